"""A cache of remote files on the disk of a node, shared by all its processes.

    <folder>/entries/<sha256>        a whole, verified file; its access time says when it was last read
    <folder>/partial/<sha256>.part   a download; locked by its writer, so that one left by a kill is free again

An entry is named by what it must contain, so it is never stale. Several processes that want the same file
download it once. Whatever the disk refuses (it is full, the limit is too small for what is in use) turns into a
read without the cache, which is counted. Local files are never cached: there is nothing to save, and no only copy
can be evicted.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
import shutil
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import pyarrow as pa

from labelmill.data import store
from labelmill.data.damage import ShardDamage
from labelmill.errors import DataError

log = logging.getLogger(__name__)

LOCK_TIMEOUT_S = 120.0
"""How long a reader waits for another one's download before it reads by itself."""
_LOCK_POLL_S = 0.02
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}

_counts: Counter[str] = Counter()
_verified: dict[str, tuple[int, int, int]] = {}  # entry: inode, size, mtime when this process hashed it
_warned: set[str] = set()
_lock = threading.Lock()
os.register_at_fork(after_in_child=lambda: globals().update(_lock=threading.Lock()))


class _Uncached(Exception):
    """This file can't be kept now, and why."""


@dataclass(frozen=True)
class ShardCache:
    """The cache in `folder`, which holds at most `limit_bytes`. Cheap to make: a task may open its own.

    Attributes:
        folder: on a local disk; made when missing. Processes of one node share it.
        limit_bytes: of all entries together, downloads included. Others' disk usage isn't counted.
        rehash: verify an entry at each read, not once in each process.
    """

    folder: str
    limit_bytes: int
    rehash: bool = False

    def check(self, largest: int = 0) -> None:
        """Raises DataError when the cache can't work: folder not writable, limit or disk too small.

        Args:
            largest: bytes of the largest file that will be read.
        """
        if self.limit_bytes < max(largest, 1):
            need = f"the largest shard has {_size(largest)}" if largest else "nothing fits"
            raise DataError(
                f"shard cache {self.folder}: a limit of {_size(self.limit_bytes)} is too small: {need}. Raise the "
                "limit, to several shards for each worker of a node, or do without a cache."
            )
        try:
            self._make_folders()
            held = sum(size for size, _ in self._entries().values())
            free = shutil.disk_usage(self.folder).free
            if free + held >= max(largest, 1):
                probe = os.path.join(self.folder, "partial", f"probe.{os.getpid()}.{threading.get_ident()}")
                os.close(os.open(probe, os.O_WRONLY | os.O_CREAT, 0o644))
                os.unlink(probe)
        except OSError as error:
            raise DataError(
                f"shard cache {self.folder}: can't be written: {error.strerror or error}. Name a folder on a local "
                "disk that the workers may write to."
            ) from error
        if free + held < max(largest, 1):
            raise DataError(
                f"shard cache {self.folder}: its disk has {_size(free)} left, the largest shard has {_size(largest)}. "
                "Free some space or name another folder."
            )

    def read(self, path: str, sha256: str, size: int | None = None) -> pa.Buffer:
        """A file's content, verified, as one buffer: a memory map of the cached copy of a remote file.

        Args:
            path: path or URI.
            sha256: hex digest that the content must have.
            size: bytes that it must have, if known.

        Raises DataError (ShardDamage) when the file isn't what size and sha256 say, and StoreError as
        `store.read_bytes`.
        """
        if not store.is_uri(path):
            return _fetch(path, sha256, size)
        try:
            self._make_folders()
            return self._mapped(path, sha256, size) or self._locked(path, sha256, size)
        except _Uncached as reason:
            _count("uncached", f"shard cache {self.folder}: {reason}. It reads {path} and the like without the cache.")
        except OSError as error:
            _count("uncached", f"shard cache {self.folder}: {error}. It reads {path} and the like without the cache.")
        return _fetch(path, sha256, size)

    # --- entries ---

    def _make_folders(self) -> None:
        for name in ("entries", "partial"):
            os.makedirs(os.path.join(self.folder, name), exist_ok=True)

    def _entry(self, sha256: str) -> str:
        return os.path.join(self.folder, "entries", sha256)

    def _mapped(self, path: str, sha256: str, size: int | None) -> pa.Buffer | None:
        """The entry, if there is a whole one. A damaged one is dropped."""
        entry = self._entry(sha256)
        try:
            before = os.stat(entry)
            data = store.read_bytes(entry)
            after = os.stat(entry)
        except (FileNotFoundError, store.StoreError):
            return None
        mark = (after.st_ino, after.st_size, after.st_mtime_ns)
        if (before.st_ino, before.st_size, before.st_mtime_ns) != mark or data.size != after.st_size:
            return None  # replaced meanwhile: what was mapped isn't what was looked at
        if self.rehash or _verified.get(entry) != mark:
            if (size is not None and data.size != size) or hashlib.sha256(data).hexdigest() != sha256:
                _verified.pop(entry, None)
                with suppress(FileNotFoundError):
                    os.unlink(entry)
                _count("damaged", f"shard cache {self.folder}: the copy of {path} was damaged; it is fetched again.")
                return None
            _verified[entry] = mark
        with suppress(OSError):  # the time of access, for eviction; noatime mounts don't keep it
            os.utime(entry, ns=(time.time_ns(), after.st_mtime_ns))
        _count("hit")
        return data

    def _locked(self, path: str, sha256: str, size: int | None) -> pa.Buffer:
        with self._writing(sha256) as file:
            found = self._mapped(path, sha256, size)  # whoever held the lock may have made it
            if found is not None:
                with suppress(FileNotFoundError):
                    os.unlink(file.name)
                return found
            try:
                data = _fetch(path, sha256, size)
                return self._keep(file, sha256, data, path)
            except BaseException:
                with suppress(OSError):
                    os.unlink(file.name)
                raise

    @contextmanager
    def _writing(self, sha256: str) -> Iterator[_Partial]:
        """The download file of an entry, locked: by the kernel, so a killed writer blocks nobody."""
        name = os.path.join(self.folder, "partial", f"{sha256}.part")
        deadline = time.monotonic() + LOCK_TIMEOUT_S
        while True:
            fd = os.open(name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                if _try_lock(fd) and _same_file(fd, name):  # else its last writer moved it away
                    yield _Partial(fd, name)
                    return
            finally:
                os.close(fd)
            if time.monotonic() > deadline:
                raise _Uncached(f"another process has been fetching for {LOCK_TIMEOUT_S:.0f} s")
            time.sleep(_LOCK_POLL_S)

    def _keep(self, file: _Partial, sha256: str, data: pa.Buffer, path: str) -> pa.Buffer:
        """Writes verified content as an entry. When there is no room, the content itself is as good."""
        entry = self._entry(sha256)
        try:
            self._reserve(file, data.size)
            _write_all(file.fd, data)
            os.replace(file.name, entry)
        except (_Uncached, OSError) as error:
            full = isinstance(error, OSError) and error.errno in _FULL
            reason = "the disk is full" if full else str(error)
            _count("uncached", f"shard cache {self.folder}: {reason}. It reads {path} and the like without the cache.")
            with suppress(OSError):
                os.unlink(file.name)
            return data
        info = os.fstat(file.fd)
        _verified[entry] = (info.st_ino, info.st_size, info.st_mtime_ns)
        _count("miss")
        with suppress(store.StoreError):
            mapped = store.read_bytes(entry)
            if mapped.size == data.size:
                return mapped  # the page cache is shared; the downloaded copy can go
        return data

    # --- room ---

    def _reserve(self, file: _Partial, size: int) -> None:
        """Room for `size` bytes within the limit and on the disk, by dropping what was read longest ago."""
        if size > self.limit_bytes:
            raise _Uncached(f"{_size(size)} is more than its limit of {_size(self.limit_bytes)}")
        fd = os.open(os.path.join(self.folder, "room.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)  # held for milliseconds, by whoever makes room
            self._make_room(size, os.path.basename(file.name))
            try:
                _allocate(file.fd, size)
            except OSError as error:
                if error.errno not in _FULL:
                    raise
                # others fill the disk: be smaller than the limit allows
                self._make_room(size, os.path.basename(file.name), spare=size)
                _allocate(file.fd, size)
        finally:
            os.close(fd)

    def _entries(self) -> dict[str, tuple[int, float]]:
        """Bytes and time of the last access of each entry."""
        out = {}
        for item in os.scandir(os.path.join(self.folder, "entries")):
            with suppress(FileNotFoundError):
                info = item.stat()
                out[item.path] = (info.st_size, info.st_atime)
        return out

    def _make_room(self, size: int, mine: str, spare: int = 0) -> None:
        """Drops entries, oldest access first, until `size` more bytes are within the limit, and at least
        `spare` bytes of them. A reader that has one mapped keeps its pages: only the name goes."""
        entries = self._entries()
        held = sum(size for size, _ in entries.values()) + self._downloading(mine)
        over = max(held + size - self.limit_bytes, spare)
        for path, (bytes_, _) in sorted(entries.items(), key=lambda item: item[1][1]):
            if over <= 0:
                return
            with suppress(FileNotFoundError):
                os.unlink(path)
            _count("evicted")
            over -= bytes_
        if over > spare:
            raise _Uncached("downloads under way fill its limit")

    def _downloading(self, mine: str) -> int:
        """Bytes of other processes' downloads; those of killed ones are removed."""
        total = 0
        for item in os.scandir(os.path.join(self.folder, "partial")):
            if item.name == mine:
                continue
            with suppress(OSError):
                fd = os.open(item.path, os.O_RDWR | os.O_CLOEXEC)
                try:
                    if _try_lock(fd) and _same_file(fd, item.path):
                        os.unlink(item.path)
                    else:
                        total += os.fstat(fd).st_size
                finally:
                    os.close(fd)
        return total


@dataclass(frozen=True)
class _Partial:
    fd: int
    name: str


def counts() -> dict[str, int]:
    """What caches did in this process: hit, miss, evicted, damaged, uncached."""
    with _lock:
        return dict(_counts)


def _count(what: str, warning: str | None = None) -> None:
    with _lock:
        _counts[what] += 1
        first = warning is not None and warning.partition(". It reads")[0] not in _warned
        if warning is not None:
            _warned.add(warning.partition(". It reads")[0])
    if first:
        log.warning("%s", warning)


def _fetch(path: str, sha256: str, size: int | None) -> pa.Buffer:
    """The file, verified. Raises ShardDamage."""
    data, digest = store.hashed(path, store.read_bytes(path), sha256)
    if digest == sha256:
        return data
    reason = f"the content changed since it was written (sha256 {digest[:12]}..., not {sha256[:12]}...)"
    if size is not None and data.size != size:
        reason = f"{data.size:,} bytes long instead of {size:,}"
    raise ShardDamage.of(path, reason)


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        raise
    return True


def _same_file(fd: int, name: str) -> bool:
    try:
        there = os.stat(name)
    except FileNotFoundError:
        return False
    mine = os.fstat(fd)
    return (there.st_ino, there.st_dev) == (mine.st_ino, mine.st_dev)


def _allocate(fd: int, size: int) -> None:
    os.ftruncate(fd, 0)
    if size:
        try:
            os.posix_fallocate(fd, 0, size)
        except OSError as error:
            os.ftruncate(fd, 0)
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise


def _write_all(fd: int, data: pa.Buffer) -> None:
    view, at = memoryview(data).cast("B"), 0
    while at < len(view):
        at += os.pwrite(fd, view[at:], at)
    os.ftruncate(fd, len(view))


def _size(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB"
