"""The training loop, in one visible piece."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist

from labelmill.data.stream import Batch
from labelmill.heads.batch import NotFiniteError as HeadNotFiniteError
from labelmill.training.checkpoint import Position
from labelmill.training.config import TrainConfig
from labelmill.training.engine import Engine
from labelmill.training.events import Sink
from labelmill.training.objective import Losses

PARTS = ("wait for data", "forward", "backward", "update")
"""What a step's seconds are spent on; the sharded head's logits and gradients are part of `forward`."""


class NotFiniteError(FloatingPointError):
    """The loss became NaN or infinite, in more steps than the job allows."""


def train(
    engine: Engine,
    batches: Iterator[Batch],
    config: TrainConfig,
    start: Position,
    total_steps: int,
    sink: Sink | None,
    checkpoint: Callable[[Position], object],
    evaluation: Callable[[], dict[str, float]] | None = None,
) -> Position:
    """Runs optimizer steps `start.step .. total_steps`; returns where it ended.

    Args:
        engine: dense modules and heads.
        batches: micro batches, beginning at the start's cursor.
        config: the job's `train` section.
        start: the first step and cursor.
        total_steps: of the whole run; the schedule is laid over them.
        sink: takes metrics; given to rank 0 only.
        checkpoint: saves at a position; collective.
        evaluation: gives metrics on held-out samples every `config.evaluate_every` steps; collective.
    """
    engine.objective.train()
    position = start
    seconds = dict.fromkeys(PARTS, 0.0)
    clock, window_start, window_steps = time.perf_counter(), time.perf_counter(), 0

    def spent(part: str) -> None:
        nonlocal clock
        now = time.perf_counter()
        seconds[part] += now - clock
        clock = now

    skipped = 0
    for step in range(start.step, total_steps):
        rate = config.rate(step, total_steps)
        loss, parts, norm = 0.0, dict[str, float](), math.nan
        engine.begin(rate)
        problem = ""
        for _ in range(config.accumulation):
            batch = engine.to_device(next(batches))
            spent("wait for data")
            if problem:  # the rest of a step that is left out
                continue
            losses, problem = _forward(engine, batch)
            spent("forward")
            if losses is None:
                continue
            loss += float(losses.total.detach()) / config.accumulation
            for name, value in losses.parts.items():
                parts[name] = parts.get(name, 0.0) + float(value.detach()) / config.accumulation
            engine.backward(losses)
            spent("backward")
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
        position = Position(step + 1, start.cursor + (step + 1 - start.step) * config.global_batch, start.stream)
        window_steps += 1

        last = step + 1 == total_steps
        evaluates = evaluation is not None and ((step + 1) % config.evaluate_every == 0 or last)
        due = (step + 1) % config.log_every == 0 or last or evaluates
        shown = _mean_over_ranks({"loss": loss} | parts, engine.device) if due else {}
        elapsed = time.perf_counter() - window_start
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
            seconds = dict.fromkeys(PARTS, 0.0)
            window_start, window_steps = time.perf_counter(), 0
            clock = window_start
        if last or (config.checkpoint_every and (step + 1) % config.checkpoint_every == 0):
            checkpoint(position)
            clock = time.perf_counter()
    return position


def _forward(engine: Engine, batch: Batch) -> tuple[Losses | None, str]:
    """The losses of a micro batch; without them, on every rank alike, what isn't finite."""
    try:
        losses = engine.forward(batch)
    except HeadNotFiniteError as error:
        return None, str(error)
    if engine.all_finite(losses.total):
        return losses, ""
    return None, f"the loss is {float(losses.total.detach())}"


def _mean_over_ranks(values: dict[str, float], device: torch.device) -> dict[str, float]:
    """Scalars averaged over the ranks: a dense module's loss is the rank's own, a sharded head's is equal on all."""
    packed = torch.tensor(list(values.values()), dtype=torch.float64, device=device)
    dist.all_reduce(packed)
    return dict(zip(values, (packed / dist.get_world_size()).tolist(), strict=True))


@torch.no_grad()
def evaluate(engine: Engine, batches: Iterator[Batch]) -> dict[str, float]:
    """Means of the objective's `evaluate` over a stream, as `eval/<name>`; holes and padding don't count. Collective."""
    modules = list(engine.objective.children())
    # not the objective itself: the training stream's threads, which read ahead, ask it whether it trains
    for module in modules:
        module.eval()
    sums: dict[str, float] = {}
    weight = 0.0
    for batch in batches:
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
def predict(engine: Engine, batches: Iterator[Batch], sink: Sink | None, total: int, name: str) -> dict[str, list]:
    """Runs the objective's `predict` over a stream; columns of this rank's samples, holes and padding left out."""
    engine.objective.eval()
    columns: dict[str, list] = {"key": [], "position": []}
    for done, batch in enumerate(batches, start=1):
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
