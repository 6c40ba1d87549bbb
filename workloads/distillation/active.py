"""Robust active distillation: buy soft labels from a teacher that is often wrong, where a wrong answer hurts least.

Baykal, Trinh, Iliopoulos, Menghani, Vee (ICLR 2023, arXiv 2210.01213). No code of the authors was found: the game is
reconstructed and checked against a linear program; how they round it to a batch is not known.

Shape legend: B samples of this rank, n samples of the pool, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from labelmill.data.config import DataConfig
from labelmill.data.labels import Labels
from labelmill.data.manifest import Manifest
from labelmill.data.outputs import Outputs
from labelmill.data.selection import KeepRows, load_selection
from labelmill.data.shards import read_labels
from labelmill.data.spec import AnySpec, StreamSpec
from labelmill.data.stream import Batch
from labelmill.encoders import EncoderConfig, build_encoder
from labelmill.errors import DataError, JobError
from labelmill.evaluation.groups import wilson_interval
from labelmill.evaluation.query_game import choose
from labelmill.job import StrictModel
from labelmill.losses.soft_targets import soft_cross_entropy
from labelmill.run import Run
from labelmill.stages import Fitted, Stage
from labelmill.teachers import FittedTeacher, check_teacher, teach
from labelmill.tracking import figures
from labelmill.training.config import TrainConfig, TrainJob
from labelmill.training.objective import Losses, Objective
from labelmill.workload import workload
from workloads.discrimination.partial_fc import input_options
from workloads.distillation.common import carve, fit_teacher, matrix_of, pack_teacher
from workloads.noisy.audited import labels_by_key

_FEW = 50  # labelled samples below which the teacher's error is little known


class Buyer(StrictModel):
    """How samples are chosen."""

    kind: Literal["robust", "random", "margin", "entropy", "confident"] = "robust"
    gain: Literal["margin", "entropy", "least_confident"] = Field(
        "margin", description="robust: informativeness of a sample"
    )
    cost: float = Field(
        1.0, ge=1, description="robust: what a wrong answer costs; 1: it is lost, 2: as bad as a right one is good"
    )


class ActiveJob(TrainJob):
    """A few labels, a pool, a teacher, a budget."""

    workload: Literal["distillation.active"]
    data: DataConfig
    teacher: FittedTeacher
    encoder: EncoderConfig
    labelled: int = Field(300, ge=2, description="samples with their label, drawn by their keys")
    pool: int = Field(5000, ge=2, description="samples without a label that the teacher may be asked about")
    validation: int = Field(500, ge=2, description="labelled samples that only tell how often the teacher is wrong")
    budget: int = Field(500, ge=1, description="answers that are bought in all")
    rounds: int = Field(1, ge=1)
    arms: dict[str, Buyer] = Field(
        {k: Buyer(kind=k) for k in ("random", "margin", "entropy", "confident", "robust")},
        min_length=1,
    )
    augment: bool = True
    eval_batch: int = Field(1024, ge=1)

    @model_validator(mode="after")
    def _check(self) -> ActiveJob:
        if self.budget > self.pool:
            raise ValueError(f"budget {self.budget} exceeds the pool of {self.pool}")
        if self.budget % self.rounds:
            raise ValueError(f"budget {self.budget} doesn't divide into {self.rounds} rounds")
        if self.teacher.live or self.register_as:
            raise ValueError("distillation.active takes neither teacher.live nor register_as")
        return self


class Asker(Objective):
    """Encoder and a dense layer: cross-entropy on labels, and on the teacher's probabilities where it was asked."""

    def __init__(self, encoder: EncoderConfig, num_classes: int, answers: tuple[str, ...]) -> None:
        super().__init__()
        self.encoder = build_encoder(encoder)
        self.classes = nn.Linear(self.encoder.dim, num_classes)
        self.answers = [Outputs(folder) for folder in answers]

    def prepare(self, raw: Any, labels: Labels, rng: np.ndarray | None) -> Any:
        return self.encoder.prepare(raw, rng)

    def target(self, batch: Batch, num_classes: int) -> Tensor:
        """(B, C): one-hot labels, the teacher's softmax for the bought samples."""
        target_BC = F.one_hot(batch.labels.single_B, num_classes).float()
        for answers in self.answers:
            known = np.isin(np.array(batch.keys), answers.keys)
            if known.any():
                rows = answers.read([k for k, yes in zip(batch.keys, known, strict=True) if yes])
                assert rows.logits_BC is not None
                target_BC[torch.from_numpy(known)] = torch.softmax(rows.logits_BC, 1).to(target_BC)
        return target_BC

    def forward(self, batch: Batch) -> Losses:
        logits_BC = self.classes(self.encoder(batch.inputs))
        loss_B = soft_cross_entropy(logits_BC, self.target(batch, logits_BC.shape[1]))
        return Losses((loss_B * batch.weight_B).sum() / batch.weight_B.sum().clamp_min(1))

    @torch.no_grad()
    def predict(self, batch: Batch) -> dict[str, Tensor]:
        p_BC = torch.softmax(self.classes(self.encoder(batch.inputs)).float(), 1)
        top, ids = p_BC.topk(2)
        entropy = -torch.special.xlogy(p_BC, p_BC).sum(1)
        out = {"class_id": ids[:, 0], "margin": 1 - (top[:, 0] - top[:, 1]), "entropy": entropy}
        return out | {"least_confident": 1 - top[:, 0], "label": batch.labels.ids_BP[:, 0]}


def fit_asker(
    run: Run,
    folder: Path,
    train: AnySpec,
    predict: dict[str, AnySpec],
    encoder: EncoderConfig,
    answers: list[Stage],
    config: TrainConfig,
    seed: int,
    augment: bool,
) -> dict[str, Any]:
    """Stage: a student from scratch, on labels and all answers so far; scores the pool."""
    assert train.label.num_classes is not None
    folders = tuple(str((stage.folder / "outputs").resolve()) for stage in answers)
    objective = partial(Asker, encoder, train.label.num_classes, folders)
    return {"seconds": run.fit(folder, objective, train, config, predict, augment, seed=seed).seconds}


def buy(
    run: Run,
    folder: Path,
    scored: Stage,
    pool: Manifest,
    bought: list[Stage],
    buyer: Buyer,
    error: float,
    count: int,
    seed: int,
) -> dict[str, Any]:
    """Stage: which samples of the pool to ask about next, in `chosen.arrow`; nobody is asked twice."""
    table = Fitted(scored.folder).predictions("pool")
    keys = np.array(table.column("key").to_pylist())
    known = {key for stage in bought for key in stage["keys"]}
    left = np.array([key not in known for key in keys])
    keys, columns = keys[left], {n: matrix_of(table, n)[left, 0] for n in ("margin", "entropy", "least_confident")}
    check_gains(columns, keys)
    rng = np.random.default_rng([seed, len(bought)])
    facts: dict[str, Any] = {}
    if buyer.kind == "robust":
        at, game = choose(columns[buyer.gain], error, count, rng, buyer.cost)
        facts = {"size": game.size, "value": game.value, "fallback": game.fallback}
    elif buyer.kind == "random":
        at = rng.choice(len(keys), count, replace=False)
    elif buyer.kind == "confident":
        at = np.argsort(columns["least_confident"], kind="stable")[:count]
    else:
        at = np.argsort(-columns[buyer.kind], kind="stable")[:count]
    chosen = set(keys[at].tolist())
    shards = [read_labels(pool, i).column("key").to_pylist() for i in range(len(pool.shards))]
    rows = KeepRows.of(
        (np.array([key in chosen for key in shard], bool) for shard in shards), pool.digest, {"rule": buyer.kind}
    )
    rows.save(str(folder / "chosen.arrow"))
    return {"keys": sorted(chosen)} | facts


def check_gains(gains: Mapping[str, np.ndarray], keys: np.ndarray) -> None:
    """Raises DataError for samples whose gain is negative or not finite, by key: the student has diverged."""
    for name, gain in gains.items():
        wrong = ~np.isfinite(gain) | (gain < 0)
        if wrong.any():
            shown = ", ".join(map(repr, keys[wrong][:5].tolist()))
            raise DataError(
                f"{name} is negative or not finite for {int(wrong.sum())} samples of the pool: {shown}. Lower "
                "train.learning_rate."
            )


@workload("distillation.active", ActiveJob)
def active(job: ActiveJob, run: Run) -> None:
    train, test = job.data.open()
    if train.label.form != "single":
        raise JobError(f"{job.workload} takes a single label a sample; {train.name!r} has {train.label.form}.")
    if job.data.select or job.data.mix:
        raise JobError("distillation.active draws its own samples: leave data.select and data.mix out.")
    if train.digest == test.digest:
        raise JobError("data.train and data.test are the same set: the pool's answers would leak into the test.")
    folder = run.folder / "data"
    sizes = {"labelled": job.labelled, "pool": job.pool, "validation": job.validation}
    if job.teacher.samples:
        sizes["teacher"] = job.teacher.samples
    parts = carve(train, folder, sizes, job.seed)
    options = input_options(job.encoder, job.seed)
    base = job.data.stream(train, global_batch=job.train.global_batch, **options)
    look: Callable[..., StreamSpec] = partial(job.data.stream, global_batch=job.eval_batch, shuffle=False, **options)
    run.track_data(train=train, test=test)
    # without samples of its own the teacher has seen the same labels as the student
    seen = parts["teacher" if "teacher" in parts else "labelled"]
    batch = job.teacher.train.global_batch
    spec = replace(
        job.data.stream(train, global_batch=batch, **input_options(job.teacher.encoder, job.seed)), selection=seen
    )
    fitted = run.stage("fit-teacher", fit_teacher, train=spec, predict={}, teacher=job.teacher, seed=job.seed)
    package = run.stage("pack-teacher", pack_teacher, fit=fitted, teacher=job.teacher, data=train).folder / "model"
    check_teacher(package, train)

    def ask(name: str, data: Manifest, only: str) -> Stage:
        return run.stage(
            name, teach, data=data, package=package, encoder=None, name="teacher", columns=("logits",), k=1,
            temperatures=(), dtype="float32", max_bad=job.data.max_bad_samples, only=only,
        )  # fmt: skip

    error = teacher_error(run, train, ask("teach-validation", train, parts["validation"].path))
    pool = replace(look(train), selection=parts["pool"])
    fits, answers = {}, {}
    for name, buyer in job.arms.items():
        bought: list[Stage] = []
        told: list[Stage] = []
        for number in range(job.rounds + 1):
            rows = union(train, [parts["labelled"], *(load_rows(s) for s in bought)], folder)
            fit = run.stage(
                f"fit-{name}-{number}" if number else "fit-labelled",
                fit_asker,
                train=replace(base, selection=rows),
                predict={"pool": pool, "test": look(test)},
                encoder=job.encoder,
                answers=told,
                config=job.train,
                seed=job.seed,
                augment=job.augment,
            )
            if not number:
                run.report.metrics["test/labelled only"] = accuracy_of(fit)
            if number == job.rounds:
                break
            count = job.budget // job.rounds
            bought.append(
                run.stage(
                    f"buy-{name}-{number}",
                    buy,
                    scored=fit,
                    pool=train,
                    bought=[*bought],
                    buyer=buyer,
                    error=error,
                    count=count,
                    seed=job.seed,
                )
            )
            told.append(ask(f"teach-{name}-{number}", train, str(bought[-1].folder / "chosen.arrow")))
        fits[name], answers[name] = fit, (bought, told)
    report_buyers(run, fits, answers, train)


def load_rows(stage: Stage) -> KeepRows:
    """The samples that a stage chose."""
    found = load_selection(str(stage.folder / "chosen.arrow"))
    assert isinstance(found, KeepRows)
    return found


def union(data: Manifest, parts: list[KeepRows], folder: Path) -> KeepRows:
    """All rows of some selections, kept in a file by content."""
    masks = [np.any([part.mask(i) for part in parts], axis=0) for i in range(len(data.shards))]
    rows = KeepRows.of(masks, data.digest, {"rule": "labelled and bought"})
    return rows.save(str(folder / f"union-{rows.digest[:16]}.arrow"))  # type: ignore[return-value]


def teacher_error(run: Run, train: Manifest, stage: Stage) -> float:
    """The share of validation samples that the teacher gets wrong."""
    answers, truth = Outputs(stage.folder / "outputs"), labels_by_key(train)
    keys = list(answers.keys)
    logits = answers.read(keys).logits_BC
    assert logits is not None
    right = int((logits.argmax(1).numpy() == np.array([truth[k] for k in keys])).sum())
    if not right:
        raise DataError("the teacher gets every validation sample wrong: its answers are worth nothing.")
    low, high = wilson_interval(right, len(keys))
    run.report.metrics |= {"teacher/accuracy": right / len(keys)}
    if len(keys) < _FEW:
        run.report.notes.append(
            f"the teacher's accuracy {right / len(keys):.2f} comes from {len(keys)} samples: it lies in {low:.2f} to {high:.2f}"
        )
    return 1 - right / len(keys)


def accuracy_of(fit: Stage) -> float:
    """Of a student on the test set."""
    table = Fitted(fit.folder).predictions("test")
    return float((matrix_of(table, "class_id")[:, 0] == matrix_of(table, "label")[:, 0]).mean())


def report_buyers(run: Run, fits: Mapping[str, Stage], answers: Mapping[str, Any], train: Manifest) -> None:
    """Accuracy of each buyer's student, and how many of the bought answers are right."""
    truth, rows, curves = labels_by_key(train), [], {}
    for name, fit in fits.items():
        accuracy = accuracy_of(fit)
        bought, told = answers[name]
        right = []
        for stage in told:
            kept = Outputs(stage.folder / "outputs")
            keys = list(kept.keys)
            logits = kept.read(keys).logits_BC
            assert logits is not None
            right += (logits.argmax(1).numpy() == np.array([truth[k] for k in keys])).tolist()
        share = float(np.mean(right)) if right else float("nan")
        run.report.metrics |= {f"test/{name}": accuracy, f"right/{name}": share}
        size = bought[0].values.get("size", "") if bought else ""
        if bought and "value" in bought[0].values:
            run.report.metrics |= {f"game_size/{name}": float(size), f"game_value/{name}": bought[0]["value"]}
            if any(stage["fallback"] for stage in bought):
                run.report.notes.append(f"arm {name}: no positive play, samples were drawn uniformly")
        rows.append([name, f"{100 * accuracy:.2f}", f"{100 * share:.1f}", size])
        history = Fitted(fit.folder).history
        curves[name] = ([h["step"] for h in history], [h["train/loss"] for h in history])
    header = ["buyer", "test %", "right answers %", "samples with a chance"]
    run.report.add_table("buyers", header, rows, "test accuracy after the last round")
    figures.lines(curves, "step", "training loss", run.figure("losses"))
