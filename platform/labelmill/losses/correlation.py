"""Distillation by correlation instead of divergence.

Shape legend: N samples, R classes of a chunk, C all classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from labelmill.errors import DataError
from labelmill.losses.class_sums import Columns, LogitLoss, Part, Sums, dot_, mass_, softmax_at, top_of


class DIST(LogitLoss):
    """Distillation by correlation (Huang et al., DIST, NeurIPS 2022, arXiv 2205.10536).

    a = softmax(s/T), b = softmax(t/T); T^2 (beta (1 - pearson of a sample's classes) + gamma (1 - mean over the classes of
    their pearson over the batch)). A class whose column is constant over the batch correlates 0 with anything and adds 1,
    as in the authors' code, unless `skip_constant`. With G the derivative by a, that by s is a (G - sum a G) / T.
    """

    kind: Literal["dist"] = "dist"
    temperature: float = Field(1.0, gt=0, description="T")
    beta: float = Field(1.0, ge=0, description="weight of the samples' correlation (inter)")
    gamma: float = Field(1.0, ge=0, description="weight of the classes' correlation over the batch (intra)")
    skip_constant: bool = Field(False, description="classes that are constant over the batch don't count")
    scans: ClassVar[int] = 2
    relative: ClassVar[Mapping[str, str]] = {"z_s": "top_s", "z_t": "top_t"}

    def scan(self, number: int, part: Part, at: Columns) -> Sums:
        if number == 0:
            self._check(part)
            out = {}
            for x, logits_NR in (("s", part.s_NR), ("t", part.teacher_NR)):
                x_NR = part.scaled(0, logits_NR, 1 / self.temperature)
                out[f"top_{x}"] = top_of(x_NR)
                out[f"z_{x}"] = mass_(x_NR, out[f"top_{x}"]).sum(1)
            return out
        a_NR, b_NR = self._softmaxes(part, at)
        rho_R, live_R, slope_NR = self._over_batch(a_NR, b_NR, part)
        slide_N = dot_(slope_NR, a_NR)
        even = 1.0 / part.num_classes
        a_NR -= even
        b_NR -= even
        return {
            "ab": torch.mul(a_NR, b_NR, out=part.matrix(2)).sum(1),
            "aa": a_NR.square_().sum(1),
            "bb": b_NR.square_().sum(1),
            "rho": ((1 - rho_R) * live_R).sum()[None],
            "live": live_R.sum()[None],
            "slide": slide_N,
        }

    def _check(self, part: Part) -> None:
        if self.gamma and int((part.weight_N > 0).sum()) < 2:
            raise DataError(
                "loss dist compares samples of a batch: it needs two or more. Set gamma to 0 or a larger batch."
            )

    def _softmaxes(self, part: Part, at: Columns) -> tuple[Tensor, Tensor]:
        return (
            softmax_at(part.s_NR, at["lse_s"], self.temperature, part.matrix(0)),
            softmax_at(part.teacher_NR, at["lse_t"], self.temperature, part.matrix(1)),
        )

    def _over_batch(self, a_NR: Tensor, b_NR: Tensor, part: Part) -> tuple[Tensor, Tensor, Tensor]:
        """Correlation of each class over the batch (R,), which classes count (R,), derivative of their sum of 1 - rho by a."""
        share_N = (part.weight_N > 0).to(a_NR)
        count = share_N.sum().clamp_min(1)
        x_NR = torch.sub(a_NR, share_N @ a_NR / count, out=part.matrix(2)).mul_(share_N[:, None])
        y_NR = torch.sub(b_NR, share_N @ b_NR / count, out=part.matrix(3)).mul_(share_N[:, None])
        xx_R, yy_R, xy_R = (torch.linalg.vecdot(u, v, dim=0) for u, v in ((x_NR, x_NR), (y_NR, y_NR), (x_NR, y_NR)))
        rho_R, by_y_R, by_x_R = _pearson(xy_R, xx_R, yy_R)
        live_R = ((xx_R > 1e-16) & (yy_R > 1e-16)).to(rho_R) if self.skip_constant else torch.ones_like(rho_R)
        return rho_R, live_R, x_NR.mul_(by_x_R * live_R).sub_(y_NR.mul_(by_y_R * live_R))

    def conclude(self, number: int, known: Sums, part: Part) -> Sums:
        if number == 0:
            return {f"lse_{x}": known[f"top_{x}"] + known[f"z_{x}"].log() for x in "st"}
        rho_N, by_y_N, by_x_N = _pearson(known["ab"], known["aa"], known["bb"])
        # sum a G of the samples' part, with sum a = sum b = 1
        turn_N = by_x_N * known["aa"] - by_y_N * known["ab"]
        intra = known["rho"] / known["live"].clamp_min(1)
        by_intra = 1 / known["live"].clamp_min(1)
        return {"inter": 1 - rho_N, "by_y": by_y_N, "by_x": by_x_N, "turn": turn_N, "intra": intra, "each": by_intra}

    def parts(self, known: Sums) -> tuple[Tensor, Tensor]:
        """(1 - correlation of each sample (N,), the classes' mean, a scalar)."""
        return known["inter"], known["intra"][0]

    def value(self, known: Sums, part: Part) -> Tensor:
        return self.temperature**2 * (self.beta * known["inter"] + self.gamma * known["intra"])

    def slope(self, part: Part, at: Columns, by_N1: Tensor) -> Tensor:
        a_NR, b_NR = self._softmaxes(part, at)
        even = 1.0 / part.num_classes
        inter_N1 = self.beta * by_N1
        by_batch = self.gamma * by_N1.sum() * at["each"]  # every sample's loss has the classes' mean
        g_NR = self._over_batch(a_NR, b_NR, part)[2].sub_(at["slide"]).mul_(by_batch)
        by_x_N1, by_y_N1 = inter_N1 * at["by_x"], inter_N1 * at["by_y"]
        level_N1 = even * (by_y_N1 - by_x_N1) - inter_N1 * at["turn"]  # a and b are less 1 / C in the correlation
        g_NR.addcmul_(a_NR, by_x_N1).addcmul_(b_NR, by_y_N1, value=-1).add_(level_N1)
        return g_NR.mul_(a_NR).mul_(self.temperature)


def _pearson(xy: Tensor, xx: Tensor, yy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """rho = xy / (|x| |y| + 1e-8), and the factors u, v of its derivative u y - v x by x; 0 where a side is constant."""
    tiny = torch.finfo(xx.dtype).tiny
    dead = (xx <= tiny) | (yy <= tiny)
    x_length, y_length = (torch.where(dead, 1.0, v).sqrt() for v in (xx, yy))
    by_y = (1 / (x_length * y_length + 1e-8)).masked_fill(dead, 0.0)
    return xy * by_y, by_y, xy * by_y.square() * y_length / x_length
