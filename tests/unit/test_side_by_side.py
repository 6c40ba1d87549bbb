"""Fits of one run at the same time: order, limits, failures; and how many groups a cluster holds."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from labelmill.job import ClusterConfig
from labelmill.training import room
from labelmill.training.parallel import StoppedError, side_by_side


def test_values_come_in_order_and_no_more_run_than_fit() -> None:
    running, most, lock = 0, 0, threading.Lock()

    def call(number: int) -> Callable[[], int]:
        def work() -> int:
            nonlocal running, most
            with lock:
                running += 1
                most = max(most, running)
            time.sleep(0.05 * (4 - number % 4))
            with lock:
                running -= 1
            return number

        return work

    assert side_by_side([call(n) for n in range(6)], 3, threading.Event()) == list(range(6))
    assert most == 3
    most = 0
    assert side_by_side([call(n) for n in range(2)], 1, threading.Event()) == [0, 1]
    assert most == 1


def test_a_failure_ends_the_others_and_is_what_is_raised() -> None:
    stop, started = threading.Event(), list[str]()

    def fails() -> None:
        time.sleep(0.1)
        raise ValueError("no data")

    def heeds() -> None:
        started.append("heeds")
        if not stop.wait(10):
            raise AssertionError("was not told to end")
        raise StoppedError

    def late() -> None:
        started.append("late")

    with pytest.raises(ValueError, match="no data"):
        side_by_side([heeds, fails, late], 2, stop)
    assert started == ["heeds"]
    assert not stop.is_set(), "the next fits may run"


@pytest.mark.parametrize(
    ("cpus", "cluster", "groups"),
    [
        ({"a": 2.0}, {"workers": 1, "cpus_per_worker": 0.75, "read_cpus": 0.25}, 2),
        ({"a": 1.9}, {"workers": 1, "cpus_per_worker": 0.75, "read_cpus": 0.25}, 1),
        ({"a": 4.0, "b": 4.0}, {"workers": 3, "cpus_per_worker": 1.0, "read_cpus": 0.5}, 2),
        ({"a": 0.5}, {"workers": 1, "cpus_per_worker": 1.0}, 0),
        ({"a": 64.0}, {"workers": 1, "cpus_per_worker": 1.0}, 4),
    ],
)
def test_groups_that_a_cluster_holds(
    monkeypatch: pytest.MonkeyPatch, cpus: dict[str, float], cluster: dict[str, float], groups: int
) -> None:
    monkeypatch.setattr(room, "draining_nodes", dict)
    nodes = {name: {"CPU": value} for name, value in cpus.items()}
    monkeypatch.setattr(room, "free_workers", lambda config: room._fitting(config, nodes))
    assert room.free_groups(ClusterConfig(**cluster), 4) == groups
