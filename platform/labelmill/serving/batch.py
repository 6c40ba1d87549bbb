"""Prediction over the shards of a data set, as a Ray Data job with exactly one output file a shard.

    <out>/job.json               what is predicted with what; written first
    <out>/part-<shard>.parquet   a row a sample, in the shard's order; appears whole or not at all
    <out>/predictions.json       counts of all parts; written last, when every part was read back and found whole

The unit of work is a shard: an actor reads its blocks, predicts, and writes its part under a name that only the shard
gives. So a part is the same whoever writes it, a job that was killed leaves whole parts or none, and the same command
does what is missing. Places are folders or `s3://`.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from labelmill.data import store
from labelmill.data.decode import decode_column
from labelmill.data.manifest import Manifest
from labelmill.data.reading import WindowRead, read_blocks
from labelmill.data.shards import HOLE
from labelmill.data.spec import Reading, StreamSpec
from labelmill.errors import DataError, UserError
from labelmill.job import ClusterConfig, TrackingConfig
from labelmill.serving.package import fetch_package
from labelmill.tracking.model import ModelSpec, Predictor, load_model, read_spec

JOB, SUMMARY = "job.json", "predictions.json"
_NOTE = b"labelmill.part"
_OLD_S = 3600.0  # a temporary file that nobody has written to for so long was left by a killed process
_SIDE_BY_SIDE = 2  # shards that an actor has at once: one is read, decoded or written while the model has another
_NAMED = 1000  # bad samples that a part names

Progress = Callable[[float, float, float, str], None]
"""Takes (shards done, shards in all, samples a second, text)."""


@dataclass(frozen=True)
class Task:
    """What is predicted with what.

    Attributes:
        model: `NAME/VERSION`.
        manifest: the data set.
        field: the manifest field that goes into the encoder.
        out: folder or `s3://` address.
        k: answers a sample.
        max_bad: samples that may be unusable, over all shards; each has a row that says why.
    """

    model: str
    manifest: Manifest
    field: str
    out: str
    k: int
    max_bad: int = 0

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the content of the parts."""
        return {"format_version": 1, "model": self.model, "manifest": self.manifest.digest,
                "data": self.manifest.name, "field": self.field, "k": self.k,
                "shards": len(self.manifest.shards)}  # fmt: skip

    def part(self, shard: int) -> str:
        """Where the predictions of a shard lie."""
        return store.join(self.out, part_name(shard))


@dataclass(frozen=True)
class Part:
    """What a part holds.

    Attributes:
        shard: index of the input shard.
        rows: samples, bad ones included.
        bad: unusable ones.
        problems: (key, reason) of the first of them.
    """

    shard: int
    rows: int
    bad: int
    problems: list[tuple[str, str]]


def part_name(shard: int) -> str:
    """File name of a shard's predictions."""
    return f"part-{shard:06d}.parquet"


# --- one shard ------------------------------------------------------------------------------------------------


def predict_shard(
    predictor: Predictor, task: Task, shard: int, alone: AbstractContextManager[object] | None = None
) -> Part:
    """Writes a shard's part; `alone` is held while the model computes, so that other shards are read meanwhile.

    Raises DataError for damaged data, or more bad samples than the job allows.
    """
    info = task.manifest.shards[shard]
    rows, problems, bad = 0, list[tuple[str, str]](), 0
    with store.open_write(task.part(shard)) as file:
        writer: pq.ParquetWriter | None = None
        for table in _blocks(task, shard):
            answers, holes = _answers(predictor, task, table, alone or nullcontext())
            bad += len(holes)
            problems += holes[: _NAMED - len(problems)]
            if bad > task.max_bad:
                raise _too_bad(task, bad, *holes[0])
            rows += table.num_rows
            if writer is None:
                writer = pq.ParquetWriter(file, answers.schema, compression="zstd")
            writer.write_table(answers)
        if rows != info.samples or writer is None:
            raise DataError(
                f"{task.manifest.shard_path(shard)}: {rows} samples were read, the manifest has {info.samples}."
            )
        note = Part(shard, rows, bad, problems)
        writer.add_key_value_metadata({_NOTE: json.dumps({**asdict(note), "job": task.identity})})
        writer.close()
    return note


def _too_bad(task: Task, bad: int, key: str, reason: str) -> DataError:
    return DataError(
        f"data set {task.manifest.name!r}: sample {key!r} can't be used: {reason}. {bad} bad sample(s) so far, the job "
        f"allows {task.max_bad}. Repair the data, or raise --max-bad; such samples then get a row that says why."
    )


def _blocks(task: Task, shard: int) -> Iterator[pa.Table]:
    manifest = task.manifest
    one = manifest.model_copy(update={"shards": (manifest.shards[shard],)})
    rows = one.num_samples
    block = StreamSpec(one, task.field, global_batch=1).block_rows
    reading = Reading(on_damage="raise" if not task.max_bad else "sample")
    zeros = np.zeros(rows, np.int64)
    return read_blocks(WindowRead(one, task.field, zeros, np.arange(rows), 0, block, reading))


def _answers(
    predictor: Predictor, task: Task, table: pa.Table, alone: AbstractContextManager[object]
) -> tuple[pa.Table, list[tuple[str, str]]]:
    """The part's rows of a block, and its bad samples (key, reason)."""
    config, keys = predictor.spec.encoder, table.column("key").to_pylist()
    size, channels = config.get("image_size"), config.get("channels", 3)
    holes = table.column(HOLE)
    skip_B = ~holes.is_null().to_numpy(zero_copy_only=False)
    spec = task.manifest.fields[task.field]
    raw, valid_B, bad = decode_column(table.column(task.field), spec, keys, size, channels, skip_B)
    bad = [(k, r) for k, r in zip(keys, holes.to_pylist(), strict=True) if r is not None] + bad
    sound = np.flatnonzero(valid_B)
    values = raw[sound] if isinstance(raw, np.ndarray) else [raw[i] for i in sound.tolist()]
    with alone:
        found = predictor.predict(values, task.k)
    reasons = dict(bad)
    place = np.full(len(keys), -1, np.int64)
    place[sound] = np.arange(len(sound))
    columns: dict[str, Any] = {"key": table.column("key").cast(pa.string())}
    for name, column in _by_input(found, len(sound)).items():
        # a bad sample has nulls
        columns[name] = column.take(pa.array(place, mask=place < 0))
    columns["problem"] = pa.array([reasons.get(key) for key in keys], pa.string())
    return pa.table(columns), bad


def _by_input(found: pa.Table, inputs: int) -> dict[str, pa.Array]:
    """The answers with a row an input: ranked ones as lists, best first."""
    plain = {name: found.column(name).combine_chunks() for name in found.column_names if name not in ("input", "rank")}
    if "rank" not in found.column_names:
        return plain
    counts = np.bincount(found.column("input").to_numpy(), minlength=inputs)
    offsets = pa.array(np.concatenate([[0], np.cumsum(counts)]).astype(np.int32))
    return {name: pa.ListArray.from_arrays(offsets, column) for name, column in plain.items()}


class ShardPredictor:
    """Ray Data's worker: opens the model once, then predicts shards; reads the next one while the model has one."""

    def __init__(self, task: Task, config: TrackingConfig, output: str, threads: int, device: str) -> None:
        import torch

        from labelmill.training.device import keep_freed_memory

        torch.set_num_threads(threads)
        keep_freed_memory()
        self._task, self._alone = task, threading.Lock()
        self._predictor = load_model(fetch_package(config, output, task.model)[1], device)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        found: list[dict[str, Any]] = []
        for shard in batch["shard"]:
            try:
                found.append({"part": asdict(predict_shard(self._predictor, self._task, int(shard), self._alone))})
            except UserError as error:  # Ray Data would wrap it until nobody can tell what it was
                found.append({"error": str(error)})
        return {"found": [json.dumps(one) for one in found]}


# --- the job --------------------------------------------------------------------------------------------------


def make_task(
    config: TrackingConfig,
    output: str | Path,
    model: str,
    manifest: Manifest,
    out: str,
    k: int = 5,
    field: str | None = None,
    max_bad: int = 0,
) -> Task:
    """The task of a registered model over a data set; checks that they fit, before anything starts.

    Raises TrackingError for an unknown model, DataError for data whose fields the model can't take.
    """
    version, folder = fetch_package(config, output, model)
    chosen = _field(read_spec(folder), manifest, field)
    if k < 1:
        raise DataError(f"k must be at least 1, not {k}")
    return Task(f"{version.name}/{version.version}", manifest, chosen, store.normal(out), k, max_bad)


def _field(spec: ModelSpec, manifest: Manifest, wanted: str | None) -> str:
    fitting = [name for name, field in manifest.fields.items() if field.kind == spec.input]
    name = wanted or (spec.field if spec.field in manifest.fields else fitting[0] if len(fitting) == 1 else "")
    if name not in fitting:
        shown = ", ".join(f"{n} ({f.kind})" for n, f in manifest.fields.items())
        raise DataError(
            f"data set {manifest.name!r}: the model takes a field of kind {spec.input} (it was trained on {spec.field!r}), "
            f"and the data has: {shown}. Name one with --field."
        )
    return name


def predict_shards(
    task: Task,
    config: TrackingConfig,
    output: str | Path,
    cluster: ClusterConfig,
    progress: Progress = lambda *_: None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Predicts every shard that has no part yet; returns the content of `predictions.json`.

    `cluster.workers` actors work side by side. Raises DataError for a folder that holds another job's parts (unless
    `overwrite`), damaged data, or too many bad samples; UserError kinds as workers raise them.
    """
    from labelmill.cluster import connect

    _claim(task, overwrite)
    every = range(len(task.manifest.shards))
    found = {part.shard: part for part in _read_parts(task, every) if part}
    _check_bad(task, found)
    todo = [shard for shard in every if shard not in found]
    done, began = len(found), time.monotonic()
    progress(done, len(every), float("nan"), "kept from before" if done else "")
    if todo:
        fresh = 0
        with connect(cluster):
            for part in _run(task, config, str(Path(output).resolve()), cluster, todo):
                found[part.shard] = part
                fresh += part.rows
                _check_bad(task, found)
                progress(len(found), len(every), fresh / (time.monotonic() - began), "")
    # what counts is what lies there, not what the workers said
    last = _read_parts(task, every)
    missing = [task.part(i) for i, part in enumerate(last) if part is None]
    if missing:
        raise DataError(
            f"{len(missing)} part(s) aren't there after all, first {missing[0]}. Run the same command again."
        )
    parts = [part for part in last if part is not None]
    summary = {
        **task.identity,
        "rows": sum(part.rows for part in parts),
        "bad": sum(part.bad for part in parts),
        "parts": [{"file": part_name(p.shard), "rows": p.rows, "bad": p.bad} for p in parts],
    }
    store.write_bytes(store.join(task.out, SUMMARY), json.dumps(summary, indent=1).encode())
    return summary


def _run(
    task: Task, config: TrackingConfig, output: str, cluster: ClusterConfig, shards: Sequence[int]
) -> Iterator[Part]:
    """Parts as workers finish them. An actor or a host that dies is replaced and its shard done again."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    gpus = cluster.gpus_per_worker
    arguments = {"task": task, "config": config, "output": output, "threads": max(1, int(cluster.cpus_per_worker)),
                 "device": "cuda" if gpus else "cpu"}  # fmt: skip
    shards_set = ray.data.from_items([{"shard": i} for i in shards], override_num_blocks=len(shards))
    parts = shards_set.map_batches(
        ShardPredictor,
        fn_constructor_kwargs=arguments,
        batch_size=1,
        num_cpus=cluster.cpus_per_worker,
        num_gpus=gpus or None,
        compute=ray.data.ActorPoolStrategy(
            size=min(cluster.workers, len(shards)),
            max_tasks_in_flight_per_actor=_SIDE_BY_SIDE,
            max_concurrent_calls_per_actor=_SIDE_BY_SIDE,
            enable_true_multi_threading=True,
        ),
    )
    for row in parts.iter_rows():
        found = json.loads(row["found"])
        if "error" in found:
            raise DataError(found["error"])
        yield Part(**found["part"])


def _claim(task: Task, overwrite: bool) -> None:
    """Notes whose parts the folder holds. Raises DataError when they are another job's."""
    path = store.join(task.out, JOB)
    names = store.list_files(task.out, recursive=False)
    if JOB in names:
        held = json.loads(store.read_bytes(path).to_pybytes())
        if held == task.identity:
            _sweep(task.out, names)
            return
        if not overwrite:
            differ = [f"{k}: {held.get(k)} there, {v} asked for" for k, v in task.identity.items() if held.get(k) != v]
            raise DataError(
                f"{task.out}: holds predictions of another job ({'; '.join(differ)}). Choose another folder, or replace "
                "them with --overwrite."
            )
    elif names and not overwrite:
        raise DataError(
            f"{task.out}: this folder isn't empty and holds no predictions ({names[0]}). Choose another one."
        )
    # the summary goes first: it says that all parts are there
    ours = [n for n in names if n in (SUMMARY, JOB) or (n.startswith("part-") and ".parquet" in n)]
    store.delete_many(store.join(task.out, name) for name in sorted(ours, reverse=True))
    store.write_bytes(path, json.dumps(task.identity, indent=1).encode())


def _sweep(out: str, names: list[str]) -> None:
    """Removes temporary files that killed workers left on a disk; S3 shows nothing of an upload that didn't end."""
    if store.is_uri(out):
        return
    for name in names:
        path = Path(out, name)
        with suppress(OSError):
            if name.endswith(".part") and time.time() - path.stat().st_mtime > _OLD_S:
                os.unlink(path)


def _read_parts(task: Task, shards: Sequence[int]) -> list[Part | None]:
    """What each shard's part says of itself; None where it is missing, broken or another job's."""
    there = set(store.list_files(task.out, recursive=False))

    def read(shard: int) -> Part | None:
        if part_name(shard) not in there:
            return None
        try:
            system, inner = store.filesystem(task.part(shard))
            about = pq.read_metadata(inner, filesystem=system)
            note = json.loads(about.metadata[_NOTE])
        except (OSError, pa.ArrowException, KeyError, TypeError, ValueError):
            return None
        if (
            note.pop("job") != task.identity
            or not about.num_rows == note["rows"] == task.manifest.shards[shard].samples
        ):
            return None
        return Part(note["shard"], note["rows"], note["bad"], [(k, r) for k, r in note["problems"]])

    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(read, shards))


def _check_bad(task: Task, found: dict[int, Part]) -> None:
    bad = sum(part.bad for part in found.values())
    if bad > task.max_bad:
        first = next(part for part in found.values() if part.bad)
        raise _too_bad(task, bad, *first.problems[0])
