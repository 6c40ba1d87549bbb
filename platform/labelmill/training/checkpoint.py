"""Checkpoints: a folder of safetensors and JSON, whole or absent, independent of ZeRO stage and number of workers.

    step-00000200/
        dense.safetensors        fp32 parameters and buffers by name
        optimizer.safetensors    moments of the dense parameters by name
        head-<name>/head.json    a head's index; beside it rows and their optimizer state by class range
        rng-<rank>.safetensors   random state of each rank
        checkpoint.json          step, cursor, stream digest, world size, size and sha256 of every file; written last

The folder is filled under a temporary name and renamed when `checkpoint.json` is in it. All ranks see one file
system. In the background (`Checkpointer(background=True)`) each rank writes from a thread while training goes on.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from labelmill.errors import DataError
from labelmill.heads.saving import HeadSave
from labelmill.heads.snapshot import Background
from labelmill.heads.storage import write_index
from labelmill.training.checkpoint_copies import Copies
from labelmill.training.checkpoint_files import (
    INDEX,
    Position,
    check_file,
    complete,
    fenced_off,
    folder_name,
    latest_checkpoint,
    read_dense,
    read_file,
    read_index,
    sha256_of,
    sync,
    write_json,
)
from labelmill.training.engine import Engine
from labelmill.training.events import Sink
from labelmill.training.objective import Objective

__all__ = [
    "CheckpointError",
    "Checkpointer",
    "Position",
    "gather",
    "latest_checkpoint",
    "read_dense",
    "read_index",
    "restore",
    "save_checkpoint",
]

_POLL_S = 0.05
_AGAIN_S = 2.0  # before the last checkpoint is tried again
_GRACE_S = 5.0  # for the other ranks' parts, when training ends early


class CheckpointError(RuntimeError):
    """A checkpoint could not be written; the one before it is whole."""


@dataclass(frozen=True)
class Commit:
    """What making a folder a checkpoint needs: who may, how many stay, where a copy goes."""

    keep: int
    attempt: int | None = None
    copier: Copier | None = None


class Checkpointer:
    """Writes checkpoints below `root` on all ranks together and keeps the newest `keep`.

    Args:
        background: `save` returns when the state is safe from further training, and a thread writes it. A checkpoint
            then appears by itself once every rank has written its part. Costs copies of the dense weights and
            moments on rank 0, and `memory_bytes` for each head on each rank (`heads.snapshot`).
        memory_bytes: of class rows kept for the writer; when they are used up, training waits for the disk.
        attempt: of `checkpoint_files.raise_fence` for `root`'s parent: when another attempt has begun, nothing is
            committed any more. None: nobody else writes here.
        copies: where every checkpoint is copied to, by a thread of rank 0; None: nowhere.
        note: takes what went wrong with a copy. Training goes on without copies.
    """

    def __init__(
        self,
        root: Path,
        keep: int,
        background: bool = False,
        memory_bytes: int = 2**28,
        attempt: int | None = None,
        copies: Copies | None = None,
        note: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.root, self.background, self.memory_bytes = root, background, memory_bytes
        self._commit = Commit(keep, attempt, Copier(copies, note) if copies else None)
        self._writer, self._committer = Background("checkpoint"), Background("checkpoint-commit")
        self._stop = threading.Event()

    def save(self, engine: Engine, position: Position) -> Path:
        """Writes, or begins to write, `root/step-NNNNNNNN`. Collective; never two at once.

        Raises CheckpointError, on all ranks, when this checkpoint or the one begun before could not be written.
        """
        self.finish()
        rank, world = dist.get_rank(), dist.get_world_size()
        target = self.root / folder_name(position.step)
        part = self.root / f".{target.name}.{self._commit.attempt or 0}.part"
        error = ""
        if rank == 0:
            self.tidy()
            try:
                for name in engine.objective.heads:
                    (part / f"head-{name}").mkdir(parents=True)
                part.mkdir(parents=True, exist_ok=True)
            except OSError as failed:
                error = f"{type(failed).__name__}: {failed}"
        self._raise(gather(error))
        dense, moments = engine.dense_state(), engine.optimizer_state()
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
            self._committer.start(lambda: _make_whole(part, target, world, content, self._commit, self._stop))
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
        self._raise(gather(committed if committed and not errors else "") or errors)

    def _raise(self, errors: list[str]) -> None:
        """CheckpointError on all ranks if there are errors; what was written so far gives its room back."""
        if errors:
            if dist.get_rank() == 0:
                self.tidy()
            raise CheckpointError(f"{self.root}: a checkpoint could not be written: {'; '.join(errors)}")

    def tidy(self) -> None:
        """Removes what was begun and never became a checkpoint. Not while one is being written."""
        for pattern in (".step-*.part", ".step-*.fetched"):
            for left in self.root.glob(pattern):
                shutil.rmtree(left, ignore_errors=True)

    def close(self, timeout_s: float = 120.0) -> None:
        """Lets the checkpoint being written and its copy end, in about so long; not collective, raises nothing."""
        with contextlib.suppress(Exception):  # the error that ended training is the one to show
            self._writer.finish(timeout_s)
        with contextlib.suppress(Exception):
            self._committer.finish(min(_GRACE_S, timeout_s))
        self._stop.set()  # the part of a rank that is gone won't come
        with contextlib.suppress(Exception):
            self._committer.finish(timeout_s)
        if self._commit.copier:
            self._commit.copier.close(timeout_s)
            _drop_old(self.root, self._commit)

    @staticmethod
    def _error(work: Background) -> str:
        try:
            work.finish()
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return ""


class Saving:
    """Saves in a loop that outlives failures: up to `limit` checkpoints in a row may fail, with a note each."""

    def __init__(self, saver: Checkpointer, engine: Engine, limit: int, sink: Sink | None) -> None:
        self._saver, self._engine, self._limit, self._sink = saver, engine, limit, sink
        self._failed = 0
        self._begun = False
        self._last: Position | None = None

    def __call__(self, position: Position) -> bool:
        """Begins a checkpoint; whether that went well. Collective. Raises CheckpointError after too many failures."""
        self._last = position
        self._settle()
        self._begun = self._try(lambda: self._saver.save(self._engine, position))
        return self._begun

    def finish(self) -> None:
        """Waits for the last checkpoint and writes it again if it failed. Collective. Raises CheckpointError."""
        while self._last is not None and not self._settle():
            time.sleep(_AGAIN_S)
            self(self._last)

    def _settle(self) -> bool:
        """Whether the checkpoint begun last is written."""
        begun, self._begun = self._begun, False
        if not begun or not self._try(self._saver.finish):
            return False
        self._failed = 0
        return True

    def _try(self, work: Callable[[], object]) -> bool:
        try:
            work()
        except CheckpointError as error:
            self._failed += 1
            if self._failed > self._limit:
                raise
            if self._sink:
                self._sink.post(
                    kind="note", text=f"{error}. Training goes on ({self._failed} of {self._limit} failures)."
                )
            return False
        return True


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
        sums = {}
        for name, tensors in files.items():
            save_file(dict(tensors), part / name)
            sync(part / name)
            sums[name] = sha256_of(part / name)
        done = {"heads": saved, "sha256": sums}
    except BaseException as error:
        done = {"error": f"{type(error).__name__}: {error}"}
        raise
    finally:
        for head in heads.values():
            head.close()
        write_json(part / f"part-{rank}.json", done)


def _make_whole(
    part: Path, target: Path, world: int, content: Mapping[str, Any], how: Commit, stop: threading.Event
) -> None:
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
    sums = {name: value for done in parts for name, value in done["sha256"].items()}
    listed = [*part.rglob("*.safetensors"), *part.rglob("head.json")]
    files = {}
    for file in sorted(listed):
        name = str(file.relative_to(part))
        if file.name == "head.json":
            sums[name] = sha256_of(file)
        files[name] = {"bytes": file.stat().st_size, "sha256": sums.get(name)}
    write_json(part / INDEX, dict(content) | {"files": files})
    if fenced_off(target.parent.parent, how.attempt):
        shutil.rmtree(part, ignore_errors=True)
        raise CheckpointError(f"{target}: another attempt of this run has begun; this one no longer writes")
    shutil.rmtree(target, ignore_errors=True)
    part.rename(target)
    sync(target.parent)
    _drop_old(target.parent, how)
    if how.copier:
        how.copier.wants(target)


def _drop_old(root: Path, how: Commit) -> None:
    """Leaves the newest, and the one that is being copied."""
    busy = how.copier.busy_with if how.copier else None
    for old in complete(root)[: -how.keep]:
        if old != busy:
            shutil.rmtree(old, ignore_errors=True)


class Copier:
    """Copies checkpoints from a thread, always the newest next: training never waits for the place."""

    def __init__(self, copies: Copies, note: Callable[[str], None]) -> None:
        self._copies, self._note = copies, note
        self._turn = threading.Condition()
        self._next: Path | None = None
        self._closing = False
        self._thread: threading.Thread | None = None
        self.busy_with: Path | None = None

    def wants(self, folder: Path) -> None:
        """This checkpoint is to be copied; one that waited before it is passed over."""
        with self._turn:
            self._next = folder
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="checkpoint-copy", daemon=True)
                self._thread.start()
            self._turn.notify_all()

    def _run(self) -> None:
        while True:
            with self._turn:
                self._turn.wait_for(lambda: self._next is not None or self._closing)
                if self._next is None:
                    return
                folder, self._next = self._next, None
                self.busy_with = folder
            try:
                self._copies.put(folder)
            except (DataError, OSError) as error:
                self._note(f"checkpoint {folder.name} could not be copied to {self._copies.place}: {error}")
            with self._turn:
                self.busy_with = None

    def close(self, timeout_s: float) -> None:
        """Waits until the newest checkpoint is copied, at most so long."""
        with self._turn:
            self._closing = True
            self._turn.notify_all()
        if self._thread is not None:
            self._thread.join(timeout_s)
            if self._thread.is_alive():
                self._note(f"the last checkpoint was not copied to {self._copies.place} within {timeout_s:.0f} s")


def gather(value: Any) -> list[Any]:
    """`value` of every rank, in rank order, without the empty ones."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, value)
    return [item for item in everyone if item]


def _owned(state: dict[str, Tensor]) -> dict[str, Tensor]:
    # safetensors refuses tensors that share memory (tied weights)
    return {name: value.contiguous() for name, value in state.items()}


def restore(folder: Path, engine: Engine, objective: Objective) -> Position:
    """Loads optimizer, heads and random state, verified; the dense weights are already in. Every rank calls it.

    Raises DataError for damaged files and for those of another head.
    """
    index = read_index(folder)
    engine.load_optimizer(read_file(folder, "optimizer.safetensors", index), index["optimizer_steps"])
    for name, head in objective.heads.items():
        check_file(folder, f"head-{name}/head.json", index)
        head.load(folder / f"head-{name}")
    if index["world"] == dist.get_world_size():
        torch.set_rng_state(read_file(folder, f"rng-{dist.get_rank()}.safetensors", index)["torch"])
    return Position(index["step"], index["cursor"], index["stream"], index.get("skipped", 0))
