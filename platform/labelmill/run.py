"""A run of a job: its folder, its finished stages, its MLflow run, its report, and the verbs a method is written in.

    <output>/<job name>/
        run.json               MLflow run id, digest of the job, status
        run.log                everything, tracebacks included
        stages/<name>-<key>/   what a stage keeps; `stage.json` in it, written last, marks it finished
        report/                report.json and figures
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel
from rich.console import Console

from labelmill import __version__
from labelmill.data.manifest import Manifest, load_manifest
from labelmill.data.source import StreamSpec
from labelmill.errors import UserError
from labelmill.job import Job, resolved
from labelmill.progress import ProgressView
from labelmill.tracking.report import Report, Table
from labelmill.tracking.run import Tracker
from labelmill.training.config import TrainConfig

log = logging.getLogger("labelmill")


@dataclass(frozen=True)
class Stage:
    """A finished stage: what it returned and the folder it filled."""

    name: str
    key: str
    folder: Path
    values: Mapping[str, Any]
    seconds: float

    def __getitem__(self, name: str) -> Any:
        return self.values[name]

    def manifest(self, split: str = ".") -> Manifest:
        """The data set that the stage wrote below its folder."""
        return load_manifest(self.folder / split)


@dataclass
class Fitted:
    """What `Run.fit` leaves: exported weights, predictions, history."""

    folder: Path
    seconds: dict[str, float] = field(default_factory=dict)

    def predictions(self, name: str) -> pa.Table:
        """The rows that the objective's `predict` gave for stream `name`, in the order of the stream."""
        parts = [pq.read_table(path) for path in sorted((self.folder / "predictions" / name).glob("part-*.parquet"))]
        return pa.concat_tables(parts).sort_by("position")

    @property
    def history(self) -> list[dict[str, float]]:
        """Metric records of training, by step."""
        path = self.folder / "history.jsonl"
        records = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
        # a step run twice (crash after a record, before its checkpoint) counts as it ran last
        return sorted({record["step"]: record for record in records}.values(), key=lambda record: record["step"])

    @property
    def bad_samples(self) -> dict[str, str]:
        """Key -> reason of samples that could not be decoded."""
        path = self.folder / "bad_samples.jsonl"
        lines = path.read_text().splitlines() if path.is_file() else []
        return dict(json.loads(line) for line in lines)


class Run:
    """The context a method's function works in. Opened by `open_run`."""

    def __init__(self, job: Job, folder: Path, tracker: Tracker, progress: ProgressView) -> None:
        self.job, self.folder, self.tracker, self.progress = job, folder, tracker, progress
        self.report = Report(title=job.name, meta={"workload": job.workload, "seed": str(job.seed)})
        self.stages: list[Stage] = []
        self._resources = contextlib.ExitStack()
        self._connected = False

    # --- stages ------------------------------------------------------------------------------------------

    def stage(self, name: str, function: Callable[..., Mapping[str, Any]], **inputs: Any) -> Stage:
        """Runs `function(run, folder, **inputs)`, or returns what it kept when it ran before with equal inputs.

        The function fills `folder` and returns JSON values. After a crash it finds in `folder` what it had left, so a
        stage that can continue (training) does; one that can't must clear what it finds.
        """
        key = stage_key(name, function, inputs)
        folder = self.folder / "stages" / f"{name}-{key}"
        marker = folder / "stage.json"
        if marker.is_file():
            kept = json.loads(marker.read_text(encoding="utf-8"))
            self.progress.line(f"{name}: kept from before ({kept['seconds']:.1f} s then)")
        else:
            folder.mkdir(parents=True, exist_ok=True)
            began = time.monotonic()
            with self.progress.stage(name):
                values = dict(function(self, folder, **inputs) or {})
            kept = {"name": name, "key": key, "values": values, "seconds": time.monotonic() - began}
            write_json(marker, kept)
        done = Stage(name, key, folder, kept["values"], kept["seconds"])
        self.stages.append(done)
        self.tracker.metrics([(f"stage_seconds/{name}", done.seconds, 0, _now_ms())])
        return done

    # --- verbs -------------------------------------------------------------------------------------------

    def connect(self) -> None:
        """Joins or starts the cluster, once a run; checks that the job's workers fit."""
        if not self._connected:
            from labelmill.cluster import connect

            self._resources.enter_context(connect(self.job.cluster))
            self._connected = True

    def fit(
        self,
        folder: Path,
        objective: Callable[[], Any],
        train: StreamSpec | None,
        config: TrainConfig,
        predict: Mapping[str, StreamSpec] | None = None,
        augment: bool = False,
        seed: int | None = None,
    ) -> Fitted:
        """Trains an objective on the job's workers, exports it, and predicts over streams. Resumes from `folder`."""
        from labelmill.training.fit import fit
        from labelmill.training.worker import FitTask

        self.connect()
        cluster = self.job.cluster
        task = FitTask(
            objective,
            config,
            train,
            predict=dict(predict or {}),
            work=folder.resolve(),
            seed=self.job.seed if seed is None else seed,
            augment=augment,
            use_gpu=cluster.gpus_per_worker > 0,
            threads=max(1, int(cluster.cpus_per_worker)),
            read_cpus=cluster.read_cpus,
        )
        folder.mkdir(parents=True, exist_ok=True)
        seconds = fit(task, cluster, self.job.name, lambda event: self._on_event(folder, event))
        return Fitted(folder, seconds)

    def _on_event(self, folder: Path, event: dict[str, Any]) -> None:
        match event["kind"]:
            case "metrics":
                with open(folder / "history.jsonl", "a", encoding="utf-8") as out:
                    out.write(json.dumps({"step": event["step"], **event["values"]}) + "\n")
                now = int(event["time"] * 1000)
                self.tracker.metrics([(name, value, event["step"], now) for name, value in event["values"].items()])
            case "progress":
                self.progress.update(event["done"], event["total"], event["rate"], event["text"])
            case "bad":
                with open(folder / "bad_samples.jsonl", "a", encoding="utf-8") as out:
                    out.writelines(json.dumps(item) + "\n" for item in event["samples"])
                for key, reason in event["samples"]:
                    log.warning("data set %s: sample %s can't be decoded: %s", event["data"], key, reason)

    def report_data_health(self, *fits: Fitted) -> None:
        """Adds every undecodable sample that the fits met to the report, by key."""
        bad = {key: reason for fitted in fits for key, reason in fitted.bad_samples.items()}
        self.report.metrics["data/bad_samples"] = float(len(bad))
        if bad:
            rows = [[key, reason] for key, reason in sorted(bad.items())[:200]]
            self.report.tables["bad samples"] = Table(["key", "reason"], rows, f"{len(bad)} samples were left out")

    def figure(self, name: str) -> Path:
        """Where a figure of the report goes; the file is listed in the report under `name`."""
        path = self.folder / "report" / "figures" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        self.report.figures[name] = f"figures/{name}.png"
        return path

    def close(self) -> None:
        """Leaves the cluster."""
        self._resources.close()


def stage_key(name: str, function: Callable[..., Any], inputs: Mapping[str, Any]) -> str:
    """Identity of a stage's work: its function and everything that goes in, by content."""
    content = {
        "name": name,
        "function": f"{function.__module__}.{function.__qualname__}",
        "version": __version__,
        "inputs": {k: fingerprint(v) for k, v in inputs.items()},
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def fingerprint(value: Any) -> Any:
    """JSON that stands for an input: data sets by digest, stages by key, sections by value.

    Raises TypeError for values whose content can't be told, so that no change of them is overlooked.
    """
    if isinstance(value, Manifest):
        return {"manifest": value.digest}
    if isinstance(value, Stage):
        return {"stage": [value.name, value.key]}
    if isinstance(value, BaseModel):
        return {"section": json.loads(value.model_dump_json())}
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {str(k): fingerprint(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [fingerprint(v) for v in value]
    if value is None or isinstance(value, str | int | float | bool):
        return value
    raise TypeError(f"a stage's input must be data, not {type(value).__name__}")


def write_json(path: Path, value: Any) -> None:
    """Writes JSON whole or not at all."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps(value, indent=1), encoding="utf-8")
    part.replace(path)


def _now_ms() -> int:
    return int(time.time() * 1000)


def job_digest(job: Job) -> str:
    """Identity of a job's content, without where it runs and reports to."""
    content = resolved(job)
    for section in ("cluster", "tracking", "output"):
        content.pop(section, None)
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    with open(folder / ".lock", "w", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{folder}: another process is running this job. Wait for it, or give this run another name "
                "(--set name=...)."
            ) from None
        yield


def execute(
    job: Job, function: Callable[[Any, Run], None], fresh: bool = False, console: Console | None = None
) -> Report:
    """Runs a job to its report, continuing what an earlier call left unfinished.

    The order of checks: tracking answers, then data (the method loads its manifests), then the cluster.
    """
    console = console or Console()
    folder = Path(job.output) / job.name
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        if fresh:
            for name in ("stages", "report"):
                shutil.rmtree(folder / name, ignore_errors=True)
            (folder / "run.json").unlink(missing_ok=True)
        state_path = folder / "run.json"
        state = json.loads(state_path.read_text(encoding="utf-8")) if state_path.is_file() else {}
        same = state.get("job") == job_digest(job)
        if same and state.get("status") == "finished":
            report = Report.load(folder / "report")
            console.print(f"{job.name}: finished before, nothing has changed (start over with --fresh)", highlight=False)
            report.render(console)
            return report
        handler = logging.FileHandler(folder / "run.log", encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        log.addHandler(handler)
        log.setLevel(logging.INFO)
        try:
            return _execute(job, function, folder, state if same else {}, console)
        finally:
            log.removeHandler(handler)
            handler.close()


def _execute(
    job: Job, function: Callable[[Any, Run], None], folder: Path, state: dict[str, Any], console: Console
) -> Report:
    tracker = Tracker.open(job.tracking, Path(job.output), run_name=job.name, run_id=state.get("mlflow_run"))
    state = {"mlflow_run": tracker.run_id, "job": job_digest(job), "status": "running"}
    write_json(folder / "run.json", state)
    status = "FAILED"
    with ProgressView(console) as progress:
        run = Run(job, folder, tracker, progress)
        try:
            tracker.config(resolved(job))
            function(job, run)
            _finish_report(run)
            status = "FINISHED"
        except KeyboardInterrupt:
            status = "KILLED"
            raise
        finally:
            run.close()
            tracker.finish(status)
            write_json(folder / "run.json", state | {"status": status.lower()})
    run.report.render(console)
    return run.report


def _finish_report(run: Run) -> None:
    rows = [[stage.name, f"{stage.seconds:.1f}"] for stage in run.stages]
    run.report.tables["stages"] = Table(["stage", "seconds"], rows, "wall time of each stage, kept ones as they ran")
    run.report.meta["mlflow_run"] = run.tracker.run_id
    run.report.save(run.folder / "report")
    run.tracker.report(run.report, run.folder / "report")
