"""Trains in this process, as a group of one: no Ray workers, no read tasks. For small models, where starting costs most."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace

import torch.distributed as dist

from labelmill.job import ClusterConfig
from labelmill.training.device import backend
from labelmill.training.events import CallSink, Event
from labelmill.training.worker import FitTask, run_worker


def fit_here(task: FitTask, cluster: ClusterConfig, name: str, on_event: Callable[[Event], None]) -> dict[str, float]:
    """As `training.fit.fit`, for `cluster.workers` 1. `on_event` is called as things happen: training waits for it."""
    began = time.time()
    if not dist.is_initialized():
        # what a launcher sets and DeepSpeed asks for; the group stays, later fits of the process use it again
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1")
        dist.init_process_group(backend(task.use_gpu), store=dist.HashStore(), rank=0, world_size=1)
    timing = run_worker(replace(task, transport="local"), 0, 1, CallSink(on_event))
    return {"start workers": 0.0, **timing, "stop workers": max(0.0, time.time() - began - sum(timing.values()))}
