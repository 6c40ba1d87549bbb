"""Mixed streams: exact proportions in every period, the same for any slicing, resumable from one integer."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from labelmill.data.mix import Mix, spread, whole_shares
from labelmill.data.plan import Plan
from labelmill.errors import DataError

SHARES = st.lists(st.integers(1, 12), min_size=1, max_size=6)
MIXES = st.builds(Mix, SHARES, st.none() | st.integers(0, 3))


@pytest.mark.parametrize(
    ("weights", "shares"),
    [
        ([0.7, 0.3], (7, 3)),
        ([70, 30], (7, 3)),
        ([1e6, 2e6, 1e6], (1, 2, 1)),
        ([0.1, 0.2, 0.7], (1, 2, 7)),
        ([Fraction(1, 3), Fraction(2, 3)], (1, 2)),
        ([5], (1,)),
    ],
)
def test_weights_become_the_smallest_whole_shares(weights: list[Any], shares: tuple[int, ...]) -> None:
    mix = Mix(weights)
    assert mix.shares == shares
    assert mix.exact


def test_long_periods_are_rounded_and_said_to_be() -> None:
    mix = Mix([0.123456, 0.876544], max_period=1000)
    assert mix.shares == (123, 877)
    assert not mix.exact
    assert mix.describe() == "123 + 877 of every 1000 samples (12.3%, 87.7%, rounded from weights 0.123456, 0.876544)"
    assert Mix([0.7, 0.3]).describe() == "7 + 3 of every 10 samples (70%, 30%)"


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=6))
def test_rounded_shares_are_off_by_less_than_one_place(weights: list[float]) -> None:
    shares = np.array(whole_shares(weights, 50_000))
    assert np.abs(shares / shares.sum() - np.array(weights) / sum(weights)).max() < 1 / 50_000 + 1e-12


@pytest.mark.parametrize("weights", [[], [1, 0], [1, -2], [float("nan"), 1], [float("inf"), 1], [True, 1]])
def test_wrong_weights_are_refused(weights: list[Any]) -> None:
    with pytest.raises(DataError, match="weight"):
        Mix(weights)
    with pytest.raises(DataError, match=r"weight 1e-09 of a mix is less than one in 10000"):
        Mix([1.0, 1e-9])


@settings(max_examples=100, deadline=None)
@given(SHARES)
def test_an_even_spread_is_never_a_sample_away(shares: list[int]) -> None:
    period = sum(shares)
    given_K = np.cumsum(spread(shares)[:, None] == np.arange(len(shares)), axis=0)
    assert given_K[-1].tolist() == shares
    assert (np.abs(given_K * period - np.outer(np.arange(1, period + 1), shares)) < period).all()


@settings(max_examples=100, deadline=None)
@given(MIXES, st.integers(0, 400), st.integers(0, 150))
def test_every_period_is_exact_and_every_slicing_agrees(mix: Mix, start: int, length: int) -> None:
    stop, k = start + length, len(mix.shares)
    whole = mix.source_of(np.arange(stop + mix.period))
    for period in range(stop // mix.period):
        here = whole[period * mix.period : (period + 1) * mix.period]
        assert np.bincount(here, minlength=k).tolist() == list(mix.shares)
    source_B, local_B = mix.order(start, stop)
    assert source_B.tolist() == whole[start:stop].tolist()
    ranges = mix.ranges(start, stop)
    for source, (a, b) in enumerate(ranges.tolist()):
        # a source's own positions in the range: contiguous, in order, from where it stood
        assert local_B[source_B == source].tolist() == list(range(a, b))
        assert a == np.count_nonzero(whole[:start] == source)
    assert mix.local(start).sum() == start
    assert (mix.local(start + 1) - mix.local(start)).tolist() == np.eye(k, dtype=int)[whole[start]].tolist()


@settings(max_examples=50, deadline=None)
@given(MIXES, st.lists(st.integers(1, 40), min_size=1, max_size=8))
def test_pieces_give_what_one_pass_gives(mix: Mix, lengths: list[int]) -> None:
    ends = np.cumsum(lengths).tolist()
    pieces = [mix.order(a, b) for a, b in zip([0, *ends[:-1]], ends, strict=True)]
    again = Mix(mix.weights, mix.seed)
    for part in (0, 1):
        assert np.concatenate([p[part] for p in pieces]).tolist() == again.order(0, ends[-1])[part].tolist()


def test_positions_far_away_and_in_any_order() -> None:
    for seed in (None, 3):
        mix = Mix([5, 2, 1], seed)
        far = 10**15 + np.array([9, 0, 4, 4])
        assert mix.source_of(far).tolist() == [mix.source_of(np.array([p]))[0] for p in far]
        assert mix.local(10**15).tolist() == [5 * 10**15 // 8, 2 * 10**15 // 8, 10**15 // 8]
        assert mix.order(10**15 + 4, 10**15 + 4)[0].size == 0


def test_seed_shuffles_within_periods_and_counts_for_the_digest() -> None:
    even, one, two = Mix([3, 2]), Mix([3, 2], 1), Mix([3, 2], 2)
    orders = [m.source_of(np.arange(100)).tolist() for m in (even, one, two)]
    assert len({tuple(o) for o in orders}) == 3
    assert len({tuple(orders[1][i : i + 5]) for i in range(0, 100, 5)}) > 3, "periods differ"
    assert len({even.digest, one.digest, two.digest, Mix([3, 1]).digest}) == 4
    assert even.digest == Mix([0.6, 0.4]).digest


def test_sources_of_different_length_go_into_epochs_of_their_own() -> None:
    mix, plans = Mix([3, 1]), [Plan([4, 6], seed=1, window=1), Plan([50], seed=2)]
    source_B, local_B = mix.order(0, 160)
    drawn = []
    for k, plan in enumerate(plans):
        mine = local_B[source_B == k]
        drawn.append(list(zip(*(part.tolist() for part in plan.samples(0, len(mine))), strict=True)))
    assert [len(d) for d in drawn] == [120, 40]
    assert all(len(set(drawn[0][i : i + 10])) == 10 for i in range(0, 120, 10)), "twelve whole epochs of the short one"
    assert len(set(drawn[1])) == 40
