"""The plan: the order of earlier releases, the same for any slicing, and cheap for a thousand million samples."""

from __future__ import annotations

import hashlib
import pickle
import time
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from labelmill.data.manifest import FieldSpec, LabelSpec, Manifest, ShardInfo, load_manifest, save_manifest
from labelmill.data.plan import Plan, Window
from labelmill.data.spec import StreamSpec

COUNTS = st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(lambda c: sum(c) > 0)
PLANS = st.builds(Plan, COUNTS, st.integers(0, 5), st.integers(1, 5), st.booleans())


def epoch(plan: Plan, number: int) -> list[tuple[int, int]]:
    """An epoch's samples as (shard, row), in order."""
    n = plan.epoch_samples
    shards, rows = plan.samples(number * n, (number + 1) * n)
    return list(zip(shards.tolist(), rows.tolist(), strict=True))


def test_orders_and_digests_of_earlier_releases_stay_valid() -> None:
    found = hashlib.sha256()
    counts = tuple((7 * i) % 13 for i in range(50))
    for seed, window, shuffle in ((0, 8, True), (5, 3, True), (1, 50, True), (2, 100, True), (3, 4, False)):
        plan = Plan(counts, seed, window, shuffle)
        for w in plan.windows(0, 3 * plan.epoch_samples):
            found.update(repr((w.start, w.samples, w.shards, w.epoch, w.index, plan.rows(w).tolist())).encode())
        found.update(plan.digest("abc").encode())
    # written down from the release that first stored cursors
    assert found.hexdigest() == "e506c29bb51967c271df46782a95bcc2be67e6998b4a5668015cfe9bf935bd7b"


@settings(max_examples=80, deadline=None)
@given(PLANS, st.integers(0, 3))
def test_an_epoch_holds_each_sample_once(plan: Plan, number: int) -> None:
    assert sorted(epoch(plan, number)) == [(s, r) for s, n in enumerate(plan.counts) for r in range(n)]


@settings(max_examples=80, deadline=None)
@given(PLANS, st.data())
def test_any_slice_of_the_positions_gives_the_same_windows(plan: Plan, data: st.DataObject) -> None:
    end = 4 * plan.epoch_samples
    whole = list(plan.windows(0, end))
    assert [w.start for w in whole] == [0] + [w.stop for w in whole[:-1]]
    assert whole[-1].stop == end
    assert all(w.samples for w in whole), "no task reads nothing"
    start = data.draw(st.integers(0, end - 1))
    stop = data.draw(st.integers(start, end))
    fresh = Plan(plan.counts, plan.seed, plan.window, plan.shuffle)
    assert list(fresh.windows(start, stop)) == [w for w in whole if w.stop > start and w.start < stop and start < stop]
    at = next(w for w in whole if w.start <= start < w.stop)
    assert fresh.window_at(start) == at
    assert fresh.rows(at).tolist() == plan.rows(at).tolist()
    shards, rows = plan.samples(0, end)
    part = fresh.samples(start, stop)
    assert part[0].tolist() == shards[start:stop].tolist()
    assert part[1].tolist() == rows[start:stop].tolist()


def test_epochs_differ_and_without_shuffle_the_manifest_s_order_stays() -> None:
    plan = Plan([20] * 9, seed=3, window=2)
    assert len({tuple(epoch(plan, n)) for n in range(4)}) == 4
    straight = Plan([3, 0, 2], window=2, shuffle=False)
    assert epoch(straight, 0) == epoch(straight, 5) == [(0, 0), (0, 1), (0, 2), (2, 0), (2, 1)]


def test_nothing_to_give_and_wrong_arguments() -> None:
    assert list(Plan([]).windows(0, 5)) == list(Plan([0, 0]).windows(0, 5)) == []
    assert list(Plan([3]).windows(2, 2)) == []
    with pytest.raises(ValueError, match="no position 0"):
        Plan([0]).window_at(0)
    with pytest.raises(ValueError, match="no position -1"):
        Plan([3]).window_at(-1)
    for counts, window in (([1, -1], 8), ([1], 0), ([[1]], 8)):
        with pytest.raises(ValueError, match="non-negative"):
            Plan(counts, 0, window)  # type: ignore[arg-type]


def test_a_plan_travels_without_its_layouts() -> None:
    plan = Plan(np.full(10_000, 5), seed=1)
    before = len(pickle.dumps(plan))
    window = plan.window_at(123_456)
    assert len(pickle.dumps(plan)) == before
    again = pickle.loads(pickle.dumps(plan))
    assert again.window_at(123_456) == window
    assert again.digest("data") == plan.digest("data")


def peak_of(work: object) -> tuple[float, float, object]:
    """MiB at the peak, CPU seconds, result of a call."""
    tracemalloc.start()
    began = time.process_time()
    try:
        result = work()  # type: ignore[operator]
        return tracemalloc.get_traced_memory()[1] / 2**20, time.process_time() - began, result
    finally:
        tracemalloc.stop()


def test_a_thousand_million_samples_in_a_million_shards() -> None:
    counts = np.full(1_000_000, 1000)
    position = 7 * 10**9 + 987_654_321

    def work() -> tuple[Window, np.ndarray]:
        plan = Plan(counts, seed=4)
        window = plan.window_at(position)
        return window, plan.rows(window)

    mib, seconds, (window, rows) = peak_of(work)
    assert mib < 64
    assert seconds < 1.0
    assert window.epoch == 7
    assert window.start <= position < window.stop
    assert np.array_equal(np.sort(rows), np.arange(8000))
    # the following windows, over the border of the epoch as well, cost their own size
    plan = Plan(counts, seed=4)
    assert sum(w.samples for w in plan.windows(8 * 10**9 - 16_000, 8 * 10**9 + 16_000)) == 32_000
    mib, _, found = peak_of(lambda: plan.samples(7 * 10**9 + 5, 7 * 10**9 + 20_005))
    assert len(set(zip(*(part.tolist() for part in found), strict=True))) == 20_000
    assert mib < 16
    assert peak_of(lambda: plan.digest("data"))[0] < 16


def synthetic(shards: int, samples: int) -> Manifest:
    infos = [ShardInfo(path=f"{i:06d}.tar", samples=samples, bytes=1, sha256=f"{i:064x}") for i in range(shards)]
    fields = {"text": FieldSpec(kind="text", ext="txt")}
    label = LabelSpec(form="single", num_classes=10)
    return Manifest(name="big", layout="packed", fields=fields, label=label, shards=tuple(infos))


def test_a_stream_over_a_manifest_of_a_thousand_million_samples() -> None:
    spec = StreamSpec(synthetic(10_000, 100_000), "text", 1024, seed=1)
    assert spec.manifest.num_samples == 10**9

    def work() -> tuple[Window, np.ndarray]:
        plan = spec.plan
        window = plan.window_at(3 * 10**9 + 7)
        return window, plan.rows(window)

    mib, seconds, (window, rows) = peak_of(work)
    assert (window.epoch, len(rows)) == (3, 800_000)
    assert mib < 64
    assert seconds < 1.0


def test_a_manifest_of_a_million_samples_opens_at_once(tmp_path: Path) -> None:
    save_manifest(synthetic(1000, 1000), tmp_path)
    mib, seconds, manifest = peak_of(lambda: load_manifest(tmp_path))
    assert isinstance(manifest, Manifest)
    assert manifest.num_samples == 10**6
    assert mib < 100
    assert seconds < 1.0


def test_a_large_window_takes_its_own_size() -> None:
    plan = Plan(np.full(64, 31_250), window=64)
    mib, _, rows = peak_of(lambda: plan.rows(plan.window_at(10)))
    assert len(rows) == 2_000_000  # type: ignore[arg-type]
    assert mib < 2 * 2_000_000 * 8 / 2**20
    assert Counter(np.bincount(rows).tolist()) == {1: 2_000_000}  # type: ignore[call-overload]
