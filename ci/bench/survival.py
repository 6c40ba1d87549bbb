"""What faults cost a training: strikes it for real, and prints seconds of outage and the steps that were done again.

    PYTHONPATH=platform:. python ci/bench/survival.py [cluster] [hosts]

`cluster`: worker, mailbox, Train's controller, raylet, new hosts, a preemption notice, a worker that stands still. `hosts`:
two hosts in network namespaces (needs root), one cut off and one killed. Takes about two minutes each on two cores.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from tests.survival import write_texts


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="labelmill-") as folder:
        data = write_texts(Path(folder))
        for story in sys.argv[1:] or ["cluster", "hosts"]:
            command = [sys.executable, "-m", f"tests.survival_{story}", data, str(Path(folder, story))]
            print(f"\n{story}\n", flush=True)
            subprocess.run(command, check=False, timeout=900)


if __name__ == "__main__":
    main()
