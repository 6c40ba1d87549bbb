"""New label versions: the shards of a data set with other labels, which lie in small files of their own."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from labelmill.data import store
from labelmill.data.labels import LabelSpec, check_labels, count_labels
from labelmill.data.manifest import CLASSES_FILE, Manifest, ShardInfo, classes_bytes
from labelmill.data.shards import read_labels
from labelmill.data.staging import Staging
from labelmill.data.writer import with_counts
from labelmill.errors import DataError


def write_label_overlay(
    manifest: Manifest,
    out: str | os.PathLike[str],
    label: LabelSpec,
    tables: Iterable[pa.Table],
    *,
    classes: pa.Table | None = None,
    name: str | None = None,
    created_by: Mapping[str, str] | None = None,
    check_keys_align: bool = True,
    parents: tuple[str, ...] | None = None,
    overwrite: bool = False,
    staging: Staging | None = None,
) -> Manifest:
    """A new version of a data set: the same shards, other labels. Nothing of the old version changes.

    Args:
        manifest: the old version.
        out: folder of the new version.
        label: the new labels' form.
        tables: per shard, in order, a table with `key` and the label columns, row for row beside the shard.
        classes: label space of the new labels; None keeps the old one where its length fits.
        name: of the new version; the old one's by default.
        created_by: origin, kept in the manifest.
        check_keys_align: compare the keys with those of the shards, which reads the shards once more. Readers
            compare them in any case.
        parents: digests of the versions this one comes from; None names `manifest`.
        overwrite: replace a version that is there.
        staging: where the new version is being written, with files of it that are there already.

    Raises DataError when tables and shards don't match, or a label is wrong.
    """
    place = store.normal(out)
    staging = staging or Staging(place, overwrite)
    if classes is None and manifest.classes and label.num_classes == manifest.label.num_classes:
        classes = manifest.load_classes()
        classes = classes.drop_columns(["count"]) if "count" in classes.column_names else classes
    shards: list[ShardInfo] = []
    counts: np.ndarray | int = 0
    schema = pa.schema([("key", pa.string()), *label.columns.items()])
    remaining = iter(tables)
    try:
        for i, info in enumerate(manifest.shards):
            table = next(remaining, None)
            if table is None:
                raise DataError(f"{place}: labels for {i} shard(s), the data set has {len(manifest.shards)}.")
            table = _overlay_table(table, schema, manifest, i, label, check_keys_align)
            if label.num_classes is not None and label.columns:
                counts = counts + count_labels(table, label)
            path = f"labels-{i:06d}.arrow"
            data = classes_bytes(table)
            store.write_bytes(staging.path(path), data)
            moved = {"path": _from(manifest.shard_path(i), info.path, place), "labels": path}
            if (index := manifest.index_path(i)) is not None:
                moved["index"] = _from(index, info.index or "", place)
            shards.append(info.model_copy(update=moved | {"labels_sha256": hashlib.sha256(data).hexdigest()}))
        if next(remaining, None) is not None:
            raise DataError(f"{place}: labels for more shards than the {len(manifest.shards)} of the data set.")
        update: dict[str, Any] = {"classes": None, "classes_sha256": None}
        if classes is not None:
            data = classes_bytes(with_counts(classes, label, counts, place))
            store.write_bytes(staging.path(CLASSES_FILE), data)
            update = {"classes": CLASSES_FILE, "classes_sha256": hashlib.sha256(data).hexdigest()}
        new = (
            manifest.model_dump()
            | update
            | {
                "name": name or manifest.name,
                "label": label.model_dump(),
                "shards": [s.model_dump() for s in shards],
                "parents": (manifest.digest,) if parents is None else parents,
                "created_by": dict(created_by or {}),
            }
        )
        return staging.commit(Manifest.model_validate(new))
    except BaseException:
        staging.discard()
        raise


def _overlay_table(
    table: pa.Table, schema: pa.Schema, manifest: Manifest, i: int, label: LabelSpec, align: bool
) -> pa.Table:
    where = f"labels of {manifest.shard_path(i)}"
    try:
        table = table.select(schema.names).cast(schema)
    except (KeyError, pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise DataError(f"{where}: need the columns {', '.join(schema.names)}: {error}") from None
    if table.num_rows != manifest.shards[i].samples:
        raise DataError(f"{where}: {table.num_rows} rows for {manifest.shards[i].samples} samples.")
    check_labels(table, label, where)
    if align:
        keys = read_labels(manifest, i).column("key")
        if not keys.equals(table.column("key")):
            row = pc.index(pc.fill_null(pc.equal(keys, table.column("key")), False), False).as_py()
            raise DataError(
                f"{where}: row {row} is for sample {table.column('key')[row].as_py()!r}, the shard has "
                f"{keys[row].as_py()!r} there. Give the rows in the shard's order."
            )
    return table


def _from(path: str, named: str, place: str) -> str:
    """A file of the old version as a manifest in `place` names it: relative if it was (`named`) and both are local."""
    if store.is_uri(path) or store.is_uri(place) or os.path.isabs(named):
        return path
    return os.path.relpath(path, place)
