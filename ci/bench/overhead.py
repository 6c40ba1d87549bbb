"""What the platform costs a step, and how long it takes to start, against the same loop bare in one process.

    PYTHONPATH=platform:. .venv/bin/python ci/bench/overhead.py
    PYTHONPATH=platform:. .venv/bin/python ci/bench/overhead.py --rounds 1 --steps 100

Platform: one Ray Train worker, the stream through Ray Data from shards on disk, DeepSpeed, metrics every ten steps, events
to the driver, Prometheus. Bare: the same encoder and head, batches decoded and prepared beforehand in memory, torch's
AdamW, nothing else. Both have one torch thread, train the same number of samples a step, and take turns.

The start is measured in a session in which a run has ended before: from the call of `fit` to the end of the first step.
Prints Markdown tables; takes about three minutes on two quiet cores.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from labelmill.data.config import StreamConfig
from labelmill.data.labels import LabelSpec
from labelmill.data.manifest import FieldSpec, Manifest, load_manifest
from labelmill.data.source import LocalSource
from labelmill.data.spec import AnySpec
from labelmill.data.stream import Batch, RankStream
from labelmill.data.writer import ShardWriter
from labelmill.encoders.vision import SmallCnnConfig
from labelmill.heads.config import HeadConfig
from labelmill.job import ClusterConfig
from labelmill.training.config import TrainConfig
from labelmill.training.loop import PARTS
from workloads.discrimination.partial_fc import Classifier

SIDE, CLASSES, SAMPLES, SHARD = 32, 20_000, 12_800, 800
ENCODER = SmallCnnConfig(image_size=SIDE, channels=3, dim=128, width=16)
HEAD = HeadConfig(sample_rate=0.1)
KEPT = 40  # batches of the bare loop, in turn


def make_data(folder: Path) -> Manifest:
    """JPEG pictures of smooth noise with a label each."""
    rng = np.random.default_rng(0)
    fields = {"image": FieldSpec(kind="image", ext="jpg")}
    label = LabelSpec(form="single", num_classes=CLASSES)
    with ShardWriter(str(folder), "noise", fields, label, layout="packed", samples_per_shard=SHARD) as writer:
        for i in range(SAMPLES):
            small = Image.fromarray(rng.integers(0, 255, (4, 4, 3), dtype=np.uint8))
            buffer = io.BytesIO()
            small.resize((SIDE, SIDE), Image.Resampling.BILINEAR).save(buffer, "JPEG")
            writer.write(f"n{i:06d}", {"image": buffer.getvalue()}, {"label": int(rng.integers(CLASSES))})
        return writer.close()


def stream_of(data: Manifest, batch: int) -> AnySpec:
    return StreamConfig().stream(data, "image", batch, image_size=SIDE)


def objective_of() -> partial[Classifier]:
    return partial(Classifier, ENCODER, HEAD, CLASSES, 0)


# --- bare -----------------------------------------------------------------------------------------------------


def bare(folder: Path, batch: int, steps: int) -> list[float]:
    """Seconds of each step of a hand-written loop over batches in memory."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    objective = objective_of()()
    spec = stream_of(load_manifest(folder), batch)
    stream = iter(RankStream(spec, LocalSource(spec, 0, 1), 0, 1, objective.prepare))
    batches: list[Batch] = [next(stream) for _ in range(min(KEPT, spec.steps))]
    stream.close()
    optimizer = torch.optim.AdamW(objective.parameters(), lr=1e-3, betas=(0.9, 0.999), weight_decay=0.0)
    objective.train()
    seconds = []
    for step in range(steps):
        began = time.perf_counter()
        objective.head.begin_step(1e-3)
        losses = objective(batches[step % len(batches)])
        float(losses.total.detach())
        losses.total.backward()
        optimizer.step()
        objective.head.step(1e-3)
        optimizer.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - began)
    return seconds


def run_bare(folder: Path, batch: int, steps: int) -> list[float]:
    """`bare` in a process of its own."""
    command = [sys.executable, __file__, "--bare", str(folder), "--batch", str(batch), "--steps", str(steps)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


# --- platform -------------------------------------------------------------------------------------------------


def run_platform(data: Manifest, work: Path, batch: int, steps: int, every: int) -> dict[str, Any]:
    """A fit in the session that is open: history, seconds of each part of the whole, and when the events came."""
    from labelmill.training.fit import fit
    from labelmill.training.worker import FitTask

    config = TrainConfig(global_batch=batch, steps=steps, log_every=every, schedule="constant", warmup=0.0)
    task = FitTask(objective_of(), config, stream_of(data, batch), work=work, threads=1, run="overhead")
    cluster = ClusterConfig(workers=1, cpus_per_worker=1.0, read_cpus=0.25)
    events: list[tuple[str, float]] = []
    began = time.time()
    work.mkdir(parents=True)
    seconds = fit(task, cluster, "overhead", lambda event: events.append((event["kind"], event["time"] - began)))
    first = {kind: next(at for k, at in events if k == kind) for kind in ("start", "metrics")}
    return {"history": [json.loads(x) for x in (work / "history.jsonl").read_text().splitlines()],
            "seconds": seconds, "first": first}  # fmt: skip


def windows(found: dict[str, Any], batch: int) -> list[dict[str, float]]:
    """The windows of a fit after the first two, which warm up: seconds of a step, whole and by part."""
    return [
        {"step": batch / record["train/samples_per_second"], **{p: record[f"seconds/{p}"] for p in PARTS}}
        for record in found["history"][2:]
    ]


# --- tables ---------------------------------------------------------------------------------------------------


def table(columns: list[str], rows: list[list[str]]) -> None:
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    for row in rows:
        print("| " + " | ".join(row) + " |")
    print()


def show_steps(bares: list[list[float]], platforms: list[list[dict[str, float]]]) -> None:
    rows = []
    for number, (mine, its) in enumerate(zip(bares, platforms, strict=True), 1):
        plain, ours = statistics.fmean(mine[20:]), statistics.fmean(w["step"] for w in its)
        rows.append([str(number), f"{1e3 * plain:.2f}", f"{1e3 * ours:.2f}", f"{100 * (ours / plain - 1):+.1f}%"])
    plain = statistics.fmean(s for mine in bares for s in mine[20:])
    ours = statistics.fmean(w["step"] for its in platforms for w in its)
    rows.append(["all", f"{1e3 * plain:.2f}", f"{1e3 * ours:.2f}", f"{100 * (ours / plain - 1):+.1f}%"])
    table(["round", "bare, ms a step", "platform, ms a step", "overhead"], rows)
    every = [w for its in platforms for w in its]
    parts = {part: statistics.fmean(w[part] for w in every) for part in PARTS}
    rest = ours - sum(parts.values())
    table(["part of a platform step", "ms"], [[p, f"{1e3 * s:.2f}"] for p, s in parts.items()]
          + [["metrics, events, the loop itself", f"{1e3 * rest:.2f}"]])  # fmt: skip


def show_start(found: dict[str, Any]) -> None:
    seconds, first = found["seconds"], found["first"]
    rows = [[name, f"{seconds[name]:.2f}"] for name in ("start workers", "build model", "initialise head")]
    rows.append(["open the stream, first batch, first step", f"{first['metrics'] - first['start']:.2f}"])
    rows.append(["**call to the end of the first step**", f"**{first['metrics']:.2f}**"])
    rows.append(["after the last step: export, stop workers", f"{seconds['export'] + seconds['stop workers']:.2f}"])
    table(["start in a warm session", "s"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32, help="samples of a step; 32 take about 50 ms")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--bare", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.bare:
        print(json.dumps(bare(options.bare, options.batch, options.steps)))
        return
    from labelmill.cluster import start

    with tempfile.TemporaryDirectory(prefix="labelmill-overhead-") as text:
        folder = Path(text)
        data = make_data(folder / "data")
        start(ClusterConfig(object_store_mb=500))
        run_platform(data, folder / "warm", options.batch, 5, 5)  # the session is warm from here on
        starts = run_platform(data, folder / "start", options.batch, 1, 1)
        bares, platforms = [], []
        for number in range(options.rounds):
            bares.append(run_bare(folder / "data", options.batch, options.steps))
            found = run_platform(data, folder / f"fit-{number}", options.batch, options.steps, 10)
            platforms.append(windows(found, options.batch))
        show_steps(bares, platforms)
        show_start(starts)


if __name__ == "__main__":
    main()
