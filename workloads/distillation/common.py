"""What the distillation methods share: samples for teacher and student, the teacher's stages, the report.

Shape legend: N samples, Q test samples, C classes.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from labelmill.data.config import DataConfig
from labelmill.data.keys import key_hashes
from labelmill.data.manifest import Manifest
from labelmill.data.outputs import Outputs
from labelmill.data.selection import KeepRows
from labelmill.data.shards import read_labels
from labelmill.data.spec import AnySpec
from labelmill.encoders import EncoderConfig, build_encoder
from labelmill.errors import DataError, JobError
from labelmill.evaluation.calibration import reliability
from labelmill.evaluation.groups import wilson_interval
from labelmill.heads.config import HeadConfig
from labelmill.packaging import build_package
from labelmill.reporting import report_training
from labelmill.run import Run
from labelmill.stages import Fitted, Stage
from labelmill.teachers import (
    CachedTeacher,
    EncoderTeacher,
    FittedTeacher,
    RegisteredTeacher,
    TeacherModel,
    check_teacher,
    package_digest,
    teach,
)
from labelmill.tracking import figures
from labelmill.training.config import TrainConfig
from workloads.discrimination.partial_fc import Classifier, input_options
from workloads.distillation.student import Arm, Student, TeacherPlace

AnyTeacher = RegisteredTeacher | FittedTeacher | CachedTeacher | EncoderTeacher


def carve(data: Manifest, folder: Path, sizes: Mapping[str, int], seed: int) -> dict[str, KeepRows]:
    """Disjoint samples of a data set, drawn by the hash of their keys. Raises DataError when there are too few."""
    keys = [read_labels(data, i).column("key").to_pylist() for i in range(len(data.shards))]
    hashes = key_hashes([f"carve|{seed}|{key}" for shard in keys for key in shard])[0]
    if sum(sizes.values()) > len(hashes):
        raise DataError(f"{sum(sizes.values())} samples asked for ({dict(sizes)}), {data.name!r} has {len(hashes)}.")
    rank = np.empty(len(hashes), np.int64)
    rank[np.argsort(hashes, kind="stable")] = np.arange(len(hashes))
    cuts = np.cumsum([0, *map(len, keys)])
    found, lo = {}, 0
    folder.mkdir(parents=True, exist_ok=True)
    for name, size in sizes.items():
        mask = (rank >= lo) & (rank < lo + size)
        rows = KeepRows.of((mask[a:b] for a, b in pairwise(cuts)), data.digest, {"part": name, "seed": seed})
        found[name] = rows.save(str(folder / f"{name}-{lo}-{size}-{seed}.arrow"))
        lo += size
    return found  # type: ignore[return-value]


def streams(
    data: DataConfig,
    train: Manifest,
    folder: Path,
    parts: Mapping[str, tuple[int | None, int]],
    encoders: Mapping[str, Any],
    seed: int,
) -> dict[str, AnySpec]:
    """A training stream for each name: (samples or None for all, global batch)."""
    sizes = {name: count for name, (count, _) in parts.items() if count}
    carved = carve(train, folder, sizes, seed) if sizes else {}
    out: dict[str, AnySpec] = {}
    for name, (_, batch) in parts.items():
        options = input_options(encoders[name], seed)
        spec = data.training_stream(train, folder, global_batch=batch, **options)
        if name in carved:
            if data.select or data.mix:
                raise JobError("samples and data.select or data.mix don't go together: leave one out.")
            spec = replace(spec, selection=carved[name])  # type: ignore[arg-type]
        out[name] = spec
    return out


def fit_teacher(
    run: Run, folder: Path, train: AnySpec, predict: dict[str, AnySpec], teacher: FittedTeacher, seed: int
) -> dict[str, Any]:
    """Stage: the teacher, a classifier with cosine logits."""
    assert train.label.num_classes is not None
    objective = partial(Classifier, teacher.encoder, teacher_head(teacher), train.label.num_classes, seed)
    return {"seconds": run.fit(folder, objective, train, teacher.train, predict, teacher.augment, seed=seed).seconds}


def teacher_head(teacher: FittedTeacher) -> HeadConfig:
    """Of a teacher that the job trains."""
    return HeadConfig(scale=teacher.scale)


def pack_teacher(run: Run, folder: Path, fit: Stage, teacher: FittedTeacher, data: Manifest) -> dict[str, Any]:
    """Stage: the teacher as a packaged model."""
    build_package(run.job, folder / "model", Fitted(fit.folder), teacher.encoder, teacher_head(teacher), data)
    return {"digest": package_digest(folder / "model")}


@dataclass
class Teacher:
    """A teacher at work: where students find it, and what is known of it.

    Attributes:
        train, test: kept outputs; None where it runs live, or has none of the test set.
        package: its packaged model, if it has one.
        reference: registry reference, for lineage.
    """

    place: TeacherPlace
    train: Outputs | None = None
    test: Outputs | None = None
    package: Path | None = None
    reference: str = ""


def open_teacher(
    run: Run,
    teacher: AnyTeacher,
    train: Manifest,
    test: Manifest,
    spec: AnySpec | None,
    max_bad: int,
    seed: int,
    only: str = "",
) -> Teacher:
    """Trains, fetches or opens the teacher, and runs it over both sets unless it runs live.

    `spec` is the training stream of a teacher that is fitted here; `only` the file of a selection of training samples, if the
    teacher is to be asked about these alone.
    """
    if isinstance(teacher, CachedTeacher):
        kept, held = (Outputs(place) if place else None for place in (teacher.folder, teacher.test))
        assert kept is not None
        for outputs, data in ((kept, train), (held, test)):
            if outputs is not None:
                outputs.verify()
                outputs.check(data, classes=outputs.info.num_classes > 0)
        place = TeacherPlace(
            outputs=str(Path(teacher.folder).resolve()), width=_width(kept), temperatures=kept.info.temperatures
        )
        return Teacher(place, kept, held)
    package, reference, name = None, "", ""
    if isinstance(teacher, FittedTeacher):
        assert spec is not None
        fit = run.stage("fit-teacher", fit_teacher, train=spec, predict={}, teacher=teacher, seed=seed)
        report_training(run, Fitted(fit.folder), fit["seconds"], "teacher")
        packed = run.stage("pack-teacher", pack_teacher, fit=fit, teacher=teacher, data=train)
        package, name = packed.folder / "model", f"teacher of {run.job.name}: {packed['digest']}"
    elif isinstance(teacher, RegisteredTeacher):
        from labelmill.serving.package import fetch_package

        version, package = fetch_package(run.job.tracking, run.job.output, teacher.model)
        reference = name = f"{version.name}/{version.version}"
    encoder = teacher.encoder if isinstance(teacher, EncoderTeacher) else None
    model = check_teacher(package, train).encoder if package else build_encoder(encoder)  # type: ignore[arg-type]
    width = model.dim
    if teacher.live:
        place = TeacherPlace(package=str(package.resolve()) if package else "", encoder=encoder, width=width)
        return Teacher(place, package=package, reference=reference)
    options: dict[str, Any] = {
        "package": package,
        "encoder": encoder,
        "name": name or f"encoder {teacher.kind}",
        "columns": teacher.columns,
        "k": teacher.k,
        "temperatures": teacher.temperatures,
        "dtype": teacher.dtype,
        "max_bad": max_bad,
    }
    kept = Outputs(run.stage("teach", teach, data=train, only=only, **options).folder / "outputs")
    kept.check(train, classes=kept.info.num_classes > 0)
    columns = ("logits",) if package and (train.label.num_classes or 0) <= 1000 else teacher.columns
    held = Outputs(run.stage("teach-test", teach, data=test, **(options | {"columns": columns})).folder / "outputs")
    run.report.meta["teacher"] = name or teacher.kind
    run.report.meta["teacher_outputs"] = kept.digest
    run.tracker.tags({"labelmill.teacher_outputs": kept.digest})
    place = TeacherPlace(outputs=str(kept.folder.resolve()), width=width, temperatures=kept.info.temperatures)
    return Teacher(place, kept, held, package, reference)


def _width(kept: Outputs) -> int:
    values = kept._columns.get("embedding")
    return 0 if values is None else int(values[np.array([0])].shape[1])


def fit_student(
    run: Run,
    folder: Path,
    train: AnySpec,
    predict: dict[str, AnySpec],
    encoder: EncoderConfig,
    head: HeadConfig | None,
    arm: Arm,
    teacher: TeacherPlace | None,
    config: TrainConfig,
    seed: int,
    augment: bool,
) -> dict[str, Any]:
    """Stage: one student."""
    assert train.label.num_classes is not None
    if arm.learning_rate:
        config = config.model_copy(update={"learning_rate": arm.learning_rate})
    if arm.align != "none" and config.zero_stage == 3:
        raise JobError("align takes the gradient of each loss by whole parameters: use train.zero_stage 0, 1 or 2.")
    objective = partial(
        Student,
        encoder,
        head,
        train.label.num_classes,
        arm,
        seed,
        teacher if arm.taught else None,
        epoch_steps=max(1.0, train.epoch_samples / config.global_batch) * config.accumulation,
        step_samples=config.global_batch // config.accumulation,
    )
    return {"seconds": run.fit(folder, objective, train, config, predict, augment, seed=seed).seconds}


# --- report ------------------------------------------------------------------------------------------------------


def matrix_of(table: Any, name: str) -> np.ndarray:
    """A column of predictions as (Q, ...)."""
    column = table.column(name).combine_chunks()
    flat = column.flatten() if hasattr(column, "flatten") else column
    return flat.to_numpy(zero_copy_only=False).reshape(len(table), -1)


def report_students(
    run: Run, fits: Mapping[str, Stage], teacher: Teacher | None, test: Manifest, stream: str = "test"
) -> None:
    """Accuracy, calibration, and how far each student agrees with the teacher; curves, agreement, reliability."""
    rows: list[Any] = []
    curves: dict[str, Any] = {}
    classes: dict[str, np.ndarray] = {}
    t_NC = None
    for name, fit in fits.items():
        table = Fitted(fit.folder).predictions(stream)
        label_Q, best_Q = matrix_of(table, "label")[:, 0], matrix_of(table, "class_id")[:, 0]
        confidence_Q = matrix_of(table, "prob")[:, 0].clip(0, 1)
        if t_NC is None and teacher and teacher.test and "logits" in teacher.test.info.columns:
            found = teacher.test.read(table.column("key").to_pylist()).logits_BC
            assert found is not None
            t_NC = found
            add_row(run, rows, curves, classes, "teacher", label_Q, *_best(t_NC), None, None)
        s_NC = torch.from_numpy(matrix_of(table, "logits").copy()) if "logits" in table.column_names else None
        add_row(run, rows, curves, classes, name, label_Q, best_Q, confidence_Q, t_NC, s_NC)
    caption = "test set; the interval is that of the sample, not of the seed. Agreement and KL are with the teacher"
    header = ["system", "accuracy %", "ECE %", "agreement %", "KL to teacher"]
    run.report.add_table("students", header, rows, caption)
    figures.lines(
        curves | {"perfect": ([0, 1], [0, 1])}, "confidence", "accuracy", run.figure("reliability"), markers=True
    )
    names = list(classes)
    if len(names) > 1:
        agree = np.array([[float((classes[a] == classes[b]).mean()) for b in names] for a in names])
        figures.matrix(agree, names, names, run.figure("agreement"), "", "", title="same answer on the test set")
    _report_curves(run, fits)
    teacher_accuracy = run.report.metrics.get("test/teacher")
    if teacher_accuracy is not None:
        better = [n for n in fits if run.report.metrics[f"test/{n}"] > teacher_accuracy]
        if better:
            run.report.notes.append(f"the teacher is less accurate on the test set than {', '.join(better)}")


def _best(t_NC: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    prob, ids = torch.softmax(t_NC, 1).max(1)
    return ids.numpy(), prob.numpy()


def add_row(
    run: Run,
    rows: list[Any],
    curves: dict[str, Any],
    classes: dict[str, np.ndarray],
    name: str,
    label_Q: np.ndarray,
    best_Q: np.ndarray,
    confidence_Q: np.ndarray,
    t_QC: torch.Tensor | None,
    s_QC: torch.Tensor | None,
) -> None:
    """One system's figures."""
    right_Q = best_Q == label_Q
    low, high = wilson_interval(int(right_Q.sum()), len(right_Q))
    found = reliability(confidence_Q, right_Q)
    facts = {"test": float(right_Q.mean()), "ece": found.ece}
    if t_QC is not None:
        facts["agreement"] = float((best_Q == t_QC.argmax(1).numpy()).mean())
        if s_QC is not None:
            log_q, log_p = torch.log_softmax(t_QC.double(), 1), torch.log_softmax(s_QC.double(), 1)
            facts["kl"] = float((log_q.exp() * (log_q - log_p)).sum(1).mean())
    run.report.metrics |= {f"{metric}/{name}": value for metric, value in facts.items()}
    shown = [f"{100 * facts[m]:.2f}" if m in facts else "" for m in ("ece", "agreement")]
    kl = f"{facts['kl']:.4f}" if "kl" in facts else ""
    rows.append([name, f"{100 * facts['test']:.2f} ± {50 * (high - low):.2f}", *shown, kl])
    curves[name] = (found.confidence_M.tolist(), found.accuracy_M.tolist())
    classes[name] = best_Q


def _report_curves(run: Run, fits: Mapping[str, Stage]) -> None:
    curves = {}
    for name, fit in fits.items():
        history = Fitted(fit.folder).history
        if history:
            curves[name] = ([h["step"] for h in history], [h["train/loss"] for h in history])
        report_training(run, Fitted(fit.folder), fit["seconds"], name)
        run.report_data_health(Fitted(fit.folder))
    if curves:
        figures.lines(curves, "step", "training loss", run.figure("losses"))


def measure(folder: Path, raw: Any, repeats: int = 20) -> dict[str, float]:
    """Size and speed of a packaged model on this machine, one thread: parameters, megabytes, milliseconds a sample.

    The median of single batches of `raw`, with preparation.
    """
    model = TeacherModel.of(folder)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        seconds = []
        for _ in range(repeats):
            began = time.perf_counter()
            model(model.encoder.prepare(raw))
            seconds.append(time.perf_counter() - began)
    finally:
        torch.set_num_threads(threads)
    parameters = sum(p.numel() for p in model.parameters())
    size = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
    return {"parameters": parameters, "mb": size / 2**20, "ms": 1000 * float(np.median(seconds)) / max(1, len(raw))}
