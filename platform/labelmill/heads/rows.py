"""Class rows of one step, and the gradient they collect.

Shape legend: C classes of this rank, S rows of the step (all C, or the sampled ones), U rows touched since
the last optimizer step, R rows of a chunk, D embedding size.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

SMALLEST_NORM = 1e-12


class Scratch:
    """Memory that steps hand on: fresh pages of a large tensor cost more than the work on it."""

    def __init__(self) -> None:
        self._idle: dict[str, Tensor] = {}

    def take(self, name: str, count: int, like: Tensor) -> Tensor:
        """`count` elements, uninitialised. Not handed out again before `give`."""
        found = self._idle.pop(name, None)
        return like.new_empty(count) if found is None or found.numel() < count else found[:count]

    def give(self, name: str, tensor: Tensor) -> None:
        """Returns what `take` handed out; nobody may use it any more."""
        whole = tensor if tensor._base is None else tensor._base
        self._idle[name] = whole.view(-1)


class StepRows:
    """The rows that take part in one forward and backward pass, unit length where the head normalises.

    Sampled rows are gathered once. When every class takes part the rows stay where they are, and each chunk
    is normalised on its way to the matrix product: a copy of the whole shard never exists.
    """

    def __init__(self, w_CD: Tensor, ids_S: Tensor | None, normalize: bool, scratch: Scratch) -> None:
        self.ids_S = ids_S
        self._scratch = scratch
        self._rows = w_CD
        if ids_S is not None:
            shape = (ids_S.numel(), w_CD.shape[1])
            self._rows = scratch.take("rows", shape[0] * shape[1], w_CD).view(shape)
            torch.index_select(w_CD, 0, ids_S, out=self._rows)
        self.inverse_norm_S: Tensor | None = None
        if normalize:
            norm_S = torch.linalg.vector_norm(self._rows, dim=1).clamp_min_(SMALLEST_NORM)
            self.inverse_norm_S = norm_S.reciprocal_()
            if ids_S is not None:
                self._rows.mul_(self.inverse_norm_S[:, None])

    def __len__(self) -> int:
        return self._rows.shape[0]

    def chunk(self, lo: int, hi: int) -> Tensor:
        """Rows [lo, hi) of the step, (R, D)."""
        rows_RD = self._rows[lo:hi]
        if self.inverse_norm_S is None or self.ids_S is not None:
            return rows_RD
        return rows_RD * self.inverse_norm_S[lo:hi, None]

    def pick(self, at_K: Tensor) -> Tensor:
        """Rows at places `at_K` of the step, (K, D)."""
        rows_KD = self._rows.index_select(0, at_K)
        if self.inverse_norm_S is None or self.ids_S is not None:
            return rows_KD
        return rows_KD.mul_(self.inverse_norm_S[at_K, None])

    def release(self) -> None:
        """Gives the gathered rows' memory back."""
        if self.ids_S is not None:
            self._scratch.give("rows", self._rows)

    def locate(self, local_K: Tensor) -> Tensor:
        """Places in the step of local rows that take part."""
        return local_K if self.ids_S is None else torch.searchsorted(self.ids_S, local_K)

    def pull_back_(self, grad_RD: Tensor, unit_RD: Tensor, lo: int, hi: int) -> Tensor:
        """Gradient of chunk rows -> gradient of the stored rows, in place: (g - (g.u) u) / |w|."""
        if self.inverse_norm_S is None:
            return grad_RD
        along_R = torch.linalg.vecdot(grad_RD, unit_RD)
        grad_RD.addcmul_(unit_RD, along_R[:, None], value=-1.0)
        return grad_RD.mul_(self.inverse_norm_S[lo:hi, None])


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

    def make_room(self, ids_S: Tensor | None, w_CD: Tensor) -> Tensor | None:
        """Merges the rows of a step in; returns their places, None where these are the buffer's own."""
        if self.grad_UD is None:
            self.ids_U, self.grad_UD = ids_S, self._zeros(len(w_CD) if ids_S is None else len(ids_S), w_CD)
            return None
        if ids_S is None or self.ids_U is None or torch.equal(ids_S, self.ids_U):
            return None
        merged_U = torch.unique(torch.cat([self.ids_U, ids_S]))
        if merged_U.numel() > self.ids_U.numel():
            grad_UD = self._zeros(len(merged_U), w_CD)
            grad_UD.index_copy_(0, torch.searchsorted(merged_U, self.ids_U), self.grad_UD)
            self.ids_U, self.grad_UD = merged_U, grad_UD
        return torch.searchsorted(self.ids_U, ids_S)

    def _zeros(self, rows: int, w_CD: Tensor) -> Tensor:
        dim = w_CD.shape[1]
        return self._scratch.take("gradient", rows * dim, w_CD).view(rows, dim).zero_()

    def add(self, places_S: Tensor | None, lo: int, hi: int, grad_RD: Tensor, factor: Tensor) -> None:
        """Adds factor * gradient of the step's rows [lo, hi)."""
        assert self.grad_UD is not None, "make_room comes first"
        if places_S is None:
            self.grad_UD[lo:hi].addcmul_(grad_RD, factor)
        else:
            self.grad_UD.index_add_(0, places_S[lo:hi], grad_RD.mul_(factor))

    def chunks(self, size: int) -> Iterator[tuple[slice | Tensor, Tensor]]:
        """(local rows, gradient (R, D)) piece by piece; the rows are a slice when every row is touched."""
        if self.grad_UD is None:
            return
        for lo in range(0, self.grad_UD.shape[0], size):
            grad_RD = self.grad_UD[lo : lo + size]
            yield (slice(lo, lo + size) if self.ids_U is None else self.ids_U[lo : lo + size]), grad_RD
