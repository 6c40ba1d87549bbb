"""Label members of a tar shard -> label columns.

Single labels are an ASCII integer in `<key>.cls`, the other forms a JSON object with the names of the label columns in
`<key>.labels.json`.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from labelmill.data.labels import LabelSpec
from labelmill.data.spans import Fail, Spans

_ERRORS = (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError)


def label_ext(spec: LabelSpec) -> str:
    """Extension of the member that holds the label."""
    return "cls" if spec.form == "single" else "labels.json"


def empty_label(kind: pa.DataType) -> Any:
    """What a hole has for a label: class 0, or an empty list."""
    return [] if pa.types.is_list(kind) else 0


def parse_labels(raw: Spans, spec: LabelSpec, good: np.ndarray, fail: Fail) -> dict[str, pa.Array]:
    """Label columns (N,) by name. Only values where the mask `good` is set are looked at; the others, and those that
    `fail` was told of, get an empty label.
    """
    rows = np.flatnonzero(good)
    if spec.form == "single":
        return {"label": _integers(raw, rows, fail)}
    objects: list[dict[str, Any] | None] = [None] * len(raw)
    for row in rows.tolist():
        text = raw.value(row)
        try:
            value = json.loads(text)
            _ = [value[name] for name in spec.columns]
            objects[row] = value
        except (ValueError, KeyError, TypeError, IndexError, RecursionError):
            needed = ", ".join(spec.columns)
            fail(row, f"its labels.json {text[:60]!r} isn't an object with {needed}")
    return {name: _column(objects, name, kind, fail) for name, kind in spec.columns.items()}


def _integers(raw: Spans, rows: np.ndarray, fail: Fail) -> pa.Array:
    try:
        found = pc.utf8_trim_whitespace(raw.take(rows).join(pa.string())).cast(pa.int64())
        values = found.to_numpy()
    except pa.ArrowInvalid:
        values = np.zeros(len(rows), dtype=np.int64)
        for n, row in enumerate(rows.tolist()):
            text = raw.value(row)
            try:
                values[n] = pa.scalar(text.decode().strip()).cast(pa.int64()).as_py()
            except (ValueError, pa.ArrowInvalid):
                fail(row, f"its label {text[:40]!r} isn't an integer")
    out = np.zeros(len(raw), dtype=np.int64)
    out[rows] = values
    return pa.array(out)


def _column(objects: list[dict[str, Any] | None], name: str, kind: pa.DataType, fail: Fail) -> pa.Array:
    nothing = empty_label(kind)
    values = [nothing if o is None else o[name] for o in objects]
    try:
        return pa.array(values, kind)
    except _ERRORS:
        for row, value in enumerate(values):
            if not _fits(value, kind):
                fail(row, f"its {name} {value!r} isn't of type {kind}")
                values[row] = nothing
        return pa.array(values, kind)


def _fits(value: Any, kind: pa.DataType) -> bool:
    try:
        pa.array([value], kind)
    except _ERRORS:
        return False
    return True
