"""Knowledge distillation: a small student learns from labels and from a teacher's logits or features, many ways side by side.

Hinton, Vinyals, Dean 2015 (KD); Sun et al. 2024 (logit standardisation); Zhao et al. 2022 (DKD); Huang et al. 2022 (DIST);
Romero et al. 2015 (FitNet); Park et al. 2019 (RKD); Tung and Mori 2019 (SP); Tian et al. 2020 (CRD).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, model_validator

from labelmill.data.config import DataConfig
from labelmill.data.manifest import Manifest
from labelmill.data.shards import read_shard
from labelmill.data.spec import StreamSpec
from labelmill.encoders import EncoderConfig
from labelmill.errors import JobError
from labelmill.heads.config import HeadConfig
from labelmill.losses.distillation import KD
from labelmill.packaging import build_package
from labelmill.run import Run
from labelmill.stages import Fitted, Stage
from labelmill.teachers import FittedTeacher, TeacherConfig
from labelmill.training.config import TrainJob
from labelmill.workload import workload
from workloads.discrimination.partial_fc import image_options, input_options
from workloads.distillation.common import Teacher, fit_student, measure, open_teacher, report_students, streams
from workloads.distillation.student import Arm, Arms, LogitTerm

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
        if self.register_as and not self.head:
            raise ValueError("register_as registers class rows of a sharded head: give head as well")
        live = getattr(self.teacher, "live", False)
        if self.augment and not live and getattr(getattr(self.encoder, "augment", None), "active", False):
            raise ValueError(
                "kept teacher outputs belong to inputs without augmentation: set teacher.live to true, or augment to false"
            )
        columns = set(getattr(self.teacher, "columns", ()))
        for name, arm in self.arms.items():
            if arm.features and columns and "embedding" not in columns and not live:
                raise ValueError(f"arms.{name}: feature losses need embedding in teacher.columns")
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
    look: Callable[..., StreamSpec] = partial(
        job.data.stream, global_batch=job.eval_batch, shuffle=False, **input_options(job.encoder, job.seed)
    )
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
        )
        for name, arm in job.arms.items()
    }
    report_students(run, fits, teacher, test)
    export(job, run, fits, teacher, train, test)
    return fits, teacher, train


def pack_student(
    run: Run, folder: Path, fit: Stage, encoder: EncoderConfig, head: HeadConfig, data: Manifest
) -> dict[str, Any]:
    """Stage: the student as a packaged model: encoder and main head, nothing else."""
    build_package(run.job, folder / "model", Fitted(fit.folder), encoder, head, data)
    return {}


def export(
    job: DistillJob, run: Run, fits: dict[str, Stage], teacher: Teacher, train: Manifest, test: Manifest
) -> None:
    """Size and speed of teacher and student; the student in the registry, with its teacher as parent."""
    last = fits[[*fits][-1]]
    rows = []
    raw = _some_inputs(test, job)
    found = {}
    if teacher.package and raw is not None:
        found["teacher"] = measure(teacher.package, raw)
    if job.head and raw is not None:
        packed = run.stage("pack-student", pack_student, fit=last, encoder=job.encoder, head=job.head, data=train)
        found["student"] = measure(packed.folder / "model", raw)
    for name, facts in found.items():
        rows.append([name, f"{facts['parameters']:,}", f"{facts['mb']:.2f}", f"{facts['ms']:.4f}"])
        run.report.metrics |= {f"model/{name}/{key}": value for key, value in facts.items()}
    if rows:
        caption = f"packaged models; one thread, batches of {len(raw)}, preparation included"
        run.report.add_table("size and speed", ["model", "parameters", "MiB", "ms a sample"], rows, caption)
    if job.register_as and job.head:
        parents = [teacher.reference] if teacher.reference else []
        run.register(job.register_as, last, encoder=job.encoder, head=job.head, data=train, parents=parents)


def _some_inputs(test: Manifest, job: DistillJob, count: int = 64) -> Any:
    """Decoded inputs of the test set; None for fields that aren't images."""
    from labelmill.data.decode import decode_images

    if test.fields[job.encoder.field].kind != "image":
        return None
    table = read_shard(test, 0).slice(0, count)
    options = image_options(job.encoder)
    keys = table.column("key").to_pylist()
    images: np.ndarray = decode_images(
        table.column(job.encoder.field), keys, size=options["image_size"], channels=options["channels"]
    )[0]
    return images


@workload("distillation.kd", KDJob)
def kd(job: KDJob, run: Run) -> None:
    distill(job, run)
