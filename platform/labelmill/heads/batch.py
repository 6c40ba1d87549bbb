"""The batch of all ranks: gathered in two collectives, and checked so that every rank raises alike.

Where ranks form several replicas, embeddings travel within a replica only, labels and weights everywhere.

Shape legend: B samples of this rank, N samples of this replica's ranks, W samples of all replicas, P positives of a
sample (padded with -1), D embedding size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from labelmill.errors import DataError
from labelmill.heads.ranks import Grid, Ranks
from labelmill.losses.classification import SampleError


class NotFiniteError(FloatingPointError):
    """Embeddings, class rows or a loss hold NaN or infinite values; every rank raises it and nothing was changed.

    The training loop leaves such a step out, and raises it after more of them than the job allows.
    """


class HasIds(Protocol):
    """Labels in batch form, as `labelmill.data.labels.Labels`."""

    @property
    def form(self) -> str: ...

    @property
    def ids_BP(self) -> Tensor: ...


@dataclass
class WholeBatch:
    """What a replica knows of the batch of all replicas.

    Attributes:
        weight_sum: of all samples.
        positive_T: global ids of the positives of all samples with weight; may repeat.
        most: samples of the largest replica.
    """

    weight_sum: Tensor
    positive_T: Tensor
    most: int


@dataclass
class GlobalBatch:
    """The batch of this replica's ranks; `lo`, `hi` is this rank's part. `target_NP` are the weights of soft labels.

    `whole` is None where there is one replica. `counts` are the sizes of the ranks' batches, `first` the first rank.
    """

    x_ND: Tensor
    ids_NP: Tensor
    weight_N: Tensor
    lo: int
    hi: int
    counts: list[int]
    target_NP: Tensor | None = None
    whole: WholeBatch | None = None
    first: int = 0


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
) -> GlobalBatch:
    """The batch of all ranks. Sizes travel first, so that they may differ.

    Args:
        same: numbers that must be equal on every rank.

    Raises:
        DataError: they aren't, as when ranks were built for different jobs or resumed at different steps.
    """
    table = _gather_sizes(ranks, [len(x_BD), ids_BP.shape[1], int(target_BP is not None)], same, x_BD.device)
    counts = [row[0] for row in table]
    parts = _gather_bytes(ranks, [x_BD, *_columns(table, ids_BP, weight_B, target_BP)], counts)
    lo = sum(counts[: ranks.rank])
    return GlobalBatch(
        parts[0].view(x_BD.dtype),
        parts[1].view(torch.int64),
        parts[2].view(torch.float64)[:, 0].to(x_BD.dtype),
        lo,
        lo + len(x_BD),
        counts,
        parts[3].view(torch.float64).to(x_BD.dtype) if len(parts) > 3 else None,
    )


def gather_replica(
    grid: Grid,
    x_BD: Tensor,
    ids_BP: Tensor,
    weight_B: Tensor,
    target_BP: Tensor | None,
    same: dict[str, int],
    num_classes: int,
) -> GlobalBatch:
    """The batch of this replica, with what it needs of the others. Every rank raises alike, as `check_batch`."""
    world, replicas, dtype = grid.world, grid.replicas, x_BD.dtype
    numbers = [len(x_BD), ids_BP.shape[1], int(target_BP is not None), _first_broken(x_BD)]
    table = _gather_sizes(world, numbers, same, x_BD.device)
    counts = [row[0] for row in table]
    parts = _gather_bytes(world, _columns(table, ids_BP, weight_B, target_BP), counts)
    _refuse_broken([row[3] for row in table])
    ids_WP, weight_W = parts[0].view(torch.int64), parts[1].view(torch.float64)[:, 0].to(dtype)
    target_WP = parts[2].view(torch.float64).to(dtype) if len(parts) > 2 else None
    check_labels(ids_WP, weight_W, target_WP, counts, num_classes)
    ours = slice(replicas.rank * grid.shards.world, (replicas.rank + 1) * grid.shards.world)
    begin, lo = sum(counts[: ours.start]), sum(counts[ours.start : world.rank])
    part = slice(begin, begin + sum(counts[ours]))
    positive_WP = ids_WP[weight_W > 0]
    by_replica = [sum(counts[r : r + grid.shards.world]) for r in range(0, world.world, grid.shards.world)]
    return GlobalBatch(
        grid.shards.gather_rows(x_BD, counts[ours]),
        ids_WP[part],
        weight_W[part],
        lo,
        lo + len(x_BD),
        counts[ours],
        None if target_WP is None else target_WP[part],
        WholeBatch(weight_W.sum(), positive_WP[positive_WP >= 0], max(by_replica)),
        ours.start,
    )


def gather_queries(grid: Grid, x_BD: Tensor, numbers: Sequence[int] = ()) -> tuple[Tensor, list[int], list[list[int]]]:
    """Embeddings of this replica's ranks (N, D) and their ranks' sizes; every rank's batch size and `numbers`.

    Collective over all ranks. Raises NotFiniteError on all of them alike.
    """
    table = grid.world.gather_numbers([_first_broken(x_BD), len(x_BD), *numbers], x_BD.device)
    _refuse_broken([row[0] for row in table])
    first = grid.replicas.rank * grid.shards.world
    counts = [row[1] for row in table[first : first + grid.shards.world]]
    return grid.shards.gather_rows(x_BD, counts), counts, [row[1:] for row in table]


def check_finite(ranks: Ranks, *emb_BD: Tensor) -> list[int]:
    """The ranks' batch sizes. Collective. Raises NotFiniteError on all ranks alike if one of a rank's tensors isn't
    finite."""
    broken = max(_first_broken(part_BD) for part_BD in emb_BD)
    table = ranks.gather_numbers([broken, len(emb_BD[0])], emb_BD[0].device)
    _refuse_broken([row[0] for row in table])
    return [row[1] for row in table]


def _first_broken(x_BD: Tensor) -> int:
    """The first sample that isn't finite; -1 if all are."""
    finite_B = torch.isfinite(x_BD).all(dim=1)
    return -1 if bool(finite_B.all()) else int((~finite_B).nonzero()[0])


def _refuse_broken(broken: Sequence[int]) -> None:
    """Raises NotFiniteError for the first of the ranks' `_first_broken`."""
    for rank, index in enumerate(broken):
        if index >= 0:
            raise NotFiniteError(f"the embedding of {named(rank, index)} holds NaN or infinite values")


def _gather_sizes(ranks: Ranks, numbers: list[int], same: dict[str, int], device: torch.device) -> list[list[int]]:
    """Each rank's numbers; raises DataError unless those in `same` are equal."""
    table = ranks.gather_numbers([*numbers, *same.values()], device)
    for rank, row in enumerate(table):
        for (name, mine), theirs in zip(same.items(), row[len(numbers) :], strict=True):
            if mine != theirs:
                raise DataError(f"the ranks don't share one head: {name} is {mine} here and {theirs} on rank {rank}.")
    return table


def _columns(table: list[list[int]], ids_BP: Tensor, weight_B: Tensor, target_BP: Tensor | None) -> list[Tensor]:
    """Ids, weights and, if any rank has soft labels, their weights, as wide as the widest rank's."""
    width, soft = max(row[1] for row in table), any(row[2] for row in table)
    columns = [_padded(ids_BP, width, -1), weight_B.to(torch.float64)[:, None]]
    if soft:
        target_BP = (ids_BP >= 0).double() if target_BP is None else target_BP
        columns.append(_padded(target_BP.to(torch.float64), width, 0.0))
    return columns


def _gather_bytes(ranks: Ranks, columns: list[Tensor], counts: list[int]) -> list[Tensor]:
    """Columns of all ranks, as bytes: they travel in one message."""
    packed = torch.cat([part.contiguous().view(torch.uint8) for part in columns], dim=1)
    packed = ranks.gather_rows(packed, counts)
    sizes = [part.shape[1] * part.element_size() for part in columns]
    return [part.contiguous() for part in packed.split(sizes, dim=1)]


def _padded(values: Tensor, width: int, fill: float) -> Tensor:
    if values.shape[1] == width:
        return values
    out = values.new_full((len(values), width), fill)
    out[:, : values.shape[1]] = values
    return out


def check_batch(batch: GlobalBatch, num_classes: int) -> None:
    """Every rank sees the whole batch, so every rank raises.

    Raises:
        NotFiniteError: an embedding holds NaN or infinite values.
        SampleError: a weight or target that is negative or not a number, a class id out of range, a sample with
            weight and no positive.
    """
    counts = batch.counts
    if not len(batch.x_ND):
        return
    if not bool(torch.isfinite(batch.x_ND).all()):
        rank, index, _ = locate(_first_broken(batch.x_ND), counts)
        _refuse_broken([index if r == rank else -1 for r in range(len(counts))])
    check_labels(batch.ids_NP, batch.weight_N, batch.target_NP, counts, num_classes)


def check_labels(
    ids_NP: Tensor, weight_N: Tensor, target_NP: Tensor | None, counts: Sequence[int], num_classes: int
) -> None:
    """The part of `check_batch` that needs no embeddings."""
    for name, value in (("weight", weight_N[:, None]), ("label weight", target_NP)):
        if value is not None:
            wrong = ~((value >= 0) & torch.isfinite(value)).all(dim=1)
            if bool(wrong.any()):
                index = int(wrong.nonzero()[0])
                raise SampleError(
                    f"the {name} of {{sample}} is negative or not a number.", index, locate(index, counts)
                )
    if ids_NP.numel() and (int(ids_NP.max()) >= num_classes or int(ids_NP.min()) < -1):
        row, column = ((ids_NP >= num_classes) | (ids_NP < -1)).nonzero()[0].tolist()
        raise wrong_label(int(ids_NP[row, column]), row, locate(row, counts), num_classes)
    empty_N = (weight_N > 0) & ~(ids_NP >= 0).any(dim=1)
    if bool(empty_N.any()):
        index = int(empty_N.nonzero()[0])
        text = "{sample} has no positive class. Drop such samples or give them weight 0."
        raise SampleError(text, index, locate(index, counts))


def wrong_label(label: int, index: int, at: tuple[int, int, int], num_classes: int) -> SampleError:
    """The error for a class id out of range."""
    text = f"label {label} of {{sample}} is out of range: class ids run from 0 to {num_classes - 1} (-1 pads)."
    return SampleError(text, index, at)


def locate(index: int, counts: Sequence[int], first: int = 0) -> tuple[int, int, int]:
    """(rank, place in its batch, size of that) of a sample of the ranks `first`, `first` + 1, ..."""
    rank = 0
    while index >= counts[rank]:
        index -= counts[rank]
        rank += 1
    return first + rank, index, counts[rank]


def first_error(world: Ranks, error: Exception | None) -> Exception:
    """The error of the first rank that has one, the same on all ranks. Collective; at least one has."""
    kinds = {kind.__name__: kind for kind in (SampleError, NotFiniteError, DataError)}
    told = None
    if error is not None:
        kind = next(name for name, kind in kinds.items() if isinstance(error, kind))
        told = (kind, (error.text, error.index, error.at) if isinstance(error, SampleError) else (str(error),))
    everyone: list[Any] = [None] * world.world
    dist.all_gather_object(everyone, told, group=world.group)
    kind, args = next(item for item in everyone if item is not None)
    return kinds[kind](*args)


def named(rank: int, index: int) -> str:
    """`sample 3 of rank 1's batch`."""
    return f"sample {index} of rank {rank}'s batch"
