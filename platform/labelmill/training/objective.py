"""What one training step minimises: encoder, dense modules, sharded heads and losses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from labelmill.data.stream import Batch

if TYPE_CHECKING:
    import numpy as np

    from labelmill.data.labels import Labels
    from labelmill.heads.sharded import ShardedHead


Progress = Callable[[int, int], None]
"""Takes (done, total)."""


@dataclass
class Losses:
    """A step's loss.

    Attributes:
        total: scalar that is minimised. A sharded head's loss is already the mean over the global batch; a loss made
            on the rank alone should be the rank's mean.
        parts: further scalars to log.
    """

    total: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)


class Objective(nn.Module):
    """Base of a method's objective.

    Dense modules are ordinary attributes and train inside the DeepSpeed engine. Sharded heads are named in `heads`;
    they are no sub-modules (the engine would replicate and average them) and train beside the engine.
    """

    phase_rates: tuple[float, ...] = (1.0,)
    """With several: each batch is used for so many optimizer steps, one a phase. A phase has optimizer moments of its own, and
    its learning rate is the schedule's times its number here."""

    @property
    def heads(self) -> Mapping[str, ShardedHead]:
        """Sharded heads by name."""
        return {}

    def begin(self, step: int, total: int) -> None:
        """Called on every rank before optimizer step `step` (from 0) of `total`; its phase is `step % len(phase_rates)`."""

    def prepare(self, raw: Any, labels: Labels, rng: np.ndarray | None) -> Any:
        """CPU side of the encoder, in the reader thread: raw field values -> tensors; `rng` uint64 keys (B,) augment.

        `self.training` tells training streams from evaluation.
        """
        raise NotImplementedError

    def join(self, keys: Sequence[str], weight_B: Tensor) -> dict[str, Any]:
        """What is kept beside the shards of a batch's samples, by name: for `Batch.columns`. In the reader thread."""
        return {}

    def start(self, progress: Progress) -> None:
        """Called once on every rank before the first step of a fresh run, not after a resume."""

    def finish(self, progress: Progress) -> None:
        """Called on every rank when training is complete, before weights are exported."""

    def forward(self, batch: Batch) -> Losses:
        """The loss of a batch."""
        raise NotImplementedError

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> dict[str, Tensor]:
        """Per-sample figures of merit by name, each (B,), for `train.evaluate_every`. Collective, as `predict` is."""
        raise NotImplementedError

    @torch.no_grad()
    def predict(self, batch: Batch) -> dict[str, Tensor]:
        """Per-sample outputs by name, each (B, ...). Collective: every rank calls it equally often.

        Integer matrices may differ in width from batch to batch (labels of samples that have several); they are kept with -1
        behind the shorter ones.
        """
        raise NotImplementedError
