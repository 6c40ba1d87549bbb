"""One training through faults of a cluster, struck for real: prints what each cost as a Markdown table.

    PYTHONPATH=platform:. python -m tests.survival_cluster [--json] [--short] DATA FOLDER

A head without training workers and up to three hosts with one each, on this machine (`ray.cluster_utils`). The training
must reach its end with the history, weights and checkpoints of a run that nothing happened to; tests/system look at that.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil

from labelmill.cluster import set_environment

HEALTH = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 1000,
    "health_check_timeout_ms": 3000,
    "health_check_failure_threshold": 4,
}
STEPS = 500


def processes(title: str) -> list[psutil.Process]:
    """Our descendants with that in their title."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if title in " ".join(process.cmdline()):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


class Story:
    """Faults in order; each is struck when the attempt after the one before has made a few steps."""

    def __init__(self, cluster: Any, folder: Path, short: bool) -> None:
        self.cluster, self.folder = cluster, folder
        self.hosts = [cluster.add_node(num_cpus=2) for _ in range(2)]
        more = [("SIGKILL of a worker", self.kill_worker), ("SIGKILL of the mailbox", self.kill_mailbox)]
        self.plan: list[tuple[str, Callable[[], None]]] = [
            *([] if short else more),
            ("SIGKILL of Train's controller", self.kill_controller),
            ("SIGKILL of a raylet", self.kill_raylet),
            ("two hosts more", self.add_hosts),
            ("preemption notice", self.drain),
            ("a worker stands still (SIGSTOP)", self.freeze),
        ]
        self.struck: list[dict[str, Any]] = []
        self.frozen: list[psutil.Process] = []
        self.attempt_began, self.steps_seen = 0, 0

    def on_event(self, event: dict[str, Any]) -> None:
        with open(self.folder / "events.jsonl", "a", encoding="utf-8") as out:
            out.write(json.dumps(event, default=str) + "\n")
        if event["kind"] == "hang":
            for process in self.frozen:
                process.send_signal(signal.SIGCONT)
        if event["kind"] != "metrics":
            return
        from labelmill.training.attempts import read_attempts

        attempts = len(read_attempts(self.folder / "work"))
        if attempts != self.attempt_began:
            self.attempt_began, self.steps_seen = attempts, 0
        self.steps_seen += 1
        if self.steps_seen == 7 and len(self.struck) < min(attempts, len(self.plan)):
            name, strike = self.plan[len(self.struck)]
            self.struck.append({"fault": name, "time": time.time(), "attempt": attempts, "step": event["step"]})
            strike()

    def kill_worker(self) -> None:
        processes("ray::RayTrainWorker")[0].kill()

    def kill_controller(self) -> None:
        processes("ray::TrainController")[0].kill()

    def kill_mailbox(self) -> None:
        processes("ray::Mailbox")[0].kill()

    def kill_raylet(self) -> None:
        os.kill(self.hosts[1].all_processes["raylet"][0].process.pid, signal.SIGKILL)

    def add_hosts(self) -> None:
        self.hosts[1:] = [self.cluster.add_node(num_cpus=2) for _ in range(2)]

    def drain(self) -> None:
        from ray._raylet import GcsClient
        from ray.core.generated import autoscaler_pb2

        reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        deadline_ms = int(time.time() * 1000) + 30_000
        accepted, why = GcsClient(address=self.cluster.address).drain_node(
            self.hosts[2].node_id, reason, "taken away", deadline_ms
        )
        assert accepted, why

    def freeze(self) -> None:
        self.frozen = processes("ray::RayTrainWorker")[:1]
        self.frozen[0].suspend()


def run_story(data: str, folder: Path, short: bool = False) -> dict[str, Any]:
    """Trains through all faults; returns the strikes and the attempts."""
    set_environment()
    import ray
    from ray.cluster_utils import Cluster

    from labelmill.job import ClusterConfig
    from labelmill.training.attempts import read_attempts
    from labelmill.training.fit import fit
    from tests.survival import fit_task, steps_done_again

    for name, value in HEALTH.items():
        os.environ[f"RAY_{name}"] = str(value)
    temp = tempfile.mkdtemp(prefix="lms", dir="/tmp")
    cluster = Cluster(initialize_head=True, shutdown_at_exit=False, head_node_args={"num_cpus": 1, "temp_dir": temp})
    ray.init(address=cluster.address, logging_level="ERROR", log_to_driver=False)
    try:
        story = Story(cluster, folder, short)
        config = ClusterConfig(
            workers=3, min_workers=1, cpus_per_worker=2, read_cpus=0.5, max_failures=2, hang_limit_s=6, resize_every_s=2
        )
        task = replace(fit_task(data, folder / "work", STEPS, pause_s=0.05), hang_limit_s=config.hang_limit_s)
        fit(task, config, "story", story.on_event)
        return {
            "strikes": story.struck,
            "attempts": read_attempts(folder / "work"),
            "again": steps_done_again(folder / "work"),
        }
    finally:
        ray.shutdown()
        cluster.shutdown()
        for process in psutil.Process().children(recursive=True):
            process.kill()


def table(found: dict[str, Any]) -> str:
    """What each fault cost, from the strike to the first step of the attempt that followed."""
    rows = ["| fault | noticed as | workers | outage s | steps done again |", "|---|---|---|---|---|"]
    for strike, before, after in zip(found["strikes"], found["attempts"], found["attempts"][1:], strict=False):
        again = {int(step): count for step, count in found["again"].items()}.get(after["from_step"], 0)
        rows.append(
            f"| {strike['fault']} | {after['why'][:90]} | {before['workers']} -> {after['workers']} | "
            f"{after['outage_s']:.1f} | {again} |"
        )
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--short", action="store_true", help="leave out what other tests strike as well")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    found = run_story(args.data, args.folder, args.short)
    print(json.dumps(found) if args.json else table(found))


if __name__ == "__main__":
    sys.exit(main())
