"""What the structure of a shard says: where its samples lie, what is wrong, and what is certain in spite of damage.

Shape legend: N samples of the shard, G samples or blocks found in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from labelmill.data.damage import ShardDamage
from labelmill.data.labels import LABEL_COLUMNS
from labelmill.data.manifest import Manifest
from labelmill.data.members import label_ext
from labelmill.data.scan import Places, is_utf8, places_of, scan, split_name
from labelmill.data.tar import BLOCK, TarDamage, checksum_is, parse_tar

BLOCK_EXT = "arrow"
_RESYNC_TRIES = 64


def wanted_exts(manifest: Manifest, i: int) -> dict[str, tuple[str, ...]]:
    """Extensions of the members that a sample of shard `i` must have (any one of each), by what they are."""
    if manifest.layout == "packed":
        return {"block": (BLOCK_EXT,)}
    wanted = {f"field {name!r}": spec.exts for name, spec in manifest.fields.items()}
    if manifest.shards[i].labels is None and manifest.label.columns:
        wanted["label"] = (label_ext(manifest.label),)
    return wanted


def locate(data: pa.Buffer, manifest: Manifest, i: int) -> Places:
    """The places of shard `i`'s samples (packed: blocks).

    Raises ShardDamage with what was found: a damaged header, a cut, members that can't be grouped.
    """
    info, path = manifest.shards[i], manifest.shard_path(i)
    view = memoryview(data).cast("B")
    try:
        try:
            places = scan(view, path)
        except ShardDamage as damage:
            reason, found = damage.reason, damage.found
            raise ShardDamage.of(path, reason, damage.offset, damage.key, found, info.samples) from None
        if not places.ended and _whole(places, data, manifest, i)[0] != info.samples:
            found, key = _whole(places, data, manifest, i)
            reason = "no end-of-archive marker: cut between two members"
            raise ShardDamage.of(path, reason, places.end, key, found, info.samples)
        return places
    except TarDamage as damage:
        found, key = _whole(places_of(damage.index, path), data, manifest, i)
        if (parts := split_name(damage.name)) is not None:
            key = parts[0]
        raise ShardDamage.of(path, damage.reason, damage.offset, key, found, info.samples) from None


def _whole(places: Places, data: pa.Buffer, manifest: Manifest, i: int) -> tuple[int, str | None]:
    """How many samples are complete, and the key of the first that isn't."""
    if manifest.layout == "packed":
        try:
            return sum(t.num_rows for t in read_blocks(data, places, manifest, i)), None
        except ShardDamage as damage:
            return damage.found or 0, damage.key
    whole = np.ones(len(places), dtype=bool)
    for exts in wanted_exts(manifest, i).values():
        whole &= places.member(exts)[0] >= 0
    return int(whole.sum()), None if whole.all() else places.keys[int(np.argmin(whole))].as_py()


# --- layout "packed" -----------------------------------------------------------------------------------


def block_schema(manifest: Manifest, i: int) -> pa.Schema:
    """Columns that a block of shard `i` must have."""
    if manifest.shards[i].labels is None:
        return manifest.schema
    return pa.schema([f for f in manifest.schema if f.name not in LABEL_COLUMNS])


def read_block(raw: pa.Buffer, schema: pa.Schema, trusted: bool) -> pa.Table:
    """One block. Raises ValueError (with the reason) when it isn't an Arrow stream with these columns."""
    try:
        table = pa.ipc.open_stream(raw).read_all().select(schema.names)
        if not trusted:  # bytes nobody vouches for may hold offsets that lead anywhere
            table.validate(full=True)
        table = table if table.schema.equals(schema) else table.cast(schema)
    except (pa.ArrowException, KeyError, OSError, IndexError) as error:
        raise ValueError(str(error)) from None
    if holes := [name for name in schema.names if table.column(name).null_count]:
        raise ValueError(f"a sample has no {holes[0]}")
    return table


def read_blocks(
    data: pa.Buffer, places: Places, manifest: Manifest, i: int, trusted: bool = False
) -> Iterator[pa.Table]:
    """The blocks of a packed shard, in place. Raises ShardDamage for the first that can't be read."""
    path, schema = manifest.shard_path(i), block_schema(manifest, i)
    found = 0
    offset, size = places.member((BLOCK_EXT,))
    for b, (start, length) in enumerate(zip(offset.tolist(), size.tolist(), strict=True)):
        name = places.keys[b].as_py()
        if start < 0:
            at = int(places.start[b])
            reason = f"member {name!r} isn't an .{BLOCK_EXT} block of a packed shard"
            raise ShardDamage.of(path, reason, at, None, found, manifest.shards[i].samples)
        try:
            table = read_block(data.slice(start, length), schema, trusted)
        except ValueError as error:
            reason = f"block {name!r} can't be read ({error})"
            raise ShardDamage.of(path, reason, start, name, found, manifest.shards[i].samples) from None
        yield table
        found += table.num_rows


# --- what is certain in spite of damage ----------------------------------------------------------------
#
# One place of damage is assumed: a cut, a run of wrong bytes, a member too few or too many. Where the structure shows the
# place, samples before it keep their position counted from the front, and those behind it, if the shard has the right
# length, theirs counted from the back. The neighbours of wrong bytes are given up: the damage may reach into them.


@dataclass
class _Group:
    """Members of one key that follow each other; not `whole` when one is there twice, or the key isn't text."""

    key: str
    start: int
    stop: int
    members: dict[str, tuple[int, int]]
    whole: bool = True


@dataclass
class _Found:
    """Groups before and behind the place of damage; `located` when the structure shows one."""

    front: list[_Group]
    back: list[_Group]
    located: bool
    ended: bool


def certain_samples(data: pa.Buffer, manifest: Manifest, i: int, damage: ShardDamage) -> tuple[Places, np.ndarray]:
    """Places of all N samples of a damaged shard in layout tar, and which of them are certain (N,) bool.

    Raises `damage` when nothing is certain: bytes changed, but nothing shows where.
    """
    count = manifest.shards[i].samples
    found = _around(data, manifest.shards[i].bytes)
    exts = list(wanted_exts(manifest, i).values())
    for group in (*found.front, *found.back):
        group.whole &= all(any(e in group.members for e in alternatives) for alternatives in exts)
    if not found.located and found.ended and (len(found.front) != count or all(g.whole for g in found.front)):
        raise damage
    if len(found.front) + len(found.back) > count:
        raise damage
    at = dict(enumerate(found.front)) | {count - 1 - n: g for n, g in enumerate(reversed(found.back))}
    at = {row: group for row, group in at.items() if group.whole}
    if len({group.key for group in at.values()}) != len(at):
        raise damage
    start, stop = np.zeros(count, dtype=np.int64), np.zeros(count, dtype=np.int64)
    members = {e: (np.full(count, -1, dtype=np.int64), np.zeros(count, dtype=np.int64)) for a in exts for e in a}
    certain = np.zeros(count, dtype=bool)
    for row, group in at.items():
        certain[row], start[row], stop[row] = True, group.start, group.stop
        for ext, (offset, size) in group.members.items():
            if ext in members:
                members[ext][0][row], members[ext][1][row] = offset, size
    keys = pa.array([at[row].key if row in at else "" for row in range(count)], pa.string())
    return Places(keys, start, stop, members, True, 0), certain


def certain_blocks(data: pa.Buffer, manifest: Manifest, i: int, damage: ShardDamage) -> list[tuple[int, pa.Table]]:
    """The blocks of a damaged packed shard that are certain, each with the number of its first sample.

    Raises as `certain_samples`.
    """
    count, schema = manifest.shards[i].samples, block_schema(manifest, i)
    found = _around(data, manifest.shards[i].bytes)
    front = [_block_of(data, group, schema) for group in found.front]
    back = [_block_of(data, group, schema) for group in found.back]
    unreadable = sum(t is None for t in (*front, *back))
    if not found.located and found.ended:
        if unreadable != 1:
            raise damage
        bad = front.index(None)
        front, back = front[:bad], front[bad + 1 :]
    elif unreadable:
        raise damage
    out: list[tuple[int, pa.Table]] = []
    first, last = 0, count
    for table in front:
        assert table is not None
        out.append((first, table))
        first += table.num_rows
    for table in reversed(back):
        assert table is not None
        last -= table.num_rows
        out.append((last, table))
    if first > last or (first == last and found.ended):
        raise damage
    return sorted(out, key=lambda entry: entry[0])


def _block_of(data: pa.Buffer, group: _Group, schema: pa.Schema) -> pa.Table | None:
    if not group.whole or BLOCK_EXT not in group.members:
        return None
    try:
        table = read_block(data.slice(*group.members[BLOCK_EXT]), schema, trusted=False)
    except ValueError:
        return None
    return table if table.num_rows and table.column("key")[0].as_py() == group.key else None


def _around(data: pa.Buffer, expected_bytes: int) -> _Found:
    view = memoryview(data).cast("B")
    front, broken, ended = _walk(view, 0)
    if broken is None:
        return _Found(front, [], located=False, ended=ended)
    if broken.reason.startswith("cut") and data.size < expected_bytes:
        return _Found(front, [], located=True, ended=False)
    back = _resync(view, broken.offset) if data.size == expected_bytes else []
    return _Found(front[:-1], back[1:], located=True, ended=bool(back))


def _walk(view: memoryview, base: int) -> tuple[list[_Group], TarDamage | None, bool]:
    """Groups of the members in `view`, which begins at byte `base` of the shard, as far as they can be walked."""
    broken = None
    try:
        index = parse_tar(view)
    except TarDamage as damage:
        index, broken = damage.index, damage
    groups: list[_Group] = []
    for name, offset, size, start in zip(index.names, index.offsets, index.sizes, index.starts, strict=True):
        if (parts := split_name(name)) is None:
            continue
        key, ext = parts
        if not groups or groups[-1].key != key:
            groups.append(_Group(key, base + start, 0, {}, is_utf8(key)))
        group = groups[-1]
        group.whole &= ext not in group.members
        group.members[ext] = base + offset, size
        group.stop = base + -(-(offset + size) // BLOCK) * BLOCK
    return groups, broken, broken is None and index.ended


def _resync(view: memoryview, offset: int) -> list[_Group]:
    """Groups behind damage at byte `offset`, from the first header that leads to the end of the shard."""
    blocks = np.frombuffer(view, dtype=np.uint8)[: len(view) // BLOCK * BLOCK].reshape(-1, BLOCK)
    first = offset // BLOCK + 1
    magic = np.frombuffer(b"ustar", dtype=np.uint8)
    for at in (first + np.flatnonzero((blocks[first:, 257:262] == magic).all(axis=1)))[:_RESYNC_TRIES].tolist():
        if not checksum_is(bytes(blocks[at])):
            continue
        groups, broken, ended = _walk(view[at * BLOCK :], at * BLOCK)
        if broken is None and ended:
            return groups
    return []
