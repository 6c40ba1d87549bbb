"""The objective of parametric rows on queries with several labels: one loss over all of them, or a sum over drawn ones.

Shape legend: B queries of this rank, P positives of a query (padded with -1), R positives drawn.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from labelmill.data.labels import Labels
from labelmill.data.stream import Batch
from labelmill.encoders import EncoderConfig
from labelmill.encoders.hashing import mix64
from labelmill.heads.config import HeadConfig
from labelmill.job import StrictModel
from labelmill.training.objective import Losses
from workloads.discrimination.partial_fc import Classifier


class Together(StrictModel):
    """One loss of all positives of a query against one sample of the negatives (`head.loss`)."""

    kind: Literal["together"] = "together"


class SampledSum(StrictModel):
    """The mean of single-label losses of a few drawn positives, each against a sample of negatives of its own.

    As in the multi-positive partial FC of the trainers that the authors of MLCD released later. The other positives of a
    query are not masked: they are negatives where they are drawn.
    """

    kind: Literal["sampled_sum"] = "sampled_sum"
    draws: int = Field(3, ge=1, description="positives drawn a query and step; those of a query with fewer repeat")


class RowRanker(Classifier):
    """A `Classifier` for queries with several labels.

    Args:
        objective: see above.
        others: as of `Classifier`.
    """

    def __init__(
        self, encoder: EncoderConfig, head: HeadConfig, num_classes: int, seed: int, objective: Any, k: int
    ) -> None:
        super().__init__(encoder, head, num_classes, seed, k=k)
        self.objective = objective

    def prepare(self, raw: Any, labels: Labels, rng: np.ndarray | None) -> Any:
        inputs = super().prepare(raw, labels, rng)
        if self.training and isinstance(self.objective, SampledSum):
            keys_B = np.arange(len(labels), dtype=np.uint64) if rng is None else np.asarray(rng)
            inputs["drawn"] = torch.from_numpy(drawn_columns(keys_B, labels.ids_BP.numpy(), self.objective.draws))
        return inputs

    def forward(self, batch: Batch) -> Losses:
        emb_BD = self.encoder(batch.inputs["sample"])
        weight_B = torch.where((batch.labels.ids_BP >= 0).any(dim=1), batch.weight_B, 0.0)
        if not isinstance(self.objective, SampledSum):
            return Losses(self.head.loss(emb_BD, batch.labels, weight_B))
        drawn_BR, total = batch.inputs["drawn"], emb_BD.new_zeros(())
        for draw in range(self.objective.draws):
            self.head.draw = draw
            total = total + self.head.loss(emb_BD, drawn_BR[:, draw], weight_B)
        self.head.draw = 0
        return Losses(total / self.objective.draws)

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> dict[str, Tensor]:
        _, ids_BK = self.head.topk(self.encoder(batch.inputs["sample"]), 1)
        return {"p1": (batch.labels.ids_BP == ids_BK).any(dim=1)}

    @torch.no_grad()
    def predict(self, batch: Batch) -> dict[str, Tensor]:
        scores_BK, ids_BK = self.head.topk(self.encoder(batch.inputs["sample"]), self.k)
        return {"class_id": ids_BK, "score": scores_BK}


def drawn_columns(key_B: np.ndarray, ids_BP: np.ndarray, draws: int) -> np.ndarray:
    """`draws` positives of each query, int64 (B, draws): without replacement while there are enough, then again from the
    first; -1 for a query without any. A matter of key and label ids alone."""
    priority_BP = mix64(key_B[:, None] ^ mix64(ids_BP.astype(np.uint64))) >> np.uint64(1)
    priority_BP = np.where(ids_BP >= 0, priority_BP, np.uint64(2**64 - 1))
    ordered_BP = np.take_along_axis(ids_BP, np.argsort(priority_BP, axis=1, kind="stable"), axis=1)
    count_B1 = np.maximum((ids_BP >= 0).sum(axis=1), 1)[:, None]
    if not ordered_BP.shape[1]:
        return np.full((len(ids_BP), draws), -1, np.int64)
    return np.take_along_axis(ordered_BP, np.arange(draws)[None, :] % count_B1, axis=1)
