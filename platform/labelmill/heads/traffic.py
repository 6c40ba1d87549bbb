"""What a sharded head sends: the formula for a step, and a counter to hold it against.

Bytes are those one rank sends with ring algorithms, which is what gloo and NCCL use for large tensors and the
least that is possible for an all-reduce. `b` is the tensor of one rank, g the number of ranks:

    all_gather   (g - 1) b          of the rank's own part b
    all_reduce   2 (g - 1) / g b
    broadcast    b                  by the first rank; the others send at most as much
    all_to_all   (g - 1) / g b      of what the rank has for all of them, where shares are equal

Shape legend: B samples of a rank, N = B x shards samples of a replica, P positives of a sample, U touched rows
of a shard, D embedding size.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Kind = Literal["all_gather", "all_reduce", "broadcast", "all_to_all"]
Axis = Literal["world", "shards", "replicas"]
NUMBERS = 7  # batch size, positives of a sample, soft labels or not; classes, dimensions, seed and step must be equal
NUMBER_BYTES = 8
ID_BYTES = 8
HARDNESS_BYTES = 4
LOSS_NUMBERS = 2  # the loss, and whether a replica refused its batch


def sent_bytes(kind: Kind, payload: float, world: int) -> float:
    """Bytes that one of `world` ranks sends in a collective over `payload` bytes of its own."""
    if world == 1:
        return 0.0
    return {
        "all_gather": (world - 1) * payload,
        "all_reduce": 2 * (world - 1) / world * payload,
        "broadcast": payload,
        "all_to_all": (world - 1) / world * payload,
    }[kind]


_waited_s = 0.0


@contextlib.contextmanager
def waiting() -> Iterator[None]:
    """Around a collective: its seconds count as waiting for other ranks. On a GPU the call returns before that."""
    global _waited_s
    began = time.perf_counter()
    try:
        yield
    finally:
        _waited_s += time.perf_counter() - began


def waited_s() -> float:
    """Seconds that this process has spent in collectives so far."""
    return _waited_s


class Traffic:
    """Counts collectives by kind: `calls`, `payload` bytes given in, bytes `sent`, and `seconds` of waiting for them.

    Seconds are those of the calls that wait, until they return; a call on a GPU returns when it has been started.
    """

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.payload: Counter[str] = Counter()
        self.sent: dict[str, float] = {}
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def timed(self, kind: Kind, value: Tensor, world: int) -> Iterator[None]:
        """One collective over `value`, which runs in the block."""
        self.add(kind, value, world)
        began = time.perf_counter()
        with waiting():
            yield
        self.seconds[kind] = self.seconds.get(kind, 0.0) + time.perf_counter() - began

    def add(self, kind: Kind, value: Tensor, world: int) -> None:
        """One collective over `value`."""
        size = value.numel() * value.element_size()
        self.calls[kind] += 1
        self.payload[kind] += size
        self.sent[kind] = self.sent.get(kind, 0.0) + sent_bytes(kind, size, world)

    def clear(self) -> None:
        """Starts again from zero."""
        self.calls.clear()
        self.payload.clear()
        self.sent.clear()
        self.seconds.clear()


@dataclass(frozen=True)
class Collective:
    """One collective of a head's step.

    Attributes:
        what: what travels.
        axis: the ranks it runs over.
        payload: bytes of one rank's tensor.
        world: ranks on the axis.
        each: once a micro batch, or once an optimizer step.
    """

    what: str
    axis: Axis
    kind: Kind
    payload: float
    world: int
    each: Literal["micro batch", "step"]

    @property
    def sent(self) -> float:
        """Bytes that one rank sends."""
        return sent_bytes(self.kind, self.payload, self.world)


def head_collectives(
    batch: int,
    positives: int,
    dim: int,
    touched_rows: float,
    shards: int,
    replicas: int,
    element: int = 4,
    maximum: bool = False,
    sums: bool = False,
    hard: tuple[int, int] = (0, 0),
    soft: bool = False,
) -> list[Collective]:
    """The collectives of `ShardedHead.loss`, `backward` and `step`, in their order; those over one rank are left out.

    With one replica embeddings and ids travel in one message; with several, ids go to all ranks and embeddings to those
    of the replica. "ids" are labels, the weight of the sample and, of soft labels, their weights.

    Args:
        batch: samples B of a rank in a micro batch.
        positives: width P of the padded labels.
        touched_rows: U, rows of the shard that get a gradient in the optimizer step (each sub-centre is a row).
        element: bytes of the head's numbers.
        maximum: the head's logits need their maximum (a head without normalised rows).
        sums: the loss needs the sum of the negatives' logits and their number.
        hard: classes of the shard, and how many of them at most are offered as the hardest; 0 without hard sampling.
        soft: labels have weights.
    """
    n = batch * shards
    whole = shards * replicas
    numbers, embeddings = NUMBERS * NUMBER_BYTES, batch * dim * element
    ids = batch * (positives * (1 + soft) + 1) * ID_BYTES
    if replicas == 1:
        gathers = [
            Collective("sizes", "world", "all_gather", numbers, whole, "micro batch"),
            Collective("embeddings and ids", "shards", "all_gather", embeddings + ids, shards, "micro batch"),
        ]
    else:
        gathers = [
            # and the first sample that is not finite
            Collective("sizes", "world", "all_gather", numbers + NUMBER_BYTES, whole, "micro batch"),
            Collective("ids", "world", "all_gather", ids, whole, "micro batch"),
            Collective("embeddings", "shards", "all_gather", embeddings, shards, "micro batch"),
        ]
    classes, offered = hard
    statistics = 1 + 2 * sums + positives
    found = [
        *gathers,
        Collective("hard scale", "replicas", "all_reduce", element if classes else 0, replicas, "micro batch"),
        Collective("hardness", "replicas", "all_reduce", classes * HARDNESS_BYTES, replicas, "micro batch"),
        Collective("hard sizes", "shards", "all_gather", NUMBER_BYTES if classes else 0, shards, "micro batch"),
        Collective("hard classes", "shards", "all_gather", offered * HARDNESS_BYTES, shards, "micro batch"),
        Collective("maxima", "shards", "all_reduce", n * element if maximum else 0, shards, "micro batch"),
        Collective("statistics", "shards", "all_reduce", n * statistics * element, shards, "micro batch"),
        Collective("embedding gradient", "shards", "all_reduce", n * dim * element, shards, "micro batch"),
        Collective("loss", "replicas", "all_reduce", LOSS_NUMBERS * element, replicas, "micro batch"),
        Collective("row gradient", "replicas", "all_reduce", touched_rows * dim * element, replicas, "step"),
    ]
    return [c for c in found if c.world > 1 and c.payload]


def tcp_bytes_sent() -> int:
    """Bytes that this process's TCP sockets have sent and seen acknowledged (Linux's TCP_INFO); 0 elsewhere.

    What gloo really sends, to hold formulas against.
    """
    total = 0
    with contextlib.suppress(OSError):
        for fd in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError, struct.error):
                if not os.readlink(f"/proc/self/fd/{fd}").startswith("socket:"):
                    continue
                with socket.socket(fileno=os.dup(int(fd))) as copy:
                    if copy.family in (socket.AF_INET, socket.AF_INET6):
                        info = copy.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                        total += struct.unpack_from("Q", info, 120)[0]  # tcpi_bytes_acked
    return total
