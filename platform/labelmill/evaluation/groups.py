"""Accuracy by group, and how sure it is: Wilson intervals and the bootstrap.

N samples, G groups.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

Z95 = 1.959963984540054


@dataclass(frozen=True)
class GroupMetric:
    """Accuracy of one group with its interval."""

    group: str
    count: int
    correct: float
    accuracy: float
    low: float
    high: float


def wilson_interval(correct: float, count: float, z: float = Z95) -> tuple[float, float]:
    """Interval of a proportion (Wilson 1927), sensible near 0 and 1 and for few samples. (0, 1) of none."""
    if count <= 0:
        return 0.0, 1.0
    if not 0 <= correct <= count:
        raise ValueError(f"{correct} correct of {count}")
    share, z2 = correct / count, z * z
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = z / (1 + z2 / count) * math.sqrt(share * (1 - share) / count + z2 / (4 * count * count))
    return max(0.0, middle - half), min(1.0, middle + half)


def metrics_by_group(
    groups: Sequence[object] | np.ndarray,
    correct: np.ndarray,
    order: Sequence[str] | None = None,
    total: str | None = "all",
) -> list[GroupMetric]:
    """Accuracy, count and Wilson 95 % interval of every group, and of all samples as the last row.

    `correct` bool (N,); `order` names the groups in the order wanted, groups without samples included; by
    default they are sorted by name. Raises ValueError for unequal lengths or a group missing from `order`.
    """
    names = np.asarray([str(g) for g in groups])
    flags = np.asarray(correct).astype(bool)
    if len(names) != len(flags) or flags.ndim != 1:
        raise ValueError(f"{len(names)} groups for results of shape {flags.shape}")
    present = np.unique(names).tolist()
    if order is not None and (unknown := sorted(set(present) - set(order))):
        raise ValueError(f"groups {unknown} are not in the given order {list(order)}")
    rows = [_metric(name, flags[names == name]) for name in (order or present)]
    return rows + ([_metric(total, flags)] if total is not None else [])


def _metric(name: str, flags: np.ndarray) -> GroupMetric:
    count, correct = len(flags), int(flags.sum())
    low, high = wilson_interval(correct, count)
    return GroupMetric(name, count, correct, correct / count if count else float("nan"), low, high)


def bootstrap(
    values: np.ndarray,
    statistic: Callable[[np.ndarray], float] | None = None,
    draws: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[float, float, float]:
    """(estimate, low, high) of a statistic of `values` (N, ...) by the percentile bootstrap over samples.

    The default statistic is the mean. Raises ValueError for no values.
    """
    values = np.asarray(values)
    if not len(values):
        raise ValueError("bootstrap of no values")
    measure = statistic or (lambda sample: float(np.mean(sample)))
    rng = np.random.default_rng(seed)
    results = [measure(values[rng.integers(0, len(values), len(values))]) for _ in range(draws)]
    low, high = np.quantile(results, [(1 - level) / 2, (1 + level) / 2])
    return float(measure(values)), float(low), float(high)


def paired_difference(
    first: np.ndarray, second: np.ndarray, draws: int = 1000, seed: int = 0
) -> tuple[float, float, float]:
    """(mean of first - second, low, high): two methods on the same samples, bootstrapped over the samples."""
    first, second = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if first.shape != second.shape:
        raise ValueError(f"paired results differ in shape: {first.shape} and {second.shape}")
    return bootstrap(first - second, draws=draws, seed=seed)
