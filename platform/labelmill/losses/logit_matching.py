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

    def term(self, s: Tensor, t: Tensor) -> Tensor:
        raise NotImplementedError

    def derivative(self, s: Tensor, t: Tensor) -> Tensor:
        """Of `term` by s, in memory of its own."""
        raise NotImplementedError

    def scan(self, number: int, part: Part, at: Columns) -> Sums:
        return {"total": self.term(part.s_NR, part.teacher_NR).sum(1)}

    def value(self, known: Sums, part: Part) -> Tensor:
        return known["total"] / self._over(part)

    def slope(self, part: Part, at: Columns, by_N1: Tensor) -> Tensor:
        return self.derivative(part.s_NR, part.teacher_NR).mul_(by_N1 / self._over(part))

    def _over(self, part: Part) -> int:
        return part.num_classes if self.reduction == "mean" else 1


def softplus(x: Tensor) -> Tensor:
    """ln(1 + e^x), without torch's threshold."""
    return x.clamp_min(0).add_(x.abs().neg_().exp_().log1p_())


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

    def term(self, s: Tensor, t: Tensor) -> Tensor:
        u = (s - t).div_(2 * self.temperature).abs_()
        return u.add((-2 * u).exp_().log1p_()).sub_(math.log(2)).mul_(self.temperature**2)

    def derivative(self, s: Tensor, t: Tensor) -> Tensor:
        return (s - t).div_(2 * self.temperature).tanh_().mul_(self.temperature / 2)


class BinaryKL(_Elementwise):
    """BinaryKL: T^2 sum over classes KL(sigmoid(t/T) || sigmoid(s/T)). Also the distillation of multi-label teachers."""

    kind: Literal["binary_kl"] = "binary_kl"
    temperature: float = Field(2.0, gt=0, description="T")

    def term(self, s: Tensor, t: Tensor) -> Tensor:
        return bernoulli_kl(s / self.temperature, t / self.temperature).mul_(self.temperature**2)

    def derivative(self, s: Tensor, t: Tensor) -> Tensor:
        p, q = (s / self.temperature).sigmoid_(), (t / self.temperature).sigmoid_()
        return p.sub_(q).mul_(self.temperature)


class LogitMSE(_Elementwise):
    """sum (or mean) over classes of (s - t)^2 (Ba and Caruana, NeurIPS 2014)."""

    kind: Literal["logit_mse"] = "logit_mse"
    reduction: Reduction = Field("mean", description="over the classes")

    def term(self, s: Tensor, t: Tensor) -> Tensor:
        return (s - t).square_()

    def derivative(self, s: Tensor, t: Tensor) -> Tensor:
        return (s - t).mul_(2)
