"""Which client reads S3 with the least CPU, and what parts side by side gain. Prints Markdown tables.

    PYTHONPATH=platform:. .venv/bin/python ci/bench/store_read.py

The server runs in a process of its own on this machine (its CPU isn't counted, but it needs some). Whole shards and
a small range are read over loopback; then a shard from a store that is far away: 30 ms and 50 MB/s a connection.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import boto3
import pyarrow as pa
from botocore.config import Config
from pyarrow import fs

from labelmill.data import s3, s3_objects, store

MIB = 1 << 20
SIZES = {"64 KiB": 64 << 10, "16 MiB": 16 * MIB, "48 MiB": 48 * MIB, "64 MiB": 64 * MIB}
SECONDS = 1.5  # of each measurement
ROUNDS = 3


def serve(pipe: Connection) -> None:
    """The server; its distance is set through the pipe."""
    from tests.faults import FaultServer

    with FaultServer() as server:
        block = os.urandom(MIB)
        for name, size in SIZES.items():
            server.put(f"bench/{name}", (block * (size // MIB + 1))[:size])
        pipe.send(server.url)
        while (distance := pipe.recv()) is not None:
            server.latency_s, server.bandwidth = distance
            pipe.send(True)


def cpu_seconds() -> float:
    """Of this process, all threads."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def measure(read: Callable[[], Any]) -> tuple[float, float]:
    """Wall and CPU seconds of a read, the best of some rounds."""
    best = (float("inf"), float("inf"))
    for _ in range(ROUNDS):
        wall, cpu, n = time.perf_counter(), cpu_seconds(), 0
        while time.perf_counter() - wall < SECONDS / ROUNDS or not n:
            read()
            n += 1
        best = min(best[0], (time.perf_counter() - wall) / n), min(best[1], (cpu_seconds() - cpu) / n)
    return best


def clients(endpoint: str) -> dict[str, Callable[[str, int], Any]]:
    """Ways to read the first bytes of an object."""
    plain = boto3.client("s3", config=Config(s3={"addressing_style": "path"}))
    arrow = fs.S3FileSystem(
        endpoint_override=endpoint.removeprefix("http://"),
        scheme="http",
        region="us-east-1",
        access_key="a",
        secret_key="b",
    )

    def boto(name: str, size: int) -> bytes:
        return plain.get_object(Bucket="bench", Key=name, Range=f"bytes=0-{size - 1}")["Body"].read()

    def pyarrow(name: str, size: int) -> pa.Buffer:
        with arrow.open_input_file(f"bench/{name}") as file:
            return file.read_buffer(size)

    def ours(name: str, size: int) -> pa.Buffer:
        return store.read_bytes(f"s3://bench/{name}", 0, size)

    return {"pyarrow.fs": pyarrow, "boto3, Body.read()": boto, "store.read_bytes": ours}


def table(rows: list[list[str]]) -> None:
    """A Markdown table, the first row its head."""
    for i, row in enumerate(rows):
        print("| " + " | ".join(row) + " |")
        if not i:
            print("|" + " --- |" * len(row))
    print()


def main() -> None:
    """Measures and prints."""
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    server = context.Process(target=serve, args=(theirs,), daemon=True)
    server.start()
    url = pipe.recv()
    os.environ |= {"AWS_ENDPOINT_URL": url, "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
    os.environ |= {"AWS_REGION": "us-east-1", "AWS_DEFAULT_REGION": "us-east-1"}
    ways = clients(url)
    rows = [["loopback", *(f"{name}: ms, CPU ms" for name in ways)]]
    for name, size in SIZES.items():
        cells = [measure(lambda read=read, name=name, size=size: read(name, size)) for read in ways.values()]
        rows.append([name, *(f"{1e3 * wall:.1f}, {1e3 * cpu:.1f}" for wall, cpu in cells)])
    table(rows)
    rows = [["64 MiB", "one request: ms, CPU ms", "parts: ms, CPU ms", "as chosen: ms, CPU ms"]]
    chosen = s3_objects._FAST
    for place, distance in {"loopback": (0.0, 0.0), "30 ms away, 50 MB/s a connection": (0.03, 50e6)}.items():
        pipe.send(distance)
        pipe.recv()
        cells = []
        for fast in (0.0, float("inf"), chosen):
            s3_objects._FAST = fast
            s3.connect().fast = fast == 0
            cells.append(measure(lambda: store.read_bytes("s3://bench/64 MiB", 0, 64 * MIB)))
        rows.append([place, *(f"{1e3 * wall:.1f}, {1e3 * cpu:.1f}" for wall, cpu in cells)])
    table(rows)
    pipe.send(None)
    server.join()


if __name__ == "__main__":
    main()
