"""From the places of samples in fetched buffers to rows: fields as spans, labels as columns, holes with their reason.

Shape legend: K rows at hand, N samples of the shard.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from labelmill.data.damage import WHOLE_SHARD, Damage, Policy, ShardDamage
from labelmill.data.fetch import Verify
from labelmill.data.manifest import Manifest
from labelmill.data.members import empty_label, label_ext, parse_labels
from labelmill.data.overlay_reading import check_aligned, read_overlay
from labelmill.data.scan import Places
from labelmill.data.spans import Spans, fixed_spans, spans_of, typed_spans
from labelmill.data.structure import wanted_exts

Bad = dict[int, tuple[str, int | None]]
"""By number of a row at hand: why it is a hole, and the byte offset if known."""


@dataclass(frozen=True)
class Request:
    """Which shard is read, and how."""

    manifest: Manifest
    i: int
    fields: tuple[str, ...]
    verify: Verify
    policy: Policy

    @property
    def path(self) -> str:
        """Path of the shard."""
        return self.manifest.shard_path(self.i)

    @property
    def samples(self) -> int:
        """N, by the manifest."""
        return self.manifest.shards[self.i].samples

    @property
    def labelled(self) -> bool:
        """Whether labels come from the shard itself."""
        return self.manifest.shards[self.i].labels is None and bool(self.manifest.label.columns)

    def stand_in_key(self, row: int) -> str:
        """Names a sample whose key is lost."""
        return f"{os.path.basename(self.path).removesuffix('.tar')}#{row}"


@dataclass
class Rows:
    """K samples of a shard.

    Attributes:
        number: int64 (K,): their places in the shard.
        keys: string (K,).
        fields: contents by field.
        labels: label columns (K,) by name.
        bad: the holes.
    """

    number: np.ndarray
    keys: pa.StringArray
    fields: dict[str, Spans]
    labels: dict[str, pa.Array]
    bad: Bad = field(default_factory=dict)


def rows_of_tar(request: Request, places: Places, number: np.ndarray, where: Spans, bad: Bad) -> Rows:
    """Rows of a shard in layout tar.

    Args:
        request: what was asked for.
        places: of all N samples.
        number: int64 (K,), the rows wanted.
        where: for each row, the buffer that holds its bytes, the place in the shard where that buffer begins
            (`offset`); `size` isn't used.
        bad: rows known to be bad.

    Raises ShardDamage for the first bad sample unless the policy is "sample".
    """
    manifest, count = request.manifest, len(number)
    good = np.ones(count, dtype=bool)
    good[list(bad)] = False
    keys = places.keys if len(places) == count else places.keys.take(pa.array(number))

    def fail(row: int, reason: str) -> None:
        place, key = int(places.start[number[row]]), keys[row].as_py()
        if request.policy != "sample":
            text = f"sample {key!r} {reason}" if reason.startswith("has no") else f"sample {key!r}: {reason}"
            raise ShardDamage.of(request.path, text, place, key, None, request.samples)
        bad.setdefault(row, (reason, place))
        good[row] = False

    def member(exts: Sequence[str]) -> Spans:
        offset, size = (a[number] for a in places.member(exts))
        return Spans(where.buffers, where.part, np.where(good, offset - where.offset, 0), np.where(good, size, 0))

    for what, exts in wanted_exts(manifest, request.i).items():
        for row in np.flatnonzero(good & (places.member(exts)[0][number] < 0)).tolist():
            fail(row, f"has no {what} (member .{' or .'.join(exts)})")
    fields = {}
    for name in request.fields:
        spec = manifest.fields[name]
        fields[name] = typed_spans(member(spec.exts), spec, good, fail)
    labels: dict[str, pa.Array] = {}
    if request.labelled:
        labels = parse_labels(member((label_ext(manifest.label),)), manifest.label, good, fail)
    return finish(request, Rows(number, keys, fields, labels, bad))


def rows_of_packed(request: Request, blocks: list[tuple[int, pa.Table]], number: np.ndarray, bad: Bad) -> Rows:
    """Rows of a packed shard; `blocks` are read blocks with the numbers of their first samples, in order.

    Rows in no block must be in `bad`.
    """
    schema = request.manifest.schema
    count = len(number)
    good = np.ones(count, dtype=bool)
    good[list(bad)] = False
    firsts = np.array([first for first, _ in blocks], dtype=np.int64)
    before = np.cumsum([0, *(t.num_rows for _, t in blocks)])
    block = np.searchsorted(firsts, number[good], side="right") - 1
    place = np.full(count, before[-1], dtype=np.int64)  # one behind the last: what a hole gets
    place[good] = before[block] + number[good] - firsts[block]
    whole = len(blocks) > 0 and good.all() and count == before[-1]

    def column(name: str) -> pa.ChunkedArray:
        chunks = [c for _, table in blocks for c in table.column(name).chunks]
        return pa.chunked_array(chunks, schema.field(name).type)

    def values(name: str, empty: Any) -> pa.Array:
        found = _combined(column(name))
        return found if whole else pa.concat_arrays([found, pa.array([empty], found.type)]).take(pa.array(place))

    fields = {}
    for name in request.fields:
        found = column(name)
        spans = fixed_spans(found) if pa.types.is_fixed_size_list(found.type) else spans_of(found)
        if not whole:
            hole = spans.part[:1] * 0, spans.part[:1] * 0, spans.part[:1] * 0
            if not len(spans):
                hole = (np.zeros(1, dtype=np.int64),) * 3
            padded = (np.concatenate([a, h]) for a, h in zip((spans.part, spans.offset, spans.size), hole, strict=True))
            spans = Spans(spans.buffers or [pa.py_buffer(b"")], *padded).take(place)
        fields[name] = spans
    labels = (
        {n: values(n, empty_label(k)) for n, k in request.manifest.label.columns.items()} if request.labelled else {}
    )
    return finish(request, Rows(number, values("key", ""), fields, labels, bad))


def _combined(column: pa.ChunkedArray) -> pa.Array:
    if column.num_chunks == 1:
        return column.chunk(0)
    return pa.concat_arrays(column.chunks or [pa.array([], column.type)])


def empty_rows(request: Request, bad: Bad, keys: pa.StringArray | None) -> Rows:
    """All N samples as holes."""
    count = request.samples
    nowhere = np.zeros(count, dtype=np.int64)
    fields = {name: Spans([pa.py_buffer(b"")], nowhere, nowhere, nowhere) for name in request.fields}
    labels = {}
    for name, kind in request.manifest.label.columns.items():
        labels[name] = pa.array([empty_label(kind)] * count, kind)
    none = pa.array([""] * count, pa.string())
    return finish(request, Rows(np.arange(count), keys if keys is not None else none, fields, labels, bad), False)


def finish(request: Request, rows: Rows, overlaid: bool = True) -> Rows:
    """Labels of the overlay if there is one; holes without content, label and with a key of some kind."""
    count = len(rows.number)
    hole = np.zeros(count, dtype=bool)
    hole[list(rows.bad)] = True
    if overlaid and request.manifest.shards[request.i].labels is not None:
        _lay_over(request, rows, hole)
    if not hole.any():
        return rows
    keys = rows.keys.to_pylist()
    rows.keys = pa.array(
        [k or request.stand_in_key(int(n)) for k, n in zip(keys, rows.number, strict=True)], pa.string()
    )
    for name, spans in rows.fields.items():
        kind = request.manifest.fields[name].arrow_type
        size = kind.list_size * kind.value_type.bit_width // 8 if pa.types.is_fixed_size_list(kind) else 0
        rows.fields[name] = spans.blank(hole, bytes(size))
    for name, column in rows.labels.items():
        empty = pa.array([empty_label(column.type)], column.type)
        place = np.where(hole, count, np.arange(count))
        rows.labels[name] = pa.concat_arrays([column, empty]).take(pa.array(place))
    return rows


def _lay_over(request: Request, rows: Rows, hole: np.ndarray) -> None:
    overlay = read_overlay(request.manifest, request.i, bool(request.verify))
    if len(rows.number) < overlay.num_rows:
        overlay = overlay.take(pa.array(rows.number))
    keys = _combined(overlay.column("key"))
    mine = rows.keys if not hole.any() else pc.if_else(pa.array(hole), keys, rows.keys)
    check_aligned(mine, keys, rows.number, request.manifest.labels_path(request.i) or "", request.path)
    rows.keys = keys
    rows.labels = {name: _combined(overlay.column(name)) for name in request.manifest.label.columns}


def damage_of(request: Request, rows: Rows, asked: np.ndarray | None) -> list[Damage]:
    """The holes among the rows that were asked for (None: all), in order; one entry when all have one reason."""
    if len(rows.bad) == request.samples and len(set(rows.bad.values())) == 1:
        reason, offset = rows.bad[0]
        return [Damage(request.path, WHOLE_SHARD, "", reason, offset)]
    numbers = {k: int(rows.number[k]) for k in rows.bad}
    wanted = None if asked is None else set(asked.tolist())
    holes = sorted(k for k, n in numbers.items() if wanted is None or n in wanted)
    return [Damage(request.path, numbers[k], rows.keys[k].as_py(), *rows.bad[k]) for k in holes]
