"""Distillation losses that compare softmaxes, and the list of all losses on a teacher's logits that a job may name.

Equations in the sums of `labelmill.losses.class_sums`. s, t are the logits of student and teacher, T a temperature,
lse(x) = ln sum e^x over the classes.

Shape legend: N samples, R classes of a chunk, C all classes, k listed classes of a sample.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from labelmill.errors import DataError
from labelmill.losses.class_sums import Columns, Listed, LogitLoss, Part, Sums, dot_, mass_, softmax_at, top_of
from labelmill.losses.correlation import DIST
from labelmill.losses.logit_matching import BinaryKL, BinaryKLNorm, LogitMSE, bernoulli_kl


class CrossEntropy(LogitLoss):
    """-ln softmax(s)_y. The teacher has no part in it; it shares the scans of the losses beside it."""

    kind: Literal["cross_entropy"] = "cross_entropy"
    needs_label: ClassVar[bool] = True
    needs_teacher: ClassVar[bool] = False
    relative: ClassVar[Mapping[str, str]] = {"z": "top"}

    def scan(self, number: int, part: Part, at: Columns) -> Sums:
        top_N = top_of(part.s_NR)
        e_NR = torch.sub(part.s_NR, top_N[:, None], out=part.matrix(0)).exp_()
        return {"top": top_N, "z": e_NR.sum(1), "own": _own(part.s_NR, part)}

    def conclude(self, number: int, known: Sums, part: Part) -> Sums:
        return {"lse": known["top"] + known["z"].log()}

    def value(self, known: Sums, part: Part) -> Tensor:
        return known["lse"] - known["own"]

    def slope(self, part: Part, at: Columns, by_N1: Tensor) -> Tensor:
        p_NR = softmax_at(part.s_NR, at["lse"], 1.0, part.matrix(0))
        p_NR[part.own.at] -= 1
        return p_NR.mul_(by_N1)


def _own(x_NR: Tensor, part: Part) -> Tensor:
    """Logit of the label, (N,); 0 where it isn't among these classes."""
    own_N = x_NR.new_zeros(len(x_NR))
    own_N[part.own.sample_P] = x_NR[part.own.at]
    return own_N


class KD(LogitLoss):
    """Distillation (Hinton, Vinyals, Dean 2015, arXiv 1503.02531): T^2 KL(softmax(t/T) || softmax(s/T)).

    With Z = sum e^{x/T} and n = sum e^{t/T} (t - s)/T, KL = n / Z_t - ln Z_t + ln Z_s. Its gradient by s is
    T (softmax(s/T) - softmax(t/T)); for T -> infinity it is (1/2C) sum (d - mean d)^2, d = s - t.
    """

    kind: Literal["kd"] = "kd"
    temperature: float = Field(4.0, gt=0, description="T")
    relative: ClassVar[Mapping[str, str]] = {"z_s": "top_s", "z_t": "top_t", "n": "top_t"}

    def scan(self, number: int, part: Part, at: Columns) -> Sums:
        s_NR, t_NR, gap_NR = _scaled(part, self.temperature)
        return _kl_sums(s_NR, t_NR, gap_NR)

    def conclude(self, number: int, known: Sums, part: Part) -> Sums:
        return _kl_ends(known)

    def value(self, known: Sums, part: Part) -> Tensor:
        return self.temperature**2 * known["kl"]

    def slope(self, part: Part, at: Columns, by_N1: Tensor) -> Tensor:
        p_NR = softmax_at(part.s_NR, at["lse_s"], self.temperature, part.matrix(0))
        p_NR -= softmax_at(part.teacher_NR, at["lse_t"], self.temperature, part.matrix(1))
        return p_NR.mul_(self.temperature * by_N1)


def _scaled(part: Part, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """s / T, t / T and (t - s) / T."""
    s_NR = part.scaled(0, part.s_NR, 1 / temperature)
    t_NR = part.scaled(1, part.teacher_NR, 1 / temperature)
    return s_NR, t_NR, torch.sub(t_NR, s_NR, out=part.matrix(2))


def _kl_sums(s_NR: Tensor, t_NR: Tensor, gap_NR: Tensor) -> Sums:
    """What the KL of two softmaxes is made of; `gap_NR` is t - s, and finite also where both are -inf. Overwrites it, and
    both sides by e^(x - top)."""
    top_s_N, top_t_N = top_of(s_NR), top_of(t_NR)
    e_NR = mass_(t_NR, top_t_N)
    z_s_N = mass_(s_NR, top_s_N).sum(1)
    return {"top_s": top_s_N, "top_t": top_t_N, "z_s": z_s_N, "z_t": e_NR.sum(1), "n": dot_(gap_NR, e_NR)}


def _kl_ends(known: Sums) -> Sums:
    lse_s_N, lse_t_N = known["top_s"] + known["z_s"].log(), known["top_t"] + known["z_t"].log()
    return {"lse_s": lse_s_N, "lse_t": lse_t_N, "kl": known["n"] / known["z_t"] - lse_t_N + lse_s_N}


class StandardizedKD(LogitLoss):
    """KD on standardised logits (Sun et al., Logit Standardization, CVPR 2024, arXiv 2403.01427).

    u = (x - mean) / ((std + 1e-7) T) over the classes, std with C - 1, of both; T^2 KL(softmax(u_t) || softmax(u_s)). It
    doesn't change with x -> a x + b, a > 0, of either side. With p, q the softmaxes and D = E_p u_s - E_q u_s, its gradient
    is T^2 (p - q - T D (s - mean) / ((C - 1) std)) / ((std + 1e-7) T).
    """

    kind: Literal["standardized_kd"] = "standardized_kd"
    temperature: float = Field(2.0, gt=0, description="the base temperature T")
    scans: ClassVar[int] = 2
    relative: ClassVar[Mapping[str, str]] = {**KD.relative, "u_p": "top_s", "u_q": "top_t"}

    def scan(self, number: int, part: Part, at: Columns) -> Sums:
        if part.num_classes < 2:
            raise DataError("standardised logits need two classes or more.")
        pair = {"s": part.s_NR, "t": part.teacher_NR}
        if number == 0:
            room_NR = part.matrix(0)
            return {f"{name}_{x}": v for x, x_NR in pair.items() for name, v in _moments(x_NR, room_NR).items()}
        s_NR, t_NR = (
            torch.addcmul(at[f"shift_{x}"], x_NR, at[f"by_{x}"], out=part.matrix(i))
            for i, (x, x_NR) in enumerate(pair.items())
        )
        gap_NR, u_NR = torch.sub(t_NR, s_NR, out=part.matrix(2)), part.matrix(3).copy_(s_NR)
        sums = _kl_sums(s_NR, t_NR, gap_NR)
        return sums | {"u_p": dot_(s_NR, u_NR), "u_q": dot_(t_NR, u_NR)}

    def conclude(self, number: int, known: Sums, part: Part) -> Sums:
        count, out = part.num_classes, {}
        if number == 0:
            for x in "st":
                mean_N = known[f"sum_{x}"] / count
                std_N = (known[f"square_{x}"] - count * mean_N.square()).clamp_min(0).div(count - 1).sqrt()
                out[f"by_{x}"] = 1 / ((std_N + 1e-7) * self.temperature)
                out[f"shift_{x}"] = -mean_N * out[f"by_{x}"]
                out[f"std_{x}"] = std_N
            return out
        gap_N = known["u_p"] / known["z_s"] - known["u_q"] / known["z_t"]
        std_N = known["std_s"]  # equal logits: the root has no slope
        tilt_N = torch.where(std_N > 0, self.temperature * gap_N / ((count - 1) * std_N), 0.0)
        mean_N = known["sum_s"] / count
        return _kl_ends(known) | {"tilt": tilt_N, "level": tilt_N * mean_N}

    def value(self, known: Sums, part: Part) -> Tensor:
        return self.temperature**2 * known["kl"]

    def slope(self, part: Part, at: Columns, by_N1: Tensor) -> Tensor:
        s_NR, t_NR = part.s_NR, part.teacher_NR
        p_NR = torch.addcmul(at["shift_s"] - at["lse_s"], s_NR, at["by_s"], out=part.matrix(0)).exp_()
        p_NR -= torch.addcmul(at["shift_t"] - at["lse_t"], t_NR, at["by_t"], out=part.matrix(1)).exp_()
        p_NR.addcmul_(s_NR, at["tilt"], value=-1).add_(at["level"])
        return p_NR.mul_(self.temperature**2 * at["by_s"] * by_N1)


def _moments(x_NR: Tensor, room_NR: Tensor) -> Sums:
    """Sum and sum of squares, float64: about the chunk's own mean first, for logits far from 0."""
    count = x_NR.shape[1]
    mean_N1 = x_NR.sum(1, keepdim=True) / max(count, 1)
    off_NR = torch.sub(x_NR, mean_N1, out=room_NR)
    mean_N, left_N = mean_N1[:, 0].double(), off_NR.sum(1)  # left over by the mean's rounding
    square_N = off_NR.square_().sum(1) + 2 * mean_N * left_N + count * mean_N.square()
    return {"sum": count * mean_N + left_N, "square": square_N}


class DKD(LogitLoss):
    """Decoupled distillation (Zhao et al., CVPR 2022, arXiv 2203.08679): T^2 (alpha TCKD + beta NCKD).

    TCKD: KL of (p_y, 1 - p_y). NCKD: KL of the softmax over the classes other than y. KD = TCKD + (1 - p_y^t) NCKD. With
    p', q' these softmaxes the gradient is T (alpha (p_y - q_y)) at the label and
    T (beta (p' - q') - alpha (p_y - q_y) p') elsewhere.
    """

    kind: Literal["dkd"] = "dkd"
    temperature: float = Field(4.0, gt=0, description="T")
    alpha: float = Field(1.0, ge=0, description="weight of the label's class against all others")
    beta: float = Field(8.0, ge=0, description="weight of the other classes among each other; 2 for weak teachers")
    needs_label: ClassVar[bool] = True
    relative: ClassVar[Mapping[str, str]] = KD.relative

    def scan(self, number: int, part: Part, at: Columns) -> Sums:
        s_NR, t_NR, gap_NR = _scaled(part, self.temperature)
        own = {"own_s": _own(s_NR, part), "own_t": _own(t_NR, part)}
        for x_NR in (s_NR, t_NR):
            x_NR[part.own.at] = -torch.inf
        return own | _kl_sums(s_NR, t_NR, gap_NR)

    def conclude(self, number: int, known: Sums, part: Part) -> Sums:
        other = _kl_ends(known)
        # ln p_y / (1 - p_y)
        lead_s_N, lead_t_N = known["own_s"] - other["lse_s"], known["own_t"] - other["lse_t"]
        q_N = torch.sigmoid(lead_t_N)
        return other | {"target": bernoulli_kl(lead_s_N, lead_t_N), "q_y": q_N, "gap_y": torch.sigmoid(lead_s_N) - q_N}

    def parts(self, known: Sums) -> tuple[Tensor, Tensor, Tensor]:
        """(TCKD, NCKD, p_y of the teacher), each (N,)."""
        return known["target"], known["kl"], known["q_y"]

    def value(self, known: Sums, part: Part) -> Tensor:
        return self.temperature**2 * (self.alpha * known["target"] + self.beta * known["kl"])

    def slope(self, part: Part, at: Columns, by_N1: Tensor) -> Tensor:
        p_NR = softmax_at(part.s_NR, at["lse_s"], self.temperature, part.matrix(0))
        q_NR = softmax_at(part.teacher_NR, at["lse_t"], self.temperature, part.matrix(1))
        p_NR.mul_(self.beta - self.alpha * at["gap_y"]).sub_(q_NR, alpha=self.beta)
        p_NR[part.own.at] = self.alpha * at["gap_y"][part.own.sample_P, 0]
        return p_NR.mul_(self.temperature * by_N1)


class ListedKD(LogitLoss):
    """KD from a teacher's k best classes: KL over k + 1 cells, the last of which is all other classes together.

    At most the full KL (data processing), and equal to it where the student's and the teacher's tails are proportional.
    The tail isn't dropped: without it the student's mass there would be free. With p, q over the cells the gradient is
    T (p - q) at a listed class, and at the others that of the last cell times the student's softmax among them.
    """

    kind: Literal["listed_kd"] = "listed_kd"
    temperature: float = Field(4.0, gt=0, description="T; the teacher's tail must have been kept for it")
    needs_teacher: ClassVar[bool] = False
    relative: ClassVar[Mapping[str, str]] = {"z": "top"}

    def _listed(self, part: Part) -> Listed:
        listed = part.listed
        if listed is None:
            raise DataError("loss listed_kd takes a teacher known by its best classes: keep teacher.columns topk.")
        if not math.isclose(listed.temperature, self.temperature, rel_tol=1e-6):
            raise DataError(
                f"the teacher's tail was kept for temperature {listed.temperature:g}, the loss has {self.temperature:g}. "
                "Name it in teacher.temperatures and run the teacher again."
            )
        return listed

    def scan(self, number: int, part: Part, at: Columns) -> Sums:
        s_NR, named = part.scaled(0, part.s_NR, 1 / self.temperature), part.named
        listed_Nk = s_NR.new_zeros(self._listed(part).ids_Nk.shape)
        listed_Nk[named.sample_P, named.place_P] = s_NR[named.at]
        s_NR[named.at] = -torch.inf
        top_N = top_of(s_NR)
        return {"top": top_N, "z": mass_(s_NR, top_N).sum(1), "listed": listed_Nk}

    def conclude(self, number: int, known: Sums, part: Part) -> Sums:
        listed, rest = self._listed(part), known["z"] > 0
        lse_N = torch.where(rest, known["top"] + known["z"].log(), 0.0)
        rest_N = lse_N.masked_fill(~rest, -torch.inf)
        s_NK = torch.cat([known["listed"], rest_N[:, None]], 1)
        t_NK = torch.cat([listed.logits_Nk.double() / self.temperature, listed.tail_N.double()[:, None]], 1)
        log_q, log_p = torch.log_softmax(t_NK, 1), torch.log_softmax(s_NK, 1)
        q_NK = log_q.exp()
        gap_NK = log_p.exp() - q_NK
        kl_N = torch.where(q_NK > 0, q_NK * (log_q - log_p), 0.0).sum(1)
        return {"lse": lse_N, "kl": kl_N, "gap_listed": gap_NK[:, :-1], "gap_rest": gap_NK[:, -1]}

    def value(self, known: Sums, part: Part) -> Tensor:
        return self.temperature**2 * known["kl"]

    def slope(self, part: Part, at: Columns, by_N1: Tensor) -> Tensor:
        p_NR = softmax_at(part.s_NR, at["lse"], self.temperature, part.matrix(0)).mul_(at["gap_rest"])
        named = part.named
        p_NR[named.at] = at["gap_listed"][named.sample_P, named.place_P]
        return p_NR.mul_(self.temperature * by_N1)


AnyLogitLoss = KD | StandardizedKD | DKD | DIST | BinaryKLNorm | BinaryKL | LogitMSE | ListedKD
LogitLossConfig = Annotated[AnyLogitLoss, Field(discriminator="kind")]
