"""Taking existing WebDataset tars in place: they are indexed and checked, not copied.

The result is a manifest with absolute paths, and an index of each tar beside it. Labels stay in the tars where they are
ids; names, and labels inside `json` members, are turned into ids in small files beside the manifest.
"""

from __future__ import annotations

import fnmatch
import glob
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from labelmill.data import store
from labelmill.data.columns import ImportedLabels, LabelSource, read_labels_of
from labelmill.data.damage import ShardDamage
from labelmill.data.images import IMAGE_EXTS
from labelmill.data.index import MAX_EXTS, ShardIndex, build_index, index_bytes, index_names
from labelmill.data.keys import check_unique
from labelmill.data.labels import Form, LabelSpec, count_labels
from labelmill.data.manifest import CLASSES_FILE, FieldSpec, Manifest, ShardInfo, classes_bytes
from labelmill.data.overlay import write_label_overlay
from labelmill.data.scan import Places, group_members
from labelmill.data.spans import Spans
from labelmill.data.staging import Staging, check_free
from labelmill.data.tar import TarDamage, parse_tar
from labelmill.data.writer import with_counts
from labelmill.errors import DataError

_KINDS: dict[str, tuple[Literal["text", "array", "safetensors", "arrow"], str]] = {
    "txt": ("text", "text"),
    "npy": ("array", "array"),
    "safetensors": ("safetensors", "tensors"),
    "arrow": ("arrow", "table"),
}
_PARTS = {"label", "label_weight", "label_negative"}


@dataclass
class _Scan:
    """What the tars hold: per sample only Arrow columns, never Python objects."""

    label_exts: tuple[str, ...]
    shards: list[ShardInfo] = field(default_factory=list)
    keys: list[pa.Array] = field(default_factory=list)
    raw: dict[str, list[pa.ChunkedArray]] = field(default_factory=dict)  # label members, null where a sample has none
    shapes: Counter[tuple[str, ...]] = field(default_factory=Counter)  # sets of extensions
    example: dict[tuple[str, ...], str] = field(default_factory=dict)  # a sample that has just these

    @property
    def total(self) -> int:
        return sum(self.shapes.values())

    def count(self, ext: str) -> int:
        """Samples with a member of extension `ext`."""
        return sum(n for shape, n in self.shapes.items() if ext in shape)

    def without(self, exts: Sequence[str]) -> str:
        """A sample that has none of `exts`."""
        return next(self.example[s] for s in self.shapes if not set(exts) & set(s))


def import_webdataset(
    paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    name: str | None = None,
    fields: Mapping[str, FieldSpec] | None = None,
    label_form: Form | None = None,
    label_field: str | None = None,
    num_classes: int | None = None,
    class_names: Sequence[str] | None = None,
    overwrite: bool = False,
) -> dict[str, Manifest]:
    """Indexes tars in place.

    Fields follow from the extensions: images (all image extensions together are `image`; with a prefix, as in
    `left.png`, they are `left`), `txt` is `text`, `npy` is `array`, `safetensors` is `tensors`, `arrow` is `table`; other
    members are left alone. Labels come from `cls` (one id or name), else `labels.json`, else there are none.

    Args:
        paths: a folder, a glob pattern, a brace range `shard-{0000..0099}.tar`, or a list of tars.
        out: folder of the manifest.
        name: of the data set; by default that of the folder of tars.
        fields: which members are read, instead of what the extensions suggest.
        label_form: form of the labels where it can't be told (complementary labels look like multi).
        label_field: take labels from this field of the `json` members.
        num_classes, class_names: the label space; by default what the labels need.
        overwrite: replace a data set at `out`.

    Returns {"all": manifest}. Raises DataError naming shard, byte offset or sample: damage, a cut tar, a key
    that occurs twice, samples that lack a member, a wrong label.
    """
    place = store.normal(out)
    check_free(place, overwrite)
    tars = find_tars(paths)
    staging = Staging(place, overwrite)
    try:
        scan = _Scan(("json",) if label_field is not None else ("cls", "labels.json"))
        for path, index_name in zip(tars, index_names(tars), strict=True):
            _scan_tar(path, scan, staging, index_name)
        return {"all": _import(tars, scan, staging, name, fields, label_form, label_field, num_classes, class_names)}
    except BaseException:
        staging.discard()
        raise


def _import(
    tars: list[str],
    scan: _Scan,
    staging: Staging,
    name: str | None,
    fields: Mapping[str, FieldSpec] | None,
    label_form: Form | None,
    label_field: str | None,
    num_classes: int | None,
    class_names: Sequence[str] | None,
) -> Manifest:
    """The manifest of scanned tars."""
    place = staging.out
    check_unique(pa.chunked_array(scan.keys), tars[0] if len(tars) == 1 else os.path.dirname(tars[0]))
    specs = dict(fields) if fields is not None else _infer_fields(scan)
    for field_name, spec in specs.items():
        if sum(n for shape, n in scan.shapes.items() if set(spec.exts) & set(shape)) < scan.total:
            example, wanted = scan.without(spec.exts), " or .".join(spec.exts)
            raise DataError(f"{example} has no field {field_name!r} (member .{wanted}). Say which fields to read.")
    draft = Manifest(
        name=name or os.path.basename(os.path.dirname(tars[0])) or "webdataset",
        layout="tar",
        fields=specs,
        label=LabelSpec(form="none", num_classes=num_classes),
        shards=tuple(scan.shards),
        created_by={"importer": "webdataset", "ignored": ", ".join(_ignored(scan, specs)) or "nothing"},
    )
    columns, form, in_place = _label_columns(scan, label_form, label_field)
    keys = pa.chunked_array(scan.keys)
    source = LabelSource("none", num_classes=num_classes)
    if form != "none":
        weights, negatives = ("label_weight", "label_negative")
        source = LabelSource(
            form,
            "label",
            weights if weights in columns else None,
            negatives if negatives in columns else None,
            num_classes=num_classes,
            class_names=class_names,
        )
    labels = read_labels_of(pa.table(columns), source, f"{os.path.dirname(tars[0])} (labels)", keys)
    if in_place:
        return _commit(draft, labels, staging)
    table = pa.table({"key": keys, **labels.columns})
    starts = np.cumsum([0, *(s.samples for s in scan.shards)])
    return write_label_overlay(
        draft.at(place),
        place,
        labels.spec,
        (table.slice(int(a), s.samples) for a, s in zip(starts, scan.shards, strict=False)),
        classes=labels.classes,
        created_by=draft.created_by,
        check_keys_align=False,
        parents=(),
        staging=staging,
    )


def _commit(draft: Manifest, labels: ImportedLabels, staging: Staging) -> Manifest:
    """The manifest and label space of tars that hold their labels as ids."""
    update: dict[str, Any] = {"label": labels.spec}
    if labels.classes is not None:
        counts = count_labels(pa.table(labels.columns), labels.spec)
        data = classes_bytes(with_counts(labels.classes, labels.spec, counts, staging.out))
        store.write_bytes(staging.path(CLASSES_FILE), data)
        update |= {"classes": CLASSES_FILE, "classes_sha256": hashlib.sha256(data).hexdigest()}
    return staging.commit(draft.model_copy(update=update))


# --- finding and scanning ------------------------------------------------------------------------------


def find_tars(paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> list[str]:
    """The tars that a folder, glob, brace range or list names, in order. Raises DataError for none."""
    given = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    found: list[str] = []
    for path in given:
        for text in _braces(os.fspath(path)):
            found += _matching(store.normal(text))
    if not found:
        shown = ", ".join(os.fspath(path) for path in given) or "no path"
        raise DataError(f"{shown}: no tar here. Give a folder, a glob or tars.")
    if twice := [p for p, n in Counter(found).items() if n > 1]:
        raise DataError(f"{twice[0]}: this tar is named twice.")
    return found


def _braces(text: str) -> Iterator[str]:
    """`a-{08..10}.tar` -> a-08.tar, a-09.tar, a-10.tar; `{x,y}` too."""
    match = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", text)
    if match is None:
        yield text
        return
    first, last, words = match.groups()
    parts = words.split(",") if words else [str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)]
    for part in parts:
        yield from _braces(text[: match.start()] + part + text[match.end() :])


def _matching(path: str) -> list[str]:
    folder, _, pattern = path.rpartition("/")
    if any(c in pattern for c in "*?["):
        if not store.is_uri(path):
            return sorted(glob.glob(path, recursive=True))
        return [store.join(folder, f) for f in store.list_files(folder, False) if fnmatch.fnmatch(f, pattern)]
    if store.is_folder(path):
        return [store.join(path, f) for f in store.list_files(path, recursive=False) if f.endswith(".tar")]
    if not store.exists(path):
        raise DataError(f"{path}: no such tar. Give a folder, a glob or tars.")
    return [path]


def _scan_tar(path: str, scan: _Scan, staging: Staging, index_name: str) -> None:
    """Adds a tar to the scan, and writes its index."""
    data = store.read_bytes(path)
    index = _index(data, path)
    places = index.places
    if not len(places):
        raise DataError(f"{path}: no sample in this tar: members are called <key>.<extension>.")
    exts = sorted(places.members)
    if exts == ["arrow"]:
        raise DataError(f"{path}: a packed shard of a labelmill data set. Use the manifest it was written with.")
    has = np.stack([places.members[ext][0] >= 0 for ext in exts], axis=1)
    shapes, first, counts = np.unique(has, axis=0, return_index=True, return_counts=True)
    for mask, row, count in zip(shapes, first, counts, strict=True):
        shape = tuple(ext for ext, there in zip(exts, mask, strict=True) if there)
        scan.shapes[shape] += int(count)
        scan.example.setdefault(shape, f"{path}: sample {places.keys[int(row)].as_py()!r}")
    for ext in scan.label_exts:
        scan.raw.setdefault(ext, []).append(_contents(data, places, ext))
    scan.keys.append(places.keys)
    digest = hashlib.sha256(data).hexdigest()
    info = {"path": path, "samples": len(places), "bytes": data.size, "sha256": digest}
    if len(exts) <= MAX_EXTS:
        made = index_bytes(index, digest)
        store.write_bytes(staging.path(index_name), made)
        info |= {"index": index_name, "index_sha256": hashlib.sha256(made).hexdigest()}
    scan.shards.append(ShardInfo.model_validate(info))


def _index(data: pa.Buffer, path: str) -> ShardIndex:
    """Where the samples of a tar lie. Raises ShardDamage, with how many samples are whole, when it's damaged or cut."""
    try:
        index = build_index(data, "tar", path)
        if not index.places.ended:
            walked = parse_tar(memoryview(data).cast("B"))
            reason = "no end-of-archive marker, so it may be cut, and nothing says how many samples there should be,"
            raise TarDamage(reason, walked.end, walked)
    except TarDamage as damage:
        before = group_members(damage.index, path).members
        found = sum(m.keys() >= before[0].keys() for m in before)  # as complete as the first
        raise ShardDamage.of(path, damage.reason, damage.offset, found=found) from None
    return index


def _contents(data: pa.Buffer, places: Places, ext: str) -> pa.ChunkedArray:
    """The members of extension `ext` as a binary column, null where a sample has none."""
    offset, size = places.member((ext,))
    has = offset >= 0
    spans = Spans([data], np.zeros(len(places), dtype=np.int64), offset, size)
    found = spans.take(np.flatnonzero(has)).join(pa.binary())
    if has.all():
        return found
    place = np.where(has, np.cumsum(has) - 1, 0)
    return found.take(pa.array(place, mask=~has)) if has.any() else pa.chunked_array([pa.nulls(len(has), pa.binary())])


# --- what the members mean -----------------------------------------------------------------------------


def _infer_fields(scan: _Scan) -> dict[str, FieldSpec]:
    exts = sorted({e for shape in scan.shapes for e in shape})
    plain_images = [e for e in exts if e in IMAGE_EXTS]
    fields: dict[str, FieldSpec] = {}
    if any(len(set(shape) & IMAGE_EXTS) > 1 for shape in scan.shapes):
        fields |= {e: FieldSpec(kind="image", ext=e) for e in plain_images}  # such as photo.jpg beside mask.png
    elif plain_images:
        fields["image"] = FieldSpec(kind="image", ext=";".join(plain_images))
    for ext in exts:
        prefix, dot, last = ext.rpartition(".")
        if last in IMAGE_EXTS and dot:
            fields[prefix] = FieldSpec(kind="image", ext=ext)
        elif last in _KINDS:
            kind, plain = _KINDS[last]
            fields[prefix if dot else plain] = FieldSpec(kind=kind, ext=ext)
    if not fields:
        raise DataError(
            f"{scan.shards[0].path}: no member is an image, .txt, .npy, .safetensors or .arrow (found .{', .'.join(exts)}). Say "
            "which fields to read."
        )
    return fields


def _ignored(scan: _Scan, fields: Mapping[str, FieldSpec]) -> list[str]:
    known = {e for spec in fields.values() for e in spec.exts} | {"cls", "labels.json"}
    return sorted({e for shape in scan.shapes for e in shape} - known)


def _complete(scan: _Scan, ext: str) -> bool:
    """Whether the samples have a member of extension `ext`: all or none. Raises DataError for some."""
    if 0 < scan.count(ext) < scan.total:
        missing = scan.total - scan.count(ext)
        raise DataError(f"{scan.without([ext])} has no .{ext} member ({missing} of {scan.total} samples lack it).")
    return scan.count(ext) > 0


def _label_columns(scan: _Scan, form: Form | None, label_field: str | None) -> tuple[dict[str, Any], Form, bool]:
    """Label columns for `read_labels_of`, their form, and whether the tars hold them as ids."""
    if form == "none":
        return {}, "none", True
    if label_field is not None:
        return _from_json(scan, form, label_field)
    if _complete(scan, "cls"):
        if form not in (None, "single"):
            raise DataError(f"{scan.shards[0].path}: .cls members hold single labels, not {form!r}.")
        texts = pa.chunked_array([pc.utf8_trim_whitespace(_text(c)) for c in _raw(scan, "cls").chunks], pa.string())
        if pc.all(pc.match_substring_regex(texts, r"^-?[0-9]{1,18}$")).as_py():
            return {"label": texts.cast(pa.int64())}, "single", True
        return {"label": texts}, "single", False
    if _complete(scan, "labels.json"):
        columns = _json_columns(scan, "labels.json", sorted(_PARTS), "label")
        return columns, form or _form_of(columns), not _is_text(columns["label"])
    if form is not None:
        raise DataError(f"{scan.shards[0].path}: no .cls or .labels.json member to take {form!r} labels from.")
    return {}, "none", True


def _raw(scan: _Scan, ext: str) -> pa.ChunkedArray:
    return pa.chunked_array([c for column in scan.raw[ext] for c in column.chunks], pa.binary())


def _text(raw: pa.Array) -> pa.Array:
    try:
        return raw.cast(pa.string())
    except pa.ArrowInvalid:
        return pa.array([value.decode("utf-8", "replace") for value in raw.to_pylist()], pa.string())


def _from_json(scan: _Scan, form: Form | None, label_field: str) -> tuple[dict[str, Any], Form, bool]:
    if not _complete(scan, "json"):
        raise DataError(f"{scan.shards[0].path}: no .json member to take {label_field!r} from.")
    columns = _json_columns(scan, "json", [label_field], label_field, as_text=form == "soft")
    columns = {"label": columns[label_field]}
    if form is None:
        kind = columns["label"].type
        form = "single" if pa.types.is_integer(kind) or pa.types.is_string(kind) else _form_of(columns)
    return columns, form, False


def _json_columns(
    scan: _Scan, ext: str, names: Sequence[str], needed: str, as_text: bool = False
) -> dict[str, pa.ChunkedArray]:
    """Those of the fields `names` that every `ext` member has, as columns; a shard's objects at a time."""
    parts: list[dict[str, pa.Array]] = []
    for shard, (keys, column) in enumerate(zip(scan.keys, scan.raw[ext], strict=True)):
        objects = []
        for row, raw in enumerate(column.to_pylist()):
            try:
                value = json.loads(raw or b"")
            except (ValueError, RecursionError):
                value = None
            if not isinstance(value, dict) or needed not in value:
                key = keys[row].as_py()
                raise DataError(f"sample {key!r}: its .{ext} member isn't a JSON object with a field {needed!r}.")
            objects.append(value)
        try:
            present = [n for n in names if all(n in o for o in objects)]
            values = {n: [json.dumps(o[n]) if as_text else o[n] for o in objects] for n in present}
            parts.append({n: pa.array(v) for n, v in values.items()})
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError) as error:
            raise DataError(f"{scan.shards[shard].path}: {ext}: values of different kinds: {error}") from None
    common = [n for n in names if all(n in part for part in parts)]
    return {n: _unified([part[n] for part in parts], f"{scan.shards[0].path}: {ext}, {n}") for n in common}


def _unified(parts: list[pa.Array], what: str) -> pa.ChunkedArray:
    """Columns of all shards as one, of the type that holds all: an empty list in one shard may be names in another."""
    if len({part.type for part in parts}) == 1:
        return pa.chunked_array(parts)
    try:
        examples = pa.array([v for part in parts for v in _telling(part)])
        return pa.chunked_array([part.cast(examples.type) for part in parts])
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError) as error:
        raise DataError(f"{what}: values of different kinds: {error}") from None


def _telling(part: pa.Array) -> list[Any]:
    """A few values that give a column's type away."""
    if pa.types.is_list(part.type):
        lengths = pc.fill_null(pc.list_value_length(part), 0)
        part = part.filter(pc.greater(lengths, 0))
    return part.drop_null()[:1].to_pylist()


def _is_text(column: pa.Array) -> bool:
    kind = column.type.value_type if pa.types.is_list(column.type) else column.type
    return pa.types.is_string(kind)


def _form_of(columns: Mapping[str, pa.Array]) -> Form:
    if "label_weight" in columns:
        return "soft"
    if "label_negative" in columns:
        return "partial"
    kind = columns["label"].type
    kind = kind.value_type if pa.types.is_list(kind) else kind
    return "continuous" if pa.types.is_floating(kind) else "multi"
