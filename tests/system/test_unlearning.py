"""Unlearning for real, small: all methods side by side, and a request from its file to the audited champion."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import yaml
from rich.console import Console

from labelmill import api
from labelmill.data.labels import LabelSpec
from labelmill.data.manifest import FieldSpec
from labelmill.data.writer import ShardWriter

CLASSES, WIDTH = 4, 8


def blobs(folder: Path, count: int, seed: int) -> Path:
    """Points around four centres, in a wide space: easy to tell apart, easy to remember."""
    rng = np.random.default_rng(seed)
    centres = np.eye(CLASSES, WIDTH) * 3
    fields = {"x": FieldSpec(kind="array", ext="npy", shape=(WIDTH,), dtype="float32")}
    label = LabelSpec(form="single", num_classes=CLASSES)
    with ShardWriter(folder, f"blobs{seed}", fields, label, layout="packed", samples_per_shard=150) as writer:
        for i in range(count):
            x = centres[i % CLASSES] + rng.normal(size=WIDTH)
            writer.write(f"user-{i % 10}/s{i:05d}", {"x": x.astype(np.float32)}, {"label": i % CLASSES})
        writer.close(classes=pa.table({"name": ["north", "east", "south", "west"]}))
    return folder


SMALL: dict[str, Any] = {
    "cluster": {"in_process": True},
    "encoder": {"kind": "linear", "field": "x", "in_dim": WIDTH, "dim": 6},
    "head": {"scale": 8.0, "optimizer": {"kind": "adamw", "weight_decay": 0.0}},
    "train": {"global_batch": 32, "epochs": 8, "learning_rate": 0.01, "log_every": 50, "zero_stage": 0},
}
BUDGET = {"global_batch": 32, "epochs": 6, "learning_rate": 0.03, "log_every": 50, "zero_stage": 0}


def run(folder: Path, job: dict[str, Any]) -> tuple[Any, str]:
    path, text = folder / f"{job['name']}.yaml", io.StringIO()
    path.write_text(yaml.safe_dump({"output": str(folder / "runs"), **job}))
    return api.run(path, console=Console(file=text, width=200)), text.getvalue()


METHODS: dict[str, Any] = {
    "finetune": {"kind": "finetune"},
    "ascent": {"kind": "ascent", "train": BUDGET | {"learning_rate": 0.01}},
    "neggrad_plus": {"kind": "neggrad_plus", "alpha": 0.7},
    "random_labels": {"kind": "random_labels"},
    "boundary_shrink": {"kind": "boundary_shrink", "step": 1.0, "train": BUDGET | {"learning_rate": 0.01}},
    "bad_teacher": {"kind": "bad_teacher"},
    "scrub": {"kind": "scrub"},
    "dampening": {"kind": "dampening", "alpha": 1.2, "train": BUDGET | {"epochs": 1}},
    "eu": {"kind": "last_layers", "k": 2, "fresh": True},
    "unsir": {"kind": "unsir", "noise": 8, "noise_steps": 10},
    "laf": {
        "kind": "laf",
        "latent": 2,
        "vae_epochs": 3,
        "train": BUDGET | {"epochs": 10, "learning_rate": 0.01, "schedule": "constant"},
        "repair": BUDGET | {"epochs": 1},
        "repair_layers": 0,
    },
}


def test_all_methods_beside_retraining(tmp_path: Path) -> None:
    job = SMALL | {
        "workload": "unlearning.compare",
        "name": "all",
        "data": {
            "train": str(blobs(tmp_path / "train", 400, 0)),
            "test": str(blobs(tmp_path / "test", 200, 1)),
        },
        "task": {"kind": "class", "ids": [0]},
        "seeds": [0],
        "methods": METHODS,
        "budget": BUDGET,
        "audit": {"samples": 200, "splits": 1, "attacks": ["threshold", "logistic"]},
    }
    report, _ = run(tmp_path, job)
    found = report.metrics
    assert found["original/train_f"] > 90
    assert found["retrain/train_f"] < 20
    assert found["retrain/gap"] == found["retrain/js_to_retrain"] == 0
    assert {row[0] for row in report.tables["versions"].rows} == {"original", "retrain", *METHODS}
    for name in ("finetune", "neggrad-plus", "random-labels", "eu", "scrub"):
        assert found[f"{name}/train_f"] < 30, name
    for name in ("ascent", "boundary-shrink", "bad-teacher", "unsir", "laf"):
        assert found[f"{name}/train_f"] < found["original/train_f"] - 20, name
    assert found["dampening/train_f"] < found["original/train_f"]
    for name in METHODS:
        assert found[f"{name.replace('_', '-')}/test_r"] > 70, name
    assert 0 <= found["bad-teacher/zrf"] <= 1
    assert not any(math.isnan(value) for value in report.metrics.values())
