"""What a read task does: a window's shards in, blocks of samples in plan order out.

Runs in tasks on the cluster and, for small data and tests, in the process itself.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from labelmill.data import cache, store
from labelmill.data.cache import ShardCache
from labelmill.data.decode import decode_images
from labelmill.data.labels import check_labels
from labelmill.data.manifest import Manifest
from labelmill.data.plan import Window
from labelmill.data.shards import HOLE, Shard, gather, open_shard
from labelmill.data.spec import Reading, StreamSpec

POSITION = "__position__"
STATS = b"labelmill.stats"
"""Key of a block's schema metadata: JSON of what its window cost, on the window's first block only."""

_FINE = {"hit", "miss", "evicted"}  # what a cache counts and nobody needs to hear of


@dataclass(frozen=True)
class WindowRead:
    """What a read task needs, and nothing more: a manifest of a million shards doesn't travel with every task.

    Attributes:
        manifest: the window's shards alone.
        field: the field whose bytes are wanted; empty for none.
        which_S, row_S: shard (of the window) and row in it of each sample, in plan order.
        start: position of the first sample.
        block_rows: samples of a block.
        reading: how.
    """

    manifest: Manifest
    field: str
    which_S: np.ndarray
    row_S: np.ndarray
    start: int
    block_rows: int
    reading: Reading

    @property
    def stop(self) -> int:
        """One past the last position."""
        return self.start + len(self.row_S)


def plan_read(spec: StreamSpec, window: Window, lo: int, hi: int) -> WindowRead:
    """The read of a window's positions inside `[lo, hi)`."""
    lo, hi = max(lo, window.start), min(hi, window.stop)
    rows_S = spec.plan.rows(window)[lo - window.start : hi - window.start]
    shards = tuple(spec.manifest.shards[i] for i in window.shards)
    first = np.concatenate([[0], np.cumsum([shard.samples for shard in shards])])
    which_S = np.searchsorted(first, rows_S, side="right") - 1
    used, which_S = np.unique(which_S, return_inverse=True)
    row_S = rows_S - first[used][which_S]
    manifest = spec.manifest.model_copy(update={"shards": tuple(shards[i] for i in used.tolist())})
    return WindowRead(manifest, spec.field, which_S, row_S, lo, spec.block_rows, spec.reading)


def read_blocks(read: WindowRead) -> Iterator[pa.Table]:
    """The window's samples, block by block: key, label columns, the field, position, and why a row is a hole (or null).

    Raises ShardDamage or DataError, naming shard and offset, as `open_shard`.
    """
    began, before = time.perf_counter(), Counter(_trouble())
    shards = _open(read)
    met = Counter(_trouble()) - before
    stats: dict[str, Any] = {
        "fetch_seconds": time.perf_counter() - began,
        "bytes": sum(info.bytes for info in read.manifest.shards),
        "retries": dict(met),
        "damage": [[d.shard, d.offset, d.key, d.reason] for shard in shards for d in shard.damage[:20]],
    }
    for lo in range(0, len(read.row_S), read.block_rows):
        hi = min(lo + read.block_rows, len(read.row_S))
        table = gather(shards, read.which_S[lo:hi], read.row_S[lo:hi])
        holes = table.column(HOLE)
        sound = table if holes.null_count == len(table) else table.filter(holes.is_null())
        check_labels(sound, read.manifest.label, where=f"data set {read.manifest.name!r}")
        table = table.append_column(POSITION, pa.array(np.arange(read.start + lo, read.start + hi)))
        yield table if lo else table.replace_schema_metadata({STATS: json.dumps(stats)})


def _trouble() -> dict[str, int]:
    """What this process met so far and got over, by reason."""
    return store.retries() | {f"shard cache: {what}": n for what, n in cache.counts().items() if what not in _FINE}


def _open(read: WindowRead) -> list[Shard]:
    """The window's shards, remote ones at once: waiting for storage costs no CPU."""
    manifest, reading = read.manifest, read.reading
    whole = len(read.row_S) >= 0.8 * manifest.num_samples
    kept = ShardCache(reading.cache_folder, int(reading.cache_mb * 2**20)) if reading.cache_folder else None
    fields = [read.field] if read.field else []

    def open_one(i: int) -> Shard:
        rows = None if whole else np.unique(read.row_S[read.which_S == i])
        return open_shard(
            manifest, i, rows=rows, fields=fields, verify=reading.verify, policy=reading.on_damage, cache=kept
        )

    every = range(len(manifest.shards))
    if not any(store.is_uri(manifest.shard_path(i)) for i in every):
        return [open_one(i) for i in every]
    with ThreadPoolExecutor(min(8, len(every))) as pool:
        return list(pool.map(open_one, every))


def decode_block(table: pa.Table, field: str, size: int | None, channels: int) -> pa.Table:
    """A block with its images decoded: uint8 lists of H x W x C with the size in the field's metadata; new holes named."""
    images, valid_B, bad = decode_images(
        table.column(field), table.column("key").to_pylist(), size=size, channels=channels, holes=table.column(HOLE)
    )
    width = int(np.prod(images.shape[1:]))
    column = pa.FixedSizeListArray.from_arrays(pa.array(images.reshape(-1)), max(1, width))
    at = table.schema.get_field_index(field)
    shape = {b"shape": json.dumps(images.shape[1:])}
    table = table.set_column(at, pa.field(field, column.type, metadata=shape), column)
    if bad:
        reasons, why = table.column(HOLE).to_pylist(), dict(bad)
        keys = table.column("key").to_pylist()
        reasons = [r or (None if ok else why.get(k)) for r, k, ok in zip(reasons, keys, valid_B.tolist(), strict=True)]
        table = table.set_column(table.schema.get_field_index(HOLE), HOLE, pa.array(reasons, pa.string()))
    return table
