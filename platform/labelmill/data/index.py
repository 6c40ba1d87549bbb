"""The sidecar index of a shard: where each sample lies, and a checksum of each.

`<stem of the shard>.index.arrow` is an Arrow file with a row for each sample (in a packed shard: for each block):

column                        meaning
key                           of the sample, or of the block's first sample
start, stop                   bytes of the sample in the shard, tar headers and padding included
crc32                         zlib's, of those bytes
offset.<ext>, size.<ext>      content of the member with that extension; offset -1 where there is none
rows                          packed shards only: samples of the block

With it a resumed run reads only the byte ranges it needs, a damaged sample can be told from its neighbours, and a
shard whose content hash is right needn't be parsed. It is no part of a data set's digest and can be made again at any
time, so readers do without an index that is missing or isn't the one the manifest names.
"""

from __future__ import annotations

import hashlib
import logging
import os
import zlib
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from labelmill.data import store
from labelmill.data.damage import ShardDamage
from labelmill.data.manifest import Layout, Manifest, ShardInfo, save_manifest
from labelmill.data.scan import Places, scan
from labelmill.data.structure import BLOCK_EXT, wanted_exts
from labelmill.data.tar import TarDamage
from labelmill.errors import DataError

SUFFIX = ".index.arrow"
_SHARD = b"labelmill.shard_sha256"
_OFFSET, _SIZE = "offset.", "size."
MAX_EXTS = 64
"""Most extensions that an index keeps the places of."""

_SMALL = 2**31
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ShardIndex:
    """Where the samples of a shard lie.

    Attributes:
        places: of the samples, or of a packed shard's blocks.
        crc32: uint32, checksum of each.
        rows: int64, samples of each block; None in layout tar.
    """

    places: Places
    crc32: np.ndarray
    rows: np.ndarray | None = None

    @property
    def samples(self) -> int:
        """Samples of the shard."""
        return len(self.places) if self.rows is None else int(self.rows.sum())

    @property
    def first(self) -> np.ndarray:
        """int64: number of the first sample of each entry, and of the one behind the last."""
        counts = np.ones(len(self.places), dtype=np.int64) if self.rows is None else self.rows
        return np.concatenate([[0], np.cumsum(counts)])

    def entries(self, rows: np.ndarray) -> np.ndarray:
        """Entry that holds each of the samples `rows`."""
        return rows if self.rows is None else np.searchsorted(self.first, rows, side="right") - 1

    def intact(self, data: memoryview, start: int, entry: int) -> bool:
        """Whether the bytes of an entry are right, in a buffer that begins at byte `start` of the shard."""
        lo, hi = int(self.places.start[entry]) - start, int(self.places.stop[entry]) - start
        return lo >= 0 and hi <= len(data) and zlib.crc32(data[lo:hi]) == int(self.crc32[entry])


def build_index(data: pa.Buffer, layout: Layout, where: str) -> ShardIndex:
    """The index of a shard's content. Raises TarDamage or ShardDamage when it can't be parsed."""
    view = memoryview(data).cast("B")
    places = scan(view, where)
    spans = zip(places.start.tolist(), places.stop.tolist(), strict=True)
    crc32 = np.array([zlib.crc32(view[a:z]) for a, z in spans], dtype=np.uint32)
    rows = None
    if layout == "packed":
        offset, size = places.member((BLOCK_EXT,))
        try:
            blocks = (data.slice(a, n) for a, n in zip(offset.tolist(), size.tolist(), strict=True))
            rows = np.array([pa.ipc.open_stream(block).read_all().num_rows for block in blocks], dtype=np.int64)
        except (pa.ArrowException, OSError, IndexError) as error:
            raise ShardDamage.of(where, f"a block can't be read ({error})") from None
    return ShardIndex(places, crc32, rows)


def index_bytes(index: ShardIndex, sha256: str, exts: Collection[str] | None = None) -> pa.Buffer:
    """The index of the shard with content hash `sha256` as an Arrow file, with the places of `exts` (None: all)."""
    places = index.places
    kind = np.int32 if not len(places) or places.stop[-1] < _SMALL else np.int64
    columns = {"key": places.keys, "start": places.start.astype(kind), "stop": places.stop.astype(kind)}
    columns["crc32"] = index.crc32
    for ext, (offset, size) in places.members.items():
        if exts is not None and ext not in exts:
            continue
        columns[_OFFSET + ext], columns[_SIZE + ext] = offset.astype(kind), size.astype(kind)
    if index.rows is not None:
        columns["rows"] = index.rows
    table = pa.table(columns).replace_schema_metadata({_SHARD: sha256.encode()})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def parse_index(data: pa.Buffer, shard: ShardInfo, layout: Layout) -> ShardIndex | None:
    """The index in an Arrow file; None when it isn't one, or not one of this shard."""
    try:
        table = pa.ipc.open_file(data).read_all()
        table.validate(full=True)
        if (table.schema.metadata or {}).get(_SHARD) != shard.sha256.encode():
            return None
        numbers = {n: _int64(table, n) for n in table.column_names if n not in ("key", "crc32")}
        keys = table.column("key").cast(pa.string()).combine_chunks()
        crc32 = table.column("crc32").to_numpy()
        members = {n: (numbers[_OFFSET + n], numbers[_SIZE + n]) for n in _extensions(table)}
        end = int(numbers["stop"][-1]) if len(keys) else 0
        places = Places(_one(keys), numbers["start"], numbers["stop"], members, True, end)
        index = ShardIndex(places, crc32, numbers["rows"] if layout == "packed" else None)
    except (pa.ArrowException, KeyError, OSError):
        return None
    return index if index.samples == shard.samples else None


def _extensions(table: pa.Table) -> list[str]:
    return [n.removeprefix(_OFFSET) for n in table.column_names if n.startswith(_OFFSET)]


def _int64(table: pa.Table, name: str) -> np.ndarray:
    return table.column(name).to_numpy().astype(np.int64)


def _one(keys: pa.Array | pa.ChunkedArray) -> pa.Array:
    return keys if isinstance(keys, pa.Array) else pa.concat_arrays(keys.chunks or [pa.array([], pa.string())])


def read_index(manifest: Manifest, i: int) -> ShardIndex | None:
    """The index of shard `i`; None when there is none, or not the one that the manifest names (logged).

    Raises DataError when the place can't be read.
    """
    info, path = manifest.shards[i], manifest.index_path(i)
    if path is None:
        return None
    try:
        data = store.read_bytes(path)
    except DataError:
        if store.exists(path):
            raise
        _log.warning("%s: the index of a shard is missing; reading the whole shard. Make it with `data index`.", path)
        return None
    index = None
    if hashlib.sha256(data).hexdigest() == info.index_sha256:
        index = parse_index(data, info, manifest.layout)
    if index is not None and not all(
        any(e in index.places.members for e in a) for a in wanted_exts(manifest, i).values()
    ):
        index = None  # made for other fields
    if index is None:
        _log.warning("%s: not the index that the manifest names; reading the whole shard.", path)
    return index


def plan_ranges(index: ShardIndex, entries: np.ndarray, total: int, gap: int) -> list[tuple[int, int]] | None:
    """Byte ranges that hold `entries` (sorted); ranges nearer than `gap` bytes become one.

    None when they are most of the `total` bytes: then the whole shard is the better read.
    """
    start, stop = index.places.start[entries], index.places.stop[entries]
    if not len(entries):
        return []
    cut = np.flatnonzero(start[1:] - stop[:-1] > gap)
    lo, hi = start[np.concatenate([[0], cut + 1])], stop[np.concatenate([cut, [len(entries) - 1]])]
    if int((hi - lo).sum()) > 0.6 * total:
        return None
    return list(zip(lo.tolist(), hi.tolist(), strict=True))


# --- making indexes ------------------------------------------------------------------------------------


def add_indexes(manifest: Manifest) -> Manifest:
    """Writes the indexes that a data set lacks beside its manifest, and the manifest anew. See `ensure`."""
    return save_manifest(ensure(manifest, manifest.root), manifest.root)


def index_names(shards: list[str]) -> list[str]:
    """A file name for the index of each shard path; shards of one name in several folders get a number."""
    names: list[str] = []
    taken: set[str] = set()
    for i, path in enumerate(shards):
        stem = os.path.basename(path).removesuffix(".tar")
        name = f"{stem}{SUFFIX}" if f"{stem}{SUFFIX}" not in taken else f"{stem}.{i}{SUFFIX}"
        taken.add(name)
        names.append(name)
    return names


def ensure(manifest: Manifest, folder: str | os.PathLike[str]) -> Manifest:
    """The same data set with an index for each shard.

    Indexes that are missing are written into `folder` (several processes may do so at once); those that lie there
    already are taken. The manifest itself isn't saved.

    Raises ShardDamage for a shard that isn't what the manifest says, DataError when something can't be read or written.
    """
    place = store.normal(folder)
    inside = manifest._root == place
    names = index_names([shard.path for shard in manifest.shards])
    shards = []
    for i, info in enumerate(manifest.shards):
        if info.index is not None and read_index(manifest, i) is not None:
            shards.append(info)
            continue
        path = store.join(place, names[i])
        data = _index_there(path, info, manifest.layout)
        if data is None:
            exts = {ext for alternatives in wanted_exts(manifest, i).values() for ext in alternatives}
            data = index_bytes(_build_checked(manifest, i), info.sha256, exts)
            store.write_bytes(path, data)
        digest = hashlib.sha256(data).hexdigest()
        shards.append(info.model_copy(update={"index": names[i] if inside else path, "index_sha256": digest}))
    made = manifest.model_copy(update={"shards": tuple(shards)})
    return made.at(manifest.root)


def _index_there(path: str, info: ShardInfo, layout: Layout) -> pa.Buffer | None:
    if not store.exists(path):
        return None
    data = store.read_bytes(path)
    return data if parse_index(data, info, layout) is not None else None


def _build_checked(manifest: Manifest, i: int) -> ShardIndex:
    info, path = manifest.shards[i], manifest.shard_path(i)
    data = store.read_bytes(path)
    if hashlib.sha256(data).hexdigest() != info.sha256:
        raise ShardDamage.of(path, "the content changed since it was written (its sha256 differs)")
    try:
        index = build_index(data, manifest.layout, path)
    except TarDamage as damage:
        raise ShardDamage.of(path, damage.reason, damage.offset) from None
    if index.samples != info.samples:
        raise ShardDamage.of(path, "wrong number of samples", found=index.samples, expected=info.samples)
    return index
