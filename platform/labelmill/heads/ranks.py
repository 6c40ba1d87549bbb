"""The ranks that share a class axis, and the few collectives that a sharded head uses.

Without an initialised process group there is one rank, and every collective is the identity.

Shape legend: B samples of this rank, N samples of all ranks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

# torch 2.13 renamed it
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Ranks:
    """A process group seen from one of its ranks."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        live = dist.is_available() and dist.is_initialized()
        self.group = group
        self.rank = dist.get_rank(group) if live else 0
        self.world = dist.get_world_size(group) if live else 1

    def gather_numbers(self, numbers: list[int], device: torch.device) -> list[list[int]]:
        """Each rank's numbers, in rank order."""
        if self.world == 1:
            return [numbers]
        out = torch.empty(self.world, len(numbers), dtype=torch.int64, device=device)
        _all_gather(out, torch.tensor([numbers], device=device), group=self.group)
        return out.tolist()

    def gather_rows(self, rows: Tensor, counts: list[int]) -> Tensor:
        """The ranks' rows one after the other, (B, ...) -> (N, ...); `counts` are the ranks' B."""
        if self.world == 1:
            return rows
        most = max(counts)
        if most == 0:
            return rows
        if rows.shape[0] < most:
            padded = rows.new_zeros(most, *rows.shape[1:])
            padded[: rows.shape[0]] = rows
            rows = padded
        out = rows.new_empty(self.world * most, *rows.shape[1:])
        _all_gather(out, rows.contiguous(), group=self.group)
        if min(counts) == most:
            return out
        return torch.cat([out[r * most : r * most + n] for r, n in enumerate(counts)])

    def gather_rows_with_grad(self, rows: Tensor, counts: list[int]) -> Tensor:
        """`gather_rows` that autograd goes through: a row's gradient is the sum of what every rank made of it."""
        return rows if self.world == 1 else _GatherRows.apply(rows, self, counts)

    def sum_(self, value: Tensor) -> Tensor:
        """Sum over the ranks, in place."""
        if self.world > 1:
            dist.all_reduce(value, group=self.group)
        return value

    def sum_later_(self, value: Tensor) -> dist.Work | None:
        """Starts a sum in place; wait on what it returns."""
        return dist.all_reduce(value, group=self.group, async_op=True) if self.world > 1 else None

    def max_(self, value: Tensor) -> Tensor:
        """Maximum over the ranks, in place."""
        if self.world > 1:
            dist.all_reduce(value, op=dist.ReduceOp.MAX, group=self.group)
        return value


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, ranks: Ranks, counts: list[int]) -> Tensor:
        ctx.ranks, ctx.counts = ranks, counts
        return ranks.gather_rows(rows, counts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        first = sum(ctx.counts[: ctx.ranks.rank])
        return ctx.ranks.sum_(grad.contiguous())[first : first + ctx.counts[ctx.ranks.rank]], None, None
