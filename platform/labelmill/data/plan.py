"""The order of samples: a pure function of (shard counts, seed, epoch), the same for any number of workers.

Positions are global: position = epoch * samples_per_epoch + place in the epoch. An epoch's end is only a
marker, so no tail is dropped and a global batch may straddle two epochs. Within an epoch the shards are
permuted, cut into windows of `window` shards, and the samples of a window are permuted together: one window is
what one read task holds in memory, and what a resume re-reads at most.

Shape legend: W shards of a window, S samples of a window.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

_SHARD_ORDER, _SAMPLE_ORDER = 1, 2


def _generator(*key: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))


@dataclass(frozen=True)
class Window:
    """A run of positions that one read task serves: `[start, start + samples)` from `shards`."""

    start: int
    samples: int
    shards: tuple[int, ...]
    epoch: int
    index: int

    @property
    def stop(self) -> int:
        """One past the window's last position."""
        return self.start + self.samples


@dataclass(frozen=True)
class Plan:
    """The order of a stream.

    Args:
        counts: samples of each shard.
        seed: of the order.
        window: shards that are shuffled together.
        shuffle: False keeps the order of the manifest (evaluation, export).
    """

    counts: tuple[int, ...]
    seed: int = 0
    window: int = 8
    shuffle: bool = True

    @cached_property
    def epoch_samples(self) -> int:
        """Samples of one epoch."""
        return sum(self.counts)

    def windows(self, start: int, stop: int) -> Iterator[Window]:
        """The windows that hold a position of `[start, stop)`, in order."""
        if not self.epoch_samples or stop <= start:
            return
        for epoch in range(start // self.epoch_samples, -(-stop // self.epoch_samples)):
            for window in self._epoch_windows(epoch):
                if window.stop > start and window.start < stop:
                    yield window

    def _epoch_windows(self, epoch: int) -> Iterator[Window]:
        order = np.arange(len(self.counts))
        if self.shuffle:
            order = _generator(self.seed, _SHARD_ORDER, epoch).permutation(order)
        position = epoch * self.epoch_samples
        for index, first in enumerate(range(0, len(order), self.window)):
            shards = tuple(int(i) for i in order[first : first + self.window])
            samples = sum(self.counts[i] for i in shards)
            if samples:
                yield Window(position, samples, shards, epoch, index)
            position += samples

    def rows(self, window: Window) -> np.ndarray:
        """Order inside a window: int64 (S,), each a row of the window's shards laid end to end."""
        if not self.shuffle:
            return np.arange(window.samples)
        return _generator(self.seed, _SAMPLE_ORDER, window.epoch, window.index).permutation(window.samples)

    def digest(self, data: str) -> str:
        """Identifies the order over the data set with digest `data`; a cursor is valid for one digest only."""
        content = [data, list(self.counts), self.seed, self.window, self.shuffle, 1]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def share(start: int, stop: int, rank: int, world: int) -> tuple[int, int]:
    """Rank's slice `[lo, hi)` of the positions `[start, stop)`: even up to one sample, in rank order."""
    n = stop - start
    return start + rank * n // world, start + (rank + 1) * n // world


def padded_share(start: int, stop: int, rank: int, world: int) -> tuple[int, int]:
    """`share`, but a rank left empty by a batch smaller than the world gets the first sample as padding.

    Encoders and collectives then see a batch on every rank; whoever uses the rows drops those outside `share`.
    """
    lo, hi = share(start, stop, rank, world)
    return (lo, hi) if hi > lo else (start, start + 1)
