"""Hard classes of a batch, found with an int8 copy of the unit rows (a quarter of their memory).

Every row is compared with every sample in int8; a class is as hard as its best cosine with a sample that it is not a
positive of. An accurate proposal is what makes hard sampling work: cosines here are off by some 4e-4, which centroid
lists and sketches of few dimensions are not by far.

Shape legend: C rows of this rank, N samples of this replica, R rows of a chunk, D embedding size, K own positives.
"""

from __future__ import annotations

import torch
from torch import Tensor

from labelmill.heads.ranks import Grid
from labelmill.heads.rows import ClassRows, Watcher, Where

CHUNK = 1024
_LOWEST = -(2**30)


class Screen(Watcher):
    """The int8 copy of a rank's rows; rows that move are quantised again."""

    def __init__(self, rows: ClassRows) -> None:
        self.rows = rows
        self.q_CD = torch.empty(rows.w_CD.shape, dtype=torch.int8, device=rows.w_CD.device)
        self.scale_C = torch.empty(len(rows), dtype=torch.float32, device=rows.w_CD.device)
        rows.watchers.append(self)

    def rows_changed(self, where: Where, w_RD: Tensor, inverse_R: Tensor | None) -> None:
        if self.q_CD.device != w_RD.device:
            self.q_CD, self.scale_C = self.q_CD.to(w_RD.device), self.scale_C.to(w_RD.device)
        top_R = w_RD.abs().amax(dim=1).clamp_min_(1e-30)
        self.q_CD[where] = (w_RD * (127.0 / top_R)[:, None]).round_().to(torch.int8)
        length_R = top_R / 127.0
        self.scale_C[where] = (length_R if inverse_R is None else length_R * inverse_R).float()

    def scores(self, x_ND: Tensor, sample_K: Tensor, row_K: Tensor, top: Tensor | None = None) -> Tensor:
        """Best similarity of each row with a sample that it is no positive of, up to rounding; float32 (C,).

        `top` is the largest entry of the samples that all are rounded by; that of `x_ND` by default.
        """
        if not len(x_ND):
            return self.scale_C.new_full((len(self.rows),), -torch.inf)
        # one scale for all samples, so that the best of them is found among the integers
        top = x_ND.abs().amax() if top is None else top
        top = top.clamp_min(1e-30)
        x_DN = (x_ND * (127.0 / top)).round().to(torch.int8).t()
        order_K = torch.argsort(row_K)
        row_K, sample_K = row_K[order_K], sample_K[order_K]
        edges = torch.arange(0, len(self.rows) + CHUNK, CHUNK, device=row_K.device)
        cuts = torch.searchsorted(row_K, edges).tolist()
        best_C = torch.empty(len(self.rows), dtype=torch.int32, device=x_ND.device)
        memory = torch.empty(CHUNK, len(x_ND), dtype=torch.int32, device=x_ND.device)
        for number, lo in enumerate(range(0, len(best_C), CHUNK)):
            hi = min(lo + CHUNK, len(best_C))
            z_RN = _int_mm(self.q_CD[lo:hi], x_DN, memory)
            first, last = cuts[number], cuts[number + 1]
            if last > first:
                z_RN[row_K[first:last] - lo, sample_K[first:last]] = _LOWEST
            torch.amax(z_RN, dim=1, out=best_C[lo:hi])
        return best_C * self.scale_C * (top / 127.0).float()

    def hardest(
        self, grid: Grid, x_ND: Tensor, sample_K: Tensor, class_K: Tensor, count: int, group: int = 1
    ) -> Tensor:
        """Own classes among the `count` hardest of all ranks, (H,) local ids. Collective.

        A function of the rows and the global batch, up to classes of equal score at the bar.
        """
        row_K = (
            class_K if group == 1 else (class_K[:, None] * group + torch.arange(group, device=class_K.device)).flatten()
        )
        # rounded alike in all replicas, whose samples differ
        top = grid.replicas.max_(x_ND.abs().amax() if len(x_ND) else x_ND.new_zeros(()))
        score_C = self.scores(x_ND, sample_K.repeat_interleave(group), row_K, top)
        if group > 1:
            score_C = score_C.view(-1, group).amax(dim=1)
        # the hardest for the samples of any replica, so that all replicas choose alike
        grid.replicas.max_(score_C)
        ranks = grid.shards
        own = min(count, len(score_C))
        best_H, id_H = torch.topk(score_C, own)
        if ranks.world == 1:
            return id_H
        counts = [n for (n,) in ranks.gather_numbers([own], x_ND.device)]
        everyone = ranks.gather_rows(best_H, counts)
        if len(everyone) <= count:
            return id_H
        bar = torch.topk(everyone, count).values[-1]
        above = int((everyone > bar).sum())
        # at the bar itself: places left go to ranks in order
        before = int((everyone[: sum(counts[: ranks.rank])] == bar).sum())
        places = max(0, count - above - before)
        tied = id_H[best_H == bar].sort().values[:places]
        return torch.cat([id_H[best_H > bar], tied])


def _int_mm(a_RD: Tensor, b_DN: Tensor, memory: Tensor) -> Tensor:
    """int8 x int8 -> int32; padded where an accelerator's kernel wants multiples of 8 and more than 16 rows."""
    if a_RD.device.type == "cpu":
        return torch._int_mm(a_RD, b_DN, out=memory[: len(a_RD)])
    rows, dim, columns = *a_RD.shape, b_DN.shape[1]
    pad = torch.nn.functional.pad
    a_RD = pad(a_RD, (0, -dim % 8, 0, max(0, 17 - rows)))
    b_DN = pad(b_DN, (0, -columns % 8, 0, -dim % 8))
    return torch._int_mm(a_RD, b_DN.t().contiguous().t())[:rows, :columns]
