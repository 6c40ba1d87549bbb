"""Confident learning over streams of out-of-sample probabilities: thresholds, the joint of given and true labels, noise rates.

Northcutt, Jiang, Chuang: Confident Learning (JAIR 2021, arXiv 1911.00068); definitions and names are those of the library
`cleanlab`. Two passes over batches, and N x K is never in memory:

    sums = ThresholdSums(num_classes)              # pass 1: K sums
    for given_B, probs_BK in batches: sums.add_probs(given_B, probs_BK)
    thresholds_K = sums.thresholds()
    parts = [row_facts(given_B, probs_BK, thresholds_K) for given_B, probs_BK in batches]   # pass 2: a few numbers a row
    facts = RowFacts.concat(parts)
    joint = noise_rates.confident_joint(facts)     # sparse, at most N + K entries

Where the class axis is sharded, each shard makes the facts of its classes and `RowFacts.merge` joins them, exactly. Where
only the best classes of a row were stored, `facts_of_top` makes the facts from them.

Shape legend: N rows, B rows of a batch, K classes, S classes of a shard, M best other classes kept of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal

import numpy as np
from scipy.special import xlogy

from labelmill.errors import DataError

SLACK = 1e-6  # a probability this far below its threshold still counts, and the given label's lead in `agrees`
ABSENT = 2.0  # threshold of a class without a labelled row: never reached
_LOWEST = 2e-6  # of thresholds
KEEP = 5

GuessRule = Literal["library", "paper"]


# --- checks ---------------------------------------------------------------------------------------------


def check_given(given_N: np.ndarray, num_classes: int) -> np.ndarray:
    """Given labels as int64. Raises DataError for one that is no class, naming row, value and range."""
    given_N = np.asarray(given_N)
    if given_N.ndim != 1 or not np.issubdtype(given_N.dtype, np.integer):
        raise DataError(
            f"given labels must be a list of class ids, not {given_N.dtype} of shape {list(given_N.shape)}."
        )
    wrong = np.flatnonzero((given_N < 0) | (given_N >= num_classes))
    if len(wrong):
        raise DataError(
            f"row {wrong[0]} is labelled {int(given_N[wrong[0]])}, but the probabilities are over {num_classes} classes, "
            f"0 ... {num_classes - 1} ({len(wrong)} row(s) are wrong so). Were they made for another label space?"
        )
    return given_N.astype(np.int64)


def check_probs(probs_BK: np.ndarray, rows: int, first_row: int = 0, whole: bool = True) -> np.ndarray:
    """Probabilities as float64. Raises DataError: wrong shape, NaN, outside [0, 1], a `whole` row that doesn't add up to 1."""
    probs = np.asarray(probs_BK, dtype=np.float64)
    if probs.ndim != 2 or len(probs) != rows:
        raise DataError(f"probabilities of shape {list(probs.shape)} for {rows} labels: one row a sample is needed.")
    low, high = probs.min(initial=0.0), probs.max(initial=0.0)
    if not (low >= -1e-6 and high <= 1 + 1e-3):  # NaN fails both
        bad = ~((probs >= -1e-6) & (probs <= 1 + 1e-3))
        row = int(np.flatnonzero(bad.any(axis=1))[0])
        value = probs[row][bad[row]][0]
        raise DataError(
            f"row {first_row + row} has the probability {value}: softmax outputs between 0 and 1 are needed."
        )
    sums = probs.sum(axis=1)
    if whole and len(off := np.flatnonzero(np.abs(sums - 1) > 1e-3)):
        raise DataError(
            f"the probabilities of row {first_row + int(off[0])} add up to {sums[off[0]]:.4g}, not 1 ({len(off)} such row(s)). "
            "Are these logits, or scores of a multi-label model?"
        )
    return probs


# --- pass 1: thresholds ---------------------------------------------------------------------------------


class ThresholdSums:
    """Pass 1: for each class, the sum of its rows' self-confidence (float64) and their number. Sums of parts add up."""

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self.sum_K = np.zeros(num_classes, np.float64)
        self.count_K = np.zeros(num_classes, np.int64)

    def add(self, given_B: np.ndarray, self_confidence_B: np.ndarray) -> None:
        """Takes the probability of each row's given label."""
        given_B = check_given(given_B, self.num_classes)
        self.sum_K += np.bincount(given_B, np.asarray(self_confidence_B, np.float64), self.num_classes)
        self.count_K += np.bincount(given_B, minlength=self.num_classes)

    def add_probs(self, given_B: np.ndarray, probs_BK: np.ndarray) -> None:
        """Takes whole rows. Raises DataError as `check_probs`."""
        probs_BK = check_probs(probs_BK, len(given_B), int(self.count_K.sum()))
        _check_width(probs_BK, self.num_classes)
        given_B = check_given(given_B, self.num_classes)
        self.add(given_B, probs_BK[np.arange(len(given_B)), given_B])

    def merge(self, other: ThresholdSums) -> ThresholdSums:
        """Both together, for passes that ran side by side."""
        out = ThresholdSums(self.num_classes)
        out.sum_K, out.count_K = self.sum_K + other.sum_K, self.count_K + other.count_K
        return out

    def thresholds(self) -> np.ndarray:
        """t_j: mean self-confidence of the rows labelled j, float64 (K,); 2 for a class without rows."""
        mean_K = self.sum_K / np.maximum(self.count_K, 1)
        return np.maximum(np.where(self.count_K > 0, mean_K, ABSENT), _LOWEST)


# --- pass 2: a few numbers a row ------------------------------------------------------------------------


@dataclass(frozen=True)
class RowFacts:
    """What is kept of each row: O(M) numbers.

    Attributes:
        num_classes: K.
        given_N: int64, the given label.
        self_N: float64, its probability.
        other_id_N, other_N: the most probable other class (the lower id among equals) and its probability.
        confident_N: int64, how many classes reach their threshold.
        best_id_N, best_N: the most probable of those, -1 and -1 where there is none.
        entropy_N: float64, -sum p ln p in nats.
        top_id_NM, top_NM: other classes by falling probability; -1 and 0 where there are fewer than M.
    """

    num_classes: int
    given_N: np.ndarray
    self_N: np.ndarray
    other_id_N: np.ndarray
    other_N: np.ndarray
    confident_N: np.ndarray
    best_id_N: np.ndarray
    best_N: np.ndarray
    entropy_N: np.ndarray
    top_id_NM: np.ndarray
    top_NM: np.ndarray

    def __len__(self) -> int:
        return len(self.given_N)

    @property
    def predicted_N(self) -> np.ndarray:
        """int64: the most probable class, the lower id among equals."""
        first = (self.self_N > self.other_N) | ((self.self_N == self.other_N) & (self.given_N < self.other_id_N))
        return np.where(first | (self.other_id_N < 0), self.given_N, self.other_id_N)

    @property
    def agrees_N(self) -> np.ndarray:
        """bool: the given label is the most probable one once 1e-6 is added to it. Such rows are never flagged."""
        raised_N = self.self_N + SLACK
        first = (raised_N > self.other_N) | ((raised_N == self.other_N) & (self.given_N < self.other_id_N))
        return first | (self.other_id_N < 0)

    def guess_N(self, rule: GuessRule = "library") -> np.ndarray:
        """int64: the class that a row is confidently counted to, -1 for none.

        Of several confident classes, the library takes the most probable of all classes, the paper the most probable of
        the confident ones; they differ where the most probable class isn't confident.
        """
        if rule == "paper":
            return self.best_id_N
        return np.where(self.confident_N > 1, self.predicted_N, self.best_id_N)

    @property
    def label_counts(self) -> np.ndarray:
        """int64 (K,): rows of each given label."""
        return np.bincount(self.given_N, minlength=self.num_classes)

    @staticmethod
    def concat(parts: Sequence[RowFacts]) -> RowFacts:
        """Batches one after the other. Raises ValueError for none."""
        if not parts:
            raise ValueError("no rows: give at least one batch")
        names = [f.name for f in fields(RowFacts) if f.name != "num_classes"]
        return RowFacts(parts[0].num_classes, **{n: np.concatenate([getattr(p, n) for p in parts]) for n in names})

    def take(self, rows: np.ndarray) -> RowFacts:
        """Some of the rows, by number or mask."""
        names = [f.name for f in fields(RowFacts) if f.name != "num_classes"]
        return replace(self, **{n: getattr(self, n)[rows] for n in names})

    def merge(self, other: RowFacts) -> RowFacts:
        """The same rows seen by another shard of classes. Associative and commutative.

        Raises ValueError for other rows.
        """
        if not np.array_equal(self.given_N, other.given_N):
            raise ValueError("facts of different rows can't be merged")
        other_N, other_id_N = _better(self.other_N, self.other_id_N, other.other_N, other.other_id_N)
        best_N, best_id_N = _better(self.best_N, self.best_id_N, other.best_N, other.best_id_N)
        width = max(self.top_NM.shape[1], other.top_NM.shape[1])
        id_NM = np.concatenate([self.top_id_NM, other.top_id_NM], axis=1)
        top_id_NM, top_NM = _sorted(id_NM, np.concatenate([self.top_NM, other.top_NM], axis=1), width)
        return RowFacts(
            self.num_classes,
            self.given_N,
            self.self_N + other.self_N,  # the shard that doesn't hold the given label has 0
            other_id_N,
            other_N,
            self.confident_N + other.confident_N,
            best_id_N,
            best_N,
            self.entropy_N + other.entropy_N,
            top_id_NM,
            top_NM,
        )


def row_facts(
    given_B: np.ndarray,
    probs_BS: np.ndarray,
    thresholds_K: np.ndarray,
    first: int = 0,
    keep: int = KEEP,
    first_row: int = 0,
) -> RowFacts:
    """Pass 2 over a batch of rows, or over a shard's classes `[first, first + S)` of it.

    Args:
        given_B: given labels.
        probs_BS: probabilities, of all K classes or of the shard's.
        thresholds_K: of pass 1, of all classes.
        first: class of the first column.
        keep: M, other classes whose probabilities are kept; only `prune_by_noise_rate` looks at them. K - 1 is exact.
        first_row: number of the batch's first row, for messages.

    Raises DataError as `check_given` and `check_probs`.
    """
    num_classes = len(thresholds_K)
    given_B = check_given(given_B, num_classes)
    probs = check_probs(probs_BS, len(given_B), first_row, whole=np.shape(probs_BS)[-1] == num_classes)
    width = probs.shape[1]
    if first + width > num_classes:
        raise DataError(f"classes {first} ... {first + width - 1} of {num_classes}: the probabilities are too wide.")
    rows, local = np.arange(len(given_B)), given_B - first
    mine = (local >= 0) & (local < width)
    self_N = np.zeros(len(given_B))
    self_N[mine] = probs[rows[mine], local[mine]]
    reached = probs >= thresholds_K[first : first + width] - SLACK
    confident_N = reached.sum(axis=1)
    masked = np.where(reached, probs, -1.0)
    best = masked.argmax(axis=1)
    best_N = masked[rows, best]
    entropy_N = -xlogy(probs, probs).sum(axis=1)
    others = masked
    np.copyto(others, probs)
    others[rows[mine], local[mine]] = -1.0
    other = others.argmax(axis=1)
    other_N = others[rows, other]
    kept = max(1, min(keep, width))
    if kept < width:
        at = np.argpartition(others, width - kept, axis=1)[:, width - kept :]
    else:
        at = np.broadcast_to(np.arange(width), others.shape)
    found = np.take_along_axis(others, at, axis=1)
    top_id, top = _sorted(np.where(found < 0, -1, at + first), found, min(keep, max(1, num_classes - 1)))
    return RowFacts(
        num_classes,
        given_B,
        self_N,
        np.where(other_N < 0, -1, other + first),
        other_N,
        confident_N,
        np.where(best_N < 0, -1, best + first),
        best_N,
        entropy_N,
        top_id,
        top,
    )


def facts_of_top(
    given_B: np.ndarray,
    self_B: np.ndarray,
    top_id_BM: np.ndarray,
    top_BM: np.ndarray,
    entropy_B: np.ndarray,
    thresholds_K: np.ndarray,
) -> RowFacts:
    """Facts from the stored best classes of each row (the given label may be among them) and its own probability.

    What is cut: a class beyond the best M that reaches a low threshold isn't counted as confident. With M = K it's exact.

    Args:
        given_B, self_B, entropy_B: as of `RowFacts`.
        top_id_BM, top_BM: classes and their probabilities, in any order; -1 where there are fewer.
        thresholds_K: of pass 1.
    """
    num_classes = len(thresholds_K)
    given_B, rows = check_given(given_B, num_classes), np.arange(len(given_B))
    known = top_id_BM >= 0
    # the given label takes part with its own probability, whether it is among the best or not
    ids = np.concatenate([np.where(known & (top_id_BM != given_B[:, None]), top_id_BM, -1), given_B[:, None]], axis=1)
    probs = np.concatenate([np.asarray(top_BM, np.float64), np.asarray(self_B, np.float64)[:, None]], axis=1)
    reached = (ids >= 0) & (probs >= thresholds_K[ids] - SLACK)
    best_id, best = _sorted(np.where(reached, ids, -1), probs, 1)
    top_id, top = _sorted(ids[:, :-1], probs[:, :-1], top_id_BM.shape[1])
    none = top_id[:, 0] < 0
    return RowFacts(
        num_classes,
        given_B,
        probs[rows, -1],
        top_id[:, 0],
        np.where(none, -1.0, top[:, 0]),
        reached.sum(axis=1),
        best_id[:, 0],
        np.where(best_id[:, 0] < 0, -1.0, best[:, 0]),
        np.asarray(entropy_B, np.float64),
        top_id,
        top,
    )


def _better(a_N: np.ndarray, a_id_N: np.ndarray, b_N: np.ndarray, b_id_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The larger of two values and its id, the lower id among equals."""
    first = (a_N > b_N) | ((a_N == b_N) & (a_id_N <= b_id_N))
    return np.where(first, a_N, b_N), np.where(first, a_id_N, b_id_N)


def _sorted(id_NM: np.ndarray, value_NM: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """The `width` largest of each row by falling value, the lower id first among equals; id -1 is no entry."""
    value = np.where(id_NM < 0, -1.0, value_NM)
    order = np.lexsort((id_NM, -value), axis=1)[:, :width]
    ids, values = np.take_along_axis(id_NM, order, 1), np.take_along_axis(value, order, 1)
    if (short := width - ids.shape[1]) > 0:
        ids = np.pad(ids, ((0, 0), (0, short)), constant_values=-1)
        values = np.pad(values, ((0, 0), (0, short)))
    return ids, np.maximum(values, 0.0)


def _check_width(probs_BK: np.ndarray, num_classes: int) -> None:
    if probs_BK.shape[1] != num_classes:
        raise DataError(f"probabilities over {probs_BK.shape[1]} classes, the labels have {num_classes}.")
