"""The folder of a search: what is in it, and what its parts say to each other.

<output>/<job name>/search/
    search.json            the job as written, digest, MLflow run, status
    best.yaml              the best settings as a job
    report/                the report with its figures
    stages/                stages that trials share
    trials/<id>/           the run folder of a trial; besides:
        settings.jsonl     its settings; several lines where it changed them
        curve.jsonl        the metric over optimizer steps
        outcome.json       how it ended: value, steps, seconds, or the error
        console.log        what it printed
    former/                trials of a search that was stopped and began again
    kept/                  checkpoints that trials go on from, while the search runs
    tune/                  Ray Tune's own state (pickles), while the search runs
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from labelmill.job import Job, validate_job
from labelmill.search_config import SearchConfig
from labelmill.stages import write_json
from labelmill.tuning.space import with_values
from labelmill.workload import Workload, find_workload

FINAL = "final"
"""Key of a trial's last result to Tune, told when its run has ended."""


@dataclass(frozen=True)
class SearchFolder:
    """Paths of a search, and its `search.json`."""

    root: Path

    @cached_property
    def state(self) -> dict[str, Any]:
        """`search.json`, as it was when first asked for; empty if there is none."""
        return read_json(self.root / "search.json")

    def trial(self, name: str) -> Path:
        """Folder of a trial."""
        return self.root / "trials" / name

    def set_trials_aside(self) -> None:
        """Before the search begins again: its trials wait to be taken over by trials with the same settings."""
        former = self.root / "former"
        former.mkdir(exist_ok=True)
        for own in self.trial("").glob("*"):
            shutil.rmtree(former / own.name, ignore_errors=True)
            own.rename(former / own.name)

    def take_over(self, name: str, values: dict[str, Any]) -> None:
        """Makes the folder of a former trial that had these settings, and didn't fail, the one of trial `name`."""
        for before in sorted((self.root / "former").glob("*")):
            record = read_record(before)
            if record.values == values and len(record.settings) == 1 and record.status != "failed":
                with contextlib.suppress(FileNotFoundError):  # another trial was faster
                    before.rename(self.trial(name))
                    return

    @property
    def kept(self) -> Path:
        """Where checkpoints are kept for trials to go on from."""
        return self.root / "kept"

    @property
    def stop_file(self) -> Path:
        """Its presence ends the search; it says why."""
        return self.root / "stop"

    @property
    def method(self) -> Workload:
        """The workload."""
        return find_workload(self.state["raw"]["workload"])

    def job(self, values: dict[str, Any] | None = None) -> Job:
        """The job as written, or with other values. Raises JobError when it refuses them."""
        raw = with_values(self.state["raw"], values) if values is not None else self.state["raw"]
        return validate_job(raw, self.method.job_type, source=self.state["source"])

    @cached_property
    def search(self) -> SearchConfig:
        """The search section."""
        search = self.job().search
        assert search is not None
        return search


@dataclass
class Record:
    """What is known of a trial.

    Attributes:
        name: Tune's id.
        settings: what it runs or ran with: `values` by field, `time`, and `from`: {trial, step} it took weights from.
        curve: (step, value).
        outcome: `status` (finished, failed), `value`, `step`, `total`, `seconds`, `error`, `fatal`; empty if not ended.
        status: finished, stopped (by the scheduler or the time limit), failed, running.
    """

    name: str
    settings: list[dict[str, Any]] = field(default_factory=list)
    curve: list[tuple[int, float]] = field(default_factory=list)
    outcome: dict[str, Any] = field(default_factory=dict)
    status: str = "running"

    @property
    def values(self) -> dict[str, Any]:
        """The settings it ended with."""
        return self.settings[-1]["values"] if self.settings else {}

    @property
    def began(self) -> float:
        """Unix time of its first start."""
        return self.settings[0]["time"] if self.settings else time.time()

    @property
    def value(self) -> float | None:
        """The metric: of the report, else the last one known."""
        if "value" in self.outcome:
            return self.outcome["value"]
        return self.curve[-1][1] if self.curve else None

    @property
    def step(self) -> int:
        """Optimizer steps it has trained."""
        return self.outcome.get("step") or (self.curve[-1][0] if self.curve else 0)


def read_record(folder: Path) -> Record:
    """The record of a trial from its folder."""
    outcome = read_json(folder / "outcome.json")
    curve = {int(line["step"]): float(line["value"]) for line in read_lines(folder / "curve.jsonl")}
    return Record(
        folder.name,
        read_lines(folder / "settings.jsonl"),
        sorted(curve.items()),
        outcome,
        outcome.get("status", "running"),
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file; empty if it isn't there."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def read_lines(path: Path) -> list[dict[str, Any]]:
    """A file of JSON lines; a last line that a crash cut is left out."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


def append_line(path: Path, content: dict[str, Any]) -> None:
    """Adds a JSON line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as out:
        out.write(json.dumps(content) + "\n")
        out.flush()
        os.fsync(out.fileno())


def write_outcome(folder: Path, **content: Any) -> None:
    """Says how a trial ended."""
    write_json(folder / "outcome.json", content)
