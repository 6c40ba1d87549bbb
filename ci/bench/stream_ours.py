"""Our stream, Ray's own WebDataset reader, and the decode limit; runs in the project's environment.

    python stream_ours.py run NAME LOADER --data FOLDER ...   (called by stream.py)
    python stream_ours.py limit NAME --data FOLDER            pure decode from memory, on all cores

Loaders: `labelmill` (the layout advised for the data: packed for small samples), `labelmill-tar`, `labelmill-ordered`
(no shuffle), `labelmill-s3` (the same shards from S3), `ray-webdataset`.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import simplejpeg
import torch
from stream_data import KINDS
from stream_protocol import passes

from labelmill.cluster import start
from labelmill.data.manifest import Manifest, load_manifest
from labelmill.job import ClusterConfig

BATCH = 256
SHAPES = {"jp": (224, 224, 3), "fm": (28, 28, 1)}
STORE_MB = 1024


def open_stream(manifest: Manifest, field: str, shuffle: bool) -> Iterator[int]:
    """One epoch of the data set as rank 0 of 1 gets it, in batches of BATCH; yields the batches' sizes.

    The only place here that knows how a stream is opened.
    """
    from labelmill.data.source import Streams
    from labelmill.data.spec import StreamSpec
    from labelmill.data.stream import RankStream

    channels = 1 if manifest.name == "fm" else 3
    spec = StreamSpec(manifest, field, BATCH, shuffle=shuffle, channels=channels)
    source = Streams().open(spec)
    for batch in RankStream(spec, source, 0, 1, _to_tensor, threads=os.cpu_count() or 1):
        yield len(batch)


def _to_tensor(raw: Any, labels: Any, keys_B: Any) -> Any:
    return torch.from_numpy(raw) if isinstance(raw, np.ndarray) else raw


def ray_webdataset(name: str, folder: Path, samples: int) -> Iterator[int]:
    """`ray.data.read_webdataset` as its documentation shows it, over as many shards as `samples` need."""
    import ray.data

    ray.data.DataContext.get_current().enable_progress_bars = False
    manifest = load_manifest(folder / "tar")
    counts = np.cumsum([shard.samples for shard in manifest.shards])
    needed = int(np.searchsorted(counts, min(samples, counts[-1]))) + 1
    paths = [manifest.shard_path(i) for i in range(needed)]
    value = manifest.fields[KINDS[name].field].ext
    for batch in ray.data.read_webdataset(paths).iter_batches(batch_size=BATCH):
        column = batch[value]
        values = column.tolist() if name == "tx" else torch.from_numpy(np.stack(list(column)))
        yield len(values)


def run(name: str, loader: str, data: Path, uri: str | None, samples: int, count: int) -> None:
    """`count` passes in one Ray session; the first one includes starting it."""
    from labelmill.cluster import set_environment

    set_environment()
    import ray
    import ray.data

    kind = KINDS[name]
    layout = "tar" if loader == "labelmill-tar" else kind.layouts[-1]

    def begin(number: int) -> Iterator[int]:
        if not ray.is_initialized():
            start(ClusterConfig(object_store_mb=STORE_MB))
        if loader == "ray-webdataset":
            return ray_webdataset(name, data / name, samples)
        manifest = load_manifest(uri if uri and loader == "labelmill-s3" else data / name / layout)
        return open_stream(manifest, kind.field, loader != "labelmill-ordered")

    passes(begin, samples, count)
    ray.shutdown()


# --- the limit ---


def _decode(name: str, values: Sequence[Any], seconds: float) -> tuple[int, float]:
    """Decodes `values` over and over for `seconds`; samples and CPU seconds."""
    rows = np.zeros((BATCH, *SHAPES.get(name, ())), dtype=np.uint8)
    began, cpu = time.perf_counter(), time.thread_time()
    done = 0
    while time.perf_counter() - began < seconds:
        for i, raw in enumerate(values[done % len(values) :][:BATCH]):
            _decode_one(name, raw, rows[i])
            done += 1
    return done, time.thread_time() - cpu


def _decode_one(name: str, raw: Any, row: np.ndarray) -> Any:
    if name == "jp":
        return simplejpeg.decode_jpeg(raw, "RGB", buffer=row)
    if name == "fm":
        import io

        from PIL import Image

        row[:, :, 0] = np.asarray(Image.open(io.BytesIO(raw)))
        return row
    return raw.decode()


def _values(name: str, data: Path, count: int = 4096) -> list[bytes]:
    from labelmill.data.shards import read_shard

    kind = KINDS[name]
    manifest = load_manifest(data / name / "tar")
    found: list[bytes] = []
    for i in range(len(manifest.shards)):
        found += read_shard(manifest, i).column(kind.field).cast(pa.binary()).to_pylist()
        if len(found) >= count:
            break
    return found[:count]


def limit(name: str, data: Path, seconds: float) -> dict[str, Any]:
    """Samples/s and CPU seconds per 1,000 samples of nothing but decoding, by one process a core and one thread a core."""
    values, cores = _values(name, data), os.cpu_count() or 1
    out: dict[str, Any] = {"cores": cores, "mean_bytes": float(np.mean([len(v) for v in values]))}
    tasks = ([name] * cores, [values] * cores, [seconds] * cores)
    out["one"] = _rate([_decode(name, values, seconds)], seconds)
    with ThreadPoolExecutor(cores) as threads:
        out["threads"] = _rate(list(threads.map(_decode, *tasks)), seconds)
    with get_context("fork").Pool(cores) as pool:
        out["processes"] = _rate(pool.starmap(_decode, list(zip(*tasks, strict=True))), seconds)
    best = max(("threads", "processes"), key=lambda way: out[way]["rate"])
    out |= {"rate": out[best]["rate"], "cpu_per_1k": out[best]["cpu_per_1k"], "best": best}
    out["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return out


def _rate(parts: list[tuple[int, float]], seconds: float) -> dict[str, float]:
    done, cpu = (sum(column) for column in zip(*parts, strict=True))
    return {"rate": done / seconds, "cpu_per_1k": 1000 * cpu / done}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for word in ("run", "limit"):
        command = commands.add_parser(word)
        command.add_argument("name", choices=list(KINDS))
        command.add_argument("--data", type=Path, required=True)
        if word == "run":
            command.add_argument("loader")
            command.add_argument("--uri", help="the data set on S3, for labelmill-s3")
            command.add_argument("--samples", type=int, default=2**62)
            command.add_argument("--passes", type=int, default=2)
        else:
            command.add_argument("--seconds", type=float, default=3.0)
    options = parser.parse_args()
    if options.command == "limit":
        print(json.dumps(limit(options.name, options.data, options.seconds)))
        return
    run(options.name, options.loader, options.data, options.uri, options.samples, options.passes)


if __name__ == "__main__":
    main()
