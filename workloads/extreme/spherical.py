"""Classification with a loss of the spherical family, whose step costs the same for any number of classes.

de Brebisson and Vincent: The Z-loss (2016, arXiv 1604.08859); Vincent, de Brebisson, Bouthillier: Efficient Exact Gradient
Update for training Deep Networks with Very Large Sparse Targets (NIPS 2015, arXiv 1412.7091). The output layer is factored;
its step equals plain SGD on the dense layer. The encoder has its own optimizer.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from labelmill.data.config import DataConfig
from labelmill.data.labels import Labels
from labelmill.data.spec import AnySpec
from labelmill.data.stream import Batch
from labelmill.encoders import EncoderConfig, build_encoder
from labelmill.errors import JobError
from labelmill.heads.config import HeadConfig
from labelmill.heads.factored import FactoredConfig, FactoredHead
from labelmill.heads.sharded import ShardedHead
from labelmill.reporting import report_training
from labelmill.run import Run
from labelmill.stages import Fitted, Stage
from labelmill.training.config import TrainConfig, TrainJob
from labelmill.training.objective import Losses, Objective
from labelmill.workload import workload
from workloads.discrimination.partial_fc import input_options
from workloads.extreme.ranking import RankingSection, ranked_for, refuse_test_search, report_extreme


class RowClassifier(Objective):
    """Encoder and sharded rows: a factored head, or an ordinary one over all classes for comparison.

    Args:
        encoder: config section.
        head: of either kind.
        bias: constant that is appended to the embedding, which makes one column of the rows a bias; 0: none.
        k: classes that `predict` ranks.
    """

    def __init__(
        self,
        encoder: EncoderConfig,
        head: FactoredConfig | HeadConfig,
        num_classes: int,
        seed: int,
        bias: float = 0.0,
        k: int = 50,
    ) -> None:
        super().__init__()
        self.encoder = build_encoder(encoder)
        self.bias, self.k = bias, min(k, num_classes)
        dim = self.encoder.dim + int(bias != 0)
        self.head: ShardedHead = (
            FactoredHead(num_classes, dim, head, seed)
            if isinstance(head, FactoredConfig)
            else ShardedHead(num_classes, dim, head, seed)
        )

    @property
    def heads(self) -> Mapping[str, ShardedHead]:
        return {"classes": self.head}

    def prepare(self, raw: Any, labels: Labels, rng: np.ndarray | None) -> Any:
        return self.encoder.prepare(raw, rng)

    def embed(self, batch: Batch) -> Tensor:
        """Embeddings as the head takes them (B, D)."""
        emb_BD = self.encoder(batch.inputs)
        if not self.bias:
            return emb_BD
        return torch.cat([emb_BD, emb_BD.new_full((len(emb_BD), 1), self.bias)], dim=1)

    def forward(self, batch: Batch) -> Losses:
        return Losses(self.head.loss(self.embed(batch), batch.labels, batch.weight_B))

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> dict[str, Tensor]:
        _, ids_BK = self.head.topk(self.embed(batch), min(10, self.k))
        hit_BK = (ids_BK[:, :, None] == batch.labels.ids_BP[:, None, :]).any(dim=2)
        return {"top1": hit_BK[:, 0], "top10": hit_BK.any(dim=1)}

    @torch.no_grad()
    def predict(self, batch: Batch) -> dict[str, Tensor]:
        scores_BK, ids_BK = self.head.topk(self.embed(batch), self.k)
        return {"class_id": ids_BK, "score": scores_BK}


class SphericalJob(TrainJob):
    """A classifier with a factored head; `compare` trains the same encoder with an ordinary head over all classes."""

    workload: Literal["extreme.spherical"]
    data: DataConfig
    encoder: EncoderConfig
    factored: FactoredConfig = FactoredConfig()
    compare: HeadConfig | None = Field(None, description="an ordinary head, such as softmax over all classes, besides")
    compare_learning_rate: float | None = Field(None, gt=0, description="of the comparison; empty: the same")
    bias: float = Field(
        0.0, ge=0, description="constant appended to embeddings, so that one column of the rows is a bias"
    )
    ranking: RankingSection = RankingSection(ks=(1, 5), recall_ks=(10, 50))
    eval_batch: int = Field(1024, ge=1)

    def class_count(self) -> int | None:
        return self.data.open()[0].label.num_classes

    @model_validator(mode="after")
    def _exact(self) -> SphericalJob:
        refuse_test_search(self.search, self.data.dev)
        if self.train.precision != "fp32":
            raise ValueError("the factored head is exact in fp32: set train.precision to fp32")
        if self.register_as and not self.factored.loss.scores_are_logits:
            raise ValueError(
                f"register_as: {self.factored.loss.kind} ranks by magnitude, a registered model by the score itself"
            )
        if self.register_as and self.bias:
            raise ValueError("register_as: a registered encoder doesn't append the bias; set bias to 0")
        return self


def fit_rows(
    run: Run,
    folder: Path,
    train: AnySpec,
    predict: Mapping[str, AnySpec],
    evaluate: AnySpec,
    encoder: EncoderConfig,
    head: FactoredConfig | HeadConfig,
    config: TrainConfig,
    seed: int,
    bias: float,
    k: int,
) -> dict[str, Any]:
    """Stage: trains a classifier and ranks `k` classes for every sample of the streams of `predict`."""
    assert train.label.num_classes is not None
    if train.label.form not in ("single", "multi"):
        raise JobError(f"extreme.spherical takes labels of form single or multi, not {train.label.form}.")
    objective = partial(RowClassifier, encoder, head, train.label.num_classes, seed, bias, k)
    return {"seconds": run.fit(folder, objective, train, config, predict, augment=True, evaluate=evaluate).seconds}


@workload("extreme.spherical", SphericalJob, ("test/P@1", "test/R@10", "test/R@50"), ("eval/top1", "eval/top10"))
def spherical(job: SphericalJob, run: Run) -> None:
    train, test = job.data.open()
    k = ranked_for(job.ranking, test)
    options = input_options(job.encoder, job.seed)
    stream = job.data.training_stream(train, run.folder / "data", global_batch=job.train.global_batch, **options)
    run.track_data(train=stream, test=test)
    inputs: dict[str, Any] = {
        "train": stream,
        **job.data.judging(test, global_batch=job.eval_batch, **options),
        "encoder": job.encoder,
        "seed": job.seed,
        "bias": job.bias,
        "k": k,
    }
    fits: dict[str, Stage] = {
        job.factored.loss.kind: run.stage("fit", fit_rows, head=job.factored, config=job.train, **inputs)
    }
    if job.compare:
        rate = job.compare_learning_rate or job.train.learning_rate
        config = job.train.model_copy(update={"learning_rate": rate})
        name = f"{job.compare.loss.kind} over all classes"
        fits[name] = run.stage("fit-compared", fit_rows, head=job.compare, config=config, **inputs)
    for number, (name, fit) in enumerate(fits.items()):
        report_training(run, Fitted(fit.folder), fit["seconds"], "" if number == 0 else "compared")
        run.report.metrics[f"seconds/{name}"] = float(fit["seconds"]["train"])
        run.report_data_health(Fitted(fit.folder))
    report_extreme(run, fits, job.ranking, train, test)
    if job.register_as:
        (first, *_) = fits.values()
        run.register(job.register_as, first, encoder=job.encoder, head=job.factored.head, data=train)
