"""A search from its job to its report: one parent MLflow run, trials below it, the best one registered."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import random
import re
import shutil
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from labelmill.errors import UserError
from labelmill.execution import locked
from labelmill.job import Job, read_job_file, resolved
from labelmill.stages import write_json
from labelmill.tracking.report import Report
from labelmill.tracking.run import Tracker
from labelmill.tuning.capacity import concurrent_trials, trial_resources
from labelmill.tuning.check import check_search, tuned_on_test
from labelmill.tuning.outcome import conclude
from labelmill.tuning.state import SearchFolder
from labelmill.tuning.trial import trial_job, uses_own_process
from labelmill.workload import Workload, load_job

_ENVIRONMENT = {
    "TUNE_GLOBAL_CHECKPOINT_S": "1",  # seconds of the search that a crash can cost
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGNAL_HANDLER": "1",  # Ctrl-C ends the command, the same command continues
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
}
_OTHER_TEST = "Search with a part of the training data as data.test, and run the best settings with the real one."
_LIMITS = ("concurrent", "minutes", "max_failed")


class Board:
    """Actor that hands trials the environment of the search: secrets that the job names never touch a disk."""

    def __init__(self, environment: dict[str, str]) -> None:
        self._environment = environment

    def environment(self) -> dict[str, str]:
        """Variables by name."""
        return self._environment


def run_search(
    job_file: str | Path, overrides: Sequence[str] = (), fresh: bool = False, console: Console | None = None
) -> Report:
    """Searches as the job says, or continues a search that was interrupted; finished trials aren't run again.

    Raises UserError kinds for what the caller can mend, before any worker starts where that is possible.
    """
    console = console or Console()
    method, job = load_job(job_file, list(overrides))
    raw = _without_secrets(read_job_file(job_file, list(overrides)))
    if warning := tuned_on_test(check_search(job, raw, method, str(job_file))):
        console.print(f"{job_file}: {warning} {_OTHER_TEST}", style="yellow", highlight=False, soft_wrap=True)
    root = Path(job.output) / job.name / "search"
    root.mkdir(parents=True, exist_ok=True)
    with locked(root):
        if fresh:
            _clear(root)
        folder = SearchFolder(root.resolve())
        digest = _digest(job)
        if folder.state and folder.state["digest"] != digest:
            raise UserError(
                f"{root}: this search began with another job. Put the job back as it was, give it another name "
                "(--set name=...), or start over with --fresh."
            )
        if folder.state.get("status") == "finished":
            report = Report.load(root / "report")
            console.print(
                f"{job.name}: searched before, nothing has changed (start over with --fresh)", highlight=False
            )
            report.render(console)
            return report
        return _search(folder, job, raw, method, str(job_file), digest, console)


def _clear(root: Path) -> None:
    for path in root.iterdir():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name != ".lock":
            path.unlink()


def _digest(job: Job) -> str:
    """Identity of a search, without where it runs and reports to, and how much it may cost."""
    content = resolved(job)
    for section in ("cluster", "tracking", "output"):
        content.pop(section, None)
    for field in _LIMITS:
        content["search"].pop(field, None)
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _search(
    folder: SearchFolder, job: Job, raw: dict[str, Any], method: Workload, source: str, digest: str, console: Console
) -> Report:
    assert job.search is not None
    before, in_process = folder.state, uses_own_process(job)
    with Tracker.open(
        job.tracking,
        job.output,
        run_name=f"{job.name} search",
        run_id=before.get("mlflow_run"),
        tags={"search.metric": job.search.metric, "search.goal": job.search.goal},
        run_dir=folder.root,
    ) as tracker:
        state = {
            "raw": raw,
            "source": source,
            "digest": digest,
            "mlflow_run": tracker.run_id,
            "board": f"labelmill-search-{uuid.uuid4().hex}",
            "in_process": in_process,
            "max_failed": job.search.max_failed,
            "cwd": os.getcwd(),
            "began": before.get("began", time.time()),
        }
        write_json(folder.root / "search.json", state | {"status": "running"})
        folder = SearchFolder(folder.root)
        trial_job(folder, {}, "trial", in_process)  # refused here rather than by every trial
        tracker.config(resolved(job))
        tracker.params(resolved(job))
        with _session(job, in_process, folder):
            errors = _tune(folder, job, in_process, before.get("status") == "stopped", console)
            stopped = folder.stop_file.read_text(encoding="utf-8") if folder.stop_file.is_file() else ""
            report = conclude(folder, job, tracker, errors, stopped, console)
        if stopped:
            write_json(folder.root / "search.json", state | {"status": "stopped"})
            raise UserError(
                f"{source}: the search was stopped: {stopped}. The trials are in {folder.root / 'report'}. Mend it and run "
                "the same command: failed trials are tried again; --fresh starts over."
            )
        write_json(folder.root / "search.json", state | {"status": "finished"})
        for name in ("tune", "kept", "former"):
            shutil.rmtree(folder.root / name, ignore_errors=True)
    report.render(console)
    return report


@contextlib.contextmanager
def _session(job: Job, in_process: bool, folder: SearchFolder) -> Iterator[None]:
    """Ray with room for a trial, and the board that trials ask."""
    os.environ.update({name: os.environ.get(name, value) for name, value in _ENVIRONMENT.items()})
    from labelmill.cluster import connect

    cluster = job.cluster.model_copy(update={"workers": 1}) if in_process else job.cluster
    with connect(cluster):
        import ray

        actor: Any = ray.remote(Board)
        board = actor.options(name=folder.state["board"], num_cpus=0).remote(_secrets(folder.state["raw"]))
        try:
            yield
        finally:
            ray.kill(board)


def _without_secrets(raw: dict[str, Any]) -> dict[str, Any]:
    """The job with secrets that stand in it moved to the environment: the search keeps the job in a file."""
    section = raw.get("tracking") or {}
    for field in ("username", "password", "token"):
        value = section.get(field)
        if isinstance(value, str) and not value.startswith("${env:"):
            name = f"LABELMILL_TRACKING_{field.upper()}"
            os.environ[name] = value
            section[field] = f"${{env:{name}}}"
    return raw


def _secrets(raw: Mapping[str, Any]) -> dict[str, str]:
    """Environment variables that the job names, and those of MLflow."""
    named = set(re.findall(r"\$\{env:([A-Za-z_]\w*)\}", json.dumps(raw, default=str)))
    return {name: value for name, value in os.environ.items() if name in named or name.startswith("MLFLOW_")}


def _nodes() -> list[Mapping[str, float]]:
    """Free resources of every node."""
    import ray

    free = ray._private.state.available_resources_per_node()
    return [free.get(node["NodeID"], {}) for node in ray.nodes() if node["Alive"]]


def _tune(folder: SearchFolder, job: Job, in_process: bool, again: bool, console: Console) -> dict[str, str]:
    """Runs the trials. Returns trial -> Tune's status of it."""
    from ray import tune
    from ray.tune import Tuner

    from labelmill.tuning import follow, schedule

    search = job.search
    assert search is not None
    at_once = concurrent_trials(job.cluster, _nodes(), in_process, search.concurrent, search.total)
    console.print(f"{job.name}: {search.total} trials, {at_once} at once", highlight=False)
    folder.stop_file.unlink(missing_ok=True)
    follow.console = console
    trainable: Any = tune.with_resources(_trainable(str(folder.root)), trial_resources(job.cluster, in_process))
    place = folder.root / "tune"
    if again:
        # Tune counts trials that it was told to stop as done, and proposes no more: it begins anew, trials don't
        console.print("the search begins again; trials that have finished are kept", highlight=False)
        shutil.rmtree(place, ignore_errors=True)
        folder.set_trials_aside()
    if (place / "tuner.pkl").is_file() and Tuner.can_restore(str(place)):
        console.print("the search goes on where it was interrupted", highlight=False)
        tuner = Tuner.restore(str(place), trainable, resume_unfinished=True)
    else:
        shutil.rmtree(place, ignore_errors=True)
        steps = getattr(getattr(job, "train", None), "steps", None)
        tuner = Tuner(
            trainable,
            param_space=schedule.param_space(search),
            tune_config=tune.TuneConfig(
                metric=schedule.VALUE,
                mode=search.goal,
                num_samples=search.trials or 1,
                scheduler=schedule.scheduler(search, steps),
                search_alg=schedule.searcher(search, at_once),
                max_concurrent_trials=at_once if search.searcher.kind in ("optuna", "bohb") else None,
                time_budget_s=search.minutes * 60 if search.minutes else None,
                trial_name_creator=_trial_id,
                trial_dirname_creator=_trial_id,
            ),
            run_config=tune.RunConfig(
                name="tune",
                storage_path=str(folder.root),
                verbose=0,
                failure_config=tune.FailureConfig(max_failures=job.cluster.max_failures),
                stop=follow.StopOnFile(str(folder.stop_file)),
                callbacks=[follow.Follow(str(folder.root))],
            ),
        )
    random.seed(search.seed)  # PBT draws from it
    with _quiet():
        results = tuner.fit()
    follow.end_groups(folder)
    return {trial.trial_id: trial.status for trial in results._experiment_analysis.trials}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without Tune's own chatter: how trials end is told by lines, the table and their logs."""
    logger = logging.getLogger("ray")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _trial_id(trial: Any) -> str:
    return trial.trial_id


def _trainable(root: str) -> Callable[[Mapping[str, Any]], None]:
    def trial(config: Mapping[str, Any]) -> None:
        from labelmill.tuning.trial import run_trial

        run_trial(config, root)

    return trial
