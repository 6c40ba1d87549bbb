"""Dual encoders for extreme multi-label classification: labels are encoded by the encoder of the queries.

Gupta, Khatri, Rawat, Bhojanapalli, Jain, Dhillon: Dual-Encoders for Extreme Multi-Label Classification (ICLR 2024, arXiv
2310.10636). Losses over all labels (softmax, decoupled softmax, soft top-k, binary cross-entropy) with a gradient cache, over
the batch, or over the batch and mined labels; exact top-k over sharded labels or through an approximate index.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, model_validator

from labelmill.data.config import DataConfig
from labelmill.data.manifest import Manifest
from labelmill.data.shards import read_labels
from labelmill.data.spec import AnySpec
from labelmill.encoders import EncoderConfig
from labelmill.errors import DataError, JobError
from labelmill.heads.encoded import encoded_head_config
from labelmill.heads.index import IndexConfig
from labelmill.losses.retrieval import DecoupledSection, RetrievalLoss, SoftTopKSection
from labelmill.reporting import report_training
from labelmill.run import Run
from labelmill.stages import Fitted
from labelmill.training.config import TrainConfig, TrainJob
from labelmill.workload import workload
from workloads.discrimination.partial_fc import input_options
from workloads.extreme.ranking import (
    RankingSection,
    measure_index,
    ranked_for,
    refuse_test_search,
    report_extreme,
    report_index,
)
from workloads.extreme.towers import DualEncoder, FullNegatives, Negatives


class DualEncoderJob(TrainJob):
    """Queries with several labels; the class names are the labels' texts."""

    workload: Literal["extreme.dual_encoder"]
    data: DataConfig
    encoder: EncoderConfig
    loss: RetrievalLoss = DecoupledSection()
    negatives: Negatives = FullNegatives()
    normalize: bool = Field(True, description="scores are cosines; otherwise inner products")
    temperature: float = Field(0.05, gt=0, description="divides the scores; 0.05 for cosines, 1 for inner products")
    label_cache_mb: float = Field(1024.0, ge=0, description="memory for prepared label texts, MiB a worker")
    memory_mb: float = Field(512.0, gt=0, description="memory for scores of a step, MiB a worker")
    ranking: RankingSection = RankingSection()
    eval_batch: int = Field(1024, ge=1)
    index: IndexConfig | None = Field(None, description="an approximate index, measured and packed into the model")

    def class_count(self) -> int | None:
        return self.data.open()[0].label.num_classes

    @model_validator(mode="after")
    def _sound(self) -> DualEncoderJob:
        if self.normalize and self.temperature >= 0.5:
            warnings.warn(
                f"temperature {self.temperature:g} with cosines: scores lie within ±{1 / self.temperature:g}, which a "
                "softmax over many labels can't fit. Use about 0.05.",
                stacklevel=2,
            )
        if isinstance(self.negatives, FullNegatives) and self.train.zero_stage == 3 and self.cluster.workers > 1:
            raise ValueError(
                "negatives.kind full encodes labels again in the backward pass: use train.zero_stage 0 to 2"
            )
        if isinstance(self.loss, SoftTopKSection) and self.loss.k != "num_pos" and self.loss.k < 1:
            raise ValueError(f"loss.k {self.loss.k}: 0 < k < number of labels")
        refuse_test_search(self.search, self.data.dev)
        return self


def check_label_space(job: DualEncoderJob, train: Manifest) -> None:
    """Raises JobError for labels or numbers that the method can't work with."""
    classes = train.label.num_classes
    if train.label.form not in ("single", "multi", "soft") or classes is None:
        raise JobError(f"extreme.dual_encoder takes labels of form single, multi or soft, not {train.label.form}.")
    if not train.classes:
        raise DataError(f"data set {train.name!r} has no class names, which are the labels' texts here.")
    if isinstance(job.loss, SoftTopKSection) and job.loss.k != "num_pos" and job.loss.k >= classes:
        raise JobError(f"loss.k {job.loss.k}: 0 < k < number of labels, which is {classes}.")


def unlabelled(data: Manifest) -> int:
    """Training queries without any label: they count nothing."""
    if data.label.form == "single":
        return 0
    lists = (read_labels(data, i).column("label") for i in range(len(data.shards)))
    return sum(int(np.sum(np.array([len(row) == 0 for row in column.to_pylist()]))) for column in lists)


def fit_dual_encoder(
    run: Run,
    folder: Path,
    train: AnySpec,
    predict: Mapping[str, AnySpec],
    evaluate: AnySpec,
    encoder: EncoderConfig,
    loss: RetrievalLoss,
    negatives: Negatives,
    config: TrainConfig,
    normalize: bool,
    temperature: float,
    seed: int,
    k: int,
    embed: bool,
    label_cache_mb: float,
    memory_mb: float,
) -> dict[str, Any]:
    """Stage: trains, then ranks `k` labels for every query of the streams of `predict`."""
    data = train.parts[0].manifest
    options: dict[str, Any] = {"normalize": normalize, "temperature": temperature, "seed": seed, "k": k, "embed": embed}
    options |= {"label_cache_mb": label_cache_mb, "memory_mb": memory_mb}
    objective = partial(DualEncoder, encoder, loss, negatives, data, **options)
    # drawing positives needs the samples' keys, which come with augmentation
    fitted = run.fit(folder, objective, train, config, predict, augment=True, evaluate=evaluate)
    return {"seconds": fitted.seconds, "unlabelled": unlabelled(data)}


METRICS = ("test/P@1", "test/P@5", "test/PSP@1", "test/PSP@5", "test/nDCG@5", "test/R@10", "train/final_loss")


@workload("extreme.dual_encoder", DualEncoderJob, METRICS, ("eval/p1", "eval/r10"))
def dual_encoder(job: DualEncoderJob, run: Run) -> None:
    train, test = job.data.open()
    check_label_space(job, train)
    k = ranked_for(job.ranking, test)
    options = input_options(job.encoder, job.seed)
    stream = job.data.training_stream(train, run.folder / "data", global_batch=job.train.global_batch, **options)
    run.track_data(train=stream, test=test)
    fit = run.stage(
        "fit",
        fit_dual_encoder,
        train=stream,
        encoder=job.encoder,
        loss=job.loss,
        negatives=job.negatives,
        config=job.train,
        normalize=job.normalize,
        temperature=job.temperature,
        seed=job.seed,
        k=k,
        embed=job.index is not None,
        label_cache_mb=job.label_cache_mb,
        memory_mb=job.memory_mb,
        **job.data.judging(test, global_batch=job.eval_batch, **options),
    )
    report_training(run, Fitted(fit.folder), fit["seconds"])
    report_extreme(run, {"dual encoder": fit}, job.ranking, train, test)
    if fit["unlabelled"]:
        run.report.metrics["data/training queries without a label"] = float(fit["unlabelled"])
    run.report_data_health(Fitted(fit.folder))
    if job.index:
        inputs = {"train": train, "test": test, "index": job.index, "section": job.ranking}
        report_index(run, run.stage("index", measure_index, fit=fit, **inputs))
    if job.register_as:
        head = encoded_head_config(job.loss, job.normalize, job.temperature)
        run.register(job.register_as, fit, encoder=job.encoder, head=head, data=train, index=job.index)
