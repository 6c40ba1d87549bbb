"""The order of a stream: each sample once an epoch, independent of world size, resumable anywhere."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from labelmill.data.plan import Plan, padded_share, share
from labelmill.data.reading import POSITION
from labelmill.data.source import LocalSource, Streams
from labelmill.data.spec import StreamSpec
from labelmill.data.stream import RankStream
from labelmill.errors import DataError

COUNTS = st.lists(st.integers(0, 9), min_size=1, max_size=8).filter(lambda c: sum(c) > 0)


@settings(max_examples=60, deadline=None)
@given(COUNTS, st.integers(0, 5), st.integers(1, 4), st.booleans())
def test_an_epoch_holds_each_sample_once(counts: list[int], seed: int, window: int, shuffle: bool) -> None:
    plan = Plan(tuple(counts), seed, window, shuffle)
    total = sum(counts)
    for epoch in (0, 1):
        seen: Counter[tuple[int, int]] = Counter()
        position = epoch * total
        for w in plan.windows(epoch * total, (epoch + 1) * total):
            assert w.start == position
            position = w.stop
            first = np.concatenate([[0], np.cumsum([counts[i] for i in w.shards])])
            for row in plan.rows(w):
                k = int(np.searchsorted(first, row, side="right")) - 1
                seen[(w.shards[k], int(row - first[k]))] += 1
        assert position == (epoch + 1) * total
        assert set(seen.values()) == {1}
        assert len(seen) == total


def test_order_depends_on_seed_and_epoch() -> None:
    def order(seed: int, epoch: int) -> list[Any]:
        plan = Plan((50,) * 6, seed, 3)
        return [(w.shards, plan.rows(w).tolist()) for w in plan.windows(epoch * 300, (epoch + 1) * 300)]

    assert order(1, 0) == order(1, 0)
    assert order(1, 0) != order(1, 1)
    assert order(1, 0) != order(2, 0)


@given(st.integers(0, 40), st.integers(1, 6))
def test_shares_cover_a_batch(n: int, world: int) -> None:
    parts = [share(100, 100 + n, r, world) for r in range(world)]
    assert parts[0][0] == 100
    assert parts[-1][1] == 100 + n
    assert all(a[1] == b[0] for a, b in pairwise(parts))
    if n:
        assert all(hi > lo for lo, hi in (padded_share(100, 100 + n, r, world) for r in range(world)))


def positions(spec: StreamSpec, world: int) -> list[list[int]]:
    """Global batches as position lists, put together from all ranks."""
    batches: list[list[int]] = [[] for _ in range(spec.steps)]
    for rank in range(world):
        stream = RankStream(spec, LocalSource(spec, rank, world), rank, world, lambda raw, labels, rng: raw)
        for step, batch in enumerate(stream):
            batches[step] += batch.positions_B[batch.weight_B > 0].tolist()
    return batches


@pytest.mark.parametrize("world", [1, 2, 3, 6])
def test_global_batches_are_the_same_for_any_world(make_text_data: Callable[..., Any], world: int) -> None:
    data = make_text_data(101, 13)
    spec = StreamSpec(data, "text", 24, seed=5, window=3, stop=202)
    assert positions(spec, world) == positions(spec, 1)
    flat = [p for batch in positions(spec, world) for p in batch]
    assert flat == list(range(202))


def test_samples_of_two_epochs_and_resume(make_text_data: Callable[..., Any]) -> None:
    data = make_text_data(50, 7)
    spec = StreamSpec(data, "text", 12, seed=1, window=2, stop=96)

    def keys(part: StreamSpec) -> list[str]:
        stream = RankStream(part, LocalSource(part), 0, 1, lambda raw, labels, rng: raw)
        return [key for batch in stream for key in batch.keys]

    whole = keys(spec)
    assert len(set(whole[:50])) == 50, "the first epoch holds each sample once"
    assert len(set(whole[50:])) == 46
    assert whole[:46] != whole[50:]
    for cursor in (12, 24, 60, 84):
        assert keys(spec.after(cursor)) == whole[cursor:]


def test_inputs_and_labels_belong_to_the_key(make_text_data: Callable[..., Any]) -> None:
    data = make_text_data(40, 9, classes=5)
    spec = StreamSpec(data, "text", 16, seed=2)
    for batch in RankStream(spec, LocalSource(spec), 0, 1, lambda raw, labels, rng: raw):
        for key, text, label in zip(batch.keys, batch.inputs, batch.labels.single_B.tolist(), strict=True):
            i = int(key[1:])
            assert text == f"word-{i}"
            assert label == i % 5


def test_augmentation_keys_do_not_depend_on_the_world(make_text_data: Callable[..., Any]) -> None:
    data = make_text_data(40, 9)
    spec = StreamSpec(data, "text", 8, seed=2)

    def drawn(world: int) -> dict[int, int]:
        found: dict[int, int] = {}
        for rank in range(world):
            stream = RankStream(
                spec, LocalSource(spec, rank, world), rank, world, lambda raw, labels, rng: rng, augment=True
            )
            for batch in stream:
                found |= dict(zip(batch.positions_B.tolist(), batch.inputs.tolist(), strict=True))
        return found

    assert drawn(1) == drawn(2) == drawn(4)
    assert len(set(drawn(1).values())) == 40


def test_an_error_in_the_reader_reaches_the_consumer(make_text_data: Callable[..., Any]) -> None:
    data = make_text_data(10, 5)
    spec = StreamSpec(data, "text", 5)

    def broken(raw: Any, labels: Any, rng: Any) -> Any:
        raise ValueError("broken prepare")

    with pytest.raises(ValueError, match="broken prepare"):
        list(RankStream(spec, LocalSource(spec), 0, 1, broken))


def test_unknown_field_is_named(make_text_data: Callable[..., Any]) -> None:
    with pytest.raises(DataError, match="no field 'image'; it has: text"):
        StreamSpec(make_text_data(4, 2), "image", 2)


def test_the_digest_follows_order_and_data(make_text_data: Callable[..., Any]) -> None:
    spec = StreamSpec(make_text_data(20, 5), "text", 5)
    assert spec.digest == replace(spec, global_batch=10).digest, "the cursor counts samples, not batches"
    assert spec.digest != replace(spec, seed=1).digest
    assert spec.digest != replace(spec, window=2).digest
    assert spec.digest != StreamSpec(make_text_data(20, 4, name="other"), "text", 5).digest


def rows(pieces: Any) -> pa.Table:
    """A rank's rows of a step as one table."""
    return pa.concat_tables([table for part in pieces for table in part])


def test_ray_gives_what_the_local_reader_gives(make_text_data: Callable[..., Any], ray_session: None) -> None:
    data = make_text_data(101, 13)
    spec = StreamSpec(data, "text", 24, seed=5, window=3, start=24, stop=202)
    for world in (1, 2, 3):
        ranks = [Streams(rank, world, 0.25, f"test-{world}").open(spec) for rank in range(world)]
        here = [LocalSource(spec, rank, world) for rank in range(world)]
        for step in range(spec.steps):
            for rank in range(world):
                got, expected = rows(ranks[rank].pieces(step)), rows(here[rank].pieces(step))
                for column in ("key", "text", "label", POSITION):
                    assert got.column(column).to_pylist() == expected.column(column).to_pylist()
        assert all(r.pieces(spec.steps) is None for r in ranks)
        for r in ranks:
            r.close()


def test_a_ray_data_set_holds_the_same_rows_in_order(make_text_data: Callable[..., Any], ray_session: None) -> None:
    from labelmill.data.ray_data import ray_dataset

    spec = StreamSpec(make_text_data(101, 13), "text", 24, seed=5, window=3, start=10, stop=90)
    found = [(row[POSITION], row["key"], row["text"], row["label"]) for row in ray_dataset(spec).iter_rows()]
    source = LocalSource(spec)
    table = pa.concat_tables([rows(source.pieces(step)) for step in range(spec.steps)])
    expected = zip(*(table.column(c).to_pylist() for c in (POSITION, "key", "text", "label")), strict=True)
    assert found == list(expected)


def test_a_damaged_shard_stops_the_ray_stream_and_is_named(
    make_text_data: Callable[..., Any], ray_session: None
) -> None:
    from labelmill.errors import user_error_in

    data = make_text_data(60, 20)
    path = data.shard_path(1)
    with open(path, "r+b") as file:
        file.truncate(1024)
    spec = StreamSpec(data, "text", 20)
    source = Streams().open(spec)
    with pytest.raises(Exception, match=r"texts") as caught:
        [source.pieces(step) for step in range(spec.steps)]
    error = user_error_in(caught.value)
    assert isinstance(error, DataError)
    assert path in str(error)


def test_a_cursor_of_another_order_is_refused(make_text_data: Callable[..., Any], tmp_path: Any) -> None:
    import json

    from labelmill.training.config import TrainConfig
    from labelmill.training.resume import _position
    from labelmill.training.worker import FitTask

    spec = StreamSpec(make_text_data(20, 5), "text", 5)
    (tmp_path / "checkpoint.json").write_text(json.dumps({"stream": spec.digest, "files": {}}))
    others = [
        replace(spec, seed=1),
        replace(spec, window=2),
        StreamSpec(make_text_data(21, 5, name="other"), "text", 5),
    ]
    for other in others:
        task: Any = FitTask(lambda: None, TrainConfig(global_batch=5, steps=2), other)  # type: ignore[arg-type,return-value]
        nothing: Any = None
        with pytest.raises(DataError, match="another data set, seed or shuffle window"):
            _position(task, nothing, nothing, tmp_path, nothing)
