"""Losses that stand label noise, side by side: LDR-KL, ALDR-KL, and the field's baselines.

Zhu, Ying, Yang: Label Distributionally Robust Losses for Multi-class Classification (ICML 2023, arXiv 2112.14869); GCE (Zhang
and Sabuncu 2018), SCE (Wang et al. 2019), MAE (Ghosh et al. 2017), ELR (Liu et al. 2020), label smoothing, cross-entropy.

Shape legend: B samples of this rank, K classes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from labelmill.data.config import DataConfig
from labelmill.data.labels import Labels
from labelmill.data.manifest import Manifest
from labelmill.data.noise import NoiseConfig
from labelmill.data.spec import AnySpec
from labelmill.data.stream import Batch
from labelmill.encoders import EncoderConfig, build_encoder
from labelmill.evaluation.groups import wilson_interval
from labelmill.heads.config import HeadConfig
from labelmill.losses.classification import GCE, LDR, MAE, SCE, RowLoss, SmoothedSoftmax, Softmax, dense_loss
from labelmill.losses.sample_state import ALDR, ELR, NormalizedLDR
from labelmill.reporting import report_training
from labelmill.run import Run
from labelmill.stages import Fitted, Stage
from labelmill.tracking import figures
from labelmill.training.config import TrainConfig, TrainJob
from labelmill.training.objective import Losses, Objective
from labelmill.training.sample_state import SampleState
from labelmill.workload import workload
from workloads.discrimination.partial_fc import image_options, input_options
from workloads.noisy.audited import add_noise, audited, clean_labels, labels_by_key, predicted_classes, require_single

AnyLoss = Softmax | SmoothedSoftmax | MAE | GCE | SCE | LDR | NormalizedLDR | ALDR | ELR
Arms = dict[str, Annotated[AnyLoss, Field(discriminator="kind")]]


class RobustClassifier(Objective):
    """Encoder and a dense layer under any of the losses; what a loss remembers of samples lies in `state`.

    Args:
        encoder: config section.
        loss: of the arm.
        data: the training set, whose keys the memory needs.
    """

    def __init__(self, encoder: EncoderConfig, loss: AnyLoss, data: Manifest) -> None:
        super().__init__()
        assert data.label.num_classes is not None
        self.encoder = build_encoder(encoder)
        self.classes = nn.Linear(self.encoder.dim, data.label.num_classes)
        self.loss = loss
        width = 0 if isinstance(loss, RowLoss) else loss.width(data.label.num_classes)
        self.state = SampleState.of(data, width, loss.initial) if width and not isinstance(loss, RowLoss) else None

    def prepare(self, raw: Any, labels: Labels, rng: np.ndarray | None) -> Any:
        return self.encoder.prepare(raw, rng)

    def forward(self, batch: Batch) -> Losses:
        logits_BK, label_B = self.classes(self.encoder(batch.inputs)), batch.labels.single_B
        if isinstance(self.loss, RowLoss):
            loss_B = dense_loss(self.loss, logits_BK, label_B[:, None])
        elif self.state is None:
            loss_B, _ = self.loss(logits_BK, label_B, logits_BK.new_zeros(len(label_B), 0))
        else:
            rows_B = self.state.rows(batch.keys)
            loss_B, new_BW = self.loss(logits_BK, label_B, self.state.read(rows_B))
            self.state.write(rows_B, new_BW, batch.weight_B)
        return Losses((loss_B * batch.weight_B).sum() / batch.weight_B.sum().clamp_min(1))

    @torch.no_grad()
    def predict(self, batch: Batch) -> dict[str, Tensor]:
        prob_BK = torch.softmax(self.classes(self.encoder(batch.inputs)), dim=1)
        prob, ids = prob_BK.topk(1)
        return {"label": batch.labels.ids_BP[:, 0], "class_id": ids, "prob": prob}


class LdrJob(TrainJob):
    """A noisy training set and the losses to compare."""

    workload: Literal["noisy.ldr"]
    data: DataConfig
    noise: NoiseConfig | None = Field(None, description="noise added on purpose to both sets")
    encoder: EncoderConfig
    losses: Arms = Field(
        {"CE": Softmax(), "GCE": GCE(), "LDR": NormalizedLDR(), "ALDR": ALDR()},
        min_length=1,
        description="arms by name; a registered model is that of the last",
    )
    head: HeadConfig | None = Field(None, description="a sharded head instead of a dense layer; its loss is the arm's")
    augment: bool = Field(True, description="the encoder's training augmentation, if it has one")
    eval_batch: int = Field(1024, ge=1)

    def class_count(self) -> int | None:
        return self.data.open()[0].label.num_classes

    @model_validator(mode="after")
    def _fits_head(self) -> LdrJob:
        if self.head:
            for name, loss in self.losses.items():
                if not isinstance(loss, RowLoss):
                    raise ValueError(
                        f"losses.{name}: {loss.kind} takes all logits of a sample and remembers it; it works on a dense "
                        "layer only. Leave head out, or use kind ldr, gce, sce or mae"
                    )
        if self.register_as and not self.head:
            raise ValueError("register_as registers class rows of a sharded head: give head as well")
        return self


def fit_robust(
    run: Run,
    folder: Path,
    train: AnySpec,
    predict: dict[str, AnySpec],
    data: Manifest,
    encoder: EncoderConfig,
    loss: AnyLoss,
    head: HeadConfig | None,
    config: TrainConfig,
    seed: int,
    augment: bool,
) -> dict[str, Any]:
    """Stage: one arm; also predicts the training set, to see what was memorised."""
    assert data.label.num_classes is not None
    objective: Any = partial(RobustClassifier, encoder, loss, data)
    if head:
        config_of_head = head.model_copy(update={"loss": loss})
        objective = audited(encoder, config_of_head, data.label.num_classes, seed, k=1)
    return {"seconds": run.fit(folder, objective, train, config, predict, augment).seconds}


@workload("noisy.ldr", LdrJob)
def ldr(job: LdrJob, run: Run) -> None:
    train, test = job.data.open()
    require_single(train, job.workload)
    data, noisy_test = train, None
    image = image_options(job.encoder)
    if job.noise:
        noisy = run.stage(
            "noise", add_noise, train=train, test=test, noise=job.noise, field=job.encoder.field, image=image
        )
        data, noisy_test = noisy.manifest("train"), noisy.manifest("test")
    options = input_options(job.encoder, job.seed)
    stream = job.data.training_stream(data, run.folder / "data", global_batch=job.train.global_batch, **options)
    look: Callable[..., AnySpec] = partial(job.data.stream, global_batch=job.eval_batch, shuffle=False, **options)
    run.track_data(train=stream, test=test)
    fits = {
        name: run.stage(
            f"fit-{name}".lower(),
            fit_robust,
            train=stream,
            predict={"test": look(test), "train": look(data)},
            data=data,
            encoder=job.encoder,
            loss=loss,
            head=job.head,
            config=job.train,
            seed=job.seed,
            augment=job.augment,
        )
        for name, loss in job.losses.items()
    }
    report_arms(run, fits, data, test, noisy_test)
    for name, loss in job.losses.items():
        if isinstance(loss, ALDR) and loss.iterations == 1 and clean_labels(data) is not None:
            report_temperatures(run, name, fits[name], data)
    last = [*job.losses][-1]
    if job.register_as and job.head:
        run.register(job.register_as, fits[last], encoder=job.encoder, head=job.head, data=train)


def report_arms(run: Run, fits: dict[str, Stage], data: Manifest, test: Manifest, noisy_test: Manifest | None) -> None:
    """Accuracy on clean and noisy test labels; the fit on given training labels; the share of wrong ones memorised."""
    true, given = labels_by_key(test), labels_by_key(noisy_test) if noisy_test else None
    train_given, train_true = labels_by_key(data), clean_labels(data)
    rows = []
    for name, fit in fits.items():
        keys, predicted_Q = predicted_classes(fit)
        right = int((predicted_Q == np.array([true[key] for key in keys])).sum())
        low, high = wilson_interval(right, len(keys))
        train_keys, predicted_N = predicted_classes(fit, "train")
        given_N = np.array([train_given[key] for key in train_keys])
        facts = {"test": right / len(keys), "train_fit": float((predicted_N == given_N).mean())}
        if given:
            facts["noisy_test"] = float((predicted_Q == np.array([given[key] for key in keys])).mean())
        if train_true:
            wrong_N = given_N != np.array([train_true[key] for key in train_keys])
            if wrong_N.any():
                facts["memorised"] = float((predicted_N == given_N)[wrong_N].mean())
        run.report.metrics |= {f"{metric}/{name}": value for metric, value in facts.items()}
        shown = [f"{100 * facts['test']:.2f} ± {50 * (high - low):.2f}"]
        shown += [f"{100 * facts[m]:.2f}" if m in facts else "" for m in ("noisy_test", "train_fit", "memorised")]
        rows.append([name, *shown])
        report_training(run, Fitted(fit.folder), fit["seconds"], name)
        run.report_data_health(Fitted(fit.folder))
    run.report.add_table(
        "losses",
        ["loss", "test %", "noisy test %", "fit on given labels %", "wrong labels memorised %"],
        rows,
        "at the end of training; the interval is that of the test sample, not of the seed",
    )


def report_temperatures(run: Run, name: str, fit: Stage, data: Manifest) -> None:
    """ALDR's temperature of samples whose label is right and of those whose label is wrong."""
    truth, given = clean_labels(data), labels_by_key(data)
    assert truth is not None
    memory = SampleState.of(data, 1)
    memory.values_NW.copy_(Fitted(fit.folder).dense("state.")["values_NW"])
    keys = list(given)
    lam_N = memory.read(memory.rows(keys))[:, 0].numpy()
    wrong_N = np.array([given[key] != truth[key] for key in keys])
    groups = {"right labels": lam_N[~wrong_N], "wrong labels": lam_N[wrong_N]}
    path = run.figure(f"temperature_{name.lower()}")
    figures.histograms(groups, "temperature", path, title=f"{name}: temperature of training samples")
    run.report.metrics |= {
        f"temperature/{name}/{group.split()[0]}": float(values.mean())
        for group, values in groups.items()
        if len(values)
    }
