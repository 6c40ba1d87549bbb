"""What reading a data set costs on this machine, part by part, against what its decoder alone could do.

Every number is measured on the data set's own shards. advice.py makes a ceiling and advice of them.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from rich.markup import escape

from labelmill.data import store
from labelmill.data.advice import Bench, Cost, advise
from labelmill.data.decode import decode_arrays, decode_images
from labelmill.data.manifest import FieldSpec, Manifest
from labelmill.data.shards import read_shard
from labelmill.data.writer import ShardWriter
from labelmill.errors import DataError

if TYPE_CHECKING:
    from rich.console import Console

_BLOCK_BYTES = 8 << 20
_MOST_BYTES = 512 << 20
_BLOCK_ROWS = 256
_DECODED_BYTES = 4 << 20
_LEAST_S = 0.3
_BUSY = 1.15  # wall over CPU time of decoding, which never waits by itself
_SMALL = 16 << 10  # bytes; larger samples gain nothing from packing
_WINDOW = 8  # shards of a read task, by default


def bench(
    manifest: Manifest,
    field: str | None = None,
    samples: int = 4_000,
    threads: int | None = None,
    image_size: int | None = None,
    handover: bool = True,
) -> Bench:
    """Measures the parts of a stream over `manifest`; takes seconds.

    Args:
        manifest: the data set, local or remote.
        field: the field to decode; by default the first.
        samples: about how many are read, in whole shards spread over the data set.
        threads: CPUs that the stream may use; by default those of the machine.
        image_size: side that a job resizes images to.
        handover: measure the object store of the Ray session that is open.

    Raises DataError: no such field, a shard that can't be read or isn't what the manifest says.
    """
    name = field or next(iter(manifest.fields), "")
    if name not in manifest.fields:
        raise DataError(f"data set {manifest.name!r} has no field {name!r}; it has: {', '.join(manifest.fields)}.")
    if samples < 1:
        raise DataError(f"samples must be at least 1, not {samples}.")
    cpus = threads or len(os.sched_getaffinity(0))
    picked = _pick(manifest, samples)
    with tempfile.TemporaryDirectory(prefix="labelmill-bench-") as folder:
        copy, fetch, fetch_rate, latency = _fetch(manifest, picked, folder, cpus)
        parts = {"fetch": fetch, **_reading(copy, manifest)}
        table = pa.concat_tables([read_shard(copy, i, verify=False) for i in range(len(copy.shards))])
        column = table.column(name)
        content = column.nbytes / table.num_rows
        measured = Bench(
            name=manifest.name,
            layout=manifest.layout,
            field=name,
            kind=manifest.fields[name].kind,
            samples=table.num_rows,
            shards=len(picked),
            sample_bytes=content,
            stored_bytes=copy.num_bytes / table.num_rows,
            shard_samples=manifest.num_samples / len(manifest.shards),
            threads=cpus,
            remote=store.is_uri(manifest.shard_path(picked[0])),
            latency_s=latency,
            parts=parts,
            fetch_rate=fetch_rate,
        )
        rows = table.slice(0, min(samples, table.num_rows))
        work = _Decoding(rows.column(name), rows.column("key").to_pylist(), manifest.fields[name], image_size)
        measured.parts |= _decoding(work)
        measured.decode_rate = _decode_rates(work, cpus, folder)
        if handover:
            measured.parts["tasks"] = _tasks(_WINDOW * measured.shard_samples)
            measured.parts["hand over, late"] = _handover(rows.select(["key", name]))
            measured.parts["hand over, task"] = _handover(work.table())
        if manifest.layout == "tar" and content < _SMALL:
            measured.packed = _packed(manifest, table, folder)
    return measured


def timed(work: Callable[[], Any], samples: int, least_s: float = _LEAST_S) -> Cost:
    """Cost of `work`, which handles `samples` samples, repeated for at least `least_s` seconds after one trial."""
    work()
    wall, cpu, times = time.perf_counter(), time.process_time(), 0
    while not times or time.perf_counter() - wall < least_s:
        work()
        times += 1
    scale = 1000 / (samples * times)
    return Cost((time.process_time() - cpu) * scale, (time.perf_counter() - wall) * scale)


# --- fetch and read ------------------------------------------------------------------------------------


def _pick(manifest: Manifest, samples: int) -> list[int]:
    """Shards spread over the data set that hold `samples` together, at least one, within memory."""
    order = np.linspace(0, len(manifest.shards) - 1, min(len(manifest.shards), samples)).round().astype(int)
    step = max(1, round(len(order) * manifest.num_samples / len(manifest.shards) / max(1, samples)))
    spread = [*order[::step].tolist(), *order.tolist()]
    picked: list[int] = []
    count = size = 0
    for i in dict.fromkeys(spread):
        if picked and (count >= samples or size + manifest.shards[i].bytes > _MOST_BYTES):
            break
        picked.append(i)
        count, size = count + manifest.shards[i].samples, size + manifest.shards[i].bytes
    return sorted(picked)


def _fetch(manifest: Manifest, picked: Sequence[int], folder: str, threads: int) -> tuple[Manifest, Cost, float, float]:
    """Fetches the shards once, into `folder`; a data set of the copies, the cost, the rate of `threads`, the latency."""
    shards = [manifest.shards[i] for i in picked]
    paths = [manifest.shard_path(i) for i in picked]
    samples = sum(shard.samples for shard in shards)
    wall, cpu = time.perf_counter(), time.process_time()
    content = [store.read_bytes(path) for path in paths]
    cost = Cost((time.process_time() - cpu) * 1000 / samples, (time.perf_counter() - wall) * 1000 / samples)
    latency, remote = 0.0, store.is_uri(paths[0])
    if remote:
        latency = timed(lambda: store.read_head(paths[0], 1), 1000, 0.1).wall_s
    with ThreadPoolExecutor(threads) as pool:
        many = timed(lambda: list(pool.map(store.read_bytes, paths)), samples, _LEAST_S if remote else 0.1)
    if not remote:
        cost = timed(lambda: [store.read_bytes(path) for path in paths], samples)  # from the page cache by now
    local = []
    for i, shard, data in zip(picked, shards, content, strict=True):
        path = os.path.join(folder, f"{i}.tar")
        store.write_bytes(path, data)
        update: dict[str, Any] = {"path": path}
        if labels := manifest.labels_path(i):
            update["labels"] = os.path.join(folder, f"{i}.arrow")
            store.write_bytes(update["labels"], store.read_bytes(labels))
        local.append(shard.model_copy(update=update))
    return manifest.model_copy(update={"shards": tuple(local)}).at(folder), cost, 1000 / many.wall_s, latency


def _reading(copy: Manifest, manifest: Manifest) -> dict[str, Cost]:
    """Cost of verify, parse and order, on local copies. Raises DataError with the path of the original."""
    numbers, samples = range(len(copy.shards)), copy.num_samples
    content = [store.read_bytes(copy.shard_path(i)) for i in numbers]
    read = timed(lambda: [store.read_bytes(copy.shard_path(i)) for i in numbers], samples)
    both = timed(lambda: [read_shard(copy, i, verify=False) for i in numbers], samples)
    table = pa.concat_tables([read_shard(copy, i, verify=True) for i in numbers])
    order = pa.array(np.random.default_rng(0).permutation(table.num_rows))
    return {
        "verify": timed(lambda: [hashlib.sha256(data).digest() for data in content], samples),
        "parse": Cost(max(0.0, both.cpu_s - read.cpu_s), max(0.0, both.wall_s - read.wall_s)),
        "order": timed(lambda: table.take(order), samples),
    }


def _packed(manifest: Manifest, table: pa.Table, folder: str) -> Cost:
    """Cost of parse and order of the same samples in the packed layout."""
    place = os.path.join(folder, "packed")
    writer = ShardWriter(place, "packed", manifest.fields, manifest.label, layout="packed")
    writer.write_table(table)
    packed = writer.close()
    parts = _reading(packed, packed)
    return Cost(parts["parse"].cpu_s + parts["order"].cpu_s, parts["parse"].wall_s + parts["order"].wall_s)


# --- decode --------------------------------------------------------------------------------------------


@dataclass
class _Decoding:
    """Blocks of a field's encoded values, and what decodes one."""

    column: pa.ChunkedArray
    keys: list[str]
    spec: FieldSpec
    image_size: int | None
    rows: int = 0

    def __post_init__(self) -> None:
        """Small enough blocks that their memory is used again: fresh pages aren't part of decoding."""
        first = self._decode(0, 1)
        size = first.nbytes if isinstance(first, np.ndarray) else 0
        self.rows = max(1, min(_BLOCK_ROWS, _DECODED_BYTES // max(1, size)))

    def blocks(self) -> Iterator[int]:
        """First row of each block."""
        return iter(range(0, len(self.keys), self.rows))

    def decode(self, first: int) -> Any:
        """The block that begins at row `first`, decoded as a stream does it."""
        return self._decode(first, self.rows)

    def _decode(self, first: int, rows: int) -> Any:
        part, keys = self.column.slice(first, rows), self.keys[first : first + rows]
        if self.spec.kind == "image":
            return decode_images(part, keys, size=self.image_size)[0]
        if self.spec.kind == "array":
            return decode_arrays(part, self.spec, keys)[0]
        return part.to_pylist()

    def table(self) -> pa.Table:
        """Decoded samples, about a block's bytes of them, as a read task hands them over."""
        values = self.decode(0)
        if not isinstance(values, np.ndarray):
            return pa.table({"key": self.keys, "value": self.column})
        flat = pa.array(np.ascontiguousarray(values).reshape(-1))
        return pa.table({"value": pa.FixedSizeListArray.from_arrays(flat, max(1, values[0].size))})


def _decoding(work: _Decoding) -> dict[str, Cost]:
    decode = timed(lambda: [work.decode(first) for first in work.blocks()], len(work.keys))
    values = work.decode(0)
    if not isinstance(values, np.ndarray):
        return {"decode": decode, "copy": Cost(0.0, 0.0)}
    batch = np.empty_like(values)
    return {"decode": decode, "copy": timed(lambda: np.copyto(batch, values), len(values), 0.1)}


def _decode_for(work: _Decoding, seconds: float, first: int) -> float:
    """Samples/s of one thread decoding for `seconds`, beginning with block number `first`."""
    starts = list(work.blocks())
    began, done = time.perf_counter(), 0
    while (passed := time.perf_counter() - began) < seconds or not done:
        row = starts[first % len(starts)]
        work.decode(row)
        done += min(work.rows, len(work.keys) - row)
        first += 1
    return done / passed


def _decode_rates(work: _Decoding, workers: int, folder: str, seconds: float = 0.6) -> dict[str, float]:
    """Samples/s of pure decode: by one thread, by `workers` threads, by as many processes."""
    rates = {"one": _decode_for(work, seconds, 0)}
    if workers == 1:
        return rates
    numbers, times = list(range(workers)), [seconds] * workers
    with ThreadPoolExecutor(workers) as pool:
        rates["threads"] = sum(pool.map(_decode_for, [work] * workers, times, numbers))
    path = os.path.join(folder, "values.arrow")
    table = pa.table({"key": work.keys, "value": work.column})
    with pa.ipc.new_file(path, table.schema) as file:
        file.write_table(table)
    with get_context("spawn").Pool(workers, _open_values, (path, work.spec, work.image_size)) as processes:
        processes.map(_warm, numbers, chunksize=1)
        rates["processes"] = sum(processes.starmap(_decode_here, zip(times, numbers, strict=True), chunksize=1))
    return rates


_here: list[_Decoding] = []  # of a process of the pool


def _open_values(path: str, spec: FieldSpec, image_size: int | None) -> None:
    table = pa.ipc.open_file(pa.memory_map(path)).read_all()
    _here.append(_Decoding(table.column("value"), table.column("key").to_pylist(), spec, image_size))


def _warm(first: int) -> None:
    _decode_for(_here[0], 0.05, first)


def _decode_here(seconds: float, first: int) -> float:
    return _decode_for(_here[0], seconds, first)


# --- hand-over -----------------------------------------------------------------------------------------


def _produce(block: pa.Table, times: int) -> Iterator[Any]:
    began = time.process_time()
    for _ in range(times):
        yield block
    yield time.process_time() - began


def _tasks(samples: float, times: int = 20) -> Cost:
    """Starting read tasks, if each serves `samples` samples."""
    import ray

    task: Any = ray.remote(num_cpus=0, max_retries=0)(_produce)
    cost = Cost(0.0, 0.0)
    for count in (2, times):
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(count):
            for reference in task.options(num_returns="streaming").remote(None, 0):
                last = ray.get(reference)
        scale = 1000 / (count * samples)
        cost = Cost((time.process_time() - cpu + count * last) * scale, (time.perf_counter() - wall) * scale)
    return cost


def _handover(table: pa.Table) -> Cost:
    """From a task to this process through the object store of the open session, in blocks as a stream's."""
    import ray

    rows = max(1, min(table.num_rows, int(_BLOCK_BYTES / max(1.0, table.nbytes / table.num_rows))))
    block = table.slice(0, rows).combine_chunks()
    # as often as one pass over the sample, and often enough for a clock; what is read ahead stays within the store
    times = max(8, min(64, -(-table.num_rows // rows)))
    task: Any = ray.remote(num_cpus=0, max_retries=0)(_produce)
    given = ray.put(block)
    cost = Cost(0.0, 0.0)
    for _ in range(2):  # the first time starts a process
        wall, cpu = time.perf_counter(), time.process_time()
        for reference in task.options(num_returns="streaming", _generator_backpressure_num_objects=4).remote(
            given, times
        ):
            last = ray.get(reference)
        scale = 1000 / (times * rows)
        passed = time.process_time() - cpu + last
        cost = Cost(passed * scale, (time.perf_counter() - wall) * scale)
    return cost


# --- showing it ----------------------------------------------------------------------------------------


def render_bench(found: Bench, console: Console) -> None:
    """Costs, limits and advice, for people."""
    from rich.table import Table

    def say(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True)

    say(
        f"[bold]{escape(found.name)}[/]: {found.samples:,} samples of {found.shards} {found.layout} shard(s), field "
        f"{found.field} ({found.kind}), {found.sample_bytes:,.0f} bytes a sample, {found.stored_bytes:,.0f} as stored"
    )
    table = Table(box=None, pad_edge=False)
    table.add_column("per 1,000 samples")
    for name in ("CPU s", "wall s", "share of CPU"):
        table.add_column(name, justify="right")
    used, total = found.used(found.best), found.cpu_s(found.best)
    for name, cost in found.parts.items():
        share = f"{cost.cpu_s / total:.0%}" if name in used else "not used"
        table.add_row(name, f"{cost.cpu_s:.4f}", f"{cost.wall_s:.4f}", share)
    console.print(table)
    rates = ", ".join(f"{rate:,.0f} by {way}" for way, rate in found.decode_rate.items())
    say(f"Decoding alone, samples/s: {rates} ({found.threads} CPUs).")
    if found.remote:
        say(
            f"Fetching, {found.threads} at once: {found.fetch_rate:,.0f} samples/s; {found.latency_s * 1000:.1f} ms a request."
        )
    for place in ("late", "task"):
        ceiling = found.ceiling(place)
        where = "late, in the rank's threads" if place == "late" else "in read tasks"
        say(f"Ceiling if decoded {where}: {ceiling.rate:,.0f} samples/s, bound by {ceiling.bound}.")
    decode = found.parts["decode"]
    if decode.wall_s > _BUSY * decode.cpu_s:
        say(
            "[yellow]The machine was busy with other work: the wall times and rates are too low, CPU times may be too high.[/]"
        )
    for line in advise(found):
        say(f"- {escape(line)}")
