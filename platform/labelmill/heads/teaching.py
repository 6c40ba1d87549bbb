"""What a class-sharded student is compared with: the teacher's logits of own classes, for the samples of all ranks.

Shape legend: B samples of this rank, N of all ranks, R classes of a chunk, C of this rank, k listed classes, E embedding width.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from labelmill.errors import DataError
from labelmill.heads.ranks import Ranks
from labelmill.heads.rows import Scratch, Where
from labelmill.heads.sharded import ShardedHead
from labelmill.losses.class_sums import Listed


class Teacher(Protocol):
    """What a sharded student is compared with; `gather` is collective and comes first."""

    def gather(self, ranks: Ranks, counts: list[int], head: ShardedHead) -> Sliced:
        """The teacher of all ranks' samples, for this rank's classes."""
        ...


@dataclass
class Sliced:
    """The teacher's logits of own classes, or its `listed` ones."""

    listed: Listed | None = None

    def logits(self, where: Where, scratch: Scratch) -> Tensor | None:
        """(N, R) of local rows, until the next call; not to be written to."""
        return None


class NoTeacher:
    """For losses that look at labels alone."""

    def gather(self, ranks: Ranks, counts: list[int], head: ShardedHead) -> Sliced:
        return Sliced()


@dataclass
class _Columns(Sliced):
    t_NC: Tensor | None = None

    def logits(self, where: Where, scratch: Scratch) -> Tensor | None:
        assert self.t_NC is not None
        return self.t_NC[:, where]


@dataclass
class LogitTeacher:
    """Logits of own samples for all classes, (B, classes): ranks exchange columns, so that each gets its own classes'."""

    t_BC: Tensor

    def gather(self, ranks: Ranks, counts: list[int], head: ShardedHead) -> Sliced:
        if self.t_BC.shape[1] != head.num_classes:
            raise DataError(f"the teacher has {self.t_BC.shape[1]} classes and the student {head.num_classes}.")
        t_BC = self.t_BC.to(head.device, head.dtype)
        spans = ranks.gather_numbers([head.start, head.stop], head.device)
        if ranks.world == 1:
            return _Columns(t_NC=t_BC)
        width = head.stop - head.start
        received = [t_BC.new_empty(count * width) for count in counts]
        sent = [t_BC[:, lo:hi].reshape(-1) for lo, hi in spans]
        _exchange(received, sent, ranks)
        return _Columns(t_NC=torch.cat([part.view(count, width) for part, count in zip(received, counts, strict=True)]))


def _exchange(received: list[Tensor], sent: list[Tensor], ranks: Ranks) -> None:
    """Piece r of `sent` goes to rank r."""
    out = torch.cat(received)
    sizes = [len(part) for part in received]
    with ranks.traffic.timed("all_to_all", out, ranks.world):
        dist.all_to_all_single(out, torch.cat(sent), sizes, [len(part) for part in sent], group=ranks.group)
    lo = 0
    for part, size in zip(received, sizes, strict=True):
        part.copy_(out[lo : lo + size])
        lo += size


@dataclass
class RowTeacher:
    """The teacher's embeddings of own samples and its class rows, sharded as the student's: logits are made chunk by chunk.

    Attributes:
        emb_BE: of own samples.
        w_CE: rows of the classes [head.start, head.stop).
        scale: of the inner products.
        bias_C: of the same classes.
    """

    emb_BE: Tensor
    w_CE: Tensor
    scale: float = 1.0
    bias_C: Tensor | None = None

    def gather(self, ranks: Ranks, counts: list[int], head: ShardedHead) -> Sliced:
        if len(self.w_CE) != head.stop - head.start:
            raise DataError(
                f"the teacher has {len(self.w_CE)} rows for the classes [{head.start}, {head.stop}) of this rank."
            )
        emb_NE = ranks.gather_rows(self.emb_BE.to(head.device, head.dtype), counts)
        return _Rows(None, emb_NE * self.scale, self)


@dataclass
class _Rows(Sliced):
    emb_NE: Tensor = field(default_factory=lambda: torch.empty(0))
    teacher: RowTeacher | None = None

    def logits(self, where: Where, scratch: Scratch) -> Tensor | None:
        assert self.teacher is not None
        w_CE, bias_C = self.teacher.w_CE, self.teacher.bias_C
        w_RE = w_CE[where].to(self.emb_NE)
        z_NR = scratch.borrow("teacher logits", (len(self.emb_NE), len(w_RE)), self.emb_NE)
        torch.mm(self.emb_NE, w_RE.T, out=z_NR)
        return z_NR if bias_C is None else z_NR.add_(bias_C[where].to(z_NR))


@dataclass
class ListedTeacher:
    """The best classes of own samples and what the others weigh (see `Listed`); global class ids."""

    listed: Listed

    def gather(self, ranks: Ranks, counts: list[int], head: ShardedHead) -> Sliced:
        own = self.listed
        ids, logits, tail = (
            ranks.gather_rows(x.to(head.device).contiguous(), counts) for x in (own.ids_Nk, own.logits_Nk, own.tail_N)
        )
        return Sliced(Listed(ids, logits.to(head.dtype), tail.to(head.dtype), own.temperature))
