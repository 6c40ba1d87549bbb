"""Files of a sharded head: tensors by name whose first axis is the class, cut into ranges of classes.

    head.json                            classes, tensors, files with sizes and checksums, notes; written last
    head-<start>-<stop>.safetensors      rows of the classes [start, stop), of bounded size

Any number of ranks writes, each its own classes; any number reads, each the classes that it owns, without a
collective and without more memory than a page of rows. A page of rows has a checksum (CRC-32) for each tensor, so
that a range can be verified without reading the whole file. The files are ordinary safetensors; a folder without
`head.json` is read by the ranges in the files' names, without checksums.

Shape legend: C classes, D embedding size.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from labelmill.errors import DataError

INDEX = "head.json"
FORMAT = {"format": "labelmill-head", "version": 1}
FILE_BYTES = 256 * 2**20
PAGE_BYTES = 4 * 2**20
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_ALIGN = 64  # bytes; where a file's data begin, so that a memory map of them is aligned


@dataclass(frozen=True)
class TensorSpec:
    """A tensor without its class axis: safetensors' name of the dtype, shape of a row."""

    dtype: str
    shape: tuple[int, ...] = ()

    @staticmethod
    def of(tensor: Tensor) -> TensorSpec:
        """The spec of a tensor whose first axis is the class."""
        return TensorSpec(_CODES[tensor.dtype], tuple(tensor.shape[1:]))

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def row_bytes(self) -> int:
        return self.torch_dtype.itemsize * prod(self.shape)

    def empty(self, rows: int) -> Tensor:
        """Uninitialised rows on the CPU."""
        return torch.empty(rows, *self.shape, dtype=self.torch_dtype)


Specs = Mapping[str, TensorSpec]


@dataclass(frozen=True)
class RowFile:
    """A file's entry in the index.

    Attributes:
        start, stop: its classes.
        bytes: its size.
        page_rows: rows of a page, counted from `start`.
        crc32: of each page, by tensor; empty if unknown.
    """

    file: str
    start: int
    stop: int
    bytes: int
    page_rows: int
    crc32: dict[str, list[int]] = field(default_factory=dict)


def specs_of(tensors: Mapping[str, Tensor]) -> dict[str, TensorSpec]:
    """Specs by name of tensors whose first axis is the class."""
    return {name: TensorSpec.of(tensor) for name, tensor in tensors.items()}


def rows_per_page(specs: Specs) -> int:
    """Rows of all tensors that make a page."""
    return max(1, PAGE_BYTES // max(1, sum(spec.row_bytes for spec in specs.values())))


# --- writing ------------------------------------------------------------------------------------------------

Fetch = Callable[[int, int], Mapping[str, Tensor]]
"""Takes a class range [lo, hi); gives its tensors (hi - lo, ...)."""


def write_rows(
    folder: str | Path,
    prefix: str,
    specs: Specs,
    start: int,
    stop: int,
    fetch: Fetch,
    file_bytes: int = FILE_BYTES,
    cuts: Sequence[int] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> list[RowFile]:
    """Writes the classes [start, stop) page by page, in order, and returns the entries of the files.

    Holds one page of rows. A file appears under its name whole or not at all; while one is flushed to disk the next
    is filled.

    Args:
        fetch: gives the tensors of a range; asked in ascending order, at most a page at a time.
        file_bytes: size of a file, about; at least one page.
        cuts: class ids at which files end, instead of `file_bytes`.

    Raises:
        OSError: the disk is full, or the like; nothing half-written stays.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    page_rows = rows_per_page(specs)
    if cuts is None:
        row_bytes = max(1, sum(spec.row_bytes for spec in specs.values()))
        step = max(1, file_bytes // row_bytes // page_rows) * page_rows
        cuts = range(start + step, stop, step)
    edges = [start, *(cut for cut in cuts if start < cut < stop), stop]
    entries: list[RowFile] = []
    flushing: list[Future[None]] = []
    with ThreadPoolExecutor(1) as pool:
        for lo, hi in pairwise(edges):
            if lo == hi:
                continue
            entry, partial = _write_file(folder, prefix, specs, lo, hi, page_rows, fetch, metadata or {})
            entries.append(entry)
            while len(flushing) > 1:  # at most two files wait for the disk
                flushing.pop(0).result()
            flushing.append(pool.submit(_flush, partial, folder / entry.file))
        for waiting in flushing:
            waiting.result()
    return entries


def _write_file(
    folder: Path,
    prefix: str,
    specs: Specs,
    start: int,
    stop: int,
    page_rows: int,
    fetch: Fetch,
    metadata: Mapping[str, str],
) -> tuple[RowFile, Path]:
    name = f"{prefix}-{start:010d}-{stop:010d}.safetensors"
    partial = folder / f".{name}.partial"
    header, offsets, size = _header(specs, stop - start, metadata)
    crc32: dict[str, list[int]] = {tensor: [] for tensor in specs}
    try:
        with open(partial, "wb", buffering=0) as out:
            out.write(header)
            for lo in range(start, stop, page_rows):
                hi = min(lo + page_rows, stop)
                page = fetch(lo, hi)
                for tensor, spec in specs.items():
                    data = _bytes_of(page[tensor], spec, hi - lo, tensor)
                    crc32[tensor].append(zlib.crc32(data))
                    _pwrite(out.fileno(), data, offsets[tensor] + (lo - start) * spec.row_bytes)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    return RowFile(name, start, stop, size, page_rows, crc32), partial


def _flush(partial: Path, target: Path) -> None:
    with partial.open("rb") as written:
        os.fsync(written.fileno())
    partial.replace(target)


def _header(specs: Specs, rows: int, metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int], int]:
    """A safetensors header, the offset of each tensor in the file, the file's size."""
    # wide dtypes first keeps every tensor aligned to its dtype
    order = sorted(specs, key=lambda name: (-specs[name].torch_dtype.itemsize, name))
    content: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    begin, begins = 0, {}
    for name in order:
        end = begin + rows * specs[name].row_bytes
        shape = [rows, *specs[name].shape]
        content[name] = {"dtype": specs[name].dtype, "shape": shape, "data_offsets": [begin, end]}
        begins[name], begin = begin, end
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGN)
    first = 8 + len(text)
    return struct.pack("<Q", len(text)) + text, {name: first + at for name, at in begins.items()}, first + begin


def _bytes_of(tensor: Tensor, spec: TensorSpec, rows: int, name: str) -> memoryview:
    if tuple(tensor.shape) != (rows, *spec.shape) or tensor.dtype != spec.torch_dtype:
        raise ValueError(f"{name!r}: {tensor.dtype} {tuple(tensor.shape)} isn't {rows} rows of {spec}")
    return view_of(tensor.detach().cpu().contiguous())


def view_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def _pwrite(file: int, data: memoryview, offset: int) -> None:
    while len(data):
        done = os.pwrite(file, data, offset)
        data, offset = data[done:], offset + done


def write_index(folder: str | Path, num_classes: int, parts: Sequence[Mapping[str, Any]]) -> None:
    """Writes `head.json` from what the ranks' `save_part` returned: with it the folder is complete.

    Raises DataError when the parts are of different saves or don't hold each class exactly once.
    """
    folder = Path(folder)
    for part in parts[1:]:
        for key in ("notes", "tensors"):
            if part[key] != parts[0][key]:
                raise DataError(
                    f"{folder}: the classes [{part['start']}, {part['stop']}) and [{parts[0]['start']}, "
                    f"{parts[0]['stop']}) were not saved together: {_difference(part[key], parts[0][key])}."
                )
    files = check_cover((entry for part in parts for entry in part["files"]), num_classes, folder)
    index = {
        **FORMAT,
        "num_classes": num_classes,
        "tensors": parts[0]["tensors"],
        "notes": parts[0]["notes"],
        "files": list(files),
    }
    partial = folder / f".{INDEX}.partial"
    with partial.open("w", encoding="utf-8") as out:
        json.dump(index, out)
        out.flush()
        os.fsync(out.fileno())
    partial.replace(folder / INDEX)


def part_of(specs: Specs, start: int, stop: int, files: Iterable[RowFile], notes: Mapping[str, Any]) -> dict[str, Any]:
    """What one writer adds to the index, as JSON values."""
    return {
        "start": start,
        "stop": stop,
        "tensors": {name: {"dtype": spec.dtype, "shape": list(spec.shape)} for name, spec in specs.items()},
        "notes": dict(notes),
        "files": [asdict(entry) for entry in files],
    }


def _difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    names = [name for name in sorted({*one, *other}) if one.get(name) != other.get(name)]
    return ", ".join(f"{name} is {one.get(name)} and {other.get(name)}" for name in names[:3])


def save_range(
    folder: str | Path,
    prefix: str,
    tensors: Mapping[str, Tensor],
    start: int,
    stop: int,
    notes: Mapping[str, Any],
    file_bytes: int = FILE_BYTES,
) -> list[dict[str, Any]]:
    """Writes the rows of classes [start, stop) and returns the index entries of the files; no `head.json`."""

    def fetch(lo: int, hi: int) -> Mapping[str, Tensor]:
        return {name: tensor[lo - start : hi - start] for name, tensor in tensors.items()}

    metadata = {key: str(value) for key, value in notes.items()}
    written = write_rows(folder, prefix, specs_of(tensors), start, stop, fetch, file_bytes, metadata=metadata)
    return [asdict(entry) for entry in written]


def check_cover(entries: Iterable[Mapping[str, Any]], num_classes: int, folder: str | Path) -> list[Mapping[str, Any]]:
    """The entries in order of classes. Raises DataError unless they cover [0, num_classes) exactly once."""
    ordered = sorted((e for e in entries if e["start"] < e["stop"]), key=lambda e: (e["start"], e["stop"]))
    reached = 0
    for before, entry in zip([None, *ordered], ordered, strict=False):
        if entry["start"] > reached:
            raise DataError(f"{folder}: no file holds the classes [{reached}, {entry['start']}) of the head.")
        if before is not None and entry["start"] < reached:
            overlap = f"[{entry['start']}, {min(reached, entry['stop'])})"
            raise DataError(
                f"{folder}: two files hold the classes {overlap} of the head: {before['file']} and {entry['file']}. "
                "Were saves of different numbers of workers mixed?"
            )
        reached = entry["stop"]
    if reached < num_classes:
        raise DataError(f"{folder}: no file holds the classes [{reached}, {num_classes}) of the head.")
    if reached > num_classes:
        raise DataError(f"{folder}: the files hold {reached} classes, the head has {num_classes}.")
    return ordered


def read_header(
    path: Path, holds: str
) -> tuple[dict[str, tuple[TensorSpec, int]], dict[str, str], dict[str, int], int]:
    """(spec, rows) of each tensor, metadata, where each tensor's data begin, size of a safetensors file.

    Raises DataError when the file is missing, cut off or no safetensors file; `holds` says what is lost with it.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(size, 100_000_000):
                raise ValueError("the header's length is wrong")
            content = json.loads(file.read(length))
        metadata = content.pop("__metadata__", {})
        specs, begins, end = {}, {}, 0
        for name, item in content.items():
            rows, *shape = item["shape"] or [0]
            specs[name] = (TensorSpec(item["dtype"], tuple(shape)), rows)
            begin, stop = item["data_offsets"]
            if stop - begin != rows * specs[name][0].row_bytes:
                raise ValueError(f"{name} has the wrong number of bytes")
            begins[name], end = 8 + length + begin, max(end, 8 + length + stop)
    except FileNotFoundError:
        raise DataError(f"{path}: missing; it holds {holds}.") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise DataError(f"{path}: cut off or not a safetensors file: {error}") from error
    if size < end:
        raise DataError(f"{path}: cut off: it has {size} of {end} bytes.")
    return specs, metadata, begins, size
