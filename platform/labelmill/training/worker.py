"""What one training worker does, from an empty process to exported weights and predictions."""

from __future__ import annotations

import copy
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
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
from labelmill.training.device import worker_device
from labelmill.training.engine import Engine, load_dense
from labelmill.training.events import HistorySink, Sink
from labelmill.training.loop import evaluate, predict, train
from labelmill.training.objective import Objective, Progress


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
        transport: `ray` streams through Ray Data; `local` reads in the worker process.
        rows_dtype: of exported head rows.
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

    if task.train and position.step < task.total_steps:
        micro = task.config.global_batch // task.config.accumulation
        spec = replace(
            task.train,
            global_batch=micro,
            start=position.cursor,
            stop=task.total_steps * task.config.global_batch,
        )
        stream = open_stream(spec, streams, objective, rank, world, sink, task.augment, task.threads)
        batches = iter(stream)
        config = task.config
        saver = Checkpointer(
            checkpoints,
            config.keep_checkpoints,
            config.checkpoint_async,
            int(config.checkpoint_memory_mb * 2**20),
        )

        def save(at: Position) -> None:
            place = saver.save(engine, at)
            if rank == 0:
                # in the background it is there only once every rank has written its part
                sink.post(kind="checkpoint", step=at.step, total=task.total_steps, path=str(place))

        def evaluation() -> dict[str, float]:
            assert task.evaluate is not None
            return evaluate(engine, _held_out(task, task.evaluate, streams, objective, rank, world, sink))

        try:
            position = train(
                engine,
                batches,
                config,
                position,
                task.total_steps,
                HistorySink(task.work / "history.jsonl", sink) if rank == 0 else None,
                save,
                evaluation if task.evaluate and config.evaluate_every else None,
            )
            saver.finish()
        finally:
            saver.close()
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
) -> RankStream:
    """This rank's batches of a stream. Every rank opens the same streams in the same order."""
    source: BatchSource = LocalSource(spec, rank, world) if streams is None else streams.open(spec)

    def on_bad(bad: list[tuple[str, str]]) -> None:
        sink.post(kind="bad", samples=[list(item) for item in bad], data=spec.name)

    return RankStream(spec, source, rank, world, objective.prepare, augment=augment, threads=threads, on_bad=on_bad)


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
