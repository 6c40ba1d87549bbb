"""Trains a `FitTask` on Ray and follows it from the driver, through failures: attempt after attempt, to its end.

An attempt is a group of Ray Train workers of a fixed size that goes on from the newest checkpoint. It ends with the
result; or with a failure of anything (worker, host, Train's controller, a hang), after which the next one begins; or
because it was asked to stop at a checkpoint, when a host is about to be taken away or there is room for more workers.
All decisions are here, so that one budget covers them and a rank, a host and the controller are lost in one way.
"""

from __future__ import annotations

import queue
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from labelmill.errors import UserError, errors_behind, user_error_in
from labelmill.job import ClusterConfig
from labelmill.training.attempt import Attempt, Outcome
from labelmill.training.attempts import Attempts
from labelmill.training.checkpoint_files import latest_checkpoint, raise_fence, step_of
from labelmill.training.events import Event
from labelmill.training.loop import NotFiniteError
from labelmill.training.room import usable_sizes, wait_for_room
from labelmill.training.worker import FitTask

# A bug repeats itself in every attempt. What a lost peer makes of the others are RuntimeErrors of the collectives.
_BUGS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    NameError,
    NotImplementedError,
    NotFiniteError,
    SyntaxError,
    TypeError,
    UserError,
    ValueError,
)


def fit(task: FitTask, cluster: ClusterConfig, name: str, on_event: Callable[[Event], None]) -> dict[str, float]:
    """Trains on `cluster.workers` Ray Train workers; returns the seconds of each part, start-up included.

    `on_event` is called from one other thread, so that an outage of what it talks to can't delay the supervision.

    Raises UserError kinds raised in a worker as they are, ClusterError when there are no resources to go on with;
    everything else as Ray reports it.
    """
    task.work.mkdir(parents=True, exist_ok=True)
    with _Delivery(on_event) as deliver:
        try:
            return _supervise(task, cluster, name, deliver)
        finally:
            shutil.rmtree(task.work / ".ray", ignore_errors=True)


def _supervise(task: FitTask, cluster: ClusterConfig, name: str, deliver: Callable[[Event], None]) -> dict[str, float]:
    attempts = Attempts(task.work)
    sizes = usable_sizes(task, cluster)
    failures, reached = 0, _newest_step(task)
    why = "start" if attempts.last is None else "the driver was started again"
    settle_s = 1.0
    while True:
        workers = wait_for_room(cluster, sizes, settle_s)
        number = attempts.begin(workers, why, deliver)
        raise_fence(task.work, number)
        attempt = Attempt(replace(task, attempt=number), cluster, name, workers, sizes, deliver, attempts)
        outcome = attempt.run()
        attempts.end(outcome.why)
        if outcome.seconds is not None:
            return outcome.seconds
        step = _newest_step(task)
        if step > reached:
            failures, reached = 0, step
        if outcome.error is not None:
            failures += 1
            _raise_if_final(outcome, failures, cluster)
            text = f"{outcome.why}; going on from step {step} ({failures} of {cluster.max_failures} failures)"
            deliver({"kind": "note", "time": time.time(), "text": text})
        why, settle_s = outcome.why, 5.0


def _newest_step(task: FitTask) -> int:
    found = latest_checkpoint(task.work / "checkpoints")
    return step_of(found) if found else 0


def _raise_if_final(outcome: Outcome, failures: int, cluster: ClusterConfig) -> None:
    """Raises the error that ended an attempt when another attempt wouldn't help or isn't allowed."""
    from ray.exceptions import RayActorError

    error = outcome.error
    assert error is not None
    if known := user_error_in(error):
        raise known from error
    died = any(isinstance(item, RayActorError) for item in errors_behind(error))
    raised = list(getattr(error, "worker_failures", {}).values())
    raised += [item.__cause__ for item in raised]
    if failures > cluster.max_failures or (not died and any(isinstance(item, _BUGS) for item in raised)):
        raise error


class _Delivery:
    """Hands events to a function in a thread of its own, in order. Its error surfaces at the next event or at the end."""

    def __init__(self, on_event: Callable[[Event], None]) -> None:
        self._on_event = on_event
        self._queue: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="events", daemon=True)

    def __enter__(self) -> Callable[[Event], None]:
        self._thread.start()
        return self._put

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self._queue.put(None)
        self._thread.join()
        if self._error is not None and error is None:
            raise self._error

    def _put(self, event: Event) -> None:
        if self._error is not None:
            raise self._error
        self._queue.put(event)

    def _run(self) -> None:
        while (event := self._queue.get()) is not None:
            try:
                self._on_event(event)
            except BaseException as error:
                self._error = error
                return
