"""What workers tell the driver while they run: progress, metrics, bad samples, what reading met.

Workers never talk to the tracking server: they post events to a small actor, the driver drains it, and an outage of
tracking can't stall a step.
"""

from __future__ import annotations

import errno
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

Event = dict[str, Any]
State = dict[str, Any]


class Sink(Protocol):
    """Takes events; never blocks."""

    def post(self, **event: Any) -> None:
        """Adds an event; `kind` says what it is.

        That is progress, metrics, checkpoint, start, group, bad, reading, ranks, note, restart or hang.
        """


class ListSink:
    """Events in a list of this process."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def post(self, **event: Any) -> None:
        self.events.append({"time": time.time(), **event})


class CallSink:
    """Hands events to a function of this process."""

    def __init__(self, take: Callable[[Event], None]) -> None:
        self._take = take

    def post(self, **event: Any) -> None:
        self._take({"time": time.time(), **event})


class Mailbox:
    """Actor between the workers of an attempt and the driver: events and states one way, a wish the other."""

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._states: dict[int, State] = {}
        self._controller: Any = None
        self._wish = 0

    def put(self, event: Event) -> None:
        """Adds one event."""
        self._events.append(event)

    def beat(self, rank: int, state: State) -> int:
        """Takes what a rank is doing; returns what the driver wishes (`pulse.SAVE`, `pulse.STOP`)."""
        self._states[rank] = state
        return self._wish

    def introduce(self, controller: Any) -> None:
        """Takes the actor that controls the workers."""
        self._controller = controller

    def wish(self, wanted: int) -> None:
        """What all ranks are to do at their next step."""
        self._wish |= wanted

    def drain(self) -> tuple[list[Event], dict[int, State], Any]:
        """Takes all events; the ranks' states as they told them last; the controller, once it is there."""
        events, self._events = self._events, []
        return events, self._states, self._controller


class RaySink:
    """Posts to a `Mailbox` actor without waiting for an answer."""

    def __init__(self, mailbox: Any) -> None:
        self._mailbox = mailbox

    def post(self, **event: Any) -> None:
        self._mailbox.put.remote({"time": time.time(), **event})


class HistorySink:
    """Appends metric records to a file before it hands them on.

    A checkpoint then never holds a step that the history lacks, even when the driver dies with undelivered events.
    On a full disk records wait in memory; checkpoints fail there as well.
    """

    def __init__(self, path: Path, sink: Sink) -> None:
        self._path, self._sink = path, sink
        self._waiting: list[str] = []

    def post(self, **event: Any) -> None:
        event = {"time": time.time(), **event}
        if event["kind"] == "metrics":
            record = {"step": event["step"], "time": event["time"], **event["values"]}
            self._waiting.append(json.dumps(record) + "\n")
            self._write()
        self._sink.post(**event)

    def _write(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        data = memoryview("".join(self._waiting).encode())
        try:
            with open(self._path, "ab", buffering=0) as out:  # a buffer would be written again by its closing
                size = out.tell()
                try:
                    while len(data):
                        data = data[out.write(data) :]
                except OSError:
                    out.truncate(size)  # no half a line
                    raise
            self._waiting = []
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
