"""A run of a job: its folder, its finished stages, its MLflow run, its report, and the verbs a method is written in.

<output>/<job name>/
    run.json               MLflow run id, digest of the job, status
    run.log                everything, tracebacks included
    stages/<name>-<key>/   what a stage keeps; `stage.json` in it, written last, marks it finished
    report/                report.json and figures
"""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from labelmill.data.manifest import Manifest
from labelmill.data.spec import AnySpec
from labelmill.data.store import join, normal
from labelmill.heads.config import HeadConfig
from labelmill.heads.index import IndexConfig
from labelmill.host import Host, TrainsHereError, turn
from labelmill.job import Job
from labelmill.packaging import build_package
from labelmill.progress import ProgressView
from labelmill.stages import Fitted, Stage, stage_key, write_json
from labelmill.tracking.model import ClassPrior
from labelmill.tracking.report import Report
from labelmill.tracking.run import Tracker, code_version
from labelmill.training.attempts import read_attempts
from labelmill.training.config import TrainConfig
from labelmill.training.parallel import StoppedError, side_by_side

if TYPE_CHECKING:
    from labelmill.training.initial import HeadStart

log = logging.getLogger("labelmill")
_RANKS_SHOWN = 16  # a metric a rank; with more only the slowest


class Run:
    """The context a method's function works in. Opened by `labelmill.execution.execute`."""

    def __init__(
        self,
        job: Job,
        folder: Path,
        tracker: Tracker,
        progress: ProgressView,
        profile: bool = False,
        host: Host | None = None,
    ) -> None:
        self.job, self.folder, self.tracker, self.progress = job, folder, tracker, progress
        self.profile, self.host = profile, host
        meta = {"workload": job.workload, "seed": str(job.seed), **code_version()}
        self.report = Report(title=job.name, meta=meta, root=folder / "report")
        self.stages: list[Stage] = []
        self._resources = contextlib.ExitStack()
        # a host has connected, and knows that its runs fit
        self._connected = host is not None
        self._trained: set[str] = set()  # keys of stages that training went into
        self._stop = threading.Event()  # fits side by side are to end
        self._parents: dict[str, None] = {}  # registered models that were used, as NAME/VERSION

    # --- stages ------------------------------------------------------------------------------------------

    def stage(self, name: str, function: Callable[..., Mapping[str, Any]], /, **inputs: Any) -> Stage:
        """Runs `function(run, folder, **inputs)`, or returns what it kept when it ran before with equal inputs.

        The function fills `folder` and returns JSON values. After a crash it finds in `folder` what it had left, so a
        stage that can continue (training) does; one that can't must clear what it finds.
        """
        key = stage_key(name, function, inputs)
        folder = self.folder / "stages" / f"{name}-{key}"
        shared = self.host.shared_stages if self.host else None
        if any(isinstance(value, Stage) and value.key in self._trained for value in inputs.values()) or folder.is_dir():
            self._trained.add(key)
            shared = None
        if shared is None:
            done = self._stage(name, key, folder, function, inputs)
        else:
            try:
                with turn(shared / folder.name, name) as place:
                    done = self._stage(name, key, place, function, inputs)
            except TrainsHereError:
                self._trained.add(key)
                done = self._stage(name, key, folder, function, inputs)
        self.stages.append(done)
        self.tracker.metrics([(f"stage_seconds/{name}", done.seconds, 0, None)])
        return done

    def _stage(
        self, name: str, key: str, folder: Path, function: Callable[..., Mapping[str, Any]], inputs: Mapping[str, Any]
    ) -> Stage:
        marker = folder / "stage.json"
        if marker.is_file():
            kept = json.loads(marker.read_text(encoding="utf-8"))
            self.progress.line(f"{name}: kept from before ({kept['seconds']:.1f} s then)")
        else:
            folder.mkdir(parents=True, exist_ok=True)
            began = time.monotonic()
            self.tracker.tags({"labelmill.stage": name})
            with self.progress.stage(name):
                values = dict(function(self, folder, **inputs))
            kept = {"name": name, "key": key, "values": values, "seconds": time.monotonic() - began}
            write_json(marker, kept)
        return Stage(name, key, folder, kept["values"], kept["seconds"])

    # --- verbs -------------------------------------------------------------------------------------------

    def connect(self) -> None:
        """Joins or starts the cluster, once a run; checks that the job's workers fit. Nothing under `cluster.in_process`."""
        if not self._connected and not self.job.cluster.in_process:
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
        initial: Mapping[str, HeadStart] | None = None,
        evaluate: AnySpec | None = None,
    ) -> Fitted:
        """Trains an objective on the job's workers, exports it, and predicts over streams. Resumes from `folder`.

        Under `cluster.in_process` all of it happens in this process.
        `initial` says what heads go on from (`training.initial.find_start`), by name; `evaluate` is a stream of held-out
        samples for `train.evaluate_every`.
        """
        from labelmill.training.fit import fit
        from labelmill.training.inprocess import fit_here
        from labelmill.training.worker import FitTask

        host = self.host
        if host and host.shared_stages and folder.parent == host.shared_stages:
            raise TrainsHereError
        if host:
            host.before_fit(self, folder)
        self.connect()
        cluster = self.job.cluster
        task = FitTask(
            objective,
            config,
            train,
            predict=dict(predict or {}),
            evaluate=evaluate,
            work=folder.resolve(),
            seed=self.job.seed if seed is None else seed,
            augment=augment,
            use_gpu=cluster.gpus_per_worker > 0,
            threads=max(1, int(cluster.cpus_per_worker)),
            read_cpus=cluster.read_cpus,
            initial=dict(initial or {}),
            head_shards=tuple(s.shards for _, s in self.job if isinstance(s, HeadConfig) and s.shards),
            checkpoint_to=self._copies_of(folder),
            hang_limit_s=cluster.hang_limit_s,
            run=self.job.name,
            profile=self.profile,
        )
        folder.mkdir(parents=True, exist_ok=True)
        told: set[int] = set()

        def on_event(event: dict[str, Any]) -> None:
            if self._stop.is_set():
                raise StoppedError
            if event["kind"] == "metrics":
                told.add(event["step"])
            self._on_event(folder, event)

        self._track_history(folder, told)  # what a killed driver hadn't sent yet
        train_on = host.fit if host and host.fit else fit_here if cluster.in_process else fit
        seconds = train_on(task, cluster, self.job.name, on_event)
        self._track_history(folder, told)  # what was lost with a mailbox
        if (traces := folder / "profile").is_dir():
            self.tracker.artifact(traces, "profile")
            self.progress.line(f"traces of a few steps: {traces}/trace-rank*.json.gz (open them in ui.perfetto.dev)")
        return Fitted(folder, seconds)

    def fit_each(self, fits: Sequence[Callable[[], Fitted]]) -> list[Fitted]:
        """Calls of `fit` that need nothing of each other, in order of `fits`.

        They train at the same time, each with all of the job's workers, where the cluster holds more than one such group; one
        after the other in a search, whose trials share the cluster, and under `cluster.in_process`.
        """
        from labelmill.training.room import free_groups

        self.connect()
        alone = self.host is not None or self.job.cluster.in_process or len(fits) < 2
        return side_by_side(fits, 1 if alone else free_groups(self.job.cluster, len(fits)), self._stop)

    def _copies_of(self, folder: Path) -> str | None:
        place = self.job.cluster.checkpoint_to
        if place is None:
            return None
        return join(normal(place), self.job.name, *folder.resolve().relative_to(self.folder.resolve() / "stages").parts)

    def _track_history(self, folder: Path, told: set[int]) -> None:
        """Sends the metric records that aren't among the `told` steps; MLflow drops the points that it has."""
        for record in Fitted(folder).history:
            if record["step"] not in told:
                values = {name: value for name, value in record.items() if name not in ("step", "time")}
                self._track(int(record["step"]), record["time"], values)

    def embed(
        self, folder: Path, data: Manifest, encoder: Any, weights: Mapping[str, Tensor], max_bad: int = 0
    ) -> None:
        """Embeds every sample with a frozen encoder, shard by shard; read back with `load_embeddings`."""
        from labelmill.training.passes import embed_shards

        self.connect()
        bad = embed_shards(data, folder, encoder, dict(weights), max_bad, self.progress.update)
        for key, reason in bad:
            log.warning("data set %s: sample %s can't be decoded: %s", data.name, key, reason)

    def model(self, ref: str) -> Path:
        """The folder of a registered model (`NAME`, `NAME@alias`, `NAME/version`, with or without `models:/`).

        It becomes a parent of every model that this run registers from here on. Raises TrackingError for an unknown one,
        DataError for one that isn't what was registered.
        """
        from labelmill.serving.package import fetch_package

        version, folder = fetch_package(self.job.tracking, self.job.output, ref)
        self._parents[f"{version.name}/{version.version}"] = None
        return folder

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
        parents: Sequence[str] = (),
    ) -> Stage:
        """Packages a fitted encoder with its class rows, logs it and registers it as `name`, alias `candidate`.

        With `index` the package also holds an approximate index over the rows. `parents`: references of the registered
        models that it was made from, beside those of `Run.model`.
        """
        known = list(dict.fromkeys([*self._parents, *parents]))
        lineage = {"parents": known} if known else {}  # without any, earlier runs' stages keep their key
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
            **lineage,
        )

    def track_data(self, **sets: Manifest | AnySpec) -> None:
        """Records which data sets the run uses, by manifest hash; of a stream all its parts, and the order's digest."""
        manifests: dict[str, Manifest] = {}
        for context, data in sets.items():
            if isinstance(data, Manifest):
                manifests[context] = data
                continue
            self.report.meta[f"stream_{context}"] = data.digest
            for number, part in enumerate(data.parts):
                manifests[f"{context}_mix_{number}" if number else context] = part.manifest
        for context, data in manifests.items():
            profile = {"num_samples": data.num_samples, "parents": list(data.parents)}
            self.tracker.dataset(data.digest, data.name, data.root, context, profile)
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
            case "start":
                self.progress.pause()
                with open(folder / "starts.jsonl", "a", encoding="utf-8") as out:
                    out.write(json.dumps({k: v for k, v in event.items() if k != "kind"}) + "\n")
                starts = len((folder / "starts.jsonl").read_text(encoding="utf-8").splitlines())
                began = {"run/worker_starts": starts, "run/total_steps": event["total"], "run/workers": event["world"]}
                self._track(event["step"], event["time"], began)
                self.tracker.flush()
            case "bad":
                with open(folder / "bad_samples.jsonl", "a", encoding="utf-8") as out:
                    out.writelines(json.dumps(item) + "\n" for item in event["samples"])
                bad = len(Fitted(folder).bad_samples)
                self._track(0, event["time"], {"data/bad_samples": bad})
                for key, reason in event["samples"]:
                    log.warning("data set %s: sample %s can't be used: %s", event["data"], key, reason)
            case "note":
                log.warning("%s", event["text"])
                self.progress.line(event["text"])
            case "hang":
                log.error("%s", event["text"])
                self.progress.line(event["text"])
                for path in event["files"]:
                    self.tracker.artifact(path, "hangs")
            case "restart":
                when = int(event["time"] * 1000)
                self.tracker.metrics([("outage_seconds", event["outage_s"], event["from_step"], when)])
            case "ranks":
                write_json(folder / "ranks.json", event)
                own_ms = {rank: s["own_ms"] for rank, s in event["ranks"].items() if s["own_ms"] is not None}
                shown = own_ms if len(own_ms) <= _RANKS_SHOWN else {}
                values = {f"ranks/own_ms_{rank}": value for rank, value in shown.items()}
                if own_ms:
                    slowest = max(own_ms, key=lambda rank: own_ms[rank])
                    values |= {"ranks/slowest": float(slowest), "ranks/slowest_own_ms": own_ms[slowest]}
                self._track(event["step"], event["time"], values)
                for rank, state in event["ranks"].items():
                    if state["straggler"]:
                        log.warning(
                            "rank %s on %s is slow: %.0f ms of own work a step", rank, state["host"], own_ms[rank]
                        )
            case "reading":
                with open(folder / "reading.jsonl", "a", encoding="utf-8") as out:
                    out.write(json.dumps({k: v for k, v in event.items() if k != "kind"}) + "\n")
                for reason, times in event["retries"].items():
                    log.warning("data set %s: %d storage request(s) tried again: %s", event["data"], times, reason)
        if self.host:
            self.host.on_event(folder, event)

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

        self._report_survival(fits)

    def _report_survival(self, fits: Sequence[Fitted]) -> None:
        """What training lived through, if it had to, and the ranks' own shares of a step."""
        restarts = [record for fitted in fits for record in read_attempts(fitted.folder)[1:]]
        if restarts:
            outages = [record["outage_s"] or 0.0 for record in restarts]
            self.report.metrics |= {"restarts": float(len(restarts)), "outage_seconds": sum(outages)}
            rows = [
                [
                    r["why"],
                    r["workers"],
                    r.get("from_step", "-"),
                    "-" if r["outage_s"] is None else f"{r['outage_s']:.1f}",
                ]
                for r in restarts
            ]
            self.report.add_table(
                "restarts", ["why", "workers", "from step", "outage s"], rows, "outage: from step to step"
            )
        ranks = [rank for fitted in fits for rank in fitted.ranks]
        if len(ranks) > 1:
            rows = [[r["rank"], r["host"], f"{1000 * r['own_s'] / max(1, r['steps']):.1f}", r["steps"]] for r in ranks]
            self.report.add_table(
                "ranks", ["rank", "host", "own ms a step", "steps"], rows, "reading and forward pass, without waiting"
            )

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
    parents: Sequence[str] = (),
) -> dict[str, Any]:
    """Stage: the model package, the MLflow model, the registry entry."""
    from labelmill.tracking import registry

    package = folder / "model"
    info = build_package(run.job, package, Fitted(fit.folder), encoder, head, data, predictor, prior, index)
    if info:
        run.progress.line(f"index {info.kind} {info.factory}: {info.bytes / 2**20:.1f} MiB in {info.seconds:.1f} s")
    version = registry.register(run.tracker, package, name, tags={"workload": run.job.workload}, parents=parents)
    run.progress.line(f"registered {name} version {version}, alias candidate")
    return {"name": name, "version": str(version)}
