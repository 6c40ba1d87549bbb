"""Categorical values to rows of an embedding table, by hash: no vocabularies, the same rows in every process.

Coleman, Kang, Fahrbach, Wang, Hong, Chi, Cheng: Unified Embedding: Battle-Tested Feature Representations for Web-Scale ML
Systems (NeurIPS 2023, arXiv 2305.12102). Every (feature, chunk) has a salt of its own; a value of it lies in row
hash(salt, value) mod M.

Shape legend: B samples, S slots (a slot is one chunk of one feature), V values of a multi-valued feature (padded), M rows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field, model_validator

from labelmill.encoders.hashing import mix64
from labelmill.errors import DataError
from labelmill.job import StrictModel

MISSING = "\0missing"
"""The value of a feature that is null: a token of its own, different from the empty string."""
HASH = "blake2b-64 of salt and value, splitmix64"


class Feature(StrictModel):
    """A categorical column."""

    name: str = Field(min_length=1)
    dtype: Literal["text", "integer"] = Field("text", description="how values are normalised before they are hashed")
    many: bool = Field(False, description="a list of values, pooled")
    pool: Literal["mean", "sum"] = "mean"
    chunks: int = Field(1, ge=1, le=8, description="rows looked up for a value, side by side")
    most: int = Field(32, ge=1, description="values of a list that count; further ones are left out")


class FeatureSet(StrictModel):
    """The features of a table, in order: new ones go to the end, so that rows of the others stay."""

    features: tuple[Feature, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _distinct(self) -> FeatureSet:
        names = [feature.name for feature in self.features]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"feature {twice[0]!r} is there twice")
        return self

    @property
    def slots(self) -> list[tuple[Feature, int]]:
        """(feature, chunk) in the order of the embedding."""
        return [(feature, chunk) for feature in self.features for chunk in range(feature.chunks)]

    def digest(self) -> dict[str, Any]:
        """What must be equal for saved rows to mean the same."""
        parts = [[f.name, f.dtype, f.chunks] for f in self.features]
        return {"features": parts, "hash": HASH}


def salt_of(name: str, chunk: int) -> int:
    """The 64-bit salt of a feature's chunk."""
    return int.from_bytes(hashlib.blake2b(f"{name}\0{chunk}".encode(), digest_size=8).digest(), "little")


def value_hashes(values: Sequence[Any], feature: Feature) -> np.ndarray:
    """uint64 hash of each value, the same for every feature. Raises DataError for a number that isn't categorical."""
    texts = [_normal(value, feature) for value in values]
    column = pa.array(texts, pa.string()).dictionary_encode()
    distinct = np.array([_hash(text.encode()) for text in column.dictionary.to_pylist()], np.uint64)
    return mix64(distinct)[column.indices.to_numpy()] if len(distinct) else np.empty(0, np.uint64)


def _hash(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def _normal(value: Any, feature: Feature) -> str:
    """The value as it is hashed: integers without leading zeros, so that 7 and "7" of an integer feature are one."""
    if value is None:
        return MISSING
    if isinstance(value, float):
        if feature.dtype == "integer" and value.is_integer():
            return str(int(value))
        raise DataError(f"feature {feature.name!r}: {value!r} is a real number. Bucketise it first.")
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise DataError(f"feature {feature.name!r}: {value!r} is neither text nor an integer.")
    if feature.dtype == "integer":
        try:
            return str(int(value))
        except ValueError:
            raise DataError(f"feature {feature.name!r}: {value!r} is no integer; declare it as text.") from None
    return str(value)


def read_rows(rows: Sequence[str | bytes | None], features: FeatureSet) -> dict[str, list[Any]]:
    """JSON objects, one a sample, as columns. Raises DataError naming a feature that a sample lacks."""
    columns: dict[str, list[Any]] = {feature.name: [] for feature in features.features}
    for row in rows:
        found = json.loads(row) if row else dict.fromkeys(columns)
        for name, column in columns.items():
            if name not in found:
                raise DataError(f"feature {name!r} is missing from a sample that has {sorted(found)}.")
            column.append(found[name])
    return columns


class RowMap:
    """From values to rows of one table, for one of the ways of sharing it.

    Args:
        features: the columns.
        rows: M, of the whole table, at least 2.
        sharing: `multiplexed`: all features use all rows, with salts of their own. `separate`: every feature has rows of its
            own, in proportion to `vocabulary`. `hashing_trick`: all rows, without salts: equal values of two features share
            a row. `collisionless`: a row for every value of `values`, and one a feature for all others.
        vocabulary: distinct training values by feature; for `separate`.
        values: sorted uint64 hashes of the training values by feature; for `collisionless`.
    """

    def __init__(
        self,
        features: FeatureSet,
        rows: int,
        sharing: Literal["multiplexed", "separate", "hashing_trick", "collisionless"] = "multiplexed",
        vocabulary: dict[str, int] | None = None,
        values: dict[str, np.ndarray] | None = None,
    ) -> None:
        self.features, self.sharing, self.values = features, sharing, values
        if sharing == "collisionless":
            assert values is not None
            self.ranges: dict[str, tuple[int, int]] = {}
            at = 0
            for feature in features.features:
                size = len(values[feature.name]) + 1
                self.ranges[feature.name] = (at, size)
                at += size * feature.chunks
            rows = at
        elif sharing == "separate":
            assert vocabulary is not None
            self.ranges = split_budget(features, rows, vocabulary)
        if rows < 2:
            raise DataError(f"an embedding table needs at least 2 rows, not {rows}.")
        self.rows = rows

    def places(self, hashes: np.ndarray, feature: Feature, chunk: int) -> np.ndarray:
        """int64 row of each value hash."""
        name = feature.name
        if self.sharing == "collisionless":
            assert self.values is not None
            known, (first, size) = self.values[name], self.ranges[name]
            at = np.searchsorted(known, hashes)
            found = (at < len(known)) & (known[np.minimum(at, max(0, len(known) - 1))] == hashes)
            return first + chunk * size + np.where(found, at + 1, 0)
        salt = chunk if self.sharing == "hashing_trick" else salt_of(name, chunk)
        mixed = mix64(hashes ^ mix64(np.array([salt], np.uint64)))
        if self.sharing == "separate":
            first, size = self.ranges[name]
            return first + (mixed % np.uint64(size)).astype(np.int64)
        return (mixed % np.uint64(self.rows)).astype(np.int64)

    def look_up(self, columns: dict[str, list[Any]]) -> dict[str, np.ndarray]:
        """For each feature its rows int64 (B, chunks, V), -1 where there is no value; V is 1 unless it has many."""
        out = {}
        for feature in self.features.features:
            column = columns[feature.name]
            lists = column if feature.many else [[value] for value in column]
            lists = [[None] if part is None else list(part)[: feature.most] for part in lists]
            lengths = np.array([len(part) for part in lists])
            hashes = value_hashes([v for part in lists for v in part], feature)
            width = max(1, int(lengths.max(initial=0)))
            filled = np.arange(width)[None, :] < lengths[:, None]
            rows = np.full((len(lists), feature.chunks, width), -1, np.int64)
            for chunk in range(feature.chunks):
                part = np.full((len(lists), width), -1, np.int64)
                part[filled] = self.places(hashes, feature, chunk)
                rows[:, chunk] = part
            out[feature.name] = rows
        return out


def split_budget(features: FeatureSet, rows: int, vocabulary: dict[str, int]) -> dict[str, tuple[int, int]]:
    """(first row, rows) of each feature, in proportion to its training values; at least 1 each, `rows` together."""
    names = [feature.name for feature in features.features]
    if rows < len(names):
        raise DataError(f"{rows} rows are too few for separate tables of {len(names)} features.")
    total = max(1, sum(vocabulary[name] for name in names))
    sizes = [max(1, int((rows - len(names)) * vocabulary[name] / total) + 1) for name in names]
    sizes[int(np.argmax(sizes))] += rows - sum(sizes)
    firsts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    return {name: (int(first), size) for name, first, size in zip(names, firsts, sizes, strict=True)}


def check_same_rows(saved: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raises DataError, with the differences, unless saved rows mean what is wanted."""
    different = [
        f"{key}: saved {saved.get(key)!r}, wanted {wanted[key]!r}" for key in wanted if saved.get(key) != wanted[key]
    ]
    if different:
        raise DataError("the saved embedding table belongs to other features: " + "; ".join(different))
