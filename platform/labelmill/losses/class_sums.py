"""Losses between a student's logits and a teacher's that need of each sample only sums over the class axis.

A loss scans the classes once or twice, adding up numbers of each sample; a value and, class by class, the derivative by the
student's logits follow from these sums. Nothing else of a class is kept, so the axis may come in chunks and lie on several
ranks (`labelmill.heads.distilled`). Here is what such a loss is, and the caller that has all classes at once.

Sums of exponentials are taken relative to the largest exponent of the chunk, and joined relative to the largest of all.

Shape legend: N samples, R classes of a chunk, C all classes, k listed classes of a sample, P pairs of sample and class.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from labelmill.errors import DataError
from labelmill.job import StrictModel

Sums = dict[str, Tensor]
"""Numbers of each sample by name: (N,), or of all samples together, (1,)."""


class Columns(dict[str, Tensor]):
    """What is known of the samples after the scans so far, in the logits' dtype, to work with a chunk; vectors as (N, 1)."""

    def __init__(self, known: Sums, like: Tensor) -> None:
        super().__init__()
        self.known, self.dtype = known, like.dtype

    def __missing__(self, name: str) -> Tensor:
        value = self.known[name].to(self.dtype)
        self[name] = value[:, None] if value.ndim == 1 else value
        return self[name]


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
class Pairs:
    """Some (sample, class) pairs of a chunk: the sample's row, the class's column, and which of the sample's it is."""

    sample_P: Tensor
    column_P: Tensor
    place_P: Tensor

    @property
    def at(self) -> tuple[Tensor, Tensor]:
        """Index of the pairs in a matrix of the chunk."""
        return self.sample_P, self.column_P


@dataclass(frozen=True)
class Part:
    """Some classes of all samples.

    Attributes:
        s_NR: the student's logits.
        t_NR: the teacher's; None for losses that don't ask for them, or with `listed`.
        own: the samples' labels, as far as they are among these classes.
        named: the same of the listed classes.
        weight_N: of the samples; 0 leaves one out.
        num_classes: C that take part, over all ranks.
        listed: the teacher's best classes instead of `t_NR`.
        room: memory for a loss's own matrices like `s_NR`, by number; fresh without it. Losses work in it: pages that are
            fresh in every chunk cost more than the arithmetic on them.
    """

    s_NR: Tensor
    t_NR: Tensor | None
    own: Pairs
    named: Pairs
    weight_N: Tensor
    num_classes: int
    listed: Listed | None = None
    room: Callable[[int], Tensor] | None = None

    def scaled(self, number: int, x_NR: Tensor, by: float) -> Tensor:
        """x * by, in the loss's matrix `number`."""
        return torch.mul(x_NR, by, out=self.matrix(number))

    def matrix(self, number: int) -> Tensor:
        """The loss's own matrix of that number, (N, R), with any content."""
        return torch.empty_like(self.s_NR) if self.room is None else self.room(number)

    @property
    def teacher_NR(self) -> Tensor:
        """`t_NR`; DataError where the teacher is known by a few classes only."""
        if self.t_NR is None:
            raise DataError(
                "this loss takes the teacher's logit of every class, and the teacher is known by its best classes alone. "
                "Keep teacher.columns logits, or use loss kind listed_kd."
            )
        return self.t_NR


class LogitLoss(StrictModel):
    """A loss on logits. Subclass it with a `kind`, hyper-parameters as fields, and the functions below."""

    scans: ClassVar[int] = 1
    needs_label: ClassVar[bool] = False
    needs_teacher: ClassVar[bool] = True  # wants t_NR
    relative: ClassVar[Mapping[str, str]] = {}
    """Sums of exponentials, each with the name of the maximum that it is relative to."""

    def scan(self, number: int, part: Part, at: Columns) -> Sums:
        """Maxima and sums of scan `number` (from 0) over the classes of `part`."""
        raise NotImplementedError

    def conclude(self, number: int, known: Sums, part: Part) -> Sums:
        """What follows from the sums of scan `number` over all classes. Of `part` nothing of single classes may be used."""
        return {}

    def value(self, known: Sums, part: Part) -> Tensor:
        """The loss of each sample, (N,), from everything known; `part` as in `conclude`."""
        raise NotImplementedError

    def slope(self, part: Part, at: Columns, by_N1: Tensor) -> Tensor:
        """Derivative of sum_i by_i * loss_i by the student's logits of these classes, (N, R), in one of the loss's matrices."""
        raise NotImplementedError


def joined(parts: Sequence[Sums], relative: Mapping[str, str]) -> Sums:
    """The sums of several chunks as one, float64; names in the order of the first chunk's."""
    stacked = {name: torch.stack([part[name] for part in parts]).double() for name in parts[0]}
    tops = {name: values.amax(0) for name, values in stacked.items() if name in relative.values()}
    out = {}
    for name, values in stacked.items():
        scaled = values * shrink(stacked, tops, relative[name]) if name in relative else values
        out[name] = tops[name] if name in tops else scaled.sum(0)
    return out


def shrink(own: Sums, tops: Sums, name: str) -> Tensor:
    """What a sum relative to its own maximum is multiplied by to be relative to the largest."""
    return torch.exp(own[name] - tops[name])


def top_of(x_NR: Tensor) -> Tensor:
    """Largest of each row; the lowest finite value where there is no class, or only some that are left out (-inf)."""
    low = torch.finfo(x_NR.dtype).min
    return x_NR.amax(1).clamp_min_(low) if x_NR.shape[1] else x_NR.new_full((len(x_NR),), low)


def mass_(x_NR: Tensor, top_N: Tensor) -> Tensor:
    """e^(x - top), in place."""
    return x_NR.sub_(top_N[:, None]).exp_()


def dot_(a_NR: Tensor, b_NR: Tensor) -> Tensor:
    """Inner product of each row, (N,). Overwrites a."""
    return a_NR.mul_(b_NR).sum(1)


def softmax_at(x_NR: Tensor, lse_N1: Tensor, temperature: float, out: Tensor) -> Tensor:
    """softmax(x / T) of some classes, given the log-sum-exp of x / T over all."""
    return torch.add(-lse_N1, x_NR, alpha=1 / temperature, out=out).exp_()


# --- all classes at once ---------------------------------------------------------------------------------------------


def whole(
    s_NC: Tensor,
    t_NC: Tensor | None,
    label_N: Tensor | None,
    weight_N: Tensor | None = None,
    listed: Listed | None = None,
) -> Part:
    """All classes as one part; a label of -1 is none."""
    count, classes = s_NC.shape
    nothing = torch.empty(0, dtype=torch.int64, device=s_NC.device)
    own = named = Pairs(nothing, nothing, nothing)
    if label_N is not None:
        here_N = ((label_N >= 0) & (label_N < classes)).nonzero()[:, 0]
        own = Pairs(here_N, label_N[here_N], torch.zeros_like(here_N))
    if listed is not None:
        k = listed.ids_Nk.shape[1]
        sample_P, place_P = (torch.arange(n, device=s_NC.device) for n in (count, k))
        named = Pairs(sample_P.repeat_interleave(k), listed.ids_Nk.flatten(), place_P.repeat(count))
    weight_N = torch.ones(count, device=s_NC.device) if weight_N is None else weight_N
    return Part(s_NC, t_NC, own, named, weight_N, classes, listed)


def solved(loss: LogitLoss, part: Part) -> Sums:
    """Everything known of the samples after all scans, where `part` has all classes."""
    known: Sums = {}
    for number in range(loss.scans):
        known |= loss.scan(number, part, Columns(known, part.s_NR))
        known |= loss.conclude(number, known, part)
    return known


class _Dense(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, s_NC: Tensor, loss: LogitLoss, part: Part) -> Tensor:
        known, hole_N = solved(loss, part), part.weight_N <= 0
        ctx.work = (loss, part, known, hole_N)
        return loss.value(known, part).to(s_NC.dtype).masked_fill(hole_N, 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_N: Tensor) -> tuple[Tensor | None, ...]:
        loss, part, known, hole_N = ctx.work
        slope_NC = loss.slope(part, Columns(known, part.s_NR), by_N.masked_fill(hole_N, 0.0)[:, None])
        return slope_NC.masked_fill_(hole_N[:, None], 0.0), None, None


def dense_distillation(
    loss: LogitLoss,
    s_NC: Tensor,
    t_NC: Tensor | None,
    label_N: Tensor | None = None,
    weight_N: Tensor | None = None,
    listed: Listed | None = None,
) -> Tensor:
    """The loss of each sample, (N,), differentiable once in the student's logits; of samples without weight it is 0.

    Args:
        s_NC: student's logits; float32 or float64 (half precision is taken as float32).
        t_NC: teacher's logits, which get no gradient, or None for `listed`.
        label_N: int64 labels, for losses that need them.

    Raises DataError for a teacher of another shape.
    """
    if t_NC is not None and t_NC.shape != s_NC.shape:
        raise DataError(
            f"the teacher's logits are {tuple(t_NC.shape)} and the student's {tuple(s_NC.shape)}: their classes differ."
        )
    s_NC = s_NC.float() if s_NC.dtype in (torch.float16, torch.bfloat16) else s_NC
    t_NC = None if t_NC is None else t_NC.detach().to(s_NC.dtype)
    label_N = label_N if loss.needs_label else None
    return _Dense.apply(s_NC, loss, whole(s_NC.detach(), t_NC, label_N, weight_N, listed))
