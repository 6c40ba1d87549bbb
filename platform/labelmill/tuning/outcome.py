"""What a search found: the table of trials, figures, the best settings as a job, the best model in the registry."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from labelmill.host import Host
from labelmill.job import Job
from labelmill.search_config import SearchConfig
from labelmill.stages import write_json
from labelmill.tracking import search_figures
from labelmill.tracking.config import client_env
from labelmill.tracking.report import Report
from labelmill.tracking.run import Tracker, code_version
from labelmill.tuning.check import tuned_on_test
from labelmill.tuning.space import with_values
from labelmill.tuning.state import Record, SearchFolder, read_json, read_record
from labelmill.tuning.trial import trial_settings

_DONE = ("finished", "stopped", "failed")


def conclude(
    folder: SearchFolder, job: Job, tracker: Tracker, statuses: Mapping[str, str], stopped: str, console: Console
) -> Report:
    """The report of a search whose trials have ended; registers the best one if the job says so.

    Args:
        folder: of the search.
        job: as written.
        tracker: of the parent run.
        statuses: Tune's status by trial.
        stopped: why the search was stopped before its end; empty if it wasn't.
    """
    search = job.search
    assert search is not None
    records = read_records(folder, statuses)
    best = best_of(records, search)
    meta = {"workload": job.workload, "seed": str(job.seed), **code_version(), "mlflow_run": tracker.run_id}
    report = Report(title=f"{job.name} search", meta=meta, root=folder.root / "report")
    if stopped:
        report.notes.append(f"The search was stopped: {stopped}.")
    if warning := tuned_on_test(search):
        report.notes.append(warning)
    _report_trials(report, records, best, search)
    _draw(report, records, best, search)
    if best is not None:
        _report_best(report, folder, job, best)
        tracker.artifact(folder.root / "best.yaml")
        if job.register_as and not stopped:
            report.notes.append(_register(folder, job, best, console))
    _close_runs(folder, tracker, records)
    tracker.tags({"search.best": best.name if best else ""})
    tracker.report(report)
    return report


def read_records(folder: SearchFolder, statuses: Mapping[str, str]) -> list[Record]:
    """Trials in Tune's order, which is the order in which they were proposed."""
    records = []
    for name, status in statuses.items():
        record = read_record(folder.trial(name))
        if record.status == "running":
            record.status = "failed" if status == "ERROR" else "stopped"
        if record.settings:
            records.append(record)
    return records


def best_of(records: Sequence[Record], search: SearchConfig) -> Record | None:
    """The finished trial with the best metric; the earlier one of two that are equal."""
    finished = [record for record in records if record.status == "finished" and record.value is not None]
    sign = 1.0 if search.goal == "max" else -1.0
    return max(finished, key=lambda record: sign * float(record.value or 0.0), default=None)


# --- the report -----------------------------------------------------------------------------------------


def _shown(value: Any) -> Any:
    """A setting as a cell: sections by their values, as `cosface 0.1`."""
    if isinstance(value, Mapping):
        return " ".join(str(_shown(part)) for part in value.values())
    return value if isinstance(value, int | float | str) and not isinstance(value, bool) else json.dumps(value)


def _report_trials(report: Report, records: Sequence[Record], best: Record | None, search: SearchConfig) -> None:
    counts = {status: sum(record.status == status for record in records) for status in _DONE}
    report.metrics |= {"search/trials": float(len(records))} | {f"search/{k}": float(v) for k, v in counts.items()}
    report.metrics["search/steps"] = float(sum(record.step for record in records))
    if best is not None:
        report.metrics[f"search/best/{search.metric}"] = float(best.value or 0.0)
    paths = list(search.space)
    rows = []
    for number, record in enumerate(records, start=1):
        mark = "best" if record is best else record.status
        settings = [_shown(record.values.get(path)) for path in paths]
        seconds = record.outcome.get("seconds")
        rows.append(
            [
                number,
                record.name,
                mark,
                record.value,
                record.step,
                seconds and round(seconds, 1),
                *settings,
                record.outcome.get("error", ""),
            ]
        )
    columns = ["trial", "id", "status", search.metric, "steps", "seconds", *paths, "error"]
    if not any(row[-1] for row in rows):
        columns, rows = columns[:-1], [row[:-1] for row in rows]
    caption = f"the best has the {'highest' if search.goal == 'max' else 'lowest'} {search.metric} of the finished ones"
    report.add_table("trials", columns, rows, caption)
    numbers = {record.name: number for number, record in enumerate(records, start=1)}
    changes = [
        [numbers[record.name], numbers.get(part["from"]["trial"]), part["from"]["step"]]
        + [_shown(part["values"].get(path)) for path in paths]
        for record in records
        for before, part in zip([None, *record.settings], record.settings, strict=False)
        if part["from"] and before and (part["values"] != before["values"] or part["from"]["trial"] != record.name)
    ]
    if changes:
        caption = "a trial took over another one's weights and went on with changed settings"
        report.add_table("changes", ["trial", "weights of", "at step", *paths], changes, caption)


def _draw(report: Report, records: Sequence[Record], best: Record | None, search: SearchConfig) -> None:
    known = [record for record in records if record.value is not None]
    if not known:
        return
    folder = (report.root or Path()) / "figures"
    values = [float(record.value or 0.0) for record in known]
    kinds = [(record is best and "best") or record.status for record in known]
    axes = {
        path: search_figures.Axis(
            [record.values[path] for record in known],
            log=space.kind == "log_uniform" or bool(getattr(space, "log", False)),
            choices=[_shown(v) for v in space.values] if space.kind == "choice" else None,
        )
        for path, space in search.space.items()
    }
    for axis in axes.values():
        if axis.choices is not None:
            axis.values = [_shown(value) for value in axis.values]
    figures = {
        "parallel_coordinates": search_figures.parallel_coordinates,
        "metric_by_parameter": search_figures.metric_by_parameter,
    }
    for name, draw in figures.items():
        draw(axes, search.metric, values, kinds, search.goal == "max", folder / f"{name}.png")
        report.figures[name] = f"figures/{name}.png"
    curves = {number: record.curve for number, record in enumerate(records, start=1) if len(record.curve) > 1}
    if curves:
        number = records.index(best) + 1 if best else None
        search_figures.learning_curves(curves, search.metric, number, folder / "learning_curves.png")
        report.figures["learning_curves"] = "figures/learning_curves.png"


# --- the best -------------------------------------------------------------------------------------------


def _report_best(report: Report, folder: SearchFolder, job: Job, best: Record) -> None:
    path = folder.root / "best.yaml"
    raw = with_values(folder.state["raw"], {**best.values, "name": f"{job.name}-best"})
    text = yaml.safe_dump(raw, sort_keys=False, allow_unicode=True)
    path.write_text(f"# The best trial of the search {job.name}: {best.name}.\n{text}", encoding="utf-8")
    rows = [[path, json.dumps(value)] for path, value in best.values.items()]
    report.add_table("best settings", ["field", "value"], rows)
    report.notes.append(f"The best settings are a job: labelmill run {path}")
    if any(part["from"] and part["from"]["trial"] != best.name for part in best.settings):
        report.notes.append(
            "The best trial took weights from others and changed its settings while it trained (table changes): a run with "
            "its last settings alone is another training."
        )


def _register(folder: SearchFolder, job: Job, best: Record, console: Console) -> str:
    """Runs the best trial's job again with `register_as`: all its stages are kept, the registration is what is new."""
    from labelmill.execution import execute

    in_process = bool(folder.state["in_process"])
    settings = trial_settings(folder, best.values, best.name, in_process) | {"register_as": job.register_as}
    host = Host(folder.trial(best.name), folder.state["mlflow_run"], shared_stages=folder.root / "stages")
    console.print(f"registers the best trial as {job.register_as}", highlight=False)
    with open(folder.trial(best.name) / "console.log", "a", encoding="utf-8") as out:
        report = execute(folder.job(settings), folder.method.run, console=Console(file=out, width=160), host=host)
    registered = list((folder.trial(best.name) / "stages").glob("register-*/stage.json"))
    if not registered:
        return f"{job.workload} registers no model, so {job.register_as} wasn't registered."
    write_json(folder.trial(best.name) / "registered.json", {"mlflow_run": report.meta["mlflow_run"]})
    version = max(int(read_json(path)["values"]["version"]) for path in registered)
    return f"The best trial is {job.register_as} version {version}, alias candidate: labelmill models show {job.register_as}"


def _close_runs(folder: SearchFolder, tracker: Tracker, records: Sequence[Record]) -> None:
    """Marks every trial's MLflow run; those of processes that were killed still count as running."""
    from mlflow.exceptions import MlflowException

    with contextlib.suppress(MlflowException), client_env(tracker.store) as client:
        for left in set(folder.trial("").glob("*")) - {folder.trial(record.name) for record in records}:
            # a trial that Tune forgot, since it began in the second before a crash
            if run_id := read_json(left / "run.json").get("mlflow_run"):
                client.set_terminated(run_id, "KILLED")
            shutil.rmtree(left, ignore_errors=True)
        for record in records:
            run_id = read_json(folder.trial(record.name) / "run.json").get("mlflow_run")
            if run_id is None:
                continue
            client.set_tag(run_id, "search.status", record.status)
            if record.value is not None:
                client.log_metric(run_id, "search/value", record.value)
            if client.get_run(run_id).info.status == "RUNNING":
                client.set_terminated(run_id, "FAILED" if record.status == "failed" else "KILLED")
