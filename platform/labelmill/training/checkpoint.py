"""Checkpoints: a folder of safetensors and JSON, whole or absent, independent of ZeRO stage and number of workers.

    step-00000200/
        dense.safetensors        fp32 parameters and buffers by name
        optimizer.safetensors    moments of the dense parameters by name
        head-<name>/head.json    a head's index; beside it rows and their optimizer state by class range
        rng-<rank>.safetensors   random state of each rank
        checkpoint.json          step, cursor, stream digest, world size, size of every file; written last

The folder is filled under a temporary name and renamed when `checkpoint.json` is in it. All ranks see one file
system. In the background (`Checkpointer(background=True)`) each rank writes from a thread while training goes on.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from labelmill.heads.saving import HeadSave
from labelmill.heads.snapshot import Background
from labelmill.heads.storage import write_index
from labelmill.training.engine import Engine
from labelmill.training.objective import Objective

_INDEX = "checkpoint.json"
_POLL_S = 0.05


@dataclass(frozen=True)
class Position:
    """Where a run stands.

    Attributes:
        step: optimizer steps done.
        cursor: committed samples, the position of the stream.
        stream: digest of the order that the cursor belongs to.
        skipped: steps that were left out because a value was not finite.
    """

    step: int
    cursor: int
    stream: str
    skipped: int = 0


class CheckpointError(RuntimeError):
    """A checkpoint could not be written; the one before it is whole."""


class Checkpointer:
    """Writes checkpoints below `root` on all ranks together and keeps the newest `keep`.

    Args:
        background: `save` returns when the state is safe from further training, and a thread writes it. A checkpoint
            then appears by itself once every rank has written its part. Costs copies of the dense weights and
            moments on rank 0, and `memory_bytes` for each head on each rank (`heads.snapshot`).
        memory_bytes: of class rows kept for the writer; when they are used up, training waits for the disk.
    """

    def __init__(self, root: Path, keep: int, background: bool = False, memory_bytes: int = 2**28) -> None:
        self.root, self.keep, self.background, self.memory_bytes = root, keep, background, memory_bytes
        self._writer, self._committer = Background("checkpoint"), Background("checkpoint-commit")
        self._stop = threading.Event()

    def save(self, engine: Engine, position: Position) -> Path:
        """Writes, or begins to write, `root/step-NNNNNNNN`. Collective; never two at once.

        Raises CheckpointError, on all ranks, when this checkpoint or the one begun before could not be written.
        """
        self.finish()
        rank, world = dist.get_rank(), dist.get_world_size()
        target = self.root / f"step-{position.step:08d}"
        part = self.root / f".{target.name}.part"
        if rank == 0:
            for left in self.root.glob(".step-*.part"):
                shutil.rmtree(left, ignore_errors=True)
            for name in engine.objective.heads:
                (part / f"head-{name}").mkdir(parents=True)
            part.mkdir(parents=True, exist_ok=True)
        dense, moments = engine.dense_state(), engine.optimizer_state()
        dist.barrier()
        files: dict[str, dict[str, Tensor]] = {f"rng-{rank}.safetensors": {"torch": torch.get_rng_state()}}
        if rank == 0:
            files |= {"dense.safetensors": _owned(dense), "optimizer.safetensors": _owned(moments)}
        memory = self.memory_bytes if self.background else None
        heads = {name: HeadSave(head, part / f"head-{name}", memory) for name, head in engine.objective.heads.items()}
        content = {
            "step": position.step,
            "cursor": position.cursor,
            "stream": position.stream,
            "skipped": position.skipped,
            "world": world,
            "optimizer_steps": engine.optimizer_steps,
            "heads": {name: head.num_classes for name, head in engine.objective.heads.items()},
        }
        self._stop.clear()
        self._writer.start(lambda: _write_part(part, rank, files, heads))
        if rank == 0:
            self._committer.start(lambda: _commit(part, target, world, content, self.keep, self._stop))
        if not self.background:
            self.finish()
        return target

    def finish(self) -> None:
        """Waits for the checkpoint being written. Collective. Raises CheckpointError on all ranks if it failed."""
        error = self._error(self._writer)
        # no rank waits for the others' files before it knows that all of them have been written
        errors = gather(error and f"rank {dist.get_rank()}: {error}")
        if errors:
            self._stop.set()
        committed = self._error(self._committer)
        errors = gather(committed if committed and not errors else "") or errors
        if errors:
            raise CheckpointError(f"{self.root}: a checkpoint could not be written: {'; '.join(errors)}")

    def close(self, timeout_s: float = 120.0) -> None:
        """Lets the checkpoint being written end, when training ends early; not collective, raises nothing."""
        for work in (self._writer, self._committer):
            with contextlib.suppress(Exception):  # the error that ended training is the one to show
                work.finish(timeout_s)

    @staticmethod
    def _error(work: Background) -> str:
        try:
            work.finish()
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return ""


def save_checkpoint(root: Path, engine: Engine, position: Position, keep: int) -> Path:
    """Writes `root/step-NNNNNNNN` on all ranks together and drops all but the newest `keep`. Collective."""
    return Checkpointer(root, keep).save(engine, position)


def _write_part(
    part: Path,
    rank: int,
    files: Mapping[str, Mapping[str, Tensor]],
    heads: Mapping[str, HeadSave],
) -> None:
    """Writes a rank's files, then what rank 0 has to know of them."""
    done: dict[str, Any] = {"error": "interrupted"}
    try:
        # heads first: training may be waiting for their rows to be written
        saved = {name: head.write() for name, head in heads.items()}
        for name, tensors in files.items():
            save_file(dict(tensors), part / name)
            _sync(part / name)
        done = {"heads": saved}
    except BaseException as error:
        done = {"error": f"{type(error).__name__}: {error}"}
        raise
    finally:
        for head in heads.values():
            head.close()
        _write_json(part / f"part-{rank}.json", done)


def _commit(part: Path, target: Path, world: int, content: Mapping[str, Any], keep: int, stop: threading.Event) -> None:
    """Waits for every rank's part, then makes the folder a checkpoint."""
    parts: list[dict[str, Any]] = []
    for rank in range(world):
        path = part / f"part-{rank}.json"
        while not path.is_file():
            if stop.is_set():
                return
            time.sleep(_POLL_S)
        parts.append(json.loads(path.read_text(encoding="utf-8")))
        if "error" in parts[-1]:
            return  # that rank tells
    for name, num_classes in content["heads"].items():
        write_index(part / f"head-{name}", num_classes, [done["heads"][name] for done in parts])
    for rank in range(world):
        (part / f"part-{rank}.json").unlink()
    listed = [*part.rglob("*.safetensors"), *part.rglob("head.json")]
    files = {str(f.relative_to(part)): f.stat().st_size for f in sorted(listed)}
    _write_json(part / _INDEX, dict(content) | {"files": files})
    shutil.rmtree(target, ignore_errors=True)
    part.rename(target)
    _sync(target.parent)
    for old in _complete(target.parent)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as out:
        json.dump(content, out, indent=1)
        out.flush()
        os.fsync(out.fileno())
    partial.rename(path)


def _sync(path: Path) -> None:
    """Flushes a file, or a folder's names, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
        head.load(folder / f"head-{name}")
    rng = folder / f"rng-{dist.get_rank()}.safetensors"
    if index["world"] == dist.get_world_size() and rng.is_file():
        torch.set_rng_state(load_file(rng)["torch"])
    return Position(index["step"], index["cursor"], index["stream"], index.get("skipped", 0))
