"""Shadow models for the likelihood-ratio attack: models like the original, each trained on half of its samples.

Carlini et al., Membership Inference Attacks From First Principles (S&P 2022). On a Ray cluster they are the trials of a
search over their number, so that Ray Tune trains as many at a time as the cluster holds and goes on where it was
interrupted; in process, and where the comparison is itself a trial, they are trained one after the other.

Shape legend: N samples.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field
from rich.console import Console

from labelmill.data.selection import KeepRows
from labelmill.data.shards import read_labels
from labelmill.data.spec import StreamSpec
from labelmill.encoders import EncoderConfig
from labelmill.errors import JobError
from labelmill.heads.config import HeadConfig
from labelmill.job import StrictModel, resolved
from labelmill.run import Run
from labelmill.training.config import TrainConfig
from labelmill.tuning.search import search_job
from labelmill.tuning.state import SearchFolder, read_record
from labelmill.workload import check_job
from workloads.unlearning import audit as audits
from workloads.unlearning.audit import answers_of
from workloads.unlearning.task import Task, fit_original, unit

ASKED = ("forget", "test")
METRIC = "shadow/test_accuracy"


class ShadowPart(StrictModel):
    """One shadow model of one seed."""

    number: int = Field(ge=0)
    seed: int


def in_shadow(keys: list[str], number: int, seed: int) -> np.ndarray:
    """bool (N,): which samples a shadow model is trained on."""
    return np.array([unit(key, f"shadow|{seed}|{number}") < 0.5 for key in keys])


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


def train_shadow(number: int, job: Any, run: Run, task: Task) -> dict[str, audits.Said]:
    """A shadow model and its answers: what a trial does."""
    fit = run.stage(
        f"shadow-{number}-s{task.seed}",
        fit_shadow,
        train=task.everything,
        number=number,
        encoder=job.encoder,
        head=job.head,
        config=job.train,
        seed=task.seed,
        job=task.recipe,
    )
    asked = {name: task.sets[name] for name in ASKED}
    said = audits.ask(run, f"shadow-{number}-s{task.seed}", fit, asked, job.budget)
    run.report.metrics[METRIC] = float(said["test"].correct_N.mean())
    return said


def searched_shadows(job: Any, run: Run, task: Task) -> list[dict[str, audits.Said]]:
    """The answers of all shadow models, trained as trials of a search beside this run.

    Raises JobError when one of them failed.
    """
    raw = resolved(job)
    # secrets are masked there; they are the same in the environment or the job that this process has
    raw["tracking"] = job.tracking.model_dump(mode="python") | {
        name: secret.get_secret_value() for name, secret in job.tracking if hasattr(secret, "get_secret_value")
    }
    raw |= {
        "name": f"{job.name}-shadows-s{task.seed}",
        "shadow": {"number": 0, "seed": task.seed},
        "search": {
            "space": {"shadow.number": list(range(job.audit.shadows))},
            "metric": METRIC,
            "searcher": "grid",
            "max_failed": 0,
        },
    }
    method, search = check_job(raw, "audit.shadows")
    run.connect()
    run.progress.line(f"audit.shadows: {job.audit.shadows} trainings, by Ray Tune")
    text = io.StringIO()
    search_job(method, search, raw, "audit.shadows", console=Console(file=text, width=160))
    folder = SearchFolder((Path(job.output) / search.name / "search").resolve())
    found: dict[int, dict[str, audits.Said]] = {}
    for place in folder.trial("").glob("*"):
        record = read_record(place)
        if record.status == "finished":
            (stage,) = (place / "stages").glob("probe-shadow-*")
            found[int(record.values["shadow.number"])] = {name: answers_of(stage, name) for name in ASKED}
    if len(found) < job.audit.shadows:
        raise JobError(
            f"audit.shadows: {job.audit.shadows - len(found)} of {job.audit.shadows} shadow models failed; see {folder.root}"
        )
    return [found[number] for number in range(job.audit.shadows)]


def shadow_attacks(
    job: Any, run: Run, task: Task, said: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, float]]:
    """Version -> the attack with shadow models."""
    if job.cluster.in_process or run.host is not None:
        shadows = [train_shadow(number, job, run, task) for number in range(job.audit.shadows)]
    else:
        shadows = searched_shadows(job, run, task)
    inside = [in_shadow(shadow["forget"].keys, number, task.seed) for number, shadow in enumerate(shadows)]
    return {name: audits.shadow_attack(found, shadows, inside) for name, found in said.items() if name != "random"}
