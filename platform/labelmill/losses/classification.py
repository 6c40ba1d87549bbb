"""Losses over a class axis, written in row statistics so that the axis may be sharded and sampled.

A loss sees, for each sample, the log-sum-exp of the logits of its negatives and the logits of its few
positives: both are small whatever the number of classes. The head computes them, and turns the derivative
with respect to the log-sum-exp into the gradient of each negative (dL/dz_j = dL/dlse * softmax_j).

Shape legend: N samples, P positives of a sample (padded, see `mask_NP`), C classes.

Every loss is a `RowLoss`, called as `loss(negatives_N, logits_pos_NP, mask_NP, extras) -> loss_N`:
    negatives_N: log-sum-exp over the sampled negatives (own positives excluded), -inf when there are none. For an
        `elementwise` loss it is the sum of its `negative_term` over them instead.
    logits_pos_NP: logits of the positives, margin and scale applied; anything where the mask is False.
    mask_NP: bool, True where there is a positive. A sample without any gives a finite value of no meaning.
    extras: the sum of the negatives' logits and their number (for a loss with `needs_sum`), weights of soft labels.
All logits are divided by the loss's `temperature`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from labelmill.errors import DataError
from labelmill.job import StrictModel
from labelmill.losses.margins import Margin, NoMargin, apply_margin


class SampleError(DataError):
    """A sample that a loss can't take; `{sample}` in the text stands for its place.

    Attributes:
        index: among the samples that the loss was given.
        at: (rank, place in its batch, size of that), once the head knows; then the text names them.
    """

    def __init__(self, text: str, index: int = -1, at: tuple[int, int, int] | None = None) -> None:
        place = f"sample {index} of the batch" if at is None else f"sample {at[1]} of rank {at[0]}'s batch"
        super().__init__(text.replace("{sample}", place))
        self.text, self.index, self.at = text, index, at


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


@dataclass(frozen=True)
class Extras:
    """Further statistics of a sample.

    Attributes:
        sum_N: sum of the sampled negatives' logits, if the loss `needs_sum`.
        number_N: how many negatives that is (their total weight under importance correction).
        target_NP: weights of soft labels; None for other label forms.
    """

    sum_N: Tensor | None = None
    number_N: Tensor | None = None
    target_NP: Tensor | None = None


class RowLoss(StrictModel):
    """A loss in row statistics. Subclass it with a `kind`, hyper-parameters as fields, and `__call__`."""

    elementwise: ClassVar[bool] = False  # negatives add up by `negative_term`, not by exponentials
    needs_sum: ClassVar[bool] = False  # wants the sum of the negatives' logits and their number
    soft: ClassVar[bool] = False  # takes weights of positives

    @property
    def temperature(self) -> float:
        """Divides every logit, before the log-sum-exp."""
        return 1.0

    def __call__(
        self, negatives_N: Tensor, logits_pos_NP: Tensor, mask_NP: Tensor, extras: Extras = Extras()
    ) -> Tensor:
        """The loss of each sample, differentiable in all of its inputs."""
        raise NotImplementedError

    def negative_term(self, z: Tensor) -> Tensor:
        """What an elementwise loss adds up over negatives; 0 at -inf. Differentiable."""
        raise NotImplementedError

    def negative_slope(self, z: Tensor) -> Tensor:
        """Derivative of `negative_term`; 0 at -inf. Found by autograd unless given."""
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            (slope,) = torch.autograd.grad(self.negative_term(z).sum(), z)
        return slope.nan_to_num_(0.0)


class Softmax(RowLoss):
    """Cross-entropy of the one positive: ln(e^z + sum_neg e^z_j) - z. DataError for several positives."""

    kind: Literal["softmax"] = "softmax"

    def __call__(
        self, negatives_N: Tensor, logits_pos_NP: Tensor, mask_NP: Tensor, extras: Extras = Extras()
    ) -> Tensor:
        return softplus(negatives_N - only_positive(logits_pos_NP, mask_NP, self.kind))


def only_positive(logits_pos_NP: Tensor, mask_NP: Tensor, kind: str) -> Tensor:
    """The logit of the one positive, (N,). Raises SampleError where there are several."""
    count_N = mask_NP.sum(dim=1)
    if count_N.numel() and int(count_N.max()) > 1:
        index = int(count_N.argmax())
        raise SampleError(
            f"loss {kind} takes one positive a sample, {{sample}} has {int(count_N[index])}. Use loss.kind "
            "multi_softmax, decoupled, mlcd or mlc.",
            index,
        )
    return logits_pos_NP.masked_fill(~mask_NP, 0.0).sum(dim=1)


class SmoothedSoftmax(RowLoss):
    """Cross-entropy with label smoothing (Szegedy et al., CVPR 2016, sec. 7): (1 - e) on the label, e / K on each class.

    L = ln sum e^z - (1 - e) z_y - (e / K) sum z, over the K classes that take part.
    """

    kind: Literal["smoothed_softmax"] = "smoothed_softmax"
    needs_sum: ClassVar[bool] = True
    smoothing: float = Field(0.1, ge=0, lt=1)

    def __call__(
        self, negatives_N: Tensor, logits_pos_NP: Tensor, mask_NP: Tensor, extras: Extras = Extras()
    ) -> Tensor:
        assert extras.sum_N is not None
        assert extras.number_N is not None
        z_N = only_positive(logits_pos_NP, mask_NP, self.kind)
        mean_N = (z_N + extras.sum_N) / (1.0 + extras.number_N)
        return softplus(negatives_N - z_N) + self.smoothing * (z_N - mean_N)


class SoftTargets(RowLoss):
    """Cross-entropy with a distribution over few classes and a tail (distillation from a teacher's top classes).

    L = ln sum e^z - sum_i q_i z_i - (t / number of negatives) sum_neg z. The given weights q are as the labels have
    them; what they lack to 1 is the tail t, spread evenly over the other classes (`tail: spread`), or the weights are
    divided by their sum (`tail: drop`). Without weights every positive has the same.
    """

    kind: Literal["soft_targets"] = "soft_targets"
    needs_sum: ClassVar[bool] = True
    soft: ClassVar[bool] = True
    tail: Literal["spread", "drop"] = "spread"

    def __call__(
        self, negatives_N: Tensor, logits_pos_NP: Tensor, mask_NP: Tensor, extras: Extras = Extras()
    ) -> Tensor:
        assert extras.sum_N is not None
        assert extras.number_N is not None
        if extras.target_NP is None:
            q_NP = mask_NP / mask_NP.sum(dim=1, keepdim=True).clamp_min(1)
        else:
            q_NP = extras.target_NP.masked_fill(~mask_NP, 0.0)
        given_N = q_NP.sum(dim=1)
        if self.tail == "drop":
            q_NP, given_N = q_NP / given_N.clamp_min(1e-12)[:, None], torch.ones_like(given_N)
        elif given_N.numel() and float(given_N.max()) > 1.001:
            index = int(given_N.argmax())
            raise SampleError(
                f"the label weights of {{sample}} add up to {float(given_N[index]):.4g}, more than 1. Set loss.tail to "
                "drop to divide them by their sum.",
                index,
            )
        tail_N = torch.where(extras.number_N > 0.5, (1.0 - given_N).clamp_min(0.0), 0.0)
        lse_N = torch.logaddexp(negatives_N, masked_logsumexp(logits_pos_NP, mask_NP))
        positive_N = (q_NP * logits_pos_NP.masked_fill(~mask_NP, 0.0)).sum(dim=1)
        tail_mean_N = extras.sum_N / extras.number_N.clamp_min(1.0)
        return (given_N + tail_N) * lse_N - positive_N - tail_N * tail_mean_N


class MultiSoftmax(RowLoss):
    """Mean over the positives of their cross-entropy; the other positives stay in the denominator.

    L = mean_i ln(sum_pos e^z + sum_neg e^z) - z_i. The other positives carry their margin too.
    """

    kind: Literal["multi_softmax"] = "multi_softmax"

    def __call__(
        self, negatives_N: Tensor, logits_pos_NP: Tensor, mask_NP: Tensor, extras: Extras = Extras()
    ) -> Tensor:
        lse_N = torch.logaddexp(negatives_N, masked_logsumexp(logits_pos_NP, mask_NP))
        return masked_mean(lse_N[:, None] - logits_pos_NP, mask_NP)


class Decoupled(RowLoss):
    """Each positive against all negatives, without the other positives: DEXML (Gupta et al., ICLR 2024).

    L = mean_i ln(e^z_i + sum_neg e^z_j) - z_i.
    """

    kind: Literal["decoupled"] = "decoupled"

    def __call__(
        self, negatives_N: Tensor, logits_pos_NP: Tensor, mask_NP: Tensor, extras: Extras = Extras()
    ) -> Tensor:
        return masked_mean(softplus(negatives_N[:, None] - logits_pos_NP.masked_fill(~mask_NP, 0.0)), mask_NP)


class MLC(RowLoss):
    """Multi-label classification in one logarithm (An et al., MLCD, ECCV 2024, eq. 4; after Circle loss).

    L = ln(1 + sum_neg e^z_j * sum_pos e^-z_i).
    """

    kind: Literal["mlc"] = "mlc"

    def __call__(
        self, negatives_N: Tensor, logits_pos_NP: Tensor, mask_NP: Tensor, extras: Extras = Extras()
    ) -> Tensor:
        return softplus(negatives_N + masked_logsumexp(-logits_pos_NP, mask_NP))


class MLCD(RowLoss):
    """Multi-label cluster discrimination (An et al., ECCV 2024, eq. 5): each side against a threshold.

    L = ln(1 + sum_pos e^-(z_i - b)) + ln(1 + sum_neg e^(z_j - b)); the paper's b is 0.
    """

    kind: Literal["mlcd"] = "mlcd"
    threshold: float = Field(0.0, description="the logit b that parts positives from negatives; the paper's is 0")

    def __call__(
        self, negatives_N: Tensor, logits_pos_NP: Tensor, mask_NP: Tensor, extras: Extras = Extras()
    ) -> Tensor:
        lse_pos_N = masked_logsumexp(-logits_pos_NP, mask_NP)
        return softplus(lse_pos_N + self.threshold) + softplus(negatives_N - self.threshold)


class BCE(RowLoss):
    """Binary cross-entropy of every class by itself: sum_pos ln(1 + e^-(z - b)) + w sum_neg ln(1 + e^(z - b))."""

    kind: Literal["bce"] = "bce"
    elementwise: ClassVar[bool] = True
    threshold: float = Field(0.0, description="the logit b that parts positives from negatives")
    negative_weight: float = Field(1.0, gt=0, description="w; 1 / number of classes makes both sides comparable")

    def __call__(
        self, negatives_N: Tensor, logits_pos_NP: Tensor, mask_NP: Tensor, extras: Extras = Extras()
    ) -> Tensor:
        positive_NP = softplus(self.threshold - logits_pos_NP.masked_fill(~mask_NP, 0.0)).masked_fill(~mask_NP, 0.0)
        return positive_NP.sum(dim=1) + self.negative_weight * negatives_N

    def negative_term(self, z: Tensor) -> Tensor:
        return torch.nn.functional.softplus(z - self.threshold)

    def negative_slope(self, z: Tensor) -> Tensor:
        return torch.sigmoid(z - self.threshold)


class ASL(RowLoss):
    """Asymmetric loss (Ridnik et al., ICCV 2021, eq. 7), p = sigmoid(z - b), p_m = max(p - m, 0).

    L = sum_pos (1 - p)^gamma_pos (-ln p) + sum_neg p_m^gamma_neg (-ln(1 - p_m)). With both gammas and m at 0 it is BCE.
    """

    kind: Literal["asl"] = "asl"
    elementwise: ClassVar[bool] = True
    gamma_pos: float = Field(0.0, ge=0)
    gamma_neg: float = Field(4.0, ge=0)
    clip: float = Field(0.05, ge=0, lt=1, description="m: negatives below this probability cost nothing")
    threshold: float = Field(0.0, description="the logit b that parts positives from negatives")

    def __call__(
        self, negatives_N: Tensor, logits_pos_NP: Tensor, mask_NP: Tensor, extras: Extras = Extras()
    ) -> Tensor:
        z_NP = logits_pos_NP.masked_fill(~mask_NP, 0.0) - self.threshold
        positive_NP = torch.exp(-self.gamma_pos * softplus(z_NP)) * softplus(-z_NP)  # 1 - p = e^-softplus(z)
        return positive_NP.masked_fill(~mask_NP, 0.0).sum(dim=1) + negatives_N

    def negative_term(self, z: Tensor) -> Tensor:
        over = (torch.sigmoid(z - self.threshold) - self.clip).clamp_min(0.0)
        miss = -torch.log1p(-over) if self.clip else torch.nn.functional.softplus(z - self.threshold)
        return miss * over**self.gamma_neg if self.gamma_neg else miss

    def negative_slope(self, z: Tensor) -> Tensor:
        p = torch.sigmoid(z - self.threshold)
        over = (p - self.clip).clamp_min(0.0)
        miss = -torch.log1p(-over) if self.clip else torch.nn.functional.softplus(z - self.threshold)
        # d/dp [over^g miss] * p (1 - p); without a clip (1 - p) / (1 - over) is 1, also where p rounds to 1
        rise = p * (1.0 - p) / (1.0 - over) if self.clip else p
        if self.gamma_neg:
            rise = rise * over**self.gamma_neg
            rise += self.gamma_neg * over ** (self.gamma_neg - 1.0) * miss * p * (1.0 - p)
        return rise.masked_fill_(over <= 0.0, 0.0)


class LDR(RowLoss):
    """Label-distributionally robust loss with a KL term, LDR-KL (Zhu et al., ICML 2023, arXiv 2112.14869).

    L = lam ln( (1/K) sum_k e^(delta_k / lam) ), delta_k = z_k - z_y + c for k != y and 0 for y, over the K classes that
    take part. lam -> 0 gives the multi-class SVM of Crammer and Singer, lam = 1 and c = 0 cross-entropy less ln K,
    lam -> infinity a symmetric loss, which stands label noise.
    """

    kind: Literal["ldr"] = "ldr"
    needs_sum: ClassVar[bool] = True  # for the number of classes
    lam: float = Field(1.0, ge=1e-3, description="temperature; larger stands more label noise")
    gap: float = Field(0.1, ge=0, description="c: by how much the label should lead")

    @property
    def temperature(self) -> float:
        return self.lam

    def __call__(
        self, negatives_N: Tensor, logits_pos_NP: Tensor, mask_NP: Tensor, extras: Extras = Extras()
    ) -> Tensor:
        assert extras.number_N is not None
        z_N = only_positive(logits_pos_NP, mask_NP, self.kind)
        return self.lam * (softplus(negatives_N + self.gap / self.lam - z_N) - torch.log1p(extras.number_N))


class MAE(RowLoss):
    """Mean absolute error of the softmax (Ghosh et al., AAAI 2017): 2 (1 - p_y). Symmetric, so it stands label noise; slow."""

    kind: Literal["mae"] = "mae"

    def __call__(
        self, negatives_N: Tensor, logits_pos_NP: Tensor, mask_NP: Tensor, extras: Extras = Extras()
    ) -> Tensor:
        surprise_N = softplus(negatives_N - only_positive(logits_pos_NP, mask_NP, self.kind))  # -ln p_y
        return -2.0 * torch.expm1(-surprise_N)


class GCE(RowLoss):
    """Generalized cross-entropy (Zhang and Sabuncu, NeurIPS 2018, eq. 6): (1 - p_y^q) / q; q -> 0 is CE, q = 1 half of MAE."""

    kind: Literal["gce"] = "gce"
    q: float = Field(0.7, gt=0, le=1, description="larger stands more label noise and learns more slowly")

    def __call__(
        self, negatives_N: Tensor, logits_pos_NP: Tensor, mask_NP: Tensor, extras: Extras = Extras()
    ) -> Tensor:
        surprise_N = softplus(negatives_N - only_positive(logits_pos_NP, mask_NP, self.kind))
        return -torch.expm1(-self.q * surprise_N) / self.q


class SCE(RowLoss):
    """Symmetric cross-entropy (Wang et al., ICCV 2019, eq. 7): alpha CE + beta RCE, with RCE = -A (1 - p_y), A for ln 0."""

    kind: Literal["sce"] = "sce"
    alpha: float = Field(0.1, ge=0, description="weight of cross-entropy")
    beta: float = Field(1.0, ge=0, description="weight of reverse cross-entropy")
    log_zero: float = Field(-4.0, lt=0, description="A: what ln 0 counts as")

    def __call__(
        self, negatives_N: Tensor, logits_pos_NP: Tensor, mask_NP: Tensor, extras: Extras = Extras()
    ) -> Tensor:
        surprise_N = softplus(negatives_N - only_positive(logits_pos_NP, mask_NP, self.kind))
        return self.alpha * surprise_N + self.beta * self.log_zero * torch.expm1(-surprise_N)


Loss = (
    Softmax | SmoothedSoftmax | SoftTargets | MultiSoftmax | Decoupled | MLC | MLCD | BCE | ASL | LDR | MAE | GCE | SCE
)
LossConfig = Annotated[Loss, Field(discriminator="kind")]


def dense_loss(
    loss: RowLoss,
    logits_NC: Tensor,
    ids_NP: Tensor,
    margin: Margin | None = None,
    scale: float = 1.0,
    target_NP: Tensor | None = None,
) -> Tensor:
    """The same loss from dense logits: for small class axes and as the reference of the sharded head.

    Args:
        logits_NC: similarities (cosines, when a margin is given); they are multiplied by `scale`.
        ids_NP: int64 class ids of the positives, padded with -1.
        margin: applied to the positives before the scale.
        target_NP: weights of soft labels.

    Returns:
        loss_N, one value a sample, differentiable in `logits_NC`.
    """
    mask_NP = ids_NP >= 0
    at_NP = ids_NP.clamp_min(0)
    scale = scale / loss.temperature
    pos_NP = scale * apply_margin(logits_NC.gather(1, at_NP), margin or NoMargin())
    own_NC = torch.zeros_like(logits_NC, dtype=torch.int8).scatter_add_(1, at_NP, mask_NP.to(torch.int8)) > 0
    z_NC = scale * logits_NC
    if loss.elementwise:
        negatives_N = loss.negative_term(z_NC).masked_fill(own_NC, 0.0).sum(dim=1)
    else:
        negatives_N = torch.logsumexp(z_NC.masked_fill(own_NC, -torch.inf), dim=1)
    extras = Extras(z_NC.masked_fill(own_NC, 0.0).sum(dim=1), (~own_NC).to(z_NC).sum(dim=1), target_NP)
    return loss(negatives_N, pos_NP, mask_NP, extras)
