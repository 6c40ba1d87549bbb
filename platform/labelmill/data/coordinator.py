"""Hands the blocks of a stream to ranks: one reader for all, references only.

A stream's blocks begin and end where the plan says, so handing over is arithmetic: a rank asks for a range of positions
and gets (block reference, from, to). Rows go from the object store to the rank and never pass through here. Nothing here
is state that matters: a coordinator that is lost is started again and asked for the same ranges.

Plain Ray tasks, not a Ray Data execution: Ray Data's scheduling loop took a third of the CPU time of decoding itself, and
its `streaming_split` drops the tail. (`labelmill.data.ray_data` gives the same blocks as a Ray Data set, for batch jobs.)

Memory: blocks held for ranks and blocks that read tasks have ready are limited to half of `reading.prefetch_mb` each; one
block a reader and one global batch more can be under way.
"""

from __future__ import annotations

import collections
import contextlib
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from labelmill.data.reading import WindowRead, decode_block, plan_read, read_blocks
from labelmill.data.spec import AnySpec, StreamSpec
from labelmill.errors import DataError

Range = tuple[int, int]
Piece = tuple[list[Any], int, int]
"""([block reference], from, to). Inside a list the reference stays one when it travels."""


@dataclass
class _Block:
    start: int
    stop: int
    ref: Any


class Feed:
    """One data set's blocks, in order, for all ranks. A thread keeps read tasks going while there is room."""

    def __init__(self, spec: StreamSpec, world: int, read_cpus: float, start: int, end: int) -> None:
        import ray

        self._spec, self._world, self._end = spec, world, end
        budget = spec.reading.prefetch_mb * 2**20 / 2
        self._room = max(1, int(budget / spec.sample_bytes))  # samples
        ahead = max(1, int(self._room / spec.reading.readers / spec.block_rows))
        remote: Any = ray.remote
        options = {"num_cpus": read_cpus, "max_retries": 5, "scheduling_strategy": "SPREAD"}
        self._read = remote(num_returns="streaming", _generator_backpressure_num_objects=ahead, **options)(_read_task)
        self._decode: Any = remote(**options)(decode_block) if spec.decodes_in_task else None
        # decoding keeps a core busy: more tasks than cores would only take memory, each has a process
        self._cores = max(2, int(ray.cluster_resources().get("CPU", 2)))
        self._decoding: collections.deque[Any] = collections.deque()
        self._changed = threading.Condition()
        self._run = 0  # counts launches; a thread of an older one ends
        self._live: collections.deque[tuple[WindowRead, Any]] = collections.deque()
        self._launch(start)

    def _launch(self, start: int) -> None:
        self._run += 1
        self._cancel()
        self._blocks: collections.deque[_Block] = collections.deque()
        self._have = self._first = start
        self._demand = start
        self._done = [start] * self._world
        self._error: BaseException | None = None
        threading.Thread(
            target=self._pump, args=(self._run, start, self._live), name="stream-feed", daemon=True
        ).start()

    def _cancel(self) -> None:
        import ray

        for _, blocks in self._live:
            with contextlib.suppress(Exception):
                ray.cancel(blocks)
        self._live = collections.deque()
        self._decoding = collections.deque()

    # --- the reading side ---

    def _pump(self, run: int, start: int, live: collections.deque[tuple[WindowRead, Any]]) -> None:
        try:
            windows = self._spec.plan.windows(start, self._end)
            while True:
                while len(live) < self._spec.reading.readers and (window := next(windows, None)) is not None:
                    read = plan_read(self._spec, window, start, self._end)
                    live.append((read, self._read.remote(read)))
                if not live or not self._drain(run, *live[0]):
                    return
                if self._run != run:
                    return
                live.popleft()
        except BaseException as error:
            with self._changed:
                if self._run == run:
                    self._error = error
                self._changed.notify_all()

    def _drain(self, run: int, read: WindowRead, blocks: Any) -> bool:
        """Takes a window's blocks as they are made and as there is room; False when the launch is over."""
        at = read.start
        for ref in blocks:
            stop = min(at + read.block_rows, read.stop)
            if self._decode is not None:
                ref = self._decoded(ref)
            with self._changed:
                if self._run != run:
                    return False
                self._blocks.append(_Block(at, stop, ref))
                self._have = at = stop
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._run != run or self._has_room())
                if self._run != run:
                    return False
        if at < read.stop:
            # the last reference holds the task's error, and whoever gets it raises that
            raise DataError(
                f"data set {self._spec.name!r}: reading stopped at position {at}; see the error before this."
            )
        return True

    def _decoded(self, ref: Any) -> Any:
        """A block on its way through a decoding task; waits while as many are under way as there are cores."""
        import ray

        if len(self._decoding) >= self._cores:
            ray.wait([self._decoding.popleft()], fetch_local=False)
        spec = self._spec
        done = self._decode.remote(ref, spec.field, spec.image_size, spec.channels)
        self._decoding.append(done)
        return done

    def _has_room(self) -> bool:
        return self._have - min(self._done) < self._room or self._have < self._demand

    # --- the ranks' side ---

    def ready(self, hi: int) -> bool:
        """Whether all positions below `hi` are here."""
        return self._have >= hi

    def wait(self, lo: int, hi: int) -> None:
        """Returns when `[lo, hi)` is here; reads it again where it was handed out and dropped before."""
        with self._changed:
            if lo < hi and lo < self._first:
                self._launch(lo)
            self._demand = max(self._demand, hi)
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._have >= hi or self._error is not None or self._run < 0)
            if self._have < hi:
                raise self._error or DataError(f"data set {self._spec.name!r}: the stream was closed.")

    def take(self, rank: int, lo: int, hi: int) -> list[Piece]:
        """The pieces of `[lo, hi)`, which must be here; `rank` needs nothing before `hi` again."""
        with self._changed:
            pieces = [
                ([block.ref], max(lo, block.start) - block.start, min(hi, block.stop) - block.start)
                for block in self._blocks
                if block.start < hi and block.stop > lo
            ]
            self._done[rank] = max(self._done[rank], hi)
            low = min(self._done)
            while self._blocks and self._blocks[0].stop <= low:
                self._first = self._blocks.popleft().stop
            self._changed.notify_all()
        return pieces

    def close(self) -> None:
        """Ends the reading."""
        with self._changed:
            self._run = -1
            self._cancel()
            self._blocks.clear()
            self._changed.notify_all()


def _read_task(read: WindowRead) -> Any:
    pa.set_cpu_count(1)
    yield from read_blocks(read)


class Coordinator:
    """The streams of one worker group. An actor that reserves no CPU; in a group of one, an object of the rank itself."""

    def __init__(self, world: int, read_cpus: float) -> None:
        self._world, self._read_cpus = world, read_cpus
        self._feeds: dict[str, list[Feed]] = {}
        self._left: dict[str, set[int]] = {}
        self._bad: dict[str, dict[str, str]] = {}
        self._lock = threading.Lock()

    def open(self, stream: str, spec: AnySpec, lo: int) -> None:
        """Starts reading a stream at position `lo`, unless it is open."""
        with self._lock:
            if stream in self._feeds:
                return
            starts, _ = spec.split(lo, lo)
            ends, _ = spec.split(spec.end, spec.end)
            self._feeds[stream] = [
                Feed(part, self._world, self._read_cpus, start, end)
                for part, (start, _), (end, _) in zip(spec.parts, starts, ends, strict=True)
            ]
            self._left[stream] = set()

    def fetch(self, stream: str, rank: int, wanted: Sequence[Sequence[Range]]) -> list[list[list[Piece]]] | None:
        """Rank's pieces for one or more steps, by part.

        Args:
            stream: its name.
            rank: who asks.
            wanted: for each step, a range for each part, rising from step to step.

        Returns pieces of as many steps as are here, at least of the first; None for a stream that isn't open.
        """
        feeds = self._feeds.get(stream)
        if feeds is None:
            return None
        out = []
        for i, ranges in enumerate(wanted):
            if i == 0:
                for feed, (lo, hi) in zip(feeds, ranges, strict=True):
                    feed.wait(lo, hi)
            elif not all(feed.ready(hi) for feed, (_, hi) in zip(feeds, ranges, strict=True)):
                break
            out.append([feed.take(rank, lo, hi) for feed, (lo, hi) in zip(feeds, ranges, strict=True)])
        return out

    def report_bad(self, stream: str, bad: list[tuple[str, str]]) -> int:
        """Adds bad samples (key, reason); returns how many distinct ones the stream has met so far."""
        with self._lock:
            known = self._bad.setdefault(stream, {})
            known.update(bad)
            return len(known)

    def leave(self, stream: str, rank: int) -> None:
        """A rank is done with a stream; when all are, its blocks go."""
        with self._lock:
            if stream not in self._feeds:
                return
            self._left[stream].add(rank)
            if len(self._left[stream]) < self._world:
                return
            feeds = self._feeds.pop(stream)
        for feed in feeds:
            feed.close()
