"""Time of an output layer's step as the number of classes grows: factored Z-loss, dense softmax, partial FC.

    python ci/bench/spherical.py
    python ci/bench/spherical.py --classes 10000 100000 1000000 --dim 64 --batch 64

One process, one thread, float32, the head alone: forward, gradient of the batch, update of the rows. CPU time, so that other
work on the machine counts little; minimum and median over steps. Dense is plain torch (linear, cross-entropy, SGD); `full` is
the sharded head over all classes; `sampled` the same with a tenth of them. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from labelmill.heads.config import HeadConfig
from labelmill.heads.factored import FactoredConfig, FactoredHead
from labelmill.heads.optim import SGD
from labelmill.heads.sharded import ShardedHead

Step = Callable[[torch.Tensor, torch.Tensor], None]


def sharded(head: ShardedHead) -> Step:
    """A step of a head of the platform."""

    def step(x: torch.Tensor, ids: torch.Tensor) -> None:
        head.begin_step(0.01)
        head.loss(x.requires_grad_(), ids).backward()
        head.step(0.01)

    return step


def dense(classes: int, dim: int) -> Step:
    """A step of a plain linear layer with softmax."""
    w = (torch.randn(classes, dim) * 0.01).requires_grad_()

    def step(x: torch.Tensor, ids: torch.Tensor) -> None:
        F.cross_entropy(x.requires_grad_() @ w.t(), ids).backward()
        with torch.no_grad():
            w.sub_(w.grad, alpha=0.01)
            w.grad = None

    return step


def steps_of(kind: str, classes: int, dim: int) -> Step:
    """A fresh layer."""
    if kind == "dense softmax":
        return dense(classes, dim)
    if kind == "factored Z":
        return sharded(FactoredHead(classes, dim, FactoredConfig(stabilise_every=10**6, recompute_every=10**6)))
    rate = 1.0 if kind == "full" else 0.1
    config = HeadConfig(normalize=False, scale=1.0, sample_rate=rate, optimizer=SGD(momentum=0.0))
    return sharded(ShardedHead(classes, dim, config))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, nargs="+", default=[10_000, 30_000, 100_000, 300_000, 1_000_000])
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    kinds = ["factored Z", "dense softmax", "full", "sampled"]
    print(f"| classes | {' | '.join(f'{kind}, ms' for kind in kinds)} | dense / factored |")
    print("|" + "---|" * (2 + len(kinds)), flush=True)
    for classes in options.classes:
        cells, lowest = [], {}
        for kind in kinds:
            step, spent = steps_of(kind, classes, options.dim), []
            count = options.steps if classes < 300_000 or kind == "factored Z" else max(3, options.steps // 4)
            for number in range(count + 2):
                x = torch.randn(options.batch, options.dim)
                ids = torch.randint(classes, (options.batch,))
                began = time.process_time()
                step(x, ids)
                if number >= 2:
                    spent.append(1000 * (time.process_time() - began))
            lowest[kind] = min(spent)
            cells.append(f"{min(spent):.2f} / {statistics.median(spent):.2f}")
            del step
        ratio = lowest["dense softmax"] / lowest["factored Z"]
        print(f"| {classes:,} | {' | '.join(cells)} | {ratio:.0f} |", flush=True)


if __name__ == "__main__":
    main()
