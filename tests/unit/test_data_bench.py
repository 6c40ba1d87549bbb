"""Timing a data set part by part, and the advice made of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import simplejpeg
from typer.testing import CliRunner

from labelmill.cli import app
from labelmill.data.advice import Bench, Cost, advise
from labelmill.data.bench import bench
from labelmill.data.decode import encode_png
from labelmill.data.labels import LabelSpec
from labelmill.data.manifest import FieldSpec, Manifest, load_manifest, save_manifest
from labelmill.data.overlay import write_label_overlay
from labelmill.data.writer import ShardWriter
from labelmill.errors import DataError

COMMON = {"fetch", "verify", "parse", "gather", "decode"}
IN_TASKS = {"decode, task", "copy, task"}
JPG, PNG = FieldSpec(kind="image", ext="jpg"), FieldSpec(kind="image", ext="png")


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """A hundredth of a second of each part shows that it works."""
    monkeypatch.setattr("labelmill.data.bench._LEAST_S", 0.01)


def jpeg(i: int) -> bytes:
    pixels = np.random.default_rng(i).integers(0, 255, (40, 30, 3), dtype=np.uint8)
    return simplejpeg.encode_jpeg(pixels)


def value(kind: str, i: int):
    if kind == "jpg":
        return jpeg(i)
    if kind == "png":
        return encode_png(np.full((28, 28), i % 250, dtype=np.uint8))
    return f"the text of sample {i}" if kind == "text" else np.full((3, 4), i, dtype=np.float32)


FIELDS = {
    "jpg": JPG,
    "png": PNG,
    "text": FieldSpec(kind="text", ext="txt"),
    "array": FieldSpec(kind="array", ext="npy", shape=(3, 4), dtype="float32"),
}


def make(out: Path, kind: str, layout: str = "tar", count: int = 60) -> Manifest:
    label = LabelSpec(form="single", num_classes=5)
    writer = ShardWriter(out, kind, {"x": FIELDS[kind]}, label, layout, samples_per_shard=20, rows_per_member=10)
    for i in range(count):
        writer.write(f"s{i:03d}", {"x": value(kind, i)}, {"label": i % 5})
    return writer.close()


@pytest.mark.parametrize(("kind", "layout"), [("jpg", "tar"), ("png", "tar"), ("text", "packed"), ("array", "tar")])
def test_every_kind(tmp_path, kind, layout):
    found = bench(make(tmp_path / "a", kind, layout), samples=40, threads=1, handover=False)
    image = kind in ("jpg", "png")
    assert set(found.parts) == COMMON | (IN_TASKS if image else set())
    assert all(cost.cpu_s >= 0 and cost.wall_s >= 0 for cost in found.parts.values())
    assert found.parts["decode"].wall_s > 0
    assert (found.samples, found.shards, found.shard_samples) == (40, 2, 20)
    assert set(found.decode_rate) == {"one"}
    assert found.places == (("late", "task") if image else ("late",))
    for place in found.places:
        ceiling = found.ceiling(place)
        assert 0 < ceiling.rate <= found.decode_limit * 1.0001
        # one CPU can't do more than all parts one after another
        assert ceiling.rate <= 1000 / found.cpu_s(place) * 1.0001
        assert ceiling.bound
    assert (found.packed is None) == (layout == "packed")
    assert found.stored_bytes > found.sample_bytes > 0
    assert found.as_dict()["advice"]
    json.dumps(found.as_dict())


def test_ceilings_are_arithmetic_over_the_parts():
    parts = {
        "fetch": Cost(0.01, 0.02), "verify": Cost(0.02, 0.02), "parse": Cost(0.01, 0.01), "gather": Cost(0.01, 0.01),
        "decode": Cost(0.20, 0.20), "tasks": Cost(0.0, 0.0), "hand over": Cost(0.01, 0.01),
        "decode, task": Cost(0.25, 0.25), "hand over, task": Cost(0.10, 0.10), "copy, task": Cost(0.02, 0.02),
    }  # fmt: skip
    rates = {"one": 4800.0, "threads": 9000.0, "processes": 9500.0}
    found = Bench("a", "tar", "x", "image", 10, 1, 9e4, 9e4, 1000, 2, False, parts=parts, decode_rate=rates)
    assert found.cpu_s("late") == pytest.approx(0.26)
    assert found.ceiling("late").rate == pytest.approx(2000 / 0.26)
    assert found.ceiling("late").bound == "CPU time, 77% of it decode"
    assert found.ceiling("task").rate == pytest.approx(2000 / 0.42)
    assert found.best == "late"
    assert found.decode_limit == 9500
    lines = advise(found)
    assert len(lines) == 2
    assert lines[0].startswith(
        "Decode in the rank's threads (data.decode: late): up to 7,692 samples/s, in read tasks 4,762."
    )
    assert lines[1].startswith("The decoder sets the pace (81% of its limit)")

    locked = replace(found, decode_rate=rates | {"threads": 3000.0})
    assert (locked.ceiling("late").rate, locked.best) == (3000, "task")
    assert locked.ceiling("late").bound == "the decoder in threads"
    assert "data.decode: task" in advise(locked)[0]
    assert "Threads hinder each other in this decoder (3,000/s against 9,500/s" in advise(locked)[0]

    far = replace(found, remote=True, fetch_rate=1500.0, latency_s=0.01)
    assert far.ceiling("late").bound == "the network"
    text = "\n".join(advise(far))
    assert "data.cache.folder" in text
    assert "Make larger shards" in text
    assert "10.0 ms" in text
    quick = replace(far, fetch_rate=20_000.0, latency_s=0.0001, parts=parts | {"fetch": Cost(0.01, 0.4)})
    assert "data.readers: 4" in "\n".join(advise(quick))

    small = replace(
        found, packed=Cost(0.001, 0.001), parts=parts | {"parse": Cost(0.08, 0.08), "decode": Cost(0.01, 0.01)}
    )
    assert advise(small)[0].startswith("Pack the samples (import with --layout packed): parse and gather take 0.0900")
    hashed = replace(found, parts=parts | {"verify": Cost(0.2, 0.2)})
    assert "data.verify: first" in advise(hashed)[0]
    started = replace(found, parts=parts | {"tasks": Cost(0.2, 0.2)})
    assert "starting read tasks takes" in advise(started)[0]


def test_threads_and_processes_decode_the_same_samples(tmp_path):
    found = bench(make(tmp_path / "a", "jpg"), samples=60, threads=2, handover=False)
    assert set(found.decode_rate) == {"one", "threads", "processes"}
    assert min(found.decode_rate.values()) > 100


def test_overlay_labels_and_image_size(tmp_path):
    manifest = make(tmp_path / "a", "jpg")
    labels = (
        pa.table({"key": [f"s{i:03d}" for i in range(a, a + 20)], "label": pa.array([1] * 20)}) for a in (0, 20, 40)
    )
    other = write_label_overlay(manifest, tmp_path / "b", LabelSpec(form="single", num_classes=2), labels)
    found = bench(other, threads=1, image_size=16, channels=1, handover=False)
    assert found.samples == 60


def test_errors(tmp_path):
    manifest = make(tmp_path / "a", "jpg")
    with pytest.raises(DataError, match="has no field 'y'; it has: x"):
        bench(manifest, field="y", handover=False)
    shard = tmp_path / "a" / manifest.shards[0].path
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-3000])
    with pytest.raises(DataError, match=str(shard)):
        bench(manifest, handover=False)
    shard.unlink()
    with pytest.raises(DataError, match="no such file"):
        bench(manifest, handover=False)


def test_images_of_several_sizes_need_a_size(tmp_path):
    with ShardWriter(tmp_path / "a", "a", {"x": PNG}, LabelSpec(form="none")) as writer:
        for i in range(4):
            writer.write(f"s{i}", {"x": encode_png(np.zeros((8 + i, 8), dtype=np.uint8))})
    manifest = load_manifest(tmp_path / "a")
    with pytest.raises(DataError, match="images differ in size"):
        bench(manifest, threads=1, handover=False)
    assert bench(manifest, threads=1, image_size=8, handover=False).samples == 4


def call(*arguments: str):
    return CliRunner().invoke(app, ["data", "bench", *arguments])


def test_command(tmp_path):
    make(tmp_path / "a", "png")
    done = call(str(tmp_path / "a"), "--no-ray", "--samples", "20", "--threads", "1", "--channels", "1")
    assert done.exit_code == 0, done.output
    for part in (
        "png: 20 samples of 1 tar shard(s)",
        "per 1,000 samples",
        "decode, task",
        "Ceiling if decoded late",
        "- ",
    ):
        assert part in done.output
    done = call(str(tmp_path / "a"), "--no-ray", "--samples", "20", "--threads", "1", "--json")
    assert json.loads(done.output)["samples"] == 20


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_handover(tmp_path):
    found = bench(make(tmp_path / "a", "jpg"), threads=1)
    assert set(found.parts) == COMMON | IN_TASKS | {"tasks", "hand over", "hand over, task"}
    assert found.parts["hand over"].wall_s > 0


def test_command_names_what_is_wrong(tmp_path):
    done = call(str(tmp_path / "nowhere"), "--no-ray")
    assert "no such data set" in str(done.exception)
    manifest = make(tmp_path / "a", "png")
    save_manifest(manifest.model_copy(update={"fields": {}}), tmp_path / "b")
    assert call(str(tmp_path / "a"), "--samples", "0").exit_code == 2
