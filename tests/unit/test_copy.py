"""Data sets on S3 and between places: imported, copied, verified, resumed, replaced."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from typer.testing import CliRunner

from labelmill.cli_data import data_app
from labelmill.data import store
from labelmill.data.copy import copy_data, parts_of
from labelmill.data.importers import import_table
from labelmill.data.inspect import verify
from labelmill.data.labels import LabelSpec
from labelmill.data.manifest import Manifest, load_manifest, save_manifest
from labelmill.data.overlay import write_label_overlay
from labelmill.data.shards import ShardDamage, read_shard
from labelmill.data.staging import own_files, references
from labelmill.errors import DataError
from tests.faults import FaultServer, Rule

Make = Callable[..., Manifest]


def _same(copy: Manifest, original: Manifest) -> None:
    assert copy.digest == original.digest
    assert verify(copy).lines() == verify(original).lines()
    assert verify(copy).ok
    for i in range(len(original.shards)):
        assert read_shard(copy, i).equals(read_shard(original, i))


def _csv(tmp_path: Path, rows: int = 60) -> Path:
    path = tmp_path / "words.csv"
    path.write_text("word,class\n" + "".join(f"word-{i},c{i % 3}\n" for i in range(rows)))
    return path


def test_import_to_s3_and_round_trip(s3_store: str, tmp_path: Path) -> None:
    """The commands that a person would type."""
    run = CliRunner()
    table = ["import", "table", str(_csv(tmp_path)), "--text", "word", "--label", "class", "--shard-mb", "0.01"]
    for steps in (
        [*table, "--to", "s3://data/words"],
        ["verify", "s3://data/words"],
        ["copy", "s3://data/words", str(tmp_path / "here")],
        ["copy", str(tmp_path / "here"), "s3://data/again"],
        ["copy", "s3://data/again", "s3://data/third"],
        ["verify", "s3://data/third"],
        ["inspect", "s3://data/third"],
    ):
        done = run.invoke(data_app, steps, catch_exceptions=False)
        assert done.exit_code == 0, (steps, done.output)
    _same(load_manifest("s3://data/third"), load_manifest("s3://data/words"))
    _same(load_manifest(tmp_path / "here"), load_manifest("s3://data/words"))
    assert load_manifest("s3://data/third").load_classes().num_rows == 3
    with pytest.raises(DataError, match="there already"):
        run.invoke(data_app, [*table, "--to", "s3://data/words"], catch_exceptions=False)
    assert run.invoke(data_app, [*table, "--to", "s3://data/words", "--overwrite"]).exit_code == 0
    assert verify(load_manifest("s3://data/words")).ok


def test_parts_go_together(tmp_path: Path) -> None:
    options: Any = {"split": {"train": 0.5, "test": 0.5}}
    made = import_table(_csv(tmp_path), tmp_path / "parts", text_column="word", label_column="class", **options)
    assert parts_of(tmp_path / "parts") == ["test", "train"]
    assert CliRunner().invoke(data_app, ["copy", str(tmp_path / "parts"), str(tmp_path / "copy")]).exit_code == 0
    for part, manifest in made.items():
        _same(load_manifest(tmp_path / "copy" / part), manifest)


def test_everything_the_manifest_names_goes_along(make_text_data: Make, tmp_path: Path, faulty: FaultServer) -> None:
    """Label overlays, class names, shards named by absolute paths and URIs, two files of one name."""
    base = make_text_data(20, 4, classes=2)
    place, deep = tmp_path / "mixed", tmp_path / "deep"
    (place / "sub").mkdir(parents=True)
    deep.mkdir()
    first = base.shards[0].path
    store.write_bytes(f"s3://data/far/{first}", store.read_bytes(base.shard_path(0)))
    shutil.copy(base.shard_path(3), deep / first)
    shutil.copy(base.shard_path(4), place / "sub" / first)
    paths = [f"s3://data/far/{first}", base.shard_path(1), base.shard_path(2), str(deep / first), f"sub/{first}"]
    bare = {"index": None, "index_sha256": None}
    shards = [s.model_copy(update={"path": path, **bare}) for s, path in zip(base.shards, paths, strict=True)]
    save_manifest(base.model_copy(update={"shards": tuple(shards)}), place)
    mixed = load_manifest(place)
    kept = copy_data(mixed.root, tmp_path / "kept").manifest
    stem = first.removesuffix(".tar")
    assert {s.path for s in kept.shards} >= {first, f"{stem}-1.tar", f"sub/{first}"}
    _same(kept, base)
    label = LabelSpec(form="multi", num_classes=3)
    tables = [
        pa.table({"key": read_shard(mixed, i).column("key"), "label": pa.array([[i % 3]] * s.samples)})
        for i, s in enumerate(mixed.shards)
    ]
    names = pa.table({"name": ["a", "b", "c"]})
    relabelled = write_label_overlay(mixed, tmp_path / "relabelled", label, tables, classes=names)
    for where in (tmp_path / "whole", "s3://data/whole"):
        report = copy_data(relabelled.root, where)
        assert report.copied == 5 + 5 + 1
        names_there = store.list_files(where)
        assert len(names_there) == 12
        assert sorted(own_files(report.manifest) | {"manifest.json"}) == names_there
        _same(load_manifest(where), relabelled)
        assert load_manifest(where).load_classes().column("name").to_pylist() == ["a", "b", "c"]
    # and on from a copy that lost its sources
    shutil.rmtree(place)
    shutil.rmtree(deep)
    report = copy_data(tmp_path / "whole", tmp_path / "last")
    assert [s.path for s in report.manifest.shards] == [s.path for s in load_manifest(tmp_path / "whole").shards]


def test_fields_to_come_go_along(make_text_data: Make) -> None:
    """A file named by a field X with a checksum in X_sha256 is copied whatever X is."""
    from labelmill.data.manifest import ShardInfo

    class WithNotes(ShardInfo):
        notes: str | None = None
        notes_sha256: str | None = None

    info = make_text_data(4, 4).shards[0]
    shard = WithNotes(**info.model_dump(), notes="a.notes", notes_sha256="ab" * 32)
    assert dict(references(shard, 5)) == {
        "path": (info.path, info.sha256, 5),
        "index": (info.index, info.index_sha256, None),
        "notes": ("a.notes", "ab" * 32, None),
    }


def test_an_interrupted_copy_goes_on(make_text_data: Make, faulty: FaultServer, monkeypatch) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    original = make_text_data(40, 4)
    faulty.rules = [Rule("500", key="*-000007.tar", method="PUT", times=None)]
    with pytest.raises(DataError, match=r"texts-000007\.tar: can't be written"):
        copy_data(original.root, "s3://data/copy", jobs=1)
    assert not store.exists("s3://data/copy/manifest.json")
    with pytest.raises(DataError, match=r"no manifest\.json|holds tar files"):
        load_manifest("s3://data/copy")
    there = set(store.list_files("s3://data/copy"))
    assert len(there) >= 7
    # one of them spoiled since, one replaced by something of the right size: neither is kept
    first = faulty.objects["data/copy/texts-000000.tar"].data
    faulty.put("data/copy/texts-000000.tar", first[:-1] + b"!")
    faulty.put("data/copy/texts-000001.tar", b"short")
    faulty.calm()
    report = copy_data(original.root, "s3://data/copy")
    assert report.kept == len(there) - 2
    assert report.kept + report.copied == 20, "shards and their indexes"
    _same(report.manifest, original)
    faulty.calm()
    report = copy_data(original.root, "s3://data/copy")
    assert (report.kept, report.copied) == (20, 0)
    assert not [r for r in faulty.gets() if r.path.endswith(".tar")]  # by the noted checksum, without reading
    report = copy_data("s3://data/copy", original.root)
    assert (report.kept, report.copied) == (20, 0)


def test_local_leftovers_are_tidied(make_text_data: Make, tmp_path: Path) -> None:
    original = make_text_data(8, 4)
    place = tmp_path / "copy"
    place.mkdir()
    (place / f"{original.shards[0].path}.0123abcd.part").write_bytes(b"half")
    shutil.copy(original.shard_path(1), place)
    report = copy_data(original.root, place)
    assert (report.kept, report.copied) == (1, 3)
    assert store.list_files(place) == sorted({"manifest.json"} | own_files(original))


def test_damaged_sources_stop_the_copy(make_text_data: Make, tmp_path: Path) -> None:
    original = make_text_data(12, 4)
    path = Path(original.shard_path(1))
    data = path.read_bytes()
    for wrong, words in ((data[:-512], "bytes long instead of"), (data[:-1] + b"!", "the content changed")):
        path.write_bytes(wrong)
        with pytest.raises(ShardDamage, match=words) as caught:
            copy_data(original.root, tmp_path / "copy")
        assert str(path) in str(caught.value)
        assert not (tmp_path / "copy" / "manifest.json").exists()
    path.unlink()
    with pytest.raises(DataError, match="no such file"):
        copy_data(original.root, tmp_path / "copy")
    path.write_bytes(data)
    _same(copy_data(original.root, tmp_path / "copy").manifest, original)


def test_what_is_there_is_safe(make_text_data: Make, tmp_path: Path) -> None:
    one, two = make_text_data(12, 4, name="one"), make_text_data(8, 4, name="two")
    place = tmp_path / "copy"
    copy_data(one.root, place)
    with pytest.raises(DataError, match="another data set, 'one'"):
        copy_data(two.root, place)
    report = copy_data(two.root, place, overwrite=True)
    assert report.removed == 6
    _same(load_manifest(place), two)
    assert store.list_files(place) == sorted({"manifest.json"} | own_files(two))
    (place / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match=r"notes\.txt"):
        copy_data(one.root, place, overwrite=True)
    with pytest.raises(DataError, match="onto itself"):
        copy_data(one.root, one.root)
    with pytest.raises(DataError, match=r"notes\.txt: a file has this name"):
        copy_data(one.root, place / "notes.txt")
    _same(load_manifest(place), two)


def test_overwriting_on_s3_leaves_nothing_behind(faulty: FaultServer, tmp_path: Path) -> None:
    for rows, size in ((60, 3000), (10, 10**6)):
        import_table(
            _csv(tmp_path, rows),
            "s3://data/words",
            text_column="word",
            target_bytes=size,
            overwrite=True,
            rows_per_member=8,
        )
    manifest = load_manifest("s3://data/words")
    assert store.list_files("s3://data/words") == sorted({"manifest.json"} | own_files(manifest))
    assert verify(manifest).ok


def test_local_tars_are_not_indexed_into_a_bucket(faulty: FaultServer, tmp_path: Path) -> None:
    from labelmill.data.webdataset import import_webdataset

    made = import_table(_csv(tmp_path), tmp_path / "tars", text_column="word", layout="tar", label_column="class")
    with pytest.raises(DataError, match="labelmill data copy"):
        import_webdataset(made["all"].root, "s3://data/index")
    assert not faulty.objects


def test_manifests_stay_small_text(make_text_data: Make, tmp_path: Path) -> None:
    copy = copy_data(make_text_data(8, 4).root, tmp_path / "copy").manifest
    text = (tmp_path / "copy" / "manifest.json").read_text()
    assert json.loads(text)["shards"][0]["path"] == copy.shards[0].path
    assert hashlib.sha256((tmp_path / "copy" / copy.shards[0].path).read_bytes()).hexdigest() == copy.shards[0].sha256
