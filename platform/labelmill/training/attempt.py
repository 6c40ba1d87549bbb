"""One attempt: a Ray Train worker group of a fixed size, watched from the driver until it ends."""

from __future__ import annotations

import contextlib
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch.distributed as dist

from labelmill.errors import ClusterError
from labelmill.job import ClusterConfig
from labelmill.training.attempts import Attempts
from labelmill.training.device import backend
from labelmill.training.events import Event, Mailbox, RaySink, State
from labelmill.training.groups import end_group, this_group
from labelmill.training.pulse import STOP
from labelmill.training.room import draining_nodes, free_workers, most_workers
from labelmill.training.worker import FitTask, run_worker

_POLL_S = 0.3
_DRAIN_EVERY_S = 1.0
_RANKS_EVERY_S = 5.0
_STACKS_S = 2.0  # what writing the stacks may take beyond the limit
_END_S = 30.0


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended: with `seconds` of its parts when training is complete, with `error` when it failed."""

    why: str
    seconds: dict[str, float] | None = None
    error: BaseException | None = None


class HangError(RuntimeError):
    """Training made no progress for `cluster.hang_limit_s`."""


class HostLostError(RuntimeError):
    """A host went before the attempt had begun."""


def _introduction(mailbox: Any) -> Any:
    """Has Train's controller introduce itself: an attempt that can't start has no other handle to be ended by."""
    import ray
    from ray.train.v2._internal.execution.callback import ControllerCallback  # no public callback runs at the start

    class Introduction(ControllerCallback):
        def after_controller_start(self, train_run_context: Any) -> None:
            with contextlib.suppress(Exception):  # training goes without as well
                mailbox.introduce.remote(ray.get_runtime_context().current_actor)

    return Introduction()


def _train_loop(config: dict[str, Any]) -> dict[str, Any]:
    """Runs in each Ray Train worker, where the process group already exists."""
    began = time.time()
    sink = RaySink(config["mailbox"])
    rank, world = dist.get_rank(), dist.get_world_size()
    if rank == 0:
        sink.post(kind="group", group=this_group())
    timing = run_worker(config["task"], rank, world, sink, config["mailbox"])
    return {"started": began, "timing": timing, "ended": time.time()}


class Attempt:
    """Starts the workers and watches them: failures, hangs, hosts about to go, room to grow."""

    def __init__(
        self,
        task: FitTask,
        cluster: ClusterConfig,
        name: str,
        workers: int,
        sizes: Sequence[int],
        deliver: Callable[[Event], None],
        attempts: Attempts,
    ) -> None:
        self._task, self._cluster, self._workers, self._sizes = task, cluster, workers, sizes
        self._name, self._deliver, self._attempts = name, deliver, attempts
        self._states: dict[int, State] = {}
        self._ticks: dict[int, tuple[int, float]] = {}  # of each rank, and when they last changed here
        self._before: dict[int, tuple[float, int]] = {}
        self._step: int | None = None
        self._group = ""  # the workers' placement group
        self._controller: Any = None
        self._stop_why = ""
        self._roomy = False
        self._due = dict.fromkeys(("drain", "grow", "ranks"), time.monotonic())

    def run(self) -> Outcome:
        """Runs to the end, whatever it is. Raises only what `deliver` raises."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        actor: Any = ray.remote(Mailbox)
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self._mailbox = actor.options(num_cpus=0, scheduling_strategy=here).remote()
        ended: dict[str, Any] = {}

        def train() -> None:
            try:
                ended["result"] = self._trainer().fit()
            except BaseException as error:
                ended["error"] = error

        began = time.time()
        thread = threading.Thread(target=train, name="ray-train", daemon=True)
        thread.start()
        error: BaseException | None = None
        try:
            while thread.is_alive() and error is None:
                thread.join(_POLL_S)
                error = self._look()
            if error is None:
                error = self._look()
        except BaseException:  # the driver is to stop: a trial that isn't to go on, Ctrl-C
            end_group(self._group, self._controller)
            raise
        finally:
            self._end_workers()
        thread.join(_END_S)
        if error is not None:
            return Outcome(str(error), error=error)
        return self._outcome(ended, began)

    def _trainer(self) -> Any:
        import ray.train
        from ray.train.torch import TorchConfig, TorchTrainer

        cluster = self._cluster
        use_gpu = cluster.gpus_per_worker > 0
        resources: dict[str, float] = {"CPU": cluster.cpus_per_worker}
        if use_gpu:
            resources["GPU"] = cluster.gpus_per_worker
        loop: Any = _train_loop
        # failures are handled by whoever runs attempts; the type stubs know the older class of this name
        failures = cast(Any, ray.train.FailureConfig)(max_failures=0, controller_failure_limit=0)
        return TorchTrainer(
            loop,
            train_loop_config={"task": self._task, "mailbox": self._mailbox},
            torch_config=TorchConfig(backend=backend(use_gpu)),
            scaling_config=ray.train.ScalingConfig(
                num_workers=self._workers, use_gpu=use_gpu, resources_per_worker=resources
            ),
            run_config=ray.train.RunConfig(
                # a new name each time: resuming is ours, from our own checkpoints
                name=f"{self._name}-{time.time_ns()}",
                storage_path=str(self._task.work.resolve() / ".ray"),
                failure_config=failures,
                callbacks=[_introduction(self._mailbox)],
            ),
        )

    def _outcome(self, ended: dict[str, Any], began: float) -> Outcome:
        error = ended.get("error") or getattr(ended.get("result"), "error", None)
        if error is not None:
            return Outcome(f"{self._stop_why}: " * bool(self._stop_why) + _short(error), error=error)
        value = getattr(ended.get("result"), "return_value", None)
        if value is None:
            text = "the workers ended without a result; see the run's log for what stopped them"
            return Outcome(text, error=ClusterError(text))
        if "stopped" in value["timing"]:
            return Outcome(self._stop_why or "stopped")
        seconds = {
            "start workers": max(0.0, value["started"] - began),  # two hosts' clocks
            **value["timing"],
            "stop workers": max(0.0, time.time() - value["ended"]),
        }
        return Outcome("finished", seconds=seconds)

    # --- watching --------------------------------------------------------------------------------------------

    def _look(self) -> BaseException | None:
        """Takes what the workers told; returns why the attempt must end now, if it must."""
        import ray
        from ray.exceptions import GetTimeoutError, RayError

        try:
            events, self._states, self._controller = ray.get(self._mailbox.drain.remote(), timeout=_END_S)
        except (RayError, GetTimeoutError) as error:
            return error
        for event in events:
            if event["kind"] == "group":
                self._group = event["group"]
            self._deliver(event)
        now = time.monotonic()
        self._follow(now)
        if self._is_due("drain", _DRAIN_EVERY_S):
            if len(self._states) < self._workers and (most := most_workers(self._cluster)) < self._workers:
                # Ray would wait for the host to come back
                return HostLostError(f"a host was lost before the workers had started; {most} would fit")
            self._heed_drain()
        if self._workers < self._sizes[-1] and self._is_due("grow", self._cluster.resize_every_s):
            self._consider_growth()
        if self._states and self._is_due("ranks", _RANKS_EVERY_S):
            self._deliver({"kind": "ranks", "time": time.time(), "step": self._step or 0, "ranks": self._ranks()})
        return self._hang(now)

    def _is_due(self, what: str, every_s: float) -> bool:
        now = time.monotonic()
        if now - self._due[what] < every_s:
            return False
        self._due[what] = now
        return True

    def _follow(self, now: float) -> None:
        for rank, state in self._states.items():
            if rank not in self._ticks or self._ticks[rank][0] != state["ticks"]:
                self._ticks[rank] = (state["ticks"], now)
        if len(self._states) < self._workers:
            return
        step = min(state["step"] for state in self._states.values())
        first = max(state["first"] for state in self._states.values())
        if step > max(first, self._step or 0):
            self._step = step
            self._attempts.stepped(first, step)

    def _hang(self, now: float) -> BaseException | None:
        limit = self._cluster.hang_limit_s
        if limit is None:
            return None
        stuck = {
            rank: now - self._ticks[rank][1]
            for rank, state in self._states.items()
            if state["watched"] and now - self._ticks[rank][1] > limit + _STACKS_S
        }
        if not stuck:
            return None
        found = sorted((self._task.work / "hangs").glob(f"attempt-{self._task.attempt or 0:03d}-rank-*.txt"))
        shown = sorted(self._states.items())
        ranks = "; ".join(f"rank {rank} on {s['host']}: {s['part']} of step {s['step'] + 1}" for rank, s in shown)
        files = [str(path) for path in found if path.stat().st_size]
        stacks = f"stacks of {len(files)} of {len(shown)} workers are in {self._task.work / 'hangs'}"
        text = f"no progress for {max(stuck.values()):.0f} s ({ranks}); {stacks}"
        self._deliver({"kind": "hang", "time": time.time(), "text": text, "files": files})
        return HangError(text)

    def _ranks(self) -> dict[int, State]:
        """Each rank's state with its own milliseconds a step since this was last asked, stragglers marked."""
        shown: dict[int, State] = {}
        for rank, state in sorted(self._states.items()):
            own_s, steps = self._before.get(rank, (0.0, 0))
            self._before[rank] = (state["own_s"], state["steps"])
            done = state["steps"] - steps
            own_ms = 1000 * (state["own_s"] - own_s) / done if done else None
            kept = {key: value for key, value in state.items() if key != "actor"}
            shown[rank] = kept | {"own_ms": own_ms}
        return mark_stragglers(shown)

    # --- wishes ----------------------------------------------------------------------------------------------

    def _stop(self, why: str) -> None:
        """Asks the workers to write a checkpoint after the step they are in, and to end."""
        self._stop_why = why
        self._mailbox.wish.remote(STOP)
        self._deliver({"kind": "note", "time": time.time(), "text": f"{why}: training stops at a checkpoint"})

    def _heed_drain(self) -> None:
        leaving = draining_nodes()
        ours = {state.get("node") for state in self._states.values()} & set(leaving)
        if ours and not self._stop_why:
            self._stop(f"{len(ours)} host(s) are about to be taken away")

    def _consider_growth(self) -> None:
        if self._stop_why or self._step is None or not self._states:
            return
        room = self._workers + free_workers(self._cluster)
        larger = [size for size in self._sizes if self._workers < size <= room]
        # resources that another's task gives back for a moment are no room: it must be there twice
        if larger and self._roomy:
            self._stop(f"there is room for {larger[-1]} workers instead of {self._workers}")
        self._roomy = bool(larger)

    def _end_workers(self) -> None:
        """Ends what is left of workers, controller and mailbox; those of a finished attempt are gone already."""
        import ray

        workers = [state.get("actor") for state in self._states.values()]
        for actor in filter(None, [*workers, self._controller, self._mailbox]):
            with contextlib.suppress(Exception):  # gone, or its host is
                ray.kill(actor, no_restart=True)


def mark_stragglers(ranks: dict[int, State]) -> dict[int, State]:
    """Adds `straggler`: whether a rank's own work of a step takes half as long again as the median rank's, and 5 ms."""
    known = [state["own_ms"] for state in ranks.values() if state["own_ms"] is not None]
    middle = statistics.median_low(known) if known else 0.0
    return {
        rank: state | {"straggler": len(known) > 1 and (state["own_ms"] or 0.0) > max(1.5 * middle, middle + 5.0)}
        for rank, state in ranks.items()
    }


def _short(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    return f"{type(error).__name__}: {lines[-1] if lines[0].startswith('Training failed') else lines[0]}"[:300]
