"""Checkpoints from outside a run: found, verified, exported as plain weights."""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file

from labelmill.data import store
from labelmill.errors import DataError
from labelmill.heads.export import export
from labelmill.heads.reshard import convert, new_folder
from labelmill.heads.source import open_rows
from labelmill.training.checkpoint_copies import Copies
from labelmill.training.checkpoint_files import DAMAGED, INDEX, complete, read_dense, read_index, step_of, verify

State = Literal["whole", "copy", "incomplete", "damaged", "unfinished"]
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Entry:
    """A checkpoint folder.

    Attributes:
        place: folder or `s3://` address.
        state: `whole`; `copy`, whole at a remote place; `incomplete`: files are missing or cut; `damaged`: a resume has
            set it aside; `unfinished`: being written, or left by a run that died.
        step, cursor, world: optimizer steps, samples and workers, where an index tells.
        bytes: of its files.
    """

    place: str
    state: State
    step: int | None
    cursor: int | None
    world: int | None
    bytes: int

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def find(place: str) -> list[Entry]:
    """The checkpoints at or below a place, by folder and step. Raises DataError when the place isn't there."""
    if store.is_uri(place):
        return _copies(store.normal(place))
    root = Path(store.normal(place))
    if not root.is_dir():
        raise DataError(f"{root}: no such folder.")
    if (root / INDEX).is_file():
        return [_local(root)]
    found = {path for pattern in ("step-*", f"{DAMAGED}*step-*", ".step-*.part") for path in root.rglob(pattern)}
    return [_local(path) for path in sorted(found, key=lambda p: (str(p.parent), p.name)) if path.is_dir()]


def _local(folder: Path) -> Entry:
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    if folder.name.startswith("."):
        return Entry(str(folder), "unfinished", int(folder.name.split("-")[1].split(".")[0]), None, None, size)
    state: State = "damaged" if folder.name.startswith(DAMAGED) else "incomplete"
    if state == "incomplete" and folder in complete(folder.parent):
        state = "whole"
    try:
        index = read_index(folder)
    except DataError:
        return Entry(str(folder), state, step_of(folder), None, None, size)
    return Entry(str(folder), state, index["step"], index["cursor"], index["world"], size)


def _copies(place: str) -> list[Entry]:
    names = store.list_files(place)
    found = []
    for name in names if not store.exists(store.join(place, INDEX)) else [INDEX]:
        if name != INDEX and not name.endswith(f"/{INDEX}"):
            continue
        index = json.loads(store.read_bytes(store.join(place, name)).to_pybytes())
        folder = store.join(place, name).rpartition("/")[0]
        size = sum(entry["bytes"] for entry in index["files"].values())
        found.append(Entry(folder, "copy", index["step"], index["cursor"], index["world"], size))
    return found


def verify_entry(entry: Entry) -> list[str]:
    """Reads every byte; returns what is wrong. A copy is brought here for that, into a temporary folder."""
    if entry.state != "copy":
        return verify(Path(entry.place))
    with tempfile.TemporaryDirectory(prefix="labelmill-") as folder:
        try:
            return verify(_bring(entry, Path(folder)))
        except DataError as error:
            return [str(error)]


def _bring(entry: Entry, folder: Path) -> Path:
    assert entry.step is not None
    return Copies(entry.place.rpartition("/")[0], keep=1).fetch(entry.step, folder)


def export_checkpoint(place: str, out: Path, step: int | None = None, dtype: str = "float32") -> dict[str, Any]:
    """Writes `out/dense.safetensors` and `out/head-<name>.safetensors` (row i is class i), from verified files.

    Heads of several rows a class become a folder `out/head-<name>`, as `labelmill head convert` writes it.

    Raises DataError for a place without a sound checkpoint (of that step), several runs, or a folder that exists.
    """
    if dtype not in _DTYPES:
        raise DataError(f"--dtype {dtype!r}: write one of {', '.join(_DTYPES)}.")
    found = [entry for entry in find(place) if entry.state in ("whole", "copy") and step in (None, entry.step)]
    runs = {entry.place.rpartition("/")[0] for entry in found}
    if len(runs) > 1:
        raise DataError(f"{place}: holds checkpoints of several trainings; name one: {', '.join(sorted(runs))}.")
    for entry in sorted(found, key=lambda entry: entry.step or 0, reverse=True):
        with tempfile.TemporaryDirectory(prefix="labelmill-") as folder:
            source = _bring(entry, Path(folder)) if entry.state == "copy" else Path(entry.place)
            if problems := verify(source):
                if step is not None:
                    raise DataError("\n".join(problems))
                continue
            return _write(source, out, _DTYPES[dtype])
    raise DataError(f"{place}: holds no sound checkpoint{f' of step {step}' if step is not None else ''}.")


def _write(source: Path, out: Path, dtype: torch.dtype) -> dict[str, Any]:
    index, dense = read_index(source), read_dense(source)
    with new_folder(out) as folder:
        save_file(dense, folder / "dense.safetensors")
        for name in index["heads"]:
            saved = source / f"head-{name}"
            if open_rows(saved).sub_centres > 1:
                convert(saved, folder / f"head-{name}", dtype=dtype, weights_only=True)
            else:
                export(saved, folder / f"head-{name}.safetensors", dtype)
    return {
        "step": index["step"],
        "parameters": sum(value.numel() for value in dense.values()),
        "heads": ", ".join(f"{name} ({classes:,} classes)" for name, classes in index["heads"].items()) or "none",
    }
