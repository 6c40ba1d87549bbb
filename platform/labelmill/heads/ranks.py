"""The ranks that share a class axis, their layout, and the few collectives that a sharded head uses.

Without an initialised process group there is one rank, and every collective is the identity.

Shape legend: B samples of this rank, N samples of all ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from labelmill.errors import JobError
from labelmill.heads.traffic import Traffic

# torch 2.13 renamed it
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Ranks:
    """A process group seen from one of its ranks.

    Attributes:
        rank, world: of this process in the group; 0 and 1 without an initialised group.
        traffic: the collectives that were called, with the bytes this rank sent in them.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        live = dist.is_available() and dist.is_initialized()
        self.group = group
        self.rank = dist.get_rank(group) if live else 0
        self.world = dist.get_world_size(group) if live else 1
        self.traffic = Traffic()

    @classmethod
    def alone(cls) -> Ranks:
        """One rank by itself, whatever groups exist."""
        ranks = cls.__new__(cls)
        ranks.group, ranks.rank, ranks.world, ranks.traffic = None, 0, 1, Traffic()
        return ranks

    def gather_numbers(self, numbers: list[int], device: torch.device) -> list[list[int]]:
        """Each rank's numbers, in rank order."""
        if self.world == 1:
            return [numbers]
        out = torch.empty(self.world, len(numbers), dtype=torch.int64, device=device)
        self._gather(out, torch.tensor([numbers], device=device))
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
        self._gather(out, rows.contiguous())
        if min(counts) == most:
            return out
        return torch.cat([out[r * most : r * most + n] for r, n in enumerate(counts)])

    def gather_rows_with_grad(self, rows: Tensor, counts: list[int]) -> Tensor:
        """`gather_rows` that autograd goes through: a row's gradient is the sum of what every rank made of it."""
        return rows if self.world == 1 else _GatherRows.apply(rows, self, counts)

    def sum_(self, value: Tensor) -> Tensor:
        """Sum over the ranks, in place."""
        if self.world > 1:
            with self.traffic.timed("all_reduce", value, self.world):
                dist.all_reduce(value, group=self.group)
        return value

    def sum_later_(self, value: Tensor) -> dist.Work | None:
        """Starts a sum in place; wait on what it returns."""
        if self.world == 1:
            return None
        self.traffic.add("all_reduce", value, self.world)
        return dist.all_reduce(value, group=self.group, async_op=True)

    def max_(self, value: Tensor) -> Tensor:
        """Maximum over the ranks, in place."""
        if self.world > 1:
            with self.traffic.timed("all_reduce", value, self.world):
                dist.all_reduce(value, op=dist.ReduceOp.MAX, group=self.group)
        return value

    def copy_from_first_(self, value: Tensor) -> Tensor:
        """Overwrites `value` with that of rank 0."""
        if self.world > 1:
            with self.traffic.timed("broadcast", value, self.world):
                dist.broadcast(value, group=self.group, group_src=0)
        return value

    def _gather(self, out: Tensor, part: Tensor) -> None:
        with self.traffic.timed("all_gather", part, self.world):
            _all_gather(out, part, group=self.group)


@dataclass(frozen=True)
class Grid:
    """The ranks as `replicas` x `shards`: rank r holds shard r % shards of replica r // shards.

    A replica is a full set of class shards. Its ranks stand next to each other, so that the gather of
    embeddings stays within a node where a node holds a replica; the ranks with the same shard are `shards`
    apart.

    Attributes:
        world: all ranks of the head.
        shards: the ranks of this rank's replica; they split the class axis.
        replicas: the ranks that hold the same classes as this one.
    """

    world: Ranks
    shards: Ranks
    replicas: Ranks


_grids: dict[tuple[int, int], tuple[dist.ProcessGroup, Grid]] = {}


def lay_grid(group: dist.ProcessGroup | None = None, shards: int | None = None) -> Grid:
    """The layout with `shards` class shards in a replica; all ranks of `group` in one replica by default.

    Collective over `group` at its first call for a number of shards; heads of the same layout share groups.
    Raises JobError when `shards` doesn't divide the number of ranks.
    """
    world = Ranks(group)
    shards = shards or world.world
    check_shards(shards, world.world)
    if shards == world.world:
        return Grid(world, world, Ranks.alone())
    if shards == 1:
        return Grid(world, Ranks.alone(), world)
    whole = group if group is not None else dist.group.WORLD
    assert whole is not None
    key = (id(whole), shards)
    if key not in _grids or _grids[key][0] is not whole:
        members = dist.get_process_group_ranks(whole)
        replica, shard = divmod(world.rank, shards)

        def among(ranks: list[int]) -> Ranks:
            # only the members take part in making a group, so that `group` may be a part of the world
            return Ranks(dist.new_group(ranks, use_local_synchronization=True))

        grid = Grid(world, among(members[replica * shards : (replica + 1) * shards]), among(members[shard::shards]))
        _grids[key] = (whole, grid)
    known = _grids[key][1]
    return Grid(world, Ranks(known.shards.group), Ranks(known.replicas.group))


def check_shards(shards: int, world: int) -> None:
    """Raises JobError, with the numbers that would do, unless `shards` divides `world`."""
    if world % shards:
        fitting = [n for n in range(1, world + 1) if world % n == 0]
        raise JobError(f"head.shards: {shards} doesn't divide the {world} workers; {_either(fitting)} would.")


def _either(numbers: list[int]) -> str:
    return f"{', '.join(map(str, numbers[:-1]))} or {numbers[-1]}" if len(numbers) > 1 else str(numbers[0])


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
