"""A loader as a process of its own, run and measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stream_measure import Tree

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RIVALS = ("webdataset", "mosaicml", "litdata")
DEFAULT = ("labelmill", *(f"{r}-w{w}" for r in RIVALS for w in (2, 0)), "ray-webdataset")
EXTRA = ("labelmill-tar", "labelmill-ordered", "labelmill-s3", *(f"{r}-w2-shuffle" for r in RIVALS))
_NAIVE_SAMPLES = {"jp": 6_000, "fm": 20_000, "tx": 40_000}  # its rate doesn't depend on it, and it is slow


@dataclass
class Options:
    """What main was asked for."""

    data: Path
    rivals: str
    samples: int
    passes: int = 2
    uri: str | None = None


def command(name: str, loader: str, options: Options) -> list[str]:
    """The command line of a loader's process."""
    common = ["run", name]
    tail = ["--data", str(options.data), "--passes", str(options.passes)]
    samples = options.samples
    if loader.split("-")[0] in RIVALS:
        kind, workers, *shuffle = loader.split("-")
        tail += ["--workers", workers.removeprefix("w"), *(["--shuffle"] if shuffle else [])]
        return [options.rivals, str(HERE / "stream_rivals.py"), *common, kind, *tail, "--samples", str(samples)]
    if loader == "ray-webdataset":
        samples = min(samples, _NAIVE_SAMPLES[name])
    if options.uri and loader == "labelmill-s3":
        tail += ["--uri", options.uri]
    return [sys.executable, str(HERE / "stream_ours.py"), *common, loader, *tail, "--samples", str(samples)]


def environment() -> dict[str, str]:
    """For all loaders alike: one thread per process in numerical libraries, as DataLoader workers have."""
    path = f"{ROOT / 'platform'}{os.pathsep}{ROOT}"
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "LITDATA_DISABLE_VERSION_CHECK": "1"}


def run(name: str, loader: str, options: Options, memory: bool = False) -> list[dict[str, Any]]:
    """A loader's process from start to end: a record for each pass. Raises RuntimeError with its output."""
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with (
        tempfile.TemporaryFile("w+") as errors,  # a pipe nobody reads would fill up and stop the child
        subprocess.Popen(command(name, loader, options), **pipes, stderr=errors, env=environment()) as child,
    ):
        assert child.stdin is not None
        assert child.stdout is not None
        tree = Tree(child.pid, memory, period=0.1 if memory else 0.25)
        records, noise = [], []
        before, busy = (0.0, 0.0), 0.0
        for line in child.stdout:
            if not line.startswith('{"event"'):
                noise.append(line)
                continue
            event = json.loads(line)
            if event["event"] == "begin":
                before, busy = tree.cpu(), tree.machine()
            else:
                after, all_busy = tree.cpu(), tree.machine()
                own, daemons = after[0] - before[0], after[1] - before[1]
                records.append(_record(event, own, daemons, all_busy - busy))
            if memory:
                tree.look()
            child.stdin.write("\n")
            child.stdin.flush()
        code = child.wait()
        tree.close()
        errors.seek(0)
        noise += errors.readlines()
    if code or not records:
        raise RuntimeError(f"{name} {loader}: exit status {code}\n{''.join(noise[-30:])}")
    if memory:
        peak = tree.peak
        for record in records:
            record |= {"peak_mb": peak.total, "shared_mb": peak.shared, "files_mb": peak.files}
            record["daemons_mb"] = tree.peak_daemons
            record["parts_mb"] = {f"{name} x{count}": round(mb) for name, (mb, count) in sorted(peak.parts.items())}
    return records


def _record(event: dict[str, Any], cpu: float, daemons: float, machine: float) -> dict[str, Any]:
    samples = event["samples"]
    rest_s, rest = event["wall_s"] - event["first_s"], samples - event["first"]
    return {
        "samples": samples,
        "wall_s": event["wall_s"],
        "first_s": event["first_s"],
        "rate": samples / event["wall_s"],
        "steady": rest / rest_s if rest_s > 0 else 0.0,
        "cpu_per_1k": 1000 * cpu / samples,
        "daemon_cpu_per_1k": 1000 * daemons / samples,
        "others": max(0.0, machine - cpu - daemons) / (event["wall_s"] * (os.cpu_count() or 1)),
    }


def limit(name: str, options: Options) -> dict[str, Any]:
    """The decode limit, in a process of its own."""
    line = [sys.executable, str(HERE / "stream_ours.py"), "limit", name, "--data", str(options.data)]
    done = subprocess.run(line, env=environment(), check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])
