"""The Ray Data source over a manifest and the coordinator that hands its blocks to ranks.

Own datasource, because Ray's tar reader loses rows silently on damaged shards; own hand-over, because
`streaming_split` drops the tail and keeps no order. A read task serves one window of the plan, in order. The
coordinator iterates the ordered blocks and gives each rank references to its slice of every global batch; rows go
from the object store to the rank and never pass through the coordinator.
"""

from __future__ import annotations

import collections
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from labelmill.data.labels import check_labels
from labelmill.data.manifest import Manifest
from labelmill.data.plan import Plan, Window, padded_share
from labelmill.data.shards import read_shard
from labelmill.errors import DataError

POSITION = "__position__"
_BLOCK_BYTES = 8 << 20
_BREATH_S = 0.05


@dataclass(frozen=True)
class StreamSpec:
    """A stream: which samples in which order, in which global batches. Picklable and independent of the workers.

    Attributes:
        manifest: the shards.
        field: the manifest field an encoder reads; empty for labels only.
        global_batch: samples of one global batch, over all workers.
        start, stop: positions `[start, stop)`; stop None is one epoch.
        seed, window, shuffle: of the plan.
        image_size, channels: images are resized to `image_size` (None keeps them) and converted to `channels`.
        max_bad_samples: undecodable samples that become holes (weight 0) before the run stops; 0 stops at the first.
        verify: re-hash each shard as it is read.
    """

    manifest: Manifest
    field: str
    global_batch: int
    start: int = 0
    stop: int | None = None
    seed: int = 0
    window: int = 8
    shuffle: bool = True
    image_size: int | None = None
    channels: int = 3
    max_bad_samples: int = 0
    verify: bool = True

    def __post_init__(self) -> None:
        if self.field and self.field not in self.manifest.fields:
            known = ", ".join(self.manifest.fields)
            raise DataError(f"data set {self.manifest.name!r} has no field {self.field!r}; it has: {known}.")

    @property
    def plan(self) -> Plan:
        """The order of the stream."""
        counts = tuple(shard.samples for shard in self.manifest.shards)
        return Plan(counts, self.seed, self.window, self.shuffle)

    @property
    def end(self) -> int:
        """One past the last position."""
        return self.manifest.num_samples if self.stop is None else self.stop

    @property
    def steps(self) -> int:
        """Global batches, the last one may be smaller."""
        return -(-(self.end - self.start) // self.global_batch)

    @property
    def digest(self) -> str:
        """Identity of the order: a cursor belongs to one digest."""
        return self.plan.digest(self.manifest.digest)

    def after(self, cursor: int) -> StreamSpec:
        """The same stream from position `cursor` on."""
        return replace(self, start=cursor)

    def batch_range(self, step: int) -> tuple[int, int]:
        """Positions `[lo, hi)` of global batch `step`, counted from `start`."""
        lo = self.start + step * self.global_batch
        return lo, min(self.end, lo + self.global_batch)


def read_window(spec: StreamSpec, window: Window) -> pa.Table:
    """The window's samples at positions inside `[spec.start, spec.end)`, in plan order, with a position column."""
    lo, hi = max(spec.start, window.start) - window.start, min(spec.end, window.stop) - window.start
    rows = spec.plan.rows(window)[lo:hi]
    counts = np.array([spec.manifest.shards[i].samples for i in window.shards])
    first = np.concatenate([[0], np.cumsum(counts)])
    shard_of_row = np.searchsorted(first, rows, side="right") - 1
    needed = np.unique(shard_of_row)
    tables, new_first, at = [], np.zeros(len(counts), dtype=np.int64), 0
    for i in needed:
        table = read_shard(spec.manifest, window.shards[i], verify=spec.verify)
        check_labels(table, spec.manifest.label, where=spec.manifest.shard_path(window.shards[i]))
        wanted = [c for c in table.column_names if c not in spec.manifest.fields or c == spec.field]
        tables.append(table.select(wanted))
        new_first[i] = at
        at += table.num_rows
    table = pa.concat_tables(tables)
    table = table.take(pa.array(rows - first[shard_of_row] + new_first[shard_of_row]))
    return table.append_column(POSITION, pa.array(np.arange(window.start + lo, window.start + hi)))


def _block_rows(spec: StreamSpec) -> int:
    """Rows of an emitted block: whole global batches, about `_BLOCK_BYTES`, so that a block is a few hand-overs."""
    mean = sum(s.bytes for s in spec.manifest.shards) / max(1, spec.manifest.num_samples)
    return spec.global_batch * max(1, int(_BLOCK_BYTES / max(1.0, mean * spec.global_batch)))


def read_blocks(spec: StreamSpec, window: Window) -> Iterator[pa.Table]:
    """`read_window` cut into blocks."""
    table, rows = read_window(spec, window), _block_rows(spec)
    for lo in range(0, table.num_rows, rows):
        # combine_chunks makes a block own its bytes: a slice would ship the whole window with every block
        yield table.slice(lo, rows).combine_chunks()


def ordered_blocks(spec: StreamSpec, read_cpus: float) -> Iterator[tuple[Any, int]]:
    """Runs the stream's read tasks on Ray Data; yields (block reference, rows) in plan order."""
    import ray.data
    from ray.data._internal.execution.execution_callback import ExecutionCallback
    from ray.data.block import BlockMetadata
    from ray.data.datasource import Datasource, ReadTask

    windows = list(spec.plan.windows(spec.start, spec.end))

    class PlanSource(Datasource):
        def estimate_inmemory_data_size(self) -> int | None:
            return None

        def get_read_tasks(
            self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
        ) -> list[ReadTask]:
            def task(window: Window) -> Callable[[], Iterator[pa.Table]]:
                return lambda: read_blocks(spec, window)

            unknown = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
            return [ReadTask(task(window), unknown) for window in windows]

    class Breather(ExecutionCallback):
        """Pauses Ray's scheduling loop while finished blocks wait for the consumer.

        A task whose output is held back by backpressure is always `ready`, so the loop would spin and take most of a core
        from the workers.
        """

        def on_execution_step(self, executor: Any) -> None:
            if not executor._consumer_idling():
                time.sleep(_BREATH_S)

    context = ray.data.DataContext.get_current()
    context.custom_execution_callback_classes = [Breather]
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # Ray merges and then cuts blocks to this size; one emitted block is the size that costs least
    context.target_max_block_size = 4 * _BLOCK_BYTES
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    dataset = ray.data.read_datasource(
        PlanSource(), override_num_blocks=len(windows), ray_remote_args={"num_cpus": read_cpus, "max_retries": 3}
    )
    for bundle in dataset.iter_internal_ref_bundles():
        for entry in bundle.blocks:
            ref, metadata = (entry.ref, entry.metadata) if hasattr(entry, "ref") else entry[:2]
            yield ref, metadata.num_rows


class Coordinator:
    """Actor (no CPU reserved): one ordered execution of a stream, shared by the ranks of a worker group."""

    def __init__(self, spec: StreamSpec, world: int, read_cpus: float) -> None:
        self._spec, self._world = spec, world
        self._blocks = ordered_blocks(spec, read_cpus) if spec.steps else iter(())
        self._open: collections.deque[list[Any]] = collections.deque()  # [reference, next row, rows]
        self._ready: dict[int, tuple[list[tuple[Any, int, int]], int]] = {}  # step -> pieces, ranks yet to come
        self._next = 0
        self._bad: dict[str, str] = {}

    def _fill(self) -> None:
        lo, hi = self._spec.batch_range(self._next)
        pieces, missing = [], hi - lo
        while missing:
            if not self._open:
                ref, rows = next(self._blocks)
                self._open.append([ref, 0, rows])
            block = self._open[0]
            taken = min(missing, block[2] - block[1])
            pieces.append((block[0], block[1], block[1] + taken))
            block[1] += taken
            missing -= taken
            if block[1] == block[2]:
                self._open.popleft()
        self._ready[self._next] = (pieces, self._world)
        self._next += 1

    def fetch(self, step: int, rank: int) -> list[tuple[list[Any], int, int]] | None:
        """Rank's slice of global batch `step` as ([block reference], from, to); None past the end."""
        if step >= self._spec.steps:
            return None
        while step >= self._next:
            self._fill()
        pieces, left = self._ready[step]
        start, stop = self._spec.batch_range(step)
        lo, hi = padded_share(0, stop - start, rank, self._world)
        mine, offset = [], 0
        for ref, a, z in pieces:
            x, y = max(lo, offset), min(hi, offset + z - a)
            if x < y:
                # inside a list the reference stays a reference when the answer travels
                mine.append(([ref], a + x - offset, a + y - offset))
            offset += z - a
        if left == 1:
            del self._ready[step]
        else:
            self._ready[step] = (pieces, left - 1)
        return mine

    def report_bad(self, bad: list[tuple[str, str]]) -> int:
        """Adds undecodable samples (key, reason); returns how many distinct ones the stream has met so far."""
        self._bad.update(bad)
        return len(self._bad)
