"""A rank's view of a stream: batches of decoded samples with labels, in an order fixed by the plan.

The reader runs ahead in a thread (fetch, decode, the encoder's `prepare`), so the training step finds its batch
ready. The cursor is not kept here: readers run ahead, and only the step that used a batch commits it.

Shape legend: B samples of the rank's slice of a global batch.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import torch

from labelmill.data.decode import decode_images
from labelmill.data.labels import Labels, labels_from_table
from labelmill.data.plan import padded_share, share
from labelmill.data.source import POSITION, Coordinator, StreamSpec, read_window
from labelmill.encoders.hashing import sample_keys
from labelmill.errors import DataError

Prepare = Callable[[Any, Labels, np.ndarray | None], Any]
"""Encoder side of decoding: raw field values (list of text or uint8 (B, H, W, C)), the labels and, for augmentation, a
uint64 key per sample -> tensors, on the CPU."""


@dataclass
class Batch:
    """A rank's slice of one global batch.

    Attributes:
        keys: sample keys, B.
        inputs: what the encoder's `prepare` made of the field.
        labels: of the B samples.
        weight_B: float32; 0 marks a hole (a sample that could not be decoded) or padding.
        positions_B: int64, place in the stream.
        columns: further columns of the shards by name, as numpy arrays or lists.
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


class BatchSource(Protocol):
    """Where a rank's rows come from."""

    def table(self, step: int) -> pa.Table | None:
        """Rank's rows of global batch `step`; None past the end."""

    def report_bad(self, bad: list[tuple[str, str]]) -> int:
        """Counts bad samples over all ranks; returns the total."""


class RaySource:
    """Rows through the object store, handed out by a coordinator actor."""

    def __init__(self, coordinator: Any, rank: int) -> None:
        self._coordinator, self._rank = coordinator, rank
        self._cache: dict[Any, pa.Table] = {}

    @staticmethod
    def start(spec: StreamSpec, world: int, read_cpus: float, name: str) -> Any:
        """Starts the coordinator of a stream; it lives as long as the handle that is returned."""
        import ray

        actor: Any = ray.remote(Coordinator)
        return actor.options(num_cpus=0, name=name).remote(spec, world, read_cpus)

    @staticmethod
    def find(name: str) -> Any:
        """The handle of a coordinator that another rank has started."""
        import ray

        return ray.get_actor(name)

    def table(self, step: int) -> pa.Table | None:
        import ray

        pieces = ray.get(self._coordinator.fetch.remote(step, self._rank))
        if pieces is None:
            return None
        live: dict[Any, pa.Table] = {}
        parts = []
        for (ref,), lo, hi in pieces:
            live[ref] = self._cache[ref] if ref in self._cache else ray.get(ref)
            parts.append(live[ref].slice(lo, hi - lo))
        self._cache = live
        return pa.concat_tables(parts)

    def report_bad(self, bad: list[tuple[str, str]]) -> int:
        import ray

        return ray.get(self._coordinator.report_bad.remote(bad))


class LocalSource:
    """Rows read in this process, without Ray: small data, tests, single-process tools."""

    def __init__(self, spec: StreamSpec, rank: int = 0, world: int = 1) -> None:
        self._spec, self._rank, self._world = spec, rank, world
        self._windows: dict[int, pa.Table] = {}
        self._bad: dict[str, str] = {}

    def table(self, step: int) -> pa.Table | None:
        spec = self._spec
        if step >= spec.steps:
            return None
        lo, hi = padded_share(*spec.batch_range(step), self._rank, self._world)
        parts, live = [], {}
        for window in spec.plan.windows(lo, hi):
            table = self._windows.get(window.start)
            live[window.start] = read_window(spec, window) if table is None else table
            first = max(window.start, spec.start)
            a, z = max(lo, first) - first, min(hi, window.stop) - first
            parts.append(live[window.start].slice(a, z - a))
        self._windows = live
        return pa.concat_tables(parts)

    def report_bad(self, bad: list[tuple[str, str]]) -> int:
        self._bad.update(bad)
        return len(self._bad)


class RankStream:
    """Iterates a rank's batches, reading ahead in a thread.

    Args:
        spec: the stream.
        source: where rows come from.
        rank, world: whose slice of each global batch.
        prepare: the encoder's CPU side.
        augment: pass per-sample randomness to `prepare`; keyed by position, so equal for any number of workers.
        ahead: batches prepared in advance.
        on_bad: called with the (key, reason) pairs of undecodable samples.

    Raises (from iteration): DataError when a shard is damaged or more samples are bad than the stream allows.
    """

    def __init__(
        self,
        spec: StreamSpec,
        source: BatchSource,
        rank: int,
        world: int,
        prepare: Prepare,
        augment: bool = False,
        ahead: int = 2,
        on_bad: Callable[[list[tuple[str, str]]], None] | None = None,
    ) -> None:
        self.spec = spec
        self._source, self._prepare, self._augment, self._on_bad = source, prepare, augment, on_bad
        self._rank, self._world, self._ahead = rank, world, ahead
        self.read_seconds = 0.0

    def __iter__(self) -> Iterator[Batch]:
        ready: queue.Queue[Batch | BaseException | None] = queue.Queue(maxsize=self._ahead)
        stop = threading.Event()

        def offer(item: Batch | BaseException | None) -> bool:
            while not stop.is_set():
                try:
                    ready.put(item, timeout=0.2)
                    return True
                except queue.Full:
                    continue
            return False

        def run() -> None:
            try:
                for step in range(self.spec.steps):
                    began = time.perf_counter()
                    table = self._source.table(step)
                    if table is None:
                        break
                    batch = self._batch(table, step)
                    self.read_seconds += time.perf_counter() - began
                    if not offer(batch):
                        return
                offer(None)
            except BaseException as error:
                offer(error)

        threading.Thread(target=run, name="stream-reader", daemon=True).start()
        try:
            while (item := ready.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stop.set()

    def _batch(self, table: pa.Table, step: int) -> Batch:
        spec = self.spec
        lo, hi = share(*spec.batch_range(step), self._rank, self._world)
        keys = table.column("key").to_pylist()
        positions_B = table.column(POSITION).to_numpy()
        # rows outside the share are padding for a batch smaller than the world
        weight_B = ((positions_B >= lo) & (positions_B < hi)).astype(np.float32)
        labels = labels_from_table(table, spec.manifest.label)
        inputs: Any = None
        if spec.field:
            raw, valid_B, bad = self._decode(table, keys)
            weight_B[~valid_B] = 0.0
            if bad:
                self._note_bad(bad)
            keys_B = sample_keys(spec.seed, 0, positions_B) if self._augment else None
            inputs = self._prepare(raw, labels, keys_B)
        known = {"key", POSITION, spec.field, "label", "label_weight", "label_negative"}
        extra = {name: table.column(name).to_pylist() for name in table.column_names if name not in known}
        return Batch(keys, inputs, labels, torch.from_numpy(weight_B), torch.from_numpy(positions_B.copy()), extra)

    def _decode(self, table: pa.Table, keys: list[str]) -> tuple[Any, np.ndarray, list[tuple[str, str]]]:
        spec = self.spec
        column = table.column(spec.field)
        if spec.manifest.fields[spec.field].kind == "image":
            return decode_images(column, keys, size=spec.image_size, channels=spec.channels)
        return column.to_pylist(), np.ones(len(keys), dtype=bool), []

    def _note_bad(self, bad: list[tuple[str, str]]) -> None:
        if self._on_bad:
            self._on_bad(bad)
        total = self._source.report_bad(bad)
        if total > self.spec.max_bad_samples:
            key, reason = bad[0]
            raise DataError(
                f"data set {self.spec.manifest.name!r}: sample {key!r} can't be decoded: {reason}. {total} bad "
                f"sample(s) so far, the job allows {self.spec.max_bad_samples}. Repair the sample, or raise "
                "data.max_bad_samples to let such samples become holes that are counted and named in the report."
            )
