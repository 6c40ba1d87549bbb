"""What a run is a part of, when it is not on its own: a search gives its trials a folder, a parent and a listener."""

from __future__ import annotations

import contextlib
import fcntl
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Fit = Callable[..., dict[str, float]]


@dataclass(frozen=True)
class Host:
    """How a run is embedded.

    Attributes:
        folder: the run's folder, instead of `<output>/<name>`.
        parent_run_id: of the MLflow run that it is nested in.
        tags: of its MLflow run.
        fit: trains a task, as `training.fit.fit` does.
        shared_stages: folder where finished stages that no training went into are shared with other runs.
        before_fit: called with the run and the folder of a fit before it starts.
        on_event: called with the folder of a fit and an event of it, after the run has taken note.
        patience_s: seconds to wait for a process that still holds the run's folder.
    """

    folder: Path
    parent_run_id: str | None = None
    tags: Mapping[str, str] = field(default_factory=dict)
    fit: Fit | None = None
    shared_stages: Path | None = None
    before_fit: Callable[[Any, Path], None] = lambda run, folder: None
    on_event: Callable[[Path, dict[str, Any]], None] = lambda folder, event: None
    patience_s: float = 0.0


class TrainsHereError(Exception):
    """A stage in a shared folder wants to train.

    Weights of a run may have come from another run, so a key doesn't tell what is in a stage that trains: it goes into the
    run's own folder.
    """


@contextlib.contextmanager
def turn(folder: Path, name: str) -> Iterator[Path]:
    """A shared stage's folder, for one run at a time.

    Raises TrainsHereError when the stage called `name` has turned out to be one that trains; its folder is gone then.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    trains = folder.with_name(f".{name}.trains")
    if trains.is_file():
        raise TrainsHereError
    with open(folder.with_name(f".{folder.name}.lock"), "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield folder
        except TrainsHereError:
            shutil.rmtree(folder, ignore_errors=True)
            trains.touch()
            raise
