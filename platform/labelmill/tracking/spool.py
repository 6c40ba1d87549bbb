"""What couldn't be sent to the tracking store, kept in a file until it can.

One JSON object a line, in the order of the calls. Sending a record twice does no harm (MLflow drops a metric
point it has, a param it has, and overwrites tags and artifacts), so a crash in the middle of a replay costs
nothing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

Record = dict[str, Any]


class Spool:
    """An append-only file of records. Not safe for two threads at once: the tracker holds its lock."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._records, whole = _read(path)
        if not whole:
            self._rewrite()

    def __len__(self) -> int:
        return len(self._records)

    def append(self, record: Record) -> None:
        """Adds a record; it is on disk when this returns."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a", encoding="utf-8") as out:
            out.write(json.dumps(record, ensure_ascii=False) + "\n")
            out.flush()
            os.fsync(out.fileno())
        self._records.append(record)

    def move(self, path: Path) -> None:
        """Goes on under another name."""
        if self.path.exists():
            self.path.replace(path)
        self.path = path

    def take_over(self, path: Path) -> None:
        """Puts the records of another file behind its own; that file is gone afterwards."""
        records, _ = _read(path)
        self._records += records
        self._rewrite()
        path.unlink(missing_ok=True)

    def replay(self, send: Callable[[Record], bool]) -> bool:
        """Gives the records to `send` in order until one returns False; keeps the rest. True: none left."""
        done = 0
        for record in self._records:
            if not send(record):
                break
            done += 1
        if done:
            self._records = self._records[done:]
            self._rewrite()
        return not self._records

    def _rewrite(self) -> None:
        if not self._records:
            self.path.unlink(missing_ok=True)
            return
        part = self.path.with_suffix(".part")
        part.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in self._records), encoding="utf-8")
        part.replace(self.path)


def _read(path: Path) -> tuple[list[Record], bool]:
    """Records of an earlier process, and whether every line was whole: a crash may cut the last one."""
    if not path.is_file():
        return [], True
    records, whole = [], True
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            whole = False
    return records, whole
