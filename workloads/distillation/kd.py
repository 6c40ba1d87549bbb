"""Knowledge distillation: a small student learns from labels and from a teacher's logits or features, many ways side by side.

Hinton, Vinyals, Dean 2015 (KD); Sun et al. 2024 (logit standardisation); Zhao et al. 2022 (DKD); Huang et al. 2022 (DIST);
Romero et al. 2015 (FitNet); Park et al. 2019 (RKD); Tung and Mori 2019 (SP); Tian et al. 2020 (CRD).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, model_validator

from labelmill.data.config import DataConfig
from labelmill.data.manifest import Manifest
from labelmill.data.spec import StreamSpec
from labelmill.encoders import EncoderConfig, build_encoder
from labelmill.encoders.base import Encoder
from labelmill.errors import JobError
from labelmill.heads.config import HeadConfig
from labelmill.losses.distillation import KD
from labelmill.packaging import build_package
from labelmill.run import Run
from labelmill.stages import Fitted, Stage
from labelmill.teachers import EncoderTeacher, FittedTeacher, TeacherConfig, TeacherModel
from labelmill.training.config import TrainJob
from labelmill.workload import workload
from workloads.discrimination.partial_fc import input_options
from workloads.distillation.arms import Arm, Arms, LogitTerm
from workloads.distillation.common import (
    MEASURED,
    Teacher,
    fit_student,
    measure,
    open_teacher,
    report_students,
    some_inputs,
    streams,
)
from workloads.distillation.matching import map_shapes, paired

_HINTON = Arm(ce=0.1, losses=(LogitTerm(weight=0.9, loss=KD(temperature=4)),))


class DistillJob(TrainJob):
    """Data, a teacher, a student, and the ways to train it."""

    data: DataConfig
    teacher: TeacherConfig
    encoder: EncoderConfig
    head: HeadConfig | None = Field(None, description="a class-sharded head instead of a dense layer")
    samples: int | None = Field(None, ge=2, description="the student's training samples, drawn by their keys")
    arms: Arms = Field(
        min_length=1, description="ways to train the student, by name; a registered model is that of the last"
    )
    augment: bool = Field(True, description="the encoder's training augmentation, if it has one")
    eval_batch: int = Field(1024, ge=1)

    def class_count(self) -> int | None:
        return self.data.open()[0].label.num_classes

    @model_validator(mode="after")
    def _fits_together(self) -> DistillJob:
        live = getattr(self.teacher, "live", False)
        if self.augment and not live and getattr(getattr(self.encoder, "augment", None), "active", False):
            raise ValueError(
                "kept teacher outputs belong to inputs without augmentation: set teacher.live to true, or augment to false"
            )
        columns = set(getattr(self.teacher, "columns", ()))
        for name, arm in self.arms.items():
            if any(not t.of_maps for t in arm.features) and columns and "embedding" not in columns and not live:
                raise ValueError(f"arms.{name}: feature losses need embedding in teacher.columns")
            if arm.needs_maps and not live:
                raise ValueError(
                    f"arms.{name}: feature maps are too large to keep: attention and fitnet_maps take a teacher that runs "
                    "beside the student (kind fit, registered or encoder, with live: true)"
                )
            if arm.needs_maps and self.train.zero_stage == 3:
                raise ValueError(f"arms.{name}: attention and fitnet_maps take train.zero_stage 0, 1 or 2")
            if live and any(term.loss.kind == "listed_kd" for term in arm.losses):
                raise ValueError(f"arms.{name}: listed_kd takes kept outputs (teacher.live false, columns topk)")
        return self


class KDJob(DistillJob):
    """Any losses of the toolbox."""

    workload: Literal["distillation.kd"]
    arms: Arms = Field({"CE": Arm(), "KD": _HINTON}, min_length=1)


def distill(job: DistillJob, run: Run) -> tuple[dict[str, Stage], Teacher, Manifest]:
    """Teacher, students, report: what the methods of this family share."""
    train, test = job.data.open()
    if train.label.form != "single":
        raise JobError(f"{job.workload} takes a single label a sample; {train.name!r} has {train.label.form}.")
    needs_maps = any(arm.needs_maps for arm in job.arms.values())
    if needs_maps and isinstance(job.teacher, FittedTeacher | EncoderTeacher):
        check_maps(job, _built(job.teacher.encoder))
    parts = {"student": (job.samples, job.train.global_batch)}
    encoders: dict[str, Any] = {"student": job.encoder}
    if isinstance(job.teacher, FittedTeacher):
        parts["teacher"] = (job.teacher.samples, job.teacher.train.global_batch)
        encoders["teacher"] = job.teacher.encoder
    spec = streams(job.data, train, run.folder / "data", parts, encoders, job.seed)
    run.track_data(train=spec["student"], test=test)
    chosen = getattr(spec["student"], "selection", None)
    only = chosen.path if job.samples and chosen is not None else ""
    options = (spec.get("teacher"), job.data.max_bad_samples, job.seed, only)
    teacher = open_teacher(run, job.teacher, train, test, *options)
    if needs_maps and teacher.package:
        check_maps(job, TeacherModel.of(teacher.package).encoder)
    look: Callable[..., StreamSpec] = partial(
        job.data.stream, global_batch=job.eval_batch, shuffle=False, **input_options(job.encoder, job.seed)
    )
    # without it, earlier runs' stages keep their key
    meanwhile = {"evaluate": look(test)} if job.train.evaluate_every else {}
    fits = {
        name: run.stage(
            f"fit-{name}".lower().replace(" ", "-").replace("/", "-"),
            fit_student,
            train=spec["student"],
            predict={"test": look(test)},
            encoder=job.encoder,
            head=job.head,
            arm=arm,
            teacher=teacher.place,
            config=job.train,
            seed=job.seed,
            augment=job.augment,
            **meanwhile,
        )
        for name, arm in job.arms.items()
    }
    report_students(run, fits, teacher, test)
    export(job, run, fits, teacher, train, test)
    return fits, teacher, train


def check_maps(job: DistillJob, teacher: Encoder) -> None:
    """Raises JobError unless the feature maps that arms compare are there."""
    shapes = map_shapes(_built(job.encoder)), map_shapes(teacher)
    for arm in job.arms.values():
        for term in arm.features:
            if term.of_maps:
                paired(term, *shapes)


def _built(config: EncoderConfig) -> Encoder:
    with torch.random.fork_rng(devices=[]):
        return build_encoder(config)


def pack_student(
    run: Run, folder: Path, fit: Stage, encoder: EncoderConfig, head: HeadConfig | None, data: Manifest
) -> dict[str, Any]:
    """Stage: the student as a packaged model: encoder and main head, nothing else."""
    build_package(run.job, folder / "model", Fitted(fit.folder), encoder, head, data)
    return {}


def export(
    job: DistillJob, run: Run, fits: dict[str, Stage], teacher: Teacher, train: Manifest, test: Manifest
) -> None:
    """Teacher and student side by side: size, speed, what they are right about; the student in the registry."""
    name = [*fits][-1]
    last = fits[name]
    packed = run.stage("pack-student", pack_student, fit=last, encoder=job.encoder, head=job.head, data=train)
    packages = {"teacher": teacher.package, "student": packed.folder / "model"}
    rows = []
    for who, package in packages.items():
        if package is None:
            continue
        facts = measure(package, some_inputs(test, TeacherModel.of(package).encoder))
        run.report.metrics |= {f"model/{who}/{key}": value for key, value in facts.items()}
        arm = name if who == "student" else who
        told = [run.report.metrics.get(f"{metric}/{arm}") for metric in ("test", "ece", "agreement")]
        shown = ["" if value is None else f"{100 * value:.2f}" for value in told]
        rows.append([arm, f"{facts['parameters']:,}", f"{facts['mb']:.2f}", f"{facts['ms']:.4f}", *shown])
    header = ["model", "parameters", "MiB", "ms a sample", "accuracy %", "ECE %", "agreement %"]
    caption = f"packaged models; speed: one thread, batches of {MEASURED}, preparation included"
    run.report.add_table("size and speed", header, rows, caption)
    if job.register_as:
        parents = [teacher.reference] if teacher.reference else []
        tags = {"labelmill.teacher_outputs": teacher.train.digest} if teacher.train else {}
        options: dict[str, Any] = {"encoder": job.encoder, "head": job.head, "data": train}
        run.register(job.register_as, last, parents=parents, tags=tags, **options)


@workload("distillation.kd", KDJob)
def kd(job: KDJob, run: Run) -> None:
    distill(job, run)
