"""Stages are kept by their inputs; crashed stages run again; runs are locked; fresh starts over."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from labelmill.data.config import DataConfig
from labelmill.data.manifest import Manifest
from labelmill.data.spec import MixedSpec, StreamSpec
from labelmill.errors import UserError
from labelmill.execution import execute
from labelmill.job import Job, TrackingConfig, validate_job
from labelmill.run import Run
from labelmill.stages import Fitted, fingerprint, stage_key
from labelmill.workload import find_workload

CALLS: list[str] = []


def count(run: Run, folder: Path, n: int) -> dict[str, Any]:
    CALLS.append(f"count {n}")
    (folder / "n.txt").write_text(str(n))
    return {"n": n}


def double(run: Run, folder: Path, before: Any) -> dict[str, Any]:
    CALLS.append("double")
    if (folder / "crash.txt").exists() or before["n"] != 13:
        return {"n": 2 * before["n"]}
    (folder / "crash.txt").write_text("half done")
    raise RuntimeError("power cut")


def method(job: Any, run: Run) -> None:
    first = run.stage("count", count, n=job.seed)
    second = run.stage("double", double, before=first)
    run.report.metrics["n"] = float(second["n"])


def job(tmp_path: Path, seed: int) -> Job:
    return Job(workload="w", name="j", seed=seed, output=tmp_path, tracking=TrackingConfig(system_metrics=False))


def run_it(tmp_path: Path, seed: int, fresh: bool = False) -> str:
    text = io.StringIO()
    execute(job(tmp_path, seed), method, fresh=fresh, console=Console(file=text, width=120))
    return text.getvalue()


def test_life_of_a_run(tmp_path: Path) -> None:
    CALLS.clear()
    output = run_it(tmp_path, 1)
    assert CALLS == ["count 1", "double"]
    assert "count: done in" in output
    state = json.loads((tmp_path / "j" / "run.json").read_text())
    assert state["status"] == "finished"

    assert "nothing has changed" in run_it(tmp_path, 1)
    assert CALLS == ["count 1", "double"]

    run_it(tmp_path, 2)
    assert CALLS == ["count 1", "double", "count 2", "double"], "another input is other work"
    run_it(tmp_path, 1)
    assert len(CALLS) == 4, "what was done before is still there"

    run_it(tmp_path, 1, fresh=True)
    assert CALLS[4:] == ["count 1", "double"]


def test_a_crash_continues_in_the_same_mlflow_run(tmp_path: Path) -> None:
    CALLS.clear()
    with pytest.raises(RuntimeError, match="power cut") as caught:
        run_it(tmp_path, 13)
    log = Path(caught.value.labelmill_log)
    assert "power cut" in log.read_text()
    before = json.loads((tmp_path / "j" / "run.json").read_text())
    assert before["status"] == "running"

    output = run_it(tmp_path, 13)
    assert "count: kept from before" in output
    assert CALLS == ["count 13", "double", "double"]
    after = json.loads((tmp_path / "j" / "run.json").read_text())
    assert after["mlflow_run"] == before["mlflow_run"]
    assert after["status"] == "finished"


def test_two_processes_cannot_run_one_job(tmp_path: Path) -> None:
    import fcntl

    (tmp_path / "j").mkdir()
    with open(tmp_path / "j" / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process is running this job"):
            run_it(tmp_path, 1)


def test_keys_follow_content() -> None:
    assert stage_key("a", count, {"n": 1}) == stage_key("a", count, {"n": 1})
    assert len({stage_key("a", count, {"n": 1}), stage_key("a", count, {"n": 2}), stage_key("b", count, {"n": 1})}) == 3
    with pytest.raises(TypeError, match="must be data"):
        fingerprint(object())


def test_a_dead_tracking_server_is_an_error_before_anything_runs(tmp_path: Path) -> None:
    CALLS.clear()
    dead = job(tmp_path, 1).model_copy(update={"tracking": TrackingConfig(uri="http://127.0.0.1:9", timeout_s=3)})
    with pytest.raises(UserError, match=r"127\.0\.0\.1:9"):
        execute(dead, method, console=Console(file=io.StringIO()))
    assert CALLS == []


def test_a_stream_trains_again_when_its_samples_change_and_not_when_it_is_read_faster(
    make_text_data: Callable[..., Manifest], tmp_path: Path
) -> None:
    train = make_text_data(40, 9, classes=4)
    other = make_text_data(24, 9, classes=4, name="other")
    folder, keys = tmp_path / "kept", tmp_path / "keys.txt"
    keys.write_text("s00001\ns00007\n")

    def key(**section: Any) -> str:
        config = DataConfig(train=train.root, test=train.root, **section)
        stream = config.training_stream(train, folder, "text", 8, seed=1)
        return stage_key("fit", count, {"train": stream})

    mix, chosen = [{"data": other.root, "weight": 2.0}], {"kind": "keys", "file": str(keys)}
    assert key() == key(prefetch_mb=3, readers=1, decode_threads=4, verify=True, cache={"folder": str(tmp_path)})
    different = [key(), key(window=2), key(max_bad_samples=1), key(on_damage="shard"), key(mix=mix), key(select=chosen)]
    different += [key(mix=mix, weight=3.0), key(mix=mix, select=chosen)]
    keys.write_text("s00001\n")
    different.append(key(select=chosen))
    larger = make_text_data(25, 9, classes=4, name="larger")
    different.append(key(mix=[{"data": larger.root, "weight": 2.0}]))
    assert len(set(different)) == len(different)


def test_the_training_stream_of_a_section_selects_from_the_training_set_and_mixes_the_rest_in(
    make_text_data: Callable[..., Manifest], tmp_path: Path
) -> None:
    train, other = make_text_data(40, 9, classes=4), make_text_data(24, 9, classes=4, name="other")
    section = {"select": {"kind": "classes", "ids": [0]}, "mix": [{"data": other.root, "weight": 3.0}], "weight": 2.0}
    config = DataConfig(train=train.root, test=train.root, **section)
    stream = config.training_stream(train, tmp_path / "kept", "text", 10, seed=5)
    assert isinstance(stream, MixedSpec)
    assert [part.name for part in stream.parts] == ["texts", "other"]
    assert [part.epoch_samples for part in stream.parts] == [10, 24]
    assert stream.epoch_samples == 25, "one epoch of the selected ten"
    assert stream.mix.shares == (2, 3)
    ranges, order = stream.split(0, 10)
    assert [hi - lo for lo, hi in ranges] == [4, 6]
    assert order is not None
    plain = DataConfig(train=train.root, test=train.root).training_stream(train, tmp_path / "kept", "text", 10)
    assert isinstance(plain, StreamSpec)
    assert plain.selection is None


def test_the_report_tells_what_reading_met(make_text_data: Callable[..., Manifest], tmp_path: Path) -> None:
    train, other = make_text_data(20, 9, classes=4), make_text_data(24, 9, classes=4, name="other")

    def health(job: Any, run: Run) -> None:
        config = DataConfig(train=train.root, test=train.root, mix=[{"data": other.root, "weight": 1.0}])
        run.track_data(train=config.training_stream(train, run.folder, "text", 8), test=train)
        folder = run.folder / "fit"
        folder.mkdir()
        reading = {
            "time": 0.0,
            "kind": "reading",
            "data": "texts",
            "rank": 0,
            "samples": 20,
            "fetch_seconds": 0.1,
            "bytes": 7,
        }
        place = ["shard-000001.arrow", 512, 9, "bad checksum"]
        run._on_event(folder, reading | {"retries": {"HTTP 503": 2}, "damage": [place]})
        run._on_event(folder, reading | {"rank": 1, "retries": {"HTTP 503": 1, "timeout": 1}, "damage": [place]})
        run._on_event(folder, {"time": 0.0, "kind": "bad", "data": "texts", "samples": [["s00009", "bad checksum"]]})
        run.report_data_health(Fitted(folder))

    report = execute(job(tmp_path, 1), health, console=Console(file=io.StringIO()))
    tables = report.tables
    assert tables["bad samples"].rows == [["s00009", "bad checksum"]]
    assert tables["damaged shards"].rows == [["shard-000001.arrow", "512", "9", "bad checksum"]], "named once"
    assert tables["storage requests tried again"].rows == [["HTTP 503", "3"], ["timeout", "1"]]
    assert report.metrics["data/storage_retries"] == 4
    assert report.metrics["data/bad_samples"] == 1
    assert {"data_train", "data_train_mix_1", "data_test", "stream_train"} <= set(report.meta)
    assert report.meta["data_train_mix_1"] == other.digest


def test_a_search_needs_a_held_out_set_of_its_own(make_text_data: Callable[..., Manifest], tmp_path: Path) -> None:
    train, dev = make_text_data(20, 9, classes=4), make_text_data(12, 9, classes=4, name="dev")
    other = make_text_data(12, 9, classes=5, name="other")
    raw = {
        "workload": "discrimination.partial_fc",
        "name": "x",
        "data": {"train": train.root, "test": train.root},
        "encoder": {"kind": "char_ngrams", "dim": 8},
        "train": {"global_batch": 4, "steps": 2, "evaluate_every": 1},
        "search": {"metric": "eval/top1", "goal": "max", "trials": 2, "space": {"train.learning_rate": [0.1, 0.2]}},
    }
    job_type = find_workload("discrimination.partial_fc").job_type
    with pytest.raises(
        UserError, match=r"eval/top1 would be measured on the test set: name a held-out set in data\.dev"
    ):
        validate_job(raw, job_type, source="job.yaml")
    with_dev: Any = validate_job(raw | {"data": raw["data"] | {"dev": dev.root}}, job_type, source="job.yaml")
    assert with_dev.data.held_out(train).digest == dev.digest
    wrong = DataConfig(train=train.root, test=train.root, dev=other.root)
    with pytest.raises(UserError, match=r"data\.dev .* has labels single of 5 classes"):
        wrong.open()
    assert DataConfig(train=train.root, test=train.root).held_out(train) is train
