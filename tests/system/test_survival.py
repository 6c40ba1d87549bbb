"""Trainings that are struck for real, on clusters of their own: each ends as if nothing had happened.

What the faults cost in seconds is printed by `python -m tests.survival_cluster` and `tests.survival_hosts`; here is only
looked at, not bounded, how long an outage was: that depends on the machine.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from labelmill.training.attempt import mark_stragglers
from labelmill.training.attempts import read_attempts
from labelmill.training.checkpoint_files import step_of
from labelmill.training.local import spawn
from tests import survival_cluster, survival_hosts
from tests.survival import assert_as_uninterrupted, assert_no_orphans, fit_task, losses, train_locally, write_texts

ROOT = Path(__file__).resolve().parents[2]


def run_module(module: str, data: str, folder: Path, *options: str) -> dict[str, Any]:
    """A story in a process of its own: it has a Ray cluster of its own."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_", "AWS_"))}
    environment |= {"PYTHONPATH": f"{ROOT / 'platform'}:{ROOT}", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", module, "--json", *options, data, str(folder)],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        out, err = process.communicate(timeout=560)
    finally:
        for child in [*_descendants(process.pid), process]:
            child.kill()
    assert process.returncode == 0, f"{out[-2000:]}\n{err[-4000:]}"
    return json.loads(out.splitlines()[-1])


def _descendants(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The data, and a training of it that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole")
    data = write_texts(folder)
    spawn(train_locally, 2, data, str(folder / "work"), survival_cluster.STEPS)
    return {"data": data, "work": folder / "work"}


# --- a cluster -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster(whole: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("cluster")
    return folder, run_module("tests.survival_cluster", whole["data"], folder, "--short")


EXPECTED = [
    ("SIGKILL of Train's controller", 2, 2, "ActorDiedError"),
    ("SIGKILL of a raylet", 2, 1, "."),
    ("two hosts more", 1, 3, r"there is room for [23] workers instead of 1"),  # they come one after the other
    ("preemption notice", 3, 2, r"1 host\(s\) are about to be taken away"),
    ("a worker stands still (SIGSTOP)", 2, 2, "no progress for"),
]


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(EXPECTED)), ids=[fault for fault, *_ in EXPECTED])
def test_a_fault_costs_one_attempt(cluster: tuple[Path, dict[str, Any]], number: int) -> None:
    _, found = cluster
    fault, before, after, why = EXPECTED[number]
    strike, old, new = found["strikes"][number], found["attempts"][number], found["attempts"][number + 1]
    assert strike["fault"] == fault
    assert (old["workers"], new["workers"]) == (before, after)
    assert re.search(why, new["why"]), new["why"]
    assert new["outage_s"] > 0
    planned = fault in ("two hosts more", "preemption notice")
    again = found["again"].get(str(new["from_step"]), 0)
    # a planned stop is at a checkpoint made for it; others cost what came after the last one (every 4 steps, in the
    # background)
    assert again == 0 if planned else again < 20, f"{again} steps were done again"


@pytest.mark.slow
def test_the_training_ends_as_if_nothing_had_happened(
    cluster: tuple[Path, dict[str, Any]], whole: dict[str, Any]
) -> None:
    folder, found = cluster
    assert len(found["attempts"]) == len(EXPECTED) + 1, [a["why"] for a in found["attempts"]]
    assert len(losses(folder / "work")) == survival_cluster.STEPS
    assert_as_uninterrupted(folder / "work", whole["work"], same_world=False)


@pytest.mark.slow
def test_a_hang_leaves_the_stacks_of_all_ranks_that_can_write(cluster: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = cluster
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    hang = next(event for event in events if event["kind"] == "hang")
    assert re.search(r"no progress for \d+ s \(rank 0 on .*: .* of step \d+; rank 1 on .*\)", hang["text"])
    stacks = [Path(file).read_text() for file in hang["files"]]
    assert stacks, hang
    # a rank waits for the one that stands still in any part of a step: its stack shows the part that it told
    told = dict(re.findall(r"rank (\d+) on [^:]*: (.*?) of step \d+", hang["text"]))
    called = {"forward": "forward", "backward": "backward", "update": "step"}
    for file, text in zip(hang["files"], stacks, strict=True):
        part = told[str(int(Path(file).stem.rpartition("-")[2]))]
        assert "loop.py" in text, (part, text)
        assert re.search(rf"in \w*{called.get(part, '')}\b", text), (part, text)
    assert all("Thread" in text for text in stacks)


@pytest.mark.slow
def test_ranks_are_shown_with_their_own_share_of_a_step(cluster: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = cluster
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    ranks = [event for event in events if event["kind"] == "ranks"][-1]["ranks"]
    assert set(ranks) == {"0", "1"}
    for state in ranks.values():
        assert 1000 * state["own_s"] / state["steps"] >= 50, "each sleeps 50 ms a step"
        assert state["own_ms"] >= 50
        assert state["host"]


def test_stragglers_are_those_whose_own_work_takes_longer() -> None:
    def marked(*own_ms: float | None) -> list[bool]:
        ranks = mark_stragglers({rank: {"own_ms": value} for rank, value in enumerate(own_ms)})
        return [state["straggler"] for state in ranks.values()]

    assert marked(50, 51, 90, 49) == [False, False, True, False]
    assert marked(50, 90) == [False, True]
    assert marked(1, 3) == [False, False], "a few milliseconds are noise"
    assert marked(50, None) == [False, False]


@pytest.mark.slow
def test_one_of_two_workers_is_killed(whole: dict[str, Any], tmp_path: Path, ray_session: None) -> None:
    from labelmill.job import ClusterConfig
    from labelmill.training.fit import fit

    killed: list[int] = []

    def on_event(event: dict[str, Any]) -> None:
        if event["kind"] == "metrics" and event["step"] >= 40 and not killed:
            victim = survival_cluster.processes("ray::RayTrainWorker")[0]
            killed.append(victim.pid)
            victim.kill()

    task = fit_task(whole["data"], tmp_path / "work", survival_cluster.STEPS, pause_s=0.01)
    fit(task, ClusterConfig(workers=2, cpus_per_worker=0.75, read_cpus=0.25), "killed", on_event)
    attempts = read_attempts(tmp_path / "work")
    assert [attempt["workers"] for attempt in attempts] == [2, 2]
    assert attempts[1]["from_step"] >= 36
    assert attempts[1]["outage_s"] > 0
    assert_as_uninterrupted(tmp_path / "work", whole["work"])


# --- hosts ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hosts(whole: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    if problem := survival_hosts.why_not():
        pytest.skip(f"two hosts aren't possible here: {problem}")
    folder = tmp_path_factory.mktemp("hosts")
    return folder, run_module("tests.survival_hosts", whole["data"], folder)


@pytest.mark.slow
def test_a_host_is_cut_off_comes_back_and_is_killed(hosts: tuple[Path, dict[str, Any]], whole: dict[str, Any]) -> None:
    folder, found = hosts
    assert [strike["fault"] for strike in found["strikes"]] == [
        "a host is cut off (network)",
        "the host is back",
        "SIGKILL of a host",
    ]
    assert [attempt["workers"] for attempt in found["attempts"]] == [2, 1, 2, 1]
    assert "there is room for 2 workers instead of 1" in found["attempts"][2]["why"]
    assert_as_uninterrupted(folder / "work", whole["work"], same_world=False)


# --- the driver ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_killed_driver_goes_on_where_it_was(tmp_path: Path) -> None:
    """`labelmill run` is killed with SIGKILL in the middle of training; the same command ends it, in the same MLflow run."""
    data = write_texts(tmp_path)
    job = {
        "workload": "discrimination.partial_fc",
        "name": "driven",
        "seed": 1,
        "output": str(tmp_path / "runs"),
        "cluster": {"workers": 1, "cpus_per_worker": 0.5},
        "data": {"train": data, "test": data},
        "encoder": {"kind": "char_ngrams", "dim": 16, "buckets": 512, "hidden": 16, "field": "text"},
        "head": {"scale": 12.0, "block_rows": 16},
        "train": {"global_batch": 24, "steps": 600, "checkpoint_every": 10, "log_every": 1, "learning_rate": 0.01},
        "tracking": {"system_metrics": False, "interval_s": 0.2},
    }
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    history = tmp_path / "runs" / "driven"

    def command(name: str) -> subprocess.Popen[str]:
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_", "AWS_"))}
        environment |= {"PYTHONPATH": f"{ROOT / 'platform'}:{ROOT}", "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            [sys.executable, "-m", "labelmill.cli", "run", str(tmp_path / "job.yaml"), "--set", f"name={name}"],
            cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True,
        )  # fmt: skip

    first = command("driven")
    until(lambda: any(step_of(path) >= 20 for path in history.glob("stages/fit-*/checkpoints/step-*")), first)
    children = _descendants(first.pid)
    # Ray's agents may stay, and do nothing; what could still train or serve objects must not
    agents = [child for child in children if "Agent" in child.name()]
    first.send_signal(signal.SIGKILL)
    killed_at = time.monotonic()
    first.wait()
    before = json.loads((history / "run.json").read_text())
    assert before["status"] == "running"
    _, alive = psutil.wait_procs([child for child in children if child not in agents], timeout=30)
    for child in agents:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    assert not alive, "Ray's processes outlive the driver that started them"
    gone_s = time.monotonic() - killed_at

    second = command("driven")
    (work,) = history.glob("stages/fit-*")
    until(lambda: len(read_attempts(work)) == 2 and read_attempts(work)[1].get("from_step") is not None, second)
    outage_s = time.monotonic() - killed_at
    out, _ = second.communicate(timeout=200)
    assert second.returncode == 0, out[-3000:]
    print(f"driver: processes gone after {gone_s:.1f} s, training again {outage_s:.1f} s after the kill")
    after = json.loads((history / "run.json").read_text())
    assert (after["status"], after["mlflow_run"]) == ("finished", before["mlflow_run"])
    attempts = read_attempts(work)
    assert attempts[1]["why"] == "the driver was started again"
    assert attempts[1]["from_step"] >= 20
    assert len(losses(work)) == 600
    assert_no_orphans(work)

    from labelmill.job import TrackingConfig
    from labelmill.tracking.config import Store, client_env

    with client_env(Store.of(TrackingConfig(), tmp_path / "runs")) as client:
        points = client.get_metric_history(after["mlflow_run"], "train/loss")
    assert sorted({point.step for point in points}) == list(range(1, 601)), "a metric is lost"

    spawn(plain_run, 1, str(tmp_path / "job.yaml"), str(tmp_path / "plain"))
    assert losses(work) == pytest.approx(losses(tmp_path / "plain"), rel=1e-5)


def until(found: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 150.0) -> None:
    deadline = time.monotonic() + seconds
    while not found():
        assert process.poll() is None, process.stdout and process.stdout.read()[-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def plain_run(rank: int, world: int, job_file: str, work: str) -> dict[str, Any]:
    """The same training in a process without Ray."""
    from functools import partial

    from labelmill.training.events import ListSink
    from labelmill.training.worker import FitTask, run_worker
    from labelmill.workload import load_job
    from workloads.discrimination.partial_fc import Classifier

    job: Any = load_job(job_file, [])[1]
    train, _ = job.data.open()
    objective = partial(Classifier, job.encoder, job.head, train.label.num_classes, job.seed, None, 0.0, 5)
    stream = job.data.training_stream(
        train, Path(work) / "data", global_batch=24, field="text", seed=job.seed, image_size=None, channels=3
    )
    task = FitTask(objective, job.train, stream, work=Path(work), seed=job.seed, augment=job.augment, transport="local")
    run_worker(task, rank, world, ListSink())
    return {}
