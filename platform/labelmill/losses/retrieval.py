"""Losses of dual encoders: several positives a query, of which a step may use a part; soft top-k.

Gupta, Khatri, Rawat, Bhojanapalli, Jain, Dhillon: Dual-Encoders for Extreme Multi-Label Classification (ICLR 2024, arXiv
2310.10636). Weights of positives say how much each counts; a positive of weight 0 is left out of the step: it is neither
pulled up nor, as a negative, pushed down.

Shape legend: N queries, P positives of a query (padded), C labels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from labelmill.encoders.hashing import mix64
from labelmill.job import StrictModel
from labelmill.losses.classification import (
    BCE,
    Decoupled,
    Extras,
    MultiSoftmax,
    masked_logsumexp,
    softplus,
)

NO_EXTRAS = Extras()


def weighted_positives(mask_NP: Tensor, extras: Extras) -> tuple[Tensor, Tensor]:
    """Weights of the positives that are used (N, P), and how many those are (N,), at least 1."""
    weight_NP = mask_NP.double() if extras.target_NP is None else extras.target_NP.masked_fill(~mask_NP, 0.0)
    return weight_NP, (weight_NP > 0).sum(dim=1).clamp_min(1)


class WeightedDecoupled(Decoupled):
    """`Decoupled` with weights of positives: mean over those used of w_i (ln(e^z_i + sum_neg e^z_j) - z_i)."""

    soft: ClassVar[bool] = True

    def __call__(
        self, negatives_N: Tensor, logits_pos_NP: Tensor, mask_NP: Tensor, extras: Extras = NO_EXTRAS
    ) -> Tensor:
        weight_NP, count_N = weighted_positives(mask_NP, extras)
        z_NP = logits_pos_NP.masked_fill(~mask_NP, 0.0)
        return (weight_NP.to(z_NP.dtype) * softplus(negatives_N[:, None] - z_NP)).sum(dim=1) / count_N


class WeightedSoftmax(MultiSoftmax):
    """`MultiSoftmax` with weights of positives; in its denominator stand all of them, used or not."""

    soft: ClassVar[bool] = True

    def __call__(
        self, negatives_N: Tensor, logits_pos_NP: Tensor, mask_NP: Tensor, extras: Extras = NO_EXTRAS
    ) -> Tensor:
        weight_NP, count_N = weighted_positives(mask_NP, extras)
        lse_N = torch.logaddexp(negatives_N, masked_logsumexp(logits_pos_NP, mask_NP))
        z_NP = logits_pos_NP.masked_fill(~mask_NP, 0.0)
        return (weight_NP.to(z_NP.dtype) * (lse_N[:, None] - z_NP)).sum(dim=1) / count_N


class WeightedBCE(BCE):
    """`BCE` with weights of positives."""

    soft: ClassVar[bool] = True

    def __call__(
        self, negatives_N: Tensor, logits_pos_NP: Tensor, mask_NP: Tensor, extras: Extras = NO_EXTRAS
    ) -> Tensor:
        weight_NP, _ = weighted_positives(mask_NP, extras)
        z_NP = logits_pos_NP.masked_fill(~mask_NP, 0.0)
        positive_N = (weight_NP.to(z_NP.dtype) * softplus(self.threshold - z_NP)).sum(dim=1)
        return positive_N + self.negative_weight * negatives_N


# --- what a job says ----------------------------------------------------------------------------------------


class SoftmaxSection(StrictModel):
    """Softmax over all labels (InfoNCE), mean over the positives; pulls every positive to 1 / number of positives."""

    kind: Literal["softmax"] = "softmax"
    positives: Literal["all", "one"] = "all"

    def row_loss(self) -> WeightedSoftmax:
        """As the head takes it."""
        return WeightedSoftmax()


class DecoupledSection(StrictModel):
    """Each positive against the negatives alone (sec. 4.2)."""

    kind: Literal["decoupled"] = "decoupled"
    positives: Literal["all", "one"] = Field("all", description="one: one drawn positive a query and step")

    def row_loss(self) -> WeightedDecoupled:
        """As the head takes it."""
        return WeightedDecoupled()


class BCESection(StrictModel):
    """Binary cross-entropy of every label; logits start `bias` below the scores."""

    kind: Literal["bce"] = "bce"
    positives: Literal["all", "one"] = "all"
    bias: float = Field(0.0, description="added to every score; negative where most labels don't apply")
    negative_weight: float = Field(1.0, gt=0)

    def row_loss(self) -> WeightedBCE:
        """As the head takes it."""
        return WeightedBCE(threshold=-self.bias, negative_weight=self.negative_weight)


class SoftTopKSection(StrictModel):
    """Soft top-k (sec. 4.3): the log of each positive's share of the k places."""

    kind: Literal["soft_topk"] = "soft_topk"
    k: int | Literal["num_pos"] = Field(5, description="places; num_pos: as many as the query has positives")
    alpha: float = Field(2.0, gt=0, description="sharpness: the places go to the hard top-k as it grows")

    @property
    def most(self) -> int | None:
        """The most positives of a query that are used in a step; None for all."""
        return None if self.k == "num_pos" else self.k


RetrievalLoss = Annotated[SoftmaxSection | DecoupledSection | BCESection | SoftTopKSection, Field(discriminator="kind")]


def most_positives(loss: StrictModel) -> int | None:
    """The most positives of a query that a loss uses in a step; None for all."""
    if isinstance(loss, SoftTopKSection):
        return loss.most
    return 1 if getattr(loss, "positives", "all") == "one" else None


def draw_positives(key_N: np.ndarray, ids_NP: np.ndarray, weight_NP: np.ndarray | None, most: int | None) -> np.ndarray:
    """Weights of the positives that a step uses, float32 (N, P): at most `most` of each query, drawn without replacement.

    With weights the chance to be drawn first is in proportion to them (exponential races), as a multinomial draw. What is
    drawn depends on the query's key and its label ids alone. Used positives keep their weight (1 without weights).

    Args:
        key_N: uint64, other ones in each epoch.
        ids_NP: int64, padded with -1.
    """
    given_NP = np.ones(ids_NP.shape, np.float32) if weight_NP is None else weight_NP.astype(np.float32)
    given_NP = np.where(ids_NP >= 0, given_NP, np.float32(0))
    if most is None or ids_NP.shape[1] <= most:
        return given_NP
    bits_NP = mix64(key_N[:, None] ^ mix64(ids_NP.astype(np.uint64)))
    uniform_NP = ((bits_NP >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    with np.errstate(divide="ignore"):
        arrival_NP = np.where(given_NP > 0, -np.log(uniform_NP) / given_NP, np.inf)
    rank_NP = np.argsort(np.argsort(arrival_NP, axis=1, kind="stable"), axis=1, kind="stable")
    return np.where(rank_NP < most, given_NP, np.float32(0))


# --- soft top-k ---------------------------------------------------------------------------------------------


@dataclass
class Reduce:
    """How rows of scores that lie in several places are reduced; alone, everything is the identity."""

    sum_: Callable[[Tensor], Tensor] = lambda value: value
    max_: Callable[[Tensor], Tensor] = lambda value: value


ALONE = Reduce()


def soft_topk_threshold(
    s_NC: Tensor, k_N: Tensor, alpha: float, reduce: Reduce = ALONE, steps: int | None = None
) -> Tensor:
    """t of each row (N,), with sum_l sigmoid(alpha (s_l + t)) = k, by bisection over all places' columns.

    Columns at -inf don't take part. The bracket is [-max s - 10/alpha, -min s + 10/alpha], widened where k or C - k are
    so small beside C that it would not hold the root.
    """
    live_NC = torch.isfinite(s_NC)
    ends_N2 = torch.stack(
        [
            s_NC.amax(dim=1) if s_NC.shape[1] else s_NC.new_full((len(s_NC),), -torch.inf),
            -s_NC.masked_fill(~live_NC, torch.inf).amin(dim=1)
            if s_NC.shape[1]
            else s_NC.new_full((len(s_NC),), -torch.inf),
        ],
        dim=1,
    )
    number_N = reduce.sum_(live_NC.sum(dim=1).to(s_NC.dtype))
    ends_N2 = reduce.max_(ends_N2)
    # with all scores equal the root lies ln(k / (C - k)) / alpha away
    spare_N = torch.log(number_N.clamp_min(2.0)) + 10.0
    low_N, high_N = -ends_N2[:, 0] - spare_N / alpha, ends_N2[:, 1] + spare_N / alpha
    steps = steps or (60 if s_NC.dtype == torch.float64 else 32)
    for _ in range(steps):
        middle_N = (low_N + high_N) / 2
        total_N = reduce.sum_(torch.sigmoid(alpha * (s_NC + middle_N[:, None])).sum(dim=1))
        over_N = total_N > k_N
        high_N = torch.where(over_N, middle_N, high_N)
        low_N = torch.where(over_N, low_N, middle_N)
        if s_NC.dtype != torch.float64 and bool(((total_N - k_N).abs() < 1e-5 * k_N).all()):
            return middle_N
    return (low_N + high_N) / 2


def soft_topk_forward_backward(
    s_NC: Tensor, pos_NC: Tensor, k_N: Tensor, alpha: float, row_weight_N: Tensor, reduce: Reduce = ALONE
) -> tuple[Tensor, Tensor]:
    """Loss of each row (N,) and the gradient (N, C) of sum_n row_weight_n loss_n, by implicit differentiation.

    loss = - sum_l pos_l ln p_l with p_l = sigmoid(alpha (s_l + t)). With u_l = pos_l alpha (1 - p_l) and v_l = alpha p_l
    (1 - p_l): dloss/ds_l = -(u_l - (sum u) v_l / sum v), which sums to 0.

    Args:
        s_NC: scores of own columns; -inf leaves a column out of its row.
        pos_NC: weights of the positives, 0 elsewhere.
        k_N: places; 0 < k < number of live columns.
    """
    t_N = soft_topk_threshold(s_NC, k_N, alpha, reduce)
    z_NC = alpha * (s_NC + t_N[:, None])
    p_NC = torch.sigmoid(z_NC)
    u_NC = alpha * pos_NC * (1.0 - p_NC)
    v_NC = alpha * p_NC * (1.0 - p_NC)
    log_NC = torch.where(pos_NC > 0, pos_NC * (z_NC - softplus(z_NC)).masked_fill(pos_NC <= 0, 0.0), 0.0)
    sums_N3 = reduce.sum_(torch.stack([u_NC.sum(dim=1), v_NC.sum(dim=1), log_NC.sum(dim=1)], dim=1))
    ratio_N = torch.where(sums_N3[:, 1] > 0, sums_N3[:, 0] / sums_N3[:, 1], 0.0)
    grad_NC = v_NC.mul_(ratio_N[:, None]).sub_(u_NC).mul_(row_weight_N[:, None])
    return -sums_N3[:, 2], grad_NC


class _SoftTopK(torch.autograd.Function):
    @staticmethod
    def forward(ctx, s_NC, pos_NC, k_N, alpha):
        loss_N, grad_NC = soft_topk_forward_backward(s_NC, pos_NC, k_N, alpha, torch.ones_like(k_N))
        ctx.save_for_backward(grad_NC)
        return loss_N

    @staticmethod
    def backward(ctx, grad_N):
        (grad_NC,) = ctx.saved_tensors
        return grad_N[:, None] * grad_NC, None, None, None


def soft_topk_loss(s_NC: Tensor, ids_NP: Tensor, k_N: Tensor, alpha: float, weight_NP: Tensor | None = None) -> Tensor:
    """The loss of each row from dense scores (N,): the reference of the sharded form.

    Positives of weight 0 are left out of their row. L = -(1 / positives used) sum w_p ln p_p.

    Raises ValueError unless 0 < k < number of labels.
    """
    check_places(k_N, s_NC.shape[1])
    weight_NP = (ids_NP >= 0).to(s_NC.dtype) if weight_NP is None else weight_NP.to(s_NC.dtype)
    pos_NC, drop_NC = spread_positives(ids_NP, weight_NP, s_NC.shape[1])
    used_N = (weight_NP > 0).sum(dim=1).clamp_min(1)
    return _SoftTopK.apply(s_NC.masked_fill(drop_NC, -torch.inf), pos_NC, k_N.to(s_NC.dtype), alpha) / used_N


def check_places(k_N: Tensor, num_labels: int) -> None:
    """Raises ValueError unless 0 < k < number of labels for every row."""
    if k_N.numel() and not bool(((k_N > 0) & (k_N < num_labels)).all()):
        bad = float(k_N[(k_N <= 0) | (k_N >= num_labels)][0])
        raise ValueError(f"soft top-k needs 0 < k < number of labels; k is {bad:g}, there are {num_labels} labels")


def spread_positives(ids_NP: Tensor, weight_NP: Tensor, columns: int, start: int = 0) -> tuple[Tensor, Tensor]:
    """Of columns [start, start + columns): weights of the used positives (N, C), and positives of weight 0 (N, C) bool."""
    own_NP = (ids_NP >= start) & (ids_NP < start + columns)
    row_K, place_K = own_NP.nonzero(as_tuple=True)
    column_K, weight_K = ids_NP[row_K, place_K] - start, weight_NP[row_K, place_K]
    pos_NC = weight_NP.new_zeros(len(ids_NP), columns)
    pos_NC[row_K, column_K] = weight_K
    drop_NC = torch.zeros(len(ids_NP), columns, dtype=torch.bool, device=ids_NP.device)
    drop_NC[row_K, column_K] = weight_K == 0
    return pos_NC, drop_NC
