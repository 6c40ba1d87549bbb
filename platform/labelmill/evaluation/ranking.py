"""Ranked predictions and embedding spaces: top-k accuracy, retrieval recall, nearest neighbours, cosines.

B queries, N base rows, K kept results, P true labels (padded with -1), D embedding width.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from labelmill.errors import DataError

_BLOCK = 16_384  # base rows compared at a time: B x block similarities in memory, never B x N


def hits(top_BK: torch.Tensor, target_BP: torch.Tensor) -> torch.Tensor:
    """bool (B, K): is the k-th result one of the true labels? `target` is (B,) or (B, P), padded -1."""
    target_BP = target_BP[:, None] if target_BP.dim() == 1 else target_BP
    known_BP = target_BP >= 0
    return ((top_BK[:, :, None] == target_BP[:, None, :]) & known_BP[:, None, :]).any(dim=2)


def topk_accuracy(
    hits_BK: torch.Tensor, ks: Iterable[int] = (1, 5), weight_B: torch.Tensor | None = None
) -> dict[str, float]:
    """{"top1": ..., "top5": ...}: share of queries with a hit among the first k.

    `weight_B` (0 leaves a query out). Raises ValueError when k exceeds the kept results or no query counts.
    """
    weight = torch.ones(len(hits_BK), dtype=torch.float64) if weight_B is None else weight_B.double().cpu()
    if not float(weight.sum()) > 0:
        raise ValueError("top-k accuracy of no query")
    result = {}
    for k in ks:
        if not 1 <= k <= hits_BK.shape[1]:
            raise ValueError(f"top-{k} needs {k} results a query, there are {hits_BK.shape[1]}")
        correct = hits_BK[:, :k].any(dim=1).double().cpu()
        result[f"top{k}"] = float((correct * weight).sum() / weight.sum())
    return result


def with_prior(
    score_BK: torch.Tensor, id_BK: torch.Tensor, log_prior_C: torch.Tensor, weight: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ranked classes again by score + weight * log prior of the class; equal scores keep their order.

    Logit adjustment after training (Menon et al., ICLR 2021, eq. 9, with the sign of a deployment whose classes are as
    frequent as the prior says). `weight` belongs to a development set.
    """
    adjusted_BK = score_BK + weight * log_prior_C[id_BK]
    order_BK = adjusted_BK.argsort(dim=1, descending=True, stable=True)
    return adjusted_BK.gather(1, order_BK), id_BK.gather(1, order_BK)


def mean_reciprocal_rank(hits_BK: torch.Tensor) -> float:
    """Mean of 1 / rank of the first hit, 0 where there is none among the K results."""
    rank_K = torch.arange(1, hits_BK.shape[1] + 1, dtype=torch.float64, device=hits_BK.device)
    return float((hits_BK.double() / rank_K).max(dim=1).values.mean())


def unit_rows(emb_ND: torch.Tensor, what: str = "embeddings") -> torch.Tensor:
    """float rows of length 1. Raises DataError, naming the first row, when a row is zero or not finite."""
    emb_ND = emb_ND.float()
    norm_N = emb_ND.norm(dim=1)
    bad = ~torch.isfinite(norm_N) | (norm_N == 0)
    if bool(bad.any()):
        first = int(bad.nonzero()[0, 0])
        raise DataError(
            f"{what}: row {first} has length {float(norm_N[first])}; {int(bad.sum())} of {len(emb_ND)} rows "
            "are zero or not finite and have no direction"
        )
    return emb_ND / norm_N[:, None]


def nearest_neighbours(
    query_BD: torch.Tensor, base_ND: torch.Tensor, k: int, exclude_self: bool = False, block: int = _BLOCK
) -> tuple[torch.Tensor, torch.Tensor]:
    """(cosine_BK, id_BK) of the k base rows nearest by cosine, best first, the lower id first among equals.

    `exclude_self`: query row i is base row i and is left out. At most B x block similarities exist at a time.
    Raises ValueError when fewer than k base rows are left.
    """
    available = len(base_ND) - int(exclude_self)
    if not 1 <= k <= available:
        raise ValueError(f"{k} neighbours asked for, {available} rows to choose from")
    query_BD, base_ND = unit_rows(query_BD, "queries"), unit_rows(base_ND, "base")
    best_BK = torch.full((len(query_BD), 0), -torch.inf, device=query_BD.device)
    id_BK = torch.zeros((len(query_BD), 0), dtype=torch.int64, device=query_BD.device)
    for lo in range(0, len(base_ND), block):
        cos_BN = query_BD @ base_ND[lo : lo + block].T
        if exclude_self:
            rows = torch.arange(lo, min(lo + cos_BN.shape[1], len(query_BD)), device=cos_BN.device)
            cos_BN[rows, rows - lo] = -torch.inf
        best_BK, id_BK = merge_top(best_BK, id_BK, cos_BN, lo, k)
    return best_BK, id_BK


def merge_top(
    best_BK: torch.Tensor, id_BK: torch.Tensor, score_BN: torch.Tensor, first_id: int, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k best of a kept list and a block of scores from `first_id` on; lower id first."""
    new_BK, column_BK = score_BN.topk(min(k, score_BN.shape[1]), dim=1)
    # topk takes any of the equals at its edge; where there are some, sort the row to take the lower ids
    tied = ((score_BN >= new_BK[:, -1:]).sum(dim=1) > new_BK.shape[1]).nonzero()[:, 0]
    if len(tied):
        column_BK[tied] = score_BN[tied].argsort(dim=1, descending=True, stable=True)[:, : new_BK.shape[1]]
        new_BK[tied] = score_BN[tied].gather(1, column_BK[tied])
    score = torch.cat([best_BK, new_BK], dim=1)
    ids = torch.cat([id_BK, column_BK + first_id], dim=1)
    by_id = ids.argsort(dim=1, stable=True)
    score, ids = score.gather(1, by_id), ids.gather(1, by_id)
    order = score.argsort(dim=1, descending=True, stable=True)[:, :k]
    return score.gather(1, order), ids.gather(1, order)


def retrieval_recall(
    emb_ND: torch.Tensor, label_N: torch.Tensor, ks: Iterable[int] = (1, 5), block: int = 1024
) -> dict[str, float]:
    """{"recall@1": ...}: share of rows with a row of the same label among the k nearest others.

    Rows whose label occurs once have nothing to find and are left out. ValueError when that is all.
    """
    ks = tuple(ks)
    _, inverse, counts = label_N.unique(return_inverse=True, return_counts=True)
    rows = (counts[inverse] > 1).nonzero()[:, 0]
    if not len(rows):
        raise ValueError("retrieval recall needs a label with at least two rows")
    unit_ND = unit_rows(emb_ND)
    found = dict.fromkeys(ks, 0)
    for lo in range(0, len(rows), block):
        here = rows[lo : lo + block]
        _, near = nearest_neighbours(unit_ND[here], unit_ND, min(max(ks) + 1, len(unit_ND)))
        # the row itself is dropped by position in the list, since duplicates may rank before it
        other = near != here[:, None]
        same = (label_N[near] == label_N[here][:, None]) & other
        place = other.cumsum(dim=1)
        for k in ks:
            found[k] += int((same & (place <= k)).any(dim=1).sum())
    return {f"recall@{k}": found[k] / len(rows) for k in ks}


def cosine_summary(
    emb_ND: torch.Tensor, label_N: torch.Tensor, pairs: int = 20_000, seed: int = 0
) -> dict[str, object]:
    """Cosines of random pairs with the same and with different labels: means, spread, separation and samples.

    `separation` is the chance that a same-label pair is nearer than a different-label pair (the area under
    the ROC curve); `same` and `different` hold the cosines themselves, for a histogram.
    """
    generator = torch.Generator().manual_seed(seed)
    unit_ND, label_N = unit_rows(emb_ND).cpu(), label_N.cpu()
    size = len(label_N)
    if size < 2:
        raise ValueError("cosine summary needs at least two rows")
    order = label_N.argsort(stable=True)
    _, counts = label_N[order].unique_consecutive(return_counts=True)
    start = counts.cumsum(0) - counts
    cluster = torch.repeat_interleave(torch.arange(len(counts)), counts)
    many = (counts[cluster] > 1).nonzero()[:, 0]
    same = torch.zeros(0)
    if len(many):
        left = many[torch.randint(len(many), (pairs,), generator=generator)]
        group = cluster[left]
        step = 1 + (torch.rand(pairs, generator=generator) * (counts[group] - 1)).long().clamp_max(counts[group] - 2)
        right = start[group] + (left - start[group] + step) % counts[group]
        same = (unit_ND[order[left]] * unit_ND[order[right]]).sum(dim=1)
    a = torch.randint(size, (pairs,), generator=generator)
    b = torch.randint(size, (pairs,), generator=generator)
    apart = label_N[a] != label_N[b]
    different = (unit_ND[a[apart]] * unit_ND[b[apart]]).sum(dim=1)
    summary: dict[str, object] = {"same": same.numpy(), "different": different.numpy()}
    for name, values in (("same", same), ("different", different)):
        summary[f"{name}_mean"] = float(values.mean()) if len(values) else float("nan")
        summary[f"{name}_std"] = float(values.std(unbiased=False)) if len(values) else float("nan")
    summary["separation"] = _chance_greater(same, different)
    return summary


def _chance_greater(high: torch.Tensor, low: torch.Tensor) -> float:
    """P(high > low) + P(equal) / 2 of two samples (Mann and Whitney)."""
    if not len(high) or not len(low):
        return float("nan")
    ordered = low.sort().values
    below = torch.searchsorted(ordered, high.contiguous(), right=False).double()
    upto = torch.searchsorted(ordered, high.contiguous(), right=True).double()
    return float(((below + upto) / 2).mean() / len(low))
