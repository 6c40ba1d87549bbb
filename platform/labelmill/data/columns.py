"""Label columns of tables as people keep them -> label columns of a data set.

Classes come as integers, which stay the ids, or as names, which get ids in sorted order. Lists come as Arrow
lists or as text with a separator.

Shape legend: R rows, N labels of all rows end to end.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from labelmill.data.labels import Form, LabelSpec, check_labels
from labelmill.errors import DataError, did_you_mean

Keys: TypeAlias = Sequence[str] | pa.ChunkedArray
"""Sample keys, to name what is wrong."""

_INTEGER = r"^(0|[1-9][0-9]{0,17})$"


@dataclass(frozen=True)
class LabelSource:
    """Which columns of a table hold the label, and how to read them.

    Attributes:
        form: the label form.
        column: the label; for continuous labels also several columns, one a dimension.
        weight_column: weights of soft labels, if they aren't in `column` as JSON objects {class: weight}.
        negative_column: known negatives of partial labels.
        separator: between the labels of a list kept as text.
        num_classes: size of the label space; by default what the labels need.
        class_names: the label space in id order; by default the sorted names that occur.
    """

    form: Form = "none"
    column: str | Sequence[str] | None = None
    weight_column: str | None = None
    negative_column: str | None = None
    separator: str = ";"
    num_classes: int | None = None
    class_names: Sequence[str] | None = None

    @property
    def columns(self) -> list[str]:
        """Names of all columns concerned."""
        main = [self.column] if isinstance(self.column, str) else list(self.column or [])
        return main + [c for c in (self.weight_column, self.negative_column) if c]


@dataclass(frozen=True)
class ImportedLabels:
    """Labels ready to write: form, Arrow columns of R rows, the label space where there are classes."""

    spec: LabelSpec
    columns: dict[str, pa.Array]
    classes: pa.Table | None


@dataclass
class _Ragged:
    """A list of class tokens for each row: `tokens` (N,) strings or int64, `lengths` (R,)."""

    tokens: pa.Array
    lengths: np.ndarray

    def row(self, n: int) -> int:
        """Row of token `n`."""
        return int(np.searchsorted(np.cumsum(self.lengths), n, side="right"))


def read_labels_of(table: pa.Table, source: LabelSource, where: str, keys: Keys = ()) -> ImportedLabels:
    """The label columns of `table` by `source`, checked.

    Raises DataError naming file and row (counted from 1) for a missing column, an unreadable or wrong label,
    a name that isn't in `class_names`.
    """
    _check_source(table, source, where)
    form = source.form
    if form == "none":
        spec = LabelSpec(form="none", num_classes=source.num_classes)
        return ImportedLabels(spec, {}, None)
    if form == "continuous":
        return _continuous(table, source, where, keys)
    weights: pa.Array | None = None
    main = _plain(table, source.columns[0])
    if form == "soft" and source.weight_column is None:
        label, weights = _soft_objects(main, where, source.columns[0])
    elif form == "single":
        label = _Ragged(_tokens(main, where, source.columns[0]), np.ones(len(main), dtype=np.int64))
    else:
        label = _lists(main, source.separator, where, source.columns[0])
    parts = [label]
    if source.weight_column is not None:
        weights = _numbers(_plain(table, source.weight_column), source.separator, where, source.weight_column)
    if source.negative_column is not None:
        parts.append(_lists(_plain(table, source.negative_column), source.separator, where, source.negative_column))
    ids, names = _to_ids(parts, source, where)
    size = source.num_classes or (len(names) if names else 1 + max((int(i.max(initial=-1)) for i in ids), default=-1))
    if size < 1:
        raise DataError(f"{where}: no row has a label; give num_classes, or import with label form 'none'.")
    if names and len(names) > size:
        raise DataError(f"{where}: {len(names)} class names, but num_classes is {size}.")
    columns: dict[str, pa.Array] = {}
    columns["label"] = pa.array(ids[0]) if form == "single" else _list_array(ids[0], label.lengths)
    if weights is not None:
        columns["label_weight"] = weights
    if form == "partial":
        other = parts[1] if len(parts) > 1 else _Ragged(pa.array([], pa.int64()), np.zeros(len(main), dtype=np.int64))
        columns["label_negative"] = _list_array(ids[1] if len(parts) > 1 else np.empty(0, np.int64), other.lengths)
    spec = LabelSpec(form=form, num_classes=size)
    _check(columns, spec, where, keys)
    given = list(names or [])
    classes = pa.table({"name": pa.array(given + [str(i) for i in range(len(given), size)], pa.string())})
    return ImportedLabels(spec, columns, classes)


def _check_source(table: pa.Table, source: LabelSource, where: str) -> None:
    if source.form not in get_args(Form):
        raise DataError(f"label form {source.form!r} is unknown.{did_you_mean(source.form, get_args(Form))}")
    if source.form == "none":
        if source.columns:
            raise DataError(f"{where}: a label column is named, so give its form: single, multi, soft, ...")
        return
    if not source.columns or source.column is None:
        raise DataError(f"{where}: labels of form {source.form!r} need a label column.")
    if missing := [name for name in source.columns if name not in table.column_names]:
        raise DataError(f"{where}: no column {missing[0]!r}.{did_you_mean(missing[0], table.column_names)}")
    if not isinstance(source.column, str) and source.form != "continuous":
        raise DataError(f"{where}: only continuous labels spread over several columns; name one.")
    if source.weight_column and source.form != "soft":
        raise DataError(f"{where}: a weight column belongs to soft labels, the form is {source.form!r}.")
    if source.negative_column and source.form != "partial":
        raise DataError(f"{where}: a column of negatives belongs to partial labels, the form is {source.form!r}.")
    if source.class_names is not None and len(set(source.class_names)) != len(source.class_names):
        raise DataError(f"{where}: class_names holds a name twice.")


def _check(columns: dict[str, pa.Array], spec: LabelSpec, where: str, keys: Keys) -> None:
    named = keys if isinstance(keys, pa.ChunkedArray) else pa.array(keys, pa.string())
    table = pa.table({"key": named, **columns} if len(keys) else columns)
    check_labels(table, spec, where, first_row=1)


def _plain(table: pa.Table, name: str) -> pa.Array:
    """A column as one Array without dictionary encoding and large or fixed-size variants."""
    column = table.column(name)
    kind = column.type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        kind = pa.list_(kind.value_type)
    if pa.types.is_list(kind) and pa.types.is_dictionary(kind.value_type):
        kind = pa.list_(kind.value_type.value_type)
    if pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        kind = pa.string()
    column = column.cast(kind).combine_chunks()
    return column if isinstance(column, pa.Array) else pa.concat_arrays(column.chunks or [pa.array([], kind)])


def _missing(column: pa.Array, where: str, name: str) -> None:
    if column.null_count:
        row = column.is_null().index(True).as_py()
        raise DataError(f"{where}: row {row + 1}: {name} is missing. For no label at all, write an empty list.")


def _tokens(values: pa.Array, where: str, name: str) -> pa.Array:
    """Class tokens as strings without blanks around them, or as int64."""
    _missing(values, where, name)
    if pa.types.is_integer(values.type):
        return values.cast(pa.int64())
    if pa.types.is_boolean(values.type):
        return values.cast(pa.int64())
    if not pa.types.is_string(values.type):
        raise DataError(f"{where}: column {name!r} is {values.type}; classes are integers or names.")
    trimmed = pc.utf8_trim_whitespace(values)
    if pc.any(pc.equal(trimmed, "")).as_py():
        row = pc.index(trimmed, "").as_py()
        raise DataError(f"{where}: row {row + 1}: {name} is empty.")
    return trimmed


def _lists(column: pa.Array, separator: str, where: str, name: str) -> _Ragged:
    _missing(column, where, name)
    if pa.types.is_string(column.type):
        split = pc.split_pattern(column, separator)
        parents = pc.list_parent_indices(split).to_numpy(zero_copy_only=False)
        tokens = pc.utf8_trim_whitespace(split.flatten())
        real = pc.not_equal(tokens, "")
        lengths = np.bincount(parents[real.to_numpy(zero_copy_only=False)], minlength=len(column))
        return _Ragged(tokens.filter(real), lengths)
    if pa.types.is_list(column.type):
        lengths = pc.list_value_length(column).to_numpy(zero_copy_only=False).astype(np.int64)
        flat = column.flatten()
        if pa.types.is_null(flat.type):
            flat = flat.cast(pa.int64())
        return _Ragged(_tokens(flat, where, name), lengths)
    return _Ragged(_tokens(column, where, name), np.ones(len(column), dtype=np.int64))


def _numbers(column: pa.Array, separator: str, where: str, name: str) -> pa.Array:
    """A list<float32> column from lists, numbers, or text with separators."""
    _missing(column, where, name)
    wanted = pa.list_(pa.float32())
    if pa.types.is_string(column.type):
        ragged = _lists(column, separator, where, name)
        try:
            return _list_array(ragged.tokens.cast(pa.float32()), ragged.lengths)
        except pa.ArrowInvalid:
            n = next(i for i, t in enumerate(ragged.tokens.to_pylist()) if not _is_number(t))
            text, row = ragged.tokens[n].as_py(), ragged.row(n)
            raise DataError(f"{where}: row {row + 1}: {name} holds {text!r}, which isn't a number.") from None
    try:
        if pa.types.is_list(column.type):
            return column.cast(wanted, safe=False)
        return _list_array(column.cast(pa.float32(), safe=False), np.ones(len(column), dtype=np.int64))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise DataError(f"{where}: column {name!r} is {column.type}, not numbers: {error}") from None


def _is_number(text: str) -> bool:
    try:
        pa.scalar(text).cast(pa.float32())
    except pa.ArrowInvalid:
        return False
    return True


def _soft_objects(column: pa.Array, where: str, name: str) -> tuple[_Ragged, pa.Array]:
    """JSON objects {class: weight}."""
    _missing(column, where, name)
    if not pa.types.is_string(column.type):
        raise DataError(
            f"{where}: soft labels in one column are JSON objects {{class: weight}} as text, but {name!r} is "
            f"{column.type}. With two list columns, name the one with the weights as well."
        )
    tokens: list[str] = []
    weights: list[float] = []
    lengths = np.zeros(len(column), dtype=np.int64)
    for row, text in enumerate(column.to_pylist()):
        try:
            entry = json.loads(text)
            tokens += [str(k) for k in entry]
            weights += [float(v) for v in entry.values()]
            lengths[row] = len(entry)
        except (ValueError, AttributeError, TypeError):
            what = f'{name} {text[:60]!r} isn\'t a JSON object such as {{"cat": 0.7, "dog": 0.3}}'
            raise DataError(f"{where}: row {row + 1}: {what}.") from None
    return _Ragged(pa.array(tokens, pa.string()), lengths), _list_array(pa.array(weights, pa.float32()), lengths)


def _continuous(table: pa.Table, source: LabelSource, where: str, keys: Keys) -> ImportedLabels:
    columns = [_numbers(_plain(table, n), source.separator, where, n) for n in source.columns]
    label = columns[0]
    if len(columns) > 1:
        flat = [c.flatten().to_numpy(zero_copy_only=False) for c in columns]
        if any(len(f) != table.num_rows for f in flat):
            raise DataError(f"{where}: continuous labels in several columns need one number in each cell.")
        label = _list_array(pa.array(np.stack(flat, axis=1).ravel()), np.full(table.num_rows, len(flat)))
    dim = int(pc.max(pc.list_value_length(label)).as_py() or 0)
    if dim < 1:
        raise DataError(f"{where}: no row has a continuous label.")
    spec = LabelSpec(form="continuous", dim=dim)
    _check({"label": label}, spec, where, keys)
    return ImportedLabels(spec, {"label": label}, None)


def _to_ids(parts: list[_Ragged], source: LabelSource, where: str) -> tuple[list[np.ndarray], list[str] | None]:
    """Ids (N,) of each part, over one label space; the class names where labels are names."""
    texts = [p.tokens for p in parts if pa.types.is_string(p.tokens.type)]
    all_integers = all(pc.all(pc.match_substring_regex(t, _INTEGER)).as_py() is not False for t in texts)
    names = list(source.class_names) if source.class_names is not None else None
    if all_integers and names is not None:  # "3" is id 3, unless the names themselves are numbers
        space = pa.array(names, pa.string())
        all_integers = not all(pc.all(pc.is_in(t, space)).as_py() for t in texts)
    if texts and not all_integers:
        if len(texts) < len(parts):
            raise DataError(f"{where}: some label columns hold names, others integers; use one kind.")
        if names is None:
            names = sorted(set().union(*(t.unique().to_pylist() for t in texts)))
        space = pa.array(names, pa.string())
        return [_ids_of_names(part, space, where) for part in parts], names
    return [p.tokens.cast(pa.int64()).to_numpy(zero_copy_only=False) for p in parts], names


def _ids_of_names(part: _Ragged, space: pa.Array, where: str) -> np.ndarray:
    ids = pc.index_in(part.tokens, space)
    if ids.null_count:
        n = ids.is_null().index(True).as_py()
        name = part.tokens[n].as_py()
        known: list[Any] = space.to_pylist()[:10_000]
        raise DataError(
            f"{where}: row {part.row(n) + 1}: {name!r} isn't one of the {len(space)} class names."
            f"{did_you_mean(name, known)}"
        )
    return ids.cast(pa.int64()).to_numpy(zero_copy_only=False)


def _list_array(values: Any, lengths: np.ndarray) -> pa.Array:
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values) if isinstance(values, np.ndarray) else values)
