"""Opening shards: policies under damage, byte ranges, verification, gathering."""

from __future__ import annotations

import os
import pickle
import tarfile
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from labelmill.data import spans, store
from labelmill.data.labels import LabelSpec
from labelmill.data.manifest import FieldSpec, Manifest
from labelmill.data.overlay import write_label_overlay
from labelmill.data.shards import HOLE, WHOLE_SHARD, Shard, ShardDamage, gather, open_shard, read_labels, read_shard
from labelmill.data.tar import END, padding, parse_tar, tar_header
from labelmill.data.writer import ShardWriter
from labelmill.errors import DataError

SAMPLES = 12
FIELDS = {
    "image": FieldSpec(kind="image", ext="jpg;png"),
    "text": FieldSpec(kind="text", ext="txt"),
    "vector": FieldSpec(kind="array", ext="npy", shape=(2, 3), dtype="float32"),
}
SINGLE = LabelSpec(form="single", num_classes=SAMPLES)
rng = np.random.default_rng(0)


def write(
    out: Path, layout: str, fields: dict[str, FieldSpec] = FIELDS, label: LabelSpec = SINGLE, **options
) -> Manifest:
    writer = ShardWriter(out, "d", fields, label, layout, rows_per_member=3, **options)
    for i in range(SAMPLES):
        values = {
            "image": rng.bytes(400 + 301 * (i % 4)),
            "text": f"täxt {i}",
            "vector": np.full((2, 3), i, np.float32),
        }
        label_of = {"single": {"label": i}, "multi": {"label": [i, 0] if i else []}, "none": {}}[label.form]
        writer.write(f"k{i:02d}", {name: values[name] for name in fields}, label_of)
    return writer.close()


def without_index(manifest: Manifest) -> Manifest:
    bare = tuple(s.model_copy(update={"index": None, "index_sha256": None}) for s in manifest.shards)
    return manifest.model_copy(update={"shards": bare}).at(manifest.root)


def table_of(shard: Shard, rows: np.ndarray | None = None) -> pa.Table:
    rows = np.arange(shard.num_rows) if rows is None else rows
    return gather([shard], np.zeros_like(rows), rows)


# --- damage --------------------------------------------------------------------------------------------


class Case:
    """A whole shard and its table, with a short repr."""

    def __init__(self, name: str, manifest: Manifest) -> None:
        self.name, self.manifest = name, manifest
        self.data, self.table = Path(manifest.shard_path(0)).read_bytes(), read_shard(manifest, 0)

    def __repr__(self) -> str:
        return self.name


@pytest.fixture(scope="module", params=["tar", "tar, one member", "packed"])
def case(request, tmp_path_factory):
    layout = request.param.partition(",")[0]
    kinds = (FIELDS, SINGLE) if layout == request.param else ({"text": FIELDS["text"]}, LabelSpec(form="none"))
    manifest = write(tmp_path_factory.mktemp("case") / "set", layout, *kinds)
    return Case(request.param, manifest)


def members_of(data: bytes) -> list[bytes]:
    index = parse_tar(memoryview(data))
    edges = [*index.starts, index.end]
    return [data[a:z] for a, z in pairwise(edges)]


KINDS = ["flip", "header", "cut", "drop", "repeat", "zeros", "noise", "append", "nothing"]


@dataclass(frozen=True)
class Change:
    """Damages a shard's bytes in one place; `part` and `other` are places as shares of the whole."""

    kind: str
    part: float
    other: float
    flip: int
    length: int

    def __call__(self, data: bytes) -> bytes:
        at = int(self.part * len(data))
        members = members_of(data)
        m = int(self.part * len(members))
        if self.kind == "header":
            at = parse_tar(memoryview(data)).starts[m] + int(self.other * 512)
        if self.kind in ("flip", "header"):
            return data[:at] + bytes([data[at] ^ self.flip]) + data[at + 1 :]
        if self.kind == "cut":
            return data[:at]
        if self.kind == "drop":
            return b"".join(members[:m] + members[m + 1 :]) + END
        if self.kind == "repeat":
            to = int(self.other * (len(members) + 1))
            return b"".join([*members[:to], members[m], *members[to:]]) + END
        if self.kind in ("zeros", "noise"):
            run = data[at : at + self.length]
            run = bytes(len(run)) if self.kind == "zeros" else bytes(b ^ self.flip for b in run)
            return data[:at] + run + data[at + self.length :]
        return data + bytes(self.length) if self.kind == "append" else data


shares = st.floats(0, 0.999)
changes = st.builds(Change, st.sampled_from(KINDS), shares, shares, st.integers(1, 255), st.integers(1, 3000))


@pytest.mark.parametrize("indexed", [True, False])
@settings(max_examples=120, deadline=None)
@given(change=changes, some=st.sets(st.integers(0, SAMPLES - 1), min_size=1, max_size=4))
def test_damage_raises_or_becomes_holes_and_never_other_rows(case, indexed, change, some):
    manifest = case.manifest if indexed else without_index(case.manifest)
    path, data = Path(manifest.shard_path(0)), change(case.data)
    path.write_bytes(data)
    try:
        if data != case.data:
            with pytest.raises(ShardDamage) as caught:
                open_shard(manifest, 0)
            assert str(caught.value).startswith(str(path))
        else:
            assert table_of(open_shard(manifest, 0)).drop_columns([HOLE]).equals(case.table)
        quarantined = open_shard(manifest, 0, policy="shard")
        holes = table_of(quarantined).column(HOLE)
        assert holes.null_count == (0 if data != case.data else SAMPLES)
        shard = open_shard(manifest, 0, policy="sample")
        rows = np.array(sorted(some))
        part = open_shard(manifest, 0, policy="sample", rows=rows)
    finally:
        path.write_bytes(case.data)
    table = table_of(shard)
    check_holes(shard, table, case.table)
    if data == case.data:
        assert shard.damage == []
        assert table.column(HOLE).null_count == SAMPLES
    else:
        assert shard.damage
    assert table_of(part, rows).equals(table.take(pa.array(rows)))  # what is a hole doesn't depend on the rows read


def check_holes(shard: Shard, table: pa.Table, original: pa.Table) -> None:
    assert shard.num_rows == table.num_rows == original.num_rows
    named = {d.row: d for d in shard.damage}
    assert pickle.loads(pickle.dumps(shard.damage)) == shard.damage
    for row, (found, wanted) in enumerate(zip(table.to_pylist(), original.to_pylist(), strict=True)):
        reason = found.pop(HOLE)
        if reason is None:
            assert found == wanted
            assert row not in named
            continue
        damage = named.get(row) or named[WHOLE_SHARD]
        assert damage.reason == reason
        assert damage.shard == shard.path
        for name, value in found.items():
            if name != "key":
                assert value in (b"", "", 0, [], [0.0] * 6)
        assert found["key"] == wanted["key"] or found["key"] == f"d-000000#{row}"


def only_holes(manifest: Manifest, data: bytes, **options) -> dict[int, str]:
    path = Path(manifest.shard_path(0))
    whole = path.read_bytes()
    path.write_bytes(data)
    try:
        table = table_of(open_shard(manifest, 0, policy="sample", **options))
    finally:
        path.write_bytes(whole)
    return {row: reason for row, reason in enumerate(table.column(HOLE).to_pylist()) if reason is not None}


def test_an_index_limits_damage_to_the_samples_concerned(tmp_path):
    manifest = write(tmp_path / "a", "tar")
    data = Path(manifest.shard_path(0)).read_bytes()
    index = parse_tar(memoryview(data))
    at = index.offsets[4 * 5] + 7  # the image of the sixth sample
    flipped = data[:at] + b"?" + data[at + 1 :]
    holes = only_holes(manifest, flipped)
    assert list(holes) == [5]
    assert "crc32 differs" in holes[5]
    cut = data[: index.starts[4 * 9] + 10]
    assert list(only_holes(manifest, cut)) == [9, 10, 11]
    bare = without_index(manifest)
    assert len(only_holes(bare, flipped)) == SAMPLES  # nothing shows where
    assert list(only_holes(bare, cut)) == [9, 10, 11]
    header = index.starts[4 * 5]
    broken = data[:header] + b"?" + data[header + 1 :]
    assert list(only_holes(bare, broken)) == [4, 5]  # the neighbour before may be concerned as well
    assert list(only_holes(manifest, broken)) == [5]
    packed = write(tmp_path / "b", "packed")
    data = Path(packed.shard_path(0)).read_bytes()
    at = parse_tar(memoryview(data)).offsets[1] + 900
    assert list(only_holes(packed, data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])) == [3, 4, 5]


def test_the_error_names_the_changed_sample(tmp_path):
    manifest = write(tmp_path / "a", "tar")
    path = Path(manifest.shard_path(0))
    data = bytearray(path.read_bytes())
    index = parse_tar(memoryview(data))
    data[index.offsets[4 * 7] + 3] ^= 1
    path.write_bytes(data)
    with pytest.raises(ShardDamage, match="content changed") as caught:
        open_shard(manifest, 0)
    assert (caught.value.key, caught.value.offset) == ("k07", index.starts[4 * 7])
    with pytest.raises(ShardDamage, match="crc32") as caught:
        open_shard(manifest, 0, rows=np.array([7]))
    assert (caught.value.key, caught.value.offset) == ("k07", index.starts[4 * 7])
    open_shard(manifest, 0, rows=np.array([6]))


@pytest.mark.parametrize("content", [b"nonsense", b"\xff\xfe", b""])
def test_a_label_that_is_none_is_one_hole(tmp_path, content):
    pieces = [(f"s{i}.{e}", c) for i in range(3) for e, c in (("txt", b"t"), ("cls", b"1" if i != 1 else content))]
    data = b"".join(tar_header(n, len(c)) + c + padding(len(c)) for n, c in pieces) + END
    manifest = foreign(tmp_path, data, 3, {"text": FIELDS["text"]})
    assert list(only_holes(manifest, data)) == [1]
    with pytest.raises(ShardDamage, match=r"'s1': its label .* isn't an integer"):
        open_shard(manifest, 0)


@pytest.mark.parametrize("content", [b"\xff", None])
def test_a_text_that_is_none_is_one_hole(tmp_path, content):
    pieces = [(f"s{i}.txt", b"t" if i != 1 else content) for i in range(3)]
    pieces = [p for i, p in enumerate(pieces) for p in (p, (f"s{i}.cls", b"1")) if p[1] is not None]
    data = b"".join(tar_header(n, len(c)) + c + padding(len(c)) for n, c in pieces) + END
    manifest = foreign(tmp_path, data, 3, {"text": FIELDS["text"]})
    assert list(only_holes(manifest, data)) == [1]
    with pytest.raises(ShardDamage, match="'s1'"):
        open_shard(manifest, 0)
    assert open_shard(manifest, 0, policy="shard").damage[0].row == WHOLE_SHARD


def test_arrays_written_otherwise_are_read_and_wrong_ones_are_holes(tmp_path):
    import io

    def npy(array: np.ndarray, version: tuple[int, int] | None = None) -> bytes:
        file = io.BytesIO()
        np.lib.format.write_array(file, array, version=version, allow_pickle=False)
        return file.getvalue()

    plain = np.arange(6, dtype=np.float32).reshape(2, 3)
    bodies = [npy(plain), npy(np.asfortranarray(plain)), npy(plain + 1, (2, 0)), npy(plain.T), b"?", npy(plain + 2)]
    pieces = [(f"s{i}.{e}", c) for i, body in enumerate(bodies) for e, c in (("npy", body), ("cls", b"1"))]
    data = b"".join(tar_header(n, len(c)) + c + padding(len(c)) for n, c in pieces) + END
    manifest = foreign(tmp_path, data, 6, {"vector": FIELDS["vector"]})
    table = table_of(open_shard(manifest, 0, policy="sample"))
    wanted = [plain, plain, plain + 1, plain * 0, plain * 0, plain + 2]
    assert table.column("vector").to_pylist() == [w.ravel().tolist() for w in wanted]
    assert [r is not None for r in table.column(HOLE).to_pylist()] == [False, False, False, True, True, False]


def foreign(folder: Path, data: bytes, samples: int, fields: dict[str, FieldSpec]) -> Manifest:
    import hashlib

    (folder / "x.tar").write_bytes(data)
    shard = {"path": "x.tar", "samples": samples, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    return Manifest.model_validate(
        {"name": "x", "layout": "tar", "fields": fields, "label": SINGLE, "shards": [shard]}
    ).at(folder)


def test_a_missing_shard_is_damage_and_a_failing_store_is_not(tmp_path, monkeypatch):
    manifest = write(tmp_path / "a", "tar")
    os.rename(manifest.shard_path(0), tmp_path / "away")
    with pytest.raises(ShardDamage, match=r"no such file"):
        open_shard(manifest, 0)
    for policy in ("shard", "sample"):
        shard = open_shard(manifest, 0, policy=policy)
        table = table_of(shard)
        assert table.column("key").to_pylist() == [f"k{i:02d}" for i in range(SAMPLES)]  # the index has them
        assert all("shard quarantined: no such file" in r for r in table.column(HOLE).to_pylist())
        assert [d.row for d in shard.damage] == [WHOLE_SHARD]
    os.rename(tmp_path / "away", manifest.shard_path(0))

    def fails(path, *args):
        if str(path).endswith(".tar"):
            raise DataError(f"{path}: can't be read: connection reset")
        return original(path, *args)

    original = store.read_bytes
    monkeypatch.setattr(store, "read_bytes", fails)
    for policy in ("raise", "shard", "sample"):
        for rows in (None, np.array([1])):
            with pytest.raises(DataError, match="connection reset") as caught:
                open_shard(manifest, 0, policy=policy, rows=rows)
            assert not isinstance(caught.value, ShardDamage)


# --- ranges --------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _small_gaps(monkeypatch):
    """Test shards are small; ranges pay off from here on."""
    from labelmill.data import shards

    monkeypatch.setattr(shards, "_GAP_LOCAL", 256)


@pytest.mark.parametrize("layout", ["tar", "packed"])
@settings(max_examples=40, deadline=None)
@given(some=st.lists(st.integers(0, SAMPLES - 1), max_size=6), names=st.sets(st.sampled_from(sorted(FIELDS))))
def test_any_rows_and_fields_are_those_of_the_whole(layout, sets, some, names):
    manifest = sets[layout]
    rows = np.array(some, dtype=np.int64)
    shard = open_shard(manifest, 0, rows=rows, fields=sorted(names))
    assert shard.num_rows == SAMPLES
    wanted = read_shard(manifest, 0).take(pa.array(rows))
    wanted = wanted.select(["key", *(n for n in FIELDS if n in names), "label"])
    assert table_of(shard, rows).drop_columns([HOLE]).equals(wanted)
    assert shard.schema.equals(wanted.schema)


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    return {layout: write(tmp_path_factory.mktemp(layout) / "set", layout) for layout in ("tar", "packed")}


@pytest.mark.parametrize("layout", ["tar", "packed"])
def test_only_the_ranges_that_are_needed_are_read(sets, layout, monkeypatch):
    manifest = sets[layout]
    asked: list[tuple[int, int]] = []

    def read(path, offset=0, length=None):
        if str(path).endswith(".tar"):
            asked.append((offset, length))
        return original(path, offset, length)

    original = store.read_bytes
    monkeypatch.setattr(store, "read_bytes", read)
    shard = open_shard(manifest, 0, rows=np.array([1, 10]))
    assert len(asked) == 2
    assert sum(n for _, n in asked) < manifest.shards[0].bytes / 1.5
    with pytest.raises(IndexError, match="row 7 isn't among"):
        gather([shard], np.array([0, 0]), np.array([1, 7]))
    asked.clear()
    open_shard(manifest, 0, rows=np.arange(SAMPLES - 1))
    open_shard(manifest, 0, rows=np.array([1]), policy="shard")  # a hole mustn't depend on the rows
    open_shard(without_index(manifest), 0, rows=np.array([1]))
    assert asked == [(0, None)] * 3
    with pytest.raises(IndexError, match="no row 12"):
        open_shard(manifest, 0, rows=np.array([12]))


@pytest.mark.parametrize("layout", ["tar", "packed"])
def test_overlays_go_with_rows_and_holes(tmp_path, layout):
    old = write(tmp_path / "old", layout, label=LabelSpec(form="multi", num_classes=SAMPLES))
    keys = read_labels(old, 0).column("key")
    labels = pa.table({"key": keys, "label": pa.array(range(SAMPLES), pa.int64())})
    new = write_label_overlay(old, tmp_path / "new", SINGLE, [labels])
    assert new.shards[0].index == "../old/d-000000.index.arrow"
    table = table_of(open_shard(new, 0, rows=np.array([2, 9])), np.array([9, 2]))
    assert table.column("label").to_pylist() == [9, 2]
    assert table.column("text").to_pylist() == ["täxt 9", "täxt 2"]
    data = Path(new.shard_path(0)).read_bytes()
    at = parse_tar(memoryview(data)).offsets[0] + 300
    Path(new.shard_path(0)).write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    table = table_of(open_shard(new, 0, policy="sample"))
    lost = 1 if layout == "tar" else 3
    assert table.column(HOLE).null_count == SAMPLES - lost
    assert table.column("key").to_pylist() == keys.to_pylist()
    assert table.column("label").to_pylist() == [0] * lost + list(range(lost, SAMPLES))


# --- gathering -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["tar", "packed"])
@pytest.mark.parametrize("form", ["single", "multi", "none"])
def test_samples_of_many_shards_become_one_contiguous_table(tmp_path, layout, form):
    label = LabelSpec(form=form, num_classes=None if form == "none" else SAMPLES)
    manifest = write(tmp_path / "a", layout, label=label, samples_per_shard=3)
    shards = [open_shard(manifest, i) for i in range(len(manifest.shards))]
    shards[1] = open_shard(manifest, 1, rows=np.array([0, 2]))
    which, row = np.array([2, 0, 1, 1, 0, 3, 1]), np.array([1, 2, 2, 0, 2, 0, 2])
    table = gather(shards, which, row)
    whole = [read_shard(manifest, i) for i in range(len(shards))]
    wanted = pa.concat_tables([whole[s].slice(r, 1) for s, r in zip(which, row, strict=True)])
    assert table.drop_columns([HOLE]).equals(wanted)
    assert table.drop_columns([HOLE]).schema.equals(manifest.schema)
    assert all(column.num_chunks == 1 for column in table.columns)
    assert table.column(HOLE).null_count == len(row)
    table.validate(full=True)
    assert gather(shards, which[:0], row[:0]).num_rows == 0
    for wrong in ([4], [-1]):
        with pytest.raises(IndexError, match="there are 4 shards"):
            gather(shards, np.array(wrong), np.array([0]))
    with pytest.raises(IndexError, match="row 3"):
        gather(shards, np.array([0]), np.array([3]))


def test_more_than_a_chunk_can_hold_is_split_and_large_buffers_are_seen_whole(sets, monkeypatch):
    whole = read_shard(sets["tar"], 0)
    monkeypatch.setattr(spans, "MAX_BINARY", 1500)
    monkeypatch.setattr(spans, "_REACH", 256)
    table = read_shard(sets["tar"], 0)
    assert table.column("image").num_chunks > 3
    assert table.equals(whole)


# --- verification --------------------------------------------------------------------------------------


def test_first_hashes_a_file_once_until_it_changes(tmp_path, monkeypatch):
    manifest = without_index(write(tmp_path / "a", "tar"))
    path = Path(manifest.shard_path(0))
    hashed: list[int] = []

    class Hash:
        def sha256(self, data):
            hashed.append(len(data))
            return original.sha256(data)

    import hashlib as original

    monkeypatch.setattr(store, "hashlib", Hash())
    for _ in range(3):
        open_shard(manifest, 0, verify="first")
    assert len(hashed) == 1
    open_shard(manifest, 0, verify=True)
    open_shard(manifest, 0, verify=False)
    assert len(hashed) == 2
    data = path.read_bytes()
    os.utime(path, ns=(1, 1))
    open_shard(manifest, 0, verify="first")
    assert len(hashed) == 3
    path.write_bytes(data[:3000] + bytes([data[3000] ^ 1]) + data[3001:])
    with pytest.raises(ShardDamage, match="content changed"):
        open_shard(manifest, 0, verify="first")


def test_remote_shards_go_through_the_cache(tmp_path, monkeypatch):
    local = write(tmp_path / "a", "tar")
    path = Path(local.shard_path(0))
    manifest = local.at("memory://bucket/a")
    calls: list[tuple[str, str, int]] = []

    class Cache:
        def read(self, path: str, sha256: str, size: int) -> pa.Buffer:
            calls.append((path, sha256, size))
            if not self.works:
                raise DataError("cache: full")
            return pa.py_buffer(self.content)

    Cache.works, Cache.content = True, path.read_bytes()  # type: ignore[attr-defined]
    info = local.shards[0]
    assert table_of(open_shard(manifest, 0, cache=Cache())).drop_columns([HOLE]).equals(read_shard(local, 0))
    assert calls == [("memory://bucket/a/d-000000.tar", info.sha256, info.bytes)]
    open_shard(local, 0, cache=Cache())
    assert len(calls) == 1  # local files need none
    Cache.content = b"?" * info.bytes  # type: ignore[attr-defined]
    with pytest.raises(ShardDamage):
        open_shard(without_index(manifest), 0, cache=Cache())
    Cache.works = False  # type: ignore[attr-defined]
    monkeypatch.setattr(store, "read_bytes", lambda p, *a: pa.py_buffer(path.read_bytes()))
    open_shard(without_index(manifest), 0, cache=Cache())


def test_a_tar_with_members_of_no_sample_is_fine(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name in ("README", "s0.txt", ".hidden", "s0.cls"):
            info = tarfile.TarInfo(name)
            info.size = 1
            import io

            tar.addfile(info, io.BytesIO(b"1"))
    data = (tmp_path / "x.tar").read_bytes()
    manifest = foreign(tmp_path, data, 1, {"text": FIELDS["text"]})
    assert read_shard(manifest, 0).to_pylist() == [{"key": "s0", "text": "1", "label": 1}]
