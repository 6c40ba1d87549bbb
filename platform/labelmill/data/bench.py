"""What reading a data set costs on this machine, part by part, against what its decoder alone could do.

Every number is measured on the data set's own shards. advice.py makes a ceiling and advice of them.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import threading
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
from labelmill.data.decode import binary_views, decode_views
from labelmill.data.manifest import FieldSpec, Manifest
from labelmill.data.reading import decode_block
from labelmill.data.shards import HOLE, gather, open_shard, read_shard
from labelmill.data.writer import ShardWriter
from labelmill.errors import DataError

if TYPE_CHECKING:
    from rich.console import Console

_BLOCK_BYTES = 8 << 20
_MOST_BYTES = 512 << 20
_BLOCK_ROWS = 256
_MOST_ROWS = 4096
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
    channels: int = 3,
    handover: bool = True,
) -> Bench:
    """Measures the parts of a stream over `manifest`; takes seconds.

    Args:
        manifest: the data set, local or remote.
        field: the field to decode; by default the first.
        samples: about how many are read, in whole shards spread over the data set.
        threads: CPUs that the stream may use; by default those of the machine.
        image_size, channels: what a job asks of its images.
        handover: measure the object store of the Ray session that is open.

    Raises DataError: no such field, a shard that can't be read or isn't what the manifest says, images of several sizes
    without `image_size`.
    """
    name = field or next(iter(manifest.fields), "")
    if name not in manifest.fields:
        raise DataError(f"data set {manifest.name!r} has no field {name!r}; it has: {', '.join(manifest.fields)}.")
    cpus = threads or len(os.sched_getaffinity(0))
    picked = _pick(manifest, samples)
    with tempfile.TemporaryDirectory(prefix="labelmill-bench-") as folder:
        copy, parts, fetch_rate, latency = _fetch(manifest, picked, folder, cpus)
        try:
            table = _some(copy, name, samples)
        except DataError as error:
            originals = {copy.shard_path(at): manifest.shard_path(i) for at, i in enumerate(picked)}
            text = str(error)
            for path, original in originals.items():
                text = text.replace(path, original)
            raise DataError(text) from None
        parts |= _reading(copy, name)
        found = Bench(
            name=manifest.name,
            layout=manifest.layout,
            field=name,
            kind=manifest.fields[name].kind,
            samples=copy.num_samples,
            shards=len(picked),
            sample_bytes=table.column(name).nbytes / table.num_rows,
            stored_bytes=copy.num_bytes / copy.num_samples,
            shard_samples=manifest.num_samples / len(manifest.shards),
            threads=cpus,
            remote=store.is_uri(manifest.shard_path(picked[0])),
            latency_s=latency,
            parts=parts,
            fetch_rate=fetch_rate,
        )
        work = Decoding(table.select(["key", name, HOLE]), name, manifest.fields[name], image_size, channels)
        parts["decode"] = timed(lambda: [work.decode(first) for first in work.firsts()], table.num_rows)
        found.decode_rate = _decode_rates(work, cpus, folder)
        if handover:
            parts["tasks"] = _tasks(_WINDOW * found.shard_samples)
            parts["hand over"] = _handover(table)
        if found.kind == "image":
            parts |= _in_tasks(work, handover)
        if manifest.layout == "tar" and found.sample_bytes < _SMALL:
            found.packed = _packed(copy, name, folder)
    return found


def timed(work: Callable[[], Any], samples: int, least_s: float | None = None) -> Cost:
    """Cost of `work`, which handles `samples` samples, repeated for at least `least_s` seconds after one trial."""
    least_s = _LEAST_S if least_s is None else least_s
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


def _fetch(
    manifest: Manifest, picked: Sequence[int], folder: str, threads: int
) -> tuple[Manifest, dict[str, Cost], float, float]:
    """Fetches the shards into `folder`; a data set of the copies, costs, the rate of `threads` at once, the latency."""
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
        many = timed(lambda: list(pool.map(store.read_bytes, paths)), samples, None if remote else 0.1)
    if not remote:
        cost = timed(lambda: [store.read_bytes(path) for path in paths], samples)  # from the page cache by now
    local = []
    for i, shard, data in zip(picked, shards, content, strict=True):
        path = os.path.join(folder, f"{i}.tar")
        store.write_bytes(path, data)
        update: dict[str, Any] = {"path": path, "index": None, "index_sha256": None}
        if labels := manifest.labels_path(i):
            update["labels"] = os.path.join(folder, f"{i}.arrow")
            store.write_bytes(update["labels"], store.read_bytes(labels))
        local.append(shard.model_copy(update=update))
    copy = manifest.model_copy(update={"shards": tuple(local)}).at(folder)
    verify = timed(lambda: [hashlib.sha256(data).digest() for data in content], samples)
    return copy, {"fetch": cost, "verify": verify}, 1000 / many.wall_s, latency


def _reading(copy: Manifest, name: str) -> dict[str, Cost]:
    """Cost of parse (finding the samples in a fetched shard) and gather (blocks of them in the plan's order)."""
    numbers, samples = range(len(copy.shards)), copy.num_samples

    def opened() -> list[Any]:
        return [open_shard(copy, i, fields=[name], verify=False) for i in numbers]

    read = timed(lambda: [store.read_bytes(copy.shard_path(i)) for i in numbers], samples)
    both, shards = timed(opened, samples), opened()
    order = np.random.default_rng(0).permutation(samples)
    first = np.cumsum([0, *(shard.num_rows for shard in shards)])
    which = np.searchsorted(first, order, side="right") - 1
    row = order - first[which]
    rows = max(1, min(_MOST_ROWS, int(_BLOCK_BYTES * samples / copy.num_bytes)))

    def gathered() -> None:
        for lo in range(0, samples, rows):
            gather(shards, which[lo : lo + rows], row[lo : lo + rows])

    parse = Cost(max(0.0, both.cpu_s - read.cpu_s), max(0.0, both.wall_s - read.wall_s))
    return {"parse": parse, "gather": timed(gathered, samples)}


def _some(copy: Manifest, name: str, samples: int) -> pa.Table:
    """Up to `samples` samples as a block has them. Raises DataError for a shard that isn't what the manifest says."""
    shards = [open_shard(copy, i, fields=[name]) for i in range(len(copy.shards))]
    order = np.arange(min(samples, copy.num_samples))
    first = np.cumsum([0, *(shard.num_rows for shard in shards)])
    which = np.searchsorted(first, order, side="right") - 1
    return gather(shards, which, order - first[which]).combine_chunks()


def _packed(copy: Manifest, name: str, folder: str) -> Cost:
    """Cost of parse and gather of the same samples in the packed layout."""
    writer = ShardWriter(os.path.join(folder, "packed"), "packed", copy.fields, copy.label, layout="packed")
    for i in range(len(copy.shards)):
        writer.write_table(read_shard(copy, i, verify=False))
    parts = _reading(writer.close(), name)
    return parts["parse"] + parts["gather"]


# --- decode --------------------------------------------------------------------------------------------


@dataclass
class Decoding:
    """Decodes the samples of `table` (key, the field, `HOLE`) in blocks, as a stream does.

    Attributes:
        rows: samples of a block: few enough that its memory stays in the processor's reach and is used again.
    """

    table: pa.Table
    field: str
    spec: FieldSpec
    image_size: int | None
    channels: int
    rows: int = _BLOCK_ROWS

    def __post_init__(self) -> None:
        self._keys = self.table.column("key").to_pylist()
        self._memory = threading.local()
        first = self.decode(0)
        if isinstance(first, np.ndarray):
            self.rows = max(1, min(_BLOCK_ROWS, _BLOCK_BYTES // max(1, first[0].nbytes)))

    def firsts(self) -> range:
        """First row of each block."""
        return range(0, len(self._keys), self.rows)

    def decode(self, first: int) -> Any:
        """The block that begins at row `first`: uint8 (B, H, W, C), else a list of values."""
        part = self.table.column(self.field).slice(first, self.rows)
        if self.spec.kind != "image":
            return part.to_pylist()
        keys = self._keys[first : first + self.rows]
        return decode_views(binary_views(part), keys, self.image_size, self.channels, memory=self._take)[0]

    def in_task(self, first: int) -> pa.Table:
        """The same block as a read task decodes it."""
        return decode_block(self.table.slice(first, self.rows), self.field, self.image_size, self.channels)

    def _take(self, shape: tuple[int, ...]) -> np.ndarray:
        # a stream uses its batches' memory again, too; each thread has its own here
        kept = getattr(self._memory, "array", None)
        if kept is None or kept.shape != shape:
            kept = self._memory.array = np.empty(shape, np.uint8)
        return kept


def _in_tasks(work: Decoding, handover: bool) -> dict[str, Cost]:
    """What decoding in read tasks costs instead: the decoded samples travel, and are copied into batches."""
    count = work.table.num_rows
    parts = {"decode, task": timed(lambda: [work.in_task(first) for first in work.firsts()], count)}
    block = work.in_task(0)
    if handover:
        parts["hand over, task"] = _handover(block)
    values = block.column(work.field).combine_chunks().flatten().to_numpy()
    batch = np.empty_like(values)
    return parts | {"copy, task": timed(lambda: np.copyto(batch, values), block.num_rows, 0.1)}


def _decode_for(work: Decoding, seconds: float, number: int) -> float:
    """Samples/s of one thread decoding for `seconds`, beginning with block `number`."""
    firsts, rows, done = work.firsts(), work.table.num_rows, 0
    began = time.perf_counter()
    while (passed := time.perf_counter() - began) < seconds or not done:
        first = firsts[number % len(firsts)]
        work.decode(first)
        done += min(work.rows, rows - first)
        number += 1
    return done / passed


def _decode_rates(work: Decoding, workers: int, folder: str) -> dict[str, float]:
    """Samples/s of pure decode: by one thread, by `workers` threads, by as many processes."""
    seconds = 2 * _LEAST_S
    rates = {"one": _decode_for(work, seconds, 0)}
    if workers == 1:
        return rates
    numbers, times = list(range(workers)), [seconds] * workers
    with ThreadPoolExecutor(workers) as pool:
        rates["threads"] = sum(pool.map(_decode_for, [work] * workers, times, numbers))
    path = os.path.join(folder, "values.arrow")
    with pa.ipc.new_file(path, work.table.schema) as file:
        file.write_table(work.table)
    rest = (path, work.field, work.spec, work.image_size, work.channels)
    with get_context("spawn").Pool(workers, _open_values, rest) as processes:
        for wanted in (0.05, seconds):  # the first time waits for the processes
            found = processes.starmap(_decode_here, [(wanted, number) for number in numbers], chunksize=1)
    rates["processes"] = sum(found)
    return rates


_here: list[Decoding] = []  # of a process of the pool


def _open_values(path: str, *rest: Any) -> None:
    _here.append(Decoding(pa.ipc.open_file(pa.memory_map(path)).read_all(), *rest))


def _decode_here(seconds: float, number: int) -> float:
    return _decode_for(_here[0], seconds, number)


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
        share = f"{cost.cpu_s / total:.0%}" if name in used else "-"
        table.add_row(name, f"{cost.cpu_s:.4f}", f"{cost.wall_s:.4f}", share)
    console.print(table)
    rates = ", ".join(f"{rate:,.0f} by {way}" for way, rate in found.decode_rate.items())
    say(f"Decoding alone, samples/s: {rates} ({found.threads} CPUs).")
    if found.remote:
        say(
            f"Fetching, {found.threads} at once: {found.fetch_rate:,.0f} samples/s; {found.latency_s * 1000:.1f} ms a request."
        )
    for place in found.places:
        ceiling = found.ceiling(place)
        where = "late, in the rank's threads" if place == "late" else "in read tasks (the parts called task)"
        say(f"Ceiling if decoded {where}: {ceiling.rate:,.0f} samples/s, bound by {ceiling.bound}.")
    decode = found.parts["decode"]
    if decode.wall_s > _BUSY * decode.cpu_s:
        say(
            "[yellow]The machine was busy with other work: the wall times and rates are too low, CPU times may be too high.[/]"
        )
    for line in advise(found):
        say(f"- {escape(line)}")
