"""Peak object-store memory of a stream against its documented bound.

    .venv/bin/python ci/bench/stream_memory.py [--only jp|fm|tx] [--samples N] [--prefetch-mb A,B] [--pause-ms MS]

A slow consumer (it pauses after each batch) lets the readers run as far ahead as they may; meanwhile the object store is
asked 20 times a second how much it holds. Prints a Markdown table; the bound is that of coordinator.py.
"""

from __future__ import annotations

import argparse
import os
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import stream_data

from labelmill.cluster import set_environment, start
from labelmill.data.manifest import load_manifest
from labelmill.data.source import Streams
from labelmill.data.spec import Reading, StreamSpec
from labelmill.data.stream import RankStream
from labelmill.job import ClusterConfig

BATCH = 256
STORE_MB = 2048


@dataclass
class Use:
    """Peaks of the object store, bytes: all objects, and what was spilled to disk."""

    used: int = 0
    spilled: int = 0


class Watch:
    """Asks the session's object store until it is closed."""

    def __init__(self, period: float = 0.05) -> None:
        import ray
        from ray._private.internal_api import get_memory_info_reply, get_state_from_address

        state = get_state_from_address(ray.get_runtime_context().gcs_address)
        self._ask = lambda: get_memory_info_reply(state).store_stats
        self._period, self._stop = period, threading.Event()
        self.start, self.peak = self._ask().object_store_bytes_used, Use()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(self._period):
            found = self._ask()
            self.peak.used = max(self.peak.used, found.object_store_bytes_used - self.start)
            self.peak.spilled = max(self.peak.spilled, found.spilled_bytes_total)

    def close(self) -> Use:
        """Stops asking."""
        self._stop.set()
        self._thread.join()
        return self.peak


def bound(spec: StreamSpec) -> float:
    """MiB that the stream may hold: what is read ahead, a block under way for each reader, a global batch."""
    under_way = spec.reading.readers * spec.block_rows + spec.global_batch
    return spec.reading.prefetch_mb + under_way * spec.sample_bytes / 2**20


def measure(spec: StreamSpec, samples: int, pause: float) -> tuple[Use, int]:
    """Peaks while up to `samples` samples are consumed slowly; samples consumed."""
    watch, seen = Watch(), 0
    stream = iter(
        RankStream(spec, Streams().open(spec), 0, 1, lambda raw, labels, keys: raw, threads=os.cpu_count() or 1)
    )
    for batch in stream:
        seen += len(batch)
        time.sleep(pause)
        if seen >= samples:
            break
    stream.close()
    return watch.close(), seen


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(stream_data.KINDS), action="append")
    parser.add_argument("--samples", type=int, default=20_000)
    parser.add_argument("--prefetch-mb", default="32,64,256", help="data.prefetch_mb values")
    parser.add_argument("--pause-ms", type=float, default=50.0, help="the consumer's pause after each batch")
    parser.add_argument("--data", type=Path, default=Path(stream_data.DEFAULT))
    given = parser.parse_args()
    set_environment()
    start(ClusterConfig(object_store_mb=STORE_MB))
    print("| data | decode | prefetch_mb | block MiB | samples | peak MiB | bound MiB | spilled MiB |")
    print("|---|---|---|---|---|---|---|---|")
    for name in given.only or list(stream_data.KINDS):
        stream_data.make(name, given.data)
        kind = stream_data.KINDS[name]
        manifest = load_manifest(given.data / name / kind.layouts[-1])
        for prefetch in map(float, given.prefetch_mb.split(",")):
            for place in ("late", "task") if kind.field == "image" else ("late",):
                reading: Any = replace(Reading(), prefetch_mb=prefetch, decode=place)
                spec = StreamSpec(manifest, kind.field, BATCH, reading=reading, channels=1 if name == "fm" else 3)
                use, seen = measure(spec, given.samples, given.pause_ms / 1000)
                block = spec.block_rows * spec.sample_bytes / 2**20
                print(
                    f"| {name} | {place} | {prefetch:g} | {block:.1f} | {seen:,} | {use.used / 2**20:.1f} | {bound(spec):.1f} "
                    f"| {use.spilled / 2**20:.1f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
