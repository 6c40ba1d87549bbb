"""A Chrome trace of a few steps of a worker: open it in chrome://tracing or ui.perfetto.dev.

The parts of a step are named ranges; inside them are torch's operators, collectives and, on a GPU, its kernels.
"""

from __future__ import annotations

import contextlib
import gzip
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

SKIPPED, RECORDED = 3, 3
"""Steps left out (first steps allocate memory and build groups), and steps recorded after them."""


class StepProfiler:
    """Records `RECORDED` steps after the first `SKIPPED` of a worker into `<folder>/trace-rank<r>.json.gz`.

    A run with fewer steps left records from its first one on.
    """

    def __init__(self, folder: Path, rank: int, steps: int) -> None:
        self._path = folder / f"trace-rank{rank}.json.gz"
        self._first = SKIPPED if steps > SKIPPED else 0
        self._last = min(self._first + RECORDED, steps)
        self._seen = 0
        self._profiler: Any = None

    def begin_step(self) -> None:
        """Before a step's first part."""
        if self._seen == self._first and self._last > self._first:
            activities = [torch.profiler.ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            self._profiler = torch.profiler.profile(activities=activities)
            self._profiler.__enter__()

    def end_step(self) -> None:
        """After a step's last part; writes the trace after the last step that is recorded."""
        self._seen += 1
        if self._seen == self._last:
            self.close()

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """A named range."""
        if self._profiler is None:
            yield
            return
        with torch.profiler.record_function(name):
            yield

    def close(self) -> None:
        """Ends recording, if it goes on, and writes what there is."""
        if self._profiler is None:
            return
        profiler, self._profiler = self._profiler, None
        profiler.__exit__(None, None, None)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        plain = self._path.with_suffix("")
        profiler.export_chrome_trace(str(plain))
        with open(plain, "rb") as source, gzip.open(self._path, "wb", compresslevel=3) as target:
            shutil.copyfileobj(source, target)
        plain.unlink()
