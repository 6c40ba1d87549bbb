"""Runs a job to its report: one process a folder, finished jobs as they were, the rest where it stopped.

<output>/<job name>/run.json holds the MLflow run, the digest of the job, and the status.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from labelmill.errors import UserError
from labelmill.host import Host
from labelmill.job import Job, resolved
from labelmill.masking import Formatter
from labelmill.progress import ProgressView
from labelmill.run import Run
from labelmill.stages import write_json
from labelmill.tracking.report import Report
from labelmill.tracking.run import Tracker, spools

log = logging.getLogger("labelmill")


def job_digest(job: Job) -> str:
    """Identity of a job's content, without where it runs and reports to."""
    content = resolved(job)
    for section in ("cluster", "tracking", "output", "search"):
        content.pop(section, None)
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def locked(folder: Path, patience_s: float = 0.0) -> Iterator[None]:
    """Keeps other processes out of a folder. Raises UserError when one is in it for longer than `patience_s`."""
    until = time.monotonic() + patience_s
    with open(folder / ".lock", "w", encoding="utf-8") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() < until:
                    time.sleep(0.2)
                    continue
                raise UserError(
                    f"{folder}: another process is running this job. Wait for it, or give this run another name "
                    "(--set name=...)."
                ) from None
        yield


def execute(
    job: Job,
    function: Callable[[Any, Run], None],
    fresh: bool = False,
    console: Console | None = None,
    profile: bool = False,
    host: Host | None = None,
) -> Report:
    """Runs a job to its report, continuing what an earlier call left unfinished.

    `profile` records a few steps; `host` is there when the run is part of a search.

    The order of checks: tracking answers, then data (the method loads its manifests), then the cluster.
    """
    console = console or Console()
    folder = host.folder if host else Path(job.output) / job.name
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder, host.patience_s if host else 0.0):
        if fresh:
            for name in ("stages", "report"):
                shutil.rmtree(folder / name, ignore_errors=True)
            (folder / "run.json").unlink(missing_ok=True)
        state_path = folder / "run.json"
        state = json.loads(state_path.read_text(encoding="utf-8")) if state_path.is_file() else {}
        same = state.get("job") == job_digest(job)
        if same and state.get("status") == "finished":
            report = Report.load(folder / "report")
            console.print(
                f"{job.name}: finished before, nothing has changed (start over with --fresh)", highlight=False
            )
            report.render(console)
            if spools(folder):  # the run ended while the tracking server was away
                with Tracker.open(
                    job.tracking, job.output, run_name=job.name, run_id=state["mlflow_run"] or None, run_dir=folder
                ) as tracker:
                    tracker.on_open = lambda run_id: write_json(state_path, state | {"mlflow_run": run_id})
                    tracker.flush()
            return report
        handler = logging.FileHandler(folder / "run.log", encoding="utf-8")
        handler.setFormatter(Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        log.addHandler(handler)
        log.setLevel(logging.INFO)
        try:
            # a part of a search stays one MLflow run, also when its settings change
            return _execute(job, function, folder, state if same or host else {}, console, profile, host)
        except UserError:
            raise
        except Exception as error:
            log.exception("the run failed")
            error.labelmill_log = folder / "run.log"  # type: ignore[attr-defined]
            raise
        finally:
            log.removeHandler(handler)
            handler.close()


def _execute(
    job: Job,
    function: Callable[[Any, Run], None],
    folder: Path,
    state: dict[str, Any],
    console: Console,
    profile: bool = False,
    host: Host | None = None,
) -> Report:
    with Tracker.open(
        job.tracking,
        job.output,
        run_name=job.name,
        run_id=state.get("mlflow_run") or None,
        tags=host.tags if host else None,
        parent_run_id=host.parent_run_id if host else None,
        run_dir=folder,
    ) as tracker:
        state = {"mlflow_run": tracker.run_id, "job": job_digest(job), "status": "running"}

        def note(**values: str) -> None:
            state.update(values)
            write_json(folder / "run.json", state)

        tracker.on_open = lambda run_id: note(mlflow_run=run_id)
        note()
        with ProgressView(console) as progress:
            run = Run(job, folder, tracker, progress, profile, host)
            try:
                tracker.config(resolved(job))
                tracker.params(resolved(job))
                function(job, run)
                _finish_report(run)
            finally:
                run.close()
        note(status="finished")
    run.report.render(console)
    return run.report


def _finish_report(run: Run) -> None:
    rows = [[stage.name, f"{stage.seconds:.1f}"] for stage in run.stages]
    run.report.add_table("stages", ["stage", "seconds"], rows, "wall time of each stage, kept ones as they ran")
    run.report.meta["mlflow_run"] = run.tracker.run_id
    run.tracker.report(run.report)
