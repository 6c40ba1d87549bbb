"""What a rank is doing, told to the driver twice a second, and what the driver wishes, told to the loop.

A rank that stops making progress for the job's limit writes the stacks of all its threads to a file by itself: a timer of
the C runtime does it (`faulthandler`), also when a library holds the interpreter's lock and no Python code runs.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import socket
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import IO, Any

SAVE, STOP = 1, 2
"""Wishes, as bits: write a checkpoint after this step; write one and end the attempt."""

_EVERY_S = 0.5
_ANSWER_S = 10.0


class Pulse:
    """A rank's progress. Use as a context manager around training.

    Args:
        rank: of this worker.
        mailbox: the driver's `Mailbox` actor; None without a driver.
        save_every_s: seconds between wishes of this rank for a checkpoint.
        limit_s: seconds without progress after which stacks are written.
        stacks: the file for them; removed when it stays empty.
    """

    def __init__(
        self,
        rank: int,
        mailbox: Any = None,
        save_every_s: float | None = None,
        limit_s: float | None = None,
        stacks: Path | None = None,
    ) -> None:
        self.rank, self.step, self.first = rank, 0, 0
        self._mailbox, self._save_every_s = mailbox, save_every_s
        self._limit_s, self._path = limit_s if stacks else None, stacks
        self._part, self._watched = "start", False
        self._ticks, self._told, self._wish = 0, 0, 0
        self._own_s, self._steps = 0.0, 0
        self._saved_at = time.monotonic()
        self._file: IO[bytes] | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pulse", daemon=True)

    def __enter__(self) -> Pulse:
        if self._limit_s is not None and self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("wb")
        if self._mailbox is not None or self._file is not None:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join(2 * _EVERY_S)
        if self._file is not None and self._path is not None:
            faulthandler.cancel_dump_traceback_later()
            self._file.close()
            with contextlib.suppress(OSError):
                if not self._path.stat().st_size:
                    self._path.unlink()

    # --- the loop's side -------------------------------------------------------------------------------------

    def begin(self, step: int) -> None:
        """Training begins, after `step` steps."""
        self.step = self.first = step

    def enter(self, part: str, watched: bool = True) -> None:
        """A part of the work begins; `watched` parts must end within the limit."""
        self._part, self._watched = part, watched
        self._ticks += 1

    def stepped(self, step: int, own_s: float) -> None:
        """An optimizer step is done; `own_s` is what this rank spent on it without waiting for others."""
        self.step = step
        self._own_s += own_s
        self._steps += 1
        self._ticks += 1

    def saved(self) -> None:
        """A checkpoint was begun."""
        self._saved_at = time.monotonic()
        self._wish &= ~SAVE

    @property
    def wish(self) -> int:
        """What this rank knows to be wished; ranks agree on it in the step."""
        due = self._save_every_s is not None and time.monotonic() - self._saved_at >= self._save_every_s
        return self._wish | (SAVE if due else 0)

    # --- the driver's side -----------------------------------------------------------------------------------

    def _state(self) -> dict[str, Any]:
        return {
            "first": self.first,
            "step": self.step,
            "part": self._part,
            "watched": self._watched,
            "ticks": self._ticks,
            "own_s": self._own_s,  # over `steps`, both since the attempt began
            "steps": self._steps,
            "host": socket.gethostname(),
            "pid": os.getpid(),
        }

    def _run(self) -> None:
        handle = self._own_handle()
        every_s = min(_EVERY_S, (self._limit_s or 4 * _EVERY_S) / 4)  # the timer is set again long before it is due
        while not self._ended.wait(every_s if self._told else 0.01):
            if self._file is not None and (self._ticks != self._told or not self._watched):
                faulthandler.dump_traceback_later(self._limit_s or 0.0, file=self._file, exit=False)
                if not self._watched:
                    faulthandler.cancel_dump_traceback_later()
            self._told = self._ticks or 1
            if self._mailbox is not None:
                import ray

                # without an answer the driver or its host is gone, and Ray ends this process
                with contextlib.suppress(Exception):
                    state = self._state() | handle
                    self._wish |= ray.get(self._mailbox.beat.remote(self.rank, state), timeout=_ANSWER_S)

    def _own_handle(self) -> dict[str, Any]:
        """This worker's actor, for a driver that has to end it."""
        if self._mailbox is None:
            return {}
        import ray

        with contextlib.suppress(Exception):
            context = ray.get_runtime_context()
            return {"actor": context.current_actor, "node": context.get_node_id()}
        return {}
