"""Where a rank's rows come from: the object store, by way of a coordinator, or this process itself."""

from __future__ import annotations

import collections
import contextlib
import itertools
import logging
import time
import uuid
from typing import Any, Protocol

import pyarrow as pa

from labelmill.data.coordinator import Coordinator, Range
from labelmill.data.plan import padded_share
from labelmill.data.reading import plan_read, read_blocks
from labelmill.data.spec import AnySpec
from labelmill.errors import DataError

log = logging.getLogger("labelmill")

_STEPS_A_CALL = 8  # at most; handed over early they take memory, so only while they are small
_BYTES_A_CALL = 1 << 20
_TRIES = 6  # of a hand-over, when the coordinator or a host with blocks is lost
_WAITS = 120  # seconds for a coordinator that starts again


class BatchSource(Protocol):
    """Where a rank's rows come from."""

    def pieces(self, step: int) -> list[list[pa.Table]] | None:
        """Rank's rows of global batch `step`: for each part of the stream, tables end to end; None past the end.

        Steps are asked for in order.
        """

    def report_bad(self, bad: list[tuple[str, str]]) -> int:
        """Counts bad samples (key, reason) over all ranks; returns the number of distinct ones so far."""

    def close(self) -> None:
        """No more steps are wanted."""


def rank_ranges(spec: AnySpec, step: int, rank: int, world: int) -> list[Range]:
    """The range of each part that holds a rank's (padded) share of a global batch."""
    return spec.split(*padded_share(*spec.batch_range(step), rank, world))[0]


class Streams:
    """Opens the streams of a worker group on Ray. Every rank has one, and opens the same streams in the same order.

    Args:
        rank, world: of the group.
        read_cpus: CPUs that a read task reserves.
        group: a name that the ranks share and no other group has; for a group of one it may be left out.
    """

    def __init__(self, rank: int = 0, world: int = 1, read_cpus: float = 0.25, group: str = "") -> None:
        self.rank, self.world = rank, world
        self._names = itertools.count()
        self._group = group or uuid.uuid4().hex
        if world == 1:
            self._coordinator: Any = Coordinator(1, read_cpus)
            return
        import ray

        actor: Any = ray.remote(Coordinator)
        # the first rank to come makes it; it ends with the last handle, and starts again where it was killed
        self._coordinator = actor.options(
            name=f"labelmill-streams-{self._group}",
            get_if_exists=True,
            num_cpus=0,
            max_concurrency=2 * world + 2,
            max_restarts=-1,
        ).remote(world, read_cpus)

    def open(self, spec: AnySpec) -> RaySource:
        """This rank's rows of a stream."""
        return RaySource(spec, self._coordinator, f"stream-{next(self._names)}", self.rank, self.world)


class RaySource:
    """Rows through the object store; references come from a coordinator. Opened by `Streams.open`."""

    def __init__(self, spec: AnySpec, coordinator: Any, stream: str, rank: int, world: int) -> None:
        self._spec, self._coordinator, self._stream = spec, coordinator, stream
        self._rank, self._world = rank, world
        self._local = isinstance(coordinator, Coordinator)
        batch = spec.global_batch / world * max(part.sample_bytes for part in spec.parts)
        self._steps_a_call = max(1, min(_STEPS_A_CALL, int(_BYTES_A_CALL / max(1.0, batch))))
        self._handed: collections.deque[list[list[Any]]] = collections.deque()
        self._next = 0  # first step that was not handed over yet
        self._blocks: dict[Any, pa.Table] = {}

    def _call(self, method: str, *arguments: Any) -> Any:
        import ray

        if self._local:
            return getattr(self._coordinator, method)(self._stream, *arguments)
        return ray.get(getattr(self._coordinator, method).remote(self._stream, *arguments))

    def pieces(self, step: int) -> list[list[pa.Table]] | None:
        from ray import exceptions

        if step >= self._spec.steps:
            return None
        lost = (exceptions.RayActorError, exceptions.ObjectLostError, exceptions.WorkerCrashedError)
        times, waits = 0, 0
        while True:
            try:
                if not self._handed or step != self._next - len(self._handed):
                    self._request(step)
                found = self._rows(self._handed[0])
                self._handed.popleft()
                return found
            except lost as error:
                # a coordinator that starts again is only waited for: on a busy host that takes its time
                starting = isinstance(error, exceptions.ActorUnavailableError)
                times, waits = times + (not starting), waits + starting
                if times == _TRIES or waits == _WAITS:
                    raise DataError(
                        f"data set {self._spec.name!r}: batch {step} was lost {times} times on its way to rank "
                        f"{self._rank}, and its coordinator was away for {waits} s ({type(error).__name__}: {error}). Are "
                        "hosts being lost, or is a read task killed for its memory? A smaller data.window or data.readers "
                        "needs less."
                    ) from error
                log.warning("stream %s: a hand-over was lost (%s); asking again", self._spec.name, type(error).__name__)
                self._handed.clear()
                self._blocks.clear()
                time.sleep(1.0 if starting else 0.1 * 2**times)

    def _request(self, step: int) -> None:
        spec = self._spec
        steps = range(step, min(spec.steps, step + self._steps_a_call))
        wanted = [rank_ranges(spec, s, self._rank, self._world) for s in steps]
        while (handed := self._call("fetch", self._rank, wanted)) is None:
            self._call("open", spec, spec.batch_range(step)[0])
        self._handed = collections.deque(handed)
        self._next = step + len(handed)

    def _rows(self, parts: list[list[Any]]) -> list[list[pa.Table]]:
        import ray

        live: dict[Any, pa.Table] = {}
        out = []
        for pieces in parts:
            rows = []
            for (ref,), lo, hi in pieces:
                live[ref] = self._blocks[ref] if ref in self._blocks else ray.get(ref)
                rows.append(live[ref].slice(lo, hi - lo))
            out.append(rows)
        self._blocks = live
        return out

    def report_bad(self, bad: list[tuple[str, str]]) -> int:
        return self._call("report_bad", bad)

    def close(self) -> None:
        self._handed.clear()
        self._blocks.clear()
        with contextlib.suppress(Exception):
            if self._local:
                self._coordinator.leave(self._stream, self._rank)
            else:
                self._coordinator.leave.remote(self._stream, self._rank)


class LocalSource:
    """Rows read in this process, without Ray: small data, tests, single-process tools. Keeps a window in memory."""

    def __init__(self, spec: AnySpec, rank: int = 0, world: int = 1) -> None:
        self._spec, self._rank, self._world = spec, rank, world
        self._windows: list[dict[int, pa.Table]] = [{} for _ in spec.parts]
        self._first = [lo for lo, _ in spec.split(spec.start, spec.start)[0]]
        self._bad: dict[str, str] = {}

    def pieces(self, step: int) -> list[list[pa.Table]] | None:
        if step >= self._spec.steps:
            return None
        ranges = rank_ranges(self._spec, step, self._rank, self._world)
        return [self._part(k, lo, hi) for k, (lo, hi) in enumerate(ranges)]

    def _part(self, k: int, lo: int, hi: int) -> list[pa.Table]:
        part, kept, live, rows = self._spec.parts[k], self._windows[k], {}, []
        for window in part.plan.windows(lo, hi):
            first = max(window.start, self._first[k])
            table = kept.get(window.start)
            if table is None:
                table = pa.concat_tables(read_blocks(plan_read(part, window, first, window.stop)))
            live[window.start] = table
            a, z = max(lo, first) - first, min(hi, window.stop) - first
            rows.append(table.slice(a, z - a))
        if live:
            self._windows[k] = live
        return rows

    def report_bad(self, bad: list[tuple[str, str]]) -> int:
        self._bad.update(bad)
        return len(self._bad)

    def close(self) -> None:
        self._windows = [{} for _ in self._spec.parts]
