"""`labelmill head ...`: saved heads made into others, exported, imported and indexed."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from labelmill.errors import DataError, UserError

if TYPE_CHECKING:
    from labelmill.heads.source import RowSource

head_app = typer.Typer(
    help="Saved heads (`head-<name>` of a checkpoint): convert, grow, shrink, remap, export, index.",
    no_args_is_help=True,
)
index_app = typer.Typer(help="An approximate index over class rows.", no_args_is_help=True)
head_app.add_typer(index_app, name="index")

console = Console()


class Dtype(StrEnum):
    """Number formats of rows."""

    float64 = "float64"
    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


class MergeRule(StrEnum):
    """What becomes of classes that share a new id."""

    refuse = "refuse"
    first = "first"
    mean = "mean"


class IndexKind(StrEnum):
    """Libraries of indexes."""

    faiss = "faiss"
    usearch = "usearch"


Source = Annotated[Path, typer.Argument(help="folder of a saved head")]
Out = Annotated[Path, typer.Argument(help="the new folder")]
RowsOption = Annotated[Path | None, typer.Option("--rows", help=".npy matrix: rows of the new classes, in id order")]
SeedOption = Annotated[int | None, typer.Option(help="draws rows of new classes; default: the head's own seed")]
MemoryOption = Annotated[float, typer.Option("--memory-mb", help="memory for rows, MiB")]
DtypeOption = Annotated[Dtype | None, typer.Option("--dtype", help="of the rows")]
FileMb = Annotated[float | None, typer.Option("--file-mb", help="size of a file, MiB; 256 by default")]


def _torch(dtype: Dtype | None) -> Any:
    import torch

    return None if dtype is None else getattr(torch, dtype.value)


def _show(source: RowSource) -> None:
    size = sum(entry.bytes for entry in source.files) / 2**20
    console.print(
        f"{source.num_classes:,} classes, {len(source.files)} file(s), {size:,.1f} MiB -> {source.folder}",
        highlight=False,
        soft_wrap=True,
    )


@head_app.command()
def show(
    source: Source, verify: Annotated[bool, typer.Option("--verify", help="read and check every file")] = False
) -> None:
    """Classes, tensors, files and notes of a saved head."""
    from labelmill.heads.source import open_rows

    head = open_rows(source)
    _show(head)
    table = Table("tensor", "dtype", "of a class", box=None, header_style="bold", pad_edge=False)
    for name, spec in head.specs.items():
        table.add_row(name, str(spec.torch_dtype).removeprefix("torch."), str(list(spec.shape)))
    console.print(table)
    console.print(", ".join(f"{key} {value}" for key, value in head.notes.items()), highlight=False)
    if verify:
        head.verify()
        checked = all(entry.crc32 for entry in head.files)
        console.print("every file is whole" if checked else "every file is there; they carry no checksums")


@head_app.command()
def convert(
    source: Source,
    out: Out,
    files: Annotated[int | None, typer.Option(help="number of files, of equal numbers of classes")] = None,
    file_mb: FileMb = None,
    dtype: DtypeOption = None,
    state_dtype: Annotated[Dtype | None, typer.Option(help="of the optimizer's floating state")] = None,
    weights_only: Annotated[bool, typer.Option("--weights-only", help="leave the optimizer's state out")] = False,
) -> None:
    """The same head in other files or another dtype."""
    from labelmill.heads import reshard

    _show(reshard.convert(source, out, files, file_mb, _torch(dtype), _torch(state_dtype), weights_only))


@head_app.command()
def merge(source: Source, out: Out, dtype: DtypeOption = None) -> None:
    """The same head in one file."""
    from labelmill.heads import reshard

    _show(reshard.convert(source, out, files=1, dtype=_torch(dtype)))


@head_app.command()
def grow(
    source: Source,
    out: Out,
    classes: Annotated[int, typer.Option(help="number of classes of the new head")],
    rows: RowsOption = None,
    seed: SeedOption = None,
    memory_mb: MemoryOption = 256.0,
) -> None:
    """Append classes, with fresh rows and optimizer state."""
    from labelmill.heads import reshard

    _show(reshard.grow(source, out, classes, rows, seed, memory_mb))


@head_app.command()
def shrink(
    source: Source,
    out: Out,
    drop: Annotated[Path | None, typer.Option(help="ids to leave out: .npy, or a text file with one a line")] = None,
    classes: Annotated[int | None, typer.Option(help="keep the first so many instead")] = None,
    memory_mb: MemoryOption = 256.0,
) -> None:
    """Leave classes out; the others keep their order and state."""
    from labelmill.heads import classmap, reshard

    _show(reshard.shrink(source, out, classmap.read_ids(drop) if drop else None, classes, memory_mb))


@head_app.command()
def remap(
    source: Source,
    out: Out,
    map_file: Annotated[
        Path | None, typer.Option("--map", help=".npy with the new id of each old class (-1 drops), or CSV old,new")
    ] = None,
    old_names: Annotated[
        Path | None, typer.Option(help="instead: class names of the head (classes.arrow, .txt)")
    ] = None,
    new_names: Annotated[Path | None, typer.Option(help="class names of the new head, in id order")] = None,
    classes: Annotated[int | None, typer.Option(help="number of new classes; default: what the map needs")] = None,
    merge: Annotated[MergeRule, typer.Option(help="classes that share a new id")] = MergeRule.refuse,
    rows: RowsOption = None,
    seed: SeedOption = None,
    memory_mb: MemoryOption = 256.0,
) -> None:
    """Give classes other ids: drop, reorder, merge, add; by a map, or by the names of the classes."""
    from labelmill.heads import classmap, reshard
    from labelmill.heads.source import open_rows

    if (map_file is None) == (old_names is None) or (old_names is None) != (new_names is None):
        raise UserError("give --map, or both --old-names and --new-names.")
    count = open_rows(source).num_classes
    if map_file is not None:
        new_of_old = classmap.read_map(map_file, count)
    else:
        assert old_names is not None
        assert new_names is not None
        names = classmap.read_names(new_names)
        new_of_old = classmap.map_by_name(classmap.read_names(old_names), names)
        classes = classes or len(names)
    _show(reshard.remap(source, out, new_of_old, classes, merge.value, rows, seed, memory_mb))


@head_app.command()
def export(
    source: Source,
    out: Annotated[Path, typer.Argument(help="the new file, .npy or .safetensors")],
    dtype: Annotated[Dtype, typer.Option(help="of the matrix")] = Dtype.float32,
    raw: Annotated[bool, typer.Option("--raw", help="rows as they are, not of length 1")] = False,
    names: Annotated[Path | None, typer.Option(help="class names to put beside (classes.arrow, .txt)")] = None,
) -> None:
    """All rows as one plain matrix."""
    from labelmill.heads.export import export

    made = export(source, out, _torch(dtype), False if raw else None, names)
    console.print(f"{made.stat().st_size / 2**20:,.1f} MiB -> {made}", highlight=False, soft_wrap=True)


@head_app.command("import-insightface")
def import_insightface(
    files: Annotated[list[Path], typer.Argument(help="a run's folder, or its ranks' files, in any order")],
    out: Annotated[Path, typer.Option(help="the new folder")],
    classes: Annotated[int | None, typer.Option(help="number of classes, to check against")] = None,
    file_mb: FileMb = None,
) -> None:
    """Class rows of an InsightFace PartialFC run: the weights of all ranks, nothing else."""
    from labelmill.heads.insightface import import_insightface

    single = files[0] if len(files) == 1 and files[0].is_dir() else files
    _show(import_insightface(single, out, classes, file_mb))


@index_app.command("build")
def index_build(
    folder: Annotated[Path, typer.Argument(help="a packaged model or a saved head")],
    kind: Annotated[IndexKind, typer.Option(help="library")] = IndexKind.faiss,
    factory: Annotated[
        str | None, typer.Option(help="faiss: an index_factory string; usearch: f32, f16, bf16 or i8")
    ] = None,
    probes: Annotated[int | None, typer.Option(help="lists or candidates looked at for a query")] = None,
) -> None:
    """Build an index over all rows and put it beside them."""
    from labelmill.heads.index import MODEL, build_index

    info = build_index(folder, kind.value, factory, probes)
    if (folder / MODEL).is_file():
        from labelmill.tracking.model import note_index

        note_index(folder)
    console.print(
        f"{info.kind} {info.factory}: {info.num_classes:,} classes, {info.bytes / 2**20:,.1f} MiB in "
        f"{info.seconds:.1f} s -> {Path(folder) / info.file}",
        highlight=False,
        soft_wrap=True,
    )


@index_app.command("recall")
def index_recall(
    folder: Annotated[Path, typer.Argument(help="a folder with an index")],
    queries: Annotated[Path | None, typer.Option(help=".npy matrix of embeddings")] = None,
    texts: Annotated[Path | None, typer.Option(help="a packaged model: a text file, an input a line")] = None,
    k: Annotated[int, typer.Option("-k", help="best classes to find")] = 10,
) -> None:
    """Compare the index with the exact search on given queries; notes the recall beside the index."""
    from labelmill.heads.index import measure_recall

    if (queries is None) == (texts is None):
        raise UserError("give --queries or --texts.")
    found = measure_recall(folder, _queries(queries) if queries else _embedded(folder, texts), k)
    for name, value in found.items():
        console.print(f"{name:12} {value:.4f}", highlight=False)


def _queries(path: Path) -> Any:
    import numpy as np
    import torch

    try:
        matrix = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not a readable .npy matrix: {error}") from error
    if matrix.ndim != 2 or matrix.dtype.kind != "f":
        raise DataError(f"{path}: needs a matrix of floating numbers, is {matrix.dtype} {matrix.shape}.")
    return torch.from_numpy(matrix).float()


def _embedded(folder: Path, texts: Path | None) -> Any:
    from labelmill.tracking.model import load_model

    assert texts is not None
    if not texts.is_file():
        raise UserError(f"--texts {texts}: no such file.")
    return load_model(folder).queries([line for line in texts.read_text(encoding="utf-8").splitlines() if line.strip()])
