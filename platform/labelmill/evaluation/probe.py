"""How much an embedding knows: linear probe and k nearest neighbours.

N training rows, M test rows, D embedding width.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from labelmill.evaluation.groups import wilson_interval
from labelmill.evaluation.ranking import nearest_neighbours


@dataclass(frozen=True)
class ProbeResult:
    """Test accuracy of a linear probe, its Wilson 95 % interval, and what was chosen on the training set."""

    accuracy: float
    low: float
    high: float
    c: float
    validation_accuracy: float
    num_labels: int
    predicted_M: np.ndarray


def choose_labelled(
    label_N: np.ndarray, seed: int, labels_per_class: int | None = None, num_labels: int | None = None
) -> np.ndarray:
    """Sorted row ids whose labels the probe may see: so many of each class, or so many at random, or all.

    Raises ValueError when both are given, or a class has fewer rows than asked for.
    """
    if labels_per_class is not None and num_labels is not None:
        raise ValueError("give labels_per_class or num_labels, not both")
    rng = np.random.default_rng(seed)
    if labels_per_class is not None:
        chosen = []
        for value in np.unique(label_N):
            rows = np.flatnonzero(label_N == value)
            if len(rows) < labels_per_class:
                raise ValueError(f"class {value} has {len(rows)} rows, labels_per_class asks for {labels_per_class}")
            chosen.append(rng.choice(rows, labels_per_class, replace=False))
        return np.sort(np.concatenate(chosen))
    if num_labels is not None:
        if not 1 <= num_labels <= len(label_N):
            raise ValueError(f"num_labels is {num_labels}, there are {len(label_N)} training rows")
        return np.sort(rng.choice(len(label_N), num_labels, replace=False))
    return np.arange(len(label_N))


def linear_probe(
    train_ND: torch.Tensor | np.ndarray,
    train_label_N: torch.Tensor | np.ndarray,
    test_MD: torch.Tensor | np.ndarray,
    test_label_M: torch.Tensor | np.ndarray,
    seed: int = 0,
    labels_per_class: int | None = None,
    num_labels: int | None = None,
    grid: Sequence[float] = (1e-3, 1e-2, 1e-1, 1.0, 10.0),
    max_iterations: int = 300,
) -> ProbeResult:
    """Multinomial logistic regression on standardised embeddings (scikit-learn, L2, C from `grid`).

    Mean and deviation come from the labelled training rows. C is chosen on a fifth of the labelled training
    rows, never on the test set, then the probe is fitted again on all of them. Raises ValueError for fewer
    than two classes.
    """
    from sklearn.model_selection import train_test_split

    train, test = _rows(train_ND), _rows(test_MD)
    label, test_label = np.asarray(train_label_N), np.asarray(test_label_M)
    rows = choose_labelled(label, seed, labels_per_class, num_labels)
    train, label = train[rows], label[rows]
    values, counts = np.unique(label, return_counts=True)
    if len(values) < 2:
        raise ValueError("a linear probe needs at least two classes among its training labels")
    centre, spread = train.mean(axis=0), train.std(axis=0)
    spread[spread < 1e-8] = 1.0
    train, test = (train - centre) / spread, (test - centre) / spread

    held_out = max(1, round(0.2 * len(label)))
    stratify = label if counts.min() >= 2 and min(held_out, len(label) - held_out) >= len(values) else None
    fit_rows, check_rows = train_test_split(
        np.arange(len(label)), test_size=held_out, random_state=seed, stratify=stratify
    )
    best_c, best = float(grid[0]), -1.0
    if len(np.unique(label[fit_rows])) >= 2:
        for c in grid:
            model = _fit(train[fit_rows], label[fit_rows], c, max_iterations)
            score = float((model.predict(train[check_rows]) == label[check_rows]).mean())
            if score > best:
                best_c, best = float(c), score
    predicted = _fit(train, label, best_c, max_iterations).predict(test)
    correct = int((predicted == test_label).sum())
    low, high = wilson_interval(correct, len(test_label))
    return ProbeResult(correct / len(test_label), low, high, best_c, best, len(label), predicted)


def knn_accuracy(
    train_ND: torch.Tensor,
    train_label_N: torch.Tensor,
    test_MD: torch.Tensor,
    test_label_M: torch.Tensor,
    k: int = 20,
    temperature: float = 0.07,
    block: int = 2048,
) -> float:
    """Accuracy of the vote of the k nearest training rows by cosine, weighted by exp(cosine / temperature).

    The protocol of Wu et al. (CVPR 2018). Ties go to the lower class id. The test set is taken in blocks.
    """
    values, inverse_N = train_label_N.unique(return_inverse=True)
    correct = 0
    for lo in range(0, len(test_MD), block):
        cos_BK, id_BK = nearest_neighbours(test_MD[lo : lo + block], train_ND, k)
        votes = torch.zeros(len(cos_BK), len(values), dtype=torch.float64)
        votes.scatter_add_(1, inverse_N[id_BK], torch.exp((cos_BK.double() - 1.0) / temperature))
        correct += int((values[votes.argmax(dim=1)] == test_label_M[lo : lo + block]).sum())
    return correct / len(test_MD)


def _rows(emb: torch.Tensor | np.ndarray) -> np.ndarray:
    rows = emb.detach().cpu().float().numpy() if isinstance(emb, torch.Tensor) else np.asarray(emb)
    rows = rows.astype(np.float64)
    if not np.isfinite(rows).all():
        bad = int(np.flatnonzero(~np.isfinite(rows).all(axis=1))[0])
        raise ValueError(f"embedding row {bad} is not finite")
    return rows


def _fit(train: np.ndarray, label: np.ndarray, c: float, max_iterations: int):  # type: ignore[no-untyped-def]
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings():
        # a probe stopped at max_iterations is a fair probe: C already limits it
        warnings.simplefilter("ignore", ConvergenceWarning)
        return LogisticRegression(C=c, max_iter=max_iterations).fit(train, label)
