"""What every encoder is: raw fields to an embedding, in two halves.

`prepare` runs on the CPU in the reader thread (numpy, no gradient) and gives tensors whose first axis is
always the sample, so that a prepared batch can be cut into micro batches. `forward` runs in the training
engine.

B samples, D embedding width, C channels, H height, W width of a feature map.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from labelmill.encoders.hashing import Rng
from labelmill.errors import JobError
from labelmill.job import StrictModel

Prepared = torch.Tensor | dict[str, torch.Tensor]
Raw = Sequence[Any] | np.ndarray | torch.Tensor


class Encoder(nn.Module):
    """Maps one field of a sample to an embedding.

    Attributes: `dim` width of the embedding; `field` manifest field it reads; `config` what it was built
    from. Weights come from torch's global generator at construction: seed it before `build_encoder`.
    """

    dim: int
    field: str

    def __init__(self, config: StrictModel, dim: int, field: str) -> None:
        super().__init__()
        self.config = config
        self.dim = dim
        self.field = field

    def prepare(self, raw: Raw, rng: Rng | None = None) -> Prepared:
        """Decoded field values of B samples -> CPU tensors with first axis B.

        `rng` (a numpy Generator, or uint64 keys (B,) of `sample_keys`) switches training augmentation on;
        keys make it independent of how the batch is cut.
        """
        raise NotImplementedError

    def forward(self, prepared: Prepared) -> torch.Tensor:
        """emb_BD, floating point, not normalised."""
        raise NotImplementedError

    def maps(self, prepared: Prepared) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """emb_BD as `forward` gives it, and the feature maps on the way to it, (B, C, H, W) each, first to last.

        Raises JobError for an encoder that has none.
        """
        kind = getattr(self.config, "kind", type(self).__name__)
        raise JobError(f"encoder {kind!r} has no feature maps; small_cnn, small_vit and hf_image have.")

    def portable(self, folder: Path) -> StrictModel:
        """A config that rebuilds this encoder elsewhere: files it needs beside its weights go into `folder`.

        The weights themselves are the caller's to save (`state_dict`). Paths in the returned config are
        relative to `folder`; give it as `root` to `build_encoder`.
        """
        return self.config

    @torch.no_grad()
    def embed(self, raw: Raw, batch: int = 4096) -> torch.Tensor:
        """emb_ND on the CPU, not normalised, evaluation mode, no augmentation.

        For small sets and predictions.
        """
        was_training, device = self.training, next((p.device for p in self.parameters()), torch.device("cpu"))
        self.eval()
        try:
            parts = [
                self(to_device(self.prepare(raw[i : i + batch]), device)).float().cpu()
                for i in range(0, len(raw), batch)
            ]
        finally:
            self.train(was_training)
        return torch.cat(parts) if parts else torch.zeros(0, self.dim)


def to_device(prepared: Prepared, device: torch.device | str) -> Prepared:
    """The prepared batch on `device` (asynchronous where the source is pinned)."""
    if isinstance(prepared, dict):
        return {name: value.to(device, non_blocking=True) for name, value in prepared.items()}
    return prepared.to(device, non_blocking=True)


def slice_prepared(prepared: Prepared, lo: int, hi: int) -> Prepared:
    """Rows lo:hi of every tensor: a micro batch."""
    if isinstance(prepared, dict):
        return {name: value[lo:hi] for name, value in prepared.items()}
    return prepared[lo:hi]


def prepared_rows(prepared: Prepared) -> int:
    """B of a prepared batch."""
    return len(next(iter(prepared.values())) if isinstance(prepared, dict) else prepared)
