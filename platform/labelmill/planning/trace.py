"""What an encoder and a head need, found by running them at a small size: FLOP, and the memory alive at the peak.

Shape legend: B samples of a rank, N samples of a replica, S rows of a step, R rows of a chunk, D embedding size.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from labelmill.data.labels import Labels
from labelmill.encoders.base import Encoder, Prepared
from labelmill.errors import JobError
from labelmill.heads.config import HeadConfig
from labelmill.heads.sharded import ShardedHead

WORD_LETTERS = 9  # of an example text for an encoder of short strings


class PeakMemory(TorchDispatchMode):
    """Bytes of the tensors that operations make and that are `alive`; `peak` is the most so far. Counts `operations`."""

    def __init__(self) -> None:
        super().__init__()
        self.alive, self.peak, self.operations = 0, 0, 0
        self._seen: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += 1
        known = {_key(t) for t in _tensors((args, kwargs or {}))}
        out = func(*args, **(kwargs or {}))
        for tensor in _tensors(out):
            key = _key(tensor)
            if key not in known and key not in self._seen:
                self._count(tensor, key)
        return out

    def _count(self, tensor: Tensor, key: int) -> None:
        storage = tensor.untyped_storage()
        size = storage.nbytes()
        self.alive += size
        self.peak = max(self.peak, self.alive)
        self._seen[key] = weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self.alive -= size
        self._seen.pop(key, None)


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return [t for item in value.values() for t in _tensors(item)]
    if isinstance(value, list | tuple):
        return [t for item in value for t in _tensors(item)]
    return []


@dataclass(frozen=True)
class EncoderCost:
    """What an encoder costs.

    Attributes:
        dim: of the embedding.
        parameters, trainable: numbers in the encoder.
        forward_flops, train_flops: of a sample; the second is forward and backward.
        operations: operators of a forward and backward pass, whatever the batch.
        activation_bytes: fp32, of a sample: what the forward pass keeps for the backward pass.
        input_bytes: of a prepared sample.
    """

    dim: int
    parameters: int
    trainable: int
    forward_flops: float
    train_flops: float
    operations: int
    activation_bytes: float
    input_bytes: float


def example_inputs(encoder: Encoder, count: int) -> Prepared:
    """Prepared inputs of `count` samples of the size that the encoder's config says. Raises JobError."""
    config, rng = encoder.config, np.random.default_rng(0)
    size = getattr(config, "image_size", None)
    if size:
        channels = getattr(config, "channels", 3)
        return encoder.prepare(rng.integers(0, 256, (count, size, size, channels), dtype=np.uint8))
    if hasattr(config, "max_length"):
        longest = int(config.max_length)
        letters = WORD_LETTERS if hasattr(config, "buckets") else longest
        words = rng.integers(97, 123, (count, min(letters, longest)), dtype=np.uint8)
        return encoder.prepare([bytes(row).decode() for row in words])
    if hasattr(config, "in_dim"):
        return encoder.prepare(rng.standard_normal((count, config.in_dim), dtype=np.float32))
    kind = getattr(config, "kind", type(encoder).__name__)
    raise JobError(
        f"plan: don't know what a sample of encoder {kind!r} looks like (no image_size, max_length or in_dim)."
    )


def trace_encoder(encoder: Encoder) -> EncoderCost:
    """Runs the encoder on two small batches; what both have is fixed, the difference belongs to a sample."""
    encoder.train()
    few, more = 2, 3
    encoder(example_inputs(encoder, few))  # what is made once is made now
    small, large = _run(encoder, few), _run(encoder, more)
    encoder.zero_grad(set_to_none=True)
    forward = large.forward - small.forward
    return EncoderCost(
        large.dim,
        sum(p.numel() for p in encoder.parameters()),
        sum(p.numel() for p in encoder.parameters() if p.requires_grad),
        forward,
        forward + large.backward - small.backward,
        large.operations,
        max(0.0, float(large.alive - small.alive)),
        large.input_bytes / more,
    )


@dataclass(frozen=True)
class _Run:
    dim: int
    forward: float
    backward: float
    operations: int
    alive: int
    input_bytes: int


def _run(encoder: Encoder, batch: int) -> _Run:
    """A forward and backward pass: FLOP, operators, and bytes alive between the two."""
    inputs = example_inputs(encoder, batch)
    encoder.zero_grad(set_to_none=True)
    with FlopCounterMode(display=False) as forward, PeakMemory() as first:
        emb_BD = encoder(inputs)
        alive = first.alive  # for the backward pass; gradients of weights come on top, once
    with FlopCounterMode(display=False) as backward, PeakMemory() as second:
        if emb_BD.requires_grad:
            emb_BD.sum().backward()
    size = sum(t.numel() * t.element_size() for t in _tensors(inputs))
    flops = forward.get_total_flops(), backward.get_total_flops()
    return _Run(emb_BD.shape[1], *flops, first.operations + second.operations, alive, size)


@dataclass(frozen=True)
class HeadCost:
    """Memory of a head, from small ones of the same config.

    Attributes:
        class_bytes: a class: its rows (one for each sub-centre), the optimizer's state, the copy that finds hard classes.
        step_row_bytes: a row that takes part in a step: gathered copy, gradient, bookkeeping.
        sample_bytes: a sample of the replica's batch.
        fixed_bytes: chunks and what else depends on neither.
    """

    class_bytes: float
    step_row_bytes: float
    sample_bytes: float
    fixed_bytes: float


def trace_head(config: HeadConfig, dim: int, positives: int = 1) -> HeadCost:
    """Runs heads of a few thousand classes through two steps; differences give the bytes of a row and of a sample.

    Logits kept for the backward pass are left out: `memory_mb` limits them.
    """
    rate = 1.0 if config.sample_rate >= 1 else 0.5
    # what changes no tensor's size shall not be traced again
    same = {"memory_mb": 0.0, "shards": None, "sample_rate": rate, "matmul": "fp32", "initial": None}
    return _trace_head(config.model_copy(update=same), dim, positives)


@lru_cache(maxsize=32)
def _trace_head(config: HeadConfig, dim: int, positives: int) -> HeadCost:
    def rows_and_state(classes: int) -> int:
        with PeakMemory() as memory:
            head = ShardedHead(classes, dim, config)
        found = memory.alive
        return max(found, sum(t.numel() * t.element_size() for t in head.state_tensors().values()))

    # chunks have their full number of rows in the first pair of runs, their least in the second
    (few, few_rows), (many, many_rows) = (_head_peak(config, c, dim, 256, positives) for c in (16384, 32768))
    thin, wide = (_head_peak(config, 1024, dim, n, positives)[0] for n in (4096, 8192))
    row, sample = (many - few) / (many_rows - few_rows), (wide - thin) / 4096
    return HeadCost(
        (rows_and_state(4096) - rows_and_state(2048)) / 2048, row, sample, max(0.0, few - few_rows * row - 256 * sample)
    )


def _head_peak(config: HeadConfig, classes: int, dim: int, batch: int, positives: int) -> tuple[int, int]:
    """Peak bytes of two steps, beyond rows and state, and the rows of the last one."""
    head = ShardedHead(classes, dim, config)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(classes, (batch, positives), generator=generator)
    # as they come from a stream: int64 ids, float32 weights
    labels = Labels("soft", ids, weights_BP=torch.full(ids.shape, 1 / positives)) if config.loss.soft else ids
    touched = 0
    with PeakMemory() as memory:
        for _ in range(2):
            x_BD = torch.randn(batch, dim, generator=generator, requires_grad=True)
            head.loss(x_BD, labels).backward()
            touched = len(head.pending_rows()[0])
            head.step(0.1)
    return memory.peak, touched
