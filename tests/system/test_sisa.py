"""SISA for real, small: deleting gives, bit for bit, what training without the samples gives, for the turns that saw them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file

from labelmill import api
from labelmill.data import corrections
from labelmill.data.folds import fold_of
from labelmill.data.labels import LabelSpec
from labelmill.data.manifest import FieldSpec, load_manifest
from labelmill.data.writer import ShardWriter
from labelmill.errors import DataError, JobError
from labelmill.job import validate_job
from labelmill.tracking.model import load_model
from workloads.unlearning.sisa import SisaJob

CLASSES, WIDTH, SHARDS, SLICES = 3, 6, 3, 2
KEYS = [f"s{i:03d}" for i in range(180)]


def write(folder: Path, count: int, seed: int) -> str:
    rng = np.random.default_rng(seed)
    fields = {"x": FieldSpec(kind="array", ext="npy", shape=(WIDTH,), dtype="float32")}
    label = LabelSpec(form="single", num_classes=CLASSES)
    with ShardWriter(folder, folder.name, fields, label, layout="packed") as writer:
        for i in range(count):
            x = 3 * np.eye(CLASSES, WIDTH)[i % CLASSES] + rng.normal(size=WIDTH)
            writer.write(f"s{i:03d}", {"x": x.astype(np.float32)}, {"label": i % CLASSES})
        writer.close(classes=pa.table({"name": ["north", "east", "south"]}))
    return str(folder)


def run(folder: Path, job: dict[str, Any]) -> tuple[Any, str]:
    path, text = folder / f"{job['name']}.yaml", io.StringIO()
    path.write_text(yaml.safe_dump({"output": str(folder / "runs"), "cluster": {"in_process": True}, **job}))
    return api.run(path, console=Console(file=text, width=200)), text.getvalue()


def stage(folder: Path, job: str, name: str) -> Path:
    (found,) = (folder / "runs" / job / "stages").glob(f"{name}-*")
    return found


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a package."""
    return {f"{f.name}/{n}": v for f in sorted(folder.glob("*.safetensors")) for n, v in load_file(f).items()}


def same(one: Path, two: Path) -> bool:
    a, b = weights(one), weights(two)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


TRAIN: dict[str, Any] = {"global_batch": 16, "epochs": 4, "learning_rate": 0.01, "log_every": 50, "zero_stage": 0}
JOB: dict[str, Any] = {
    "workload": "unlearning.sisa",
    "encoder": {"kind": "linear", "field": "x", "in_dim": WIDTH, "dim": 4},
    "head": {"scale": 8.0, "optimizer": {"kind": "adamw", "weight_decay": 0.0}},
    "sisa": {"shards": SHARDS, "slices": SLICES},
    "train": TRAIN,
    "seed": 3,
}
FORGET = {
    "train": TRAIN,
    "audit": {"samples": 100, "splits": 1, "attacks": ["threshold"]},
    "workload": "unlearning.forget",
}


def test_a_deletion_is_training_without_the_samples(tmp_path: Path) -> None:
    data = {"train": write(tmp_path / "train", len(KEYS), 0), "test": write(tmp_path / "test", 60, 1)}
    report, _ = run(tmp_path, JOB | {"name": "sisa", "data": data, "register_as": "blobs"})
    assert report.metrics["test/top1"] > 0.8
    made = stage(tmp_path, "sisa", "constituents")

    # the score is the mean of the constituents' cosines
    x = np.random.default_rng(5).normal(size=(7, WIDTH)).astype(np.float32)
    whole = load_model(made / "model")
    scores, ids = whole.topk(x, CLASSES)
    members = [load_model(made / "slices" / f"{s}-{SLICES - 1}").topk(x, CLASSES) for s in range(SHARDS)]
    mean = sum(torch.zeros(7, CLASSES).scatter(1, at, value) for value, at in members) / SHARDS
    torch.testing.assert_close(scores, mean.gather(1, ids), atol=1e-5, rtol=1e-4)

    # two samples of the last slice of one shard: one turn of six learns again
    cell = fold_of(KEYS, SHARDS * SLICES, 3)
    late = [key for key, c in zip(KEYS, cell, strict=True) if c == 1 * SLICES + 1][:2]
    (tmp_path / "ids.txt").write_text("\n".join(late) + "\n")
    job = FORGET | {"method": {"kind": "sisa"}, "request": {"kind": "ids", "file": str(tmp_path / "ids.txt")}}
    report, text = run(tmp_path, job | {"name": "forget", "model": "blobs@candidate"})
    assert "1 of 6 turns were trained again" in text
    assert report.metrics["forget/turns"] == 1
    forgot, again = stage(tmp_path, "forget", "forget"), stage(tmp_path, "forget", "retrain")
    assert same(forgot / "model", again / "model"), "the reference trains all turns, without the samples"
    assert not same(forgot / "model", made / "model")
    assert report.metrics["audit/gap"] == report.metrics["audit/js_to_retrain"] == 0
    for s in range(SHARDS):
        for turn in range(SLICES):
            kept = same(forgot / "slices" / f"{s}-{turn}", made / "slices" / f"{s}-{turn}")
            assert kept == ((s, turn) != (1, 1))

    # the next request is answered from the new version's own slices; the samples of the first stay away
    first = next(key for key, c in zip(KEYS, cell, strict=True) if c == 0)
    (tmp_path / "ids.txt").write_text(first + "\n")
    report, _ = run(tmp_path, job | {"name": "second", "model": "blobs@candidate", "reference": False})
    assert report.metrics["forget/turns"] == 2
    second = stage(tmp_path, "second", "forget")

    # training on a data set that holds none of the three, in a run that knows nothing of all this
    without = tmp_path / "without"
    corrections.drop(load_manifest(data["train"]), without, [*late, first], {"why": "test"})
    run(tmp_path, JOB | {"name": "scratch", "data": data | {"train": str(without)}})
    assert same(second / "model", stage(tmp_path, "scratch", "constituents") / "model")

    # other methods forget by the joined model; its slices no longer tell how it was made
    run(tmp_path, job | {"name": "third", "model": "blobs@candidate", "method": {"kind": "finetune"}, "reference": False,
                         "request": {"kind": "classes", "ids": [2]}})  # fmt: skip
    with pytest.raises(Exception, match="its run keeps no 'slices'"):
        run(tmp_path, job | {"name": "fourth", "model": "blobs@candidate", "request": {"kind": "classes", "ids": [1]}})


def test_what_can_not_be_dealt_is_refused(tmp_path: Path) -> None:
    data = {"train": write(tmp_path / "train", 6, 0), "test": write(tmp_path / "test", 6, 1)}
    job = JOB | {"name": "sisa", "data": data}
    with pytest.raises(DataError, match=r"shard \d of 8 has no sample: train with fewer"):
        run(tmp_path, job | {"sisa": {"shards": 8}})
    with pytest.raises(JobError, match=r"give train.epochs instead"):
        validate_job(job | {"train": {"global_batch": 16, "steps": 3}}, SisaJob)
    plain = JOB | {"workload": "discrimination.partial_fc", "name": "plain", "data": data, "register_as": "plain"}
    plain.pop("sisa")
    run(tmp_path, plain)
    with pytest.raises(JobError, match=r"wasn't trained by unlearning\.sisa"):
        run(
            tmp_path,
            FORGET
            | {"name": "no", "model": "plain", "method": {"kind": "sisa"}, "request": {"kind": "classes", "ids": [0]}},
        )
