"""Step time and memory of the sharded head beside two peers, on gloo ranks of one thread each.

Peers, written here from their public descriptions:
  * `PartialFC_V2-style`: An et al., CVPR 2022, as InsightFace's public class does a step. Gather embeddings and labels;
    keep positives and fill up with random classes (rand, top-k, sort over the shard); index the weight; normalise both
    sides; margin; softmax with three all-reduces; autograd, whose gradient of the shard is dense; torch SGD over the
    whole shard. `as shipped` is that; `tuned` uses torch's fused SGD and an allocator that keeps freed pages (glibc
    without mmap), the nearest a CPU comes to a caching allocator.
  * `loss_parallel`: torch DTensor, weight sharded by class, linear logits, full cross-entropy, torch SGD.

All methods of a run are alternated in one process group, so that whatever else the machine does hits them alike.

    python ci/bench/head.py speed --classes 1000000 --rate 0.1 --batch 64
    python ci/bench/head.py speed --classes 1000000 --rate 0.1 --batch 64 --tuned
    python ci/bench/head.py parallel --classes 100000 --batch 64
    python ci/bench/head.py memory --classes 1000000 --rate 0.1 --batch 64
    python ci/bench/head.py check

Prints a Markdown row a method and writes JSON with --json. Needs `platform` on PYTHONPATH or labelmill installed.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from labelmill.heads.config import HeadConfig
from labelmill.heads.optim import SGD
from labelmill.heads.plan import BlockSampling, HardSampling, UniformSampling
from labelmill.heads.sharded import ShardedHead
from labelmill.losses.margins import CosFace
from labelmill.training.local import spawn

SCALE, MARGIN, LR, MOMENTUM, DECAY = 64.0, 0.4, 0.1, 0.9, 5e-4
SAMPLING = {"uniform": UniformSampling(), "blocks": BlockSampling(), "hard": HardSampling(share=1.0)}


# --- peers ----------------------------------------------------------------------------------------------


class _Gather(torch.autograd.Function):
    """All ranks' embeddings; the gradient is reduced to the owner and multiplied by the number of ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        out = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(out, x.contiguous())
        return torch.cat(out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        parts = list(grad.contiguous().chunk(dist.get_world_size()))
        mine = parts[dist.get_rank()]
        for rank, part in enumerate(parts):
            dist.reduce(part, rank)
        return mine * dist.get_world_size()


class _ShardedSoftmax(torch.autograd.Function):
    """Cross-entropy over logits split by class: all-reduces for the maximum, the sum and the target's probability."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        top = logits.max(dim=1, keepdim=True).values
        dist.all_reduce(top, dist.ReduceOp.MAX)
        logits.sub_(top)
        logits.exp_()
        total = logits.sum(dim=1, keepdim=True)
        dist.all_reduce(total)
        logits.div_(total)
        rows = torch.where(labels >= 0)[0]
        target = torch.zeros(len(logits), 1)
        target[rows] = logits[rows].gather(1, labels[rows, None])
        dist.all_reduce(target)
        ctx.save_for_backward(rows, logits, labels)
        return target.clamp_min_(1e-30).log_().mean() * -1

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        rows, probability, labels = ctx.saved_tensors
        onehot = torch.zeros(len(rows), probability.shape[1])
        onehot.scatter_(1, labels[rows, None], 1)
        probability[rows] -= onehot
        probability.div_(len(probability))
        return probability * grad.item(), None


class PartialFCV2Style:
    """A step of the public reference scheme; see the top of this file."""

    def __init__(self, num_classes: int, dim: int, rate: float, fused: bool) -> None:
        rank, world = dist.get_rank(), dist.get_world_size()
        self.own = num_classes // world + int(rank < num_classes % world)
        self.start = num_classes // world * rank + min(rank, num_classes % world)
        self.count, self.rate = int(rate * self.own), rate
        self.weight = torch.nn.Parameter(torch.empty(self.own, dim).normal_(0, 0.01))
        self.optimizer = torch.optim.SGD([self.weight], LR, momentum=MOMENTUM, weight_decay=DECAY, fused=fused or None)

    def _sample(self, labels: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
        positives = torch.unique(labels[positive], sorted=True)
        if self.count >= len(positives):
            order = torch.rand(self.own)
            order[positives] = 2.0
            index = torch.topk(order, k=self.count).indices.sort().values
        else:
            index = positives
        labels[positive] = torch.searchsorted(index, labels[positive])
        return index, labels

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        everyone = [torch.empty_like(y) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, y)
        labels = torch.cat(everyone)
        embeddings = _Gather.apply(x)
        positive = (labels >= self.start) & (labels < self.start + self.own)
        labels = torch.where(positive, labels - self.start, -1)
        weight: Tensor = self.weight
        if self.rate < 1:
            index, labels = self._sample(labels, positive)
            weight = weight[index]
        logits = F.linear(F.normalize(embeddings), F.normalize(weight)).clamp(-1, 1)
        rows = torch.where(labels >= 0)[0]
        moved = logits[rows, labels[rows]] - MARGIN
        logits = logits.index_put((rows, labels[rows]), moved) * SCALE
        loss = _ShardedSoftmax.apply(logits, labels)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


class LossParallel:
    """Full cross-entropy through DTensor."""

    def __init__(self, num_classes: int, dim: int) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import Shard, distribute_tensor

        self.mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        torch.manual_seed(0)
        whole = torch.empty(num_classes, dim).normal_(0, 0.01)
        self.weight = torch.nn.Parameter(distribute_tensor(whole, self.mesh, [Shard(0)]))
        self.optimizer = torch.optim.SGD([self.weight], LR, momentum=MOMENTUM, weight_decay=DECAY)

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        from torch.distributed.tensor import DTensor, Replicate, Shard
        from torch.distributed.tensor.parallel import loss_parallel

        everyone = [torch.empty_like(y) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, y)
        labels = DTensor.from_local(torch.cat(everyone), self.mesh, [Replicate()])
        embeddings = DTensor.from_local(x, self.mesh, [Shard(0)]).redistribute(placements=[Replicate()])
        with loss_parallel():
            loss = F.cross_entropy(F.linear(embeddings, self.weight), labels)
            loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


class Ours:
    """The product's head, rows moved in the backward pass."""

    def __init__(self, num_classes: int, dim: int, rate: float, sampling: str, memory_mb: float, **more: Any) -> None:
        config = HeadConfig(
            scale=SCALE,
            margin=CosFace(m=MARGIN),
            sample_rate=rate,
            sampling=SAMPLING[sampling],
            optimizer=SGD(momentum=MOMENTUM, weight_decay=DECAY),
            memory_mb=memory_mb,
            **more,
        )
        self.head = ShardedHead(num_classes, dim, config)

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        self.head.begin_step(LR)
        loss = self.head.loss(x, y)
        loss.backward()
        self.head.step(LR)
        return loss.detach()


# --- measuring ------------------------------------------------------------------------------------------


def keep_pages() -> None:
    """glibc: no mmap for large blocks, never give memory back."""
    libc = ctypes.CDLL(None)
    libc.mallopt(-4, 0)  # M_MMAP_MAX
    libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
    libc.mallopt(-2, 64 * 2**20)  # M_TOP_PAD


def gemm_rate(batch: int, dim: int, rows: int = 512) -> float:
    """GFLOP/s of a rank while all ranks multiply matrices of the head's shapes: logits, pull, gradient of rows."""
    w, x, z = torch.randn(rows, dim), torch.randn(batch, dim), torch.randn(rows, batch)
    x_t, out, grad, pull = x.t().contiguous(), torch.empty(rows, batch), torch.empty(rows, dim), torch.zeros(batch, dim)
    best = 0.0
    for _ in range(5):
        dist.barrier()
        start, count = time.perf_counter(), 40
        for _ in range(count):
            torch.mm(w, x_t, out=out)
            pull.addmm_(z.t(), w)
            torch.mm(z, x, out=grad)
        best = max(best, count * 6.0 * rows * batch * dim / (time.perf_counter() - start) / 1e9)
    return best


def batches(num_classes: int, dim: int, batch: int, steps: int) -> list[tuple[Tensor, Tensor]]:
    """Every rank's own random embeddings and labels."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    return [
        (torch.randn(batch, dim, generator=generator), torch.randint(num_classes, (batch,), generator=generator))
        for _ in range(steps)
    ]


def alternate(methods: dict[str, Any], data: list[tuple[Tensor, Tensor]], warm: int) -> dict[str, list[float]]:
    """Milliseconds of each step of each method, in turn; a step lasts until the slowest rank is done."""
    times: dict[str, list[float]] = {name: [] for name in methods}
    for number, (x, y) in enumerate(data):
        for name, method in methods.items():
            x_leaf = x.clone().requires_grad_()
            dist.barrier()
            start = time.perf_counter()
            method.step(x_leaf, y)
            dist.barrier()
            if number >= warm:
                times[name].append(1e3 * (time.perf_counter() - start))
    return times


def speed(rank: int, world: int, options: dict[str, Any]) -> dict[str, Any]:
    """Step times of the peer and of ours."""
    if options["tuned"]:
        keep_pages()
    if options["medium"]:
        torch.set_float32_matmul_precision("medium")
    classes, dim, rate = options["classes"], options["dim"], options["rate"]
    methods: dict[str, Any] = {}
    if not options["alone"]:
        name = "PartialFC_V2-style, tuned" if options["tuned"] else "PartialFC_V2-style, as shipped"
        methods[name] = PartialFCV2Style(classes, dim, rate, fused=options["tuned"])
    for sampling in options["sampling"] if rate < 1 else ["uniform"]:
        label = f"labelmill, {sampling}" if rate < 1 else "labelmill, all classes"
        methods[label] = Ours(classes, dim, rate, sampling, options["memory_mb"])
        if options["bf16"]:
            more = Ours(classes, dim, rate, sampling, options["memory_mb"], matmul="bf16")
            methods[f"{label}, bf16 products"] = more
    if options["screened"]:
        methods[f"labelmill, screened {options['screened']:g}"] = Ours(
            classes, dim, options["screened"], "hard", options["memory_mb"]
        )
    gc.collect()
    data = batches(classes, dim, options["batch"], options["steps"] + options["warm"])
    before = gemm_rate(options["batch"] * world, dim)
    times = alternate(methods, data, options["warm"])
    peak = max(before, gemm_rate(options["batch"] * world, dim))
    return {"times": times, "gemm": peak}


def parallel(rank: int, world: int, options: dict[str, Any]) -> dict[str, Any]:
    """Full softmax against DTensor."""
    classes, dim = options["classes"], options["dim"]
    methods: dict[str, Any] = {
        "torch loss_parallel": LossParallel(classes, dim),
        "labelmill, all classes": Ours(classes, dim, 1.0, "uniform", options["memory_mb"]),
    }
    if options["bf16"]:
        methods["labelmill, all classes, bf16 products"] = Ours(
            classes, dim, 1.0, "uniform", options["memory_mb"], matmul="bf16"
        )
    data = batches(classes, dim, options["batch"], options["steps"] + options["warm"])
    times = alternate(methods, data, options["warm"])
    return {"times": times, "gemm": gemm_rate(options["batch"] * world, dim)}


def memory(rank: int, world: int, options: dict[str, Any]) -> dict[str, Any]:
    """Peak resident memory of a rank above what torch and gloo need before there is a head."""
    classes, dim = options["classes"], options["dim"]
    data = batches(classes, dim, options["batch"], options["steps"])
    warm = torch.randn(64, 64) @ torch.randn(64, 64)
    dist.all_reduce(warm)
    base = resident()
    method: Any = (
        PartialFCV2Style(classes, dim, options["rate"], fused=False)
        if options["peer"]
        else Ours(classes, dim, options["rate"], options["sampling"][0], options["memory_mb"])
    )
    times = alternate({"step": method}, data, 1)
    own = method.own if options["peer"] else method.head.stop - method.head.start
    return {"peak": peak_resident() - base, "needed": 2 * 4 * own * dim, "block": 4 * 1024 * dim, "times": times}


def resident() -> int:
    """Bytes of this process in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak_resident() -> int:
    """The most that `resident` has been."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("this system does not report VmHWM")


def check(rank: int, world: int, options: dict[str, Any]) -> dict[str, Any]:
    """Peer and ours from equal rows, all classes: do they do the same mathematics?"""
    classes, dim = 5000, 64
    peer, ours = PartialFCV2Style(classes, dim, 1.0, False), Ours(classes, dim, 1.0, "uniform", 512.0)
    counts = [n for (n,) in ours.head.ranks.gather_numbers([ours.head.stop - ours.head.start], ours.head.device)]
    mine = ours.head.ranks.gather_rows(ours.head.w_CD, counts)
    peer.weight.data.copy_(mine[peer.start : peer.start + peer.own])
    for x, y in batches(classes, dim, 64, 5):
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        loss_a, loss_b = peer.step(a, y), ours.step(b, y)
    assert a.grad is not None
    assert b.grad is not None
    rows = ours.head.ranks.gather_rows(ours.head.w_CD, counts)[peer.start : peer.start + peer.own]
    return {
        "loss": [float(loss_a), float(loss_b)],
        "gradient": float((a.grad - b.grad).norm() / a.grad.norm()),
        "rows": float((peer.weight.detach() - rows).norm() / rows.norm()),
    }


# --- reporting ------------------------------------------------------------------------------------------


def report(options: dict[str, Any], results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A record a method: the median over steps, and how far above the multiplication limit it is."""
    gemm = min(result["gemm"] for result in results)
    per_rank = options["classes"] / options["ranks"]
    records = []
    for name, values in results[0]["times"].items():
        rate = options["rate"] if "screened" not in name else options["screened"]
        batch = options["batch"] * options["ranks"]
        limit = 6.0 * batch * per_rank * rate * options["dim"] / gemm / 1e6
        median = statistics.median(values)
        records.append({"method": name, "ms": median, "low": min(values), "high": max(values), "limit_ms": limit})
        records[-1] |= {"classes": options["classes"], "rate": rate, "batch": batch, "gemm_gflops": gemm}
    slowest = records[0]["ms"]
    print(f"| C {options['classes']:,}, N {options['batch'] * options['ranks']}, d {options['dim']}, rate {options['rate']:g} "
          f"| ms a step (range) | speed-up | share of multiplication limit ({gemm:.0f} GFLOP/s a rank) |")  # fmt: skip
    print("|---|---|---|---|")
    for record in records:
        share = f"{100 * record['limit_ms'] / record['ms']:.0f} %" if "screened" not in record["method"] else "-"
        spread = f"{record['low']:.1f}-{record['high']:.1f}"
        print(f"| {record['method']} | {record['ms']:.1f} ({spread}) | {slowest / record['ms']:.1f} | {share} |")
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["speed", "parallel", "memory", "check"])
    parser.add_argument("--classes", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--rate", type=float, default=0.1, help="share of the classes drawn in a step")
    parser.add_argument("--batch", type=int, default=64, help="samples a rank")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--warm", type=int, default=2)
    parser.add_argument("--sampling", nargs="*", default=["uniform", "blocks"], choices=list(SAMPLING))
    parser.add_argument("--screened", type=float, default=0.0, help="also a hard sample of this share")
    parser.add_argument("--memory-mb", type=float, default=512.0)
    parser.add_argument(
        "--tuned", action="store_true", help="the peer with fused SGD, and an allocator that keeps pages"
    )
    parser.add_argument("--bf16", action="store_true", help="also ours with products of bfloat16, summed in float32")
    parser.add_argument("--medium", action="store_true", help="the same precision for everything, the peer too")
    parser.add_argument("--alone", action="store_true", help="no peer")
    parser.add_argument("--peer", action="store_true", help="memory of the peer")
    parser.add_argument("--json", type=Path)
    options = vars(parser.parse_args())
    path = options.pop("json")
    run: Callable[..., Any] = {"speed": speed, "parallel": parallel, "memory": memory, "check": check}[options["what"]]
    results = spawn(run, options["ranks"], options, timeout_s=1200.0)
    records: Any
    if options["what"] in ("speed", "parallel"):
        if options["what"] == "parallel":
            options["rate"] = 1.0
        records = report(options, results)
    elif options["what"] == "memory":
        records = []
        for result in results:
            ratio = result["peak"] / (result["needed"] + result["block"])
            step = statistics.median(result["times"]["step"])
            print(f"peak {result['peak'] / 2**30:.2f} GiB, weights + momentum {result['needed'] / 2**30:.2f} GiB, "
                  f"ratio with one block {ratio:.3f}, step {step:.0f} ms")  # fmt: skip
            records.append({"peak": result["peak"], "needed": result["needed"], "ratio": ratio, "ms": step} | options)
    else:
        records = results
        print(json.dumps(results[0]))
    if path:
        path.write_text(json.dumps({"options": options, "records": records}, indent=1) + "\n", encoding="utf-8")
    if not math.isfinite(sum(r.get("ms", 0.0) for r in records)):
        sys.exit("a time is not finite")


if __name__ == "__main__":
    main()
