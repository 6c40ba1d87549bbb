"""The `select` section of a job: which samples take part in an epoch, and how often.

    select: {kind: keys, file: ids.txt, keep: true}
    select: {kind: classes, ids: [3, 8], keep: false}
    select: {kind: balanced, exponent: 0.5}
    select: {kind: repeat_factor, threshold: 0.001}

The last two take `within:` with one of the first two, and then draw from what it leaves.
"""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Literal

import pyarrow as pa
from pydantic import Field, field_validator

from labelmill.data import choose, store
from labelmill.data.choose import Tables
from labelmill.data.manifest import Manifest
from labelmill.data.selection import KeepRows, Selection, load_selection
from labelmill.data.tables import read_table
from labelmill.errors import DataError
from labelmill.job import StrictModel

_TABLES = (".csv", ".tsv", ".csv.gz", ".tsv.gz", ".parquet", ".pq")


class _Select(StrictModel):
    """What every kind has."""

    def build(self, manifest: Manifest, folder: str, seed: int = 0, tables: Tables | None = None) -> Selection:
        """The selection for a data set, kept in `folder` as `selection-<recipe>.arrow` and reused from there.

        Building reads the labels of every shard once (twice with `within`), unless `tables` hands them over (see
        `choose.keep_where`).
        `folder` should be one that read tasks on other machines see as well; they get path and digest alone.

        Raises DataError: keys or classes that the data set doesn't have, labels that don't fit the kind, nothing left.
        """
        # a recipe: same job, same data and same list give the same file, so a resumed run doesn't read labels again
        recipe = [1, self.model_dump(mode="json"), self._sources(), manifest.digest, seed]
        name = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]
        path = store.join(store.normal(folder), f"selection-{name}.arrow")
        if store.exists(path):
            kept = load_selection(path)
            return load_selection(path, kept.digest)
        return self.make(manifest, seed, tables).save(path)

    def make(self, manifest: Manifest, seed: int = 0, tables: Tables | None = None) -> Selection:
        """The selection, kept nowhere."""
        raise NotImplementedError

    def _sources(self) -> list[str]:
        """Digests of the files that the section names."""
        return []


class KeysSelection(_Select):
    """Samples by key, from a list: a text file with a key on each line, or a column of a table."""

    kind: Literal["keys"] = "keys"
    file: str = Field(min_length=1, description="text file with a key a line, or a .csv, .tsv or .parquet table")
    column: str = Field("key", description="column of the keys, for a table")
    keep: bool = Field(True, description="false leaves these samples out and keeps the others")

    def make(self, manifest: Manifest, seed: int = 0, tables: Tables | None = None) -> KeepRows:
        keys = read_keys(self.file, self.column)
        try:
            return (choose.keep_keys if self.keep else choose.drop_keys)(manifest, keys, tables)
        except DataError as error:
            raise DataError(f"select.file {self.file}: {error}") from None

    def _sources(self) -> list[str]:
        return [hashlib.sha256(store.read_bytes(self.file)).hexdigest()]


class ClassesSelection(_Select):
    """Samples by class."""

    kind: Literal["classes"] = "classes"
    ids: tuple[int, ...] = Field(min_length=1, description="class ids")
    keep: bool = Field(True, description="true: samples with one of the classes; false: samples with none of them")

    @field_validator("ids")
    @classmethod
    def _distinct(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if negative := [i for i in value if i < 0]:
            raise ValueError(f"class ids start at 0, {negative[0]} is negative")
        seen: set[int] = set()
        if twice := [i for i in value if i in seen or seen.add(i)]:  # type: ignore[func-returns-value]
            raise ValueError(f"class {twice[0]} is listed twice")
        return value

    def make(self, manifest: Manifest, seed: int = 0, tables: Tables | None = None) -> KeepRows:
        return choose.keep_classes(manifest, self.ids, self.keep, tables)


class _Drawn(_Select):
    within: Annotated[KeysSelection | ClassesSelection, Field(discriminator="kind")] | None = Field(
        None, description="draw only from these samples (kind: keys or classes)"
    )

    def _rows(self, manifest: Manifest, tables: Tables | None) -> tuple[KeepRows | None, Tables | None]:
        if self.within is None:
            return None, tables
        known = None if tables is None else list(tables)  # two looks at labels that may come only once
        return self.within.make(manifest, 0, known), known

    def _sources(self) -> list[str]:
        return self.within._sources() if self.within else []


class BalancedSelection(_Drawn):
    """Single labels with classes in other proportions: square root, or all alike."""

    kind: Literal["balanced"] = "balanced"
    exponent: float = Field(1.0, ge=0, le=1, description="0 leaves the classes as they are, 1 makes them equal")
    per_class: int | None = Field(None, ge=1, description="mean samples of a class in an epoch; empty keeps its length")

    def make(self, manifest: Manifest, seed: int = 0, tables: Tables | None = None) -> Selection:
        rows, tables = self._rows(manifest, tables)
        return choose.balance(manifest, self.exponent, self.per_class, seed, rows, tables)


class RepeatFactorSelection(_Drawn):
    """Samples with a rare class several times in an epoch, the others once."""

    kind: Literal["repeat_factor"] = "repeat_factor"
    threshold: float = Field(0.001, gt=0, le=1, description="share of the samples below which a class counts as rare")

    def make(self, manifest: Manifest, seed: int = 0, tables: Tables | None = None) -> Selection:
        rows, tables = self._rows(manifest, tables)
        return choose.repeat_factors(manifest, self.threshold, seed, rows, tables)


SelectionConfig = Annotated[
    KeysSelection | ClassesSelection | BalancedSelection | RepeatFactorSelection, Field(discriminator="kind")
]
"""The `select` section; `kind` says which."""


def read_keys(file: str, column: str = "key") -> pa.Array:
    """Keys from a text file (one a line; empty lines don't count) or from a column of a table.

    Raises DataError when the file is missing or can't be read as that.
    """
    if file.lower().endswith(_TABLES):
        keys = read_table(file, [column]).column(column).cast(pa.string())
        return pa.concat_arrays(keys.chunks) if keys.num_chunks else pa.array([], pa.string())
    try:
        text = store.read_bytes(file).to_pybytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not a text file in UTF-8 ({error}). Give one key a line.") from None
    return pa.array([line.rstrip("\r") for line in text.split("\n") if line.strip()], pa.string())
