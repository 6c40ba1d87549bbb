"""Several fits of one run at the same time, each with a group of workers of its own, as many as the cluster holds."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")
_END_S = 60.0


class StoppedError(Exception):
    """A fit that is ended because another one beside it failed, or because the run is to stop."""


def side_by_side(calls: Sequence[Callable[[], T]], at_once: int, stop: threading.Event) -> list[T]:
    """Values of the calls, in order; at most `at_once` of them run at a time, in threads.

    When one fails, or this thread is interrupted, `stop` is set: calls that heed it (`Run.fit` does) end soon, and none
    starts any more. Raises what failed first.
    """
    if at_once <= 1 or len(calls) <= 1:
        return [call() for call in calls]
    todo: queue.SimpleQueue[int] = queue.SimpleQueue()
    for number in range(len(calls)):
        todo.put(number)
    values: dict[int, T] = {}
    errors: list[BaseException] = []

    def work() -> None:
        while not stop.is_set():
            try:
                number = todo.get_nowait()
            except queue.Empty:
                return
            try:
                values[number] = calls[number]()
            except BaseException as error:
                errors.append(error)
                stop.set()

    threads = [threading.Thread(target=work, name=f"fit-{n}", daemon=True) for n in range(min(at_once, len(calls)))]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            while thread.is_alive():
                thread.join(0.5)  # short, so that Ctrl-C is heard
    except BaseException:
        stop.set()
        for thread in threads:
            thread.join(_END_S)
        raise
    finally:
        stop.clear()
    if errors:
        raise next((error for error in errors if not isinstance(error, StoppedError)), errors[0])
    return [values[number] for number in range(len(calls))]
