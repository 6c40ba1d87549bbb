"""Answers a deletion request against a registered model: a new version that forgets, with proof and an audit.

The request (ids, conditions, classes) is resolved against the training set that the registry recorded with the version. The
new version names its parent, the request's digest, the method and the audit. It is a candidate until somebody promotes it and
revokes the old one.
"""

from __future__ import annotations

import hashlib
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from labelmill.data import store
from labelmill.data.config import StreamConfig
from labelmill.data.deletion import RequestConfig, requested_rows, resolve
from labelmill.data.manifest import Manifest
from labelmill.data.selection import KeepRows, load_selection
from labelmill.data.spec import StreamSpec
from labelmill.encoders import build_encoder
from labelmill.errors import JobError
from labelmill.run import Run
from labelmill.serving.package import fetch_package
from labelmill.stages import Stage
from labelmill.tracking import registry
from labelmill.tracking.model import read_spec
from labelmill.tracking.requests import EARLIER, FOLDER, REQUEST, fetch_requests, trained_on
from labelmill.training.config import TrainConfig, TrainJob
from labelmill.workload import workload
from workloads.discrimination.partial_fc import image_options
from workloads.unlearning import audit as audits
from workloads.unlearning.audit import AuditSection
from workloads.unlearning.compare import COLUMNS
from workloads.unlearning.laf import LafConfig
from workloads.unlearning.methods import Finetune, MethodConfig, RemoveClasses, Retrain, Sisa
from workloads.unlearning.model import register_version
from workloads.unlearning.remove import remove_classes
from workloads.unlearning.sisa import SLICES, Recipe, forget_slices
from workloads.unlearning.unlearn import unlearn


class ForgetData(StreamConfig):
    """The recorded data sets are used; places only if they have moved."""

    train: str | None = Field(
        None, min_length=1, description="where the model's training set lies now, if it has moved"
    )
    test: str | None = Field(None, min_length=1, description="likewise its test set")


class ForgetJob(TrainJob):
    """A registered model, a request, a method; `train` is the method's budget."""

    workload: Literal["unlearning.forget", "unlearning.laf"]
    model: str = Field(min_length=1, description="NAME, NAME@alias or NAME/version in the registry")
    request: RequestConfig
    method: MethodConfig | RemoveClasses | Sisa = Field(Finetune(), discriminator="kind")
    data: ForgetData = ForgetData()
    audit: AuditSection = AuditSection()
    reference: bool = Field(True, description="retrain as well, to measure gaps; costs what training costs")


class AuditJob(TrainJob):
    """Registered versions of one training set, a request, and what each version knows of its samples."""

    workload: Literal["unlearning.audit"]
    models: tuple[str, ...] = Field(min_length=1, description="NAME/version and so on; the first is the original")
    reference: str | None = Field(None, description="one of them that never saw the samples: gaps are measured to it")
    request: RequestConfig
    data: ForgetData = ForgetData()
    audit: AuditSection = AuditSection()
    train: TrainConfig = Field(TrainConfig(global_batch=256, steps=1), description="batches of the passes; none trains")

    @model_validator(mode="after")
    def _named(self) -> AuditJob:
        if len(set(self.models)) < len(self.models):
            raise ValueError("models: each version once")
        if self.reference is not None and self.reference not in self.models:
            raise ValueError(f"reference: {self.reference!r} is none of the models")
        return self


class LafJob(ForgetJob):
    """LAF: labels of the training set are dropped before the method sees it."""

    workload: Literal["unlearning.laf"]
    method: LafConfig = Field(LafConfig(), discriminator=None)


def take_request(
    run: Run, folder: Path, request: Any, train: Manifest, sources: list[str], before: list[str]
) -> dict[str, Any]:
    """Stage: the masks, and what is kept of the request. `before`: folders of the requests that the model answers."""
    found = resolve(request, train, requested_rows([Path(place) for place in before], train))
    digest = found.save(folder / FOLDER, train)
    found.forget.save(str(folder / "forget.arrow"))
    found.retain.save(str(folder / "retain.arrow"))
    return {"digest": digest, "samples": found.forget.samples, "classes": list(found.classes or ())}


def earlier_requests(run: Run, folder: Path, version: str) -> dict[str, Any]:
    """Stage: the requests that the model answers already, copied: its samples of then aren't to come back."""
    config, output = run.job.tracking, run.job.output
    found = fetch_requests(config, output, registry.resolve(config, output, version), folder)
    return {"requests": [str(place.relative_to(folder)) for place in found]}


def forget_samples(
    run: Run,
    folder: Path,
    model: str,
    retain: StreamSpec,
    forget: StreamSpec,
    test: StreamSpec | None,
    method: Any,
    budget: TrainConfig,
    seed: int,
    classes: tuple[int, ...],
    slices: str | None = None,
) -> dict[str, Any]:
    """Stage: the method. `slices`: folder of those that the model's training kept."""
    package = Path(model)
    if isinstance(method, Sisa):
        assert slices
        assert isinstance(forget.selection, KeepRows)
        made, measured = forget_slices(run, folder, package, retain, forget.selection, Path(slices))
        return measured | {"package": str(made.relative_to(folder))}
    if isinstance(method, RemoveClasses):
        made, seconds = remove_classes(run, folder, package, retain, classes, method, budget, seed)
    else:
        held_out = None if classes else test
        made, seconds = unlearn(run, folder, package, retain, forget, method, budget, seed, classes, held_out)
    return {"seconds": seconds, "package": str(made.relative_to(folder))}


def copy_parent(run: Run, folder: Path, model: str) -> dict[str, Any]:
    """Stage: the version as it was, so that the run no longer depends on where the registry keeps it."""
    shutil.rmtree(folder / "model", ignore_errors=True)
    shutil.copytree(model, folder / "model")
    return {"package": "model", "seconds": math.nan}


def fetch_slices(run: Run, folder: Path, version: str) -> dict[str, Any]:
    """Stage: what the version's training kept of each shard after each slice."""
    config, output = run.job.tracking, run.job.output
    registry.fetch_artifacts(config, output, registry.resolve(config, output, version), SLICES, folder)
    return {}


@dataclass(frozen=True)
class Asked:
    """A request against a version.

    Attributes:
        classes: forgotten as a whole.
        masks: the stage with the request.
        retain, forget, test: streams; `test` is None where no test set is known.
    """

    classes: tuple[int, ...]
    masks: Stage
    retain: StreamSpec
    forget: StreamSpec
    test: StreamSpec | None
    num_classes: int


def asked(job: ForgetJob | AuditJob, run: Run, source: str, package: Path, before: Sequence[str] = ()) -> Asked:
    """Resolves a job's request against the data that a version was trained on, without that of the requests in `before`."""
    known = trained_on(job.tracking, job.output, source, job.data.train, job.data.test)
    if job.audit.shadows:
        raise JobError("audit.shadows: unlearning.compare trains shadow models; leave it out here.")
    file = getattr(job.request, "file", None)
    if file and not store.exists(file):
        raise JobError(f"request.file {file}: no such file.")
    sources = [hashlib.sha256(store.read_bytes(file)).hexdigest()] if file else []
    more = {"request": job.request, "train": known.train, "sources": sources, "before": list(before)}
    masks = run.stage("request", take_request, **more)
    run.progress.line(f"{source}: the request is for {masks['samples']:,} of {known.train.num_samples:,} samples")
    run.track_data(**{"train": known.train} | ({"test": known.test} if known.test else {}))
    spec = read_spec(package)
    encoder: Any = build_encoder(spec.encoder, root=package).config

    def stream(data: Manifest, mask: str | None) -> StreamSpec:
        found = job.data.stream(data, spec.field, job.train.global_batch, job.seed, **image_options(encoder))
        return replace(found, selection=load_selection(str(masks.folder / f"{mask}.arrow"))) if mask else found

    return Asked(
        tuple(masks["classes"]),
        masks,
        stream(known.train, "retain"),
        stream(known.train, "forget"),
        stream(known.test, None) if known.test else None,
        spec.num_classes,
    )


def answer(job: ForgetJob, run: Run) -> None:
    """The whole way from the request to the audited candidate."""
    version, package = fetch_package(job.tracking, job.output, job.model)
    source = f"{version.name}/{version.version}"
    before = run.stage("before", earlier_requests, version=source)
    question = asked(job, run, source, package, [str(before.folder / name) for name in before["requests"]])
    masks = question.masks
    run.tracker.artifact(masks.folder / FOLDER / "request.json", FOLDER)
    run.tracker.artifact(masks.folder / FOLDER / "leaves.bin", FOLDER)
    for number, place in enumerate(before["requests"]):
        run.tracker.artifact(before.folder / place, f"{EARLIER}/{number}")

    original = run.stage("parent", copy_parent, model=str(package))
    shared: dict[str, Any] = {
        "model": str(original.folder / "model"),
        "retain": question.retain,
        "forget": question.forget,
        "test": question.test,
        "budget": job.train,
        "seed": job.seed,
        "classes": question.classes,
    }
    more = {}
    if isinstance(job.method, Sisa):
        Recipe.of(package)  # refuses another model before anything is fetched
        more = {"slices": str(run.stage(SLICES, fetch_slices, version=source).folder / SLICES)}
    made = run.stage("forget", forget_samples, method=job.method, **shared, **more)
    versions = {"parent": original, job.method.kind: made}
    if job.reference and job.method.kind != "retrain":
        versions["retrain"] = run.stage("retrain", forget_samples, method=Retrain(), **shared)
    reference = "retrain" if "retrain" in versions else None
    values = _audit(job, run, versions, question, reference)
    found = values[job.method.kind]
    run.report.metrics |= {f"audit/{k}": v for k, v in found.items() if not math.isnan(v)}
    run.report.metrics |= {"request/samples": float(masks["samples"]), "forget/seconds": made["seconds"]}
    if "trained" in made.values:
        share = 100 * made["seconds"] / max(made["all_seconds"], 1e-9)
        run.report.metrics |= {"forget/turns": float(made["trained"]), "forget/share": share}
        run.progress.line(f"{made['trained']} of {made['of']} turns were trained again")
    tags = {
        "workload": job.workload,
        REQUEST: masks["digest"],
        "labelmill.method": job.method.kind,
        "labelmill.forgot": f"{masks['samples']} of {question.forget.manifest.num_samples} samples",
    } | {f"audit.{k}": f"{v:.3f}" for k, v in found.items() if not math.isnan(v) and not k.endswith("_ci")}
    run.report.meta |= {"request": masks["digest"], "parent_model": source}
    if (made.folder / SLICES).is_dir():
        run.tracker.artifact(made.folder / SLICES, SLICES)
    done = run.stage(
        "register", register_version, name=job.register_as or version.name, made=made, tags=tags, parents=[source]
    )
    run.progress.line(
        f"look at it: labelmill models show {done['name']}; make it answer: labelmill models revoke {source} "
        f"--champion {done['version']}"
    )


def _audit(
    job: ForgetJob | AuditJob, run: Run, versions: Mapping[str, Stage], question: Asked, reference: str | None
) -> dict[str, dict[str, float]]:
    """The table of the report, and the numbers by version."""
    if question.test is None:
        run.report.add_table("audit", ["version", "note"], [[n, "no test set: not audited"] for n in versions])
        return {name: {} for name in versions}
    most, first = job.audit.samples, next(iter(versions))
    sets = {
        "retain": audits.part_of(question.retain, most),
        "forget": audits.part_of(question.forget, most),
        "test": audits.part_of(question.test, 3 * most),
    }
    said = audits.ask_all(run, versions, sets, job.train)
    gold = said[reference] if reference else None
    values = {
        name: audits.audit(said[name], question.classes, job.audit, question.num_classes, gold, said["random"])
        for name in versions
    }
    known_f = values[first]["train_f"]
    for name, steps in audits.relearning(run, job.audit, versions, question.forget, known_f).items():
        values[name]["relearn"] = steps
    for name, version in versions.items() if reference else ():
        values[name]["time"] = 100 * version["seconds"] / max(versions[str(reference)]["seconds"], 1e-9)
    columns = [*COLUMNS, *sorted(k for k in values[first] if k.startswith("mia_") and not k.endswith("_ci"))]
    shown = [c for c in columns if any(not math.isnan(v.get(c, math.nan)) for v in values.values())]
    rows = [[c, *(round(v.get(c, math.nan), 3) for v in values.values())] for c in shown]
    run.report.add_table(
        "audit",
        ["measure", *values],
        rows,
        "percent (js_to_retrain and zrf: 0 to 1); closest to retraining is best, also for membership inference (mia)",
    )
    return values


AUDIT_METRICS = ("audit/train_r", "audit/train_f", "audit/test_r", "audit/test_f", "audit/gap", "forget/seconds")


@workload("unlearning.forget", ForgetJob, AUDIT_METRICS)
def forget(job: ForgetJob, run: Run) -> None:
    answer(job, run)


@workload("unlearning.laf", LafJob, AUDIT_METRICS)
def forget_without_labels(job: LafJob, run: Run) -> None:
    answer(job, run)


@workload("unlearning.audit", AuditJob)
def audit_versions(job: AuditJob, run: Run) -> None:
    versions: dict[str, Stage] = {}
    question: Asked | None = None
    for ref in job.models:
        version, package = fetch_package(job.tracking, job.output, ref)
        source = f"{version.name}/{version.version}"
        if question is None:
            question = asked(job, run, source, package)
        elif read_spec(package).manifest != question.forget.manifest.digest:
            raise JobError(
                f"models: {ref} wasn't trained on the data of {job.models[0]}, so one request can't ask both."
            )
        versions[ref] = run.stage(f"version-{audits.file_name(ref)}", copy_parent, model=str(package))
    assert question
    for name, values in _audit(job, run, versions, question, job.reference).items():
        run.report.metrics |= {f"{audits.file_name(name)}/{k}": v for k, v in values.items() if not math.isnan(v)}
