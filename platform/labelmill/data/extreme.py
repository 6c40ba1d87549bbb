"""Importing the extreme classification repository's sparse text format, with label texts.

Three kinds of files: `trn_X_Y.txt` and `tst_X_Y.txt` (or `train.txt`, `test.txt` with features too), sparse matrices whose
first line is `rows columns` (or `rows features labels`) and whose lines are `label:value label:value ...` (or
`l1,l2 f:v f:v`); and texts, one a line: `train_raw_texts.txt`, `test_raw_texts.txt`, `label_raw_texts.txt` (the repository's
raw text releases name them `trn_X.txt`, `tst_X.txt`, `Y.txt`). Texts may be gzipped.

Shape legend: N samples, L labels.
"""

from __future__ import annotations

import gzip
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Unpack

import numpy as np
import pyarrow as pa

from labelmill.data import store
from labelmill.data.columns import ImportedLabels
from labelmill.data.importers import WriteOptions, write_import
from labelmill.data.keys import clean_key
from labelmill.data.labels import LabelSpec
from labelmill.data.manifest import FieldSpec, Manifest
from labelmill.errors import DataError

PLACEHOLDER = "(no text)"
"""What a label without text is encoded as."""


@dataclass(frozen=True)
class SparseLabels:
    """Labels of N samples end to end.

    Attributes:
        ids: int64, rising within a sample.
        lengths_N: labels of each sample.
        num_labels: L.
        values: relevance of each label of `ids`.
    """

    ids: np.ndarray
    lengths_N: np.ndarray
    num_labels: int
    values: np.ndarray


def read_lines(path: str | os.PathLike[str]) -> Iterator[str]:
    """Lines of a text file, plain or gzip, UTF-8; bad bytes are replaced."""
    where = store.normal(path)
    if not store.exists(where) and store.exists(where + ".gz"):
        where += ".gz"
    raw = store.read_bytes(where).to_pybytes()
    raw = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    text = raw.decode("utf-8", errors="replace")
    yield from text.removesuffix("\n").split("\n") if text else ()


def read_sparse_labels(path: str | os.PathLike[str]) -> SparseLabels:
    """The labels of a sparse file of either kind.

    Raises DataError naming the line: a header that is none, another number of rows, an id out of range, twice in a row, or
    not a number.
    """
    lines = read_lines(path)
    header = next(lines, "").split()
    if len(header) not in (2, 3) or not all(part.isdigit() for part in header):
        raise DataError(f"{os.fspath(path)}: line 1: expected `rows labels` or `rows features labels`, not {header}.")
    rows, num_labels = int(header[0]), int(header[-1])
    ids: list[int] = []
    values: list[float] = []
    lengths: list[int] = []
    for number, line in enumerate(lines, start=2):
        found = _labels_of(line, len(header) == 3, f"{os.fspath(path)}: line {number}")
        for label in found:
            if not 0 <= label < num_labels:
                raise DataError(
                    f"{os.fspath(path)}: line {number}: label {label} is out of range: ids run from 0 to {num_labels - 1}."
                )
        ids += sorted(found)
        values += [found[label] for label in sorted(found)]
        lengths.append(len(found))
    if len(lengths) != rows:
        raise DataError(f"{os.fspath(path)}: the first line says {rows} rows, {len(lengths)} follow.")
    return SparseLabels(np.array(ids, np.int64), np.array(lengths, np.int64), num_labels, np.array(values, np.float32))


def _labels_of(line: str, features: bool, where: str) -> dict[int, float]:
    """Labels of a line with their values. Raises DataError."""
    found: dict[int, float] = {}
    first = (line.split(" ", 1)[0].split(",") if line[:1] != " " else []) if features else line.split()
    for part in first:
        if features and ":" in part:  # a line without labels begins with its features
            break
        label, _, value = part.partition(":")
        try:
            number, worth = int(label), float(value) if value else 1.0
        except ValueError:
            if not part:
                continue
            raise DataError(f"{where}: {part!r} is no label; write id or id:value.") from None
        if number in found:
            raise DataError(f"{where}: label {number} stands there twice.")
        found[number] = worth
    return found


def import_extreme(
    texts: str | os.PathLike[str],
    labels: str | os.PathLike[str],
    label_texts: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    soft: bool = False,
    drop_unlabelled: bool = True,
    **options: Unpack[WriteOptions],
) -> tuple[Manifest, int, int]:
    """One part (train or test) of a data set in the repository's format. The field is `text`, classes are label texts.

    Args:
        texts: a line a sample; `title->content` keeps its arrow.
        labels: the sparse file.
        label_texts: a line a label. Empty ones become `(no text)`.
        soft: keep the values as weights (form soft); otherwise the form is multi and values are ignored.
        drop_unlabelled: samples without a label are left out; otherwise they stay with an empty list.

    Returns the manifest, samples left out, and labels without text. Raises DataError for files that don't fit together.
    """
    sparse = read_sparse_labels(labels)
    names = list(read_lines(label_texts))
    lines = list(read_lines(texts))
    if len(names) != sparse.num_labels:
        raise DataError(
            f"{os.fspath(label_texts)}: has {len(names)} lines, {os.fspath(labels)} {sparse.num_labels} labels."
        )
    if len(lines) != len(sparse.lengths_N):
        raise DataError(
            f"{os.fspath(texts)}: has {len(lines)} lines, {os.fspath(labels)} {len(sparse.lengths_N)} rows."
        )
    keep_N = sparse.lengths_N > 0 if drop_unlabelled else np.ones(len(lines), bool)
    ids = sparse.ids  # those of dropped samples are none
    offsets = np.concatenate([[0], np.cumsum(sparse.lengths_N[keep_N])]).astype(np.int32)
    columns = {"label": pa.ListArray.from_arrays(pa.array(offsets), pa.array(ids))}
    if soft:
        columns["label_weight"] = pa.ListArray.from_arrays(pa.array(offsets), pa.array(sparse.values))
    spec = LabelSpec(form="soft" if soft else "multi", num_classes=sparse.num_labels)
    missing = sum(not name.strip() for name in names)
    classes = pa.table({"name": [name if name.strip() else PLACEHOLDER for name in names]})
    stem = clean_key(str(options.get("name") or os.path.basename(os.fspath(texts)).partition(".")[0]))
    kept = np.flatnonzero(keep_N)
    manifest = write_multi_label(
        [f"{stem}-{i:08d}" for i in kept], [lines[i] for i in kept], columns, spec, classes, out, stem, **options
    )
    return manifest, int((~keep_N).sum()), missing


def write_multi_label(
    keys: list[str],
    texts: list[str],
    columns: dict[str, pa.Array],
    spec: LabelSpec,
    classes: pa.Table,
    out: str | os.PathLike[str],
    default_name: str,
    importer: str = "extreme",
    **options: Unpack[WriteOptions],
) -> Manifest:
    """A data set of texts with lists of labels, packed. `classes` has at least the column `name`."""
    column = pa.array(texts, pa.string())
    options = {"rows_per_member": 1024, **options}
    made = write_import(
        out,
        default_name,
        keys,
        {"text": FieldSpec(kind="text", ext="txt")},
        ImportedLabels(spec, dict(columns), classes),
        lambda rows: {"text": column.take(pa.array(rows))},
        importer,
        "packed",
        options,
    )
    return next(iter(made.values()))


def label_lists(rows: list[list[int]]) -> pa.Array:
    """Lists of label ids as a column."""
    return pa.array(rows, pa.list_(pa.int64()))
