"""Losses that compare a student's and a teacher's logits class by class; sums of one function of both.

Shape legend: N samples, R classes of a chunk, C all classes.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from labelmill.losses.class_sums import Columns, LogitLoss, Part, Sums

Reduction = Literal["sum", "mean"]


class _Elementwise(LogitLoss):
    """A sum over classes of a function of one student's and one teacher's logit."""

    reduction: Reduction = Field("sum", description="over the classes; the papers' is sum")

    def term_(self, part: Part) -> Tensor:
        """The function, (N, R), in one of the loss's matrices."""
        raise NotImplementedError

    def derivative_(self, part: Part) -> Tensor:
        """Its derivative by the student's logit."""
        raise NotImplementedError

    def scan(self, number: int, part: Part, at: Columns) -> Sums:
        return {"total": self.term_(part).sum(1)}

    def value(self, known: Sums, part: Part) -> Tensor:
        return known["total"] / self._over(part)

    def slope(self, part: Part, at: Columns, by_N1: Tensor) -> Tensor:
        return self.derivative_(part).mul_(by_N1 / self._over(part))

    def _over(self, part: Part) -> int:
        return part.num_classes if self.reduction == "mean" else 1


def softplus(x: Tensor, out: Tensor | None = None) -> Tensor:
    """ln(1 + e^x), without torch's threshold."""
    small = torch.abs(x, out=out).neg_().exp_().log1p_()
    return small.add_(x.clamp_min(0))


def bernoulli_kl(x: Tensor, y: Tensor) -> Tensor:
    """KL(sigmoid(y) || sigmoid(x)), elementwise: softplus(x) - softplus(y) - sigmoid(y) (x - y)."""
    return softplus(x).sub_(softplus(y)).addcmul_(torch.sigmoid(y), x - y, value=-1)


class BinaryKLNorm(_Elementwise):
    """BinaryKL-Norm of DHKD (Yang et al., arXiv 2411.08937): T^2 sum KL(Bernoulli(1/2) || Bernoulli(sigmoid((s - t)/T))).

    In closed form T^2 sum ln cosh((s - t)/(2T)): a logit regression that is quadratic, (s - t)^2 / 8, near s = t and linear
    far from it. The gradient is (T/2) tanh((s - t)/(2T)). ln cosh u = |u| + ln(1 + e^(-2|u|)) - ln 2 holds in fp32 where the
    authors' clamped sigmoid overflows (|s - t|/T above 17).
    """

    kind: Literal["binary_kl_norm"] = "binary_kl_norm"
    temperature: float = Field(2.0, gt=0, description="T")

    def term_(self, part: Part) -> Tensor:
        u = torch.sub(part.s_NR, part.teacher_NR, out=part.matrix(0)).mul_(0.5 / self.temperature).abs_()
        u += part.scaled(1, u, -2.0).exp_().log1p_()
        return u.sub_(math.log(2)).mul_(self.temperature**2)

    def derivative_(self, part: Part) -> Tensor:
        u = torch.sub(part.s_NR, part.teacher_NR, out=part.matrix(0)).mul_(1 / self.temperature)
        return u.sigmoid_().sub_(0.5).mul_(self.temperature)  # tanh(u / 2) = 2 sigmoid(u) - 1, in a fifth of the time


class BinaryKL(_Elementwise):
    """BinaryKL: T^2 sum over classes KL(sigmoid(t/T) || sigmoid(s/T)). Also the distillation of multi-label teachers."""

    kind: Literal["binary_kl"] = "binary_kl"
    temperature: float = Field(2.0, gt=0, description="T")

    def term_(self, part: Part) -> Tensor:
        s, t = (part.scaled(i, x, 1 / self.temperature) for i, x in enumerate((part.s_NR, part.teacher_NR)))
        kl = softplus(s, part.matrix(2)).sub_(softplus(t, part.matrix(3)))
        kl.addcmul_(torch.sigmoid(t, out=part.matrix(3)), s.sub_(t), value=-1)
        return kl.mul_(self.temperature**2)

    def derivative_(self, part: Part) -> Tensor:
        s, t = (part.scaled(i, x, 1 / self.temperature) for i, x in enumerate((part.s_NR, part.teacher_NR)))
        return s.sigmoid_().sub_(t.sigmoid_()).mul_(self.temperature)


class LogitMSE(_Elementwise):
    """sum (or mean) over classes of (s - t)^2 (Ba and Caruana, NeurIPS 2014)."""

    kind: Literal["logit_mse"] = "logit_mse"
    reduction: Reduction = Field("mean", description="over the classes")

    def term_(self, part: Part) -> Tensor:
        return torch.sub(part.s_NR, part.teacher_NR, out=part.matrix(0)).square_()

    def derivative_(self, part: Part) -> Tensor:
        return torch.sub(part.s_NR, part.teacher_NR, out=part.matrix(0)).mul_(2)
