"""An embedding table split over the ranks by row: lookups travel, rows stay.

Rows are dealt to ranks in blocks, as class rows are, so that saving, loading and resharding are theirs; hashed rows are even
over any cut. A step dedupes its rows, asks their owners in one exchange, and sends gradients back the same way; only touched
rows move, by a row optimizer.

Shape legend: R rows of this rank, K looked-up rows of this rank's batch (may repeat), U distinct ones, A rows asked of this
rank by all, d width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from labelmill.heads.config import HeadConfig
from labelmill.heads.optim import Adagrad, RowOptimizerConfig
from labelmill.heads.ranks import Ranks
from labelmill.heads.sampling import class_range
from labelmill.heads.sharded import ShardedHead


class ShardedTable(ShardedHead):
    """This rank's rows of a table of `num_rows` x `dim`; a sharded head without a loss of its own.

    Args:
        optimizer: of touched rows.
        lr_multiplier: rows learn this much faster than the dense modules.
        init_std: of the first rows.
    """

    def __init__(
        self,
        num_rows: int,
        dim: int,
        optimizer: RowOptimizerConfig | None = None,
        lr_multiplier: float = 1.0,
        init_std: float = 0.03,
        seed: int = 0,
        group: dist.ProcessGroup | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        optimizer = optimizer or Adagrad()
        config = HeadConfig(
            normalize=False, scale=1.0, optimizer=optimizer, lr_multiplier=lr_multiplier, init_std=init_std
        )
        super().__init__(num_rows, dim, config, seed, group, dtype=dtype)
        self._ends = torch.tensor(
            [class_range(num_rows, config.block_rows, r, self.ranks.world)[1] for r in range(self.ranks.world)]
        )

    def begin_step(self, lr: float) -> None:
        """Nothing: rows move in `step`."""

    def look_up(self, row_K: Tensor) -> Tensor:
        """The rows (K, d), differentiable: their gradient goes to the table. Collective.

        The gradient is the sum over ranks of what each made of a row, divided by the number of ranks: losses that are the
        mean over a rank's samples, as of dense modules. Raises IndexError for a row out of range.
        """
        if row_K.numel() and (int(row_K.min()) < 0 or int(row_K.max()) >= self.num_classes):
            raise IndexError(f"rows run from 0 to {self.num_classes - 1}")
        return _LookUp.apply(self._anchor, self, row_K)

    def _fetch(self, distinct_U: Tensor) -> tuple[Tensor, list[int], list[int], Tensor]:
        """Rows of sorted distinct ids, how many go to and come from each rank, and what was asked of this one (A,)."""
        world = self.ranks.world
        if world == 1:
            return self.w_CD[distinct_U], [len(distinct_U)], [len(distinct_U)], distinct_U
        edges = torch.searchsorted(distinct_U, self._ends.to(distinct_U.device)).tolist()
        send = [b - a for a, b in zip([0, *edges[:-1]], edges, strict=True)]
        table = self.ranks.gather_numbers(send, distinct_U.device)
        receive = [row[self.ranks.rank] for row in table]
        asked_A = exchange(self.ranks, distinct_U, send, receive) - self.start
        return exchange(self.ranks, self.w_CD[asked_A], receive, send), send, receive, asked_A

    def _collect(self, asked_A: Tensor, grad_Ad: Tensor) -> None:
        """Adds gradients of own rows, which may repeat."""
        row_U, place_A = torch.unique(asked_A, return_inverse=True)
        sum_Ud = grad_Ad.new_zeros(len(row_U), self.dim).index_add_(0, place_A, grad_Ad)
        places = self._pending.make_room(row_U, len(self.rows), sum_Ud[:0])
        self._pending.add(places, 0, len(row_U), sum_Ud)


class _LookUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, table: ShardedTable, row_K: Tensor) -> Tensor:
        distinct_U, place_K = torch.unique(row_K, return_inverse=True)
        rows_Ud, send, receive, asked_A = table._fetch(distinct_U)
        ctx.table, ctx.send, ctx.receive = table, send, receive
        ctx.save_for_backward(place_K, asked_A)
        ctx.count = len(distinct_U)
        return rows_Ud[place_K]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_Kd: Tensor) -> tuple[Tensor | None, ...]:
        place_K, asked_A = ctx.saved_tensors
        table: ShardedTable = ctx.table
        sum_Ud = grad_Kd.new_zeros(ctx.count, table.dim).index_add_(0, place_K, grad_Kd)
        if table.ranks.world > 1:
            sum_Ud = exchange(table.ranks, sum_Ud.div_(table.ranks.world), ctx.send, ctx.receive)
        table._collect(asked_A, sum_Ud)
        return None, None, None


def exchange(ranks: Ranks, value: Tensor, send: list[int], receive: list[int]) -> Tensor:
    """Sends `send[r]` rows to each rank r, gets `receive[r]` of it, in rank order. Collective."""
    out = value.new_empty(sum(receive), *value.shape[1:])
    with ranks.traffic.timed("all_to_all", value, ranks.world):
        dist.all_to_all_single(out, value.contiguous(), receive, send, group=ranks.group)
    return out
