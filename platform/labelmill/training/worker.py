"""What one training worker does, from an empty process to exported weights and predictions."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Callable
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
from labelmill.data.stream import RankStream
from labelmill.errors import DataError
from labelmill.training.checkpoint import (
    Checkpointer,
    Position,
    gather,
    latest_checkpoint,
    read_dense,
    read_index,
    restore,
)
from labelmill.training.config import TrainConfig
from labelmill.training.device import keep_freed_memory, worker_device
from labelmill.training.engine import Engine, load_dense
from labelmill.training.events import HistorySink, Sink
from labelmill.training.loop import PARTS, predict, train
from labelmill.training.metrics import Exporter, Window
from labelmill.training.objective import Objective, Progress
from labelmill.training.profile import StepProfiler


@dataclass(frozen=True)
class FitTask:
    """All a worker group needs to train an objective and use it.

    Attributes:
        objective: builds the objective; called on every rank with torch's seed set to `seed`.
        config: the job's `train` section.
        train: the training stream (its batch size and end are set from `config`); None only predicts.
        predict: streams whose samples go through the objective's `predict` when training is done.
        work: folder of checkpoints, `export/` and `predictions/`.
        seed: of weights, order and sampled classes.
        augment: pass per-sample randomness to the objective's `prepare` while training.
        use_gpu, threads, read_cpus: from the job's cluster section.
        run: name of the run, a label of metrics.
        profile: record a few steps of every worker into `work/profile`.
        transport: `ray` streams through Ray Data; `local` reads in the worker process.
        rows_dtype: of exported head rows.
    """

    objective: Callable[[], Objective]
    config: TrainConfig
    train: AnySpec | None
    predict: dict[str, AnySpec] = field(default_factory=dict)
    work: Path = Path(".")
    seed: int = 0
    augment: bool = False
    use_gpu: bool = False
    threads: int = 1
    read_cpus: float = 0.25
    run: str = ""
    profile: bool = False
    transport: Literal["ray", "local"] = "ray"
    rows_dtype: torch.dtype = torch.float32

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.config.total_steps(self.train.epoch_samples) if self.train else 0


def run_worker(task: FitTask, rank: int, world: int, sink: Sink) -> dict[str, Any]:
    """Trains (or resumes), exports, predicts. Needs a process group. Returns the seconds of each part.

    Raises DataError for damaged data or a checkpoint of another stream; NotFiniteError when the loss diverges.
    """
    clock, timing = time.perf_counter(), dict[str, float]()

    def lap(part: str) -> None:
        nonlocal clock
        timing[part] = time.perf_counter() - clock
        clock = time.perf_counter()

    torch.set_num_threads(task.threads)
    keep_freed_memory()
    device = worker_device(task.use_gpu)
    torch.manual_seed(task.seed)
    objective = task.objective().to(device)
    for head in objective.heads.values():
        head.to(device)
    checkpoints = task.work / "checkpoints"
    found = latest_checkpoint(checkpoints)
    if found:
        load_dense(objective, read_dense(found))
    engine = Engine(objective, task.config, device)
    lap("build model")

    def progress(done: int, total: int) -> None:
        if rank == 0:
            sink.post(kind="progress", done=done, total=total, rate=math.nan, text="class rows")

    streams = open_streams(task, rank, world)
    position = _begin(task, engine, objective, found, progress)
    lap("initialise head" if not found else "restore checkpoint")
    exporter = Exporter(task.run, task.work.name, rank, world) if task.transport == "ray" else None
    if rank == 0:
        sink.post(kind="start", step=position.step, total=task.total_steps, world=world)

    if task.train and position.step < task.total_steps:
        micro = task.config.global_batch // task.config.accumulation
        spec = replace(
            task.train,
            global_batch=micro,
            start=position.cursor,
            stop=task.total_steps * task.config.global_batch,
        )
        stream = open_stream(spec, streams, objective, rank, world, sink, task.augment, task.threads, exporter)
        batches = iter(stream)
        config = task.config
        saver = Checkpointer(
            checkpoints,
            config.keep_checkpoints,
            config.checkpoint_async,
            int(config.checkpoint_memory_mb * 2**20),
        )

        def watch(seen: Window) -> None:
            assert exporter is not None
            exporter.window(seen, objective.heads, PARTS[0], stream.stats.retries.total())

        steps = task.total_steps - position.step
        profiler = StepProfiler(task.work / "profile", rank, steps) if task.profile else None
        try:
            position = train(
                engine,
                batches,
                config,
                position,
                task.total_steps,
                HistorySink(task.work / "history.jsonl", sink) if rank == 0 else None,
                lambda at: _save(saver, engine, at, exporter),
                watch if exporter else None,
                profiler,
            )
            saver.finish()
        finally:
            saver.close()
            if profiler:
                profiler.close()
        batches.close()
        _post_reading(stream, rank, sink)
    lap("train")
    if not (task.work / "export").is_dir():
        objective.finish(progress)
        lap("finish head")
    _export(task, engine, rank)
    lap("export")
    for name, spec in task.predict.items():
        stream = open_stream(spec, streams, objective, rank, world, sink, threads=task.threads)
        columns = predict(engine, iter(stream), sink if rank == 0 else None, spec.steps, name)
        _post_reading(stream, rank, sink)
        _write_predictions(task.work / "predictions" / name, columns, rank)
        lap(f"predict {name}")
    return timing


def _save(saver: Checkpointer, engine: Engine, at: Position, exporter: Exporter | None) -> None:
    began = time.perf_counter()
    saver.save(engine, at)
    if exporter:
        exporter.checkpoint(at.step, time.perf_counter() - began)


def _begin(task: FitTask, engine: Engine, objective: Objective, found: Path | None, progress: Progress) -> Position:
    """The position to start from: the checkpoint's, or zero with fresh rows."""
    stream = task.train.digest if task.train else ""
    if found is None:
        objective.start(progress)
        return Position(0, 0, stream)
    expected = read_index(found)["stream"]
    if task.train and expected != stream:
        raise DataError(
            f"{found}: this checkpoint belongs to another data set, seed or shuffle window (stream {expected[:12]}, the "
            f"job has {stream[:12]}). Restore those settings, or start over with --fresh."
        )
    return restore(found, engine, objective)


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

    return RankStream(spec, source, rank, world, objective.prepare, augment=augment, threads=threads, on_bad=on_bad)


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
    """One Parquet file a rank; matrices become fixed-size lists."""
    arrays: dict[str, pa.Array] = {}
    for name, values in columns.items():
        if values and isinstance(values[0], torch.Tensor):
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
