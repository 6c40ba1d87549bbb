"""What the platform costs a step, and how long it takes to start, against the same loop bare in one process.

    PYTHONPATH=platform:. .venv/bin/python ci/bench/overhead.py
    PYTHONPATH=platform:. .venv/bin/python ci/bench/overhead.py --rounds 1 --steps 100

Platform: one Ray Train worker, the stream through Ray Data from shards on disk, DeepSpeed, metrics every ten steps, events
to the driver, Prometheus. Bare: the same encoder and head, batches decoded and prepared beforehand in memory, torch's
AdamW, nothing else. Both have one torch thread, train the same number of samples a step, and take turns. `keeping` is the
bare loop with the one setting of the memory allocator that workers make for themselves (training/device.py).

The start is measured in a session in which a run has ended before: from the call of `fit` to the end of the first step.
Prints Markdown tables; takes about three minutes on two quiet cores.
"""

from __future__ import annotations

import argparse
import io
import itertools
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
from labelmill.training.device import keep_freed_memory
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


def bare(folder: Path, batch: int, steps: int, keeping: bool) -> list[dict[str, float]]:
    """Seconds of each step of a hand-written loop over batches in memory, whole and by part."""
    if keeping:
        keep_freed_memory()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    objective = objective_of()()
    spec = stream_of(load_manifest(folder), batch)
    stream = iter(RankStream(spec, LocalSource(spec, 0, 1), 0, 1, objective.prepare))
    batches: list[Batch] = [next(stream) for _ in range(min(KEPT, spec.steps))]
    stream.close()
    optimizer = torch.optim.AdamW(objective.parameters(), lr=1e-3, betas=(0.9, 0.999), weight_decay=0.0)
    objective.train()
    found = []
    for step in range(steps):
        times = [time.perf_counter()]
        objective.head.begin_step(1e-3)
        losses = objective(batches[step % len(batches)])
        float(losses.total.detach())
        times.append(time.perf_counter())
        losses.total.backward()
        times.append(time.perf_counter())
        optimizer.step()
        objective.head.step(1e-3)
        optimizer.zero_grad(set_to_none=True)
        times.append(time.perf_counter())
        seconds = [b - a for a, b in itertools.pairwise(times)]
        found.append({"step": times[-1] - times[0], **dict(zip(PARTS, [0.0, *seconds], strict=True))})
    return found


def run_bare(folder: Path, batch: int, steps: int, keeping: bool) -> list[dict[str, float]]:
    """`bare` in a process of its own, after the steps that warm up."""
    command = [sys.executable, __file__, "--bare", str(folder), "--batch", str(batch), "--steps", str(steps)]
    command += ["--keeping"] if keeping else []
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])[20:]


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


def show_steps(rounds: list[dict[str, list[dict[str, float]]]]) -> None:
    """Rounds hold the steps (or windows of ten) of each loop."""
    loops = list(rounds[0])
    means = [{loop: statistics.fmean(w["step"] for w in found[loop]) for loop in loops} for found in rounds]
    rows = [
        [str(number), *(f"{1e3 * mean[loop]:.2f}" for loop in loops),
         *(f"{100 * (mean['platform'] / mean[loop] - 1):+.1f}%" for loop in loops[:2])]
        for number, mean in enumerate(means, 1)
    ]  # fmt: skip
    table(["round", *(f"{loop}, ms a step" for loop in loops), *(f"over {loop}" for loop in loops[:2])], rows)
    rows = []
    for part in ("step", *PARTS):
        median = {loop: statistics.median(w[part] for found in rounds for w in found[loop]) for loop in loops}
        rows.append([part, *(f"{1e3 * median[loop]:.2f}" for loop in loops)])
    table(["median, ms", *loops], rows)


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
    parser.add_argument("--keeping", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.bare:
        print(json.dumps(bare(options.bare, options.batch, options.steps, options.keeping)))
        return
    from labelmill.cluster import start

    with tempfile.TemporaryDirectory(prefix="labelmill-overhead-") as text:
        folder = Path(text)
        data = make_data(folder / "data")
        start(ClusterConfig(object_store_mb=500))
        run_platform(data, folder / "warm", options.batch, 5, 5)  # the session is warm from here on
        starts = run_platform(data, folder / "start", options.batch, 1, 1)
        rounds = []
        for number in range(options.rounds):
            found = {
                name: run_bare(folder / "data", options.batch, options.steps, keeping)
                for name, keeping in (("bare", False), ("bare, keeping", True))
            }
            ours = run_platform(data, folder / f"fit-{number}", options.batch, options.steps, 10)
            rounds.append(found | {"platform": windows(ours, options.batch)})
        show_steps(rounds)
        show_start(starts)


if __name__ == "__main__":
    main()
