"""The two objectives of nested co-teaching: a net on compressed features, and two nets that choose samples for each other.

Shape legend: B samples of this rank, D channels, K classes.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from labelmill.data.labels import Labels
from labelmill.data.stream import Batch
from labelmill.encoders import EncoderConfig, build_encoder
from labelmill.errors import DataError
from labelmill.job import StrictModel
from labelmill.losses.coteaching import cross_selection, draw_prefix, forget_rate, keep_prefix
from labelmill.training.config import TrainConfig
from labelmill.training.objective import Losses, Objective, Progress
from workloads.noisy.best_weights import BestWeights


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
    """Encoder and a class layer without bias, on compressed features. The model holds its number of channels: `prefix`.

    With `keep_best` it also keeps the weights of the best evaluation, and predicts with these.
    """

    step: Tensor
    prefix: Tensor

    def __init__(
        self, encoder: EncoderConfig, num_classes: int, compression: Compression, seed: int, keep_best: bool = False
    ) -> None:
        super().__init__()
        self.encoder = build_encoder(encoder)
        self.classes = nn.Linear(self.encoder.dim, num_classes, bias=False)
        self.compression, self.seed = compression, seed
        self.register_buffer("step", torch.zeros(1, dtype=torch.int64))
        self.register_buffer("prefix", torch.tensor([self.encoder.dim]))
        parts = {"encoder": self.encoder, "classes": self.classes}
        self.best = BestWeights(parts, self.encoder.dim if compression.kind == "nested" else 1) if keep_best else None

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
        if self.best:
            self.best.settle()  # of an evaluation since the last step
        logits_BK = self.logits(batch.inputs, self.drawn_prefix())
        self.step += 1
        loss_B = F.cross_entropy(logits_BK, batch.labels.single_B, reduction="none")
        return Losses((loss_B * batch.weight_B).sum() / batch.weight_B.sum().clamp_min(1))

    def finish(self, progress: Progress) -> None:
        if self.best:
            self.best.settle()

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> dict[str, Tensor]:
        assert self.best is not None
        found = _by_prefix([self], batch)
        return {"accuracy": self.best.add(found["by_prefix"], found["label"], batch.weight_B)[:, -1]}

    @torch.no_grad()
    def predict(self, batch: Batch) -> dict[str, Tensor]:
        with self.best.used() if self.best else nullcontext():
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
        keep_best: bool = False,
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
        dim = self.pair[0].encoder.dim if compression.kind == "nested" else 1
        self.best = BestWeights({"nets": self.nets}, dim) if keep_best else None

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

    def _settle(self) -> None:
        """Of an evaluation since the last step: both nets judge with the number of channels that it found."""
        prefix = self.best.settle() if self.best else None
        if prefix is not None and self.pair[0].compression.kind == "nested":
            for net in self.pair:
                net.prefix.fill_(prefix)

    def finish(self, progress: Progress) -> None:
        self._settle()

    def forward(self, batch: Batch) -> Losses:
        self._settle()
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
    def evaluate(self, batch: Batch) -> dict[str, Tensor]:
        assert self.best is not None
        found = _by_prefix(self.pair, batch)
        return {"accuracy": self.best.add(found["by_prefix"], found["label"], batch.weight_B)[:, -1]}

    @torch.no_grad()
    def predict(self, batch: Batch) -> dict[str, Tensor]:
        with self.best.used() if self.best else nullcontext():
            return _by_prefix(self.pair, batch)
