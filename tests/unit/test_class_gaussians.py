"""Robust class Gaussians and lending to the tail: values worked out by hand, and properties."""

from __future__ import annotations

import numpy as np
import pytest

from labelmill.errors import DataError
from labelmill.evaluation.class_gaussians import (
    ClassGaussians,
    calibrate_tail,
    class_gaussians,
    head_classes,
    lending_weights,
    local_outlier_factor,
    missing_to_balance,
)


def four() -> ClassGaussians:
    mean = np.array([[0, 0], [2, 0], [0, 3], [1, 1]], float)
    cov = np.stack([np.eye(2) * s for s in (1, 2, 0.5, 0.1)])
    return ClassGaussians(mean, cov, np.array([100, 50, 80, 4]), np.array([100, 50, 80, 4]))


HEAD = np.array([True, True, True, False])


def test_local_outlier_factors_by_hand() -> None:
    z = np.array([[0], [0.1], [0.2], [0.35], [5]])
    np.testing.assert_allclose(local_outlier_factor(z, 2), [0.857143, 1.083333, 0.9375, 1.142857, 25.3125], atol=1e-5)
    found = class_gaussians(z, np.zeros(5, int), 1, neighbours=2)
    assert found.kept_K.tolist() == [4]
    assert found.mean_KD[0, 0] == pytest.approx(0.1625)


def test_lending_by_hand() -> None:
    found, warnings = calibrate_tail(four(), HEAD, q=2, beta=0.5, alpha=0.0)
    np.testing.assert_allclose(lending_weights(np.array([100, 50]), np.array([2.0, 2.0])), [2 / 3, 1 / 3])
    np.testing.assert_allclose(found.mean_KD[3], [0.833333, 0.5], atol=1e-6)
    np.testing.assert_allclose(found.cov_KDD[3], 0.716667 * np.eye(2), atol=1e-6)
    assert not warnings
    ones, _ = calibrate_tail(four(), HEAD, q=2, beta=0.5, alpha=0.1, ones=True)
    np.testing.assert_allclose(ones.cov_KDD[3], [[0.816667, 0.1], [0.1, 0.816667]], atol=1e-6)
    np.testing.assert_allclose(np.linalg.eigvalsh(ones.cov_KDD[3]), [0.716667, 0.916667], atol=1e-6)
    np.testing.assert_array_equal(found.mean_KD[:3], four().mean_KD[:3])


def test_without_lending_nothing_changes_and_equal_means_take_all() -> None:
    found, _ = calibrate_tail(four(), HEAD, beta=0.0, alpha=0.0)
    np.testing.assert_array_equal(found.mean_KD, four().mean_KD)
    np.testing.assert_array_equal(found.cov_KDD, four().cov_KDD)
    assert lending_weights(np.array([5, 7]), np.array([0.0, 2.0])).tolist() == [1, 0]


def test_classes_with_few_rows_borrow_all() -> None:
    given = four()
    given.kept_K[3] = 1
    found, warnings = calibrate_tail(given, HEAD, q=1)
    np.testing.assert_allclose(found.mean_KD[3], [0, 0])
    assert "fewer than 2 rows" in warnings[0]
    given.kept_K[3] = 0
    found, _ = calibrate_tail(given, HEAD)
    np.testing.assert_allclose(found.mean_KD[3], np.array([100, 50, 80]) @ given.mean_KD[:3] / 230)
    with pytest.raises(DataError, match="no head class"):
        calibrate_tail(given, np.zeros(4, bool))


def test_wrong_labels_far_off_move_the_mean_less_without_outliers() -> None:
    rng = np.random.default_rng(0)
    z = np.concatenate([rng.normal(size=(900, 2)), rng.normal(size=(12, 2)) * 4 + 20])
    label = np.zeros(len(z), int)
    raw = class_gaussians(z, label, 1, neighbours=0)
    robust = class_gaussians(z, label, 1, neighbours=20)
    assert np.linalg.norm(robust.mean_KD[0]) < 0.5 * np.linalg.norm(raw.mean_KD[0])
    np.testing.assert_allclose(raw.cov_KDD[0], np.cov(z, rowvar=False))


def test_a_clump_of_wrong_labels_is_found_with_more_neighbours_than_it_has_rows() -> None:
    rng = np.random.default_rng(1)
    z = np.concatenate([rng.normal(size=(900, 2)), rng.normal(size=(100, 2)) + 8])
    raw, few, many = (class_gaussians(z, np.zeros(1000, int), 1, neighbours=n).mean_KD[0] for n in (0, 20, 150))
    assert np.linalg.norm(few) < np.linalg.norm(raw)
    assert np.linalg.norm(many) < 0.2 < 0.9 < np.linalg.norm(few)


def test_draws_have_the_mean_and_the_covariance() -> None:
    given = four()
    given.cov_KDD[1] = [[2.0, 0.7], [0.7, 1.0]]
    draws = given.sample(1, 100_000, seed=3)
    error = 3 * np.sqrt(np.diagonal(given.cov_KDD[1]) / 1e5)
    assert (np.abs(draws.mean(0) - given.mean_KD[1]) < error).all()
    np.testing.assert_allclose(np.cov(draws, rowvar=False), given.cov_KDD[1], atol=3 * 2 * np.sqrt(2 / 1e5))
    np.testing.assert_array_equal(given.sample(1, 5, 3), draws[:5])
    assert (given.sample(1, 5, 3, step=1) != draws[:5]).all()
    given.cov_KDD[2] = [[1.0, 2.0], [2.0, 1.0]]
    with pytest.raises(DataError, match=r"class 2: the covariance of 80 rows of 2 features"):
        given.sample(2, 1, 0)


def test_head_and_tail_and_what_is_missing() -> None:
    assert head_classes(np.array([1, 50, 30, 10, 9]), 0.6).tolist() == [False, True, True, False, False]
    assert head_classes(np.array([5, 0]), 1.0).tolist() == [True, False]
    assert missing_to_balance([5, 3, 0]).tolist() == [0, 2, 5]
    assert missing_to_balance([5, 3, 0], most=3).tolist() == [0, 2, 3]
    with pytest.raises(DataError, match="row 1 are not finite"):
        class_gaussians(np.array([[0.0], [np.nan]]), np.zeros(2, int), 1)


def test_few_rows_in_many_dimensions_can_be_drawn_from() -> None:
    z = np.random.default_rng(0).normal(size=(4, 10))
    found = class_gaussians(z, np.zeros(4, int), 1, neighbours=0)
    assert np.isfinite(found.sample(0, 3, 0)).all()
    np.testing.assert_allclose(np.diagonal(found.cov_KDD[0]), z.var(0, ddof=1))
