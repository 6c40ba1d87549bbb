"""The objective of tables with many categorical columns: one hashed embedding table for all of them, then a network.

Shape legend: B samples of this rank, K looked-up rows, d width of a table row, D width of the input, T features, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from safetensors.numpy import load_file
from torch import Tensor, nn

from labelmill.data.categorical import Feature, FeatureSet, RowMap, read_rows, value_hashes
from labelmill.data.labels import Labels
from labelmill.data.manifest import Manifest
from labelmill.data.shards import read_shard
from labelmill.data.stream import Batch
from labelmill.heads.optim import Adagrad, RowOptimizerConfig
from labelmill.heads.sharded import ShardedHead
from labelmill.heads.table import ShardedTable
from labelmill.job import StrictModel
from labelmill.training.objective import Losses, Objective

Sharing = Literal["multiplexed", "separate", "hashing_trick", "collisionless"]


class TableSection(StrictModel):
    """The embedding table."""

    sharing: Sharing = Field("multiplexed", description="who uses which rows; the others are baselines")
    rows: int | None = Field(None, ge=2, description="rows of the table")
    budget: float | None = Field(None, gt=0, description="or: rows as a share of the distinct training values")
    dim: int = Field(16, ge=1, description="numbers of a row; a feature gets `chunks` rows side by side")
    optimizer: RowOptimizerConfig = Adagrad()
    lr_multiplier: float = Field(10.0, gt=0, description="rows learn this much faster than the network")
    init_std: float = Field(0.03, gt=0)

    @model_validator(mode="after")
    def _one_size(self) -> TableSection:
        if self.sharing != "collisionless" and (self.rows is None) == (self.budget is None):
            raise ValueError("give exactly one of `rows` and `budget`")
        return self


class NetworkSection(StrictModel):
    """What follows the embeddings: cross layers (DCN-V2, Wang et al., WWW 2021), then a network."""

    cross: int = Field(1, ge=0, description="cross layers x0 * (W x + b) + x")
    hidden: tuple[int, ...] = (128,)
    weigh: bool = Field(True, description="a learned factor for each feature's embedding")


def count_values(data: Manifest, field: str, features: FeatureSet) -> dict[str, np.ndarray]:
    """Sorted distinct value hashes of each feature, over all shards."""
    found: dict[str, np.ndarray] = {f.name: np.empty(0, np.uint64) for f in features.features}
    for i in range(len(data.shards)):
        columns = read_rows(read_shard(data, i).column(field).to_pylist(), features)
        for feature in features.features:
            values = flat_values(columns[feature.name], feature)
            found[feature.name] = np.union1d(found[feature.name], value_hashes(values, feature))
    return found


def flat_values(column: list[Any], feature: Feature) -> list[Any]:
    """All values of a column that count."""
    return [v for row in column for v in (row or [])[: feature.most]] if feature.many else column


def row_map(features: FeatureSet, table: TableSection, values_file: Path) -> RowMap:
    """The map of a job, from the training values that `count_values` found."""
    values = load_file(values_file)
    vocabulary = {name: len(found) for name, found in values.items()}
    rows = table.rows or max(2, round((table.budget or 1.0) * sum(vocabulary.values())))
    return RowMap(features, rows, table.sharing, vocabulary, {n: v.view(np.uint64) for n, v in values.items()})


class TableClassifier(Objective):
    """Columns to classes.

    Args:
        features, table, network: sections.
        values_file: distinct training values by feature (hashes).
        num_classes, seed: of labels, of weights.
    """

    def __init__(
        self,
        features: FeatureSet,
        table: TableSection,
        network: NetworkSection,
        values_file: Path,
        num_classes: int,
        seed: int,
    ) -> None:
        super().__init__()
        self.features, self.table_map = features, row_map(features, table, values_file)
        self.table = ShardedTable(
            self.table_map.rows, table.dim, table.optimizer, table.lr_multiplier, table.init_std, seed
        )
        self.dims = [feature.chunks * table.dim for feature in features.features]
        width = sum(self.dims)
        self.weight_T = nn.Parameter(torch.ones(len(self.dims)), requires_grad=network.weigh)
        self.cross = nn.ModuleList(nn.Linear(width, width) for _ in range(network.cross))
        layers: list[nn.Module] = []
        for hidden in network.hidden:
            layers += [nn.Linear(width, hidden), nn.ReLU()]
            width = hidden
        self.network = nn.Sequential(*layers, nn.Linear(width, num_classes))

    @property
    def heads(self) -> Mapping[str, ShardedHead]:
        return {"table": self.table}

    def prepare(self, raw: Any, labels: Labels, rng: np.ndarray | None) -> Any:
        places = self.table_map.look_up(read_rows(list(raw), self.features))
        return {name: torch.from_numpy(rows) for name, rows in places.items()}

    def embed(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Embeddings of all features side by side (B, D): one lookup for all of them."""
        rows = [inputs[feature.name] for feature in self.features.features]
        flat_K = torch.cat([r.clamp_min(0).flatten() for r in rows])
        used_K = torch.cat([(r >= 0).flatten() for r in rows])
        found_Kd = torch.zeros(len(flat_K), self.table.dim, dtype=self.table.dtype, device=flat_K.device)
        found_Kd = found_Kd.index_put((used_K.nonzero()[:, 0],), self.table.look_up(flat_K[used_K]))
        parts, at = [], 0
        for place, (feature, r) in enumerate(zip(self.features.features, rows, strict=True)):
            part = found_Kd[at : at + r.numel()].view(*r.shape, -1)  # (B, chunks, V, d)
            at += r.numel()
            pooled = part.sum(dim=2)
            if feature.many and feature.pool == "mean":
                pooled = pooled / (r >= 0).sum(dim=2, keepdim=True).clamp_min(1)
            parts.append(pooled.flatten(1) * self.weight_T[place])
        return torch.cat(parts, dim=1)

    def logits(self, batch: Batch) -> Tensor:
        """Scores of all classes (B, C)."""
        x_BD = first_BD = self.embed(batch.inputs)
        for layer in self.cross:
            x_BD = first_BD * layer(x_BD) + x_BD
        return self.network(x_BD)

    def forward(self, batch: Batch) -> Losses:
        loss_B = F.cross_entropy(self.logits(batch), batch.labels.single_B, reduction="none")
        return Losses((loss_B * batch.weight_B).sum() / batch.weight_B.sum().clamp_min(1))

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> dict[str, Tensor]:
        return {"accuracy": self.logits(batch).argmax(dim=1) == batch.labels.single_B}

    @torch.no_grad()
    def predict(self, batch: Batch) -> dict[str, Tensor]:
        return {"class_id": self.logits(batch).argmax(dim=1), "label": batch.labels.single_B}
