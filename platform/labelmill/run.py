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
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
from rich.console import Console
from torch import Tensor

from labelmill import __version__
from labelmill.data.manifest import Manifest
from labelmill.data.spec import AnySpec
from labelmill.errors import UserError
from labelmill.heads.index import IndexConfig, build_index
from labelmill.job import Job, resolved
from labelmill.masking import Formatter
from labelmill.progress import ProgressView
from labelmill.stages import Fitted, Stage, stage_key, write_json
from labelmill.tracking.model import ClassPrior
from labelmill.tracking.report import Report
from labelmill.tracking.run import Tracker, code_version
from labelmill.training.config import TrainConfig

log = logging.getLogger("labelmill")


class Run:
    """The context a method's function works in. Opened by `open_run`."""

    def __init__(self, job: Job, folder: Path, tracker: Tracker, progress: ProgressView) -> None:
        self.job, self.folder, self.tracker, self.progress = job, folder, tracker, progress
        meta = {"workload": job.workload, "seed": str(job.seed), **code_version()}
        self.report = Report(title=job.name, meta=meta, root=folder / "report")
        self.stages: list[Stage] = []
        self._resources = contextlib.ExitStack()
        self._connected = False

    # --- stages ------------------------------------------------------------------------------------------

    def stage(self, name: str, function: Callable[..., Mapping[str, Any]], /, **inputs: Any) -> Stage:
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
                values = dict(function(self, folder, **inputs))
            kept = {"name": name, "key": key, "values": values, "seconds": time.monotonic() - began}
            write_json(marker, kept)
        done = Stage(name, key, folder, kept["values"], kept["seconds"])
        self.stages.append(done)
        self.tracker.metrics([(f"stage_seconds/{name}", done.seconds, 0, None)])
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
        train: AnySpec | None,
        config: TrainConfig,
        predict: Mapping[str, AnySpec] | None = None,
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
        # what a killed driver hadn't sent yet; MLflow drops the points that it has
        for record in Fitted(folder).history:
            values = {name: value for name, value in record.items() if name not in ("step", "time")}
            self._track(int(record["step"]), record["time"], values)
        seconds = fit(task, cluster, self.job.name, lambda event: self._on_event(folder, event))
        return Fitted(folder, seconds)

    def embed(
        self, folder: Path, data: Manifest, encoder: Any, weights: Mapping[str, Tensor], max_bad: int = 0
    ) -> None:
        """Embeds every sample with a frozen encoder, a Ray task a shard; read back with `load_embeddings`."""
        from labelmill.training.passes import embed_shards

        self.connect()
        bad = embed_shards(data, folder, encoder, dict(weights), max_bad, self.progress.update)
        for key, reason in bad:
            log.warning("data set %s: sample %s can't be decoded: %s", data.name, key, reason)

    def register(
        self,
        name: str,
        fit: Stage,
        encoder: Any,
        head: Any,
        data: Manifest,
        predictor: str = "topk",
        prior: ClassPrior | None = None,
        index: IndexConfig | None = None,
    ) -> Stage:
        """Packages a fitted encoder with its class rows, logs it and registers it as `name`, alias `candidate`.

        With `index` the package also holds an approximate index over the rows.
        """
        return self.stage(
            "register",
            _register,
            fit=fit,
            encoder=encoder,
            head=head,
            data=data,
            name=name,
            predictor=predictor,
            prior=prior,
            index=index,
        )

    def track_data(self, **sets: Manifest) -> None:
        """Records which data sets the run uses, by manifest hash."""
        for context, data in sets.items():
            self.tracker.dataset(data.digest, data.name, data.root, context)
            path = self.folder / "data" / f"{context}-manifest.json"
            path.parent.mkdir(exist_ok=True)
            write_json(path, data.model_dump(mode="json"))
            self.tracker.artifact(path, "data")
            self.report.meta[f"data_{context}"] = data.digest

    def _track(self, step: int, when_s: float, values: Mapping[str, float]) -> None:
        self.tracker.metrics([(name, value, step, int(when_s * 1000)) for name, value in values.items()])

    def _on_event(self, folder: Path, event: dict[str, Any]) -> None:
        match event["kind"]:
            case "metrics":
                self._track(event["step"], event["time"], event["values"])
            case "progress":
                self.progress.update(event["done"], event["total"], event["rate"], event["text"])
            case "bad":
                with open(folder / "bad_samples.jsonl", "a", encoding="utf-8") as out:
                    out.writelines(json.dumps(item) + "\n" for item in event["samples"])
                for key, reason in event["samples"]:
                    log.warning("data set %s: sample %s can't be used: %s", event["data"], key, reason)
            case "reading":
                with open(folder / "reading.jsonl", "a", encoding="utf-8") as out:
                    out.write(json.dumps({k: v for k, v in event.items() if k != "kind"}) + "\n")
                for reason, times in event["retries"].items():
                    log.warning("data set %s: %d storage request(s) tried again: %s", event["data"], times, reason)

    def report_data_health(self, *fits: Fitted) -> None:
        """Adds to the report what reading met: every hole by key, damaged shards by offset, requests tried again."""
        bad = {key: reason for fitted in fits for key, reason in fitted.bad_samples.items()}
        records = [record for fitted in fits for record in fitted.reading]
        self.report.metrics["data/bad_samples"] = float(len(bad))
        self.report.metrics["data/storage_retries"] = float(sum(sum(r["retries"].values()) for r in records))
        if bad:
            rows = [[key, reason] for key, reason in sorted(bad.items())[:200]]
            self.report.add_table("bad samples", ["key", "reason"], rows, f"{len(bad)} samples were left out")
        damage = sorted({tuple(str(part) for part in place) for r in records for place in r["damage"]})
        if damage:
            rows = [list(place) for place in damage[:200]]
            self.report.add_table("damaged shards", ["shard", "byte", "first sample", "reason"], rows)
        retried = Counter[str]()
        for record in records:
            retried.update(record["retries"])
        if retried:
            rows = [[reason, str(times)] for reason, times in sorted(retried.items())]
            self.report.add_table("storage requests tried again", ["reason", "times"], rows)

    def figure(self, name: str) -> Path:
        """Where a figure of the report goes; the file is listed in the report under `name`."""
        path = self.folder / "report" / "figures" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        self.report.figures[name] = f"figures/{name}.png"
        return path

    def close(self) -> None:
        """Leaves the cluster."""
        self._resources.close()


def _register(
    run: Run,
    folder: Path,
    fit: Stage,
    encoder: Any,
    head: Any,
    data: Manifest,
    name: str,
    predictor: str,
    prior: ClassPrior | None,
    index: IndexConfig | None,
) -> dict[str, Any]:
    """Stage: the model package, the MLflow model, the registry entry."""
    from labelmill.encoders import build_encoder
    from labelmill.tracking import registry
    from labelmill.tracking.model import write_model

    fitted, package = Fitted(fit.folder), folder / "model"
    shutil.rmtree(package, ignore_errors=True)
    package.mkdir()
    classes = None
    if predictor != "embed":
        assert data.label.num_classes is not None
        for entry in fitted.head_shards("classes"):
            # the rows are large and final: a second name for the same bytes
            _link(fitted.folder / "export" / "head-classes" / entry["file"], package / entry["file"])
        bare = pa.table({"name": [str(i) for i in range(data.label.num_classes)]}) if not data.classes else None
        classes = data.load_classes() if bare is None else bare
    kind = data.fields[encoder.field].kind
    if kind == "bytes" or kind == "safetensors" or kind == "arrow":  # written so for mypy
        raise UserError(f"field {encoder.field!r} is {kind}: a registered model takes text, images or arrays.")
    write_model(
        package,
        encoder=build_encoder(encoder),
        input_kind=kind,
        predictor=predictor,
        classes=classes,
        state=fitted.dense("encoder."),
        normalized=head.normalize,
        prior=prior,
        scale=head.scale,
        label_form=data.label.form,
        manifest_digest=data.digest,
        code_version=__version__,
        extra={"job": resolved(run.job)},
    )
    if index is not None and classes is not None:
        info = build_index(package, index.kind, index.factory, index.probes)
        run.progress.line(f"index {info.kind} {info.factory}: {info.bytes / 2**20:.1f} MiB in {info.seconds:.1f} s")
    version = registry.register(run.tracker, package, name, tags={"workload": run.job.workload})
    run.progress.line(f"registered {name} version {version}, alias candidate")
    return {"name": name, "version": str(version)}


def _link(source: Path, target: Path) -> None:
    try:
        target.hardlink_to(source)
    except OSError:
        shutil.copyfile(source, target)


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
            console.print(
                f"{job.name}: finished before, nothing has changed (start over with --fresh)", highlight=False
            )
            report.render(console)
            return report
        handler = logging.FileHandler(folder / "run.log", encoding="utf-8")
        handler.setFormatter(Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        log.addHandler(handler)
        log.setLevel(logging.INFO)
        try:
            return _execute(job, function, folder, state if same else {}, console)
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
    job: Job, function: Callable[[Any, Run], None], folder: Path, state: dict[str, Any], console: Console
) -> Report:
    with Tracker.open(
        job.tracking, job.output, run_name=job.name, run_id=state.get("mlflow_run"), run_dir=folder
    ) as tracker:
        state = {"mlflow_run": tracker.run_id, "job": job_digest(job)}
        write_json(folder / "run.json", state | {"status": "running"})
        with ProgressView(console) as progress:
            run = Run(job, folder, tracker, progress)
            try:
                tracker.config(resolved(job))
                tracker.params(resolved(job))
                function(job, run)
                _finish_report(run)
            finally:
                run.close()
        write_json(folder / "run.json", state | {"status": "finished"})
    run.report.render(console)
    return run.report


def _finish_report(run: Run) -> None:
    rows = [[stage.name, f"{stage.seconds:.1f}"] for stage in run.stages]
    run.report.add_table("stages", ["stage", "seconds"], rows, "wall time of each stage, kept ones as they ran")
    run.report.meta["mlflow_run"] = run.tracker.run_id
    run.tracker.report(run.report)
