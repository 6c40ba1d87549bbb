"""Losses between a student's logits and a teacher's, written in sums over the class axis so that the axis may be sharded.

A loss adds up numbers of each sample over the classes, in one or more levels: a level may use the sums of the levels before
it, as the softmax uses the maximum. A dense caller gives all classes at once (`dense_distillation`); a sharded one gives
them in chunks on each rank, joins each level over the ranks, and gets the gradient from the derivative by the sums
(`labelmill.heads.distilled`). Both run the same code.

Shape legend: N samples, R classes of a chunk, C all classes, k listed classes of a sample, T temperatures.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from labelmill.errors import DataError
from labelmill.job import StrictModel

State = Mapping[str, Tensor]
"""What is known of the samples so far: sums and maxima by name, over all classes."""


@dataclass(frozen=True)
class Listed:
    """A teacher known by its best classes and by what the others weigh together.

    Attributes:
        ids_Nk: int64 global class ids.
        logits_Nk: the teacher's logits of them.
        tail_N: log-sum-exp of the other classes' logits / temperature; -inf where there is none.
        temperature: that the tail belongs to.
    """

    ids_Nk: Tensor
    logits_Nk: Tensor
    tail_N: Tensor
    temperature: float = 1.0


@dataclass(frozen=True)
class Part:
    """Some classes of all samples.

    Attributes:
        s_NR: the student's logits, with gradient.
        t_NR: the teacher's, without; None for losses that don't ask for them, or with `listed`.
        own_NR: bool, True at a sample's label.
        ids_R: global ids of the classes.
        weight_N: of the samples; 0 leaves one out.
        num_classes: C that take part, over all ranks.
        listed: the teacher's best classes instead of `t_NR`.
    """

    s_NR: Tensor
    t_NR: Tensor | None
    own_NR: Tensor
    ids_R: Tensor
    weight_N: Tensor
    num_classes: int
    listed: Listed | None = None

    @property
    def teacher_NR(self) -> Tensor:
        """`t_NR`; DataError where the teacher is known by a few classes only."""
        if self.t_NR is None:
            raise DataError(
                "this loss takes the teacher's logit of every class, and the teacher is known by its best classes alone. "
                "Keep teacher.columns logits, or use loss kind listed_kd."
            )
        return self.t_NR


@dataclass(frozen=True)
class Level:
    """What one pass over the classes gives: `tops` are joined by maximum, `sums` by addition."""

    tops: Mapping[str, Tensor]
    sums: Mapping[str, Tensor]


class LogitLoss(StrictModel):
    """A loss on logits. Subclass it with a `kind`, hyper-parameters as fields, `level` and `value`."""

    levels: ClassVar[int] = 1
    needs_label: ClassVar[bool] = False
    needs_teacher: ClassVar[bool] = True  # wants t_NR
    pulls_back: ClassVar[frozenset[int]] = frozenset()  # levels whose sums depend, with a slope, on earlier sums

    def level(self, number: int, part: Part, known: State) -> Level:
        """The sums of level `number` (from 0) over the classes of `part`. Differentiable in logits and sums; maxima aren't."""
        raise NotImplementedError

    def value(self, known: State, part: Part) -> Tensor:
        """The loss of each sample, (N,), from all sums. Of `part` only what isn't of single classes may be used."""
        raise NotImplementedError


def _top(x_NR: Tensor) -> Tensor:
    """Largest of each row, no gradient; the lowest finite value for a chunk without classes."""
    if not x_NR.shape[1]:
        return x_NR.new_full((len(x_NR),), torch.finfo(x_NR.dtype).min)
    return x_NR.detach().amax(dim=1).clamp_min(torch.finfo(x_NR.dtype).min)


def _exp(x_NR: Tensor, top_N: Tensor) -> Tensor:
    return torch.exp(x_NR - top_N[:, None])


class CrossEntropy(LogitLoss):
    """-ln softmax(s)_y. The teacher has no part in it; it shares the passes of the losses beside it."""

    kind: Literal["cross_entropy"] = "cross_entropy"
    levels: ClassVar[int] = 2
    needs_label: ClassVar[bool] = True
    needs_teacher: ClassVar[bool] = False

    def level(self, number: int, part: Part, known: State) -> Level:
        if number == 0:
            return Level({"top": _top(part.s_NR)}, {"own": part.s_NR.masked_fill(~part.own_NR, 0.0).sum(1)})
        return Level({}, {"z": _exp(part.s_NR, known["top"]).sum(1)})

    def value(self, known: State, part: Part) -> Tensor:
        return known["top"] + known["z"].log() - known["own"]


class KD(LogitLoss):
    """Distillation (Hinton, Vinyals, Dean 2015, arXiv 1503.02531): T^2 KL(softmax(t/T) || softmax(s/T)).

    With Z = sum e^{x/T} and N = sum e^{t/T} (t - s)/T, KL = N / Z_t - ln Z_t + ln Z_s. Its gradient by s is
    T (softmax(s/T) - softmax(t/T)); for T -> infinity it is (1/2C) sum (d - mean d)^2, d = s - t.
    """

    kind: Literal["kd"] = "kd"
    temperature: float = Field(4.0, gt=0, description="T")
    levels: ClassVar[int] = 2

    def level(self, number: int, part: Part, known: State) -> Level:
        s_NR, t_NR = part.s_NR / self.temperature, part.teacher_NR / self.temperature
        if number == 0:
            return Level({"top_s": _top(s_NR), "top_t": _top(t_NR)}, {})
        return Level({}, _kl_sums(s_NR, t_NR, known["top_s"], known["top_t"]))

    def value(self, known: State, part: Part) -> Tensor:
        return self.temperature**2 * _kl(known)


def _kl_sums(s_NR: Tensor, t_NR: Tensor, top_s_N: Tensor, top_t_N: Tensor) -> dict[str, Tensor]:
    e_NR = _exp(t_NR, top_t_N)
    # a class that takes no part has logit -inf on both sides
    gap_NR = torch.where(e_NR > 0, t_NR - s_NR, 0.0)
    return {"z_s": _exp(s_NR, top_s_N).sum(1), "z_t": e_NR.sum(1), "n": (e_NR * gap_NR).sum(1)}


def _kl(known: State) -> Tensor:
    lse_s, lse_t = known["top_s"] + known["z_s"].log(), known["top_t"] + known["z_t"].log()
    return known["n"] / known["z_t"] - lse_t + lse_s


class StandardizedKD(LogitLoss):
    """KD on standardised logits (Sun et al., Logit Standardization, CVPR 2024, arXiv 2403.01427).

    z = (x - mean) / (std + 1e-7) over the classes, std with C - 1, of both; then KD at temperature T. It doesn't change
    with x -> a x + b, a > 0, of either side.
    """

    kind: Literal["standardized_kd"] = "standardized_kd"
    temperature: float = Field(2.0, gt=0, description="the base temperature T")
    levels: ClassVar[int] = 3
    # level 1 depends on the mean, but a sum of squares about it has no slope there
    pulls_back: ClassVar[frozenset[int]] = frozenset({2})

    def level(self, number: int, part: Part, known: State) -> Level:
        s_NR, t_NR, count = part.s_NR, part.teacher_NR, part.num_classes
        if count < 2:
            raise DataError("standardised logits need two classes or more.")
        if number == 0:
            return Level({"max_s": _top(s_NR), "max_t": _top(t_NR)}, {"sum_s": s_NR.sum(1), "sum_t": t_NR.sum(1)})
        s_NR, t_NR = s_NR - known["sum_s"][:, None] / count, t_NR - known["sum_t"][:, None] / count
        if number == 1:
            return Level({}, {"square_s": s_NR.square().sum(1), "square_t": t_NR.square().sum(1)})
        by_s, by_t = (self._by(known[f"square_{x}"], count) for x in "st")
        top_s = (known["max_s"] - known["sum_s"] / count).detach() * by_s.detach()
        top_t = (known["max_t"] - known["sum_t"] / count) * by_t
        return Level({}, _kl_sums(s_NR * by_s[:, None], t_NR * by_t[:, None], top_s, top_t))

    def _by(self, square_N: Tensor, count: int) -> Tensor:
        variance_N = square_N / (count - 1)
        flat_N = variance_N <= 0  # of equal logits the root has no slope
        std_N = torch.where(flat_N, torch.ones_like(variance_N), variance_N).sqrt().masked_fill(flat_N, 0.0)
        return 1.0 / ((std_N + 1e-7) * self.temperature)

    def value(self, known: State, part: Part) -> Tensor:
        count = part.num_classes
        by_s, by_t = (self._by(known[f"square_{x}"], count).detach() for x in "st")
        tops = {
            f"top_{x}": (known[f"max_{x}"] - known[f"sum_{x}"] / count).detach() * by
            for x, by in zip("st", (by_s, by_t), strict=True)
        }
        return self.temperature**2 * _kl({**known, **tops})


class DKD(LogitLoss):
    """Decoupled distillation (Zhao et al., CVPR 2022, arXiv 2203.08679): T^2 (alpha TCKD + beta NCKD).

    TCKD: KL of (p_y, 1 - p_y). NCKD: KL of the softmax over the classes other than y. KD = TCKD + (1 - p_y^t) NCKD.
    """

    kind: Literal["dkd"] = "dkd"
    temperature: float = Field(4.0, gt=0, description="T")
    alpha: float = Field(1.0, ge=0, description="weight of the label's class against all others")
    beta: float = Field(8.0, ge=0, description="weight of the other classes among each other; 2 for weak teachers")
    levels: ClassVar[int] = 2
    needs_label: ClassVar[bool] = True

    def level(self, number: int, part: Part, known: State) -> Level:
        own = part.own_NR
        s_NR, t_NR = part.s_NR / self.temperature, part.teacher_NR / self.temperature
        s_other, t_other = (x.masked_fill(own, -torch.inf) for x in (s_NR, t_NR))
        if number == 0:
            tops = {"top_s": _top(s_other), "top_t": _top(t_other)}
            return Level(
                tops, {"own_s": s_NR.masked_fill(~own, 0.0).sum(1), "own_t": t_NR.masked_fill(~own, 0.0).sum(1)}
            )
        return Level({}, _kl_sums(s_other, t_other, known["top_s"], known["top_t"]))

    def parts(self, known: State) -> tuple[Tensor, Tensor, Tensor]:
        """(TCKD, NCKD, p_y of the teacher), each (N,)."""
        lead_s = known["own_s"] - known["top_s"] - known["z_s"].log()  # ln p_y / (1 - p_y)
        lead_t = known["own_t"] - known["top_t"] - known["z_t"].log()
        p_N = torch.sigmoid(lead_t)
        target_N = _bernoulli_kl(lead_s, lead_t)
        return target_N, _kl(known), p_N

    def value(self, known: State, part: Part) -> Tensor:
        target_N, other_N, _ = self.parts(known)
        return self.temperature**2 * (self.alpha * target_N + self.beta * other_N)


def _softplus(x: Tensor) -> Tensor:
    return torch.logaddexp(x, torch.zeros_like(x))


def _bernoulli_kl(x: Tensor, y: Tensor) -> Tensor:
    """KL(sigmoid(y) || sigmoid(x)), elementwise: softplus(x) - softplus(y) - sigmoid(y) (x - y)."""
    return _softplus(x) - _softplus(y) - torch.sigmoid(y) * (x - y)


class DIST(LogitLoss):
    """Distillation by correlation (Huang et al., DIST, NeurIPS 2022, arXiv 2205.10536).

    a = softmax(s/T), b = softmax(t/T); T^2 (beta (1 - pearson of a sample's classes) + gamma (1 - mean over the classes of
    their pearson over the batch)). A class whose column is constant over the batch correlates 0 with anything and adds 1,
    as in the authors' code, unless `skip_constant`.
    """

    kind: Literal["dist"] = "dist"
    temperature: float = Field(1.0, gt=0, description="T")
    beta: float = Field(1.0, ge=0, description="weight of the samples' correlation (inter)")
    gamma: float = Field(1.0, ge=0, description="weight of the classes' correlation over the batch (intra)")
    skip_constant: bool = Field(False, description="classes that are constant over the batch don't count")
    levels: ClassVar[int] = 3
    pulls_back: ClassVar[frozenset[int]] = frozenset({2})

    def level(self, number: int, part: Part, known: State) -> Level:
        if self.gamma and int((part.weight_N > 0).sum()) < 2:
            raise DataError(
                "loss dist compares samples of a batch: it needs two or more. Set gamma to 0 or a larger batch."
            )
        s_NR, t_NR = part.s_NR / self.temperature, part.teacher_NR / self.temperature
        if number == 0:
            return Level({"top_s": _top(s_NR), "top_t": _top(t_NR)}, {})
        a_NR, b_NR = _exp(s_NR, known["top_s"]), _exp(t_NR, known["top_t"])
        if number == 1:
            return Level({}, {"z_s": a_NR.sum(1), "z_t": b_NR.sum(1)})
        a_NR, b_NR = a_NR / known["z_s"][:, None], b_NR / known["z_t"][:, None]
        even = 1.0 / part.num_classes
        x_NR, y_NR = a_NR - even, b_NR - even
        sums = {"aa": x_NR.square().sum(1), "bb": y_NR.square().sum(1), "ab": (x_NR * y_NR).sum(1)}
        share_N1 = (part.weight_N > 0).to(a_NR)[:, None]
        count = share_N1.sum().clamp_min(1)
        x_NR = (a_NR - (a_NR * share_N1).sum(0) / count) * share_N1
        y_NR = (b_NR - (b_NR * share_N1).sum(0) / count) * share_N1
        rho_R = _pearson((x_NR * y_NR).sum(0), x_NR.square().sum(0), y_NR.square().sum(0))
        live_R = torch.ones_like(rho_R)
        if self.skip_constant:
            live_R = ((x_NR.square().sum(0) > 1e-16) & (y_NR.square().sum(0) > 1e-16)).to(rho_R)
        return Level({}, sums | {"rho": ((1 - rho_R) * live_R).sum()[None], "live": live_R.sum()[None]})

    def parts(self, known: State) -> tuple[Tensor, Tensor]:
        """(1 - correlation of each sample (N,), the classes' mean, a scalar)."""
        inter_N = 1 - _pearson(known["ab"], known["aa"], known["bb"])
        return inter_N, (known["rho"] / known["live"].clamp_min(1)).squeeze()

    def value(self, known: State, part: Part) -> Tensor:
        inter_N, intra = self.parts(known)
        return self.temperature**2 * (self.beta * inter_N + self.gamma * intra)


def _pearson(xy: Tensor, xx: Tensor, yy: Tensor) -> Tensor:
    tiny = torch.finfo(xx.dtype).tiny
    dead = (xx <= tiny) | (yy <= tiny)
    length = torch.where(dead, torch.ones_like(xx), xx).sqrt() * torch.where(dead, torch.ones_like(yy), yy).sqrt()
    return (xy / (length + 1e-8)).masked_fill(dead, 0.0)


Reduction = Literal["sum", "mean"]


class _Elementwise(LogitLoss):
    """A sum over classes of a function of one student's and one teacher's logit."""

    reduction: Reduction = Field("sum", description="over the classes; the papers' is sum")

    def term(self, s: Tensor, t: Tensor) -> Tensor:
        raise NotImplementedError

    def level(self, number: int, part: Part, known: State) -> Level:
        return Level({}, {"total": self.term(part.s_NR, part.teacher_NR).sum(1)})

    def value(self, known: State, part: Part) -> Tensor:
        return known["total"] / (part.num_classes if self.reduction == "mean" else 1)


class BinaryKLNorm(_Elementwise):
    """BinaryKL-Norm of DHKD (Yang et al., arXiv 2411.08937): T^2 sum KL(Bernoulli(1/2) || Bernoulli(sigmoid((s - t)/T))).

    In closed form T^2 sum ln cosh((s - t)/(2T)): a logit regression that is quadratic, (s - t)^2 / 8, near s = t and linear
    far from it. The gradient is (T/2) tanh((s - t)/(2T)). ln cosh u = |u| + softplus(-2|u|) - ln 2 holds in fp32 where the
    authors' clamped sigmoid overflows (|s - t|/T above 17).
    """

    kind: Literal["binary_kl_norm"] = "binary_kl_norm"
    temperature: float = Field(2.0, gt=0, description="T")

    def term(self, s: Tensor, t: Tensor) -> Tensor:
        u = ((s - t) / (2 * self.temperature)).abs()
        # |u| has no derivative at 0, where ln cosh has 0: u + softplus(-2u) gives 1 - 2 sigmoid(0) = 0 there
        return self.temperature**2 * (u + _softplus(-2 * u) - math.log(2))


class BinaryKL(_Elementwise):
    """BinaryKL: T^2 sum over classes KL(sigmoid(t/T) || sigmoid(s/T)). Also the distillation of multi-label teachers."""

    kind: Literal["binary_kl"] = "binary_kl"
    temperature: float = Field(2.0, gt=0, description="T")

    def term(self, s: Tensor, t: Tensor) -> Tensor:
        return self.temperature**2 * _bernoulli_kl(s / self.temperature, t / self.temperature)


class LogitMSE(_Elementwise):
    """sum (or mean) over classes of (s - t)^2 (Ba and Caruana, NeurIPS 2014)."""

    kind: Literal["logit_mse"] = "logit_mse"
    reduction: Reduction = Field("mean", description="over the classes")

    def term(self, s: Tensor, t: Tensor) -> Tensor:
        return (s - t).square()


class ListedKD(LogitLoss):
    """KD from a teacher's k best classes: KL over k + 1 cells, the last of which is all other classes together.

    At most the full KL (data processing), and equal to it where the student's and the teacher's tails are proportional.
    The tail isn't dropped: without it the student's mass there would be free.
    """

    kind: Literal["listed_kd"] = "listed_kd"
    temperature: float = Field(4.0, gt=0, description="T; the teacher's tail must have been kept for it")
    levels: ClassVar[int] = 2
    needs_teacher: ClassVar[bool] = False

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

    def level(self, number: int, part: Part, known: State) -> Level:
        ids_Nk = self._listed(part).ids_Nk
        s_NR = part.s_NR / self.temperature
        at_Nk = torch.searchsorted(part.ids_R, ids_Nk.contiguous()).clamp_max(max(len(part.ids_R) - 1, 0))
        here_Nk = part.ids_R[at_Nk] == ids_Nk if len(part.ids_R) else torch.zeros_like(ids_Nk, dtype=torch.bool)
        named_NR = torch.zeros_like(s_NR, dtype=torch.int8)
        if len(part.ids_R):
            named_NR.scatter_add_(1, at_Nk, here_Nk.to(torch.int8))
        rest_NR = s_NR.masked_fill(named_NR > 0, -torch.inf)
        if number == 0:
            own_Nk = (
                s_NR.gather(1, at_Nk).masked_fill(~here_Nk, 0.0) if len(part.ids_R) else s_NR.new_zeros(ids_Nk.shape)
            )
            return Level({"top": _top(rest_NR)}, {"listed": own_Nk})
        return Level({}, {"z": _exp(rest_NR, known["top"]).sum(1)})

    def value(self, known: State, part: Part) -> Tensor:
        listed, s_Nk = self._listed(part), known["listed"]
        rest_N = known["top"] + torch.log(known["z"].clamp_min(torch.finfo(known["z"].dtype).tiny))
        t_Nk = listed.logits_Nk.to(s_Nk) / self.temperature
        tail_N = listed.tail_N.to(s_Nk)
        s_NK, t_NK = torch.cat([s_Nk, rest_N[:, None]], 1), torch.cat([t_Nk, tail_N[:, None]], 1)
        log_q, log_p = torch.log_softmax(t_NK, 1), torch.log_softmax(s_NK, 1)
        q = log_q.exp()
        return self.temperature**2 * torch.where(q > 0, q * (log_q - log_p), 0.0).sum(1)


AnyLogitLoss = KD | StandardizedKD | DKD | DIST | BinaryKLNorm | BinaryKL | LogitMSE | ListedKD
LogitLossConfig = Annotated[AnyLogitLoss, Field(discriminator="kind")]


def part_of(
    s_NC: Tensor,
    t_NC: Tensor | None,
    label_N: Tensor | None,
    weight_N: Tensor | None = None,
    listed: Listed | None = None,
) -> Part:
    """All classes at once. The teacher gets no gradient; a label of -1 is none."""
    ids_C = torch.arange(s_NC.shape[1], device=s_NC.device)
    label_N = torch.full((len(s_NC),), -1, device=s_NC.device) if label_N is None else label_N
    weight_N = torch.ones(len(s_NC), device=s_NC.device) if weight_N is None else weight_N
    if t_NC is not None:
        t_NC = t_NC.detach().to(s_NC.dtype)
    return Part(s_NC, t_NC, label_N[:, None] == ids_C, ids_C, weight_N, s_NC.shape[1], listed)


def dense_state(loss: LogitLoss, part: Part) -> dict[str, Tensor]:
    """All levels of a loss where `part` has all classes."""
    known: dict[str, Tensor] = {}
    for number in range(loss.levels):
        found = loss.level(number, part, known)
        known |= {name: top.detach() for name, top in found.tops.items()} | dict(found.sums)
    return known


def dense_distillation(
    loss: LogitLoss,
    s_NC: Tensor,
    t_NC: Tensor | None,
    label_N: Tensor | None = None,
    weight_N: Tensor | None = None,
    listed: Listed | None = None,
) -> Tensor:
    """The loss of each sample, (N,), differentiable in the student's logits; of samples without weight it is 0.

    Args:
        s_NC: student's logits; float32 or float64 (half precision is taken as float32).
        t_NC: teacher's logits, or None for `listed`.
        label_N: int64 labels, for losses that need them.

    Raises DataError for a teacher of another shape.
    """
    if t_NC is not None and t_NC.shape != s_NC.shape:
        raise DataError(
            f"the teacher's logits are {tuple(t_NC.shape)} and the student's {tuple(s_NC.shape)}: their classes differ."
        )
    s_NC = s_NC.float() if s_NC.dtype in (torch.float16, torch.bfloat16) else s_NC
    part = part_of(s_NC, t_NC, label_N, weight_N, listed)
    loss_N = loss.value(dense_state(loss, part), part)
    return torch.where(part.weight_N > 0, loss_N, 0.0)
