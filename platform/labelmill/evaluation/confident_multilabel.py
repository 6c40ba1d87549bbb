"""Confident learning for several labels a sample: K problems of two classes, streamed.

Northcutt, Jiang, Chuang (JAIR 2021) as `cleanlab` applies it to multi-label data: each label by itself on [1 - p, p]; a
sample is an issue if one of its labels is. Unknown labels (NaN) take no part. Two passes; only the cells on which model and
label disagree are kept.

    sums = CellSums(num_labels);      for given_BK, probs_BK in batches: sums.add(given_BK, probs_BK)
    joints = CellJoints(sums);        for ...: joints.add(given_BK, probs_BK)
    cells = joints.issues(by)         # (row, label) of the flagged cells

Shape legend: B rows of a batch, K labels, 2 values of a label (absent, present).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_array

from labelmill.errors import DataError
from labelmill.evaluation.confident import ABSENT, SLACK, check_probs
from labelmill.evaluation.label_filters import Filter, keep_at_least
from labelmill.evaluation.noise_rates import calibrated_joint, rounded_joint

_LOWEST = 2e-6


def _cells(given_BK: np.ndarray, probs_BK: np.ndarray, num_labels: int) -> tuple[np.ndarray, np.ndarray]:
    """Checked cells: labels float64 with NaN for unknown, probabilities float64."""
    given = np.asarray(given_BK, np.float64)
    probs = check_probs(probs_BK, len(given), whole=False)
    if given.shape != probs.shape or given.shape[1] != num_labels:
        raise DataError(f"labels {list(given.shape)} and probabilities {list(probs.shape)} for {num_labels} labels.")
    if not (np.isnan(given) | (given == 0) | (given == 1)).all():
        raise DataError("a label of a multi-label sample is 1 (applies), 0 (does not) or NaN (unknown).")
    return given, probs


class CellSums:
    """Pass 1: for each label and value, the sum of the probabilities of that value and their number."""

    def __init__(self, num_labels: int) -> None:
        self.num_labels = num_labels
        self.sum_K2, self.count_K2 = np.zeros((num_labels, 2)), np.zeros((num_labels, 2), np.int64)

    def add(self, given_BK: np.ndarray, probs_BK: np.ndarray) -> None:
        """Takes rows of 0, 1 or NaN and the probabilities that the label applies."""
        given, probs = _cells(given_BK, probs_BK, self.num_labels)
        for value, p in ((0, 1.0 - probs), (1, probs)):
            mask = given == value
            self.sum_K2[:, value] += np.where(mask, p, 0.0).sum(axis=0)
            self.count_K2[:, value] += mask.sum(axis=0)

    def thresholds(self) -> np.ndarray:
        """float64 (K, 2): mean probability of the given value; 2 where no sample has it."""
        mean = self.sum_K2 / np.maximum(self.count_K2, 1)
        return np.maximum(np.where(self.count_K2 > 0, mean, ABSENT), _LOWEST)


@dataclass(frozen=True)
class CellIssues:
    """Flagged cells: the row, the label, the probability of its given value."""

    row: np.ndarray
    label: np.ndarray
    self_confidence: np.ndarray

    def rows(self, count: int) -> np.ndarray:
        """bool (count,): rows with a flagged label."""
        return np.bincount(self.row, minlength=count) > 0


class CellJoints:
    """Pass 2: the 2 x 2 joint of each label, and the cells that can be issues."""

    def __init__(self, sums: CellSums) -> None:
        self.sums, self.thresholds_K2 = sums, sums.thresholds()
        self.joint_K22 = np.zeros((sums.num_labels, 2, 2), np.int64)
        self.rows = 0
        self._kept: list[tuple[np.ndarray, ...]] = []

    def add(self, given_BK: np.ndarray, probs_BK: np.ndarray) -> None:
        """Takes the same rows as pass 1, in batches of any size."""
        given, probs = _cells(given_BK, probs_BK, self.sums.num_labels)
        absent, present = 1.0 - probs, probs
        low = absent >= self.thresholds_K2[:, 0] - SLACK
        high = present >= self.thresholds_K2[:, 1] - SLACK
        guess = np.where(low & high, present > absent, high)  # the absent value first among equals, as argmax does
        counted = low | high
        for a in (0, 1):
            for b in (0, 1):
                self.joint_K22[:, a, b] += (counted & (given == a) & (guess == b)).sum(axis=0)
        own = np.where(given == 1, present, absent)
        other = np.where(given == 1, absent, present)
        # the first of equals wins an argmax: the absent value
        agrees = np.where(given == 0, own + SLACK >= other, own + SLACK > other)
        row, label = np.nonzero(~np.isnan(given) & ~agrees)
        confident = counted[row, label] & (guess[row, label] != given[row, label])
        self._kept.append((row + self.rows, label, given[row, label].astype(np.int64), own[row, label], confident))
        self.rows += len(given)

    def joints(self) -> np.ndarray:
        """int64 (K, 2, 2), rows = given value: C with the diagonal at least 1."""
        out = self.joint_K22.copy()
        for value in (0, 1):
            out[:, value, value] = np.maximum(out[:, value, value], 1)
        return out

    def counts(self) -> np.ndarray:
        """int64 (K, 2, 2): the calibrated joints rounded to counts."""
        found = [
            rounded_joint(calibrated_joint(csr_array(c), n)).toarray()
            for c, n in zip(self.joints(), self.sums.count_K2, strict=True)
        ]
        return np.stack(found)

    def issues(self, by: Filter = "prune_by_noise_rate", frac_noise: float = 1.0, min_examples: int = 1) -> CellIssues:
        """The flagged cells under a filter of `label_filters.find_issues`.

        With two classes both `prune` filters take the cells of a value with the lowest self-confidence.
        Raises DataError for `low_...`: these rank samples (`sample_scores`).
        """
        if by.startswith("low_"):
            raise DataError(f"filter {by} ranks whole samples: use sample_scores and take the lowest.")
        row, label, value, own, confident = (np.concatenate(c) for c in zip(*self._kept, strict=True))
        if by == "predicted_neq_given":
            keep = np.ones(len(row), np.bool_)
        elif by == "confident_learning":
            keep = confident
        else:
            keep = self._pruned(by, row, label, value, own, frac_noise, min_examples)
        return CellIssues(row[keep], label[keep], own[keep])

    def _pruned(
        self,
        by: Filter,
        row: np.ndarray,
        label: np.ndarray,
        value: np.ndarray,
        own: np.ndarray,
        frac_noise: float,
        min_examples: int,
    ) -> np.ndarray:
        number_K2 = np.empty((self.sums.num_labels, 2), np.int64)
        for k, counts in enumerate(self.counts()):
            kept = keep_at_least(csr_array(counts), min_examples, frac_noise).toarray()
            size = self.sums.count_K2[k]
            by_class, by_rate = size - np.diagonal(kept), np.array([kept[0, 1], kept[1, 0]])
            number = {"prune_by_class": by_class, "prune_by_noise_rate": by_rate}.get(by, np.minimum(by_class, by_rate))
            number_K2[k] = np.where((size > min_examples) & (size > 1), number, 0)
        group = label * 2 + value
        order = np.lexsort((row, own, group))
        starts = np.searchsorted(group[order], group[order])
        keep = np.zeros(len(row), np.bool_)
        keep[order] = np.arange(len(row)) - starts < number_K2.reshape(-1)[group[order]]
        return keep


def sample_scores(given_BK: np.ndarray, probs_BK: np.ndarray, alpha: float = 0.8) -> np.ndarray:
    """float64 (B,): self-confidence of the labels, highest first, in an exponential moving average; low is suspicious.

    The worst label weighs alpha. Unknown labels are left out; a sample without a known label gets 1.
    """
    given, probs = _cells(given_BK, probs_BK, np.shape(given_BK)[1])
    own = np.where(np.isnan(given), np.inf, np.where(given == 1, probs, 1.0 - probs))
    ordered = -np.sort(-own, axis=1)
    score = np.ones(len(own))
    started = np.zeros(len(own), np.bool_)
    for column in ordered.T:
        known = np.isfinite(column)
        moved = np.where(started, alpha * np.where(known, column, 0.0) + (1 - alpha) * score, column)
        score = np.where(known, moved, score)
        started |= known
    return score
