"""CPU milliseconds that reading shards costs, by part, for 1,000 samples. Prints a Markdown table.

    python ci/bench/read_shards.py [FOLDER]

Writes four small data sets of random content below FOLDER (a temporary folder by default): JPEG-sized members, small PNG-
sized members, texts packed and texts in plain tar. The page cache is warm; the best of several rounds counts.
"""

from __future__ import annotations

import hashlib
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from labelmill.data import store
from labelmill.data.fetch import Verify
from labelmill.data.index import read_index
from labelmill.data.labels import LabelSpec
from labelmill.data.manifest import FieldSpec, Layout, Manifest
from labelmill.data.scan import scan, scan_slow
from labelmill.data.shards import gather, open_shard
from labelmill.data.writer import ShardWriter

SHARDS = 4


@dataclass(frozen=True)
class DataSet:
    """Samples of about `size` bytes, `samples` in each shard."""

    name: str
    samples: int
    size: int
    ext: str
    layout: Layout = "tar"


SETS = (
    DataSet("jpg 18 KB", 1000, 18_000, "jpg"),
    DataSet("png 0.5 KB", 2000, 500, "png"),
    DataSet("text, packed", 4000, 70, "txt", "packed"),
    DataSet("text, tar", 4000, 70, "txt"),
)


def write(folder: Path, what: DataSet) -> Manifest:
    rng = np.random.default_rng(0)
    fields = {"input": FieldSpec(kind="text" if what.ext == "txt" else "image", ext=what.ext)}
    label = LabelSpec(form="single", num_classes=1000)
    writer = ShardWriter(
        folder / what.name.replace(" ", "-"),
        "x",
        fields,
        label,
        what.layout,
        target_bytes=1 << 30,
        samples_per_shard=what.samples,
        rows_per_member=1000,
    )
    for i in range(what.samples * SHARDS):
        size = what.size + i % 50
        writer.write(f"s{i:08d}", {"input": "x" * size if what.ext == "txt" else rng.bytes(size)}, {"label": i % 1000})
    return writer.close()


def cost(call: Callable[[], object], rounds: int = 12) -> float:
    """CPU milliseconds of the best round."""
    call()
    best = float("inf")
    for _ in range(rounds):
        began = time.process_time()
        call()
        best = min(best, time.process_time() - began)
    return 1000 * best


def measure(manifest: Manifest, samples: int) -> dict[str, float]:
    path = manifest.shard_path(0)
    view = memoryview(store.read_bytes(path)).cast("B")
    plain = manifest.model_copy(
        update={"shards": tuple(s.model_copy(update={"index": None, "index_sha256": None}) for s in manifest.shards)}
    )
    modes: dict[str, Verify] = {"hash": True, "hash known": "first", "no hash": False}
    rng = np.random.default_rng(1)
    which, row = rng.integers(0, SHARDS, samples), rng.integers(0, samples, samples)
    shards = [open_shard(manifest, i, verify="first") for i in range(SHARDS)]
    quarter = np.arange(samples // 4)
    return {
        "read": cost(lambda: store.read_bytes(path)),
        "sha256": cost(lambda: hashlib.sha256(view).hexdigest(), 4),
        "scan": cost(lambda: scan(view, path)),
        "scan by the walk": cost(lambda: scan_slow(view, path), 4),
        "read index": cost(lambda: read_index(manifest, 0)),
        **{f"open, {name}": cost(lambda v=v: open_shard(manifest, 0, verify=v), 6) for name, v in modes.items()},  # type: ignore[misc]
        "open, hash known, no index": cost(lambda: open_shard(plain, 0, verify="first")),
        "open a quarter by ranges": cost(lambda: open_shard(manifest, 0, rows=quarter)),
        "gather": cost(lambda: gather(shards, which, row)),
    }


def main(folder: Path) -> None:
    found = {what.name: measure(write(folder, what), what.samples) for what in SETS}
    print("| CPU ms per 1,000 samples of the shard |", " | ".join(found), "|")
    print("|---|" + "---|" * len(found))
    for part in next(iter(found.values())):
        cells = (f"{found[what.name][part] / what.samples * 1000:.2f}" for what in SETS)
        print(f"| {part} |", " | ".join(cells), "|")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(Path(temporary))
