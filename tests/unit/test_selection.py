"""Selections: exact quotas in every epoch, turns over epochs, one file, errors that name the key or class."""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from labelmill.data import choose
from labelmill.data.choose import apportion, as_integers, balance, drop_keys, keep_classes, keep_keys, repeat_factors
from labelmill.data.labels import LabelSpec
from labelmill.data.manifest import FieldSpec, Manifest, ShardInfo
from labelmill.data.plan import Plan
from labelmill.data.selection import Balanced, KeepRows, Selection, load_selection
from labelmill.data.selection_config import SelectionConfig, read_keys
from labelmill.data.source import LocalSource
from labelmill.data.spec import StreamSpec
from labelmill.data.stream import RankStream
from labelmill.errors import DataError

SELECT: TypeAdapter[Any] = TypeAdapter(SelectionConfig)


class Data:
    """A data set of labels alone, as manifest and as tables: what choosing needs."""

    def __init__(self, shards: Sequence[Sequence[Any]], form: str = "single", classes: int = 5, **columns: Any) -> None:
        self.spec = LabelSpec(form=form, num_classes=classes)  # type: ignore[arg-type]
        self.labels = [label for shard in shards for label in shard]
        infos = [
            ShardInfo(path=f"{i}.tar", samples=len(shard), bytes=1, sha256=f"{i:064x}")
            for i, shard in enumerate(shards)
        ]
        fields = {"text": FieldSpec(kind="text", ext="txt")}
        self.manifest = Manifest(name="made", layout="packed", fields=fields, label=self.spec, shards=tuple(infos))
        self.tables, at = [], 0
        for i, shard in enumerate(shards):
            table = {"key": pa.array([f"s{at + j}" for j in range(len(shard))])}
            table["label"] = pa.array(list(shard), self.spec.columns["label"])
            table |= {name: pa.array(value[i], self.spec.columns[name]) for name, value in columns.items()}
            self.tables.append(pa.table(table))
            at += len(shard)


def uses(selection: Selection, epoch: int) -> np.ndarray:
    """How often each sample of the data set is drawn in an epoch; checks counts against rows on the way."""
    counts = selection.counts(epoch)
    assert counts.dtype == np.int64
    assert counts.sum() == selection.samples
    found = []
    for shard, n in enumerate(selection.shard_samples.tolist()):
        rows = selection.rows(epoch, shard)
        assert len(rows) == counts[shard]
        assert (np.diff(rows) >= 0).all()
        found.append(np.bincount(rows, minlength=n))
    return np.concatenate(found)


def per_class(data: Data, selection: Selection, epoch: int) -> list[int]:
    return np.bincount(data.labels, uses(selection, epoch), data.spec.num_classes).astype(int).tolist()


SINGLE = st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=12), min_size=1, max_size=6).map(Data)


# --- kept rows ------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(SINGLE, st.data())
def test_keys_are_kept_or_dropped(data: Data, draw: st.DataObject) -> None:
    n = len(data.labels)
    chosen = draw.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=n, unique=True))
    keys = [f"s{i}" for i in chosen]
    kept = keep_keys(data.manifest, keys, data.tables)
    assert np.flatnonzero(uses(kept, 0)).tolist() == sorted(chosen)
    assert (uses(kept, 0) == uses(kept, 9)).all()
    if len(keys) == n:
        with pytest.raises(DataError, match=f"keeps none of the {n} samples"):
            drop_keys(data.manifest, keys, data.tables)
    else:
        assert (uses(drop_keys(data.manifest, keys, data.tables), 0) + uses(kept, 0) == 1).all()


def test_many_keys_are_looked_up_in_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "_BATCH", 7)
    data = Data([[0] * n for n in (3, 9, 1, 2, 8, 4)])
    kept = keep_keys(data.manifest, ["s26", "s0", "s12"], data.tables)
    assert np.flatnonzero(uses(kept, 0)).tolist() == [0, 12, 26]


def test_wrong_lists_of_keys_are_named() -> None:
    data = Data([[0, 1], [2]])
    with pytest.raises(DataError, match=r"'made': 2 key\(s\) aren't in it: 'x', 'y'. Correct the list"):
        keep_keys(data.manifest, ["s0", "x", "y"], data.tables)
    with pytest.raises(DataError, match="'s1' occurs 2 times"):
        drop_keys(data.manifest, ["s1", "s0", "s1"], data.tables)
    with pytest.raises(DataError, match="list of keys is empty"):
        keep_keys(data.manifest, [], data.tables)
    twice = [data.tables[0], data.tables[0].slice(0, 1)]
    with pytest.raises(DataError, match="occur there more than once: 's0'"):
        keep_keys(data.manifest, ["s0"], twice)
    with pytest.raises(DataError, match=r"1\.tar: nothing for 1 samples"):
        keep_keys(data.manifest, ["s0"], data.tables[:1])
    with pytest.raises(DataError, match=r"0\.tar: 1 rows for 2 samples"):
        keep_keys(data.manifest, ["s0"], data.tables[::-1])


def test_classes_are_kept_or_dropped_for_every_form_that_lists_them() -> None:
    data = Data([[0, 1, 4], [4, 2]])
    assert uses(keep_classes(data.manifest, [4, 2], tables=data.tables), 0).tolist() == [0, 0, 1, 1, 1]
    assert uses(keep_classes(data.manifest, [4, 2], False, data.tables), 0).tolist() == [1, 1, 0, 0, 0]
    about = keep_classes(data.manifest, [3, 1], tables=data.tables).about
    assert about["classes without a sample"] == {"count": 1, "first": [3]}
    multi = Data([[[0, 1], [], [2]], [[1, 2]]], "multi")
    assert uses(keep_classes(multi.manifest, [1], tables=multi.tables), 0).tolist() == [1, 0, 0, 1]
    assert uses(keep_classes(multi.manifest, [1], False, multi.tables), 0).tolist() == [0, 1, 1, 0]
    soft = Data([[[0, 1], [1]]], "soft", label_weight=[[[1.0, 0.0], [0.5]]])
    assert uses(keep_classes(soft.manifest, [1], tables=soft.tables), 0).tolist() == [0, 1]
    partial = Data([[[0], []]], "partial", label_negative=[[[1], [0]]])
    assert uses(keep_classes(partial.manifest, [0], tables=partial.tables), 0).tolist() == [1, 0]


def test_wrong_classes_are_named() -> None:
    data = Data([[0, 1]])
    with pytest.raises(DataError, match=r"no class 5; its classes are 0 \.\.\. 4"):
        keep_classes(data.manifest, [0, 5], tables=data.tables)
    with pytest.raises(DataError, match="keeps none"):
        keep_classes(data.manifest, [3], tables=data.tables)
    other = Data([[[0]]], "complementary")
    for choice in (lambda: keep_classes(other.manifest, [0]), lambda: repeat_factors(other.manifest)):
        with pytest.raises(DataError, match="don't say which classes apply"):
            choice()
    wrong = Data([[0, 7]])
    with pytest.raises(DataError, match="'s1'"):
        keep_classes(wrong.manifest, [0], tables=wrong.tables)


# --- quotas ---------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(SINGLE, st.none() | st.integers(1, 6), st.integers(0, 3), st.integers(0, 1000))
def test_balanced_epochs_are_exact_and_samples_take_turns(data: Data, q: int | None, seed: int, first: int) -> None:
    selection = balance(data.manifest, per_class=q, seed=seed, tables=data.tables)
    present = sorted(set(data.labels))
    quota = q or max(1, round(len(data.labels) / len(present)))
    assert selection.samples == quota * len(present)
    arrays = selection.arrays
    assert (arrays["slot"] < arrays["size"][arrays["group"]]).all()
    total = np.zeros(len(data.labels))
    for epoch in range(first, first + 7):
        assert per_class(data, selection, epoch) == [quota * (c in present) for c in range(5)]
        total += uses(selection, epoch)
        share = (epoch - first + 1) * quota / np.bincount(data.labels)[data.labels]
        assert (total >= np.floor(share)).all()
        assert (total <= np.ceil(share)).all()


@settings(max_examples=40, deadline=None)
@given(SINGLE, st.sampled_from([0.0, 0.25, 0.5, 0.9]), st.none() | st.integers(1, 4))
def test_other_exponents_keep_the_length_and_the_proportions(data: Data, exponent: float, q: int | None) -> None:
    selection = balance(data.manifest, exponent, q, tables=data.tables)
    count_C = np.bincount(data.labels, minlength=5)
    present = count_C > 0
    total = len(data.labels) if q is None else q * present.sum()
    assert selection.samples == total
    drawn = np.array(per_class(data, selection, 3))
    assert (drawn[present] >= 1).all()
    if q is None:
        weight = np.where(present, count_C ** (1 - exponent), 0.0)
        assert (np.abs(drawn - total * weight / weight.sum()) < 1).all()
    if q is None and exponent == 0:
        assert (uses(selection, 0) == 1).all(), "as it is: every sample once"


def test_consecutive_epochs_draw_other_samples_and_the_seed_says_which() -> None:
    data = Data([[0] * 60, [1] * 6])
    one, two = (balance(data.manifest, per_class=6, seed=s, tables=data.tables) for s in (1, 2))
    drawn = [np.flatnonzero(uses(one, e)[:60]).tolist() for e in range(10)]
    assert sorted(i for d in drawn for i in d) == list(range(60))
    assert drawn[0] != np.flatnonzero(uses(two, 0)[:60]).tolist()
    assert drawn[0] != list(range(6))
    assert one.digest != two.digest


def test_classes_without_samples_are_named_and_others_refused() -> None:
    data = Data([[0, 0, 3]])
    about = balance(data.manifest, tables=data.tables).about
    assert about["classes without a sample"] == {"count": 3, "first": [1, 2, 4]}
    assert about["classes"] == 2
    multi = Data([[[0]]], "multi")
    with pytest.raises(DataError, match=r"only single labels can be balanced by class. Use repeat factors"):
        balance(multi.manifest, tables=multi.tables)


def test_only_rows_within_a_selection_are_drawn() -> None:
    data = Data([[0, 0, 1], [1, 1, 2]])
    within = keep_keys(data.manifest, ["s0", "s3", "s4"], data.tables)
    selection = balance(data.manifest, per_class=2, within=within, tables=data.tables)
    assert uses(selection, 0).tolist() == [2, 0, 0, 1, 1, 0]
    assert uses(repeat_factors(data.manifest, 1.0, within=within, tables=data.tables), 0)[[1, 2, 5]].sum() == 0
    with pytest.raises(DataError, match="belong to another data set"):
        balance(data.manifest, within=KeepRows.of([np.array([True])]), tables=data.tables)


MULTI = st.lists(
    st.lists(st.lists(st.integers(0, 4), max_size=3, unique=True), min_size=1, max_size=15), min_size=1, max_size=5
).map(lambda shards: Data(shards, "multi"))


@settings(max_examples=60, deadline=None)
@given(MULTI, st.floats(0.01, 1.0))
def test_repeat_factors_are_those_of_the_paper(data: Data, threshold: float) -> None:
    n = len(data.labels)
    frequency = np.bincount([i for label in data.labels for i in label], minlength=5) / n
    with np.errstate(divide="ignore"):
        factor = np.maximum(1.0, np.sqrt(threshold / frequency))
    wanted = np.array([max((factor[i] for i in label), default=1.0) for label in data.labels])
    selection = repeat_factors(data.manifest, threshold, tables=data.tables)
    assert selection.samples == n + round(float((wanted - 1).sum()))
    total = np.zeros(n)
    for epoch in range(6):
        drawn = uses(selection, epoch)
        total += drawn
        for value in np.unique(wanted.round(9)):
            group = wanted.round(9) == value
            # the group's quota is n r but for the apportioned fraction; every sample gets floor or ceiling of its share
            assert abs(drawn[group].sum() - value * group.sum()) < 1 + 1e-6
            share = drawn[group].sum() / group.sum()
            assert set(drawn[group].tolist()) <= {int(np.floor(share)), int(np.ceil(share))}
            assert np.ptp(total[group]) <= 1


def test_repeat_factors_of_an_example() -> None:
    # class 1 is on 4 of 100 samples: threshold 0.16 gives sqrt(0.16 / 0.04) = 2
    data = Data([[[0]] * 50, [[0]] * 46 + [[0, 1]] * 4], "multi")
    selection = repeat_factors(data.manifest, 0.16, tables=data.tables)
    assert uses(selection, 0).tolist() == uses(selection, 5).tolist() == [1] * 96 + [2] * 4
    assert selection.about["repeated"] == 4
    assert selection.about["largest_factor"] == 2.0


@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=30), st.integers(0, 10**9))
def test_largest_remainder_apportions_exactly(weights: list[int], total: int) -> None:
    units = apportion(weights, total)
    assert units.sum() == total
    assert all(abs(u * sum(weights) - total * w) < sum(weights) for u, w in zip(units.tolist(), weights, strict=True))
    if total >= len(weights):
        least = apportion(weights, total, least=1)
        assert least.sum() == total
        assert least.min() >= 1


def test_reals_as_integers_keep_their_proportions() -> None:
    values = np.array([0.0, 1.0, 3.7, 1e9, 1e-3])
    found = np.array([float(v) for v in as_integers(values)])
    assert np.allclose(found / found[1], values, rtol=1e-11)


# --- in a plan ------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(SINGLE, st.integers(1, 3), st.booleans(), st.sampled_from(["keep", "balance"]), st.data())
def test_a_plan_draws_what_the_selection_says(
    data: Data, window: int, shuffle: bool, kind: str, draw: st.DataObject
) -> None:
    if kind == "keep":
        selection: Selection = keep_classes(data.manifest, set(data.labels[:2]), tables=data.tables)
    else:
        selection = balance(data.manifest, 0.5, tables=data.tables)
    plan = Plan(selection.shard_samples, 3, window, shuffle, selection)
    n = plan.epoch_samples
    assert n == selection.samples
    first = np.cumsum(selection.shard_samples) - selection.shard_samples
    for epoch in range(3):
        shards, rows = plan.samples(epoch * n, (epoch + 1) * n)
        drawn = np.bincount(first[shards] + rows, minlength=len(data.labels))
        assert (drawn == uses(selection, epoch)).all()
        if not shuffle:
            assert (np.diff(first[shards] + rows) >= 0).all()
    for w in plan.windows(0, 3 * n):
        assert all(selection.counts(w.epoch)[list(w.shards)] > 0), "windows hold shards that have something to give"
    start = draw.draw(st.integers(0, 3 * n - 1))
    stop = draw.draw(st.integers(start, 3 * n))
    whole = plan.samples(0, 3 * n)
    part = Plan(selection.shard_samples, 3, window, shuffle, selection).samples(start, stop)
    assert all((p == w[start:stop]).all() for p, w in zip(part, whole, strict=True))


def test_the_selection_counts_for_the_digest_and_must_fit() -> None:
    data = Data([[0, 0, 0], [1]])
    kept = keep_keys(data.manifest, ["s1"], data.tables)
    digests = {Plan([3, 1], selection=s).digest("d") for s in (None, kept, balance(data.manifest, tables=data.tables))}
    assert len(digests) == 3
    with pytest.raises(
        DataError, match=r"made for 2 shard\(s\) of 4 samples, the data set has 2 of 4, or they are cut"
    ):
        Plan([2, 2], selection=kept)


def test_a_stream_reads_a_selection_for_any_world(make_text_data: Callable[..., Any]) -> None:
    manifest = make_text_data(90, 13, classes=3)
    dropped = [f"s{i:05d}" for i in range(0, 90, 3) if i > 5]  # class 0 keeps 2 of its 30
    selection = balance(manifest, per_class=20, within=drop_keys(manifest, dropped))

    class Chosen(StreamSpec):
        @property
        def plan(self) -> Plan:
            return Plan([s.samples for s in self.manifest.shards], self.seed, self.window, self.shuffle, selection)

    def keys(world: int, start: int = 0) -> list[str]:
        spec = Chosen(manifest, "text", 24, start=start, stop=120, seed=5, window=3)
        ranks = [RankStream(spec, LocalSource(spec, r, world), r, world, lambda raw, *_: raw) for r in range(world)]
        return [key for step in zip(*ranks, strict=True) for batch in step for key in batch.keys]

    whole = keys(1)
    assert whole == keys(2) == keys(3)
    assert whole[48:] == keys(2, 48)
    for epoch in (0, 1):
        drawn = Counter(int(key[1:]) % 3 for key in whole[epoch * 60 : (epoch + 1) * 60])
        assert drawn == {0: 20, 1: 20, 2: 20}
    assert Counter(whole)["s00000"] == Counter(whole)["s00003"] == 20
    assert not set(dropped) & set(whole)


def test_counts_of_large_data_are_summed_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    from labelmill.data import selection as module

    data = Data([list(range(5)) * k for k in (3, 1, 4, 1, 5, 9, 2, 6)])
    chosen = balance(data.manifest, 0.5, per_class=7, tables=data.tables)
    whole = [chosen.counts(e).tolist() for e in range(4)]
    for chunk in (1, 7, 15, 64):
        monkeypatch.setattr(module, "_CHUNK", chunk)
        assert [chosen.counts(e).tolist() for e in range(4)] == whole


# --- on disk and in a job -------------------------------------------------------------------------------


def both(data: Data) -> list[Selection]:
    return [keep_keys(data.manifest, ["s1", "s4"], data.tables), balance(data.manifest, tables=data.tables)]


def test_a_selection_is_one_file_that_travels_by_path_and_digest(tmp_path: Path) -> None:
    data = Data([[0, 1, 1] * 1000, [2]])
    for i, selection in enumerate(both(data)):
        path = str(tmp_path / f"{i}.arrow")
        loose = pickle.loads(pickle.dumps(selection))
        saved = selection.save(path)
        packed = pickle.dumps(saved)
        assert len(packed) < 400
        for again in (loose, saved, pickle.loads(packed), load_selection(path)):
            assert type(again) is type(selection)
            assert again.digest == selection.digest
            assert again.about == selection.about
            assert (uses(again, 4) == uses(selection, 4)).all()
        assert selection.data == data.manifest.digest == saved.data
    assert isinstance(load_selection(path), Balanced)
    assert load_selection(path).nbytes < 3001 * 4, "small types for small groups"


def test_damaged_and_foreign_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.arrow"
    one, two = both(Data([[0] * 50, [1] * 50]))
    one.save(str(path))
    with pytest.raises(DataError, match="holds another selection than the run began with"):
        load_selection(str(path), two.digest)
    content = bytearray(path.read_bytes())
    at = content.rfind(one.arrays["mask"].tobytes())
    content[at] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"is damaged, or of another release. Delete the file"):
        load_selection(str(path))
    for junk in (b"", b"junk" * 10, bytes(content[: len(content) // 2])):
        path.write_bytes(junk)
        with pytest.raises(DataError, match=r"s\.arrow: (not a selection|the selection can't be read)"):
            load_selection(str(path))
    with pytest.raises(DataError, match="Every machine of the run needs to see this file"):
        load_selection(str(tmp_path / "none.arrow"), one.digest)


def test_sections_of_a_job_build_once_and_reuse(
    make_text_data: Callable[..., Manifest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = make_text_data(40, 9, classes=4)
    (tmp_path / "ids.txt").write_text("s00001\n\ns00007\r\n")
    sections: list[dict[str, Any]] = [
        {"kind": "keys", "file": str(tmp_path / "ids.txt"), "keep": False},
        {"kind": "classes", "ids": [0, 2]},
        {"kind": "balanced", "exponent": 0.5},
        {"kind": "balanced", "per_class": 3, "within": {"kind": "classes", "ids": [1, 3]}},
        {"kind": "repeat_factor", "threshold": 0.3},
    ]
    built = [SELECT.validate_python(section).build(manifest, str(tmp_path / "kept")) for section in sections]
    assert [s.samples for s in built] == [38, 20, 40, 6, 44]
    assert len(list((tmp_path / "kept").iterdir())) == 5
    monkeypatch.setattr(choose, "read_labels", None)  # from here on, nothing is read
    for section, before in zip(sections, built, strict=True):
        assert SELECT.validate_python(section).build(manifest, str(tmp_path / "kept")).digest == before.digest
    monkeypatch.undo()
    (tmp_path / "ids.txt").write_text("s00001\n")
    assert SELECT.validate_python(sections[0]).build(manifest, str(tmp_path / "kept")).samples == 39
    assert SELECT.validate_python(sections[2]).build(manifest, str(tmp_path / "kept"), seed=1).digest != built[2].digest


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"kind": "ballanced"}, "balanced"),
        ({"kind": "balanced", "exponent": 2}, "less than or equal to 1"),
        ({"kind": "balanced", "per_class": 0}, "greater than or equal to 1"),
        ({"kind": "balanced", "per_klass": 2}, "per_klass"),
        ({"kind": "classes", "ids": []}, "at least 1"),
        ({"kind": "classes", "ids": [1, 2, 1]}, "class 1 is listed twice"),
        ({"kind": "classes", "ids": [-1]}, "class ids start at 0, -1 is negative"),
        ({"kind": "repeat_factor", "threshold": 0}, "greater than 0"),
        ({"kind": "balanced", "within": {"kind": "balanced"}}, "keys"),
    ],
)
def test_wrong_sections_say_what_is_wrong(section: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        SELECT.validate_python(section)


def test_keys_come_from_text_or_tables(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\ufeffone two\r\nthree\n", encoding="utf-8")
    assert read_keys(str(tmp_path / "a.txt")).to_pylist() == ["one two", "three"]
    pa.csv.write_csv(pa.table({"name": ["a", "b"], "n": [1, 2]}), tmp_path / "a.csv")
    assert read_keys(str(tmp_path / "a.csv"), "name").to_pylist() == ["a", "b"]
    with pytest.raises(DataError, match="no column 'key'"):
        read_keys(str(tmp_path / "a.csv"))
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="not a text file in UTF-8"):
        read_keys(str(tmp_path / "b.txt"))
    section = SELECT.validate_python({"kind": "keys", "file": str(tmp_path / "a.txt")})
    data = Data([[0]])
    with pytest.raises(DataError, match=r"select.file .*a\.txt: data set 'made': 2 key\(s\) aren't in it: 'one two'"):
        section.make(data.manifest, 0, data.tables)
