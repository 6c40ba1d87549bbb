"""One face over the places data lives: local folders and anything pyarrow has a file system for (`s3://...`).

Paths are text: a local path, or a URI. Credentials and endpoint of S3 come from the usual environment
variables (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL, AWS_REGION).
"""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import fs

from labelmill.errors import DataError

_SCHEME = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]+://")


def is_uri(path: str | os.PathLike[str]) -> bool:
    """Whether `path` names a remote place; `file://` is local."""
    text = os.fspath(path)
    return bool(_SCHEME.match(text)) and not text.startswith("file://")


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


@lru_cache(maxsize=16)
def _s3(pid: int) -> fs.FileSystem:
    # keyed by process: a client doesn't survive a fork
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    options: dict[str, Any] = {}
    if endpoint:
        scheme, _, host = endpoint.rpartition("://")
        options = {"endpoint_override": host.rstrip("/"), "scheme": scheme or "https"}
    if region := os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION"):
        options["region"] = region
    elif endpoint:
        options["region"] = "us-east-1"
    return fs.S3FileSystem(**options)


@lru_cache(maxsize=1)
def _local() -> fs.FileSystem:
    return fs.LocalFileSystem()


def _resolve(path: str | os.PathLike[str]) -> tuple[fs.FileSystem, str]:
    text = normal(path)
    try:
        if text.startswith("s3://"):
            return _s3(os.getpid()), text.removeprefix("s3://")
        return fs.FileSystem.from_uri(text) if is_uri(text) else (_local(), text)
    except (OSError, pa.ArrowException, ValueError) as error:
        raise DataError(f"{text}: this place can't be opened: {error}") from error


@contextmanager
def _named(path: str, doing: str) -> Iterator[None]:
    """Errors of the file system, as DataError with the path."""
    try:
        yield
    except FileNotFoundError:
        raise DataError(f"{path}: no such file. Check the path; was the data moved or deleted?") from None
    except OSError as error:
        raise DataError(f"{path}: can't be {doing}: {error}") from error


def read_bytes(path: str | os.PathLike[str], offset: int = 0, length: int | None = None) -> pa.Buffer:
    """The file, or `length` bytes of it from `offset` on, as one buffer in one read; less where the file ends.

    Raises DataError when it's missing or unreadable.
    """
    system, inner = _resolve(path)
    with _named(os.fspath(path), "read"), system.open_input_file(inner) as file:
        if offset:
            file.seek(offset)
        return file.read_buffer(length)


def read_head(path: str | os.PathLike[str], count: int) -> bytes:
    """The first `count` bytes of a file. Raises DataError as `read_bytes`."""
    system, inner = _resolve(path)
    with _named(os.fspath(path), "read"), system.open_input_file(inner) as file:
        return file.read(count)


@contextmanager
def open_write(path: str | os.PathLike[str]) -> Iterator[Any]:
    """A binary file to write; it appears under its name only when the block ends without an error.

    Locally through a temporary file and a rename; object stores publish an upload only when it is complete.
    """
    text = normal(path)
    system, inner = _resolve(text)
    if is_uri(text):
        with _named(text, "written"):
            stream = system.open_output_stream(inner)
            try:
                yield stream
            except BaseException:
                with suppress(AttributeError, OSError):
                    stream.abort()
                raise
            stream.close()
        return
    temporary = f"{inner}.{uuid.uuid4().hex[:8]}.part"
    with _named(text, "written"):
        os.makedirs(os.path.dirname(inner), exist_ok=True)
        try:
            with open(temporary, "xb") as file:
                yield file
            os.replace(temporary, inner)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)
            raise


def write_bytes(path: str | os.PathLike[str], data: bytes | pa.Buffer) -> None:
    """Writes a whole file, atomically."""
    with open_write(path) as file:
        file.write(data)


def exists(path: str | os.PathLike[str]) -> bool:
    """Whether a file or folder is there."""
    return _info(path).type != fs.FileType.NotFound


def is_folder(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is a folder (for an object store: a prefix with something under it)."""
    return _info(path).type == fs.FileType.Directory


def size(path: str | os.PathLike[str]) -> int:
    """Bytes of a file. Raises DataError when it isn't there."""
    info = _info(path)
    if info.type != fs.FileType.File:
        raise DataError(f"{os.fspath(path)}: no such file.")
    return int(info.size)


def _info(path: str | os.PathLike[str]) -> fs.FileInfo:
    system, inner = _resolve(path)
    with _named(os.fspath(path), "looked up"):
        return system.get_file_info(inner)


def list_files(folder: str | os.PathLike[str], recursive: bool = True) -> list[str]:
    """Relative paths of the files under `folder`, sorted; empty when the folder isn't there."""
    system, inner = _resolve(folder)
    with _named(os.fspath(folder), "listed"):
        infos = system.get_file_info(fs.FileSelector(inner, allow_not_found=True, recursive=recursive))
    prefix = inner.rstrip("/") + "/"
    return sorted(info.path.removeprefix(prefix) for info in infos if info.type == fs.FileType.File)


def delete(path: str | os.PathLike[str]) -> None:
    """Removes a file if it is there."""
    if is_uri(path):
        system, inner = _resolve(path)
        with _named(os.fspath(path), "deleted"):
            if exists(path):
                system.delete_file(inner)
        return
    with _named(os.fspath(path), "deleted"):
        Path(normal(path)).unlink(missing_ok=True)
