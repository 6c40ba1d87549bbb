"""Confident learning against values worked out by hand, and against the library on random problems."""

from __future__ import annotations

import warnings

import numpy as np
import pyarrow as pa
import pytest

from labelmill.errors import DataError
from labelmill.evaluation import confident, label_filters, noise_rates
from labelmill.evaluation.confident import RowFacts, ThresholdSums, facts_of_top, row_facts
from labelmill.evaluation.label_filters import FILTERS, SCORES, find_issues, issue_table, label_scores

P = np.array(
    [[.9, .05, .05], [.7, .2, .1], [.2, .7, .1], [.1, .8, .1], [.3, .6, .1], [.75, .15, .1], [.1, .1, .8], [.2, .1, .7],
     [.05, .9, .05], [.34, .33, .33]]
)  # fmt: skip
GIVEN = np.array([0, 0, 0, 1, 1, 1, 2, 2, 2, 2])


def facts_of(given: np.ndarray, probs: np.ndarray, batch: int = 4, keep: int | None = None) -> RowFacts:
    """Both passes, in batches."""
    sums = ThresholdSums(probs.shape[1])
    for lo in range(0, len(given), batch):
        sums.add_probs(given[lo : lo + batch], probs[lo : lo + batch])
    t = sums.thresholds()
    keep = probs.shape[1] - 1 if keep is None else keep
    batches = range(0, len(given), batch)
    return RowFacts.concat([row_facts(given[lo : lo + batch], probs[lo : lo + batch], t, keep=keep) for lo in batches])


def random_problem(seed: int, rows: int = 300, classes: int = 6, absent: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Labels with errors and probabilities that know something of the truth."""
    rng = np.random.default_rng(seed)
    true = rng.integers(0, classes - absent, rows)
    given = np.where(rng.random(rows) < 0.25, rng.integers(0, classes - absent, rows), true)
    logits = rng.normal(size=(rows, classes)) * 1.5
    logits[np.arange(rows), true] += 2.0
    probs = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return given, probs


# --- worked out by hand ---


def test_thresholds_joint_and_error_of_the_small_problem() -> None:
    facts = facts_of(GIVEN, P)
    sums = ThresholdSums(3)
    sums.add_probs(GIVEN, P)
    np.testing.assert_allclose(sums.thresholds(), [0.6, 0.516667, 0.47], atol=1e-6)
    joint = noise_rates.confident_joint(facts)
    assert joint.toarray().tolist() == [[2, 1, 0], [1, 2, 0], [0, 1, 2]]
    assert facts.guess_N()[9] == -1, "no class is confident"
    calibrated = noise_rates.calibrated_joint(joint, facts.label_counts)
    q = noise_rates.joint_distribution(calibrated).toarray()
    np.testing.assert_allclose(q, [[0.2, 0.1, 0], [0.1, 0.2, 0], [0, 0.133333, 0.266667]], atol=1e-6)
    assert noise_rates.error_rate(calibrated) == pytest.approx(1 / 3)
    rounded = noise_rates.rounded_joint(calibrated)
    assert rounded.toarray().tolist() == [[2, 1, 0], [1, 2, 0], [0, 1, 3]]
    assert noise_rates.error_rate(rounded) == pytest.approx(0.3)


def test_noise_matrices_of_the_small_problem() -> None:
    facts = facts_of(GIVEN, P)
    rates = noise_rates.noise_rates(noise_rates.confident_joint(facts), facts.label_counts)
    np.testing.assert_allclose(rates.prior_K, [0.310345, 0.413793, 0.275862], atol=1e-6)
    given = [[0.666667, 0.25, 0], [0.333333, 0.5, 0], [0, 0.25, 1]]
    np.testing.assert_allclose(rates.given_by_true.toarray(), given, atol=1e-6)
    np.testing.assert_allclose(rates.transition.toarray(), np.transpose(given), atol=1e-6)
    true = [[0.666667, 0.333333, 0], [0.333333, 0.666667, 0.333333], [0, 0, 0.666667]]
    np.testing.assert_allclose(rates.true_by_given.toarray(), true, atol=1e-6)


def test_filters_and_scores_of_the_small_problem() -> None:
    facts = facts_of(GIVEN, P)
    for name in ("confident_learning", "prune_by_class", "prune_by_noise_rate", "both"):
        assert np.flatnonzero(find_issues(facts, name)).tolist() == [2, 5, 8], name
    assert np.flatnonzero(find_issues(facts, "predicted_neq_given")).tolist() == [2, 5, 8, 9]
    own, margin = label_scores(facts, "self_confidence"), label_scores(facts, "normalized_margin")
    assert (own[5], margin[5]) == pytest.approx((0.15, 0.20))
    assert (own[9], margin[9]) == pytest.approx((0.33, 0.495))


def test_uniform_probabilities_flag_nothing() -> None:
    given = np.repeat([0, 1, 2], 3)
    facts = facts_of(given, np.full((9, 3), 1 / 3))
    assert noise_rates.confident_joint(facts).toarray().tolist() == [[3, 0, 0], [3, 1, 0], [3, 0, 1]]
    for name in ("confident_learning", "prune_by_class", "prune_by_noise_rate", "both"):
        assert not find_issues(facts, name).any()


def test_certain_and_right_probabilities_flag_nothing_and_are_called_in_sample() -> None:
    given = np.repeat([0, 1, 2], 3)
    facts = facts_of(given, np.eye(3)[given])
    assert noise_rates.confident_joint(facts).toarray().tolist() == [[3, 0, 0], [0, 3, 0], [0, 0, 3]]
    assert not any(find_issues(facts, name).any() for name in FILTERS)
    assert "use crossfit" in (label_filters.in_sample_warning(facts) or "")
    assert label_filters.in_sample_warning(facts_of(GIVEN, P)) is None


def test_permuted_classes_permute_the_joint_and_a_dead_class_changes_nothing() -> None:
    given, probs = random_problem(1)
    joint = noise_rates.confident_joint(facts_of(given, probs)).toarray()
    order = np.random.default_rng(0).permutation(6)
    there = np.argsort(order)  # old class -> new class
    moved = noise_rates.confident_joint(facts_of(there[given], probs[:, order])).toarray()
    np.testing.assert_array_equal(moved, joint[np.ix_(order, order)])
    wider = noise_rates.confident_joint(facts_of(given, np.pad(probs, ((0, 0), (0, 1))))).toarray()
    np.testing.assert_array_equal(wider[:6, :6], joint)
    assert wider[6].tolist() == [0] * 6 + [1]


def test_the_paper_and_the_library_differ_where_the_best_class_is_not_confident() -> None:
    t = np.array([0.96, 0.4, 0.1])
    row = row_facts(np.array([2]), np.array([[0.45, 0.42, 0.13]]), t, keep=2)
    assert row.confident_N[0] == 2
    assert (row.guess_N("library")[0], row.guess_N("paper")[0]) == (0, 1)


# --- the library ---


@pytest.mark.parametrize("seed", range(8))
def test_agrees_with_the_library(seed: int) -> None:
    from cleanlab import count, filter, rank

    given, probs = random_problem(seed, rows=200 + 37 * seed, classes=3 + seed, absent=seed % 3 == 0)
    facts = facts_of(given, probs, batch=64)
    sums = ThresholdSums(probs.shape[1])
    sums.add_probs(given, probs)
    np.testing.assert_allclose(sums.thresholds(), count.get_confident_thresholds(given, probs), rtol=1e-12)
    joint = noise_rates.confident_joint(facts)
    np.testing.assert_array_equal(joint.toarray(), count.compute_confident_joint(given, probs, calibrate=False))
    calibrated = noise_rates.calibrated_joint(joint, facts.label_counts)
    ours, theirs = noise_rates.rounded_joint(calibrated), count.compute_confident_joint(given, probs)
    # ties among remainders may fall to another class, nothing else may differ
    assert abs(ours.toarray() - theirs).max() <= 1
    np.testing.assert_array_equal(ours.toarray().sum(1), theirs.sum(1))
    py, noise, inverse = count.estimate_latent(joint.toarray(), given)
    rates = noise_rates.noise_rates(joint, facts.label_counts)
    np.testing.assert_allclose(rates.prior_K, py, rtol=1e-9)
    np.testing.assert_allclose(rates.given_by_true.toarray(), noise, rtol=1e-9)
    np.testing.assert_allclose(rates.true_by_given.toarray(), inverse, rtol=1e-9)
    for name, theirs_of in (
        ("self_confidence", rank.get_self_confidence_for_each_label),
        ("normalized_margin", rank.get_normalized_margin_for_each_label),
        ("confidence_weighted_entropy", rank.get_confidence_weighted_entropy_for_each_label),
    ):
        np.testing.assert_allclose(label_scores(facts, name), theirs_of(given, probs), rtol=1e-9)
    from scipy.sparse import csr_array

    for name in FILTERS:
        for frac in (1.0, 0.6) if name.startswith("prune") or name == "both" else (1.0,):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                want = filter.find_label_issues(
                    given, probs, filter_by=name, frac_noise=frac, n_jobs=1, confident_joint=np.asarray(theirs)
                )
            got = find_issues(facts, name, csr_array(theirs), frac_noise=frac)
            np.testing.assert_array_equal(got, want, err_msg=name)


def test_few_rows_a_class_as_in_the_library() -> None:
    from cleanlab import filter

    for seed in range(5):
        given, probs = random_problem(seed, rows=14, classes=6)
        counts = np.random.default_rng(seed).integers(0, 4, (6, 6))
        from scipy.sparse import csr_array

        for least in (1, 2):
            for name in ("prune_by_class", "prune_by_noise_rate", "both"):
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    want = filter.find_label_issues(
                        given, probs, filter_by=name, min_examples_per_class=least, confident_joint=counts, n_jobs=1
                    )
                got = find_issues(facts_of(given, probs), name, csr_array(counts), min_examples=least)
                np.testing.assert_array_equal(got, want)


# --- other forms of the same ---


def test_shards_of_classes_merge_to_the_whole() -> None:
    given, probs = random_problem(3, classes=9)
    sums = ThresholdSums(9)
    sums.add_probs(given, probs)
    t = sums.thresholds()
    whole = row_facts(given, probs, t, keep=4)
    parts = [row_facts(given, probs[:, lo:hi], t, first=lo, keep=4) for lo, hi in ((0, 2), (2, 3), (3, 7), (7, 9))]
    for order in ([0, 1, 2, 3], [2, 0, 3, 1]):
        merged = parts[order[0]]
        for i in order[1:]:
            merged = merged.merge(parts[i])
        for name in ("self_N", "other_id_N", "other_N", "confident_N", "best_id_N", "best_N", "top_id_NM", "top_NM"):
            np.testing.assert_array_equal(getattr(merged, name), getattr(whole, name), err_msg=name)
        np.testing.assert_allclose(merged.entropy_N, whole.entropy_N, rtol=1e-12)


def test_thresholds_of_parts_merge() -> None:
    given, probs = random_problem(4)
    parts = [ThresholdSums(6), ThresholdSums(6), ThresholdSums(6)]
    for part, rows in zip(parts[:2], (slice(0, 100), slice(100, None)), strict=True):
        part.add_probs(given[rows], probs[rows])
    parts[2].add_probs(given, probs)
    merged = parts[0].merge(parts[1])
    np.testing.assert_allclose(merged.thresholds(), parts[2].thresholds(), rtol=1e-14)


def test_stored_best_classes_give_the_same_facts() -> None:
    given, probs = random_problem(5, classes=7)
    sums = ThresholdSums(7)
    sums.add_probs(given, probs)
    t = sums.thresholds()
    ids = np.argsort(-probs, axis=1)
    whole = row_facts(given, probs, t, keep=6)
    own = probs[np.arange(len(given)), given]
    full = facts_of_top(given, own, ids, np.take_along_axis(probs, ids, 1), whole.entropy_N, t)
    for name in ("self_N", "other_id_N", "other_N", "confident_N", "best_id_N", "best_N"):
        np.testing.assert_array_equal(getattr(full, name), getattr(whole, name), err_msg=name)
    for name in FILTERS:
        np.testing.assert_array_equal(find_issues(full, name), find_issues(whole, name))
    best = ids[:, :2]
    cut = facts_of_top(given, own, best, np.take_along_axis(probs, best, 1), whole.entropy_N, t)
    np.testing.assert_array_equal(cut.predicted_N, whole.predicted_N)
    assert (find_issues(cut, "confident_learning") == find_issues(whole, "confident_learning")).mean() > 0.99


def test_few_kept_classes_flag_nearly_the_same() -> None:
    given, probs = random_problem(6, rows=1000, classes=12)
    exact = find_issues(facts_of(given, probs), "prune_by_noise_rate")
    cut = find_issues(facts_of(given, probs, keep=3), "prune_by_noise_rate")
    assert not (cut & ~exact).sum() > 0.02 * exact.sum()
    assert (cut & exact).sum() > 0.95 * exact.sum()


def test_the_issue_table_is_ranked_and_has_keys() -> None:
    facts = facts_of(GIVEN, P)
    flags = {name: find_issues(facts, name) for name in FILTERS}
    table = issue_table(facts, [f"s{i}" for i in range(10)], flags, extra={"clean": np.arange(10)})
    assert table.column("key").to_pylist()[:3] == ["s8", "s5", "s2"]
    assert set(table.column_names) >= {"given", "suggested", "by_both", "clean", *SCORES}
    assert table.column("suggested").to_pylist()[:3] == [1, 0, 1]
    assert table.column("clean").to_pylist()[:3] == [8, 5, 2]
    assert issue_table(facts, pa.array(["x"] * 10), {}).num_rows == 0


# --- bad input ---


def test_bad_probabilities_and_labels_are_named() -> None:
    t = np.full(3, 0.5)
    with pytest.raises(DataError, match="row 1 has the probability nan"):
        row_facts(GIVEN[:2], np.array([[0.5, 0.3, 0.2], [np.nan, 0.5, 0.5]]), t)
    with pytest.raises(DataError, match="probabilities of row 7 add up to"):
        row_facts(GIVEN[:1], np.array([[0.5, 0.5, 0.5]]), t, first_row=7)
    with pytest.raises(DataError, match="row 0 is labelled 3, but the probabilities are over 3 classes"):
        row_facts(np.array([3]), P[:1], t)
    with pytest.raises(DataError, match="over 3 classes, the labels have 4"):
        ThresholdSums(4).add_probs(GIVEN, P)
    with pytest.raises(DataError, match=r"shape \[10, 3\] for 4 labels"):
        row_facts(GIVEN[:4], P, t)
    with pytest.raises(DataError, match="list of class ids"):
        ThresholdSums(3).add(GIVEN.astype(float), P[:, 0])
    with pytest.raises(DataError, match="filter 'best' is unknown"):
        find_issues(facts_of(GIVEN, P), "best")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="frac_noise 0"):
        find_issues(facts_of(GIVEN, P), frac_noise=0)
    assert ThresholdSums(2).thresholds()[0] == confident.ABSENT
