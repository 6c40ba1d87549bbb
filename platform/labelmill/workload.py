"""Workloads: how the engine finds methods without importing them.

A method is a module with one function marked `@workload(name, JobType)`; its package announces it under the
entry point group `labelmill.workloads` (name = the method, value = the module). A user's own package adds
methods the same way.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import Distribution, EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

from labelmill.errors import JobError, did_you_mean
from labelmill.job import Job, read_job_file, validate_job

if TYPE_CHECKING:
    from labelmill.run import Run

GROUP = "labelmill.workloads"
ENGINE_METRICS = ("train/loss", "train/grad_norm", "train/samples_per_second")
"""What every training reports each `train.log_every` steps."""


@dataclass(frozen=True)
class Workload:
    """A method: its name, the type of its jobs, and the function that runs one.

    Attributes:
        metrics: names in its report that a search may compare trials by; empty: not told, a trial shows.
        training_metrics: the same of what is known while it trains, besides the engine's (`ENGINE_METRICS`).
    """

    name: str
    job_type: type[Job]
    run: Callable[[Any, Run], None]
    doc: str
    metrics: tuple[str, ...] = ()
    training_metrics: tuple[str, ...] = ()

    @property
    def summary(self) -> str:
        """First line of the method's module docstring."""
        return self.doc.strip().splitlines()[0]


def workload(
    name: str, job_type: type[Job], metrics: Iterable[str] = (), training_metrics: Iterable[str] = ()
) -> Callable[[Callable[[Any, Run], None]], Workload]:
    """Marks the function that runs a method; the module's docstring is its card. Metrics: see `Workload`."""

    def mark(function: Callable[[Any, Run], None]) -> Workload:
        module = inspect.getmodule(function)
        doc = (module.__doc__ if module else None) or function.__doc__ or name
        return Workload(name, job_type, function, doc, tuple(metrics), tuple(training_metrics))

    return mark


def _announced() -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=GROUP)}


def workload_names() -> list[str]:
    """Names of every method that an installed package announces."""
    return sorted(_announced())


def find_workload(name: str) -> Workload:
    """The method called `name`. Raises JobError with the nearest known name."""
    known = _announced()
    if name not in known:
        raise JobError(f"workload {name!r} is not known.{did_you_mean(name, known)} `labelmill workloads` lists them.")
    module = importlib.import_module(known[name].value.partition(":")[0])
    found = [value for value in vars(module).values() if isinstance(value, Workload) and value.name == name]
    if not found:
        raise JobError(f"{module.__name__} is announced as workload {name!r} but has no @workload({name!r}, ...).")
    return found[0]


def card(name: str) -> str:
    """The method card: the section of the family's README that names the method, else the module's docstring."""
    entry = _announced().get(name)
    method = find_workload(name)
    if entry is not None:
        module = importlib.import_module(entry.value.partition(":")[0])
        readme = Path(inspect.getfile(module)).parent / "README.md"
        if readme.is_file():
            section = _section(readme.read_text(encoding="utf-8"), name)
            if section:
                return section
    return method.doc


def _section(markdown: str, name: str) -> str:
    """The `## ...` section whose heading holds `name` in backquotes."""
    lines = markdown.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith("## ") and f"`{name}`" in line), None)
    if start is None:
        return ""
    stop = next((i for i in range(start + 1, len(lines)) if lines[i].startswith("## ")), len(lines))
    return "\n".join(lines[start:stop]).strip()


def load_job(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> tuple[Workload, Job]:
    """Reads and validates a job file with the job type of the workload that it names."""
    return check_job(read_job_file(path, overrides), str(path))


def check_job(raw: Mapping[str, Any], source: str) -> tuple[Workload, Job]:
    """Validates a job file's mapping with the job type of the workload that it names; `source` names it in errors."""
    name = raw.get("workload")
    if not isinstance(name, str):
        raise JobError(f"{source}: workload: this field is required. Known: {', '.join(workload_names())}.")
    try:
        method = find_workload(name)
    except JobError as error:
        raise JobError(f"{source}: {error}") from None
    return method, validate_job(raw, method.job_type, source=source)


def distribution_of(name: str) -> Distribution | None:
    """The installed distribution that announces the method called `name`."""
    entry = _announced().get(name)
    return entry.dist if entry else None
