"""Which rows of a rank take part in a step, as chunks to work through, and where a row stands among them.

The drawn classes are a function of (seed, step) for uniform and block sampling, so that they are equal for any number
of ranks; positives of the batch are added on the rank that owns them. See `labelmill.heads.screen` for hard classes.

Shape legend: C classes of this rank, S rows of the step, K positives that this rank owns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from labelmill.heads import sampling
from labelmill.heads.rows import Where, count_of, part_of
from labelmill.job import StrictModel


class UniformSampling(StrictModel):
    """Classes one by one, each with the same probability."""

    kind: Literal["uniform"] = "uniform"


class BlockSampling(StrictModel):
    """Whole blocks of neighbouring class ids: rows are read in place, which is fastest.

    Classes of a block are always drawn together. Where neighbours in the label file resemble each other, a `stride`
    of k makes a block of every k-th class instead.
    """

    kind: Literal["blocks"] = "blocks"
    stride: int = Field(1, ge=1, description="a block takes every k-th class of `block_rows` neighbours")


class HardSampling(StrictModel):
    """The classes nearest to the batch, found by an int8 copy of the rows, and a uniform sample besides."""

    kind: Literal["hard"] = "hard"
    share: float = Field(0.5, gt=0, le=1, description="of the drawn classes that are hard ones; the rest is uniform")


SamplingConfig = Annotated[UniformSampling | BlockSampling | HardSampling, Field(discriminator="kind")]


@dataclass
class Piece:
    """Rows [lo, hi) of a step and where they lie in the shard."""

    where: Where
    lo: int
    hi: int

    def parts(self, size: int) -> list[Piece]:
        """The piece in parts of at most `size` rows."""
        if self.hi - self.lo <= size:
            return [self]
        return [
            Piece(part_of(self.where, lo, lo + size), self.lo + lo, min(self.lo + lo + size, self.hi))
            for lo in range(0, self.hi - self.lo, size)
        ]


class StepPlan:
    """The rows that take part in one forward and backward pass.

    Attributes:
        sections: slices of the shard, or one tensor of sorted row numbers; a row is in one of them.
        total: rows in all sections.
    """

    def __init__(self, sections: list[Where], rows: int) -> None:
        self.sections = [section for section in sections if count_of(section)]
        self.total = sum(count_of(section) for section in self.sections)
        self._rows = rows

    @property
    def everything(self) -> bool:
        """Whether every row of the shard takes part, in order."""
        return self.total == self._rows and all(isinstance(s, slice) and s.step in (None, 1) for s in self.sections)

    def pieces(self, size: int) -> list[Piece]:
        """Chunks of at most `size` rows."""
        pieces, lo = [], 0
        for section in self.sections:
            count = count_of(section)
            pieces += Piece(section, lo, lo + count).parts(size)
            lo += count
        return pieces

    def ids(self, device: torch.device) -> Tensor | None:
        """Row numbers in the order of the pieces, (S,); None for all."""
        if self.everything:
            return None
        parts = [
            s if isinstance(s, Tensor) else torch.arange(s.start, s.stop, s.step or 1, device=device)
            for s in self.sections
        ]
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64, device=device)

    def locate(self, row_K: Tensor) -> Tensor:
        """Places of rows that take part, (K,)."""
        if self.everything or not row_K.numel():
            return row_K
        place_K, lo = torch.full_like(row_K, -1), 0
        for section in self.sections:
            if isinstance(section, Tensor):
                at_K = torch.searchsorted(section, row_K).clamp_max_(len(section) - 1)
                place_K = torch.where(section[at_K] == row_K, at_K + lo, place_K)
            lo += count_of(section)
        return _locate_in_slices(self.sections, row_K, place_K)


def _locate_in_slices(sections: list[Where], row_K: Tensor, place_K: Tensor) -> Tensor:
    """Fills in the places of rows that lie in slices; slices of one stride and equal extent."""
    spans = [(s.start, s.stop, s.step or 1) for s in sections if isinstance(s, slice)]
    if not spans:
        return place_K
    table = torch.tensor(spans, dtype=torch.int64, device=row_K.device)
    offset, lo = [], 0
    for section in sections:
        if isinstance(section, slice):
            offset.append(lo)
        lo += count_of(section)
    offset_T = torch.tensor(offset, dtype=torch.int64, device=row_K.device)
    start, stop, step = table.unbind(1)
    # few positives, few slices: one comparison of each with each
    inside = (row_K[:, None] >= start) & (row_K[:, None] < stop) & ((row_K[:, None] - start) % step == 0)
    found_K, at_K = inside.any(dim=1), inside.to(torch.int8).argmax(dim=1)
    return torch.where(found_K, offset_T[at_K] + (row_K - start[at_K]) // step[at_K], place_K)


def everything(rows: int) -> StepPlan:
    """All rows."""
    return StepPlan([slice(0, rows)], rows)


def of_rows(row_S: Tensor, rows: int) -> StepPlan:
    """Some rows, given by sorted distinct numbers."""
    return StepPlan([row_S], rows)


def of_blocks(drawn: list[slice], positive_K: Tensor, rows: int) -> StepPlan:
    """Blocks, and the positives that lie in none of them."""
    plan = StepPlan(list(drawn), rows)
    if not positive_K.numel():
        return plan
    outside = _locate_in_slices(plan.sections, positive_K, torch.full_like(positive_K, -1)) < 0
    return StepPlan([*drawn, torch.unique(positive_K[outside])], rows)


def of_groups(classes: StepPlan, group: int, rows: int) -> StepPlan:
    """The rows of a plan of classes, each class having `group` rows one after the other."""
    if group == 1:
        return classes
    within = torch.arange(group)
    sections: list[Where] = [
        slice(s.start * group, s.stop * group)
        if isinstance(s, slice)
        else (s[:, None] * group + within.to(s.device)).flatten()
        for s in classes.sections
    ]
    return StepPlan(sections, rows)


def dealt_blocks(num_classes: int, block_rows: int, stride: int) -> tuple[int, int, int]:
    """Classes of a unit of neighbours, blocks that a unit is cut into, blocks of all classes."""
    size = sampling.block_size(num_classes, block_rows)
    stride = min(stride, size)
    return size, stride, -(-num_classes // size) * stride


def drawn_blocks(
    num_classes: int, block_rows: int, stride: int, rate: float, seed: int, step: int, start: int, stop: int
) -> list[slice]:
    """Own blocks drawn for a step, as slices of the shard [start, stop)."""
    size, stride, blocks_in_all = dealt_blocks(num_classes, block_rows, stride)
    drawn = sampling.sampled_blocks(blocks_in_all, rate, seed, step)
    first, last = start // size, -(-stop // size)
    mine = drawn[(drawn >= first * stride) & (drawn < last * stride)].tolist() if stop > start else []
    blocks = []
    for number in mine:
        unit, phase = divmod(number, stride)
        lo, hi = unit * size - start, min((unit + 1) * size, stop) - start
        if lo + phase < hi:
            blocks.append(slice(lo + phase, hi, stride) if stride > 1 else slice(lo, hi))
    return blocks
