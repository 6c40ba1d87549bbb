"""A classification head without shards: each loss in plain autograd over all classes, in double precision, and its cases."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from labelmill.data.labels import Labels
from labelmill.heads.config import HeadConfig
from labelmill.heads.plan import BlockSampling, HardSampling
from labelmill.heads.sampling import block_size, sampled_blocks, sampled_classes
from labelmill.heads.sharded import ShardedHead
from labelmill.losses.classification import (
    ASL,
    BCE,
    GCE,
    LDR,
    MLC,
    MLCD,
    SCE,
    Decoupled,
    MultiSoftmax,
    SmoothedSoftmax,
    SoftTargets,
)
from labelmill.losses.margins import ArcFace, Combined, CosFace

DIM = 12
WORLDS = (1, 2, 3, 4)
SPLITS = {1: [11], 2: [7, 4], 3: [5, 0, 6], 4: [2, 4, 1, 4]}
"""Local batch sizes by world: uneven, and a rank without samples."""


# --- the dense reference --------------------------------------------------------------------------------


def reference_loss(
    w_CD: Tensor,
    x_ND: Tensor,
    ids: list[list[int]],
    weights: Tensor,
    config: HeadConfig,
    drawn: set[int],
    targets: list[Tensor] | None = None,
    drawn_weight: float = 1.0,
) -> Tensor:
    """Weighted mean loss, sample by sample, from the definitions."""
    positives = {c for n, row in enumerate(ids) if weights[n] > 0 for c in row}
    present = drawn | positives
    sim_NR = F.normalize(x_ND) @ F.normalize(w_CD).T if config.normalize else x_ND @ w_CD.T
    sim_NC = sim_NR.unflatten(1, (-1, config.sub_centres)).amax(dim=2)
    loss = config.loss
    total = torch.zeros((), dtype=torch.float64)
    for n, row in enumerate(ids):
        if weights[n] == 0:
            continue
        others = sorted(present - set(row))
        negative = config.scale * sim_NC[n, others]
        # a class drawn with probability q counts 1 / q times; one that the batch brings along is certain
        count = torch.tensor([1.0 if c in positives else drawn_weight for c in others], dtype=torch.float64)
        positive = config.scale * reference_margin(sim_NC[n, row], config.margin)
        target = targets[n] if targets else None
        total = total + weights[n] * REFERENCES[loss.kind](positive, negative, count, loss, target)
    return total / weights.sum()


def reference_margin(cos: Tensor, margin: Any) -> Tensor:
    if margin.kind == "cosface":
        return cos - margin.m
    if margin.kind == "none":
        return cos
    m1, m2, m3 = (1.0, margin.m, 0.0) if margin.kind == "arcface" else (margin.m1, margin.m2, margin.m3)
    moved = torch.cos(m1 * torch.acos(cos) + m2) - m3
    return cos + (moved - cos).detach() if margin.straight_through else moved


def cross_entropy(positive: Tensor, others: Tensor, count: Tensor) -> Tensor:
    return (
        torch.log(positive.exp() + (count * others.exp()).sum()) - positive
        if not len(others) or float(others.detach().abs().max()) < 300
        else (-torch.log_softmax(torch.cat([positive[None], others]), 0)[0])
    )


def mean_cross_entropy(p: Tensor, n: Tensor, c: Tensor, each_other: bool) -> Tensor:
    one = torch.ones(len(p) - 1, dtype=torch.float64)
    terms = []
    for i in range(len(p)):
        rest = torch.cat([p[:i], p[i + 1 :]])
        terms.append(cross_entropy(p[i], *((torch.cat([rest, n]), torch.cat([one, c])) if each_other else (n, c))))
    return torch.stack(terms).mean()


def smoothed(p: Tensor, n: Tensor, c: Tensor, loss: Any, target: Tensor | None) -> Tensor:
    lse = cross_entropy(p[0], n, c) + p[0]
    return lse - (1 - loss.smoothing) * p[0] - loss.smoothing * (p[0] + (c * n).sum()) / (1 + c.sum())


def soft(p: Tensor, n: Tensor, c: Tensor, loss: Any, target: Tensor | None) -> Tensor:
    q = torch.full_like(p, 1 / len(p)) if target is None else target
    q = q / q.sum() if loss.tail == "drop" else q
    lse = torch.log(p.exp().sum() + (c * n.exp()).sum())
    return (q * (lse - p)).sum() + (1 - q.sum()) * (lse - (c * n).sum() / c.sum())


def asymmetric(p: Tensor, n: Tensor, c: Tensor, loss: Any, target: Tensor | None) -> Tensor:
    right, wrong = torch.sigmoid(p), (torch.sigmoid(n) - loss.clip).clamp_min(0)
    positive = (1 - right) ** loss.gamma_pos * -torch.log(right)
    return positive.sum() + (c * wrong**loss.gamma_neg * -torch.log(1 - wrong)).sum()


REFERENCES: dict[str, Callable[..., Tensor]] = {
    "softmax": lambda p, n, c, loss, q: cross_entropy(p[0], n, c),
    "multi_softmax": lambda p, n, c, loss, q: mean_cross_entropy(p, n, c, True),
    "decoupled": lambda p, n, c, loss, q: mean_cross_entropy(p, n, c, False),
    "mlc": lambda p, n, c, loss, q: torch.log1p((c * n.exp()).sum() * (-p).exp().sum()),
    "mlcd": lambda p, n, c, loss, q: torch.log1p((-p).exp().sum()) + torch.log1p((c * n.exp()).sum()),
    "smoothed_softmax": smoothed,
    "soft_targets": soft,
    "bce": lambda p, n, c, loss, q: F.softplus(-p).sum() + (c * F.softplus(n)).sum(),
    "asl": asymmetric,
    "gce": lambda p, n, c, loss, q: (1 - (-loss.q * cross_entropy(p[0], n, c)).exp()) / loss.q,
    "sce": lambda p, n, c, loss, q: (
        loss.alpha * cross_entropy(p[0], n, c) - 4 * loss.beta * ((-cross_entropy(p[0], n, c)).exp() - 1)
    ),
    "ldr": lambda p, n, c, loss, q: (
        loss.lam * torch.log((1 + (c * ((n - p[0] + loss.gap) / loss.lam).exp()).sum()) / (1 + c.sum()))
    ),
}


# --- shared pieces of the checks ------------------------------------------------------------------------


class Data:
    """A global batch and this rank's part of it; the same on every rank."""

    def __init__(self, rank: int, world: int, num_classes: int, positives: int, seed: int = 0, top: int | None = None):
        generator = torch.Generator().manual_seed(seed)
        count = sum(SPLITS[world])
        self.x_ND = torch.randn(count, DIM, dtype=torch.float64, generator=generator)
        self.weights = torch.rand(count, dtype=torch.float64, generator=generator) + 0.5
        self.weights[3] = 0.0
        self.ids: list[list[int]] = []
        for n in range(count):
            many = 1 + n % positives
            self.ids.append(torch.randperm(top or num_classes, generator=generator)[:many].tolist())
        self.ids[2] = list(self.ids[1])  # two samples with the same classes
        self.ids_NP = torch.tensor([row + [-1] * (positives - len(row)) for row in self.ids])
        self.ids_NP[3] = -1  # a hole: no weight, no label
        self.ids[3] = []
        lo = sum(SPLITS[world][:rank])
        self.mine = slice(lo, lo + SPLITS[world][rank])
        self.targets: list[Tensor] | None = None

    def soften(self) -> None:
        """Gives the positives of every sample weights that add up to 0.8."""
        generator = torch.Generator().manual_seed(9)
        self.targets = []
        for row in self.ids:
            weight = torch.rand(len(row), dtype=torch.float64, generator=generator) + 0.1
            self.targets.append((0.8 * weight / weight.sum()).float().double())

    def call(self, head: ShardedHead, x_BD: Tensor) -> Tensor:
        ids: Any = self.ids_NP[self.mine]
        if self.targets is not None:
            width = ids.shape[1]
            padded = torch.zeros(len(self.ids), width)
            for n, target in enumerate(self.targets):
                padded[n, : len(target)] = target
            ids = Labels("soft", ids, weights_BP=padded[self.mine])
        return head.loss(x_BD, ids, self.weights[self.mine])


def whole(head: ShardedHead, tensor: Tensor) -> Tensor:
    """All ranks' rows of a tensor whose first axis is the class."""
    counts = [n for (n,) in head.ranks.gather_numbers([len(tensor)], head.device)]
    return head.ranks.gather_rows(tensor, counts)


def dense_pending(head: ShardedHead) -> Tensor:
    """The collected gradient of own rows, zero where nothing was touched."""
    ids, grad = head.pending_rows()
    dense = torch.zeros_like(head.w_CD)
    dense[ids - head.start * head.config.sub_centres] = grad
    return dense


def drawn_classes(head: ShardedHead) -> set[int]:
    config, rate = head.config, head.config.sample_rate
    if rate >= 1:
        return set(range(head.num_classes))
    if not isinstance(config.sampling, BlockSampling):
        return set(sampled_classes(head.num_classes, rate, head.seed, head.steps).tolist())
    size = block_size(head.num_classes, config.block_rows)
    stride = min(config.sampling.stride, size)
    blocks = -(-head.num_classes // size) * stride
    drawn = set()
    for block in sampled_blocks(blocks, rate, head.seed, head.steps).tolist():
        unit, phase = divmod(block, stride)
        drawn |= {c for c in range(unit * size + phase, (unit + 1) * size, stride) if c < head.num_classes}
    return drawn


def drawn_weight(head: ShardedHead) -> float:
    config = head.config
    if not config.importance or config.sample_rate >= 1:
        return 1.0
    if isinstance(config.sampling, BlockSampling):
        size = block_size(head.num_classes, config.block_rows)
        blocks = -(-head.num_classes // size) * min(config.sampling.stride, size)
        return blocks / max(1, round(config.sample_rate * blocks))
    return head.num_classes / len(drawn_classes(head))


def make(num_classes: int, seed: int = 0, **fields: Any) -> ShardedHead:
    config = HeadConfig(init_std=1.0, block_rows=64, **{"scale": 6.0, **fields})
    return ShardedHead(num_classes, DIM, config, seed=seed, dtype=torch.float64)


def close(got: Tensor, want: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


CASES: dict[str, tuple[int, int, dict[str, Any]]] = {
    # name: classes, positives a sample, config
    "softmax": (1003, 1, {}),
    "softmax sampled": (1003, 1, {"sample_rate": 0.1}),
    "softmax linear": (1003, 1, {"normalize": False, "scale": 1.0}),
    "softmax linear large logits": (1003, 1, {"normalize": False, "scale": 40.0, "sample_rate": 0.2}),
    "softmax past the exponent": (1003, 1, {"scale": 900.0}),
    "softmax recomputed": (1003, 1, {"memory_mb": 0.0}),
    "softmax linear half kept": (1003, 1, {"normalize": False, "scale": 3.0, "memory_mb": 0.02}),
    "cosface": (1003, 1, {"margin": CosFace(m=0.35), "sample_rate": 0.3}),
    "arcface": (1003, 1, {"margin": ArcFace(m=0.4)}),
    "arcface straight-through": (1003, 1, {"margin": ArcFace(m=0.4, straight_through=True)}),
    "combined": (203, 3, {"margin": Combined(m1=1.2, m2=0.1, m3=0.1), "loss": Decoupled()}),
    "mlcd": (1003, 4, {"loss": MLCD(), "margin": CosFace(m=0.3)}),
    "mlcd sampled": (1003, 4, {"loss": MLCD(), "sample_rate": 0.05, "memory_mb": 0.0}),
    "mlcd linear": (1003, 4, {"loss": MLCD(), "normalize": False, "scale": 1.0, "sample_rate": 0.5}),
    "mlcd more positives than drawn": (1003, 6, {"loss": MLCD(), "sample_rate": 0.001}),
    "mlc": (1003, 4, {"loss": MLC(), "sample_rate": 0.3}),
    "decoupled": (1003, 4, {"loss": Decoupled(), "sample_rate": 0.3}),
    "multi_softmax": (1003, 4, {"loss": MultiSoftmax(), "sample_rate": 0.3}),
    "smoothed": (1003, 1, {"loss": SmoothedSoftmax(smoothing=0.1), "sample_rate": 0.3}),
    "smoothed linear": (1003, 1, {"loss": SmoothedSoftmax(smoothing=0.2), "normalize": False, "scale": 2.0}),
    "smoothed importance": (1003, 1, {"loss": SmoothedSoftmax(), "sample_rate": 0.1, "importance": True}),
    "soft targets": (1003, 4, {"loss": SoftTargets(), "sample_rate": 0.3}),
    "soft targets without tail": (1003, 4, {"loss": SoftTargets(tail="drop"), "margin": CosFace(m=0.1)}),
    "bce": (1003, 4, {"loss": BCE(), "sample_rate": 0.5, "normalize": False, "scale": 1.0}),
    "bce all, recomputed": (1003, 4, {"loss": BCE(), "memory_mb": 0.0}),
    "asl": (1003, 4, {"loss": ASL(gamma_pos=1.0, gamma_neg=2.0), "scale": 4.0}),
    "asl importance": (1003, 4, {"loss": ASL(gamma_neg=3.0), "sample_rate": 0.1, "importance": True, "scale": 4.0}),
    "ldr": (1003, 1, {"loss": LDR(lam=2.0), "sample_rate": 0.5}),
    "ldr linear": (1003, 1, {"loss": LDR(lam=0.3), "normalize": False, "scale": 1.0}),
    "gce": (1003, 1, {"loss": GCE(), "sample_rate": 0.5, "scale": 8.0}),
    "sce linear": (1003, 1, {"loss": SCE(), "normalize": False, "scale": 1.0}),
    "blocks": (1003, 1, {"sampling": BlockSampling(), "sample_rate": 0.2}),
    "blocks strided": (1003, 4, {"sampling": BlockSampling(stride=3), "sample_rate": 0.2, "loss": MLCD()}),
    "blocks importance": (997, 1, {"sampling": BlockSampling(stride=2), "sample_rate": 0.25, "importance": True}),
    "few blocks, importance": (640, 1, {"sampling": BlockSampling(), "sample_rate": 0.021, "importance": True}),
    "hard, one class": (1, 1, {"sampling": HardSampling(), "sample_rate": 0.5, "importance": True}),
    "blocks, one class": (1, 1, {"sampling": BlockSampling(stride=3), "sample_rate": 0.5}),
    "hard, two classes": (2, 1, {"sampling": HardSampling(share=1.0), "sample_rate": 1.0}),
    "softmax importance": (1003, 1, {"sample_rate": 0.1, "importance": True, "memory_mb": 0.0}),
    "sub-centres": (401, 1, {"sub_centres": 3, "margin": ArcFace(m=0.3)}),
    "sub-centres sampled": (401, 3, {"sub_centres": 2, "sample_rate": 0.3, "loss": MLCD(), "memory_mb": 0.0}),
    "sub-centres blocks": (401, 1, {"sub_centres": 2, "sample_rate": 0.3, "sampling": BlockSampling()}),
    "fewer classes than ranks": (2, 1, {}),
    "two classes, both positive": (2, 2, {"loss": MLCD()}),
    "one class": (1, 1, {}),
    "one class linear": (1, 1, {"normalize": False}),
}
