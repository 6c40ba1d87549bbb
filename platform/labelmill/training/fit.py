"""Runs a `FitTask` on Ray Train workers and follows it from the driver."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, cast

import torch.distributed as dist

from labelmill.errors import ClusterError, user_error_in
from labelmill.job import ClusterConfig
from labelmill.training.device import backend
from labelmill.training.events import Event, Mailbox, RaySink
from labelmill.training.groups import end_group, this_group
from labelmill.training.worker import FitTask, run_worker

_POLL_S = 0.3


def _train_loop(config: dict[str, Any]) -> dict[str, Any]:
    """Runs in each Ray Train worker, where the process group already exists."""
    began = time.time()
    sink = RaySink(config["mailbox"])
    rank, world = dist.get_rank(), dist.get_world_size()
    if rank == 0:
        sink.post(kind="group", **this_group())
    timing = run_worker(config["task"], rank, world, sink)
    return {"started": began, "timing": timing, "ended": time.time()}


def fit(task: FitTask, cluster: ClusterConfig, name: str, on_event: Callable[[Event], None]) -> dict[str, float]:
    """Trains on `cluster.workers` Ray Train workers; returns the seconds of each part, start-up included.

    A worker that dies is restarted with its group from the last checkpoint, `cluster.max_failures` times.

    Raises UserError kinds raised in a worker as they are; everything else as Ray reports it.
    """
    import ray
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    use_gpu = cluster.gpus_per_worker > 0
    resources: dict[str, float] = {"CPU": cluster.cpus_per_worker}
    if use_gpu:
        resources["GPU"] = cluster.gpus_per_worker
    # the type stubs know the older class of this name
    failures = cast(Any, ray.train.FailureConfig)(max_failures=cluster.max_failures, controller_failure_limit=3)
    actor: Any = ray.remote(Mailbox)
    mailbox = actor.options(num_cpus=0).remote()
    loop: Any = _train_loop
    trainer = TorchTrainer(
        loop,
        train_loop_config={"task": task, "mailbox": mailbox},
        torch_config=TorchConfig(backend=backend(use_gpu)),
        scaling_config=ray.train.ScalingConfig(
            num_workers=cluster.workers, use_gpu=use_gpu, resources_per_worker=resources
        ),
        run_config=ray.train.RunConfig(
            # a new name each time: resuming is ours, from our own checkpoints
            name=f"{name}-{time.time_ns()}",
            storage_path=str(task.work.resolve() / ".ray"),
            failure_config=failures,
        ),
    )
    outcome: dict[str, Any] = {}

    def run() -> None:
        try:
            outcome["result"] = trainer.fit()
        except BaseException as error:
            outcome["error"] = error

    group: dict[str, Any] = {"group": ""}

    def take(events: list[Event]) -> None:
        for event in events:
            if event["kind"] == "group":
                group.update(group=event["group"], controller=event.pop("controller"))
            on_event(event)

    began = time.time()
    thread = threading.Thread(target=run, name="ray-train", daemon=True)
    thread.start()
    try:
        while thread.is_alive():
            thread.join(_POLL_S)
            take(ray.get(mailbox.drain.remote()))
    except BaseException:
        # the driver is to stop: a trial that isn't to go on, Ctrl-C
        end_group(**group)
        raise
    take(ray.get(mailbox.drain.remote()))
    if error := outcome.get("error"):
        raise user_error_in(error) or error
    result = outcome["result"]
    if result.error:
        raise user_error_in(result.error) or result.error
    value = result.return_value
    if value is None:
        raise ClusterError("the workers ended without a result; see the run's log for what stopped them")
    return {"start workers": value["started"] - began, **value["timing"], "stop workers": time.time() - value["ended"]}
