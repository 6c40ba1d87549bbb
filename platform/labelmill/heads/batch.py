"""The batch of all ranks: gathered in two collectives, and checked so that every rank raises alike.

Shape legend: B samples of this rank, N samples of all ranks, P positives of a sample (padded with -1), D embedding
size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from labelmill.errors import DataError
from labelmill.heads.ranks import Ranks


class NotFiniteError(FloatingPointError):
    """Embeddings or class rows hold NaN or infinite values; nothing was changed."""


class HasIds(Protocol):
    """Labels in batch form, as `labelmill.data.labels.Labels`."""

    @property
    def form(self) -> str: ...

    @property
    def ids_BP(self) -> Tensor: ...


@dataclass
class GlobalBatch:
    """The batch of all ranks; `lo`, `hi` is this rank's part. `target_NP` are the weights of soft labels."""

    x_ND: Tensor
    ids_NP: Tensor
    weight_N: Tensor
    lo: int
    hi: int
    target_NP: Tensor | None = None


def class_ids(labels: HasIds | Tensor, count: int) -> tuple[Tensor, Tensor | None]:
    """(B, P) int64 ids, and the weights of soft labels (B, P), from Labels or a tensor."""
    weights = None
    if isinstance(labels, Tensor):
        ids = labels
    else:
        if labels.form not in ("single", "multi", "soft"):
            raise DataError(f"a sharded head trains on labels of form single, multi or soft, not {labels.form}.")
        ids = labels.ids_BP
        weights = getattr(labels, "weights_BP", None) if labels.form == "soft" else None
    ids = ids[:, None] if ids.ndim == 1 else ids
    if ids.dtype != torch.int64:
        raise TypeError(f"class ids must be int64 (narrower types lose large ids), got {ids.dtype}")
    if ids.ndim != 2 or len(ids) != count:
        raise ValueError(f"class ids of shape {tuple(ids.shape)} don't fit {count} embeddings")
    return ids, weights


def gather_batch(
    ranks: Ranks, x_BD: Tensor, ids_BP: Tensor, weight_B: Tensor, target_BP: Tensor | None, same: dict[str, int]
) -> tuple[GlobalBatch, list[int]]:
    """The batch of all ranks and the ranks' sizes. Sizes travel first, so that they may differ.

    Args:
        same: numbers that must be equal on every rank.

    Raises:
        DataError: they aren't, as when ranks were built for different jobs or resumed at different steps.
    """
    numbers = [len(x_BD), ids_BP.shape[1], int(target_BP is not None), *same.values()]
    table = ranks.gather_numbers(numbers, x_BD.device)
    for rank, row in enumerate(table):
        for name, mine, theirs in zip(same, numbers[3:], row[3:], strict=True):
            if mine != theirs:
                raise DataError(f"the ranks don't share one head: {name} is {mine} here and {theirs} on rank {rank}.")
    counts, width = [row[0] for row in table], max(row[1] for row in table)
    soft = any(row[2] for row in table)
    # everything travels in one message, as bytes
    columns = [_padded(ids_BP, width, -1), weight_B.to(torch.float64)[:, None]]
    if soft:
        target_BP = (ids_BP >= 0).double() if target_BP is None else target_BP
        columns.append(_padded(target_BP.to(torch.float64), width, 0.0))
    packed = torch.cat([part.contiguous().view(torch.uint8) for part in (x_BD.contiguous(), *columns)], dim=1)
    packed = ranks.gather_rows(packed, counts)
    sizes = [part.shape[1] * part.element_size() for part in (x_BD, *columns)]
    parts = [part.contiguous() for part in packed.split(sizes, dim=1)]
    lo = sum(counts[: ranks.rank])
    batch = GlobalBatch(
        parts[0].view(x_BD.dtype),
        parts[1].view(torch.int64),
        parts[2].view(torch.float64)[:, 0].to(x_BD.dtype),
        lo,
        lo + len(x_BD),
        parts[3].view(torch.float64).to(x_BD.dtype) if soft else None,
    )
    return batch, counts


def _padded(values: Tensor, width: int, fill: float) -> Tensor:
    if values.shape[1] == width:
        return values
    out = values.new_full((len(values), width), fill)
    out[:, : values.shape[1]] = values
    return out


def check_batch(batch: GlobalBatch, counts: Sequence[int], num_classes: int) -> None:
    """Every rank sees the whole batch, so every rank raises.

    Raises:
        NotFiniteError: an embedding holds NaN or infinite values.
        DataError: a weight or target that is negative or not a number, a class id out of range, a sample with
            weight and no positive.
    """
    if not len(batch.x_ND):
        return
    ids_NP, used_N = batch.ids_NP, batch.weight_N > 0
    if not bool(torch.isfinite(batch.x_ND).all()):
        bad = (~torch.isfinite(batch.x_ND).all(dim=1)).nonzero()[:, 0]
        raise NotFiniteError(f"the embedding of {where(int(bad[0]), counts)} holds NaN or infinite values")
    for name, value in (("weight", batch.weight_N[:, None]), ("label weight", batch.target_NP)):
        if value is not None:
            wrong = ~((value >= 0) & torch.isfinite(value)).all(dim=1)
            if bool(wrong.any()):
                at = where(int(wrong.nonzero()[0]), counts)
                raise DataError(f"the {name} of {at} is negative or not a number.")
    if ids_NP.numel() and (int(ids_NP.max()) >= num_classes or int(ids_NP.min()) < -1):
        row, column = ((ids_NP >= num_classes) | (ids_NP < -1)).nonzero()[0].tolist()
        raise DataError(
            f"label {int(ids_NP[row, column])} of {where(row, counts)} is out of range: class ids run "
            f"from 0 to {num_classes - 1} (-1 pads)."
        )
    empty_N = used_N & ~(ids_NP >= 0).any(dim=1)
    if bool(empty_N.any()):
        raise DataError(
            f"{where(int(empty_N.nonzero()[0]), counts)} has no positive class. Drop such "
            "samples or give them weight 0."
        )


def where(index: int, counts: Sequence[int]) -> str:
    """`sample 3 of rank 1's batch`."""
    rank = 0
    while index >= counts[rank]:
        index -= counts[rank]
        rank += 1
    return f"sample {index} of rank {rank}'s batch"
