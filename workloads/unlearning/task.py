"""The task of a comparison: what one seed forgets, and the classifier that is to forget it.

Shape legend: B samples of a shard.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from labelmill.data.corrections import relabel
from labelmill.data.keys import key_hashes
from labelmill.data.manifest import Manifest
from labelmill.data.selection import KeepRows, load_selection
from labelmill.data.shards import read_labels
from labelmill.data.spec import StreamSpec
from labelmill.encoders import EncoderConfig
from labelmill.heads.config import HeadConfig
from labelmill.job import StrictModel, resolved
from labelmill.run import Run
from labelmill.training.config import TrainConfig
from workloads.discrimination.partial_fc import Classifier, input_options
from workloads.unlearning.audit import part_of
from workloads.unlearning.model import package_fit


class ClassTask(StrictModel):
    """Forget all samples of these classes."""

    kind: Literal["class"] = "class"
    ids: tuple[int, ...] = (0,)


class RandomTask(StrictModel):
    """Forget a share of the samples of these classes, drawn by their keys."""

    kind: Literal["random"] = "random"
    ids: tuple[int, ...] = (5, 6, 7, 8, 9)
    rate: float = Field(0.4, gt=0, lt=1)


class NoisyTask(StrictModel):
    """A share of these classes gets a wrong label before the original is trained; forget those samples."""

    kind: Literal["noisy"] = "noisy"
    ids: tuple[int, ...] = (0, 1, 2, 3, 4)
    rate: float = Field(0.6, gt=0, lt=1)


TaskConfig = Annotated[ClassTask | RandomTask | NoisyTask, Field(discriminator="kind")]


@dataclass(frozen=True)
class Task:
    """One seed's streams.

    Attributes:
        classes: forgotten as a whole.
        everything, retain, forget: training streams; `everything` is what the original is trained on.
        held_out: unseen samples that a method may choose by: of `data.dev`, without one of the test set.
        sets: what versions are asked about: `retain`, `forget` and `test`.
        recipe: of the original, as its package keeps it.
    """

    seed: int
    classes: tuple[int, ...]
    everything: StreamSpec
    retain: StreamSpec
    forget: StreamSpec
    held_out: StreamSpec
    sets: Mapping[str, StreamSpec]
    recipe: dict[str, Any]


def task_of(job: Any, run: Run, train: Manifest, test: Manifest, seed: int) -> Task:
    """The task of a comparison's job with one seed."""
    masks = run.stage(f"task-s{seed}", prepare, train=train, task=job.task, samples=job.samples, seed=seed)
    data = masks.manifest("train") if masks["relabelled"] else train
    options = input_options(job.encoder, seed)

    def stream(name: str) -> StreamSpec:
        spec = job.data.stream(data, global_batch=job.train.global_batch, **options)
        return replace(spec, selection=load_selection(str(masks.folder / f"{name}.arrow")))

    def unseen(data: Manifest) -> StreamSpec:
        return job.data.stream(data, global_batch=1000, shuffle=False, **options)

    tested = unseen(test)
    retain, forget, most = stream("retain"), stream("forget"), job.audit.samples
    return Task(
        seed,
        job.task.ids if job.task.kind == "class" else (),
        stream("all"),
        retain,
        forget,
        part_of(unseen(job.data.held_out(test)), 5000),
        {"retain": part_of(retain, most), "forget": part_of(forget, most), "test": part_of(tested, 3 * most)},
        {name: value for name, value in resolved(job).items() if name in ("encoder", "head", "train")},
    )


def unit(key: str, salt: str) -> float:
    """A number in [0, 1) drawn for a key."""
    return float(key_hashes([f"{salt}|{key}"])[0][0]) / 2**64


def prepare(run: Run, folder: Path, train: Manifest, task: Any, samples: int | None, seed: int) -> dict[str, Any]:
    """Stage: masks of all, forgotten and retained samples; for the noisy task the version with wrong labels."""
    keep_all, tables = [], [read_labels(train, i) for i in range(len(train.shards))]
    rank = np.concatenate([key_hashes([f"cut|{k}" for k in t.column("key").to_pylist()])[0] for t in tables])
    limit = np.sort(rank)[min(samples or len(rank), len(rank)) - 1]
    forget, wrong, at = [], dict[str, int](), 0
    num_classes = train.label.num_classes or 0
    for table in tables:
        keys, label_B = table.column("key").to_pylist(), table.column("label").to_numpy()
        inside = rank[at : at + len(keys)] <= limit
        at += len(keys)
        mark = np.isin(label_B, task.ids) & inside
        if task.kind != "class":
            mark &= np.array([unit(key, f"{task.kind}|{seed}") < task.rate for key in keys])
        if task.kind == "noisy":
            for row in np.flatnonzero(mark):
                shift = 1 + int(unit(keys[row], f"label|{seed}") * (num_classes - 1))
                wrong[keys[row]] = (int(label_B[row]) + shift) % num_classes
        keep_all.append(inside)
        forget.append(mark)
    if wrong:
        relabel(train, folder / "train", wrong, overwrite=True)
    KeepRows.of(keep_all).save(str(folder / "all.arrow"))
    KeepRows.of(forget).save(str(folder / "forget.arrow"))
    KeepRows.of([a & ~f for a, f in zip(keep_all, forget, strict=True)]).save(str(folder / "retain.arrow"))
    return {"forget": int(sum(map(np.sum, forget))), "all": int(sum(map(np.sum, keep_all))), "relabelled": bool(wrong)}


def fit_original(
    run: Run,
    folder: Path,
    train: StreamSpec,
    encoder: EncoderConfig,
    head: HeadConfig,
    config: TrainConfig,
    seed: int,
    job: dict[str, Any],
) -> dict[str, Any]:
    """Stage: the classifier that is to forget, as a package."""
    objective = partial(Classifier, encoder, head, train.label.num_classes or 0, seed)
    fitted = run.fit(folder, objective, train, config, augment=True, seed=seed)
    package_fit(folder / "model", fitted, train.manifest, encoder, head, {"job": job})
    return {"seconds": fitted.seconds.get("train", 0.0)}
