"""Margins on the cosine of a positive class: CosFace, ArcFace, and their combination.

A margin makes a positive look worse than it is, so that the loss keeps pulling until the positive leads by
the margin. It acts on cosines only: the head must normalise embeddings and class rows.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from labelmill.job import StrictModel


class NoMargin(StrictModel):
    """The cosine as it is."""

    kind: Literal["none"] = "none"


class CosFace(StrictModel):
    """cos(theta) - m (Wang et al., CosFace, CVPR 2018, eq. 4)."""

    kind: Literal["cosface"] = "cosface"
    m: float = Field(0.35, ge=0, lt=2, description="subtracted from the cosine of a positive")


class ArcFace(StrictModel):
    """cos(theta + m) (Deng et al., ArcFace, CVPR 2019, eq. 3)."""

    kind: Literal["arcface"] = "arcface"
    m: float = Field(0.5, ge=0, lt=math.pi, description="added to the angle of a positive, radians")
    straight_through: bool = Field(False, description="gradient of the plain cosine, as InsightFace computes it")


class Combined(StrictModel):
    """cos(m1 theta + m2) - m3 (Deng et al., ArcFace, CVPR 2019, eq. 4)."""

    kind: Literal["combined"] = "combined"
    m1: float = Field(1.0, ge=1, description="multiplies the angle of a positive (SphereFace)")
    m2: float = Field(0.0, ge=0, lt=math.pi, description="added to the angle of a positive, radians (ArcFace)")
    m3: float = Field(0.0, ge=0, lt=2, description="subtracted from the cosine of a positive (CosFace)")
    straight_through: bool = Field(False, description="gradient of the plain cosine, as InsightFace computes it")


Margin = NoMargin | CosFace | ArcFace | Combined
MarginConfig = Annotated[Margin, Field(discriminator="kind")]


def apply_margin(cos: Tensor, margin: Margin) -> Tensor:
    """Cosines of positives, any shape, with the margin; the derivative is exact unless straight-through.

    An angle past pi continues downwards (the psi of SphereFace, Liu et al. 2017, eq. 5): there the bare
    cos(m1 theta + m2) would rise again and push a far positive further away. With `straight_through` the
    value is the bare one and the gradient that of the unchanged cosine: InsightFace edits the angle outside
    autograd.
    """
    if isinstance(margin, NoMargin):
        return cos
    if isinstance(margin, CosFace):
        return cos - margin.m
    if isinstance(margin, ArcFace):
        return _angular(cos, 1.0, margin.m, 0.0, margin.straight_through)
    return _angular(cos, margin.m1, margin.m2, margin.m3, margin.straight_through)


def _angular(cos: Tensor, m1: float, m2: float, m3: float, straight_through: bool) -> Tensor:
    # acos has an infinite slope at +-1, and rounding can carry a cosine past it. The value is clamped, the
    # gradient is not: a clamped gradient of 0 would leave a positive at -1 there for good. On the sphere the
    # large slope is harmless, the tangent it multiplies vanishes as fast.
    limit = 1.0 - 8.0 * torch.finfo(cos.dtype).eps
    safe = cos + (cos.clamp(-limit, limit) - cos).detach()
    angle = m1 * torch.acos(safe) + m2
    if straight_through:
        return cos + (torch.cos(angle) - m3 - cos).detach()
    turns = torch.floor(angle / math.pi).detach()
    sign = 1.0 - 2.0 * torch.remainder(turns, 2.0)
    return sign * torch.cos(angle) - 2.0 * turns - m3
