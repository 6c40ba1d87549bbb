"""What is done about wrong labels, each as a new version of the data set: relabel, weight, drop. Nothing changes in place.

relabel   other labels for some keys, in an overlay beside the same shards
weight    labels of form `soft`: the one given class with a weight in (0, 1], in an overlay
drop      new shards without some samples

Each version names its parent, and its `created_by` says what was done.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from labelmill.data import store
from labelmill.data.labels import LabelSpec
from labelmill.data.manifest import Manifest
from labelmill.data.overlay import write_label_overlay
from labelmill.data.shards import read_labels, read_shard
from labelmill.data.writer import ShardWriter
from labelmill.errors import DataError

Out = str | os.PathLike[str]


def relabel(
    manifest: Manifest,
    out: Out,
    labels: Mapping[str, int],
    created_by: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> Manifest:
    """A version in which the samples of `labels` (key -> class) are labelled so. DataError for an unknown key or class."""
    _single(manifest)
    keys, values = pa.array(list(labels), pa.string()), np.fromiter(labels.values(), np.int64, len(labels))
    seen = _Seen(manifest, keys)

    def tables() -> Any:
        for table in _label_tables(manifest):
            at = seen.look_up(table)
            label = table.column("label").to_numpy().astype(np.int64)
            label[at >= 0] = values[at[at >= 0]]
            yield pa.table({"key": table.column("key"), "label": label})
        seen.check()

    about = {"action": "relabel", "samples": str(len(labels)), **(created_by or {})}
    return write_label_overlay(
        manifest, out, manifest.label, tables(), created_by=about, check_keys_align=False, overwrite=overwrite
    )


def weight(
    manifest: Manifest,
    out: Out,
    weights: Mapping[str, float],
    created_by: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> Manifest:
    """A version of form `soft` in which the samples of `weights` (key -> (0, 1]) count less and all others 1.

    Raises DataError for an unknown key or a weight outside (0, 1]; to leave a sample out, `drop` it.
    """
    _single(manifest)
    keys, values = pa.array(list(weights), pa.string()), np.fromiter(weights.values(), np.float32, len(weights))
    if len(wrong := np.flatnonzero(~((values > 0) & (values <= 1)))):
        key = keys[int(wrong[0])].as_py()
        raise DataError(f"sample {key!r}: weight {weights[key]} must lie in (0, 1]. Use drop to leave samples out.")
    seen = _Seen(manifest, keys)

    def tables() -> Any:
        for table in _label_tables(manifest):
            at = seen.look_up(table)
            number = np.ones(table.num_rows, np.float32)
            number[at >= 0] = values[at[at >= 0]]
            offsets = pa.array(np.arange(table.num_rows + 1, dtype=np.int32))
            label = pa.ListArray.from_arrays(offsets, table.column("label").combine_chunks())
            yield pa.table(
                {
                    "key": table.column("key"),
                    "label": label,
                    "label_weight": pa.ListArray.from_arrays(offsets, pa.array(number)),
                }
            )
        seen.check()

    spec = LabelSpec(form="soft", num_classes=manifest.label.num_classes)
    about = {"action": "weight", "samples": str(len(weights)), **(created_by or {})}
    return write_label_overlay(
        manifest, out, spec, tables(), created_by=about, check_keys_align=False, overwrite=overwrite
    )


def drop(
    manifest: Manifest,
    out: Out,
    keys: list[str] | pa.Array,
    created_by: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> Manifest:
    """A version without the samples `keys`: shards written anew, one in memory at a time.

    To leave samples out without writing shards, select keys in the job (`data.select`).
    Raises DataError for an unknown key, or when nothing is left.
    """
    wanted = keys if isinstance(keys, pa.Array) else pa.array(keys, pa.string())
    seen = _Seen(manifest, wanted)
    about = {"action": "drop", "samples": str(len(wanted)), **(created_by or {})}
    classes = None
    if manifest.classes:
        classes = manifest.load_classes()
        classes = classes.drop_columns(["count"]) if "count" in classes.column_names else classes
    most = max(shard.samples for shard in manifest.shards)
    writer = ShardWriter(
        store.normal(out),
        manifest.name,
        manifest.fields,
        manifest.label,
        manifest.layout,
        samples_per_shard=most,
        overwrite=overwrite,
        created_by=about,
        parents=(manifest.digest,),
    )
    with writer.or_nothing():
        for i in range(len(manifest.shards)):
            table = read_shard(manifest, i)
            table = table.filter(pa.array(seen.look_up(table) < 0))
            if table.num_rows:
                writer.write_table(table.select(manifest.schema.names))
        seen.check()
        return writer.close(classes)


def _single(manifest: Manifest) -> None:
    if manifest.label.form != "single":
        raise DataError(
            f"data set {manifest.name!r} has labels of form {manifest.label.form!r}; relabel and weight take single labels."
        )


def _label_tables(manifest: Manifest) -> Any:
    return (read_labels(manifest, i) for i in range(len(manifest.shards)))


class _Seen:
    """Looks keys up shard by shard, and says at the end which of them weren't there."""

    def __init__(self, manifest: Manifest, keys: pa.Array) -> None:
        self.manifest, self.keys = manifest, keys
        self.found = np.zeros(len(keys), np.bool_)

    def look_up(self, table: pa.Table) -> np.ndarray:
        """int64: for each row its place in the list, -1 if it isn't there."""
        if not len(self.keys):
            return np.full(table.num_rows, -1)
        at = pc.fill_null(pc.index_in(table.column("key"), value_set=self.keys), -1).to_numpy().astype(np.int64)
        self.found[at[at >= 0]] = True
        return at

    def check(self) -> None:
        if not self.found.all():
            missing = self.keys.take(pa.array(np.flatnonzero(~self.found)[:5])).to_pylist()
            raise DataError(
                f"data set {self.manifest.name!r}: {int((~self.found).sum())} key(s) aren't in it: "
                f"{', '.join(map(repr, missing))}. Was the list written for another data set?"
            )
