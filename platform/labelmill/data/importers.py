"""Importing what people have: image folders, IDX files, CSV and Parquet tables.

Everything is read and checked before the first byte is written. Samples are put in an order drawn from the
hash of their key (samples of a class don't lie together, whatever the source's order), and split by another
part of it, so that an import of the same data gives the same shards anywhere.

Existing WebDataset tars are taken in place: see webdataset.py.
"""

from __future__ import annotations

import gzip
import os
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, TypedDict, Unpack

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from labelmill.data import store
from labelmill.data.columns import ImportedLabels, LabelSource, read_labels_of
from labelmill.data.decode import encode_png
from labelmill.data.images import IMAGE_EXTS, image_kind
from labelmill.data.keys import assign_splits, check_keys, check_unique, clean_key, key_hashes, keys_of_paths
from labelmill.data.labels import Form, LabelSpec
from labelmill.data.manifest import FieldSpec, Layout, Manifest
from labelmill.data.staging import check_free
from labelmill.data.tables import read_table
from labelmill.data.writer import ShardWriter
from labelmill.errors import DataError

ALL = "all"
"""Name of the only part when an import isn't split."""

_CHUNK = 1024  # samples held in memory while writing
_TEXT_ROWS_PER_MEMBER = 4096
_IDX_TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


class WriteOptions(TypedDict, total=False):
    """How an import is written.

    Keys:
        name: of the data set; by default that of the source.
        split: share of each part, such as {"train": 0.9, "test": 0.1}: parts go to folders `out/<part>` and
            share one label space. Without it the data set is written to `out` itself.
        layout: "tar" (a file per sample) or "packed" (small samples).
        target_bytes, rows_per_member, samples_per_shard: see ShardWriter.
        shuffle: False keeps the source's order.
        overwrite: replace data sets that are there.
    """

    name: str
    split: Mapping[str, float] | None
    layout: Layout
    target_bytes: int
    rows_per_member: int
    samples_per_shard: int | None
    shuffle: bool
    overwrite: bool


def import_image_folder(
    root: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    class_names: Sequence[str] | None = None,
    labelled: bool = True,
    **options: Unpack[WriteOptions],
) -> dict[str, Manifest]:
    """A folder with a subfolder for each class, images anywhere below it. The field is called `image`.

    Args:
        root: the folder.
        out: where the data set goes.
        class_names: subfolders in id order; by default sorted, by value where all are numbers.
        labelled: False takes all images below `root` without labels.
        options: see WriteOptions; the layout is "tar" by default.

    Returns the manifests by part, {"all": manifest} without a split.
    Raises DataError naming the file: no image, one outside any class folder, one that isn't what its name
    says.
    """
    where = store.normal(root)
    if not store.is_folder(where):
        raise DataError(f"{where}: no such folder. Give a folder with a subfolder for each class.")
    paths = [p for p in store.list_files(where) if _is_image_path(p)]
    if not paths:
        raise DataError(f"{where}: no image ({', '.join(sorted(IMAGE_EXTS))}) in this folder or below it.")
    keys = keys_of_paths(paths)
    labels = ImportedLabels(LabelSpec(form="none"), {}, None)
    if labelled:
        if loose := [p for p in paths if "/" not in p]:
            raise DataError(
                f"{store.join(where, loose[0])}: this image lies in no class folder. Move it into one, or "
                "import without labels."
            )
        folders = [p.partition("/")[0] for p in paths]
        names = class_names or sorted(set(folders), key=_by_value(folders))
        source = LabelSource(form="single", column="folder", class_names=names)
        labels = read_labels_of(pa.table({"folder": folders}), source, where, keys)
    full = [store.join(where, p) for p in paths]
    kinds = {_checked_kind(store.read_head(p, 16), p) for p in full}

    def values(rows: np.ndarray) -> dict[str, Any]:
        return {"image": pa.array([store.read_bytes(full[i]).to_pybytes() for i in rows], pa.binary())}

    fields = {"image": FieldSpec(kind="image", ext=";".join(sorted(kinds)))}
    return write_import(out, os.path.basename(where), keys, fields, labels, values, "image-folder", "tar", options)


def _is_image_path(path: str) -> bool:
    base = path.rpartition("/")[2]
    return not base.startswith(".") and base.rpartition(".")[2].lower() in IMAGE_EXTS


def _by_value(names: Sequence[str]) -> Callable[[str], Any]:
    return int if all(n.isascii() and n.isdigit() for n in names) else str


def _checked_kind(head: bytes, where: str) -> str:
    kind = image_kind(head)
    if kind is None:
        raise DataError(f"{where}: not an image (it begins with {head[:8]!r}). Remove or repair it, then import again.")
    return kind


# --- IDX -----------------------------------------------------------------------------------------------


def import_idx(
    images: str | os.PathLike[str],
    labels: str | os.PathLike[str] | None,
    out: str | os.PathLike[str],
    *,
    num_classes: int | None = None,
    class_names: Sequence[str] | None = None,
    **options: Unpack[WriteOptions],
) -> dict[str, Manifest]:
    """A pair of IDX files (the format of MNIST), plain or gzip. Images become PNG, the field is called
    `image`.

    Args:
        images: uint8 (N, H, W) or (N, H, W, C).
        labels: integers (N,); None imports without labels.
        out: where the data set goes.
        num_classes: by default the largest label plus one, or the number of names.
        class_names: of the ids 0, 1, ...
        options: see WriteOptions; the layout is "packed" by default.

    Returns the manifests by part. Raises DataError naming the file: missing, not IDX, cut short, counts that
    differ.
    """
    pixels = read_idx(images)
    if pixels.ndim not in (3, 4) or pixels.dtype != np.uint8 or (pixels.ndim == 4 and pixels.shape[3] not in (1, 3, 4)):
        found = f"{pixels.dtype}{list(pixels.shape)}"
        raise DataError(f"{os.fspath(images)}: images are uint8 (N, H, W) or (N, H, W, C), this file holds {found}.")
    stem = clean_key(options.get("name") or os.path.basename(os.fspath(images)).removesuffix(".gz"))
    keys = [f"{stem}-{i:07d}" for i in range(len(pixels))]
    parsed = ImportedLabels(LabelSpec(form="none"), {}, None)
    if labels is not None:
        ids = read_idx(labels)
        if ids.ndim != 1 or ids.dtype.kind not in "ui" or len(ids) != len(pixels):
            raise DataError(
                f"{os.fspath(labels)}: holds {ids.dtype}{list(ids.shape)}, needed is one integer for each of "
                f"the {len(pixels)} images of {os.fspath(images)}."
            )
        source = LabelSource(form="single", column="label", num_classes=num_classes, class_names=class_names)
        table = pa.table({"label": ids.astype(np.int64)})
        parsed = read_labels_of(table, source, os.fspath(labels), keys)

    def values(rows: np.ndarray) -> dict[str, Any]:
        return {"image": pa.array([encode_png(pixels[i]) for i in rows], pa.binary())}

    shape = (*pixels.shape[1:3], pixels.shape[3] if pixels.ndim == 4 else 1)
    fields = {"image": FieldSpec(kind="image", ext="png", shape=shape)}
    return write_import(out, stem, keys, fields, parsed, values, "idx", "packed", options)


def read_idx(path: str | os.PathLike[str]) -> np.ndarray:
    """An IDX file (plain or gzip; `path` or `path.gz`) as an array in native byte order.

    Header: two zero bytes, element type, number of dimensions, then big-endian 32-bit sizes. Raises DataError
    when it's missing, not IDX, or shorter or longer than its header says.
    """
    where = store.normal(path)
    if not store.exists(where) and store.exists(where + ".gz"):
        where += ".gz"
    raw = store.read_bytes(where).to_pybytes()
    if raw[:2] == b"\x1f\x8b":
        try:
            raw = gzip.decompress(raw)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"{where}: the gzip stream is damaged: {error}. Copy the file again.") from None
    if len(raw) < 4 or raw[:2] != b"\0\0" or raw[2] not in _IDX_TYPES or len(raw) < 4 + 4 * raw[3]:
        raise DataError(f"{where}: not an IDX file (it begins with {raw[:4]!r}).")
    shape = struct.unpack(f">{raw[3]}I", raw[4 : 4 + 4 * raw[3]])
    kind = np.dtype(_IDX_TYPES[raw[2]])
    need, have = int(np.prod(shape, dtype=np.int64)) * kind.itemsize, len(raw) - 4 - 4 * raw[3]
    if need != have:
        raise DataError(
            f"{where}: its header announces {list(shape)}, {need} bytes, but {have} follow. Copy the file again."
        )
    array = np.frombuffer(raw, dtype=kind, offset=4 + 4 * raw[3]).reshape(shape)
    return array.astype(kind.newbyteorder("="), copy=False)


# --- tables --------------------------------------------------------------------------------------------


def import_table(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    text_column: str | None = None,
    image_column: str | None = None,
    label_column: str | Sequence[str] | None = None,
    label_form: Form | None = None,
    weight_column: str | None = None,
    negative_column: str | None = None,
    separator: str = ";",
    key_column: str | None = None,
    num_classes: int | None = None,
    class_names: Sequence[str] | None = None,
    **options: Unpack[WriteOptions],
) -> dict[str, Manifest]:
    """A CSV, TSV or Parquet table with a text column, an image column, or both (fields `text` and `image`).

    Args:
        path: .csv, .tsv (also .gz) or .parquet; it is held in memory as a whole.
        out: where the data set goes.
        text_column: text.
        image_column: paths relative to the table's folder, or encoded bytes (Parquet).
        label_column, weight_column, negative_column, separator, num_classes, class_names: see LabelSource.
        label_form: by default "single" where there is a label column, else "none".
        key_column: sample keys; by default the file's name and the row number.
        options: see WriteOptions; the layout is "packed" for text alone, else "tar".

    Returns the manifests by part. Raises DataError naming file and row (counted from 1, without the CSV
    header).
    """
    where = store.normal(path)
    form: Form = label_form or ("single" if label_column else "none")
    source = LabelSource(form, label_column, weight_column, negative_column, separator, num_classes, class_names)
    wanted = [c for c in (text_column, image_column, key_column) if c]
    if text_column is None and image_column is None:
        raise DataError(f"{where}: which column has the samples? Give --text COLUMN, --image COLUMN, or both.")
    table = read_table(where, [*wanted, *source.columns])
    if not table.num_rows:
        raise DataError(f"{where}: the table has no row.")
    keys = _table_keys(table, key_column, where)
    labels = read_labels_of(table, source, where, keys)
    fields: dict[str, FieldSpec] = {}
    columns: dict[str, pa.Array] = {}
    if text_column is not None:
        columns["text"] = _text_of(table, text_column, where)
        fields["text"] = FieldSpec(kind="text", ext="txt")
    read_image: Callable[[int], bytes] | None = None
    if image_column is not None:
        read_image, ext = _images_of(table, image_column, where)
        fields["image"] = FieldSpec(kind="image", ext=ext)

    def values(rows: np.ndarray) -> dict[str, Any]:
        picked: dict[str, Any] = {name: column.take(pa.array(rows)) for name, column in columns.items()}
        if read_image is not None:
            picked["image"] = pa.array([read_image(int(i)) for i in rows], pa.binary())
        return picked

    stem = os.path.basename(where).partition(".")[0]
    layout: Layout = "packed" if image_column is None else "tar"
    if image_column is None:
        options = {"rows_per_member": _TEXT_ROWS_PER_MEMBER, **options}
    return write_import(out, stem, keys, fields, labels, values, "table", layout, options)


def _table_keys(table: pa.Table, key_column: str | None, where: str) -> list[str]:
    if key_column is None:
        stem = clean_key(os.path.basename(where).partition(".")[0])
        return [f"{stem}-{i:08d}" for i in range(1, table.num_rows + 1)]
    column = table.column(key_column)
    if column.null_count:
        raise DataError(f"{where}: row {column.is_null().index(True).as_py() + 1}: {key_column} is missing.")
    keys = [clean_key(str(k)) for k in column.to_pylist()]
    check_unique(pa.chunked_array([pa.array(keys, pa.string())]), f"{where}: column {key_column!r}")
    return keys


def _text_of(table: pa.Table, name: str, where: str) -> pa.Array:
    column = table.column(name)
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        try:
            column = column.cast(pa.string())
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            raise DataError(f"{where}: column {name!r} is {column.type}, not text.") from None
    if column.null_count:
        raise DataError(f"{where}: row {column.is_null().index(True).as_py() + 1}: {name} is missing.")
    return pa.concat_arrays(column.cast(pa.string()).chunks)


def _images_of(table: pa.Table, name: str, where: str) -> tuple[Callable[[int], bytes], str]:
    """A reader of a row's encoded image, and the extensions that occur. Checks every signature."""
    column = table.column(name).combine_chunks()
    if pa.types.is_struct(column.type) and column.type.get_field_index("bytes") >= 0:
        column = pc.struct_field(column, "bytes")
    if column.null_count:
        raise DataError(f"{where}: row {column.is_null().index(True).as_py() + 1}: {name} is missing.")
    kinds: set[str] = set()
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        folder = os.path.dirname(where)
        paths = [store.join(folder, p) for p in column.to_pylist()]
        for row, path in enumerate(paths):
            if not store.exists(path):
                raise DataError(f"{where}: row {row + 1}: no image file {path} (relative to the table's folder).")
            kinds.add(_checked_kind(store.read_head(path, 16), f"{where}: row {row + 1}: {path}"))
        return lambda i: store.read_bytes(paths[i]).to_pybytes(), ";".join(sorted(kinds))
    if not (pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type)):
        raise DataError(f"{where}: column {name!r} is {column.type}; images are paths or encoded bytes.")
    for row, head in enumerate(pc.binary_slice(column, 0, 16).to_pylist()):
        kinds.add(_checked_kind(head, f"{where}: row {row + 1}: {name}"))
    return lambda i: column[i].as_py(), ";".join(sorted(kinds))


# --- writing -------------------------------------------------------------------------------------------


def write_import(
    out: str | os.PathLike[str],
    default_name: str,
    keys: list[str],
    fields: dict[str, FieldSpec],
    labels: ImportedLabels,
    values: Callable[[np.ndarray], dict[str, Any]],
    importer: str,
    layout: Layout,
    options: WriteOptions,
) -> dict[str, Manifest]:
    """Writes the samples: `values(rows)` gives their field columns."""
    place, split = store.normal(out), options.get("split")
    check_keys(pa.array(keys, pa.string()), place)
    parts = assign_splits(keys, split) if split else {ALL: np.arange(len(keys))}
    places = {part: store.join(place, part) if split else place for part in parts}
    overwrite = options.get("overwrite", False)
    for folder in places.values():
        check_free(folder, overwrite)
    order = key_hashes(keys)[1] if options.get("shuffle", True) else np.arange(len(keys))
    name = clean_key(options.get("name") or default_name).replace("/", "_")
    sizes: dict[str, Any] = {
        k: options[k] for k in ("target_bytes", "rows_per_member", "samples_per_shard") if k in options
    }
    key_column = pa.array(keys, pa.string())
    writers: dict[str, ShardWriter] = {}
    with ExitStack() as stack:  # an error in one part leaves none
        for part, rows in parts.items():
            writer = ShardWriter(
                places[part],
                f"{name}-{part}" if split else name,
                fields,
                labels.spec,
                options.get("layout", layout),
                overwrite=overwrite,
                created_by={"importer": importer, "part": part},
                **sizes,
            )
            stack.enter_context(writer.or_nothing())
            rows = rows[np.argsort(order[rows], kind="stable")]
            for first in range(0, len(rows), _CHUNK):
                some = rows[first : first + _CHUNK]
                picked = {n: c.take(pa.array(some)) for n, c in labels.columns.items()}
                writer.write_table(pa.table({"key": key_column.take(pa.array(some)), **values(some), **picked}))
            writers[part] = writer
        return {part: writer.close(labels.classes) for part, writer in writers.items()}
