"""How a loader's process talks to stream.py: a line of JSON out, an empty line back, so that the parent can read the
process tree's counters at the edges of a pass while nothing else runs."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

_OUT = sys.stdout


def tell(event: str, **values: Any) -> None:
    """Sends an event and waits until the parent has seen it."""
    print(json.dumps({"event": event, **values}), file=_OUT, flush=True)
    sys.stdin.readline()


def passes(begin: Callable[[int], Iterator[int]], samples: int, count: int) -> None:
    """Runs `count` passes of up to `samples` samples; `begin(number)` gives an iterator of batch sizes.

    A pass is timed from before the loader (in the first pass: the session, too) is made to its last batch; loader and
    workers live on while the parent reads the counters.
    """
    for number in range(count):
        tell("begin", number=number)
        start = time.perf_counter()
        batches = begin(number)
        seen = first = 0
        first_at = start
        for size in batches:
            if not seen:
                first, first_at = size, time.perf_counter()
            seen += size
            if seen >= samples:
                break
        end = time.perf_counter()
        tell("end", number=number, samples=seen, first=first, first_s=first_at - start, wall_s=end - start)
        close = getattr(batches, "close", None)
        if close is not None:
            close()
        # worker processes and readers wind down outside of any pass
        time.sleep(0.3)
