"""What can be wrong with a search, said before any worker starts."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from labelmill.errors import JobError, did_you_mean
from labelmill.job import Job, models_in, validate_job
from labelmill.search_config import SearchConfig
from labelmill.training.config import TrainJob
from labelmill.tuning.space import draw, with_values
from labelmill.workload import ENGINE_METRICS, Workload

_NOT_SEARCHED = {
    "workload": "a search compares settings of one workload",
    "name": "trials are named after the job",
    "output": "trials are kept in the folder of the search",
    "cluster": "it says where trials run, not what they compute",
    "tracking": "all trials report to one place",
    "register_as": "the best trial is registered when the search has ended",
    "search": "a search doesn't search itself",
}
_DRAWS = 64


def check_search(job: Job, raw: Mapping[str, Any], method: Workload, source: str) -> SearchConfig:
    """The job's search section, once it is sure that its trials can run.

    Raises JobError for a field the job doesn't have, a value it refuses, a metric nobody reports, and a scheduler that
    the metric or a field doesn't go with; each with what to write instead.
    """
    search = job.search
    if search is None:
        raise JobError(
            f"{source}: there is no search section. Write at least `search: {{space: {{train.learning_rate: {{kind: "
            "log_uniform, low: 0.0001, high: 0.1}}, metric: train/loss, goal: min, trials: 10}`."
        )
    for path in search.space:
        if reason := _NOT_SEARCHED.get(path.split(".")[0]):
            raise JobError(f"{source}: search.space.{path}: can't be searched: {reason}.")
    _check_metric(search, job, method, source)
    if search.scheduler.kind == "pbt":
        _check_changeable(search, method.job_type, source)
    _check_scheduler_steps(search, job, source)
    _check_values(search, raw, method, source)
    return search


# --- values ---------------------------------------------------------------------------------------------


def _refusal(raw: Mapping[str, Any], values: Mapping[str, Any], method: Workload, source: str) -> str:
    """Why the job refuses these values; empty if it doesn't."""
    try:
        validate_job(with_values(raw, values), method.job_type, source)
    except JobError as error:
        return str(error).removeprefix(f"{source}: ")
    return ""


def _check_values(search: SearchConfig, raw: Mapping[str, Any], method: Workload, source: str) -> None:
    for path, space in search.space.items():
        for value in space.probes():
            # alone first, so that the message is about this field; some values only fit together with others
            if (refusal := _refusal(raw, {path: value}, method, source)) and (
                len(search.space) == 1 or not _fits_with_others(search, raw, method, source, path, value)
            ):
                raise JobError(
                    f"{source}: search.space.{path}: the job refuses {value!r}: {refusal}. Take it out of the space."
                )
    combinations = list(search.grid()) if search.searcher.kind == "grid" else _draws(search)
    refused = [(values, why) for values in combinations if (why := _refusal(raw, values, method, source))]
    # a grid is known; of draws some may be refused, they are failed trials then
    if refused and (search.searcher.kind == "grid" or len(refused) > len(combinations) / 4):
        values, why = refused[0]
        told = ", ".join(f"{path}={value!r}" for path, value in values.items())
        raise JobError(
            f"{source}: search.space: the job refuses {len(refused)} of {len(combinations)} combinations, for example "
            f"{told}: {why}. Narrow the ranges, or search such fields together as a list of sections."
        )


def _fits_with_others(
    search: SearchConfig, raw: Mapping[str, Any], method: Workload, source: str, path: str, value: Any
) -> bool:
    return any(not _refusal(raw, {**values, path: value}, method, source) for values in _draws(search))


def _draws(search: SearchConfig) -> list[dict[str, Any]]:
    rng = random.Random(search.seed)
    return [{path: draw(space, rng) for path, space in search.space.items()} for _ in range(_DRAWS)]


# --- metric and scheduler -------------------------------------------------------------------------------


def tuned_on_test(search: SearchConfig) -> str:
    """What is wrong with a search that goes by a metric of the test set; empty for other metrics."""
    if not search.metric.startswith("test/"):
        return ""
    return (
        f"{search.metric} is measured on data.test. A search that goes by it chooses what fits that set, which then no "
        "longer says how good the model is on new data."
    )


def _check_metric(search: SearchConfig, job: Job, method: Workload, source: str) -> None:
    if search.metric.startswith("test/"):
        held_out = sorted(name for name in method.training_metrics if name.startswith("eval/"))
        if held_out:
            raise JobError(
                f"{source}: search.metric: {tuned_on_test(search)} Take {' or '.join(held_out)}, which is measured on a "
                "held-out part of the training data."
            )
    train = getattr(job, "train", None)
    while_training = {*ENGINE_METRICS, *method.training_metrics} if isinstance(job, TrainJob) else set()
    known = while_training | set(method.metrics)
    if search.metric not in known and method.metrics:
        raise JobError(
            f"{source}: search.metric: {method.name} reports no {search.metric!r}.{did_you_mean(search.metric, known)}"
        )
    if search.metric == "train/grad_norm" and train is not None and train.max_grad_norm is None:
        raise JobError(f"{source}: search.metric: train/grad_norm is reported only with train.max_grad_norm.")
    needs_evaluation = search.metric.startswith("eval/")
    if needs_evaluation and not search.pauses and train is not None and not train.evaluate_every:
        raise JobError(
            f"{source}: search.metric: {search.metric} is reported while training only; set train.evaluate_every to "
            "the optimizer steps between two evaluations."
        )
    if search.scheduler.kind != "none" and search.metric not in while_training:
        names = ", ".join(sorted(while_training)) or "none of this workload"
        raise JobError(
            f"{source}: search.metric: {search.scheduler.kind} compares trials while they train, and {search.metric!r} is "
            f"known only at the end. Take one that is reported on the way ({names}), or scheduler: none."
        )


def _check_scheduler_steps(search: SearchConfig, job: Job, source: str) -> None:
    first = getattr(search.scheduler, "grace_steps", 0) or search.report_steps
    steps = getattr(getattr(job, "train", None), "steps", None)
    if search.scheduler.kind != "none" and steps is not None and first >= steps:
        field = next(
            name for name in ("grace_steps", "first_steps", "interval_steps") if hasattr(search.scheduler, name)
        )
        raise JobError(
            f"{source}: search.scheduler.{field}: {first} steps, but a trial trains {steps} (train.steps); no trial would "
            f"ever be compared. Write a tenth of it, {max(1, steps // 10)}."
        )
    if search.scheduler.kind == "hyperband" and steps is None:
        raise JobError(
            f"{source}: search.scheduler: hyperband plans with the steps of a trial; give train.steps instead of train.epochs."
        )


def _check_changeable(search: SearchConfig, job_type: type[Job], source: str) -> None:
    known = sorted(changeable_fields(job_type))
    for path in search.space:
        if not is_changeable(job_type, path):
            raise JobError(
                f"{source}: search.space.{path}: pbt changes settings of a model that is being trained, and this one would "
                f"make it another model, or other data. Search it with scheduler: none or asha. pbt can change: "
                f"{', '.join(known)}."
            )


def is_changeable(job_type: type[BaseModel], path: str) -> bool:
    """Whether a dotted field, or a section around it, may change while a run trains."""
    models: list[type[BaseModel]] = [job_type]
    for part in path.split("."):
        holders = [model for model in models if part in model.model_fields]
        if any(part in getattr(model, "changeable", ()) for model in holders):
            return True
        models = [inner for model in holders for inner in models_in(model.model_fields[part].annotation)]
    return False


def changeable_fields(job_type: type[BaseModel], prefix: str = "") -> set[str]:
    """Every dotted field or section that may change while a run trains."""
    found: set[str] = set()
    for name, field in job_type.model_fields.items():
        path = f"{prefix}{name}"
        if name in getattr(job_type, "changeable", ()):
            found.add(path)
        elif name not in _NOT_SEARCHED:
            for inner in models_in(field.annotation):
                found |= changeable_fields(inner, f"{path}.")
    return found
