"""What a plan says DeepSpeed sends, against the bytes in its sockets; and a plan measured on this machine."""

from __future__ import annotations

import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from labelmill import api
from labelmill.data.labels import Labels
from labelmill.encoders import build_encoder
from labelmill.encoders.text import CharNgramsConfig
from labelmill.heads.config import HeadConfig
from labelmill.heads.plan import HardSampling
from labelmill.heads.sharded import ShardedHead
from labelmill.heads.traffic import tcp_bytes_sent
from labelmill.losses.classification import MLCD, SmoothedSoftmax, SoftTargets
from labelmill.planning.estimate import Setup, traffic
from labelmill.planning.probe import ProbeObjective, make_batch, train_step
from labelmill.planning.trace import trace_encoder
from labelmill.training.config import TrainConfig
from labelmill.training.engine import Engine
from labelmill.training.local import spawn

CASES = [(stage, accumulation, "fp32") for stage in (0, 1, 2, 3) for accumulation in (1, 3)] + [(2, 3, "bf16")]


def count(rank: int, world: int) -> list[list[float]]:
    """(planned, sent) bytes of an optimizer step, case by case."""
    warnings.simplefilter("ignore", FutureWarning)
    found = []
    for stage, accumulation, precision in CASES:
        encoder = build_encoder(CharNgramsConfig(dim=64, buckets=8192))
        fields: dict[str, Any] = {"zero_stage": stage, "accumulation": accumulation, "precision": precision}
        config = TrainConfig(global_batch=8 * world * accumulation, steps=5, **fields)
        setup = Setup(trace_encoder(encoder), HeadConfig(), 64, config, world)
        engine = Engine(ProbeObjective(encoder, setup.head), config, torch.device("cpu"))
        batch = make_batch(encoder, 8, 64, 1, rank)
        sent = 0
        for _ in range(2):
            torch.distributed.barrier()
            time.sleep(0.02)
            before = tcp_bytes_sent()
            for _ in range(accumulation):
                train_step(engine, batch)
            torch.distributed.barrier()
            time.sleep(0.02)
            sent = tcp_bytes_sent() - before
        times = {"micro batch": accumulation, "step": 1}
        found.append([sum(c.sent * times[c.each] for c in traffic(setup, gloo=True)), float(sent)])
    return found


HEADS: list[tuple[int, dict[str, Any]]] = [
    # positives of a sample, config: what a plan has to know of a head to say what it sends
    (1, {"sub_centres": 3, "shards": 1}),
    (1, {"sub_centres": 2, "sample_rate": 0.2}),
    (4, {"loss": SoftTargets()}),
    (4, {"loss": SoftTargets(), "shards": 1, "rows_dtype": "bf16"}),
    (1, {"loss": SmoothedSoftmax(), "sample_rate": 0.3}),
    (1, {"sampling": HardSampling(), "sample_rate": 0.2, "sub_centres": 2}),
    (1, {"sampling": HardSampling(), "sample_rate": 0.2, "shards": 1, "matmul": "bf16"}),
    (2, {"loss": MLCD(), "normalize": False}),
]


def count_heads(rank: int, world: int) -> list[dict[str, list[float]]]:
    """(planned, counted) bytes of a head's step by kind of collective; the rows' gradient as it was, if sampled."""
    encoder = build_encoder(CharNgramsConfig(dim=24, buckets=64))
    cost = trace_encoder(encoder)
    found = []
    for positives, fields in HEADS:
        config = HeadConfig(**fields)
        train = TrainConfig(global_batch=16 * world, steps=1, zero_stage=0)
        planned = Setup(cost, config, 1000, train, world, positives)
        head = ShardedHead(1000, 24, config)
        generator = torch.Generator().manual_seed(rank)
        ids = torch.stack([torch.randperm(1000, generator=generator)[:positives] for _ in range(16)])
        labels: Any = Labels("soft", ids, weights_BP=torch.full(ids.shape, 0.2)) if config.loss.soft else ids
        x_BD = torch.randn(16, 24, generator=generator, requires_grad=True)
        head.loss(x_BD, labels).backward()
        touched = len(head.pending_rows()[0])
        head.step(0.1)
        sent = {"all_gather": [0.0, 0.0], "all_reduce": [0.0, 0.0]}
        for item in traffic(planned, gloo=True):
            if not item.what.startswith(("encoder", "gradient")):
                size = touched / planned.touched_rows if item.what == "row gradient" else 1.0
                sent[item.kind][0] += item.sent * size
        for ranks in {id(r): r for r in (head.grid.world, head.grid.shards, head.grid.replicas)}.values():
            for kind in sent:
                sent[kind][1] += ranks.traffic.sent.get(kind, 0.0)
        found.append(sent)
    return found


@pytest.mark.parametrize("world", [2])
def test_bytes_of_heads(world: int) -> None:
    for rank in spawn(count_heads, world):
        for case, sent in zip(HEADS, rank, strict=True):
            for kind, (planned, counted) in sent.items():
                assert counted == pytest.approx(planned), (case, kind)


@pytest.mark.parametrize("world", [2])
def test_bytes_of_a_training_step(world: int) -> None:
    for rank in spawn(count, world):
        for case, (planned, sent) in zip(CASES, rank, strict=True):
            if sent:
                assert sent == pytest.approx(planned, rel=0.03), (case, world)


def test_plan_of_this_machine() -> None:
    plan, _ = api.plan(Path("workloads/discrimination/jobs/spelling-small.yaml"), "local")
    assert plan.fits
    assert plan.spec.name == "local"
    assert plan.setup.workers == 2
    assert 0.1 < plan.spec.tflops["fp32"] * 1e3 / 20 < 100  # GFLOP/s, of any machine
    assert 1e-3 < plan.step_seconds < 10
    assert plan.seconds["head products"] > 0
    assert plan.sent["embeddings and ids", "shards"] == 256 * (64 * 4 + 2 * 8)
