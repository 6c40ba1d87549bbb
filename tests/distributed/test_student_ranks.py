"""The student on two workers: gradients averaged as the engine does equal those of one worker on the whole batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from labelmill.data.config import StreamConfig
from labelmill.data.manifest import Manifest, load_manifest
from labelmill.data.outputs import OutputsInfo, finish_outputs, outputs_file, write_outputs
from labelmill.data.shards import read_labels
from labelmill.data.source import LocalSource
from labelmill.data.stream import RankStream
from labelmill.encoders import CharNgramsConfig
from labelmill.heads.config import HeadConfig
from labelmill.losses.distillation import DIST, KD, BinaryKLNorm
from labelmill.training.local import spawn
from workloads.distillation.arms import Arm, FeatureTerm, LogitTerm
from workloads.distillation.student import Student, TeacherPlace

NORM = (LogitTerm(loss=BinaryKLNorm(), weight=30.0),)
ARMS = {
    "aligned": (Arm(losses=NORM, aux="linear", align="all"), None),
    "dist": (Arm(losses=(LogitTerm(loss=DIST()),)), None),
    "relations": (Arm(features=(FeatureTerm(kind="rkd"), FeatureTerm(kind="crd"))), None),
    "sharded": (Arm(losses=(LogitTerm(loss=KD()),)), HeadConfig(scale=8.0)),
}


def gradients(rank: int, world: int, data: str, outputs: str) -> dict[str, Tensor]:
    manifest, found = load_manifest(data), {}
    place = TeacherPlace(outputs=outputs, width=5)
    for name, (arm, head) in ARMS.items():
        torch.manual_seed(0)
        model = Student(CharNgramsConfig(dim=8, buckets=64, hidden=16), head, 7, arm, 0, place, 1, 16)
        spec = StreamConfig().stream(manifest, "text", 16, shuffle=False)
        batch: Any = next(
            iter(RankStream(spec, LocalSource(spec, rank, world), rank, world, model.prepare, join=model.join))
        )
        losses = model.forward(batch)
        losses.total.backward()
        for key, parameter in model.named_parameters():
            grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            if world > 1:
                dist.all_reduce(grad)
            found[f"{name}.{key}"] = grad / world
    return found


def write_teacher(data: Manifest, folder: Path) -> None:
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(len(data.shards)):
        keys = read_labels(data, i).column("key").to_pylist()
        columns = {"logits": rng.normal(size=(len(keys), 7)) * 3, "embedding": rng.normal(size=(len(keys), 5))}
        single = {name: values.astype(np.float32) for name, values in columns.items()}
        write_outputs(outputs_file(folder, i), keys, np.ones(len(keys), bool), single)
    finish_outputs(folder, OutputsInfo(manifest=data.digest, num_classes=7, model="m", columns=("logits", "embedding")))


@pytest.mark.parametrize("world", [2])
def test_two_workers_have_the_gradients_of_one(
    make_text_data: Callable[..., Manifest], tmp_path: Path, world: int
) -> None:
    data = make_text_data(40, 15)
    write_teacher(data, tmp_path / "out")
    place = (str(tmp_path / "texts"), str(tmp_path / "out"))
    alone, parts = gradients(0, 1, *place), spawn(gradients, world, *place)
    for key, want in alone.items():
        for part in parts:
            torch.testing.assert_close(part[key], want, rtol=2e-4, atol=2e-5, msg=lambda m: f"{key}: {m}")  # noqa: B023
