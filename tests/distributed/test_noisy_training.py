"""A loss that remembers samples: the same curve and the same memory for any number of workers, also after a resume."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from labelmill.data.labels import LabelSpec
from labelmill.data.manifest import FieldSpec, load_manifest
from labelmill.data.spec import StreamSpec
from labelmill.data.writer import ShardWriter
from labelmill.encoders import CharNgramsConfig
from labelmill.losses.sample_state import ALDR
from labelmill.stages import Fitted
from labelmill.training.config import TrainConfig
from labelmill.training.events import ListSink
from labelmill.training.local import spawn
from labelmill.training.worker import FitTask, run_worker
from workloads.noisy.ldr import RobustClassifier

ENCODER = CharNgramsConfig(dim=16, buckets=512, hidden=16)


def make_data(folder: Path) -> None:
    label = LabelSpec(form="single", num_classes=4)
    with ShardWriter(
        folder, "words", {"text": FieldSpec(kind="text", ext="txt")}, label, layout="packed", samples_per_shard=25
    ) as writer:
        for i in range(96):
            writer.write(f"s{i}", {"text": "abcd"[i % 4] * 3 + str(i)}, {"label": (i + (i % 7 == 0)) % 4})


def train(rank: int, world: int, data: str, work: str, steps: int) -> list[float]:
    manifest = load_manifest(data)
    task = FitTask(
        partial(RobustClassifier, ENCODER, ALDR(lam0=2.0), manifest),
        TrainConfig(
            global_batch=24, steps=steps, learning_rate=0.01, schedule="constant", warmup=0.0, log_every=1, zero_stage=1
        ),
        StreamSpec(manifest, "text", 24, seed=2, window=2),
        work=Path(work),
        seed=1,
        transport="local",
    )
    sink = ListSink()
    run_worker(task, rank, world, sink)
    return [e["values"]["train/loss"] for e in sink.events if e["kind"] == "metrics"]


def test_the_memory_is_the_same_for_any_number_of_workers_and_after_a_resume(tmp_path: Path) -> None:
    make_data(tmp_path / "data")
    run = partial(spawn, train)
    whole = run(1, str(tmp_path / "data"), str(tmp_path / "whole"), 8)[0]
    first = run(2, str(tmp_path / "data"), str(tmp_path / "parts"), 5)[0]
    shutil.rmtree(tmp_path / "parts" / "export")
    rest = run(1, str(tmp_path / "data"), str(tmp_path / "parts"), 8)[0]
    assert first + rest == pytest.approx(whole, rel=1e-4)
    states: list[Any] = [Fitted(tmp_path / name).dense("state.")["values_NW"] for name in ("whole", "parts")]
    torch.testing.assert_close(states[0], states[1], atol=1e-5, rtol=1e-4)
    changed = (states[0] != 2.0).any(dim=1)
    assert changed.all(), "two epochs: each sample was seen"
