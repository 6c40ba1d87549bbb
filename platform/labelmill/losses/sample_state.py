"""Losses for noisy labels that remember each training sample: ALDR-KL and ELR, for a dense class axis.

Such a loss is a pure function of the batch and of what was remembered of its samples; what it returns to remember is kept
by `labelmill.training.sample_state.SampleState`, by sample key.

Shape legend: N samples, K classes, W remembered numbers of a sample.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from labelmill.job import StrictModel
from labelmill.losses.classification import LDR, dense_loss

Normalize = Literal["none", "l1", "softplus"]


def normalize_scores(f_NK: Tensor, kind: Normalize) -> Tensor:
    """Scores of a bounded sum, without which the loss of a large temperature has no lower bound.

    l1: f / (||f||_1 / K). softplus: softplus(f) / mean of it.
    """
    if kind == "l1":
        return f_NK / f_NK.abs().mean(dim=1, keepdim=True).clamp_min(1e-8)
    if kind == "softplus":
        soft = torch.nn.functional.softplus(f_NK)
        return soft / soft.mean(dim=1, keepdim=True).clamp_min(1e-8)
    return f_NK


def ldr_kl(f_NK: Tensor, label_N: Tensor, lam_N: Tensor, gap: float) -> Tensor:
    """LDR-KL with a temperature of each sample's own: lam ln((1/K) sum_k e^(delta_k / lam)), (N,) (Zhu et al. 2023, eq. 4).

    delta_k = f_k - f_y + gap for k != y, 0 for y. Scores in half precision are taken as float32.
    """
    delta_NK = margins(f_NK, label_N, gap)
    return lam_N * (torch.logsumexp(delta_NK / lam_N[:, None], dim=1) - math.log(f_NK.shape[1]))


def margins(f_NK: Tensor, label_N: Tensor, gap: float) -> Tensor:
    """delta (N, K): how far each class comes to lead over the label, with a margin; 0 for the label."""
    f_NK = f_NK.float() if f_NK.dtype in (torch.float16, torch.bfloat16) else f_NK
    delta_NK = f_NK - f_NK.gather(1, label_N[:, None]) + gap
    return delta_NK.scatter(1, label_N[:, None], 0.0)


def kl_to_uniform(q_NK: Tensor) -> Tensor:
    """KL(q || uniform) >= 0, at most ln K, (N,)."""
    return (torch.special.xlogy(q_NK, q_NK)).sum(dim=1) + math.log(q_NK.shape[1])


class _StateLoss(StrictModel):
    """A loss with memory: called as `loss(logits_NK, label_N, state_NW) -> (loss_N, new state_NW)`."""

    def width(self, num_classes: int) -> int:
        """W."""
        raise NotImplementedError

    @property
    def initial(self) -> float:
        """What is remembered of a sample not seen yet."""
        raise NotImplementedError

    def __call__(self, logits_NK: Tensor, label_N: Tensor, state_NW: Tensor) -> tuple[Tensor, Tensor]:
        """The loss, differentiable in the logits alone, and what to remember (no gradient)."""
        raise NotImplementedError


class ALDR(_StateLoss):
    """Adaptive LDR-KL (Zhu, Ying, Yang, ICML 2023, arXiv 2112.14869): each sample has a temperature of its own.

    max over p and lam of sum_k p_k delta_k - lam KL(p || u) - (alpha ln K / (2 lam0)) (lam - lam0)^2. At a visit, lam moves
    once: lam = lam0 (1 - KL(q || u) / (alpha ln K)) with q = softmax(f / old lam), within [lam0 (1 - 1/alpha), lam0].
    Confident samples get a low temperature (like cross-entropy), doubtful ones lam0 (symmetric, stands noise).
    `iterations` > 1 repeats that within a visit, from lam0 each time: without memory, for samples that are seen once.
    """

    kind: Literal["aldr"] = "aldr"
    lam0: float = Field(1.0, ge=1e-3, description="temperature that samples start with; the paper tries 0.1, 1, 10")
    alpha: float = Field(2.0, gt=1, description="the temperature stays above lam0 (1 - 1 / alpha)")
    gap: float = Field(0.1, ge=0, description="margin c of the paper")
    normalize: Normalize = Field("l1", description="of the scores: none, l1, softplus")
    iterations: int = Field(1, ge=1, description="more than 1: no memory, that many fixed-point steps from lam0")

    def width(self, num_classes: int) -> int:
        return 1

    @property
    def initial(self) -> float:
        return self.lam0

    def temperature(self, f_NK: Tensor, old_N: Tensor) -> Tensor:
        """One step of lam, (N,), from normalised scores; no gradient."""
        q_NK = torch.softmax(f_NK.detach() / old_N[:, None], dim=1) + 1e-5
        q_NK = q_NK / q_NK.sum(dim=1, keepdim=True)
        return (self.lam0 - self.lam0 * kl_to_uniform(q_NK) / (self.alpha * math.log(f_NK.shape[1]))).clamp_min(1e-3)

    def __call__(self, logits_NK: Tensor, label_N: Tensor, state_NW: Tensor) -> tuple[Tensor, Tensor]:
        f_NK = normalize_scores(logits_NK.float() if logits_NK.dtype != torch.float64 else logits_NK, self.normalize)
        lam_N = state_NW[:, 0].to(f_NK.dtype)
        if self.iterations > 1:
            lam_N = torch.full_like(lam_N, self.lam0)
        for _ in range(self.iterations):
            lam_N = self.temperature(f_NK, lam_N)
        return self.value(f_NK, label_N, lam_N), lam_N[:, None].to(state_NW.dtype)

    def value(self, f_NK: Tensor, label_N: Tensor, lam_N: Tensor) -> Tensor:
        """The loss at given temperatures, the prior's term included."""
        prior = self.alpha * math.log(f_NK.shape[1]) / (2 * self.lam0)
        return ldr_kl(f_NK, label_N, lam_N, self.gap) - prior * (lam_N - self.lam0) ** 2

    def maximum(self, f_NK: Tensor, label_N: Tensor, steps: int = 200) -> tuple[Tensor, Tensor]:
        """(loss_N, lam_N) at the exact inner maximum: lam fixed under p = softmax(delta / lam). For checks."""
        delta_NK = margins(f_NK, label_N, self.gap)
        lam_N = torch.full_like(delta_NK[:, 0], self.lam0)
        for _ in range(steps):
            kl_N = kl_to_uniform(torch.softmax(delta_NK / lam_N[:, None], dim=1))
            lam_N = self.lam0 * (1 - kl_N / (self.alpha * math.log(f_NK.shape[1])))
        return self.value(f_NK, label_N, lam_N), lam_N


class NormalizedLDR(_StateLoss):
    """LDR-KL on normalised scores, one temperature for all (on a sharded head: head.loss `ldr`, without normalisation)."""

    kind: Literal["ldr_normalized"] = "ldr_normalized"
    lam: float = Field(1.0, ge=1e-3, description="temperature; larger stands more label noise")
    gap: float = Field(0.1, ge=0, description="margin c of the paper")
    normalize: Normalize = Field("softplus", description="of the scores: none, l1, softplus")

    def width(self, num_classes: int) -> int:
        return 0

    @property
    def initial(self) -> float:
        return 0.0

    def __call__(self, logits_NK: Tensor, label_N: Tensor, state_NW: Tensor) -> tuple[Tensor, Tensor]:
        f_NK = normalize_scores(logits_NK.float() if logits_NK.dtype != torch.float64 else logits_NK, self.normalize)
        return dense_loss(LDR(lam=self.lam, gap=self.gap), f_NK, label_N[:, None]), state_NW


class ELR(_StateLoss):
    """Early-learning regularisation (Liu et al., NeurIPS 2020, eq. 6): CE + lam ln(1 - <p, t>).

    t is a moving average of the sample's own past predictions: t <- beta t + (1 - beta) p. It pulls towards what the model
    thought before it began to memorise. Predictions are kept in [1e-4, 1 - 1e-4], as in the authors' code.
    """

    kind: Literal["elr"] = "elr"
    lam: float = Field(3.0, ge=0, description="weight of the regulariser; 3 for ten classes, 7 for a hundred")
    beta: float = Field(0.7, ge=0, lt=1, description="memory of the targets; 0.9 for a hundred classes")

    def width(self, num_classes: int) -> int:
        return num_classes

    @property
    def initial(self) -> float:
        return 0.0

    def __call__(self, logits_NK: Tensor, label_N: Tensor, state_NW: Tensor) -> tuple[Tensor, Tensor]:
        logits_NK = logits_NK.float() if logits_NK.dtype != torch.float64 else logits_NK
        p_NK = torch.softmax(logits_NK, dim=1).clamp(1e-4, 1 - 1e-4)
        own_NK = p_NK.detach() / p_NK.detach().sum(dim=1, keepdim=True)
        target_NK = self.beta * state_NW.to(own_NK.dtype) + (1 - self.beta) * own_NK
        pull_N = torch.log(1 - (target_NK * p_NK).sum(dim=1))
        loss_N = torch.nn.functional.cross_entropy(logits_NK, label_N, reduction="none") + self.lam * pull_N
        return loss_N, target_NK.to(state_NW.dtype)


StateLoss = ALDR | ELR | NormalizedLDR
