"""Reading shards: one read per shard or byte range, checked against the manifest, as an Arrow table.

Two layouts, both valid tars that WebDataset reads as well:

tar      one member per field and sample, `<key>.<ext>`; labels in `<key>.cls` (ASCII integer, single labels) or
         `<key>.labels.json` (other forms: an object with the names of the label columns)
packed   one member per block of samples, `<first key>.arrow`, an Arrow IPC stream with the columns of the table: for
         small samples, where two tar headers would outweigh the content

A shard that isn't what the manifest says is an error or holes (see `open_shard`), never a shorter shard. `open_shard`
gives the fetched bytes with the places of the samples in them, `gather` makes a table of samples of several shards;
payload is copied once, by `gather`.

Shape legend: N samples of a shard, K rows at hand, J samples gathered.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from labelmill.data import store
from labelmill.data.cache import ShardCache
from labelmill.data.damage import WHOLE_SHARD, Damage, Policy, ShardDamage
from labelmill.data.fetch import Content, Verify, fetch_ranges, fetch_whole
from labelmill.data.index import ShardIndex, plan_ranges, read_index
from labelmill.data.labels import count_labels
from labelmill.data.manifest import Manifest
from labelmill.data.overlay_reading import read_overlay
from labelmill.data.rows import Bad, Request, Rows, damage_of, empty_rows, rows_of_packed, rows_of_tar
from labelmill.data.scan import Places
from labelmill.data.spans import Spans, column_of, concat_spans
from labelmill.data.structure import (
    BLOCK_EXT,
    block_schema,
    certain_blocks,
    certain_samples,
    locate,
    read_block,
    read_blocks,
)

__all__ = [
    "HOLE",
    "WHOLE_SHARD",
    "Damage",
    "Policy",
    "Shard",
    "ShardDamage",
    "gather",
    "label_counts",
    "open_shard",
    "read_labels",
    "read_shard",
]

HOLE = "__hole__"
"""Column of `gather`: null for a sample that is fine, else why it is a hole."""

_GAP_LOCAL, _GAP_REMOTE = 64 << 10, 1 << 20  # bytes that are cheaper to read than to skip


@dataclass
class Shard:
    """A fetched shard, or the ranges of it that were asked for. It holds the bytes; nothing is copied out of them.

    Attributes:
        path: of the shard.
        num_rows: N by the manifest, holes included.
        damage: the holes; empty unless the policy allows them. Damage of every row alike is one entry (`WHOLE_SHARD`).
        schema: columns of the tables that `gather` makes, without `HOLE`.
    """

    path: str
    num_rows: int
    damage: list[Damage]
    schema: pa.Schema
    _rows: Rows

    def places(self, row: np.ndarray) -> np.ndarray:
        """Numbers among the rows at hand of the samples `row`. Raises IndexError for one that wasn't fetched."""
        number = self._rows.number
        if len(number) == self.num_rows:
            found, wrong = row, (row < 0) | (row >= self.num_rows)
        else:
            found = np.searchsorted(number, row)
            wrong = (found == len(number)) | (number[np.minimum(found, len(number) - 1)] != row)
        if wrong.any():
            raise IndexError(
                f"{self.path}: row {int(row[int(np.argmax(wrong))])} isn't among the rows that were opened"
            )
        return found


def open_shard(
    manifest: Manifest,
    i: int,
    *,
    rows: np.ndarray | None = None,
    fields: Sequence[str] | None = None,
    verify: Verify = True,
    policy: Policy = "raise",
    cache: ShardCache | None = None,
) -> Shard:
    """Fetches and checks shard `i`.

    Args:
        manifest: the data set.
        i: index of the shard.
        rows: samples wanted; None for all. With a sidecar index only the byte ranges that hold them are read, and each
            sample's crc32 is compared; otherwise, or when they are most of the shard, the whole shard is.
        fields: fields wanted; None for all. Keys and labels always come.
        verify: compare the content of a whole shard with the manifest's sha256 (in ranges: with the crc32 of the index);
            "first" hashes a local file only if this process hasn't yet found the same file (path, size, time, inode)
            right. Size, structure and count are compared in any case.
        policy: "raise": the first damage raises. "shard": a damaged, changed or missing shard becomes N holes; it is
            read whole even if `rows` are given, so that what is a hole doesn't depend on them. "sample": what can be
            proved good is kept, the rest becomes holes, and no sample changes its place. Proof is the crc32 of the
            index; without one, the structure around a single place of damage.
        cache: whole remote shards are read through it.

    Raises:
        ShardDamage (a DataError): under policy "raise", a shard that is missing, cut, damaged, changed, or holds a
            sample that can't be read; names the shard, the byte offset, samples found and expected, the first sample
            concerned where it can be told.
        DataError: the place can't be read (under every policy), or the label overlay doesn't belong to the shard.
    """
    names = tuple(manifest.fields) if fields is None else tuple(n for n in manifest.fields if n in set(fields))
    request = Request(manifest, i, names, verify, policy)
    asked = None if rows is None else np.unique(np.asarray(rows, dtype=np.int64))
    note: ShardDamage | None = None
    try:
        found = None if asked is None or policy == "shard" else _from_ranges(request, asked)
        if found is None:
            content = fetch_whole(manifest, i, verify, cache)
            found, note = _from_whole(request, content)
    except ShardDamage as damage:
        if policy == "raise":
            raise
        found = _quarantined(request, damage)
    damage_list = damage_of(request, found, asked)
    if note is not None and not found.bad:  # something is wrong, but no sample
        damage_list = [Damage(request.path, WHOLE_SHARD, "", note.reason, note.offset)]
    wanted = [f for f in manifest.schema if f.name not in manifest.fields or f.name in names]
    return Shard(request.path, request.samples, damage_list, pa.schema(wanted), found)


def gather(shards: Sequence[Shard], which: np.ndarray, row: np.ndarray) -> pa.Table:
    """Samples of several shards as one table.

    Args:
        shards: opened with the same fields.
        which, row: integers (J,): sample j is row `row[j]` of `shards[which[j]]`.

    Returns a table of J rows with the shards' columns (contiguous; several chunks only above 2 GiB) and the string column
    `HOLE`. Holes have empty content (arrays of fixed shape: zeros) and label 0 or an empty list. Raises IndexError for
    a row that wasn't opened.
    """
    if not shards:
        raise ValueError("gather needs at least one shard, to know the columns")
    which, row = np.asarray(which, dtype=np.int64), np.asarray(row, dtype=np.int64)
    if len(which) and not (which.min() >= 0 and which.max() < len(shards)):
        raise IndexError(f"`which` runs from {which.min()} to {which.max()}, but there are {len(shards)} shards")
    counts = [len(s._rows.number) for s in shards]
    first = np.cumsum([0, *counts])
    if len(shards) == 1:
        place = shards[0].places(row)
    else:
        place = np.empty(len(row), dtype=np.int64)
        for s, shard in enumerate(shards):
            mine = np.flatnonzero(which == s)
            place[mine] = first[s] + shard.places(row[mine])
    indices = pa.array(place)
    schema = shards[0].schema
    parts = [s._rows for s in shards]
    columns: dict[str, pa.Array | pa.ChunkedArray] = {}
    for column in schema:
        if column.name in parts[0].fields:
            spans = concat_spans([p.fields[column.name] for p in parts]).take(place)
            columns[column.name] = column_of(spans, column.type)
        elif column.name == "key":
            columns["key"] = pa.concat_arrays([p.keys for p in parts]).take(indices)
        else:
            columns[column.name] = pa.concat_arrays([p.labels[column.name] for p in parts]).take(indices)
    columns[HOLE] = _hole_column(parts, first, place)
    return pa.table(columns, schema=schema.append(pa.field(HOLE, pa.string())))


def _hole_column(parts: list[Rows], first: np.ndarray, place: np.ndarray) -> pa.Array:
    reasons = {int(first[p]) + k: reason for p, rows in enumerate(parts) for k, (reason, _) in rows.bad.items()}
    if not reasons:
        return pa.nulls(len(place), pa.string())
    return pa.array([reasons.get(k) for k in place.tolist()], pa.string())


def read_shard(manifest: Manifest, i: int, verify: Verify = True) -> pa.Table:
    """Shard `i` as a table with the columns of `manifest.schema`: `key`, each field, the labels.

    Args and errors as those of `open_shard` with policy "raise".
    """
    return _table(open_shard(manifest, i, verify=verify))


def read_labels(manifest: Manifest, i: int, verify: Verify = True) -> pa.Table:
    """`key` and label columns of shard `i`, from the overlay alone if there is one. See `open_shard`."""
    if manifest.shards[i].labels is not None:
        return read_overlay(manifest, i, bool(verify))
    return _table(open_shard(manifest, i, verify=verify, fields=()))


def _table(shard: Shard) -> pa.Table:
    number = np.arange(shard.num_rows)
    return gather([shard], np.zeros_like(number), number).drop_columns([HOLE])


def label_counts(manifest: Manifest, verify: Verify = True) -> np.ndarray:
    """int64 (C,): samples of each class over all shards, counted from the labels (see `count_labels`)."""
    total = np.zeros(manifest.label.num_classes or 0, dtype=np.int64)
    for i in range(len(manifest.shards)):
        total = total + count_labels(read_labels(manifest, i, verify), manifest.label)
    return total


# --- a whole shard -------------------------------------------------------------------------------------


def _from_whole(request: Request, content: Content) -> tuple[Rows, ShardDamage | None]:
    """The rows of a whole shard, and what is wrong with it if the policy lets that pass."""
    info = request.manifest.shards[request.i]
    sound = content.data.size == info.bytes and (content.trusted or content.digest is None)
    if not sound:
        if request.policy != "sample":
            raise _diagnosis(request, content)
        try:
            damage = _diagnosis(request, content)
        except ShardDamage as found:
            damage = found
        return _salvaged(request, content, damage), damage
    index = None
    if content.trusted and not store.is_uri(request.path):  # a remote index costs more than the parse it saves
        index = read_index(request.manifest, request.i)
    places = index.places if index is not None else locate(content.data, request.manifest, request.i)
    rows = _rows_of(request, content.data, places, content.trusted)
    return rows, None


def _rows_of(request: Request, data: pa.Buffer, places: Places, trusted: bool) -> Rows:
    if request.manifest.layout == "packed":
        blocks, first = [], 0
        for table in read_blocks(data, places, request.manifest, request.i, trusted):
            blocks.append((first, table))
            first += table.num_rows
        _check_count(request, first)
        return rows_of_packed(request, blocks, np.arange(first), {})
    nowhere = np.zeros(len(places), dtype=np.int64)
    if request.policy == "sample":  # with a wrong count no place in the shard is certain
        _check_count(request, len(places))
    rows = rows_of_tar(request, places, np.arange(len(places)), Spans([data], nowhere, nowhere, nowhere), {})
    _check_count(request, len(places))
    return rows


def _check_count(request: Request, found: int) -> None:
    if found != request.samples:
        raise ShardDamage.of(request.path, "wrong number of samples", found=found, expected=request.samples)


def _diagnosis(request: Request, content: Content) -> ShardDamage:
    """What is wrong with a shard whose size or hash is: the structure is looked at, to say where."""
    info, path = request.manifest.shards[request.i], request.path
    strict = Request(request.manifest, request.i, tuple(request.manifest.fields), request.verify, "raise")
    places = locate(content.data, request.manifest, request.i)
    rows = _rows_of(strict, content.data, places, trusted=False)
    if content.data.size != info.bytes:
        reason = f"{content.data.size} bytes long instead of {info.bytes}"
        return ShardDamage.of(path, reason, found=len(rows.number), expected=info.samples)
    reason = (
        f"the content changed since it was written (sha256 {(content.digest or '')[:12]}..., not {info.sha256[:12]}...)"
    )
    index = read_index(request.manifest, request.i)
    view = memoryview(content.data).cast("B")
    for entry in range(len(index.places) if index is not None else 0):
        assert index is not None
        if not index.intact(view, 0, entry):
            offset = int(index.places.start[entry])
            key = index.places.keys[entry].as_py() if index.rows is None else None  # a block holds many
            return ShardDamage.of(path, reason, offset, key, None, info.samples)
    return ShardDamage.of(path, reason, found=len(rows.number), expected=info.samples)


def _salvaged(request: Request, content: Content, damage: ShardDamage) -> Rows:
    """The rows that are certain in spite of damage; the others are holes. Raises `damage` when none is."""
    number = np.arange(request.samples)
    index = read_index(request.manifest, request.i)
    if index is not None:
        return _from_index(request, index, number, [(0, content.data)], damage.reason)
    reason = f"not certain in a damaged shard: {damage.reason}"
    if request.manifest.layout == "packed":
        blocks = certain_blocks(content.data, request.manifest, request.i, damage)
        lost = np.ones(len(number), dtype=bool)
        for first, table in blocks:
            lost[first : first + table.num_rows] = False
        bad: Bad = dict.fromkeys(np.flatnonzero(lost).tolist(), (reason, damage.offset))
        return rows_of_packed(request, blocks, number, bad)
    places, certain = certain_samples(content.data, request.manifest, request.i, damage)
    nowhere = np.zeros(len(number), dtype=np.int64)
    bad = dict.fromkeys(np.flatnonzero(~certain).tolist(), (reason, damage.offset))
    return rows_of_tar(request, places, number, Spans([content.data], nowhere, nowhere, nowhere), bad)


def _quarantined(request: Request, damage: ShardDamage) -> Rows:
    """Every sample as a hole."""
    reason = f"shard quarantined: {damage.reason}"
    keys = None
    if request.manifest.layout == "tar" and (index := read_index(request.manifest, request.i)) is not None:
        keys = index.places.keys
    return empty_rows(request, dict.fromkeys(range(request.samples), (reason, damage.offset)), keys)


# --- ranges, and whatever has an index -----------------------------------------------------------------


def _from_ranges(request: Request, asked: np.ndarray) -> Rows | None:
    """The rows `asked`, from the ranges that hold them; None when the whole shard must be read."""
    info, path = request.manifest.shards[request.i], request.path
    gap = _GAP_REMOTE if store.is_uri(path) else _GAP_LOCAL
    if info.index is None or info.bytes <= gap or len(asked) == info.samples:
        return None
    if len(asked) and (asked[0] < 0 or asked[-1] >= info.samples):
        raise IndexError(f"{path}: no row {int(asked[0] if asked[0] < 0 else asked[-1])}; it has {info.samples}")
    index = read_index(request.manifest, request.i)
    if index is None or (ranges := plan_ranges(index, np.unique(index.entries(asked)), info.bytes, gap)) is None:
        return None
    buffers = fetch_ranges(path, ranges)
    parts = [(start, data) for (start, _), data in zip(ranges, buffers, strict=True)]
    return _from_index(request, index, asked, parts, "its bytes aren't there: the shard is cut")


def _from_index(
    request: Request, index: ShardIndex, number: np.ndarray, parts: list[tuple[int, pa.Buffer]], why: str
) -> Rows:
    """The rows `number` from `parts` of the shard (byte offset, content), each entry checked by the index."""
    entries = index.entries(number)
    needed = np.unique(entries)
    starts = np.array([start for start, _ in parts], dtype=np.int64)
    part_of = np.searchsorted(starts, index.places.start[needed], side="right") - 1
    views = [memoryview(data).cast("B") for _, data in parts]
    wrong: dict[int, str] = {}
    for entry, part in zip(needed.tolist(), part_of.tolist(), strict=True):
        stop = int(index.places.stop[entry]) - int(starts[part])
        if stop > len(views[part]):
            wrong[entry] = "the shard is cut before its end"
        elif request.verify and not index.intact(views[part], int(starts[part]), entry):
            wrong[entry] = "its bytes changed since they were written (crc32 differs)"
    if wrong and request.policy != "sample":
        entry = next(iter(wrong))
        key, at = index.places.keys[entry].as_py(), int(index.places.start[entry])
        what = "block" if index.rows is not None else "sample"
        raise ShardDamage.of(request.path, f"{what} {key!r}: {wrong[entry]}", at, key, None, request.samples)
    bad: Bad = {}
    for k, entry in enumerate(entries.tolist()):
        if entry in wrong:
            bad[k] = (wrong[entry], int(index.places.start[entry]))
    buffers = [data for _, data in parts]
    if request.manifest.layout == "tar":
        mine = part_of[np.searchsorted(needed, entries)]
        where = Spans(buffers, mine, starts[mine], np.zeros(len(mine), dtype=np.int64))
        return rows_of_tar(request, index.places, number, where, bad)
    schema, first = block_schema(request.manifest, request.i), index.first
    offset, size = index.places.member((BLOCK_EXT,))
    blocks = []
    for entry, p in zip(needed.tolist(), part_of.tolist(), strict=True):
        if entry in wrong:
            continue
        raw = buffers[p].slice(int(offset[entry] - starts[p]), int(size[entry]))
        try:
            blocks.append((int(first[entry]), read_block(raw, schema, trusted=False)))
        except ValueError as error:
            reason = f"block {index.places.keys[entry].as_py()!r} can't be read ({error})"
            raise ShardDamage.of(request.path, reason, int(offset[entry]), None, None, request.samples) from None
    return rows_of_packed(request, blocks, number, bad)
