"""Extreme ranking metrics against the values of small examples worked out by hand and by the official formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest

from labelmill.errors import DataError
from labelmill.evaluation.extreme import RankedSums, drop_filtered, frequency_bands, inverse_propensities

SCORES = np.array([[0.9, 0.8, 0.7, 0.1, 0.0], [0.1, 0.9, 0.3, 0.8, 0.2]])
TRUE = np.array([[0, 2, 4], [2, 3, -1]])
RANKED = np.argsort(-SCORES, axis=1, kind="stable")
FREQUENCY = np.array([100, 10, 1, 5, 0])


def test_values_and_streaming() -> None:
    inverse = inverse_propensities(FREQUENCY, 1000)
    expected = [1.7704299874, 3.5521470235, 6.9077552790, 4.4929080698, 8.8241885777]
    assert inverse.tolist() == pytest.approx(expected, abs=1e-9)
    options = {"ks": (1, 3, 5), "recall_ks": (3,), "inverse_L": inverse, "num_labels": 5}
    whole = RankedSums(**options)
    whole.add(RANKED, TRUE)
    found = whole.metrics()
    values = {
        "P@1": 0.5,
        "P@3": 0.6666666667,
        "P@5": 0.5,
        "R@3": 0.8333333333,
        "nDCG@3": 0.6986722463,
        "nDCG@5": 0.7894431426,
        "PSP@1": 0.1125372683,
        "PSP@3": 0.6946968404,
        "macro R@5": 1.0,
    }
    for name, value in values.items():
        assert found[name] == pytest.approx(value, abs=1e-9), name
    first, second = RankedSums(**options), RankedSums(**options)
    first.add(RANKED[:1], TRUE[:1])
    second.add(RANKED[1:], TRUE[1:])
    assert first.merge(second).metrics() == pytest.approx(found), "sums add up"


def test_bands_and_slices() -> None:
    band = frequency_bands(np.array([50, 30, 15, 5, 0]), (0.5, 0.8))
    assert band.tolist() == [0, 1, 2, 2, 2]
    sums = RankedSums(ks=(1,), recall_ks=(1,), band_L=band, num_labels=5)
    sums.add(np.array([[0], [1], [0]]), np.array([[0, -1], [2, 1], [4, -1]]))
    found = sums.metrics()
    assert found["head R@1"] == 1.0
    assert found["torso R@1"] == 1.0
    assert found["tail R@1"] == 0.0
    assert found["macro R@1"] == pytest.approx((1 + 1 + 0 + 0) / 4)


def test_queries_without_labels_and_bad_input() -> None:
    sums = RankedSums(ks=(1,), recall_ks=(2,))
    sums.add(np.array([[0, 1], [2, 3]]), np.array([[0], [-1]]))
    assert sums.empty == 1
    assert sums.metrics() == {"P@1": 0.5, "nDCG@1": 1.0, "R@2": 1.0}
    with pytest.raises(DataError, match="1 labels are ranked a query, the metrics need 2"):
        sums.add(np.array([[0]]), np.array([[0]]))
    with pytest.raises(DataError, match="of no query"):
        RankedSums().metrics()
    with pytest.raises(ValueError, match="at least 1"):
        RankedSums(ks=(0,))
    with pytest.raises(DataError, match="between 0 and the 5"):
        inverse_propensities(np.array([6]), 5)
    assert math.isclose(inverse_propensities(np.array([5]), 5)[0], 1 + (math.log(5) - 1) * 2.5**0.55 * 6.5**-0.55)


def test_filtered_labels_leave_the_ranking() -> None:
    kept = drop_filtered(np.array([[4, 2, 7], [1, 2, 3]]), ["a", "b"], {"a": {2}}, 2)
    assert kept.tolist() == [[4, 7], [1, 2]]
    assert drop_filtered(np.array([[4, 2]]), ["a"], {"a": {2}}, 2).tolist() == [[4, -1]]
