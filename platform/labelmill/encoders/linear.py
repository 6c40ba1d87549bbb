"""`pixels` and `linear`: encoders without depth, for baselines and as frozen teachers (PCA).

B samples, N rows of a fit, I input width, D embedding width.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import nn

from labelmill.encoders.base import Encoder, Prepared, Raw
from labelmill.encoders.hashing import Rng
from labelmill.encoders.vision import ImageEncoder, ImageOptions
from labelmill.errors import DataError
from labelmill.job import StrictModel


class PixelsConfig(ImageOptions):
    """Options of the `pixels` encoder."""

    kind: Literal["pixels"] = "pixels"


class Pixels(ImageEncoder):
    """The normalised pixels themselves; no parameters."""

    def __init__(self, config: PixelsConfig) -> None:
        super().__init__(config, config.channels * config.image_size**2, config.field)

    def forward(self, prepared: Prepared) -> torch.Tensor:
        """float (B, C, H, W) -> emb_BD, D = C x H x W."""
        assert isinstance(prepared, torch.Tensor)
        return prepared.flatten(1)


class LinearConfig(StrictModel):
    """Options of the `linear` encoder."""

    kind: Literal["linear"] = "linear"
    field: str = Field("image", description="manifest field: an image or an array, flattened")
    channels: Literal[1, 3] = Field(1, description="an image is decoded to so many channels")
    image_size: int | None = Field(None, ge=1, description="an image is resized to this side; null keeps its size")
    in_dim: int = Field(ge=1, description="numbers of a sample after flattening")
    dim: int = Field(64, ge=1, description="width of the embedding")


class LinearProjection(Encoder):
    """emb = (x - centre) W^T. uint8 input is scaled to 0..1. The centre is a buffer, W a parameter."""

    config: LinearConfig
    centre_I: torch.Tensor

    def __init__(self, config: LinearConfig) -> None:
        super().__init__(config, config.dim, config.field)
        self.weight_DI = nn.Parameter(torch.randn(config.dim, config.in_dim) * config.in_dim**-0.5)
        self.register_buffer("centre_I", torch.zeros(config.in_dim))

    def set_weights(self, weight_DI: torch.Tensor, centre_I: torch.Tensor) -> LinearProjection:
        """Takes a fitted projection and freezes it."""
        with torch.no_grad():
            self.weight_DI.copy_(weight_DI)
            self.centre_I.copy_(centre_I)
        self.weight_DI.requires_grad_(False)
        return self

    def prepare(self, raw: Raw, rng: Rng | None = None) -> Prepared:
        """Arrays (B, ...) -> float32 (B, I). Raises DataError when a sample isn't I numbers."""
        values = raw.numpy() if isinstance(raw, torch.Tensor) else np.asarray(raw)
        flat = values.reshape(len(values), -1) if len(values) else values.reshape(0, self.config.in_dim)
        if flat.shape[1] != self.config.in_dim:
            raise DataError(
                f"field {self.field!r}: a sample has {flat.shape[1]} numbers, encoder.in_dim is {self.config.in_dim}"
            )
        scale = 1.0 / 255.0 if values.dtype == np.uint8 else 1.0
        return torch.from_numpy(flat.astype(np.float32) * np.float32(scale))

    def forward(self, prepared: Prepared) -> torch.Tensor:
        """float (B, I) -> emb_BD."""
        assert isinstance(prepared, torch.Tensor)
        return (prepared - self.centre_I) @ self.weight_DI.T


def fit_pca(values_NI: torch.Tensor, dim: int, whiten: bool = False) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Principal components of float rows: (weight_DI, centre_I, share_D of the variance), float32.

    Computed in float64 from the I x I covariance; the largest entry of every component is positive, so the
    result doesn't depend on the solver's signs. `whiten` gives every component unit variance.
    Raises ValueError when dim exceeds the input width or the number of rows.
    """
    rows, width = values_NI.shape
    if not 1 <= dim <= min(rows, width):
        raise ValueError(f"PCA to {dim} dimensions needs at least that many rows and columns, found {rows} x {width}")
    values = values_NI.double()
    centre_I = values.mean(dim=0)
    values = values - centre_I
    variance_I, vectors_II = torch.linalg.eigh(values.T @ values / max(rows - 1, 1))
    variance_D = variance_I.flip(0)[:dim].clamp_min(0)
    weight_DI = vectors_II.flip(1)[:, :dim].T
    largest = weight_DI.gather(1, weight_DI.abs().argmax(dim=1, keepdim=True))
    weight_DI = weight_DI * largest.sign()
    share_D = variance_D / variance_I.clamp_min(0).sum().clamp_min(1e-300)
    if whiten:
        weight_DI = weight_DI / variance_D.clamp_min(1e-12).sqrt()[:, None]
    return weight_DI.float().contiguous(), centre_I.float(), share_D.float()
