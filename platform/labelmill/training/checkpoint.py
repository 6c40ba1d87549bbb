"""Checkpoints: a folder of safetensors and one JSON file, whole or absent, independent of the ZeRO stage.

    step-00000200/
        dense.safetensors        fp32 parameters and buffers by name
        optimizer.safetensors    moments of the dense parameters by name
        head-<name>/...          rows and their optimizer state, one file a class range
        rng-<rank>.safetensors   random state of each rank
        checkpoint.json          step, cursor, stream digest, world size, size of every file; written last

The folder is filled under a temporary name and renamed when `checkpoint.json` is in it.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from labelmill.training.engine import Engine
from labelmill.training.objective import Objective

_INDEX = "checkpoint.json"


@dataclass(frozen=True)
class Position:
    """Where a run stands.

    Attributes:
        step: optimizer steps done.
        cursor: committed samples, the position of the stream.
        stream: digest of the order that the cursor belongs to.
    """

    step: int
    cursor: int
    stream: str


def save_checkpoint(root: Path, engine: Engine, position: Position, keep: int) -> Path:
    """Writes `root/step-NNNNNNNN` on all ranks together and drops all but the newest `keep`. Collective."""
    rank, world = dist.get_rank(), dist.get_world_size()
    target = root / f"step-{position.step:08d}"
    part = root / f".{target.name}.part"
    if rank == 0:
        shutil.rmtree(part, ignore_errors=True)
        for name in engine.objective.heads:
            (part / f"head-{name}").mkdir(parents=True)
        part.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    dense, moments = engine.dense_state(), engine.optimizer_state()
    if rank == 0:
        save_file(_owned(dense), part / "dense.safetensors")
        save_file(_owned(moments), part / "optimizer.safetensors")
    save_file({"torch": torch.get_rng_state()}, part / f"rng-{rank}.safetensors")
    heads: dict[str, list[dict[str, Any]]] = {}
    for name, head in engine.objective.heads.items():
        heads[name] = gather(head.save(part / f"head-{name}"))
    dist.barrier()
    if rank == 0:
        files = {str(f.relative_to(part)): f.stat().st_size for f in sorted(part.rglob("*.safetensors"))}
        index = {
            "step": position.step,
            "cursor": position.cursor,
            "stream": position.stream,
            "world": world,
            "optimizer_steps": engine.optimizer_steps,
            "heads": heads,
            "files": files,
        }
        with open(part / _INDEX, "w", encoding="utf-8") as out:
            json.dump(index, out, indent=1)
            out.flush()
            os.fsync(out.fileno())
        shutil.rmtree(target, ignore_errors=True)
        part.rename(target)
        for old in _complete(root)[:-keep]:
            shutil.rmtree(old, ignore_errors=True)
    dist.barrier()
    return target


def gather(value: Any) -> list[Any]:
    """`value` of every rank, in rank order, without the empty ones."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, value)
    return [item for item in everyone if item]


def _owned(state: dict[str, Tensor]) -> dict[str, Tensor]:
    # safetensors refuses tensors that share memory (tied weights)
    return {name: value.contiguous() for name, value in state.items()}


def _complete(root: Path) -> list[Path]:
    """Checkpoints whose every file is there with its recorded size, oldest first."""
    found = []
    for folder in sorted(root.glob("step-*")):
        index = folder / _INDEX
        if not index.is_file():
            continue
        files = json.loads(index.read_text(encoding="utf-8"))["files"]
        if all((folder / name).is_file() and (folder / name).stat().st_size == size for name, size in files.items()):
            found.append(folder)
    return found


def latest_checkpoint(root: Path) -> Path | None:
    """The newest complete checkpoint below `root`."""
    found = _complete(root)
    return found[-1] if found else None


def read_index(folder: Path) -> dict[str, Any]:
    """The checkpoint's JSON."""
    return json.loads((folder / _INDEX).read_text(encoding="utf-8"))


def read_dense(folder: Path) -> dict[str, Tensor]:
    """Parameters and buffers, to load into an objective before the engine is built."""
    return load_file(folder / "dense.safetensors")


def restore(folder: Path, engine: Engine, objective: Objective) -> Position:
    """Loads optimizer, heads and random state; the dense weights are already in. Every rank calls it."""
    index = read_index(folder)
    engine.load_optimizer(load_file(folder / "optimizer.safetensors"), index["optimizer_steps"])
    for name, head in objective.heads.items():
        head.load(folder / f"head-{name}", index["heads"][name])
    rng = folder / f"rng-{dist.get_rank()}.safetensors"
    if index["world"] == dist.get_world_size() and rng.is_file():
        torch.set_rng_state(load_file(rng)["torch"])
    return Position(index["step"], index["cursor"], index["stream"])
