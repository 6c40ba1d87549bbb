"""What a process and all its descendants use: CPU seconds and memory, Ray's daemons apart. Linux only."""

from __future__ import annotations

import os
import re
import threading
import time
from dataclasses import dataclass, field

_TICK = os.sysconf("SC_CLK_TCK")
_DAEMONS = re.compile(
    r"raylet/raylet|gcs_server|dashboard/dashboard\.py|dashboard/agent\.py|runtime_env/agent/main\.py|log_monitor\.py|"
    r"monitor\.py|ray-dashboard|autoscaler"
)


@dataclass
class Process:
    """One process at one moment: start time tells it from a later one with the same id."""

    pid: int
    start: int
    cpu: float
    daemon: bool


@dataclass
class Memory:
    """Megabytes. Shared segments (object store, torch batches) are counted once, with the loader.

    own: private memory; files: mapped files, that is libraries and mapped shards, which the kernel can drop at any time.
    """

    own: float = 0.0
    files: float = 0.0
    shared: float = 0.0
    daemons: float = 0.0
    parts: dict[str, list[float]] = field(default_factory=dict)  # by command: private MB, processes

    @property
    def total(self) -> float:
        """All but the daemons."""
        return self.own + self.files + self.shared


def _read(path: str) -> str:
    try:
        with open(path) as file:
            return file.read()
    except OSError:
        return ""


class Tree:
    """A root process and its descendants, polled; remembers what ended processes had used."""

    def __init__(self, root: int, memory: bool = False, period: float = 0.25) -> None:
        self._root, self._memory, self._period = root, memory, period
        self._daemon: dict[tuple[int, int], bool] = {}
        self._cpu: dict[tuple[int, int], float] = {}
        self.peak = Memory()
        self.peak_daemons = 0.0
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._poll, daemon=True)
        self._thread.start()

    def _poll(self) -> None:
        while not self._stop.wait(self._period):
            self.cpu()
            if self._memory:
                self.look()

    def close(self) -> None:
        """Stops polling."""
        self._stop.set()
        self._thread.join()

    def processes(self) -> list[Process]:
        """The tree's processes that are alive."""
        rows: dict[int, tuple[int, int, float]] = {}
        for entry in os.listdir("/proc"):
            if not entry.isdigit():
                continue
            stat = _read(f"/proc/{entry}/stat")
            if not stat:
                continue
            words = stat[stat.rindex(")") + 2 :].split()
            rows[int(entry)] = (int(words[1]), int(words[19]), (int(words[11]) + int(words[12])) / _TICK)
        wanted, out = {self._root}, []
        grown = True
        while grown:
            new = {pid for pid, (parent, _, _) in rows.items() if parent in wanted} - wanted
            wanted |= new
            grown = bool(new)
        for pid in wanted & rows.keys():
            _, start, cpu = rows[pid]
            out.append(Process(pid, start, cpu, self._is_daemon(pid, start)))
        return out

    def _is_daemon(self, pid: int, start: int) -> bool:
        if not self._daemon.get((pid, start)):
            # a fresh worker still has its parent's command line, so only "yes" is remembered at once
            self._daemon[pid, start] = bool(_DAEMONS.search(_read(f"/proc/{pid}/cmdline").replace("\0", " ")))
        return self._daemon[pid, start]

    def cpu(self) -> tuple[float, float]:
        """CPU seconds so far of (loader, Ray's daemons), processes that have ended included."""
        with self._lock:
            for process in self.processes():
                self._cpu[process.pid, process.start] = process.cpu
            own = sum(cpu for key, cpu in self._cpu.items() if not self._daemon.get(key))
            return own, sum(cpu for key, cpu in self._cpu.items() if self._daemon.get(key))

    def machine(self) -> float:
        """CPU seconds that all processes of the machine have used, and those a host took away."""
        words = _read("/proc/stat").splitlines()[0].split()[1:9]
        return sum(int(word) for i, word in enumerate(words) if i not in (3, 4)) / _TICK  # not idle, not waiting

    def look(self) -> Memory:
        """Memory now; keeps the peak."""
        now = Memory()
        for process in self.processes():
            rollup = dict(
                re.findall(r"^(Pss\w*):\s+(\d+) kB", _read(f"/proc/{process.pid}/smaps_rollup"), re.MULTILINE)
            )
            shared = int(rollup.get("Pss_Shmem", 0)) / 1024
            files = int(rollup.get("Pss_File", 0)) / 1024
            private = int(rollup.get("Pss", 0)) / 1024 - shared - files
            now.shared += shared
            if process.daemon:
                now.daemons += private + files
            else:
                now.own += private
                now.files += files
                title = _read(f"/proc/{process.pid}/cmdline").split("\0")[0][:40] or str(process.pid)
                part = now.parts.setdefault(title, [0.0, 0])
                part[0] += private
                part[1] += 1
        if now.total > self.peak.total:
            self.peak = now
        self.peak_daemons = max(self.peak_daemons, now.daemons)
        return now


if __name__ == "__main__":  # what a running process uses: python stream_measure.py PID
    import sys

    tree = Tree(int(sys.argv[1]), memory=True)
    time.sleep(0.5)
    print(tree.cpu(), tree.look())
