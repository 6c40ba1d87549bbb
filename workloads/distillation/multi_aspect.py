"""Multi-aspect distillation (MaKD): a student also learns answers to questions about its inputs, as further outputs.

Lee, Bang, Kwon, Kim: Multi-aspect Knowledge Distillation with Large Language Model (arXiv 2501.13341, CVPR workshops 2025).
L = CE(first C outputs) + alpha BCE(Q further outputs, answers). The answers are paid for once; the test set is never asked about.

Shape legend: B samples of this rank, C classes, Q questions, D embedding width.
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
from labelmill.data.spec import AnySpec, StreamSpec
from labelmill.data.stream import Batch
from labelmill.encoders import EncoderConfig, build_encoder
from labelmill.errors import DataError, JobError
from labelmill.job import StrictModel
from labelmill.losses.soft_targets import masked_soft_bce, soft_entropy
from labelmill.run import Run
from labelmill.stages import Fitted, Stage
from labelmill.training.config import TrainConfig, TrainJob
from labelmill.training.objective import Losses, Objective
from labelmill.workload import workload
from workloads.discrimination.partial_fc import input_options
from workloads.distillation.aspects import (
    FILE,
    AspectConfig,
    AspectTable,
    AttributeAspects,
    LlmAspects,
    RecordedAspects,
    score_attributes,
    score_with_llm,
    truth_of,
    usage_rows,
)
from workloads.distillation.common import carve, matrix_of, report_students


class AspectArm(StrictModel):
    """How much the answers count."""

    ce: float = Field(1.0, ge=0)
    alpha: float = Field(4.0, ge=0, description="weight of the answers; 0 is plain cross-entropy")
    tau: float = Field(1.0, gt=0, description="q = sigmoid(difference / tau)")
    targets: Literal["soft", "hard", "shuffled"] = Field(
        "soft", description="controls: what the class decides (attributes only), or another sample's answers"
    )


class AspectStudent(Objective):
    """Encoder, class outputs, and outputs for the questions, which the class outputs know nothing of.

    Args:
        path: file with the answers; `truth` classes where the answer is yes, for hard targets.
    """

    def __init__(
        self,
        encoder: EncoderConfig,
        num_classes: int,
        arm: AspectArm,
        path: str,
        questions: tuple[str, ...],
        form: str,
        truth: list[tuple[int, ...]] | None,
        allow_missing: bool,
    ) -> None:
        super().__init__()
        self.encoder, self.arm, self.truth, self.allow_missing = build_encoder(encoder), arm, truth, allow_missing
        self.classes = nn.Linear(self.encoder.dim, num_classes)
        self.aspects = nn.Linear(self.encoder.dim, len(questions))
        self.table = AspectTable(path, questions, form)

    def prepare(self, raw: Any, labels: Labels, rng: np.ndarray | None) -> Any:
        return self.encoder.prepare(raw, rng)

    def target(self, batch: Batch) -> Tensor:
        """q (B, Q), NaN where there is no answer."""
        if self.arm.targets == "hard":
            if self.truth is None:
                raise DataError("targets hard needs aspects.kind attributes, whose answers the class decides.")
            return truth_of(batch.labels.single_B, self.truth)
        live = batch.weight_B > 0
        keys = [k for k, yes in zip(batch.keys, live.tolist(), strict=True) if yes]
        diff_BQ = torch.full((len(batch), self.table.diff_NQ.shape[1]), torch.nan)
        diff_BQ[live.cpu()] = self.table.read(keys, self.allow_missing)
        q_BQ = torch.sigmoid(diff_BQ / self.arm.tau).to(batch.weight_B.device)
        return q_BQ.roll(1, 0) if self.arm.targets == "shuffled" else q_BQ

    def forward(self, batch: Batch) -> Losses:
        emb_BD = self.encoder(batch.inputs)
        ce_B = F.cross_entropy(self.classes(emb_BD), batch.labels.single_B, reduction="none")
        ce = (ce_B * batch.weight_B).sum() / batch.weight_B.sum().clamp_min(1)
        if not self.arm.alpha:
            return Losses(self.arm.ce * ce, {"ce": ce})
        q_BQ = self.target(batch)
        bce = masked_soft_bce(self.aspects(emb_BD), q_BQ, batch.weight_B)
        # the floor of bce is the answers' own entropy: what is left is the KL
        parts = {"ce": ce, "aspect_kl": bce - soft_entropy(q_BQ, batch.weight_B)}
        return Losses(self.arm.ce * ce + self.arm.alpha * bce, parts)

    @torch.no_grad()
    def predict(self, batch: Batch) -> dict[str, Tensor]:
        emb_BD = self.encoder(batch.inputs)
        prob, ids = torch.softmax(self.classes(emb_BD).float(), 1).topk(1)
        return {
            "label": batch.labels.ids_BP[:, 0],
            "class_id": ids,
            "prob": prob,
            "aspects": torch.sigmoid(self.aspects(emb_BD)),
        }


class MultiAspectJob(TrainJob):
    """Questions, who answers them, a student."""

    workload: Literal["distillation.multi_aspect"]
    data: DataConfig
    aspects: AspectConfig
    encoder: EncoderConfig
    samples: int | None = Field(None, ge=2, description="the student's training samples, drawn by their keys")
    arms: dict[str, AspectArm] = Field(
        {"base": AspectArm(alpha=0), "aspects": AspectArm(), "shuffled": AspectArm(targets="shuffled")}, min_length=1
    )
    allow_missing: bool = Field(False, description="training samples without answers are no error")
    cache: str = Field("", description="folder of a language model's earlier answers; default: llm-cache in output")
    augment: bool = Field(True, description="the encoder's training augmentation, if it has one")
    eval_batch: int = Field(1024, ge=1)

    @model_validator(mode="after")
    def _check(self) -> MultiAspectJob:
        if self.data.select or self.data.mix or self.register_as:
            raise ValueError("distillation.multi_aspect takes no data.select, data.mix or register_as")
        if not isinstance(self.aspects, AttributeAspects) and any(arm.targets == "hard" for arm in self.arms.values()):
            raise ValueError("arms: targets hard needs aspects.kind attributes")
        return self


def fit_aspects(
    run: Run,
    folder: Path,
    train: AnySpec,
    predict: dict[str, AnySpec],
    encoder: EncoderConfig,
    arm: AspectArm,
    path: str,
    questions: list[str],
    form: str,
    truth: list[list[int]] | None,
    allow_missing: bool,
    config: TrainConfig,
    seed: int,
    augment: bool,
) -> dict[str, Any]:
    """Stage: one arm."""
    assert train.label.num_classes is not None
    classes = [tuple(c) for c in truth] if truth else None
    objective = partial(
        AspectStudent, encoder, train.label.num_classes, arm, path, tuple(questions), form, classes, allow_missing
    )
    return {"seconds": run.fit(folder, objective, train, config, predict, augment, seed=seed).seconds}


@workload("distillation.multi_aspect", MultiAspectJob)
def multi_aspect(job: MultiAspectJob, run: Run) -> None:
    train, test = job.data.open()
    if train.label.form != "single":
        raise JobError(f"{job.workload} takes a single label a sample; {train.name!r} has {train.label.form}.")
    if train.digest == test.digest:
        raise JobError("data.train and data.test are the same set: its answers would leak into the test.")
    sizes = {"student": job.samples} if job.samples else {}
    if isinstance(job.aspects, AttributeAspects):
        if not job.samples:
            raise JobError(
                "samples: with aspects.kind attributes the student's samples must leave some to the classifier."
            )
        sizes["classifier"] = job.aspects.samples
    parts = carve(train, run.folder / "data", sizes, job.seed) if sizes else {}
    options = input_options(job.encoder, job.seed)
    stream = replace(
        job.data.stream(train, global_batch=job.train.global_batch, **options), selection=parts.get("student")
    )
    look: Callable[..., StreamSpec] = partial(job.data.stream, global_batch=job.eval_batch, shuffle=False, **options)
    run.track_data(train=stream, test=test)
    path, questions, form = "", list[str](), "logit_diff"
    truth: list[list[int]] | None = None
    if isinstance(job.aspects, AttributeAspects):
        config = job.aspects
        own = input_options(config.encoder, job.seed)
        spec = job.data.stream(train, global_batch=config.train.global_batch, **own)
        answered = job.data.stream(train, global_batch=job.eval_batch, shuffle=False, **own)
        stage = run.stage(
            "score",
            score_attributes,
            train=replace(spec, selection=parts["classifier"]),
            look=replace(answered, selection=parts["student"]),
            aspects=config,
            seed=job.seed,
        )
        truth = [list(classes) for classes in config.questions.values()]
    elif isinstance(job.aspects, LlmAspects):
        cache = job.cache or str(Path(job.output) / "llm-cache")
        stage = run.stage("score", _llm_stage, data=train, selection=_path(parts), aspects=job.aspects, cache=cache)
        rows = [*usage_rows(stage["usage"]), ["share without an answer", round(stage["junk"], 4)]]
        run.report.add_table("language model", ["what", "value"], rows, "of this run; cached answers cost nothing")
    if isinstance(job.aspects, RecordedAspects):
        path, questions, form = str(Path(job.aspects.path).resolve()), list(job.aspects.questions), job.aspects.form
    else:
        path, questions = str((stage.folder / FILE).resolve()), stage["questions"]
    fits = {
        name: run.stage(
            f"fit-{name}".lower().replace(" ", "-"),
            fit_aspects,
            train=stream,
            predict={"test": look(test)},
            encoder=job.encoder,
            arm=arm,
            path=path,
            questions=questions,
            form=form,
            truth=truth,
            allow_missing=job.allow_missing,
            config=job.train,
            seed=job.seed,
            augment=job.augment,
        )
        for name, arm in job.arms.items()
    }
    report_students(run, fits, None, test)
    if truth:
        report_aspects(run, fits, questions, truth)


def _path(parts: Mapping[str, Any]) -> str:
    return parts["student"].path if "student" in parts else ""


def _llm_stage(run: Run, folder: Path, data: Any, selection: str, aspects: LlmAspects, cache: str) -> dict[str, Any]:
    from labelmill.data.selection import KeepRows, load_selection

    chosen = load_selection(selection) if selection else None
    return score_with_llm(run, folder, data, chosen if isinstance(chosen, KeepRows) else None, aspects, cache)


def report_aspects(run: Run, fits: Mapping[str, Stage], questions: list[str], truth: list[list[int]]) -> None:
    """How well each student's further outputs tell the attributes on the test set: area under the curve."""
    from sklearn.metrics import roc_auc_score

    rows = []
    for name, fit in fits.items():
        table = Fitted(fit.folder).predictions("test")
        label_Q = torch.from_numpy(matrix_of(table, "label")[:, 0].copy())
        want, told = truth_of(label_Q, truth).numpy(), matrix_of(table, "aspects")
        auc = [float(roc_auc_score(want[:, j], told[:, j])) for j in range(len(questions))]
        run.report.metrics[f"aspect_auc/{name}"] = float(np.mean(auc))
        rows.append([name, *(f"{value:.3f}" for value in auc)])
    run.report.add_table("aspects", ["arm", *questions], rows, "area under the ROC curve on the test set")
