"""Exactly once, whatever happens: any world sizes, stops, damaged places and windows give the uninterrupted run's batches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from labelmill.data.mix import Mix
from labelmill.data.source import LocalSource
from labelmill.data.spec import AnySpec, MixedSpec, Reading, StreamSpec
from labelmill.data.stream import RankStream
from labelmill.errors import DataError

Step = tuple[tuple[int, ...], tuple[str, ...], tuple[float, ...]]


def run(spec: AnySpec, world: int, stop_after: int | None = None) -> list[Step]:
    """Global batches (positions, keys, weights) that `world` ranks see together, up to a stop."""
    steps = spec.steps if stop_after is None else min(stop_after, spec.steps)
    found: list[list[Any]] = [[] for _ in range(steps)]
    for rank in range(world):
        stream = RankStream(spec, LocalSource(spec, rank, world), rank, world, lambda raw, labels, rng: raw)
        batches = iter(stream)
        for step in range(steps):
            batch = next(batches)
            # a rank that a small last batch leaves empty gets a row of padding, which is no sample
            lo, hi = spec.batch_range(step)
            first, last = lo + rank * (hi - lo) // world, lo + (rank + 1) * (hi - lo) // world
            rows = zip(batch.positions_B.tolist(), batch.keys, batch.weight_B.tolist(), strict=True)
            found[step] += [row for row in rows if first <= row[0] < last]
        batches.close()
    return [tuple(zip(*rows, strict=True)) for rows in found]  # type: ignore[misc]


def interrupted(spec: AnySpec, legs: list[tuple[int, int, int]]) -> list[Step]:
    """The committed batches of a run in legs of (world, steps, steps since the last checkpoint when it died)."""
    committed: list[Step] = []
    cursor = spec.start
    for world, steps, lost in legs:
        batches = run(spec.after(cursor), world, steps)
        kept = batches[: max(0, len(batches) - lost)]
        committed += kept
        cursor += spec.global_batch * len(kept)
    return committed + run(spec.after(cursor), 1)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, int], Any]:
    """Tar data sets by (samples, samples a shard), made once."""
    from labelmill.data.labels import LabelSpec
    from labelmill.data.manifest import FieldSpec
    from labelmill.data.writer import ShardWriter

    made: dict[tuple[int, int], Any] = {}

    def make(samples: int, per_shard: int) -> Any:
        if (samples, per_shard) not in made:
            out = tmp_path_factory.mktemp("texts") / "data"
            fields, label = {"text": FieldSpec(kind="text", ext="txt")}, LabelSpec(form="single", num_classes=5)
            with ShardWriter(out, f"n{samples}", fields, label, samples_per_shard=per_shard) as writer:
                for i in range(samples):
                    writer.write(f"n{samples}-{i:04d}", {"text": f"word-{i}"}, {"label": i % 5})
                made[samples, per_shard] = writer.close()
        return made[samples, per_shard]

    return make


LEGS = st.lists(st.tuples(st.integers(1, 6), st.integers(0, 5), st.integers(0, 3)), max_size=3)
QUIET = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


@settings(max_examples=25, deadline=None, suppress_health_check=QUIET)
@given(LEGS, st.integers(1, 5), st.integers(0, 3), st.sampled_from([6, 12, 30]), st.integers(30, 170))
def test_committed_batches_are_those_of_the_uninterrupted_run(
    texts: Callable[[int, int], Any], legs: list[tuple[int, int, int]], window: int, seed: int, batch: int, stop: int
) -> None:
    spec = StreamSpec(texts(60, 7), "text", batch, seed=seed, window=window, stop=stop)
    expected = run(spec, 1)
    assert interrupted(spec, legs) == expected
    seen = Counter(key for _, keys, _ in expected for key in keys)
    assert set(seen.values()) <= {stop // 60, -(-stop // 60)}


@settings(max_examples=15, deadline=None, suppress_health_check=QUIET)
@given(LEGS, st.integers(1, 4), st.sets(st.integers(0, 8), min_size=1, max_size=3), st.data())
def test_holes_keep_their_places(
    texts: Callable[[int, int], Any],
    tmp_path_factory: Any,
    legs: list[tuple[int, int, int]],
    window: int,
    bad: set[int],
    data: Any,
) -> None:
    """Damaged shards become holes: no position moves, on any number of workers, before and after a resume."""
    import shutil

    whole = texts(60, 7)
    root = tmp_path_factory.mktemp("damaged") / "data"
    shutil.copytree(whole.root, root)
    damaged = whole.at(root)
    for i in bad:
        content = bytearray(Path(damaged.shard_path(i)).read_bytes())
        at = data.draw(st.integers(0, len(content) - 1025))
        content[at] ^= 0xFF
        Path(damaged.shard_path(i)).write_bytes(content)
    policy = data.draw(st.sampled_from(["shard", "sample"]))
    reading = Reading(on_damage=policy, verify=True)
    sound = StreamSpec(whole, "text", 12, seed=1, window=window, stop=100)
    spec = replace(sound, manifest=damaged, max_bad_samples=60, reading=reading)
    expected = run(sound, 1)
    found = interrupted(spec, legs)
    assert [step[0] for step in found] == [step[0] for step in expected]
    keys = [key for step in expected for key in step[1]]
    weights = [weight for step in found for weight in step[2]]
    hole_shards = {int(key[-4:]) // 7 for key, weight in zip(keys, weights, strict=True) if weight == 0}
    assert hole_shards <= bad
    assert found == run(spec, 1)
    with pytest.raises(DataError, match=r"damage|sha256|changed|header|end|sample"):
        run(replace(spec, reading=Reading(verify=True)), 1)


@settings(max_examples=15, deadline=None, suppress_health_check=QUIET)
@given(LEGS, st.tuples(st.integers(1, 4), st.integers(1, 4)), st.integers(1, 3))
def test_a_mix_is_exactly_proportioned_and_resumes(
    texts: Callable[[int, int], Any], legs: list[tuple[int, int, int]], weights: tuple[int, int], window: int
) -> None:
    parts = tuple(StreamSpec(texts(n, 7), "text", 12, seed=3, window=window) for n in (60, 25))
    spec = MixedSpec(parts, Mix(weights), 12, stop=150)
    expected = run(spec, 1)
    assert interrupted(spec, legs) == expected
    names = [key.partition("-")[0] for _, keys, _ in expected for key in keys]
    period = spec.mix.period
    for lo in range(0, len(names) - period + 1, period):
        assert Counter(names[lo : lo + period]) == dict(zip(("n60", "n25"), spec.mix.shares, strict=True))
    # each part's own samples are its own stream, in order
    own = [key for _, keys, _ in expected for key in keys if key.startswith("n25-")]
    alone = replace(parts[1], stop=len(own))
    assert own == [key for _, keys, _ in run(alone, 1) for key in keys]


def test_a_mix_of_other_labels_is_refused(texts: Callable[[int, int], Any]) -> None:
    data = texts(25, 7)
    other = data.model_copy(update={"label": data.label.model_copy(update={"num_classes": 9})})
    with pytest.raises(DataError, match=r"single of 9 classes.*single of 5 classes"):
        MixedSpec((StreamSpec(data, "text", 4), StreamSpec(other, "text", 4)), Mix([1, 1]), 4)


def test_inputs_of_a_mix_belong_to_their_keys(texts: Callable[[int, int], Any]) -> None:
    parts = tuple(StreamSpec(texts(n, 7), "text", 10, seed=3, window=2) for n in (60, 25))
    spec = MixedSpec(parts, Mix([2, 1], seed=5), 10, stop=90)
    for rank in (0, 1):
        for batch in RankStream(spec, LocalSource(spec, rank, 2), rank, 2, lambda raw, labels, rng: raw):
            numbers = np.array([int(key.partition("-")[2]) for key in batch.keys])
            assert batch.inputs == [f"word-{i}" for i in numbers]
            assert batch.labels.single_B.tolist() == (numbers % 5).tolist()
