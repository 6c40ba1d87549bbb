"""Self-supervised label augmentation (SLA): classes times transformations as labels, views that vote, and a student of the vote.

Lee, Hwang, Shin: Self-supervised Label Augmentation via Input Transformations (ICML 2020, arXiv 1910.05872). Side by side with
plain training, rotations as augmentation (DA) and as a second task (MT). No teacher is needed: the vote is one (SLA+SD).

Shape legend: B samples of this rank, M views, N classes, D embedding width.
"""

from __future__ import annotations

from collections.abc import Mapping
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
from labelmill.data.spec import AnySpec
from labelmill.data.stream import Batch
from labelmill.encoders import EncoderConfig, build_encoder
from labelmill.errors import DataError, JobError
from labelmill.job import StrictModel
from labelmill.losses.class_sums import dense_distillation
from labelmill.losses.distillation import KD
from labelmill.run import Run
from labelmill.stages import Fitted, Stage
from labelmill.training.config import TrainConfig, TrainJob
from labelmill.training.objective import Losses, Objective
from labelmill.workload import workload
from workloads.discrimination.partial_fc import input_options
from workloads.distillation.common import matrix_of, report_students, streams
from workloads.distillation.views import ViewSet, aggregated, check_views, expand, identity_of, joint_labels, transforms
from workloads.noisy.rcal import LongTail, cut_tail


class SlaArm(StrictModel):
    """One way to use the views."""

    kind: Literal["plain", "augment", "multi_task", "joint", "joint_distilled"] = Field(
        "joint", description="plain: no views; augment: DA; multi_task: MT; joint: SLA; joint_distilled: SLA+SD"
    )
    views: ViewSet = "rotation"
    large_loss: bool = Field(
        False, description="sum over the views instead of their mean (the authors' setting for many classes)"
    )
    temperature: float = Field(1.0, gt=0, description="T of the distillation from the vote")
    longer: float = Field(1.0, gt=0, description="times as many steps: 4 makes plain training as costly as four views")


class ViewClassifier(Objective):
    """Encoder under any of the arms. Column (y, j) of the joint head is y M + j."""

    views_id: Tensor

    def __init__(self, encoder: EncoderConfig, num_classes: int, arm: SlaArm) -> None:
        super().__init__()
        self.encoder, self.arm, self.num_classes = build_encoder(encoder), arm, num_classes
        self.chosen = transforms(arm.views) if arm.kind != "plain" else transforms("rotation")[:1]
        self.views = len(self.chosen)
        size = getattr(encoder, "image_size", None)
        check_views(self.chosen, getattr(encoder, "channels", 3), size or 1, size or 1)
        joint = arm.kind in ("joint", "joint_distilled")
        self.classes = nn.Linear(self.encoder.dim, num_classes * (self.views if joint else 1))
        if arm.kind == "multi_task":
            self.which = nn.Linear(self.encoder.dim, self.views)
        if arm.kind == "joint_distilled":
            self.single = nn.Linear(self.encoder.dim, num_classes)
        # travels with checkpoints: another list of views would mean other columns
        self.register_buffer("views_id", torch.tensor(identity_of(self.chosen)))

    def prepare(self, raw: Any, labels: Labels, rng: np.ndarray | None) -> Any:
        return self.encoder.prepare(raw, rng)

    def _embed(self, batch: Batch) -> Tensor:
        if int(self.views_id) != identity_of(self.chosen):
            raise DataError("these weights were trained with another list of views, or another order of it.")
        x = batch.inputs
        if x.ndim == 4:
            check_views(self.chosen, x.shape[1], x.shape[2], x.shape[3])
        return self.encoder(expand(x, self.chosen) if self.views > 1 else x)

    def forward(self, batch: Batch) -> Losses:
        emb_LD, label_B, views = self._embed(batch), batch.labels.single_B, self.views
        count = batch.weight_B.sum().clamp_min(1)
        logits = self.classes(emb_LD)
        joint = self.arm.kind in ("joint", "joint_distilled")
        target_L = joint_labels(label_B, views) if joint else label_B.repeat_interleave(views)
        each_BM = F.cross_entropy(logits, target_L, reduction="none").view(-1, views)

        def mean(x_B: Tensor) -> Tensor:
            return (x_B * batch.weight_B).sum() / count

        parts = {"views": mean(each_BM.mean(1))}
        total = parts["views"] * (views if self.arm.large_loss else 1)
        if self.arm.kind == "multi_task":
            number_L = torch.arange(views, device=label_B.device).repeat(len(label_B))
            parts["which"] = mean(
                F.cross_entropy(self.which(emb_LD), number_L, reduction="none").view(-1, views).mean(1)
            )
            total = total + parts["which"]
        if self.arm.kind == "joint_distilled":
            own_BN = self.single(emb_LD[::views])
            vote_BN = aggregated(logits, views)
            parts["single"] = mean(F.cross_entropy(own_BN, label_B, reduction="none"))
            parts["vote"] = mean(dense_distillation(KD(temperature=self.arm.temperature), own_BN, vote_BN))
            total = total + parts["single"] + parts["vote"]
        return Losses(total, parts)

    @torch.no_grad()
    def predict(self, batch: Batch) -> dict[str, Tensor]:
        emb_LD, views = self._embed(batch), self.views
        logits = self.classes(emb_LD).float()
        if self.arm.kind in ("joint", "joint_distilled"):
            one_BN, vote_BN = logits[::views, ::views], aggregated(logits, views)
            number = torch.arange(views, device=logits.device).repeat(len(batch))
            told = (logits.argmax(1) % views == number).float().view(-1, views).mean(1)
        else:
            one_BN, vote_BN = logits[::views], logits.unflatten(0, (-1, views)).mean(1)
            told = torch.full_like(batch.weight_B, torch.nan)
            if self.arm.kind == "multi_task":
                number = torch.arange(views, device=logits.device).repeat(len(batch))
                told = (self.which(emb_LD).argmax(1) == number).float().view(-1, views).mean(1)
        if self.arm.kind == "joint_distilled":
            one_BN = self.single(emb_LD[::views]).float()
        prob, ids = torch.softmax(one_BN, 1).topk(1)
        label_B = batch.labels.ids_BP[:, 0]
        return {"label": label_B, "class_id": ids, "prob": prob, "vote": vote_BN.argmax(1), "told": told}


class SlaJob(TrainJob):
    """Images, an encoder, and arms."""

    workload: Literal["distillation.self_label_augmentation"]
    data: DataConfig
    long_tail: LongTail | None = Field(None, description="cut the training set to a long tail first")
    samples: int | None = Field(None, ge=2, description="training samples, drawn by their keys")
    encoder: EncoderConfig
    arms: dict[str, SlaArm] = Field(
        {
            "plain": SlaArm(kind="plain"),
            "plain x4": SlaArm(kind="plain", longer=4),
            "DA": SlaArm(kind="augment"),
            "MT": SlaArm(kind="multi_task"),
            "SLA": SlaArm(kind="joint"),
            "SLA+SD": SlaArm(kind="joint_distilled"),
        },
        min_length=1,
    )
    augment: bool = Field(True, description="the encoder's training augmentation; it comes before the views")
    eval_batch: int = Field(1024, ge=1)

    @model_validator(mode="after")
    def _check(self) -> SlaJob:
        if self.register_as:
            raise ValueError("register_as: a vote of views is no packaged model; leave register_as out")
        return self


def fit_views(
    run: Run,
    folder: Path,
    train: AnySpec,
    predict: dict[str, AnySpec],
    encoder: EncoderConfig,
    arm: SlaArm,
    config: TrainConfig,
    seed: int,
    augment: bool,
) -> dict[str, Any]:
    """Stage: one arm."""
    assert train.label.num_classes is not None
    if arm.longer != 1:
        steps = round(arm.longer * config.total_steps(train.epoch_samples))
        config = config.model_copy(update={"epochs": None, "steps": steps})
    objective = partial(ViewClassifier, encoder, train.label.num_classes, arm)
    return {"seconds": run.fit(folder, objective, train, config, predict, augment, seed=seed).seconds}


@workload("distillation.self_label_augmentation", SlaJob)
def self_label_augmentation(job: SlaJob, run: Run) -> None:
    train, test = job.data.open()
    if train.label.form != "single":
        raise JobError(f"{job.workload} takes a single label a sample; {train.name!r} has {train.label.form}.")
    if train.fields[job.encoder.field].kind != "image":
        raise JobError(
            f"{job.workload} turns images; field {job.encoder.field!r} is {train.fields[job.encoder.field].kind}."
        )
    data = train
    if job.long_tail:
        data = run.stage("long-tail", cut_tail, train=train, tail=job.long_tail, seed=job.seed).manifest("train")
    parts = {"student": (job.samples, job.train.global_batch)}
    spec = streams(job.data, data, run.folder / "data", parts, {"student": job.encoder}, job.seed)["student"]
    run.track_data(train=spec, test=test)
    look = job.data.stream(test, global_batch=job.eval_batch, shuffle=False, **input_options(job.encoder, job.seed))
    fits = {
        name: run.stage(
            f"fit-{name}".lower().replace(" ", "-"),
            fit_views,
            train=spec,
            predict={"test": look},
            encoder=job.encoder,
            arm=arm,
            config=job.train,
            seed=job.seed,
            augment=job.augment,
        )
        for name, arm in job.arms.items()
    }
    report_students(run, fits, None, test)
    report_votes(run, fits, job.arms)


def report_votes(run: Run, fits: Mapping[str, Stage], arms: Mapping[str, SlaArm]) -> None:
    """One view against the vote of all, and how well the view itself is told."""
    rows = []
    for name, fit in fits.items():
        table = Fitted(fit.folder).predictions("test")
        label_Q, one_Q, vote_Q = (matrix_of(table, c)[:, 0] for c in ("label", "class_id", "vote"))
        told = float(np.mean(matrix_of(table, "told")))
        one, vote = float((one_Q == label_Q).mean()), float((vote_Q == label_Q).mean())
        run.report.metrics |= {f"vote/{name}": vote}
        views = 1 if arms[name].kind == "plain" else len(transforms(arms[name].views))
        if not np.isnan(told):
            run.report.metrics[f"told/{name}"] = told
            if told < 1.5 / views:
                run.report.notes.append(
                    f"arm {name}: views are told no better than by chance ({told:.2f} of 1/{views})."
                )
        rows.append(
            [name, views, f"{100 * one:.2f}", f"{100 * vote:.2f}", "" if np.isnan(told) else f"{100 * told:.1f}"]
        )
    header = ["arm", "views", "one view %", "vote %", "view told %"]
    run.report.add_table("views", header, rows, "accuracy on the test set; SLA+SD's one view is its own head's")
