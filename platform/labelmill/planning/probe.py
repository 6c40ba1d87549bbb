"""This machine as a cluster: rates and times measured by running the job's own encoder and head at small sizes.

Shape legend as in `labelmill.planning.estimate`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import psutil
import torch
import torch.distributed as dist
from scipy.optimize import nnls

from labelmill.data.labels import Labels
from labelmill.data.stream import Batch
from labelmill.encoders import AnyEncoderConfig, build_encoder
from labelmill.encoders.base import Encoder, to_device
from labelmill.errors import ClusterError
from labelmill.heads.config import HeadConfig
from labelmill.heads.precision import matmul_precision
from labelmill.heads.sharded import ShardedHead
from labelmill.heads.traffic import Collective, sent_bytes
from labelmill.planning.estimate import Setup, zero_collectives
from labelmill.planning.spec import ClusterSpec, Efficiency
from labelmill.planning.trace import example_inputs
from labelmill.training.engine import Engine
from labelmill.training.local import spawn
from labelmill.training.objective import Losses, Objective

PAYLOADS = (64, 4096, 65_536, 1_048_576, 8_388_608)
SAMPLED_ROWS = ((16_000, 0.1), (64_000, 0.1), (64_000, 0.02))
ALL_ROWS = ((8_000, 1.0), (32_000, 1.0))
"""Classes and sample rate of the heads that are measured."""
LEAST_SAMPLES, MOST_SAMPLES = 128, 512
REPEATS = 9
TRIES, OTHERS = 3, 0.1
PROBE_CLASSES = 64


@dataclass(frozen=True)
class LocalMachine:
    """Measured constants, as `estimate.Machine` uses them.

    Attributes:
        spec: rates of this machine.
        head_fit: seconds of a micro batch for each of `head_features`.
        update_fit: seconds of an optimizer step for each number (U x D) and each step.
        encoder_fit: seconds of a micro batch, fixed and for each sample.
        dense_seconds: DeepSpeed's part of an optimizer step beyond encoder and collectives.
        links: (seconds a call, bytes/s) by kind of collective.
    """

    spec: ClusterSpec
    head_fit: tuple[float, ...]
    update_fit: tuple[float, float]
    encoder_fit: tuple[float, float]
    dense_seconds: float
    links: dict[str, tuple[float, float]]
    gloo: bool = True

    def encoder(self, setup: Setup) -> float:
        fixed, sample = self.encoder_fit
        return fixed + sample * setup.batch

    def head(self, setup: Setup) -> dict[str, float]:
        parts = [c * f for c, f in zip(self.head_fit, head_features(setup), strict=True)]
        products = min(sum(parts), setup.head_flops / self.spec.flops("fp32", "head"))
        return {"head products": products, "head memory": sum(parts) - products}

    def row_update(self, setup: Setup) -> float:
        return self.update_fit[0] * setup.touched_rows * setup.dim + self.update_fit[1]

    def dense_update(self, setup: Setup) -> float:
        return self.dense_seconds

    def collective(self, item: Collective, setup: Setup) -> float:
        call, rate = self.links[item.kind]
        return call + item.sent / rate


def head_features(setup: Setup) -> tuple[float, ...]:
    """What the time of the head is made of: products and passes over logits, the same again for logits that are
    computed twice, passes over rows, classes to draw from, 8-bit products, and something for each call.
    """
    products = setup.samples * setup.step_rows * setup.dim
    drawn = setup.num_classes if setup.head.sample_rate < 1 else 0
    return (products, (1 - setup.kept) * products, setup.step_rows * setup.dim, drawn, setup.screened, 1.0)


def probe(setup: Setup, encoder: AnyEncoderConfig, threads: int = 1) -> LocalMachine:
    """Measures this machine for a job, `setup.workers` processes side by side; takes some ten seconds.

    Raises ClusterError for more workers than the machine can run side by side.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if setup.workers > 2 * cores:
        raise ClusterError(
            f"--cluster local: the job has {setup.workers} workers and this machine {cores} cores; set cluster.workers "
            f"to at most {2 * cores}, or describe the cluster."
        )
    found = spawn(measure, setup.workers, setup, encoder, threads)[0]
    memory = psutil.virtual_memory().total / setup.workers / 1e9
    calls, rate = found["links"]["all_reduce"]
    spec = ClusterSpec(
        name="local",
        workers=setup.workers,
        workers_per_node=setup.workers,
        memory_gb=memory,
        reserved_gb=min(memory / 2, found["resident"] / 1e9),
        memory_gbps=found["copy"] / 1e9,
        tflops={"fp32": found["gemm"] / 1e12, "bf16": found["gemm"] / 1e12},
        intra_gbps=rate / 1e9,
        inter_gbps=rate / 1e9,
        intra_us=calls * 1e6,
        inter_us=calls * 1e6,
        launch_us=0.0,
        efficiency=Efficiency(encoder=1.0, head=1.0, memory=1.0, network=1.0),
    )
    return LocalMachine(
        spec,
        tuple(found["head"]),
        (found["update"][0], found["update"][1]),
        (found["encoder"][0], found["encoder"][1]),
        found["dense"],
        {kind: (call, rate) for kind, (call, rate) in found["links"].items()},
    )


def measure(rank: int, world: int, setup: Setup, encoder: AnyEncoderConfig, threads: int) -> dict[str, Any]:
    """On every rank of a gloo group: the constants of `LocalMachine`."""
    torch.set_num_threads(threads)
    links = {kind: _fit_link(kind, world) for kind in ("all_gather", "all_reduce")}
    head, update = _fit_head(setup)
    fixed, sample, dense = _fit_dense(setup, encoder, links, (head, update))
    return {
        "links": links,
        "gemm": _gemm_rate(setup),
        "copy": _copy_rate(),
        "resident": float(psutil.Process().memory_info().rss),
        "head": head,
        "update": update,
        "encoder": [fixed, sample],
        "dense": dense,
    }


def timed(work: Callable[[], Any], repeats: int = REPEATS, warm: int = 2) -> float:
    """Seconds of the slowest rank, all starting together: the lower quartile, since other programs only ever add.

    Measured again, up to twice, while others take more than a tenth of the machine; the quietest time counts.
    """
    for _ in range(warm):
        work()
    tries: list[tuple[float, float]] = []
    while len(tries) < TRIES and (not tries or min(tries)[0] > OTHERS):
        taken = []
        before = _busy_and_own()
        begin = time.perf_counter()
        for _ in range(repeats):
            dist.barrier()
            start = time.perf_counter()
            work()
            slowest = torch.tensor([time.perf_counter() - start], dtype=torch.float64)
            dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
            taken.append(float(slowest))
        # all ranks must come to the same number of tries
        spent = torch.tensor(
            [now - then for now, then in zip(_busy_and_own(), before, strict=True)], dtype=torch.float64
        )
        own, wall = spent[1:2].clone(), torch.tensor([time.perf_counter() - begin], dtype=torch.float64)
        dist.all_reduce(own)
        values = torch.cat([spent[:1], own, wall])
        dist.broadcast(values, 0)
        busy, used, seconds = values.tolist()
        cores = psutil.cpu_count() or 1
        # the kernel counts in hundredths of a second: too coarse to judge a shorter time
        others = max(0.0, busy - used) / (seconds * cores) if seconds > 0.1 else 0.0
        tries.append((others, lower_quartile(taken)))
    return min(tries)[1]


def _busy_and_own() -> tuple[float, float]:
    """CPU seconds that the machine was busy or lent to others, and those of this process."""
    total, own = psutil.cpu_times(), psutil.Process().cpu_times()
    idle = total.idle + getattr(total, "iowait", 0.0)
    # guest times are part of user and nice
    everything = sum(total) - getattr(total, "guest", 0.0) - getattr(total, "guest_nice", 0.0)
    return everything - idle, own.user + own.system


def lower_quartile(values: list[float]) -> float:
    """The value that a quarter of the others lie below."""
    return sorted(values)[len(values) // 4]


def fit(features: Sequence[Sequence[float]], seconds: Sequence[float]) -> list[float]:
    """Non-negative coefficients with the least relative error."""
    scaled = np.array(features, dtype=float) / np.array(seconds)[:, None]
    size = np.abs(scaled).max(axis=0)
    size[size == 0] = 1.0
    solved, _ = nnls(scaled / size, np.ones(len(seconds)))
    return (solved / size).tolist()


def _fit_link(kind: str, world: int) -> list[float]:
    if world == 1:
        return [0.0, 1e12]
    points, seconds = [], []
    for payload in PAYLOADS:
        part = torch.zeros(payload // 4)
        whole = torch.zeros(world * part.numel())

        def work(part: torch.Tensor = part, whole: torch.Tensor = whole) -> None:
            if kind == "all_gather":
                dist.all_gather_into_tensor(whole, part)
            else:
                dist.all_reduce(part)

        seconds.append(timed(work, repeats=15))
        points.append((1.0, sent_bytes(kind, payload, world)))  # type: ignore[arg-type]
    call, byte = fit(points, seconds)
    return [call, 1 / max(byte, 1e-13)]


def _gemm_rate(setup: Setup) -> float:
    """FLOP/s of the head's products: 1024 rows at a time."""
    rows, samples = torch.randn(1024, setup.dim), torch.randn(setup.dim, max(16, setup.samples))
    out = torch.empty(1024, samples.shape[1])
    times = max(1, int(2e9 / (2 * 1024 * setup.dim * samples.shape[1])))

    def work() -> None:
        with matmul_precision(setup.head.matmul):
            for _ in range(times):
                torch.mm(rows, samples, out=out)

    return 2 * 1024 * setup.dim * samples.shape[1] * times / timed(work)


def _copy_rate() -> float:
    """Bytes/s of a copy, read and written."""
    source = torch.zeros(16_000_000)
    target = torch.zeros_like(source)
    return 2 * source.numel() * 4 / timed(lambda: target.copy_(source))


def _fit_head(setup: Setup) -> tuple[list[float], list[float]]:
    """The head's own times without collectives: each rank has a head for itself."""
    alone = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    heads = SAMPLED_ROWS if setup.head.sample_rate < 1 else ALL_ROWS
    most = min(max(setup.samples, LEAST_SAMPLES), MOST_SAMPLES)
    keep = setup.head.memory_mb
    points = [(classes, samples, rate, keep) for classes, rate in heads for samples in (most // 4, most // 2, most)]
    # logits that are not kept are computed twice
    points += [(*heads[1][:1], samples, heads[1][1], 0.0) for samples in (most // 4, most)]
    features, passes, updates, numbers = [], [], [], []
    for classes, samples, rate, memory_mb in points:
        config = setup.head.model_copy(update={"sample_rate": rate, "memory_mb": memory_mb, "shards": None})
        like = Setup(
            setup.encoder,
            config,
            classes,
            setup.train.model_copy(update={"global_batch": samples, "accumulation": 1}),
            1,
            setup.positives,
        )
        loss, update, touched = _time_head(like, alone)
        features.append(head_features(like))
        passes.append(loss)
        updates.append(update)
        numbers.append((touched * setup.dim, 1.0))
    return fit(features, passes), fit(numbers, updates)


def _time_head(like: Setup, group: Any) -> tuple[float, float, int]:
    head = ShardedHead(like.num_classes, like.dim, like.head, group=group)
    generator = torch.Generator().manual_seed(0)
    x_BD = torch.randn(like.samples, like.dim, generator=generator, requires_grad=True)
    touched = 0

    def forward_backward() -> None:
        ids = torch.randint(like.num_classes, (like.samples, like.positives), generator=generator)
        head.loss(x_BD, ids).backward()

    updates: list[float] = []

    def step() -> None:
        nonlocal touched
        begin = time.perf_counter()
        touched = len(head.pending_rows()[0])
        head.step(0.01)
        updates.append(time.perf_counter() - begin)

    def both() -> None:
        forward_backward()
        step()

    whole = timed(both)
    update = lower_quartile(updates[2:])
    return max(whole - update, 1e-6), update, touched


class ProbeObjective(Objective):
    """The job's encoder with a head of hardly any classes."""

    def __init__(self, encoder: Encoder, head: HeadConfig, classes: int = PROBE_CLASSES) -> None:
        super().__init__()
        self.encoder = encoder
        self._heads = {"classes": ShardedHead(classes, encoder.dim, head)}

    @property
    def heads(self) -> dict[str, ShardedHead]:
        return self._heads

    def forward(self, batch: Batch) -> Losses:
        return Losses(self._heads["classes"].loss(self.encoder(batch.inputs), batch.labels, batch.weight_B))


def make_batch(encoder: Encoder, size: int, classes: int, positives: int, seed: int) -> Batch:
    """A batch of example inputs with random labels."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(classes, (size, positives), generator=generator)
    labels = Labels("multi" if positives > 1 else "single", ids)
    places = torch.arange(size)
    return Batch([str(i) for i in range(size)], example_inputs(encoder, size), labels, torch.ones(size), places)


def train_step(engine: Engine, batch: Batch) -> None:
    """A micro batch as the training loop takes it."""
    engine.backward(engine.forward(engine.to_device(batch)))
    engine.step(1e-3)


def _fit_dense(
    setup: Setup, config: AnyEncoderConfig, links: dict[str, list[float]], head: tuple[list[float], list[float]]
) -> tuple[float, float, float]:
    """Encoder: seconds fixed and a sample. DeepSpeed: seconds of a step beyond encoder, head and collectives."""
    torch.manual_seed(0)
    encoder = build_encoder(config)
    encoder.train()
    sizes = sorted({max(2, min(setup.batch, 128) // 4), max(4, min(setup.batch, 128))})
    seconds = []
    for size in sizes:
        inputs = to_device(example_inputs(encoder, size), "cpu")

        def work(inputs: Any = inputs) -> None:
            encoder.zero_grad(set_to_none=True)
            emb_BD = encoder(inputs)
            if emb_BD.requires_grad:
                emb_BD.sum().backward()

        seconds.append(timed(work))
    fixed, sample = fit([(1.0, size) for size in sizes], seconds)
    world, size = dist.get_world_size(), sizes[0]
    train = setup.train.model_copy(update={"global_batch": size * world, "accumulation": 1})
    small = HeadConfig(loss=setup.head.loss, margin=setup.head.margin, normalize=setup.head.normalize)
    engine = Engine(ProbeObjective(encoder, small), train, torch.device("cpu"))
    batch = make_batch(encoder, size, PROBE_CLASSES, 1, dist.get_rank())
    whole = timed(lambda: train_step(engine, batch))
    sent = zero_collectives(Setup(setup.encoder, small, PROBE_CLASSES, train, world), gloo=True)
    wire = sum(links[c.kind][0] + c.sent / links[c.kind][1] for c in sent)
    return fixed, sample, max(0.0, whole - fixed - sample * size - wire - head[0][-1] - head[1][-1])
