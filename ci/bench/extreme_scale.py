"""A million labels on two CPU workers: seconds and peak memory of a step, beside what the formulas say.

    python ci/bench/extreme_scale.py                     dual encoder and partial FC, 1,000,000 labels, 2 ranks
    python ci/bench/extreme_scale.py --labels 200000 --only rows
    python ci/bench/extreme_scale.py --table             the formula at 1M, 10M and 100M labels on clusters of GPUs

A dual-encoder step: all labels are encoded by the gradient cache and are negatives of every query; encoder and AdamW move.
A partial-FC step: rows with Adagrad, one tenth of the classes drawn. Peak memory is VmHWM of the fuller process above what
it had before, after one chunk of texts had gone through the encoder (libraries and their workspace), with the labels' texts
in it. Prints Markdown tables. Needs labelmill and workloads on PYTHONPATH.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from labelmill.encoders import CharNgramsConfig, build_encoder
from labelmill.heads.config import HeadConfig
from labelmill.heads.encoded import EncodedHead, encode_cached, encoded_head_config
from labelmill.heads.optim import Adagrad
from labelmill.heads.sharded import ShardedHead
from labelmill.losses.classification import Decoupled
from labelmill.losses.retrieval import DecoupledSection
from labelmill.planning.encoded import EncodedSetup, encoded_memory
from labelmill.training.local import spawn
from workloads.extreme.towers import LabelSide

LENGTH = 24


def config(dim: int) -> CharNgramsConfig:
    """A small encoder of short texts: one family of hashed 3-grams."""
    return CharNgramsConfig(
        dim=dim, buckets=1 << 15, orders=(3,), placed=(), gaps=(), deletions=False, hidden=dim, max_length=LENGTH
    )


def peak() -> int:
    """Largest resident memory of this process so far, bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return 1024 * int(line.split()[1])
    raise RuntimeError("this system does not report VmHWM")


def dual_encoder(rank: int, world: int, options: dict[str, Any]) -> dict[str, float]:
    """Steps of one rank."""
    torch.manual_seed(0)
    encoder, loss = build_encoder(config(options["dim"])), DecoupledSection()
    texts = pa.chunked_array([pa.array([f"label number {i}" for i in range(options["labels"])])])
    warm(encoder, options["chunk"])
    base = peak()
    head = EncodedHead(
        options["labels"], options["dim"], loss, encoded_head_config(loss, memory_mb=options["memory_mb"])
    )
    side = LabelSide(texts, head.start, head.stop, options["chunk"], 1024.0)
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=1e-3)
    batch, seconds, device = options["batch"] // world, [], torch.device("cpu")
    for step in range(options["steps"]):
        began = time.perf_counter()
        noise = torch.Generator().manual_seed(1000 * step + rank)
        ids = torch.randint(options["labels"], (batch, 2), generator=noise)
        ids[ids[:, 0] == ids[:, 1], 1] = -1
        emb = encoder(encoder.prepare([f"label number {i} query" for i in ids[:, 0].tolist()]))
        rows = encode_cached(encoder, lambda i: side.own(encoder, i), side.sizes, options["dim"], torch.float32, device)
        value = head.encoded_loss(emb, rows, ids, None, torch.ones(batch))
        value.backward()
        del rows, emb
        for parameter in encoder.parameters():
            torch.distributed.all_reduce(parameter.grad)
            parameter.grad /= world
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - began)
    size = encoder.prepare(texts.slice(0, 1).to_pylist())
    prepared = sum(t.numel() * t.element_size() for t in (side._kept or [size])) / max(
        1, side.sizes[0] * len(side._kept)
    )
    numbers = sum(p.numel() for p in encoder.parameters())
    return {
        "peak": float(peak() - base), "seconds": min(seconds), "parameters": float(numbers),
        "prepared": prepared, "loss": float(value.detach()), "bytes": float(texts.nbytes) / len(texts),
    }  # fmt: skip


def rows(rank: int, world: int, options: dict[str, Any]) -> dict[str, float]:
    """Partial-FC steps of one rank."""
    torch.manual_seed(0)
    encoder = build_encoder(config(options["dim"]))
    warm(encoder, 64)
    base = peak()
    section = HeadConfig(
        loss=Decoupled(), scale=20.0, sample_rate=0.1, optimizer=Adagrad(), memory_mb=options["memory_mb"]
    )
    head = ShardedHead(options["labels"], options["dim"], section)
    batch, seconds = options["batch"] // world, []
    for step in range(options["steps"]):
        began = time.perf_counter()
        noise = torch.Generator().manual_seed(1000 * step + rank)
        emb = torch.randn(batch, options["dim"], generator=noise, requires_grad=True)
        ids = torch.randint(options["labels"], (batch,), generator=noise)
        head.begin_step(0.01)
        value = head.loss(emb, ids)
        value.backward()
        head.step(0.01)
        seconds.append(time.perf_counter() - began)
    drawn = 0.1 * (head.stop - head.start)
    needed = 4.0 * (head.stop - head.start) * (options["dim"] + 2)  # rows, Adagrad's number a row, 1/length
    kept = min(options["memory_mb"] * 2**20, 4.0 * options["batch"] * drawn)
    # ids of the drawn classes over all ranks, sorted, and places: int64
    return {"peak": float(peak() - base), "seconds": min(seconds), "needed": needed + kept + 8 * 3 * drawn * world,
            "loss": float(value.detach())}  # fmt: skip


def warm(encoder: Any, texts: int) -> None:
    """What a first use loads, and the workspace of libraries and heap for so many texts."""
    inputs = encoder.prepare([f"label number {i}" for i in range(texts)])
    with torch.no_grad():
        encoder(inputs)
    encoder(inputs).sum().backward()
    encoder.zero_grad()
    value = torch.ones(4)
    torch.distributed.all_reduce(value)


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
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--chunk", type=int, default=8192)
    parser.add_argument("--memory-mb", type=float, default=512.0)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--only", choices=["dual_encoder", "rows"])
    parser.add_argument("--table", action="store_true", help="the formula for larger clusters, nothing is run")
    options = vars(parser.parse_args())
    if options.pop("table"):
        table()
        return
    only = options.pop("only")
    print(
        "| step | labels | ranks | s a step | peak GiB a rank | formula GiB | measured / formula |\n|---|---|---|---|---|---|---|"
    )
    for name, function in (("dual_encoder", dual_encoder), ("rows", rows)):
        if only in (None, name):
            found = spawn(function, options["ranks"], options, timeout_s=1500.0)
            measured = max(r["peak"] for r in found)
            if name == "rows":
                formula = max(r["needed"] for r in found)
            else:
                first = found[0]
                width = options["dim"]
                setup = EncodedSetup(
                    options["labels"], options["ranks"], width, options["batch"], int(first["parameters"]),
                    first["prepared"], 4.0 * (6 * width), options["chunk"], options["memory_mb"], 1024.0, 0.0,
                )  # fmt: skip
                formula = sum(encoded_memory(setup).values())
            gib = 2**30
            print(
                f"| {name} | {options['labels']:,} | {options['ranks']} | {max(r['seconds'] for r in found):.1f} | "
                f"{measured / gib:.2f} | {formula / gib:.2f} | {measured / formula:.2f} |", flush=True,
            )  # fmt: skip


if __name__ == "__main__":
    main()
