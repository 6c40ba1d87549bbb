"""The k best classes of each query over many rows, chunk by chunk; imports nothing but torch.

A chunk of scores is first compared with each query's k-th best so far; what is better waits beside the best until
there are many to sort. So nearly all the work is the matrix product and one pass for its maxima, and no more than one
chunk of scores exists.

Shape legend: Q queries, q those of a tile, g those with something to gain, R rows (classes), D embedding size, k
results, m candidates.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from labelmill.heads.ranks import Ranks

QUERIES_A_TILE = 1024


def topk_rows(
    queries_QD: Tensor, rows_RD: Tensor, k: int, offset: int = 0, normalize_rows: bool = False
) -> tuple[Tensor, Tensor]:
    """Scores (Q, k), highest first, and class ids (Q, k) int64 of the rows with the largest inner products.

    Equal scores are ordered by class id. With fewer than k rows the rest is filled with score -inf and id -1.

    Args:
        queries_QD: floating; its dtype is that of the scores.
        rows_RD: any floating dtype; cast chunk by chunk.
        offset: class id of the first row.
        normalize_rows: divide by each row's length (rows that are not stored as unit vectors).

    Raises:
        ValueError: k < 1.
        FloatingPointError: queries that are not finite.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    best = [_Best(tile_qD, k) for tile_qD in queries_QD.split(QUERIES_A_TILE)]
    for first, chunk_RD, scale_R in row_chunks(queries_QD, rows_RD, normalize_rows):
        for tile in best:
            scores_qR = tile.queries_qD @ chunk_RD.t()
            tile.add(scores_qR if scale_R is None else scores_qR.mul_(scale_R), offset + first)
    for tile in best:
        tile.settle()
    if not best:
        return queries_QD.new_empty(0, k), torch.empty(0, k, dtype=torch.int64, device=queries_QD.device)
    return torch.cat([tile.scores_qm[:, :k] for tile in best]), torch.cat([tile.ids_qm[:, :k] for tile in best])


def row_chunks(
    queries_QD: Tensor, rows_RD: Tensor, normalize_rows: bool = False, multiple: int = 1
) -> Iterator[tuple[int, Tensor, Tensor | None]]:
    """(first row, rows of the queries' dtype, factor of their scores) of each chunk, of a multiple of so many rows.

    Raises FloatingPointError for queries that are not finite.
    """
    if not bool(torch.isfinite(queries_QD).all()):
        raise FloatingPointError("queries hold NaN or infinite values")
    # about 1024 rows keep the product in cache; few queries take more, or calls would outweigh the work
    step = -(-max(1024, min(8192, 2**17 // max(1, len(queries_QD)))) // multiple) * multiple
    for first in range(0, rows_RD.shape[0], step):
        chunk_RD = rows_RD[first : first + step].to(queries_QD.dtype)
        scale_R = None
        if normalize_rows:
            scale_R = torch.linalg.vector_norm(chunk_RD, dim=1).clamp_min_(1e-12).reciprocal_()
        yield first, chunk_RD, scale_R


def merge_topk(scores_Qm: Tensor, ids_Qm: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The best k of m candidates a query. Among equal scores the candidate that stands first wins."""
    order_Qk = torch.sort(scores_Qm, dim=1, descending=True, stable=True).indices[:, :k]
    return scores_Qm.gather(1, order_Qk), ids_Qm.gather(1, order_Qk)


def topk_sharded(
    ranks: Ranks, x_ND: Tensor, counts: list[int], w_CD: Tensor, k: int, start: int, group: int, normalize: bool
) -> tuple[Tensor, Tensor]:
    """The best k classes of own samples over all ranks' rows: scores (B, k) and class ids (B, k). Collective.

    Args:
        x_ND, counts: the samples of all ranks and how many are of each.
        w_CD: own rows, `group` of them a class, the first of class `start`. A class counts by its best row.
    """
    found = topk_rows(x_ND, w_CD, k * group, start * group, normalize_rows=normalize)
    scores_Nk, ids_Nk = found if group == 1 else _best_of_classes(*found, group, k)
    first = sum(counts[: ranks.rank])
    even, mine = [len(x_ND)] * ranks.world, slice(first, first + counts[ranks.rank])
    scores = ranks.gather_rows(scores_Nk, even).view(ranks.world, len(x_ND), k)[:, mine]
    ids = ranks.gather_rows(ids_Nk, even).view(ranks.world, len(x_ND), k)[:, mine]
    # ranks own ascending classes, so that among equal scores the lower class stands first
    return merge_topk(scores.transpose(0, 1).flatten(1), ids.transpose(0, 1).flatten(1), k)


def _best_of_classes(scores_Nm: Tensor, rows_Nm: Tensor, group: int, k: int) -> tuple[Tensor, Tensor]:
    """The best k classes from the best k * group rows: every class by its best sub-centre."""
    class_Nm = torch.where(rows_Nm < 0, -1, torch.div(rows_Nm, group, rounding_mode="floor"))
    # rows come best first: by class, stably, the first of each is its best
    order_Nm = torch.sort(class_Nm, dim=1, stable=True).indices
    class_Nm, scores_Nm = class_Nm.gather(1, order_Nm), scores_Nm.gather(1, order_Nm)
    again_Nm = torch.zeros_like(class_Nm, dtype=torch.bool)
    again_Nm[:, 1:] = class_Nm[:, 1:] == class_Nm[:, :-1]
    scores_Nm = scores_Nm.masked_fill(again_Nm | (class_Nm < 0), -torch.inf)
    return merge_topk(scores_Nm, class_Nm, k)


class _Best:
    """The best k of a tile of queries so far, in order, and behind them candidates by class id."""

    def __init__(self, queries_qD: Tensor, k: int) -> None:
        self.queries_qD, self.k = queries_qD, k
        self.width = 3 * k + 32
        self.scores_qm = queries_qD.new_full((len(queries_qD), self.width), -torch.inf)
        self.ids_qm = torch.full_like(self.scores_qm, -1, dtype=torch.int64)
        self.count_q = torch.full((len(queries_qD),), k, device=queries_qD.device)

    def settle(self) -> None:
        """Sorts the candidates in."""
        row_g = (self.count_q > self.k).nonzero()[:, 0]
        if row_g.numel():
            scores_gk, ids_gk = merge_topk(self.scores_qm[row_g], self.ids_qm[row_g], self.k)
            self._put(row_g, scores_gk, ids_gk)

    def _put(self, row_g: Tensor, scores_gk: Tensor, ids_gk: Tensor) -> None:
        self.scores_qm[row_g, : self.k] = scores_gk
        self.ids_qm[row_g, : self.k] = ids_gk
        self.scores_qm[row_g, self.k :] = -torch.inf
        self.count_q[row_g] = self.k

    def add(self, new_qR: Tensor, offset: int) -> None:
        """Takes a chunk of scores; `offset` is its first class. Chunks come in the order of class ids."""
        # strictly better only: an equal score of a later class never displaces an earlier one
        gain_g = (new_qR.amax(dim=1) > self.scores_qm[:, self.k - 1]).nonzero()[:, 0]
        if not gain_g.numel():
            return
        new_gR = new_qR if gain_g.numel() == new_qR.shape[0] else new_qR[gain_g]
        better_gR = new_gR > self.scores_qm[gain_g, self.k - 1, None]
        more_g = better_gR.sum(dim=1)
        if bool((self.count_q[gain_g] + more_g > self.width).any()):
            self.settle()
            better_gR &= new_gR > self.scores_qm[gain_g, self.k - 1, None]
            more_g = better_gR.sum(dim=1)
            if int(more_g.max()) > self.width - self.k:  # the first chunk, or scores that rise with the id
                better_gR &= new_gR >= new_gR.topk(min(self.k, new_gR.shape[1]), dim=1).values[:, -1:]
                self._merge(gain_g, new_gR, better_gR, offset)
                return
        row, column = better_gR.nonzero(as_tuple=True)  # by query, then by class id
        place = self.count_q[gain_g][row] + _place_in_group(row, more_g)
        self.scores_qm[gain_g[row], place] = new_gR[row, column]
        self.ids_qm[gain_g[row], place] = column + offset
        self.count_q[gain_g] += more_g

    def _merge(self, gain_g: Tensor, new_gR: Tensor, better_gR: Tensor, offset: int) -> None:
        """Sorts any number of candidates in at once."""
        row, column = better_gR.nonzero(as_tuple=True)
        more_g = better_gR.sum(dim=1)
        place = _place_in_group(row, more_g)
        found_gm = new_gR.new_full((gain_g.numel(), int(more_g.max())), -torch.inf)
        found_gm[row, place] = new_gR[row, column]
        which_gm = torch.full_like(found_gm, -1, dtype=torch.int64)
        which_gm[row, place] = column + offset
        scores_gm = torch.cat([self.scores_qm[gain_g, : self.k], found_gm], dim=1)
        ids_gm = torch.cat([self.ids_qm[gain_g, : self.k], which_gm], dim=1)
        self._put(gain_g, *merge_topk(scores_gm, ids_gm, self.k))


def _place_in_group(row: Tensor, count_g: Tensor) -> Tensor:
    """0, 1, ... within each run of equal `row`, which ascends."""
    start_g = count_g.cumsum(0) - count_g
    return torch.arange(row.numel(), device=row.device) - start_g[row]
