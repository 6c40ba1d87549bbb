"""The parts of survival that need no cluster: the pulse of a rank, sizes, attempts, budgets, history on a full disk."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
import textwrap
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from labelmill.errors import ClusterError, DataError, JobError
from labelmill.job import ClusterConfig, validate_section
from labelmill.training import attempt, fit, room
from labelmill.training.attempt import HangError, Outcome
from labelmill.training.attempts import Attempts, read_attempts
from labelmill.training.checkpoint import CheckpointError, Position, Saving
from labelmill.training.config import TrainConfig
from labelmill.training.events import HistorySink, ListSink
from labelmill.training.loop import NotFiniteError
from labelmill.training.pulse import SAVE, STOP, Pulse


def test_stacks_are_written_even_while_a_library_holds_the_interpreter(tmp_path: Path) -> None:
    code = """
    import ctypes, sys, time
    from pathlib import Path
    from labelmill.training.pulse import Pulse

    def stuck_in_a_library():
        ctypes.PyDLL(None).usleep(1_500_000)  # a PyDLL keeps the lock: no other thread runs

    with Pulse(0, limit_s=0.4, stacks=Path(sys.argv[1])) as pulse:
        for _ in range(12):  # progress: no stacks
            pulse.enter("forward")
            time.sleep(0.1)
        print(Path(sys.argv[1]).stat().st_size)
        stuck_in_a_library()
    with Pulse(0, limit_s=0.3, stacks=Path(sys.argv[2])) as pulse:
        pulse.enter("export", watched=False)
        time.sleep(1.2)
    """
    stacks, none = tmp_path / "hangs" / "rank-0.txt", tmp_path / "hangs" / "rank-1.txt"
    command = [sys.executable, "-c", textwrap.dedent(code), str(stacks), str(none)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "0\n"
    assert "in stuck_in_a_library" in stacks.read_text()
    assert not none.exists(), "what isn't watched may take its time, and an empty file is removed"


def test_a_rank_wishes_a_checkpoint_when_it_is_time() -> None:
    pulse = Pulse(0, save_every_s=0.05)
    assert pulse.wish == 0
    time.sleep(0.06)
    assert pulse.wish == SAVE
    pulse._wish = STOP  # the driver's
    assert pulse.wish == SAVE | STOP
    pulse.saved()
    assert pulse.wish == STOP


def test_only_numbers_of_workers_that_divide_the_batch_are_used() -> None:
    def sizes(batch: int, low: int | None, high: int, shards: tuple[int, ...] = (), accumulation: int = 1) -> list[int]:
        config = TrainConfig(global_batch=batch, steps=1, accumulation=accumulation)
        task: Any = SimpleNamespace(config=config, head_shards=shards)
        return room.usable_sizes(task, ClusterConfig(workers=high, min_workers=low))

    assert sizes(24, 1, 3) == [1, 2, 3]
    assert sizes(32, 1, 4) == [1, 2, 4]
    assert sizes(24, None, 3) == [3]
    assert sizes(64, 1, 8, shards=(2,)) == [2, 4, 8]
    assert sizes(12, 1, 6, accumulation=2) == [1, 2, 3, 6]


def test_the_fields_are_checked() -> None:
    for raw, said in (
        ({"workers": 2, "min_workers": 3}, "min_workers 3 is more than workers 2"),
        ({"hang_limit_s": 0}, "hang_limit_s: Input should be greater than 0"),
        ({"max_failures": -1}, "max_failures: Input should be greater than or equal to 0"),
        ({"checkpoint_to": ""}, "checkpoint_to: String should have at least 1 character"),
    ):
        with pytest.raises(JobError, match=said):
            validate_section(raw, ClusterConfig, "job.yaml")
    with pytest.raises(JobError, match="checkpoint_every_s: Input should be greater than 0"):
        validate_section({"global_batch": 2, "steps": 1, "checkpoint_every_s": 0}, TrainConfig, "job.yaml")


def test_waiting_for_room(monkeypatch: pytest.MonkeyPatch) -> None:
    free = iter([0, 1, 1, 2])
    monkeypatch.setattr(room, "free_workers", lambda cluster: next(free))
    monkeypatch.setattr(room, "most_workers", lambda cluster: 2)
    monkeypatch.setattr(room, "_POLL_S", 0.001)
    # two fit once what the failed attempt had is free again; a third host isn't there, so nobody waits for it
    assert room.wait_for_room(ClusterConfig(workers=3, min_workers=1), [1, 2, 3], settle_s=60) == 2
    monkeypatch.setattr(room, "free_workers", lambda cluster: 1)
    monkeypatch.setattr(room, "most_workers", lambda cluster: 1)
    with pytest.raises(ClusterError, match=r"2 training worker\(s\) are needed .* only 1 fit .*cluster.min_workers"):
        room.wait_for_room(ClusterConfig(workers=2, wait_s=0.01), [2], settle_s=0)


def test_the_record_of_attempts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, events = iter([10.0, 11.0, 15.0, 16.0]), list[dict[str, Any]]()
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    attempts = Attempts(tmp_path)
    assert attempts.begin(2, "start", events.append) == 0
    attempts.stepped(0, 1)
    attempts.stepped(0, 7)
    attempts.end("a worker died")
    assert attempts.begin(1, "a worker died", events.append) == 1
    attempts.stepped(4, 5)
    with open(tmp_path / "attempts.jsonl", "a") as out:
        out.write('{"attempt": 1, "to_st')  # the driver dies
    first, second = read_attempts(tmp_path)
    assert (first["from_step"], first["to_step"], first["outage_s"]) == (0, 7, None)
    assert (second["why"], second["from_step"], second["outage_s"], second["ended"]) == ("a worker died", 4, 4.0, None)
    assert [event["outage_s"] for event in events] == [4.0]


def test_what_is_not_tried_again() -> None:
    from ray.exceptions import ActorDiedError
    from ray.train import WorkerGroupError

    cluster = ClusterConfig(max_failures=2)

    def final(failures: dict[int, Exception], count: int = 1) -> bool:
        try:
            fit._raise_if_final(Outcome("", error=WorkerGroupError("", failures)), count, cluster)
        except (WorkerGroupError, DataError):
            return True
        return False

    lost = RuntimeError("[gloo] Connection closed by peer [10.0.0.1]:1234")
    assert not final({0: lost, 1: ActorDiedError()})
    assert not final({0: lost})
    assert not final({0: CheckpointError("disk full")})
    assert not final({0: ValueError("after a lost peer"), 1: ActorDiedError()})
    assert final({0: ValueError("a bug")})
    assert final({0: NotFiniteError("the loss is nan")})
    assert final({0: DataError("shard 3 is damaged"), 1: ActorDiedError()})
    assert final({0: lost}, count=3)
    fit._raise_if_final(Outcome("", error=HangError("no progress")), 2, cluster)


class FailingSaver:
    """Fails the saves whose numbers are given, when they are waited for."""

    def __init__(self, *failing: int) -> None:
        self.failing, self.begun, self.saved = set(failing), 0, list[int]()
        self._step = 0

    def save(self, engine: Any, position: Position) -> None:
        self.begun += 1
        self._step = position.step

    def finish(self) -> None:
        if self.begun in self.failing:
            raise CheckpointError(f"step {self._step}: no space left")
        self.saved.append(self._step)


def test_failed_checkpoints_are_notes_until_there_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("labelmill.training.checkpoint._AGAIN_S", 0.0)
    sink = ListSink()

    def run(saver: FailingSaver, limit: int) -> list[int]:
        save = Saving(saver, None, limit, sink)  # type: ignore[arg-type]
        for step in (4, 8, 12, 16):
            save(Position(step, 0, ""))
        save.finish()
        return saver.saved

    assert run(FailingSaver(2, 3), 2) == [4, 16], "the one after a failure is begun all the same"
    assert [event["text"] for event in sink.events] == [
        "step 8: no space left. Training goes on (1 of 2 failures).",
        "step 12: no space left. Training goes on (2 of 2 failures).",
    ]
    assert run(FailingSaver(4, 5), 2) == [4, 8, 12, 16], "the last one is written again"
    with pytest.raises(CheckpointError, match="step 12"):
        run(FailingSaver(2, 3), 1)


def test_history_waits_for_room_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "history.jsonl"
    sink = HistorySink(path, ListSink())
    sink.post(kind="metrics", step=1, values={"loss": 1.0})
    real = open

    def full(file: Any, *args: Any, **options: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("builtins.open", full)
    sink.post(kind="metrics", step=2, values={"loss": 2.0})
    monkeypatch.setattr("builtins.open", real)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1]
    sink.post(kind="metrics", step=3, values={"loss": 3.0})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]


def test_a_short_reason() -> None:
    assert attempt._short(RuntimeError("Training failed due to worker errors:\n x\nrank 1 died")) == (
        "RuntimeError: rank 1 died"
    )


def test_a_start_of_ray_that_took_too_long_is_tried_once_more(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    from labelmill import cluster
    from labelmill.job import ClusterConfig

    texts = ["The current node timed out during startup. This could happen because ...", "", "The ports are taken."]

    def init(**_: object) -> None:
        text = texts.pop(0)
        if text:
            raise Exception(text)

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    # a session that other tests share keeps its token
    monkeypatch.setattr(cluster, "_locked", nullcontext)
    cluster.start(ClusterConfig())
    assert len(texts) == 1
    with pytest.raises(Exception, match="ports are taken"):
        cluster.start(ClusterConfig())
