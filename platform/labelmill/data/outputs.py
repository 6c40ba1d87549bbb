"""A model's outputs of a data set, kept beside the shards: one Arrow file a shard, row for row, found again by sample key.

<folder>/outputs-000000.arrow    key, valid, and some of: logits; ids, values, tail; embedding
<folder>/outputs.json            what they are of: data, classes, model, input; written last

Shape legend: n rows of a shard, N rows of all, B samples asked for, C classes, k best classes, T temperatures, E embedding width.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from pydantic import Field, ValidationError
from torch import Tensor

from labelmill.data.keys import key_hashes
from labelmill.data.manifest import Manifest
from labelmill.errors import DataError
from labelmill.strict import StrictModel

Column = Literal["logits", "topk", "embedding"]
Stored = Literal["float16", "float32"]
_INFO = "outputs.json"
_NAMED = 5  # keys that an error shows
_HALF_MAX = 65504.0
_MOST_IN_DICT = 1_000_000


class OutputsInfo(StrictModel):
    """Content of `outputs.json`.

    Attributes:
        manifest: digest of the data set.
        classes: `class_map` of the model's label space; empty for embeddings alone.
        model: which model: reference and version, or digest of its package.
        columns: what is kept.
        dtype: of logits, values and embeddings.
        temperatures: that tails are kept for.
        input: how samples were prepared (size, channels, augmentation).
        files: sha256 by name.
    """

    format_version: Literal[1] = 1
    manifest: str
    classes: str = ""
    num_classes: int = 0
    model: str
    columns: tuple[Column, ...] = Field(min_length=1)
    dtype: Stored = "float16"
    temperatures: tuple[float, ...] = ()
    input: dict[str, Any] = Field(default_factory=dict)
    files: dict[str, str] = Field(default_factory=dict)


def class_map(names: Sequence[str] | None, num_classes: int) -> str:
    """Identity of a label space: the names in the order of the ids, or their number where there are no names."""
    content = list(names) if names is not None else num_classes
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def names_of(data: Manifest) -> list[str] | None:
    """Class names in the order of the ids; None where the set has none."""
    return [str(name) for name in data.load_classes().column("name").to_pylist()] if data.classes else None


def outputs_file(folder: Path, shard: int) -> Path:
    """Where a shard's outputs lie."""
    return folder / f"outputs-{shard:06d}.arrow"


def check_outputs(name: str, values: np.ndarray, keys: Sequence[str], valid: np.ndarray, dtype: Stored) -> None:
    """Raises DataError for rows that aren't finite or don't fit the stored type, naming their samples' keys."""
    flat = values.reshape(len(values), -1)
    wrong = valid & ~np.isfinite(flat).all(axis=1)
    if wrong.any():
        raise DataError(f"{_count(wrong)} of the model's {name} hold NaN or infinite values: {_keys(keys, wrong)}.")
    big = valid & (np.abs(flat).max(axis=1, initial=0) > _HALF_MAX) if dtype == "float16" else np.zeros(len(flat), bool)
    if big.any():
        raise DataError(
            f"{_count(big)} of the model's {name} are beyond what float16 holds (65504): {_keys(keys, big)}. Keep them as "
            "float32 (teacher.dtype)."
        )


def check_logits(logits: np.ndarray | Tensor) -> None:
    """Raises DataError when rows are probabilities: all in [0, 1] and adding up to 1."""
    values = torch.as_tensor(logits).float()
    if values.shape[1] < 2 or not len(values):
        return
    inside = bool(((values >= 0) & (values <= 1)).all())
    if inside and bool(((values.sum(1) - 1).abs() < 5e-3).all()):
        raise DataError(
            "the teacher's logits look like probabilities: every row is in [0, 1] and adds up to 1. Give logits."
        )


def write_outputs(path: Path, keys: Sequence[str], valid: np.ndarray, columns: Mapping[str, np.ndarray]) -> None:
    """One shard's file, whole or not at all; matrices become fixed-size lists."""
    arrays: dict[str, pa.Array] = {"key": pa.array(keys, pa.string()), "valid": pa.array(valid)}
    for name, values in columns.items():
        flat = pa.array(np.ascontiguousarray(values).reshape(-1))
        arrays[name] = pa.FixedSizeListArray.from_arrays(flat, int(np.prod(values.shape[1:])))
    table = pa.table(arrays)
    part = path.with_name(f".{path.name}.part")
    with pa.OSFile(str(part), "wb") as out, pa.ipc.new_file(out, table.schema) as writer:
        writer.write_table(table)
    part.replace(path)


def finish_outputs(folder: Path, info: OutputsInfo) -> OutputsInfo:
    """Writes `outputs.json` with the files' hashes."""
    paths = sorted(folder.glob("outputs-*.arrow"))
    files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
    info = info.model_copy(update={"files": files})
    part = folder / f".{_INFO}.part"
    part.write_text(json.dumps(json.loads(info.model_dump_json()), indent=1), encoding="utf-8")
    part.replace(folder / _INFO)
    return info


@dataclass
class Rows:
    """The outputs of some samples; what wasn't kept is None.

    Attributes:
        valid_B: False where the model's input couldn't be read; its values mean nothing.
        maps: feature maps of a model that runs live, (B, C, H, W) each; they aren't kept.
    """

    valid_B: Tensor
    logits_BC: Tensor | None = None
    ids_Bk: Tensor | None = None
    values_Bk: Tensor | None = None
    tail_BT: Tensor | None = None
    embedding_BE: Tensor | None = None
    maps: tuple[Tensor, ...] = ()


class Outputs:
    """Kept outputs, memory-mapped, found by sample key.

    Raises DataError when the folder isn't finished, a file was changed, a key occurs twice.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        path = self.folder / _INFO
        if not path.is_file():
            raise DataError(f"{self.folder}: no finished outputs of a model here ({_INFO} is missing).")
        try:
            self.info = OutputsInfo.model_validate_json(path.read_text(encoding="utf-8"))
        except ValidationError as error:
            raise DataError(f"{path}: {error.errors()[0]['msg']}.") from None
        tables = []
        for name in sorted(self.info.files):
            try:
                tables.append(pa.ipc.open_file(pa.memory_map(str(self.folder / name))).read_all())
            except (OSError, pa.ArrowInvalid) as error:
                raise DataError(f"{self.folder / name}: can't be read ({error}). Run the teacher again.") from None
        self._tables = tables
        self._starts = np.cumsum([0, *(t.num_rows for t in tables)])
        hashes = [key_hashes(t.column("key").to_pylist())[0] for t in tables]
        every = np.concatenate(hashes) if hashes else np.empty(0, np.uint64)
        self._order = np.argsort(every, kind="stable")
        self._sorted = every[self._order]
        if len(every) and (self._sorted[1:] == self._sorted[:-1]).any():
            raise DataError(f"{self.folder}: a sample key occurs twice.")

    def __len__(self) -> int:
        return len(self._sorted)

    @property
    def first_key(self) -> str:
        """Of the first sample."""
        return str(next(t for t in self._tables if t.num_rows).column("key")[0].as_py())

    @cached_property
    def keys(self) -> np.ndarray:
        """Keys of all samples, text (N,)."""
        return np.array([key for table in self._tables for key in table.column("key").to_pylist()])

    @cached_property
    def _places(self) -> dict[str, int]:
        """Rows by key: for sets of moderate size faster than hashing each key in Python."""
        return {key: row for row, key in enumerate(self.keys.tolist())}

    @cached_property
    def digest(self) -> str:
        """Identity of the content."""
        return hashlib.sha256(self.info.model_dump_json().encode()).hexdigest()[:16]

    def verify(self) -> None:
        """Re-hashes every file. Raises DataError for one that was changed."""
        for name, wanted in self.info.files.items():
            if hashlib.sha256((self.folder / name).read_bytes()).hexdigest() != wanted:
                raise DataError(f"{self.folder / name}: changed since it was written. Run the teacher again.")

    def check(self, data: Manifest, classes: bool = True) -> None:
        """Raises DataError unless these outputs are of this data set (or of the version that it relabels) and label space."""
        info = self.info
        if data.digest != info.manifest and info.manifest not in data.parents:
            raise DataError(
                f"{self.folder}: these outputs are of the data set with digest {info.manifest[:12]}, not of "
                f"{data.name!r} ({data.digest[:12]}). Run the teacher on this data set."
            )
        if classes:
            check_classes(info.classes, info.num_classes, data, f"the outputs in {self.folder}")

    def check_logits(self) -> None:
        """Raises DataError when logits are kept that look like probabilities."""
        kept = self._columns.get("logits")
        if kept is not None:
            check_logits(kept[np.flatnonzero(self._valid)[:1000]].astype(np.float32))

    @cached_property
    def _columns(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        names = [n for n in self._tables[0].column_names if n not in ("key", "valid")] if self._tables else []
        for name in names:
            parts = []
            for table in self._tables:
                array = table.column(name).combine_chunks()
                array = array.chunk(0) if isinstance(array, pa.ChunkedArray) else array
                parts.append(array.flatten().to_numpy(zero_copy_only=False).reshape(len(table), -1))
            found[name] = parts[0] if len(parts) == 1 else _Joined(parts, self._starts)
        return found

    @cached_property
    def _valid(self) -> np.ndarray:
        return np.concatenate([t.column("valid").to_numpy(zero_copy_only=False) for t in self._tables])

    def rows(self, keys: Sequence[str]) -> np.ndarray:
        """int64 (B,): rows of the samples. Raises DataError for samples without outputs."""
        if len(self) <= _MOST_IN_DICT:
            found = [self._places.get(key, -1) for key in keys]
            if -1 not in found:
                return np.array(found, np.int64)
        hashes = key_hashes(keys)[0]
        at = np.minimum(np.searchsorted(self._sorted, hashes), len(self._sorted) - 1)
        missing = self._sorted[at] != hashes
        if missing.any():
            raise DataError(f"{self.folder}: {_count(missing)} have no outputs here: {_keys(keys, missing)}.")
        return self._order[at]

    def read(self, keys: Sequence[str]) -> Rows:
        """Outputs of samples, float32. Raises DataError for unknown samples, or values that aren't finite, by key."""
        row_B = self.rows(keys)
        valid_B = self._valid[row_B]
        taken = {}
        for name, values in self._columns.items():
            part = values[row_B]
            if name in ("logits", "values", "embedding") and not np.isfinite(part).all():
                check_outputs(name, part, keys, valid_B, "float32")
            taken[name] = torch.from_numpy(part.astype(np.int64 if name == "ids" else np.float32))
        return Rows(
            torch.from_numpy(valid_B),
            taken.get("logits"),
            taken.get("ids"),
            taken.get("values"),
            taken.get("tail"),
            taken.get("embedding"),
        )


class _Joined:
    """Several arrays as one, without a copy of them."""

    def __init__(self, parts: list[np.ndarray], starts: np.ndarray) -> None:
        self.parts, self.starts = parts, starts

    def __getitem__(self, row_B: np.ndarray) -> np.ndarray:
        part_B = np.searchsorted(self.starts, row_B, side="right") - 1
        out = np.empty((len(row_B), self.parts[0].shape[1]), self.parts[0].dtype)
        for i in np.unique(part_B):
            mine = part_B == i
            out[mine] = self.parts[i][row_B[mine] - self.starts[i]]
        return out


def check_classes(found: str, num_classes: int, data: Manifest, what: str, names: Sequence[str] | None = None) -> None:
    """Raises DataError unless a teacher's label space is the data set's, in the same order."""
    own = data.label.num_classes or 0
    if num_classes != own:
        raise DataError(f"{what} have {num_classes} classes, data set {data.name!r} has {own}.")
    mine = names_of(data)
    if names is not None and mine is not None and list(names) != mine:
        first = next(i for i, (a, b) in enumerate(zip(names, mine, strict=True)) if a != b)
        raise DataError(
            f"{what} have {names[first]!r} as class {first}, data set {data.name!r} has {mine[first]!r} there."
        )
    if found and found != class_map(mine, own):
        raise DataError(
            f"{what} belong to another list of class names than data set {data.name!r}, or to another order."
        )


def _count(mask: np.ndarray) -> str:
    n = int(np.count_nonzero(mask))
    return f"{n} sample{'s' if n > 1 else ''}"


def _keys(keys: Sequence[str], mask: np.ndarray) -> str:
    found = [keys[i] for i in np.flatnonzero(mask).tolist()]
    return ", ".join(map(repr, found[:_NAMED])) + (", ..." if len(found) > _NAMED else "")
