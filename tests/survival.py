"""Trainings that the tests of faults break: a small classifier whose uninterrupted run is known, and looks at its end."""

from __future__ import annotations

import json
import time
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from labelmill.data.labels import LabelSpec
from labelmill.data.manifest import FieldSpec, load_manifest
from labelmill.data.spec import StreamSpec
from labelmill.data.writer import ShardWriter
from labelmill.encoders import CharNgramsConfig
from labelmill.heads.config import HeadConfig
from labelmill.stages import Fitted
from labelmill.training.checkpoint_files import complete, latest_checkpoint, read_dense, verify
from labelmill.training.config import TrainConfig
from labelmill.training.events import ListSink
from labelmill.training.worker import FitTask, run_worker
from workloads.discrimination.partial_fc import Classifier

CLASSES = 7


def write_texts(folder: Path, samples: int = 200) -> str:
    """A data set of packed texts; returns its folder."""
    fields, label = {"text": FieldSpec(kind="text", ext="txt")}, LabelSpec(form="single", num_classes=7)
    with ShardWriter(
        folder / "texts", "texts", fields, label, layout="packed", rows_per_member=16, samples_per_shard=20
    ) as writer:
        for i in range(samples):
            writer.write(f"s{i:05d}", {"text": f"word-{i}"}, {"label": i % 7})
        return str(writer.close().root)


class SlowClassifier(Classifier):
    """Takes its time over a step, so that there is one to strike in."""

    def __init__(self, *args: Any, pause_s: float = 0.0) -> None:
        super().__init__(*args)
        self.pause_s = pause_s

    def forward(self, batch: Any) -> Any:
        time.sleep(self.pause_s)
        return super().forward(batch)


def fit_task(data: str, work: Path, steps: int = 40, pause_s: float = 0.0, **options: Any) -> FitTask:
    """A training of `steps` steps of 24 samples, a checkpoint every 4, a metric record every step."""
    train = {"checkpoint_every": 4, "log_every": 1} | options.pop("train", {})
    config = TrainConfig(global_batch=24, steps=steps, learning_rate=0.01, schedule="constant", warmup=0.0, **train)
    head = HeadConfig(scale=12.0, block_rows=16)
    encoder = CharNgramsConfig(dim=16, buckets=512, hidden=16)
    objective = partial(SlowClassifier, encoder, head, CLASSES, 1, None, 0.0, 3, pause_s=pause_s)
    stream = StreamSpec(load_manifest(data), "text", 24, seed=2, window=2)
    return FitTask(objective, config, stream, work=Path(work), seed=1, **options)


def train_locally(rank: int, world: int, data: str, work: str, steps: int = 40) -> dict[str, Any]:
    """The uninterrupted run, in processes without Ray."""
    run_worker(fit_task(data, Path(work), steps, transport="local"), rank, world, ListSink())
    return {}


def losses(work: Path) -> list[float]:
    """By step; a step missing is a failure."""
    history = Fitted(work).history
    assert [record["step"] for record in history] == list(range(1, len(history) + 1)), "a metric record is lost"
    return [record["train/loss"] for record in history]


def assert_as_uninterrupted(work: Path, whole: Path, same_world: bool = True) -> None:
    """Losses of every step (so committed batches), final weights, checkpoints: as in the run that nothing happened to."""
    assert losses(work) == pytest.approx(losses(whole), rel=1e-5 if same_world else 1e-4)
    rtol, atol = (1e-4, 1e-6) if same_world else (1e-3, 1e-5)
    rows, expected = Fitted(work).head_rows("classes"), Fitted(whole).head_rows("classes")
    torch.testing.assert_close(rows, expected, rtol=rtol, atol=atol)
    newest, other = latest_checkpoint(work / "checkpoints"), latest_checkpoint(whole / "checkpoints")
    assert newest is not None
    assert other is not None
    assert newest.name == other.name
    for name, value in read_dense(other).items():
        torch.testing.assert_close(read_dense(newest)[name], value, rtol=rtol, atol=atol)
    assert_no_orphans(work)


def assert_no_orphans(work: Path, keep: int = 2) -> None:
    """Only whole checkpoints, as many as the job keeps, each sound; nothing half-written."""
    root = work / "checkpoints"
    assert sorted(root.iterdir()) == complete(root)
    assert len(complete(root)) <= keep
    assert not [problem for folder in complete(root) for problem in verify(folder)]
    assert not (work / ".ray").exists()


def steps_done_again(work: Path) -> dict[int, int]:
    """Steps that were made twice, by the step that training went on from; the raw history tells."""
    lines = (work / "history.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [json.loads(line)["step"] for line in lines]
    return {after - 1: before - after + 1 for before, after in pairwise(steps) if after <= before}
