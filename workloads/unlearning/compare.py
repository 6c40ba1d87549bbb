"""Methods of unlearning side by side, on one task, beside retraining, over several seeds.

A classifier is trained, a part of its training set is to be forgotten (a class, a random part, wrongly labelled samples), and
each method makes a model of it that is audited like the original and the retrained one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from labelmill.data.config import DataConfig
from labelmill.data.manifest import Manifest
from labelmill.data.spec import StreamSpec
from labelmill.encoders import EncoderConfig
from labelmill.errors import JobError
from labelmill.evaluation.forgetting import interval
from labelmill.heads.config import HeadConfig
from labelmill.run import Run
from labelmill.stages import Stage
from labelmill.training.config import TrainConfig, TrainJob
from labelmill.workload import workload
from workloads.unlearning import audit as audits
from workloads.unlearning.audit import AuditSection
from workloads.unlearning.methods import MethodConfig, Retrain
from workloads.unlearning.shadows import ShadowPart, shadow_attacks, train_shadow
from workloads.unlearning.task import TaskConfig, fit_original, task_of
from workloads.unlearning.unlearn import unlearn


class CompareJob(TrainJob):
    """`train` is the recipe of the original and of retraining; `budget` what a method has unless it says otherwise."""

    workload: Literal["unlearning.compare"]
    data: DataConfig
    encoder: EncoderConfig
    head: HeadConfig = HeadConfig()
    task: TaskConfig
    samples: int | None = Field(None, ge=100, description="cut the training set to so many, drawn by their keys")
    seeds: tuple[int, ...] = Field((0, 1, 2), min_length=1)
    methods: dict[str, MethodConfig] = Field(min_length=1)
    budget: TrainConfig
    audit: AuditSection = AuditSection()
    shadow: ShadowPart | None = Field(
        None, description="train this shadow model alone: what the trials of the audit do"
    )

    def class_count(self) -> int | None:
        return self.data.open()[0].label.num_classes

    @model_validator(mode="after")
    def _names(self) -> CompareJob:
        if taken := {"original", "retrain"} & set(self.methods):
            raise ValueError(f"methods: {sorted(taken)[0]!r} is there in any case")
        if self.data.select or self.data.mix:
            raise ValueError("unlearning.compare takes one whole set: leave data.select and data.mix out (use samples)")
        return self


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
    if job.shadow is not None:
        train_shadow(job.shadow.number, job, run, task_of(job, run, train, test, job.shadow.seed))
        return
    for seed in job.seeds:
        for name, values in compare_seed(job, run, train, test, seed).items():
            found.setdefault(name, []).append(values)
    report_comparison(run, found)


def compare_seed(job: CompareJob, run: Run, train: Manifest, test: Manifest, seed: int) -> dict[str, dict[str, float]]:
    """Every version's numbers with one seed."""
    task = task_of(job, run, train, test, seed)
    classes, retain, forget, sets, recipe = task.classes, task.retain, task.forget, task.sets, task.recipe
    original = run.stage(
        f"original-s{seed}",
        fit_original,
        train=task.everything,
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
                f"{audits.file_name(name)}-s{seed}",
                fit_unlearned,
                original=original,
                retain=retain,
                forget=forget,
                test=task.held_out,
                method=method,
                budget=job.budget,
                seed=seed,
                classes=classes,
            )
        except FloatingPointError as error:
            run.progress.line(f"{name}: diverged: {error}")
    said = audits.ask_all(run, versions, sets, job.budget, f"-s{seed}")
    count, out = train.label.num_classes or 0, {}
    for name, version in versions.items():
        values = audits.audit(said[name], classes, job.audit, count, said["retrain"], said["random"])
        values["time"] = 100 * version["seconds"] / max(versions["retrain"]["seconds"], 1e-9)
        out[name] = values
    if job.audit.shadows:
        for name, found in shadow_attacks(job, run, task, said).items():
            out[name] |= found
    for name, steps in audits.relearning(
        run, job.audit, versions, forget, out["original"]["train_f"], f"-s{seed}"
    ).items():
        out[name]["relearn"] = steps
    return out


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
                run.report.metrics[f"{audits.file_name(name)}/{column}"] = mean
