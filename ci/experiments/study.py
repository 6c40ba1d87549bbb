"""What experiments share: parts of a data set cut by key, runs of a job under many settings, tables of mean and spread.

A run that has finished is not run again, so a study that was stopped goes on where it was.
"""

from __future__ import annotations

import hashlib
import io
import json
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from labelmill import api
from labelmill.data import corrections
from labelmill.data.manifest import Manifest, load_manifest
from labelmill.data.shards import read_labels

ROOT = Path(__file__).resolve().parents[2]
RUNS = ROOT / "runs" / "experiments"
HERE = {"cluster.workers": 1, "cluster.in_process": True, "tracking.system_metrics": False, "output": str(RUNS)}

Metrics = Mapping[str, float]


def cut(source: Path, out: Path, start: int, stop: int) -> Path:
    """A version of a data set with the samples `start`..`stop` in the order of a hash of their keys; made once."""
    if not (out / "manifest.json").is_file():
        data = load_manifest(str(source))
        order = sorted(_keys(data), key=lambda key: hashlib.blake2b(key.encode(), digest_size=8).digest())
        away = order[:start] + order[stop:]
        corrections.drop(data, out, away, {"part": f"{start}..{stop} by key"}, overwrite=True)
    return out


def _keys(data: Manifest) -> list[str]:
    return [key for i in range(len(data.shards)) for key in read_labels(data, i).column("key").to_pylist()]


def run(job: str, name: str, **settings: Any) -> Metrics:
    """Metrics of a job under settings (dots of a field as two underscores), trained in this process."""
    values = HERE | {"name": name} | {key.replace("__", "."): value for key, value in settings.items()}
    overrides = [f"{key}={json.dumps(value, default=str)}" for key, value in values.items()]
    began = time.monotonic()
    report = api.run(ROOT / "workloads" / job, overrides, console=Console(file=io.StringIO()))
    print(f"{time.strftime('%H:%M:%S')} {name}: {time.monotonic() - began:.1f} s", flush=True)
    return report.metrics


def best(found: Mapping[Any, float]) -> Any:
    """The setting with the highest value; the first of equals."""
    return max(found, key=lambda key: found[key])


def spread(values: Sequence[float], scale: float = 100.0, digits: int = 1) -> str:
    """`mean ± standard deviation` over seeds, in percent unless `scale` says otherwise."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{scale * statistics.mean(values):.{digits}f} ± {scale * deviation:.{digits}f}"


def gain(values: Sequence[float], base: Sequence[float]) -> str:
    """`mean of the differences (seeds in which it is positive)`, paired by seed."""
    differences = [a - b for a, b in zip(values, base, strict=True)]
    return f"{100 * statistics.mean(differences):+.1f} ({sum(d > 0 for d in differences)}/{len(differences)})"


def paired(values: Sequence[float], base: Sequence[float]) -> str:
    """`gain` with the paired t: mean of the differences over its standard error."""
    differences = [a - b for a, b in zip(values, base, strict=True)]
    error = statistics.stdev(differences) / len(differences) ** 0.5
    return f"{gain(values, base)[:-1]}, t {statistics.mean(differences) / error if error else 0.0:+.1f})"


def table(head: Iterable[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table."""
    names = list(head)
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def write(family: str, name: str, text: str) -> None:
    """Prints a result and keeps it in `runs/experiments/<family>-<name>.md`."""
    RUNS.mkdir(parents=True, exist_ok=True)
    (RUNS / f"{family}-{name}.md").write_text(text + "\n", encoding="utf-8")
    print(f"\n{text}\n", flush=True)
