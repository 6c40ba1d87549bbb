"""How a run stands, from its MLflow run alone: it may run elsewhere, or be over."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from labelmill.errors import TrackingError, did_you_mean
from labelmill.job import TrackingConfig
from labelmill.tracking.config import Store, client_env

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from rich.console import Console

_RATE, _STARTS, _TOTAL = "train/samples_per_second", "run/worker_starts", "run/total_steps"
_STAGE = "stage_seconds/"
_DAMAGE = ("data/bad_samples", "data/storage_retries", "train/skipped_steps")


@dataclass(frozen=True)
class RunStatus:
    """How a run stands.

    Attributes:
        state: MLflow's: RUNNING, FINISHED, FAILED, KILLED.
        stage: the one that was begun last; empty before the first.
        stages: seconds of each finished stage.
        step, total_steps: optimizer steps of the training stage begun last; None before it.
        samples_per_second: of the last metric window.
        metrics: last training metrics and, at the end, those of the report.
        damage: samples that can't be used, storage requests tried again, steps left out; what isn't zero.
        restarts: times that the workers began to train again.
        heard_ms: Unix time of the newest metric; None without one.
        began_ms, ended_ms: Unix times of the run.
    """

    run_id: str
    name: str
    state: str
    stage: str
    stages: dict[str, float]
    step: int | None
    total_steps: int | None
    samples_per_second: float | None
    metrics: dict[str, float]
    damage: dict[str, float]
    restarts: int
    heard_ms: int | None
    began_ms: int
    ended_ms: int | None
    tags: dict[str, str] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def read_status(config: TrackingConfig, output_dir: str | Path, run: str) -> RunStatus:
    """The status of a run: its MLflow id, or the newest run of that name. Raises TrackingError when there is none."""
    with client_env(Store.of(config, output_dir)) as client:
        found = _find(client, config, run)
        values = dict(found.data.metrics)
        last = {
            name: _last(client, found.info.run_id, name) for name in (_RATE, "train/loss", _STARTS) if name in values
        }
    tags = found.data.tags
    steps = [metric.step for name, metric in last.items() if metric is not None]
    heard = [metric.timestamp for metric in last.values() if metric is not None]
    shown = {k: v for k, v in sorted(values.items()) if not k.startswith(("system/", _STAGE, "run/", "seconds/"))}
    for name in (*_DAMAGE, _RATE):
        shown.pop(name, None)
    return RunStatus(
        run_id=found.info.run_id,
        name=found.info.run_name or "",
        state=found.info.status,
        stage=tags.get("labelmill.stage", ""),
        stages={k.removeprefix(_STAGE): v for k, v in sorted(values.items()) if k.startswith(_STAGE)},
        step=max(steps) if steps else None,
        total_steps=int(values[_TOTAL]) if _TOTAL in values else None,
        samples_per_second=values.get(_RATE),
        metrics=shown,
        damage={name: values[name] for name in _DAMAGE if values.get(name)},
        restarts=max(0, int(values.get(_STARTS, 1)) - 1),
        heard_ms=max(heard) if heard else None,
        began_ms=found.info.start_time,
        ended_ms=found.info.end_time,
        tags={k: v for k, v in tags.items() if k.startswith("labelmill.")},
    )


def _find(client: MlflowClient, config: TrackingConfig, run: str) -> Any:
    from mlflow.exceptions import MlflowException

    try:
        return client.get_run(run)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "NOT_FOUND", "INVALID_PARAMETER_VALUE"):
            raise
    experiments = [e.experiment_id for e in client.search_experiments()]
    escaped = run.replace("'", "''")
    named = f"attributes.run_name = '{escaped}'"
    if found := client.search_runs(experiments, named, max_results=1, order_by=["attributes.start_time DESC"]):
        return found[0]
    known = {r.info.run_name or "" for r in client.search_runs(experiments, max_results=200)}
    hint = did_you_mean(run, known - {""}) or " There is none yet."
    raise TrackingError(f"run {run!r}: neither the id nor the name of a run.{hint}")


def _last(client: MlflowClient, run_id: str, name: str) -> Any:
    history = client.get_metric_history(run_id, name)
    return max(history, key=lambda metric: (metric.timestamp, metric.step)) if history else None


def render_status(status: RunStatus, console: Console) -> None:
    """Prints a status: what it is doing, how far, and whether anything went wrong on the way."""
    from rich.text import Text

    from labelmill.tracking.report import format_cell

    now = time.time()
    colour = {"FINISHED": "green", "RUNNING": "cyan"}.get(status.state, "red")
    console.print(Text.assemble((status.name, "bold"), "  ", (status.state.lower(), colour), f"  {status.run_id}"))
    rows: dict[str, str] = {}
    end_s = (status.ended_ms or now * 1000) / 1000
    rows["time"] = f"{_span(end_s - status.began_ms / 1000)}"
    if status.state == "RUNNING":
        rows["stage"] = status.stage or "not begun"
        if status.heard_ms is not None:
            rows["last heard"] = f"{_span(max(0.0, now - status.heard_ms / 1000))} ago"
    if status.step is not None:
        rows["step"] = f"{status.step:,}" + (f" of {status.total_steps:,}" if status.total_steps else "")
    if status.samples_per_second is not None:
        rows["samples/s"] = format_cell(float(status.samples_per_second))
    rows["stages done"] = ", ".join(f"{name} ({_span(s)})" for name, s in status.stages.items()) or "none"
    rows["restarts"] = str(status.restarts)
    rows["damage"] = ", ".join(f"{name} {format_cell(int(v))}" for name, v in status.damage.items()) or "none"
    rows |= {name: format_cell(value) for name, value in status.metrics.items()}
    width = max(map(len, rows))
    for name, text in rows.items():
        console.print(Text(f"  {name:<{width}}  {text}"), soft_wrap=True)


def _span(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
