"""Losses over a class axis, written in row statistics so that the axis may be sharded and sampled.

A loss sees, for each sample, the log-sum-exp of the logits of its negatives and the logits of its few
positives: both are small whatever the number of classes. The head computes them, and turns the derivative
with respect to the log-sum-exp into the gradient of each negative (dL/dz_j = dL/dlse * softmax_j).

Shape legend: N samples, P positives of a sample (padded, see `mask_NP`), C classes.

Every loss has the signature `loss(lse_neg_N, logits_pos_NP, mask_NP) -> loss_N`:
    lse_neg_N: log-sum-exp over the sampled negatives (own positives excluded), -inf when there are none.
    logits_pos_NP: logits of the positives, margin and scale applied; anything where the mask is False.
    mask_NP: bool, True where there is a positive. A sample without any gives a finite value of no meaning.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from labelmill.errors import DataError
from labelmill.job import StrictModel
from labelmill.losses.margins import Margin, NoMargin, apply_margin


def softplus(x: Tensor) -> Tensor:
    """ln(1 + e^x) to full precision at both ends (torch's own switches to x at 20)."""
    return torch.logaddexp(x, torch.zeros_like(x))


def masked_logsumexp(x_NP: Tensor, mask_NP: Tensor) -> Tensor:
    """Log-sum-exp over the True entries, (N,); without any, the lowest finite value and no gradient."""
    lowest = torch.finfo(x_NP.dtype).min
    return torch.logsumexp(x_NP.masked_fill(~mask_NP, lowest), dim=1)


def masked_mean(x_NP: Tensor, mask_NP: Tensor) -> Tensor:
    """Mean over the True entries, (N,); 0 for a row without any."""
    return x_NP.masked_fill(~mask_NP, 0.0).sum(dim=1) / mask_NP.sum(dim=1).clamp_min(1)


class Softmax(StrictModel):
    """Cross-entropy of the one positive: ln(e^z + sum_neg e^z_j) - z. DataError for several positives."""

    kind: Literal["softmax"] = "softmax"

    def __call__(self, lse_neg_N: Tensor, logits_pos_NP: Tensor, mask_NP: Tensor) -> Tensor:
        count_N = mask_NP.sum(dim=1)
        if count_N.numel() and int(count_N.max()) > 1:
            index = int(count_N.argmax())
            raise DataError(
                f"loss softmax takes one positive a sample, sample {index} of the batch has "
                f"{int(count_N[index])}. Use loss.kind multi_softmax, decoupled, mlcd or mlc."
            )
        z_N = logits_pos_NP.masked_fill(~mask_NP, 0.0).sum(dim=1)
        return softplus(lse_neg_N - z_N)


class MultiSoftmax(StrictModel):
    """Mean over the positives of their cross-entropy; the other positives stay in the denominator.

    L = mean_i ln(sum_pos e^z + sum_neg e^z) - z_i. The other positives carry their margin too.
    """

    kind: Literal["multi_softmax"] = "multi_softmax"

    def __call__(self, lse_neg_N: Tensor, logits_pos_NP: Tensor, mask_NP: Tensor) -> Tensor:
        lse_N = torch.logaddexp(lse_neg_N, masked_logsumexp(logits_pos_NP, mask_NP))
        return masked_mean(lse_N[:, None] - logits_pos_NP, mask_NP)


class Decoupled(StrictModel):
    """Each positive against all negatives, without the other positives: DEXML (Gupta et al., ICLR 2024).

    L = mean_i ln(e^z_i + sum_neg e^z_j) - z_i.
    """

    kind: Literal["decoupled"] = "decoupled"

    def __call__(self, lse_neg_N: Tensor, logits_pos_NP: Tensor, mask_NP: Tensor) -> Tensor:
        return masked_mean(softplus(lse_neg_N[:, None] - logits_pos_NP.masked_fill(~mask_NP, 0.0)), mask_NP)


class MLC(StrictModel):
    """Multi-label classification in one logarithm (An et al., MLCD, ECCV 2024, eq. 4; after Circle loss).

    L = ln(1 + sum_neg e^z_j * sum_pos e^-z_i).
    """

    kind: Literal["mlc"] = "mlc"

    def __call__(self, lse_neg_N: Tensor, logits_pos_NP: Tensor, mask_NP: Tensor) -> Tensor:
        return softplus(lse_neg_N + masked_logsumexp(-logits_pos_NP, mask_NP))


class MLCD(StrictModel):
    """Multi-label cluster discrimination (An et al., ECCV 2024, eq. 5): each side against a threshold.

    L = ln(1 + sum_pos e^-(z_i - b)) + ln(1 + sum_neg e^(z_j - b)); the paper's b is 0.
    """

    kind: Literal["mlcd"] = "mlcd"
    threshold: float = Field(0.0, description="the logit b that parts positives from negatives; the paper's is 0")

    def __call__(self, lse_neg_N: Tensor, logits_pos_NP: Tensor, mask_NP: Tensor) -> Tensor:
        lse_pos_N = masked_logsumexp(-logits_pos_NP, mask_NP)
        return softplus(lse_pos_N + self.threshold) + softplus(lse_neg_N - self.threshold)


Loss = Softmax | MultiSoftmax | Decoupled | MLC | MLCD
LossConfig = Annotated[Loss, Field(discriminator="kind")]


def dense_loss(
    loss: Loss, logits_NC: Tensor, ids_NP: Tensor, margin: Margin | None = None, scale: float = 1.0
) -> Tensor:
    """The same loss from dense logits: for small class axes and as the reference of the sharded head.

    Args:
        logits_NC: similarities (cosines, when a margin is given); they are multiplied by `scale`.
        ids_NP: int64 class ids of the positives, padded with -1.
        margin: applied to the positives before the scale.

    Returns:
        loss_N, one value a sample, differentiable in `logits_NC`.
    """
    mask_NP = ids_NP >= 0
    at_NP = ids_NP.clamp_min(0)
    pos_NP = scale * apply_margin(logits_NC.gather(1, at_NP), margin or NoMargin())
    own_NC = torch.zeros_like(logits_NC, dtype=torch.int8).scatter_add_(1, at_NP, mask_NP.to(torch.int8)) > 0
    lse_neg_N = torch.logsumexp((scale * logits_NC).masked_fill(own_NC, -torch.inf), dim=1)
    return loss(lse_neg_N, pos_NP, mask_NP)
