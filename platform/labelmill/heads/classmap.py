"""What becomes of the classes of a saved head: an old id -> a new id, or nothing.

Shape legend: O old classes, C new classes, K old classes that go to a range of new ones.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from labelmill.errors import DataError


@dataclass(frozen=True)
class ClassMap:
    """Old classes in the order of their new ids, 16 bytes a class. Make it with `class_map`.

    Attributes:
        num_old, num_classes: O and C.
        old_K: old classes that are kept, by new id, then by old id.
        new_K: their new ids, ascending; repeated where classes are merged.
    """

    num_old: int
    num_classes: int
    old_K: Tensor
    new_K: Tensor

    @property
    def dropped(self) -> int:
        """Old classes that go nowhere."""
        return self.num_old - len(self.old_K)

    @property
    def fresh(self) -> int:
        """New classes that come from nowhere."""
        return self.num_classes - len(torch.unique_consecutive(self.new_K))

    @property
    def merged(self) -> int:
        """Old classes that share their new class with a lower one."""
        return len(self.new_K) - len(torch.unique_consecutive(self.new_K))

    def part(self, lo: int, hi: int) -> tuple[Tensor, Tensor]:
        """(old ids (K,), their places (K,) from 0) of the new classes [lo, hi), ordered by place, then old id."""
        first, last = torch.searchsorted(self.new_K, torch.tensor([lo, hi])).tolist()
        return self.old_K[first:last], self.new_K[first:last] - lo


def class_map(new_of_old_O: Tensor | np.ndarray, num_old: int, num_classes: int | None = None) -> ClassMap:
    """The map that sends old class i to `new_of_old_O[i]` (int; -1 drops it).

    `num_classes` is C; by default what the map needs. Raises DataError for a map of another length or type, ids out
    of range, and when no class is left.
    """
    new_O = torch.as_tensor(np.asarray(new_of_old_O))
    if new_O.ndim != 1 or new_O.dtype.is_floating_point or new_O.dtype == torch.bool:
        raise DataError(f"a class map is a vector of integers, not {new_O.dtype} of shape {tuple(new_O.shape)}.")
    if len(new_O) != num_old:
        raise DataError(f"the class map has {len(new_O)} entries, the saved head {num_old} classes.")
    new_O = new_O.long()
    count = (int(new_O.max()) + 1 if num_old else 0) if num_classes is None else num_classes
    if count < 1:
        raise DataError("the class map leaves no class.")
    bad = ((new_O < -1) | (new_O >= count)).nonzero()[:, 0]
    if len(bad):
        raise DataError(
            f"the class map sends class {int(bad[0])} to {int(new_O[bad[0]])}: new ids run from 0 to {count - 1}, "
            f"-1 drops a class ({len(bad)} such entries)."
        )
    order = torch.argsort(new_O, stable=True)
    order = order[int((new_O < 0).sum()) :]
    return ClassMap(num_old, count, order, new_O[order])


def first_classes(num_old: int, num_classes: int) -> ClassMap:
    """Ids stay; classes are appended or cut off at the end."""
    ids = torch.arange(num_old)
    return class_map(torch.where(ids < num_classes, ids, -1), num_old, num_classes)


def map_by_name(old: pa.Array | pa.ChunkedArray, new: pa.Array | pa.ChunkedArray) -> Tensor:
    """new_of_old (O,) by class names in id order; old names that are gone get -1.

    Raises DataError when a name stands twice.
    """
    old, new = (values.cast(pa.large_string()) for values in (old, new))
    for kind, values in (("old", old), ("new", new)):
        counts = pc.value_counts(values)
        twice = counts.filter(pc.greater(counts.field("counts"), 1))
        if len(twice):
            raise DataError(f"the {kind} class names hold {twice[0]['values'].as_py()!r} more than once.")
    found = pc.fill_null(pc.index_in(old, value_set=new if isinstance(new, pa.Array) else new.combine_chunks()), -1)
    return torch.from_numpy(np.array(found.to_numpy(zero_copy_only=False), dtype=np.int64))


def read_names(path: str | Path) -> pa.ChunkedArray:
    """Class names in id order: column `name` of an Arrow file, or the lines of a text file."""
    path = Path(path)
    try:
        if path.suffix == ".arrow":
            with pa.memory_map(str(path)) as file:
                return pa.ipc.open_file(file).read_all()["name"]
        return pa.chunked_array([path.read_text(encoding="utf-8").splitlines()], pa.string())
    except (OSError, KeyError, ValueError) as error:  # pyarrow's errors are ValueErrors
        raise DataError(f"{path}: not readable class names: {error}") from error


def read_map(path: str | Path, num_old: int) -> Tensor:
    """new_of_old (O,) from `.npy` (integers, one an old class), or from CSV with the columns `old` and `new`.

    In CSV an empty `new` drops the class, and so does leaving it out. Raises DataError, naming the line.
    """
    path = Path(path)
    if path.suffix == ".npy":
        try:
            return torch.from_numpy(np.load(path, allow_pickle=False))
        except (OSError, ValueError, TypeError) as error:
            raise DataError(f"{path}: not a readable class map: {error}") from error
    new_O = torch.full((num_old,), -1, dtype=torch.int64)
    seen_O = torch.zeros(num_old, dtype=torch.bool)
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = csv.DictReader(file)
            if not {"old", "new"} <= set(rows.fieldnames or ()):
                raise DataError(f"{path}: needs the columns old and new, has {rows.fieldnames}.")
            for line, row in enumerate(rows, start=2):
                old, new = int(row["old"]), int(row["new"] or -1)
                if not 0 <= old < num_old or seen_O[old]:
                    why = "stands twice" if 0 <= old < num_old else f"is out of range (0 to {num_old - 1})"
                    raise DataError(f"{path}: line {line}: old class {old} {why}.")
                new_O[old], seen_O[old] = new, True
    except OSError as error:
        raise DataError(f"{path}: not readable: {error}") from error
    except ValueError as error:
        raise DataError(f"{path}: line {line}: {error}") from error
    return new_O


def read_ids(path: str | Path) -> Tensor:
    """Class ids (K,): `.npy`, or a text file with one a line."""
    path = Path(path)
    try:
        if path.suffix == ".npy":
            return torch.from_numpy(np.load(path, allow_pickle=False)).long()
        return torch.tensor([int(line) for line in path.read_text().split()], dtype=torch.int64)
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{path}: not readable class ids: {error}") from error
