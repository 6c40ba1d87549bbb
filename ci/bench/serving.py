"""A large class-sharded model from the registry to answers: size, time and memory of each step.

    PYTHONPATH=platform:. .venv/bin/python ci/bench/serving.py
    PYTHONPATH=platform:. .venv/bin/python ci/bench/serving.py --classes 2000000 --dim 512 --shards 8

Makes a model of random unit rows, logs and registers it in a store of its own, loads it in a fresh process, predicts, and
serves it over HTTP. `Anonymous` is what a process holds for itself; `mapped` are pages of the model's files, which the
kernel drops when it needs the memory and which processes on a host share. Prints Markdown tables; needs about twice the
model's size on disk and two minutes for 2 GB.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
import torch.nn.functional as F

from labelmill.encoders import build_encoder
from labelmill.heads.storage import save_range
from labelmill.job import ClusterConfig, TrackingConfig
from labelmill.serving.package import fetch_package
from labelmill.tracking import registry
from labelmill.tracking.model import load_model, write_model
from labelmill.tracking.run import Tracker

CONFIG = TrackingConfig(system_metrics=False)
PORT = 18_234


def memory() -> dict[str, float]:
    """MiB of this process: held by itself, and mapped from files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    found = {line.split(":")[0]: float(line.split()[1]) / 1024 for line in lines if line.startswith("Rss")}
    return {"anonymous": found["RssAnon"], "mapped": found["RssFile"]}


class Watch:
    """The most anonymous memory that was seen while the block ran, MiB, every 5 ms."""

    def __enter__(self) -> Watch:
        self.most, self._stop = memory()["anonymous"], threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def _look(self) -> None:
        while not self._stop.wait(0.005):
            self.most = max(self.most, memory()["anonymous"])

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()


def make_model(folder: Path, classes: int, dim: int, shards: int) -> float:
    """Writes the package; returns its size in GB."""
    torch.manual_seed(0)
    encoder = build_encoder({"kind": "char_ngrams", "dim": dim, "buckets": 4096, "hidden": 0})
    bounds = [classes * i // shards for i in range(shards + 1)]
    folder.mkdir()
    for start, stop in itertools.pairwise(bounds):
        save_range(folder, "rows", {"rows": F.normalize(torch.randn(stop - start, dim), dim=1)}, start, stop, {})
    names = pa.table({"name": [f"class-{i}" for i in range(classes)]})
    write_model(folder, encoder=encoder, input_kind="text", classes=names)
    return sum(path.stat().st_size for path in folder.iterdir()) / 1e9


def use(output: str) -> dict[str, Any]:
    """What a fresh process sees: seconds and memory of loading and of predictions."""
    torch.set_num_threads(1)
    before = memory()
    began = time.perf_counter()
    _, folder = fetch_package(CONFIG, output, "large")
    fetched = time.perf_counter()
    model = load_model(folder)
    found: dict[str, Any] = {"before": before, "find": fetched - began, "load": time.perf_counter() - fetched,
                             "loaded": memory(), "rows": []}  # fmt: skip
    for queries in (1, 1, 8, 64, 512):
        with Watch() as watch:
            began = time.perf_counter()
            model.predict([f"query {i}" for i in range(queries)], k=10)
            seconds = time.perf_counter() - began
        found["rows"].append(
            [queries, seconds, watch.most - before["anonymous"], memory()["mapped"] - before["mapped"]]
        )
    return found


def serve(output: str) -> list[list[float]]:
    """Clients, requests a second, median and 95th percentile of the latency in ms."""
    from labelmill import api

    def ask(number: int) -> float:
        body = json.dumps({"inputs": [f"query {number}"], "params": {"k": 10}}).encode()
        request = urllib.request.Request(url + "/invocations", body, {"content-type": "application/json"})
        began = time.perf_counter()
        with urllib.request.urlopen(request, timeout=120) as answer:
            answer.read()
        return time.perf_counter() - began

    rows = []
    cluster = ClusterConfig(cpus_per_worker=1.0).model_dump(exclude={"address"})
    with api.serve("large", port=PORT, cluster=cluster, output=output, tracking=CONFIG) as (url, _):
        ask(0)
        for clients in (1, 4, 16, 32):
            with ThreadPoolExecutor(clients) as pool:
                began = time.perf_counter()
                took = sorted(pool.map(ask, range(6 * clients)))
                seconds = time.perf_counter() - began
            rows.append([clients, len(took) / seconds, 1e3 * took[len(took) // 2], 1e3 * took[int(len(took) * 0.95)]])
    return rows


def table(columns: list[str], rows: list[list[Any]]) -> None:
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    for row in rows:
        print("| " + " | ".join(f"{cell:,.2f}" if isinstance(cell, float) else str(cell) for cell in row) + " |")
    print(flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--use", help=argparse.SUPPRESS)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.use or options.serve:
        print(json.dumps(use(options.use) if options.use else serve(options.serve)))
        return
    with tempfile.TemporaryDirectory(prefix="labelmill-serving-") as text:
        folder = Path(text)
        size = make_model(folder / "model", options.classes, options.dim, options.shards)
        output = str(folder / "runs")
        with Tracker.open(CONFIG, output, "large", run_dir=folder / "run") as tracker, Watch() as watch:
            before = memory()["anonymous"]
            began = time.perf_counter()
            registry.register(tracker, folder / "model", "large")
            seconds = time.perf_counter() - began
        pickles = [p.name for p in folder.rglob("*") if p.suffix in {".pkl", ".pickle", ".pt", ".bin"}]
        print(
            f"{options.classes:,} x {options.dim} float32 in {options.shards} files, {size:.2f} GB; pickles: {pickles}\n"
        )

        def fresh(part: str) -> Any:
            command = [sys.executable, __file__, part, output]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            return json.loads(done.stdout.splitlines()[-1])

        found = fresh("--use")
        held = found["loaded"]["anonymous"] - found["before"]["anonymous"]
        table(["step", "s", "anonymous MiB"], [["log and register", seconds, watch.most - before],
              ["find in the registry", found["find"], ""], ["load", found["load"], held]])  # fmt: skip
        table(["queries at once", "s", "anonymous MiB, peak", "mapped MiB"], found["rows"])
        table(["HTTP clients", "requests/s", "median ms", "95% ms"], fresh("--serve"))


if __name__ == "__main__":
    main()
