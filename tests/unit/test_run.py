"""Stages are kept by their inputs; crashed stages run again; runs are locked; fresh starts over."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from labelmill.errors import UserError
from labelmill.job import Job, TrackingConfig
from labelmill.run import Run, execute
from labelmill.stages import fingerprint, stage_key

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
