"""A saved head as one plain matrix, for other programs."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from labelmill.errors import DataError
from labelmill.heads.classmap import read_names
from labelmill.heads.refill import MASTER, whole_rows
from labelmill.heads.reshard import cast, new_folder
from labelmill.heads.source import RowSource, open_rows
from labelmill.heads.storage import Fetch, TensorSpec, write_rows


def export(
    source: str | Path,
    out: str | Path,
    dtype: torch.dtype = torch.float32,
    unit: bool | None = None,
    names: str | Path | None = None,
) -> Path:
    """All rows as one matrix (C, D), row i is class i: `.npy`, or `.safetensors` with the tensor `rows`.

    Args:
        unit: rows of length 1; by default what the head compares embeddings with (unit if it normalises).
        names: class names in id order (`classes.arrow`, or text lines); copied beside as `<out>.classes.<suffix>`.

    Raises DataError for another suffix, names of another number, or a dtype that `.npy` lacks.
    """
    old, out = open_rows(source), Path(out)
    unit = old.normalized if unit is None else unit
    kept = [name for name in old.specs if name == "rows" or name.endswith(MASTER)]
    if old.sub_centres > 1:
        raise DataError(f"{source}: has {old.sub_centres} sub-centres a class, and no one row a class to export.")

    def fetch(lo: int, hi: int) -> dict[str, Tensor]:
        raw_RD = whole_rows(old.read(lo, hi, kept))
        rows_RD = torch.nn.functional.normalize(raw_RD, dim=1) if unit else raw_RD
        return {"rows": cast(rows_RD, dtype, f"{source}: a row")}

    if names is not None and (count := len(read_names(names))) != old.num_classes:
        raise DataError(f"{names}: holds {count} names, {source} {old.num_classes} classes.")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.part")
    shape = (old.num_classes, old.dim)
    if out.suffix == ".npy":
        if dtype == torch.bfloat16:
            raise DataError("a .npy file can't hold bfloat16: take float32 or float16, or write .safetensors.")
        try:
            _write_npy(partial, shape, fetch, old, dtype)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
    elif out.suffix == ".safetensors":
        specs = {"rows": replace(TensorSpec.of(torch.empty(0, dtype=dtype)), shape=(old.dim,))}
        shutil.rmtree(partial, ignore_errors=True)  # of an export that was killed
        with new_folder(partial) as folder:
            (entry,) = write_rows(folder, "rows", specs, 0, old.num_classes, fetch, cuts=[])
        (partial / entry.file).rename(out)
        shutil.rmtree(partial)
    else:
        raise DataError(f"{out}: write .npy or .safetensors.")
    if out.suffix == ".npy":
        partial.replace(out)
    if names is not None:
        shutil.copyfile(names, out.with_name(f"{out.stem}.classes{Path(names).suffix}"))
    return out


def _write_npy(path: Path, shape: tuple[int, int], fetch: Fetch, old: RowSource, dtype: torch.dtype) -> None:
    descr = np.lib.format.dtype_to_descr(torch.empty(0, dtype=dtype).numpy().dtype)
    with path.open("wb") as out:
        np.lib.format.write_array_header_1_0(out, {"descr": descr, "fortran_order": False, "shape": shape})
        for lo, hi in old.pages():
            out.write(fetch(lo, hi)["rows"].contiguous().numpy().data)
        out.flush()
        os.fsync(out.fileno())
