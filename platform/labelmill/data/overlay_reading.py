"""Reading label overlays: small files with the labels of a shard, row for row."""

from __future__ import annotations

import hashlib

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from labelmill.data import store
from labelmill.data.manifest import Manifest
from labelmill.errors import DataError


def read_overlay(manifest: Manifest, i: int, verify: bool) -> pa.Table:
    """The overlay file of shard `i`: `key` and label columns. Raises DataError when it isn't what it should be."""
    info, path = manifest.shards[i], manifest.labels_path(i)
    assert path is not None
    data = store.read_bytes(path)
    if verify and hashlib.sha256(data).hexdigest() != info.labels_sha256:
        raise DataError(
            f"{path}: the labels changed since they were written (sha256 differs). Write the overlay again."
        )
    try:
        table = pa.ipc.open_file(data).read_all().select(["key", *manifest.label.columns])
        if not verify:
            table.validate(full=True)
    except (pa.ArrowException, KeyError, OSError) as error:
        raise DataError(f"{path}: the labels can't be read ({error}). Write the overlay again.") from None
    if table.num_rows != info.samples:
        raise DataError(f"{path}: {table.num_rows} labels for {info.samples} samples. Write the overlay again.")
    return table


def check_aligned(keys: pa.Array, other: pa.Array, number: np.ndarray, labels_path: str, shard_path: str) -> None:
    """Raises DataError naming the first row whose key in the overlay (`other`) isn't that of the shard."""
    if keys.equals(other):
        return
    row = pc.index(pc.equal(keys, other), False).as_py()
    raise DataError(
        f"{labels_path}: row {int(number[row])} labels sample {other[row].as_py()!r}, but {shard_path} has "
        f"{keys[row].as_py()!r} there. Labels of an overlay lie row for row beside their shard: write the "
        "overlay again in the shard's order."
    )
