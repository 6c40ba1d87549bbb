"""Confident learning: find wrong labels, act on them in a new version of the data, train again, compare with a control.

Northcutt, Jiang, Chuang: Confident Learning (JAIR 2021, arXiv 1911.00068); Northcutt, Athalye, Mueller: Pervasive Label
Errors in Test Sets Destabilize ML Benchmarks (NeurIPS 2021, arXiv 2103.14749).

A K-fold pass gives each training sample a probability from a model that didn't train on it. Thresholds, the joint of given
and true labels and the issues follow from two streamed passes over these. The control removes as many samples at random.

Shape legend: N samples, K classes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, model_validator
from scipy.sparse import csr_array

from labelmill.crossfit import audit_held_out, crossfit
from labelmill.data import corrections
from labelmill.data.choose import drop_keys
from labelmill.data.config import DataConfig
from labelmill.data.manifest import Manifest
from labelmill.data.noise import NoiseConfig
from labelmill.data.selection import load_selection
from labelmill.data.shards import read_labels
from labelmill.data.spec import AnySpec, StreamSpec
from labelmill.encoders import EncoderConfig
from labelmill.evaluation.confident import ABSENT, GuessRule
from labelmill.evaluation.label_filters import (
    FILTERS,
    Filter,
    Score,
    audit_summary,
    find_issues,
    in_sample_warning,
    issue_table,
)
from labelmill.evaluation.noise_rates import calibrated_joint, confident_joint, rounded_joint
from labelmill.heads.config import HeadConfig
from labelmill.job import StrictModel
from labelmill.run import Run
from labelmill.stages import Stage
from labelmill.training.config import TrainConfig, TrainJob
from labelmill.workload import workload
from workloads.discrimination.partial_fc import image_options, input_options
from workloads.noisy.audit_report import report_audit, report_models
from workloads.noisy.audited import add_noise, audited, clean_labels, fit_audited, require_single

Action = Literal["drop", "relabel", "weight"]


class AuditSection(StrictModel):
    """How wrong labels are found."""

    folds: int = Field(5, ge=2, description="models of the out-of-sample pass, each on (folds - 1) / folds of the data")
    filter: Filter = Field("prune_by_noise_rate", description="which samples are acted on")
    score: Score = Field("self_confidence", description="orders the issues, most suspicious first")
    frac_noise: float = Field(1.0, gt=0, le=1, description="share of the estimated noise that the prune filters take")
    rule: GuessRule = Field("library", description="of several confident classes: the library's choice or the paper's")
    keep: int = Field(20, ge=2, description="most probable classes that are kept of a sample; all classes is exact")
    train: TrainConfig | None = Field(None, description="how the models of the pass are trained; default: as `train`")


class ConfidentJob(TrainJob):
    """A training set whose labels aren't trusted, and a test set."""

    workload: Literal["noisy.confident"]
    data: DataConfig
    noise: NoiseConfig | None = Field(None, description="noise added on purpose to both sets, to see what is found")
    encoder: EncoderConfig
    head: HeadConfig = HeadConfig(scale=16.0)
    audit: AuditSection = AuditSection()
    action: Action = Field("drop", description="what is done about the issues, in a new version of the data set")
    issue_weight: float = Field(0.2, gt=0, le=1, description="weight of an issue under action weight")
    compare: bool = Field(True, description="also train on all labels and after random removal of as many samples")
    augment: bool = Field(True, description="the encoder's training augmentation, if it has one")
    eval_batch: int = Field(1024, ge=1)

    def class_count(self) -> int | None:
        return self.data.open()[0].label.num_classes

    @model_validator(mode="after")
    def _whole_set(self) -> ConfidentJob:
        if self.data.select or self.data.mix:
            raise ValueError("noisy.confident audits one whole training set: leave data.select and data.mix out")
        return self


def crossfit_audited(
    run: Run,
    folder: Path,
    train: AnySpec,
    encoder: EncoderConfig,
    head: HeadConfig,
    config: TrainConfig,
    folds: int,
    eval_batch: int,
    seed: int,
    augment: bool,
    k: int,
) -> dict[str, Any]:
    """Stage: out-of-sample probabilities of every training sample."""
    assert train.label.num_classes is not None
    objective = audited(encoder, head, train.label.num_classes, seed, k)
    return crossfit(run, folder, objective, train, config, folds, seed, eval_batch, augment)


def audit(
    run: Run, folder: Path, predictions: Stage, data: Manifest, section: AuditSection, clean: bool
) -> dict[str, Any]:
    """Stage: thresholds, joint, issues. Writes `issues.parquet`, `joint.parquet`, `thresholds.parquet`."""
    assert data.label.num_classes is not None
    facts, keys, thresholds_K = audit_held_out(predictions.folder, predictions["folds"], data.label.num_classes)
    calibrated = calibrated_joint(confident_joint(facts, section.rule), facts.label_counts)
    counts = rounded_joint(calibrated)
    flags = {
        name: find_issues(facts, name, counts, frac_noise=section.frac_noise, rule=section.rule) for name in FILTERS
    }
    extra, quality = dict[str, np.ndarray](), dict[str, dict[str, float]]()
    truth = clean_labels(data) if clean else None
    if truth is not None:
        truth_N = np.array([truth[key] for key in keys.to_pylist()], np.int64)
        wrong_N = truth_N != facts.given_N
        extra["clean"] = truth_N
        for name, mask in flags.items():
            hit = int((mask & wrong_N).sum())
            quality[name] = {"precision": hit / max(1, int(mask.sum())), "recall": hit / max(1, int(wrong_N.sum()))}
        quality["base_rate"] = {"precision": float(wrong_N.mean())}
    pq.write_table(issue_table(facts, keys, flags, section.score, extra), folder / "issues.parquet")
    found: Any = calibrated.tocoo()
    pq.write_table(pa.table({"given": found.row, "true": found.col, "count": found.data}), folder / "joint.parquet")
    pq.write_table(pa.table({"threshold": thresholds_K, "samples": facts.label_counts}), folder / "thresholds.parquet")
    absent = np.flatnonzero(thresholds_K == ABSENT)
    warnings = [*predictions["warnings"]]
    if (warning := in_sample_warning(facts)) is not None:
        warnings.append(warning)
    if len(absent):
        warnings.append(f"{len(absent)} class(es) have no labelled sample and are never guessed, such as {absent[0]}.")
    return {
        "summary": audit_summary(facts, section.rule),
        "quality": quality,
        "warnings": warnings,
        "issues": {name: int(mask.sum()) for name, mask in flags.items()},
    }


def joint_of(stage: Stage, num_classes: int) -> csr_array:
    """The calibrated joint that `audit` wrote."""
    table = pq.read_table(stage.folder / "joint.parquet")
    at = (table["given"].to_numpy(), table["true"].to_numpy())
    return csr_array((table["count"].to_numpy(), at), shape=(num_classes, num_classes))


def issues_of(stage: Stage, by: Filter) -> pa.Table:
    """The issues of one filter, most suspicious first."""
    table = pq.read_table(stage.folder / "issues.parquet")
    return table.filter(table[f"by_{by}"])


def act(
    run: Run, folder: Path, data: Manifest, audit: Stage, by: Filter, action: Action, issue_weight: float
) -> dict[str, Any]:
    """Stage: the new version of the data set, in `data` below the folder."""
    issues = issues_of(audit, by)
    keys = issues["key"].to_pylist()
    origin = {"filter": by, "audit": audit.key}
    out = folder / "data"
    if action == "drop":
        corrections.drop(data, out, keys, origin, overwrite=True)
    elif action == "relabel":
        new = dict(zip(keys, issues["suggested"].to_pylist(), strict=True))
        corrections.relabel(data, out, new, origin, overwrite=True)
    else:
        corrections.weight(data, out, dict.fromkeys(keys, issue_weight), origin, overwrite=True)
    return {"samples": len(keys)}


def at_random(run: Run, folder: Path, data: Manifest, number: int, seed: int) -> dict[str, Any]:
    """Stage: the control: a selection without `number` samples, drawn by a hash of their keys."""
    keys = [key for i in range(len(data.shards)) for key in read_labels(data, i).column("key").to_pylist()]
    order = sorted(keys, key=lambda key: hashlib.blake2b(f"{seed}|{key}".encode(), digest_size=8).digest())
    drop_keys(data, order[:number]).save(str(folder / "selection.arrow"))
    return {}


def wrong_ones(run: Run, folder: Path, data: Manifest) -> dict[str, Any]:
    """Stage: the upper bound, where noise was added on purpose: a selection without the labels that are really wrong."""
    truth = clean_labels(data)
    assert truth is not None
    tables = (read_labels(data, i) for i in range(len(data.shards)))
    wrong = [
        key
        for table in tables
        for key, label in zip(table.column("key").to_pylist(), table.column("label").to_pylist(), strict=True)
        if truth[key] != label
    ]
    drop_keys(data, wrong).save(str(folder / "selection.arrow"))
    return {}


def selected(stream: AnySpec, stage: Stage) -> AnySpec:
    """A stream of the rows of the selection that a stage saved."""
    assert isinstance(stream, StreamSpec)
    path = str(stage.folder / "selection.arrow")
    return replace(stream, selection=load_selection(path, load_selection(path).digest))


@workload("noisy.confident", ConfidentJob)
def confident(job: ConfidentJob, run: Run) -> None:
    train, test = job.data.open()
    require_single(train, job.workload)
    options = input_options(job.encoder, job.seed)
    given = {"train": train, "test": test}
    if job.noise:
        noisy = run.stage(
            "noise",
            add_noise,
            train=train,
            test=test,
            noise=job.noise,
            field=job.encoder.field,
            image=image_options(job.encoder),
        )
        given = {name: noisy.manifest(name) for name in given}
    data, num_classes = given["train"], train.label.num_classes
    assert num_classes is not None
    stream = partial(
        job.data.training_stream, folder=run.folder / "data", global_batch=job.train.global_batch, **options
    )
    run.track_data(train=data, test=test)
    k = min(job.audit.keep, num_classes)
    predictions = run.stage(
        "crossfit",
        crossfit_audited,
        train=stream(manifest=data),
        encoder=job.encoder,
        head=job.head,
        config=job.audit.train or job.train,
        folds=job.audit.folds,
        eval_batch=job.eval_batch,
        seed=job.seed,
        augment=job.augment,
        k=k,
    )
    found = run.stage(
        "audit", audit, predictions=predictions, data=data, section=job.audit, clean=job.noise is not None
    )
    acted = run.stage(
        "act", act, data=data, audit=found, by=job.audit.filter, action=job.action, issue_weight=job.issue_weight
    )
    cleaned = acted.manifest("data")
    run.track_data(cleaned=cleaned)

    fit = partial(
        run.stage,
        predict={"test": job.data.stream(test, global_batch=job.eval_batch, shuffle=False, **options)},
        encoder=job.encoder,
        head=job.head,
        config=job.train,
        seed=job.seed,
        augment=job.augment,
        k=k,
    )
    fits = {"cleaned": fit("fit-cleaned", fit_audited, train=stream(manifest=cleaned))}
    if job.compare:
        fits |= fit_controls(job, run, data, acted["samples"], stream, fit)
    report_audit(
        run,
        found,
        data,
        joint_of(found, num_classes),
        issues_of(found, job.audit.filter),
        job.audit.filter,
        job.encoder.field,
        image_options(job.encoder),
    )
    report_models(run, fits, test, given["test"] if job.noise else None)
    if job.register_as:
        run.register(job.register_as, fits["cleaned"], encoder=job.encoder, head=job.head, data=train)


def fit_controls(
    job: ConfidentJob,
    run: Run,
    data: Manifest,
    number: int,
    stream: Callable[..., AnySpec],
    fit: Callable[..., Stage],
) -> dict[str, Stage]:
    """What cleaning is compared with: all labels as given, as many removed at random, and all wrong ones removed."""
    fits = {"all labels": fit("fit-all", fit_audited, train=stream(manifest=data))}
    if number:
        drawn = run.stage("random", at_random, data=data, number=number, seed=job.seed)
        fits["random removal"] = fit("fit-random", fit_audited, train=selected(stream(manifest=data), drawn))
    if job.noise:
        wrong = run.stage("wrong", wrong_ones, data=data)
        fits["oracle removal"] = fit("fit-oracle", fit_audited, train=selected(stream(manifest=data), wrong))
    return fits
