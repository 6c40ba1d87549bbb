"""Multi-label audits against the library, and the closed form of re-ranking."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest

from labelmill.errors import DataError
from labelmill.evaluation.confident_multilabel import CellJoints, CellSums, sample_scores
from labelmill.evaluation.reranking import (
    CorrectedAccuracy,
    corrected_accuracy,
    decide_votes,
    simulate_prevalence,
    swap_prevalence,
    swap_table,
)


def problem(seed: int, rows: int = 240, labels: int = 5) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    true = (rng.random((rows, labels)) < np.linspace(0.15, 0.5, labels)).astype(float)
    given = np.where(rng.random((rows, labels)) < 0.12, 1 - true, true)
    given[:, 0][given.sum(1) == 0] = 1.0  # the library wants a label in each row
    return given, 1 / (1 + np.exp(-(4 * true - 2 + rng.normal(size=true.shape) * 1.2)))


def joints(given: np.ndarray, probs: np.ndarray, batch: int = 100) -> CellJoints:
    sums = CellSums(given.shape[1])
    parts = [(given[lo : lo + batch], probs[lo : lo + batch]) for lo in range(0, len(given), batch)]
    for part in parts:
        sums.add(*part)
    found = CellJoints(sums)
    for part in parts:
        found.add(*part)
    return found


@pytest.mark.parametrize("seed", range(3))
def test_agrees_with_the_library(seed: int) -> None:
    from cleanlab import count
    from cleanlab.internal import multilabel_scorer
    from cleanlab.multilabel_classification.filter import find_multilabel_issues_per_class

    given, probs = problem(seed)
    lists = [np.flatnonzero(row).tolist() for row in given]
    found = joints(given, probs)
    want = count.compute_confident_joint(lists, probs, multi_label=True)
    np.testing.assert_array_equal(found.counts(), want)
    for by in ("confident_learning", "prune_by_class", "prune_by_noise_rate", "both", "predicted_neq_given"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            flags = find_multilabel_issues_per_class(lists, probs, filter_by=by, n_jobs=1)
        cells = found.issues(by)
        got = np.zeros(given.shape, bool)
        got[cells.row, cells.label] = True
        np.testing.assert_array_equal(got, flags, err_msg=by)
        np.testing.assert_array_equal(cells.rows(len(given)), np.asarray(flags).any(1))
    scores = multilabel_scorer.get_label_quality_scores(given.astype(int), probs)
    np.testing.assert_allclose(sample_scores(given, probs), scores, rtol=1e-9)


def test_unknown_labels_take_no_part() -> None:
    given, probs = problem(0)
    hidden = given.copy()
    hidden[::3, 1] = np.nan
    all_cells, known = joints(given, probs), joints(hidden, probs)
    np.testing.assert_array_equal(known.joints()[[0, 2, 3, 4]], all_cells.joints()[[0, 2, 3, 4]])
    rest = np.delete(np.arange(len(given)), slice(0, None, 3))
    alone = joints(given[rest][:, 1:2], probs[rest][:, 1:2])
    np.testing.assert_array_equal(known.counts()[1], alone.counts()[0])
    cells = known.issues("confident_learning")
    assert not np.isnan(hidden[cells.row, cells.label]).any()
    scores = sample_scores(np.array([[np.nan, 1.0], [np.nan, np.nan]]), np.array([[0.9, 0.3], [0.5, 0.5]]))
    np.testing.assert_allclose(scores, [0.3, 1.0])


def test_bad_cells_are_refused() -> None:
    with pytest.raises(DataError, match=r"1 \(applies\), 0 \(does not\) or NaN"):
        CellSums(2).add(np.array([[2.0, 0.0]]), np.array([[0.5, 0.5]]))
    with pytest.raises(DataError, match="for 3 labels"):
        CellSums(3).add(np.zeros((1, 2)), np.full((1, 2), 0.5))
    with pytest.raises(DataError, match="ranks whole samples"):
        joints(*problem(0)).issues("low_self_confidence")


# --- re-ranking ---


def model(benign: float, errors: float) -> CorrectedAccuracy:
    return CorrectedAccuracy(benign, 0.0, errors, 0.0, 0.0, 1, 1)


def test_swap_prevalence_in_closed_form() -> None:
    assert swap_prevalence(model(0.90, 0.10), model(0.88, 0.40)) == pytest.approx(0.0625)
    assert math.isnan(swap_prevalence(model(0.9, 0.5), model(0.8, 0.4)))
    found = swap_table({"a": model(0.8, 0.9), "b": model(0.9, 0.1), "c": model(0.85, 0.0)})
    assert [(x, y) for x, y, _ in found] == [("c", "a"), ("b", "a")]


def test_the_closed_form_is_the_mean_of_simulations() -> None:
    rng = np.random.default_rng(0)
    true = rng.integers(0, 4, 2000)
    given = np.where(rng.random(2000) < 0.05, (true + 1) % 4, true)
    predicted = np.where(rng.random(2000) < 0.2, rng.integers(0, 4, 2000), true)
    facts = corrected_accuracy(predicted, given, true)
    assert facts.error_rows + facts.benign_rows == 2000
    runs = [simulate_prevalence(predicted, given, true, 0.3, seed) for seed in range(200)]
    assert np.mean(runs) == pytest.approx(facts.at(0.3), abs=0.004)
    with pytest.raises(DataError, match="rows are only deleted"):
        simulate_prevalence(predicted, given, true, 0.01, 0)
    with pytest.raises(DataError, match="no label was corrected"):
        corrected_accuracy(predicted, true, true)


def test_votes_decide_by_majority() -> None:
    votes = {
        "a": {"given": 4, "guessed": 1},
        "b": {"guessed": 3, "both": 2},
        "c": {"both": 5},
        "d": {"neither": 3},
        "e": {"given": 2, "guessed": 2, "neither": 1},
    }
    want = {"a": "given", "b": "correctable", "c": "both", "d": "neither", "e": "no agreement"}
    assert decide_votes(votes, set("abcde")) == want
    with pytest.raises(DataError, match="votes for sample 'e'"):
        decide_votes(votes, set("abcd"))
    with pytest.raises(DataError, match="answer 'maybe' is unknown"):
        decide_votes({"a": {"maybe": 1}}, {"a"})
    with pytest.raises(DataError, match="given and guessed both have 2 votes"):
        decide_votes({"a": {"given": 2, "guessed": 2}}, {"a"}, majority=2)
