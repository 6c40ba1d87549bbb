"""Reading the files of a sharded head (`storage`): any range of classes, verified, in bounded memory."""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from labelmill.errors import DataError
from labelmill.heads.storage import (
    FORMAT,
    INDEX,
    RowFile,
    Specs,
    TensorSpec,
    check_cover,
    read_header,
    rows_per_page,
    view_of,
)

_RANGE_NAME = re.compile(r"(?:rows|head)-(\d+)-(\d+)\.safetensors")


class RowSource:
    """A folder of head files, read by class range. Make it with `open_rows`.

    Attributes:
        num_classes: C.
        specs: the tensors by name.
        notes: what the writer noted (steps, seed, ...).
        files: in order of classes.
    """

    def __init__(
        self, folder: Path, num_classes: int, specs: Specs, notes: Mapping[str, Any], files: Sequence[RowFile]
    ) -> None:
        self.folder, self.num_classes, self.notes, self.files = folder, num_classes, notes, tuple(files)
        self.specs = dict(specs)
        self._headers: dict[str, dict[str, int]] = {}

    @property
    def dim(self) -> int:
        """Embedding size D. Raises DataError when there are no rows."""
        return self._row_shape()[-1]

    @property
    def sub_centres(self) -> int:
        """Rows a class; with several, their axis stands before D."""
        return prod(self._row_shape()[:-1])

    @property
    def normalized(self) -> bool:
        """Whether the head compares directions; files made before this was noted say `normalized`."""
        return bool(self.notes.get("normalize", self.notes.get("normalized", True)))

    def _row_shape(self) -> tuple[int, ...]:
        spec = self.specs.get("rows")
        if spec is None or len(spec.shape) not in (1, 2) or not spec.torch_dtype.is_floating_point:
            raise DataError(f"{self.folder}: holds {sorted(self.specs)}, no floating 'rows'.")
        return spec.shape

    def pages(self, rows: int | None = None) -> Iterator[tuple[int, int]]:
        """Class ranges of at most `rows` (default: about a page) that together are all classes."""
        step = rows or rows_per_page(self.specs)
        for lo in range(0, self.num_classes, step):
            yield lo, min(lo + step, self.num_classes)

    def read(self, lo: int, hi: int, names: Iterable[str] | None = None) -> dict[str, Tensor]:
        """The tensors of the classes [lo, hi), verified."""
        into = {name: self.specs[name].empty(hi - lo) for name in (self.specs if names is None else names)}
        self.read_into(into, lo, hi)
        return into

    def read_into(self, into: Mapping[str, Tensor], lo: int, hi: int) -> None:
        """Fills tensors (hi - lo, ...) with the classes [lo, hi), verified; widens narrower floats.

        Raises DataError for a tensor that isn't there, has another shape or a wider dtype, and for a missing,
        cut or damaged file.
        """
        self.check_targets(into)
        meets = [entry for entry in self.files if max(lo, entry.start) < min(hi, entry.stop)]
        for number, entry in enumerate(meets):
            for soon in meets[number : number + 2]:
                self._read_ahead(soon, into, lo, hi)
            with _OpenFile(self, entry) as file:
                for page_lo, page_hi in file.pages(max(lo, entry.start), min(hi, entry.stop)):
                    a, b = max(lo, page_lo), min(hi, page_hi)
                    for name, tensor in into.items():
                        file.read_page(name, page_lo, page_hi, a, b, tensor[a - lo : b - lo])

    def _read_ahead(self, entry: RowFile, names: Iterable[str], lo: int, hi: int) -> None:
        """Has the system fetch what will be read, so that the disk works while checksums are made."""
        if not hasattr(os, "posix_fadvise") or not (self.folder / entry.file).is_file():
            return
        offsets, ahead = self._offsets(entry), 8 * entry.page_rows  # who reads page by page asks again at once
        with (self.folder / entry.file).open("rb", buffering=0) as file:
            for name in names:
                size = self.specs[name].row_bytes
                first, last = max(lo, entry.start) - entry.start, min(hi + ahead, entry.stop) - entry.start
                at = offsets[name] + first * size
                os.posix_fadvise(file.fileno(), at, (last - first) * size, os.POSIX_FADV_WILLNEED)

    def take_into(self, into: Mapping[str, Tensor], ids_K: Tensor, at_K: Tensor | None = None) -> None:
        """Puts the classes `ids_K` at rows `at_K` of tensors (by default 0 to K - 1), verified.

        Each page that holds one of them is read once.

        Raises DataError as `read_into`, and for ids out of range.
        """
        self.check_targets(into)
        if ids_K.numel() and (int(ids_K.min()) < 0 or int(ids_K.max()) >= self.num_classes):
            bad = ids_K[(ids_K < 0) | (ids_K >= self.num_classes)][0]
            raise DataError(f"{self.folder}: class {int(bad)} is out of range: it holds 0 to {self.num_classes - 1}.")
        order_K = torch.argsort(ids_K, stable=True)
        sorted_K = ids_K[order_K].contiguous()
        order_K = order_K if at_K is None else at_K[order_K]
        for entry in self.files:
            first, last = torch.searchsorted(sorted_K, torch.tensor([entry.start, entry.stop])).tolist()
            if first == last:
                continue
            with _OpenFile(self, entry) as file:
                while first < last:
                    page_lo, page_hi = next(file.pages(int(sorted_K[first]), int(sorted_K[first]) + 1))
                    until = int(torch.searchsorted(sorted_K, page_hi))
                    places, wanted = order_K[first:until], sorted_K[first:until] - page_lo
                    a, b, at = page_lo + int(wanted[0]), page_lo + int(wanted[-1]) + 1, int(places[0])
                    run = b - a == until - first and bool((places.diff() == 1).all())  # the usual case
                    for name, tensor in into.items():
                        if run:
                            file.read_page(name, page_lo, page_hi, a, b, tensor[at : at + b - a])
                            continue
                        page = self.specs[name].empty(page_hi - page_lo)
                        file.read_page(name, page_lo, page_hi, page_lo, page_hi, page)
                        tensor[places.to(tensor.device)] = page[wanted].to(tensor.device, tensor.dtype)
                    first = until

    def verify(self) -> None:
        """Reads everything once. Raises DataError for a missing, cut or damaged file."""
        for lo, hi in self.pages():
            self.read(lo, hi)

    def check_targets(self, into: Mapping[str, Tensor]) -> None:
        """Raises DataError for tensors that aren't there, have another shape or a narrower dtype than the files."""
        for name, tensor in into.items():
            spec = self.specs.get(name)
            if spec is None:
                raise DataError(
                    f"{self.folder}: holds {sorted(self.specs)}, not {name!r}: another row optimizer wrote it."
                )
            if spec.shape != tuple(tensor.shape[1:]):
                raise DataError(
                    f"{self.folder}: a row of {name!r} has shape {list(spec.shape)}, the head needs "
                    f"{list(tensor.shape[1:])}."
                )
            if torch.promote_types(spec.torch_dtype, tensor.dtype) != tensor.dtype:
                raise DataError(
                    f"{self.folder}: {name!r} is {_name(spec.torch_dtype)}, the head's is {_name(tensor.dtype)}, which "
                    "would lose digits. Convert the files first: labelmill head convert --dtype."
                )

    def _offsets(self, entry: RowFile) -> dict[str, int]:
        """Where each tensor's data begin in a file; checks the file's header and size on first use."""
        if entry.file not in self._headers:
            path = self.folder / entry.file
            specs, _, begins, size = read_header(path, f"the classes [{entry.start}, {entry.stop}) of the head")
            if size != entry.bytes:
                raise DataError(f"{path}: has {size} bytes, its index says {entry.bytes}: it was cut off or replaced.")
            rows = entry.stop - entry.start
            for name, spec in self.specs.items():
                found, count = specs.get(name, (None, 0))
                if found != spec or count != rows:
                    raise DataError(
                        f"{path}: {name!r} is {found and (found.dtype, [count, *found.shape])}, expected "
                        f"{spec.dtype, [rows, *spec.shape]}: it doesn't belong to this head."
                    )
            self._headers[entry.file] = begins
        return self._headers[entry.file]


class _OpenFile:
    """A row file while it is read."""

    def __init__(self, source: RowSource, entry: RowFile) -> None:
        self.source, self.entry = source, entry
        self.path = source.folder / entry.file
        self.offsets = source._offsets(entry)

    def __enter__(self) -> _OpenFile:
        self.file = open(self.path, "rb", buffering=0)
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()

    def pages(self, lo: int, hi: int) -> Iterator[tuple[int, int]]:
        """Class ranges of the pages that meet [lo, hi)."""
        entry, rows = self.entry, self.entry.page_rows
        first = entry.start + (lo - entry.start) // rows * rows
        for at in range(first, hi, rows):
            yield at, min(at + rows, entry.stop)

    def read_page(self, name: str, page_lo: int, page_hi: int, lo: int, hi: int, target: Tensor) -> None:
        """Reads and verifies a page of a tensor, and copies its classes [lo, hi) to `target`."""
        spec = self.source.specs[name]
        whole = (lo, hi) == (page_lo, page_hi) and target.dtype == spec.torch_dtype
        straight = whole and target.device.type == "cpu" and target.is_contiguous()
        page = target if straight else spec.empty(page_hi - page_lo)
        data = view_of(page)
        at = self.offsets[name] + (page_lo - self.entry.start) * spec.row_bytes
        done = 0
        while done < len(data):
            count = os.preadv(self.file.fileno(), [data[done:]], at + done)
            if not count:
                raise DataError(f"{self.path}: cut off; it lacks the end of {name!r}.")
            done += count
        sums = self.entry.crc32.get(name)
        if sums is not None and zlib.crc32(data) != sums[(page_lo - self.entry.start) // self.entry.page_rows]:
            raise DataError(
                f"{self.path}: damaged: {name!r} of the classes [{page_lo}, {page_hi}) doesn't fit its checksum. "
                "Take an older checkpoint or another copy."
            )
        if not straight:
            target.copy_(page[lo - page_lo : hi - page_lo])


def open_rows(folder: str | Path) -> RowSource:
    """The head files of a folder: by its `head.json`, else by the ranges in the files' names.

    Raises DataError for a folder without head files, an index that can't be read, and files that don't cover each
    class exactly once. Files are looked at when they are read.
    """
    folder = Path(folder)
    path = folder / INDEX
    if not path.is_file():
        return _open_named(folder)
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        known = {key: index.get(key) for key in FORMAT}
        if known != FORMAT:
            raise DataError(f"{path}: is {known}, this labelmill reads {FORMAT}.")
        specs = {n: TensorSpec(s["dtype"], tuple(s["shape"])) for n, s in index["tensors"].items()}
        files = [RowFile(**entry) for entry in check_cover(index["files"], index["num_classes"], folder)]
        for entry in files:
            if Path(entry.file).name != entry.file:
                raise DataError(f"{path}: names the file {entry.file!r}, which isn't in its folder.")
        return RowSource(folder, int(index["num_classes"]), specs, index["notes"], files)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: not a readable index of head files: {error!r}") from error


def _open_named(folder: Path) -> RowSource:
    found = [(f.name, m) for f in sorted(folder.glob("*.safetensors")) if (m := _RANGE_NAME.fullmatch(f.name))]
    if not found:
        raise DataError(f"{folder}: holds no head: neither {INDEX} nor files rows-*.safetensors or head-*.safetensors.")
    entries: list[dict[str, Any]] = [{"file": name, "start": int(m[1]), "stop": int(m[2])} for name, m in found]
    count = max(entry["stop"] for entry in entries)
    for name, _ in found:  # a save that was cut off may lack files at the end
        _, noted, _, _ = read_header(folder / name, "classes of the head")
        count = max(count, int(noted.get("num_classes", 0)))
    ordered = check_cover(entries, count, folder)
    specs, notes, files = dict[str, TensorSpec](), dict[str, Any](), list[RowFile]()
    for entry in ordered:
        named, metadata, _, size = read_header(folder / entry["file"], "classes of the head")
        specs = specs or {name: spec for name, (spec, _) in named.items()}
        notes = notes or {key: _value(text) for key, text in metadata.items()}
        files.append(RowFile(entry["file"], entry["start"], entry["stop"], size, rows_per_page(specs)))
    return RowSource(folder, files[-1].stop, specs, notes, files)


def _value(text: str) -> Any:
    try:
        return json.loads(text.lower() if text in ("True", "False") else text)
    except ValueError:
        return text


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
