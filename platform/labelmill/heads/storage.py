"""Files of a sharded head: one safetensors file a range of classes, readable by any number of ranks.

Shape legend: C classes of this rank, D embedding size.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from labelmill.errors import DataError


def save_range(
    folder: str | Path,
    prefix: str,
    tensors: Mapping[str, Tensor],
    start: int,
    stop: int,
    notes: Mapping[str, Any],
) -> dict[str, Any]:
    """Writes the rows of classes [start, stop) and returns the index entry {file, start, stop}.

    The file appears whole or not at all. A rank that owns no class writes nothing: its entry's file is empty.
    """
    if start == stop:
        return {"file": "", "start": start, "stop": stop}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{prefix}-{start:010d}-{stop:010d}.safetensors"
    partial = folder / f".{name}.partial"
    save_file(
        {key: value.contiguous() for key, value in tensors.items()},
        partial,
        metadata={key: str(value) for key, value in notes.items()},
    )
    with partial.open("rb") as written:
        os.fsync(written.fileno())
    partial.replace(folder / name)
    return {"file": name, "start": start, "stop": stop}


def check_cover(entries: Iterable[Mapping[str, Any]], num_classes: int, folder: str | Path) -> list[Mapping[str, Any]]:
    """The entries in order of classes. Raises DataError unless they cover [0, num_classes) exactly once."""
    ordered = sorted((e for e in entries if e["start"] < e["stop"]), key=lambda e: e["start"])
    reached = 0
    for entry in ordered:
        if entry["start"] > reached:
            raise DataError(f"{folder}: no file holds the classes [{reached}, {entry['start']}) of the head.")
        if entry["start"] < reached:
            raise DataError(f"{folder}: two files hold the classes [{entry['start']}, {reached}) of the head.")
        reached = entry["stop"]
    if reached < num_classes:
        raise DataError(f"{folder}: no file holds the classes [{reached}, {num_classes}) of the head.")
    if reached > num_classes:
        raise DataError(f"{folder}: the files hold {reached} classes, the head has {num_classes}.")
    return ordered


def load_range(
    folder: str | Path,
    entries: Iterable[Mapping[str, Any]],
    into: Mapping[str, Tensor],
    start: int,
    stop: int,
) -> dict[str, str]:
    """Copies the classes [start, stop) into the tensors from the files that hold them; returns the notes.

    `entries` are in order of classes (`check_cover`). Raises DataError for a missing file or tensor, or other
    shapes.
    """
    notes: dict[str, str] = {}
    for entry in entries:
        lo, hi = max(start, entry["start"]), min(stop, entry["stop"])
        if lo >= hi and notes:
            continue
        path = Path(folder) / entry["file"]
        if not path.is_file():
            raise DataError(f"{path}: missing; it holds the classes [{entry['start']}, {entry['stop']}) of the head.")
        with safe_open(path, framework="pt") as file:
            notes = notes or dict(file.metadata() or {})
            if lo >= hi:
                continue
            known = set(file.keys())
            for name, tensor in into.items():
                if name not in known:
                    raise DataError(f"{path}: holds {sorted(known)}, not {name!r}: another row optimizer wrote it.")
                part = file.get_slice(name)
                want = [entry["stop"] - entry["start"], *tensor.shape[1:]]
                if list(part.get_shape()) != want:
                    raise DataError(f"{path}: {name!r} has shape {list(part.get_shape())}, the head needs {want}.")
                values = part[lo - entry["start"] : hi - entry["start"]]
                tensor[lo - start : hi - start].copy_(values.to(torch.promote_types(values.dtype, tensor.dtype)))
    return notes
