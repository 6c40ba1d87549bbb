"""What happens to a chunk of rows or logits, in place.

Shape legend: R rows of a chunk, N samples, G classes of g sub-centres, D embedding size.
"""

from __future__ import annotations

import torch
from torch import Tensor


def to_tangent_(grad_RD: Tensor, w_RD: Tensor, inverse_R: Tensor) -> None:
    """Takes off what would only change a row's length: g - (g.w) w / |w|^2, in place."""
    along_R = torch.linalg.vecdot(grad_RD, w_RD).mul_(inverse_R).mul_(inverse_R)
    grad_RD.addcmul_(w_RD, along_R[:, None], value=-1.0)


def keep_best_of_group_(z_RN: Tensor, group: int) -> Tensor:
    """Of each class's sub-centres only the nearest to the sample keeps its logit; the others get -inf.

    Returns which one it was, (R / group, N).
    """
    z_GgN = z_RN.view(len(z_RN) // group, group, z_RN.shape[1])
    best_G1N, at_G1N = z_GgN.max(dim=1, keepdim=True)
    z_GgN.fill_(-torch.inf).scatter_(1, at_G1N, best_G1N)
    return at_G1N[:, 0]


def exp_difference(lower_N: Tensor, upper_N: Tensor) -> Tensor:
    """e^(lower - upper), 0 where lower is -inf."""
    return torch.where(torch.isfinite(lower_N), (lower_N - upper_N).exp(), 0.0)


def subtract_top_(z_RN: Tensor, top_N: Tensor) -> None:
    """Takes each sample's maximum off."""
    # a sample without any negative so far has top -inf and only -inf logits: leave them, -inf + inf is NaN
    z_RN.sub_(torch.where(torch.isfinite(top_N), top_N, 0.0))
