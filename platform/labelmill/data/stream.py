"""A rank's view of a stream: batches of decoded samples with labels, in an order fixed by the plan.

Threads run ahead: one fetches, others decode and prepare whole batches, so the training step finds its batch ready. The
cursor is not kept here: readers run ahead, and only the step that used a batch commits it.

Shape legend: B samples of the rank's slice of a global batch.
"""

from __future__ import annotations

import contextlib
import json
import queue
import sys
import threading
from collections import Counter
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from labelmill.data.decode import binary_views, decode_column, image_decoder
from labelmill.data.labels import Labels, labels_from_table
from labelmill.data.plan import padded_share, share
from labelmill.data.reading import POSITION, STATS
from labelmill.data.shards import HOLE
from labelmill.data.source import BatchSource
from labelmill.data.spec import AnySpec
from labelmill.encoders.hashing import sample_keys
from labelmill.errors import DataError

_KEPT = 16

Prepare = Callable[[Any, Labels, np.ndarray | None], Any]
"""Encoder side of decoding: field values (see `decode_column`: text, uint8 images (B, H, W, C), ...), the labels and, for
augmentation, a uint64 key per sample -> tensors, on the CPU."""

Join = Callable[[list[str], torch.Tensor], dict[str, Any]]
"""What is kept beside the shards, found by sample key: keys and weights (B,) -> columns by name."""


@dataclass
class Batch:
    """A rank's slice of one global batch.

    Attributes:
        keys: sample keys, B.
        inputs: what the encoder's `prepare` made of the field.
        labels: of the B samples.
        weight_B: float32; 0 marks a hole (a sample that could not be decoded) or padding.
        positions_B: int64, place in the stream.
        columns: further columns of the shards by name, as numpy arrays or lists; and what `join` gave.
    """

    keys: list[str]
    inputs: Any
    labels: Labels
    weight_B: torch.Tensor
    positions_B: torch.Tensor
    columns: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.keys)

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> Batch:
        """The batch on `device`; floating inputs become `dtype` when given."""
        inputs = _move(self.inputs, device, dtype)
        labels = self.labels.to(device)
        return Batch(self.keys, inputs, labels, self.weight_B.to(device), self.positions_B.to(device), self.columns)


def _move(value: Any, device: torch.device, dtype: torch.dtype | None) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device, dtype if dtype and value.is_floating_point() else None)
    if isinstance(value, dict):
        return {k: _move(v, device, dtype) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_move(v, device, dtype) for v in value)
    return value


class Memory:
    """Batch arrays that are used again once nothing refers to them: fresh pages cost more than half of decoding."""

    def __init__(self) -> None:
        self._arrays: list[np.ndarray] = []
        self._lock = threading.Lock()

    def take(self, shape: tuple[int, ...]) -> np.ndarray:
        """A uint8 array with any content. It is the caller's until the last reference to it (or a view) is gone."""
        with self._lock:
            for array in self._arrays:
                # the list, the loop variable and the argument of getrefcount
                if array.shape == shape and sys.getrefcount(array) == 3:
                    return array
            self._arrays = [array for array in self._arrays if sys.getrefcount(array) > 3][-_KEPT:]
            self._arrays.append(np.empty(shape, np.uint8))
            return self._arrays[-1]


@dataclass
class ReadStats:
    """What this rank saw of its stream's reading; over all ranks each window counts once.

    Attributes:
        samples: rows of this rank's batches, padding left out.
        fetch_seconds, bytes: of the windows whose first sample came to this rank.
        retries: of storage requests, by reason.
        damage: [shard, byte offset, key, reason] of damaged places (at most 20 a shard).
    """

    samples: int = 0
    fetch_seconds: float = 0.0
    bytes: int = 0
    retries: Counter[str] = field(default_factory=Counter)
    damage: list[list[Any]] = field(default_factory=list)

    def add(self, table: pa.Table) -> None:
        """Takes the note of a block's first row."""
        note = (table.schema.metadata or {}).get(STATS)
        if note is None or not table.num_rows:
            return
        found = json.loads(note)
        self.fetch_seconds += found["fetch_seconds"]
        self.bytes += found["bytes"]
        self.retries.update(found["retries"])
        self.damage += found["damage"]


class RankStream:
    """Iterates a rank's batches, prepared ahead by threads; order and content don't depend on their number.

    Args:
        spec: the stream.
        source: where rows come from.
        rank, world: whose slice of each global batch.
        prepare: the encoder's CPU side; never called twice at once.
        augment: pass per-sample randomness to `prepare`; keyed by position, so equal for any number of workers.
        ahead: batches prepared in advance.
        threads: that decode and prepare whole batches side by side; `spec.reading.threads` goes first.
        on_bad: called with the (key, reason) pairs of holes.
        join: further columns of a batch; never called twice at once, nor while `prepare` is.

    Decoded images handed to `prepare` lie in memory that is used again when nothing refers to it any more.

    Raises (from iteration): DataError when a shard is damaged or more samples are bad than the stream allows.
    """

    def __init__(
        self,
        spec: AnySpec,
        source: BatchSource,
        rank: int,
        world: int,
        prepare: Prepare,
        augment: bool = False,
        ahead: int = 2,
        threads: int = 1,
        on_bad: Callable[[list[tuple[str, str]]], None] | None = None,
        join: Join | None = None,
    ) -> None:
        self.spec = spec
        self.stats = ReadStats()
        self._source, self._prepare, self._augment, self._on_bad = source, prepare, augment, on_bad
        self._join = join
        self._rank, self._world = rank, world
        self._threads = spec.reading.threads or threads
        self._ahead = max(ahead, self._threads)
        self._preparing = threading.Lock()
        self._memory = Memory()
        self._images = image_decoder(spec.reading.image_decoder)

    def __iter__(self) -> Generator[Batch, None, None]:
        # a slot for each batch that is under way or waits
        ready: queue.Queue[Future[Batch] | None] = queue.Queue(maxsize=self._ahead)
        stop = threading.Event()
        pool = ThreadPoolExecutor(self._threads, thread_name_prefix="stream-decode")

        def offer(item: Future[Batch] | None) -> bool:
            while not stop.is_set():
                with contextlib.suppress(queue.Full):
                    ready.put(item, timeout=0.2)
                    return True
            return False

        def fetch() -> None:
            try:
                for step in range(self.spec.steps):
                    parts = self._source.pieces(step)
                    if parts is None or not offer(pool.submit(self._batch, parts, step)):
                        break
                offer(None)
            except BaseException as error:
                failed: Future[Batch] = Future()
                failed.set_exception(error)
                offer(failed)

        threading.Thread(target=fetch, name="stream-fetch", daemon=True).start()
        try:
            while (item := ready.get()) is not None:
                yield item.result()
        finally:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            self._source.close()

    def _batch(self, parts: list[list[pa.Table]], step: int) -> Batch:
        spec = self.spec
        tables = [table for part in parts for table in part]
        for table in tables:
            self.stats.add(table)
        lo, hi = share(*spec.batch_range(step), self._rank, self._world)
        first, last = padded_share(*spec.batch_range(step), self._rank, self._world)
        order = spec.split(first, last)[1]
        positions_B = np.arange(first, last)
        # rows outside the share are padding for a batch smaller than the world
        weight_B = ((positions_B >= lo) & (positions_B < hi)).astype(np.float32)
        self.stats.samples += hi - lo
        small = pa.concat_tables([t.drop_columns([spec.field]) if spec.field else t for t in tables])
        small = small if order is None else small.take(pa.array(order))
        keys = small.column("key").to_pylist()
        labels = labels_from_table(small, spec.label)
        bad = _holes(small, keys)
        inputs: Any = None
        if spec.field:
            raw, valid_B, undecodable = self._decode(tables, small, keys, order)
            weight_B[~valid_B] = 0.0
            bad += undecodable
            keys_B = sample_keys(spec.seed, 0, positions_B) if self._augment else None
            with self._preparing:
                inputs = self._prepare(raw, labels, keys_B)
        else:
            weight_B[~small.column(HOLE).is_null().to_numpy()] = 0.0
        if bad:
            self._note_bad(bad)
        known = {"key", POSITION, HOLE, "label", "label_weight", "label_negative"}
        extra = {name: small.column(name).to_pylist() for name in small.column_names if name not in known}
        weights = torch.from_numpy(weight_B)
        if self._join:
            with self._preparing:
                extra |= self._join(keys, weights)
        return Batch(keys, inputs, labels, weights, torch.from_numpy(positions_B), extra)

    def _decode(
        self, tables: list[pa.Table], small: pa.Table, keys: list[str], order: np.ndarray | None
    ) -> tuple[Any, np.ndarray, list[tuple[str, str]]]:
        spec, field_spec = self.spec, self.spec.field_spec
        columns = [table.column(spec.field) for table in tables]
        skip_B = ~small.column(HOLE).is_null().to_numpy(zero_copy_only=False)
        if field_spec is not None and field_spec.kind == "image":
            if pa.types.is_fixed_size_list(columns[0].type):
                return self._decoded(tables, order), ~skip_B, []
            views = [view for column in columns for view in binary_views(column)]
            views = views if order is None else [views[i] for i in order]
            return self._images(views, keys, spec.image_size, spec.channels, skip_B, self._memory.take)
        column = pa.chunked_array([chunk for column in columns for chunk in column.chunks], columns[0].type)
        column = column if order is None else column.take(pa.array(order))
        assert field_spec is not None
        return decode_column(column, field_spec, keys, skip_B=skip_B)

    def _decoded(self, tables: list[pa.Table], order: np.ndarray | None) -> np.ndarray:
        """Images that a task has decoded: one copy, out of the object store's read-only memory."""
        field_name = self.spec.field
        shapes = {table.schema.field(field_name).metadata[b"shape"] for table in tables}
        if len(shapes) > 1:
            raise DataError(
                f"data set {self.spec.name!r}: images differ in size ({' and '.join(s.decode() for s in sorted(shapes))}). "
                "Give a size that every image is resized to (image_size)."
            )
        rows = sum(table.num_rows for table in tables)
        out = self._memory.take((rows, *json.loads(shapes.pop())))
        flat, place = out.reshape(rows, -1), 0
        target = None if order is None else np.argsort(order)
        for table in tables:
            for chunk in table.column(field_name).chunks:
                images = chunk.flatten().to_numpy().reshape(len(chunk), -1)
                where = slice(place, place + len(chunk)) if target is None else target[place : place + len(chunk)]
                flat[where] = images
                place += len(chunk)
        return out

    def _note_bad(self, bad: list[tuple[str, str]]) -> None:
        if self._on_bad:
            self._on_bad(bad)
        total = self._source.report_bad(bad)
        if total > self.spec.max_bad_samples:
            key, reason = bad[0]
            raise DataError(
                f"data set {self.spec.name!r}: sample {key!r} can't be used: {reason}. {total} bad "
                f"sample(s) so far, the job allows {self.spec.max_bad_samples}. Repair the data, or raise "
                "data.max_bad_samples to let such samples become holes that are counted and named in the report."
            )


def _holes(table: pa.Table, keys: list[str]) -> list[tuple[str, str]]:
    holes = table.column(HOLE)
    if holes.null_count == len(holes):
        return []
    return [(key, reason) for key, reason in zip(keys, holes.to_pylist(), strict=True) if reason is not None]
