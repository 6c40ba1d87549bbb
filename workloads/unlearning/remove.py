"""Forgetting identities of a head with any number of classes: their rows end, the encoder stays.

A sharded head isn't gathered: its files are read and written page by page. Rows of the other classes move up; the label space
of the package says by `trained_id` which class of the training set each one is.

Shape legend: C classes, K removed ones, N neighbours, D embedding width, B samples of this rank.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from labelmill.data.choose import keep_classes
from labelmill.data.selection import KeepRows
from labelmill.data.spec import StreamSpec
from labelmill.data.stream import Batch
from labelmill.errors import JobError
from labelmill.heads.config import HeadConfig
from labelmill.heads.reshard import shrink
from labelmill.heads.sharded import ShardedHead
from labelmill.heads.source import open_rows
from labelmill.run import Run
from labelmill.tracking.model import read_spec
from labelmill.training.config import TrainConfig
from labelmill.training.objective import Losses, Objective
from workloads.unlearning.methods import RemoveClasses
from workloads.unlearning.model import (
    check_classifier,
    frozen,
    head_start,
    load_encoder,
    package_classes,
    trained_ids,
    write_package,
)


def drop_rows(package: Path, out: Path, classes: tuple[int, ...]) -> Path:
    """A package without the rows and names of `classes`, page by page.

    Raises JobError when no class would be left, or one isn't there.
    """
    spec = check_classifier(package)
    names = package_classes(package)
    ids_C = trained_ids(names)
    gone_K = np.flatnonzero(np.isin(ids_C, classes))
    if len(gone_K) < len(set(classes)):
        missing = sorted(set(classes) - set(ids_C.tolist()))
        raise JobError(f"class {missing[0]} isn't one of the model's {spec.num_classes} classes.")
    if len(gone_K) == spec.num_classes:
        raise JobError("no class would be left. Retire the model instead (labelmill models revoke).")
    shrunk = out.with_name(f".{out.name}.rows")
    shutil.rmtree(shrunk, ignore_errors=True)
    source, pages = shrink(package, shrunk / "shrunk", torch.from_numpy(gone_K)), []
    for entry in source.files:
        page = load_file(shrunk / "shrunk" / entry.file)["rows"]
        page = F.normalize(page.float(), dim=1) if spec.normalized else page
        pages.append(shrunk / f"rows-{entry.start:08d}-{entry.stop:08d}.safetensors")
        save_file({"rows": page.contiguous()}, pages[-1])
    kept_C = np.ones(len(ids_C), bool)
    kept_C[gone_K] = False
    columns = {name: names.column(name) for name in names.column_names if name != "trained_id"}
    table = pa.table({**columns, "trained_id": pa.array(ids_C)}).filter(pa.array(kept_C))
    write_package(out, package, rows=pages, classes=table)
    shutil.rmtree(shrunk)
    return out


def neighbours(package: Path, classes: tuple[int, ...], number: int) -> np.ndarray:
    """The classes whose rows are nearest to removed ones, `number` of each, without the removed: int64, sorted."""
    source, spec = open_rows(package), read_spec(package)
    ids_C = trained_ids(package_classes(package))
    gone_K = np.flatnonzero(np.isin(ids_C, classes))
    w_KD = torch.cat([source.read(int(i), int(i) + 1, ["rows"])["rows"].float() for i in gone_K])
    w_KD = F.normalize(w_KD, dim=1)
    best = torch.full((len(gone_K), number), -torch.inf)
    where = torch.full((len(gone_K), number), -1, dtype=torch.int64)
    gone = torch.from_numpy(gone_K)
    for lo, hi in source.pages():
        page_RD = F.normalize(source.read(lo, hi, ["rows"])["rows"].float(), dim=1)
        cosine_KR = w_KD @ page_RD.t()
        cosine_KR[:, gone[(gone >= lo) & (gone < hi)] - lo] = -torch.inf
        both = torch.cat([best, cosine_KR], dim=1)
        ids = torch.cat([where, torch.arange(lo, hi).expand(len(gone_K), -1)], dim=1)
        best, at = both.topk(min(number, both.shape[1]), dim=1)
        where = ids.gather(1, at)
    found = np.unique(where[best > -torch.inf].numpy())
    assert spec.num_classes
    return ids_C[found]


class RepairRows(Objective):
    """The class rows learn on, the encoder stays: after classes have gone, those beside them settle."""

    def __init__(self, package: str, head: HeadConfig, seed: int) -> None:
        super().__init__()
        spec = check_classifier(Path(package))
        self.encoder = frozen(load_encoder(Path(package), spec))
        self.head = ShardedHead(spec.num_classes, spec.dim, head, seed=seed)
        self.ids_C = torch.from_numpy(trained_ids(package_classes(Path(package))).copy())
        self.anchor = nn.Parameter(torch.zeros(1))  # an engine wants something to train

    @property
    def heads(self) -> Mapping[str, ShardedHead]:
        return {"classes": self.head}

    def prepare(self, raw: Any, labels: Any, rng: Any) -> Any:
        return self.encoder.prepare(raw, rng)

    def forward(self, batch: Batch) -> Losses:
        with torch.no_grad():
            emb_BD = self.encoder(batch.inputs)
        new_B = torch.searchsorted(self.ids_C.to(emb_BD.device), batch.labels.single_B)
        return Losses(self.head.loss(emb_BD, new_B, batch.weight_B) + 0.0 * self.anchor.sum())


def remove_classes(
    run: Run,
    folder: Path,
    model: Path,
    retain: StreamSpec,
    classes: tuple[int, ...],
    method: RemoveClasses,
    budget: TrainConfig,
    seed: int,
) -> tuple[Path, float]:
    """Drops the rows of classes that are forgotten as a whole, then lets rows beside them settle.

    Returns the package folder and the seconds. Raises JobError when the request forgets no class as a whole.
    """
    from workloads.unlearning.unlearn import recipe

    if not classes:
        raise JobError("method.kind remove_classes: no class is forgotten whole by this request; use another method.")
    began = time.perf_counter()
    made = drop_rows(model, folder / "model", classes)
    seconds = time.perf_counter() - began
    if not method.repair:
        return made, seconds
    near = neighbours(model, classes, method.neighbours)
    mask = keep_classes(retain.manifest, near)
    assert isinstance(retain.selection, KeepRows)
    shards = range(len(mask.shard_samples))
    both = KeepRows.of((mask.mask(i) & retain.selection.mask(i) for i in shards), mask.data)
    stream = replace(retain, selection=both.save(str((folder / "neighbours.arrow").resolve())))
    spec = read_spec(made)
    head, _ = recipe(spec)
    config = (method.train or budget).model_copy(update={"steps": method.repair, "epochs": None, "zero_stage": 0})
    objective = partial(RepairRows, str(made.resolve()), head, seed)
    fitted = run.fit(
        folder / "fit", objective, stream, config, seed=seed, initial={"classes": head_start(made, folder)}
    )
    files = [fitted.folder / "export" / "head-classes" / entry["file"] for entry in fitted.head_shards("classes")]
    settled = write_package(folder / "settled", made, rows=files)
    return settled, seconds + fitted.seconds.get("train", 0.0)
