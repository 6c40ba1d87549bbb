"""Spherical k-means in pieces that any engine can run block by block, and how good a clustering is.

N rows, K centres, L nearest centres kept, D embedding width. Rows and centres are unit vectors.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from labelmill.evaluation.ranking import merge_top, unit_rows


def assign_top(
    emb_ND: torch.Tensor, centre_KD: torch.Tensor, nearest: int = 1, block: int = 4096
) -> tuple[torch.Tensor, torch.Tensor]:
    """(id_NL int64, cos_NL) of the `nearest` centres by cosine, most similar first.

    Among equals the lower id comes first.

    Holds N x block cosines at a time, never N x K. Both inputs must be unit rows (`unit_rows`).
    Raises ValueError unless 1 <= nearest <= K.
    """
    if not 1 <= nearest <= len(centre_KD):
        raise ValueError(f"{nearest} centres a sample asked for, there are {len(centre_KD)}")
    cos_NL = torch.zeros(len(emb_ND), 0, dtype=emb_ND.dtype, device=emb_ND.device)
    id_NL = torch.zeros(len(emb_ND), 0, dtype=torch.int64, device=emb_ND.device)
    for lo in range(0, len(centre_KD), block):
        cos_NL, id_NL = merge_top(cos_NL, id_NL, emb_ND @ centre_KD[lo : lo + block].T, lo, nearest)
    return id_NL, cos_NL


def accumulate(emb_ND: torch.Tensor, id_N: torch.Tensor, num_centres: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(sum_KD float64, count_K int64) of the rows of every centre: add those of blocks, then `new_centres`.

    float64, so that the order in which blocks are added doesn't show in float32 centres.
    """
    sum_KD = torch.zeros(num_centres, emb_ND.shape[1], dtype=torch.float64, device=emb_ND.device)
    sum_KD.index_add_(0, id_N, emb_ND.double())
    return sum_KD, torch.bincount(id_N, minlength=num_centres)


def new_centres(sum_KD: torch.Tensor, count_K: torch.Tensor, old_KD: torch.Tensor) -> torch.Tensor:
    """Unit centres; one without rows, or whose rows cancel, stays where it was (see `reseed_empty`)."""
    norm_K = sum_KD.norm(dim=1)
    usable = (count_K > 0) & (norm_K > 1e-12)
    fresh_KD = (sum_KD / norm_K.clamp_min(1e-12)[:, None]).to(old_KD.dtype)
    return torch.where(usable[:, None], fresh_KD, old_KD)


def reseed_empty(
    centre_KD: torch.Tensor, count_K: torch.Tensor, pool_ND: torch.Tensor, seed: int
) -> tuple[torch.Tensor, int]:
    """(centres, how many were reseeded): every centre without rows becomes a random row of the pool.

    Rows are drawn without replacement as far as the pool goes; what is left over stays empty.
    """
    empty = (count_K == 0).nonzero()[:, 0]
    if not len(empty) or not len(pool_ND):
        return centre_KD, 0
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(len(pool_ND), generator=generator)[: len(empty)].to(pool_ND.device)
    centre_KD = centre_KD.clone()
    centre_KD[empty[: len(rows)]] = pool_ND[rows].to(centre_KD.dtype)
    return centre_KD, len(rows)


@dataclass(frozen=True)
class Clustering:
    """Centres, nearest centre of every row; per pass the mean cosine and the number of empty centres."""

    centre_KD: torch.Tensor
    id_N: torch.Tensor
    mean_cosine: list[float]
    empty: list[int]


def spherical_kmeans(
    emb_ND: torch.Tensor, num_centres: int, passes: int = 10, seed: int = 0, block: int = 4096
) -> Clustering:
    """Spherical k-means (Dhillon and Modha 2001) in one process: the reference of the distributed one.

    Starts from distinct random rows; `mean_cosine` rises with every pass as long as no centre is reseeded.
    Raises ValueError for more centres than rows, DataError for zero or non-finite rows.
    """
    if not 1 <= num_centres <= len(emb_ND):
        raise ValueError(f"{num_centres} centres asked for, there are {len(emb_ND)} rows")
    if passes < 1:
        raise ValueError(f"passes must be at least 1, not {passes}")
    unit_ND = unit_rows(emb_ND)
    generator = torch.Generator().manual_seed(seed)
    centre_KD = unit_ND[torch.randperm(len(unit_ND), generator=generator)[:num_centres]].clone()
    history: list[float] = []
    empty: list[int] = []
    for turn in range(passes):
        id_N, cosine = _assign_rows(unit_ND, centre_KD, block)
        sum_KD, count_K = accumulate(unit_ND, id_N, num_centres)
        history.append(cosine)
        empty.append(int((count_K == 0).sum()))
        centre_KD = new_centres(sum_KD, count_K, centre_KD)
        centre_KD, _ = reseed_empty(centre_KD, count_K, unit_ND, seed + 1 + turn)
    id_N, cosine = _assign_rows(unit_ND, centre_KD, block)
    return Clustering(centre_KD, id_N, [*history, cosine], empty)


def _assign_rows(unit_ND: torch.Tensor, centre_KD: torch.Tensor, block: int) -> tuple[torch.Tensor, float]:
    ids, total = [], 0.0
    for lo in range(0, len(unit_ND), block):
        id_N1, cos_N1 = assign_top(unit_ND[lo : lo + block], centre_KD, 1, block)
        ids.append(id_N1[:, 0])
        total += float(cos_N1.double().sum())
    return torch.cat(ids), total / len(unit_ND)


def purity(cluster_N: np.ndarray | torch.Tensor, label_N: np.ndarray | torch.Tensor) -> float:
    """Share of rows whose label is the most common label of their cluster."""
    clusters, labels = np.asarray(cluster_N), np.asarray(label_N)
    if not len(clusters):
        raise ValueError("purity of no rows")
    _, c = np.unique(clusters, return_inverse=True)
    _, y = np.unique(labels, return_inverse=True)
    # pairs are counted as they occur: a cluster x label table of a million clusters need not fit
    pairs, counts = np.unique(c.astype(np.int64) * (int(y.max()) + 1) + y, return_counts=True)
    best = np.zeros(int(c.max()) + 1, dtype=np.int64)
    np.maximum.at(best, pairs // (int(y.max()) + 1), counts)
    return float(best.sum() / len(clusters))


def nmi(cluster_N: np.ndarray | torch.Tensor, label_N: np.ndarray | torch.Tensor) -> float:
    """Normalised mutual information of clusters and labels, arithmetic mean of the entropies."""
    from sklearn.metrics import normalized_mutual_info_score

    return float(normalized_mutual_info_score(np.asarray(label_N), np.asarray(cluster_N)))
