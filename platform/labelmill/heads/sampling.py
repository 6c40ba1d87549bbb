"""Which rank owns which classes, their first rows, and which classes a step draws.

All three depend on the job alone, never on the number of ranks, so that a run gives the same result on any
cluster: rows are made block by block from (seed, block), classes drawn from (seed, step), and ranks own
contiguous runs of whole blocks.

Shape legend: C classes, S sampled classes, D embedding size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import numpy as np
import torch
from torch import Tensor

_ROWS, _CLASSES, _BLOCKS = 1, 2, 3  # what a random stream is for: keeps streams of equal (seed, index) apart
MIN_BLOCKS = 64
_loaded_later: ContextVar[bool] = ContextVar("loaded_later", default=False)


def block_size(num_classes: int, block_rows: int) -> int:
    """Classes in a block: `block_rows`, fewer where that would leave fewer than 64 blocks to deal out."""
    return max(1, min(block_rows, num_classes // MIN_BLOCKS))


def class_range(num_classes: int, block_rows: int, rank: int, world: int) -> tuple[int, int]:
    """The classes [start, stop) that `rank` of `world` owns: a run of whole blocks; may be empty."""
    size = block_size(num_classes, block_rows)
    blocks = -(-num_classes // size)
    first, last = rank * blocks // world, (rank + 1) * blocks // world
    return min(first * size, num_classes), min(last * size, num_classes)


def initial_rows(
    num_classes: int,
    dim: int,
    block_rows: int,
    start: int,
    stop: int,
    seed: int,
    std: float,
    dtype: torch.dtype,
) -> Tensor:
    """Rows of the classes [start, stop), whole blocks, (stop - start, D): normal, standard deviation `std`.

    The numbers are float32 whatever the `dtype`, so a double-precision head starts where a single-precision
    one does.
    """
    if _loaded_later.get():
        return torch.zeros(stop - start, dim, dtype=dtype)
    rows = torch.empty(stop - start, dim, dtype=dtype)
    size = block_size(num_classes, block_rows)
    for first in range(start, stop, size):
        last = min(first + size, stop)
        block = _random(seed, _ROWS, first // size).standard_normal((last - first, dim), dtype=np.float32)
        rows[first - start : last - start] = torch.from_numpy(block)
    return rows.mul_(std)


@contextmanager
def loaded_later() -> Iterator[None]:
    """Inside, first rows are zeros: a checkpoint is about to fill them all, and drawing a million takes seconds."""
    token = _loaded_later.set(True)
    try:
        yield
    finally:
        _loaded_later.reset(token)


def sampled_classes(num_classes: int, rate: float, seed: int, step: int) -> Tensor:
    """The classes drawn for optimizer step `step`: S = round(rate * C) (at least 1) ids, sorted, int64.

    Stratified: the classes, as a ring turned by a random offset, are cut into S runs, and one class is drawn from each.
    Exactly S distinct classes, each with probability S / C, in O(S) and already in order; two classes of one run are
    never drawn together. Every rank gets its share of them, so that none waits for another.
    """
    return _stratified(num_classes, rate, _random(seed, _CLASSES, step))


def sampled_blocks(blocks: int, rate: float, seed: int, step: int) -> Tensor:
    """The blocks drawn for optimizer step `step`: round(rate * blocks) (at least 1) numbers, as `sampled_classes`."""
    return _stratified(blocks, rate, _random(seed, _BLOCKS, step))


def _stratified(total: int, rate: float, random: np.random.Generator) -> Tensor:
    count = max(1, round(rate * total))
    edges = np.arange(count + 1, dtype=np.int64) * total // count
    drawn = edges[:-1] + (random.random(count) * np.diff(edges)).astype(np.int64)
    drawn = np.minimum(drawn, edges[1:] - 1) + random.integers(total)
    wrapped = np.searchsorted(drawn, total)
    return torch.from_numpy(np.concatenate([drawn[wrapped:] - total, drawn[:wrapped]]))


def _random(seed: int, purpose: int, index: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, purpose, index))))
