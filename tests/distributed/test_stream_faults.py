"""The stream on Ray when things die or storage misbehaves: the same batches, or a stop that names the place."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from labelmill.data.manifest import load_manifest
from labelmill.data.reading import POSITION
from labelmill.data.source import LocalSource, RaySource, Streams
from labelmill.data.spec import Reading, StreamSpec
from labelmill.encoders import CharNgramsConfig
from labelmill.errors import DataError, user_error_in
from labelmill.heads.config import HeadConfig
from labelmill.stages import Fitted
from labelmill.training.config import TrainConfig
from labelmill.training.events import ListSink
from labelmill.training.local import spawn
from labelmill.training.worker import FitTask, run_worker
from tests.conftest import s3_environment
from tests.faults import FaultServer, Rule
from workloads.discrimination.partial_fc import Classifier

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]

Rows = list[tuple[int, str, str]]


def taken(pieces: Any) -> Rows:
    """(position, key, text) of a rank's rows of a step."""
    rows: Rows = []
    for table in (table for part in pieces for table in part):
        rows += zip(*(table.column(c).to_pylist() for c in (POSITION, "key", "text")), strict=True)
    return rows


def expected(spec: StreamSpec) -> list[Rows]:
    source = LocalSource(spec)
    return [taken(source.pieces(step)) for step in range(spec.steps)]


def steps_of(ranks: list[RaySource], spec: StreamSpec, at: int, then: Callable[[], None]) -> list[Rows]:
    """Global batches of all ranks; `then` happens before step `at`."""
    batches = []
    for step in range(spec.steps):
        if step == at:
            then()
        batches.append([row for rank in ranks for row in taken(rank.pieces(step))])
    return batches


def kill(name: str) -> int:
    """SIGKILL to every Ray process of this session with that title; returns how many."""
    found = 0
    for process in psutil.Process().children(recursive=True):
        try:
            if name in " ".join(process.cmdline()):
                process.send_signal(signal.SIGKILL)
                found += 1
        except psutil.NoSuchProcess:
            continue
    return found


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 16 rows, so that a small data set has many; a budget that holds few of them."""
    monkeypatch.setattr(StreamSpec, "block_rows", 16)


def test_a_killed_reader_loses_and_repeats_nothing(make_text_data: Callable[..., Any], small_blocks: None) -> None:
    data = make_text_data(1600, 100)
    spec = StreamSpec(data, "text", 40, seed=3, window=4, stop=3000, reading=Reading(prefetch_mb=0.01))
    ranks = [Streams(r, 2, 0.25, "kill-reader").open(spec) for r in range(2)]

    def strike() -> None:
        deadline = time.monotonic() + 10
        while not kill("ray::_read_task") and time.monotonic() < deadline:
            time.sleep(0.05)
        assert time.monotonic() < deadline, "no reader was running"

    assert steps_of(ranks, spec, 7, strike) == expected(spec)
    [rank.close() for rank in ranks]


def test_a_killed_coordinator_loses_and_repeats_nothing(make_text_data: Callable[..., Any], small_blocks: None) -> None:
    data = make_text_data(800, 100)
    spec = StreamSpec(data, "text", 40, seed=3, window=4, stop=1500, reading=Reading(prefetch_mb=0.01))
    ranks = [Streams(r, 2, 0.25, "kill-coordinator").open(spec) for r in range(2)]
    killed: list[int] = []
    assert steps_of(ranks, spec, 9, lambda: killed.append(kill("ray::Coordinator"))) == expected(spec)
    assert killed[0] >= 1
    [rank.close() for rank in ranks]


def test_ranks_that_wait_for_each_other_dont_wait_forever(
    make_text_data: Callable[..., Any], small_blocks: None
) -> None:
    """A rank may be far ahead of another one: its demand goes over the budget, which the slow rank can't free."""
    data = make_text_data(800, 100)
    spec = StreamSpec(data, "text", 40, seed=3, window=4, reading=Reading(prefetch_mb=0.001))
    ranks = [Streams(r, 2, 0.25, "uneven").open(spec) for r in range(2)]
    first = [taken(ranks[0].pieces(step)) for step in range(spec.steps)]
    second = [taken(ranks[1].pieces(step)) for step in range(spec.steps)]
    assert [a + b for a, b in zip(first, second, strict=True)] == expected(spec)
    [rank.close() for rank in ranks]


def test_a_stream_can_be_asked_again(make_text_data: Callable[..., Any], small_blocks: None) -> None:
    """What was handed out and dropped is read again (a rank that lost its blocks with a host)."""
    data = make_text_data(400, 50)
    spec = StreamSpec(data, "text", 40, seed=3, window=2)
    source, whole = Streams(0, 1).open(spec), expected(spec)
    for step in (0, 1, 5, 6, 2, 9, 0):
        assert taken(source.pieces(step)) == whole[step]
    source.close()


# --- storage -------------------------------------------------------------------------------------------


@pytest.fixture
def bucket(
    ray_storage: FaultServer, monkeypatch: pytest.MonkeyPatch, make_text_data: Callable[..., Any]
) -> Iterator[StreamSpec]:
    """A stream over a data set in the bucket of the server that misbehaves on demand."""
    for name, value in s3_environment(ray_storage).items():
        monkeypatch.setenv(name, value)
    ray_storage.calm()
    local = make_text_data(400, 50)
    for folder, _, names in os.walk(local.root):
        for name in names:
            path = os.path.join(folder, name)
            with open(path, "rb") as file:
                ray_storage.put(f"data/set/{os.path.relpath(path, local.root)}", file.read())
    yield StreamSpec(load_manifest("s3://data/set"), "text", 40, seed=3, window=2, stop=700)
    ray_storage.rules = []


@pytest.mark.parametrize("fault", ["500", "503", "cut", "reset", "range-ignored", "flip"])
def test_faults_of_storage_change_no_batch(bucket: StreamSpec, ray_storage: FaultServer, fault: str) -> None:
    whole = expected(bucket)
    ray_storage.calm()
    ray_storage.rules = [Rule(fault, key="*.tar", first=1, times=1)]
    source = Streams(0, 1).open(bucket)
    assert [taken(source.pieces(step)) for step in range(bucket.steps)] == whole
    assert any(request.fault == fault for request in ray_storage.log)
    source.close()


@pytest.mark.parametrize("fault", ["500", "flip", "truncated"])
def test_lasting_faults_stop_the_stream_with_the_shard(
    bucket: StreamSpec, ray_storage: FaultServer, fault: str
) -> None:
    shard = bucket.manifest.shard_path(3)
    ray_storage.rules = [Rule(fault, key=shard.removeprefix("s3://"), times=None)]
    source = Streams(0, 1).open(bucket)
    with pytest.raises(Exception, match=r".") as caught:
        [source.pieces(step) for step in range(bucket.steps)]
    error = user_error_in(caught.value)
    assert isinstance(error, DataError)
    assert shard in str(error)
    source.close()


@pytest.mark.parametrize(
    ("fault", "says"), [("expired", "expired"), ("missing", "no such"), ("denied", "denied|permission")]
)
def test_what_storage_refuses_stops_the_stream_with_the_shard(
    bucket: StreamSpec, ray_storage: FaultServer, fault: str, says: str
) -> None:
    shard = bucket.manifest.shard_path(3)
    ray_storage.rules = [Rule(fault, key=shard.removeprefix("s3://"), method="*", times=None)]
    source = Streams(0, 1).open(bucket)
    with pytest.raises(Exception, match=r".") as caught:
        [source.pieces(step) for step in range(bucket.steps)]
    error = user_error_in(caught.value)
    assert isinstance(error, DataError)
    assert shard in str(error)
    assert re.search(says, str(error)), str(error)
    source.close()


def test_a_resume_reads_no_more_than_what_is_left_of_its_window(bucket: StreamSpec, ray_storage: FaultServer) -> None:
    spec = replace(bucket, stop=400)
    window = spec.plan.window_at(200)
    cursor = window.stop - 20
    sizes = {spec.manifest.shard_path(i).removeprefix("s3://"): spec.manifest.shards[i].bytes for i in window.shards}
    whole = [row for step in expected(spec) for row in step]
    ray_storage.calm()
    source = Streams(0, 1).open(replace(spec, start=cursor, stop=window.stop, global_batch=20))
    assert taken(source.pieces(0)) == whole[cursor : window.stop]
    source.close()
    read = sum(r.sent for r in ray_storage.gets("*.tar"))
    assert {r.path for r in ray_storage.gets("*.tar")} <= set(sizes)
    assert 0 < read <= sum(sizes.values())


# --- a training worker ---------------------------------------------------------------------------------


def train_locally(rank: int, world: int, data: str, work: str) -> dict[str, Any]:
    """The uninterrupted run, in processes without Ray."""
    run_worker(fit_task(data, work, "local"), rank, world, ListSink())
    return {}


def fit_task(data: str, work: str, transport: Any) -> FitTask:
    manifest = load_manifest(data)
    head = HeadConfig(scale=12.0, block_rows=16)
    config = TrainConfig(global_batch=24, steps=40, learning_rate=0.01, checkpoint_every=4, log_every=1)
    objective = partial(Classifier, CharNgramsConfig(dim=16, buckets=512, hidden=16), head, 7, 1, None, 0.0, 3)
    stream = StreamSpec(manifest, "text", 24, seed=2, window=2)
    return FitTask(objective, config, stream, work=Path(work), seed=1, transport=transport)


def test_a_killed_training_worker_changes_no_batch_and_no_weight(
    make_text_data: Callable[..., Any], tmp_path: Path
) -> None:
    from labelmill.job import ClusterConfig
    from labelmill.training.fit import fit

    data = make_text_data(200, 20)
    spawn(train_locally, 2, data.root, str(tmp_path / "whole"))
    killed: list[int] = []

    def strike(event: Any) -> None:
        if event["kind"] == "metrics" and event["step"] >= 9 and not killed:
            killed.append(kill("ray::RayTrainWorker"))

    cluster = ClusterConfig(workers=2, cpus_per_worker=0.5, max_failures=2)
    fit(fit_task(data.root, str(tmp_path / "killed"), "ray"), cluster, "killed", strike)
    assert killed[0] >= 1
    whole, found = Fitted(tmp_path / "whole"), Fitted(tmp_path / "killed")
    assert [r["step"] for r in found.history] == list(range(1, 41))
    losses = [[r["train/loss"] for r in fitted.history] for fitted in (whole, found)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    torch.testing.assert_close(found.head_rows("classes"), whole.head_rows("classes"), rtol=1e-4, atol=1e-6)
