"""Losses of the spherical family: functions of a few targets' logits, the sum and the squared sum of all logits.

de Brebisson and Vincent: The Z-loss: a shift and scale invariant classification loss belonging to the Spherical Family (2016,
arXiv 1604.08859); Vincent, de Brebisson, Bouthillier: Efficient Exact Gradient Update for training Deep Networks with Very
Large Sparse Targets (NIPS 2015, arXiv 1412.7091). With these, `heads.factored` updates an output layer at a cost that does
not depend on the number of classes. The log of the softmax is no member.

Shape legend: m samples, K targets of a sample (masked), D classes.
    A_mK: logits of the targets; q_m: sum of squared logits; s_m: sum of logits, each over all D classes.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from labelmill.job import StrictModel
from labelmill.losses.classification import softplus

SMALLEST_SIGMA = 1e-6


class SphericalLoss(StrictModel):
    """Base: `__call__` gives each sample's loss, differentiable in A, q and s; several targets count by their mean."""

    scores_are_logits: ClassVar[bool] = True  # a larger logit is a better class (else its square or magnitude is)

    def __call__(self, A_mK: Tensor, q_m: Tensor, s_m: Tensor, mask_mK: Tensor, num_classes: int) -> Tensor:
        """Loss of each sample (m,)."""
        raise NotImplementedError


def over_targets(value_mK: Tensor, mask_mK: Tensor) -> Tensor:
    """Mean over a sample's targets."""
    return value_mK.masked_fill(~mask_mK, 0.0).sum(dim=1) / mask_mK.sum(dim=1).clamp_min(1)


def deviation(q_m: Tensor, s_m: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Mean and population standard deviation of all logits, (m,) each; the deviation is at least 1e-6."""
    mean_m = s_m / num_classes
    variance_m = (q_m / num_classes - mean_m**2).clamp_min(SMALLEST_SIGMA**2)
    return mean_m, variance_m.sqrt()


class ZLoss(SphericalLoss):
    """L = (1/a) softplus(a (b - z_c)) with z the logits standardised over the classes (eq. 4). Shift and scale invariant."""

    kind: Literal["z"] = "z"
    a: float = Field(1.0, gt=0, description="sharpness; with a -> infinity a hinge")
    b: float = Field(0.0, description="standard deviations by which the target should lead; larger for top-1")

    def __call__(self, A_mK: Tensor, q_m: Tensor, s_m: Tensor, mask_mK: Tensor, num_classes: int) -> Tensor:
        mean_m, sigma_m = deviation(q_m, s_m, num_classes)
        z_mK = (A_mK - mean_m[:, None]) / sigma_m[:, None]
        flat_m = sigma_m <= SMALLEST_SIGMA  # all logits equal: no direction, no gradient
        z_mK = torch.where(flat_m[:, None], z_mK.detach(), z_mK)
        return over_targets(softplus(self.a * (self.b - z_mK)) / self.a, mask_mK)


class SquaredError(SphericalLoss):
    """L = |o - y|^2 with y 1 at the targets: q - 2 sum A + number of targets."""

    kind: Literal["mse"] = "mse"

    def __call__(self, A_mK: Tensor, q_m: Tensor, s_m: Tensor, mask_mK: Tensor, num_classes: int) -> Tensor:
        return q_m - 2 * A_mK.masked_fill(~mask_mK, 0.0).sum(dim=1) + mask_mK.sum(dim=1)


class SphericalSoftmax(SphericalLoss):
    """L = -ln((o_c^2 + eps) / (q + D eps)). Classes are ranked by the square of their logit."""

    kind: Literal["spherical_softmax"] = "spherical_softmax"
    scores_are_logits: ClassVar[bool] = False
    eps: float = Field(1e-3, gt=0)

    def __call__(self, A_mK: Tensor, q_m: Tensor, s_m: Tensor, mask_mK: Tensor, num_classes: int) -> Tensor:
        all_m = (q_m + num_classes * self.eps).log()
        return over_targets(all_m[:, None] - (A_mK**2 + self.eps).log(), mask_mK)


class TaylorSoftmax(SphericalLoss):
    """L = -ln((1 + o_c + o_c^2/2) / (D + s + q/2)): the second-order expansion of the softmax."""

    kind: Literal["taylor_softmax"] = "taylor_softmax"
    scores_are_logits: ClassVar[bool] = False

    def __call__(self, A_mK: Tensor, q_m: Tensor, s_m: Tensor, mask_mK: Tensor, num_classes: int) -> Tensor:
        all_m = (num_classes + s_m + q_m / 2).log()
        return over_targets(all_m[:, None] - (1 + A_mK + A_mK**2 / 2).log(), mask_mK)


SphericalLossConfig = Annotated[ZLoss | SquaredError | SphericalSoftmax | TaylorSoftmax, Field(discriminator="kind")]


def dense_spherical(loss: SphericalLoss, logits_mD: Tensor, ids_mK: Tensor) -> Tensor:
    """The same loss from dense logits (m,): the reference of the factored form. Ids are padded with -1."""
    mask_mK = ids_mK >= 0
    A_mK = logits_mD.gather(1, ids_mK.clamp_min(0))
    return loss(A_mK, logits_mD.square().sum(dim=1), logits_mD.sum(dim=1), mask_mK, logits_mD.shape[1])


def spherical_gradients(
    loss: SphericalLoss, A_mK: Tensor, q_m: Tensor, s_m: Tensor, mask_mK: Tensor, weight_m: Tensor, num_classes: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss of each sample, and the derivatives of sum_i weight_i loss_i by A (0 where masked), q and s."""
    A, q, s = (t.detach().requires_grad_() for t in (A_mK, q_m, s_m))
    with torch.enable_grad():
        loss_m = loss(A, q, s, mask_mK, num_classes)
        grads = torch.autograd.grad((loss_m * weight_m).sum(), [A, q, s], allow_unused=True, materialize_grads=True)
    return loss_m.detach(), grads[0].masked_fill(~mask_mK, 0.0), grads[1], grads[2]
