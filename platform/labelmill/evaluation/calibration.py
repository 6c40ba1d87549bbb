"""How far confidence is from accuracy: reliability bins and the expected calibration error.

Shape legend: Q queries, M bins.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Reliability:
    """Equal-width bins of confidence; empty ones are left out.

    Attributes:
        confidence_M, accuracy_M: means of a bin.
        count_M: queries of a bin.
        ece: sum of |accuracy - confidence| weighted by count (Guo et al., ICML 2017).
    """

    confidence_M: np.ndarray
    accuracy_M: np.ndarray
    count_M: np.ndarray
    ece: float


def reliability(confidence_Q: np.ndarray, right_Q: np.ndarray, bins: int = 15) -> Reliability:
    """Raises ValueError for confidences outside [0, 1]."""
    if len(confidence_Q) and (confidence_Q.min() < 0 or confidence_Q.max() > 1 + 1e-6):
        raise ValueError("confidences must lie in [0, 1]")
    bin_Q = np.minimum((confidence_Q * bins).astype(np.int64), bins - 1)
    count = np.bincount(bin_Q, minlength=bins)
    some = count > 0
    confidence = np.bincount(bin_Q, confidence_Q, bins)[some] / count[some]
    accuracy = np.bincount(bin_Q, right_Q.astype(float), bins)[some] / count[some]
    ece = float((np.abs(accuracy - confidence) * count[some]).sum() / max(1, count.sum()))
    return Reliability(confidence, accuracy, count[some], ece)
