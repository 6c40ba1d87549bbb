"""The scripts of the recorded experiments: every job they would start is valid, and their tables say what they should."""

from __future__ import annotations

import json
import re
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from labelmill.workload import load_job

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "ci" / "experiments"))

import distillation  # noqa: E402
import noisy  # noqa: E402
import study  # noqa: E402
import unlearning  # noqa: E402


def test_tables_of_seeds() -> None:
    assert study.spread([0.8, 0.82, 0.84]) == "82.0 ± 2.0"
    assert study.spread([9.881], 1.0, 2) == "9.88 ± 0.00"
    assert study.gain([0.5, 0.6, 0.7], [0.4, 0.6, 0.75]) == "+1.7 (1/3)"
    assert study.best({"a": 1.0, "b": 2.0, "c": 2.0}) == "b"
    assert study.table(["x", "y"], [["a", 1]]) == "| x | y |\n|---|---|\n| a | 1 |"


def check(started: list[str]) -> Callable[..., Any]:
    """Stands in for `study.run`: only validates the job, and gives every metric the same value."""

    def run(job: str, name: str, **settings: Any) -> Any:
        values = study.HERE | {"name": name} | {key.replace("__", "."): value for key, value in settings.items()}
        overrides = [f"{key}={json.dumps(value, default=str)}" for key, value in values.items()]
        _, checked = load_job(ROOT / "workloads" / job, overrides)
        assert checked.cluster.in_process
        started.append(checked.name)
        metrics: dict[str, float] = defaultdict(lambda: 0.5, prevalence=0.1, simulation_off=0.0)
        # names are looked up in copies too, so they must be there
        for arm in {**settings.get("losses", {}), **settings.get("arms", {})}:
            for metric in (
                "test",
                "test_few",
                "noisy_test",
                "memorised",
                "validation",
                "ece",
                "agreement",
                "vote",
                "aspect_auc",
            ):
                metrics |= {f"{metric}/{arm}{step}": 0.5 for step in ("", "/one_net", "/mean_of_two", "/co-teaching")}
            metrics |= {f"temperature/{arm}/{group}": 0.5 for group in ("right", "wrong")}
            metrics |= {f"mean_distance/{arm}/{what}": 0.5 for what in ("raw", "without_outliers", "lent")}
        for model in settings.get("models", ()):
            for part in ("original", "corrected", "benign", "original_errors", "corrected_errors"):
                metrics[f"{part}/{model}/1"] = 0.5
        return metrics

    return run


@pytest.mark.parametrize(
    ("script", "name"), [(script, name) for script in (distillation, noisy) for name in script.STUDIES]
)
def test_every_job_of_a_study_is_valid(monkeypatch: pytest.MonkeyPatch, script: Any, name: str) -> None:
    started: list[str] = []
    texts: list[str] = []
    monkeypatch.setattr(script, "run", check(started))
    monkeypatch.setattr(script, "cut", lambda source, out, start, stop: out)
    monkeypatch.setattr(script, "systematic", lambda source, out: out, raising=False)
    monkeypatch.setattr(script, "outputs_of", lambda run, stage: f"{run}/{stage}", raising=False)
    monkeypatch.setattr(script, "write", lambda family, study, text: texts.append(text))
    script.STUDIES[name]()
    assert len(set(started)) == len(started) > 5, "runs don't overwrite each other"
    for seed in script.SEEDS:
        # distillation names the learning rate of the arms behind the seed
        assert any(re.search(rf"-s{seed}(-[0-9.]+)*$", run) for run in started)
    assert len(texts) == 1 or script is distillation, "a study writes one result; distillation's grow part by part"
    assert ("50.0 ± 0.0" if script is noisy else "50.00 ± 0.00") in texts[-1]


@pytest.mark.parametrize("name", unlearning.STUDIES)
def test_every_job_of_an_unlearning_study_is_valid(
    monkeypatch: pytest.MonkeyPatch, make_text_data: Callable[..., Any], tmp_path: Path, name: str
) -> None:
    started: list[str] = []
    texts: list[str] = []
    validate = check(started)

    def run(job: str, name: str, **settings: Any) -> Any:
        metrics = validate(job, name, **settings)
        versions = ["original", "retrain", *map(unlearning.file_name, settings.get("methods", ()))]
        return metrics | {f"{version}/{column}": 0.5 for version in versions for column in unlearning.COLUMNS.values()}

    monkeypatch.setattr(unlearning, "run", run)
    monkeypatch.setattr(unlearning, "PARTS", tmp_path)
    monkeypatch.setattr(noisy, "cut", lambda source, out, start, stop: out)
    monkeypatch.setattr(unlearning, "load_manifest", lambda path: make_text_data(120, 50))
    monkeypatch.setattr(unlearning, "write", lambda family, study, text: texts.append(text))
    unlearning.STUDIES[name]()
    assert len(set(started)) == len(started) > 3, "runs don't overwrite each other"
    (text,) = texts
    assert "0.5 ± 0.0" in text or "50.0 ± 0.0" in text
    if name != "sisa":
        numbers = {len(settings) for settings in unlearning.trials(name).values()}
        assert numbers == {4}, "every method has as many settings to choose from"
