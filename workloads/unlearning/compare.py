"""Methods of unlearning side by side, on one task, beside retraining, over several seeds.

A classifier is trained, a part of its training set is to be forgotten (a class, a random part, wrongly labelled samples), and
each method makes a model of it that is audited like the original and the retrained one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, model_validator

from labelmill.data.config import DataConfig
from labelmill.data.corrections import relabel
from labelmill.data.keys import key_hashes
from labelmill.data.manifest import Manifest
from labelmill.data.selection import KeepRows
from labelmill.data.shards import read_labels
from labelmill.data.spec import StreamSpec
from labelmill.encoders import EncoderConfig
from labelmill.errors import JobError
from labelmill.evaluation.forgetting import interval
from labelmill.heads.config import HeadConfig
from labelmill.job import StrictModel, resolved
from labelmill.run import Run
from labelmill.stages import Stage
from labelmill.training.config import TrainConfig, TrainJob
from labelmill.workload import workload
from workloads.discrimination.partial_fc import Classifier, input_options
from workloads.unlearning import audit as audits
from workloads.unlearning.audit import AuditSection, answers_of, probe_version
from workloads.unlearning.methods import MethodConfig, Retrain
from workloads.unlearning.model import package_fit
from workloads.unlearning.unlearn import unlearn


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


class CompareJob(TrainJob):
    """`train` is the recipe of the original and of retraining; `budget` what a method has unless it says otherwise."""

    workload: Literal["unlearning.compare"]
    data: DataConfig
    encoder: EncoderConfig
    head: HeadConfig = HeadConfig()
    task: Annotated[ClassTask | RandomTask | NoisyTask, Field(discriminator="kind")]
    samples: int | None = Field(None, ge=100, description="cut the training set to so many, drawn by their keys")
    seeds: tuple[int, ...] = Field((0, 1, 2), min_length=1)
    methods: dict[str, MethodConfig] = Field(min_length=1)
    budget: TrainConfig
    audit: AuditSection = AuditSection()

    def class_count(self) -> int | None:
        return self.data.open()[0].label.num_classes

    @model_validator(mode="after")
    def _names(self) -> CompareJob:
        if taken := {"original", "retrain"} & set(self.methods):
            raise ValueError(f"methods: {sorted(taken)[0]!r} is there in any case")
        if self.data.select or self.data.mix:
            raise ValueError("unlearning.compare takes one whole set: leave data.select and data.mix out (use samples)")
        return self


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


def fit_unlearned(
    run: Run,
    folder: Path,
    original: Stage,
    retain: StreamSpec,
    forget: StreamSpec,
    test: StreamSpec,
    method: Any,
    budget: TrainConfig,
    seed: int,
    classes: tuple[int, ...],
) -> dict[str, Any]:
    """Stage: one method."""
    model = original.folder / "model"
    held_out = None if classes else test
    package, seconds = unlearn(run, folder, model, retain, forget, method, budget, seed, classes, held_out)
    return {"seconds": seconds, "package": str(package.relative_to(folder))}


@workload("unlearning.compare", CompareJob)
def compare(job: CompareJob, run: Run) -> None:
    train, test = job.data.open()
    run.track_data(train=train, test=test)
    found: dict[str, list[dict[str, float]]] = {}
    for seed in job.seeds:
        for name, values in compare_seed(job, run, train, test, seed).items():
            found.setdefault(name, []).append(values)
    report_comparison(run, found)


def compare_seed(job: CompareJob, run: Run, train: Manifest, test: Manifest, seed: int) -> dict[str, dict[str, float]]:
    """Every version's numbers with one seed."""
    masks = run.stage(f"task-s{seed}", prepare, train=train, task=job.task, samples=job.samples, seed=seed)
    data = masks.manifest("train") if masks["relabelled"] else train
    classes = job.task.ids if job.task.kind == "class" else ()
    options = input_options(job.encoder, seed)

    def stream(name: str) -> StreamSpec:
        from labelmill.data.selection import load_selection

        spec = job.data.stream(data, global_batch=job.train.global_batch, **options)
        return replace(spec, selection=load_selection(str(masks.folder / f"{name}.arrow")))

    tested = job.data.stream(test, global_batch=1000, shuffle=False, **options)
    retain, forget = stream("retain"), stream("forget")
    recipe = {name: value for name, value in resolved(job).items() if name in ("encoder", "head", "train")}
    original = run.stage(
        f"original-s{seed}",
        fit_original,
        train=stream("all"),
        encoder=job.encoder,
        head=job.head,
        config=job.train,
        seed=seed,
        job=recipe,
    )
    versions = {"original": original}
    for name, method in {"retrain": Retrain(), **job.methods}.items():
        if not classes and method.kind == "unsir":
            raise JobError(f"methods.{name}: unsir forgets whole classes; this task has none.")
        try:
            versions[name] = run.stage(
                f"{file_name(name)}-s{seed}",
                fit_unlearned,
                original=original,
                retain=retain,
                forget=forget,
                test=audits.part_of(tested, 5000),
                method=method,
                budget=job.budget,
                seed=seed,
                classes=classes,
            )
        except FloatingPointError as error:
            run.progress.line(f"{name}: diverged: {error}")
    sets = {
        "retain": audits.part_of(retain, job.audit.samples),
        "forget": audits.part_of(forget, job.audit.samples),
        "test": audits.part_of(tested, 3 * job.audit.samples),
    }
    said: dict[str, dict[str, Any]] = {}
    for name, version in {**versions, "random": original}.items():
        stage = run.stage(
            f"probe-{file_name(name)}-s{seed}",
            probe_version,
            version=version,
            sets=sets,
            config=job.budget,
            random=name == "random",
        )
        said[name] = {part: answers_of(stage.folder, part) for part in sets}
    count, out = train.label.num_classes or 0, {}
    for name, version in versions.items():
        values = audits.audit(said[name], classes, job.audit, count, said["retrain"], said["random"])
        values["time"] = 100 * version["seconds"] / max(versions["retrain"]["seconds"], 1e-9)
        out[name] = values
    if job.audit.shadows:
        for name, found in shadow_attacks(job, run, stream("all"), sets, said, seed, recipe).items():
            out[name] |= found
    return out | _relearning(job, run, versions, forget, out, seed)


def fit_shadow(
    run: Run,
    folder: Path,
    train: StreamSpec,
    number: int,
    encoder: EncoderConfig,
    head: HeadConfig,
    config: TrainConfig,
    seed: int,
    job: dict[str, Any],
) -> dict[str, Any]:
    """Stage: a model like the original, trained on half of its samples, drawn by their keys."""
    assert isinstance(train.selection, KeepRows)
    folder.mkdir(parents=True, exist_ok=True)
    masks = []
    for i in range(len(train.manifest.shards)):
        keys = read_labels(train.manifest, i).column("key").to_pylist()
        masks.append(train.selection.mask(i) & in_shadow(keys, number, seed))
    half = KeepRows.of(masks, train.manifest.digest).save(str((folder / "half.arrow").resolve()))
    return fit_original(run, folder, replace(train, selection=half), encoder, head, config, seed, job)


def in_shadow(keys: list[str], number: int, seed: int) -> np.ndarray:
    """bool (N,): which samples a shadow model is trained on."""
    return np.array([unit(key, f"shadow|{seed}|{number}") < 0.5 for key in keys])


def shadow_attacks(
    job: CompareJob,
    run: Run,
    train: StreamSpec,
    sets: dict[str, StreamSpec],
    said: Mapping[str, Mapping[str, Any]],
    seed: int,
    recipe: dict[str, Any],
) -> dict[str, dict[str, float]]:
    """Version -> the attack with shadow models."""
    shadows: list[Mapping[str, audits.Said]] = []
    inside: list[np.ndarray] = []
    asked = {name: sets[name] for name in ("forget", "test")}
    for number in range(job.audit.shadows):
        fit = run.stage(
            f"shadow-{number}-s{seed}",
            fit_shadow,
            train=train,
            number=number,
            encoder=job.encoder,
            head=job.head,
            config=job.train,
            seed=seed,
            job=recipe,
        )
        stage = run.stage(f"probe-shadow-{number}-s{seed}", probe_version, version=fit, sets=asked, config=job.budget)
        shadows.append({name: answers_of(stage.folder, name) for name in asked})
        inside.append(in_shadow(shadows[-1]["forget"].keys, number, seed))
    return {name: audits.shadow_attack(found, shadows, inside) for name, found in said.items() if name != "random"}


def _relearning(
    job: CompareJob,
    run: Run,
    versions: Mapping[str, Stage],
    forget: StreamSpec,
    values: dict[str, dict[str, float]],
    seed: int,
) -> dict[str, dict[str, float]]:
    if job.audit.relearn is None:
        return values
    wanted = job.audit.relearn_share * values["original"]["train_f"] / 100
    for name, version in versions.items():
        stage = run.stage(
            f"relearn-{file_name(name)}-s{seed}",
            relearn_version,
            version=version,
            forget=forget,
            config=job.audit.relearn,
            wanted=wanted,
        )
        steps = stage["steps"]
        values[name]["relearn"] = math.nan if steps is None else float(steps)
    return values


def relearn_version(
    run: Run, folder: Path, version: Stage, forget: StreamSpec, config: TrainConfig, wanted: float
) -> dict[str, Any]:
    """Stage: how many steps until what was forgotten is known again."""
    package = version.folder / version.values.get("package", "model")
    return {"steps": audits.relearn(run, folder, package, forget, config, wanted)}


def file_name(name: str) -> str:
    """A version's name as stages and metrics have it."""
    return "".join(c if c.isalnum() else "-" for c in name.lower())


COLUMNS = ("train_r", "train_f", "test_r", "test_f", "gap", "js_to_retrain", "zrf", "relearn", "time")


def report_comparison(run: Run, found: Mapping[str, list[dict[str, float]]]) -> None:
    """Tables of means over the seeds with the half width of the 95 % interval; all single values are metrics."""
    attacks = sorted({k for many in found.values() for k in many[0] if k.startswith("mia_") and not k.endswith("_ci")})

    def cell(values: list[float], digits: int) -> str:
        mean, half = interval(values)
        if math.isnan(mean):
            return "-"
        return f"{mean:.{digits}f}" + ("" if math.isnan(half) else f" ± {half:.{digits}f}")

    for title, columns, caption in (
        ("versions", COLUMNS, "percent, bits, steps; time in percent of retraining; closest to retrain is best"),
        ("membership", attacks, "balanced accuracy (lira: area, rate at 1 %) in percent; compare with retrain"),
    ):
        shown = [c for c in columns if any(not math.isnan(v.get(c, math.nan)) for many in found.values() for v in many)]
        rows = [
            [
                name,
                *(cell([v.get(c, math.nan) for v in many], 3 if c in ("js_to_retrain", "zrf") else 1) for c in shown),
            ]
            for name, many in found.items()
        ]
        run.report.add_table(title, ["version", *shown], rows, caption)
    for name, many in found.items():
        for column in (*COLUMNS, *attacks):
            mean, _ = interval([v.get(column, math.nan) for v in many])
            if not math.isnan(mean):
                run.report.metrics[f"{file_name(name)}/{column}"] = mean
