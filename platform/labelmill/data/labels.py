"""Label forms: what a label is, on disk and in a batch. This module owns them; nothing else parses labels.

form            Arrow columns of a shard table                              batch (`Labels`)
single          label int64                                                 ids_BP, P = 1
multi           label list<int64>: every class that applies                 ids_BP
soft            label list<int64>, label_weight list<float32>               ids_BP, weights_BP
partial         label list<int64>: known positives, label_negative          ids_BP, negatives_BQ
                list<int64>: known negatives, the rest is unknown
complementary   label list<int64>: classes that the sample is NOT           negatives_BQ, ids_BP is empty
continuous      label list<float32> of length dim                           values_BD
none            no column                                                   ids_BP is empty

Shape legend: B samples, P most positives of a sample, Q most negatives, D target dimensions, C classes,
N ids of all samples end to end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, model_validator

from labelmill.errors import DataError
from labelmill.job import StrictModel

if TYPE_CHECKING:
    import torch

Form = Literal["single", "multi", "soft", "partial", "complementary", "continuous", "none"]

_IDS = pa.list_(pa.int64())
_REALS = pa.list_(pa.float32())
_COLUMNS: dict[str, dict[str, pa.DataType]] = {
    "single": {"label": pa.int64()},
    "multi": {"label": _IDS},
    "soft": {"label": _IDS, "label_weight": _REALS},
    "partial": {"label": _IDS, "label_negative": _IDS},
    "complementary": {"label": _IDS},
    "continuous": {"label": _REALS},
    "none": {},
}
LABEL_COLUMNS = frozenset({"label", "label_weight", "label_negative"})
"""Every column name that a label form may use."""


class LabelSpec(StrictModel):
    """The label form of a data set and the size of its label space."""

    form: Form = Field(description="how samples are labelled")
    num_classes: int | None = Field(None, ge=1, description="classes; valid ids are 0 ... num_classes - 1")
    dim: int | None = Field(None, ge=1, description="values of a continuous label")

    @model_validator(mode="after")
    def _sizes_fit_form(self) -> LabelSpec:
        if self.form == "continuous":
            if self.dim is None or self.num_classes is not None:
                raise ValueError("a continuous label needs dim and has no num_classes")
        elif self.dim is not None:
            raise ValueError(f"dim is for continuous labels, the form is {self.form!r}")
        elif self.form != "none" and self.num_classes is None:
            raise ValueError(f"labels of form {self.form!r} need num_classes")
        return self

    @property
    def columns(self) -> dict[str, pa.DataType]:
        """Arrow columns that hold the label, by name."""
        return _COLUMNS[self.form]


@dataclass(frozen=True)
class Labels:
    """Labels of a batch as tensors; which fields are set depends on the form (table at the top of this file).

    Attributes:
        form: the label form.
        ids_BP: int64, classes that apply, padded with -1 on the right.
        weights_BP: float32, weight of each id, 0 where padded; soft labels only.
        negatives_BQ: int64, classes known not to apply, padded with -1; partial and complementary labels
            only.
        values_BD: float32 targets; continuous labels only.
    """

    form: Form
    ids_BP: torch.Tensor
    weights_BP: torch.Tensor | None = None
    negatives_BQ: torch.Tensor | None = None
    values_BD: torch.Tensor | None = None

    def __len__(self) -> int:
        return self.ids_BP.shape[0]

    @property
    def single_B(self) -> torch.Tensor:
        """int64 (B,): the one class of each sample. Raises DataError for another form."""
        if self.form != "single":
            raise DataError(f"this needs one class per sample, but the labels are of form {self.form!r}.")
        return self.ids_BP[:, 0]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Labels:
        """The labels on `device`."""
        return self._map(lambda t: t.to(device, non_blocking=non_blocking))

    def slice(self, lo: int, hi: int) -> Labels:
        """Labels of the samples `[lo, hi)`; views, not copies."""
        return self._map(lambda t: t[lo:hi])

    @staticmethod
    def concat(parts: Sequence[Labels]) -> Labels:
        """All parts in order, padded to the widest. Raises ValueError for no part or mixed forms."""
        if len({part.form for part in parts}) != 1:
            raise ValueError(f"can't join labels of forms {sorted({part.form for part in parts})}")
        first = parts[0]
        return Labels(
            first.form,
            _cat_padded([part.ids_BP for part in parts], -1),
            None if first.weights_BP is None else _cat_padded([part.weights_BP for part in parts], 0.0),
            None if first.negatives_BQ is None else _cat_padded([part.negatives_BQ for part in parts], -1),
            None if first.values_BD is None else _cat_padded([part.values_BD for part in parts], 0.0),
        )

    def _map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Labels:
        return Labels(
            self.form,
            change(self.ids_BP),
            None if self.weights_BP is None else change(self.weights_BP),
            None if self.negatives_BQ is None else change(self.negatives_BQ),
            None if self.values_BD is None else change(self.values_BD),
        )


def _cat_padded(maybe: Sequence[torch.Tensor | None], fill: float) -> torch.Tensor:
    import torch
    from torch.nn.functional import pad

    tensors = [t for t in maybe if t is not None]  # labels of one form: all or none
    width = max(t.shape[1] for t in tensors)
    return torch.cat([pad(t, (0, width - t.shape[1]), value=fill) for t in tensors])


# --- Arrow -> tensors -----------------------------------------------------------------------------------


def labels_from_table(table: pa.Table, spec: LabelSpec) -> Labels:
    """The label columns of `table` (B rows) as tensors. Values are not checked: `check_labels` does that.

    Raises DataError when a label column is missing or has another type.
    """
    import torch

    columns = _typed_columns(table, spec, "table")
    rows = table.num_rows
    none_B0 = torch.empty((rows, 0), dtype=torch.int64)
    if spec.form == "none":
        return Labels("none", none_B0)
    label = columns["label"]
    if spec.form == "single":
        # a copy: Arrow memory is read-only, torch tensors are not
        return Labels("single", torch.from_numpy(label.to_numpy(zero_copy_only=False).copy()).unsqueeze(1))
    if spec.form == "continuous":
        values_BD, _ = _padded(label, 0.0, np.float32, spec.dim)
        return Labels("continuous", none_B0, values_BD=torch.from_numpy(values_BD))
    ids, _ = _padded(label, -1, np.int64)
    if spec.form == "complementary":
        return Labels("complementary", none_B0, negatives_BQ=torch.from_numpy(ids))
    weights = negatives = None
    if spec.form == "soft":
        weights = torch.from_numpy(_padded(columns["label_weight"], 0.0, np.float32, ids.shape[1])[0])
    if spec.form == "partial":
        negatives = torch.from_numpy(_padded(columns["label_negative"], -1, np.int64)[0])
    return Labels(spec.form, torch.from_numpy(ids), weights, negatives)


def _padded(column: pa.Array, fill: float, dtype: type, width: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """List column -> ((B, width) array padded with `fill`, (B,) lengths)."""
    values, lengths = ragged(column)
    widest = int(lengths.max(initial=0)) if width is None else width
    out: np.ndarray = np.full((len(lengths), widest), fill, dtype=dtype)
    out[np.arange(widest)[None, :] < lengths[:, None]] = values
    return out, lengths


def ragged(column: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """List column of B rows -> (values end to end (N,), lengths (B,)); a null list counts as empty."""
    lengths = pc.fill_null(pc.list_value_length(column), 0)
    return column.flatten().to_numpy(zero_copy_only=False), lengths.to_numpy(zero_copy_only=False).astype(np.int64)


def _typed_columns(table: pa.Table, spec: LabelSpec, where: str) -> dict[str, pa.Array]:
    """The label columns, each as one Array of the form's type."""
    out: dict[str, pa.Array] = {}
    for name, wanted in spec.columns.items():
        if name not in table.column_names:
            raise DataError(
                f"{where}: labels of form {spec.form!r} need a column {name!r} ({wanted}); "
                f"found {', '.join(table.column_names) or 'no column'}."
            )
        column = table.column(name)
        if column.type != wanted:
            try:
                column = column.cast(wanted)
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
                raise DataError(
                    f"{where}: column {name!r} is {column.type}, labels of form {spec.form!r} need {wanted} ({error})."
                ) from None
        chunks = column.chunks
        out[name] = chunks[0] if len(chunks) == 1 else pa.concat_arrays(chunks) if chunks else pa.array([], wanted)
    return out


# --- checks ---------------------------------------------------------------------------------------------


class LabelError(DataError):
    """A wrong label; `key` is the sample's, if the table has keys."""

    key: str | None = None


class _Check:
    """One table's labels under check; knows how to name the first offending sample."""

    def __init__(self, table: pa.Table, spec: LabelSpec, where: str, first_row: int | None) -> None:
        self.spec, self.where, self.first_row = spec, where, first_row
        self.keys = table.column("key") if "key" in table.column_names else []
        self.columns = _typed_columns(table, spec, where)

    def fail(self, bad_rows: np.ndarray, what: str) -> NoReturn:
        """Raises DataError for the first of `bad_rows` (row numbers in rising order)."""
        row = int(bad_rows[0])
        names = [f"row {row + (self.first_row or 0)}"] if self.first_row is not None or not self.keys else []
        names += [f"sample {self.keys[row].as_py()!r}"] if self.keys else []
        name = ", ".join(names)
        count = len(np.unique(bad_rows))
        others = f" {count - 1} more sample(s) are wrong in the same way." if count > 1 else ""
        error = LabelError(f"{self.where}: {name}: {what}{others}")
        error.key = self.keys[row].as_py() if self.keys else None
        raise error

    def no_nulls(self, name: str) -> None:
        column = self.columns[name]
        if column.null_count:
            self.fail(np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False)), f"{name} is missing (null).")
        if pa.types.is_list(column.type) and column.flatten().null_count:
            bad = np.flatnonzero(column.flatten().is_null().to_numpy(zero_copy_only=False))
            lengths = pc.list_value_length(column).to_numpy(zero_copy_only=False)
            self.fail(np.repeat(np.arange(len(lengths)), lengths)[bad], f"{name} holds a null.")

    def in_range(self, name: str, ids_N: np.ndarray, rows_N: np.ndarray) -> None:
        size = self.spec.num_classes
        assert size is not None
        # ids seen as unsigned: a negative id becomes huge, so that one comparison finds both ends
        if not len(ids_N) or int(ids_N.view(np.uint64).max()) < size:
            return
        bad = np.flatnonzero(ids_N.view(np.uint64) >= size)
        self.fail(
            rows_N[bad],
            f"{name} {int(ids_N[bad[0]])} is out of range: the data set has {size} classes, valid ids are "
            f"0 ... {size - 1}. Correct the label, or num_classes.",
        )

    def distinct(self, name: str, ids_N: np.ndarray, rows_N: np.ndarray, message: str = "twice") -> None:
        """No (row, id) pair occurs twice."""
        pairs = rows_N.astype(np.int64) * (self.spec.num_classes or 0) + ids_N
        if (np.diff(pairs) > 0).all():  # usual case: ids are sorted within each sample
            return
        order = np.argsort(pairs, kind="stable")
        again = order[1:][np.diff(pairs[order]) == 0]
        if len(again):
            again = again[np.argsort(rows_N[again], kind="stable")]
            self.fail(rows_N[again], f"{name} lists class {int(ids_N[again[0]])} {message}.")

    def id_list(self, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Checks a list of ids; returns (ids (N,), row of each (N,), lengths (B,))."""
        self.no_nulls(name)
        ids_N, lengths_B = ragged(self.columns[name])
        rows_N = np.repeat(np.arange(len(lengths_B)), lengths_B)
        self.in_range(name, ids_N, rows_N)
        self.distinct(name, ids_N, rows_N)
        return ids_N, rows_N, lengths_B


def check_labels(table: pa.Table, spec: LabelSpec, where: str, first_row: int | None = None) -> None:
    """Checks every label of `table`; `where` (a file) opens the message.

    With `first_row`, messages also give the row's number, counted from `first_row`.

    Raises:
        LabelError (a DataError): names the first wrong sample by key, its value, the valid range, and how
            many more are
            wrong: a missing column or value, an id outside 0 ... num_classes - 1, an id twice in a sample, a
            weight that is negative, not finite, or all zero, a class that is positive and negative at once,
            every class excluded, a continuous label of another length or with a value that is not finite.
    """
    check = _Check(table, spec, where, first_row)
    if spec.form == "none":
        return
    if spec.form == "single":
        check.no_nulls("label")
        ids_B = check.columns["label"].to_numpy(zero_copy_only=False)
        check.in_range("label", ids_B, np.arange(len(ids_B)))
    elif spec.form == "continuous":
        _check_continuous(check)
    else:
        ids_N, rows_N, lengths_B = check.id_list("label")
        if spec.form == "soft":
            _check_weights(check, rows_N, lengths_B)
        elif spec.form == "partial":
            other_N, other_rows_N, _ = check.id_list("label_negative")
            both, rows = np.concatenate([ids_N, other_N]), np.concatenate([rows_N, other_rows_N])
            check.distinct("label and label_negative", both, rows, "as positive and as negative")
        elif spec.form == "complementary" and (lengths_B >= spec.num_classes).any():
            check.fail(np.flatnonzero(lengths_B >= spec.num_classes), "every class is excluded, none is left.")


def _check_continuous(check: _Check) -> None:
    check.no_nulls("label")
    values_N, lengths_B = ragged(check.columns["label"])
    if (wrong := np.flatnonzero(lengths_B != check.spec.dim)).size:
        found, dim = int(lengths_B[wrong[0]]), check.spec.dim
        check.fail(wrong, f"label has {found} value(s), the data set's continuous labels have {dim}.")
    if (wrong := np.flatnonzero(~np.isfinite(values_N))).size:
        check.fail(wrong // (check.spec.dim or 1), f"label holds {values_N[wrong[0]]}, which is not a finite number.")


def _check_weights(check: _Check, rows_N: np.ndarray, lengths_B: np.ndarray) -> None:
    check.no_nulls("label_weight")
    weights_N, weight_lengths_B = ragged(check.columns["label_weight"])
    if (wrong := np.flatnonzero(weight_lengths_B != lengths_B)).size:
        i = wrong[0]
        check.fail(wrong, f"label has {lengths_B[i]} class(es) but label_weight has {weight_lengths_B[i]} weight(s).")
    if (wrong := np.flatnonzero(~(np.isfinite(weights_N) & (weights_N >= 0)))).size:
        check.fail(rows_N[wrong], f"label_weight holds {weights_N[wrong[0]]}; weights are finite and not negative.")
    if (wrong := np.flatnonzero(np.bincount(rows_N, weights_N, minlength=len(lengths_B)) <= 0)).size:
        check.fail(wrong, "a soft label needs at least one class with a weight above 0.")


def count_labels(table: pa.Table, spec: LabelSpec) -> np.ndarray:
    """int64 (C,): samples of each class in `table`; for complementary labels, samples that exclude it.

    For soft labels a class counts where its weight is above 0. Raises DataError for forms without classes.
    """
    if spec.num_classes is None or "label" not in spec.columns:
        raise DataError(f"labels of form {spec.form!r} have no classes to count.")
    columns = _typed_columns(table, spec, "table")
    label = columns["label"]
    ids_N = label.to_numpy(zero_copy_only=False) if spec.form == "single" else ragged(label)[0]
    if spec.form == "soft":
        ids_N = ids_N[ragged(columns["label_weight"])[0] > 0]
    return np.bincount(ids_N, minlength=spec.num_classes)
