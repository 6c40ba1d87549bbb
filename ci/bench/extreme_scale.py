"""A million labels on two CPU workers: seconds and peak memory of a step, beside what the formulas say.

    python ci/bench/extreme_scale.py                     dual encoder and partial FC, 1,000,000 labels, 2 ranks
    python ci/bench/extreme_scale.py --labels 200000 --ranks 1 --dims 64 128 --only dual_encoder
    python ci/bench/extreme_scale.py --data data/wordnet-lemmas/train --ranks 1 --chunks 4096 16384 147306 --only dual_encoder
    python ci/bench/extreme_scale.py --table             the formula at 1M, 10M and 100M labels on clusters of GPUs

A dual-encoder step: all labels are encoded by the gradient cache and are negatives of every query; encoder and AdamW move.
With a chunk as large as a rank's share of the labels this is plain autograd. A partial-FC step: rows with Adagrad, one tenth
of the classes drawn.

Peak memory is that of the fuller process above what it had after the same steps with 64 labels, which load all code. Ranks
keep freed memory, as workers do (`training.device`). The formula takes two numbers of the encoder: bytes of a prepared text,
and bytes of a text's forward and backward pass, which torch's own count of its allocations on one chunk gives. Prints
Markdown tables. Needs labelmill and workloads on PYTHONPATH.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch.profiler import ProfilerActivity, profile

from labelmill.data.manifest import load_manifest
from labelmill.encoders import CharNgramsConfig, build_encoder
from labelmill.heads.config import HeadConfig
from labelmill.heads.encoded import EncodedHead, encode_cached, encoded_head_config
from labelmill.heads.optim import Adagrad
from labelmill.heads.sharded import ShardedHead
from labelmill.losses.classification import Decoupled
from labelmill.losses.retrieval import DecoupledSection
from labelmill.planning.encoded import EncodedSetup, encoded_memory
from labelmill.training.adamw import AdamW
from labelmill.training.device import keep_freed_memory
from labelmill.training.local import spawn
from workloads.extreme.towers import LabelSide, label_texts

LENGTH, CACHE_MB, GIB = 24, 1024.0, 2**30


def config(dim: int) -> CharNgramsConfig:
    """A small encoder of short texts: one family of hashed 3-grams."""
    return CharNgramsConfig(
        dim=dim, buckets=1 << 15, orders=(3,), placed=(), gaps=(), deletions=False, hidden=dim, max_length=LENGTH
    )


def texts_of(labels: int, data: str) -> pa.ChunkedArray:
    """The first labels' texts of a data set, or numbered ones."""
    if data:
        return label_texts(load_manifest(data)).slice(0, labels)
    numbers = pa.array(np.arange(labels)).cast(pa.string())
    return pa.chunked_array([pc.binary_join_element_wise("label number", numbers, " ")])


def measured(rank: int, world: int, name: str, options: dict[str, Any]) -> dict[str, float]:
    """Steps of one rank after the same ones with few labels; `peak` is what the process took above those, bytes."""
    keep_freed_memory()
    steps: Callable[..., dict[str, float]] = {"dual_encoder": dual_encoder, "rows": rows}[name]
    steps(rank, world, **options | {"labels": 64, "chunk": 16, "dim": 16, "batch": 16})
    gc.collect()
    base = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    found = steps(rank, world, **options)
    return found | {"peak": float(resident("VmHWM") - base)}


def resident(what: str) -> int:
    """Resident memory of this process, now (`VmRSS`) or at its peak (`VmHWM`), bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(what):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"this system does not report {what}")


def dual_encoder(
    rank: int, world: int, labels: int, dim: int, batch: int, chunk: int, memory_mb: float, steps: int, data: str
) -> dict[str, float]:
    """Steps of one rank."""
    torch.manual_seed(0)
    encoder, loss = build_encoder(config(dim)), DecoupledSection()
    texts = texts_of(labels, data)
    head = EncodedHead(labels, dim, loss, encoded_head_config(loss, memory_mb=memory_mb))
    side = LabelSide(texts, head.start, head.stop, chunk, CACHE_MB)
    optimizer = AdamW(encoder.parameters(), lr=1e-3)
    size, seconds = batch // world, []
    for step in range(steps):
        began = time.perf_counter()
        noise = torch.Generator().manual_seed(1000 * step + rank)
        ids = torch.randint(labels, (size, 2), generator=noise)
        ids[ids[:, 0] == ids[:, 1], 1] = -1
        emb = encoder(encoder.prepare([f"{texts[i]} query" for i in ids[:, 0].tolist()]))
        rows = encode_cached(encoder, lambda i: side.own(encoder, i), side.sizes, head.room_for_rows())
        value = head.encoded_loss(emb, rows, ids, None, torch.ones(size))
        value.backward()
        del rows, emb
        for parameter in encoder.parameters():
            torch.distributed.all_reduce(parameter.grad)
            parameter.grad /= world
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - began)
    return {"seconds": min(seconds), "loss": float(value.detach())}


def rows(
    rank: int, world: int, labels: int, dim: int, batch: int, chunk: int, memory_mb: float, steps: int, data: str
) -> dict[str, float]:
    """Partial-FC steps of one rank; `chunk` and `data` are of the other kind of step."""
    torch.manual_seed(0)
    section = HeadConfig(loss=Decoupled(), scale=20.0, sample_rate=0.1, optimizer=Adagrad(), memory_mb=memory_mb)
    head = ShardedHead(labels, dim, section)
    size, seconds = batch // world, []
    for step in range(steps):
        began = time.perf_counter()
        noise = torch.Generator().manual_seed(1000 * step + rank)
        emb = torch.randn(size, dim, generator=noise, requires_grad=True)
        ids = torch.randint(labels, (size,), generator=noise)
        head.begin_step(0.01)
        value = head.loss(emb, ids)
        value.backward()
        head.step(0.01)
        seconds.append(time.perf_counter() - began)
    return {"seconds": min(seconds), "loss": float(value.detach())}


def dual_encoder_formula(
    ranks: int, labels: int, dim: int, batch: int, chunk: int, memory_mb: float, steps: int, data: str
) -> float:
    """Bytes of a rank by `labelmill.planning.encoded`."""
    encoder, texts = build_encoder(config(dim)), texts_of(labels, data)
    numbers = sum(p.numel() for p in encoder.parameters())
    chunk = min(chunk, -(-labels // ranks))
    inputs = encoder.prepare(texts.slice(0, min(chunk, 8192)).to_pylist())
    assert isinstance(inputs, torch.Tensor)
    half = len(inputs) // 2
    activation = (allocated(encoder, inputs) - allocated(encoder, inputs[:half])) / (len(inputs) - half)
    setup = EncodedSetup(
        labels, ranks, dim, batch, numbers, inputs.nbytes / len(inputs), activation, chunk, memory_mb, CACHE_MB,
        texts.nbytes / len(texts),
    )  # fmt: skip
    return sum(encoded_memory(setup).values())


def allocated(encoder: torch.nn.Module, inputs: torch.Tensor) -> int:
    """Most bytes of tensors at a time in a forward and backward pass, without weights and inputs."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        emb = encoder(inputs)
        torch.autograd.grad(emb, list(encoder.parameters()), torch.ones_like(emb))
    now = top = 0
    for event in seen.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            now += event.nbytes()
            top = max(top, now)
    return top


def rows_formula(
    ranks: int, labels: int, dim: int, batch: int, chunk: int, memory_mb: float, steps: int, data: str
) -> float:
    """Bytes of a rank: rows, Adagrad's number a row, 1 / length; kept scores; ids of the drawn classes, sorted, and places."""
    own = -(-labels // ranks)
    return 4.0 * own * (dim + 2) + min(memory_mb * 2**20, 0.4 * batch * own) + 8 * 3 * 0.1 * own * ranks


def table() -> None:
    """What the formula says for a text transformer of 66 million parameters, width 768, on clusters of GPUs."""
    print(
        "| labels | GPUs | rows + gradient GiB | kept scores | prepared texts | chunk | encoder, AdamW | all, GiB a GPU |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for labels, ranks in ((10**6, 8), (10**7, 16), (10**7, 64), (10**8, 64), (10**8, 256)):
        setup = EncodedSetup(labels, ranks, 768, 8192, 66_000_000, 32 * 4.0, 6 * 32 * 768 * 34.0, chunk=4096, memory_mb=8192.0,
                             cache_mb=4096.0)  # fmt: skip
        m = {name: value / 2**30 for name, value in encoded_memory(setup).items()}
        both = m["label rows"] + m["gradient of label rows"]
        cells = [
            both,
            m["kept scores"],
            m["prepared labels"],
            m["activations of a chunk"],
            m["encoder and its optimizer"],
        ]
        print(f"| {labels:,} | {ranks} | {' | '.join(f'{c:.1f}' for c in cells)} | {sum(m.values()):.1f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--labels", type=int, default=1_000_000)
    parser.add_argument("--data", default="", help="a data set whose labels' texts are taken instead of numbered ones")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2])
    parser.add_argument("--dims", type=int, nargs="+", default=[64])
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--chunks", type=int, nargs="+", default=[8192])
    parser.add_argument("--memory-mb", type=float, default=512.0)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--only", choices=["dual_encoder", "rows"])
    parser.add_argument("--table", action="store_true", help="the formula for larger clusters, nothing is run")
    options = parser.parse_args()
    if options.table:
        table()
        return
    labels = min(options.labels, len(texts_of(10**9, options.data))) if options.data else options.labels
    print("| step | labels | ranks | dim | chunk | s a step | peak GiB a rank | formula GiB | measured / formula |")
    print("|---|---|---|---|---|---|---|---|---|")
    cases = [
        (name, ranks, dim, chunk)
        for name in ("dual_encoder", "rows")
        if options.only in (None, name)
        for ranks in options.ranks
        for dim in options.dims
        for chunk in options.chunks
    ]
    for name, ranks, dim, chunk in cases:
        setup: dict[str, Any] = {"labels": labels, "dim": dim, "batch": options.batch, "chunk": chunk}
        setup |= {"memory_mb": options.memory_mb, "steps": options.steps, "data": options.data}
        formula = {"dual_encoder": dual_encoder_formula, "rows": rows_formula}[name](ranks, **setup)
        found = spawn(measured, ranks, name, setup, timeout_s=1500.0)
        peak = max(r["peak"] for r in found)
        print(
            f"| {name} | {labels:,} | {ranks} | {dim} | {chunk:,} | {max(r['seconds'] for r in found):.1f} | "
            f"{peak / GIB:.2f} | {formula / GIB:.2f} | {peak / formula:.2f} |", flush=True,
        )  # fmt: skip


if __name__ == "__main__":
    main()
