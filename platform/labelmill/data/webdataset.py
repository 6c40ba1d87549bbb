"""Taking existing WebDataset tars in place: they are indexed and checked, not copied.

The result is a manifest with absolute paths. Labels stay in the tars where they are ids; names, and labels inside
`json` members, are turned into ids in small files beside the manifest.
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
from typing import Any

import numpy as np
import pyarrow as pa

from labelmill.data import store
from labelmill.data.columns import LabelSource, read_labels_of
from labelmill.data.images import IMAGE_EXTS
from labelmill.data.keys import check_unique
from labelmill.data.labels import Form, LabelSpec
from labelmill.data.manifest import CLASSES_FILE, FieldSpec, Manifest, ShardInfo, classes_bytes
from labelmill.data.overlay import write_label_overlay
from labelmill.data.shards import ShardDamage, group_members
from labelmill.data.staging import Staging, check_free
from labelmill.data.tar import TarDamage, parse_tar
from labelmill.data.writer import with_counts
from labelmill.errors import DataError

_LABEL_EXTS = ("cls", "labels.json", "json")
_KINDS = {"txt": ("text", "text"), "npy": ("array", "array")}
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
    `left.png`, they are `left`), `txt` is `text`, `npy` is `array`; other members are left alone. Labels come from `cls`
    (one id or name), else `labels.json`, else there are none.

    Args:
        paths: a folder, a glob pattern, a brace range `shard-{0000..0099}.tar`, or a list of tars.
        out: folder of the manifest.
        name: of the data set; by default that of the folder of tars.
        fields: which members are read, instead of what the extensions suggest.
        label_form: form of the labels where it can't be told (complementary labels look like multi).
        label_field: take labels from this field of the `json` members.
        num_classes, class_names: the label space; by default what the labels need.
        overwrite: replace a data set at `out`.

    Returns {"all": manifest}. Raises DataError naming shard, byte offset or sample: damage, a cut tar, a key that
    occurs twice, samples that lack a member, a wrong label.
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
            raise DataError(f"{example!r} has no field {field_name!r} (member .{wanted}). Say which fields to read.")
    title = name or os.path.basename(os.path.dirname(tars[0])) or "webdataset"
    source, where = "in the tars", os.path.dirname(tars[0])
    draft = Manifest(
        name=title,
        layout="tar",
        fields=specs,
        label=LabelSpec(form="none", num_classes=num_classes),
        shards=tuple(scan.shards),
        created_by={"importer": "webdataset", "ignored": ", ".join(_ignored(scan, specs)) or "nothing"},
    )
    columns, form, in_place = _label_columns(scan, label_form, label_field)
    if form is None:
        manifest = Staging(place, overwrite).commit(draft)
        return {"all": manifest}
    label = LabelSource(
        form,
        "label",
        "label_weight" if "label_weight" in columns else None,
        "label_negative" if "label_negative" in columns else None,
        num_classes=num_classes,
        class_names=class_names,
    )
    keys = pa.chunked_array(scan.keys)
    parsed = read_labels_of(pa.table(columns), label, f"{where} (labels {source})", keys.to_pylist())
    bounds = np.cumsum([0, *(s.samples for s in scan.shards)])
    table = pa.table({"key": keys.combine_chunks(), **parsed.columns})
    if in_place and class_names is None and not _renamed(columns["label"]):
        staging = Staging(place, overwrite)
        try:
            return {"all": _with_label(draft, parsed.spec, parsed.classes, table, staging)}
        except BaseException:
            staging.discard()
            raise
    tables = (table.slice(int(a), int(z - a)) for a, z in zip(bounds[:-1], bounds[1:], strict=True))
    manifest = write_label_overlay(
        draft.at(place),
        place,
        parsed.spec,
        tables,
        classes=parsed.classes,
        created_by=draft.created_by,
        check_keys_align=False,
        parents=(),
        overwrite=overwrite,
    )
    return {"all": manifest}
