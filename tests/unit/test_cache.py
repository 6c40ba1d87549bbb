"""The cache of a node: shared, verified, bounded, and never a reason for a run to fail."""

from __future__ import annotations

import errno
import hashlib
import multiprocessing
import os
import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from labelmill.data import cache as cache_module
from labelmill.data import store
from labelmill.data.cache import ShardCache, counts
from labelmill.data.shards import ShardDamage
from labelmill.errors import DataError
from tests.faults import FaultServer, Rule

MIB = 1 << 20


def _content(i: int, size: int = MIB + 100) -> bytes:
    return random.Random(i).randbytes(size)


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def remote(faulty: FaultServer, monkeypatch: pytest.MonkeyPatch) -> FaultServer:
    """Six objects data/0 ... data/5 of about 1 MiB; counters at zero."""
    monkeypatch.setattr(cache_module, "_counts", Counter())
    monkeypatch.setattr(cache_module, "_verified", {})
    monkeypatch.setattr(cache_module, "_warned", set())
    for i in range(6):
        faulty.put(f"data/{i}", _content(i))
    return faulty


@pytest.fixture
def cache(tmp_path: Path) -> ShardCache:
    return ShardCache(str(tmp_path / "cache"), 4 * MIB)


def _read(cache: ShardCache, i: int) -> None:
    data = _content(i)
    assert cache.read(f"s3://data/{i}", _sha(data), len(data)).to_pybytes() == data


def _held(cache: ShardCache) -> set[str]:
    names = set(os.listdir(os.path.join(cache.folder, "entries")))
    return {str(i) for i in range(6) if _sha(_content(i)) in names}


def test_downloads_once_and_maps(remote: FaultServer, cache: ShardCache) -> None:
    cache.check(largest=MIB + 100)
    for _ in range(3):
        _read(cache, 0)
    _read(ShardCache(cache.folder, 4 * MIB), 0)
    assert len(remote.gets()) == 1
    assert counts() == {"miss": 1, "hit": 3}
    assert os.listdir(os.path.join(cache.folder, "partial")) == []
    entry = os.path.join(cache.folder, "entries", _sha(_content(0)))
    data = cache.read("s3://data/0", _sha(_content(0)))
    os.unlink(entry)  # eviction by someone else: what is mapped stays
    assert data.to_pybytes() == _content(0)


def test_least_recently_read_goes_first(remote: FaultServer, cache: ShardCache) -> None:
    for i in (0, 1, 2):
        _read(cache, i)
    _read(cache, 0)
    _read(cache, 3)
    assert _held(cache) == {"0", "2", "3"}
    assert counts()["evicted"] == 1
    sizes = [e.stat().st_size for e in os.scandir(os.path.join(cache.folder, "entries"))]
    assert sum(sizes) <= cache.limit_bytes


def test_a_damaged_entry_is_fetched_again(remote: FaultServer, cache: ShardCache, monkeypatch) -> None:
    entry = os.path.join(cache.folder, "entries", _sha(_content(0)))
    for harm in (lambda f: f.truncate(1000), lambda f: f.write(b"?")):
        _read(cache, 0)
        with open(entry, "r+b") as file:
            harm(file)
        _read(cache, 0)
    assert counts()["damaged"] == 2
    # a bit that falls over without a trace in the file's times: seen by another process, or with rehash
    info = os.stat(entry)
    with open(entry, "r+b") as file:
        file.write(b"?")
    os.utime(entry, ns=(info.st_atime_ns, info.st_mtime_ns))
    _read(ShardCache(cache.folder, 4 * MIB, rehash=True), 0)
    assert counts()["damaged"] == 3


def test_a_changed_object_is_named(remote: FaultServer, cache: ShardCache) -> None:
    remote.put("data/0", _content(1))
    with pytest.raises(ShardDamage, match="s3://data/0: the content changed"):
        _read(cache, 0)
    remote.put("data/0", _content(0) + b"more")
    with pytest.raises(ShardDamage, match="bytes long instead of"):
        _read(cache, 0)
    assert _held(cache) == set()
    assert os.listdir(os.path.join(cache.folder, "partial")) == []
    with pytest.raises(DataError, match="no such object"):
        cache.read("s3://data/none", "0" * 64)


def test_a_wrong_bit_on_the_way_is_fetched_again(remote: FaultServer, cache: ShardCache) -> None:
    for fault in ("flip", "shifted"):
        remote.rules = [Rule(fault, key="data/0")]
        _read(cache, 0)
        os.unlink(os.path.join(cache.folder, "entries", _sha(_content(0))))
    assert store.retries()["checksum"] == 2


def test_local_files_are_read_in_place(cache: ShardCache, tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(_content(0))
    assert cache.read(str(path), _sha(_content(0))).to_pybytes() == _content(0)
    assert not os.path.exists(cache.folder)
    path.write_bytes(_content(1))
    with pytest.raises(ShardDamage, match=r"a\.tar"):
        cache.read(str(path), _sha(_content(0)))


# --- two processes -------------------------------------------------------------------------------------


def _reader(cache: ShardCache, go, out) -> None:
    go.wait()
    for i in range(4):
        _read(cache, i)
    out.put(counts())


def test_processes_share_downloads(remote: FaultServer, cache: ShardCache) -> None:
    remote.latency_s = 0.05
    context = multiprocessing.get_context("fork")
    go, out = context.Event(), context.Queue()
    readers = [context.Process(target=_reader, args=(cache, go, out)) for _ in range(3)]
    for reader in readers:
        reader.start()
    go.set()
    seen = sum((Counter(out.get(timeout=30)) for _ in readers), Counter())
    for reader in readers:
        reader.join()
        assert reader.exitcode == 0
    assert len(remote.gets()) == 4
    assert seen["miss"] == 4
    assert seen["hit"] == 8


def _stuck(cache: ShardCache, ready) -> None:
    with cache._writing(_sha(_content(0))) as file:
        os.write(file.fd, b"half of it")
        ready.set()
        time.sleep(60)


def test_a_killed_writer_blocks_nobody(remote: FaultServer, cache: ShardCache, monkeypatch) -> None:
    cache.check()
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    writer = context.Process(target=_stuck, args=(cache, ready))
    writer.start()
    assert ready.wait(20)
    monkeypatch.setattr(cache_module, "LOCK_TIMEOUT_S", 0.1)
    _read(cache, 0)  # alive: read without the cache after a while
    assert counts() == {"uncached": 1}
    os.kill(writer.pid, signal.SIGKILL)
    writer.join()
    began = time.monotonic()
    _read(cache, 0)
    assert time.monotonic() - began < 5
    assert _held(cache) == {"0"}
    assert counts()["miss"] == 1


def test_downloads_of_the_killed_take_no_room(remote: FaultServer, cache: ShardCache) -> None:
    cache.check()
    left = os.path.join(cache.folder, "partial", "0" * 64 + ".part")
    Path(left).write_bytes(b"x" * (4 * MIB))
    _read(cache, 0)
    assert not os.path.exists(left)
    assert _held(cache) == {"0"}


# --- no room -------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MiB. Needs root; tests with injected errors cover the rest."""
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", place], capture_output=True)
    if done.returncode:
        pytest.skip("mounting a small tmpfs needs root")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def test_a_disk_that_others_fill(remote: FaultServer, small_disk: Path) -> None:
    cache = ShardCache(str(small_disk / "cache"), 100 * MIB)
    _read(cache, 0)
    _read(cache, 1)
    _read(cache, 2)  # the limit allows it, the disk doesn't: the oldest goes
    assert _held(cache) == {"1", "2"}
    (small_disk / "theirs").write_bytes(b"x" * (MIB // 2))
    for i in range(6):
        _read(cache, i)
    assert "uncached" not in counts()
    for path in (small_disk / "cache" / "entries").iterdir():
        path.unlink()
    filled = subprocess.run(["cp", "/dev/zero", small_disk / "theirs"], capture_output=True, text=True)
    assert "No space left" in filled.stderr
    for i in (0, 0):
        _read(cache, i)
    assert counts()["uncached"] == 2
    assert os.listdir(small_disk / "cache" / "partial") == []
    with pytest.raises(DataError, match="its disk has"):
        cache.check(largest=2 * MIB)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS])
@pytest.mark.parametrize("where", ["posix_fallocate", "pwrite", "replace", "makedirs"])
def test_what_the_disk_refuses(
    code: int, where: str, remote: FaultServer, cache: ShardCache, monkeypatch, caplog
) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise OSError(code, os.strerror(code))

    cache.check()
    monkeypatch.setattr(os, where, refuse)
    for _ in range(2):
        _read(cache, 0)
    assert counts()["uncached"] == 2
    assert len([r for r in caplog.records if "without the cache" in r.message]) == 1
    monkeypatch.undo()
    assert _held(cache) == set()
    assert os.listdir(os.path.join(cache.folder, "partial")) == []


def test_a_limit_that_is_used_up(remote: FaultServer, cache: ShardCache) -> None:
    small = ShardCache(cache.folder, MIB // 2)
    _read(small, 0)
    assert counts() == {"uncached": 1}
    with pytest.raises(DataError, match="too small: the largest shard has 1"):
        small.check(largest=MIB + 100)
    with pytest.raises(DataError, match="too small"):
        ShardCache(cache.folder, 0).check()


def test_a_folder_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/nothing")):
        with pytest.raises(DataError, match="can't be written"):
            ShardCache(str(folder), MIB).check()
