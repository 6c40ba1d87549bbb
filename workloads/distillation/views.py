"""Finite sets of image transformations whose order numbers the views of a sample; the first is the identity.

Shape legend: B samples, M views, C channels, H, W sides.
"""

from __future__ import annotations

import hashlib
import json
from itertools import permutations
from typing import Literal

import torch
from torch import Tensor

from labelmill.errors import JobError

ViewSet = Literal[
    "rotation", "rotation2", "color_perm", "color_perm3", "rot_color_perm6", "rot_color_perm12", "rot_color_perm24"
]
Turn = tuple[int, tuple[int, int, int]]
"""Quarter turns counter-clockwise, and the order of the channels."""

_RGB = (0, 1, 2)
_CYCLES = ((0, 1, 2), (1, 2, 0), (2, 0, 1))
_ORDERS = tuple((a, b, c) for a, b, c in permutations(_RGB))


def transforms(name: ViewSet) -> list[Turn]:
    """The set's transformations, in the order that numbers the views (that of the SLA authors' code)."""
    turns = {
        "rotation": range(4),
        "rotation2": (0, 2),
        "rot_color_perm6": (0, 2),
        "rot_color_perm12": range(4),
        "rot_color_perm24": range(4),
    }
    orders: dict[str, tuple[tuple[int, int, int], ...]] = {
        "color_perm": _ORDERS,
        "color_perm3": _CYCLES,
        "rot_color_perm6": _CYCLES,
        "rot_color_perm12": _CYCLES,
        "rot_color_perm24": _ORDERS,
    }
    return [(k, order) for order in orders.get(name, (_RGB,)) for k in turns.get(name, (0,))]


def identity_of(chosen: list[Turn]) -> int:
    """A number for the list in its order; below 2^52."""
    return int(hashlib.sha256(json.dumps(chosen).encode()).hexdigest()[:13], 16)


def check_views(chosen: list[Turn], channels: int, height: int, width: int) -> None:
    """Raises JobError for views that the images can't have."""
    if channels != 3 and any(order != _RGB for _, order in chosen):
        raise JobError(f"views: images of {channels} channel have no order of colours to permute: use rotation.")
    if height != width and any(k % 2 for k, _ in chosen):
        raise JobError(
            f"views: a quarter turn of {height} x {width} images changes their shape: use square ones, or rotation2."
        )


def expand(x_BCHW: Tensor, chosen: list[Turn]) -> Tensor:
    """All views of each sample, (B M, C, H, W), sample by sample."""
    views = []
    for k, order in chosen:
        view = x_BCHW if order == _RGB else x_BCHW[:, list(order)]
        views.append(torch.rot90(view, k, (2, 3)) if k else view)
    return torch.stack(views, dim=1).flatten(0, 1)


def joint_labels(label_B: Tensor, views: int) -> Tensor:
    """Column y M + j of each view, (B M,)."""
    return (label_B[:, None] * views + torch.arange(views, device=label_B.device)).flatten()


def aggregated(joint_LK: Tensor, views: int) -> Tensor:
    """s_y = mean over j of z_j[y M + j], (B, N), from joint logits (B M, N M): logits are averaged, not probabilities."""
    z = joint_LK.unflatten(0, (-1, views)).unflatten(2, (-1, views))  # (B, view, N, column)
    return z.diagonal(dim1=1, dim2=3).mean(dim=2)
