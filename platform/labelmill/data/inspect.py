"""Looking at a data set: label statistics and a few samples; and checking every byte of it.

Shape legend: C classes, N samples.
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from labelmill.data import store
from labelmill.data.decode import decode_arrays, decode_image, decode_images
from labelmill.data.labels import LabelError, LabelSpec, check_labels, count_labels
from labelmill.data.manifest import Manifest
from labelmill.data.shards import ShardDamage, read_labels, read_shard
from labelmill.errors import DataError

if TYPE_CHECKING:
    from rich.console import Console

_QUANTILES = {"min": 0.0, "p10": 0.1, "median": 0.5, "p90": 0.9, "max": 1.0}
_TAIL = {
    "0": (0, 0),
    "1": (1, 1),
    "2-9": (2, 9),
    "10-99": (10, 99),
    "100-999": (100, 999),
    "1000+": (1000, 2**62),
}
_MAX_PROBLEMS = 1000


class Inspection(dict[str, Any]):
    """What `inspect` found, by name."""

    @property
    def images(self) -> list[bytes]:
        """PNG thumbnails of the examples."""
        return [v for example in self["examples"] for v in example.values() if isinstance(v, bytes)]


def inspect(manifest: Manifest, samples: int = 8, thumbnail: int = 96) -> Inspection:
    """What a data set holds, from its labels (all shards are read) and its first shard.

    Returns a mapping with `name`, `digest`, `layout`, `shards`, `samples`, `bytes`, `fields`, `label` and
    `examples`.

    label: `form`, `num_classes`, `dim`; where there are classes: `classes_seen`, `samples_per_class` (min ...
    max over all classes), `tail` (classes by number of samples), `labels_per_sample` (min, mean, max),
    `unlabelled` samples, `largest` and `smallest` [(name, count)]; for continuous labels `values` (per
    dimension min, mean, max).

    examples: for each of up to `samples` samples, spread over the first shard: `key`, `label` (text), and by
    field the text, or PNG bytes of an image at most `thumbnail` pixels wide and high, or a description.

    Raises DataError when a shard can't be read.
    """
    label_stats: dict[str, Any] = manifest.label.model_dump()
    if manifest.label.columns:
        stats = _LabelStats(manifest.label)
        for i in range(len(manifest.shards)):
            stats.add(read_labels(manifest, i))
        label_stats |= stats.summary(_class_names(manifest))
    return Inspection(
        name=manifest.name,
        digest=manifest.digest,
        layout=manifest.layout,
        shards=len(manifest.shards),
        samples=manifest.num_samples,
        bytes=manifest.num_bytes,
        fields={name: spec.model_dump(exclude_none=True) for name, spec in manifest.fields.items()},
        label=label_stats,
        examples=_examples(manifest, samples, thumbnail),
    )


def _class_names(manifest: Manifest) -> pa.ChunkedArray | None:
    return manifest.load_classes().column("name") if manifest.classes else None


class _LabelStats:
    def __init__(self, spec: LabelSpec) -> None:
        self.spec = spec
        self.counts_C = np.zeros(spec.num_classes or 0, dtype=np.int64)
        self.lengths: list[np.ndarray] = []
        self.values: list[np.ndarray] = []

    def add(self, table: pa.Table) -> None:
        column = table.column("label")
        if self.spec.form == "continuous":
            self.values.append(np.stack(column.to_numpy()))
            return
        self.counts_C = self.counts_C + count_labels(table, self.spec)
        if self.spec.form != "single":
            self.lengths.append(pc.list_value_length(column).to_numpy())

    def summary(self, names: pa.ChunkedArray | None) -> dict[str, Any]:
        if self.spec.form == "continuous":
            values = np.concatenate(self.values)
            parts = {"min": values.min(axis=0), "mean": values.mean(axis=0), "max": values.max(axis=0)}
            return {"values": {k: [round(float(x), 6) for x in v] for k, v in parts.items()}}
        counts = self.counts_C
        order = np.argsort(-counts, kind="stable")

        def named(ids: np.ndarray) -> list[tuple[str, int]]:
            return [(names[int(i)].as_py() if names is not None else str(i), int(counts[i])) for i in ids]

        out = {
            "classes_seen": int((counts > 0).sum()),
            "samples_per_class": {k: int(np.quantile(counts, q)) for k, q in _QUANTILES.items()},
            "tail": {k: int(((counts >= lo) & (counts <= hi)).sum()) for k, (lo, hi) in _TAIL.items()},
            "largest": named(order[:5]),
            "smallest": named(order[::-1][:5]),
        }
        if self.lengths:
            lengths = np.concatenate(self.lengths)
            mean = round(float(lengths.mean()), 3)
            out["labels_per_sample"] = {"min": int(lengths.min()), "mean": mean, "max": int(lengths.max())}
            out["unlabelled"] = int((lengths == 0).sum())
        return out


def _examples(manifest: Manifest, count: int, thumbnail: int) -> list[dict[str, Any]]:
    if count < 1:
        return []
    table = read_shard(manifest, 0)
    rows = np.unique(np.linspace(0, table.num_rows - 1, min(count, table.num_rows)).astype(np.int64))
    names = _class_names(manifest)
    out = []
    for row in table.take(pa.array(rows)).to_pylist():
        example: dict[str, Any] = {"key": row["key"], "label": _label_text(row, manifest.label, names)}
        for name, spec in manifest.fields.items():
            value = row[name]
            if spec.kind == "image":
                example[name] = _thumbnail(value, thumbnail)
            elif spec.kind == "text":
                example[name] = value
            else:
                example[name] = f"{spec.kind}, {len(value)} {'values' if isinstance(value, list) else 'bytes'}"
        out.append(example)
    return out


def _label_text(row: dict[str, Any], spec: LabelSpec, names: pa.ChunkedArray | None) -> str:
    def name(i: int) -> str:
        return names[i].as_py() if names is not None else str(i)

    if spec.form == "none":
        return ""
    label = row["label"]
    if spec.form == "single":
        return name(label)
    if spec.form == "continuous":
        return ", ".join(f"{v:g}" for v in label)
    if spec.form == "soft":
        return ", ".join(f"{name(i)} {w:.2g}" for i, w in zip(label, row["label_weight"], strict=True))
    listed = ", ".join(name(i) for i in label[:8]) + (", ..." if len(label) > 8 else "")
    if spec.form == "complementary":
        return f"not {listed}"
    if spec.form == "partial":
        return f"{listed}; not " + ", ".join(name(i) for i in row["label_negative"][:8])
    return listed


def _thumbnail(raw: bytes, side: int) -> bytes | str:
    """PNG bytes, or why there are none."""
    try:
        picture = Image.fromarray(decode_image(raw, None, 3))
    except ValueError as error:
        return f"bad image: {error}"
    picture.thumbnail((side, side))
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def contact_sheet(images: Sequence[bytes], path: str | os.PathLike[str], columns: int = 8, gap: int = 4) -> None:
    """Writes images (encoded, for instance the thumbnails of `inspect`) side by side as one PNG.

    Raises DataError when there is no image, or `path` can't be written.
    """
    if not images:
        raise DataError(f"{os.fspath(path)}: no image to show.")
    pictures = [Image.fromarray(decode_image(raw, None, 3)) for raw in images]
    wide, high = max(p.width for p in pictures) + gap, max(p.height for p in pictures) + gap
    columns = min(columns, len(pictures))
    sheet = Image.new("RGB", (columns * wide + gap, -(-len(pictures) // columns) * high + gap), "white")
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (gap + i % columns * wide, gap + i // columns * high))
    file = io.BytesIO()
    sheet.save(file, "PNG")
    store.write_bytes(path, file.getvalue())


def render_inspection(info: dict[str, Any], console: Console) -> None:
    """Prints what `inspect` returned as tables."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(f"Data set {info['name']}"), show_header=False)
    for name in ("samples", "shards", "bytes", "layout"):
        table.add_row(name, f"{info[name]:,}" if isinstance(info[name], int) else info[name])
    for name, spec in info["fields"].items():
        shape = "x".join(map(str, spec["shape"])) if "shape" in spec else ""
        table.add_row(f"field {escape(name)}", f"{spec['kind']} (.{spec['ext']}) {shape}".strip())
    table.add_row("digest", info["digest"][:16])
    console.print(table)
    console.print(_label_table(info["label"]))
    if info["examples"]:
        fields = list(info["fields"])
        table = Table("key", *(escape(f) for f in fields), "label", title="Examples")
        for example in info["examples"]:
            cells = [_cell(example[f]) for f in fields]
            table.add_row(escape(example["key"]), *cells, escape(example["label"]))
        console.print(table)


def _cell(value: Any) -> str:
    from rich.markup import escape

    if isinstance(value, bytes):
        with Image.open(io.BytesIO(value)) as picture:
            return f"image, thumbnail {picture.width}x{picture.height}"
    return escape(value if len(value) <= 120 else value[:117] + "...")


def _label_table(label: dict[str, Any]) -> Any:
    from rich.markup import escape
    from rich.table import Table

    table = Table(title="Labels", show_header=False)
    table.add_row("form", label["form"])
    if label["num_classes"] is not None:
        table.add_row("classes", f"{label['num_classes']:,}")
    if "classes_seen" in label:
        table.add_row("classes with samples", f"{label['classes_seen']:,}")
        table.add_row("samples a class", ", ".join(f"{k} {v:,}" for k, v in label["samples_per_class"].items()))
        tail = ", ".join(f"{v:,} with {k}" for k, v in label["tail"].items() if v)
        table.add_row("classes by samples", tail)
        for name in ("largest", "smallest"):
            table.add_row(name, escape(", ".join(f"{n} ({c:,})" for n, c in label[name])))
    if "labels_per_sample" in label:
        table.add_row("labels a sample", ", ".join(f"{k} {v:,}" for k, v in label["labels_per_sample"].items()))
        table.add_row("samples without label", f"{label['unlabelled']:,}")
    if "values" in label:
        table.add_row("dimensions", str(label["dim"]))
        for name, values in label["values"].items():
            shown = ", ".join(f"{v:g}" for v in values[:8]) + (", ..." if len(values) > 8 else "")
            table.add_row(name, shown)
    return table


# --- checking ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """Something wrong: where, and what."""

    shard: str
    message: str
    key: str | None = None
    offset: int | None = None


@dataclass
class VerifyReport:
    """What `verify` found. `problems` holds the first 1,000 of `num_problems`."""

    shards: int = 0
    samples: int = 0
    num_problems: int = 0
    problems: list[Problem] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.num_problems

    @property
    def first_bad(self) -> str | None:
        """Key of the first sample that is known to be bad."""
        return next((p.key for p in self.problems if p.key is not None), None)

    def lines(self) -> list[str]:
        """The report as text, one line a problem."""
        if self.ok:
            return [f"{self.samples:,} samples in {self.shards:,} shard(s): every one is whole."]
        first = "" if self.first_bad is None else f" First bad sample: {self.first_bad!r}."
        head = f"{self.num_problems:,} problem(s); {self.samples:,} samples in whole shards.{first}"
        more = self.num_problems - len(self.problems)
        return [head, *(p.message for p in self.problems), *([f"... and {more:,} more."] if more else [])]

    def add(self, shard: str, message: str, key: str | None = None, offset: int | None = None) -> None:
        """Counts a problem."""
        self.num_problems += 1
        if len(self.problems) < _MAX_PROBLEMS:
            self.problems.append(Problem(shard, message, key, offset))


def verify(manifest: Manifest, decode: bool = True) -> VerifyReport:
    """Reads every shard once more: size, count, sha256, tar structure, labels, keys, and whether values
    decode.

    A shard whose content changed is searched for samples that no longer decode, so that the first bad one has
    a name where it can be told. Never raises for bad data: everything wrong is in the report.
    """
    report = VerifyReport()
    keys: list[pa.ChunkedArray] = []
    if manifest.classes:
        try:
            manifest.load_classes()
        except DataError as error:
            report.add(manifest.classes, str(error))
    for i in range(len(manifest.shards)):
        path = manifest.shard_path(i)
        table = None
        try:
            table = read_shard(manifest, i)
        except ShardDamage as damage:
            key = damage.key or (_first_undecodable(manifest, i) if store.exists(path) else None)
            report.add(path, str(damage), key, damage.offset)
        except DataError as error:
            report.add(path, str(error))
        report.shards += 1
        if table is None:
            continue
        report.samples += table.num_rows
        keys.append(table.column("key"))
        try:
            check_labels(table, manifest.label, path)
        except DataError as error:
            report.add(path, str(error), error.key if isinstance(error, LabelError) else None)
        if decode:
            for key, reason in _undecodable(manifest, table):
                report.add(path, f"{path}: sample {key!r} can't be decoded: {reason}", key)
    if keys:
        _find_repeats(pa.chunked_array([c for k in keys for c in k.chunks], pa.string()), report)
    return report


def _find_repeats(keys: pa.ChunkedArray, report: VerifyReport) -> None:
    if pc.count_distinct(keys).as_py() == len(keys):
        return
    counts = pc.value_counts(keys)
    for entry in counts.filter(pc.greater(counts.field("counts"), 1)):
        key, times = entry["values"].as_py(), entry["counts"].as_py()
        report.add("", f"sample key {key!r} occurs {times} times", key)


def _undecodable(manifest: Manifest, table: pa.Table) -> list[tuple[str, str]]:
    out: list[tuple[str, str]] = []
    keys = table.column("key").to_pylist()
    for name, spec in manifest.fields.items():
        if spec.kind == "image":
            for start in range(0, table.num_rows, 256):  # small, so that memory stays small
                part = table.column(name).slice(start, 256)
                out += decode_images(part, keys[start : start + 256], size=8, channels=3)[2]
        elif spec.kind == "array":
            out += decode_arrays(table.column(name), spec, keys)[2]
    order = {key: i for i, key in enumerate(keys)}
    return sorted(out, key=lambda item: order[item[0]])


def _first_undecodable(manifest: Manifest, i: int) -> str | None:
    """In a shard whose bytes changed: the first sample that shows it."""
    changed = manifest.shards[i].model_copy(update={"bytes": store.size(manifest.shard_path(i))})
    trusting = manifest.model_copy(update={"shards": (changed,)}).at(manifest.root)
    try:
        table = read_shard(trusting, 0, verify=False)
        bad = _undecodable(manifest, table)
        if bad:
            return bad[0][0]
        check_labels(table, manifest.label, "")
    except (ShardDamage, LabelError) as error:
        return error.key
    return None
