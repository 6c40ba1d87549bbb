"""Inspecting and verifying data sets."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from rich.console import Console

from labelmill.data.decode import encode_png
from labelmill.data.inspect import contact_sheet, inspect, render_inspection, verify
from labelmill.data.labels import LabelSpec
from labelmill.data.manifest import FieldSpec, Manifest
from labelmill.data.writer import ShardWriter
from labelmill.errors import DataError

FIELDS = {"image": FieldSpec(kind="image", ext="png"), "text": FieldSpec(kind="text", ext="txt")}
FORMS = {
    "single": (LabelSpec(form="single", num_classes=4), lambda i: {"label": i % 3}, "c1"),
    "multi": (LabelSpec(form="multi", num_classes=4), lambda i: {"label": [0, 2][: i % 3]}, "c0"),
    "soft": (LabelSpec(form="soft", num_classes=4), lambda i: {"label": [i % 4], "label_weight": [0.5]}, "c1 0.5"),
    "partial": (
        LabelSpec(form="partial", num_classes=4),
        lambda i: {"label": [1], "label_negative": [3]},
        "c1; not c3",
    ),
    "complementary": (LabelSpec(form="complementary", num_classes=4), lambda i: {"label": [i % 4]}, "not c1"),
    "continuous": (LabelSpec(form="continuous", dim=2), lambda i: {"label": [i, -i / 2]}, "1, -0.5"),
    "none": (LabelSpec(form="none"), lambda i: {}, ""),
}


def make(out, form: str = "single", count: int = 12, layout: str = "tar", images=None) -> Manifest:
    spec, label, _ = FORMS[form]
    writer = ShardWriter(out, "pets", FIELDS, spec, layout, samples_per_shard=5)
    for i in range(count):
        image = encode_png(np.full((30, 40, 3), 20 * i, dtype=np.uint8))
        writer.write(f"k{i:02d}", {"image": (images or {}).get(i, image), "text": f"[b]text[/b] {i}"}, label(i))
    names = pa.table({"name": [f"c{i}" for i in range(4)]})
    return writer.close(names if spec.num_classes else None)


def rendered(info) -> str:
    file = io.StringIO()
    render_inspection(info, Console(file=file, width=200))
    return file.getvalue()


@pytest.mark.parametrize("form", list(FORMS))
def test_inspection_of_every_form(tmp_path, form):
    manifest = make(tmp_path / "a", form)
    info = inspect(manifest, samples=5)
    assert (info["samples"], info["shards"], info["digest"]) == (12, 3, manifest.digest)
    assert [e["key"] for e in info["examples"]] == ["k00", "k01", "k02", "k03", "k04"]
    assert info["examples"][1]["label"] == FORMS[form][2]
    assert info["examples"][1]["text"] == "[b]text[/b] 1"
    assert len(info.images) == 5
    text = rendered(info)
    assert "[b]text[/b] 1" in text
    assert form in text


def test_label_statistics(tmp_path):
    label = inspect(make(tmp_path / "a", "multi"))["label"]
    assert label["classes_seen"] == 2
    assert label["tail"] == {"0": 2, "1": 0, "2-9": 2, "10-99": 0, "100-999": 0, "1000+": 0}
    assert label["labels_per_sample"] == {"min": 0, "mean": 1.0, "max": 2}
    assert label["unlabelled"] == 4
    assert label["largest"][:2] == [("c0", 8), ("c2", 4)]
    assert label["samples_per_class"]["max"] == 8
    values = inspect(make(tmp_path / "b", "continuous"))["label"]["values"]
    assert values == {"min": [0.0, -5.5], "mean": [5.5, -2.75], "max": [11.0, 0.0]}


def test_thumbnails_and_contact_sheet(tmp_path):
    info = inspect(make(tmp_path / "a", images={1: b"not an image"}), samples=5, thumbnail=16)
    assert info["examples"][1]["image"].startswith("bad image")
    with Image.open(io.BytesIO(info["examples"][0]["image"])) as picture:
        assert (picture.format, picture.size) == ("PNG", (16, 12))
    contact_sheet(info.images, tmp_path / "sheet.png", columns=3)
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (3 * 20 + 4, 2 * 16 + 4)
    assert "bad image" in rendered(info)
    with pytest.raises(DataError, match="no image"):
        contact_sheet([], tmp_path / "none.png")
    assert inspect(make(tmp_path / "b"), samples=0)["examples"] == []


@pytest.mark.parametrize("layout", ["tar", "packed"])
def test_verify_a_good_data_set(tmp_path, layout):
    report = verify(make(tmp_path / "a", layout=layout))
    assert report.ok
    assert (report.shards, report.samples, report.problems, report.first_bad) == (3, 12, [], None)
    assert report.lines() == ["12 samples in 3 shard(s): every one is whole."]


def test_verify_names_the_first_bad_sample(tmp_path):
    manifest = make(tmp_path / "a", images={3: b"junk", 7: b""})
    report = verify(manifest)
    assert not report.ok
    assert [p.key for p in report.problems] == ["k03", "k07"]
    assert report.first_bad == "k03"
    assert report.samples == 12
    assert "First bad sample: 'k03'" in report.lines()[0]
    assert verify(manifest, decode=False).ok


@pytest.mark.parametrize("layout", ["tar", "packed"])
def test_verify_finds_the_changed_sample_in_a_changed_shard(tmp_path, layout):
    manifest = make(tmp_path / "a", layout=layout)
    path = Path(manifest.shard_path(1))
    data = bytearray(path.read_bytes())
    third = [i for i in range(len(data) - 4) if data[i : i + 4] == b"IDAT"][2]
    data[third + 10] ^= 255
    path.write_bytes(data)
    report = verify(manifest)
    assert report.num_problems == 1
    assert "content changed" in report.problems[0].message
    assert report.first_bad == "k07"
    assert report.samples == 7


def test_verify_reports_every_shard(tmp_path):
    manifest = make(tmp_path / "a")
    first, second, third = (Path(manifest.shard_path(i)) for i in range(3))
    os.unlink(first)
    second.write_bytes(second.read_bytes()[:2500])
    changed = third.read_bytes().replace(b"[b]text[/b] 11", b"[b]text[/b] 1\xff")
    third.write_bytes(changed)
    (tmp_path / "a" / "classes.arrow").write_bytes(b"x")
    report = verify(manifest)
    assert report.num_problems == 4
    messages = [p.message for p in report.problems]
    assert "classes.arrow" in messages[0]
    assert "no such file" in messages[1]
    assert "cut inside" in messages[2]
    assert "isn't UTF-8" in messages[3]
    assert report.problems[3].key == "k11"
    assert len(report.lines()) == 5


def test_verify_checks_labels_and_repeated_keys(tmp_path):
    manifest = make(tmp_path / "a")
    narrow = manifest.model_copy(update={"label": LabelSpec(form="single", num_classes=2), "classes": None})
    report = verify(narrow.at(manifest.root))
    assert report.first_bad == "k02"
    assert "label 2 is out of range" in report.problems[0].message
    twice = manifest.model_copy(update={"shards": (*manifest.shards, manifest.shards[0])}).at(manifest.root)
    report = verify(twice)
    assert sorted(p.key or "" for p in report.problems) == ["k00", "k01", "k02", "k03", "k04"]


def test_a_million_classes_are_inspected_fast(tmp_path):
    import time

    rows = 200_000
    spec = LabelSpec(form="single", num_classes=1_000_000)
    writer = ShardWriter(tmp_path / "a", "m", {"text": FIELDS["text"]}, spec, "packed", rows_per_member=4096)
    keys = pa.array(np.char.add("k", np.arange(rows).astype(str)))
    writer.write_table(pa.table({"key": keys, "text": keys, "label": np.arange(rows)}))
    manifest = writer.close(pa.table({"name": pa.array(np.char.add("w", np.arange(1_000_000).astype(str)))}))
    began = time.process_time()
    info = inspect(manifest)
    assert time.process_time() - began < 3
    assert info["label"]["tail"]["0"] == 800_000
