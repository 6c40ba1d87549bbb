#!/usr/bin/env python
"""What distillation costs: the teacher's pass beside its bare forward, a step with kept outputs beside a plain step, and the
memory of a loss against a teacher on a large class axis beside that of the head's own loss. Prints Markdown; one thread. The
pass is timed by the clock, as it decodes in a second thread; steps by their CPU time, which other work on the machine changes
less.

    python ci/bench/distillation.py [--classes 1000000] [--dim 128] [--images 2048]
"""

from __future__ import annotations

import argparse
import io
import multiprocessing
import resource
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from labelmill.data.config import StreamConfig
from labelmill.data.labels import LabelSpec
from labelmill.data.manifest import FieldSpec, Manifest
from labelmill.data.outputs import OutputsInfo, finish_outputs, outputs_file
from labelmill.data.source import LocalSource
from labelmill.data.stream import RankStream
from labelmill.data.writer import ShardWriter
from labelmill.encoders import MlpConfig, SmallCnnConfig, build_encoder
from labelmill.heads.config import HeadConfig
from labelmill.heads.distilled import distillation_loss
from labelmill.heads.sharded import ShardedHead
from labelmill.heads.teaching import RowTeacher
from labelmill.losses.distillation import DIST, DKD, KD, BinaryKLNorm, CrossEntropy, StandardizedKD
from labelmill.teachers import TeacherModel, teach_shard
from workloads.distillation.arms import Arm, LogitTerm
from workloads.distillation.student import Student, TeacherPlace

ROUNDS = 5


def pictures(folder: Path, count: int) -> Manifest:
    from PIL import Image

    rng = np.random.default_rng(0)
    fields = {"image": FieldSpec(kind="image", ext="png")}
    label = LabelSpec(form="single", num_classes=10)
    with ShardWriter(folder, "pictures", fields, label, layout="packed", samples_per_shard=1024) as writer:
        for i in range(count):
            file = io.BytesIO()
            Image.fromarray(rng.integers(0, 255, (28, 28)).astype(np.uint8)).save(file, "png")
            writer.write(f"p{i:06d}", {"image": file.getvalue()}, {"label": i % 10})
        return writer.close(classes=pa.table({"name": [str(i) for i in range(10)]}))


def teacher_pass(folder: Path, data: Manifest, width: int) -> tuple[float, float]:
    """Samples a second: the pass (reading, decoding, preparing, forward, writing) and the bare forward, alternated."""
    torch.manual_seed(0)
    encoder = build_encoder(SmallCnnConfig(image_size=28, channels=1, dim=64, width=width))
    model = TeacherModel(encoder, torch.randn(10, 64))
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (512, 28, 28, 1)).astype(np.uint8)
    prepared = encoder.prepare(images)
    passes, bare = [], []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        for i in range(len(data.shards)):
            teach_shard(data, i, model, outputs_file(folder, i), ("logits",), 1, (), "float16", 0)
        passes.append(data.num_samples / (time.perf_counter() - began))
        began = time.perf_counter()
        for _ in range(data.num_samples // 512):
            model(prepared)
        bare.append(data.num_samples // 512 * 512 / (time.perf_counter() - began))
    info = OutputsInfo(manifest=data.digest, num_classes=10, model="bench", columns=("logits",))
    finish_outputs(folder, info)
    return statistics.median(passes), statistics.median(bare)


def steps(data: Manifest, outputs: Path, encoder: Any) -> tuple[float, float]:
    """Milliseconds of a step of 128 (forward, backward, AdamW) of a student on labels, and with a teacher's kept outputs."""
    place = TeacherPlace(outputs=str(outputs))
    arms = {"plain": Arm(), "taught": Arm(ce=0.1, losses=(LogitTerm(weight=0.9, loss=KD()),))}
    ready = {}
    for name, arm in arms.items():
        torch.manual_seed(0)
        model = Student(encoder, None, 10, arm, 0, place, 10, 128)
        options = {"image_size": 28, "channels": 1}
        spec = StreamConfig().stream(data, "image", 128, **options)
        batches = list(RankStream(spec, LocalSource(spec, 0, 1), 0, 1, model.prepare, join=model.join))[:8]
        ready[name] = (model, torch.optim.AdamW(model.parameters()), batches)
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(4 * ROUNDS):
        for name, (model, optimizer, batches) in ready.items():
            began = time.process_time()
            for batch in batches:
                optimizer.zero_grad()
                model(batch).total.backward()
                optimizer.step()
            seconds[name].append((time.process_time() - began) / len(batches))
    return 1000 * statistics.median(seconds["plain"]), 1000 * statistics.median(seconds["taught"])


def one_loss(pipe: Any, name: str, classes: int, dim: int, batch: int) -> None:
    """Three steps of a head under one loss; sends peak memory (MiB) and milliseconds of the fastest step."""
    torch.set_num_threads(1)
    head = ShardedHead(classes, dim, HeadConfig(memory_mb=16.0, scale=16.0), seed=0)
    teacher_rows = torch.randn(classes, 16)
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    losses: dict[str, list[Any]] = {
        "KD + cross-entropy": [(0.1, CrossEntropy()), (0.9, KD())],
        "standardized": [(1.0, StandardizedKD())],
        "BinaryKL-Norm": [(1.0, BinaryKLNorm(reduction="mean"))],
        "DKD": [(1.0, DKD())],
        "DIST": [(1.0, DIST())],
    }
    fastest = float("inf")
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(batch, dim, generator=generator, requires_grad=True)
        h, y = torch.randn(batch, 16, generator=generator), torch.randint(0, classes, (batch,), generator=generator)
        began = time.process_time()
        head.begin_step(0.1)
        if name == "head's own softmax":
            loss = head.loss(x, y)
        else:
            loss = distillation_loss(head, x, losses[name], RowTeacher(h, teacher_rows), y)
        loss.backward()
        head.step(0.1)
        fastest = min(fastest, time.process_time() - began)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    pipe.send((base, peak, 1000 * fastest))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--images", type=int, default=2048)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        data = pictures(Path(folder) / "data", args.images)
        print("| teacher | pass, samples/s | bare forward, samples/s | share |\n|---|---|---|---|")
        for width in (8, 16):
            out = Path(folder) / f"outputs-{width}"
            out.mkdir()
            ours, bare = teacher_pass(out, data, width)
            print(f"| small_cnn width {width} | {ours:,.0f} | {bare:,.0f} | {ours / bare:.2f} |", flush=True)
        print("\n| student | plain step, ms | with kept outputs, ms | ratio |\n|---|---|---|---|")
        students = {
            "mlp 784-64-64": MlpConfig(image_size=28, channels=1, hidden=(64,), dim=64, batch_norm=True),
            "small_cnn width 8": SmallCnnConfig(image_size=28, channels=1, dim=32, width=8),
        }
        for name, encoder in students.items():
            plain, taught = steps(data, out, encoder)
            print(f"| {name} | {plain:.2f} | {taught:.2f} | {taught / plain:.2f} |", flush=True)
    print(f"\n{args.classes:,} classes, D {args.dim}, batch {args.batch}, one rank\n")
    print("| loss | before the first step, MiB | peak, MiB | times the head | step, ms | times the head |")
    print("|---|---|---|---|---|---|")
    own: tuple[float, float] | None = None
    context = multiprocessing.get_context("spawn")
    for name in ("head's own softmax", "KD + cross-entropy", "standardized", "BinaryKL-Norm", "DKD", "DIST"):
        ours, theirs = context.Pipe(duplex=False)
        worker = context.Process(target=one_loss, args=(theirs, name, args.classes, args.dim, args.batch))
        worker.start()
        before, peak, ms = ours.recv()
        worker.join()
        own = own or (peak, ms)
        times = f"{peak / own[0]:.2f} | {ms:,.0f} | {ms / own[1]:.1f}"
        print(f"| {name} | {before:,.0f} | {peak:,.0f} | {times} |", flush=True)


if __name__ == "__main__":
    main()
