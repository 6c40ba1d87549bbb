"""What a run is a part of, when it is not on its own: a search gives its trials a folder, a parent and a listener."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
