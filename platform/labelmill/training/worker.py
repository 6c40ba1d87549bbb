"""What one training worker does, from an empty process to exported weights and predictions."""

from __future__ import annotations

import copy
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed as dist
from safetensors.torch import save_file

from labelmill.data.source import BatchSource, LocalSource, Streams
from labelmill.data.spec import AnySpec
from labelmill.data.stream import Batch, RankStream
from labelmill.training.checkpoint import Checkpointer, Position, Saving, gather
from labelmill.training.checkpoint_copies import Copies
from labelmill.training.checkpoint_files import folder_name
from labelmill.training.config import TrainConfig
from labelmill.training.device import keep_freed_memory, worker_device
from labelmill.training.engine import Engine
from labelmill.training.events import HistorySink, Sink
from labelmill.training.initial import HeadStart
from labelmill.training.loop import PARTS, evaluate, predict, train
from labelmill.training.metrics import Exporter, Window
from labelmill.training.objective import Objective
from labelmill.training.profile import StepProfiler
from labelmill.training.pulse import Pulse
from labelmill.training.resume import begin


@dataclass(frozen=True)
class FitTask:
    """All a worker group needs to train an objective and use it.

    Attributes:
        objective: builds the objective; called on every rank with torch's seed set to `seed`.
        config: the job's `train` section.
        train: the training stream (its batch size and end are set from `config`); None only predicts.
        evaluate: held-out samples that training is judged by every `config.evaluate_every` steps.
        predict: streams whose samples go through the objective's `predict` when training is done.
        work: folder of checkpoints, `export/` and `predictions/`.
        seed: of weights, order and sampled classes.
        augment: pass per-sample randomness to the objective's `prepare` while training.
        use_gpu, threads, read_cpus: from the job's cluster section.
        head_shards: class shards that heads of the objective ask for; other numbers of workers must fit them.
        checkpoint_to: where checkpoints are copied to, this run's own folder or `s3://` address.
        hang_limit_s: seconds without progress in training after which a rank writes its stacks to `work/hangs`.
        attempt: which start of this training it is, counted by the driver; None when nobody else writes to `work`.
        run: name of the run, a label of metrics.
        profile: record a few steps of every worker into `work/profile`.
        transport: `ray` streams through Ray Data; `local` reads in the worker process.
        rows_dtype: of exported head rows.
        initial: what heads go on from in a fresh run, by name.
    """

    objective: Callable[[], Objective]
    config: TrainConfig
    train: AnySpec | None
    predict: dict[str, AnySpec] = field(default_factory=dict)
    evaluate: AnySpec | None = None
    work: Path = Path(".")
    seed: int = 0
    augment: bool = False
    use_gpu: bool = False
    threads: int = 1
    read_cpus: float = 0.25
    head_shards: tuple[int, ...] = ()
    checkpoint_to: str | None = None
    hang_limit_s: float | None = None
    attempt: int | None = None
    run: str = ""
    profile: bool = False
    transport: Literal["ray", "local"] = "ray"
    rows_dtype: torch.dtype = torch.float32
    initial: Mapping[str, HeadStart] = field(default_factory=dict)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.config.total_steps(self.train.epoch_samples) if self.train else 0


def run_worker(task: FitTask, rank: int, world: int, sink: Sink, mailbox: Any = None) -> dict[str, Any]:
    """Trains (or resumes), exports, predicts. Needs a process group. Returns the seconds of each part.

    When the driver wishes it (by `mailbox`), training ends early at a checkpoint; the key `stopped` is then there.

    Raises DataError for damaged data or a checkpoint of another stream; NotFiniteError when more steps than the job
    allows met values that are not finite; CheckpointError when too many checkpoints in a row couldn't be written.
    """
    stacks = task.work / "hangs" / f"attempt-{task.attempt or 0:03d}-rank-{rank:03d}.txt"
    with Pulse(rank, mailbox, task.config.checkpoint_every_s, task.hang_limit_s, stacks) as pulse:
        return _work(task, rank, world, sink, pulse)


def _work(task: FitTask, rank: int, world: int, sink: Sink, pulse: Pulse) -> dict[str, Any]:
    clock, timing = time.perf_counter(), dict[str, Any]()

    def lap(part: str) -> None:
        nonlocal clock
        timing[part] = time.perf_counter() - clock
        clock = time.perf_counter()

    torch.set_num_threads(task.threads)
    keep_freed_memory()
    device = worker_device(task.use_gpu)
    copies = Copies(task.checkpoint_to, task.config.keep_checkpoints) if task.checkpoint_to else None

    def progress(done: int, total: int) -> None:
        if rank == 0:
            sink.post(kind="progress", done=done, total=total, rate=math.nan, text="class rows")

    def note(text: str) -> None:
        sink.post(kind="note", text=text)

    pulse.enter("restore", watched=False)
    engine, position = begin(task, device, copies, progress, note, lap)
    objective = engine.objective
    if rank == 0:
        sink.post(kind="start", step=position.step, total=task.total_steps, world=world)
    streams = open_streams(task, rank, world)
    if task.train and position.step < task.total_steps:
        position = _train(task, engine, position, streams, rank, world, sink, pulse, copies)
        lap("train")
        if position.step < task.total_steps:
            return timing | {"stopped": position.step}
    pulse.enter("export", watched=False)
    if not (task.work / "export").is_dir():
        objective.finish(progress)
        lap("finish head")
    _export(task, engine, rank)
    lap("export")
    for name, spec in task.predict.items():
        stream = open_stream(spec, streams, objective, rank, world, sink, threads=task.threads)
        columns = predict(engine, iter(stream), sink if rank == 0 else None, spec.steps, name, pulse)
        pulse.enter("write predictions", watched=False)
        _post_reading(stream, rank, sink)
        _write_predictions(task.work / "predictions" / name, columns, rank)
        lap(f"predict {name}")
    return timing


def _train(
    task: FitTask,
    engine: Engine,
    position: Position,
    streams: Streams | None,
    rank: int,
    world: int,
    sink: Sink,
    pulse: Pulse,
    copies: Copies | None,
) -> Position:
    """From a position to the end of training, or to where the driver wishes it to stop."""
    assert task.train is not None
    config = task.config
    spec = replace(
        task.train,
        global_batch=config.global_batch // config.accumulation,
        start=position.cursor,
        stop=-(-task.total_steps // len(engine.objective.phase_rates)) * config.global_batch,
    )
    pulse.begin(position.step)
    exporter = Exporter(task.run, task.work.name, rank, world) if task.transport == "ray" else None
    stream = open_stream(spec, streams, engine.objective, rank, world, sink, task.augment, task.threads, exporter)
    batches = iter(stream)
    saver = Checkpointer(
        task.work / "checkpoints",
        config.keep_checkpoints,
        config.checkpoint_async,
        int(config.checkpoint_memory_mb * 2**20),
        task.attempt,
        copies if rank == 0 else None,
        lambda text: sink.post(kind="note", text=text),
    )
    save = Saving(saver, engine, config.max_failed_checkpoints, sink if rank == 0 else None)
    profiler = StepProfiler(task.work / "profile", rank, task.total_steps - position.step) if task.profile else None

    def checkpoint(at: Position) -> None:
        began = time.perf_counter()
        begun = save(at)
        if exporter:
            exporter.checkpoint(at.step, time.perf_counter() - began)
        if rank == 0 and begun:
            # in the background it is there only once every rank has written its part
            path = task.work / "checkpoints" / folder_name(at.step)
            sink.post(kind="checkpoint", step=at.step, total=task.total_steps, path=str(path))

    def evaluation() -> dict[str, float]:
        assert task.evaluate is not None
        return evaluate(engine, _held_out(task, task.evaluate, streams, engine.objective, rank, world, sink), pulse)

    def watch(seen: Window) -> None:
        assert exporter is not None
        exporter.window(seen, engine.objective.heads, PARTS[0], stream.stats.retries.total())

    patience_s = 5.0
    try:
        position = train(
            engine,
            batches,
            config,
            position,
            task.total_steps,
            HistorySink(task.work / "history.jsonl", sink) if rank == 0 else None,
            checkpoint,
            pulse,
            watch if exporter else None,
            profiler,
            evaluation if task.evaluate and config.evaluate_every else None,
        )
        pulse.enter("checkpoint", watched=False)
        save.finish()
        if position.step == task.total_steps:  # a stop in between is in a hurry, and the next checkpoint is copied too
            patience_s = 120.0
    finally:
        saver.close(patience_s)
        if profiler:
            profiler.close()
    batches.close()
    _post_reading(stream, rank, sink)
    return position


def open_streams(task: FitTask, rank: int, world: int) -> Streams | None:
    """The group's streams on Ray; None where every process reads for itself. Collective."""
    if task.transport == "local":
        return None
    name = [uuid4().hex]
    dist.broadcast_object_list(name, src=0)
    return Streams(rank, world, task.read_cpus, name[0])


def open_stream(
    spec: AnySpec,
    streams: Streams | None,
    objective: Objective,
    rank: int,
    world: int,
    sink: Sink,
    augment: bool = False,
    threads: int = 1,
    exporter: Exporter | None = None,
) -> RankStream:
    """This rank's batches of a stream. Every rank opens the same streams in the same order."""
    source: BatchSource = LocalSource(spec, rank, world) if streams is None else streams.open(spec)

    def on_bad(bad: list[tuple[str, str]]) -> None:
        if exporter:
            exporter.bad(len(bad))
        sink.post(kind="bad", samples=[list(item) for item in bad], data=spec.name)

    options: dict[str, Any] = {"augment": augment, "threads": threads, "on_bad": on_bad, "join": objective.join}
    return RankStream(spec, source, rank, world, objective.prepare, **options)


def _held_out(
    task: FitTask, spec: AnySpec, streams: Streams | None, objective: Objective, rank: int, world: int, sink: Sink
) -> Iterator[Batch]:
    """The first `evaluate_samples` samples of the held-out stream."""
    # it prepares as evaluation does while the threads of the training stream go on as they are
    twin = copy.copy(objective)
    twin.training = False
    stop = min(spec.end, spec.start + task.config.evaluate_samples)
    stream = open_stream(replace(spec, stop=stop), streams, twin, rank, world, sink, threads=task.threads)
    yield from stream


def _post_reading(stream: RankStream, rank: int, sink: Sink) -> None:
    """Tells the driver what reading met, for the report on the data's health."""
    stats = stream.stats
    sink.post(
        kind="reading",
        data=stream.spec.name,
        rank=rank,
        samples=stats.samples,
        fetch_seconds=stats.fetch_seconds,
        bytes=stats.bytes,
        retries=dict(stats.retries),
        damage=stats.damage,
    )


def _export(task: FitTask, engine: Engine, rank: int) -> None:
    """Writes `work/export`: dense weights by rank 0, each head's rows by the rank that owns them."""
    target, part = task.work / "export", task.work / ".export.part"
    if target.is_dir():
        return
    dist.barrier()
    if rank == 0:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        for name in engine.objective.heads:
            (part / f"head-{name}").mkdir()
    dense = engine.dense_state()
    dist.barrier()
    heads = {
        name: [entry for own in gather(head.export_rows(part / f"head-{name}", task.rows_dtype)) for entry in own]
        for name, head in engine.objective.heads.items()
    }
    if rank == 0:
        save_file(dense, part / "dense.safetensors")
        (part / "export.json").write_text(json.dumps({"heads": heads}), encoding="utf-8")
        os.rename(part, target)
    dist.barrier()


def _write_predictions(folder: Path, columns: dict[str, list], rank: int) -> None:
    """One Parquet file a rank; matrices become fixed-size lists, all of one width (see `Objective.predict`)."""
    arrays: dict[str, pa.Array] = {}
    widths = gather(
        {
            name: max(v.shape[1] for v in values)
            for name, values in columns.items()
            if values
            and isinstance(values[0], torch.Tensor)
            and values[0].ndim == 2
            and not values[0].is_floating_point()
        }
    )
    for name, values in columns.items():
        if values and isinstance(values[0], torch.Tensor):
            wide = max((known[name] for known in widths if name in known), default=None)
            if wide is not None:
                values = [torch.nn.functional.pad(v, (0, wide - v.shape[1]), value=-1) for v in values]
            joined = torch.cat(values).numpy()
            if joined.ndim == 1:
                arrays[name] = pa.array(joined)
            else:
                flat = pa.array(np.ascontiguousarray(joined).reshape(-1))
                arrays[name] = pa.FixedSizeListArray.from_arrays(flat, int(np.prod(joined.shape[1:])))
        else:
            arrays[name] = pa.array(values)
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f".part-{rank}"
    pq.write_table(pa.table(arrays), part)
    part.rename(folder / f"part-{rank:05d}.parquet")
    if rank == 0:
        # an interrupted run with more workers may have left more files
        for old in folder.glob("part-*.parquet"):
            if int(old.stem.removeprefix("part-")) >= dist.get_world_size():
                old.unlink()
    dist.barrier()
