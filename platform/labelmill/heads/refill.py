"""Rows and state of new classes from those of old ones, merged, or fresh.

With sub-centres a row is (centres, D) wherever (D,) is said. Shape legend: C new classes, K old or fresh classes of a
range of new ones, G merged classes, D embedding size.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from labelmill.errors import DataError
from labelmill.heads import sampling
from labelmill.heads.classmap import ClassMap
from labelmill.heads.source import RowSource
from labelmill.heads.storage import TensorSpec

Merge = Literal["refuse", "first", "mean"]
MASTER = ".master"
"""How the name of a wide original of narrow rows ends; it says what the rows are."""


class Fresh(Protocol):
    """What becomes of classes that nothing is mapped to."""

    def put(self, chunk: Mapping[str, Tensor], lo: int, hi: int) -> None:
        """Fills those of the new classes [lo, hi) in tensors (hi - lo, ...)."""
        ...


class KeepRows:
    """They stay as they are in the tensors."""

    def put(self, chunk: Mapping[str, Tensor], lo: int, hi: int) -> None:
        """Nothing."""


class FreshRows:
    """Rows and state of classes that nothing is mapped to.

    Args:
        rows: given rows (K, D) in the order of their new ids, a tensor or a `.npy` file; None draws them.

    Raises DataError for given rows of another number or shape, and for drawing without the notes that it needs.
    """

    def __init__(
        self, plan: ClassMap, source: RowSource, notes: Mapping[str, Any], rows: str | Path | Tensor | None
    ) -> None:
        self.plan, self.spec, self.notes = plan, source.specs["rows"], notes
        self.given = None if rows is None else _matrix(rows)
        self._ids = torch.ones(plan.num_classes, dtype=torch.bool)
        self._ids[plan.new_K] = False
        self._before = self._ids.cumsum(0) - self._ids.long() if self.given is not None else None
        want = (plan.fresh, *self.spec.shape)
        if self.given is not None and self.given.shape != want:
            raise DataError(f"{plan.fresh} new classes need rows {want}, not {self.given.shape}.")
        lacking = [key for key in ("seed", "init_std", "block_rows") if key not in notes]
        if plan.fresh and self.given is None and lacking:
            raise DataError(f"{source.folder}: doesn't note {', '.join(lacking)}: give rows for the new classes.")

    def put(self, chunk: Mapping[str, Tensor], lo: int, hi: int) -> None:
        """Fills the fresh ones of the new classes [lo, hi)."""
        at_K = self._ids[lo:hi].nonzero()[:, 0]
        if not len(at_K):
            return
        if self.given is not None:
            assert self._before is not None
            first = int(self._before[lo + int(at_K[0])])
            raw_KD = torch.from_numpy(np.array(self.given[first : first + len(at_K)]))
            flat = raw_KD.flatten(0, -2)
            bad = ~torch.isfinite(flat).all(dim=1) | (~flat.any(dim=1) & bool(self.notes.get("normalize", True)))
            if bool(bad.any()):
                at = first + int(bad.nonzero()[0]) // (len(flat) // len(raw_KD))
                raise DataError(f"row {at} for a new class is zero or not finite.")
        else:
            first, last = lo + int(at_K[0]), lo + int(at_K[-1]) + 1
            raw_KD = first_rows(self.plan.num_classes, self.spec, self.notes, first, last)[at_K - at_K[0]]
        for name, tensor in chunk.items():
            tensor[at_K] = 0
            if name == "rows" or name.endswith(MASTER):
                tensor[at_K] = raw_KD.to(chunk["rows"].dtype).to(tensor.dtype)


def first_rows(num_classes: int, spec: TensorSpec, notes: Mapping[str, Any], lo: int, hi: int) -> Tensor:
    """Rows (hi - lo, D) that a fresh head of `num_classes` draws for the classes [lo, hi)."""
    block, std = int(notes["block_rows"]), float(notes["init_std"])
    size = sampling.block_size(num_classes, block)
    begin, end = lo // size * size, min(-(-hi // size) * size, num_classes)
    width, seed = prod(spec.shape), int(notes["seed"])
    rows = sampling.initial_rows(num_classes, width, block, begin, end, seed, std, spec.torch_dtype)
    return rows[lo - begin : hi - begin].view(-1, *spec.shape)


def whole_rows(stored: Mapping[str, Tensor]) -> Tensor:
    """Rows (K, D) in the widest form that is stored, at least float32."""
    rows = next((value for name, value in stored.items() if name.endswith(MASTER)), stored["rows"])
    return rows.to(torch.promote_types(rows.dtype, torch.float32))


def _matrix(rows: str | Path | Tensor) -> np.ndarray:
    if isinstance(rows, Tensor):
        return rows.float().numpy()
    try:
        found = np.load(rows, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DataError(f"{rows}: not a readable .npy matrix: {error}") from error
    if found.ndim < 2 or found.dtype.kind != "f":
        raise DataError(f"{rows}: needs a matrix of floating numbers, is {found.dtype} {found.shape}.")
    return found


def check_merge(plan: ClassMap, merge: Merge) -> None:
    """Raises DataError when classes share a new id and nothing says what becomes of them."""
    if merge == "refuse" and plan.merged:
        at = int((plan.new_K[1:] == plan.new_K[:-1]).nonzero()[0])
        one, two = plan.old_K[at : at + 2].tolist()
        raise DataError(
            f"the class map sends both {one} and {two} to {int(plan.new_K[at])} ({plan.merged} such classes): merge "
            "them by `first` or by `mean`."
        )


def fill_classes(
    into: Mapping[str, Tensor], source: RowSource, plan: ClassMap, lo: int, hi: int, merge: Merge, fresh: Fresh
) -> None:
    """Fills tensors (hi - lo, ...) with the new classes [lo, hi), old and fresh ones."""
    old_K, at_K = plan.part(lo, hi)
    first_K = torch.ones(len(at_K), dtype=torch.bool)
    first_K[1:] = at_K[1:] != at_K[:-1]
    source.take_into(into, old_K[first_K], at_K[first_K])
    if merge == "mean" and not bool(first_K.all()):
        shared = torch.isin(at_K, at_K[~first_K])
        places, group_K = at_K[shared].unique_consecutive(return_inverse=True)
        part = {name: source.specs[name].empty(int(shared.sum())) for name in into}
        source.take_into(part, old_K[shared])
        for name, value in _mean(part, group_K, len(places), source.normalized).items():
            into[name][places] = value.to(into[name].dtype)
    fresh.put(into, lo, hi)


def _mean(part: Mapping[str, Tensor], group_K: Tensor, groups: int, normalize: bool) -> dict[str, Tensor]:
    """One class of each group of classes."""

    def mean(value: Tensor) -> Tensor:
        total = torch.zeros(groups, *value.shape[1:], dtype=torch.float64).index_add_(0, group_K, value.double())
        return total / group_K.bincount(minlength=groups).view(-1, *[1] * (value.ndim - 1))

    first_G = torch.searchsorted(group_K, torch.arange(groups))
    merged = {
        name: mean(value)
        if value.dtype.is_floating_point
        else torch.from_numpy(np.maximum.reduceat(value.numpy(), first_G.numpy()))
        for name, value in part.items()
    }
    if normalize:
        raw_KD = whole_rows(part).double()
        unit_GD = mean(torch.nn.functional.normalize(raw_KD, dim=-1))
        # opposite rows have no mean direction: the first one's stands
        lost = torch.linalg.vector_norm(unit_GD, dim=-1, keepdim=True) < 1e-6
        unit_GD = torch.where(lost, raw_KD[first_G], unit_GD)
        length_G1 = mean(torch.linalg.vector_norm(raw_KD, dim=-1, keepdim=True))
        whole_GD = torch.nn.functional.normalize(unit_GD, dim=-1) * length_G1
        merged |= {name: whole_GD for name in part if name == "rows" or name.endswith(MASTER)}
    return merged
