"""Byte strings that lie somewhere in a few buffers, and their way into one Arrow column: a single copy.

Shape legend: N values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from labelmill.data.manifest import FieldSpec
from labelmill.data.records import decode_npy
from labelmill.errors import DataError

MAX_BINARY = 2**31 - 1
"""Bytes of one Arrow binary chunk."""

_REACH = 1 << 30  # a view's offset has 31 bits, so larger buffers are seen through windows of this stride
_INLINE = 12  # a view holds shorter values itself
_VIEW = np.dtype([("size", "<i4"), ("inline", "V12")])
_FAR = np.dtype([("prefix", "<u4"), ("buffer", "<i4"), ("offset", "<i4")])


@dataclass(frozen=True)
class Spans:
    """N byte strings: bytes `[offset, offset + size)` of `buffers[part]`; all three arrays are (N,)."""

    buffers: list[pa.Buffer]
    part: np.ndarray
    offset: np.ndarray
    size: np.ndarray

    def __len__(self) -> int:
        return len(self.part)

    def take(self, rows: np.ndarray) -> Spans:
        """The values `rows`, in that order."""
        return Spans(self.buffers, self.part[rows], self.offset[rows], self.size[rows])

    def blank(self, rows: np.ndarray, filler: bytes = b"") -> Spans:
        """The same, with `filler` in place of the values where the bool mask `rows` is set."""
        if not rows.any():
            return self
        part = np.where(rows, len(self.buffers), self.part)
        offset, size = np.where(rows, 0, self.offset), np.where(rows, len(filler), self.size)
        return Spans([*self.buffers, pa.py_buffer(filler)], part, offset, size)

    def heads(self, width: int) -> np.ndarray:
        """uint8 (N, width): the first bytes of each value, zeros behind its end."""
        out = np.zeros((len(self), width), dtype=np.uint8)
        column = np.arange(width)
        for p in np.unique(self.part):
            rows = np.flatnonzero((self.part == p) & (self.size > 0))
            if not len(rows):
                continue
            content = np.frombuffer(self.buffers[p], dtype=np.uint8)
            places = np.minimum(self.offset[rows, None] + column, len(content) - 1)
            out[rows] = np.where(column < self.size[rows, None], content[places], 0)
        return out

    def value(self, i: int) -> bytes:
        """A copy of value `i`."""
        start = int(self.offset[i])
        return self.buffers[self.part[i]][start : start + int(self.size[i])].to_pybytes()

    def join(self, kind: pa.DataType) -> pa.ChunkedArray:
        """The values as a binary column, or as a string column (invalid UTF-8 raises pa.ArrowInvalid).

        Contiguous; more than one chunk only where 32-bit offsets can't address the whole.
        """
        self._check_bounds()
        ends = np.cumsum(self.size)
        chunks: list[pa.Array] = []
        first = 0
        while first < len(self) or not chunks:
            base = int(ends[first - 1]) if first else 0
            last = int(np.searchsorted(ends, base + MAX_BINARY, side="right"))
            if last == first and first < len(self):
                raise DataError(
                    f"a value of {int(self.size[first])} bytes is too large: at most {MAX_BINARY} can be read."
                )
            part = self if last - first == len(self) else self.take(np.arange(first, last))
            chunks.append(part._views().cast(kind))
            first = last
        return pa.chunked_array(chunks)

    def _check_bounds(self) -> None:
        lengths = np.array([b.size for b in self.buffers], dtype=np.int64)
        if len(self) and ((self.offset < 0) | (self.size < 0) | (self.offset + self.size > lengths[self.part])).any():
            raise AssertionError("a value lies outside of its buffer")

    def _views(self) -> pa.Array:
        """The values as an Arrow view array, which copies nothing: Arrow's own loops then copy them once."""
        buffers, part, offset = self.buffers, self.part, self.offset
        if any(b.size > MAX_BINARY for b in buffers):
            windows = [[b.slice(a) for a in range(0, max(b.size, 1), _REACH)] for b in buffers]
            first = np.cumsum([0, *(len(w) for w in windows)])
            part, offset = first[part] + offset // _REACH, offset % _REACH
            buffers = [b for w in windows for b in w]
        views = np.zeros(len(self), dtype=_VIEW)
        views["size"] = self.size
        far = np.zeros(len(self), dtype=_FAR)
        far["buffer"], far["offset"] = part, offset
        views["inline"] = far.view("V12")
        if len(short := np.flatnonzero(self.size <= _INLINE)):
            views["inline"][short] = self.take(short).heads(_INLINE).view("V12").ravel()
        return pa.Array.from_buffers(pa.binary_view(), len(self), [None, pa.py_buffer(views), *buffers])


def concat_spans(parts: Sequence[Spans]) -> Spans:
    """All values, in order."""
    if len(parts) == 1:
        return parts[0]
    first = np.cumsum([0, *(len(p.buffers) for p in parts)])
    return Spans(
        [b for p in parts for b in p.buffers],
        np.concatenate([p.part + first[j] for j, p in enumerate(parts)]),
        np.concatenate([p.offset for p in parts]),
        np.concatenate([p.size for p in parts]),
    )


def spans_of(column: pa.ChunkedArray) -> Spans:
    """The values of a binary or string column without nulls, in place."""
    buffers: list[pa.Buffer] = []
    sizes, offsets, parts = [], [], []
    for chunk in column.chunks:
        if not len(chunk):
            continue
        _, ends, content = chunk.buffers()
        edges = np.frombuffer(ends, dtype=np.int32)[chunk.offset : chunk.offset + len(chunk) + 1].astype(np.int64)
        parts.append(np.full(len(chunk), len(buffers), dtype=np.int64))
        buffers.append(content if content is not None else pa.py_buffer(b""))
        offsets.append(edges[:-1])
        sizes.append(np.diff(edges))
    if not buffers:
        empty = np.empty(0, dtype=np.int64)
        return Spans([], empty, empty, empty)
    return Spans(buffers, np.concatenate(parts), np.concatenate(offsets), np.concatenate(sizes))


Fail = Callable[[int, str], None]
"""Called with the number of a bad value and what is wrong with it; may raise."""


def typed_spans(spans: Spans, spec: FieldSpec, good: np.ndarray, fail: Fail) -> Spans:
    """Checks member contents against the field's type; arrays of fixed shape lose their NPY header.

    Only values where the mask `good` (N,) is set are looked at.
    """
    if spec.arrow_type == pa.string():
        _check_text(spans, good, fail)
        return spans
    if pa.types.is_fixed_size_list(spec.arrow_type):
        return _npy_bodies(spans, spec, good, fail)
    return spans


def _check_text(spans: Spans, good: np.ndarray, fail: Fail) -> None:
    rows = np.flatnonzero(good)
    try:
        spans.take(rows).join(pa.string())
    except pa.ArrowInvalid:
        for row in rows.tolist():
            try:
                spans.value(row).decode("utf-8")
            except UnicodeDecodeError:
                fail(row, "its text isn't UTF-8")


def _npy_bodies(spans: Spans, spec: FieldSpec, good: np.ndarray, fail: Fail) -> Spans:
    """The elements behind the NPY headers. Values with the first one's header are taken as they lie."""
    rows = np.flatnonzero(good)
    size = np.dtype(spec.dtype).itemsize * int(np.prod(spec.shape or (), dtype=np.int64))
    part, offset, sizes = spans.part.copy(), spans.offset.copy(), spans.size.copy()
    odd = rows
    if len(rows) and (header := _plain_header(spans.value(rows[0]), spec, size)) is not None:
        heads = spans.take(rows).heads(len(header))
        same = (sizes[rows] == len(header) + size) & (heads == np.frombuffer(header, dtype=np.uint8)).all(axis=1)
        offset[rows[same]] += len(header)
        sizes[rows[same]] = size
        odd = rows[~same]
    bodies: list[bytes] = []
    for row in odd.tolist():
        try:
            array = decode_npy(spans.value(row))
        except ValueError as error:
            fail(row, f"its array is {error}")
            continue
        if array.shape != spec.shape or array.dtype != np.dtype(spec.dtype):
            found = f"{array.dtype}{list(array.shape)}"
            fail(row, f"its array is {found}, the manifest says {spec.dtype}{list(spec.shape or ())}")
            continue
        part[row], offset[row], sizes[row] = len(spans.buffers), size * len(bodies), size
        bodies.append(array.tobytes())
    return Spans([*spans.buffers, pa.py_buffer(b"".join(bodies))], part, offset, sizes)


def _plain_header(raw: bytes, spec: FieldSpec, size: int) -> bytes | None:
    """The NPY header of a value that holds `size` bytes in C order behind it; None for anything else."""
    try:
        array = decode_npy(raw)
    except ValueError:
        return None
    fits = array.shape == spec.shape and array.dtype == np.dtype(spec.dtype) and array.flags.c_contiguous
    header = raw[: len(raw) - size]
    width = 2 if raw[6] == 1 else 4  # of the header's own length
    return header if fits and len(header) == 8 + width + int.from_bytes(raw[8 : 8 + width], "little") else None


def column_of(spans: Spans, kind: pa.DataType) -> pa.ChunkedArray:
    """The values as a column of a field's type (see `FieldSpec.arrow_type`)."""
    if not pa.types.is_fixed_size_list(kind):
        joined = spans.join(pa.binary())
        return pa.chunked_array([c.view(kind) for c in joined.chunks]) if kind == pa.string() else joined
    chunks = []
    for chunk in spans.join(pa.binary()).chunks:
        content = chunk.buffers()[2] or pa.py_buffer(b"")
        flat = pa.Array.from_buffers(kind.value_type, len(chunk) * kind.list_size, [None, content])
        chunks.append(pa.FixedSizeListArray.from_arrays(flat, type=kind))
    return pa.chunked_array(chunks, kind)


def fixed_spans(column: pa.ChunkedArray) -> Spans:
    """The values of a fixed-size list column without nulls, in place."""
    kind = column.type
    width = kind.list_size * kind.value_type.bit_width // 8
    buffers: list[pa.Buffer] = []
    offsets, parts = [], []
    for chunk in column.chunks:
        if len(chunk):
            flat = chunk.flatten()
            parts.append(np.full(len(chunk), len(buffers), dtype=np.int64))
            offsets.append((flat.offset * kind.value_type.bit_width // 8) + width * np.arange(len(chunk)))
            buffers.append(flat.buffers()[1] or pa.py_buffer(b""))
    part = np.concatenate([*parts, np.empty(0, dtype=np.int64)])
    return Spans(buffers, part, np.concatenate([*offsets, np.empty(0, np.int64)]), np.full(len(part), width))
