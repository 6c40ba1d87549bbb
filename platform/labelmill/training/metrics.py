"""Prometheus metrics of training workers: the one place that names them.

Workers hand them to Ray, which adds `ray_` to the name, and serves them from each node's metrics port; Ray writes the
targets for Prometheus to `<session>/prom_metrics_service_discovery.json`. cluster/grafana/training.json draws them.
Every metric has the labels `run`, `stage` and `rank`, and Ray's own.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

if TYPE_CHECKING:
    from labelmill.heads.sharded import ShardedHead

PREFIX = "ray_"
LABELS = ("run", "stage", "rank")


@dataclass(frozen=True)
class Metric:
    """A metric.

    Attributes:
        name: without Ray's prefix; a counter's ends in `_total`.
        kind: a gauge is a state, a counter only grows while a worker lives.
        text: what it says, with its unit.
        labels: beside run, stage and rank.
    """

    name: str
    kind: Literal["gauge", "counter"]
    text: str
    labels: tuple[str, ...] = ()

    @property
    def exported(self) -> str:
        """The name that Prometheus sees."""
        return PREFIX + self.name


START = Metric("labelmill_worker_start_time_seconds", "gauge", "Unix time when the worker began to train")
STEP = Metric("labelmill_step", "gauge", "optimizer steps done")
TOTAL_STEPS = Metric("labelmill_total_steps", "gauge", "optimizer steps of the whole run")
SAMPLES = Metric("labelmill_samples_total", "counter", "samples of this rank's batches since the worker started")
RATE = Metric("labelmill_samples_per_second", "gauge", "samples a second of this rank, over the last window")
STEP_SECONDS = Metric(
    "labelmill_step_seconds", "gauge", "seconds of a step by part, mean of the last window", ("part",)
)
DATA_WAIT = Metric("labelmill_data_wait_share", "gauge", "share of the last window spent waiting for data, 0 to 1")
LOSS = Metric("labelmill_loss", "gauge", "training loss and its parts, mean over the ranks", ("name",))
COLLECTIVE_SECONDS = Metric(
    "labelmill_head_collective_seconds_total",
    "counter",
    "seconds in the head's collectives, waiting for other ranks included (on a GPU: of starting them)",
    ("head", "collective"),
)
SENT_BYTES = Metric(
    "labelmill_head_sent_bytes_total", "counter", "bytes sent in the head's collectives", ("head", "collective")
)
MEMORY = Metric("labelmill_memory_bytes", "gauge", "memory of the worker: resident, gpu_allocated, gpu_peak", ("kind",))
BAD_SAMPLES = Metric("labelmill_bad_samples_total", "counter", "samples that couldn't be used")
RETRIES = Metric("labelmill_storage_retries_total", "counter", "storage requests tried again")
CHECKPOINT_STEP = Metric("labelmill_checkpoint_step", "gauge", "step of the newest checkpoint that was begun")
CHECKPOINT_WAIT = Metric(
    "labelmill_checkpoint_wait_seconds_total", "counter", "seconds that training waited for checkpoints"
)

METRICS = (
    START, STEP, TOTAL_STEPS, SAMPLES, RATE, STEP_SECONDS, DATA_WAIT, LOSS, COLLECTIVE_SECONDS, SENT_BYTES, MEMORY,
    BAD_SAMPLES, RETRIES, CHECKPOINT_STEP, CHECKPOINT_WAIT,
)  # fmt: skip


@dataclass(frozen=True)
class Window:
    """What the training loop counted since the last window.

    Attributes:
        step, total_steps: optimizer steps done, and of the whole run.
        steps: of the window.
        samples: of all ranks in the window.
        seconds: the window's length.
        parts: seconds by part of the step, of the whole window.
        losses: means over the ranks.
    """

    step: int
    total_steps: int
    steps: int
    samples: int
    seconds: float
    parts: Mapping[str, float]
    losses: Mapping[str, float]


class Exporter:
    """Publishes one worker's metrics through Ray. Needs a process of a Ray cluster."""

    def __init__(self, run: str, stage: str, rank: int, world: int) -> None:
        from ray.util import metrics

        kinds = {"gauge": metrics.Gauge, "counter": metrics.Counter}
        self._world = world
        self._made: dict[str, Any] = {}
        for metric in METRICS:
            made = kinds[metric.kind](metric.name, metric.text, LABELS + metric.labels)
            made.set_default_tags({"run": run, "stage": stage, "rank": str(rank)})
            self._made[metric.name] = made
        self._sent: dict[tuple[str, str, str], float] = {}
        self._set(START, time.time())

    def _set(self, metric: Metric, value: float, **labels: str) -> None:
        self._made[metric.name].set(float(value), labels)

    def _add(self, metric: Metric, value: float, **labels: str) -> None:
        if value > 0:
            self._made[metric.name].inc(float(value), labels)

    def window(self, window: Window, heads: Mapping[str, ShardedHead], data_part: str, retries: int = 0) -> None:
        """Publishes a window. `data_part` is the part of the step that waits for data, `retries` are since the start."""
        own = window.samples / self._world
        self._set(STEP, window.step)
        self._set(TOTAL_STEPS, window.total_steps)
        self._add(SAMPLES, own)
        self._set(RATE, own / window.seconds)
        self._set(DATA_WAIT, window.parts.get(data_part, 0.0) / window.seconds)
        for part, seconds in window.parts.items():
            self._set(STEP_SECONDS, seconds / window.steps, part=part)
        for name, value in window.losses.items():
            self._set(LOSS, value, name=name)
        for name, head in heads.items():
            self._traffic(name, head)
        self._grown(RETRIES, retries)
        self._memory()

    def _traffic(self, name: str, head: ShardedHead) -> None:
        grid = head.grid
        sent: dict[str, float] = {}
        seconds: dict[str, float] = {}
        for ranks in {id(r): r for r in (grid.world, grid.shards, grid.replicas)}.values():
            for kind, size in ranks.traffic.sent.items():
                sent[kind] = sent.get(kind, 0.0) + size
            for kind, spent in ranks.traffic.seconds.items():
                seconds[kind] = seconds.get(kind, 0.0) + spent
        for kind, size in sent.items():
            self._grown(SENT_BYTES, size, head=name, collective=kind)
        for kind, spent in seconds.items():
            self._grown(COLLECTIVE_SECONDS, spent, head=name, collective=kind)

    def _grown(self, metric: Metric, value: float, **labels: str) -> None:
        """Adds what a total has grown by since the last window."""
        key = (metric.name, *sorted(labels.values()))
        self._add(metric, value - self._sent.get(key, 0.0), **labels)  # type: ignore[arg-type]
        self._sent[key] = value  # type: ignore[index]

    def _memory(self) -> None:
        import psutil

        self._set(MEMORY, psutil.Process(os.getpid()).memory_info().rss, kind="resident")
        if torch.cuda.is_available():
            self._set(MEMORY, torch.cuda.memory_allocated(), kind="gpu_allocated")
            self._set(MEMORY, torch.cuda.max_memory_allocated(), kind="gpu_peak")

    def bad(self, samples: int) -> None:
        """Counts samples that couldn't be used."""
        self._add(BAD_SAMPLES, samples)

    def checkpoint(self, step: int, seconds: float) -> None:
        """A checkpoint was begun, and training waited so long for it."""
        self._set(CHECKPOINT_STEP, step)
        self._add(CHECKPOINT_WAIT, seconds)
