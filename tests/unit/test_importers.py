"""Importers: what they read, what they refuse, keys, splits, label spaces."""

from __future__ import annotations

import gzip
import io
import json
import struct
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from labelmill.data import shards
from labelmill.data.decode import decode_images, encode_png
from labelmill.data.importers import import_idx, import_image_folder, import_table, read_idx
from labelmill.data.keys import assign_splits, check_keys, clean_key, keys_of_paths
from labelmill.data.manifest import Manifest, load_manifest
from labelmill.data.shards import ShardDamage, gather, label_counts, open_shard, read_shard
from labelmill.data.webdataset import find_tars, import_webdataset
from labelmill.errors import DataError


def png(value: int, side: int = 4) -> bytes:
    return encode_png(np.full((side, side, 3), value, dtype=np.uint8))


def rows(manifest: Manifest) -> dict[str, dict]:
    """Samples by key."""
    tables = [read_shard(manifest, i) for i in range(len(manifest.shards))]
    return {row["key"]: row for row in pa.concat_tables(tables).to_pylist()}


def names(manifest: Manifest) -> list[str]:
    return manifest.load_classes().column("name").to_pylist()


# --- image folder --------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path) -> Path:
    root = tmp_path / "pets"
    for c, name in enumerate(("dog", "cat", "eel")):
        (root / name / "deep").mkdir(parents=True)
        for i in range(4):
            (root / name / f"{i}.png").write_bytes(png(10 * c + i))
        (root / name / "deep" / "v.2.png").write_bytes(png(99))
    (root / "README.md").write_text("hello")
    (root / "dog" / ".hidden.png").write_text("")
    return root


def test_image_folder(folder, tmp_path):
    manifest = import_image_folder(folder, tmp_path / "out")["all"]
    assert names(manifest) == ["cat", "dog", "eel"]
    assert manifest.load_classes().column("count").to_pylist() == [5, 5, 5]
    samples = rows(manifest)
    assert len(samples) == 15
    assert samples["dog/3"]["label"] == 1
    assert samples["dog/3"]["image"] == png(3)
    assert samples["cat/deep/v_2"]["label"] == 0
    assert manifest.name == "pets"
    assert list(samples) != sorted(samples)  # classes don't lie together
    assert import_image_folder(folder, tmp_path / "again")["all"].digest == manifest.digest
    bare = import_image_folder(folder, tmp_path / "bare", labelled=False)["all"]
    assert bare.label.form == "none"


def test_numbered_folders_sort_by_value_and_given_names_rule(folder, tmp_path):
    root = tmp_path / "digits"
    for i in (10, 9, 2):
        (root / str(i)).mkdir(parents=True)
        (root / str(i) / "a.png").write_bytes(png(i))
    assert names(import_image_folder(root, tmp_path / "a")["all"]) == ["2", "9", "10"]
    given_names = ["eel", "fox", "dog", "cat"]
    manifest = import_image_folder(folder, tmp_path / "b", class_names=given_names)["all"]
    assert rows(manifest)["cat/1"]["label"] == 3
    assert label_counts(manifest).tolist() == [5, 0, 5, 5]
    with pytest.raises(DataError, match="'eel' isn't one of the 2 class names"):
        import_image_folder(folder, tmp_path / "c", class_names=["cat", "dog"])


def test_mixed_formats_share_one_field(folder, tmp_path):
    (folder / "cat" / "0.webp").write_bytes(b"RIFF\0\0\0\0WEBPVP8 ")
    manifest = import_image_folder(folder, tmp_path / "out")["all"]
    assert manifest.fields["image"].ext == "png;webp"
    keys = [k for k in rows(manifest) if k.startswith("cat/0")]
    assert len(keys) == 2  # 0.png and 0.webp stay apart
    with tarfile.open(manifest.shard_path(0)) as tar:
        assert sum(n.endswith(".webp") for n in tar.getnames()) == 1


def test_image_folder_refuses(folder, tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        import_image_folder(tmp_path / "none", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no image"):
        import_image_folder(tmp_path / "empty", tmp_path / "out")
    (folder / "loose.png").write_bytes(png(0))
    with pytest.raises(DataError, match=r"loose\.png: this image lies in no class folder"):
        import_image_folder(folder, tmp_path / "out")
    (folder / "loose.png").unlink()
    (folder / "cat" / "fake.png").write_text("<html>")
    with pytest.raises(DataError, match=r"cat/fake\.png: not an image"):
        import_image_folder(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- IDX -----------------------------------------------------------------------------------------------


def idx(array: np.ndarray) -> bytes:
    kind = {"u1": 0x08, "i4": 0x0C}[array.dtype.str[1:]]
    return (
        bytes([0, 0, kind, array.ndim])
        + struct.pack(f">{array.ndim}I", *array.shape)
        + array.astype(array.dtype.newbyteorder(">")).tobytes()
    )


@pytest.fixture
def digits(tmp_path) -> tuple[Path, Path, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (30, 6, 5), dtype=np.uint8)
    labels = (np.arange(30) % 3).astype(np.uint8)
    (tmp_path / "images").write_bytes(idx(images))
    (tmp_path / "labels.gz").write_bytes(gzip.compress(idx(labels)))
    return tmp_path / "images", tmp_path / "labels.gz", images, labels


def test_idx(digits, tmp_path):
    images_path, labels_path, images, labels = digits
    manifest = import_idx(images_path, labels_path, tmp_path / "out", name="fm", class_names=["a", "b", "c", "d"])[
        "all"
    ]
    assert manifest.layout == "packed"
    assert manifest.fields["image"].shape == (6, 5, 1)
    assert manifest.label.num_classes == 4
    samples = rows(manifest)
    for i in range(30):
        row = samples[f"fm-{i:07d}"]
        assert row["label"] == labels[i]
        decoded, _, _ = decode_images(pa.array([row["image"]]), ["x"], channels=1)
        assert np.array_equal(decoded[0, :, :, 0], images[i])
    by_bare_name = import_idx(images_path, tmp_path / "labels", tmp_path / "gz", name="fm")["all"]
    assert by_bare_name.label.num_classes == 3


def test_idx_reads_wider_types_in_big_endian_order(tmp_path):
    array = np.array([[1, -2], [70000, 4]], dtype=np.int32)
    (tmp_path / "a").write_bytes(idx(array))
    assert read_idx(tmp_path / "a").tolist() == array.tolist()


def test_idx_refuses(digits, tmp_path):
    images_path, labels_path, images, _ = digits
    whole = images_path.read_bytes()
    images_path.write_bytes(whole[:-10])
    with pytest.raises(DataError, match=r"images: its header announces \[30, 6, 5\], 900 bytes, but 890 follow"):
        import_idx(images_path, labels_path, tmp_path / "out")
    images_path.write_bytes(b"PK\3\4")
    with pytest.raises(DataError, match="not an IDX file"):
        import_idx(images_path, labels_path, tmp_path / "out")
    images_path.write_bytes(gzip.compress(whole)[:-20])
    with pytest.raises(DataError, match="gzip stream is damaged"):
        import_idx(images_path, labels_path, tmp_path / "out")
    images_path.write_bytes(idx(images[:29]))
    with pytest.raises(DataError, match="29 images"):
        import_idx(images_path, labels_path, tmp_path / "out")
    images_path.write_bytes(whole)
    with pytest.raises(DataError, match=r"row 3, .*label 2 is out of range"):
        import_idx(images_path, labels_path, tmp_path / "out", num_classes=2)
    with pytest.raises(DataError, match="no such file"):
        import_idx(tmp_path / "nothing", labels_path, tmp_path / "out")


# --- tables --------------------------------------------------------------------------------------------


def csv(tmp_path, text: str, name: str = "t.csv") -> Path:
    (tmp_path / name).write_text(text)
    return tmp_path / name


def test_csv_with_names(tmp_path):
    path = csv(tmp_path, 'text,kind,id\n"a, b",cat,x.1\n"two\nlines",dog,x2\nlast,cat,y\n')
    manifest = import_table(path, tmp_path / "out", text_column="text", label_column="kind", key_column="id")["all"]
    assert manifest.layout == "packed"
    assert names(manifest) == ["cat", "dog"]
    assert {k: (r["text"], r["label"]) for k, r in rows(manifest).items()} == {
        "x_1": ("a, b", 0),
        "x2": ("two\nlines", 1),
        "y": ("last", 0),
    }


def test_csv_with_integers_keeps_them(tmp_path):
    path = csv(tmp_path, "text\tlabel\na\t7\nb\t0\n", "t.tsv")
    manifest = import_table(path, tmp_path / "out", text_column="text", label_column="label")["all"]
    assert manifest.label.num_classes == 8
    assert [r["label"] for _, r in sorted(rows(manifest).items())] == [7, 0]
    assert sorted(rows(manifest)) == ["t-00000001", "t-00000002"]
    zipped = tmp_path / "z.csv.gz"
    zipped.write_bytes(gzip.compress(b"text,label\na,1\n"))
    given_names = ["x", "y", "z"]
    small = import_table(zipped, tmp_path / "z", text_column="text", label_column="label", class_names=given_names)
    assert names(small["all"]) == given_names


CSV_FORMS = [
    ("multi", "a;b\n;\nb\n", {}, [[0, 1], [], [1]], None),
    ("multi", "3;1\n\n2\n", {}, [[3, 1], [], [2]], None),
    ("complementary", "0|1\n2\n1\n", {"separator": "|", "num_classes": 4}, [[0, 1], [2], [1]], None),
    ("soft", '"{""a"": 0.75, ""b"": 0.25}"\n"{""b"": 1}"\n"{""c"": 2}"\n', {}, [[0, 1], [1], [2]], "label_weight"),
    ("continuous", "1.5;2\n3;4\n-1;1e3\n", {}, [[1.5, 2.0], [3.0, 4.0], [-1.0, 1000.0]], None),
]


@pytest.mark.parametrize(("form", "cells", "options", "wanted", "extra"), CSV_FORMS)
def test_csv_forms(tmp_path, form, cells, options, wanted, extra):
    lines = [f"t{i},{cell}" for i, cell in enumerate(cells.splitlines())]
    path = csv(tmp_path, "text,label\n" + "\n".join(lines) + "\n")
    options |= {"text_column": "text", "label_column": "label", "label_form": form}
    manifest = import_table(path, tmp_path / "out", **options)["all"]
    ordered = [r for _, r in sorted(rows(manifest).items())]
    assert [r["label"] for r in ordered] == wanted
    if extra:
        assert [r[extra] for r in ordered] == [[0.75, 0.25], [1.0], [2.0]]


def test_csv_partial_and_columns_of_numbers(tmp_path):
    path = csv(tmp_path, "text,yes,no,u,v\na,x;y,z,1,2\nb,,x,3,4\n")
    partial = import_table(
        path, tmp_path / "p", text_column="text", label_column="yes", negative_column="no", label_form="partial"
    )["all"]
    assert names(partial) == ["x", "y", "z"]
    assert [(r["label"], r["label_negative"]) for _, r in sorted(rows(partial).items())] == [([0, 1], [2]), ([], [0])]
    numbers = import_table(path, tmp_path / "n", text_column="text", label_column=["u", "v"], label_form="continuous")[
        "all"
    ]
    assert numbers.label.dim == 2
    assert [r["label"] for _, r in sorted(rows(numbers).items())] == [[1.0, 2.0], [3.0, 4.0]]


def test_parquet_forms(tmp_path):
    table = pa.table(
        {
            "text": pa.array(["a", "b"]).dictionary_encode(),
            "single": ["x", "y"],
            "multi": [["x", "y"], []],
            "ids": pa.array([[4], [1, 2]], pa.large_list(pa.int32())),
            "weight": [[0.5], [1.0, 3.0]],
            "no": [[0], [3]],
            "values": pa.array([[1.0, 2.0], [3.0, 4.0]], pa.list_(pa.float64(), 2)),
            "number": [7, 8],
        }
    )
    pq.write_table(table, tmp_path / "t.parquet")

    def get(form, column, **options):
        made = import_table(
            tmp_path / "t.parquet",
            tmp_path / f"{form}-{column}",
            text_column="text",
            label_column=column,
            label_form=form,
            **options,
        )["all"]
        return [{k: v for k, v in r.items() if k.startswith("label")} for _, r in sorted(rows(made).items())]

    assert get("single", "single") == [{"label": 0}, {"label": 1}]
    assert get("multi", "multi") == [{"label": [0, 1]}, {"label": []}]
    assert get("soft", "ids", weight_column="weight") == [
        {"label": [4], "label_weight": [0.5]},
        {"label": [1, 2], "label_weight": [1.0, 3.0]},
    ]
    assert get("partial", "ids", negative_column="no")[1] == {"label": [1, 2], "label_negative": [3]}
    assert get("complementary", "ids") == [{"label": [4]}, {"label": [1, 2]}]
    assert get("continuous", "values")[1] == {"label": [3.0, 4.0]}
    assert get("continuous", "number") == [{"label": [7.0]}, {"label": [8.0]}]
    assert get("none", None) == [{}, {}]


def test_image_columns(tmp_path):
    (tmp_path / "img").mkdir()
    for i in range(3):
        (tmp_path / "img" / f"{i}.png").write_bytes(png(i))
    path = csv(tmp_path, "file,caption,label\nimg/0.png,zero,0\nimg/1.png,one,1\nimg/2.png,two,0\n")
    options = {"image_column": "file", "text_column": "caption", "label_column": "label"}
    manifest = import_table(path, tmp_path / "a", **options)["all"]
    assert set(manifest.fields) == {"image", "text"}
    assert rows(manifest)["t-00000002"]["image"] == png(1)
    assert rows(manifest)["t-00000002"]["text"] == "one"
    table = pa.table({"raw": [png(5), png(6)], "hf": [{"bytes": png(7), "path": "x"}, {"bytes": png(8), "path": "y"}]})
    pq.write_table(table, tmp_path / "b.parquet")
    for column, first in (("raw", 5), ("hf", 7)):
        made = import_table(tmp_path / "b.parquet", tmp_path / column, image_column=column)["all"]
        assert rows(made)["b-00000001"]["image"] == png(first)
    (tmp_path / "img" / "1.png").unlink()
    with pytest.raises(DataError, match=r"t\.csv: row 2: no image file .*img/1\.png"):
        import_table(path, tmp_path / "c", **options)
    (tmp_path / "img" / "1.png").write_text("<html>")
    with pytest.raises(DataError, match=r"t\.csv: row 2: .*not an image"):
        import_table(path, tmp_path / "c", **options)


@pytest.mark.parametrize(
    ("text", "options", "words"),
    [
        ("text,label\na,1\n", {"label_column": "lable"}, "no column 'lable'.*Did you mean 'label'"),
        ("text,label\na,1\nb,\n", {"label_column": "label"}, "row 2: label is empty"),
        ("text,label\na,1\nb,5\n", {"label_column": "label", "num_classes": 3}, "row 2, sample .*label 5 is out of"),
        ("text,label\na,x\n", {"label_column": "label", "class_names": ["y", "xx"]}, "row 1: 'x' isn't one of"),
        ("text,label\na,{}\n", {"label_column": "label", "label_form": "soft"}, "no row has a label"),
        (
            'text,label\na,"{""x"": 1}"\nb,{}\n',
            {"label_column": "label", "label_form": "soft"},
            "row 2.*at least one class",
        ),
        ("text,label\na,x\n", {"label_column": "label", "label_form": "soft"}, "row 1: label 'x' isn't a JSON object"),
        ("text,label\na,1;z\n", {"label_column": "label", "label_form": "continuous"}, "row 1: label holds 'z'"),
        ("text,label\na,1\nb,1;2\n", {"label_column": "label", "label_form": "continuous"}, "row 1.*has 1 value"),
        ("text,label\na,1;1\n", {"label_column": "label", "label_form": "multi"}, "row 1.*class 1 twice"),
        ("text,label\na,\n", {"label_column": "label", "label_form": "multi"}, "no row has a label"),
        ("text,label\na,1\n", {"label_column": "label", "label_form": "mulit"}, "Did you mean 'multi'"),
        ("text,label\na,1\n", {"label_form": "multi"}, "need a label column"),
        ("text,label\na,1\n", {"label_column": "label", "weight_column": "text"}, "belongs to soft"),
        ("text,label\n", {"label_column": "label"}, "no row"),
        ("text,label\na,1,2\n", {"label_column": "label"}, "not readable as a table"),
        ("text,id\na,k\nb,k\n", {"key_column": "id"}, "'id': sample key 'k' occurs 2 times"),
        ("other\na\n", {}, "no column 'text'"),
    ],
)
def test_tables_refuse_with_file_and_row(tmp_path, text, options, words):
    path = csv(tmp_path, text)
    with pytest.raises(DataError, match=words) as caught:
        import_table(path, tmp_path / "out", text_column="text", **options)
    if "Did you mean 'multi'" not in words:
        assert "t.csv" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_tables_of_other_kinds(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        import_table(tmp_path / "x.csv", tmp_path / "out", text_column="text")
    (tmp_path / "x.xlsx").write_bytes(b"")
    with pytest.raises(DataError, match="unknown kind of table"):
        import_table(tmp_path / "x.xlsx", tmp_path / "out", text_column="text")
    (tmp_path / "x.parquet").write_bytes(b"junk")
    with pytest.raises(DataError, match=r"x\.parquet: not readable"):
        import_table(tmp_path / "x.parquet", tmp_path / "out", text_column="text")
    with pytest.raises(DataError, match="which column has"):
        import_table(csv(tmp_path, "a\n1\n"), tmp_path / "out")


# --- keys and splits -----------------------------------------------------------------------------------


def test_splits_share_one_label_space_and_are_stable(tmp_path):
    lines = [f"text {i},{'abc'[i % 3]},k{i}" for i in range(300)]
    path = csv(tmp_path, "text,label,id\n" + "\n".join(lines) + "\n")
    options = {"text_column": "text", "label_column": "label", "key_column": "id", "split": {"train": 0.8, "test": 0.2}}
    parts = import_table(path, tmp_path / "a", **options)
    train, test = parts["train"], parts["test"]
    assert train == load_manifest(tmp_path / "a" / "train")
    assert train.label == test.label
    assert names(train) == names(test) == ["a", "b", "c"]
    assert train.num_samples + test.num_samples == 300
    assert 35 < test.num_samples < 90
    assert not set(rows(train)) & set(rows(test))
    assert train.load_classes().column("count").to_pylist() == label_counts(train).tolist()
    shorter = csv(tmp_path, "text,label,id\n" + "\n".join(lines[50:][::-1]) + "\n", "s.csv")
    again = import_table(shorter, tmp_path / "b", **options)
    assert set(rows(again["test"])) <= set(rows(test))  # no sample changes sides
    with pytest.raises(DataError, match="a data set is there"):
        import_table(path, tmp_path / "a", **options)
    import_table(path, tmp_path / "a", overwrite=True, **options)


def test_an_error_in_one_part_leaves_none(tmp_path):
    path = csv(tmp_path, "text\n" + "\n".join("abcdefgh") + "\n")
    (tmp_path / "out" / "test").mkdir(parents=True)
    (tmp_path / "out" / "test" / "mine").write_text("x")
    with pytest.raises(DataError, match="mine"):
        import_table(path, tmp_path / "out", text_column="text", split={"train": 0.5, "test": 0.5})
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["test"]


@pytest.mark.parametrize("split", [{}, {"a": 0.5}, {"a": 1.5, "b": -0.5}, {"a/b": 1.0}, {"a": 0.999999, "b": 0.000001}])
def test_splits_that_make_no_sense(split):
    with pytest.raises(DataError, match="split"):
        assign_splits(["x", "y"], split)


@given(st.lists(st.text(min_size=1, max_size=30), min_size=1, max_size=20, unique=True))
def test_any_text_becomes_a_key(texts):
    keys = [clean_key(t) for t in texts]
    try:
        raw = [k.encode() for k in keys]
    except UnicodeEncodeError:
        return
    assert all(raw)
    check_keys(pa.array(keys, pa.string()), "x")


def test_paths_that_differ_only_in_extension_or_dots_get_different_keys():
    paths = ["a/x.png", "a/x.jpg", "a/x.1.png", "a/x_1.png", "b/x.png"]
    keys = keys_of_paths(paths)
    assert len(set(keys)) == 5
    assert keys[4] == "b/x"
    assert keys_of_paths(paths) == keys


# --- WebDataset ----------------------------------------------------------------------------------------


def tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as out:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            out.addfile(info, io.BytesIO(content))
    return path


def sample(i: int, **members: bytes) -> dict[str, bytes]:
    return {f"s{i:03d}.{ext.replace('__', '.')}": content for ext, content in members.items()}


def test_webdataset_in_place(tmp_path):
    (tmp_path / "tars").mkdir()
    for t in range(2):
        members: dict[str, bytes] = {}
        for i in range(3 * t, 3 * t + 3):
            ext = "png" if i % 2 else "jpeg"
            members |= sample(i, **{ext: png(i), "txt": f"t{i}".encode(), "cls": str(i).encode(), "xyz": b"?"})
        tar(tmp_path / "tars" / f"a-{t:02d}.tar", members)
    before = [p.stat().st_mtime_ns for p in (tmp_path / "tars").iterdir()]
    manifest = import_webdataset(tmp_path / "tars", tmp_path / "out")["all"]
    assert manifest.fields["image"].ext == "jpeg;png"
    assert manifest.fields["text"].kind == "text"
    assert manifest.label.num_classes == 6
    assert manifest.created_by["ignored"] == "xyz"
    assert [r["label"] for r in rows(load_manifest(tmp_path / "out")).values()] == list(range(6))
    assert manifest.load_classes().column("count").to_pylist() == [1] * 6
    assert all(s.path.startswith(str(tmp_path)) for s in manifest.shards)
    assert [p.stat().st_mtime_ns for p in (tmp_path / "tars").iterdir()] == before
    made = ["a-00.index.arrow", "a-01.index.arrow", "classes.arrow", "manifest.json"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == made
    with pytest.raises(DataError, match="there already"):
        import_webdataset(tmp_path / "tars", tmp_path / "out")


@pytest.mark.parametrize("pattern", ["a-{00..01}.tar", "a-*.tar", "a-{00,01}.tar", "", None])
def test_tars_are_found_by_pattern(tmp_path, pattern):
    paths = [tar(tmp_path / f"a-0{t}.tar", sample(t, txt=b"x")) for t in range(2)]
    given_paths = paths if pattern is None else tmp_path / pattern
    assert find_tars(given_paths) == [str(p) for p in paths]
    assert import_webdataset(given_paths, tmp_path / "out")["all"].num_samples == 2


def test_webdataset_label_sources(tmp_path):
    def one(name: str, members: list[dict[str, bytes]], **options) -> Manifest:
        path = tar(tmp_path / f"{name}.tar", {k: v for m in members for k, v in m.items()})
        return import_webdataset(path, tmp_path / name, **options)["all"]

    def labels(manifest: Manifest) -> list:
        return [r["label"] for r in rows(manifest).values()]

    named = one("named", [sample(0, txt=b"a", cls=b"dog\n"), sample(1, txt=b"b", cls=b"cat")])
    assert (names(named), labels(named)) == (["cat", "dog"], [1, 0])
    js = {"labels__json": json.dumps({"label": [2, 0]}).encode()}
    multi = one("multi", [sample(0, txt=b"a", **js)])
    assert (multi.label.form, multi.label.num_classes, labels(multi)) == ("multi", 3, [[2, 0]])
    assert (
        one("comp", [sample(0, txt=b"a", **js)], label_form="complementary", num_classes=5).label.form
        == "complementary"
    )
    soft = {"labels__json": json.dumps({"label": [1], "label_weight": [0.5]}).encode()}
    assert one("soft", [sample(0, txt=b"a", **soft)]).label.form == "soft"
    meta = [sample(i, txt=b"a", json=json.dumps({"tags": t, "n": i}).encode()) for i, t in enumerate((["x", "y"], []))]
    assert one("plain", meta).label.form == "none"
    tags = one("tags", meta, label_field="tags")
    assert (names(tags), labels(tags)) == (["x", "y"], [[0, 1], []])
    assert labels(one("n", meta, label_field="n", num_classes=9)) == [0, 1]
    left = one("left", [sample(0, left__png=png(1), right__png=png(2))])
    assert set(left.fields) == {"left", "right"}
    assert rows(left)["s000"]["right"] == png(2)


def test_webdataset_refuses(tmp_path):
    def fails(words: str, members: dict[str, bytes], change=lambda raw: raw, **options) -> None:
        path = tar(tmp_path / "x.tar", members)
        path.write_bytes(change(path.read_bytes()))
        with pytest.raises(DataError, match=words):
            import_webdataset(path, tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()

    two = sample(0, txt=b"a", cls=b"0") | sample(1, txt=b"b", cls=b"1")
    fails("no end-of-archive marker.*2 whole samples", two, lambda raw: raw[: 8 * 512])
    fails("cut inside a header", two, lambda raw: raw[: 4 * 512 + 7])
    fails("no end-of-archive marker.*1 whole samples", two, lambda raw: raw[: 5 * 512 + 7])
    fails("cut inside a header.*0 whole samples", two, lambda raw: raw[:7])
    fails("checksum", two, lambda raw: raw[:2048] + b"Z" + raw[2049:])
    fails("gzip", two, gzip.compress)
    fails("'s001' occurs twice", sample(1, txt=b"a") | sample(0, txt=b"a") | sample(1, cls=b"0"))
    fails("sample 's001' has no field 'text'", sample(0, txt=b"a", png=png(0)) | sample(1, png=png(0)))
    fails("sample 's001' has no .cls member", sample(0, txt=b"a", cls=b"1") | sample(1, txt=b"a"))
    fails("label 1 is out of range", two, num_classes=1)
    fails("label -1 is out of range", sample(0, txt=b"a", cls=b"-1"), num_classes=1)
    fails("no member is an image", sample(0, bin=b"a"))
    fails("no sample in this tar", {"README": b"x"})
    fails("'s000': its .labels.json", sample(0, txt=b"a", labels__json=b"[1]"))
    fails("no .json member", two, label_field="x")
    fails("packed shard", {"a.arrow": b"x"})
    with pytest.raises(DataError, match="no tar here"):
        import_webdataset(tmp_path / "*.nothing", tmp_path / "out")
    with pytest.raises(DataError, match="no such tar"):
        import_webdataset(tmp_path / "none.tar", tmp_path / "out")
    tar(tmp_path / "y-0.tar", two)
    tar(tmp_path / "y-1.tar", two)
    with pytest.raises(DataError, match="'s000' occurs 2 times"):
        import_webdataset(tmp_path / "y-*.tar", tmp_path / "out")


def test_a_tar_that_changes_later_is_seen(tmp_path):
    path = tar(tmp_path / "x.tar", sample(0, txt=b"aaa") | sample(1, txt=b"bbb"))
    manifest = import_webdataset(path, tmp_path / "out")["all"]
    path.write_bytes(path.read_bytes().replace(b"bbb", b"bbc"))
    with pytest.raises(ShardDamage, match="content changed"):
        read_shard(manifest, 0)


# --- tars of other makers ------------------------------------------------------------------------------

LONG = "d" * 90 + "/" + "f" * 60


def of_webdataset(folder: Path) -> None:
    import webdataset

    with webdataset.TarWriter(str(folder / "x.tar")) as sink:
        for i in range(6):
            sink.write({"__key__": f"dir/{i:03d}", "txt": f"t{i}", "cls": i, "png": np.full((4, 4, 3), i, np.uint8)})


def of_gnu_tar(folder: Path) -> None:
    for i in range(6):
        (folder / "in" / "dir" / LONG).parent.mkdir(parents=True, exist_ok=True)
        for ext, content in (("txt", f"t{i}"), ("cls", f"{i}\n")):
            (folder / "in" / "dir" / f"{LONG}{i}.{ext}").write_text(content)
    call = ["tar", "--sort=name", "--format=gnu", "-cf", str(folder / "x.tar"), "-C", str(folder / "in"), "."]
    subprocess.run(call, check=True)


def of_python(fmt: int) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        stem = "d" * 90 + "/" + "f" * 60 if fmt == tarfile.USTAR_FORMAT else LONG + "y" * 200 + "\u00fc"
        with tarfile.open(folder / "x.tar", "w", format=fmt) as out:
            directory = tarfile.TarInfo("./")
            directory.type = tarfile.DIRTYPE
            out.addfile(directory)
            for i in range(6):
                for ext, content in (("txt", f"t{i}"), ("cls", f"{i}")):
                    info = tarfile.TarInfo(f"./{stem}{i}.{ext}" if i % 2 else f"./{i}.{ext}")
                    info.size = len(content)
                    info.mtime = 1.5  # type: ignore[assignment]
                    out.addfile(info, io.BytesIO(content.encode()))

    return write


MAKERS = {
    "webdataset": of_webdataset,
    "GNU tar": of_gnu_tar,
    "ustar": of_python(tarfile.USTAR_FORMAT),
    "gnu": of_python(tarfile.GNU_FORMAT),
    "pax": of_python(tarfile.PAX_FORMAT),
}


@pytest.mark.parametrize("maker", list(MAKERS))
def test_tars_of_every_maker_are_read_as_webdataset_reads_them(tmp_path, maker, monkeypatch):
    import webdataset

    MAKERS[maker](tmp_path)
    manifest = import_webdataset(tmp_path / "x.tar", tmp_path / "out")["all"]
    read = list(webdataset.WebDataset(str(tmp_path / "x.tar"), shardshuffle=False))
    table = read_shard(manifest, 0)
    assert table.column("key").to_pylist() == [s["__key__"] for s in read]
    assert table.column("text").to_pylist() == [s["txt"].decode() for s in read]
    assert table.column("label").to_pylist() == [int(s["cls"]) for s in read] == list(range(6))
    monkeypatch.setattr(shards, "_GAP_LOCAL", 100)
    some = np.array([1, 4])
    found = gather([open_shard(manifest, 0, rows=some)], np.zeros(2, int), some).drop_columns(["__hole__"])
    assert found.equals(table.take(pa.array(some)))


def test_tars_in_a_bucket(tmp_path, monkeypatch, faulty):
    for t in range(2):
        members: dict[str, bytes] = {}
        for i in range(3 * t, 3 * t + 3):
            members |= sample(i, txt=b"x" * 2000 + str(i).encode(), cls=b"0")
        tar(tmp_path / f"a-{t}.tar", members)
        faulty.put(f"bucket/a-{t}.tar", (tmp_path / f"a-{t}.tar").read_bytes())
    manifest = import_webdataset("s3://bucket/a-{0..1}.tar", "s3://bucket/out")["all"]
    loaded = load_manifest("s3://bucket/out")
    assert loaded == manifest
    assert loaded.index_path(1) == "s3://bucket/out/a-1.index.arrow"
    monkeypatch.setattr(shards, "_GAP_REMOTE", 100)
    some = np.array([0, 2])
    table = gather([open_shard(loaded, 1, rows=some)], np.zeros(2, int), some)
    assert [t[-1] for t in table.column("text").to_pylist()] == ["3", "5"]


def test_labels_of_several_tars_become_one_column(tmp_path):
    def one(name: str, values: list, **options) -> list:
        (tmp_path / name).mkdir()
        for t, value in enumerate(values):
            content = json.dumps({"tags": value}).encode()
            tar(tmp_path / name / f"{t}.tar", sample(t, txt=b"a", json=content))
        manifest = import_webdataset(tmp_path / name, tmp_path / f"{name}-out", label_field="tags", **options)["all"]
        return [r["label"] for r in rows(manifest).values()]

    assert one("names", [[], ["x", "y"], [], ["z"]]) == [[], [0, 1], [], [2]]
    assert one("ids", [[], [2], [0, 1]]) == [[], [2], [0, 1]]
    assert one("reals", [[1], [0.5], [2]]) == [[1.0], [0.5], [2.0]]
    with pytest.raises(DataError, match="different kinds"):
        one("mixed", [["x"], [1]])


def test_members_of_records_are_fields(tmp_path):
    path = tar(tmp_path / "x.tar", sample(0, safetensors=b"?", arrow=b"?"))
    fields = import_webdataset(path, tmp_path / "out")["all"].fields
    assert {name: spec.kind for name, spec in fields.items()} == {"tensors": "safetensors", "table": "arrow"}
