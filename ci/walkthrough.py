#!/usr/bin/env python3
"""Runs the walk-through of cluster/README.md as it stands there: on hosts of this machine, block after block.

A block marked `bash laptop` is run on the host `laptop`, one marked `bash machine` on this machine, as root. Each stops at
the first command that fails. Where the machine can't have hosts the script says so and ends with 0, unless --must.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_BLOCK = re.compile(r"^```bash (laptop|machine)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def main() -> int:
    if os.geteuid() or not all(map(shutil.which, ("ip", "unshare"))):
        print("walk-through: hosts on one machine need root, iproute2 and util-linux; not run")
        return int("--must" in sys.argv)
    blocks = _BLOCK.findall((ROOT / "cluster" / "README.md").read_text())
    folder = Path(tempfile.mkdtemp(prefix="lmw", dir="/tmp"))  # the path of a socket may have 107 bytes
    for name in ("ci", "cluster", "platform", "workloads"):
        (folder / name).symlink_to(ROOT / name)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    settings = {"PATH": path, "HOSTS": str(folder), "COLUMNS": "120", "PYTHONPATH": f"{ROOT / 'platform'}:{ROOT}"}
    env = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "AWS_", "MLFLOW_"))}
    began = time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # hosts go away then, too
    try:
        for where, script in blocks:
            print(f"\033[1m[{where}, {time.monotonic() - began:.0f} s]\033[0m", flush=True)
            call = ["bash", "-euxo", "pipefail", "-c", script]
            if where == "laptop":
                hosts = str(ROOT / "ci" / "hosts.py")
                names = " ".join(f"{name}='{value}'" for name, value in settings.items() if name != "PATH")
                script = f'export {names} PATH="$PATH:{path}"\n{script}'
                call = [sys.executable, hosts, "run", str(folder), "laptop", "bash", "-euxo", "pipefail", "-c", script]
            subprocess.run(call, cwd=folder, env=env | settings, check=True, timeout=900)
    except subprocess.CalledProcessError as error:
        print(f"walk-through: a block ended with {error.returncode}")
        return 1
    finally:
        subprocess.run([sys.executable, ROOT / "ci" / "hosts.py", "down", folder])
        shutil.rmtree(folder, ignore_errors=True)
    print(f"walk-through: {len(blocks)} blocks in {time.monotonic() - began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
