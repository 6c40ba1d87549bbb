"""Wrong labels and a long tail at once: features learnt without labels, robust class Gaussians, lent to rare classes.

Zhang, Zhao, Yao, Yuan, Huang: When Noisy Labels Meet Long Tail Dilemmas: A Representation Calibration Method (RCAL, ICCV
2023, arXiv 2211.10955). No code of the authors was found: weights of lenders, spread and loss weights are reconstructed from
the text and from the work it builds on.

Shape legend: N samples, K classes, D feature width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from safetensors.torch import save_file

from labelmill.data import corrections
from labelmill.data.config import DataConfig
from labelmill.data.keys import key_hashes
from labelmill.data.manifest import Manifest
from labelmill.data.noise import NoiseConfig, long_tail_counts
from labelmill.data.shards import read_labels
from labelmill.data.spec import AnySpec
from labelmill.encoders import EncoderConfig
from labelmill.errors import JobError
from labelmill.evaluation.class_gaussians import calibrate_tail, class_gaussians, head_classes, missing_to_balance
from labelmill.job import StrictModel
from labelmill.reporting import report_training
from labelmill.run import Run
from labelmill.stages import Fitted, Stage
from labelmill.training.config import TrainConfig, TrainJob
from labelmill.training.passes import load_embeddings
from labelmill.workload import workload
from workloads.discrimination.partial_fc import image_options, input_options
from workloads.noisy.audited import add_noise, clean_labels, labels_by_key, predicted_classes, require_single
from workloads.noisy.rcal_objectives import Calibrated, Calibration, Contrast, ContrastSection

_MOST_GB = 4.0  # of full covariances
FULL = Calibration()


class LongTail(StrictModel):
    """Makes the training set long-tailed, before noise is added: n_k = largest * ratio^(-k / (K - 1))."""

    largest: int = Field(ge=2, description="samples of class 0")
    ratio: float = Field(gt=1, description="class 0 over the last class")


class RcalJob(TrainJob):
    """A noisy, long-tailed training set and a balanced test set."""

    workload: Literal["noisy.rcal"]
    data: DataConfig
    long_tail: LongTail | None = Field(None, description="cut the training set to a long tail first")
    noise: NoiseConfig | None = Field(None, description="noise added on purpose after that")
    encoder: EncoderConfig
    contrast: ContrastSection = ContrastSection()
    contrast_train: TrainConfig | None = Field(None, description="how features are learnt; default: as `train`")
    head_share: float = Field(0.6, gt=0, le=1, description="the largest classes with this share of the samples lend")
    arms: dict[str, Calibration] = Field(
        {"CE": Calibration(pretrained=False, synthetic=0, anchor=0, mixup=0), "RCAL": FULL}, min_length=1
    )
    augment: bool = Field(True, description="the encoder's training augmentation, if it has one")
    eval_batch: int = Field(1024, ge=1)

    def class_count(self) -> int | None:
        return self.data.open()[0].label.num_classes

    @model_validator(mode="after")
    def _check(self) -> RcalJob:
        if self.data.select or self.data.mix:
            raise ValueError("noisy.rcal trains on one whole set: leave data.select and data.mix out")
        if (other := self.contrast.encoder) is not None:
            ours, theirs = (e.model_dump(exclude={"augment", "typos"}) for e in (self.encoder, other))
            if ours != theirs:
                wrong = next(key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key))
                raise ValueError(f"contrast.encoder may differ from encoder in its augmentation only, not in {wrong}")
        if (self.contrast_train or self.train).zero_stage == 3:
            raise ValueError("noisy.rcal moves a key encoder after whole weights: use zero_stage 0, 1 or 2")
        return self


def cut_tail(run: Run, folder: Path, train: Manifest, tail: LongTail, seed: int) -> dict[str, Any]:
    """Stage: a version of the training set with a long tail; which samples stay is drawn by their keys."""
    tables = [read_labels(train, i) for i in range(len(train.shards))]
    keys = [key for table in tables for key in table.column("key").to_pylist()]
    label_N = np.concatenate([table.column("label").to_numpy() for table in tables])
    wanted_K = long_tail_counts(train.label.num_classes or 0, tail.largest, tail.ratio)
    order = np.lexsort((key_hashes([f"tail|{seed}|{key}" for key in keys])[0], label_N))
    count_K = np.bincount(label_N, minlength=len(wanted_K))
    starts = np.cumsum(count_K) - count_K
    rank = np.arange(len(order)) - starts[label_N[order]]
    away = [keys[i] for i in np.sort(order[rank >= wanted_K[label_N[order]]])]
    corrections.drop(train, folder / "train", away, {"long_tail": tail.model_dump_json()}, overwrite=True)
    return {"left": len(keys) - len(away)}


def fit_contrast(
    run: Run,
    folder: Path,
    train: AnySpec,
    encoder: EncoderConfig,
    section: ContrastSection,
    config: TrainConfig,
    seed: int,
) -> dict[str, Any]:
    """Stage: features without labels."""
    objective = partial(Contrast, section.encoder or encoder, section, seed)
    return {"seconds": run.fit(folder, objective, train, config, augment=True, seed=seed).seconds}


def embed_train(
    run: Run, folder: Path, data: Manifest, contrast: Stage, encoder: EncoderConfig, max_bad: int
) -> dict[str, Any]:
    """Stage: the contrastive features of the training set, in one file, row for row with the shards."""
    run.embed(folder / "shards", data, encoder, Fitted(contrast.folder).dense("encoder."), max_bad)
    emb_ND, valid_N = load_embeddings(folder / "shards")
    save_file({"emb": emb_ND.contiguous(), "valid": valid_N}, folder / "features.safetensors")
    return {}


def fit_gaussians(
    run: Run, folder: Path, data: Manifest, features: Stage, arm: Calibration, head_share: float
) -> dict[str, Any]:
    """Stage: robust Gaussians of the classes, lent to the tail; how far their means are from the clean ones, if known."""
    from safetensors.torch import load_file

    num_classes = data.label.num_classes or 0
    content = load_file(features.folder / "features.safetensors")
    valid = content["valid"].numpy()
    z_ND = content["emb"].numpy().astype(np.float64)[valid]
    dim = z_ND.shape[1]
    if (gigabytes := num_classes * dim**2 * 8 / 2**30) > _MOST_GB:
        raise JobError(
            f"{num_classes} classes x {dim} x {dim} covariances are {gigabytes:.0f} GiB. Use an encoder with a smaller dim."
        )
    tables = [read_labels(data, i) for i in range(len(data.shards))]
    label_N = np.concatenate([table.column("label").to_numpy() for table in tables])[valid]
    robust = class_gaussians(z_ND, label_N, num_classes, arm.neighbours)
    head_K = head_classes(robust.count_K, head_share)
    lent, warnings = calibrate_tail(robust, head_K, arm.lenders, arm.borrow, arm.spread)
    missing = missing_to_balance(robust.count_K).astype(np.float64)
    factor = np.linalg.cholesky(lent.cov_KDD + 1e-4 * np.eye(dim))
    save_file(
        {
            "mean": torch.from_numpy(lent.mean_KD).float(),
            "factor": torch.from_numpy(factor).float(),
            # balanced sets lack nothing; then every class is drawn alike
            "missing": torch.from_numpy(missing if missing.sum() else np.ones(num_classes)).float(),
        },
        folder / "gaussians.safetensors",
    )
    distances: dict[str, list[float]] = {}
    truth = clean_labels(data)
    if truth is not None:
        keys = [key for table in tables for key in table.column("key").to_pylist()]
        clean_N = np.array([truth[key] for key in keys])[valid]
        clean = class_gaussians(z_ND, clean_N, num_classes, 0)
        raw = class_gaussians(z_ND, label_N, num_classes, 0)
        for name, found in (("raw", raw), ("without outliers", robust), ("lent", lent)):
            distances[name] = np.linalg.norm(found.mean_KD - clean.mean_KD, axis=1).tolist()
    return {"distances": distances, "warnings": warnings, "head": head_K.tolist(), "counts": robust.count_K.tolist()}


def fit_calibrated(
    run: Run,
    folder: Path,
    train: AnySpec,
    predict: dict[str, AnySpec],
    data: Manifest,
    encoder: EncoderConfig,
    arm: Calibration,
    contrast: Stage | None,
    features: Stage | None,
    gaussians: Stage | None,
    config: TrainConfig,
    seed: int,
    augment: bool,
) -> dict[str, Any]:
    """Stage: one arm."""

    def path(stage: Stage | None, name: str) -> str:
        return "" if stage is None else str((stage.folder / name).resolve())

    objective = partial(
        Calibrated,
        encoder,
        data,
        arm,
        path(contrast, "export/dense.safetensors"),
        path(features, "features.safetensors"),
        path(gaussians, "gaussians.safetensors"),
        seed,
    )
    return {"seconds": run.fit(folder, objective, train, config, predict, augment, seed=seed).seconds}


@workload("noisy.rcal", RcalJob)
def rcal(job: RcalJob, run: Run) -> None:
    train, test = job.data.open()
    require_single(train, job.workload)
    options, data, noisy_test = input_options(job.encoder, job.seed), train, None
    if job.long_tail:
        data = run.stage("long-tail", cut_tail, train=train, tail=job.long_tail, seed=job.seed).manifest("train")
    if job.noise:
        image = image_options(job.encoder)
        noisy = run.stage(
            "noise", add_noise, train=data, test=test, noise=job.noise, field=job.encoder.field, image=image
        )
        data, noisy_test = noisy.manifest("train"), noisy.manifest("test")
    stream: Callable[..., AnySpec] = partial(job.data.stream, data, **options)
    look = job.data.stream(test, global_batch=job.eval_batch, shuffle=False, **options)
    run.track_data(train=data, test=test)
    contrast = features = None
    if any(arm.pretrained for arm in job.arms.values()):
        config = job.contrast_train or job.train
        contrast = run.stage(
            "contrast",
            fit_contrast,
            train=stream(global_batch=config.global_batch),
            encoder=job.encoder,
            section=job.contrast,
            config=config,
            seed=job.seed,
        )
        features = run.stage(
            "features", embed_train, data=data, contrast=contrast, encoder=job.encoder, max_bad=job.data.max_bad_samples
        )
        report_training(run, Fitted(contrast.folder), contrast["seconds"], "contrast")
    fits: dict[str, Stage] = {}
    for name, arm in job.arms.items():
        key = name.lower().replace(" ", "-")
        gaussians = None
        if arm.draws:
            gaussians = run.stage(
                f"gaussians-{key}", fit_gaussians, data=data, features=features, arm=arm, head_share=job.head_share
            )
            report_means(run, name, gaussians)
        fits[name] = run.stage(
            f"fit-{key}",
            fit_calibrated,
            train=stream(global_batch=job.train.global_batch),
            predict={"test": look},
            data=data,
            encoder=job.encoder,
            arm=arm,
            contrast=contrast if arm.pretrained else None,
            features=features if arm.pretrained else None,
            gaussians=gaussians,
            config=job.train,
            seed=job.seed,
            augment=job.augment,
        )
        report_training(run, Fitted(fits[name].folder), fits[name]["seconds"], name)
        run.report_data_health(Fitted(fits[name].folder))
    report_groups(run, fits, data, noisy_test)


def report_means(run: Run, name: str, gaussians: Stage) -> None:
    """How far the estimated class means are from those of the clean labels."""
    run.report.notes += gaussians["warnings"]
    head_K = np.array(gaussians["head"])
    rows = []
    for what, distance in gaussians["distances"].items():
        distance_K = np.array(distance)
        tail = float(distance_K[~head_K].mean()) if (~head_K).any() else float("nan")
        rows.append([what, round(float(distance_K[head_K].mean()), 4), round(tail, 4)])
        run.report.metrics[f"mean_distance/{name}/{what.replace(' ', '_')}"] = float(distance_K.mean())
    if rows:
        caption = "mean distance of a class's estimated mean to the mean of its clean samples"
        run.report.add_table(f"{name} class means", ["estimate", "head classes", "tail classes"], rows, caption)


def report_groups(run: Run, fits: dict[str, Stage], data: Manifest, noisy_test: Manifest | None) -> None:
    """Test accuracy over all classes and over those with many, medium and few training samples (thirds of the classes)."""
    label_N = np.concatenate([read_labels(data, i).column("label").to_numpy() for i in range(len(data.shards))])
    num_classes = data.label.num_classes or 0
    order = np.argsort(-np.bincount(label_N, minlength=num_classes), kind="stable")
    group_K = np.empty(num_classes, np.int64)
    group_K[order] = np.arange(num_classes) * 3 // max(num_classes, 1)
    rows = []
    for name, fit in fits.items():
        keys, predicted_Q = predicted_classes(fit)
        if noisy_test:
            given = labels_by_key(noisy_test)
            by_given = predicted_Q == np.array([given[key] for key in keys])
            run.report.metrics[f"noisy_test/{name}"] = float(by_given.mean())
        true_Q = Fitted(fit.folder).predictions("test").column("label").to_numpy()
        right_Q = predicted_Q == true_Q
        row: list[Any] = [name, round(100 * float(right_Q.mean()), 2)]
        run.report.metrics[f"test/{name}"] = float(right_Q.mean())
        for number, group in enumerate(("many", "medium", "few")):
            mask = group_K[true_Q] == number
            value = float(right_Q[mask].mean()) if mask.any() else float("nan")
            run.report.metrics[f"test_{group}/{name}"] = value
            row.append(round(100 * value, 2))
        rows.append(row)
    run.report.add_table(
        "accuracy", ["arm", "all %", "many %", "medium %", "few %"], rows, "by training samples a class"
    )
