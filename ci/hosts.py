#!/usr/bin/env python3
"""Several hosts on one machine, for trying a cluster: network namespaces with addresses, process tables and names of
their own, and `ssh` and `rsync` that reach them. Needs root, iproute2 and util-linux; nothing leaves the machine.

    ci/hosts.py up FOLDER head worker       makes the hosts; FOLDER is their shared storage and should have a short path
    ci/hosts.py run FOLDER head CMD...      runs a command on one, as ssh would
    ci/hosts.py kill FOLDER worker          the host loses its power
    ci/hosts.py back FOLDER worker          and comes back, with nothing running
    ci/hosts.py down FOLDER                 takes everything away

Hosts share the files of this machine, except /dev/shm, /tmp/ray and their home folders (FOLDER/hosts/NAME).
FOLDER/hosts/bin holds the `ssh` and `rsync` that Ray's launcher calls: the same commands over a socket, no sshd.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path
from typing import Any

NETWORK = "10.77.3"
_OPTIONS_WITH_VALUE = set("bcDEeFIiJLlmOopQRSWw")


class Hosts:
    """The hosts of a folder; what is known of them is in FOLDER/hosts/hosts.json."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).resolve()
        self.root = self.folder / "hosts"
        known = self.root / "hosts.json"
        self.state: dict[str, Any] = json.loads(known.read_text()) if known.is_file() else {}

    def address(self, name: str) -> str:
        """10.77.3.N of a host."""
        return f"{NETWORK}.{self.state['names'].index(name) + 1}"

    def save(self) -> None:
        (self.root / "hosts.json").write_text(json.dumps(self.state))

    def up(self, names: list[str]) -> None:
        """Makes a switch and the hosts. Raises SystemExit where the machine doesn't allow it."""
        missing = [tool for tool in ("ip", "unshare", "nsenter") if not shutil.which(tool)]
        if os.geteuid() or missing:
            raise SystemExit(f"hosts need root and ip, unshare, nsenter (missing: {missing or 'root'})")
        (self.root / "bin").mkdir(parents=True)
        self.state = {"prefix": f"lm{os.getpid()}", "names": names, "pids": {}}
        for tool in ("ssh", "rsync"):
            shim = self.root / "bin" / tool
            command = shlex.join([sys.executable, str(Path(__file__).resolve()), tool, str(self.folder)])
            shim.write_text(f'#!/bin/sh\nexec {command} "$@"\n')
            shim.chmod(0o755)
        lines = "".join(f"{self.address(name)} {name}\n" for name in names)
        (self.root / "etc-hosts").write_text(f"127.0.0.1 localhost\n{lines}")
        switch = f"{self.state['prefix']}-switch"
        _ip("netns", "add", switch)
        _ip("-n", switch, "link", "add", "bridge", "type", "bridge")
        _ip("-n", switch, "link", "set", "bridge", "up")
        self.save()
        for name in names:
            (self.root / name).mkdir()
            self.back(name)

    def back(self, name: str) -> None:
        """A host starts: its network, its processes from the first on."""
        switch, namespace = f"{self.state['prefix']}-switch", f"{self.state['prefix']}-{name}"
        port = f"p{self.state['names'].index(name)}"
        _ip("netns", "add", namespace)
        _ip("-n", switch, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", namespace)
        _ip("-n", switch, "link", "set", port, "master", "bridge", "up")
        for command in (["addr", "add", f"{self.address(name)}/24", "dev", "eth0"], ["link", "set", "eth0", "up"]):
            _ip("-n", namespace, *command)
        _ip("-n", namespace, "link", "set", "lo", "up")
        serve = shlex.join([sys.executable, str(Path(__file__).resolve()), "serve", str(self.folder), name])
        # bash is the host's first process and takes leave of orphans
        first = ["unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
        with open(self.root / f"{name}.log", "ab") as log:
            process = subprocess.Popen(
                ["ip", "netns", "exec", namespace, *first, "bash", "-c", f"{serve} & wait"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.state["pids"][name] = process.pid
        self.save()
        until = time.monotonic() + 20
        while True:
            with contextlib.suppress(OSError):
                self.connect(name).close()
                return
            if time.monotonic() > until or process.poll() is not None:
                raise SystemExit(f"host {name} doesn't start:\n{(self.root / f'{name}.log').read_text()}")
            time.sleep(0.05)

    def connect(self, name: str) -> socket.socket:
        """The host's door."""
        door = socket.socket(socket.AF_UNIX)
        door.connect(str(self.root / f"{name}.sock"))
        return door

    def kill(self, name: str) -> None:
        """The host is gone at once, its network too."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.state["pids"][name], signal.SIGKILL)
        namespace = f"{self.state['prefix']}-{name}"
        subprocess.run(["ip", "netns", "del", namespace], capture_output=True)
        (self.root / f"{name}.sock").unlink(missing_ok=True)
        time.sleep(0.2)

    def down(self) -> None:
        """Takes all hosts away; the folder stays."""
        for name in self.state.get("names", []):
            self.kill(name)
        if self.state:
            subprocess.run(["ip", "netns", "del", f"{self.state['prefix']}-switch"], capture_output=True)
        shutil.rmtree(self.root, ignore_errors=True)

    # --- on a host --------------------------------------------------------------------------------------

    def serve(self, name: str) -> None:
        """A host's first program: mounts what is its own, then runs what comes through the door."""
        subprocess.run(["hostname", name], check=True)
        for place in ("/tmp/ray", "/tmp/ray_tmp_mount"):
            os.makedirs(place, exist_ok=True)
        for place in ("/dev/shm", "/tmp/ray", "/tmp/ray_tmp_mount"):
            subprocess.run(["mount", "-t", "tmpfs", "tmpfs", place], check=True)
        subprocess.run(["mount", "--bind", self.root / "etc-hosts", "/etc/hosts"], check=True)
        door = socket.socket(socket.AF_UNIX)
        path = self.root / f"{name}.sock"
        path.unlink(missing_ok=True)
        door.bind(str(path))
        door.listen(50)
        while True:
            visitor, _ = door.accept()
            threading.Thread(target=self._answer, args=(name, visitor), daemon=True).start()

    def _answer(self, name: str, visitor: socket.socket) -> None:
        with visitor, visitor.makefile("rb", buffering=0) as incoming:  # nothing beyond the line is taken
            line = incoming.readline()
            if not line:
                return
            order = json.loads(line)
            if "connect" in order:
                with socket.create_connection(tuple(order["connect"])) as there:
                    _pump(visitor, there)
                return
            home = self.root / name
            keep = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "AWS_", "MLFLOW_"))}
            env = keep | {"HOME": str(home), "PATH": f"{self.root}/bin:{os.environ['PATH']}", "TERM": "dumb"}
            env |= {"OMP_NUM_THREADS": "1", **order.get("env", {})}
            payload = b""
            while len(payload) < order["bytes"]:
                payload += incoming.read(order["bytes"] - len(payload)) or b""
            process = subprocess.Popen(
                ["bash", "-c", order["command"]],
                cwd=order.get("cwd") or home,
                env=env,
                stdin=subprocess.PIPE if payload else subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            if payload:
                assert process.stdin is not None
                process.stdin.write(payload)
                process.stdin.close()
            assert process.stdout is not None
            # the command's end counts, not that of what it left behind with its output
            pipe = process.stdout.fileno()
            os.set_blocking(pipe, False)
            while True:
                ended = process.poll() is not None
                with contextlib.suppress(BlockingIOError):
                    while piece := os.read(pipe, 65536):
                        visitor.sendall(len(piece).to_bytes(4, "big") + piece)
                if ended:
                    break
                time.sleep(0.02)
            visitor.sendall((0).to_bytes(4, "big") + bytes([process.returncode & 255]))


def run(hosts: Hosts, name: str, command: str, payload: bytes = b"", **order: Any) -> int:
    """Runs a command line on a host; prints what it prints and returns its exit code."""
    try:
        door = hosts.connect(name)
    except OSError:
        print(f"ssh: connect to host {name}: No route to host", file=sys.stderr)
        return 255
    with door, door.makefile("rb") as incoming:
        door.sendall(json.dumps({"command": command, "bytes": len(payload), **order}).encode() + b"\n" + payload)
        while True:
            head = incoming.read(4)
            if len(head) < 4:
                return 255
            if not (length := int.from_bytes(head, "big")):
                return incoming.read(1)[0]
            sys.stdout.buffer.write(incoming.read(length))
            sys.stdout.buffer.flush()


def ssh(hosts: Hosts, arguments: list[str]) -> int:
    """`ssh [options] USER@ADDRESS COMMAND...`, and `ssh -fN -L PORT:HOST:PORT USER@ADDRESS`."""
    rest, tunnel, background = list(arguments), "", False
    while rest and rest[0].startswith("-"):
        option = rest.pop(0)
        background |= "f" in option
        if option[-1] in _OPTIONS_WITH_VALUE:
            value = rest.pop(0)
            tunnel = value if option[-1] == "L" else tunnel
    name = _name(hosts, rest.pop(0).rpartition("@")[2])
    if not tunnel:
        return run(hosts, name, " ".join(rest) or "true")
    here, there, port = tunnel.rsplit(":", 2)
    gate = socket.create_server(("127.0.0.1", int(here)))
    if background and os.fork():
        return 0
    while True:
        visitor, _ = gate.accept()
        door = hosts.connect(name)
        door.sendall(json.dumps({"connect": [there, int(port)]}).encode() + b"\n")
        threading.Thread(target=_pump, args=(visitor, door), daemon=True).start()


def _pump(one: socket.socket, other: socket.socket) -> None:
    """Bytes both ways, until one side is done."""

    def copy(source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while piece := source.recv(65536):
                target.sendall(piece)
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_WR)

    back = threading.Thread(target=copy, args=(other, one), daemon=True)
    back.start()
    copy(one, other)
    back.join()


def rsync(hosts: Hosts, arguments: list[str]) -> int:
    """`rsync [options] SOURCE USER@ADDRESS:TARGET`; a folder's contents when SOURCE ends with a slash."""
    source = arguments[-2]
    where, _, path = arguments[-1].partition(":")
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        folder = os.path.isdir(source)
        tar.add(source, "." if folder else os.path.basename(path))
    place = path if folder else os.path.dirname(path) or "."
    place = place.replace("~", "$HOME", 1) if place.startswith("~") else shlex.quote(place)
    return run(hosts, _name(hosts, where.rpartition("@")[2]), f"mkdir -p {place} && tar -x -C {place}", file.getvalue())


def _name(hosts: Hosts, target: str) -> str:
    names: list[str] = hosts.state["names"]
    return next((name for name in names if target in (name, hosts.address(name))), target)


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


def main() -> int:
    verb, folder, *rest = sys.argv[1:] if len(sys.argv) > 2 else ["help", "."]
    hosts = Hosts(folder)
    if verb == "up":
        hosts.up(rest)
    elif verb == "run":
        return run(hosts, rest[0], rest[1] if len(rest) == 2 else shlex.join(rest[1:]), cwd=os.getcwd())
    elif verb in ("kill", "back", "serve"):
        getattr(hosts, verb)(*rest)
    elif verb == "down":
        hosts.down()
    elif verb in ("ssh", "rsync"):
        return {"ssh": ssh, "rsync": rsync}[verb](hosts, rest)
    else:
        print(__doc__)
    return 0


if __name__ == "__main__":
    sys.exit(main())
