"""The k best classes of each query over many rows, chunk by chunk; imports nothing but torch.

A chunk of scores is first compared with each query's k-th best so far: after the first chunks few queries
have anything to gain, so a chunk costs one matrix product and one pass for its maxima.

Shape legend: Q queries, R rows (classes), D embedding size, k results.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROWS_A_CHUNK = 1024
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
        normalize_rows: divide each row by its length (rows that are not stored as unit vectors).

    Raises:
        ValueError: k < 1.
        FloatingPointError: queries that are not finite.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    if not bool(torch.isfinite(queries_QD).all()):
        raise FloatingPointError("queries hold NaN or infinite values")
    scores_Qk = queries_QD.new_full((queries_QD.shape[0], k), -torch.inf)
    ids_Qk = torch.full_like(scores_Qk, -1, dtype=torch.int64)
    for first in range(0, rows_RD.shape[0], ROWS_A_CHUNK):
        chunk_RD = rows_RD[first : first + ROWS_A_CHUNK].to(queries_QD.dtype)
        if normalize_rows:
            chunk_RD = torch.nn.functional.normalize(chunk_RD, dim=1)
        for lo in range(0, queries_QD.shape[0], QUERIES_A_TILE):
            tile = slice(lo, lo + QUERIES_A_TILE)
            new_qR = queries_QD[tile] @ chunk_RD.t()
            _keep_best(scores_Qk[tile], ids_Qk[tile], new_qR, offset + first)
    return scores_Qk, ids_Qk


def merge_topk(scores_Qm: Tensor, ids_Qm: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The best k of m candidates a query. Among equal scores the candidate that stands first wins."""
    order_Qk = torch.sort(scores_Qm, dim=1, descending=True, stable=True).indices[:, :k]
    return scores_Qm.gather(1, order_Qk), ids_Qm.gather(1, order_Qk)


def _keep_best(scores_qk: Tensor, ids_qk: Tensor, new_qR: Tensor, offset: int) -> None:
    """Merges a chunk of scores into the running best, in place. Chunks come in the order of class ids."""
    k = scores_qk.shape[1]
    # strictly better only: an equal score of a later class never displaces an earlier one
    gain_g = (new_qR.amax(dim=1) > scores_qk[:, -1]).nonzero()[:, 0]
    if not gain_g.numel():
        return
    new_gR = new_qR if gain_g.numel() == new_qR.shape[0] else new_qR[gain_g]
    better_gR = new_gR > scores_qk[gain_g, -1:]
    most = int(better_gR.sum(dim=1).max())
    if most > 4 * k + 16:  # the first chunk, or scores that rise with the id: raise the threshold first
        better_gR &= new_gR >= new_gR.topk(min(k, new_gR.shape[1]), dim=1).values[:, -1:]
        most = int(better_gR.sum(dim=1).max())
    row, column = better_gR.nonzero(as_tuple=True)  # by query, then by class id
    start_g = torch.searchsorted(row, torch.arange(gain_g.numel(), device=row.device))
    place = torch.arange(row.numel(), device=row.device) - start_g[row]
    found_gm = new_gR.new_full((gain_g.numel(), most), -torch.inf)
    found_gm[row, place] = new_gR[row, column]
    which_gm = torch.full_like(found_gm, -1, dtype=torch.int64)
    which_gm[row, place] = column + offset
    scores_qk[gain_g], ids_qk[gain_g] = merge_topk(
        torch.cat([scores_qk[gain_g], found_gm], dim=1), torch.cat([ids_qk[gain_g], which_gm], dim=1), k
    )
