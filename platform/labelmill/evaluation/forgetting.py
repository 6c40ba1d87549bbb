"""How far a model is from one that never saw the forgotten samples: gaps, divergences, relearning.

Shape legend: N samples, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np


def gap(found: Mapping[str, float], reference: Mapping[str, float]) -> float:
    """Mean |difference| over the columns that both have and that are finite. NaN without one.

    Retraining on the retained samples is the reference: closest is best, not lowest or highest.
    """
    shared = [k for k in found if math.isfinite(found[k]) and math.isfinite(reference.get(k, math.nan))]
    return float(np.mean([abs(found[k] - reference[k]) for k in shared])) if shared else math.nan


def js_divergence(p_NC: np.ndarray, q_NC: np.ndarray) -> np.ndarray:
    """Jensen-Shannon divergence of each row in bits (N,), between 0 and 1 (Lin 1991). Rows are distributions.

    Raises ValueError for other shapes, or rows that aren't distributions.
    """
    p_NC, q_NC = np.asarray(p_NC, np.float64), np.asarray(q_NC, np.float64)
    if p_NC.shape != q_NC.shape or p_NC.ndim != 2:
        raise ValueError(f"distributions of shapes {p_NC.shape} and {q_NC.shape}")
    for rows in (p_NC, q_NC):
        if (rows < -1e-9).any() or (np.abs(rows.sum(1) - 1) > 1e-3).any():
            raise ValueError("rows must be distributions over all classes")
    m_NC = (p_NC + q_NC) / 2

    def kl(a: np.ndarray) -> np.ndarray:
        ratio = np.divide(a, m_NC, out=np.ones_like(a), where=(a > 0) & (m_NC > 0))
        return (a * np.log2(ratio)).sum(1)

    return np.clip((kl(p_NC) + kl(q_NC)) / 2, 0.0, 1.0)


def zrf(prob_NC: np.ndarray, random_NC: np.ndarray) -> float:
    """Zero-retrain forgetting score 1 - mean JS(model, randomly initialised model) on the forgotten samples.

    Chundawat et al., Can Bad Teaching Induce Forgetting? (AAAI 2023). 1: as ignorant as a random net.
    """
    return 1.0 - float(js_divergence(prob_NC, random_NC).mean())


def relearn_steps(accuracies: Mapping[int, float], wanted: float) -> int | None:
    """First of the measured steps at which the accuracy on the forgotten samples is `wanted` again; None if never."""
    return next((step for step in sorted(accuracies) if accuracies[step] >= wanted), None)


def rewind(forget_errors: Sequence[float], wanted: float) -> int:
    """SCRUB+R: which checkpoint's error on the forgotten samples is nearest to that on held-out ones; the last of equals.

    Kurmanji et al., Towards Unbounded Machine Unlearning (NeurIPS 2023), section 3.2. Raises ValueError for none.
    """
    if not forget_errors:
        raise ValueError("no checkpoint to go back to")
    distance = [abs(error - wanted) for error in forget_errors]
    return max(i for i, d in enumerate(distance) if d == min(distance))


def interval(values: Sequence[float]) -> tuple[float, float]:
    """(mean, half width of its 95 % interval) over seeds, by Student's t; half width NaN for one value."""
    kept = [v for v in values if math.isfinite(v)]
    if not kept:
        return math.nan, math.nan
    if len(kept) == 1:
        return kept[0], math.nan
    from scipy.stats import t

    half = float(t.ppf(0.975, len(kept) - 1)) * float(np.std(kept, ddof=1)) / math.sqrt(len(kept))
    return float(np.mean(kept)), half
