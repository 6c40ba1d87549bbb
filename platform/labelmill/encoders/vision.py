"""Small image encoders for 28 x 28 to 64 x 64 images: `small_cnn`, `small_vit`, and `mlp` for quick experiments.

GroupNorm and LayerNorm only: the result must not depend on how a batch is spread over workers.

B samples, H height, W width, C channels, T tokens, D embedding width.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import nn

from labelmill.encoders.augment import ImageAugment, augment_images
from labelmill.encoders.base import Encoder, Prepared, Raw
from labelmill.encoders.hashing import Rng
from labelmill.errors import DataError
from labelmill.job import StrictModel


class ImageOptions(StrictModel):
    """How decoded images become the input of an encoder; shared by every image encoder."""

    field: str = Field("image", description="manifest field that holds the image")
    image_size: int = Field(28, ge=4, description="side in pixels; other sizes are resized")
    channels: Literal[1, 3] = 1
    mean: tuple[float, ...] = Field((0.5,), description="per channel or one for all, on the 0..1 scale")
    std: tuple[float, ...] = Field((0.5,), description="per channel or one for all, on the 0..1 scale")
    augment: ImageAugment = ImageAugment()

    @model_validator(mode="after")
    def _check_statistics(self) -> ImageOptions:
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, self.channels):
                raise ValueError(f"{name} has {len(values)} numbers; give 1 or {self.channels} (channels)")
        if min(self.std) <= 0:
            raise ValueError(f"std must be positive, not {min(self.std):g}")
        return self


def prepare_images(raw: Raw, options: ImageOptions, rng: Rng | None = None) -> torch.Tensor:
    """uint8 (B, H, W, C) or (B, H, W) -> float32 (B, C, image_size, image_size), normalised.

    One channel is repeated when three are wanted. `rng` switches the augmentation on. Raises DataError for
    another type or shape.
    """
    images = raw.numpy() if isinstance(raw, torch.Tensor) else np.asarray(raw)
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or images.dtype != np.uint8:
        raise DataError(
            f"field {options.field!r}: the encoder needs uint8 images of shape (B, H, W, C), "
            f"found {images.dtype} {images.shape}"
        )
    found = images.shape[-1]
    if found not in (1, options.channels):
        raise DataError(
            f"field {options.field!r}: images have {found} channels and the encoder takes "
            f"{options.channels}; set encoder.channels or decode to {options.channels} channels"
        )
    if images.shape[1:3] != (options.image_size, options.image_size):
        images = _resize(images, options.image_size)
    if rng is not None and options.augment.active:
        images_BCHW = augment_images(images, options.augment, rng)
    else:
        images_BCHW = images.transpose(0, 3, 1, 2).astype(np.float32)
    if found != options.channels:
        images_BCHW = np.repeat(images_BCHW, options.channels, axis=1)
    std = np.array(options.std, dtype=np.float32).reshape(1, -1, 1, 1)
    mean = np.array(options.mean, dtype=np.float32).reshape(1, -1, 1, 1)
    return torch.from_numpy(np.ascontiguousarray(images_BCHW * (1.0 / (255.0 * std)) - mean / std))


def _resize(images_BHWC: np.ndarray, size: int) -> np.ndarray:
    """uint8 (B, H, W, C) -> uint8 (B, size, size, C), bilinear with antialiasing."""
    pixels = torch.from_numpy(np.ascontiguousarray(images_BHWC.transpose(0, 3, 1, 2))).float()
    pixels = F.interpolate(pixels, size=(size, size), mode="bilinear", antialias=True, align_corners=False)
    return pixels.round_().clamp_(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()


class ImageEncoder(Encoder):
    """An encoder whose input is an image tensor (B, C, H, W)."""

    config: ImageOptions

    def prepare(self, raw: Raw, rng: Rng | None = None) -> Prepared:
        """See `prepare_images`."""
        return prepare_images(raw, self.config, rng)


class SmallCnnConfig(ImageOptions):
    """Options of the `small_cnn` encoder."""

    kind: Literal["small_cnn"] = "small_cnn"
    dim: int = Field(128, ge=2, description="width of the embedding")
    width: int = Field(32, ge=8, multiple_of=8, description="channels of the first stage; each stage doubles them")
    stages: int = Field(3, ge=1, le=5, description="each stage after the first halves the side")
    blocks: int = Field(1, ge=1, description="residual blocks a stage")

    @model_validator(mode="after")
    def _check_side(self) -> SmallCnnConfig:
        if self.image_size >> (self.stages - 1) < 2:
            raise ValueError(f"{self.stages} stages leave less than 2 pixels of image_size {self.image_size}")
        return self


class _Block(nn.Module):
    """Pre-activation residual block: GroupNorm, GELU, 3 x 3 convolution, twice."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(8, channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False)
        self.norm2 = nn.GroupNorm(8, channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, 1, 1, bias=False)
        self.skip: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels_out:
            self.skip = nn.Conv2d(channels_in, channels_out, 1, stride, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv1(F.gelu(self.norm1(x)))
        return self.skip(x) + self.conv2(F.gelu(self.norm2(y)))


class SmallCnn(ImageEncoder):
    """A residual network with GroupNorm; global average pooling; a linear layer to `dim`."""

    def __init__(self, config: SmallCnnConfig) -> None:
        super().__init__(config, config.dim, config.field)
        layers: list[nn.Module] = [nn.Conv2d(config.channels, config.width, 3, 1, 1, bias=False)]
        channels = config.width
        for stage in range(config.stages):
            for block in range(config.blocks):
                out = config.width << stage
                layers.append(_Block(channels, out, 2 if stage and not block else 1))
                channels = out
        self.body = nn.Sequential(*layers)
        self.norm = nn.GroupNorm(8, channels)
        self.out = nn.Linear(channels, config.dim)

    def forward(self, prepared: Prepared) -> torch.Tensor:
        """float (B, C, H, W) -> emb_BD."""
        return self._pooled(self.body(prepared))

    def _pooled(self, features: torch.Tensor) -> torch.Tensor:
        return self.out(F.gelu(self.norm(features)).mean(dim=(2, 3)))

    def maps(self, prepared: Prepared) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """See `Encoder.maps`: what each stage ends with."""
        assert isinstance(self.config, SmallCnnConfig)
        assert isinstance(prepared, torch.Tensor)
        found, features = [], prepared
        for number, layer in enumerate(self.body):
            features = layer(features)
            if number and number % self.config.blocks == 0:
                found.append(features)
        return self._pooled(features), found


class SmallVitConfig(ImageOptions):
    """Options of the `small_vit` encoder."""

    kind: Literal["small_vit"] = "small_vit"
    dim: int = Field(128, ge=2, description="width of the embedding")
    patch: int = Field(4, ge=1, description="side of a patch in pixels")
    width: int = Field(128, ge=8, description="width of the tokens")
    depth: int = Field(4, ge=1)
    heads: int = Field(4, ge=1)
    mlp_ratio: float = Field(2.0, gt=0)

    @model_validator(mode="after")
    def _check_shape(self) -> SmallVitConfig:
        if self.image_size % self.patch:
            raise ValueError(f"patch {self.patch} doesn't divide image_size {self.image_size}")
        if self.width % self.heads:
            raise ValueError(f"heads {self.heads} doesn't divide width {self.width}")
        return self


class _Attention(nn.Module):
    """Pre-norm transformer block (Dosovitskiy et al., ICLR 2021)."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x_BTW: torch.Tensor) -> torch.Tensor:
        size, tokens, width = x_BTW.shape
        qkv = self.qkv(self.norm1(x_BTW)).view(size, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(size, tokens, width)
        x_BTW = x_BTW + self.project(y)
        return x_BTW + self.mlp(self.norm2(x_BTW))


class SmallVit(ImageEncoder):
    """A vision transformer without a class token: the mean of the tokens goes to `dim`."""

    def __init__(self, config: SmallVitConfig) -> None:
        super().__init__(config, config.dim, config.field)
        self.patches = nn.Conv2d(config.channels, config.width, config.patch, config.patch)
        tokens = (config.image_size // config.patch) ** 2
        self.place_TW = nn.Parameter(0.02 * torch.randn(tokens, config.width))
        hidden = int(config.width * config.mlp_ratio)
        self.blocks = nn.Sequential(*[_Attention(config.width, config.heads, hidden) for _ in range(config.depth)])
        self.norm = nn.LayerNorm(config.width)
        self.out = nn.Linear(config.width, config.dim)

    def forward(self, prepared: Prepared) -> torch.Tensor:
        """float (B, C, H, W) -> emb_BD."""
        return self._pooled(self.blocks(self._tokens(prepared)))

    def _tokens(self, prepared: Prepared) -> torch.Tensor:
        return self.patches(prepared).flatten(2).transpose(1, 2) + self.place_TW

    def _pooled(self, x_BTW: torch.Tensor) -> torch.Tensor:
        return self.out(self.norm(x_BTW).mean(dim=1))

    def maps(self, prepared: Prepared) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """See `Encoder.maps`: the tokens after each block, in the places of their patches."""
        found, x_BTW = [], self._tokens(prepared)
        for block in self.blocks:
            x_BTW = block(x_BTW)
            found.append(as_map(x_BTW))
        return self._pooled(x_BTW), found


def as_map(x_BTW: torch.Tensor) -> torch.Tensor:
    """Tokens of the patches of a square image, after any others, as a feature map (B, W, side, side)."""
    side = math.isqrt(x_BTW.shape[1])
    return x_BTW[:, x_BTW.shape[1] - side**2 :].transpose(1, 2).unflatten(2, (side, side))


class MlpConfig(ImageOptions):
    """Options of the `mlp` encoder."""

    kind: Literal["mlp"] = "mlp"
    hidden: tuple[int, ...] = Field((256,), description="widths of the layers below the embedding; none: one layer")
    dim: int = Field(128, ge=2, description="width of the embedding")
    batch_norm: bool = Field(
        False, description="BatchNorm before each ReLU; its statistics are those of a rank's batch"
    )

    @model_validator(mode="after")
    def _check_widths(self) -> MlpConfig:
        if any(width < 1 for width in self.hidden):
            raise ValueError(f"hidden {list(self.hidden)}: a layer has at least one unit")
        return self


class Mlp(ImageEncoder):
    """Layers on the pixels, a ReLU after each, the embedding included. A few milliseconds a step on one core."""

    def __init__(self, config: MlpConfig) -> None:
        super().__init__(config, config.dim, config.field)
        layers, width = list[nn.Module](), config.channels * config.image_size**2
        for out in (*config.hidden, config.dim):
            layers += [nn.Linear(width, out), *([nn.BatchNorm1d(out)] if config.batch_norm else []), nn.ReLU()]
            width = out
        self.layers = nn.Sequential(*layers)

    def forward(self, prepared: Prepared) -> torch.Tensor:
        """float (B, C, H, W) -> emb_BD, not negative."""
        assert isinstance(prepared, torch.Tensor)
        return self.layers(prepared.flatten(1))
