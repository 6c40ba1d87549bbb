"""What workers tell the driver while they run: progress, metrics, bad samples, notes.

Workers never talk to the tracking server: they post events to a small actor, the driver drains it, and an outage of
tracking can't stall a step.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

Event = dict[str, Any]


class Sink(Protocol):
    """Takes events; never blocks."""

    def post(self, **event: Any) -> None:
        """Adds an event; `kind` says what it is: progress, metrics, checkpoint, bad, reading."""


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
    """Actor that holds events until the driver drains them."""

    def __init__(self) -> None:
        self._events: list[Event] = []

    def put(self, event: Event) -> None:
        """Adds one event."""
        self._events.append(event)

    def drain(self) -> list[Event]:
        """Takes all events."""
        events, self._events = self._events, []
        return events


class RaySink:
    """Posts to a `Mailbox` actor without waiting for an answer."""

    def __init__(self, mailbox: Any) -> None:
        self._mailbox = mailbox

    def post(self, **event: Any) -> None:
        self._mailbox.put.remote({"time": time.time(), **event})


class HistorySink:
    """Appends metric records to a file before it hands them on.

    A checkpoint then never holds a step that the history lacks, even when the driver dies with undelivered events.
    """

    def __init__(self, path: Path, sink: Sink) -> None:
        self._path, self._sink = path, sink

    def post(self, **event: Any) -> None:
        event = {"time": time.time(), **event}
        if event["kind"] == "metrics":
            record = {"step": event["step"], "time": event["time"], **event["values"]}
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with open(self._path, "a", encoding="utf-8") as out:
                out.write(json.dumps(record) + "\n")
        self._sink.post(**event)
