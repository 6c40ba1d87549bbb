"""Searches for real: Ray Tune, trials that train, MLflow, a killed search that goes on."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file

from labelmill import api
from labelmill.errors import UserError
from labelmill.job import TrackingConfig
from labelmill.search_config import SearchConfig
from labelmill.tracking.config import Store, client_env
from labelmill.tracking.report import Report
from labelmill.tuning.state import Record, read_record

EXAMPLE = Path(__file__).resolve().parents[2] / "workloads/discrimination/jobs/spelling-search.yaml"


def search_job(folder: Path, name: str, search: dict[str, Any], **train: Any) -> Path:
    """The example job, smaller, with another search."""
    raw = yaml.safe_load(EXAMPLE.read_text())
    raw |= {"name": name, "output": str(folder / "runs"), "search": search}
    raw["words"] |= {"count": 500, "queries": 100}
    raw["train"] |= train
    raw["tracking"] = {"system_metrics": False, "interval_s": 1}
    if name != "halving":
        del raw["register_as"]
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(raw, sort_keys=False))
    return path


def tune(path: Path) -> tuple[Report, str]:
    text = io.StringIO()
    return api.tune(path, console=Console(file=text, width=200)), text.getvalue()


def records(folder: Path, name: str) -> list[Record]:
    """Of the trials, in the order they began."""
    found = [read_record(trial) for trial in (folder / "runs" / name / "search" / "trials").iterdir()]
    return sorted(found, key=lambda record: record.began)


def histories(trial: Path) -> list[dict[str, float]]:
    """Everything that the fits of a trial logged."""
    paths = sorted(trial.glob("stages/fit-*/history.jsonl"))
    return [json.loads(line) for path in paths for line in path.read_text().splitlines()]


# --- halving, failures, what is kept ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def halved(tmp_path_factory: pytest.TempPathFactory, ray_session: None) -> dict[str, Any]:
    """Three trials, one after the other: a good one, a bad one that is stopped, one whose loss diverges."""
    folder = tmp_path_factory.mktemp("halving")
    path = search_job(
        folder,
        "halving",
        {
            "metric": "eval/top1",
            "space": {"train.learning_rate": [0.02, 0.000001, 1e30]},
            "searcher": "grid",
            "scheduler": {"kind": "asha", "grace_steps": 30, "reduction": 2},
            "concurrent": 1,
        },
        steps=90,
    )
    report, text = tune(path)
    return {"folder": folder, "path": path, "report": report, "text": text}


def test_halving_saves_steps_and_a_failure_is_a_row(halved: dict[str, Any]) -> None:
    good, bad, broken = records(halved["folder"], "halving")
    assert (good.status, good.step) == ("finished", 90)
    trials = halved["folder"] / "runs/halving/search/trials"
    # what was trained, not what was told: the bad trial has done the steps of the first rung and no more
    assert max(h["step"] for h in histories(trials / good.name)) == 90
    assert max(h["step"] for h in histories(trials / bad.name)) == 30
    assert bad.outcome == {}
    assert broken.status == "failed"
    report = halved["report"]
    assert report.metrics["search/steps"] <= 121
    assert {k: report.metrics[f"search/{k}"] for k in ("finished", "stopped", "failed")} == dict.fromkeys(
        ("finished", "stopped", "failed"), 1
    )
    table = report.tables["trials"]
    assert [row[2] for row in table.rows] == ["best", "stopped", "failed"]
    error = table.rows[2][table.columns.index("error")]
    assert "NaN or infinite values" in str(error)
    assert f"failed: {error}" in halved["text"]
    assert {"parallel_coordinates", "metric_by_parameter", "learning_curves"} == set(report.figures)
    for name in report.figures:
        assert report.figure_path(name).stat().st_size > 5000


def test_trials_are_runs_below_one_parent(halved: dict[str, Any]) -> None:
    state = json.loads((halved["folder"] / "runs/halving/search/search.json").read_text())
    found = records(halved["folder"], "halving")
    with client_env(Store.of(TrackingConfig(), halved["folder"] / "runs")) as client:
        parent = client.get_run(state["mlflow_run"])
        children = client.search_runs(
            [parent.info.experiment_id], f"tags.mlflow.parentRunId = '{parent.info.run_id}'", order_by=["start_time"]
        )
        assert [run.info.status for run in children] == ["FINISHED", "KILLED", "FAILED"]
        assert [run.data.tags["search.trial"] for run in children] == [record.name for record in found]
        assert [run.data.tags["search.status"] for run in children] == ["finished", "stopped", "failed"]
        assert [float(run.data.params["train.learning_rate"]) for run in children] == [0.02, 0.000001, 1e30]
        assert len(client.get_metric_history(children[0].info.run_id, "eval/top1")) == 9
        assert children[0].data.metrics["search/value"] == found[0].value
        artifacts = {item.path for item in client.list_artifacts(parent.info.run_id)}
        versions = client.search_model_versions("name = 'spelling-search'")
    assert {"best.yaml", "job.yaml", "report"} <= artifacts
    assert [version.run_id for version in versions] == [children[0].info.run_id], "the best trial, and it alone"
    assert api.predict("spelling-search@candidate", ["abouut"], k=2, output=halved["folder"] / "runs").shape[0] == 2


def test_the_best_settings_are_a_job_and_the_search_is_over(halved: dict[str, Any]) -> None:
    root = halved["folder"] / "runs/halving/search"
    best = api.check(root / "best.yaml")
    assert best.search is None
    assert (best.name, best.register_as) == ("halving-best", "spelling-search")
    assert best.train.learning_rate == 0.02  # type: ignore[attr-defined]
    assert not {"tune", "kept", "stop"} & {path.name for path in root.iterdir()}, "no pickle is left"
    assert len(list(root.glob("stages/words-*"))) == 1, "the words are made once for all trials"
    again, text = tune(halved["path"])
    assert "nothing has changed" in text
    assert again.metrics == halved["report"].metrics
    with pytest.raises(UserError, match="began with another job"):
        api.tune(halved["path"], ["train.steps=70"])


# --- population-based training --------------------------------------------------------------------------


ENGINES = ["in_process", pytest.param("workers", marks=pytest.mark.slow)]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_population_takes_over_weights_and_changes_settings(tmp_path: Path, ray_session: None, engine: str) -> None:
    search = {
        "engine": engine,
        "metric": "train/loss",
        "goal": "min",
        "trials": 2,
        "space": {"train.learning_rate": {"kind": "log_uniform", "low": 0.00001, "high": 0.01}},
        "scheduler": {"kind": "pbt", "interval_steps": 20, "quantile": 0.5, "resample": 0, "synchronous": True},
    }
    path = search_job(tmp_path, "population", search, steps=30, schedule="constant", warmup=0, evaluate_every=0)
    report, _ = tune(path)
    taker, giver = sorted(
        records(tmp_path, "population"), key=lambda record: record.settings[0]["values"]["train.learning_rate"]
    )
    assert {taker.status, giver.status} == {"finished"}
    first, after = taker.settings
    assert after["from"] == {"trial": giver.name, "step": 20}
    rate, of_giver = after["values"]["train.learning_rate"], giver.values["train.learning_rate"]
    assert rate != first["values"]["train.learning_rate"]
    assert rate == pytest.approx(1.2 * of_giver) or rate == pytest.approx(0.8 * of_giver)

    trials = tmp_path / "runs/population/search/trials"
    place = {
        name: list(trials.glob(f"{name}/stages/fit-*/checkpoints/step-00000020")) for name in (taker.name, giver.name)
    }
    (given,) = place[giver.name]
    own = next(p for p in place[taker.name] if not p.samefile(given) and same(p, given))
    others = [p for p in place[taker.name] if p != own]
    assert others, "where its own training stood"
    assert not any(same(p, given) for p in others)
    # it went on from there with the new rate
    history = [json.loads(line) for line in (own.parents[1] / "history.jsonl").read_text().splitlines()]
    assert [record["step"] for record in history] == [30]
    assert history[0]["train/learning_rate"] == pytest.approx(rate)
    assert report.tables["changes"].rows == [[mark(report, taker), mark(report, giver), 20, rate]]

    run_id = json.loads((trials / taker.name / "run.json").read_text())["mlflow_run"]
    with client_env(Store.of(TrackingConfig(), tmp_path / "runs")) as client:
        run = client.get_run(run_id)
        rates = client.get_metric_history(run_id, "search/train.learning_rate")
    assert [(point.step, point.value) for point in sorted(rates, key=lambda point: point.step)] == [
        (0, first["values"]["train.learning_rate"]),
        (20, rate),
    ]
    assert float(run.data.params["train.learning_rate"]) == first["values"]["train.learning_rate"]
    assert float(run.data.tags["param.train.learning_rate"]) == rate
    assert run.info.status == "FINISHED"


def same(one: Path, other: Path) -> bool:
    """Whether two checkpoints hold equal weights, class rows and moments."""
    files = [str(path.relative_to(one)) for path in one.rglob("*.safetensors") if "rng" not in path.name]
    pairs = [(load_file(one / name), load_file(other / name)) for name in files if (other / name).is_file()]
    return (
        bool(files)
        and len(pairs) == len(files)
        and all(torch.equal(value, b[name]) for a, b in pairs for name, value in a.items())
    )


def mark(report: Report, record: Record) -> int:
    """A trial's number in the table."""
    return next(int(row[0] or 0) for row in report.tables["trials"].rows if row[1] == record.name)


# --- workers, crash -------------------------------------------------------------------------------------


def free_again() -> bool:
    """Whether all CPUs of the cluster are free, or become so."""
    import ray

    until = time.monotonic() + 20
    while ray.available_resources().get("CPU", 0) < ray.cluster_resources()["CPU"] and time.monotonic() < until:
        time.sleep(0.2)
    return ray.available_resources()["CPU"] == ray.cluster_resources()["CPU"]


@pytest.mark.slow
def test_halving_stops_trials_with_ray_workers(tmp_path: Path, ray_session: None) -> None:
    search = {
        "metric": "eval/top1",
        "space": {"train.learning_rate": [0.02, 0.000001]},
        "searcher": "grid",
        "engine": "workers",
        "scheduler": {"kind": "asha", "grace_steps": 200, "reduction": 2},
        "concurrent": 1,
    }
    path = search_job(tmp_path, "halving-workers", search, steps=600, evaluate_every=50)
    report, _ = tune(path)
    good, bad = records(tmp_path, "halving-workers")
    assert (good.status, good.step) == ("finished", 600)
    trials = tmp_path / "runs/halving-workers/search/trials"
    assert max(h["step"] for h in histories(trials / good.name)) == 600
    assert max(h["step"] for h in histories(trials / bad.name)) < 600, "its workers were ended"
    assert [row[2] for row in report.tables["trials"].rows] == ["best", "stopped"]
    assert free_again()


def test_trials_with_ray_workers_leave_nothing_behind(tmp_path: Path, ray_session: None) -> None:
    """Two at once on two CPUs: one fails, which is one too many, while the other one's workers train."""
    search = {
        "metric": "eval/top1",
        "space": {"train.learning_rate": [0.02, 1e30]},
        "searcher": "grid",
        "engine": "workers",
        "max_failed": 0,
    }
    path = search_job(tmp_path, "workers", search, steps=100_000, evaluate_every=200)
    with pytest.raises(
        UserError, match=r"1 trials failed, search\.max_failed is 0; the last one: .*NaN or infinite values"
    ):
        tune(path)
    good, broken = sorted(records(tmp_path, "workers"), key=lambda record: record.values["train.learning_rate"])
    assert (good.status, broken.status) == ("running", "failed")
    report = Report.load(tmp_path / "runs/workers/search/report")
    assert [row[2] for row in report.tables["trials"].rows] == ["stopped", "failed"]
    assert free_again()


def test_a_killed_search_goes_on_and_runs_no_finished_trial_again(tmp_path: Path) -> None:
    search = {
        "metric": "eval/top1",
        "space": {"train.learning_rate": [0.02, 0.01, 0.005]},
        "searcher": "grid",
    }
    path = search_job(tmp_path, "killed", search, steps=1200, checkpoint_every=20, evaluate_every=60)
    command = [str(Path(sys.executable).with_name("labelmill")), "tune", str(path)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    trials = tmp_path / "runs/killed/search/trials"

    def half_done() -> bool:
        """One has ended, another one has saved a checkpoint and is far from its end: its process may outlive the search."""
        ended = {outcome.parent.name for outcome in trials.glob("*/outcome.json")}
        places = list(trials.glob("*/stages/fit-*/checkpoints/step-*"))
        far = {place.parents[3].name for place in places if int(place.name.removeprefix("step-")) >= 300}
        return bool(ended) and bool({place.parents[3].name for place in places} - far - ended)

    first = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        until = time.monotonic() + 240
        while time.monotonic() < until and first.poll() is None and not half_done():
            time.sleep(0.02)
    finally:
        first.send_signal(signal.SIGKILL)
        out, _ = first.communicate(timeout=60)
    done = [record for record in records(tmp_path, "killed") if record.status == "finished"]
    assert 1 <= len(done) < 3, out
    logs = {record.name: (trials / record.name / "console.log").read_text() for record in done}

    second = subprocess.run(command, env=env, capture_output=True, text=True, timeout=340)
    assert second.returncode == 0, second.stdout + second.stderr
    assert "goes on where it was interrupted" in second.stdout
    found = records(tmp_path, "killed")
    assert [record.status for record in found] == ["finished"] * 3
    assert sorted(record.values["train.learning_rate"] for record in found) == [0.005, 0.01, 0.02]
    for record in done:
        assert (trials / record.name / "console.log").read_text() == logs[record.name], "it wasn't run again"
        assert read_record(trials / record.name).settings == record.settings
    went_on = [record for record in found if len(record.settings) == 2]
    assert went_on
    logged = [len(histories(trials / record.name)) for record in went_on]
    assert min(logged) < 2 * 120, "one went on from a checkpoint"
    state = json.loads((tmp_path / "runs/killed/search/search.json").read_text())
    assert state["status"] == "finished"
    with client_env(Store.of(TrackingConfig(), tmp_path / "runs")) as client:
        parent = client.get_run(state["mlflow_run"])
        children = client.search_runs([parent.info.experiment_id], f"tags.mlflow.parentRunId = '{parent.info.run_id}'")
    assert (parent.info.status, len(children)) == ("FINISHED", 3)
    assert {child.info.status for child in children} == {"FINISHED"}


# --- proposals ------------------------------------------------------------------------------------------


def test_bohb_halves_brackets_and_learns_from_what_was_stopped(tmp_path: Path, ray_session: None) -> None:
    """Tune, Optuna and our result keys fit together; the trials are functions that only report."""
    from ray import tune

    from labelmill.tuning import schedule
    from labelmill.tuning.pointer import Pointer

    search = SearchConfig.model_validate(
        {
            "metric": "m",
            "trials": 4,
            "space": {"x": {"kind": "uniform", "low": 0, "high": 1}, "kind": ["a", "b"]},
            "searcher": {"kind": "bohb", "startup": 1},
            "scheduler": {"kind": "hyperband", "first_steps": 10},
        }
    )

    def trial(config: dict[str, Any]) -> None:
        held = tune.get_checkpoint()
        begin = Pointer.load(held.path).step if held else 0  # type: ignore[union-attr]
        for step in range(begin + 10, 30, 10):
            place = Pointer("t", "fit", step, "nowhere").save()
            report = {"value": config["x"], "step": step, "budget": step / 10}
            tune.report(report, checkpoint=tune.Checkpoint.from_directory(place))
        tune.report({"value": config["x"], "step": 30, "budget": 3.0, "final": True, "done": True})

    searcher = schedule.searcher(search, 2)
    tuner = tune.Tuner(
        tune.with_resources(trial, {"CPU": 0.5}),
        param_space=schedule.param_space(search),
        tune_config=tune.TuneConfig(
            metric="value",
            mode="max",
            num_samples=4,
            search_alg=searcher,
            scheduler=schedule.scheduler(search, 30),
            max_concurrent_trials=2,
        ),
        run_config=tune.RunConfig(name="tune", storage_path=str(tmp_path), verbose=0),
    )
    results = tuner.fit()
    assert not results.errors
    ended = [result.metrics["step"] for result in results]
    assert 30 in ended
    assert min(ended) == 10, "a trial of the first bracket was stopped at the smallest budget"
    states = [str(one.state).rpartition(".")[2] for one in searcher._ot_study.trials]
    assert states.count("COMPLETE") == ended.count(30)
    assert states.count("PRUNED") == 4 - ended.count(30)
