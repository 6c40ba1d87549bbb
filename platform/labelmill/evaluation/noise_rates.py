"""The joint of given and true labels, and what follows from it: error rate, noise matrices, class priors, transitions.

All matrices are sparse (K, K): row = given label, column = true label, unless said otherwise.

Shape legend: N rows, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.sparse import coo_array, csr_array

from labelmill.errors import DataError
from labelmill.evaluation.confident import GuessRule, RowFacts

_TINY = 1e-100


def confident_joint(facts: RowFacts, rule: GuessRule = "library") -> csr_array:
    """C int64 (K, K): rows given a and confidently guessed b; the diagonal at least 1 (Northcutt et al. 2021, eq. 1)."""
    guess_N = facts.guess_N(rule)
    counted = guess_N >= 0
    return joint_of_pairs(facts.given_N[counted], guess_N[counted], facts.num_classes)


def joint_of_pairs(given_N: np.ndarray, true_N: np.ndarray, num_classes: int) -> csr_array:
    """C from pairs of given and guessed labels, with the diagonal at least 1."""
    ones = np.ones(len(given_N), np.int64)
    counts = coo_array((ones, (given_N, true_N)), shape=(num_classes, num_classes)).tocsr()
    missing = np.flatnonzero(counts.diagonal() < 1)
    fill = coo_array((np.ones(len(missing), np.int64), (missing, missing)), shape=counts.shape)
    return csr_array(counts + fill.tocsr())


def calibrated_joint(joint: csr_array, label_counts: np.ndarray) -> csr_array:
    """Counts float64 whose rows add up to the given labels' numbers, not rounded (Northcutt et al. 2021, eq. 3)."""
    rows = np.maximum(np.asarray(joint.sum(axis=1)).ravel(), _TINY)
    out = csr_array(joint, dtype=np.float64, copy=True)
    out.data *= np.repeat(label_counts / rows, np.diff(out.indptr))
    out.data *= label_counts.sum() / max(out.data.sum(), _TINY)
    out.eliminate_zeros()
    return out


def rounded_joint(joint: csr_array) -> csr_array:
    """Counts int64 of a calibrated joint with the same sum in each row, by largest remainder, as in `cleanlab`.

    Among equal remainders the higher class is raised first and the lower one lowered first. (`cleanlab` sorts by an
    unstable sort there: its result for such ties depends on the machine.)
    """
    out = csr_array(joint, dtype=np.float64, copy=True)
    out.sort_indices()
    for a in range(out.shape[0]):
        lo, hi = out.indptr[a], out.indptr[a + 1]
        if lo < hi:
            out.data[lo:hi] = _round_keeping_sum(out.data[lo:hi])
    rounded = csr_array((out.data.astype(np.int64), out.indices, out.indptr), shape=out.shape)
    rounded.eliminate_zeros()
    return rounded


def _round_keeping_sum(values: np.ndarray) -> np.ndarray:
    whole = values.round()
    missing = int(np.round(values.sum().round() - whole.sum()))
    while missing:
        step = 1 if missing > 0 else -1
        order = np.argsort(values - whole, kind="stable")[:: -1 if step > 0 else 1]
        changed = order[: min(abs(missing), len(values))]
        whole[changed] += step
        missing -= step * len(changed)
    return whole


def joint_distribution(counts: csr_array) -> csr_array:
    """Q float64: P(given = a, true = b); of `calibrated_joint`, or as the library has it of `rounded_joint`."""
    out = csr_array(counts, dtype=np.float64, copy=True)
    out.data /= max(out.data.sum(), _TINY)
    return out


def error_rate(counts: csr_array) -> float:
    """1 - trace(Q): the estimated share of wrong labels."""
    return float(1.0 - joint_distribution(counts).trace())


@dataclass(frozen=True)
class NoiseRates:
    """Estimated noise.

    Attributes:
        prior_K: P(true = b).
        given_by_true: P(given = a | true = b), sparse, row a, column b; columns add up to 1.
        true_by_given: P(true = b | given = a), sparse, row b, column a; columns add up to 1.
    """

    prior_K: np.ndarray
    given_by_true: csr_array
    true_by_given: csr_array

    @property
    def transition(self) -> csr_array:
        """T, row-stochastic: T[b, a] = P(given = a | true = b), the matrix of forward and backward correction."""
        return csr_array(self.given_by_true.T.tocsr())


def noise_rates(joint: csr_array, label_counts: np.ndarray) -> NoiseRates:
    """Noise matrices and prior from a joint (`cleanlab`: estimate_latent with py_method cnt).

    prior_b is proportional to P(true = b | given = b) / P(given = b | true = b) * P(given = b).
    """
    joint = csr_array(joint, dtype=np.float64)
    given = _columns_to_one(joint)
    true = _columns_to_one(csr_array(joint.T.tocsr()))
    share = label_counts / max(label_counts.sum(), 1)
    prior = true.diagonal() / np.maximum(given.diagonal(), _TINY) * share
    prior = np.clip(prior, 1e-6, 1.0)
    return NoiseRates(prior / prior.sum(), _clipped(given), _clipped(true))


def _columns_to_one(matrix: csr_array) -> csr_array:
    out = matrix.copy()
    out.data = out.data / np.maximum(np.asarray(matrix.sum(axis=0)).ravel(), _TINY)[out.indices]
    return out


def _clipped(matrix: csr_array) -> csr_array:
    """Off-diagonal rates at most 0.9999, columns adding up to 1 again."""
    out = matrix.tocoo()
    off = out.row != out.col
    out.data[off] = np.clip(out.data[off], 0, 0.9999)
    return _columns_to_one(csr_array(out.tocsr()))


def transition_matrix(clean_N: np.ndarray, given_N: np.ndarray, num_classes: int) -> np.ndarray:
    """T float64 (K, K), row-stochastic: the share of clean class b that carries the label a, counted where both are known.

    Rows of classes without a sample are those of the identity. Raises DataError for labels of different lengths.
    """
    if len(clean_N) != len(given_N):
        raise DataError(f"{len(clean_N)} clean labels for {len(given_N)} given ones.")
    counts = np.zeros((num_classes, num_classes))
    np.add.at(counts, (clean_N, given_N), 1.0)
    empty = counts.sum(axis=1) == 0
    counts[empty, empty] = 1.0
    return counts / counts.sum(axis=1, keepdims=True)


def class_errors(counts: csr_array) -> dict[str, np.ndarray]:
    """For each class, from counts of the joint: `given`, `true`, `wrong` (given but not true), `missed` (true but not given)."""
    given = np.asarray(counts.sum(axis=1), np.float64).ravel()
    true = np.asarray(counts.sum(axis=0), np.float64).ravel()
    right = counts.diagonal()
    return {"given": given, "true": true, "wrong": given - right, "missed": true - right}


def largest_confusions(counts: csr_array, most: int = 20) -> list[tuple[int, int, float]]:
    """(given, true, count) of the largest off-diagonal entries of a joint, largest first."""
    found: Any = counts.tocoo()
    off = found.row != found.col
    rows, cols, values = found.row[off], found.col[off], found.data[off]
    order = np.lexsort((cols, rows, -values))[:most]
    return [(int(rows[i]), int(cols[i]), float(values[i])) for i in order]
