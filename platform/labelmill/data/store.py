"""One face over the places data lives: local folders, `s3://`, and what else pyarrow has a file system for.

Paths are text: a local path, or a URI. Endpoint, region and credentials of S3 come from the usual environment
and profile (s3.py). Every read gives exactly the bytes asked for, or raises; every write appears whole or not
at all.
"""

from __future__ import annotations

import hashlib
import os
import re
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import fs

from labelmill.data import s3, s3_objects
from labelmill.data.s3 import retries
from labelmill.data.s3_errors import StoreError
from labelmill.errors import DataError

__all__ = [
    "StoreError",
    "delete",
    "delete_many",
    "exists",
    "filesystem",
    "hashed",
    "is_folder",
    "is_uri",
    "join",
    "list_files",
    "make_bucket",
    "normal",
    "noted_sha256",
    "open_write",
    "presign",
    "read_bytes",
    "read_head",
    "retries",
    "size",
    "write_bytes",
]

_SCHEME = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]+://")
_MAP_FROM = 1 << 20
"""Local files of this size are mapped, not copied: reading 48 MiB took 6 ms, mapping 0.03 ms."""


def is_uri(path: str | os.PathLike[str]) -> bool:
    """Whether `path` names a remote place; `file://` is local."""
    text = os.fspath(path)
    return bool(_SCHEME.match(text)) and not text.startswith("file://")


def is_s3(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is an `s3://` URI."""
    return os.fspath(path).startswith("s3://")


def normal(path: str | os.PathLike[str]) -> str:
    """`path` as text: URIs without a trailing slash, local paths absolute."""
    text = os.fspath(path)
    if is_uri(text):
        return text.rstrip("/")
    return os.path.abspath(os.path.expanduser(text.removeprefix("file://")))


def join(base: str, *parts: str) -> str:
    """Path of something under `base`; an absolute path or URI among `parts` wins."""
    for part in parts:
        base = part if is_uri(part) or os.path.isabs(part) else f"{base.rstrip('/')}/{part}"
    return base


@lru_cache(maxsize=1)
def _local() -> fs.FileSystem:
    return fs.LocalFileSystem()


def filesystem(path: str | os.PathLike[str]) -> tuple[fs.FileSystem, str]:
    """pyarrow's file system for `path`, and the path inside it: for Ray Data, Parquet and the like.

    For S3 it has the endpoint, region and credentials that this module uses. Ask for it where it is used:
    credentials expire. It may be pickled; it is then made again from the settings of the process that loads it.
    Raises DataError for a scheme pyarrow doesn't know.
    """
    text = normal(path)
    if is_s3(text):
        return s3.filesystem(s3.split(text)[0]), text.removeprefix("s3://")
    try:
        return fs.FileSystem.from_uri(text) if is_uri(text) else (_local(), text)
    except (OSError, pa.ArrowException, ValueError) as error:
        raise DataError(f"{text}: this place can't be opened: {error}") from error


@contextmanager
def _named(path: str, doing: str) -> Iterator[None]:
    """Errors of the file system, as DataError with the path."""
    try:
        yield
    except FileNotFoundError:
        text = f"{path}: no such file. Check the path; was the data moved or deleted?"
        raise StoreError.of(text, path, "missing") from None
    except PermissionError as error:
        text = f"{path}: can't be {doing}: no permission ({error.strerror or error}). Check its owner and mode."
        raise StoreError.of(text, path, "denied") from error
    except OSError as error:
        raise StoreError.of(f"{path}: can't be {doing}: {error}", path, "failed") from error


# --- reading -------------------------------------------------------------------------------------------


def read_bytes(path: str | os.PathLike[str], offset: int = 0, length: int | None = None) -> pa.Buffer:
    """The file, or bytes [offset, offset + length) of it, as one buffer.

    Local files from 1 MiB are memory-mapped: nothing is copied, and the buffer shows what the file holds *now*.
    Data sets are never changed in place (ours are replaced by renaming, and mapped files may be unlinked). A
    file that something else cuts short while it is mapped kills the process with SIGBUS; where that can happen,
    as on some network file systems, LABELMILL_MMAP=0 makes it read copies. From S3, see s3_objects.read.

    Raises DataError when it is missing or unreadable, or ends before the range does; nothing shorter is
    returned.
    """
    if offset < 0 or (length is not None and length < 0):
        raise ValueError("offset and length must be 0 or more")
    text = normal(path)
    if is_s3(text):
        return s3_objects.read(text, offset, length)
    return _read_local(text, offset, length) if not is_uri(text) else _read_other(text, offset, length)


def hashed(path: str | os.PathLike[str], data: pa.Buffer, sha256: str) -> tuple[pa.Buffer, str]:
    """Content that was read from `path` and its sha256 (hex).

    What a store sent isn't what it must be: it is read once more and taken if it is then, since bytes can arrive wrong.
    """
    digest = hashlib.sha256(data).hexdigest()
    if digest != sha256 and is_uri(path):
        with suppress(DataError):
            again = read_bytes(path)
            if hashlib.sha256(again).hexdigest() == sha256:
                s3.count_retry("checksum")
                return again, sha256
    return data, digest


def _read_local(path: str, offset: int, length: int | None) -> pa.Buffer:
    with _named(path, "read"), open(path, "rb", buffering=0) as file:
        total = os.fstat(file.fileno()).st_size
        count = _count(path, total, offset, length)
        if count >= _MAP_FROM and os.environ.get("LABELMILL_MMAP") != "0":
            with suppress(OSError), pa.memory_map(path) as mapped:
                if mapped.size() == total:  # else it was replaced since it was opened
                    mapped.seek(offset)
                    return mapped.read_buffer(count)
        buffer = pa.allocate_buffer(count)
        view, at = memoryview(buffer).cast("B"), 0
        while at < count:
            got = os.preadv(file.fileno(), [view[at:]], offset + at)
            if not got:
                raise StoreError.of(f"{path}: the file was cut while it was read.", path, "truncated")
            at += got
        return buffer


def _read_other(path: str, offset: int, length: int | None) -> pa.Buffer:
    system, inner = filesystem(path)
    with _named(path, "read"), system.open_input_file(inner) as file:
        count = _count(path, file.size(), offset, length)
        file.seek(offset)
        buffer = file.read_buffer(count)
        if buffer.size != count:
            raise StoreError.of(f"{path}: only {buffer.size:,} of {count:,} bytes came.", path, "cut")
        return buffer


def _count(path: str, total: int, offset: int, length: int | None) -> int:
    stop = total if length is None else offset + length
    if stop > total or offset > total:
        text = f"{path}: bytes {offset:,} to {max(stop, offset):,} can't be read: it has {total:,} bytes only."
        raise StoreError.of(text, path, "truncated", span=(offset, stop))
    return stop - offset


def read_head(path: str | os.PathLike[str], count: int) -> bytes:
    """The first `count` bytes of a file, or all of a shorter one. Raises DataError as `read_bytes`."""
    text = normal(path)
    if is_s3(text):
        return s3_objects.read(text, 0, count, or_less=True).to_pybytes()
    system, inner = filesystem(text)
    with _named(text, "read"), system.open_input_file(inner) as file:
        return file.read(count)


# --- writing -------------------------------------------------------------------------------------------


@contextmanager
def open_write(path: str | os.PathLike[str], sha256: str | None = None) -> Iterator[Any]:
    """A binary file to write; it appears under its name only when the block ends without an error.

    Locally through a temporary file and a rename. On S3 as a verified upload (s3_upload.py); `sha256`, if the
    caller knows it, is noted with the object (`noted_sha256`).
    """
    text = normal(path)
    if is_uri(text):
        with _named(text, "written"), _remote_file(text, sha256) as stream:
            yield stream
        return
    temporary = f"{text}.{uuid.uuid4().hex[:8]}.part"
    with _named(text, "written"):
        os.makedirs(os.path.dirname(text), exist_ok=True)
        try:
            with open(temporary, "xb") as file:
                yield file
            os.replace(temporary, text)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)
            raise


@contextmanager
def _remote_file(text: str, sha256: str | None) -> Iterator[Any]:
    if is_s3(text):
        from labelmill.data.s3_upload import Upload

        stream: Any = Upload(text, sha256)
    else:
        system, inner = filesystem(text)
        stream = system.open_output_stream(inner)
    try:
        yield stream
        stream.close()
    except BaseException:
        with suppress(AttributeError, OSError):
            stream.abort()
        raise


def write_bytes(path: str | os.PathLike[str], data: bytes | pa.Buffer, sha256: str | None = None) -> None:
    """Writes a whole file, atomically. `sha256` as in `open_write`."""
    with open_write(path, sha256) as file:
        file.write(data)


def noted_sha256(path: str | os.PathLike[str]) -> str | None:
    """The sha256 that was noted when an S3 object was written; None for what has no note."""
    found = s3_objects.head(normal(path)) if is_s3(path) else None
    return found.sha256 if found else None


# --- looking and tidying -------------------------------------------------------------------------------


def exists(path: str | os.PathLike[str]) -> bool:
    """Whether a file or folder is there. Raises DataError when the place can't be asked: a missing bucket, say."""
    return _info(path).type != fs.FileType.NotFound


def is_folder(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is a folder (for an object store: a prefix with something under it)."""
    return _info(path).type == fs.FileType.Directory


def size(path: str | os.PathLike[str]) -> int:
    """Bytes of a file. Raises DataError when it isn't there."""
    if is_s3(path):
        return _head(path).size
    info = _info(path)
    if info.type != fs.FileType.File:
        raise StoreError.of(f"{os.fspath(path)}: no such file.", os.fspath(path), "missing")
    return int(info.size)


def _head(path: str | os.PathLike[str]) -> s3_objects.Head:
    if (found := s3_objects.head(normal(path))) is None:
        raise StoreError.of(f"{os.fspath(path)}: no such object.", os.fspath(path), "missing")
    return found


def _info(path: str | os.PathLike[str]) -> fs.FileInfo:
    text = normal(path)
    if is_s3(text):
        if (found := s3_objects.head(text)) is not None:
            return fs.FileInfo(text, fs.FileType.File, size=found.size)
        kind = fs.FileType.Directory if s3_objects.has_children(text) else fs.FileType.NotFound
        return fs.FileInfo(text, kind)
    system, inner = filesystem(text)
    with _named(text, "looked up"):
        return system.get_file_info(inner)


def list_files(folder: str | os.PathLike[str], recursive: bool = True) -> list[str]:
    """Relative paths of the files under `folder`, sorted; empty when the folder isn't there."""
    if is_s3(folder):
        return s3_objects.list_files(normal(folder), recursive)
    system, inner = filesystem(folder)
    with _named(os.fspath(folder), "listed"):
        infos = system.get_file_info(fs.FileSelector(inner, allow_not_found=True, recursive=recursive))
    prefix = inner.rstrip("/") + "/"
    return sorted(info.path.removeprefix(prefix) for info in infos if info.type == fs.FileType.File)


def delete(path: str | os.PathLike[str]) -> None:
    """Removes a file if it is there."""
    delete_many([path])


def delete_many(paths: Iterable[str | os.PathLike[str]]) -> None:
    """Removes the files that are there; objects of one bucket in few requests."""
    remote: list[str] = []
    for path in paths:
        text = normal(path)
        if is_s3(text):
            remote.append(text)
            continue
        with _named(text, "deleted"):
            if not is_uri(text):
                Path(text).unlink(missing_ok=True)
            elif exists(text):
                system, inner = filesystem(text)
                system.delete_file(inner)
    s3_objects.delete(remote)


def make_bucket(uri: str) -> None:
    """Makes the bucket of an `s3://` URI; fine if it is there and ours. Raises DataError."""
    s3_objects.make_bucket(_only_s3(uri))


def presign(uri: str, seconds: int = 3600) -> str:
    """A link that reads an `s3://` object without credentials for `seconds`, at most 7 days. Raises DataError."""
    return s3_objects.presign(_only_s3(uri), seconds)


def _only_s3(uri: str) -> str:
    if not is_s3(uri):
        raise DataError(f"{uri}: only s3:// addresses have buckets and links.")
    return normal(uri)
