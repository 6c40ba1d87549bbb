"""Taking existing WebDataset tars in place: they are indexed and checked, not copied.

The result is a manifest with absolute paths. Labels stay in the tars where they are ids; names, and labels
inside `json` members, are turned into ids in small files beside the manifest.
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

from labelmill.data import store
from labelmill.data.columns import ImportedLabels, LabelSource, read_labels_of
from labelmill.data.images import IMAGE_EXTS
from labelmill.data.keys import check_unique
from labelmill.data.labels import Form, LabelSpec, count_labels
from labelmill.data.manifest import CLASSES_FILE, FieldSpec, Manifest, ShardInfo, classes_bytes
from labelmill.data.overlay import write_label_overlay
from labelmill.data.shards import ShardDamage, group_members
from labelmill.data.staging import Staging, check_free
from labelmill.data.tar import TarDamage, parse_tar
from labelmill.data.writer import with_counts
from labelmill.errors import DataError

_LABEL_EXTS = ("cls", "labels.json", "json")
_KINDS: dict[str, tuple[Literal["text", "array"], str]] = {"txt": ("text", "text"), "npy": ("array", "array")}
_PARTS = {"label", "label_weight", "label_negative"}


@dataclass
class _Scan:
    """What the tars hold."""

    shards: list[ShardInfo] = field(default_factory=list)
    keys: list[pa.Array] = field(default_factory=list)
    raw: dict[str, list[bytes | None]] = field(default_factory=lambda: {e: [] for e in _LABEL_EXTS})
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
    `left.png`, they are `left`), `txt` is `text`, `npy` is `array`; other members are left alone. Labels come
    from `cls` (one id or name), else `labels.json`, else there are none.

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
    scan = _Scan()
    for path in tars:
        _scan_tar(path, scan)
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
    labels = read_labels_of(pa.table(columns), source, f"{os.path.dirname(tars[0])} (labels)", keys.to_pylist())
    if in_place:
        return {"all": _commit(draft, labels, Staging(place, overwrite))}
    table = pa.table({"key": keys, **labels.columns})
    starts = np.cumsum([0, *(s.samples for s in scan.shards)])
    manifest = write_label_overlay(
        draft.at(place),
        place,
        labels.spec,
        (table.slice(int(a), s.samples) for a, s in zip(starts, scan.shards, strict=False)),
        classes=labels.classes,
        created_by=draft.created_by,
        check_keys_align=False,
        parents=(),
        overwrite=overwrite,
    )
    return {"all": manifest}


def _commit(draft: Manifest, labels: ImportedLabels, staging: Staging) -> Manifest:
    """The manifest and label space of tars that hold their labels as ids."""
    update: dict[str, Any] = {"label": labels.spec}
    try:
        if labels.classes is not None:
            counts = count_labels(pa.table(labels.columns), labels.spec)
            data = classes_bytes(with_counts(labels.classes, labels.spec, counts, staging.out))
            store.write_bytes(staging.path(CLASSES_FILE), data)
            update |= {"classes": CLASSES_FILE, "classes_sha256": hashlib.sha256(data).hexdigest()}
        return staging.commit(draft.model_copy(update=update))
    except BaseException:
        staging.discard()
        raise


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


def _scan_tar(path: str, scan: _Scan) -> None:
    data = store.read_bytes(path)
    view = memoryview(data)
    try:
        index = parse_tar(view)
        if not index.ended:
            reason = "no end-of-archive marker, so it may be cut, and nothing says how many samples there should be,"
            raise TarDamage(reason, index.end, index)
    except TarDamage as damage:
        before = group_members(damage.index, path).members
        found = sum(m.keys() >= before[0].keys() for m in before)  # as complete as the first
        raise ShardDamage.of(path, damage.reason, damage.offset, found=found) from None
    samples = group_members(index, path)
    if not samples.keys:
        raise DataError(f"{path}: no sample in this tar: members are called <key>.<extension>.")
    if all(set(m) == {"arrow"} for m in samples.members):
        raise DataError(f"{path}: a packed shard of a labelmill data set. Use the manifest it was written with.")
    for key, members in zip(samples.keys, samples.members, strict=True):
        shape = tuple(sorted(members))
        scan.shapes[shape] += 1
        scan.example.setdefault(shape, f"{path}: sample {key!r}")
        for ext in _LABEL_EXTS:
            raw = None
            if (i := members.get(ext)) is not None:
                raw = bytes(view[index.offsets[i] : index.offsets[i] + index.sizes[i]])
            scan.raw[ext].append(raw)
    scan.keys.append(pa.array(samples.keys, pa.string()))
    digest = hashlib.sha256(data).hexdigest()
    scan.shards.append(ShardInfo(path=path, samples=len(samples.keys), bytes=data.size, sha256=digest))


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
            f"{scan.shards[0].path}: no member is an image, .txt or .npy (found .{', .'.join(exts)}). Say "
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
        texts = [(raw or b"").decode("utf-8", "replace").strip() for raw in scan.raw["cls"]]
        if all(re.fullmatch(r"-?[0-9]{1,18}", text) for text in texts):
            return {"label": pa.array([int(t) for t in texts], pa.int64())}, "single", True
        return {"label": pa.array(texts, pa.string())}, "single", False
    if _complete(scan, "labels.json"):
        objects = _objects(scan, "labels.json", "label")
        names = sorted(n for n in _PARTS if all(n in o for o in objects))
        columns = {n: _column([o[n] for o in objects], scan, f"labels.json, {n}") for n in names}
        return columns, form or _form_of(columns), not _is_text(columns["label"])
    if form is not None:
        raise DataError(f"{scan.shards[0].path}: no .cls or .labels.json member to take {form!r} labels from.")
    return {}, "none", True


def _from_json(scan: _Scan, form: Form | None, label_field: str) -> tuple[dict[str, Any], Form, bool]:
    if not _complete(scan, "json"):
        raise DataError(f"{scan.shards[0].path}: no .json member to take {label_field!r} from.")
    values = [o[label_field] for o in _objects(scan, "json", label_field)]
    if form == "soft":
        values = [json.dumps(v) for v in values]
    columns = {"label": _column(values, scan, f"json, {label_field}")}
    if form is None:
        kind = columns["label"].type
        form = "single" if pa.types.is_integer(kind) or pa.types.is_string(kind) else _form_of(columns)
    return columns, form, False


def _objects(scan: _Scan, ext: str, needed: str) -> list[dict[str, Any]]:
    out = []
    for row, raw in enumerate(scan.raw[ext]):
        try:
            value = json.loads(raw or b"")
        except ValueError:
            value = None
        if not isinstance(value, dict) or needed not in value:
            key = pa.chunked_array(scan.keys)[row].as_py()
            raise DataError(f"sample {key!r}: its .{ext} member isn't a JSON object with a field {needed!r}.")
        out.append(value)
    return out


def _column(values: list[Any], scan: _Scan, what: str) -> pa.Array:
    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise DataError(f"{scan.shards[0].path}: {what}: values of different kinds: {error}") from None


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
