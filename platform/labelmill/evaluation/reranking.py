"""Does correcting a test set change which model is best? Accuracy on original and corrected labels, and where models swap.

Northcutt, Athalye, Mueller: Pervasive Label Errors in Test Sets Destabilize ML Benchmarks (NeurIPS 2021 Datasets and
Benchmarks, arXiv 2103.14749), section 5.

Shape legend: N test rows; C the rows whose label was corrected, B the others that stay.
"""

from __future__ import annotations

import math
from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Literal, cast

import numpy as np

from labelmill.errors import DataError


@dataclass(frozen=True)
class CorrectedAccuracy:
    """Accuracy of a model: over the unchanged rows (`benign`), and over the corrected ones by both labels."""

    benign: float
    original_errors: float
    corrected_errors: float
    original: float
    corrected: float
    benign_rows: int
    error_rows: int

    def at(self, prevalence: float) -> float:
        """Expected accuracy on corrected labels when a share `prevalence` of the rows are formerly wrong ones: linear."""
        return (1 - prevalence) * self.benign + prevalence * self.corrected_errors


def corrected_accuracy(
    predicted_N: np.ndarray, original_N: np.ndarray, corrected_N: np.ndarray, keep_N: np.ndarray | None = None
) -> CorrectedAccuracy:
    """Accuracy by original and by corrected labels.

    `keep_N` drops rows whose right label isn't agreed on (both, neither, no agreement). Raises DataError when no row was
    corrected, or none was left unchanged.
    """
    keep = np.ones(len(original_N), np.bool_) if keep_N is None else np.asarray(keep_N, np.bool_)
    predicted, original, corrected = predicted_N[keep], original_N[keep], corrected_N[keep]
    changed = original != corrected
    if not changed.any() or changed.all():
        what = "no label was corrected" if not changed.any() else "every label was corrected"
        raise DataError(f"{what}: there is nothing to compare.")
    right, right_now = predicted == original, predicted == corrected
    return CorrectedAccuracy(
        float(right[~changed].mean()),
        float(right[changed].mean()),
        float(right_now[changed].mean()),
        float(right.mean()),
        float(right_now.mean()),
        int((~changed).sum()),
        int(changed.sum()),
    )


def swap_prevalence(first: CorrectedAccuracy, second: CorrectedAccuracy) -> float:
    """nu*: the share of formerly wrong rows from which on `second` beats `first` on corrected labels; NaN if never or always.

    acc(nu) = (1 - nu) acc_B + nu acc_C, so nu* = dB / (dB + dC), dB = acc_B(first) - acc_B(second), dC = acc_C(second) -
    acc_C(first), both positive.
    """
    d_benign = first.benign - second.benign
    d_errors = second.corrected_errors - first.corrected_errors
    return d_benign / (d_benign + d_errors) if d_benign > 0 and d_errors > 0 else math.nan


def simulate_prevalence(
    predicted_N: np.ndarray, original_N: np.ndarray, corrected_N: np.ndarray, prevalence: float, seed: int
) -> float:
    """Accuracy on corrected labels after rows with right labels were deleted at random until `prevalence` is reached.

    Raises DataError for a prevalence below that of the set, or not below 1.
    """
    wrong, fine = np.flatnonzero(original_N != corrected_N), np.flatnonzero(original_N == corrected_N)
    now = len(wrong) / len(original_N)
    if not now <= prevalence < 1:
        raise DataError(f"prevalence {prevalence:.4g} must lie in [{now:.4g}, 1): rows are only deleted.")
    left = min(len(fine), round(len(wrong) * (1 - prevalence) / prevalence)) if len(wrong) else len(fine)
    kept = np.concatenate([wrong, np.random.default_rng(seed).choice(fine, left, replace=False)])
    return float((predicted_N[kept] == corrected_N[kept]).mean())


def swap_table(models: Mapping[str, CorrectedAccuracy]) -> list[tuple[str, str, float]]:
    """(better on unchanged rows, better on corrected rows, nu*) of every pair of models that swaps, lowest nu* first."""
    names = sorted(models, key=lambda name: -models[name].benign)
    found = [(a, b, swap_prevalence(models[a], models[b])) for i, a in enumerate(names) for b in names[i + 1 :]]
    return sorted([f for f in found if not math.isnan(f[2])], key=lambda f: f[2])


Verdict = Literal["given", "correctable", "both", "neither", "no agreement"]
Votes = Mapping[str, Mapping[str, int]]
CHOICES = ("given", "guessed", "both", "neither")


def decide_votes(votes: Votes, known: Container[str], majority: int = 3) -> dict[str, Verdict]:
    """What people say of flagged samples: key -> verdict.

    Each was asked whether the given label is right, the guessed one, both, or neither; `majority` equal answers decide.
    `guessed` makes the label correctable. Everything but `given` counts as an error, also where there is no agreement.

    Args:
        votes: key -> answer -> number.
        known: keys of the data set.
        majority: 3 of 5 in the paper.

    Raises DataError for an unknown key or answer, or a majority that two answers could have.
    """
    out: dict[str, Verdict] = {}
    for key, answers in votes.items():
        if key not in known:
            raise DataError(
                f"votes for sample {key!r}, which the data set doesn't have. Were they cast for another one?"
            )
        if wrong := sorted(set(answers) - set(CHOICES)):
            raise DataError(f"sample {key!r}: answer {wrong[0]!r} is unknown; answers are {', '.join(CHOICES)}.")
        won = [choice for choice in CHOICES if answers.get(choice, 0) >= majority]
        if len(won) > 1:
            raise DataError(f"sample {key!r}: {won[0]} and {won[1]} both have {majority} votes. Use a larger majority.")
        name = {"given": "given", "guessed": "correctable", "both": "both", "neither": "neither"}
        out[key] = cast(Verdict, name[won[0]] if won else "no agreement")
    return out
