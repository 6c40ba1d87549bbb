"""Soft targets of classes and of yes/no questions, and two gradients that are to agree.

Shape legend: N samples, C classes, Q questions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def soft_cross_entropy(s_NC: Tensor, target_NC: Tensor) -> Tensor:
    """-sum_c q_c ln softmax(s)_c, (N,): cross-entropy with a teacher's probabilities as the label."""
    return -(target_NC * torch.log_softmax(s_NC, dim=1)).sum(1)


def masked_soft_bce(logits_NQ: Tensor, target_NQ: Tensor, weight_N: Tensor) -> Tensor:
    """Mean of binary cross-entropy with soft targets over those that are known (not NaN) of samples with weight; a scalar.

    0 where nothing is known. Its floor over the logits is the targets' mean entropy, not 0.
    """
    known_NQ = ~torch.isnan(target_NQ) & (weight_N > 0)[:, None]
    target_NQ = torch.where(known_NQ, target_NQ, 0.0)
    loss_NQ = F.binary_cross_entropy_with_logits(logits_NQ, target_NQ.to(logits_NQ), reduction="none")
    return torch.where(known_NQ, loss_NQ, 0.0).sum() / known_NQ.sum().clamp_min(1)


def soft_entropy(target_NQ: Tensor, weight_N: Tensor) -> Tensor:
    """The floor of `masked_soft_bce`: mean entropy of the known targets, a scalar."""
    known_NQ = ~torch.isnan(target_NQ) & (weight_N > 0)[:, None]
    q = torch.where(known_NQ, target_NQ, 0.0)
    entropy = -(torch.special.xlogy(q, q) + torch.special.xlogy(1 - q, 1 - q))
    return torch.where(known_NQ, entropy, 0.0).sum() / known_NQ.sum().clamp_min(1)


def _products(first: Sequence[Tensor | None], second: Sequence[Tensor | None]) -> tuple[Tensor, Tensor, Tensor]:
    """<g1, g2>, |g1|^2, |g2|^2 over lists of gradients, float64."""
    some = next(g for g in (*first, *second) if g is not None)
    dot, one, two = some.new_zeros(3, dtype=torch.float64).unbind()
    for a, b in zip(first, second, strict=True):
        one = one if a is None else one + a.double().square().sum()
        two = two if b is None else two + b.double().square().sum()
        dot = dot if a is None or b is None else dot + (a.double() * b.double()).sum()
    return dot, one, two


def gradient_cosine(first: Sequence[Tensor | None], second: Sequence[Tensor | None]) -> Tensor:
    """Cosine of the angle between two gradients, a scalar; 0 where one of them is 0. None stands for zero."""
    dot, one, two = _products(first, second)
    length = one.sqrt() * two.sqrt()
    return torch.where(length > 0, dot / length.clamp_min(torch.finfo(length.dtype).tiny), 0.0)


def aligned_gradients(
    first: Sequence[Tensor | None], second: Sequence[Tensor | None], dots: Any = None
) -> list[Tensor | None]:
    """One-sided gradient surgery (PCGrad, Yu et al. 2020, on one side): g1 + g2, with g2 <- g2 - <g1, g2> / |g1|^2 g1 if < 0.

    `dots` joins (<g1, g2>, |g1|^2) over the ranks where each holds a part of the gradients. None stands for zero.
    """
    pair = torch.stack(_products(first, second)[:2])
    if dots is not None:
        pair = dots(pair)
    cut = float(pair[0] / pair[1]) if pair[0] < 0 and pair[1] > 0 else 0.0
    out: list[Tensor | None] = []
    for a, b in zip(first, second, strict=True):
        parts = [x for x in (None if a is None else a * (1 - cut), b) if x is not None]
        out.append(sum(parts[1:], parts[0]) if parts else None)
    return out
