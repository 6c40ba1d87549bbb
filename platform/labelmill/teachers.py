"""Where a teacher's outputs come from: a packaged model that runs along, or outputs kept by one pass over the data.

A teacher is a packaged model (`tracking.model`): registered, or just trained by the same job. `TeacherModel` runs it
live under no_grad. `teach` is a stage that runs it once over a data set, shard by shard; what a shard gave is kept when
the pass is interrupted, and the outputs are used again by every later job that names their folder.

Shape legend: n samples of a shard, B samples of a batch, C classes, k best classes, T temperatures, E embedding width.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from labelmill.data.decode import decode_column
from labelmill.data.manifest import Manifest
from labelmill.data.outputs import (
    Column,
    OutputsInfo,
    Stored,
    check_classes,
    check_logits,
    check_outputs,
    class_map,
    finish_outputs,
    outputs_file,
    write_outputs,
)
from labelmill.data.selection import KeepRows, load_selection
from labelmill.data.shards import read_shard
from labelmill.encoders import EncoderConfig, build_encoder
from labelmill.encoders.base import Encoder, Prepared
from labelmill.errors import DataError
from labelmill.job import StrictModel
from labelmill.run import Run
from labelmill.tracking.model import Predictor, load_model
from labelmill.training.config import TrainConfig
from labelmill.training.passes import run_tasks

BATCH = 256


class _TeacherSection(StrictModel):
    """What of a teacher is used, and how it is kept."""

    live: bool = Field(
        False, description="run it beside the student, on the same augmented input, instead of keeping outputs"
    )
    columns: tuple[Column, ...] = Field(("logits",), min_length=1, description="what is kept: logits, topk, embedding")
    k: int = Field(16, ge=1, description="topk: classes of a sample")
    temperatures: tuple[float, ...] = Field((1.0, 2.0, 4.0, 8.0), description="topk: for which the tail's mass is kept")
    dtype: Stored = Field("float16", description="of what is kept")

    @model_validator(mode="after")
    def _check(self) -> Any:
        if any(t <= 0 for t in self.temperatures):
            raise ValueError("temperatures must be positive")
        return self


class RegisteredTeacher(_TeacherSection):
    """A model of the registry."""

    kind: Literal["registered"] = "registered"
    model: str = Field(min_length=1, description="NAME, NAME@alias or NAME/version")


class FittedTeacher(_TeacherSection):
    """A classifier that the job trains first, on samples that the student doesn't see."""

    kind: Literal["fit"] = "fit"
    encoder: EncoderConfig
    train: TrainConfig
    samples: int | None = Field(None, ge=1, description="training samples, drawn by their keys; default: all")
    scale: float = Field(16.0, gt=0, description="factor of the cosine: logits are at most this large")
    augment: bool = True


class CachedTeacher(StrictModel):
    """Outputs that another job has kept, or that were written by `labelmill.data.outputs`."""

    kind: Literal["cached"] = "cached"
    folder: str = Field(min_length=1, description="folder with outputs.json")
    test: str = Field("", description="the same for the test set: the report then compares students with the teacher")


class EncoderTeacher(_TeacherSection):
    """A frozen encoder with the weights that it brings along (a library model): embeddings, no logits."""

    kind: Literal["encoder"] = "encoder"
    encoder: EncoderConfig
    columns: tuple[Column, ...] = ("embedding",)

    @model_validator(mode="after")
    def _embeds(self) -> EncoderTeacher:
        if self.columns != ("embedding",):
            raise ValueError("an encoder without classes gives columns [embedding] alone")
        return self


TeacherConfig = Annotated[
    RegisteredTeacher | FittedTeacher | CachedTeacher | EncoderTeacher, Field(discriminator="kind")
]


class TeacherModel(nn.Module):
    """A teacher as a frozen module: always in evaluation mode, never with gradient.

    Args:
        encoder: of its input.
        rows_CE: class rows; None for embeddings alone.
        scale, normalized: of the logits, scale * <embedding, row> with unit embeddings if normalised.
        bias_C: added to them.
    """

    def __init__(
        self,
        encoder: Encoder,
        rows_CE: Tensor | None,
        scale: float = 1.0,
        normalized: bool = False,
        bias_C: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.encoder, self.scale, self.normalized = encoder, scale, normalized
        self.rows_CE = None if rows_CE is None else nn.Parameter(rows_CE, requires_grad=False)
        self.bias_C = None if bias_C is None else nn.Parameter(bias_C, requires_grad=False)
        self.requires_grad_(False)
        self.eval()

    @classmethod
    def of(cls, package: str | Path) -> TeacherModel:
        """From a packaged model's folder."""
        predictor = load_model(package)
        spec, bias_C = predictor.spec, None
        rows = torch.cat([rows.float() for _, rows in predictor.shards]) if spec.num_classes else None
        if rows is not None and spec.bias:
            rows, bias_C = rows[:, :-1], rows[:, -1]
        return cls(predictor.encoder, rows, spec.scale, spec.normalized, bias_C)

    def train(self, mode: bool = True) -> TeacherModel:
        """Stays in evaluation mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, prepared: Prepared) -> tuple[Tensor, Tensor | None]:
        """(embedding (B, E), logits (B, C) or None), float32."""
        emb_BE = self.encoder(prepared).float()
        return emb_BE, self._logits(emb_BE)

    @torch.no_grad()
    def with_maps(self, prepared: Prepared) -> tuple[Tensor, Tensor | None, list[Tensor]]:
        """`forward`, and the encoder's feature maps."""
        emb_BE, maps = self.encoder.maps(prepared)
        return emb_BE.float(), self._logits(emb_BE.float()), maps

    def _logits(self, emb_BE: Tensor) -> Tensor | None:
        if self.rows_CE is None:
            return None
        unit_BE = nn.functional.normalize(emb_BE, dim=1) if self.normalized else emb_BE
        logits_BC = self.scale * unit_BE @ self.rows_CE.T
        return logits_BC if self.bias_C is None else logits_BC + self.bias_C


def check_frozen(module: nn.Module) -> None:
    """Raises DataError for a teacher module in training mode, or with parameters that learn."""
    if any(part.training for part in module.modules()):
        raise DataError("the teacher is in training mode: call eval() on it.")
    if any(p.requires_grad for p in module.parameters()):
        raise DataError("the teacher's parameters ask for gradients: call requires_grad_(False) on it.")


def check_teacher(package: Path, data: Manifest) -> Predictor:
    """Raises DataError unless a packaged model has the data set's classes, in its order, and reads what it has."""
    predictor = load_model(package)
    if predictor.spec.num_classes:
        names = [str(name) for name in predictor.classes.column("name").to_pylist()]
        check_classes("", predictor.spec.num_classes, data, "the teacher's answers", names if data.classes else None)
    if predictor.spec.field not in data.fields:
        raise DataError(
            f"the teacher reads field {predictor.spec.field!r}, data set {data.name!r} has {', '.join(data.fields)}."
        )
    return predictor


# --- the pass ----------------------------------------------------------------------------------------------------


@lru_cache(maxsize=2)
def _model(package: str, encoder: str) -> TeacherModel:
    if package:
        return TeacherModel.of(package)
    from pydantic import TypeAdapter

    return TeacherModel(build_encoder(TypeAdapter(EncoderConfig).validate_json(encoder)), None)


def output_columns(
    emb_BE: Tensor, logits_BC: Tensor | None, columns: Sequence[Column], k: int, temperatures: Sequence[float]
) -> dict[str, np.ndarray]:
    """What is kept of a batch: float32 matrices and int32 ids. Tails are log-sum-exps of the other classes' logits / T."""
    out: dict[str, Tensor] = {}
    if "embedding" in columns:
        out["embedding"] = emb_BE
    if {"logits", "topk"} & set(columns):
        if logits_BC is None:
            raise DataError("this teacher has no classes: keep columns [embedding].")
        if "logits" in columns:
            out["logits"] = logits_BC
        if "topk" in columns:
            values_Bk, ids_Bk = logits_BC.topk(min(k, logits_BC.shape[1]), dim=1)
            rest_BC = logits_BC.scatter(1, ids_Bk, -torch.inf)
            tail = [torch.logsumexp(rest_BC / t, dim=1) for t in temperatures]
            out |= {"ids": ids_Bk.to(torch.int32), "values": values_Bk, "tail": torch.stack(tail, dim=1)}
    return {name: value.cpu().numpy() for name, value in out.items()}


def teach_shard(
    data: Manifest,
    shard: int,
    model: TeacherModel,
    out: Path,
    columns: Sequence[Column],
    k: int,
    temperatures: Sequence[float],
    dtype: Stored,
    max_bad: int,
    only: np.ndarray | None = None,
    batch: int = BATCH,
) -> list[tuple[str, str]]:
    """Runs a teacher over one shard and writes its file; returns the undecodable samples (key, reason).

    Raises DataError for outputs that aren't finite or don't fit `dtype`, by key, and for more than `max_bad` bad samples.
    `only` (bool, a row each) leaves the others out.
    """
    encoder = model.encoder
    table = read_shard(data, shard)
    table = table if only is None else table.filter(pa.array(only))
    keys = table.column("key").to_pylist()
    options: dict[str, Any] = _image_options(encoder.config)
    column, field = table.column(encoder.field), data.fields[encoder.field]

    def ready(lo: int) -> tuple[Prepared, np.ndarray, list[tuple[str, str]]]:
        part = slice(lo, min(lo + batch, len(keys)))
        rows = column.slice(lo, batch)
        raw, valid, bad = decode_column(rows, field, keys[part], options["image_size"], options["channels"])
        return encoder.prepare(raw), valid, bad

    parts: list[dict[str, np.ndarray]] = []
    valids: list[np.ndarray] = []
    bad: list[tuple[str, str]] = []
    with ThreadPoolExecutor(1, thread_name_prefix="decode") as ahead:  # the next batch, while the model has this one
        waiting = deque(ahead.submit(ready, lo) for lo in range(0, min(len(keys), 2 * batch), batch))
        for lo in range(0, len(keys), batch):
            prepared, valid, missed = waiting.popleft().result()
            if lo + 2 * batch < len(keys):
                waiting.append(ahead.submit(ready, lo + 2 * batch))
            bad += missed
            if len(bad) > max_bad:
                raise DataError(f"{data.shard_path(shard)}: sample {bad[0][0]!r} can't be decoded: {bad[0][1]}.")
            emb_BE, logits_BC = model(prepared)
            parts.append(output_columns(emb_BE, logits_BC, columns, k, temperatures))
            valids.append(valid)
    valid = np.concatenate(valids) if valids else np.zeros(0, bool)
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]} if parts else {}
    for name, values in joined.items():
        if name in ("logits", "values", "embedding"):
            check_outputs(name, values, keys, valid, dtype)
            joined[name] = np.where(valid[:, None], values, 0).astype(dtype)
    if "logits" in joined:
        check_logits(joined["logits"][valid])
    write_outputs(out, keys, valid, joined)
    return bad


def _teach_task(data: Manifest, shard: int, package: str, encoder: str, out: Path, options: dict[str, Any]) -> Any:
    torch.set_num_threads(1)
    return teach_shard(data, shard, _model(package, encoder), out, **options)


def _image_options(config: StrictModel) -> dict[str, Any]:
    return {"image_size": getattr(config, "image_size", None), "channels": getattr(config, "channels", 3)}


def teach(
    run: Run,
    folder: Path,
    data: Manifest,
    package: Path | None,
    encoder: StrictModel | None,
    name: str,
    columns: Sequence[Column],
    k: int,
    temperatures: Sequence[float],
    dtype: Stored,
    max_bad: int,
    only: str = "",
) -> dict[str, Any]:
    """Stage: the outputs of a teacher for a whole data set, in `outputs` below the folder; shards done before are kept.

    Args:
        package: folder of a packaged model; or `encoder`, for a library model with weights of its own.
        name: the model's reference, kept with the outputs.
        only: file of a selection (`KeepRows`): the teacher is asked about these samples alone.

    Returns {"samples", "bad"}. Runs as Ray tasks, one a shard; under `cluster.in_process` in this process.
    """
    out = folder / "outputs"
    out.mkdir(exist_ok=True)
    spec = check_teacher(package, data).spec if package else None
    config = "" if encoder is None else encoder.model_dump_json()
    options = {"columns": columns, "k": k, "temperatures": temperatures, "dtype": dtype, "max_bad": max_bad}
    chosen = load_selection(only) if only else None
    todo = [i for i in range(len(data.shards)) if not outputs_file(out, i).is_file()]
    calls = [
        (
            _teach_task,
            (
                data,
                i,
                str(package.resolve()) if package else "",
                config,
                outputs_file(out, i),
                options | {"only": chosen.mask(i) if isinstance(chosen, KeepRows) else None},
            ),
        )
        for i in todo
    ]
    bad: list[tuple[str, str]] = []
    run.connect()
    for items in run_tasks(calls, 1.0, run.progress.update):
        bad += items
    if len(bad) > max_bad:
        raise DataError(f"data set {data.name!r}: {len(bad)} undecodable samples, the job allows {max_bad}.")
    of_classes = {"logits", "topk"} & set(columns)
    num_classes = spec.num_classes if spec and of_classes else 0
    names = None
    if num_classes and package:
        predictor = load_model(package)
        names = [str(n) for n in predictor.classes.column("name").to_pylist()] if data.classes else None
    finish_outputs(
        out,
        OutputsInfo(
            manifest=data.digest,
            classes=class_map(names, num_classes) if num_classes else "",
            num_classes=num_classes,
            model=name,
            columns=tuple(columns),
            dtype=dtype,
            temperatures=tuple(temperatures) if "topk" in columns else (),
            input={
                "augment": False,
                **_image_options(build_encoder(spec.encoder).config if spec else encoder or StrictModel()),
            },
        ),
    )
    return {"samples": chosen.samples if chosen else data.num_samples, "bad": len(bad)}


def package_digest(folder: Path) -> str:
    """Identity of a packaged model: of its description, which holds the hashes of its files."""
    return hashlib.sha256((folder / "model.json").read_bytes()).hexdigest()[:16]
