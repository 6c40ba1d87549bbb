"""Checkpoints at rest: which ones below a folder are whole, and whether their bytes are what was written.

A checkpoint's index (`checkpoint.json`) holds the size and sha256 of every file but the heads' rows. Those have a
CRC-32 for each page in the head's own index, whose sha256 is here. So every byte is covered, and a rank verifies the
rows that it reads without reading the others.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from labelmill.errors import DataError

INDEX = "checkpoint.json"
FENCE = "attempt.json"
DAMAGED = "damaged-"
_CHUNK = 1 << 22


@dataclass(frozen=True)
class Position:
    """Where a run stands.

    Attributes:
        step: optimizer steps done.
        cursor: committed samples, the position of the stream.
        stream: digest of the order that the cursor belongs to.
        skipped: steps that were left out because a value was not finite.
    """

    step: int
    cursor: int
    stream: str
    skipped: int = 0


def folder_name(step: int) -> str:
    """Of the checkpoint after `step` optimizer steps."""
    return f"step-{step:08d}"


def step_of(folder: Path) -> int:
    """The step in a checkpoint folder's name."""
    return int(folder.name.rpartition("-")[2])


def read_index(folder: Path) -> dict[str, Any]:
    """The checkpoint's JSON. Raises DataError when it is missing or no index."""
    path = folder / INDEX
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        for name, entry in index["files"].items():
            if os.path.isabs(name) or ".." in Path(name).parts:
                raise ValueError(f"it names the file {name!r}, which isn't below its folder")
            int(entry["bytes"])
        return index
    except FileNotFoundError:
        raise DataError(f"{folder}: no checkpoint: it holds no {INDEX}.") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: not a readable index of a checkpoint: {error!r}") from error


def complete(root: Path) -> list[Path]:
    """Checkpoints whose every file is there with its recorded size, oldest first."""
    return [folder for folder in sorted(root.glob("step-*")) if not _lacking(folder)]


def _lacking(folder: Path) -> list[str]:
    try:
        files = read_index(folder)["files"]
    except DataError as error:
        return [str(error)]
    problems = []
    for name, entry in files.items():
        path = folder / name
        if not path.is_file():
            problems.append(f"{path}: missing")
        elif path.stat().st_size != entry["bytes"]:
            problems.append(f"{path}: cut: {path.stat().st_size} of {entry['bytes']} bytes")
    return problems


def latest_checkpoint(root: Path) -> Path | None:
    """The newest complete checkpoint below `root`."""
    found = complete(root)
    return found[-1] if found else None


def verify(folder: Path) -> list[str]:
    """Reads every byte of a checkpoint; returns what is wrong, one text for each file."""
    from labelmill.heads.source import open_rows

    problems = _lacking(folder)
    if problems:
        return problems
    index = read_index(folder)
    for name in index["files"]:
        try:
            check_file(folder, name, index)
        except DataError as error:
            problems.append(str(error))
    for name in index["heads"]:
        try:
            open_rows(folder / f"head-{name}").verify()
        except DataError as error:
            problems.append(str(error))
    return problems


def check_file(folder: Path, name: str, index: Mapping[str, Any]) -> None:
    """Raises DataError when a file's content isn't what its checkpoint's index says."""
    entry, path = index["files"].get(name), folder / name
    if entry is None:
        raise DataError(f"{path}: {INDEX} doesn't list it.")
    if entry.get("sha256") is None:
        return
    try:
        found = sha256_of(path)
    except OSError as error:
        raise DataError(f"{path}: can't be read: {error}") from error
    if found != entry["sha256"]:
        raise DataError(f"{path}: damaged: its sha256 is {found[:12]}, it was written as {entry['sha256'][:12]}.")


def read_file(folder: Path, name: str, index: Mapping[str, Any]) -> dict[str, Tensor]:
    """A safetensors file of a checkpoint, verified. Raises DataError."""
    check_file(folder, name, index)
    try:
        return load_file(folder / name)
    except (OSError, SafetensorError) as error:
        raise DataError(f"{folder / name}: not a readable safetensors file: {error}") from error


def read_dense(folder: Path) -> dict[str, Tensor]:
    """Parameters and buffers, to load into an objective before the engine is built. Raises DataError."""
    return read_file(folder, "dense.safetensors", read_index(folder))


def set_aside(folder: Path) -> Path:
    """Takes a damaged checkpoint out of the way, under a name that says so; returns its new place."""
    target = folder.with_name(DAMAGED + folder.name)
    number = 0
    while target.exists():
        number += 1
        target = folder.with_name(f"{DAMAGED}{number}-{folder.name}")
    folder.rename(target)
    return target


# --- small tools -------------------------------------------------------------------------------------------


def sha256_of(path: Path) -> str:
    """Of a file's content, hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes JSON whole or not at all, and flushes it to disk."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as out:
        json.dump(content, out, indent=1)
        out.flush()
        os.fsync(out.fileno())
    partial.rename(path)


def sync(path: Path) -> None:
    """Flushes a file, or a folder's names, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def raise_fence(work: Path, attempt: int) -> None:
    """From here on only workers of `attempt` may commit a checkpoint below `work`."""
    work.mkdir(parents=True, exist_ok=True)
    write_json(work / FENCE, {"attempt": attempt})


def fenced_off(work: Path, attempt: int | None) -> bool:
    """Whether another attempt has begun: what is left of this one, on a host that was cut off, must not write."""
    if attempt is None or not (work / FENCE).is_file():
        return False
    return json.loads((work / FENCE).read_text(encoding="utf-8"))["attempt"] != attempt
