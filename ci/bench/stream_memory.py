"""Peak object-store memory of a stream against its documented bound: a fast, a slow and a stopped consumer.

    .venv/bin/python ci/bench/stream_memory.py --data DATA_SET --field image [--prefetch-mb 64] [--world 2]

The bound (platform/README.md): prefetch_mb, two blocks for each reader, and for each rank seven batches and two blocks.
"""

from __future__ import annotations

import argparse
import threading
import time
from dataclasses import replace
from typing import Any

import torch

from labelmill.cluster import set_environment, start
from labelmill.data.manifest import load_manifest
from labelmill.data.source import Streams
from labelmill.data.spec import Reading, StreamSpec
from labelmill.data.stream import RankStream
from labelmill.job import ClusterConfig


class Peak:
    """The largest number of bytes in use in the node's object store while the block runs."""

    def __enter__(self) -> Peak:
        from ray._private.internal_api import get_memory_info_reply, get_state_from_address

        state = get_state_from_address(None)
        self.bytes, self.spilled, self._stop = 0, 0, threading.Event()

        def watch() -> None:
            while not self._stop.wait(0.02):
                stats = get_memory_info_reply(state).store_stats
                self.bytes = max(self.bytes, stats.object_store_bytes_used)
                self.spilled = max(self.spilled, stats.spilled_bytes_total)

        self._thread = threading.Thread(target=watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._stop.set()
        self._thread.join()


def consume(spec: StreamSpec, world: int, group: str, pause_s: float, batches: int) -> float:
    """All ranks take `batches` batches in step; the peak in MiB."""

    def prepare(raw: Any, labels: Any, keys_B: Any) -> Any:
        return torch.from_numpy(raw) if hasattr(raw, "shape") else raw

    with Peak() as peak:
        ranks = [
            iter(RankStream(spec, Streams(r, world, 0.25, group).open(spec), r, world, prepare)) for r in range(world)
        ]
        for _ in range(min(batches, spec.steps)):
            for rank in ranks:
                next(rank)
            time.sleep(pause_s)
        for rank in ranks:
            rank.close()
    if peak.spilled:
        raise SystemExit(f"{peak.spilled} bytes were spilled to disk")
    return peak.bytes / 2**20


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--field", default="image")
    parser.add_argument("--channels", type=int, default=3)
    parser.add_argument("--prefetch-mb", type=float, default=64)
    parser.add_argument("--world", type=int, default=2)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--batches", type=int, default=60)
    options = parser.parse_args()
    set_environment()
    start(ClusterConfig(object_store_mb=1024))
    manifest = load_manifest(options.data)
    reading = Reading(prefetch_mb=options.prefetch_mb)
    spec = StreamSpec(manifest, options.field, options.batch, channels=options.channels, reading=reading, stop=2**40)
    print("| decode | consumer | peak MiB | bound MiB |\n|---|---|---|---|")
    for decode in ("late", "task"):
        spec = replace(spec, reading=replace(reading, decode=decode))
        block = spec.block_rows * spec.sample_bytes / 2**20
        batches_mb = 7 * options.batch * spec.sample_bytes / 2**20
        bound = options.prefetch_mb + 2 * block * (reading.readers + options.world) + batches_mb
        for name, pause_s, batches in (
            ("fast", 0.0, options.batches),
            ("slow", 0.1, options.batches),
            ("stopped", 5.0, 1),
        ):
            peak = consume(spec, options.world, f"memory-{decode}-{name}", pause_s, batches)
            print(f"| {decode} | {name} | {peak:.0f} | {bound:.0f} |", flush=True)


if __name__ == "__main__":
    main()
