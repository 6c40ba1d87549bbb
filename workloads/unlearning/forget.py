"""Answers a deletion request against a registered model: a new version that forgets, with proof and an audit.

The request (ids, conditions, classes) is resolved against the training set that the registry recorded with the version. The
new version names its parent, the request's digest, the method and the audit. It is a candidate until somebody promotes it and
revokes the old one.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from labelmill.data.config import StreamConfig
from labelmill.data.deletion import RequestConfig, requested_rows, resolve
from labelmill.data.manifest import Manifest
from labelmill.data.selection import KeepRows, load_selection
from labelmill.data.spec import StreamSpec
from labelmill.encoders import build_encoder
from labelmill.errors import JobError
from labelmill.run import Run
from labelmill.stages import Stage
from labelmill.tracking import registry
from labelmill.tracking.model import read_spec
from labelmill.tracking.requests import EARLIER, FOLDER, REQUEST, fetch_requests, trained_on
from labelmill.training.config import TrainConfig, TrainJob
from labelmill.workload import workload
from workloads.discrimination.partial_fc import image_options
from workloads.unlearning import audit as audits
from workloads.unlearning.audit import AuditSection, answers_of, probe_version
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

    @model_validator(mode="after")
    def _shadows_are_for_comparisons(self) -> ForgetJob:
        if self.audit.shadows:
            raise ValueError("audit.shadows: unlearning.compare trains shadow models; leave it out here")
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


def answer(job: ForgetJob, run: Run) -> None:
    """The whole way from the request to the audited candidate."""
    from labelmill.serving.package import fetch_package

    version, package = fetch_package(job.tracking, job.output, job.model)
    source = f"{version.name}/{version.version}"
    known = trained_on(job.tracking, job.output, source, job.data.train, job.data.test)
    spec = read_spec(package)
    encoder: Any = build_encoder(spec.encoder, root=package).config
    before = run.stage("before", earlier_requests, version=source)
    classes_, masks = _request(job, run, known.train, [str(before.folder / name) for name in before["requests"]])
    run.progress.line(f"{source}: {masks['samples']:,} of {known.train.num_samples:,} samples are to be forgotten")
    sets = {"train": known.train} | ({"test": known.test} if known.test else {})
    run.track_data(**sets)
    run.tracker.artifact(masks.folder / FOLDER / "request.json", FOLDER)
    run.tracker.artifact(masks.folder / FOLDER / "leaves.bin", FOLDER)
    for number, place in enumerate(before["requests"]):
        run.tracker.artifact(before.folder / place, f"{EARLIER}/{number}")

    def stream(data: Manifest, mask: str | None) -> StreamSpec:
        image = image_options(encoder)
        found = job.data.stream(data, spec.field, job.train.global_batch, job.seed, **image)
        return replace(found, selection=load_selection(str(masks.folder / f"{mask}.arrow"))) if mask else found

    retain, forget = stream(known.train, "retain"), stream(known.train, "forget")
    tested = stream(known.test, None) if known.test else None
    original = run.stage("parent", copy_parent, model=str(package))
    shared: dict[str, Any] = {
        "model": str(original.folder / "model"),
        "retain": retain,
        "forget": forget,
        "test": tested,
        "budget": job.train,
        "seed": job.seed,
        "classes": classes_,
    }
    more = {}
    if isinstance(job.method, Sisa):
        Recipe.of(package)  # refuses another model before anything is fetched
        more = {"slices": str(run.stage(SLICES, fetch_slices, version=source).folder / SLICES)}
    made = run.stage("forget", forget_samples, method=job.method, **shared, **more)
    versions = {"parent": original, job.method.kind: made}
    if job.reference and job.method.kind != "retrain":
        versions["retrain"] = run.stage("retrain", forget_samples, method=Retrain(), **shared)
    values = _audit(job, run, versions, retain, forget, tested, classes_, spec.num_classes)
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
        "labelmill.forgot": f"{masks['samples']} of {known.train.num_samples} samples",
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


def _request(job: ForgetJob, run: Run, train: Manifest, before: list[str]) -> tuple[tuple[int, ...], Stage]:
    import hashlib

    from labelmill.data import store

    file = getattr(job.request, "file", None)
    if file and not store.exists(file):
        raise JobError(f"request.file {file}: no such file.")
    sources = [hashlib.sha256(store.read_bytes(file)).hexdigest()] if file else []
    masks = run.stage("request", take_request, request=job.request, train=train, sources=sources, before=before)
    return tuple(masks["classes"]), masks


def _audit(
    job: ForgetJob,
    run: Run,
    versions: Mapping[str, Stage],
    retain: StreamSpec,
    forget: StreamSpec,
    test: StreamSpec | None,
    classes: tuple[int, ...],
    num_classes: int,
) -> dict[str, dict[str, float]]:
    """The table of the report, and the numbers by version."""
    if test is None:
        run.report.add_table("audit", ["version", "note"], [[job.method.kind, "no test set: not audited"]])
        return {name: {} for name in versions}
    most = job.audit.samples
    sets = {
        "retain": audits.part_of(retain, most),
        "forget": audits.part_of(forget, most),
        "test": audits.part_of(test, 3 * most),
    }
    said = {}
    for name, version in {**versions, "random": versions["parent"]}.items():
        stage = run.stage(
            f"probe-{name}", probe_version, version=version, sets=sets, config=job.train, random=name == "random"
        )
        said[name] = {part: answers_of(stage.folder, part) for part in sets}
    reference = said.get("retrain") or (said[job.method.kind] if job.method.kind == "retrain" else None)
    values = {
        name: audits.audit(said[name], classes, job.audit, num_classes, reference, said["random"]) for name in versions
    }
    for name, steps in audits.relearning(run, job.audit, versions, forget, values["parent"]["train_f"]).items():
        values[name]["relearn"] = steps
    if "retrain" in versions:
        seconds = versions["retrain"]["seconds"]
        values[job.method.kind]["time"] = 100 * versions[job.method.kind]["seconds"] / max(seconds, 1e-9)
    columns = [*COLUMNS, *sorted(k for k in values["parent"] if k.startswith("mia_") and not k.endswith("_ci"))]
    shown = [c for c in columns if any(not math.isnan(v.get(c, math.nan)) for v in values.values())]
    rows = [[c, *(round(v.get(c, math.nan), 3) for v in values.values())] for c in shown]
    run.report.add_table(
        "audit",
        ["measure", *values],
        rows,
        "percent (js_to_retrain and zrf: 0 to 1); closest to retrain is best, also for membership inference (mia)",
    )
    return values


AUDIT_METRICS = ("audit/train_r", "audit/train_f", "audit/test_r", "audit/test_f", "audit/gap", "forget/seconds")


@workload("unlearning.forget", ForgetJob, AUDIT_METRICS)
def forget(job: ForgetJob, run: Run) -> None:
    answer(job, run)


@workload("unlearning.laf", LafJob, AUDIT_METRICS)
def forget_without_labels(job: LafJob, run: Run) -> None:
    answer(job, run)
