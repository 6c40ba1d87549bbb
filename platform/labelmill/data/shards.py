"""Reading shards: one read per shard, checked against the manifest, as an Arrow table.

Two layouts, both valid tars that WebDataset reads as well:

tar      one member per field and sample, `<key>.<ext>`; labels in `<key>.cls` (ASCII integer, single labels)
or
         `<key>.labels.json` (other forms: an object with the names of the label columns)
packed   one member per block of samples, `<first key>.arrow`, an Arrow IPC stream with the columns of the
table: for
         small samples, where two tar headers would outweigh the content

A shard that isn't what the manifest says is an error, never a shorter shard.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from labelmill.data import store
from labelmill.data.labels import LABEL_COLUMNS, LabelSpec, count_labels
from labelmill.data.manifest import FieldSpec, Manifest
from labelmill.data.tar import TarDamage, TarIndex, parse_tar
from labelmill.errors import DataError

_MEND = (
    "Copy the shard again from where it came from, or import the data set again; `labelmill data verify` "
    "checks every shard."
)
_MAX_BINARY = 2**31 - 1  # bytes of one Arrow binary chunk


class ShardDamage(DataError):
    """A shard that isn't what the manifest says, or can't be read.

    Attributes:
        reason: what is wrong, without place and remedy.
        shard: path of the shard.
        offset: byte offset where it goes wrong, if known.
        key: first sample that can't be trusted, if known.
        found, expected: whole samples in the shard, samples by the manifest.
    """

    reason: str = ""
    shard: str = ""
    offset: int | None = None
    key: str | None = None
    found: int | None = None
    expected: int | None = None

    @classmethod
    def of(
        cls,
        shard: str,
        reason: str,
        offset: int | None = None,
        key: str | None = None,
        found: int | None = None,
        expected: int | None = None,
    ) -> ShardDamage:
        """Builds the message. (Not the constructor: exceptions travel between processes by their message.)"""
        text = f"{shard}: {reason}"
        text += f" at byte {offset}" if offset is not None else ""
        if found is not None:
            text += f"; {found} whole samples found" + (f", {expected} expected" if expected is not None else "")
        text += f"; first sample concerned: {key!r}" if key is not None else ""
        error = cls(f"{text}. {_MEND}")
        error.reason, error.shard, error.offset, error.key = reason, shard, offset, key
        error.found, error.expected = found, expected
        return error


def read_shard(manifest: Manifest, i: int, verify: bool = True) -> pa.Table:
    """Shard `i` as a table with the columns of `manifest.schema`: `key`, each field, the labels.

    Args:
        manifest: the data set.
        i: index of the shard.
        verify: compare the content with the manifest's sha256. Size and count are compared in any case.

    Raises:
        ShardDamage (a DataError): the shard is cut, damaged, changed, or holds a sample that can't be read;
            names the shard, the byte offset, samples found and expected, the first sample concerned where it
            can be told.
        DataError: the file is missing, or its label overlay doesn't belong to it.
    """
    info, path = manifest.shards[i], manifest.shard_path(i)
    data = store.read_bytes(path)
    digest = hashlib.sha256(data).hexdigest() if verify else info.sha256
    # content is looked at even when it is known to be wrong: to say where
    table = _parse(
        data, manifest, path, info.samples, labelled=info.labels is None, trusted=verify and digest == info.sha256
    )
    if table.num_rows != info.samples:
        raise ShardDamage.of(path, "wrong number of samples", found=table.num_rows, expected=info.samples)
    if data.size != info.bytes:
        reason = f"{data.size} bytes long instead of {info.bytes}"
        raise ShardDamage.of(path, reason, found=table.num_rows, expected=info.samples)
    if digest != info.sha256:
        reason = f"the content changed since it was written (sha256 {digest[:12]}..., not {info.sha256[:12]}...)"
        raise ShardDamage.of(path, reason, found=table.num_rows, expected=info.samples)
    if info.labels is None:
        return table
    overlay = _read_overlay(manifest, i, verify)
    _check_aligned(table.column("key"), overlay.column("key"), manifest.labels_path(i) or "", path)
    for name in manifest.label.columns:
        table = table.append_column(name, overlay.column(name))
    return table


def read_labels(manifest: Manifest, i: int, verify: bool = True) -> pa.Table:
    """`key` and label columns of shard `i`, from the overlay alone if there is one. See `read_shard`."""
    if manifest.shards[i].labels is not None:
        return _read_overlay(manifest, i, verify)
    return read_shard(manifest, i, verify).select(["key", *manifest.label.columns])


def label_counts(manifest: Manifest, verify: bool = True) -> np.ndarray:
    """int64 (C,): samples of each class over all shards, counted from the labels (see `count_labels`)."""
    total = np.zeros(manifest.label.num_classes or 0, dtype=np.int64)
    for i in range(len(manifest.shards)):
        total = total + count_labels(read_labels(manifest, i, verify), manifest.label)
    return total


# --- the tar -------------------------------------------------------------------------------------------


@dataclass
class Samples:
    """A tar's samples: `members[i]` maps extension to member number of sample `keys[i]`."""

    keys: list[str]
    members: list[dict[str, int]]


def group_members(index: TarIndex, where: str) -> Samples:
    """Groups consecutive members of one key, by WebDataset's rule: the key ends at the base name's first dot.

    Files without an extension, hidden files and `__name__` entries are passed over, as WebDataset does.
    Raises ShardDamage when a sample has two members of one extension, or its members don't follow each other.
    """
    keys: list[str] = []
    members: list[dict[str, int]] = []
    seen: set[str] = set()
    current: str | None = None
    for i, name in enumerate(index.names):
        base = name.rfind("/") + 1
        dot = name.find(".", base)
        if dot <= base:  # no extension, or hidden
            continue
        key, ext = name[:dot], name[dot + 1 :].lower()
        if key != current:
            if key in seen:
                reason = f"sample {key!r} occurs twice, or its members don't follow each other"
                raise ShardDamage.of(where, reason, offset=index.offsets[i], key=key, found=len(keys) - 1)
            current = key
            seen.add(key)
            keys.append(key)
            members.append({})
        if ext in members[-1]:
            reason = f"sample {key!r} has two members of extension {ext!r}"
            raise ShardDamage.of(where, reason, offset=index.offsets[i], key=key, found=len(keys) - 1)
        members[-1][ext] = i
    return Samples(keys, members)


def _parse(data: pa.Buffer, manifest: Manifest, path: str, expected: int, labelled: bool, trusted: bool) -> pa.Table:
    view = memoryview(data)
    try:
        index = parse_tar(view)
        if not index.ended and _whole_samples(index, data, manifest, path, labelled)[0] != expected:
            raise TarDamage("no end-of-archive marker: cut between two members", index.end, index)
    except TarDamage as damage:
        found, key = _whole_samples(damage.index, data, manifest, path, labelled)
        base = damage.name.rfind("/") + 1
        if (dot := damage.name.find(".", base)) > base:
            key = damage.name[:dot]
        raise ShardDamage.of(path, damage.reason, damage.offset, key, found, expected) from None
    try:
        if manifest.layout == "packed":
            return _unpack(data, index, manifest, path, labelled, trusted)
        return _collect(view, index, manifest, path, labelled)
    except ShardDamage as damage:
        raise ShardDamage.of(path, damage.reason, damage.offset, damage.key, damage.found, expected) from None


def _whole_samples(
    index: TarIndex, data: pa.Buffer, manifest: Manifest, path: str, labelled: bool
) -> tuple[int, str | None]:
    """How many samples are complete, and the key of the first that isn't."""
    if manifest.layout == "packed":
        return _unpack(data, index, manifest, path, labelled, trusted=False).num_rows, None
    wanted = [spec.exts for spec in manifest.fields.values()]
    wanted += [(_label_ext(manifest.label),)] if labelled and manifest.label.columns else []
    samples = group_members(index, path)
    whole = [all(any(e in m for e in exts) for exts in wanted) for m in samples.members]
    return sum(whole), samples.keys[whole.index(False)] if False in whole else None


def _label_ext(spec: LabelSpec) -> str:
    return "cls" if spec.form == "single" else "labels.json"


# --- layout "tar" --------------------------------------------------------------------------------------


def _collect(view: memoryview, index: TarIndex, manifest: Manifest, path: str, labelled: bool) -> pa.Table:
    samples = group_members(index, path)
    keys = samples.keys
    offsets, sizes = np.array(index.offsets, dtype=np.int64), np.array(index.sizes, dtype=np.int64)

    def column(exts: Sequence[str], what: str) -> pa.ChunkedArray:
        if len(exts) == 1:
            which = [m.get(exts[0], -1) for m in samples.members]
        else:
            which = [next((m[e] for e in exts if e in m), -1) for m in samples.members]
        if -1 in which:
            row = which.index(-1)
            reason = f"sample {keys[row]!r} has no {what} (member .{' or .'.join(exts)})"
            raise ShardDamage.of(path, reason, key=keys[row])
        return _gather(view, offsets[which], sizes[which])

    def fail(row: int, reason: str) -> ShardDamage:
        place = samples.members[row].values()
        return ShardDamage.of(path, f"sample {keys[row]!r}: {reason}", min(offsets[i] for i in place).item(), keys[row])

    columns: dict[str, Any] = {"key": pa.array(keys, pa.string())}
    for name, spec in manifest.fields.items():
        columns[name] = _typed(column(spec.exts, f"field {name!r}"), spec, fail)
    if labelled and manifest.label.columns:
        raw = column((_label_ext(manifest.label),), "label")
        columns.update(_parse_labels(raw, manifest.label, fail))
    return pa.table(columns)


def _gather(view: memoryview, offsets: np.ndarray, sizes: np.ndarray) -> pa.ChunkedArray:
    """Slices of `view` as binary values: one copy, in chunks that 32-bit offsets can address."""
    ends = np.cumsum(sizes)
    chunks: list[pa.Array] = []
    first = 0
    while first < len(sizes) or not chunks:
        base = int(ends[first - 1]) if first else 0
        last = int(np.searchsorted(ends, base + _MAX_BINARY, side="right"))
        if last == first and first < len(sizes):
            raise DataError(f"a member of {int(sizes[first])} bytes is too large: at most {_MAX_BINARY} can be read.")
        spans = zip(offsets[first:last].tolist(), sizes[first:last].tolist(), strict=True)
        content = pa.py_buffer(b"".join([view[o : o + s] for o, s in spans]))
        starts = np.concatenate([[0], ends[first:last] - base]).astype(np.int32)
        chunks.append(pa.Array.from_buffers(pa.binary(), last - first, [None, pa.py_buffer(starts), content]))
        first = last
    return pa.chunked_array(chunks)


Fail = Callable[[int, str], ShardDamage]


def _typed(column: pa.ChunkedArray, spec: FieldSpec, fail: Fail) -> pa.ChunkedArray:
    """Raw member contents as the field's column type."""
    wanted = spec.arrow_type
    if wanted == pa.binary():
        return column
    if wanted == pa.string():
        try:
            return column.cast(pa.string())
        except pa.ArrowInvalid:
            row = _first_bad(column, lambda raw: raw.decode("utf-8"))
            raise fail(row, "its text isn't UTF-8") from None
    rows = []
    for i, raw in enumerate(column.to_pylist()):
        try:
            array = np.load(io.BytesIO(raw), allow_pickle=False)
        except (ValueError, EOFError, OSError) as error:
            raise fail(i, f"its array isn't readable as NPY: {error}") from None
        if array.shape != spec.shape or array.dtype != np.dtype(spec.dtype):
            found = f"{array.dtype}{list(array.shape)}"
            raise fail(i, f"its array is {found}, the manifest says {spec.dtype}{list(spec.shape or ())}") from None
        rows.append(array.ravel())
    flat = np.concatenate(rows) if rows else np.empty(0, dtype=spec.dtype)
    return pa.chunked_array([pa.FixedSizeListArray.from_arrays(pa.array(flat), type=wanted)])


def _parse_labels(raw: pa.ChunkedArray, spec: LabelSpec, fail: Fail) -> dict[str, pa.ChunkedArray]:
    if spec.form == "single":
        try:
            return {"label": pc.utf8_trim_whitespace(raw.cast(pa.string())).cast(pa.int64())}
        except pa.ArrowInvalid:
            row = _first_bad(raw, lambda text: pa.scalar(text.decode().strip()).cast(pa.int64()))
            raise fail(row, f"its label {raw[row].as_py()[:40]!r} isn't an integer") from None
    objects: list[dict[str, Any]] = []
    for row, text in enumerate(raw.to_pylist()):
        try:
            objects.append(json.loads(text))
            _ = [objects[-1][name] for name in spec.columns]
        except (ValueError, KeyError, TypeError, IndexError):
            needed = ", ".join(spec.columns)
            raise fail(row, f"its labels.json {text[:60]!r} isn't an object with {needed}") from None
    out = {}
    for name, kind in spec.columns.items():
        values = [o[name] for o in objects]
        try:
            out[name] = pa.chunked_array([pa.array(values, kind)])
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
            row = next(i for i, v in enumerate(values) if not _fits(v, kind))
            raise fail(row, f"its {name} {values[row]!r} isn't of type {kind}") from None
    return out


def _fits(value: Any, kind: pa.DataType) -> bool:
    try:
        pa.array([value], kind)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
        return False
    return True


def _first_bad(column: pa.ChunkedArray, parse: Callable[[bytes], object]) -> int:
    for row, raw in enumerate(column.to_pylist()):
        try:
            parse(raw)
        except (ValueError, pa.ArrowInvalid):
            return row
    raise AssertionError("every value parses one by one, but not together")


# --- layout "packed" and overlays ----------------------------------------------------------------------


def _unpack(data: pa.Buffer, index: TarIndex, manifest: Manifest, path: str, labelled: bool, trusted: bool) -> pa.Table:
    schema = manifest.schema
    if not labelled:
        schema = pa.schema([f for f in schema if f.name not in LABEL_COLUMNS])
    tables: list[pa.Table] = []
    for name, offset, size in zip(index.names, index.offsets, index.sizes, strict=True):
        found = sum(t.num_rows for t in tables)
        if not name.endswith(".arrow"):
            raise ShardDamage.of(path, f"member {name!r} isn't an .arrow block of a packed shard", offset, found=found)
        try:
            table = pa.ipc.open_stream(data.slice(offset, size)).read_all().select(schema.names)
            if not trusted:  # bytes nobody vouches for may hold offsets that lead anywhere
                table.validate(full=True)
            tables.append(table if table.schema.equals(schema) else table.cast(schema))
        except (pa.ArrowException, KeyError, OSError) as error:
            reason = f"block {name!r} can't be read ({error})"
            raise ShardDamage.of(path, reason, offset, name.removesuffix(".arrow"), found) from None
    return pa.concat_tables(tables) if tables else schema.empty_table()


def _read_overlay(manifest: Manifest, i: int, verify: bool) -> pa.Table:
    """The overlay file of shard `i`: `key` and label columns."""
    info, path = manifest.shards[i], manifest.labels_path(i)
    assert path is not None
    data = store.read_bytes(path)
    if verify and hashlib.sha256(data).hexdigest() != info.labels_sha256:
        raise DataError(
            f"{path}: the labels changed since they were written (sha256 differs). Write the overlay again."
        )
    try:
        table = pa.ipc.open_file(data).read_all().select(["key", *manifest.label.columns])
        if not verify:
            table.validate(full=True)
    except (pa.ArrowException, KeyError, OSError) as error:
        raise DataError(f"{path}: the labels can't be read ({error}). Write the overlay again.") from None
    if table.num_rows != info.samples:
        raise DataError(f"{path}: {table.num_rows} labels for {info.samples} samples. Write the overlay again.")
    return table


def _check_aligned(keys: pa.ChunkedArray, other: pa.ChunkedArray, labels_path: str, shard_path: str) -> None:
    if keys.equals(other):
        return
    row = pc.index(pc.equal(keys, other), False).as_py()
    raise DataError(
        f"{labels_path}: row {row} labels sample {other[row].as_py()!r}, but {shard_path} has "
        f"{keys[row].as_py()!r} there. Labels of an overlay lie row for row beside their shard: write the "
        "overlay again in the shard's order."
    )


HOLE = "__hole__"


class Shard:
    def __init__(self, table, manifest, fields):
        self.table = table
        self.damage = []


def open_shard(manifest, i, *, rows=None, fields=None, verify=True, policy="raise", cache=None):
    t = read_shard(manifest, i, verify=verify is True)
    return Shard(
        t.drop_columns([f for f in manifest.fields if fields is not None and f not in fields]), manifest, fields
    )


def gather(shards, which, row):
    first = np.concatenate([[0], np.cumsum([s.table.num_rows for s in shards])])
    t = pa.concat_tables([s.table for s in shards]).take(pa.array(first[which] + row)).combine_chunks()
    return t.append_column(HOLE, pa.nulls(len(row), pa.string()))
