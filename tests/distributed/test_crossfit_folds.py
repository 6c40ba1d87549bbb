"""Folds of a crossfit as Ray Train runs side by side: they overlap, and predict what folds one after the other predict."""

from __future__ import annotations

import io
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from labelmill.crossfit import crossfit, held_out_batches
from labelmill.data.config import StreamConfig
from labelmill.data.labels import LabelSpec
from labelmill.data.manifest import FieldSpec, Manifest, load_manifest
from labelmill.data.writer import ShardWriter
from labelmill.encoders import CharNgramsConfig
from labelmill.execution import execute
from labelmill.job import ClusterConfig, TrackingConfig
from labelmill.losses.classification import Softmax
from labelmill.run import Run
from labelmill.training.attempts import read_attempts
from labelmill.training.config import TrainConfig, TrainJob
from workloads.noisy.ldr import RobustClassifier

ENCODER = CharNgramsConfig(dim=8, buckets=256, hidden=8)


def words(folder: Path) -> Manifest:
    fields = {"text": FieldSpec(kind="text", ext="txt")}
    label = LabelSpec(form="single", num_classes=3)
    with ShardWriter(folder, "words", fields, label, layout="packed", samples_per_shard=40) as writer:
        for i in range(120):
            writer.write(f"s{i}", {"text": "abc"[i % 3] * 3 + str(i)}, {"label": i % 3})
    return load_manifest(folder)


def folds(run: Run, folder: Path, data: Manifest, config: TrainConfig) -> dict[str, Any]:
    stream = StreamConfig().stream(data, "text", 30)
    return crossfit(run, folder, partial(RobustClassifier, ENCODER, Softmax(), data), stream, config, folds=2)


def predicted(tmp_path: Path, data: Manifest, name: str, cluster: ClusterConfig) -> tuple[dict[str, float], list[Any]]:
    """(probability of the best class by key, attempts of each fold)."""
    found: dict[str, float] = {}
    attempts: list[Any] = []

    def method(job: TrainJob, run: Run) -> None:
        stage = run.stage("crossfit", folds, data=data, config=job.train)
        for batch in held_out_batches(stage.folder, 2):
            found.update(zip(batch["key"].to_pylist(), (p[0] for p in batch["prob"].to_pylist()), strict=True))
        attempts.extend(read_attempts(stage.folder / f"fold-{f}") for f in range(2))

    job = TrainJob(
        workload="w",
        name=name,
        output=tmp_path,
        tracking=TrackingConfig(system_metrics=False),
        cluster=cluster,
        train=TrainConfig(global_batch=30, epochs=4, learning_rate=0.02),
    )
    execute(job, method, console=Console(file=io.StringIO()))
    return found, attempts


def test_folds_train_side_by_side_and_predict_the_same(tmp_path: Path, ray_session: None) -> None:
    data = words(tmp_path / "data")
    beside, ((first,), (second,)) = predicted(tmp_path, data, "beside", ClusterConfig(cpus_per_worker=0.5))
    assert max(first["began"], second["began"]) < min(first["until"], second["until"]), "at the same time"
    alone, _ = predicted(tmp_path, data, "alone", ClusterConfig(in_process=True))
    assert len(beside) == 120
    assert beside == pytest.approx(alone, abs=1e-5)
