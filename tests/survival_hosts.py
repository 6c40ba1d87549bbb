"""Two hosts on this machine, with their own network, processes and shared memory: one is cut off, and one is killed.

    PYTHONPATH=platform:. python -m tests.survival_hosts [--json] DATA FOLDER

Needs root and `ip`. A Ray head and the driver run on host A (10.77.0.1), a raylet on host B (10.77.0.2); both train. The
training must reach its end with the history, weights and checkpoints of a run that nothing happened to.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from labelmill.cluster import set_environment
from tests.survival_cluster import HEALTH, STEPS, table

PYTHON = sys.executable
RAY = str(Path(sys.executable).with_name("ray"))


def why_not() -> str:
    """What this machine lacks for two hosts; empty when it has all."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if not shutil.which("ip") or not shutil.which("unshare"):
        return "there is no `ip` or no `unshare`"
    tried = subprocess.run(["unshare", "-n", "-p", "-f", "-m", "-u", "true"], capture_output=True, text=True)
    return tried.stderr.strip()


class Hosts:
    """Two network namespaces and a wire between them. Use as a context manager."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.mark = folder, f"lm{os.getpid()}"
        self.running: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Hosts:
        for name in "ab":
            _ip("netns", "add", self.mark + name)
        _ip("link", "add", f"{self.mark}a", "type", "veth", "peer", "name", f"{self.mark}b")
        for number, name in enumerate("ab", start=1):
            host = self.mark + name
            _ip("link", "set", host, "netns", host)
            _ip("-n", host, "link", "set", host, "name", "eth0")
            _ip("-n", host, "addr", "add", f"10.77.0.{number}/24", "dev", "eth0")
            for link in ("lo", "eth0"):
                _ip("-n", host, "link", "set", link, "up")
        return self

    def __exit__(self, *error: object) -> None:
        for name in list(self.running):
            self.kill(name)
        for name in "ab":
            subprocess.run(["ip", "netns", "del", self.mark + name], capture_output=True)

    def start(self, name: str, command: str) -> None:
        """A host that boots into a shell command."""
        boot = f"mount -t tmpfs tmpfs /dev/shm && hostname host-{name} && {command}"
        isolated = ["unshare", "-p", "-f", "-m", "-u", "--kill-child", "--mount-proc", "bash", "-c", boot]
        with open(self.folder / f"host-{name}.log", "ab") as log:
            self.running[name] = subprocess.Popen(
                ["ip", "netns", "exec", self.mark + name, *isolated],
                stdout=log, stderr=log, env=_environment(), start_new_session=True,
            )  # fmt: skip

    def kill(self, name: str) -> None:
        """Every process of the host at once."""
        process = self.running.pop(name)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)

    def cut(self, name: str) -> None:
        """Takes the wire out: nobody is told."""
        _ip("-n", self.mark + name, "link", "set", "eth0", "down")

    def mend(self, name: str) -> None:
        """Puts the wire back."""
        _ip("-n", self.mark + name, "link", "set", "eth0", "up")


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


def _environment() -> dict[str, str]:
    health = {f"RAY_{name}": str(value) for name, value in HEALTH.items()}
    return os.environ | health | {"GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1", "RAY_ADDRESS": ""}


def run_story(data: str, folder: Path) -> dict[str, Any]:
    """Trains through a cut and a kill; returns the strikes and the attempts."""
    from labelmill.training.attempts import read_attempts
    from tests.survival import steps_done_again

    set_environment()
    temp = tempfile.mkdtemp(prefix="lmh", dir="/tmp")
    options = "--object-store-memory=150000000 --disable-usage-stats --block"
    head = f"{RAY} start --head --node-ip-address=10.77.0.1 --port=6379 --num-cpus=3 --include-dashboard=false"
    driver = f"{PYTHON} -m tests.survival_hosts --driver {data} {folder}"
    second = f"exec {RAY} start --address=10.77.0.1:6379 --node-ip-address=10.77.0.2 --num-cpus=2 {options}"
    strikes: list[dict[str, Any]] = []

    with Hosts(folder) as hosts:
        hosts.start("a", f"({head} --temp-dir={temp} {options} &) ; {driver}")
        hosts.start(
            "b", f"for i in $(seq 60); do (: > /dev/tcp/10.77.0.1/6379) 2>/dev/null && break; sleep 0.2; done; {second}"
        )

        def back() -> None:
            hosts.mend("b")
            hosts.kill("b")  # it restarts, as a host does that has lost its cluster
            hosts.start("b", second)

        plan: list[tuple[str, Callable[[], None]]] = [
            ("a host is cut off (network)", lambda: hosts.cut("b")),
            ("the host is back", back),
            ("SIGKILL of a host", lambda: hosts.kill("b")),
        ]
        deadline = time.monotonic() + 500
        while hosts.running["a"].poll() is None:
            if time.monotonic() > deadline:
                raise TimeoutError(f"the training didn't end; see {folder}")
            time.sleep(0.1)
            attempts, steps = read_attempts(folder / "work"), _steps(folder, len(strikes) + 1)
            if len(strikes) < len(plan) and len(attempts) == len(strikes) + 1 and steps >= 7:
                name, strike = plan[len(strikes)]
                strikes.append({"fault": name, "time": time.time(), "attempt": len(attempts)})
                strike()
        shutil.rmtree(temp, ignore_errors=True)
        if not (folder / "done").exists():
            raise RuntimeError((folder / "host-a.log").read_text()[-3000:])
    return {"strikes": strikes, "attempts": read_attempts(folder / "work"), "again": steps_done_again(folder / "work")}


def _steps(folder: Path, attempt: int) -> int:
    """Steps that an attempt (from 1) has made, as its driver saw them."""
    path = folder / f"steps-{attempt}"
    return path.stat().st_size if path.is_file() else 0


def drive(data: str, folder: Path) -> None:
    """The driver, on host A."""
    import ray

    from labelmill.job import ClusterConfig
    from labelmill.training.attempts import read_attempts
    from labelmill.training.fit import fit
    from tests.survival import fit_task

    deadline = time.monotonic() + 60
    while True:
        try:
            ray.init(address="10.77.0.1:6379", logging_level="ERROR", log_to_driver=False)
            if len(ray.nodes()) == 2:
                break
            ray.shutdown()
        except ConnectionError:
            pass
        if time.monotonic() > deadline:
            raise TimeoutError("the two hosts did not find each other")
        time.sleep(0.5)

    def on_event(event: dict[str, Any]) -> None:
        with open(folder / "events.jsonl", "a", encoding="utf-8") as out:
            out.write(json.dumps(event, default=str) + "\n")
        if event["kind"] == "metrics":
            with open(folder / f"steps-{len(read_attempts(folder / 'work'))}", "a", encoding="utf-8") as out:
                out.write(".")

    # one worker a host: the head's third CPU is for reading
    config = ClusterConfig(workers=2, min_workers=1, cpus_per_worker=2, read_cpus=1, max_failures=2, resize_every_s=2)
    fit(replace(fit_task(data, folder / "work", STEPS, pause_s=0.05)), config, "hosts", on_event)
    ray.shutdown()
    (folder / "done").touch()
    os._exit(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--driver", action="store_true", help="internal: be the driver on host A")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    if args.driver:
        return drive(args.data, args.folder)
    if problem := why_not():
        raise SystemExit(f"two hosts aren't possible here: {problem}")
    found = run_story(args.data, args.folder)
    print(json.dumps(found) if args.json else table(found))
    return None


if __name__ == "__main__":
    main()
