"""Selections: which rows of each shard take part in an epoch, and how often. Masks in the plan, not filters.

A filter in the stream would shift every later position, and with it the batches of the other ranks and the meaning
of the cursor. A selection is part of the order instead: every epoch has the same number of samples, and which ones is
a pure function of (selection, epoch, shard).

KeepRows   the same rows in every epoch, each once: a bit for each sample
Balanced   groups of samples with a quota each; a group's samples take turns from epoch to epoch

`labelmill.data.choose` makes them from keys and labels. One Arrow file holds one selection (`Selection.save`), and read
tasks load it by path and digest: a saved selection travels as those two strings.

Shape legend: N samples of the data set, M shards, G groups, B rows of a shard.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property, lru_cache
from typing import Any, ClassVar, cast

import numpy as np
import pyarrow as pa

from labelmill.data import store
from labelmill.errors import DataError

_VERSION = "1"
_CHUNK = 1 << 18  # samples looked at together


class Selection(ABC):
    """Rows that take part in an epoch, with repetitions.

    Attributes:
        arrays: the whole content, by name.
        data: digest of the data set that it was made for.
        about: what it does, for reports (JSON values); not part of the digest.
        path: where it is saved, if it is.
    """

    kind: ClassVar[str]
    names: ClassVar[tuple[str, ...]]

    def __init__(self, arrays: Mapping[str, np.ndarray], data: str = "", about: Mapping[str, Any] | None = None):
        self.arrays = {name: np.ascontiguousarray(arrays[name]) for name in ("shards", *self.names)}
        self.data, self.about, self.path = data, dict(about or {}), ""

    @property
    def shard_samples(self) -> np.ndarray:
        """int64 (M,): samples of each shard of the data set, taking part or not."""
        return self.arrays["shards"]

    @property
    @abstractmethod
    def samples(self) -> int:
        """Samples of one epoch: the same for every epoch."""

    @abstractmethod
    def counts(self, epoch: int) -> np.ndarray:
        """int64 (M,): samples that each shard gives in `epoch`."""

    @abstractmethod
    def rows(self, epoch: int, shard: int) -> np.ndarray:
        """int64: the rows of `shard` that take part in `epoch`, rising; a row drawn k times occurs k times."""

    @cached_property
    def digest(self) -> str:
        """sha256 (hex) of the content."""
        found = hashlib.sha256(f"{_VERSION} {self.kind}".encode())
        for name, array in self.arrays.items():
            found.update(f"|{name} {array.dtype.str} {len(array)}|".encode())
            found.update(array.data.cast("B") if len(array) else b"")
        return found.hexdigest()

    @property
    def nbytes(self) -> int:
        """Bytes of the content, in memory and on disk."""
        return sum(array.nbytes for array in self.arrays.values())

    def save(self, path: str) -> Selection:
        """Writes the selection to a file or URI, atomically; returns it as it is read from there."""
        with store.open_write(path) as file:
            self._write(file)
        return load_selection(path, self.digest)

    def _write(self, file: Any) -> None:
        # one row: its lists differ in length, and each is an array that can be mapped into memory as it lies
        lists = [pa.LargeListArray.from_arrays(pa.array([0, len(a)]), pa.array(a)) for a in self.arrays.values()]
        facts = {"kind": self.kind, "version": _VERSION, "digest": self.digest, "data": self.data}
        schema = pa.schema(
            [pa.field(name, values.type) for name, values in zip(self.arrays, lists, strict=True)],
            metadata={**facts, "about": json.dumps(self.about)},
        )
        with pa.ipc.new_file(file, schema) as writer:
            writer.write_batch(pa.record_batch(lists, schema=schema))

    def __reduce__(self) -> tuple[Callable[..., Selection], tuple[Any, ...]]:
        if self.path:
            return load_selection, (self.path, self.digest)
        sink = pa.BufferOutputStream()
        self._write(sink)
        return _from_buffer, (sink.getvalue().to_pybytes(), "selection")


class KeepRows(Selection):
    """The same rows in every epoch, each once.

    Arrays: `shards` int64 (M,); `mask` uint8, a bit for each sample, lowest bit first, each shard from a byte of its
    own; `kept` int64 (M,), rows of each shard that take part.
    """

    kind = "keep_rows"
    names = ("mask", "kept")

    @classmethod
    def of(cls, masks: Iterable[np.ndarray], data: str = "", about: Mapping[str, Any] | None = None) -> KeepRows:
        """From a bool mask for each shard, in order. Raises DataError when nothing is left."""
        shards, kept, bits = [], [], [np.empty(0, np.uint8)]
        for mask in masks:
            shards.append(len(mask))
            kept.append(np.count_nonzero(mask))
            bits.append(np.packbits(mask, bitorder="little"))
        if not sum(kept):
            raise DataError(f"the selection keeps none of the {sum(shards)} samples. Choose keys or classes it has.")
        sizes: list[np.ndarray] = [np.array(shards, np.int64), np.array(kept, np.int64)]
        return cls({"shards": sizes[0], "mask": np.concatenate(bits), "kept": sizes[1]}, data, about)

    @cached_property
    def samples(self) -> int:
        return int(self.arrays["kept"].sum())

    @cached_property
    def _bytes(self) -> np.ndarray:
        return _starts((self.shard_samples + 7) // 8)

    def counts(self, epoch: int) -> np.ndarray:
        return self.arrays["kept"]

    def rows(self, epoch: int, shard: int) -> np.ndarray:
        return np.flatnonzero(self.mask(shard))

    def mask(self, shard: int) -> np.ndarray:
        """bool (B,): which rows of `shard` take part."""
        lo, hi = self._bytes[shard], self._bytes[shard + 1]
        count = int(self.shard_samples[shard])
        return np.unpackbits(self.arrays["mask"][lo:hi], count=count, bitorder="little").view(np.bool_)


class Balanced(Selection):
    """Groups of samples with a quota each: an epoch draws exactly `quota[g]` samples of group g.

    The samples of a group stand in a ring in the order of their `slot`. Epoch e takes the places
    `[e * quota, (e + 1) * quota)` around the ring, so over any run of epochs every sample of the group is used the floor
    or the ceiling of its share, and whether a sample is used in an epoch can be told from that sample alone.

    Arrays: `shards` int64 (M,); `group` and `slot` unsigned (N,), samples in the order of the manifest; `size` and
    `quota` int64 (G + 1,). Group G is left out: its quota is 0.
    """

    kind = "balanced"
    names = ("group", "slot", "size", "quota")

    @cached_property
    def samples(self) -> int:
        return int(self.arrays["quota"].sum())

    @cached_property
    def _first(self) -> np.ndarray:
        return _starts(self.shard_samples)

    def counts(self, epoch: int) -> np.ndarray:
        drawn = np.zeros(len(self._first), np.int64)  # before each shard, and in all
        total = 0
        for lo in range(0, int(self._first[-1]), _CHUNK):
            before = _starts(self._uses(epoch, lo, lo + _CHUNK))
            a, z = np.searchsorted(self._first, [lo, lo + len(before)])
            drawn[a:z] = total + before[self._first[a:z] - lo]
            total += int(before[-1])
        return np.diff(drawn)

    def rows(self, epoch: int, shard: int) -> np.ndarray:
        uses_B = self._uses(epoch, int(self._first[shard]), int(self._first[shard + 1]))
        return np.repeat(np.arange(len(uses_B)), uses_B)

    def _uses(self, epoch: int, lo: int, hi: int) -> np.ndarray:
        """int64: how often each of the samples `[lo, hi)` is drawn in `epoch`."""
        group = self.arrays["group"][lo:hi]
        size, quota = self.arrays["size"][group], self.arrays["quota"][group]
        # places x of the ring with x = slot mod size and epoch * quota <= x < (epoch + 1) * quota
        behind = epoch * quota - 1 - self.arrays["slot"][lo:hi].astype(np.int64)
        return (behind + quota) // size - behind // size


def _starts(counts: np.ndarray) -> np.ndarray:
    """int64 (n + 1,): where each of n runs starts when they are laid end to end, and where the last ends."""
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])


_KINDS: dict[str, type[Selection]] = {kind.kind: kind for kind in cast(list[type[Selection]], [KeepRows, Balanced])}


def load_selection(path: str, digest: str = "") -> Selection:
    """The selection at `path`; local files are mapped into memory, not copied. Loaded once in a process.

    Raises DataError: no such file, not a selection, damaged, or not the one with `digest`.
    """
    path = store.normal(path)
    return _load(path, digest) if digest else _read(path)


@lru_cache(maxsize=8)
def _load(path: str, digest: str) -> Selection:
    selection = _read(path)
    if selection.digest != digest:
        raise DataError(
            f"{path}: holds another selection than the run began with (digest {selection.digest[:12]}..., not "
            f"{digest[:12]}...). Bring the old file back, or start the run afresh."
        )
    return selection


def _read(path: str) -> Selection:
    if store.is_uri(path):
        return _from_buffer(store.read_bytes(path), path)
    try:
        with pa.memory_map(path) as file:
            selection = _from_buffer(file.read_buffer(), path)
    except OSError as error:
        raise DataError(
            f"{path}: the selection can't be read ({error}). Every machine of the run needs to see this file."
        ) from None
    selection.path = path
    return selection


def _from_buffer(data: pa.Buffer | bytes, where: str) -> Selection:
    remedy = "Delete the file: the selection is built again from the job."
    try:
        table = pa.ipc.open_file(data).read_all()
        facts = {k.decode(): v.decode() for k, v in (table.schema.metadata or {}).items()}
        kind = _KINDS[facts["kind"]]
        arrays = {name: table.column(name).chunk(0).flatten().to_numpy() for name in ("shards", *kind.names)}
        selection = kind(arrays, facts["data"], json.loads(facts["about"]))
    except (pa.ArrowException, KeyError, ValueError, IndexError) as error:
        raise DataError(f"{where}: not a selection of this release ({error}). {remedy}") from None
    if facts["version"] != _VERSION or selection.digest != facts["digest"]:
        raise DataError(f"{where}: the selection is damaged, or of another release. {remedy}")
    if store.is_uri(where):
        selection.path = where
    return selection
