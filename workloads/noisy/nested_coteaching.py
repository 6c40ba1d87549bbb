"""Compressed features against noisy labels: nested dropout, then two nets that choose samples for each other.

Chen, Hu, Shen, Ai, Suykens: Compressing Features for Learning with Noisy Labels (TNNLS 2022, arXiv 2206.13140).

Stage 1 trains two nets with cross-entropy on features of which only a random prefix (or a random part: dropout) is kept.
Stage 2 fine-tunes both by co-teaching. The number of channels that predicts best on clean validation samples is part of
the model. Differences from the paper's code: it is chosen at the end of training, not after each epoch, and a best prefix
of one channel stays one channel.

Shape legend: B samples of this rank, D channels, K classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from labelmill.data.choose import keep_where
from labelmill.data.config import DataConfig
from labelmill.data.folds import fold_of
from labelmill.data.labels import Labels
from labelmill.data.manifest import Manifest, load_manifest
from labelmill.data.noise import NoiseConfig
from labelmill.data.spec import AnySpec, StreamSpec
from labelmill.data.stream import Batch
from labelmill.encoders import EncoderConfig, build_encoder
from labelmill.errors import DataError
from labelmill.evaluation.groups import wilson_interval
from labelmill.job import StrictModel
from labelmill.losses.coteaching import best_prefix, cross_selection, draw_prefix, forget_rate, keep_prefix
from labelmill.reporting import report_training
from labelmill.run import Run
from labelmill.stages import Fitted, Stage
from labelmill.tracking import figures
from labelmill.training.config import TrainConfig, TrainJob
from labelmill.training.objective import Losses, Objective
from labelmill.workload import workload
from workloads.discrimination.partial_fc import image_options, input_options
from workloads.noisy.audited import add_noise, require_single

VALIDATION_FOLDS = 10  # with noise added on purpose, a tenth of the training set keeps its clean labels


class Compression(StrictModel):
    """What is done to the features before the class layer."""

    kind: Literal["none", "dropout", "nested"] = "nested"
    eta: float = Field(60.0, gt=0, description="nested: spread of the number of channels kept; too small underfits")
    p: float = Field(0.5, gt=0, lt=1, description="dropout: chance that a channel is left out")


class CoTeachingSection(StrictModel):
    """Stage 2."""

    rate: float = Field(
        ge=0, lt=1, description="share of each half batch that is left out; about the share of wrong labels"
    )
    ramp: float = Field(0.0, ge=0, le=1, description="share of the steps in which the rate rises from 0")
    split_batch: bool = Field(True, description="each net chooses among its half (the paper's code), or both among all")
    train: TrainConfig | None = Field(
        None, description="default: as `train`, at a tenth of its rate and a quarter of its length"
    )


class CompressedNet(Objective):
    """Encoder and a class layer without bias, on compressed features. The model holds its number of channels: `prefix`."""

    step: Tensor
    prefix: Tensor

    def __init__(self, encoder: EncoderConfig, num_classes: int, compression: Compression, seed: int) -> None:
        super().__init__()
        self.encoder = build_encoder(encoder)
        self.classes = nn.Linear(self.encoder.dim, num_classes, bias=False)
        self.compression, self.seed = compression, seed
        self.register_buffer("step", torch.zeros(1, dtype=torch.int64))
        self.register_buffer("prefix", torch.tensor([self.encoder.dim]))

    def prepare(self, raw: Any, labels: Labels, rng: np.ndarray | None) -> Any:
        return self.encoder.prepare(raw, rng)

    def drawn_prefix(self) -> int:
        """The number of channels of this step, the same on all ranks."""
        dim = self.encoder.dim
        nested = self.compression.kind == "nested"
        return draw_prefix(dim, self.compression.eta, self.seed, int(self.step)) if nested else dim

    def logits(self, inputs: Any, prefix: int) -> Tensor:
        """Scores (B, K) from the first `prefix` channels; dropout while training."""
        z_BD = keep_prefix(self.encoder(inputs), prefix)
        if self.compression.kind == "dropout":
            z_BD = F.dropout(z_BD, self.compression.p, self.training)
        return self.classes(z_BD)

    def forward(self, batch: Batch) -> Losses:
        logits_BK = self.logits(batch.inputs, self.drawn_prefix())
        self.step += 1
        loss_B = F.cross_entropy(logits_BK, batch.labels.single_B, reduction="none")
        return Losses((loss_B * batch.weight_B).sum() / batch.weight_B.sum().clamp_min(1))

    @torch.no_grad()
    def predict(self, batch: Batch) -> dict[str, Tensor]:
        return _by_prefix([self], batch)


def _by_prefix(nets: list[CompressedNet], batch: Batch) -> dict[str, Tensor]:
    """The class that every prefix predicts, from the mean of the nets' scores: int32 (B, D), D is 1 unless nested."""
    z = [net.encoder(batch.inputs) for net in nets]
    weights = [net.classes.weight for net in nets]
    if nets[0].compression.kind != "nested":
        mean_BK = torch.stack([a @ w.t() for a, w in zip(z, weights, strict=True)]).mean(dim=0)
        found = mean_BK.argmax(dim=1, keepdim=True)
    else:
        total_BK = torch.zeros(len(z[0]), weights[0].shape[0], device=z[0].device, dtype=z[0].dtype)
        found = torch.empty(len(z[0]), z[0].shape[1], dtype=torch.int64, device=z[0].device)
        for k in range(z[0].shape[1]):
            for a, w in zip(z, weights, strict=True):
                total_BK = total_BK + a[:, k : k + 1] * w[:, k]
            found[:, k] = total_BK.argmax(dim=1)
    return {"label": batch.labels.ids_BP[:, 0], "by_prefix": found.to(torch.int32)}


class CoTeaching(Objective):
    """Two nets from stage 1; each trains on the samples of small loss under the other.

    Args:
        encoder, num_classes, compression: as of stage 1.
        weights: exported files of both nets; each holds the number of channels with which it judges losses.
        section: rate, ramp, halves.
        total_steps: of stage 2, for the ramp.
        seed: of the prefixes drawn.
    """

    step: Tensor

    def __init__(
        self,
        encoder: EncoderConfig,
        num_classes: int,
        compression: Compression,
        weights: list[str],
        section: CoTeachingSection,
        total_steps: int,
        seed: int,
    ) -> None:
        super().__init__()
        self.nets = nn.ModuleList([CompressedNet(encoder, num_classes, compression, seed) for _ in weights])
        # here, not in `start`: the engine copies weights when it is made
        for net, path in zip(self.pair, weights, strict=True):
            state = load_file(path)
            if "prefix" not in state:
                raise DataError(f"{path}: this model doesn't say how many channels it uses; train stage 1 again.")
            net.load_state_dict(state)
        self.section, self.ramp_steps = section, int(section.ramp * total_steps)
        self.register_buffer("step", torch.zeros(1, dtype=torch.int64))

    def prepare(self, raw: Any, labels: Labels, rng: np.ndarray | None) -> Any:
        return self.pair[0].encoder.prepare(raw, rng)

    @property
    def pair(self) -> list[CompressedNet]:
        """Both nets."""
        return [net for net in self.nets if isinstance(net, CompressedNet)]

    @torch.no_grad()
    def judge(self, batch: Batch) -> list[Tensor]:
        """Losses (B,) of the batch under either net, in evaluation mode, with its own number of channels."""
        self.nets.eval()
        label_B = batch.labels.single_B
        found = [
            F.cross_entropy(net.logits(batch.inputs, int(net.prefix)), label_B, reduction="none") for net in self.pair
        ]
        self.nets.train()
        return found

    def forward(self, batch: Batch) -> Losses:
        rate = forget_rate(int(self.step), self.section.rate, self.ramp_steps)
        first_B, second_B = self.judge(batch)
        chosen = cross_selection(first_B, second_B, rate, batch.weight_B, self.section.split_batch)
        for net in self.pair:
            net.step.copy_(self.step)
        prefix = self.pair[0].drawn_prefix()  # one draw for both
        losses = []
        for net, rows in zip(self.pair, chosen, strict=True):
            logits_BK = net.logits(batch.inputs, prefix)[rows]
            losses.append(F.cross_entropy(logits_BK, batch.labels.single_B[rows]))
        self.step += 1
        return Losses(losses[0] + losses[1], {"first": losses[0], "second": losses[1]})

    @torch.no_grad()
    def predict(self, batch: Batch) -> dict[str, Tensor]:
        return _by_prefix(self.pair, batch)


class NestedJob(TrainJob):
    """A noisy training set, a small clean validation set, and a test set."""

    workload: Literal["noisy.nested_coteaching"]
    data: DataConfig
    validation: str | None = Field(
        None, description="folder or URI of clean validation samples; needed without `noise`"
    )
    noise: NoiseConfig | None = Field(
        None, description="noise added on purpose; a tenth of the training set stays clean"
    )
    encoder: EncoderConfig
    arms: dict[str, Compression] = Field(
        {"CE": Compression(kind="none"), "dropout": Compression(kind="dropout"), "nested": Compression()}, min_length=1
    )
    coteaching: CoTeachingSection
    augment: bool = Field(True, description="the encoder's training augmentation, if it has one")
    eval_batch: int = Field(1024, ge=1)

    def class_count(self) -> int | None:
        return self.data.open()[0].label.num_classes

    @model_validator(mode="after")
    def _check(self) -> NestedJob:
        if self.validation is None and self.noise is None:
            raise ValueError("validation: the number of channels is chosen on clean samples; name a data set of such")
        micro = self.train.global_batch // self.train.accumulation // self.cluster.workers
        if self.coteaching.split_batch and micro % 2:
            raise ValueError(f"coteaching.split_batch halves a worker's {micro} samples: use an even number")
        if self.data.select or self.data.mix:
            raise ValueError("noisy.nested_coteaching trains on one whole set: leave data.select and data.mix out")
        return self

    def second_stage(self) -> TrainConfig:
        """How stage 2 is trained."""
        if self.coteaching.train:
            return self.coteaching.train
        length = (
            {"steps": max(1, self.train.steps // 4)} if self.train.steps else {"epochs": (self.train.epochs or 4) / 4}
        )
        return self.train.model_copy(update={"learning_rate": self.train.learning_rate / 10, **length})


def fit_first(
    run: Run,
    folder: Path,
    train: AnySpec,
    predict: dict[str, AnySpec],
    encoder: EncoderConfig,
    compression: Compression,
    config: TrainConfig,
    seed: int,
    augment: bool,
) -> dict[str, Any]:
    """Stage 1: one net; and the best number of channels on the validation samples."""
    assert train.label.num_classes is not None
    objective = partial(CompressedNet, encoder, train.label.num_classes, compression, seed)
    fitted = run.fit(folder, objective, train, config, predict, augment, seed=seed)
    return {"seconds": fitted.seconds, **_choose(fitted)}


def fit_second(
    run: Run,
    folder: Path,
    train: AnySpec,
    predict: dict[str, AnySpec],
    encoder: EncoderConfig,
    compression: Compression,
    first: list[Stage],
    section: CoTeachingSection,
    config: TrainConfig,
    seed: int,
    augment: bool,
    trained: bool,
) -> dict[str, Any]:
    """Stage 2; without `trained` only the mean of both nets of stage 1, the control."""
    assert train.label.num_classes is not None
    weights = [str(stage.folder.resolve() / "export" / "dense.safetensors") for stage in first]
    total = config.total_steps(train.epoch_samples)
    objective = partial(CoTeaching, encoder, train.label.num_classes, compression, weights, section, total, seed)
    fitted = run.fit(folder, objective, train if trained else None, config, predict, augment, seed=seed)
    return {"seconds": fitted.seconds, **_choose(fitted)}


def by_prefix(fitted: Fitted, name: str) -> tuple[np.ndarray, np.ndarray]:
    """(labels (Q,), class that each prefix predicts (Q, D))."""
    table = fitted.predictions(name)
    found = table.column("by_prefix").combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return table.column("label").to_numpy(), found.reshape(len(table), -1)


def _choose(fitted: Fitted) -> dict[str, Any]:
    """The number of channels by validation accuracy, written into the exported model; test accuracy with it."""
    label_Q, found_QD = by_prefix(fitted, "validation")
    if not len(label_Q):
        raise DataError("no validation sample: the number of channels can't be chosen.")
    accuracy_D = (found_QD == label_Q[:, None]).mean(axis=0)
    prefix = best_prefix(torch.from_numpy(accuracy_D))
    test_Q, test_QD = by_prefix(fitted, "test")
    state = fitted.dense()
    channels = next(int(v.shape[1]) for k, v in state.items() if k.endswith("classes.weight"))
    kept = prefix if len(accuracy_D) > 1 else channels  # without nesting there is one prefix: all
    chosen = {k: torch.tensor([kept]) for k in state if k.endswith("prefix")}
    file = fitted.folder / "export" / "dense.safetensors"
    save_file(state | chosen, file.with_suffix(".part"))
    file.with_suffix(".part").replace(file)
    return {
        "prefix": prefix,
        "channels": channels,
        "validation": float(accuracy_D[prefix - 1]),
        "curve": accuracy_D.tolist(),
        "right": int((test_QD[:, prefix - 1] == test_Q).sum()),
        "queries": len(test_Q),
    }


@workload("noisy.nested_coteaching", NestedJob)
def nested_coteaching(job: NestedJob, run: Run) -> None:
    train, test = job.data.open()
    require_single(train, job.workload)
    data, options = train, input_options(job.encoder, job.seed)
    if job.noise:
        image = image_options(job.encoder)
        noisy = run.stage(
            "noise", add_noise, train=train, test=test, noise=job.noise, field=job.encoder.field, image=image
        )
        data = noisy.manifest("train")
    look: Callable[..., AnySpec] = partial(job.data.stream, global_batch=job.eval_batch, shuffle=False, **options)
    stream: AnySpec = job.data.stream(data, global_batch=job.train.global_batch, **options)
    if job.validation:
        validation: AnySpec = look(load_manifest(job.validation))
    else:
        stream, validation = _part(run, data, train, stream, look(train), job.seed)
    run.track_data(train=stream, validation=validation, test=test)
    predict = {"validation": validation, "test": look(test)}
    common = {"train": stream, "predict": predict, "encoder": job.encoder, "augment": job.augment}
    rows = []
    curves: dict[str, tuple[list[float], list[float]]] = {}
    for name, arm in job.arms.items():
        key = name.lower().replace(" ", "-")
        first = [
            run.stage(f"{key}-net{n}", fit_first, compression=arm, config=job.train, seed=job.seed + 1000 * n, **common)
            for n in (0, 1)
        ]
        pair = partial(
            run.stage, compression=arm, first=first, section=job.coteaching, config=job.second_stage(), seed=job.seed
        )
        ensemble = pair(f"{key}-ensemble", fit_second, trained=False, **common)
        second = pair(f"{key}-coteaching", fit_second, trained=True, **common)
        for what, stage in (("one net", first[0]), ("mean of two", ensemble), ("co-teaching", second)):
            rows.append(_row(run, name, what, stage))
        if arm.kind == "nested":
            curves[f"{name}, one net"] = _curve(first[0])
            curves[f"{name}, co-teaching"] = _curve(second)
        for stage, label in ((first[0], key), (second, f"{key}-coteaching")):
            report_training(run, Fitted(stage.folder), stage["seconds"], label)
            run.report_data_health(Fitted(stage.folder))
    columns = ["arm", "stage", "channels", "validation %", "test %"]
    run.report.add_table("accuracy", columns, rows, "at the end of training, with the channels that validation chose")
    if curves:
        figures.lines(curves, "channels", "validation accuracy (%)", run.figure("prefixes"))


def _part(
    run: Run, data: Manifest, clean: Manifest, stream: AnySpec, look: AnySpec, seed: int
) -> tuple[AnySpec, AnySpec]:
    """(training stream without, clean stream with only) the samples of one fold by key."""
    assert isinstance(stream, StreamSpec)
    assert isinstance(look, StreamSpec)
    folder = run.folder / "data"
    folder.mkdir(parents=True, exist_ok=True)

    def held(table: Any) -> np.ndarray:
        return fold_of(table.column("key").to_pylist(), VALIDATION_FOLDS, seed) == 0

    rest = keep_where(data, lambda table: ~held(table)).save(str(folder / "train-part.arrow"))
    own = keep_where(clean, held).save(str(folder / "validation-part.arrow"))
    return replace(stream, selection=rest), replace(look, selection=own)


def _row(run: Run, name: str, what: str, stage: Stage) -> list[Any]:
    right, queries = stage["right"], stage["queries"]
    low, high = wilson_interval(right, queries)
    metric = f"{name}/{what.replace(' ', '_')}"
    run.report.metrics |= {f"test/{metric}": right / queries, f"validation/{metric}": stage["validation"]}
    channels = f"{stage['prefix']} of {len(stage['curve'])}" if len(stage["curve"]) > 1 else str(stage["channels"])
    shown = f"{100 * right / queries:.2f} ± {50 * (high - low):.2f}"
    return [name, what, channels, round(100 * stage["validation"], 2), shown]


def _curve(stage: Stage) -> tuple[list[float], list[float]]:
    return [float(k) for k in range(1, len(stage["curve"]) + 1)], [100 * a for a in stage["curve"]]
