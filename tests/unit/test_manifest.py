"""Manifests: what they refuse, what their digest means, how they move; the store below."""

from __future__ import annotations

import json
import pickle
import shutil

import pyarrow as pa
import pytest
from pydantic import ValidationError

from labelmill.data import store
from labelmill.data.labels import LabelSpec
from labelmill.data.manifest import FieldSpec, Manifest, load_manifest, save_manifest
from labelmill.data.shards import read_shard
from labelmill.data.writer import ShardWriter
from labelmill.errors import DataError

TEXT = {"text": FieldSpec(kind="text", ext="txt")}


def write(out, rows=10, classes=True, name="words", **options) -> Manifest:
    writer = ShardWriter(out, name, TEXT, LabelSpec(form="single", num_classes=rows), "packed", **options)
    labels = list(range(rows))
    writer.write_table(pa.table({"key": [f"k{i}" for i in labels], "text": ["w"] * rows, "label": labels}))
    return writer.close(pa.table({"name": [f"name {i}" for i in labels]}) if classes else None)


def test_loads_from_folder_and_file_and_survives_a_move(tmp_path):
    written = write(tmp_path / "a")
    assert load_manifest(tmp_path / "a") == load_manifest(tmp_path / "a" / "manifest.json") == written
    shutil.move(tmp_path / "a", tmp_path / "b")
    moved = load_manifest(tmp_path / "b")
    assert moved.digest == written.digest
    assert moved.root == str(tmp_path / "b")
    assert read_shard(moved, 0).num_rows == moved.num_samples == 10
    again = pickle.loads(pickle.dumps(moved))  # workers get it so
    assert again.root == moved.root
    assert again.digest == moved.digest


def test_the_digest_is_of_content_only(tmp_path):
    one = write(tmp_path / "a")
    assert write(tmp_path / "b", name="other").digest == one.digest
    assert write(tmp_path / "c", rows=11).digest != one.digest
    assert write(tmp_path / "d", classes=False).digest != one.digest
    absolute = one.model_copy(update={"shards": tuple(s.model_copy(update={"path": "/x"}) for s in one.shards)})
    assert absolute.at("/").digest == one.digest


def test_class_names_are_in_arrow_not_in_json(tmp_path):
    manifest = write(tmp_path / "a", rows=1000)
    assert "name 7" not in (tmp_path / "a" / "manifest.json").read_text()
    classes = manifest.load_classes()
    assert classes.column("name")[7].as_py() == "name 7"
    assert classes.column("count").to_pylist() == [1] * 1000
    (tmp_path / "a" / "classes.arrow").write_bytes(b"junk")
    with pytest.raises(DataError, match="changed"):
        manifest.load_classes()
    with pytest.raises(DataError, match="bare ids"):
        write(tmp_path / "b", classes=False).load_classes()


def test_missing_data_sets_say_how_to_get_one(tmp_path):
    with pytest.raises(DataError, match=r"nothing: no such data set.*labelmill data import"):
        load_manifest(tmp_path / "nothing")
    with pytest.raises(DataError, match=r"no manifest.json in this folder"):
        load_manifest(tmp_path)
    (tmp_path / "a.tar").write_bytes(b"")
    with pytest.raises(DataError, match="import webdataset"):
        load_manifest(tmp_path)
    with pytest.raises(DataError, match="give the folder"):
        load_manifest(tmp_path / "a.tar")
    write(tmp_path / "set" / "train")
    with pytest.raises(DataError, match=r"Name one of: .*set/train"):
        load_manifest(tmp_path / "set")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m.update(schema_version=9), "schema_version is 9.*reads 1"),
        (lambda m: m.update(shards=[]), "empty: it lists no shard"),
        (lambda m: m.update(colour="red"), "colour"),
        (lambda m: m["shards"][0].update(sha256="xyz"), r"shards\.0\.sha256"),
        (lambda m: m["shards"][0].update(samples=0), r"shards\.0\.samples"),
        (lambda m: m["label"].update(form="double"), r"label\.form"),
        (lambda m: m["fields"]["text"].update(kind="sound"), r"fields\.text\.kind"),
    ],
)
def test_wrong_manifests_name_the_field(tmp_path, change, words):
    write(tmp_path / "a")
    file = tmp_path / "a" / "manifest.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    with pytest.raises(DataError, match=words):
        load_manifest(tmp_path / "a")


@pytest.mark.parametrize("text", ["{", "[1]", '"x"', ""])
def test_unreadable_manifests(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(DataError, match=r"manifest\.json"):
        load_manifest(tmp_path)


def test_fields_may_not_clash():
    common = {"name": "x", "layout": "tar", "label": LabelSpec(form="none"), "shards": ()}
    png = FieldSpec(kind="image", ext="png")
    for fields in ({"label": png}, {"key": png}, {"a": png, "b": FieldSpec(kind="image", ext="jpg;png")}):
        with pytest.raises(ValidationError):
            Manifest(fields=fields, **common)
    with pytest.raises(ValidationError):
        FieldSpec(kind="image", ext=".png")
    with pytest.raises(ValidationError, match="dtype"):
        FieldSpec(kind="array", ext="npy", dtype="object")


def test_a_manifest_without_a_place_says_so():
    manifest = Manifest(name="x", layout="tar", fields={}, label=LabelSpec(form="none"), shards=())
    with pytest.raises(DataError, match="no place"):
        _ = manifest.root


def test_store_writes_whole_files_or_none(tmp_path):
    path = tmp_path / "deep" / "file.bin"
    with pytest.raises(TypeError), store.open_write(path) as file:
        file.writelines([b"half", None])
    assert list((tmp_path / "deep").iterdir()) == []
    store.write_bytes(path, b"whole")
    assert store.read_bytes(path).to_pybytes() == b"whole"
    assert store.read_head(path, 2) == b"wh"
    assert store.size(path) == 5
    assert store.list_files(tmp_path) == ["deep/file.bin"]
    assert store.list_files(tmp_path / "none") == []
    store.delete(path)
    store.delete(path)
    assert not store.exists(path)
    with pytest.raises(DataError, match=r"file\.bin: no such file"):
        store.read_bytes(path)


def test_store_paths():
    assert store.is_uri("s3://b/k")
    assert not store.is_uri("file:///tmp/x")
    assert store.normal("file:///tmp/x/") == "/tmp/x"
    assert store.normal("s3://b/k/") == "s3://b/k"
    assert store.join("s3://b/k", "x.tar") == "s3://b/k/x.tar"
    assert store.join("/a", "/b") == "/b"
    assert store.join("/a", "s3://b/x") == "s3://b/x"


def test_saving_again_replaces_the_manifest(tmp_path):
    manifest = write(tmp_path / "a")
    renamed = save_manifest(manifest.model_copy(update={"name": "renamed"}), tmp_path / "a")
    assert load_manifest(tmp_path / "a") == renamed
    assert renamed.name == "renamed"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m["shards"][0].update(path="../secret.tar"), r"shards\.0.*leads out"),
        (lambda m: m["shards"][0].update(path="a/../../b.tar"), r"shards\.0.*leads out"),
        (lambda m: m["shards"][0].update(path="s3://bucket/../b.tar"), r"shards\.0.*leads out"),
        (lambda m: m["shards"][0].update(index="../x.arrow"), r"shards\.0.*leads out"),
        (
            lambda m: m["shards"][0].update(labels="/etc/passwd", labels_sha256="0" * 64),
            r"shards\.0.*data set's folder",
        ),
        (lambda m: m["shards"][0].update(labels="../a", labels_sha256="0" * 64), r"shards\.0.*data set's folder"),
        (lambda m: m.update(classes="../classes.arrow"), r"classes.*data set's folder"),
        (lambda m: m["shards"][0].update(index_sha256=None), r"shards\.0.*index and index_sha256"),
    ],
)
def test_paths_may_not_lead_out_of_the_folder(tmp_path, change, words):
    write(tmp_path / "a")
    file = tmp_path / "a" / "manifest.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    with pytest.raises(DataError, match=words):
        load_manifest(tmp_path / "a")
