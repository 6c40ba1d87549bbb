"""Deletion requests: which training samples a model must forget, and proof of that without keeping them.

    request: {kind: ids, file: ids.txt}
    request: {kind: where, all: [{field: key, glob: "user-17/*"}, {field: label, any_of: [3, 8]}]}
    request: {kind: classes, ids: [0]}

A request is resolved against the manifest that a model was trained on, to two masks over its stream: what is forgotten,
what is retained. What is kept of it (`Deletion.save`) is `request.json` and a salted hash of each id. Whoever has the
folder can show that an id was among them (`contains`), and nobody can read the ids from it without guessing them; the
digest of both is what the new model version carries.

Shape legend: N samples of the data set, B rows of a shard.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, model_validator

from labelmill.data import choose
from labelmill.data.labels import LabelSpec
from labelmill.data.manifest import Manifest
from labelmill.data.selection import KeepRows
from labelmill.data.selection_config import read_keys
from labelmill.data.shards import read_labels, read_shard
from labelmill.errors import DataError, did_you_mean
from labelmill.job import StrictModel

REQUEST, LEAVES = "request.json", "leaves.bin"
_LEAF = 16  # bytes of an id's hash


class IdsRequest(StrictModel):
    """Samples by key."""

    kind: Literal["ids"] = "ids"
    file: str = Field(min_length=1, description="text file with a key a line, or a .csv, .tsv or .parquet table")
    column: str = Field("key", description="column of the keys, for a table")

    def forget(self, manifest: Manifest) -> KeepRows:
        keys = read_keys(self.file, self.column)
        if not len(keys):
            raise DataError(f"request.file {self.file}: it holds no id. Name the samples to forget.")
        try:
            return choose.keep_keys(manifest, keys)
        except DataError as error:
            raise DataError(f"request.file {self.file}: {error}") from None


class Condition(StrictModel):
    """One condition on a sample: `key`, `label`, or a text field of the manifest, and one test of it."""

    field: str = Field(min_length=1)
    equals: str | int | None = None
    any_of: tuple[str | int, ...] | None = Field(None, min_length=1)
    glob: str | None = Field(None, min_length=1, description="*, ? and [...] over the whole text")
    contains: str | None = Field(None, min_length=1)
    regex: str | None = Field(None, min_length=1, description="RE2, found anywhere in the text")

    @model_validator(mode="after")
    def _one_test(self) -> Condition:
        given = [n for n in ("equals", "any_of", "glob", "contains", "regex") if getattr(self, n) is not None]
        if len(given) != 1:
            raise ValueError(f"give one of equals, any_of, glob, contains, regex; {len(given)} are given")
        if self.field == "label" and given[0] not in ("equals", "any_of"):
            raise ValueError(f"labels are class ids: use equals or any_of, not {given[0]}")
        wanted = self.any_of or ((self.equals,) if self.equals is not None else ())
        wrong = [v for v in wanted if isinstance(v, int) != (self.field == "label")]
        if wrong:
            kind = "class ids (whole numbers)" if self.field == "label" else "texts"
            raise ValueError(f"{self.field} is compared with {kind}, not {wrong[0]!r}")
        return self

    def holds(self, column: pa.ChunkedArray) -> np.ndarray:
        """bool (B,)."""
        if self.equals is not None or self.any_of is not None:
            values = self.any_of or (self.equals,)
            found = pc.is_in(column, value_set=pa.array(values, column.type))
        elif self.contains is not None:
            found = pc.match_substring(column, self.contains)
        else:
            pattern = self.regex if self.regex is not None else fnmatch.translate(self.glob or "").replace(r"\Z", "$")
            try:
                # RE2 writes the end of the text as \z; fnmatch's flags are its own
                found = pc.match_substring_regex(column, pattern.replace(r"\z", "$"))
            except pa.ArrowInvalid as error:
                raise DataError(f"request.all: {self.field}: {pattern!r} is no pattern: {error}") from None
        return pc.fill_null(found, False).to_numpy(zero_copy_only=False)


class WhereRequest(StrictModel):
    """Samples that meet every condition."""

    kind: Literal["where"] = "where"
    all: tuple[Condition, ...] = Field(min_length=1)

    def forget(self, manifest: Manifest) -> KeepRows:
        known = {"key", "label", *(name for name, spec in manifest.fields.items() if spec.kind == "text")}
        for condition in self.all:
            if condition.field not in known:
                raise DataError(
                    f"request.all: field {condition.field!r} can't be asked about.{did_you_mean(condition.field, known)} "
                    f"The fields of data set {manifest.name!r} are {', '.join(manifest.fields)}; of these, texts can."
                )
        asked = {condition.field for condition in self.all}
        if "label" in asked and manifest.label.form != "single":
            raise DataError(
                f"request.all: data set {manifest.name!r} has labels of form {manifest.label.form}; conditions on "
                "`label` need one class a sample. Use kind: classes."
            )
        whole = asked - {"key", "label"}

        def mask(i: int) -> np.ndarray:
            table = read_shard(manifest, i) if whole else read_labels(manifest, i)
            return np.logical_and.reduce([c.holds(table.column(c.field)) for c in self.all])

        return KeepRows.of((mask(i) for i in range(len(manifest.shards))), manifest.digest, {"rule": "where"})


class ClassesRequest(StrictModel):
    """Every sample with one of these classes."""

    kind: Literal["classes"] = "classes"
    ids: tuple[int | str, ...] = Field(min_length=1, description="class ids, or names of classes")

    def class_ids(self, manifest: Manifest) -> tuple[int, ...]:
        """The ids, names looked up in the label space of the data set."""
        named = any(isinstance(wanted, str) for wanted in self.ids)
        names = manifest.load_classes()["name"].to_pylist() if named else []
        found: list[int] = []
        for wanted in self.ids:
            if isinstance(wanted, str) and wanted not in names:
                raise DataError(
                    f"request.ids: data set {manifest.name!r} has no class {wanted!r}.{did_you_mean(wanted, names)}"
                )
            at = names.index(wanted) if isinstance(wanted, str) else wanted
            if at in found:
                raise DataError(f"request.ids: class {wanted} is listed twice.")
            found.append(at)
        return tuple(found)

    def forget(self, manifest: Manifest) -> KeepRows:
        return choose.keep_classes(manifest, self.class_ids(manifest))


RequestConfig = Annotated[IdsRequest | WhereRequest | ClassesRequest, Field(discriminator="kind")]


# --- resolving ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Deletion:
    """A resolved request.

    Attributes:
        request: as it was asked.
        data: digest of the manifest that it was resolved against.
        forget, retain: masks over the stream; together all samples.
        classes: class ids of which no sample is retained; None when labels don't say.
    """

    request: IdsRequest | WhereRequest | ClassesRequest
    data: str
    forget: KeepRows
    retain: KeepRows
    classes: tuple[int, ...] | None

    def keys(self, manifest: Manifest) -> list[str]:
        """The keys of the samples to forget, in the order of the shards."""
        found: list[str] = []
        for i in range(len(manifest.shards)):
            if self.forget.arrays["kept"][i]:
                keys = read_labels(manifest, i).column("key").filter(pa.array(self.forget.mask(i)))
                found += keys.to_pylist()
        return found

    def save(self, folder: Path, manifest: Manifest, salt: str | None = None) -> str:
        """Writes `request.json` and the hashes of the ids; returns the digest that stands for both.

        The file that a request of ids named isn't kept, nor its name; nor are conditions, which may name a person. A
        salt that is there already stays, so that the same request has the same digest.
        """
        folder.mkdir(parents=True, exist_ok=True)
        old = folder / REQUEST
        if salt is None and old.is_file():
            salt = json.loads(old.read_text(encoding="utf-8"))["salt"]
        salt = salt or secrets.token_hex(16)
        leaves = b"".join(sorted(_leaf(salt, key) for key in self.keys(manifest)))
        content = {
            "version": 1,
            "kind": self.request.kind,
            "samples": self.forget.samples,
            "of": manifest.num_samples,
            "classes": list(self.request.class_ids(manifest)) if isinstance(self.request, ClassesRequest) else None,
            "data": self.data,
            "salt": salt,
            "leaves": hashlib.sha256(leaves).hexdigest(),
        }
        (folder / LEAVES).write_bytes(leaves)
        old.write_text(json.dumps(content, indent=1), encoding="utf-8")
        return request_digest(folder)


def resolve(request: IdsRequest | WhereRequest | ClassesRequest, manifest: Manifest) -> Deletion:
    """Finds the samples of a request.

    Raises DataError: an id that isn't there or is named twice (the first five are named), a class or field that isn't
    there, a request that no sample or every sample meets.
    """
    forget = request.forget(manifest)
    if forget.samples == manifest.num_samples:
        raise DataError(
            f"the request names all {forget.samples} samples of data set {manifest.name!r}: nothing is left to retain. "
            "Retire the model instead (labelmill models revoke)."
        )
    shards = range(len(manifest.shards))
    retain = KeepRows.of((~forget.mask(i) for i in shards), manifest.digest, {"rule": "retain"})
    return Deletion(request, manifest.digest, forget, retain, _gone(manifest, forget))


def _gone(manifest: Manifest, forget: KeepRows) -> tuple[int, ...] | None:
    if manifest.label.form != "single" or manifest.label.num_classes is None:
        return None
    kept_C = np.zeros(manifest.label.num_classes, np.int64)
    gone_C = np.zeros_like(kept_C)
    for i in range(len(manifest.shards)):
        label_B = read_labels(manifest, i).column("label").to_numpy()
        mask_B = forget.mask(i)
        gone_C += np.bincount(label_B[mask_B], minlength=len(gone_C))
        kept_C += np.bincount(label_B[~mask_B], minlength=len(kept_C))
    return tuple(np.flatnonzero((gone_C > 0) & (kept_C == 0)).tolist())


def unlabelled(manifest: Manifest) -> Manifest:
    """The same samples without labels: no stream of it reads a label, so none can reach a method."""
    bare: dict[str, Any] = {"label": LabelSpec(form="none"), "classes": None, "classes_sha256": None}
    if any(shard.labels for shard in manifest.shards):
        plain = {"labels": None, "labels_sha256": None}
        bare["shards"] = tuple(shard.model_copy(update=plain) for shard in manifest.shards)
    return manifest.model_copy(update=bare).at(manifest.root)


# --- proof ----------------------------------------------------------------------------------------------------


def _leaf(salt: str, key: str) -> bytes:
    return hashlib.blake2b(key.encode(), digest_size=_LEAF, key=bytes.fromhex(salt)).digest()


def request_digest(folder: Path) -> str:
    """sha256 over the kept request. Raises DataError when its files are missing or don't belong together."""
    try:
        text = (folder / REQUEST).read_bytes()
        content, leaves = json.loads(text), (folder / LEAVES).read_bytes()
    except (OSError, ValueError) as error:
        raise DataError(f"{folder}: no kept deletion request: {error}") from None
    if hashlib.sha256(leaves).hexdigest() != content["leaves"] or len(leaves) != _LEAF * content["samples"]:
        raise DataError(f"{folder / LEAVES}: not the hashes that {REQUEST} was written with.")
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def contains(folder: Path, keys: Sequence[str], digest: str = "") -> dict[str, bool]:
    """Whether each id was among those that were forgotten, by the kept request alone.

    Raises DataError for a request that was changed, or isn't the one with `digest`.
    """
    found = request_digest(folder)
    if digest and found != digest:
        raise DataError(f"{folder}: this is request {found[:12]}..., not {digest[:12]}...")
    salt: Any = json.loads((folder / REQUEST).read_text(encoding="utf-8"))["salt"]
    leaves = np.frombuffer((folder / LEAVES).read_bytes(), dtype=f"V{_LEAF}")
    known = {bytes(leaf) for leaf in leaves}
    return {key: _leaf(salt, key) in known for key in keys}
