"""Training that makes later deletion cheap: samples are dealt to shards and slices, each shard has a model of its own.

Bourtoule et al.: Machine Unlearning (IEEE S&P 2021), SISA: sharded, isolated, sliced, aggregated. A shard's model is trained
slice by slice, in turn i on its first i slices, and is kept after each. To forget a sample only the model of its shard
learns again, from the last slice without it. The result is the model that training without the sample gives: nothing else
about it is approximate.

Which shard and slice a sample is in is a hash of its key, so that others stay where they are when some are deleted.

Shape legend: N samples, B samples of a batch, C classes, D embedding width, S shards, R slices of a shard.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from labelmill.data.config import DataConfig
from labelmill.data.folds import fold_of
from labelmill.data.selection import KeepRows
from labelmill.data.shards import read_labels
from labelmill.data.spec import StreamSpec
from labelmill.encoders import EncoderConfig, build_encoder
from labelmill.errors import DataError, JobError
from labelmill.heads.config import HeadConfig
from labelmill.heads.source import open_rows
from labelmill.job import StrictModel, resolved, validate_section
from labelmill.run import Run
from labelmill.stages import Fitted, second_name
from labelmill.tracking.model import check_file, read_spec, write_model
from labelmill.training.config import TrainConfig, TrainJob
from labelmill.workload import workload
from workloads.discrimination.partial_fc import Classifier, input_options
from workloads.unlearning.audit import ask
from workloads.unlearning.model import head_start, package_classes, package_fit, register_version

SLICES = "slices"
"""Folder, and artifact folder of the run, with the model of each shard after each slice: `<shard>-<slice>`."""


class SisaConfig(StrictModel):
    """How samples are dealt."""

    shards: int = Field(4, ge=1, description="S: models; a deleted sample costs the training of one of them")
    slices: int = Field(3, ge=1, description="R: checkpoints of a model; each is kept")


class SisaJob(TrainJob):
    """A classifier of S constituents; `train.epochs` are those of a plain training, each turn takes 2 / (R + 1) of them."""

    workload: Literal["unlearning.sisa"]
    data: DataConfig
    encoder: EncoderConfig
    head: HeadConfig = HeadConfig()
    sisa: SisaConfig = SisaConfig()
    eval_batch: int = Field(1000, ge=1)

    def class_count(self) -> int | None:
        return self.data.open()[0].label.num_classes

    @model_validator(mode="after")
    def _can_be_dealt(self) -> SisaJob:
        if self.train.epochs is None:
            raise ValueError("train.steps: a turn's length depends on its slices; give train.epochs instead")
        if self.data.select or self.data.mix:
            raise ValueError("unlearning.sisa deals one whole set: leave data.select and data.mix out")
        return self


@dataclass(frozen=True)
class Recipe:
    """What constituents are trained with."""

    encoder: Any
    head: HeadConfig
    train: TrainConfig
    sisa: SisaConfig
    seed: int
    job: dict[str, Any]

    @classmethod
    def of(cls, model: Path) -> Recipe:
        """That of a registered model. Raises JobError for one that `unlearning.sisa` didn't make."""
        spec = read_spec(model)
        job = spec.extra.get("job") or {}
        if spec.encoder.get("kind") != "ensemble" or "sisa" not in job:
            raise JobError(
                "method.kind sisa: the model wasn't trained by unlearning.sisa, so there are no slices to go back to."
            )
        head = validate_section(job["head"], HeadConfig, "the model's job: head")
        train = validate_section(job["train"], TrainConfig, "the model's job: train")
        sisa = validate_section(job["sisa"], SisaConfig, "the model's job: sisa")
        encoder: Any = build_encoder(spec.encoder["member"], root=model).config
        return cls(encoder, head, train, sisa, int(job["seed"]), job)

    def ordered(self, stream: StreamSpec) -> StreamSpec:
        """A stream in the order of the first training, whatever job asks."""
        window = self.job["data"]["window"]
        return replace(stream, seed=self.seed, global_batch=self.train.global_batch, window=window)


class Constituent(Classifier):
    """A classifier that goes on from a package's encoder; the rows come with the head's start."""

    def __init__(self, encoder: Any, head: HeadConfig, num_classes: int, seed: int, package: str | None) -> None:
        super().__init__(encoder, head, num_classes, seed)
        if package:
            self.encoder.load_state_dict(load_file(Path(package) / "encoder.safetensors"))


# --- training -----------------------------------------------------------------------------------------------------


def slice_masks(stream: StreamSpec, sisa: SisaConfig, seed: int) -> list[list[list[np.ndarray]]]:
    """[shard][turn] -> the samples of that turn (slices 0 to turn), a bool mask for each data shard."""
    kept, cells = [], []
    for i in range(len(stream.manifest.shards)):
        keys = read_labels(stream.manifest, i).column("key").to_pylist()
        cells.append(fold_of(keys, sisa.shards * sisa.slices, seed))
        kept.append(stream.selection.mask(i) if isinstance(stream.selection, KeepRows) else np.ones(len(keys), bool))
    return [
        [
            [m & (c // sisa.slices == s) & (c % sisa.slices <= turn) for m, c in zip(kept, cells, strict=True)]
            for turn in range(sisa.slices)
        ]
        for s in range(sisa.shards)
    ]


def train_slices(
    run: Run, folder: Path, stream: StreamSpec, recipe: Recipe, kept: Path | None = None, gone: KeepRows | None = None
) -> dict[str, float]:
    """Trains the constituents, in `folder/slices`, and joins them in `folder/model`.

    Args:
        stream: the training samples, those to retain.
        kept: slices of an earlier training, on these samples and those of `gone`; turns without any of `gone` are taken over.

    Returns seconds of training, the same for a training of all turns as far as kept slices tell, and numbers of turns.
    Raises DataError for a shard without samples.
    """
    sisa, folder = recipe.sisa, folder.resolve()
    stream = recipe.ordered(stream)
    masks = slice_masks(stream, sisa, recipe.seed)
    lost = slice_masks(replace(stream, selection=gone), sisa, recipe.seed) if gone else None
    if empty := [s for s, turns in enumerate(masks) if not _any(turns[-1])]:
        left = " left" if gone else ""
        raise DataError(f"shard {empty[0]} of {sisa.shards} has no sample{left}: train with fewer sisa.shards.")
    wanted = [(s, turn) for s in range(sisa.shards) for turn in range(sisa.slices) if _any(masks[s][turn])]
    reused = {
        place
        for place in wanted
        if kept and (kept / _name(place)).is_dir() and not (lost and _any(lost[place[0]][place[1]]))
    }

    def constituent(s: int) -> Fitted:
        """All turns of a shard that are still to be done."""
        before: Path | None = None
        for place in (place for place in wanted if place[0] == s):
            out = folder / SLICES / _name(place)
            if not (out / "model.json").is_file():
                if place in reused:
                    assert kept
                    _take_over(kept / out.name, out)
                else:
                    samples = KeepRows.of(masks[s][place[1]], stream.manifest.digest)
                    _fit(run, folder / "fits" / out.name, out, stream, samples, recipe, s, before)
            before = out
        return Fitted(folder)

    run.fit_each([partial(constituent, s) for s in range(sisa.shards)])
    last = [max(place for place in wanted if place[0] == s) for s in range(sisa.shards)]
    join(folder / "model", [folder / SLICES / _name(place) for place in last], recipe.job)
    seconds = {place: float(read_spec(folder / SLICES / _name(place)).extra["seconds"]) for place in wanted}
    return {
        "seconds": sum(value for place, value in seconds.items() if place not in reused),
        "all_seconds": sum(seconds.values()),
        "trained": len(wanted) - len(reused),
        "of": len(wanted),
    }


def _fit(
    run: Run, work: Path, out: Path, stream: StreamSpec, samples: KeepRows, recipe: Recipe, s: int, before: Path | None
) -> None:
    """One turn: trains a shard's model on its first slices, from where the turn before left it."""
    work.mkdir(parents=True, exist_ok=True)
    sisa, seed = recipe.sisa, 1009 * recipe.seed + s
    assert recipe.train.epochs is not None
    config = recipe.train.model_copy(update={"epochs": recipe.train.epochs * 2 / (sisa.slices + 1)})
    run.progress.line(f"shard {s + 1} of {sisa.shards}: a turn on {samples.samples:,} samples")
    start = {"classes": head_start(before, work)} if before else None
    objective = partial(
        Constituent, recipe.encoder, recipe.head, stream.label.num_classes or 0, seed, str(before) if before else None
    )
    part = replace(stream, selection=samples.save(str(work / "samples.arrow")))
    fitted = run.fit(work, objective, part, config, augment=True, seed=seed, initial=start)
    extra = {"seconds": fitted.seconds.get("train", 0.0)}
    package_fit(out, fitted, stream.manifest, recipe.encoder, recipe.head, extra)


def _any(masks: Sequence[np.ndarray]) -> bool:
    return any(bool(mask.any()) for mask in masks)


def _name(place: tuple[int, int]) -> str:
    return f"{place[0]}-{place[1]}"


def _take_over(source: Path, target: Path) -> None:
    """A kept slice, whose files are what was written, under another name; whole or not at all."""
    spec = read_spec(source)
    for name in spec.files:
        check_file(source, spec, name)
    part = target.with_name(f".{target.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(source, part, copy_function=second_name)
    part.rename(target)


def join(folder: Path, members: Sequence[Path], job: dict[str, Any]) -> Path:
    """One package whose score is the mean of its members' scores (see `encoders.ensemble`); rows page by page."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    spec = read_spec(members[0])
    config = {"kind": "ensemble", "member": spec.encoder, "members": len(members), "normalize": spec.normalized}
    state = {
        f"members.{i}.{name}": value
        for i, member in enumerate(members)
        for name, value in load_file(member / "encoder.safetensors").items()
    }
    sources = [open_rows(member) for member in members]
    for lo, hi in sources[0].pages():
        rows = torch.cat([source.read(lo, hi, ["rows"])["rows"].float() for source in sources], dim=1)
        rows = F.normalize(rows, dim=1) if spec.normalized else rows
        save_file({"rows": rows.contiguous()}, folder / f"rows-{lo:08d}-{hi:08d}.safetensors")
    write_model(
        folder,
        encoder=build_encoder(config, root=members[0]),
        input_kind=spec.input,
        input_shape=spec.shape,
        classes=package_classes(members[0]),
        state=state,
        normalized=spec.normalized,
        scale=spec.scale,
        label_form=spec.label_form,
        manifest_digest=spec.manifest,
        code_version=spec.code_version,
        extra={"job": job},
    )
    return folder


# --- deletion -----------------------------------------------------------------------------------------------------


def forget_slices(
    run: Run, folder: Path, model: Path, retain: StreamSpec, gone: KeepRows | None = None, kept: Path | None = None
) -> tuple[Path, dict[str, float]]:
    """SISA on the retained samples: turns that saw none of `gone` are taken from `kept`; without `kept` all are trained.

    Returns the package folder and what `train_slices` measured.
    """
    measured = train_slices(run, folder, retain, Recipe.of(model), kept, gone)
    return folder / "model", measured


# --- the workload -------------------------------------------------------------------------------------------------


def fit_constituents(
    run: Run,
    folder: Path,
    train: StreamSpec,
    encoder: Any,
    head: HeadConfig,
    config: TrainConfig,
    sisa: SisaConfig,
    seed: int,
    job: dict[str, Any],
) -> dict[str, Any]:
    """Stage: all turns of all shards."""
    measured = train_slices(run, folder, train, Recipe(encoder, head, config, sisa, seed, job))
    return measured | {"package": "model"}


@workload("unlearning.sisa", SisaJob, ("test/top1", "test/constituents", "train/seconds"))
def sisa(job: SisaJob, run: Run) -> None:
    train, test = job.data.open()
    run.track_data(train=train, test=test)
    options = input_options(job.encoder, job.seed)
    fit = run.stage(
        "constituents",
        fit_constituents,
        train=job.data.stream(train, global_batch=job.train.global_batch, **options),
        encoder=job.encoder,
        head=job.head,
        config=job.train,
        sisa=job.sisa,
        seed=job.seed,
        job=resolved(job),
    )
    tested = {"test": job.data.stream(test, global_batch=job.eval_batch, shuffle=False, **options)}
    right = {}
    for name in ("model", *(f"{SLICES}/{s}-{job.sisa.slices - 1}" for s in range(job.sisa.shards))):
        said = ask(run, name.replace("/", "-"), fit, tested, job.train, package=name)
        right[name] = float(said["test"].correct_N.mean())
    whole = right.pop("model")
    run.report.metrics |= {
        "test/top1": whole,
        "test/constituents": float(np.mean(list(right.values()))),
        "train/seconds": fit["seconds"],
    }
    run.tracker.artifact(fit.folder / SLICES, SLICES)
    if job.register_as:
        run.stage("register", register_version, name=job.register_as, made=fit, tags={"workload": job.workload})
