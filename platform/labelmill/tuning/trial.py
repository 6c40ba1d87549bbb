"""One trial of a search: a run with some settings, in a process of its own, that tells Tune how it is doing.

What it tells comes from the run's own events (metrics and checkpoints of training) and its report: a workload needs to know
nothing of a search.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from labelmill.errors import ClusterError, TrackingError, UserError
from labelmill.host import Host
from labelmill.job import Job
from labelmill.tuning.pointer import Pointer, keep, place
from labelmill.tuning.space import values_of
from labelmill.tuning.state import FINAL, Record, SearchFolder, append_line, read_record, write_outcome

if TYPE_CHECKING:
    from labelmill.run import Run

_PATIENCE_S = 60.0  # a killed search's processes may still be ending


class MetricError(UserError):
    """The workload doesn't report the metric that the search goes by."""


class TrialError(UserError):
    """The trial has failed before by an error of its own: only a process that dies is worth another try."""


def uses_own_process(job: Job) -> bool:
    """Whether the trials of a job train in their own process."""
    assert job.search is not None
    engine = job.search.engine
    return engine == "in_process" or (engine == "auto" and job.cluster.workers == 1)


def trial_settings(folder: SearchFolder, values: Mapping[str, Any], name: str, in_process: bool) -> dict[str, Any]:
    """The values of a trial and what the search itself sets, by dotted field."""
    written = folder.job()
    changed = {
        **values,
        "name": f"{written.name}-{name}",
        "register_as": None,
        "tracking.system_metrics": False,
        "cluster.address": None,
    }
    if in_process:
        changed["cluster.workers"] = 1
        if "min_workers" in type(written.cluster).model_fields:
            changed["cluster.min_workers"] = None
    if every := folder.search.report_steps:
        train: Any = written.train  # type: ignore[attr-defined]
        # a checkpoint and a fresh value at every comparison; one that is written when it is announced
        changed |= {
            "train.checkpoint_every": every,
            "train.checkpoint_async": False,
            "train.keep_checkpoints": max(4, train.keep_checkpoints),
        }
        field = "evaluate_every" if folder.search.metric.startswith("eval/") else "log_every"
        interval = getattr(train, field)
        changed[f"train.{field}"] = interval if interval and every % interval == 0 else every
    return changed


def trial_job(folder: SearchFolder, values: Mapping[str, Any], name: str, in_process: bool) -> Job:
    """The job of a trial. Raises JobError when the workload refuses the values."""
    return folder.job(trial_settings(folder, values, name, in_process))


class Watch:
    """Follows a trial's run and reports to Tune.

    Reports come from the first fit of the run that trains; what later fits measure shows in the run's report only.
    """

    def __init__(self, folder: SearchFolder, name: str, pointer: Pointer | None) -> None:
        self.folder, self.name, self.pointer = folder, name, pointer
        self.own, self.search = folder.trial(name), folder.search
        self.known: Record = read_record(self.own)
        self.value, self.step = self.known.value, self.known.step
        self.total = 0
        self._stage_file = self.own / "watched-stage"

    @property
    def stage(self) -> str:
        """Name of the stage that is followed; empty before the first fit."""
        return self._stage_file.read_text(encoding="utf-8") if self._stage_file.is_file() else ""

    def before_fit(self, run: Run, folder: Path) -> None:
        """A fit begins: put the checkpoint that the trial is to go on from into its place."""
        stage = folder.name.rpartition("-")[0]
        if not self.stage:
            self._stage_file.write_text(stage, encoding="utf-8")
        if self.pointer is not None and stage == self.pointer.stage:
            place(self.pointer, folder / "checkpoints")
            if self.pointer.trial != self.name:
                (folder / "history.jsonl").unlink(missing_ok=True)
        values = self.known.values
        numbers = {path: v for path, v in values.items() if isinstance(v, int | float) and not isinstance(v, bool)}
        step = self.pointer.step if self.pointer else 0
        # settings may change while a trial trains; MLflow's params can't
        run.tracker.metrics([(f"search/{path}", float(value), step, None) for path, value in numbers.items()])
        run.tracker.tags({"search.settings": json.dumps(values)})

    def on_event(self, folder: Path, event: Mapping[str, Any]) -> None:
        """An event of training."""
        if event["kind"] == "group":
            # whoever finds this trial's process gone can end its workers
            (self.own / "group").write_text(event["group"], encoding="utf-8")
        if folder.name.rpartition("-")[0] != self.stage:
            return
        if event["kind"] == "metrics":
            self.step, self.total = int(event["step"]), int(event["total"])
            if self.search.metric in event["values"]:
                self.value = float(event["values"][self.search.metric])
                append_line(self.own / "curve.jsonl", {"step": self.step, "value": self.value, "time": event["time"]})
                # what is known at the last step is told with the report
                if not self.search.pauses and self.step < self.total:
                    self._report()
        elif event["kind"] == "checkpoint" and self.search.pauses and event["step"] < event["total"]:
            step = int(event["step"])
            pointer = keep(Path(event["path"]), self.name, self.stage, step, self.folder.kept)
            if pointer is not None and self.value is not None:
                self._report(pointer)

    def _report(self, pointer: Pointer | None = None) -> None:
        """Tells Tune; it may end this process, or this thread (SystemExit), when the trial is not to go on."""
        from ray import tune

        assert self.value is not None
        if not math.isfinite(self.value):
            raise ValueError(f"{self.search.metric} is {self.value} at step {self.step}")
        result = {"value": self.value, "step": self.step, **self._budget(self.step)}
        if pointer is None:
            tune.report(result)
            return
        held = pointer.save()
        try:
            tune.report(result, checkpoint=tune.Checkpoint.from_directory(held))
        finally:
            shutil.rmtree(held, ignore_errors=True)

    def _budget(self, step: int) -> dict[str, float]:
        return {"budget": step / self.search.report_steps} if self.search.report_steps else {}

    def finish(self, metrics: Mapping[str, float], seconds: float) -> None:
        """The run has ended: its report decides."""
        value = metrics.get(self.search.metric, self.value)
        if value is None:
            raise MetricError(
                f"search.metric: the report of {self.folder.state['raw']['workload']} has no {self.search.metric!r}; it has "
                f"{', '.join(sorted(metrics))}."
            )
        if not math.isfinite(value):
            raise ValueError(f"{self.search.metric} is {value}")
        write_outcome(self.own, status="finished", value=value, step=self.step, seconds=seconds)
        self.tell_end(value)

    def tell_end(self, value: float) -> None:
        """Tells Tune that the run has ended: it is neither compared nor paused any more."""
        from ray import tune

        tune.report({"value": value, "step": self.step, **self._budget(self.step), FINAL: True, "done": True})


def run_trial(drawn: Mapping[str, Any], root: str) -> None:
    """What Tune calls: runs the trial, or goes on with it. Raises what ended it; the reason is in `outcome.json`."""
    from ray import tune

    folder = SearchFolder(Path(root))
    _enter(folder)
    name = tune.get_context().get_trial_id()
    own = folder.trial(name)
    held = tune.get_checkpoint()
    pointer = Pointer.load(held.path) if held is not None else None
    values = values_of(folder.search, drawn)
    own.parent.mkdir(parents=True, exist_ok=True)
    if not own.is_dir() and not folder.search.pauses:
        folder.take_over(name, values)
    own.mkdir(exist_ok=True)
    began = time.time()
    if (before := read_record(own)).status == "failed":
        raise TrialError(before.outcome["error"])
    if before.status == "finished" and before.values == values:
        # a crash came between its end and Tune's next look at its own state
        Watch(folder, name, None).tell_end(before.outcome["value"])
        return
    source = {"trial": pointer.trial, "step": pointer.step} if pointer else None
    append_line(own / "settings.jsonl", {"time": began, "values": values, "from": source})
    try:
        _run(folder, name, values, pointer)
    except Exception as error:
        fatal = isinstance(error, MetricError | TrackingError | ClusterError)
        write_outcome(own, status="failed", error=_in_a_line(error), fatal=fatal, step=read_record(own).step)
        raise


def _in_a_line(error: BaseException) -> str:
    """What went wrong, for a table; of workers' errors the first one."""
    while failures := getattr(error, "worker_failures", None):
        error = next(iter(failures.values()))
    cause = getattr(error, "cause", None)
    error = cause if isinstance(cause, BaseException) else error
    text = (str(error).strip().splitlines() or [""])[0]
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"


def _run(folder: SearchFolder, name: str, values: dict[str, Any], pointer: Pointer | None) -> None:
    from labelmill.execution import execute
    from labelmill.training import passes
    from labelmill.training.inprocess import fit_here

    own, in_process = folder.trial(name), bool(folder.state["in_process"])
    job = trial_job(folder, values, name, in_process)
    # tasks of a trial share what the trials leave free
    passes.most_cpus = job.cluster.read_cpus
    watch = Watch(folder, name, pointer)
    began = watch.known.began
    host = Host(
        folder=own,
        parent_run_id=folder.state["mlflow_run"],
        tags={"search.trial": name},
        fit=fit_here if in_process else None,
        shared_stages=(folder.root / "stages").resolve(),
        before_fit=watch.before_fit,
        on_event=watch.on_event,
        patience_s=_PATIENCE_S,
    )
    with open(own / "console.log", "a", encoding="utf-8") as out:
        report = execute(job, folder.method.run, console=Console(file=out, width=160), host=host)
    watch.finish(report.metrics, time.time() - began)


def _enter(folder: SearchFolder) -> None:
    """Where and with what the search was started: relative paths mean the same, secrets are where the job looks."""
    import ray

    if Path(folder.state["cwd"]).is_dir():
        os.chdir(folder.state["cwd"])
    board = ray.get_actor(folder.state["board"])
    environment: Any = ray.get(board.environment.remote())
    for name, value in environment.items():
        os.environ.setdefault(name, value)
