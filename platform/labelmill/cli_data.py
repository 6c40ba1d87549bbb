"""`labelmill data ...`: import, copy, inspect, verify, index and time data sets."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.console import Console

from labelmill.errors import UserError

data_app = typer.Typer(help="Data sets: import, copy, inspect, verify, index, time.", no_args_is_help=True)
import_app = typer.Typer(help="Make a data set of shards with a manifest.", no_args_is_help=True)
data_app.add_typer(import_app, name="import")

console = Console()

Out = Annotated[
    str, typer.Option("--out", "--to", help="folder or s3:// address of the data set (with --split: of its parts)")
]
Name = Annotated[str | None, typer.Option(help="name of the data set")]
Split = Annotated[str | None, typer.Option(help="parts by a hash of the key, e.g. train=0.9,test=0.1")]
ClassNames = Annotated[list[str] | None, typer.Option("--class", help="class names in id order; repeat")]
NumClasses = Annotated[int | None, typer.Option(help="classes; by default what the labels need")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="replace a data set that is there")]
ShardMb = Annotated[float | None, typer.Option(help="size of a shard, MiB")]
Layout = Annotated[str | None, typer.Option(help="tar (a member per sample) or packed (small samples)")]
LabelForm = Annotated[str | None, typer.Option(help="single, multi, soft, partial, complementary, continuous or none")]


def _options(
    name: str | None, split: str | None, layout: str | None, shard_mb: float | None, overwrite: bool
) -> dict[str, Any]:
    options: dict[str, Any] = {"overwrite": overwrite}
    if name:
        options["name"] = name
    if layout:
        if layout not in ("tar", "packed"):
            raise UserError(f"--layout {layout}: write tar or packed.")
        options["layout"] = layout
    if shard_mb is not None:
        if shard_mb * 2**20 < 1:
            raise UserError(f"--shard-mb {shard_mb:g}: a shard needs a size above 0, in MiB.")
        options["target_bytes"] = int(shard_mb * 2**20)
    if split:
        try:
            pairs = (part.split("=") for part in split.split(","))
            options["split"] = {part.strip(): float(share) for part, share in pairs}
        except ValueError:
            raise UserError(f"--split {split}: write it as train=0.9,test=0.1") from None
    return options


def _show(made: dict[str, Any]) -> None:
    for part, manifest in made.items():
        label = manifest.label.form
        if manifest.label.num_classes:
            label += f" of {manifest.label.num_classes:,} classes"
        size = manifest.num_bytes / 2**20
        prefix = "" if part == "all" else f"{part}: "
        console.print(
            f"{prefix}{manifest.num_samples:,} samples, {len(manifest.shards)} shard(s), {size:.1f} MiB, "
            f"labels: {label} -> {manifest.root}",
            highlight=False,
            soft_wrap=True,
        )


@import_app.command("image-folder")
def image_folder(
    root: Annotated[str, typer.Argument(help="a folder with a subfolder for each class")],
    out: Out,
    name: Name = None,
    split: Split = None,
    unlabelled: Annotated[bool, typer.Option("--unlabelled", help="take all images, without labels")] = False,
    class_names: ClassNames = None,
    layout: Layout = None,
    shard_mb: ShardMb = None,
    overwrite: Overwrite = False,
) -> None:
    """Images in a subfolder per class."""
    from labelmill.data.importers import import_image_folder

    options = _options(name, split, layout, shard_mb, overwrite)
    _show(import_image_folder(root, out, class_names=class_names, labelled=not unlabelled, **options))


@import_app.command()
def idx(
    images: Annotated[str, typer.Option(help="IDX file of images, plain or .gz")],
    out: Out,
    labels: Annotated[str | None, typer.Option(help="IDX file of labels")] = None,
    name: Name = None,
    split: Split = None,
    num_classes: NumClasses = None,
    class_names: ClassNames = None,
    layout: Layout = None,
    shard_mb: ShardMb = None,
    overwrite: Overwrite = False,
) -> None:
    """A pair of IDX files (the format of MNIST)."""
    from labelmill.data.importers import import_idx

    options = _options(name, split, layout, shard_mb, overwrite)
    _show(import_idx(images, labels, out, num_classes=num_classes, class_names=class_names, **options))


@import_app.command()
def extreme(
    texts: Annotated[str, typer.Argument(help="a line a sample, plain or .gz")],
    labels: Annotated[str, typer.Option(help="sparse file: trn_X_Y.txt, or train.txt with features")],
    label_texts: Annotated[str, typer.Option(help="a line a label, plain or .gz")],
    out: Out,
    name: Name = None,
    soft: Annotated[bool, typer.Option("--soft", help="keep the values as weights of the labels")] = False,
    shard_mb: ShardMb = None,
    overwrite: Overwrite = False,
) -> None:
    """A part of a data set of the extreme classification repository."""
    from labelmill.data.extreme import import_extreme

    options = _options(name, None, None, shard_mb, overwrite)
    manifest, dropped, missing = import_extreme(texts, labels, label_texts, out, soft=soft, **options)
    _show({"all": manifest})
    for count, what in ((dropped, "samples without a label were left out"), (missing, "labels have no text")):
        if count:
            console.print(f"{count:,} {what}", highlight=False)


@import_app.command()
def table(
    path: Annotated[str, typer.Argument(help=".csv, .tsv (also .gz) or .parquet")],
    out: Out,
    text: Annotated[str | None, typer.Option(help="text column")] = None,
    image: Annotated[str | None, typer.Option(help="image column: relative paths, or bytes (Parquet)")] = None,
    label: Annotated[list[str] | None, typer.Option(help="label column(s)")] = None,
    label_form: LabelForm = None,
    weight: Annotated[str | None, typer.Option(help="column of label weights (soft)")] = None,
    negative: Annotated[str | None, typer.Option(help="column of known negatives (partial)")] = None,
    separator: Annotated[str, typer.Option(help="between several labels in a CSV cell")] = ";",
    key: Annotated[str | None, typer.Option(help="column of sample keys")] = None,
    name: Name = None,
    split: Split = None,
    num_classes: NumClasses = None,
    class_names: ClassNames = None,
    layout: Layout = None,
    shard_mb: ShardMb = None,
    overwrite: Overwrite = False,
) -> None:
    """A CSV or Parquet table with a text or image column."""
    from labelmill.data.importers import import_table

    columns = None if not label else label[0] if len(label) == 1 else label
    made = import_table(
        path,
        out,
        text_column=text,
        image_column=image,
        label_column=columns,
        label_form=cast(Any, label_form),
        weight_column=weight,
        negative_column=negative,
        separator=separator,
        key_column=key,
        num_classes=num_classes,
        class_names=class_names,
        **_options(name, split, layout, shard_mb, overwrite),
    )
    _show(made)


@import_app.command()
def webdataset(
    tars: Annotated[list[str], typer.Argument(help="a folder, a glob, a brace range or tars")],
    out: Out,
    name: Name = None,
    label_form: LabelForm = None,
    label_field: Annotated[str | None, typer.Option(help="field of the json members that holds the label")] = None,
    num_classes: NumClasses = None,
    class_names: ClassNames = None,
    overwrite: Overwrite = False,
) -> None:
    """Existing WebDataset tars, indexed in place."""
    from labelmill.data.webdataset import import_webdataset

    made = import_webdataset(
        tars[0] if len(tars) == 1 else tars,
        out,
        name=name,
        label_form=cast(Any, label_form),
        label_field=label_field,
        num_classes=num_classes,
        class_names=class_names,
        overwrite=overwrite,
    )
    _show(made)


@data_app.command()
def inspect(
    data: Annotated[str, typer.Argument(help="folder of a data set")],
    samples: Annotated[int, typer.Option(help="samples shown")] = 8,
    sheet: Annotated[Path | None, typer.Option(help="write the samples' images to this PNG")] = None,
) -> None:
    """Label statistics and sample thumbnails or texts."""
    from labelmill.data.inspect import contact_sheet, inspect, render_inspection
    from labelmill.data.manifest import load_manifest

    info = inspect(load_manifest(data), samples=samples)
    render_inspection(info, console)
    if sheet:
        contact_sheet(info.images, sheet)
        console.print(f"images: {sheet}", highlight=False)


@data_app.command()
def verify(data: Annotated[str, typer.Argument(help="folder of a data set")]) -> None:
    """Re-hash every shard, decode every sample, check every label; names the first bad sample."""
    from labelmill.data.inspect import verify
    from labelmill.data.manifest import load_manifest

    report = verify(load_manifest(data))
    for line in report.lines():
        console.print(line, highlight=False, soft_wrap=True)
    if not report.ok:
        raise typer.Exit(2)


@data_app.command()
def index(data: Annotated[str, typer.Argument(help="folder of a data set")]) -> None:
    """Write the index that each shard lacks: where its samples lie, and a checksum of each."""
    from labelmill.data.index import add_indexes
    from labelmill.data.manifest import load_manifest

    manifest = load_manifest(data)
    lacking = sum(shard.index is None for shard in manifest.shards)
    made = add_indexes(manifest)
    text = f"{len(made.shards):,} shard(s) have an index; {lacking:,} had none -> {made.root}"
    console.print(text, highlight=False, soft_wrap=True)


@data_app.command()
def copy(
    source: Annotated[str, typer.Argument(help="folder or s3:// address of a data set, or of its parts")],
    out: Annotated[str, typer.Argument(help="folder or s3:// address of the copy")],
    overwrite: Overwrite = False,
    jobs: Annotated[int, typer.Option(min=1, help="files copied side by side")] = 4,
) -> None:
    """Copy a data set anywhere, verified; the same command continues an interrupted copy."""
    from labelmill.data import store
    from labelmill.data.copy import copy_data, parts_of
    from labelmill.progress import ProgressView

    parts = parts_of(source)
    pairs = [(store.join(source, part), store.join(out, part)) for part in parts] or [(source, out)]
    for (one, other), part in zip(pairs, parts or ["all"], strict=True):
        with ProgressView(console) as view, view.stage("copy" if part == "all" else f"copy {part}"):
            report = copy_data(one, other, overwrite=overwrite, jobs=jobs, progress=view.update)
        _show({part: report.manifest})
        removed = f", {report.removed} old one(s) removed" if report.removed else ""
        console.print(
            f"{report.copied} file(s) copied ({report.bytes / 2**20:.1f} MiB), {report.kept} there already{removed}",
            highlight=False,
        )


@data_app.command()
def bench(
    data: Annotated[str, typer.Argument(metavar="URI", help="folder or URI of a data set")],
    samples: Annotated[int, typer.Option(min=1, help="about how many samples are read")] = 4_000,
    threads: Annotated[int | None, typer.Option(min=1, help="CPUs a stream may use; by default all")] = None,
    field: Annotated[str | None, typer.Option(help="field to decode; by default the first")] = None,
    image_size: Annotated[int | None, typer.Option(min=1, help="side that the job resizes images to")] = None,
    channels: Annotated[int, typer.Option(min=1, max=4, help="that the job wants: 1 grey, 3 RGB, 4 RGBA")] = 3,
    ray: Annotated[bool, typer.Option("--ray/--no-ray", help="measure the hand-over between processes as well")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="numbers and advice as JSON")] = False,
) -> None:
    """What reading costs on this machine, part by part, against the decoder's limit; and advice."""
    from labelmill.data.bench import bench, render_bench
    from labelmill.data.manifest import load_manifest

    manifest = load_manifest(data)
    if ray:
        from labelmill.cluster import connect
        from labelmill.job import ClusterConfig

        session: Any = connect(ClusterConfig(cpus_per_worker=0.1, read_cpus=0.1, object_store_mb=300))
    else:
        session = nullcontext()
    with session:
        found = bench(manifest, field, samples, threads, image_size, channels, handover=ray)
    if as_json:
        typer.echo(json.dumps(found.as_dict(), indent=1))
    else:
        render_bench(found, console)
