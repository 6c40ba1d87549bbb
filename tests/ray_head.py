"""A Ray head with its dashboard and job server on loopback, apart from every other Ray session of this machine."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil

BIN = Path(sys.executable).parent


def free_ports(count: int) -> list[int]:
    """Ports that were free a moment ago, all different."""
    with contextlib.ExitStack() as stack:
        return [stack.enter_context(socket.create_server(("127.0.0.1", 0))).getsockname()[1] for _ in range(count)]


class RayHead:
    """`ray start --head` in a process group and a temporary folder of its own. Use as a context manager.

    Attributes:
        url: of the job server.
        token: what its users must show.
        folder: Ray's temporary folder: logs of all processes.
    """

    def __init__(self, cpus: float = 2, token: str | None = None, **environment: str) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="lm", dir="/tmp"))  # a socket's path may have 107 bytes
        self.token, self.cpus = token, cpus
        self.port, self.dashboard, client, agent, grpc, runtime, metrics = free_ports(7)
        self.url = f"http://127.0.0.1:{self.dashboard}"
        self._ports = {
            "port": self.port,
            "dashboard-port": self.dashboard,
            "ray-client-server-port": client,
            "dashboard-agent-listen-port": agent,
            "dashboard-agent-grpc-port": grpc,
            "runtime-env-agent-port": runtime,
            "metrics-export-port": metrics,
        }
        keep = ("PYTHONPATH", "RAY_ADDRESS", "AWS_", "MLFLOW_", "LABELMILL_")
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith(keep)}
        self.environment |= {
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "HOME": str(self.folder),
            "OMP_NUM_THREADS": "1",
            "RAY_AUTH_MODE": "token" if token else "disabled",
            **({"RAY_AUTH_TOKEN": token} if token else {}),
            **environment,
        }
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> RayHead:
        command = [str(BIN / "ray"), "start", "--head", "--block", "--node-ip-address=127.0.0.1"]
        command += [f"--num-cpus={self.cpus}", "--object-store-memory=150000000", "--disable-usage-stats"]
        command += ["--dashboard-host=127.0.0.1", "--include-dashboard=true", f"--temp-dir={self.folder}/ray"]
        command += [f"--{name}={port}" for name, port in self._ports.items()]
        log = open(self.folder / "start.log", "wb")
        self._process = subprocess.Popen(
            command, env=self.environment, cwd=self.folder, stdout=log, stderr=log, start_new_session=True
        )
        until = time.monotonic() + 120
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > until:
                text = (self.folder / "start.log").read_text()
                self.__exit__()
                raise RuntimeError(f"no Ray head: {text[-2000:]}")
            time.sleep(0.2)
        return self

    def _answers(self) -> bool:
        request = urllib.request.Request(f"{self.url}/api/version")
        if self.token:
            request.add_header("Authorization", f"Bearer {self.token}")
        try:
            with urllib.request.urlopen(request, timeout=2):
                return True
        except (OSError, urllib.error.HTTPError):
            return False

    def processes(self) -> list[psutil.Process]:
        """Every process of this session, by its folder or by descent."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("HOME") == str(self.folder):
                    found.append(process)
        return found

    def __exit__(self, *_: object) -> None:
        # a graceful end takes Ray ten seconds
        while found := self.processes():
            for process in found:
                with contextlib.suppress(psutil.Error):
                    process.kill()
            psutil.wait_procs(found, 5)
        if self._process:
            self._process.wait(5)
        shutil.rmtree(self.folder, ignore_errors=True)
