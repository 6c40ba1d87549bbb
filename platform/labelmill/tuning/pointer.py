"""Checkpoints of trials: places in our own checkpoints, which any number of workers reads, never copies through Ray.

What Tune holds for a trial is a folder with `pointer.json`: which trial, which stage, which step, and the folder of the
checkpoint. That folder consists of hard links to the files the training wrote, so it costs no bytes while the training's own
is there, and stays when the training drops it.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from labelmill.stages import second_name

POINTER = "pointer.json"
_STAY = 2  # newest checkpoints of a trial that stay: another trial may be about to start from them


@dataclass(frozen=True)
class Pointer:
    """A place that a trial can go on from.

    Attributes:
        trial: whose training wrote the checkpoint.
        stage: name of the stage that trains.
        step: optimizer steps done.
        path: folder of the checkpoint.
    """

    trial: str
    stage: str
    step: int
    path: str

    def save(self) -> str:
        """A temporary folder that holds the pointer, for Tune to take."""
        folder = tempfile.mkdtemp(prefix="labelmill-pointer-")
        Path(folder, POINTER).write_text(json.dumps(asdict(self)), encoding="utf-8")
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> Pointer | None:
        """The pointer that Tune gave back; None when there is none."""
        path = Path(folder, POINTER)
        return cls(**json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None


def keep(checkpoint: Path, trial: str, stage: str, step: int, kept: Path) -> Pointer | None:
    """Keeps a training's checkpoint below `kept/<trial>`; None when the training has dropped it already."""
    target = kept / trial / checkpoint.name
    if not (checkpoint / "checkpoint.json").is_file():
        return None
    try:
        link_folder(checkpoint, target)
    except FileNotFoundError:
        return None
    return Pointer(trial, stage, step, str(target))


def place(pointer: Pointer, checkpoints: Path) -> None:
    """Makes the pointer's checkpoint the only one of a training that has not begun or is to go on from there."""
    shutil.rmtree(checkpoints, ignore_errors=True)
    link_folder(Path(pointer.path), checkpoints / Path(pointer.path).name)


def sweep(kept: Path, needed: set[str]) -> None:
    """Drops kept checkpoints that no trial is to start from, except each trial's newest."""
    for folder in kept.glob("*"):
        for old in sorted(folder.glob("step-*"))[:-_STAY]:
            if str(old) not in needed:
                shutil.rmtree(old, ignore_errors=True)


def link_folder(source: Path, target: Path) -> None:
    """A second name for every file of a folder; a copy where the file system has no links. Whole or not at all."""
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    shutil.rmtree(part, ignore_errors=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(source, part, copy_function=second_name)
    shutil.rmtree(target, ignore_errors=True)
    part.rename(target)
