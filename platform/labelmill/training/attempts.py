"""What became of each attempt of a training, in `attempts.jsonl`: sizes, reasons, seconds of outage."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from labelmill.training.events import Event

FILE = "attempts.jsonl"


def read_attempts(work: Path) -> list[dict[str, Any]]:
    """A record for each attempt below a fit's folder.

    `attempt`, `workers`, `began` (Unix seconds); `why` it was begun; `ended` with a reason; `outage_s`: from the last
    step of the attempt before to the first of this one, None while there is none; `from_step`, `to_step`.
    """
    path = work / FILE
    found: dict[int, dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            record = json.loads(line)
        except ValueError:  # the driver died while it wrote
            continue
        found.setdefault(record["attempt"], {"outage_s": None, "ended": None}).update(record)
    return [found[number] for number in sorted(found)]


class Attempts:
    """The file, and the clock of the outages."""

    def __init__(self, work: Path) -> None:
        self._path = work / FILE
        before = read_attempts(work)
        self.last = before[-1]["attempt"] if before else None
        self._stopped_at: float | None = None
        self._stepped = False

    def begin(self, workers: int, why: str, deliver: Callable[[Event], None]) -> int:
        """Another attempt; returns its number."""
        self.last = 0 if self.last is None else self.last + 1
        self._stepped = False
        self._deliver = deliver
        self._write({"workers": workers, "why": why, "began": time.time()})
        return self.last

    def stepped(self, before: int, after: int) -> None:
        """Optimizer steps were done: training stands at `after`. Called as often as it is seen."""
        now = time.monotonic()
        if not self._stepped:
            outage_s = None if self._stopped_at is None else now - self._stopped_at
            record = {"from_step": before, "outage_s": outage_s}
            self._write(record)
            if outage_s is not None:
                self._deliver({"kind": "restart", "time": time.time(), "attempt": self.last, **record})
        self._stepped, self._stopped_at = True, now
        self._step = after

    def end(self, why: str) -> None:
        """The attempt is over."""
        self._write({"ended": why, "until": time.time()} | ({"to_step": self._step} if self._stepped else {}))

    def _write(self, record: dict[str, Any]) -> None:
        with open(self._path, "a", encoding="utf-8") as out:
            out.write(json.dumps({"attempt": self.last} | record) + "\n")
