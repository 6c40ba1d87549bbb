"""What a person sees while a run works: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

_LINE_EVERY_S = 5.0


def _eta(done: float, total: float, rate: float, began: float) -> str:
    left = total - done
    if left <= 0 or done <= 0:
        return ""
    seconds = left * (time.monotonic() - began) / done
    return f"ETA {seconds / 60:.0f} min" if seconds >= 120 else f"ETA {seconds:.0f} s"


class ProgressView:
    """Stages with their progress. Use as a context manager around a run."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._live: Progress | None = None
        self._task: TaskID | None = None
        self._stage = ""
        self._began = self._last_line = 0.0
        self._first_done = 0.0

    def __enter__(self) -> ProgressView:
        if self.console.is_terminal:
            self._live = Progress(
                SpinnerColumn(),
                TextColumn("[bold]{task.description:<10}"),
                BarColumn(bar_width=30),
                TextColumn("{task.fields[text]}"),
                TimeElapsedColumn(),
                console=self.console,
                transient=True,
            )
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """A stage begins; its end is printed with the seconds it took."""
        self._stage, self._began = name, time.monotonic()
        self._last_line, self._first_done = 0.0, 0.0
        if self._live:
            self._task = self._live.add_task(name, total=None, text="")
        else:
            self.line(f"{name}: starts")
        try:
            yield
        finally:
            if self._live and self._task is not None:
                self._live.remove_task(self._task)
        self.line(f"{name}: done in {time.monotonic() - self._began:.1f} s")

    def update(self, done: float, total: float, rate: float = math.nan, text: str = "") -> None:
        """Progress inside the stage: `rate` in samples a second, `text` what else is worth seeing."""
        parts = [f"{done:,.0f} / {total:,.0f}"]
        if math.isfinite(rate):
            parts.append(f"{rate:,.0f} samples/s")
        parts += [part for part in (_eta(done, total, rate, self._began), text) if part]
        shown = " · ".join(parts)
        if self._live and self._task is not None:
            self._live.update(self._task, completed=done, total=total, text=shown)
        elif time.monotonic() - self._last_line >= _LINE_EVERY_S or done >= total:
            self._last_line = time.monotonic()
            self.line(f"{self._stage}: {shown}")

    def line(self, text: str) -> None:
        """A line that stays."""
        self.console.print(text, highlight=False, soft_wrap=True, markup=False)
