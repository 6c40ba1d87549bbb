"""From a job to its plans: what `labelmill plan` does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import get_args

import torch

from labelmill.encoders import AnyEncoderConfig, build_encoder
from labelmill.errors import JobError
from labelmill.heads.config import HeadConfig
from labelmill.job import Job
from labelmill.planning.advice import Advice, advise, best_layout
from labelmill.planning.estimate import Estimate, Machine, Setup, SheetMachine, change, estimate
from labelmill.planning.probe import probe
from labelmill.planning.spec import LOCAL, Precision, read_spec
from labelmill.planning.trace import trace_encoder
from labelmill.training.config import TrainJob


def plan_job(
    job: Job,
    cluster: str,
    classes: int | None = None,
    workers: int | None = None,
    batch_per_worker: int | None = None,
    head_precision: str | None = None,
) -> tuple[Estimate, list[Advice]]:
    """The plan of a job on a described cluster, or on this machine with `local`, and what to change.

    Args:
        cluster: SPEC of the command line (`labelmill.planning.spec`).
        classes: instead of the job's own number.
        workers: instead of the cluster's, which are the job's if it names none.
        batch_per_worker: samples of a worker and micro batch, instead of the job's global batch.
        head_precision: of the head's products on a described cluster, instead of what `head.matmul` gives.

    Raises JobError for a job without encoder and head, wrong fields of the cluster, or batches that don't divide.
    """
    base, encoder = _setup(job, classes, head_precision)
    if cluster == LOCAL:
        if workers and workers != base.workers:
            raise JobError("--cluster local runs the job's own workers: change cluster.workers with --set.")
        setup = _sized(base, base.workers, batch_per_worker)
        setup.check()
        machine: Machine = probe(setup, encoder, max(1, int(job.cluster.cpus_per_worker)))
    else:
        spec = read_spec(cluster, base.workers)
        setup = _sized(base, workers or spec.workers, batch_per_worker)
        machine = SheetMachine(spec)
    return estimate(setup, machine), advise(setup, machine)


def tabulate(
    job: Job,
    cluster: str,
    classes: Sequence[int],
    workers: Sequence[int],
    batch_per_worker: int | None = None,
    head_precision: str | None = None,
) -> list[Estimate]:
    """Plans for every number of classes and workers, each with the layout that is fastest among those that fit."""
    if cluster == LOCAL:
        raise JobError("--cluster local plans one job as it is; a table is for a described cluster.")
    base, _ = _setup(job, classes[0] if classes else None, head_precision)
    spec = read_spec(cluster, base.workers)
    machine = SheetMachine(spec)
    counts = classes or [base.num_classes]
    plans = []
    for count in counts:
        for number in workers or [spec.workers]:
            setup = _sized(replace(base, num_classes=count), number, batch_per_worker)
            plans.append(estimate(setup, machine) if base.head.shards else best_layout(setup, machine))
    return plans


def _setup(job: Job, classes: int | None, head_precision: str | None) -> tuple[Setup, AnyEncoderConfig]:
    encoder, head = getattr(job, "encoder", None), getattr(job, "head", None)
    if not isinstance(job, TrainJob) or not isinstance(head, HeadConfig) or encoder is None:
        raise JobError(f"plan: a job of workload {job.workload!r} has no sections train, encoder and head to plan for.")
    if head_precision is not None and head_precision not in get_args(Precision):
        raise JobError(f"--head-precision {head_precision!r}: write {', '.join(get_args(Precision))}.")
    count = classes or job.class_count()
    if not count:
        raise JobError("plan: the job doesn't say how many classes there are; give --classes.")
    torch.manual_seed(0)
    cost = trace_encoder(build_encoder(encoder))
    precision: Precision | None = head_precision  # type: ignore[assignment]
    return Setup(cost, head, count, job.train, job.cluster.workers, job.label_count(), precision), encoder


def _sized(setup: Setup, workers: int, batch_per_worker: int | None) -> Setup:
    accumulation = setup.train.accumulation
    batch = batch_per_worker * workers * accumulation if batch_per_worker else setup.train.global_batch
    unit = workers * accumulation
    if batch % unit:
        raise JobError(
            f"train.global_batch {batch} with train.accumulation {accumulation} doesn't divide over {workers} workers; "
            f"give --batch-per-worker, or --set train.global_batch={unit * max(1, batch // unit)}."
        )
    return change(setup, workers=workers, global_batch=batch)
