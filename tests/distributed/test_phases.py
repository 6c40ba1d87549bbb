"""Objectives with phases: one batch for several optimizer steps, each with a rate and moments of its own."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from labelmill.data.labels import LabelSpec
from labelmill.data.manifest import FieldSpec, load_manifest
from labelmill.data.source import LocalSource
from labelmill.data.spec import StreamSpec
from labelmill.data.stream import RankStream
from labelmill.data.writer import ShardWriter
from labelmill.encoders import CharNgramsConfig, build_encoder
from labelmill.stages import Fitted
from labelmill.training.config import TrainConfig
from labelmill.training.events import ListSink
from labelmill.training.local import spawn
from labelmill.training.objective import Losses, Objective
from labelmill.training.worker import FitTask, run_worker

ENCODER = CharNgramsConfig(dim=8, buckets=128, hidden=8)
RATES, RATE = (0.2, 1.0), 0.01


class TwoPhases(Objective):
    """Classes in one phase; short embeddings in the other."""

    phase_rates = RATES

    def __init__(self) -> None:
        super().__init__()
        self.encoder = build_encoder(ENCODER)
        self.classes = torch.nn.Linear(8, 4)
        self.phase, self.seen = 0, list[tuple[int, list[str]]]()

    def begin(self, step: int, total: int) -> None:
        self.phase = step % 2

    def prepare(self, raw: Any, labels: Any, rng: Any) -> Any:
        return self.encoder.prepare(raw, rng)

    def loss(self, inputs: Any, label_B: torch.Tensor) -> torch.Tensor:
        emb_BD = self.encoder(inputs)
        if self.phase == 0:
            return emb_BD.square().sum(1).mean() + 0 * self.classes.weight.sum() + 0 * self.classes.bias.sum()
        return F.cross_entropy(self.classes(emb_BD), label_B)

    def forward(self, batch: Any) -> Losses:
        self.seen.append((self.phase, batch.keys))
        return Losses(self.loss(batch.inputs, batch.labels.single_B))


def stream(data: str) -> StreamSpec:
    return StreamSpec(load_manifest(data), "text", 16, seed=2, window=2)


def train(rank: int, world: int, data: str, work: str, steps: int, stage: int) -> list[tuple[int, list[str]]]:
    kept: list[TwoPhases] = []

    def build() -> TwoPhases:
        kept.append(TwoPhases())
        return kept[-1]

    config = TrainConfig(
        global_batch=16, steps=steps, learning_rate=RATE, schedule="constant", warmup=0.0, log_every=1, zero_stage=stage
    )
    task = FitTask(build, config, stream(data), work=Path(work), seed=1, transport="local")
    run_worker(task, rank, world, ListSink())
    return kept[0].seen


def by_hand(data: str, steps: int) -> dict[str, torch.Tensor]:
    """Two AdamW on one set of weights, a batch for both."""
    torch.manual_seed(1)
    model = TwoPhases()
    optimizers = [torch.optim.AdamW(model.parameters(), lr=RATE * r, weight_decay=0.0) for r in RATES]
    spec = stream(data)
    from dataclasses import replace

    spec = replace(spec, stop=-(-steps // 2) * 16)
    batches = list(RankStream(spec, LocalSource(spec, 0, 1), 0, 1, model.prepare))
    for step in range(steps):
        batch = batches[step // 2]
        model.begin(step, steps)
        model.zero_grad()
        model.loss(batch.inputs, batch.labels.single_B).backward()
        optimizers[step % 2].step()
    return {name: p.detach() for name, p in model.named_parameters()}


_SLOW = [pytest.param(*case, marks=pytest.mark.slow) for case in ((1, 0), (2, 0), (2, 2))]


@pytest.mark.parametrize(("world", "stage"), [(2, 1), *_SLOW])
def test_phases_equal_two_optimizers_also_after_a_resume_in_between(tmp_path: Path, world: int, stage: int) -> None:
    data, work = str(tmp_path / "data"), tmp_path / "work"
    with ShardWriter(
        data,
        "words",
        {"text": FieldSpec(kind="text", ext="txt")},
        LabelSpec(form="single", num_classes=4),
        layout="packed",
        samples_per_shard=25,
    ) as writer:
        for i in range(64):
            writer.write(f"s{i}", {"text": "abcd"[i % 4] * 3 + str(i)}, {"label": i % 4})
    run = partial(spawn, train)
    seen = run(world, data, str(work), 5, stage)[0]  # stops between the phases of the third batch
    assert [phase for phase, _ in seen] == [0, 1, 0, 1, 0]
    assert seen[0][1] == seen[1][1] != seen[2][1]
    shutil.rmtree(work / "export")
    again = run(world, data, str(work), 10, stage)[0]
    assert again[0] == (1, seen[4][1]), "the batch that wasn't through comes again"
    want = by_hand(data, 10)
    found = Fitted(work).dense()
    for name, value in want.items():
        torch.testing.assert_close(found[name], value, atol=2e-6, rtol=1e-4)
