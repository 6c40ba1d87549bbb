"""Sample keys: what names a sample for ever, and what its split and its place in the shards are drawn from.

A key is unique in its data set and becomes the name of tar members (`<key>.<ext>`), which WebDataset readers
cut at the first dot of the base name. So a key has no dot, and slashes only between parts.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from labelmill.errors import DataError

MAX_KEY_BYTES = 512
_PART = r"[^./\\\x00-\x1f\x7f]+"
_KEY = rf"^{_PART}(/{_PART})*$"
_UNSAFE = re.compile(r"[.\\\x00-\x1f\x7f]+")
# WebDataset takes a file __name__ at the top of a tar for metadata and drops it
_META = r"^__[^/]*__$"


def check_keys(keys: pa.Array | pa.ChunkedArray, where: str) -> None:
    """Raises DataError for the first key that can't name tar members (see the top of this file)."""
    good = pc.and_(pc.match_substring_regex(keys, _KEY), pc.less_equal(pc.binary_length(keys), MAX_KEY_BYTES))
    good = pc.fill_null(pc.and_(good, pc.invert(pc.match_substring_regex(keys, _META))), False)
    if pc.all(good).as_py() is False:
        row = pc.index(good, False).as_py()
        raise DataError(
            f"{where}: row {row}: {keys[row].as_py()!r} can't be a sample key: keys are 1 to {MAX_KEY_BYTES} "
            "bytes of text without dots, backslashes or control characters, with slashes only between "
            "parts, and not of the form __name__. labelmill.data.keys.clean_key makes one."
        )


def check_unique(keys: pa.ChunkedArray, where: str) -> None:
    """Raises DataError naming the first key that occurs more than once."""
    if pc.count_distinct(keys).as_py() == len(keys):
        return
    counts = pc.value_counts(keys)
    again = counts.filter(pc.greater(counts.field("counts"), 1))
    first = again[0].as_py()
    raise DataError(
        f"{where}: sample key {first['values']!r} occurs {first['counts']} times ({len(again)} key(s) "
        "repeat). Every sample needs a key of its own: rename the samples, or name another key column."
    )


def clean_key(text: str) -> str:
    """`text` as a valid key: dots and control characters become `_`, empty parts go. Not unique by itself."""
    parts = (_UNSAFE.sub("_", part) for part in text.split("/"))
    key = "/".join(part for part in parts if part)
    if re.match(_META, key):
        key = f"k{key}"
    raw = key.encode()
    if len(raw) > MAX_KEY_BYTES:
        digest = hashlib.blake2b(raw, digest_size=8).hexdigest()
        key = raw[: MAX_KEY_BYTES - 17].decode(errors="ignore").rstrip("/") + "-" + digest
    return key or "_"


def keys_of_paths(paths: Sequence[str]) -> list[str]:
    """A key for each relative file path: no extension; where two agree, a hash tells them apart."""
    keys = []
    for path in paths:
        folder, slash, base = path.rpartition("/")
        keys.append(clean_key(folder + slash + (base.rpartition(".")[0] or base)))
    counts = Counter(keys)
    for i, (key, path) in enumerate(zip(keys, paths, strict=True)):
        if counts[key] > 1:
            keys[i] = f"{key[: MAX_KEY_BYTES - 9]}-{hashlib.blake2b(path.encode(), digest_size=4).hexdigest()}"
    return keys


def key_hashes(keys: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Two independent uint64 (B,) hashes of each key, the same in every process: for split and order."""
    blake = hashlib.blake2b
    digests = b"".join(blake(key.encode(), digest_size=16).digest() for key in keys)
    pairs = np.frombuffer(digests, dtype="<u8").reshape(-1, 2)
    return pairs[:, 0], pairs[:, 1]


def assign_splits(keys: Sequence[str], split: Mapping[str, float]) -> dict[str, np.ndarray]:
    """Rows of each split, drawn by the hash of the key: a sample stays in its split when others come or go.

    Args:
        keys: sample keys.
        split: share of each split, adding up to 1, such as {"train": 0.9, "test": 0.1}.

    Raises DataError when shares don't add up, a name can't be a folder, or a split would be empty.
    """
    total = sum(split.values())
    if not split or abs(total - 1) > 1e-6 or min(split.values()) <= 0:
        raise DataError(f"split {dict(split)}: shares must be above 0 and add up to 1, these add up to {total:g}.")
    if wrong := [name for name in split if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name)]:
        raise DataError(f"split {wrong[0]!r}: a split names a folder: letters, digits, '-' and '_'.")
    unit = key_hashes(keys)[0] / np.float64(2**64)
    edges = np.cumsum([*split.values()])[:-1]
    which = np.searchsorted(edges, unit, side="right")
    rows = {name: np.flatnonzero(which == i) for i, name in enumerate(split)}
    if empty := [name for name, found in rows.items() if not len(found)]:
        raise DataError(
            f"split {empty[0]!r} gets none of the {len(keys)} samples at a share of {split[empty[0]]:g}; "
            "give it a larger share, or import without a split."
        )
    return rows
