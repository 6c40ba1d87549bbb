"""Shards: round trips of every label form in both layouts, other readers, damage, writing all or nothing."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import tarfile
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from labelmill.data.labels import LabelSpec
from labelmill.data.manifest import FieldSpec, Manifest, load_manifest
from labelmill.data.overlay import write_label_overlay
from labelmill.data.shards import ShardDamage, label_counts, read_labels, read_shard
from labelmill.data.writer import ShardWriter
from labelmill.errors import DataError

FIELDS = {
    "image": FieldSpec(kind="image", ext="png"),
    "text": FieldSpec(kind="text", ext="txt"),
    "vector": FieldSpec(kind="array", ext="npy", shape=(2, 3), dtype="float32"),
}
TEXT = {"text": FieldSpec(kind="text", ext="txt")}
CLASSES = 7
LAYOUTS = ("tar", "packed")

ids = st.lists(st.integers(0, CLASSES - 1), unique=True, max_size=4)
reals = st.floats(-1e6, 1e6, width=32)


def soft(draw_ids: list[int]) -> dict[str, list]:
    return {"label": draw_ids, "label_weight": [0.5 + i for i in range(len(draw_ids))]}


FORMS: dict[str, tuple[LabelSpec, st.SearchStrategy[dict]]] = {
    "single": (LabelSpec(form="single", num_classes=CLASSES), st.integers(0, CLASSES - 1).map(lambda i: {"label": i})),
    "multi": (LabelSpec(form="multi", num_classes=CLASSES), ids.map(lambda i: {"label": i})),
    "soft": (LabelSpec(form="soft", num_classes=CLASSES), ids.filter(bool).map(soft)),
    "partial": (
        LabelSpec(form="partial", num_classes=CLASSES),
        ids.map(lambda i: {"label": i[:2], "label_negative": i[2:]}),
    ),
    "complementary": (LabelSpec(form="complementary", num_classes=CLASSES), ids.map(lambda i: {"label": i})),
    "continuous": (
        LabelSpec(form="continuous", dim=2),
        st.lists(reals, min_size=2, max_size=2).map(lambda v: {"label": v}),
    ),
    "none": (LabelSpec(form="none"), st.just({})),
}


def read_all(manifest: Manifest, **options) -> pa.Table:
    return pa.concat_tables([read_shard(manifest, i, **options) for i in range(len(manifest.shards))])


def write_text(out, rows: int, layout: str = "tar", **options) -> Manifest:
    writer = ShardWriter(out, "t", TEXT, LabelSpec(form="single", num_classes=rows), layout, **options)
    texts = [f"text {i} é" * (i % 3) for i in range(rows)]
    writer.write_table(pa.table({"key": [f"k{i:04d}" for i in range(rows)], "text": texts, "label": range(rows)}))
    return writer.close()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", list(FORMS))
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_every_label_form_comes_back(layout, form, data):
    spec, labels = FORMS[form]
    rows = data.draw(st.lists(st.tuples(st.binary(max_size=40), st.text(max_size=20), labels), min_size=1, max_size=9))
    per_shard = data.draw(st.integers(1, 10))
    with TemporaryDirectory() as folder:
        writer = ShardWriter(f"{folder}/set", "d", FIELDS, spec, layout, rows_per_member=3, samples_per_shard=per_shard)
        for i, (image, text, label) in enumerate(rows):
            vector = np.full((2, 3), i, dtype=np.float32)
            writer.write(f"s/{i}", {"image": image, "text": text, "vector": vector}, label)
        manifest = writer.close()
        table = read_all(load_manifest(f"{folder}/set"))
    assert manifest.num_samples == len(rows) == table.num_rows
    assert all(s.samples <= per_shard for s in manifest.shards)
    assert table.schema.equals(manifest.schema)
    for i, (row, (image, text, label)) in enumerate(zip(table.to_pylist(), rows, strict=True)):
        assert row["key"] == f"s/{i}"
        assert (row["image"], row["text"]) == (image, text)
        assert row["vector"] == [float(i)] * 6
        assert {name: row[name] for name in label} == label


def test_both_layouts_give_the_same_table(tmp_path):
    tar, packed = (read_all(write_text(tmp_path / layout, 100, layout)) for layout in LAYOUTS)
    assert tar.equals(packed)


def test_plain_tars_are_read_by_webdataset_and_the_standard_library(tmp_path):
    import webdataset as wds

    manifest = write_text(tmp_path / "a", 30, samples_per_shard=10)
    urls = [manifest.shard_path(i) for i in range(3)]
    samples = list(wds.WebDataset(urls, shardshuffle=False).decode())
    table = read_all(manifest)
    assert [s["__key__"] for s in samples] == table.column("key").to_pylist()
    assert [s["txt"] for s in samples] == table.column("text").to_pylist()
    assert [s["cls"] for s in samples] == table.column("label").to_pylist()
    with tarfile.open(urls[0]) as tar:
        assert [m.name for m in tar][:3] == ["k0000.txt", "k0000.cls", "k0001.txt"]


def test_packed_tars_are_read_by_webdataset_and_the_standard_library(tmp_path):
    import webdataset as wds

    manifest = write_text(tmp_path / "a", 30, "packed", rows_per_member=8)
    samples = list(wds.WebDataset([manifest.shard_path(0)], shardshuffle=False))
    assert [s["__key__"] for s in samples] == ["k0000", "k0008", "k0016", "k0024"]
    blocks = [pa.ipc.open_stream(s["arrow"]).read_all() for s in samples]
    assert pa.concat_tables(blocks).equals(read_shard(manifest, 0))
    with tarfile.open(manifest.shard_path(0)) as tar:
        assert len(tar.getmembers()) == 4


def test_the_decoder_in_the_readme_unpacks_packed_tars(tmp_path):
    import webdataset as wds

    readme = Path(__file__).resolve().parents[2] / "platform" / "README.md"
    blocks = re.findall(r"```python\n(.*?)```", readme.read_text(encoding="utf-8"), re.DOTALL)
    [code] = [block for block in blocks if "def rows" in block]
    space: dict = {}
    exec(code, space)
    manifest = write_text(tmp_path / "a", 30, "packed", rows_per_member=8, samples_per_shard=16)
    urls = [manifest.shard_path(i) for i in range(len(manifest.shards))]
    samples = list(wds.WebDataset(urls, shardshuffle=False).compose(space["rows"]))
    assert [{"key": s["__key__"], "text": s["text"], "label": s["label"]} for s in samples] == read_all(
        manifest
    ).to_pylist()


def test_tars_of_webdataset_are_read(tmp_path):
    import webdataset as wds

    with wds.TarWriter(str(tmp_path / "w.tar")) as sink:
        for i in range(5):
            sink.write({"__key__": f"dir/{i}", "txt": f"t{i}", "labels.json": {"label": [i, i + 1]}})
    raw = (tmp_path / "w.tar").read_bytes()
    import hashlib

    shard = {"path": "w.tar", "samples": 5, "bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    label = LabelSpec(form="multi", num_classes=6)
    manifest = Manifest.model_validate(
        {"name": "w", "layout": "tar", "fields": TEXT, "label": label, "shards": [shard]}
    ).at(tmp_path)
    assert read_shard(manifest, 0).to_pydict() == {
        "key": [f"dir/{i}" for i in range(5)],
        "text": [f"t{i}" for i in range(5)],
        "label": [[i, i + 1] for i in range(5)],
    }


def test_equal_content_gives_equal_bytes(tmp_path):
    for layout in LAYOUTS:
        one, two = (write_text(tmp_path / f"{layout}{i}", 50, layout) for i in range(2))
        assert one.digest == two.digest


def test_shards_have_the_target_size(tmp_path):
    for layout in LAYOUTS:
        manifest = write_text(tmp_path / layout, 400, layout, target_bytes=40_000, rows_per_member=16)
        sizes = [s.bytes for s in manifest.shards]
        assert len(sizes) > 1
        assert max(sizes) <= 40_000
        assert min(sizes[:-1]) > 20_000
        assert all((tmp_path / layout / s.path).stat().st_size == s.bytes for s in manifest.shards)


def test_a_million_rows_are_written_and_read_fast(tmp_path):
    rows = 1_000_000
    numbers = np.arange(rows)
    keys = np.char.add("k", numbers.astype(str))
    table = pa.table({"key": pa.array(keys), "text": pa.array(keys), "label": numbers})
    began = time.process_time()
    label = LabelSpec(form="single", num_classes=rows)
    writer = ShardWriter(tmp_path / "a", "m", TEXT, label, "packed", rows_per_member=4096)
    writer.write_table(table)
    manifest = writer.close()
    wrote = time.process_time()
    assert read_all(manifest).equals(table)
    assert wrote - began < 8
    assert time.process_time() - wrote < 1


# --- damage --------------------------------------------------------------------------------------------


class Shard(tuple):
    """(manifest, bytes), with a short repr."""

    def __new__(cls, manifest: Manifest):
        return super().__new__(cls, (manifest, Path(manifest.shard_path(0)).read_bytes()))

    def __repr__(self) -> str:
        return f"Shard({self[0].layout})"


@pytest.fixture(scope="module", params=LAYOUTS)
def shard(request, tmp_path_factory):
    """A shard of 40 samples: its manifest and bytes."""
    manifest = write_text(tmp_path_factory.mktemp("damage") / "set", 40, request.param, rows_per_member=4)
    return Shard(manifest)


def damaged(shard, data: bytes, verify: bool = True) -> ShardDamage:
    manifest, whole = shard
    path = Path(manifest.shard_path(0))
    path.write_bytes(data)
    try:
        with pytest.raises(ShardDamage) as caught:
            read_shard(manifest, 0, verify)
    finally:
        path.write_bytes(whole)
    error = caught.value
    assert str(error).startswith(str(path))
    assert "import the data set again" in str(error)
    assert pickle.loads(pickle.dumps(error)).found == error.found  # errors travel from workers
    return error


@pytest.mark.parametrize("verify", [True, False])
@settings(max_examples=60, deadline=None)
@given(part=st.floats(0, 0.999))
def test_a_truncated_shard_is_never_a_shorter_shard(shard, verify, part):
    data = shard[1]
    error = damaged(shard, data[: int(part * len(data))], verify)
    assert error.expected == 40
    assert error.found is not None
    assert error.found <= 40


@pytest.mark.parametrize("verify", [True, False])
def test_a_cut_between_two_members_is_seen(shard, verify):
    from labelmill.data.tar import parse_tar

    manifest, data = shard
    index = parse_tar(memoryview(data))
    per_member = 4 if manifest.layout == "packed" else 1
    member = 4 if manifest.layout == "packed" else 8
    cut = index.offsets[member] - 512
    error = damaged(shard, data[:cut], verify)
    assert "no end-of-archive marker" in str(error)
    assert error.offset == cut
    assert error.found == 16 // (4 // per_member)
    assert f"{error.found} whole samples found, 40 expected" in str(error)


@pytest.mark.parametrize("verify", [True, False])
def test_a_damaged_header_in_the_middle_names_offset_and_sample_count(shard, verify):
    from labelmill.data.tar import parse_tar

    manifest, data = shard
    header = parse_tar(memoryview(data)).offsets[4] - 512
    broken = bytearray(data)
    broken[header + 130] ^= 1  # size
    error = damaged(shard, bytes(broken), verify)
    assert "checksum" in error.reason
    assert error.offset == header
    assert error.found == (16 if manifest.layout == "packed" else 2)


def test_the_sample_cut_in_the_middle_is_named(tmp_path):
    manifest = write_text(tmp_path / "a", 10)
    path = Path(manifest.shard_path(0))
    data = path.read_bytes()
    path.write_bytes(data[: data.index(b"k0004.txt") + 512 + 5])
    with pytest.raises(ShardDamage, match="'k0004'") as caught:
        read_shard(manifest, 0)
    assert (caught.value.key, caught.value.found) == ("k0004", 4)


@settings(max_examples=80, deadline=None)
@given(part=st.floats(0, 0.9999), bit=st.integers(0, 7))
def test_every_flipped_bit_is_seen(shard, part, bit):
    data = bytearray(shard[1])
    data[int(part * len(data))] ^= 1 << bit
    damaged(shard, bytes(data))


@settings(max_examples=80, deadline=None)
@given(part=st.floats(0, 0.9999), bit=st.integers(0, 7))
def test_unverified_reading_of_flipped_bits_never_crashes(shard, part, bit):
    manifest, whole = shard
    data = bytearray(whole)
    data[int(part * len(data))] ^= 1 << bit
    path = Path(manifest.shard_path(0))
    path.write_bytes(data)
    try:
        assert len(read_shard(manifest, 0, verify=False).to_pylist()) == 40
    except DataError:
        pass
    finally:
        path.write_bytes(whole)


def rewritten(tmp_path, members: list[tuple[str, bytes]], samples: int, form: str = "single") -> Manifest:
    """A shard with the given members behind a manifest that vouches for it."""
    import hashlib

    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    raw = out.getvalue()
    (tmp_path / "x.tar").write_bytes(raw)
    shard = {"path": "x.tar", "samples": samples, "bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    label = LabelSpec(form=form, num_classes=None if form == "none" else 9)  # type: ignore[arg-type]
    content = {"name": "x", "layout": "tar", "fields": TEXT, "label": label, "shards": [shard]}
    return Manifest.model_validate(content).at(tmp_path)


@pytest.mark.parametrize(
    ("members", "form", "words"),
    [
        ([("a.txt", b"1"), ("b.txt", b"2"), ("b.cls", b"1")], "single", "'a' has no label"),
        ([("a.txt", b"1"), ("a.cls", b"1"), ("b.cls", b"1")], "single", "'b' has no field 'text'"),
        ([("a.txt", b"1"), ("a.cls", b"1"), ("b.txt", b"2"), ("b.cls", b"cat")], "single", "'b': its label b'cat'"),
        ([("a.txt", b"1"), ("b.txt", b"\xff")], "none", "'b': its text isn't UTF-8"),
        ([("a.txt", b"1"), ("a.TXT", b"1")], "none", "two members of extension 'txt'"),
        ([("a.txt", b"1"), ("b.txt", b"1"), ("a.cls", b"1")], "none", "'a' occurs twice"),
        ([("a.txt", b"1"), ("a.labels.json", b"[1]")], "multi", "'a': its labels.json"),
        ([("a.txt", b"1"), ("a.labels.json", b'{"label": ["x"]}')], "multi", r"'a': its label \['x'\]"),
        ([("a.txt", b"1"), ("a.labels.json", b'{"label": [1]}')], "soft", "label_weight"),
    ],
)
def test_bad_samples_are_named(tmp_path, members, form, words):
    with pytest.raises(ShardDamage, match=words):
        read_shard(rewritten(tmp_path, members, 2, form), 0)


def test_members_that_are_no_samples_are_passed_over(tmp_path):
    members = [("README", b"x"), ("._a.txt", b"x"), ("d/a.b.c.txt", b"x"), ("d/a.txt", b"1"), ("d/a.cls", b" 3\n")]
    table = read_shard(rewritten(tmp_path, members, 1), 0)
    assert table.to_pydict() == {"key": ["d/a"], "text": ["1"], "label": [3]}


def test_a_missing_shard_is_named(tmp_path):
    manifest = write_text(tmp_path / "a", 5)
    os.unlink(manifest.shard_path(0))
    with pytest.raises(DataError, match=r"t-000000\.tar: no such file"):
        read_shard(manifest, 0)


# --- writing -------------------------------------------------------------------------------------------


def one_by_one(out, keys=("a", "b"), labels=(0, 1), **options) -> ShardWriter:
    writer = ShardWriter(out, "t", TEXT, LabelSpec(form="single", num_classes=2), **options)
    for key, label in zip(keys, labels, strict=True):
        writer.write(key, {"text": key}, {"label": label})
    return writer


def test_nothing_is_left_behind_by_an_error(tmp_path):
    with pytest.raises(RuntimeError, match="stop"), one_by_one(tmp_path / "a", samples_per_shard=1):
        raise RuntimeError("stop")
    with pytest.raises(DataError, match="sample key 'a' occurs 2 times"):
        one_by_one(tmp_path / "a", keys=("a", "a"), samples_per_shard=1).close()
    with pytest.raises(DataError, match="label 2 is out of range"):
        one_by_one(tmp_path / "a", labels=(0, 2)).close()
    assert list(tmp_path.iterdir()) == []


def test_nothing_shows_before_the_end_and_the_block_closes(tmp_path):
    with one_by_one(tmp_path / "a", samples_per_shard=1) as writer:
        assert not (tmp_path / "a").exists()
    assert writer.manifest == load_manifest(tmp_path / "a")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_an_existing_data_set_is_kept_unless_overwritten(tmp_path):
    one_by_one(tmp_path / "a").close()
    with pytest.raises(DataError, match="a data set is there already"):
        one_by_one(tmp_path / "a")
    new = one_by_one(tmp_path / "a", keys=("c", "d"), overwrite=True).close()
    assert read_shard(new, 0).column("key").to_pylist() == ["c", "d"]
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    (tmp_path / "a" / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match=r"notes\.txt"):
        one_by_one(tmp_path / "a", overwrite=True)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match="no data set"):
        one_by_one(tmp_path / "b", overwrite=True)
    (tmp_path / "c").mkdir()
    assert one_by_one(tmp_path / "c").close().num_samples == 2  # an empty folder is free


@pytest.mark.parametrize("key", ["", "a.b", "/a", "a/", "a//b", "a\nb", "__meta__", "x" * 600, None])
def test_keys_that_break_readers_are_refused(tmp_path, key):
    with pytest.raises(DataError, match=r"sample key|key must be|has no key"):
        one_by_one(tmp_path / "a", keys=("ok", key)).close()


@pytest.mark.parametrize(
    ("values", "label", "words"),
    [
        ({}, {"label": 0}, "'k' lacks text"),
        ({"text": "a", "sound": b""}, {"label": 0}, "'k' has sound"),
        ({"text": 7}, {"label": 0}, "'k': text must be string"),
        ({"text": None}, {"label": 0}, "'k' has no text"),
        ({"text": "a"}, {"label": "cat"}, "'k': label must be int64"),
        ({"text": "a"}, {}, "'k' lacks label"),
    ],
)
def test_wrong_values_are_named(tmp_path, values, label, words):
    writer = one_by_one(tmp_path / "a")
    writer.write("k", values, label)
    with pytest.raises(DataError, match=words):
        writer.close()
    assert list(tmp_path.iterdir()) == []


def test_wrong_tables_and_class_tables_are_refused(tmp_path):
    writer = one_by_one(tmp_path / "a")
    with pytest.raises(DataError, match="lacks text"):
        writer.write_table(pa.table({"key": ["x"], "label": [0]}))
    with pytest.raises(DataError, match="don't fit"):
        writer.write_table(pa.table({"key": ["x"], "text": ["x"], "label": ["cat"]}))
    with pytest.raises(DataError, match="3 class names for 2"):
        writer.close(pa.table({"name": ["a", "b", "c"]}))
    with pytest.raises(DataError, match="no sample"):
        ShardWriter(tmp_path / "b", "t", TEXT, LabelSpec(form="none")).close()


def test_counts_are_filled_in_and_kept_when_given(tmp_path):
    manifest = one_by_one(tmp_path / "a", labels=(1, 1)).close(pa.table({"name": ["x", "y"]}))
    assert manifest.load_classes().column("count").to_pylist() == [0, 2]
    assert label_counts(manifest).tolist() == [0, 2]
    given_counts = pa.table({"name": ["x", "y"], "count": pa.array([5, 6]), "group": ["g", "h"]})
    classes = one_by_one(tmp_path / "b").close(given_counts).load_classes()
    assert classes.equals(given_counts)


def test_alternative_extensions_follow_the_content(tmp_path):
    fields = {"image": FieldSpec(kind="image", ext="jpg;png")}
    writer = ShardWriter(tmp_path / "a", "t", fields, LabelSpec(form="none"))
    writer.write("a", {"image": b"\x89PNG\r\n\x1a\n"})
    writer.write("b", {"image": b"\xff\xd8\xff"})
    manifest = writer.close()
    with tarfile.open(manifest.shard_path(0)) as tar:
        assert tar.getnames() == ["a.png", "b.jpg"]
    assert read_shard(manifest, 0).column("image").to_pylist() == [b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"]


def test_arrays_of_another_shape_are_refused(tmp_path):
    fields = {"v": FieldSpec(kind="array", ext="npy", shape=(2,), dtype="float32")}
    writer = ShardWriter(tmp_path / "a", "t", fields, LabelSpec(form="none"))
    with pytest.raises(DataError, match=r"'k': v has shape \[3\]"):
        writer.write("k", {"v": np.zeros(3, dtype=np.float32)})
    writer.discard()


# --- label versions ------------------------------------------------------------------------------------


def overlay_tables(manifest: Manifest) -> list[pa.Table]:
    tables = []
    for i in range(len(manifest.shards)):
        keys = read_shard(manifest, i).column("key")
        labels = pa.array([[j % 3, 3] for j in range(len(keys))], pa.list_(pa.int64()))
        tables.append(pa.table({"key": keys, "label": labels}))
    return tables


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_overlay_replaces_the_labels_and_nothing_else(tmp_path, layout):
    old = write_text(tmp_path / "data" / "old", 20, layout, samples_per_shard=8)
    before = {p.name: p.read_bytes() for p in (tmp_path / "data" / "old").iterdir()}
    spec = LabelSpec(form="multi", num_classes=4)
    new = write_label_overlay(old, tmp_path / "data" / "new", spec, iter(overlay_tables(old)), name="new")
    assert {p.name: p.read_bytes() for p in (tmp_path / "data" / "old").iterdir()} == before
    assert new.parents == (old.digest,)
    assert new.digest != old.digest
    assert label_counts(new).tolist() == [8, 7, 5, 20]
    os.rename(tmp_path / "data", tmp_path / "moved")  # the pair moves together
    loaded = load_manifest(tmp_path / "moved" / "new")
    table = read_shard(loaded, 1)
    assert table.schema.equals(loaded.schema)
    assert table.column("text").equals(read_shard(load_manifest(tmp_path / "moved" / "old"), 1).column("text"))
    assert table.column("label")[1].as_py() == [1, 3]
    assert read_labels(loaded, 1).column_names == ["key", "label"]
    third = write_label_overlay(
        loaded, tmp_path / "third", LabelSpec(form="none"), [t.select(["key"]) for t in overlay_tables(loaded)]
    )
    assert read_shard(third, 0).column_names == ["key", "text"]


def test_overlays_that_do_not_fit_are_refused(tmp_path):
    old = write_text(tmp_path / "old", 20, samples_per_shard=8)
    spec = LabelSpec(form="multi", num_classes=4)
    good = overlay_tables(old)
    wrong = [
        (good[:-1], "labels for 2 shard"),
        ([*good, good[0]], "more shards"),
        ([good[0].slice(1), *good[1:]], "7 rows for 8 samples"),
        ([good[1], good[0], good[2]], "is for sample 'k0008', the shard has 'k0000'"),
        ([good[0].drop_columns(["label"]), *good[1:]], "need the columns key, label"),
    ]
    for tables, words in wrong:
        with pytest.raises(DataError, match=words):
            write_label_overlay(old, tmp_path / "new", spec, tables)
    with pytest.raises(DataError, match="out of range"):
        write_label_overlay(old, tmp_path / "new", LabelSpec(form="multi", num_classes=3), good)
    assert [p.name for p in tmp_path.iterdir()] == ["old"]
    careless = write_label_overlay(old, tmp_path / "new", spec, [good[1], good[0], good[2]], check_keys_align=False)
    with pytest.raises(DataError, match="row 0 labels sample 'k0008'"):
        read_shard(careless, 0)


def test_a_changed_overlay_is_refused(tmp_path):
    old = write_text(tmp_path / "old", 8)
    new = write_label_overlay(old, tmp_path / "new", LabelSpec(form="multi", num_classes=4), overlay_tables(old))
    path = Path(new.labels_path(0) or "")
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(DataError, match="labels changed"):
        read_shard(new, 0)


def test_labels_json_holds_the_column_names(tmp_path):
    spec = LabelSpec(form="partial", num_classes=4)
    writer = ShardWriter(tmp_path / "a", "t", TEXT, spec)
    writer.write("a", {"text": "x"}, {"label": [1], "label_negative": [0, 2]})
    with tarfile.open(writer.close().shard_path(0)) as tar:
        raw = tar.extractfile("a.labels.json").read()  # type: ignore[union-attr]
    assert json.loads(raw) == {"label": [1], "label_negative": [0, 2]}
