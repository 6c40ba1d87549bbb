"""Compressed features against noisy labels: nested dropout, then two nets that choose samples for each other.

Chen, Hu, Shen, Ai, Suykens: Compressing Features for Learning with Noisy Labels (TNNLS 2022, arXiv 2206.13140).

Stage 1 trains two nets with cross-entropy on features of which only a random prefix (or a random part: dropout) is kept.
Stage 2 fine-tunes both by co-teaching. The number of channels that predicts best on clean validation samples is part of
the model. It is chosen at the end of training; with `train.evaluate_every` after each evaluation, and the weights of the
best one are kept, as in the paper. Unlike in the paper's code, a best prefix of one channel stays one channel.

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
from safetensors.torch import save_file

from labelmill.data.choose import keep_where
from labelmill.data.config import DataConfig
from labelmill.data.folds import fold_of
from labelmill.data.manifest import Manifest, load_manifest
from labelmill.data.noise import NoiseConfig
from labelmill.data.spec import AnySpec, StreamSpec
from labelmill.encoders import EncoderConfig
from labelmill.errors import DataError
from labelmill.evaluation.groups import wilson_interval
from labelmill.losses.coteaching import best_prefix
from labelmill.reporting import report_training
from labelmill.run import Run
from labelmill.stages import Fitted, Stage
from labelmill.tracking import figures
from labelmill.training.config import TrainConfig, TrainJob
from labelmill.workload import workload
from workloads.discrimination.partial_fc import image_options, input_options
from workloads.noisy.audited import add_noise, require_single
from workloads.noisy.best_weights import kept_weights
from workloads.noisy.nested_objectives import CompressedNet, Compression, CoTeaching, CoTeachingSection

VALIDATION_FOLDS = 10  # with noise added on purpose, a tenth of the training set keeps its clean labels


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
        if self.train.evaluate_every and (self.train.zero_stage == 3 or self.train.precision == "bf16"):
            raise ValueError(
                "train.evaluate_every keeps the best weights, which must be whole and fp32 on every worker: use "
                "zero_stage 0, 1 or 2 and precision fp32"
            )
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
    objective = partial(
        CompressedNet, encoder, train.label.num_classes, compression, seed, keep_best=bool(config.evaluate_every)
    )
    fitted = run.fit(folder, objective, train, config, predict, augment, seed=seed, evaluate=predict["validation"])
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
    best = bool(config.evaluate_every) and trained
    objective = partial(CoTeaching, encoder, train.label.num_classes, compression, weights, section, total, seed, best)
    fitted = run.fit(
        folder,
        objective,
        train if trained else None,
        config,
        predict,
        augment,
        seed=seed,
        evaluate=predict["validation"] if trained else None,
    )
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
    state = kept_weights(fitted.dense())
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
