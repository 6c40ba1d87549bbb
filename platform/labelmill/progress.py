"""What a person sees while a run works: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

_LINE_EVERY_S = 5.0


class Eta:
    """The time that is left, from the progress seen so far: the start of workers before it says nothing about the rest."""

    def __init__(self) -> None:
        self._first: tuple[float, float] | None = None  # time and progress
        self._done = self._total = 0.0

    def update(self, done: float, total: float, now: float) -> str:
        """`ETA 35 s`; empty until progress has been seen twice, and at the end."""
        if self._first is None or done < self._done or total != self._total:
            # something else is counted now, or a restart has fallen back: what came before was of another pace
            self._first = (now, done)
        self._done, self._total = done, total
        began, before = self._first
        if done <= before or done >= total:
            return ""
        seconds = (total - done) * (now - began) / (done - before)
        return f"ETA {seconds / 60:.0f} min" if seconds >= 120 else f"ETA {seconds:.0f} s"


class ProgressView:
    """Stages with their progress. Use as a context manager around a run."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._live: Progress | None = None
        self._task: TaskID | None = None
        self._stage = ""
        self._began = self._last_line = 0.0
        self._eta = Eta()

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
        self.begin(name)
        try:
            yield
        finally:
            self.end()
        self.line(f"{name}: done in {time.monotonic() - self._began:.1f} s")

    def begin(self, name: str) -> None:
        """A stage begins."""
        self._stage, self._began, self._last_line = name, time.monotonic(), 0.0
        self._eta = Eta()
        if self._live:
            self._task = self._live.add_task(name, total=None, text="")
        else:
            self.line(f"{name}: starts")

    def end(self) -> None:
        """The stage is over."""
        if self._live and self._task is not None:
            self._live.remove_task(self._task)
            self._task = None

    def pause(self) -> None:
        """The time until the next progress says nothing about the pace: workers start."""
        self._eta = Eta()

    def update(self, done: float, total: float, rate: float = math.nan, text: str = "") -> None:
        """Progress inside the stage: `rate` in samples a second, `text` what else is worth seeing."""
        parts = [f"{done:,.0f} / {total:,.0f}"]
        if math.isfinite(rate):
            parts.append(f"{rate:,.0f} samples/s")
        parts += [part for part in (self._eta.update(done, total, time.monotonic()), text) if part]
        self.show(done, total, " · ".join(parts))

    def show(self, done: float, total: float, text: str) -> None:
        """Progress inside the stage, already put into words."""
        if self._live and self._task is not None:
            self._live.update(self._task, completed=done, total=total, text=text)
        elif time.monotonic() - self._last_line >= _line_every_s() or done >= total:
            self._last_line = time.monotonic()
            self.line(f"{self._stage}: {text}")

    def line(self, text: str) -> None:
        """A line that stays."""
        self.console.print(text, highlight=False, soft_wrap=True, markup=False)


_STARTS = re.compile(r"(?P<stage>[\w .-]+): starts")
_DONE = re.compile(r"(?P<stage>[\w .-]+): done in [\d.]+ s")
_SHOWN = re.compile(r"(?P<stage>[\w .-]+): (?P<text>(?P<done>[\d,]+) / (?P<total>[\d,]+)( · .*)?)")


class Replay:
    """Shows the plain lines of a run elsewhere as `view` would show the run if it were here."""

    def __init__(self, view: ProgressView) -> None:
        self.view = view
        self._stage: str | None = None

    def line(self, text: str) -> None:
        """One line of the run's output, in order."""
        if not self.view.console.is_terminal:
            self.view.line(text)
        elif match := _STARTS.fullmatch(text):
            self._stage = match["stage"]
            self.view.begin(self._stage)
        elif (match := _SHOWN.fullmatch(text)) and match["stage"] == self._stage:
            self.view.show(_number(match["done"]), _number(match["total"]), match["text"])
        else:
            if (match := _DONE.fullmatch(text)) and match["stage"] == self._stage:
                self.view.end()
                self._stage = None
            self.view.line(text)


def _number(text: str) -> float:
    return float(text.replace(",", ""))


def _line_every_s() -> float:
    """Seconds between two lines; a job on a cluster writes more, for those who follow it."""
    return float(os.environ.get("LABELMILL_PROGRESS_S", _LINE_EVERY_S))
