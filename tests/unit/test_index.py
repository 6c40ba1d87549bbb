"""The sidecar index: written with every data set, made later for others, never trusted more than it deserves."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from typer.testing import CliRunner

from labelmill.cli import app
from labelmill.data import index as sidecar
from labelmill.data import shards as reading
from labelmill.data.index import add_indexes, build_index, ensure, index_names, plan_ranges, read_index
from labelmill.data.labels import LabelSpec
from labelmill.data.manifest import FieldSpec, Manifest, load_manifest, save_manifest
from labelmill.data.shards import ShardDamage, gather, open_shard, read_shard
from labelmill.data.writer import ShardWriter
from labelmill.errors import DataError

FIELDS = {"text": FieldSpec(kind="text", ext="txt"), "blob": FieldSpec(kind="bytes", ext="bin")}


def write(out: Path, layout: str = "tar", rows: int = 20, per_shard: int = 8) -> Manifest:
    label = LabelSpec(form="single", num_classes=rows)
    with ShardWriter(out, "t", FIELDS, label, layout, rows_per_member=3, samples_per_shard=per_shard) as writer:
        for i in range(rows):
            writer.write(f"k{i:03d}", {"text": f"text {i}", "blob": bytes(100 * i)}, {"label": i})
    assert writer.manifest is not None
    return writer.manifest


def bare(manifest: Manifest) -> Manifest:
    shards = tuple(s.model_copy(update={"index": None, "index_sha256": None}) for s in manifest.shards)
    return manifest.model_copy(update={"shards": shards}).at(manifest.root)


@pytest.mark.parametrize("layout", ["tar", "packed"])
def test_every_shard_written_has_an_index_that_says_where_all_lies(tmp_path, layout):
    manifest = write(tmp_path / "a", layout)
    for i, info in enumerate(manifest.shards):
        data = Path(manifest.shard_path(i)).read_bytes()
        index = read_index(manifest, i)
        assert index is not None
        assert index.samples == info.samples
        table = read_shard(manifest, i)
        places = index.places
        if layout == "tar":
            assert places.keys.to_pylist() == table.column("key").to_pylist()
            offset, size = places.member(("txt",))
            texts = [data[o : o + s].decode() for o, s in zip(offset, size, strict=True)]
            assert texts == table.column("text").to_pylist()
        else:
            assert places.keys.to_pylist() == table.column("key").to_pylist()[::3]
        assert places.start.tolist() == [0, *places.stop.tolist()[:-1]]
        assert places.stop[-1] == len(data) - 1024
        assert all(index.intact(memoryview(data), 0, entry) for entry in range(len(places)))


def test_an_index_is_no_part_of_the_digest(tmp_path):
    manifest = write(tmp_path / "a")
    assert Manifest.model_validate(bare(manifest).model_dump()).digest == manifest.digest


@pytest.mark.parametrize("layout", ["tar", "packed"])
def test_indexes_are_made_on_first_contact_and_found_again(tmp_path, layout, monkeypatch):
    manifest = write(tmp_path / "a", layout)
    for path in (tmp_path / "a").glob("*.index.arrow"):
        path.unlink()
    elsewhere = ensure(bare(manifest), tmp_path / "indexes")
    assert [s.index for s in elsewhere.shards] == [
        str(tmp_path / "indexes" / f"t-{i:06d}.index.arrow") for i in range(len(manifest.shards))
    ]
    assert elsewhere.digest == manifest.digest
    assert elsewhere.root == manifest.root
    monkeypatch.setattr(sidecar, "build_index", None)  # nothing is built twice
    again = ensure(bare(manifest), tmp_path / "indexes")
    assert again == elsewhere
    assert ensure(again, tmp_path / "other") == again
    assert not (tmp_path / "other").exists()
    rows = np.array([2])
    monkeypatch.setattr(reading, "_GAP_LOCAL", 100)
    table = gather([open_shard(again, 1, rows=rows)], np.zeros(1, int), rows)
    assert table.column("text").to_pylist() == [read_shard(manifest, 1).column("text")[2].as_py()]


def test_a_changed_shard_gets_no_index(tmp_path):
    manifest = bare(write(tmp_path / "a"))
    path = Path(manifest.shard_path(1))
    data = path.read_bytes()
    path.write_bytes(data[:700] + bytes([data[700] ^ 1]) + data[701:])
    with pytest.raises(ShardDamage, match=r"t-000001\.tar: the content changed"):
        ensure(manifest, tmp_path / "indexes")


def test_the_command_adds_what_is_missing(tmp_path):
    manifest = write(tmp_path / "a")
    save_manifest(bare(manifest), tmp_path / "a")
    done = CliRunner().invoke(app, ["data", "index", str(tmp_path / "a")])
    assert done.exit_code == 0, done.output
    assert "3 shard(s) have an index; 3 had none" in done.output
    assert load_manifest(tmp_path / "a") == manifest
    assert add_indexes(manifest) == manifest


def test_readers_do_without_an_index_that_is_missing_or_wrong(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(reading, "_GAP_LOCAL", 100)
    manifest = write(tmp_path / "a")
    path = Path(manifest.index_path(1) or "")
    rows = np.array([3])
    wanted = read_shard(manifest, 1).take(pa.array(rows))
    for spoil in (
        lambda: path.write_bytes(path.read_bytes()[:-1] + b"?"),
        lambda: shutil.copy(manifest.index_path(0) or "", path),
        path.unlink,
    ):
        spoil()
        caplog.clear()
        table = gather([open_shard(manifest, 1, rows=rows)], np.zeros(1, int), rows)
        assert table.drop_columns(["__hole__"]).equals(wanted)
        assert "t-000001.index.arrow" in caplog.text


def test_an_index_for_other_fields_isnt_used(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "_GAP_LOCAL", 100)
    manifest = write(tmp_path / "a")
    one = manifest.model_copy(update={"fields": {"text": FIELDS["text"]}})
    narrow = ensure(bare(one), tmp_path / "indexes")
    both = narrow.model_copy(update={"fields": FIELDS})
    assert read_index(narrow, 0) is not None
    assert read_index(both, 0) is None
    assert read_shard(both, 0).equals(read_shard(manifest, 0))


def test_ranges_that_are_near_become_one():
    rows = 100
    with_places = write_places(rows)
    assert plan_ranges(with_places, np.array([], dtype=np.int64), 100_000, 0) == []
    assert plan_ranges(with_places, np.array([3, 4, 9]), 100_000, 0) == [(3000, 5000), (9000, 10000)]
    assert plan_ranges(with_places, np.array([3, 4, 9]), 100_000, 4000) == [(3000, 10000)]
    assert plan_ranges(with_places, np.arange(0, 100, 3), 100_000, 4000) is None


def write_places(rows: int):
    from labelmill.data.scan import Places

    edges = 1000 * np.arange(rows + 1)
    places = Places(pa.array([f"{i}" for i in range(rows)]), edges[:-1], edges[1:], {}, True, int(edges[-1]))
    return sidecar.ShardIndex(places, np.zeros(rows, dtype=np.uint32))


def test_names_of_indexes_are_distinct():
    assert index_names(["a/x.tar", "b/x.tar", "s3://c/y.tar"]) == ["x.index.arrow", "x.1.index.arrow", "y.index.arrow"]


def test_a_shard_in_pieces_is_refused(tmp_path):
    manifest = write(tmp_path / "a", "packed")
    data = bytearray(Path(manifest.shard_path(0)).read_bytes())
    data[512:520] = b"\xff" * 8
    with pytest.raises(ShardDamage, match="can't be read"):
        build_index(pa.py_buffer(bytes(data)), "packed", "x.tar")


def test_a_read_only_folder_is_named(tmp_path, monkeypatch):
    manifest = bare(write(tmp_path / "a"))
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(DataError, match="file/"):
        ensure(manifest, blocked)


MANY = """
import json, resource, sys, time
from labelmill.data.manifest import load_manifest
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
began = time.process_time()
manifest = load_manifest(sys.argv[1])
took = time.process_time() - began
print(took, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, manifest.num_samples)
"""


def test_a_manifest_of_a_million_samples_opens_fast_and_small(tmp_path):
    import json

    count = 50_000
    info = {"samples": 20, "bytes": 360_000, "sha256": "ab" * 32, "index_sha256": "cd" * 32}
    shards = [{"path": f"set-{i:06d}.tar", "index": f"set-{i:06d}.index.arrow", **info} for i in range(count)]
    raw = {"schema_version": 1, "name": "x", "layout": "tar", "fields": {"text": {"kind": "text", "ext": "txt"}}}
    raw |= {"label": {"form": "single", "num_classes": 9}, "shards": shards}
    (tmp_path / "manifest.json").write_text(json.dumps(raw, indent=1))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", MANY, str(tmp_path)], capture_output=True, text=True, env=environment)
    seconds, megabytes, samples = done.stdout.split()
    assert int(samples) == 1_000_000
    assert float(seconds) < 1
    assert float(megabytes) < 100
