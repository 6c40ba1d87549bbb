"""The order of samples: a pure function of (shard counts, seed, epoch), the same for any number of workers.

Positions are global: position = epoch * samples_per_epoch + place in the epoch. An epoch's end is only a
marker, so no tail is dropped and a global batch may straddle two epochs. Within an epoch the shards are
permuted, cut into windows of `window` shards, and the samples of a window are permuted together: one window is
what one read task holds in memory, and what a resume re-reads at most.

A selection (`labelmill.data.selection`) says which rows of a shard take part in an epoch and how often. It never
changes the number of samples of an epoch, so positions keep their meaning.

An epoch costs O(shards) work and memory once, a window O(window); nothing is ever of the size of the data set.

Shape legend: W shards of a window, S samples of a window, B samples asked for.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from labelmill.errors import DataError

if TYPE_CHECKING:
    from labelmill.data.selection import Selection

SHARD_ORDER, SAMPLE_ORDER, SLOT_ORDER, MIX_ORDER = 1, 2, 3, 4
"""Uses of a seed; each gets random numbers of its own."""

_EPOCHS_KEPT = 2  # a batch may straddle two epochs


def philox(*key: int) -> np.random.Generator:
    """The random generator of a key: the same numbers in every process."""
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
class _Epoch:
    """An epoch's layout: its shards in order, and the place where each window starts (one more for the end)."""

    shards: np.ndarray
    starts: np.ndarray


@dataclass(frozen=True, eq=False)
class Plan:
    """The order of a stream.

    Args:
        counts: samples of each shard, kept as a read-only int64 array.
        seed: of the order.
        window: shards that are shuffled together.
        shuffle: False keeps the order of the manifest (evaluation, export).
        selection: which rows take part and how often; None is every row once.

    Raises DataError when the selection was made for other shards.
    """

    counts: np.ndarray | Sequence[int]
    seed: int = 0
    window: int = 8
    shuffle: bool = True
    selection: Selection | None = None

    def __post_init__(self) -> None:
        counts = np.array(self.counts, dtype=np.int64)
        if counts.ndim != 1 or (counts < 0).any() or self.window < 1:
            raise ValueError("counts are non-negative numbers, one for each shard, and a window has a shard or more")
        counts.flags.writeable = False
        object.__setattr__(self, "counts", counts)
        if self.selection is not None and not np.array_equal(self.selection.shard_samples, counts):
            theirs = self.selection.shard_samples
            raise DataError(
                f"the selection was made for {len(theirs)} shard(s) of {int(theirs.sum())} samples, the data set has "
                f"{len(counts)} of {int(counts.sum())}, or they are cut differently. Build the selection again."
            )

    def __getstate__(self) -> dict[str, Any]:
        # layouts are made again where they are needed: cheaper than sending them
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @cached_property
    def epoch_samples(self) -> int:
        """Samples of one epoch."""
        return int(np.sum(self.counts)) if self.selection is None else self.selection.samples

    def windows(self, start: int, stop: int) -> Iterator[Window]:
        """The windows that hold a position of `[start, stop)`, in order; made one by one, as they are asked for."""
        total = self.epoch_samples
        position = max(0, start)
        while total and position < stop:
            epoch = position // total
            starts = self._epoch(epoch).starts
            for index in range(bisect_right(starts, position - epoch * total) - 1, len(starts) - 1):
                if starts[index] + epoch * total >= stop:
                    return
                if starts[index + 1] > starts[index]:
                    yield self._window(epoch, index)
            position = (epoch + 1) * total

    def window_at(self, position: int) -> Window:
        """The window that holds `position`. Raises ValueError for a negative position or an empty plan."""
        if position < 0 or not self.epoch_samples:
            raise ValueError(f"there is no position {position} in a plan of {self.epoch_samples} samples an epoch")
        return next(self.windows(position, position + 1))

    def rows(self, window: Window) -> np.ndarray:
        """Order inside a window: int64 (S,), each a row of the window's shards laid end to end, whole.

        A row that the selection draws several times occurs as often.
        """
        rows = None if self.selection is None else self._selected(self.selection, window)
        if not self.shuffle:
            return np.arange(window.samples) if rows is None else rows
        order = philox(self.seed, SAMPLE_ORDER, window.epoch, window.index).permutation(window.samples)
        return order if rows is None else rows[order]

    def samples(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """The samples at positions `[start, stop)`: shards, int64 (B,), and rows in them, int64 (B,)."""
        shards, rows = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        for window in self.windows(start, stop):
            rows_S = self.rows(window)[max(0, start - window.start) : stop - window.start]
            first = self._first_rows(window)
            which = np.searchsorted(first, rows_S, side="right") - 1
            shards.append(np.array(window.shards)[which])
            rows.append(rows_S - first[which])
        return np.concatenate(shards), np.concatenate(rows)

    def digest(self, data: str) -> str:
        """Identifies the order over the data set with digest `data`; a cursor is valid for one digest only."""
        # the JSON of [data, counts, seed, ...], a piece at a time: a million counts are never a list
        found = hashlib.sha256(f"[{json.dumps(data)}, [".encode())
        counts, piece = np.asarray(self.counts), 1 << 16
        for lo in range(0, len(counts), piece):
            found.update(((", " if lo else "") + ", ".join(map(str, counts[lo : lo + piece].tolist()))).encode())
        rest = [self.seed, self.window, self.shuffle, 1] + ([self.selection.digest] if self.selection else [])
        found.update(f"], {json.dumps(rest)[1:]}".encode())
        return found.hexdigest()

    def _window(self, epoch: int, index: int) -> Window:
        layout = self._epoch(epoch)
        lo, hi = layout.starts[index : index + 2].tolist()
        shards = tuple(layout.shards[index * self.window : (index + 1) * self.window].tolist())
        return Window(epoch * self.epoch_samples + lo, hi - lo, shards, epoch, index)

    @cached_property
    def _epochs(self) -> dict[int, _Epoch]:
        return {}

    def _epoch(self, epoch: int) -> _Epoch:
        """The layout of an epoch; the last ones are kept."""
        found = self._epochs.get(epoch)
        if found is None:
            found = self._lay_out(epoch)
            for old in list(self._epochs)[: 1 - _EPOCHS_KEPT]:
                self._epochs.pop(old, None)  # another thread may have been faster
            self._epochs[epoch] = found
        return found

    def _lay_out(self, epoch: int) -> _Epoch:
        counts = np.asarray(self.counts) if self.selection is None else self.selection.counts(epoch)
        order = np.arange(len(counts))
        if self.shuffle:
            order = philox(self.seed, SHARD_ORDER, epoch).permutation(order)
        if self.selection is not None:
            # windows are filled with shards that have something to give
            order = order[counts[order] > 0]
        ends = np.cumsum(counts[order])
        starts = np.concatenate([[0], ends[self.window - 1 :: self.window]])
        if len(order) % self.window:
            starts = np.append(starts, ends[-1])
        return _Epoch(order, starts)

    def _first_rows(self, window: Window) -> np.ndarray:
        """int64 (W,): where each shard of the window starts when they are laid end to end."""
        counts = np.asarray(self.counts)[list(window.shards)]
        return np.cumsum(counts) - counts

    def _selected(self, selection: Selection, window: Window) -> np.ndarray:
        first = self._first_rows(window).tolist()
        found = [selection.rows(window.epoch, i) + at for i, at in zip(window.shards, first, strict=True)]
        return np.concatenate(found)


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
