"""Class rows of an InsightFace run (`recognition/arcface_torch`, PartialFC and PartialFC_V2): the weights alone.

There, rank r of W owns C // W + (r < C % W) contiguous classes, and saves them in a file of its own:

    checkpoint_gpu_<r>.pt         PartialFC_V2: `state_dict_softmax_fc` -> `weight`, beside backbone and optimizer
    softmax_fc_gpu_<r>.pt         PartialFC: `weight`
    rank_<r>_softmax_weight.pt    PartialFC, first version: a tensor

The files are torch's own format, read with `weights_only`: nothing in them is executed. Backbone, optimizer and
schedule are left where they are.

Shape legend: C classes, D embedding size.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from labelmill.errors import DataError
from labelmill.heads.reshard import write_head
from labelmill.heads.source import RowSource
from labelmill.heads.storage import TensorSpec

_RANK = re.compile(r"(?:gpu|rank)_?(\d+)")
_KINDS = ("checkpoint_gpu_*.pt", "softmax_fc_gpu_*.pt", "rank_*_softmax_weight.pt")


def import_insightface(
    files: str | Path | Sequence[str | Path],
    out: str | Path,
    num_classes: int | None = None,
    file_mb: float | None = None,
) -> RowSource:
    """Makes a head folder of the ranks' files; its rows are what the ranks held, whole, in the order of classes.

    The folder holds no optimizer state: a job takes it up with `load_with_map`.

    Args:
        files: a folder that holds one kind of the files above, or the files in any order; their names tell the ranks.
        num_classes: C, to check against; by default the sum over the files.

    Raises DataError for a missing or doubled rank, a file without the weight or with anything but tensors in it, other
    widths or dtypes, and shares that aren't InsightFace's for C and W (a file of another run).
    """
    paths = _by_rank(files)
    shapes: list[tuple[int, int]] = []
    dtypes: set[torch.dtype] = set()
    for path in paths:
        weight_CD = read_weight(path)
        shapes.append((weight_CD.shape[0], weight_CD.shape[1]))
        dtypes.add(weight_CD.dtype)
    total, dim, world = sum(rows for rows, _ in shapes), shapes[0][1], len(paths)
    if len({width for _, width in shapes}) > 1 or len(dtypes) > 1:
        each = ", ".join(f"{path.name} {shape}" for path, shape in zip(paths, shapes, strict=True))
        raise DataError(f"{paths[0].parent}: the ranks' weights differ in width or dtype: {each}; {dtypes}.")
    if num_classes is not None and total != num_classes:
        raise DataError(f"{paths[0].parent}: the {world} files hold {total} classes, not {num_classes}.")
    if total < 1:
        raise DataError(f"{paths[0].parent}: the {world} files hold no class.")
    for rank, (path, (rows, _)) in enumerate(zip(paths, shapes, strict=True)):
        if rows != share(total, rank, world):
            raise DataError(
                f"{path}: holds {rows} classes; rank {rank} of {world} owns {share(total, rank, world)} of {total}. "
                "It belongs to a run with other classes or another number of GPUs, or a rank is missing."
            )
    reader = _Reader(paths, total)
    spec = TensorSpec.of(torch.empty(0, dim, dtype=dtypes.pop()))
    notes = {"dim": dim, "steps": 0, "normalize": True, "origin": "insightface"}
    return write_head(out, total, {"rows": spec}, notes, reader.fetch, file_mb=file_mb)


def share(num_classes: int, rank: int, world: int) -> int:
    """Classes that a rank owns there: the remainder goes to the first ranks, one each."""
    return num_classes // world + int(rank < num_classes % world)


def first_class(num_classes: int, rank: int, world: int) -> int:
    """The first class that a rank owns there."""
    return num_classes // world * rank + min(rank, num_classes % world)


def read_weight(path: Path) -> Tensor:
    """The weight (C, D) in a rank's file; mapped, not read, where the format allows it."""
    try:
        try:
            content: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # the format before torch 1.6 can't be mapped
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file.") from None
    except pickle.UnpicklingError as error:
        raise DataError(f"{path}: holds more than tensors and plain values, and isn't opened: {error}") from error
    except (OSError, RuntimeError, ValueError, EOFError, KeyError) as error:
        raise DataError(f"{path}: cut off or not a file of torch.save: {error}") from error
    if isinstance(content, Mapping):
        content = content.get("state_dict_softmax_fc", content)
    if isinstance(content, Mapping):
        content = content.get("weight", content)
    if not isinstance(content, Tensor):
        keys = sorted(map(str, content)) if isinstance(content, Mapping) else type(content).__name__
        raise DataError(f"{path}: holds {keys}, no `weight` of PartialFC.")
    if content.ndim != 2 or not content.dtype.is_floating_point:
        raise DataError(f"{path}: the weight is {content.dtype} {tuple(content.shape)}, not a floating matrix.")
    return content.detach()


def _by_rank(files: str | Path | Sequence[str | Path]) -> list[Path]:
    """The files in the order of their ranks."""
    if isinstance(files, str | Path):
        folder = Path(files)
        kinds = {kind: sorted(folder.glob(kind)) for kind in _KINDS}
        kinds = {kind: found for kind, found in kinds.items() if found}
        if len(kinds) != 1:
            raise DataError(
                f"{folder}: needs the files of one kind of {', '.join(_KINDS)}; found {list(kinds) or 'none'}."
            )
        paths = next(iter(kinds.values()))
    else:
        paths = [Path(file) for file in files]
    ranks: dict[int, Path] = {}
    for path in paths:
        match = _RANK.search(path.name)
        if match is None:
            raise DataError(f"{path}: the name doesn't tell the rank (gpu_<rank> or rank_<rank>).")
        if (rank := int(match[1])) in ranks:
            raise DataError(f"{path} and {ranks[rank]} are both of rank {rank}.")
        ranks[rank] = path
    if not ranks:
        raise DataError("give at least one file.")
    missing = sorted(set(range(max(ranks) + 1)) - set(ranks))
    if missing:
        raise DataError(f"{paths[0].parent}: the file of rank {missing[0]} is missing ({len(missing)} in all).")
    return [ranks[rank] for rank in sorted(ranks)]


class _Reader:
    """Rows by class range, one file open at a time."""

    def __init__(self, paths: Sequence[Path], num_classes: int) -> None:
        self.paths = paths
        self.starts = [first_class(num_classes, rank, len(paths)) for rank in range(len(paths))] + [num_classes]
        self._open: tuple[int, Tensor] | None = None

    def fetch(self, lo: int, hi: int) -> dict[str, Tensor]:
        parts = []
        for rank, path in enumerate(self.paths):
            a, b = max(lo, self.starts[rank]), min(hi, self.starts[rank + 1])
            if a < b:
                if self._open is None or self._open[0] != rank:
                    self._open = (rank, read_weight(path))
                rows_RD = self._open[1][a - self.starts[rank] : b - self.starts[rank]]
                bad = ~torch.isfinite(rows_RD).all(dim=1) | ~rows_RD.any(dim=1)
                if bool(bad.any()):
                    raise DataError(f"{path}: the row of class {a + int(bad.nonzero()[0])} is zero or not finite.")
                parts.append(rows_RD)
        return {"rows": parts[0] if len(parts) == 1 else torch.cat(parts)}
