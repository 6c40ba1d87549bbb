"""Metrics of extreme multi-label ranking as sums that add up over batches, ranks and files.

P@k, R@k, nDCG@k, propensity-scored PSP@k, macro recall and slices by how frequent a label was in training. Definitions are
those of the extreme classification repository and of Gupta et al. (ICLR 2024): P@k divides by k even where a query has fewer
labels; PSP@k is a ratio of means, not a mean of ratios; propensities (Jain et al., KDD 2016) come from training counts alone.

Shape legend: Q queries, K ranked labels, P true labels of a query (padded with -1), L labels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from labelmill.errors import DataError

PROPENSITIES = {"default": (0.55, 1.5), "amazon": (0.6, 2.6), "wikipedia": (0.5, 0.4)}
"""A and B by kind of data set, as the repository sets them (WikiSeeAlso takes the default)."""
BANDS = ("head", "torso", "tail")


def inverse_propensities(count_L: np.ndarray, num_train: int, a: float = 0.55, b: float = 1.5) -> np.ndarray:
    """1 / propensity of each label, float64 (L,): 1 + C (N_l + B)^-A with C = (ln n - 1)(B + 1)^A.

    Args:
        count_L: training samples of each label. Counts of a test set would leak it: don't.
        num_train: n, training samples.

    Raises DataError for negative counts or counts above n.
    """
    count_L = np.asarray(count_L, np.float64)
    if num_train < 1 or len(count_L) == 0 or count_L.min() < 0 or count_L.max() > num_train:
        raise DataError(f"propensities: training counts must lie between 0 and the {num_train} training samples.")
    c = (math.log(num_train) - 1.0) * (b + 1.0) ** a
    return 1.0 + c * (count_L + b) ** -a


def frequency_bands(count_L: np.ndarray, shares: tuple[float, float] = (0.5, 0.8)) -> np.ndarray:
    """Band of each label, int8 (L,): 0 head, 1 torso, 2 tail.

    The most frequent labels that together have the first share of all training label uses are the head, those up to the
    second share the torso. Labels that training never saw are tail.
    """
    count_L = np.asarray(count_L, np.float64)
    order = np.argsort(-count_L, kind="stable")
    before = np.concatenate([[0.0], np.cumsum(count_L[order])[:-1]]) / max(1.0, count_L.sum())
    band_L = np.full(len(count_L), 2, np.int8)
    band_L[order] = np.searchsorted(np.array(shares), before, side="right")
    band_L[count_L == 0] = 2
    return band_L


@dataclass
class RankedSums:
    """Numerators and denominators; `add` batches, `merge` parts, read `metrics`.

    Args:
        ks: k of P, nDCG and PSP; `recall_ks` those of R.
        inverse_L: of `inverse_propensities`, for PSP; `band_L` of `frequency_bands`, for slices. None leaves them out.
        num_labels: for macro recall and coverage.
    """

    ks: Sequence[int] = (1, 3, 5)
    recall_ks: Sequence[int] = (10, 100)
    inverse_L: np.ndarray | None = None
    band_L: np.ndarray | None = None
    num_labels: int = 0
    queries: int = 0
    empty: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    found_L: np.ndarray = field(default_factory=lambda: np.zeros(0))
    true_L: np.ndarray = field(default_factory=lambda: np.zeros(0))

    def __post_init__(self) -> None:
        if not self.ks or min(*self.ks, *self.recall_ks) < 1:
            raise ValueError(f"k must be at least 1: {list(self.ks)}, {list(self.recall_ks)}")
        if self.num_labels and not len(self.true_L):
            self.found_L, self.true_L = np.zeros(self.num_labels), np.zeros(self.num_labels)

    def add(self, ids_QK: np.ndarray, true_QP: np.ndarray) -> None:
        """Ranked labels, best first, -1 where there is none, and true ones, padded with -1.

        Queries without a true label count in P@k (as 0) and `queries`; R, nDCG and PSP leave them out (`empty`).
        Raises DataError when fewer labels are ranked than the largest k.
        """
        most = max(*self.ks, *self.recall_ks)
        if ids_QK.shape[1] < most:
            raise DataError(
                f"{ids_QK.shape[1]} labels are ranked a query, the metrics need {most}: rank more or lower k."
            )
        ids_QK = ids_QK[:, :most]
        hit_QK = ((ids_QK[:, :, None] == true_QP[:, None, :]) & (true_QP >= 0)[:, None, :]).any(axis=2)
        number_Q = (true_QP >= 0).sum(axis=1)
        some_Q = number_Q > 0
        self.queries += len(ids_QK)
        self.empty += int((~some_Q).sum())
        gain_K = 1.0 / np.log2(np.arange(2, most + 2))
        ideal_K = np.concatenate([[0.0], np.cumsum(gain_K)])
        for k in self.ks:
            hits_Q = hit_QK[:, :k].sum(axis=1)
            self._sum(f"P@{k}", float(hits_Q.sum()) / k)
            dcg_Q = (hit_QK[:, :k] * gain_K[:k]).sum(axis=1)
            self._sum(f"nDCG@{k}", float((dcg_Q[some_Q] / ideal_K[np.minimum(number_Q[some_Q], k)]).sum()))
        for k in self.recall_ks:
            self._sum(f"R@{k}", float((hit_QK[some_Q, :k].sum(axis=1) / number_Q[some_Q]).sum()))
        if self.inverse_L is not None:
            self._add_propensity(ids_QK, true_QP, hit_QK, self.inverse_L)
        if self.num_labels:
            self._add_labels(ids_QK, true_QP, hit_QK)

    def _sum(self, name: str, value: float) -> None:
        self.sums[name] = self.sums.get(name, 0.0) + value

    def _add_propensity(
        self, ids_QK: np.ndarray, true_QP: np.ndarray, hit_QK: np.ndarray, inverse_L: np.ndarray
    ) -> None:
        got_QK = np.where(hit_QK, inverse_L[np.maximum(ids_QK, 0)], 0.0)
        best_QP = -np.sort(-np.where(true_QP >= 0, inverse_L[np.maximum(true_QP, 0)], 0.0), axis=1)
        for k in self.ks:
            self._sum(f"PSP@{k}", float(got_QK[:, :k].sum()) / k)
            self._sum(f"PSP@{k} best", float(best_QP[:, :k].sum()) / k)

    def _add_labels(self, ids_QK: np.ndarray, true_QP: np.ndarray, hit_QK: np.ndarray) -> None:
        k = max(self.ks)
        self.found_L += np.bincount(ids_QK[:, :k][hit_QK[:, :k]], minlength=self.num_labels)
        self.true_L += np.bincount(true_QP[true_QP >= 0], minlength=self.num_labels)

    def merge(self, other: RankedSums) -> RankedSums:
        """The sums of both; they must have been made alike."""
        for name, value in other.sums.items():
            self._sum(name, value)
        self.queries += other.queries
        self.empty += other.empty
        if self.num_labels:
            self.found_L, self.true_L = self.found_L + other.found_L, self.true_L + other.true_L
        return self

    def metrics(self) -> dict[str, float]:
        """Shares of 1 by name. `macro R@k` is the mean over labels of their recall among the first k, `head R@k`, ... the
        recall of the label uses of a band. Raises DataError without any query."""
        if not self.queries:
            raise DataError("ranking metrics of no query.")
        some = self.queries - self.empty
        out: dict[str, float] = {}
        for name, value in self.sums.items():
            if name.endswith(" best"):
                continue
            if name.startswith("PSP"):
                best = self.sums[f"{name} best"]
                out[name] = value / best if best else math.nan
            else:
                out[name] = value / (self.queries if name.startswith("P@") else max(1, some))
        if self.num_labels and self.true_L.any():
            k, seen = max(self.ks), self.true_L > 0
            out[f"macro R@{k}"] = float((self.found_L[seen] / self.true_L[seen]).mean())
            if self.band_L is not None:
                for number, band in enumerate(BANDS):
                    here = self.band_L == number
                    if uses := float(self.true_L[here].sum()):
                        out[f"{band} R@{k}"] = float(self.found_L[here].sum()) / uses
        return out


def drop_filtered(
    ids_QK: np.ndarray, query_key_Q: Sequence[str], filtered: dict[str, set[int]], keep: int
) -> np.ndarray:
    """Ranked labels without a query's filtered ones (such as the query itself), the first `keep` (Q, keep), -1 padded."""
    out = np.full((len(ids_QK), keep), -1, np.int64)
    for row, (ids_K, key) in enumerate(zip(ids_QK, query_key_Q, strict=True)):
        bad = filtered.get(key)
        kept = ids_K if not bad else ids_K[~np.isin(ids_K, list(bad))]
        out[row, : min(keep, len(kept))] = kept[:keep]
    return out
