"""The manifest: what a data set is. Shards with counts and checksums, fields, label form, label space.

`manifest.json` lies beside the shards. Readers trust it, not the shards: a shard that was cut or damaged can
look like a shorter one, and only counts and checksums kept elsewhere can tell. Class names are never in the
JSON but in an Arrow file beside it, so that a million classes cost nothing to load when only their number is
needed.
"""

from __future__ import annotations

import hashlib
import json
import os
from functools import cached_property
from math import prod
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field, PrivateAttr, ValidationError, field_validator, model_validator

from labelmill.data import store
from labelmill.data.labels import LABEL_COLUMNS, LabelSpec
from labelmill.errors import DataError
from labelmill.job import StrictModel

SCHEMA_VERSION = 1
MANIFEST_FILE = "manifest.json"
CLASSES_FILE = "classes.arrow"

Layout = Literal["tar", "packed"]
_ARRAY_TYPES = {
    name: pa.from_numpy_dtype(np.dtype(name))
    for name in ("float16", "float32", "float64", "uint8", "int8", "int16", "int32", "int64")
}


class FieldSpec(StrictModel):
    """One input of a sample.

    An array with `shape` and `dtype` is an Arrow fixed-size list, otherwise NPY bytes. safetensors (a dict of tensors)
    and arrow (an Arrow stream or file) stay bytes: see records.py.
    """

    kind: Literal["image", "text", "array", "bytes", "safetensors", "arrow"]
    ext: str = Field(
        pattern=r"^[a-z0-9_]+([.][a-z0-9_]+)*(;[a-z0-9_]+([.][a-z0-9_]+)*)*$",
        description="extension of the tar member; alternatives separated by ';', as in WebDataset: png;jpg",
    )
    shape: tuple[int, ...] | None = Field(None, description="shape of every sample's array or decoded image, if fixed")
    dtype: str | None = Field(None, description="element type of arrays of fixed shape")

    @field_validator("dtype")
    @classmethod
    def _known_dtype(cls, value: str | None) -> str | None:
        if value is not None and value not in _ARRAY_TYPES:
            raise ValueError(f"dtype {value!r} is unknown; use one of {', '.join(_ARRAY_TYPES)}")
        return value

    @property
    def exts(self) -> tuple[str, ...]:
        """Extensions that a member of this field may have."""
        return tuple(self.ext.split(";"))

    @property
    def arrow_type(self) -> pa.DataType:
        """Type of the field's column in a shard table."""
        if self.kind == "text":
            return pa.string()
        if self.kind == "array" and self.shape is not None and self.dtype is not None:
            return pa.list_(_ARRAY_TYPES[self.dtype], prod(self.shape))
        return pa.binary()


def _leaves(path: str, allowed: bool) -> bool:
    """Whether a path has `..` parts. `allowed`: only where they don't lead, as in `../old/shard.tar`.

    A new label version names the shards of the old one so.
    """
    parts = path.split("/")
    while allowed and parts[0] == "..":
        parts.pop(0)
    return ".." in parts


def _is_elsewhere(path: str) -> bool:
    return ".." in path.split("/") or os.path.isabs(path) or store.is_uri(path)


class ShardInfo(StrictModel):
    """One shard file, and the overlay file with its labels when they don't come from the shard itself."""

    path: str = Field(min_length=1, description="relative to the manifest, absolute, or a URI")
    samples: int = Field(ge=1)
    bytes: int = Field(ge=1)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    labels: str | None = Field(None, description="Arrow file with key and label columns, row for row")
    labels_sha256: str | None = Field(None, pattern=r"^[0-9a-f]{64}$")
    index: str | None = Field(None, description="Arrow file that says where each sample lies (index.py)")
    index_sha256: str | None = Field(None, pattern=r"^[0-9a-f]{64}$")

    @model_validator(mode="after")
    def _is_consistent(self) -> ShardInfo:
        if (self.labels is None) != (self.labels_sha256 is None):
            raise ValueError("labels and labels_sha256 come together")
        if (self.index is None) != (self.index_sha256 is None):
            raise ValueError("index and index_sha256 come together")
        if ".." in self.path and _leaves(self.path, allowed=self.labels is not None):
            raise ValueError(f"path {self.path!r} leads out of the data set's folder")
        if self.labels is not None and _is_elsewhere(self.labels):
            raise ValueError(f"labels {self.labels!r} must be a file in the data set's folder")
        if self.index is not None and ".." in self.index and _leaves(self.index, allowed=self.labels is not None):
            raise ValueError(f"index {self.index!r} leads out of the data set's folder")
        return self


class Manifest(StrictModel):
    """A data set, or a version of one. `root` says where it was loaded from and isn't content."""

    schema_version: Literal[1] = 1
    name: str = Field(min_length=1)
    layout: Layout = Field(description="tar: a member per field and sample; packed: a member per block of samples")
    fields: dict[str, FieldSpec]
    label: LabelSpec
    classes: str | None = Field(None, description="Arrow file of the label space: name, count, further columns")
    classes_sha256: str | None = Field(None, pattern=r"^[0-9a-f]{64}$")
    shards: tuple[ShardInfo, ...]
    parents: tuple[str, ...] = Field((), description="digests of the versions that this one was made from")
    created_by: dict[str, str] = Field(default_factory=dict)
    _root: str | None = PrivateAttr(None)

    @field_validator("classes")
    @classmethod
    def _classes_lie_beside(cls, value: str | None) -> str | None:
        if value is not None and _is_elsewhere(value):
            raise ValueError(f"{value!r} must be a file in the data set's folder")
        return value

    @field_validator("fields")
    @classmethod
    def _field_names(cls, value: dict[str, FieldSpec]) -> dict[str, FieldSpec]:
        if taken := set(value) & {"key", *LABEL_COLUMNS}:
            raise ValueError(f"a field can't be called {sorted(taken)[0]!r}: that column has a meaning of its own")
        exts = [ext for spec in value.values() for ext in spec.exts]
        if twice := sorted({ext for ext in exts if exts.count(ext) > 1} | ({"cls", "labels.json"} & set(exts))):
            raise ValueError(f"extension {twice[0]!r} belongs to two fields or is the label's")
        return value

    @property
    def num_samples(self) -> int:
        """Samples of all shards."""
        return sum(shard.samples for shard in self.shards)

    @property
    def num_bytes(self) -> int:
        """Bytes of all shards."""
        return sum(shard.bytes for shard in self.shards)

    @cached_property
    def digest(self) -> str:
        """sha256 (hex) of what a reader gets: fields, label form, label space, every shard's content and
        labels.

        Name, paths, lineage, origin and sidecar indexes don't count: the same data elsewhere has the same digest.
        """
        content = {
            "schema_version": self.schema_version,
            "layout": self.layout,
            "fields": {name: spec.model_dump(mode="json") for name, spec in self.fields.items()},
            "label": self.label.model_dump(mode="json"),
            "classes": self.classes_sha256,
            "shards": [[s.samples, s.bytes, s.sha256, s.labels_sha256] for s in self.shards],
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    @property
    def root(self) -> str:
        """Folder of the manifest. Raises DataError for a manifest that was neither loaded nor saved."""
        if self._root is None:
            raise DataError(f"data set {self.name!r} has no place yet: load it with load_manifest, or save it first.")
        return self._root

    def at(self, root: str | os.PathLike[str]) -> Manifest:
        """The same content, with relative paths meant from `root`."""
        moved = self.model_copy()
        moved._root = store.normal(root)
        return moved

    def shard_path(self, i: int) -> str:
        """Path or URI of shard `i`."""
        return store.join(self.root, self.shards[i].path) if self._root else self.shards[i].path

    def labels_path(self, i: int) -> str | None:
        """Path or URI of shard `i`'s label overlay, if it has one."""
        labels = self.shards[i].labels
        return store.join(self.root, labels) if labels else None

    def index_path(self, i: int) -> str | None:
        """Path or URI of shard `i`'s sidecar index, if it has one."""
        index = self.shards[i].index
        return store.join(self.root, index) if index else None

    @property
    def schema(self) -> pa.Schema:
        """Columns of a shard table: key, fields, labels."""
        columns = {
            "key": pa.string(),
            **{n: f.arrow_type for n, f in self.fields.items()},
            **self.label.columns,
        }
        return pa.schema(list(columns.items()))

    def load_classes(self) -> pa.Table:
        """The label space: one row a class, in id order, with `name`, `count` and any further columns.

        Raises DataError when the data set has none, or the file is missing, changed, or of another length.
        """
        if self.classes is None:
            raise DataError(f"data set {self.name!r} has no class names: its labels are bare ids.")
        path = store.join(self.root, self.classes)
        data = store.read_bytes(path)
        if self.classes_sha256 and hashlib.sha256(data).hexdigest() != self.classes_sha256:
            raise DataError(f"{path}: the label space changed since it was written (sha256 differs). Copy it again.")
        try:
            table = pa.ipc.open_file(data).read_all()
        except pa.ArrowInvalid as error:
            raise DataError(
                f"{path}: not an Arrow file: {error}. Copy it again, or import the data set again."
            ) from None
        check_classes(table, self.label, path)
        return table


def check_classes(table: pa.Table, label: LabelSpec, where: str) -> None:
    """Raises DataError unless `table` names each of the label's classes, with int64 counts if any."""
    if "name" not in table.column_names or table.column("name").type != pa.string():
        raise DataError(f"{where}: a label space needs a column `name` of strings; found {table.schema.names}.")
    if "count" in table.column_names and table.column("count").type != pa.int64():
        raise DataError(f"{where}: column `count` of the label space must be int64.")
    if table.num_rows != label.num_classes:
        raise DataError(f"{where}: {table.num_rows} class names for {label.num_classes} classes.")


def classes_bytes(table: pa.Table) -> pa.Buffer:
    """The label space as an Arrow file."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table.combine_chunks())
    return sink.getvalue()


def save_manifest(manifest: Manifest, folder: str | os.PathLike[str]) -> Manifest:
    """Writes `manifest.json` into `folder`, atomically. Returns the manifest with that root."""
    text = json.dumps(manifest.model_dump(mode="json"), indent=1) + "\n"
    store.write_bytes(store.join(store.normal(folder), MANIFEST_FILE), text.encode())
    return manifest.at(folder)


def load_manifest(path: str | os.PathLike[str]) -> Manifest:
    """Loads a manifest from its folder, its file, or a URI of either.

    Raises DataError: nothing there (and how to import), not JSON, a schema version this release doesn't know,
    a wrong field (named), no shard.
    """
    given = store.normal(path)
    file = given if given.endswith(".json") else store.join(given, MANIFEST_FILE)
    if not store.exists(file):
        raise DataError(f"{given}: {_what_is_there(given)}")
    manifest = _read(file)
    if not manifest.shards:
        raise DataError(f"{file}: the data set {manifest.name!r} is empty: it lists no shard. Import it again.")
    return manifest.at(os.path.dirname(file))


def _read(file: str) -> Manifest:
    raw = _read_json(file)
    if raw.get("schema_version") != SCHEMA_VERSION:
        raise DataError(
            f"{file}: schema_version is {raw.get('schema_version')!r}, this release reads {SCHEMA_VERSION}. "
            "Use the release that wrote it, or import the data set again."
        )
    try:
        return Manifest.model_validate(raw | {"shards": _shards(raw.pop("shards"))})
    except (ValidationError, KeyError, TypeError, AttributeError):
        pass  # once more, as a whole, to say what is wrong and where
    try:
        return Manifest.model_validate(_read_json(file))
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, e['loc']))}: {e['msg'].removeprefix('Value error, ')}" for e in error.errors()]
        raise DataError(f"{file}: {'; '.join(lines[:10])}. The manifest was edited or is damaged.") from None


def _read_json(file: str) -> dict[str, Any]:
    try:
        raw = json.loads(store.read_bytes(file).to_pybytes())
    except ValueError as error:
        raise DataError(
            f"{file}: not readable as JSON ({error}). Copy it again, or import the data set again."
        ) from None
    if not isinstance(raw, dict):
        raise DataError(f"{file}: a manifest is a JSON object, this is a {type(raw).__name__}.")
    return raw


def _shards(raw: list[Any]) -> tuple[ShardInfo, ...]:
    """The shards one by one, each raw one freed at once: of many, both together cost more memory than the rest."""
    raw.reverse()
    out: list[ShardInfo] = []
    given: dict[frozenset[str], set[str]] = {}
    while raw:
        info = ShardInfo.model_validate(raw.pop())
        names = info.model_fields_set  # a set for each shard would be the largest part of it
        object.__setattr__(info, "__pydantic_fields_set__", given.setdefault(frozenset(names), names))
        out.append(info)
    return tuple(out)


def _what_is_there(given: str) -> str:
    """Why no manifest was found under `given`, and what to do."""
    how = "Import one with `labelmill data import` (`labelmill data import --help` lists the kinds)."
    if not store.exists(given):
        return f"no such data set. {how}"
    if given.endswith(".json") or not store.is_folder(given):
        return f"not a data set: give the folder that holds {MANIFEST_FILE}. {how}"
    inside = [p for p in store.list_files(given) if p.endswith("/" + MANIFEST_FILE) and p.count("/") == 1]
    if inside:
        parts = ", ".join(store.join(given, p.rpartition("/")[0]) for p in inside)
        return f"holds the parts of a data set but none itself. Name one of: {parts}."
    if any(p.endswith(".tar") for p in store.list_files(given, recursive=False)):
        return f"holds tar files but no {MANIFEST_FILE}. Index them with `labelmill data import webdataset`."
    return f"no {MANIFEST_FILE} in this folder. {how}"
