"""The job: overrides, errors that name the field, secrets, cross-field checks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from labelmill import api
from labelmill.errors import JobError
from labelmill.workload import load_job

JOB = {
    "workload": "discrimination.spelling",
    "name": "t",
    "words": {"count": 200},
    "encoder": {"kind": "char_ngrams", "dim": 16, "buckets": 256},
    "head": {"sample_rate": 0.5},
    "train": {"global_batch": 64, "steps": 3},
}


@pytest.fixture
def job_file(tmp_path: Path) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(JOB))
    return path


def message(path: Path, *overrides: str) -> str:
    with pytest.raises(JobError) as caught:
        load_job(path, list(overrides))
    return str(caught.value)


def test_defaults_and_overrides(job_file: Path) -> None:
    method, job = load_job(
        job_file, ["train.global_batch=128", "cluster.workers=2", "head.margin={kind: cosface, m: 0.2}"]
    )
    assert method.name == "discrimination.spelling"
    assert job.train.global_batch == 128
    assert job.head.margin.m == 0.2
    assert job.seed == 0


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("trian.steps=3", "trian: unknown field. Did you mean 'train'?"),
        ("train.lerning_rate=1", "train.lerning_rate: unknown field. Did you mean 'learning_rate'?"),
        ("head.margin={kind: cosfase}", "head.margin.kind: 'cosfase' is unknown. Did you mean 'cosface'?"),
        ("head.loss.kind=softmaxx", "head.loss.kind: 'softmaxx' is unknown. Did you mean 'softmax'?"),
        ("head.optimizer={kind: sgd, momentm: 1}", "head.optimizer.momentm: unknown field. Did you mean 'momentum'?"),
        ("train.global_batch=abc", "train.global_batch: Input should be a valid integer"),
        ("train.zero_stage=4", "train.zero_stage"),
        ("workload=discrimination.speling", "Did you mean 'discrimination.spelling'?"),
        ("name=a/b", "name:"),
    ],
)
def test_errors_name_the_field_and_the_nearest_name(job_file: Path, override: str, expected: str) -> None:
    assert expected in message(job_file, override)


def test_every_wrong_field_is_listed(job_file: Path) -> None:
    text = message(job_file, "train.stepz=1", "words.cuont=3")
    assert "train.stepz" in text
    assert "words.cuont" in text


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["cluster.workers=3"], "is not divisible by cluster.workers 3; a multiple of 3 is"),
        (["train.accumulation=7"], "not divisible by accumulation 7"),
        (["train.epochs=1"], "exactly one of `epochs` and `steps`"),
        (["head.normalize=false", "head.margin={kind: cosface}"], "margin 'cosface' acts on cosines"),
        (["train.precision=bf16", "train.zero_stage=0"], "use train.zero_stage 1, 2 or 3"),
        (["cluster.address=ray://host:10001"], "Ray client addresses"),
    ],
)
def test_cross_field_checks(job_file: Path, overrides: list[str], expected: str) -> None:
    assert expected in message(job_file, *overrides)


def test_secrets_come_from_the_environment_and_stay_masked(job_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", "s3cret")
    job = api.check(job_file, ["tracking.token=${env:MY_TOKEN}"])
    assert job.tracking.token is not None
    assert job.tracking.token.get_secret_value() == "s3cret"
    assert "s3cret" not in json.dumps(api.resolved(job))
    assert "environment variable MISSING_ONE is not set" in message(job_file, "tracking.token=${env:MISSING_ONE}")
    assert "name" in message(job_file, "tracking.experiment=${env:MY_TOKEN}", "name=x")
    assert "secrets only" in message(job_file, "tracking.experiment=${env:MY_TOKEN}")


def test_unreadable_files(tmp_path: Path) -> None:
    assert "no such job file" in message(tmp_path / "none.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1,")
    assert "not readable as YAML" in message(tmp_path / "broken.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    assert "a job is a mapping" in message(tmp_path / "list.yaml")
    (tmp_path / "empty.yaml").write_text("name: x")
    assert "workload: this field is required" in message(tmp_path / "empty.yaml")


@pytest.mark.parametrize("override", ["novalue", "=3", "a..b=1"])
def test_override_must_be_path_equals_value(job_file: Path, override: str) -> None:
    assert "write it as path=value" in message(job_file, override)


def test_schema_is_json_schema_of_the_workload() -> None:
    schema = api.schema("discrimination.spelling")
    assert schema["properties"]["words"]
    assert schema["additionalProperties"] is False
    with pytest.raises(JobError, match="Did you mean"):
        api.schema("discrimination.speling")


@pytest.mark.parametrize("path", sorted(Path("workloads").glob("*/jobs/*.yaml")), ids=lambda p: p.stem)
def test_every_shipped_job_is_valid(path: Path) -> None:
    load_job(path)
