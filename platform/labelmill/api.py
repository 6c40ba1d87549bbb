"""The verbs of the command line as Python functions.

from labelmill import api

report = api.run("workloads/discrimination/jobs/spelling-small.yaml", overrides=["train.steps=50"])
print(report.metrics)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from labelmill.job import Job, TrackingConfig, read_job_file, resolved
from labelmill.workload import card, find_workload, load_job, workload_names

if TYPE_CHECKING:
    import pandas as pd
    from rich.console import Console

    from labelmill.planning.advice import Advice
    from labelmill.planning.estimate import Estimate
    from labelmill.tracking.report import Report

__all__ = [
    "card",
    "check",
    "plan",
    "plan_table",
    "predict",
    "predict_data",
    "promote",
    "resolved",
    "run",
    "schema",
    "serve",
    "tune",
    "workload_names",
]


def check(job_file: str | Path, overrides: Sequence[str] = ()) -> Job:
    """The validated job, its search section included. Raises JobError that names every wrong field."""
    method, job = load_job(job_file, list(overrides))
    if job.search is not None:
        from labelmill.tuning.check import check_search

        check_search(job, read_job_file(job_file, list(overrides)), method, str(job_file))
    return job


def run(
    job_file: str | Path,
    overrides: Sequence[str] = (),
    fresh: bool = False,
    console: Console | None = None,
    profile: bool = False,
) -> Report:
    """Runs a job file to its report; stages that finished before are kept unless `fresh`.

    `profile` records a Chrome trace of a few training steps of every worker; it changes nothing else.

    Raises UserError kinds for what the caller can mend.
    """
    from labelmill.cluster import set_environment

    set_environment()
    method, job = load_job(job_file, list(overrides))
    from labelmill.execution import execute

    return execute(job, method.run, fresh=fresh, console=console, profile=profile)


def tune(
    job_file: str | Path,
    overrides: Sequence[str] = (),
    fresh: bool = False,
    console: Console | None = None,
) -> Report:
    """Searches over settings as the job's `search` section says; an interrupted search continues unless `fresh`.

    Raises UserError kinds for what the caller can mend.
    """
    from labelmill.cluster import set_environment

    set_environment()
    from labelmill.tuning.search import run_search

    return run_search(job_file, list(overrides), fresh=fresh, console=console)


def schema(workload: str) -> dict[str, Any]:
    """JSON schema of a workload's job file."""
    return find_workload(workload).job_type.model_json_schema()


def plan(
    job_file: str | Path,
    cluster: str,
    overrides: Sequence[str] = (),
    classes: int | None = None,
    workers: int | None = None,
    batch_per_worker: int | None = None,
    head_precision: str | None = None,
) -> tuple[Estimate, list[Advice]]:
    """What a job needs on a cluster (a SPEC as on the command line, or `local`), and what to change."""
    from labelmill.planning.command import plan_job

    job = check(job_file, overrides)
    return plan_job(job, cluster, classes, workers, batch_per_worker, head_precision)


def plan_table(
    job_file: str | Path,
    cluster: str,
    classes: Sequence[int] = (),
    workers: Sequence[int] = (),
    overrides: Sequence[str] = (),
    batch_per_worker: int | None = None,
    head_precision: str | None = None,
) -> list[Estimate]:
    """The plan for every number of classes and workers, each with its fastest layout that fits."""
    from labelmill.planning.command import tabulate

    return tabulate(check(job_file, overrides), cluster, classes, workers, batch_per_worker, head_precision)


def predict(
    model: str, inputs: Any, k: int = 5, output: str | Path = "runs", tracking: TrackingConfig | None = None
) -> pd.DataFrame:
    """Ranked classes from a registered model: `NAME`, `NAME@alias` or `NAME/version`."""
    from labelmill.tracking import registry

    return registry.predict(tracking or TrackingConfig(), Path(output), model, inputs, k)


def predict_data(
    model: str,
    data: str | Path,
    out: str | Path,
    k: int = 5,
    field: str | None = None,
    max_bad: int = 0,
    cluster: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    output: str | Path = "runs",
    tracking: TrackingConfig | None = None,
    progress: Callable[[float, float, float, str], None] = lambda *_: None,
) -> dict[str, Any]:
    """Predicts a data set on Ray into one Parquet file a shard below `out`; the same call finishes what was killed.

    `cluster` holds fields of a job's cluster section. Returns the content of `predictions.json`.
    """
    from labelmill.data.manifest import load_manifest
    from labelmill.job import ClusterConfig, validate_section
    from labelmill.serving import batch

    section = validate_section(cluster or {}, ClusterConfig, "cluster")
    config = tracking or TrackingConfig()
    task = batch.make_task(config, output, model, load_manifest(data), str(out), k, field, max_bad)
    return batch.predict_shards(task, config, output, section, progress, overwrite)


@contextmanager
def serve(
    model: str,
    host: str = "127.0.0.1",
    port: int = 8000,
    cluster: Mapping[str, Any] | None = None,
    max_batch: int = 32,
    output: str | Path = "runs",
    tracking: TrackingConfig | None = None,
) -> Iterator[tuple[str, str]]:
    """Serves a registered model on Ray Serve for the length of the block: gives (address, `NAME/VERSION`).

    `cluster` holds fields of a job's cluster section; its workers are replicas.
    """
    from labelmill.cluster import set_environment
    from labelmill.job import ClusterConfig, validate_section
    from labelmill.tracking import registry

    set_environment()
    from labelmill.serving.http import ServeConfig, serving

    section = validate_section(cluster or {}, ClusterConfig, "cluster")
    config = tracking or TrackingConfig()
    version = registry.usable(registry.resolve(config, output, model))
    pinned = f"{version.name}/{version.version}"
    asked = ServeConfig(pinned, str(output), config, host, port, section, max_batch)
    with serving(asked) as url:
        yield url, pinned


def promote(
    name: str, version: str = "candidate", output: str | Path = "runs", tracking: TrackingConfig | None = None
) -> str:
    """Moves alias `champion` to a version (number or alias); the former champion stays under `previous`."""
    from labelmill.tracking import registry

    return registry.promote(tracking or TrackingConfig(), Path(output), name, version)
