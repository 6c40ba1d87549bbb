"""From an empty process to an engine that goes on where training was: at the newest checkpoint that is sound.

All ranks use the same one. What is damaged is set aside under a name that says so, and the one before it is taken, or
a copy of it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.distributed as dist

from labelmill.errors import DataError
from labelmill.training.checkpoint import gather, restore
from labelmill.training.checkpoint_copies import Copies, newest
from labelmill.training.checkpoint_files import (
    DAMAGED,
    Position,
    latest_checkpoint,
    read_dense,
    read_index,
    set_aside,
    verify,
)
from labelmill.training.engine import Engine, load_dense
from labelmill.training.initial import load_heads, load_weights
from labelmill.training.objective import Objective, Progress

if TYPE_CHECKING:
    from labelmill.training.worker import FitTask

Note = Callable[[str], None]
Value = TypeVar("Value")


def begin(
    task: FitTask,
    device: torch.device,
    copies: Copies | None,
    progress: Progress,
    note: Note,
    lap: Callable[[str], None] = lambda part: None,
) -> tuple[Engine, Position]:
    """The engine and its position: a sound checkpoint's, or zero with fresh rows. Collective.

    Raises DataError when every checkpoint is damaged, or the newest is of another stream, model or head.
    """
    root = task.work / "checkpoints"
    while True:
        found = _choose(root, copies, note)
        if found is None and any(root.glob(f"{DAMAGED}*")):
            raise DataError(f"{root}: no sound checkpoint is left. Start over with --fresh.")
        error: Exception | None = None
        try:
            engine, position = _open(task, found, device, progress, lap)
        except Exception as failed:  # on every rank alike only when it isn't damage
            error = failed
        if not any(gather(error is not None)):
            return engine, position
        problems = _broadcast(verify(found) if found is not None and dist.get_rank() == 0 else [])
        if found is None or not problems:
            raise error or DataError(f"{found}: another worker could not read this checkpoint; see its error.")
        if dist.get_rank() == 0:
            note(f"{'; '.join(problems)}. It is kept as {set_aside(found).name}; an older checkpoint is used.")
        dist.barrier()


def _choose(root: Path, copies: Copies | None, note: Note) -> Path | None:
    """Rank 0's choice, for all ranks."""
    chosen: Path | None = None
    error = ""
    if dist.get_rank() == 0:
        root.mkdir(parents=True, exist_ok=True)
        try:
            chosen = newest(root, latest_checkpoint(root), copies, note)
        except DataError as failed:
            error = str(failed)
    chosen, error = _broadcast((chosen, error))
    if error:
        raise DataError(error)
    return chosen


def _broadcast(value: Value) -> Value:
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def _open(
    task: FitTask, found: Path | None, device: torch.device, progress: Progress, lap: Callable[[str], None]
) -> tuple[Engine, Position]:
    torch.manual_seed(task.seed)
    objective = task.objective().to(device)
    for head in objective.heads.values():
        head.to(device)
    error: Exception | None = None
    try:
        if found:
            load_dense(objective, read_dense(found))
        else:
            load_weights(objective, task.initial)
    except Exception as failed:
        error = failed
    if any(gather(error is not None)):  # no rank may enter the engine's collectives alone
        raise error or DataError(f"{found}: another worker could not read this checkpoint; see its error.")
    engine = Engine(objective, task.config, device)
    lap("build model")
    position = _position(task, engine, objective, found, progress)
    lap("initialise head" if not found else "restore checkpoint")
    return engine, position


def _position(task: FitTask, engine: Engine, objective: Objective, found: Path | None, progress: Progress) -> Position:
    stream = task.train.digest if task.train else ""
    if found is None:
        objective.start(progress)
        load_heads(engine, task.initial)
        return Position(0, 0, stream)
    expected = read_index(found)["stream"]
    if task.train and expected != stream:
        raise DataError(
            f"{found}: this checkpoint belongs to another data set, seed or shuffle window (stream {expected[:12]}, the "
            f"job has {stream[:12]}). Restore those settings, or start over with --fresh."
        )
    return restore(found, engine, objective)
