"""Does correcting the test labels change which model is best? Registered models on original and on corrected labels.

Northcutt, Athalye, Mueller: Pervasive Label Errors in Test Sets Destabilize ML Benchmarks (NeurIPS 2021 Datasets and
Benchmarks, arXiv 2103.14749), section 5.

With B the test rows whose label stays and C those whose label was corrected, a model's expected accuracy at a share nu of
corrected rows is (1 - nu) acc_B + nu acc_C. So two models swap at nu* = dB / (dB + dC), without a simulation.

Shape legend: N test rows.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, model_validator

from labelmill.data import store
from labelmill.data.manifest import Manifest, load_manifest
from labelmill.data.noise import NoiseConfig, write_noisy_version
from labelmill.data.tables import read_table
from labelmill.errors import DataError, JobError
from labelmill.evaluation.groups import wilson_interval
from labelmill.evaluation.reranking import (
    CorrectedAccuracy,
    Votes,
    corrected_accuracy,
    decide_votes,
    simulate_prevalence,
)
from labelmill.job import Job
from labelmill.run import Run
from labelmill.serving.batch import make_task, predict_shard, predict_shards
from labelmill.serving.package import fetch_package
from labelmill.tracking import figures
from labelmill.tracking.model import load_model, read_spec
from labelmill.workload import workload
from workloads.noisy.audit_report import report_ranking
from workloads.noisy.audited import clean_labels, labels_by_key, require_single

SIMULATED = 6  # prevalences
SEEDS = 20


class RerankingJob(Job):
    """Registered models, a test set with the labels as given, and where its corrected labels are."""

    workload: Literal["noisy.reranking"]
    models: tuple[str, ...] = Field(min_length=2, description="registered models: NAME, NAME@alias or NAME/version")
    test: str = Field(min_length=1, description="folder or URI of the test set with the labels as given")
    corrected: str | None = Field(
        None, min_length=1, description="a version of it with corrected labels; rows that it lacks are left out"
    )
    votes: str | None = Field(
        None, min_length=1, description="JSON: key -> answer (given, guessed, both, neither) -> votes of people"
    )
    guesses: str | None = Field(
        None, min_length=1, description="table with the columns key, suggested: what `guessed` meant (issues.parquet)"
    )
    majority: int = Field(3, ge=1, description="equal answers that decide")
    noise: NoiseConfig | None = Field(
        None, description="noise added on purpose: the clean labels are the corrected ones"
    )
    field: str | None = Field(None, description="field of the test set that the models read; empty: the one that fits")
    max_bad_samples: int = Field(0, ge=0, description="samples that may be unusable; they are left out")

    @model_validator(mode="after")
    def _one_source(self) -> RerankingJob:
        if self.corrected and self.votes:
            raise ValueError("corrected labels come from `corrected` or from `votes`, not from both")
        if bool(self.votes) != bool(self.guesses):
            raise ValueError("votes and guesses go together: what people voted on, and what the guessed label was")
        if self.noise and (self.corrected or self.votes):
            raise ValueError("noise: labels changed on purpose have their corrections; leave corrected and votes out")
        if self.noise and self.noise.kind == "instance":
            raise ValueError(
                "noise.kind instance takes images decoded for an encoder: name a noisy version as test instead"
            )
        if len(set(self.models)) < len(self.models):
            raise ValueError("models: a model is listed twice")
        return self


def noisy_test(run: Run, folder: Path, test: Manifest, noise: NoiseConfig) -> dict[str, Any]:
    """Stage: a noisy version of the test set, in `test` below the folder; the clean labels lie beside it."""
    made = write_noisy_version(test, folder / "test", noise, overwrite=True)
    return {"changed": int(made.created_by["changed"])}


def predict_model(
    run: Run, folder: Path, model: str, data: Manifest, field: str | None, max_bad: int
) -> dict[str, Any]:
    """Stage: the best class of every sample, in one Parquet file a shard."""
    job, out = run.job, str(folder / "predictions")
    task = make_task(job.tracking, job.output, model, data, out, 1, field, max_bad)
    if job.cluster.in_process:
        predictor = load_model(fetch_package(job.tracking, job.output, model)[1])
        for shard in range(len(data.shards)):
            predict_shard(predictor, task, shard)
            run.progress.update(shard + 1, len(data.shards))
    else:
        predict_shards(task, job.tracking, job.output, job.cluster, run.progress.update, overwrite=True)
    return {"parts": [Path(task.part(shard)).name for shard in range(len(data.shards))]}


def corrected_labels(job: RerankingJob, test: Manifest) -> tuple[dict[str, int], Counter[str]]:
    """(corrected label of the samples whose right label is agreed on, how many samples have which verdict).

    Raises DataError for keys that the test set doesn't have, a sample without a guess, or no corrected labels at all.
    """
    given = labels_by_key(test)
    if job.votes:
        verdicts = decide_votes(read_votes(job.votes), given, job.majority)
        guesses = read_table(str(job.guesses), ["key", "suggested"])
        guess = dict(zip(guesses["key"].to_pylist(), guesses["suggested"].to_pylist(), strict=True))
        corrected, classes = dict(given), test.label.num_classes or 0
        for key, verdict in verdicts.items():
            if verdict == "correctable":
                if key not in guess:
                    raise DataError(
                        f"{job.guesses}: no suggested label for sample {key!r}, whose label was voted wrong."
                    )
                if not (str(guess[key]).isdigit() and int(guess[key]) < classes):
                    raise DataError(
                        f"{job.guesses}: sample {key!r}: {guess[key]!r} is no class; they are 0 ... {classes - 1}."
                    )
                corrected[key] = int(guess[key])
            elif verdict != "given":
                del corrected[key]
        return corrected, Counter(verdicts.values())
    truth: Mapping[str, int] | None = (
        labels_by_key(load_manifest(job.corrected)) if job.corrected else clean_labels(test)
    )
    if truth is None:
        raise JobError(
            "corrected: where are the corrected labels? Name a version of the test set, or votes and guesses."
        )
    if unknown := next((key for key in truth if key not in given), None):
        raise DataError(f"{job.corrected}: sample {unknown!r} isn't in the test set {job.test}.")
    changed = sum(given[key] != label for key, label in truth.items())
    return dict(truth), Counter(
        {"correctable": changed, "given": len(truth) - changed, "left out": len(given) - len(truth)}
    )


def read_votes(place: str) -> Votes:
    """Votes by key and answer. Raises DataError for a file that isn't JSON of that shape."""
    try:
        content = json.loads(store.read_bytes(place).to_pybytes())
        return {str(key): {str(a): int(n) for a, n in answers.items()} for key, answers in content.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise DataError(f"{place}: no votes of the form {{key: {{answer: number}}}}: {error}") from None


def predictions_of(folder: Path, parts: list[str]) -> dict[str, int]:
    """Key -> predicted class of the usable samples."""
    table = pa.concat_tables(
        [pq.read_table(folder / "predictions" / part, columns=["key", "class_id"]) for part in parts]
    )
    found = zip(table["key"].to_pylist(), table["class_id"].to_pylist(), strict=True)
    return {key: ids[0] for key, ids in found if ids}


@workload("noisy.reranking", RerankingJob)
def reranking(job: RerankingJob, run: Run) -> None:
    test = load_manifest(job.test)
    require_single(test, job.workload)
    if job.noise:
        test = run.stage("noise", noisy_test, test=test, noise=job.noise).manifest("test")
    corrected, verdicts = corrected_labels(job, test)
    given = labels_by_key(test)
    run.track_data(test=test)
    found: dict[str, dict[str, int]] = {}
    for ref in job.models:
        version, package = fetch_package(job.tracking, job.output, ref)
        pinned, spec = f"{version.name}/{version.version}", read_spec(package)
        if spec.num_classes != test.label.num_classes:
            raise JobError(f"models: {pinned} has {spec.num_classes} classes, the test set {test.label.num_classes}.")
        done = run.stage(
            f"predict-{version.name}-{version.version}",
            predict_model,
            model=pinned,
            data=test,
            field=job.field,
            max_bad=job.max_bad_samples,
        )
        found[pinned] = predictions_of(done.folder, done["parts"])
    # a sample that one of them can't use counts for none
    keys = [key for key in corrected if all(key in predicted for predicted in found.values())]
    given_N, corrected_N = (np.array([labels[key] for key in keys]) for labels in (given, corrected))
    predicted = {name: np.array([by_key[key] for key in keys]) for name, by_key in found.items()}
    run.report.add_table(
        "test labels", ["verdict", "samples"], [[k, n] for k, n in verdicts.items()], "what became of the given labels"
    )
    compared = {name: corrected_accuracy(predicted_N, given_N, corrected_N) for name, predicted_N in predicted.items()}
    report_accuracies(run, compared, len(keys))
    swaps = report_ranking(run, compared)
    report_prevalence(run, compared, swaps, predicted, given_N, corrected_N)


def report_accuracies(run: Run, compared: Mapping[str, CorrectedAccuracy], rows: int) -> None:
    """Both accuracies of every model with the interval of the test sample, and the metrics."""
    table = []
    ranks = [
        {name: 1 + rank for rank, name in enumerate(sorted(compared, key=lambda n: -getattr(compared[n], by)))}
        for by in ("original", "corrected")
    ]
    for name, accuracy in compared.items():
        cells: list[Any] = [name]
        for by, rank in zip(("original", "corrected"), ranks, strict=True):
            value = getattr(accuracy, by)
            low, high = wilson_interval(round(value * rows), rows)
            cells += [f"{100 * value:.2f} ± {50 * (high - low):.2f}", rank[name]]
            run.report.metrics[f"{by}/{name}"] = value
        for part in ("benign", "original_errors", "corrected_errors"):
            run.report.metrics[f"{part}/{name}"] = getattr(accuracy, part)
        table.append(cells)
    columns = ["model", "by given labels %", "rank", "by corrected labels %", "rank"]
    run.report.add_table("accuracy", columns, table, "the interval is that of the test sample")


def report_prevalence(
    run: Run,
    compared: Mapping[str, CorrectedAccuracy],
    swaps: list[tuple[str, str, float]],
    predicted: Mapping[str, np.ndarray],
    given_N: np.ndarray,
    corrected_N: np.ndarray,
) -> None:
    """Accuracy on corrected labels against the share of formerly wrong rows: closed form as lines, simulated as a table."""
    now = float((given_N != corrected_N).mean())
    highest = max([2 * now, *(1.5 * nu for _, _, nu in swaps)])
    grid = np.linspace(now, min(0.9, max(highest, now + 0.05)), SIMULATED)
    curves = {
        name: ([100 * float(nu) for nu in (0.0, *grid)], [100 * accuracy.at(nu) for nu in (0.0, *grid)])
        for name, accuracy in compared.items()
    }
    figures.lines(
        curves, "wrong rows in the test set (%)", "accuracy on corrected labels (%)", run.figure("prevalence")
    )
    rows, furthest = [], 0.0
    for nu in grid:
        cells: list[Any] = [f"{100 * nu:.1f}"]
        for name, accuracy in compared.items():
            seeds = [simulate_prevalence(predicted[name], given_N, corrected_N, float(nu), s) for s in range(SEEDS)]
            furthest = max(furthest, abs(float(np.mean(seeds)) - accuracy.at(float(nu))))
            cells.append(f"{100 * accuracy.at(nu):.2f} ({100 * np.mean(seeds):.2f} ± {100 * np.std(seeds):.2f})")
        rows.append(cells)
    run.report.metrics |= {"prevalence": now, "simulation_off": furthest}
    run.report.metrics |= {f"swap/{a} -> {b}": nu for a, b, nu in swaps}
    run.report.add_table(
        "prevalence", ["wrong rows %", *compared], rows,
        f"accuracy on corrected labels, percent: closed form (mean and deviation of {SEEDS} simulations)",
    )  # fmt: skip
