"""A saved head made into another: other files, other dtypes, more, fewer or other classes.

Every verb streams from folder to folder in bounded memory (`memory_mb` and a page), never holds the matrix, and
leaves its source alone; the new folder appears whole or not at all. `load_with_map` does the same into the memory of
a running job's ranks.

Shape legend: C new classes, R classes of a chunk, K old classes that go into it, D embedding size.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from labelmill.errors import DataError
from labelmill.heads.classmap import ClassMap, class_map, first_classes
from labelmill.heads.refill import MASTER, FreshRows, KeepRows, Merge, check_merge, fill_classes, whole_rows
from labelmill.heads.source import RowSource, open_rows
from labelmill.heads.storage import FILE_BYTES, PAGE_BYTES, Fetch, Specs, TensorSpec, part_of, write_index, write_rows

if TYPE_CHECKING:
    from labelmill.heads.sharded import ShardedHead

MEMORY_MB = 256.0


# --- folder to folder ---------------------------------------------------------------------------------------


def convert(
    source: str | Path,
    out: str | Path,
    files: int | None = None,
    file_mb: float | None = None,
    dtype: torch.dtype | None = None,
    state_dtype: torch.dtype | None = None,
    weights_only: bool = False,
) -> RowSource:
    """The same head in other files or dtypes.

    Args:
        files: number of files, of equal numbers of classes; or `file_mb`, their size (256 MiB by default).
        dtype: of the rows. `state_dtype`: of the optimizer's floating tensors. Unchanged by default.
        weights_only: leave the optimizer's state out.

    Raises DataError for a damaged source, and for values that the new dtype can't hold.
    """
    old = open_rows(source)
    kept = [name for name in old.specs if not weights_only or name == "rows"]
    specs = {}
    for name in kept:
        spec, wanted = old.specs[name], dtype if name == "rows" else state_dtype
        changes = wanted is not None and spec.torch_dtype.is_floating_point
        specs[name] = TensorSpec.of(torch.empty(0, *spec.shape, dtype=wanted)) if changes else spec

    def fetch(lo: int, hi: int) -> dict[str, Tensor]:
        read = old.read(lo, hi, kept)
        return {name: cast(value, specs[name].torch_dtype, f"{source}: {name!r}") for name, value in read.items()}

    notes = dict(old.notes)
    if weights_only:
        notes = {key: value for key, value in notes.items() if key != "optimizer"}
    return write_head(out, old.num_classes, specs, notes, fetch, files, file_mb)


def grow(
    source: str | Path,
    out: str | Path,
    num_classes: int,
    rows: str | Path | Tensor | None = None,
    seed: int | None = None,
    memory_mb: float = MEMORY_MB,
) -> RowSource:
    """Appends classes, up to `num_classes`, with fresh optimizer state.

    Args:
        rows: of the new classes (K, D), a tensor or a `.npy` file. By default what a fresh head of the new size draws
            for their ids from `seed`, which is the saved head's own by default.

    Raises DataError for fewer classes than there are, or rows of another shape.
    """
    old = open_rows(source)
    if num_classes < old.num_classes:
        raise DataError(f"{source}: has {old.num_classes} classes; {num_classes} are fewer: use `shrink`.")
    return _rewrite(old, out, first_classes(old.num_classes, num_classes), "refuse", rows, seed, memory_mb)


def shrink(
    source: str | Path,
    out: str | Path,
    drop_K: Tensor | None = None,
    num_classes: int | None = None,
    memory_mb: float = MEMORY_MB,
) -> RowSource:
    """Leaves classes out: those of `drop_K`, or all but the first `num_classes`. The others keep their order.

    Raises DataError for ids out of range and when no class is left.
    """
    old = open_rows(source)
    keep_O = torch.ones(old.num_classes, dtype=torch.bool)
    if (drop_K is None) == (num_classes is None):
        raise DataError("give either the classes to drop or the number of classes to keep.")
    if drop_K is None:
        if not 1 <= (num_classes or 0) <= old.num_classes:
            raise DataError(f"{source}: has {old.num_classes} classes, can't keep the first {num_classes}.")
        keep_O[num_classes:] = False
    else:
        if drop_K.numel() and (int(drop_K.min()) < 0 or int(drop_K.max()) >= old.num_classes):
            bad = drop_K[(drop_K < 0) | (drop_K >= old.num_classes)][0]
            raise DataError(f"class {int(bad)} to drop is out of range: {source} has 0 to {old.num_classes - 1}.")
        keep_O[drop_K] = False
    new_O = torch.where(keep_O, keep_O.cumsum(0) - 1, -1)
    return _rewrite(old, out, class_map(new_O, old.num_classes), "refuse", None, None, memory_mb)


def remap(
    source: str | Path,
    out: str | Path,
    new_of_old_O: Tensor | np.ndarray,
    num_classes: int | None = None,
    merge: Merge = "refuse",
    rows: str | Path | Tensor | None = None,
    seed: int | None = None,
    memory_mb: float = MEMORY_MB,
) -> RowSource:
    """Sends old class i, with its optimizer state, to `new_of_old_O[i]`; -1 drops it.

    Classes that share a new id become one: `first` keeps the lowest old one; `mean` takes the direction of the mean
    of the unit rows, the mean length (for a head that doesn't normalise the plain mean), the mean of floating state
    and the maximum of counts. New ids that nothing is sent to are fresh, as in `grow`. A map that shuffles classes
    far apart reads the source about (size / `memory_mb`) times, one that keeps their order once.

    Raises DataError for a map that doesn't fit and, with `refuse`, for a shared new id.
    """
    old = open_rows(source)
    return _rewrite(old, out, class_map(new_of_old_O, old.num_classes, num_classes), merge, rows, seed, memory_mb)


def _rewrite(
    old: RowSource,
    out: str | Path,
    plan: ClassMap,
    merge: Merge,
    rows: str | Path | Tensor | None,
    seed: int | None,
    memory_mb: float,
) -> RowSource:
    check_merge(plan, merge)
    notes = dict(old.notes) | ({} if seed is None else {"seed": seed})
    fresh = FreshRows(plan, old, notes, rows)

    def fill(lo: int, hi: int) -> dict[str, Tensor]:
        chunk = {name: spec.empty(hi - lo) for name, spec in old.specs.items()}
        fill_classes(chunk, old, plan, lo, hi, merge, fresh)
        return chunk

    row_bytes = sum(spec.row_bytes for spec in old.specs.values())
    # a map that keeps the order reads the source once whatever the chunk; small ones stay in memory that is warm
    ordered = bool((plan.old_K.diff() > 0).all())
    chunk_bytes = min(memory_mb * 2**20, 4 * PAGE_BYTES) if ordered else memory_mb * 2**20
    chunk_rows = max(1, int(chunk_bytes) // max(1, row_bytes))
    return write_head(out, plan.num_classes, old.specs, notes, in_chunks(fill, chunk_rows, plan.num_classes))


def write_head(
    out: str | Path,
    num_classes: int,
    specs: Specs,
    notes: Mapping[str, Any],
    fetch: Fetch,
    files: int | None = None,
    file_mb: float | None = None,
) -> RowSource:
    """Writes a head folder from what `fetch` gives, page by page, and opens it.

    Raises DataError when `out` is there already, or files and their size are both given or make no sense.
    """
    if files is not None and file_mb is not None:
        raise DataError("give the number of files or their size, not both.")
    if (files is not None and not 1 <= files <= num_classes) or (file_mb is not None and file_mb <= 0):
        raise DataError(f"{num_classes} classes can't be cut into {files or file_mb} files of at least one class.")
    cuts = None if files is None else [num_classes * i // files for i in range(1, files)]
    size = FILE_BYTES if file_mb is None else int(file_mb * 2**20)
    with new_folder(out) as folder:
        written = write_rows(folder, "head", specs, 0, num_classes, fetch, size, cuts)
        write_index(folder, num_classes, [part_of(specs, 0, num_classes, written, notes)])
    return open_rows(out)


@contextmanager
def new_folder(out: str | Path) -> Iterator[Path]:
    """A folder to fill that gets the name `out` when all went well. Raises DataError when that is there already."""
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(f"{out}: is there already; name a new folder.")
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f".{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    try:
        yield part
        if out.is_dir():
            out.rmdir()
        part.rename(out)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def in_chunks(fill: Callable[[int, int], Mapping[str, Tensor]], chunk_rows: int, num_classes: int) -> Fetch:
    """Serves pages from chunks: `fill` is asked for `chunk_rows` classes at a time, in ascending order."""
    held: Mapping[str, Tensor] = {}
    first = last = 0

    def fetch(lo: int, hi: int) -> Mapping[str, Tensor]:
        nonlocal held, first, last
        if not first <= lo or hi > last:
            held = {}  # free it before the next is made
            first, last = lo, max(hi, min(lo + chunk_rows, num_classes))
            held = fill(first, last)
        return {name: value[lo - first : hi - first] for name, value in held.items()}

    return fetch


def cast(value: Tensor, dtype: torch.dtype, what: str) -> Tensor:
    """`value` in another dtype. Raises DataError when a finite number becomes infinite."""
    if value.dtype == dtype:
        return value
    new = value.to(dtype)
    if torch.finfo(dtype).max < torch.finfo(value.dtype).max:
        lost = torch.isfinite(value) & ~torch.isfinite(new)
        if bool(lost.any()):
            raise DataError(f"{what} holds {float(value[lost][0]):g}, which {dtype} can't hold.")
    return new


# --- into a running job -------------------------------------------------------------------------------------


def load_with_map(
    head: ShardedHead,
    folder: str | Path,
    new_of_old_O: Tensor | np.ndarray | None = None,
    merge: Merge = "refuse",
    optimizer: Literal["keep", "fresh"] = "keep",
) -> ClassMap:
    """Loads own classes of a head from a saved one with other classes; no collective, on every rank alike.

    Classes that nothing is mapped to keep the rows that the head has (a fresh head: those it drew). Memory: a page,
    and 16 bytes a saved class.

    Args:
        new_of_old_O: as in `remap`; by default ids stay, and classes are appended or cut off at the end.
        optimizer: `keep` takes the rows' optimizer state and the step count along; `fresh` takes the rows alone,
            which is also what happens when the folder holds nothing else.

    Raises DataError as `remap`, and for another embedding size or row optimizer.
    """
    source = open_rows(folder)
    names = loaded_tensors(source, head, optimizer)
    plan = (
        first_classes(source.num_classes, head.num_classes)
        if new_of_old_O is None
        else class_map(new_of_old_O, source.num_classes, head.num_classes)
    )
    check_merge(plan, merge)
    tensors = head.state_tensors()
    alike = names == set(tensors) and source.sub_centres == head.config.sub_centres and "steps" in source.notes
    if optimizer == "keep" and alike:
        head.rows.protect(slice(0, len(head.rows)))
        fill_classes(tensors, source, plan, head.start, head.stop, merge, KeepRows())
        head.take_notes(source.notes)
        return plan
    step = max(1, PAGE_BYTES * 4 // (4 * head.dim * source.sub_centres))
    for lo in range(head.start, head.stop, step):
        hi = min(lo + step, head.stop)
        chunk = {name: source.specs[name].empty(hi - lo) for name in names}
        fill_classes(chunk, source, plan, lo, hi, merge, KeepRows())
        places = plan.part(lo, hi)[1].unique_consecutive()
        head.set_rows(places + lo, whole_rows({name: value[places] for name, value in chunk.items()}))
    return plan


def loaded_tensors(source: RowSource, head: ShardedHead, optimizer: Literal["keep", "fresh"]) -> set[str]:
    """The tensors that `load_with_map` takes from a saved head: the rows, and their optimizer's state if it is kept.

    Raises DataError for another embedding size or row optimizer, and for types that would lose digits.
    """
    if source.dim != head.dim or source.sub_centres not in (1, head.config.sub_centres):
        raise DataError(
            f"{source.folder}: rows have {source.sub_centres} x {source.dim} numbers a class, the head's "
            f"{head.config.sub_centres} x {head.dim}."
        )
    if optimizer == "fresh" or set(source.specs) == {"rows"}:
        return {name for name in source.specs if name == "rows" or name.endswith(MASTER)}
    tensors = head.state_tensors()
    if set(source.specs) != set(tensors):
        raise DataError(
            f"{source.folder}: holds {sorted(source.specs)}, the head needs {sorted(tensors)}: another row optimizer "
            "wrote it. Load the rows alone (optimizer fresh)."
        )
    source.check_targets(tensors)
    return set(tensors)
