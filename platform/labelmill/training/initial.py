"""Going on from a head that another run saved, with other classes: found and checked before any worker starts.

Shape legend: O saved classes, C classes of the new run.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import torch
from pydantic import Field
from safetensors import safe_open
from safetensors.torch import load_file

from labelmill.data import store
from labelmill.data.manifest import Manifest, load_manifest
from labelmill.errors import DataError
from labelmill.heads.classmap import ClassMap, class_map, first_classes, map_by_name, read_map, read_names
from labelmill.heads.config import HeadConfig, InitialHead
from labelmill.heads.refill import check_merge
from labelmill.heads.reshard import load_with_map, loaded_tensors
from labelmill.heads.sharded import ShardedHead
from labelmill.heads.source import RowSource, open_rows
from labelmill.heads.storage import INDEX
from labelmill.job import StrictModel
from labelmill.training.checkpoint import latest_checkpoint, read_dense, read_index
from labelmill.training.engine import Engine, load_dense
from labelmill.training.objective import Objective

NAMES = "classes.arrow"
CHECKPOINT = "checkpoint.json"
COPY_BYTES = 64 * 2**20


class HeadStart(StrictModel):
    """Where a head goes on from. Paths are no content; `digest` stands for what lies there.

    Attributes:
        digest: of the saved head, the encoder's weights and the class map.
        merge, optimizer: as in the job.
        kept, fresh, dropped: saved classes that go on, new ones without a past, saved ones that end.
        folder: the saved head.
        checkpoint: holds the encoder's weights; None for a fresh encoder.
        map_file: `.npy`, the new id of each saved class (O,) int64, -1 for none.
    """

    digest: str
    merge: Literal["refuse", "first", "mean"]
    optimizer: Literal["keep", "fresh"]
    kept: int
    fresh: int
    dropped: int
    folder: str = Field(exclude=True)
    checkpoint: str | None = Field(exclude=True)
    map_file: str = Field(exclude=True)

    def __str__(self) -> str:
        return f"{self.folder}: {self.kept:,} classes go on, {self.fresh:,} are new, {self.dropped:,} end"


# --- on the driver, before any worker starts ------------------------------------------------------------------


def find_start(
    config: HeadConfig,
    data: Manifest,
    weights: Mapping[str, torch.Tensor],
    dim: int,
    work: Path,
    head: str = "classes",
) -> HeadStart:
    """Finds and checks what `config.initial` names, and writes the class map below `work`.

    Args:
        data: the new run's training set: its label space.
        weights: the objective's dense weights by name; only their shapes count.
        dim: embedding size.
        work: a folder that all workers see.
        head: the objective's name of the head.

    Raises DataError, each naming the place: nothing there, a head of another size or row optimizer, an encoder of other
    shapes, classes unknown, or several that go to one class.
    """
    initial = config.initial
    assert initial is not None
    assert data.label.num_classes is not None
    folder, checkpoint = _locate(initial.checkpoint, head, work)
    source = open_rows(folder)
    small = config.model_copy(update={"shards": None, "initial": None})
    loaded_tensors(source, ShardedHead(1, dim, small), initial.optimizer)
    if initial.encoder == "fresh":
        checkpoint = None
    elif checkpoint is None:
        raise DataError(
            f"head.initial.checkpoint: {folder} has no encoder's weights beside it. Name a whole checkpoint (step-...), "
            "or set head.initial.encoder to fresh."
        )
    else:
        _check_dense(checkpoint, weights)
    plan = _class_map(initial, source, data)
    try:
        check_merge(plan, initial.merge)
    except DataError as error:
        raise DataError(f"head.initial.classes: {error} (head.initial.merge)") from None
    new_of_old_O = np.full(plan.num_old, -1, dtype=np.int64)
    new_of_old_O[plan.old_K.numpy()] = plan.new_K.numpy()
    digest = _digest(folder, checkpoint, new_of_old_O)
    map_file = work / f"{digest[:12]}.npy"
    work.mkdir(parents=True, exist_ok=True)
    np.save(map_file, new_of_old_O)
    return HeadStart(
        digest=digest,
        merge=initial.merge,
        optimizer=initial.optimizer,
        kept=len(plan.old_K),
        fresh=plan.fresh,
        dropped=plan.dropped,
        folder=str(folder),
        checkpoint=str(checkpoint) if checkpoint else None,
        map_file=str(map_file.resolve()),
    )


def keep_class_names(folder: Path, data: Manifest) -> None:
    """Puts the class names of a label space beside the checkpoints of a fit, for a later run's `head.initial`."""
    if data.classes:
        folder.mkdir(parents=True, exist_ok=True)
        store.write_bytes(folder / NAMES, store.read_bytes(store.join(data.root, data.classes)))


def _locate(place: str, head: str, work: Path) -> tuple[Path, Path | None]:
    """The folder of the saved head, and the checkpoint that it is part of."""
    if store.is_uri(place):
        return _locate(str(_fetch(place, head, work)), head, work)
    path = Path(store.normal(place))
    if not path.is_dir():
        raise DataError(f"head.initial.checkpoint: {path}: no such folder.")
    if (path / INDEX).is_file() or any(path.glob("rows-*.safetensors")) or any(path.glob("head-*.safetensors")):
        return path, path.parent if (path.parent / CHECKPOINT).is_file() else None
    checkpoints = list(_checkpoints(path))
    if not checkpoints:
        raise DataError(
            f"head.initial.checkpoint: {path} holds neither a saved head (head.json) nor a complete checkpoint."
        )
    if len(checkpoints) > 1:
        shown = "\n  ".join(map(str, checkpoints[:10]))
        raise DataError(f"head.initial.checkpoint: {path} has several trainings; name one of\n  {shown}")
    found = checkpoints[0] / f"head-{head}"
    if not found.is_dir():
        raise DataError(f"head.initial.checkpoint: {checkpoints[0]} holds no head {head!r}.")
    return found, checkpoints[0]


def _checkpoints(path: Path) -> Iterator[Path]:
    """The newest checkpoint of every training below a checkpoint, a folder of checkpoints, a stage or a run."""
    if (path / CHECKPOINT).is_file():
        yield path
        return
    for root in [path, path / "checkpoints", *sorted(path.glob("stages/*/checkpoints"))]:
        if newest := latest_checkpoint(root):
            yield newest


def _fetch(uri: str, head: str, work: Path) -> Path:
    """A copy of what a start needs of a remote checkpoint or saved head; what is there already stays."""
    wanted = [
        name
        for name in store.list_files(uri)
        if name in (CHECKPOINT, "dense.safetensors", "optimizer.safetensors", INDEX, NAMES)
        or name.startswith(f"head-{head}/")
        or ("/" not in name and name.startswith(("head-", "rows-")))
    ]
    if not wanted:
        raise DataError(f"head.initial.checkpoint: {uri} holds neither a checkpoint nor a saved head.")
    target = work / hashlib.sha256(uri.encode()).hexdigest()[:12]
    places = {name: store.join(uri, name) for name in wanted}
    beside = store.join(uri.rstrip("/").rsplit("/", 2)[0], NAMES)  # beside the folder of checkpoints
    if CHECKPOINT in wanted and store.exists(beside):
        places[NAMES] = beside
    for name, path in places.items():
        size, local = store.size(path), target / name
        if local.is_file() and local.stat().st_size == size and name.endswith(".safetensors"):
            continue
        local.parent.mkdir(parents=True, exist_ok=True)
        part = local.with_name(f".{local.name}.part")
        with part.open("wb") as out:
            for at in range(0, size, COPY_BYTES):
                out.write(store.read_bytes(path, at, min(COPY_BYTES, size - at)))
        part.replace(local)
    return target


def _check_dense(checkpoint: Path, weights: Mapping[str, torch.Tensor]) -> None:
    with safe_open(checkpoint / "dense.safetensors", "pt") as file:
        saved = {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (it is no dict)
    here = {name: list(weight.shape) for name, weight in weights.items()}
    if wrong := sorted(name for name in {*saved, *here} if saved.get(name) != here.get(name)):
        name = wrong[0]
        raise DataError(
            f"head.initial.checkpoint: {checkpoint} is of another encoder: {name} has shape {saved.get(name)} there and "
            f"{here.get(name)} here ({len(wrong)} differ). Set encoder as it was, or head.initial.encoder to fresh."
        )


def _class_map(initial: InitialHead, source: RowSource, data: Manifest) -> ClassMap:
    count, field = data.label.num_classes, "head.initial.classes"
    assert count is not None
    new = data.load_classes()["name"] if data.classes else None
    given = initial.classes
    try:
        if given == "ids":
            return first_classes(source.num_classes, count)
        if given is not None and Path(given).suffix in (".npy", ".csv"):
            return class_map(read_map(store.normal(given), source.num_classes), source.num_classes, count)
        old = _old_names(source) if given is None else _names_at(given)
        if old is None and new is None:
            return first_classes(source.num_classes, count)
        if old is None or new is None:
            without = source.folder if old is None else f"the data set {data.name!r}"
            raise DataError(
                f"{without} has no class names, the other label space has. Give a map or names, or write ids if every "
                "id means what it did."
            )
        if len(old) != source.num_classes:
            raise DataError(f"{given or NAMES}: holds {len(old)} names, {source.folder} {source.num_classes} classes.")
        new_of_old_O = map_by_name(old, new)
        if not bool((new_of_old_O >= 0).any()):
            raise DataError(
                f"none of the {len(old)} saved classes ({old[0].as_py()!r}, ...) is one of the {len(new)} of the data set "
                f"{data.name!r} ({new[0].as_py()!r}, ...)."
            )
        return class_map(new_of_old_O, source.num_classes, count)
    except DataError as error:
        raise DataError(f"{field}: {error}") from None


def _old_names(source: RowSource) -> pa.ChunkedArray | None:
    """Names noted beside a saved head or the checkpoints of its training."""
    for folder in (source.folder, *source.folder.parents[:3]):
        if (folder / NAMES).is_file():
            return read_names(folder / NAMES)
    return None


def _names_at(place: str) -> pa.ChunkedArray:
    if Path(place).suffix in (".arrow", ".txt"):
        return read_names(store.normal(place))
    return load_manifest(place).load_classes()["name"]


def _digest(folder: Path, checkpoint: Path | None, new_of_old_O: np.ndarray) -> str:
    total = hashlib.sha256(new_of_old_O.tobytes())
    if (folder / INDEX).is_file():
        total.update((folder / INDEX).read_bytes())  # with checksums of every page
    else:
        total.update(repr(sorted((f.name, f.stat().st_size) for f in folder.glob("*.safetensors"))).encode())
    if checkpoint is not None:
        with (checkpoint / "dense.safetensors").open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


# --- on the workers -------------------------------------------------------------------------------------------


def load_weights(objective: Objective, initial: Mapping[str, HeadStart]) -> None:
    """The dense weights that a fresh run goes on from; before the engine is built."""
    for start in initial.values():
        if start.checkpoint is not None:
            load_dense(objective, read_dense(Path(start.checkpoint)))


def load_heads(engine: Engine, initial: Mapping[str, HeadStart]) -> None:
    """Rows, their optimizer state and the dense moments that a fresh run goes on from. Every rank calls it.

    Classes without a past keep the rows that they have.
    """
    for name, start in initial.items():
        head = engine.objective.heads[name]
        new_of_old_O = torch.from_numpy(np.load(start.map_file, allow_pickle=False))
        load_with_map(head, start.folder, new_of_old_O, start.merge, start.optimizer)
        if start.checkpoint is not None and start.optimizer == "keep":
            moments = load_file(Path(start.checkpoint) / "optimizer.safetensors")
            engine.load_optimizer(moments, read_index(Path(start.checkpoint))["optimizer_steps"])
