"""Class rows of a rank: reading, writing and moving them chunk by chunk, and the gradient they collect.

Rows are stored raw, with the reciprocal of their length in a column beside them: logits come from the raw rows and
are scaled by that column, so that a normalised copy of the shard never exists.

Shape legend: C rows of this rank, U rows touched since the last optimizer step, R rows of a chunk, D embedding size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from labelmill.heads.optim import Lag, RowOptimizerConfig
from labelmill.heads.rounding import round_stochastically
from labelmill.heads.snapshot import RowSnapshot

Where = slice | Tensor
"""Local rows: a slice is read and written in place, int64 row numbers are gathered and scattered."""

ROWS_AT_ONCE = 4096


class Scratch:
    """Memory that steps hand on: fresh pages of a large tensor cost more than the work on it."""

    def __init__(self) -> None:
        self._idle: dict[str, Tensor] = {}

    def take(self, name: str, count: int, like: Tensor) -> Tensor:
        """`count` elements, uninitialised. Not handed out again before `give`."""
        found = self._idle.pop(name, None)
        if found is not None and found.numel() >= count:
            return found[:count]
        found = None  # what is too small goes before its successor comes
        return like.new_empty(count)

    def give(self, name: str, tensor: Tensor) -> None:
        """Returns what `take` handed out; nobody may use it any more."""
        whole = tensor if tensor._base is None else tensor._base
        self._idle[name] = whole.view(-1)

    def borrow(self, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Memory for the moment: the next call with this name may hand out the same."""
        count = math.prod(shape)
        found = self._idle.get(name)
        if found is None or found.numel() < count or found.dtype != like.dtype:
            self._idle.pop(name, None)
            found = None  # what is too small goes before its successor comes
            found = self._idle[name] = like.new_empty(count)
        return found[:count].view(shape)


def part_of(where: Where, lo: int, hi: int) -> Where:
    """Rows [lo, hi) of a chunk."""
    if isinstance(where, Tensor):
        return where[lo:hi]
    step = where.step or 1
    return slice(where.start + lo * step, min(where.stop, where.start + hi * step), step)


def count_of(where: Where) -> int:
    """How many rows a chunk has."""
    if isinstance(where, Tensor):
        return where.numel()
    return len(range(where.start, where.stop, where.step or 1))


class ClassRows:
    """Rows, their optimizer's state and what is derived from them.

    Attributes:
        w_CD: raw rows; their type is the stored one, which may be narrower than that of the arithmetic.
        state: the optimizer's tensors by name, first axis C; `master` is the float32 original of narrow rows.
        inverse_C: 1 / length of each row, for heads that normalise.
        lag: bookkeeping of skipped steps, for optimizers that catch up.
    """

    def __init__(
        self, w_CD: Tensor, optimizer: RowOptimizerConfig, normalize: bool, dtype: torch.dtype, master: bool, seed: int
    ) -> None:
        self.optimizer, self.normalize, self.dtype = optimizer, normalize, dtype
        self.narrow = w_CD.dtype != dtype
        self.w_CD = w_CD
        self.state = optimizer.state(len(w_CD), w_CD.shape[1], dtype, w_CD.device)
        if master and self.narrow:
            self.state["master"] = w_CD.to(dtype)
        self.inverse_C: Tensor | None = None
        self._seen = -1  # version of w_CD that the derived columns belong to
        self._rounding = torch.Generator(w_CD.device).manual_seed(seed)
        self.lag = Lag(len(w_CD), optimizer, w_CD.device) if optimizer.catches_up else None
        self.watchers: list[Watcher] = []
        self.snapshot: RowSnapshot | None = None  # of a save that is being written

    def __len__(self) -> int:
        return len(self.w_CD)

    @property
    def master_CD(self) -> Tensor:
        """The rows that the optimizer moves."""
        return self.state.get("master", self.w_CD)

    def to(self, device: torch.device) -> None:
        """Moves everything; derived columns are made anew."""
        self.w_CD = self.w_CD.to(device)
        self.state = {name: tensor.to(device) for name, tensor in self.state.items()}
        self._rounding = torch.Generator(device).manual_seed(self._rounding.initial_seed())
        if self.lag:
            self.lag.to(device)
        self._seen = -1

    def replaced(self, step: int) -> None:
        """Somebody has put other rows and state in place, up to date at `step`."""
        self._seen = -1
        if self.lag:
            self.lag.reset(step)

    def protect(self, where: Where) -> None:
        """Comes before every change of rows or state: a save may still have to write them."""
        if self.snapshot is not None:
            self.snapshot.protect(where)

    def refresh(self) -> None:
        """Derived columns of the rows, if anybody has written to the rows since."""
        if self._seen == self.w_CD._version and (self.inverse_C is None or len(self.inverse_C) == len(self.w_CD)):
            return
        if self.normalize:
            self.inverse_C = torch.empty(len(self.w_CD), dtype=self.dtype, device=self.w_CD.device)
        for lo in range(0, len(self.w_CD), ROWS_AT_ONCE):
            self._derive(slice(lo, min(lo + ROWS_AT_ONCE, len(self.w_CD))))
        self._seen = self.w_CD._version

    def _derive(self, where: Where) -> None:
        w_RD = self.w_CD[where].to(self.dtype)
        if self.inverse_C is not None:
            # of a row without direction this is inf, and its logits NaN: the loss names the class
            self.inverse_C[where] = torch.linalg.vector_norm(w_RD, dim=1).reciprocal_()
        for watcher in self.watchers:
            watcher.rows_changed(where, w_RD, None if self.inverse_C is None else self.inverse_C[where])

    def first_bad(self, scratch: Scratch) -> int:
        """The first row that isn't finite or, where rows are normalised, has no direction; -1 if all are good."""
        for lo in range(0, len(self.w_CD), ROWS_AT_ONCE):
            w_RD = self.read(slice(lo, min(lo + ROWS_AT_ONCE, len(self.w_CD))), scratch, "rows")
            good_R = torch.isfinite(w_RD).all(dim=1)
            if self.normalize:
                good_R &= torch.isfinite(torch.linalg.vector_norm(w_RD, dim=1).reciprocal())
            if not bool(good_R.all()):
                return lo + int((~good_R).nonzero()[0])
        return -1

    def set(self, row_K: Tensor, rows_KD: Tensor, step: int) -> None:
        """Rows with these numbers get new values and a fresh optimizer state."""
        self.refresh()
        self.protect(row_K)
        for tensor in self.state.values():
            tensor[row_K] = 0
        if self.lag:
            self.lag.last_C[row_K] = step
        self._write(row_K, rows_KD, None)

    def read(self, where: Where, scratch: Scratch, name: str) -> Tensor:
        """The rows for arithmetic, (R, D): a view where that's possible, else a copy in scratch memory `name`."""
        return _fetch(self.w_CD, where, self.dtype, scratch, name)

    def inverse(self, where: Where) -> Tensor | None:
        """1 / length, (R,); None for heads that don't normalise."""
        return None if self.inverse_C is None else self.inverse_C[where]

    def catch_up(self, where: Where, scratch: Scratch, step: int) -> None:
        """Applies to rows the steps that passed them by; only for optimizers that catch up."""
        if self.lag is None:
            return
        behind_R = step - self.lag.last_C[where]
        if not bool(behind_R.any()):
            return
        self.protect(where)
        w_RD = _fetch(self.master_CD, where, self.dtype, scratch, "catch-up rows")
        m_RD = _fetch(self.state["momentum"], where, self.dtype, scratch, "catch-up momentum")
        self.lag.apply_(w_RD, m_RD, behind_R)
        _store(self.state["momentum"], where, m_RD)
        self._write(where, w_RD, self.inverse(where))
        self.lag.last_C[where] = step

    def catch_up_all(self, scratch: Scratch, step: int) -> None:
        """`catch_up` of every row: what a dense optimizer would hold now."""
        if self.lag is None:
            return
        for lo in range(0, len(self.w_CD), ROWS_AT_ONCE):
            self.catch_up(slice(lo, min(lo + ROWS_AT_ONCE, len(self.w_CD))), scratch, step)

    def move(self, where: Where, w_RD: Tensor, grad_RD: Tensor, lr: float, step: int, scratch: Scratch) -> None:
        """One optimizer step of a chunk. `w_RD` is what `read` gave for it; `grad_RD` is overwritten."""
        self.protect(where)
        if self.narrow:
            w_RD = _fetch(self.master_CD, where, self.dtype, scratch, "master")
        state = {
            name: _fetch(tensor, where, tensor.dtype, scratch, f"state {name}")
            for name, tensor in self.state.items()
            if name != "master"
        }
        self.optimizer.update_(w_RD, grad_RD, state, lr)
        if isinstance(where, Tensor):
            for name, part in state.items():
                _scatter(self.state[name], where, part)
        self._write(where, w_RD, self.inverse(where))
        if self.lag:
            self.lag.last_C[where] = step + 1

    def _write(self, where: Where, w_RD: Tensor, inverse_R: Tensor | None) -> None:
        """Puts rows of arithmetic back where they are stored and derives their columns."""
        if self.narrow:
            if "master" in self.state:
                _store(self.state["master"], where, w_RD)
                _store(self.w_CD, where, w_RD.to(self.w_CD.dtype))
            else:
                _store(self.w_CD, where, round_stochastically(w_RD, self.w_CD.dtype, self._rounding))
            w_RD = self.w_CD[where].to(self.dtype)
        else:
            _store(self.w_CD, where, w_RD)
        if self.inverse_C is not None:
            inverse_R = torch.linalg.vector_norm(w_RD, dim=1).reciprocal_()
            self.inverse_C[where] = inverse_R
        for watcher in self.watchers:
            watcher.rows_changed(where, w_RD, inverse_R)
        self._seen = self.w_CD._version


class Watcher:
    """Keeps something derived from the rows, as a quantised copy."""

    def rows_changed(self, where: Where, w_RD: Tensor, inverse_R: Tensor | None) -> None:
        """Rows have these values now."""
        raise NotImplementedError


def _fetch(tensor: Tensor, where: Where, dtype: torch.dtype, scratch: Scratch, name: str) -> Tensor:
    """Rows as `dtype`: a view for a slice of that type, else a copy in scratch memory."""
    if isinstance(where, Tensor):
        part = scratch.borrow(name, (where.numel(), *tensor.shape[1:]), tensor)
        torch.index_select(tensor, 0, where, out=part)
    else:
        part = tensor[where]
    if part.dtype == dtype:
        return part
    wide = scratch.borrow(f"{name} wide", tuple(part.shape), torch.empty(0, dtype=dtype, device=tensor.device))
    return wide.copy_(part)


def _store(tensor: Tensor, where: Where, part: Tensor) -> None:
    """Writes rows back; nothing to do for a view of the tensor itself."""
    if isinstance(where, Tensor):
        _scatter(tensor, where, part)
    elif part.data_ptr() != tensor[where].data_ptr():
        tensor[where] = part


def _scatter(tensor: Tensor, row_R: Tensor, part: Tensor) -> None:
    if tensor.device.type == "cpu" and tensor.dtype in (torch.float32, torch.float64):
        tensor.numpy()[row_R.numpy()] = part.numpy()  # a memcpy a row: half the time of index_copy_
    else:
        tensor.index_copy_(0, row_R, part)


class PendingRows:
    """The gradient of the touched rows, summed over micro batches until the optimizer step; empty at first.

    `ids_U` is None when every row of the shard is touched.
    """

    def __init__(self, scratch: Scratch) -> None:
        self._scratch = scratch
        self.ids_U: Tensor | None = None
        self.grad_UD: Tensor | None = None

    def clear(self) -> None:
        """Forgets the gradient."""
        if self.grad_UD is not None:
            self._scratch.give("gradient", self.grad_UD)
        self.ids_U = self.grad_UD = None

    def make_room(self, ids_S: Tensor | None, rows: int, like: Tensor) -> Tensor | None:
        """Merges the rows of a step in; returns their places, None where these are the buffer's own.

        Args:
            ids_S: distinct local rows in the order of the step's chunks; None for all of the shard.
            rows: of the shard.
            like: (1, D), type and device of the gradient.
        """
        sorted_S = ids_S
        if ids_S is not None and not bool((ids_S.diff() > 0).all()):
            sorted_S = ids_S.sort().values
        if self.grad_UD is None:
            self.ids_U, self.grad_UD = sorted_S, self._zeros(rows if ids_S is None else len(ids_S), like)
        elif self.ids_U is not None:
            merged_U = None if sorted_S is None else torch.unique(torch.cat([self.ids_U, sorted_S]))
            if merged_U is None or merged_U.numel() > self.ids_U.numel():
                grad_UD = like.new_zeros(rows if merged_U is None else len(merged_U), like.shape[1])
                places_U = self.ids_U if merged_U is None else torch.searchsorted(merged_U, self.ids_U)
                grad_UD.index_copy_(0, places_U, self.grad_UD)
                self._scratch.give("gradient", self.grad_UD)
                self.ids_U, self.grad_UD = merged_U, grad_UD
        if self.ids_U is None:
            return ids_S
        assert ids_S is not None
        if len(ids_S) == len(self.ids_U) and torch.equal(ids_S, self.ids_U):
            return None
        return torch.searchsorted(self.ids_U, ids_S)

    def _zeros(self, rows: int, like: Tensor) -> Tensor:
        dim = like.shape[1]
        return self._scratch.take("gradient", rows * dim, like).view(rows, dim).zero_()

    def add(self, places_S: Tensor | None, lo: int, hi: int, grad_RD: Tensor) -> None:
        """Adds the gradient of the step's rows [lo, hi)."""
        assert self.grad_UD is not None, "make_room comes first"
        if places_S is None:
            self.grad_UD[lo:hi].add_(grad_RD)
        else:
            self.grad_UD.index_add_(0, places_S[lo:hi], grad_RD)

    def chunks(self, size: int) -> Iterator[tuple[Where, Tensor]]:
        """(local rows, gradient (R, D)) piece by piece; the rows are a slice when every row is touched."""
        if self.grad_UD is None:
            return
        total = self.grad_UD.shape[0]
        for lo in range(0, total, size):
            hi = min(lo + size, total)
            yield (slice(lo, hi) if self.ids_U is None else self.ids_U[lo:hi]), self.grad_UD[lo:hi]
