"""The bytes of a shard, whole or in ranges, and whether they are known to be right."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import pyarrow as pa

from labelmill.data import store
from labelmill.data.cache import ShardCache
from labelmill.data.damage import ShardDamage
from labelmill.data.manifest import Manifest
from labelmill.errors import DataError

Verify = bool | Literal["first"]
"""Whether content is hashed: always, never, or only the first time that this process sees a local file so."""

_PARALLEL = 8  # range requests to an object store at a time

# (size, mtime, inode) and hash of each local file whose content was found right
_SEEN: dict[str, tuple[tuple[int, int, int], str]] = {}


@dataclass(frozen=True)
class Content:
    """A whole shard as it was found.

    Attributes:
        data: the bytes.
        trusted: the content hash was compared and is right (now or, with verify="first", earlier).
        digest: sha256 if it was computed.
    """

    data: pa.Buffer
    trusted: bool
    digest: str | None


def fetch_whole(manifest: Manifest, i: int, verify: Verify, cache: ShardCache | None = None) -> Content:
    """Shard `i` in one read. Raises ShardDamage when it is missing, DataError when it can't be read."""
    info, path = manifest.shards[i], manifest.shard_path(i)
    remote = store.is_uri(path)
    identity = None if remote else _identity(path)
    vouched = False
    data = None
    if remote and cache is not None:
        try:
            data = cache.read(path, info.sha256, info.bytes)
            vouched = verify == "first"  # the cache has hashed it
        except DataError:
            data = None  # the store tells what is wrong
    if data is None:
        data = _read(path)
    if not verify or (data.size != info.bytes and not remote):
        return Content(data, False, None)
    if vouched or (verify == "first" and identity is not None and _SEEN.get(path) == (identity, info.sha256)):
        return Content(data, True, None)
    data, digest = store.hashed(path, data, info.sha256)
    if identity is not None and digest == info.sha256:
        _SEEN[path] = (identity, digest)
    return Content(data, digest == info.sha256, digest)


def fetch_ranges(path: str, ranges: Sequence[tuple[int, int]]) -> list[pa.Buffer]:
    """Bytes `[start, stop)` of each range; shorter where the file ends before. Raises as `fetch_whole`."""
    if len(ranges) < 2 or not store.is_uri(path):
        return [_read(path, a, z) for a, z in ranges]
    with ThreadPoolExecutor(min(_PARALLEL, len(ranges))) as pool:
        return list(pool.map(lambda r: _read(path, *r), ranges))


def _read(path: str, start: int = 0, stop: int | None = None) -> pa.Buffer:
    try:
        return store.read_bytes(path, start, None if stop is None else stop - start)
    except DataError as error:
        # what is certain about the file decides whether this is damage or a failure on the way
        try:
            there = store.exists(path)
        except DataError:
            raise error from None
        if not there:
            raise ShardDamage.of(path, "no such file (moved or deleted?)") from None
        if stop is not None and (size := store.size(path)) < stop:
            return store.read_bytes(path, start, size - start) if size > start else pa.py_buffer(b"")
        raise


def _identity(path: str) -> tuple[int, int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns, found.st_ino
