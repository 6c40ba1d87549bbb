"""The training loop, in one visible piece."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist

from labelmill.data.stream import Batch
from labelmill.errors import DataError
from labelmill.heads.batch import NotFiniteError
from labelmill.heads.traffic import waited_s
from labelmill.losses.classification import SampleError
from labelmill.training.checkpoint import Position
from labelmill.training.config import TrainConfig
from labelmill.training.engine import Engine
from labelmill.training.events import Sink
from labelmill.training.metrics import Window
from labelmill.training.objective import Losses
from labelmill.training.profile import StepProfiler
from labelmill.training.pulse import STOP, Pulse

PARTS = ("wait for data", "forward", "backward", "update")
"""What a step's seconds are spent on; the sharded head's logits and gradients are part of `forward`."""


_NEXT = dict(zip(PARTS, [*PARTS[1:], PARTS[0]], strict=True))


def train(
    engine: Engine,
    batches: Iterator[Batch],
    config: TrainConfig,
    start: Position,
    total_steps: int,
    sink: Sink | None,
    checkpoint: Callable[[Position], object],
    pulse: Pulse | None = None,
    watch: Callable[[Window], object] | None = None,
    profiler: StepProfiler | None = None,
    evaluation: Callable[[], dict[str, float]] | None = None,
) -> Position:
    """Runs optimizer steps `start.step .. total_steps`; returns where it ended, which is earlier when the driver wishes it.

    Args:
        engine: dense modules and heads.
        batches: micro batches, beginning at the start's cursor.
        config: the job's `train` section.
        start: the first step and cursor.
        total_steps: of the whole run; the schedule is laid over them.
        sink: takes metrics; given to rank 0 only.
        checkpoint: saves at a position; collective.
        pulse: is told what this rank does, and knows what the driver wishes.
        watch: takes every window of `log_every` steps, on every rank.
        profiler: records some of the steps.
        evaluation: gives metrics on held-out samples every `config.evaluate_every` steps; collective.

    Raises, on all ranks alike:
        NotFiniteError: a loss or an embedding was NaN or infinite in more steps than the job allows.
        DataError: a sample that a head's loss can't take; names its key.
    """
    pulse = pulse or Pulse(dist.get_rank())
    engine.objective.train()
    position = start
    seconds = dict.fromkeys(PARTS, 0.0)
    clock, window_start, window_steps = time.perf_counter(), time.perf_counter(), 0

    def spent(part: str) -> None:
        nonlocal clock
        now = time.perf_counter()
        seconds[part] += now - clock
        clock = now
        pulse.enter(_NEXT[part])

    def named(part: str) -> AbstractContextManager[None]:
        return profiler.part(part) if profiler else nullcontext()

    skipped, phase_rates = start.skipped, engine.objective.phase_rates
    phases, held = len(phase_rates), list[Batch]()  # the batches of a step, for the phases after the first
    for step in range(start.step, total_steps):
        phase = step % phases
        rate = config.rate(step, total_steps) * phase_rates[phase]
        engine.enter_phase(phase)
        engine.objective.begin(step, total_steps)
        if phase == 0:
            held = []
        loss, parts, norm = 0.0, dict[str, float](), math.nan
        if profiler:
            profiler.begin_step()
        engine.begin(rate)
        problem, wish, waited = "", 0, 0.0
        before = seconds["wait for data"] + seconds["forward"]
        pulse.enter(PARTS[0])
        for micro in range(config.accumulation):
            with named("wait for data"):
                if len(held) > micro:
                    batch = held[micro]
                else:
                    batch = engine.to_device(next(batches))
                    if phases > 1:
                        held.append(batch)
            spent("wait for data")
            if problem:  # the rest of a step that is left out
                continue
            began_s = waited_s()
            with named("forward"):
                losses, problem, wished = _forward(engine, batch, pulse.wish)
            wish, waited = wish | wished, waited + waited_s() - began_s
            spent("forward")
            if losses is None:
                continue
            loss += float(losses.total.detach()) / config.accumulation
            for name, value in losses.parts.items():
                parts[name] = parts.get(name, 0.0) + float(value.detach()) / config.accumulation
            with named("backward"):
                engine.backward(losses)
            spent("backward")
            with named("update"):
                result = engine.step(rate)
            norm = norm if result is None else result
            spent("update")
        if problem:
            engine.skip()
            skipped += 1
            loss, parts = math.nan, dict.fromkeys(parts, math.nan)
            if skipped > config.max_skipped_steps:
                raise NotFiniteError(
                    f"step {step + 1}: {problem}. {skipped - 1} steps were left out for that before; "
                    f"train.max_skipped_steps is {config.max_skipped_steps}. Lower train.learning_rate, or set "
                    "train.max_grad_norm."
                )
        if profiler:
            profiler.end_step()
        # a batch that isn't through all its phases is read again after a resume
        cursor = start.cursor + ((step + 1) // phases - start.step // phases) * config.global_batch
        position = Position(step + 1, cursor, start.stream, skipped)
        window_steps += 1
        pulse.stepped(step + 1, seconds["wait for data"] + seconds["forward"] - before - waited)

        last = step + 1 == total_steps
        evaluates = evaluation is not None and ((step + 1) % config.evaluate_every == 0 or last)
        due = (step + 1) % config.log_every == 0 or last or evaluates
        shown = _mean_over_ranks({"loss": loss} | parts, engine.device) if due else {}
        elapsed = time.perf_counter() - window_start
        if watch and due:
            samples = window_steps * config.global_batch
            watch(Window(step + 1, total_steps, window_steps, samples, elapsed, dict(seconds), shown))
        judged = evaluation() if evaluation and evaluates else {}
        if sink and due:
            values = {f"train/{name}": value for name, value in shown.items()} | {"train/learning_rate": rate}
            if math.isfinite(norm):
                values["train/grad_norm"] = norm
            values["train/samples_per_second"] = window_steps * config.global_batch / elapsed
            if skipped:
                values["train/skipped_steps"] = skipped
            values |= {f"seconds/{part}": value / window_steps for part, value in seconds.items()} | judged
            sink.post(kind="metrics", step=step + 1, total=total_steps, values=values)
            sink.post(
                kind="progress",
                done=step + 1,
                total=total_steps,
                rate=values["train/samples_per_second"],
                text=f"loss {shown['loss']:.3f}",
            )
        if due:
            seconds = dict.fromkeys(PARTS, 0.0)
            clock = window_start = time.perf_counter()
            window_steps = 0
        if last or wish or (config.checkpoint_every and (step + 1) % config.checkpoint_every == 0):
            pulse.enter("checkpoint")
            checkpoint(position)
            pulse.saved()
            clock = time.perf_counter()
        if wish & STOP:
            break
    return position


def _forward(engine: Engine, batch: Batch, wish: int) -> tuple[Losses | None, str, int]:
    """The losses of a micro batch; without them, on every rank alike, what isn't finite. And what any rank wishes."""
    try:
        losses = engine.forward(batch)
    except NotFiniteError as error:
        return None, str(error), 0
    except SampleError as error:
        raise _with_key(error, batch) from None
    finite, wish = engine.agree(losses.total, wish)
    if finite:
        return losses, "", wish
    return None, f"the loss is {float(losses.total.detach())}", wish


def _with_key(error: SampleError, batch: Batch) -> DataError:
    """The error, which all ranks have, with the sample's key."""
    if error.at is None:
        return error
    rank, index, size = error.at
    # an objective that gives the head other samples than the batch's has no key to show
    key = [batch.keys[index] if dist.get_rank() == rank and size == len(batch.keys) else None]
    dist.broadcast_object_list(key, src=rank)
    return error if key[0] is None else DataError(f"{error} The sample's key is {key[0]!r}.")


def _mean_over_ranks(values: dict[str, float], device: torch.device) -> dict[str, float]:
    """Scalars averaged over the ranks: a dense module's loss is the rank's own, a sharded head's is equal on all."""
    packed = torch.tensor(list(values.values()), dtype=torch.float64, device=device)
    dist.all_reduce(packed)
    return dict(zip(values, (packed / dist.get_world_size()).tolist(), strict=True))


@torch.no_grad()
def evaluate(engine: Engine, batches: Iterator[Batch], pulse: Pulse) -> dict[str, float]:
    """Means of the objective's `evaluate` over a stream, as `eval/<name>`; holes and padding don't count. Collective."""
    modules = list(engine.objective.children())
    # not the objective itself: the training stream's threads, which read ahead, ask it whether it trains
    for module in modules:
        module.eval()
    sums: dict[str, float] = {}
    weight = 0.0
    for batch in batches:
        pulse.enter("evaluate")
        batch = engine.to_device(batch)
        kept_B = (batch.weight_B > 0).double()
        weight += float(kept_B.sum())
        for name, value_B in engine.objective.evaluate(batch).items():
            sums[name] = sums.get(name, 0.0) + float((value_B.double() * kept_B).sum())
    for module in modules:
        module.train()
    means = _mean_over_ranks(sums | {"": weight}, engine.device)
    total = means.pop("")
    return {f"eval/{name}": value / total for name, value in means.items()} if total else {}


@torch.no_grad()
def predict(
    engine: Engine, batches: Iterator[Batch], sink: Sink | None, total: int, name: str, pulse: Pulse | None = None
) -> dict[str, list]:
    """Runs the objective's `predict` over a stream; columns of this rank's samples, holes and padding left out."""
    engine.objective.eval()
    columns: dict[str, list] = {"key": [], "position": []}
    for done, batch in enumerate(batches, start=1):
        if pulse:
            pulse.enter(f"predict {name}")
        batch = engine.to_device(batch)
        outputs = engine.objective.predict(batch)
        kept = batch.weight_B.cpu() > 0
        columns["key"] += [key for key, keep in zip(batch.keys, kept.tolist(), strict=True) if keep]
        columns["position"].append(batch.positions_B.cpu()[kept])
        for column, value in outputs.items():
            columns.setdefault(column, []).append(
                value.detach().float().cpu()[kept] if value.is_floating_point() else value.cpu()[kept]
            )
        for column, values in batch.columns.items():
            columns.setdefault(column, []).extend(v for v, keep in zip(values, kept.tolist(), strict=True) if keep)
        if sink:
            sink.post(kind="progress", done=done, total=total, rate=math.nan, text=f"predict {name}")
    return columns
