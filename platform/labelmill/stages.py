"""Finished stages: what they keep, and the key by which they are found again."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from pydantic import BaseModel
from safetensors.torch import load_file
from torch import Tensor

from labelmill import __version__
from labelmill.data.manifest import Manifest, load_manifest
from labelmill.data.spec import MixedSpec, StreamSpec, identity


@dataclass(frozen=True)
class Stage:
    """A finished stage: what it returned and the folder it filled."""

    name: str
    key: str
    folder: Path
    values: Mapping[str, Any]
    seconds: float

    def __getitem__(self, name: str) -> Any:
        return self.values[name]

    def manifest(self, split: str = ".") -> Manifest:
        """The data set that the stage wrote below its folder."""
        return load_manifest(self.folder / split)


@dataclass
class Fitted:
    """What `Run.fit` leaves: exported weights, predictions, history."""

    folder: Path
    seconds: dict[str, float] = field(default_factory=dict)

    def predictions(self, name: str) -> pa.Table:
        """The rows that the objective's `predict` gave for stream `name`, in the order of the stream."""
        parts = [pq.read_table(path) for path in sorted((self.folder / "predictions" / name).glob("part-*.parquet"))]
        return pa.concat_tables(parts).sort_by("position")

    @property
    def history(self) -> list[dict[str, float]]:
        """Metric records of training, by step."""
        path = self.folder / "history.jsonl"
        records = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
        # a step run twice (crash after a record, before its checkpoint) counts as it ran last
        return sorted({record["step"]: record for record in records}.values(), key=lambda record: record["step"])

    def dense(self, prefix: str = "") -> dict[str, Tensor]:
        """Exported fp32 weights of the dense modules whose name starts with `prefix`, which is cut off."""
        state = load_file(self.folder / "export" / "dense.safetensors")
        return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}

    def head_shards(self, head: str) -> list[dict[str, Any]]:
        """Exported row files of a head by class range: {file, start, stop}, below `export/head-<name>`."""
        index = json.loads((self.folder / "export" / "export.json").read_text(encoding="utf-8"))
        return sorted(index["heads"][head], key=lambda entry: entry["start"])

    def head_rows(self, head: str) -> Tensor:
        """All exported rows of a head, float32 (C, D), in one process: for heads of a moderate number of classes."""
        folder = self.folder / "export" / f"head-{head}"
        return torch.cat([load_file(folder / entry["file"])["rows"].float() for entry in self.head_shards(head)])

    @property
    def reading(self) -> list[dict[str, Any]]:
        """What each rank's streams met: samples, bytes, seconds of fetching, requests tried again, damaged places."""
        path = self.folder / "reading.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []

    @property
    def ranks(self) -> list[dict[str, Any]]:
        """The training workers as they were seen last: rank, host, steps, seconds of own work."""
        path = self.folder / "ranks.json"
        found = json.loads(path.read_text(encoding="utf-8"))["ranks"] if path.is_file() else {}
        return [{"rank": int(rank)} | state for rank, state in found.items()]

    @property
    def bad_samples(self) -> dict[str, str]:
        """Key -> reason of samples that became holes."""
        path = self.folder / "bad_samples.jsonl"
        lines = path.read_text().splitlines() if path.is_file() else []
        return dict(json.loads(line) for line in lines)


def stage_key(name: str, function: Callable[..., Any], inputs: Mapping[str, Any]) -> str:
    """Identity of a stage's work: its function and everything that goes in, by content."""
    content = {
        "name": name,
        "function": f"{function.__module__}.{function.__qualname__}",
        "version": __version__,
        "inputs": {k: fingerprint(v) for k, v in inputs.items()},
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def fingerprint(value: Any) -> Any:
    """JSON that stands for an input: data sets and streams by digest, stages by key, sections by value.

    Raises TypeError for values whose content can't be told, so that no change of them is overlooked.
    """
    if isinstance(value, Manifest):
        return {"manifest": value.digest}
    if isinstance(value, StreamSpec | MixedSpec):
        return {"stream": identity(value)}
    if isinstance(value, Stage):
        return {"stage": [value.name, value.key]}
    if isinstance(value, BaseModel):
        return {"section": json.loads(value.model_dump_json())}
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {str(k): fingerprint(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [fingerprint(v) for v in value]
    if value is None or isinstance(value, str | int | float | bool):
        return value
    raise TypeError(f"a stage's input must be data, not {type(value).__name__}")


def write_json(path: Path, value: Any) -> None:
    """Writes JSON whole or not at all."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps(value, indent=1), encoding="utf-8")
    part.replace(path)


def second_name(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """Another name for a file that is final, in place of what `target` names; a copy where the file system has no links."""
    Path(target).unlink(missing_ok=True)
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:
        shutil.copyfile(source, target)
