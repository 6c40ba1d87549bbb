"""Writing data sets: shards of a target size plus a manifest, all or nothing."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa

from labelmill.data import store
from labelmill.data.index import build_index, index_bytes, index_names
from labelmill.data.keys import check_keys, check_unique
from labelmill.data.labels import LabelSpec, check_labels, count_labels
from labelmill.data.manifest import (
    CLASSES_FILE,
    FieldSpec,
    Layout,
    Manifest,
    ShardInfo,
    check_classes,
    classes_bytes,
)
from labelmill.data.staging import Staging
from labelmill.data.tar import END, padding, tar_header
from labelmill.errors import DataError

TARGET_BYTES = 64 << 20
ROWS_PER_MEMBER = 1024
_SIGNATURES = {
    "png": b"\x89PNG",
    "jpg": b"\xff\xd8\xff",
    "jpeg": b"\xff\xd8\xff",
    "gif": b"GIF8",
    "bmp": b"BM",
}


class ShardWriter:
    """Writes one data set, with an index beside each shard. Use as a context manager, or call `close`; an error
    leaves nothing behind.

    Args:
        out: folder or URI of the data set; must not hold one unless `overwrite`.
        name: name of the data set and stem of its shard files.
        fields: inputs of a sample by name.
        label: label form.
        layout: "tar" or "packed" (small samples).
        target_bytes: size of a shard; only a single block larger than that exceeds it.
        rows_per_member: samples of a block of a packed shard.
        samples_per_shard: most samples of a shard, for more shards than the size alone would give.
        overwrite: replace a data set that is there.
        created_by, parents: origin, kept in the manifest.

    Raises DataError: from the start when `out` is taken, from writing for a wrong key, value or label, from
    closing for repeated keys or when nothing was written.
    """

    def __init__(
        self,
        out: str | os.PathLike[str],
        name: str,
        fields: Mapping[str, FieldSpec],
        label: LabelSpec,
        layout: Layout = "tar",
        *,
        target_bytes: int = TARGET_BYTES,
        rows_per_member: int = ROWS_PER_MEMBER,
        samples_per_shard: int | None = None,
        overwrite: bool = False,
        created_by: Mapping[str, str] | None = None,
        parents: tuple[str, ...] = (),
    ) -> None:
        self._out = store.normal(out)
        self._draft = Manifest(
            name=name,
            layout=layout,
            fields=dict(fields),
            label=label,
            shards=(),
            parents=parents,
            created_by=dict(created_by or {}),
        )
        self._schema = self._draft.schema
        self._target = target_bytes
        self._most = samples_per_shard or 2**62
        self._block = min(rows_per_member, self._most)
        if min(target_bytes, rows_per_member, self._most) < 1:
            raise ValueError("target_bytes, rows_per_member and samples_per_shard must be at least 1")
        self._staging = Staging(self._out, overwrite)
        self._rows: list[dict[str, Any]] = []  # given one by one
        self._pending: list[pa.Table] = []  # less than a block
        self._pieces: list[Any] = []  # the shard at hand
        self._bytes = self._samples = 0
        self._shards: list[ShardInfo] = []
        self._keys: list[pa.Array] = []
        self._counts: np.ndarray | int = 0
        self.manifest: Manifest | None = None

    def write(self, key: str, values: Mapping[str, Any], label: Mapping[str, Any] | None = None) -> None:
        """One sample.

        Args:
            key: see keys.py.
            values: by field: image = encoded bytes, text = str, array = numpy array or NPY bytes, bytes.
            label: by label column, such as {"label": 3} or {"label": [1, 4]}.
        """
        row = {"key": key, **values, **(label or {})}
        for name, spec in self._draft.fields.items():
            if spec.kind == "array" and isinstance(array := row.get(name), np.ndarray):
                row[name] = _array_value(array, spec, name, key)
        self._rows.append(row)
        if len(self._rows) >= self._block:
            self._take_rows()

    def write_table(self, table: pa.Table) -> None:
        """Many samples: columns `key`, every field, the label's columns, in any order, of castable types."""
        self._take_rows()
        self._append(table)

    def close(self, classes: pa.Table | None = None) -> Manifest:
        """Finishes the data set.

        Args:
            classes: label space, a row a class in id order: `name`, optional `count` (filled in from the
                written labels when absent), further columns. None: bare ids.
        """
        if self.manifest is not None:
            return self.manifest
        try:
            self._take_rows()
            if self._pending:
                self._write_block(pa.concat_tables(self._pending))
            self._finish_shard()
            if not self._shards:
                raise DataError(f"{self._out}: nothing to write: the data set {self._draft.name!r} has no sample.")
            check_unique(pa.chunked_array(self._keys), self._out)
            update: dict[str, Any] = {"shards": tuple(self._shards)}
            if classes is not None:
                data = classes_bytes(with_counts(classes, self._draft.label, self._counts, self._out))
                store.write_bytes(self._staging.path(CLASSES_FILE), data)
                update |= {"classes": CLASSES_FILE, "classes_sha256": hashlib.sha256(data).hexdigest()}
            manifest = Manifest.model_validate(self._draft.model_dump() | update)
            self.manifest = self._staging.commit(manifest)
        except BaseException:
            self.discard()
            raise
        return self.manifest

    def discard(self) -> None:
        """Drops what was written so far."""
        self._staging.discard()

    @contextmanager
    def or_nothing(self) -> Iterator[ShardWriter]:
        """Discards what was written unless the block closed the writer."""
        try:
            yield self
        finally:
            if self.manifest is None:
                self.discard()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        elif self.manifest is None:
            self.discard()

    # --- blocks and shards ---

    def _take_rows(self) -> None:
        if not self._rows:
            return
        rows, self._rows = self._rows, []
        names = set(self._schema.names)
        for row in rows:
            if row.keys() != names:
                self._wrong_columns(row, f"sample {row['key']!r}")
        try:
            table = pa.Table.from_pylist(rows, schema=self._schema)
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError) as error:
            raise self._wrong_value(rows, error) from None
        self._append(table)

    def _wrong_columns(self, found: Iterable[str], who: str) -> None:
        have, need = set(found), set(self._schema.names)
        if missing := sorted(need - have):
            raise DataError(f"{self._out}: {who} lacks {', '.join(missing)}.")
        unknown = ", ".join(sorted(have - need))
        raise DataError(f"{self._out}: {who} has {unknown}, but the data set holds {', '.join(self._schema.names)}.")

    def _wrong_value(self, rows: list[dict[str, Any]], error: Exception) -> DataError:
        for row in rows:
            for column in self._schema:
                try:
                    pa.array([row[column.name]], column.type)
                except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError) as why:
                    what = f"sample {row['key']!r}: {column.name} must be {column.type}: {why}"
                    return DataError(f"{self._out}: {what}")
        return DataError(f"{self._out}: {error}")

    def _append(self, table: pa.Table) -> None:
        if set(table.column_names) != set(self._schema.names):
            self._wrong_columns(table.column_names, "a table")
        table = table.select(self._schema.names)
        try:
            table = table if table.schema.equals(self._schema) else table.cast(self._schema)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise DataError(f"{self._out}: a table's columns don't fit the data set: {error}") from None
        check_keys(table.column("key"), self._out)
        for name in self._draft.fields:
            if table.column(name).null_count:
                row = table.column(name).is_null().index(True).as_py()
                raise DataError(f"{self._out}: sample {table.column('key')[row].as_py()!r} has no {name}.")
        check_labels(table, self._draft.label, self._out)
        if self._draft.label.num_classes is not None and self._draft.label.columns:
            self._counts = self._counts + count_labels(table, self._draft.label)
        self._keys.append(pa.concat_arrays(table.column("key").chunks or [pa.array([], pa.string())]))
        self._pending.append(table)
        waiting = sum(t.num_rows for t in self._pending)
        if waiting < self._block:
            return
        whole = pa.concat_tables(self._pending)
        if table.num_rows > self._block:  # slices of few chunks are cheap
            whole = whole.combine_chunks()
        at = 0
        while waiting - at >= self._block:
            self._write_block(whole.slice(at, self._block))
            at += self._block
        self._pending = [whole.slice(at)] if at < waiting else []

    def _write_block(self, table: pa.Table) -> None:
        if self._draft.layout == "packed":
            name = table.column("key")[0].as_py() + ".arrow"
            self._add_members([(name, _ipc_stream(table))], table.num_rows)
            return
        exts = {name: spec.exts for name, spec in self._draft.fields.items()}
        for row in table.to_pylist():
            members = [
                (f"{row['key']}.{_ext_of(row[name], exts[name])}", _member_bytes(row[name], spec))
                for name, spec in self._draft.fields.items()
            ]
            if self._draft.label.form == "single":
                members.append((f"{row['key']}.cls", str(row["label"]).encode()))
            elif self._draft.label.columns:
                labels = {name: row[name] for name in self._draft.label.columns}
                members.append((f"{row['key']}.labels.json", json.dumps(labels).encode()))
            self._add_members(members, 1)

    def _add_members(self, members: list[tuple[str, Any]], samples: int) -> None:
        """Members that stay together, in this shard or the next."""
        pieces: list[Any] = []
        for name, content in members:
            size = len(content)
            pieces += [tar_header(name, size), content, padding(size)]
        size = sum(len(piece) for piece in pieces)
        full = self._bytes + size + len(END) > self._target or self._samples + samples > self._most
        if self._samples and full:
            self._finish_shard()
        self._pieces += pieces
        self._bytes += size
        self._samples += samples

    def _finish_shard(self) -> None:
        if not self._samples:
            return
        path = f"{self._draft.name}-{len(self._shards):06d}.tar"
        data = b"".join([*self._pieces, END])
        digest = hashlib.sha256(data).hexdigest()
        store.write_bytes(self._staging.path(path), data)
        found = build_index(pa.py_buffer(data), self._draft.layout, path)
        index = index_bytes(found, digest)
        [name] = index_names([path])
        store.write_bytes(self._staging.path(name), index)
        assert found.samples == self._samples
        self._shards.append(
            ShardInfo(
                path=path,
                samples=self._samples,
                bytes=len(data),
                sha256=digest,
                index=name,
                index_sha256=hashlib.sha256(index).hexdigest(),
            )
        )
        self._pieces, self._bytes, self._samples = [], 0, 0


def with_counts(classes: pa.Table, label: LabelSpec, counts: np.ndarray | int, where: str) -> pa.Table:
    """The label space with a `count` column, by default from `counts` (C,). See `check_classes`."""
    if "count" not in classes.column_names:
        check_classes(classes, label, where)
        filled = np.broadcast_to(np.asarray(counts, dtype=np.int64), classes.num_rows)
        classes = classes.append_column("count", pa.array(filled))
    check_classes(classes, label, where)
    return classes


def _ipc_stream(table: pa.Table) -> pa.Buffer:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table.combine_chunks())
    return sink.getvalue()


def _array_value(array: np.ndarray, spec: FieldSpec, name: str, key: str) -> Any:
    if spec.arrow_type == pa.binary():
        return _npy(array)
    if array.shape != spec.shape:
        raise DataError(
            f"sample {key!r}: {name} has shape {list(array.shape)}, the data set holds {list(spec.shape or ())}."
        )
    return array.ravel()


def _npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()


def _member_bytes(value: Any, spec: FieldSpec) -> bytes:
    if isinstance(value, str):
        return value.encode()
    if isinstance(value, list):  # an array of fixed shape
        return _npy(np.array(value, dtype=spec.dtype).reshape(spec.shape or ()))
    return value


def _ext_of(value: Any, exts: tuple[str, ...]) -> str:
    """The member's extension; of several alternatives, the one that the content's signature asks for."""
    if len(exts) > 1 and isinstance(value, bytes):
        kind = "webp" if value[8:12] == b"WEBP" else None
        for ext in exts:
            last = ext.rpartition(".")[2]
            if last == kind or (last in _SIGNATURES and value.startswith(_SIGNATURES[last])):
                return ext
    return exts[0]
