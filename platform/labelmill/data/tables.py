"""Reading CSV and Parquet files as Arrow tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from labelmill.data import store
from labelmill.errors import DataError, did_you_mean


def read_table(path: str, columns: Sequence[str]) -> pa.Table:
    """The named columns of a .csv, .tsv (also .gz) or .parquet file. CSV columns are text, an empty cell is
    "".

    Raises DataError: missing file, another kind of file, an unknown column (with the nearest name),
    unreadable content.
    """
    base = path.lower().removesuffix(".gz")
    if not store.exists(path):
        raise DataError(f"{path}: no such file. Give a .csv, .tsv or .parquet file.")
    data = store.read_bytes(path)
    try:
        if base.endswith((".parquet", ".pq")):
            return _parquet(path, data, columns)
        if base.endswith((".csv", ".tsv")):
            return _csv(path, data, columns, "\t" if base.endswith(".tsv") else ",")
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not readable as a table: {error}") from None
    raise DataError(f"{path}: unknown kind of table. Give a .csv, .tsv (also .gz) or .parquet file.")


def _known(path: str, names: Sequence[str], columns: Sequence[str]) -> list[str]:
    for column in columns:
        if column not in names:
            raise DataError(f"{path}: no column {column!r}.{did_you_mean(column, names)}")
    return list(dict.fromkeys(columns))


def _parquet(path: str, data: pa.Buffer, columns: Sequence[str]) -> pa.Table:
    import pyarrow.parquet as pq

    file = pq.ParquetFile(pa.BufferReader(data))
    return file.read(columns=_known(path, file.schema_arrow.names, columns))


def _csv(path: str, data: pa.Buffer, columns: Sequence[str], delimiter: str) -> pa.Table:
    from pyarrow import csv

    stream: Any = pa.BufferReader(data)
    if path.lower().endswith(".gz"):
        stream = pa.CompressedInputStream(stream, "gzip")
    wanted = dict.fromkeys(columns, pa.string())
    table = csv.read_csv(
        stream,
        read_options=csv.ReadOptions(use_threads=False),
        parse_options=csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
        convert_options=csv.ConvertOptions(column_types=wanted, strings_can_be_null=False),
    )
    return table.select(_known(path, table.column_names, columns))
