"""One forward and backward pass over a rank's class rows, in row statistics.

Forward: logits in chunks of rows; of each sample only the log-sum-exp of its negatives and the logits of its
positives are kept, summed over the ranks, and handed to the loss with autograd. Backward: the derivative of
the loss by those statistics, spread over the chunks. Nothing of the size of batch x classes or classes x D is
made.

The gradient of an embedding needs the softmax only up to a factor of the sample, so it is accumulated
unnormalised in the forward pass, while a chunk of exponentials is still in cache, and scaled when the sums
are known.

Shape legend: N samples of all ranks, P positives of a sample (padded with -1), S rows of the step, R rows of
a chunk, K (sample, positive) pairs whose class this rank owns, D embedding size.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from labelmill.heads.ranks import Ranks
from labelmill.heads.rows import PendingRows, Scratch, StepRows
from labelmill.losses.margins import apply_margin

if TYPE_CHECKING:
    from labelmill.heads.config import HeadConfig

CHUNK_ELEMENTS = 2**20  # logits of a chunk: 4 MiB of float32, so that the passes over it stay near the caches
PAIRS_AT_ONCE = 4096


@dataclass
class GlobalBatch:
    """The batch of this replica's ranks; `lo`, `hi` is this rank's part.

    `weight_sum` is over all replicas; so are `positives_WP`, the labels of samples with weight, if there are
    several replicas.
    """

    x_ND: Tensor
    ids_NP: Tensor
    weight_N: Tensor
    lo: int
    hi: int
    weight_sum: Tensor
    positives_WP: Tensor | None = None


@dataclass
class Pairs:
    """Positives whose class this rank owns, ordered by their place among the step's rows."""

    sample_K: Tensor
    column_K: Tensor
    at_K: Tensor


def chunk_rows(batch: int) -> int:
    """Rows of a chunk for a global batch of that many samples."""
    return min(4096, max(256, CHUNK_ELEMENTS // max(batch, 1)))


def needs_maximum(normalize: bool, scale: float, num_classes: int, dtype: torch.dtype) -> bool:
    """Whether exponentials of the logits may overflow (or all vanish) unless the largest logit is taken off.

    Cosine logits lie in [-scale, scale]: while scale + ln C stays under the exponent's range, neither can
    happen.
    """
    limit = math.log(torch.finfo(dtype).max) - 3.0
    return not normalize or scale + math.log(num_classes) > limit


class HeadPass:
    """What one call of the loss computes and keeps for its backward pass."""

    def __init__(
        self,
        config: HeadConfig,
        w_CD: Tensor,
        rows: StepRows,
        batch: GlobalBatch,
        pairs: Pairs,
        use_max: bool,
        scratch: Scratch,
    ) -> None:
        self.w_CD = w_CD
        self.config, self.rows, self.batch, self.pairs = config, rows, batch, pairs
        self.scratch = scratch
        self.count = batch.x_ND.shape[0]
        self.step = max(1, min(chunk_rows(self.count), len(rows)))
        bounds = [*range(0, len(rows), self.step), len(rows)] if len(rows) else [0]
        self.spans = list(itertools.pairwise(bounds))
        edges = torch.tensor(bounds, device=pairs.at_K.device)
        cuts = torch.searchsorted(pairs.at_K, edges).tolist()
        self.pair_spans = list(itertools.pairwise(cuts))
        self.top_N = batch.x_ND.new_full((self.count,), -torch.inf) if use_max else None
        self.chunk_top: list[Tensor] = []  # the maximum that each chunk's exponentials are relative to
        self.kept: list[Tensor] = []  # exponentials of the first chunks, as many as the memory budget holds
        self.dx_ND: Tensor | None = None
        self.dx_sum: dist.Work | None = None

    # --- forward ----------------------------------------------------------------------------------------

    def forward(self, ranks: Ranks, for_backward: bool) -> Tensor:
        """This replica's part of the weighted mean loss over all ranks, the same scalar on each of its ranks."""
        sims_K, total_N, pull_ND = self._scan(for_backward)
        stats_NQ = total_N.new_zeros(self.count, 1 + self.batch.ids_NP.shape[1])
        if self.top_N is not None:
            own_top_N = self.top_N
            self.top_N = ranks.max_(own_top_N.clone())
            shrink_N = _exp_difference(own_top_N, self.top_N)
            total_N.mul_(shrink_N)
            pull_ND.mul_(shrink_N[:, None])
        stats_NQ[:, 0] = total_N
        stats_NQ[self.pairs.sample_K, 1 + self.pairs.column_K] = sims_K
        ranks.sum_(stats_NQ)
        if not bool(torch.isfinite(stats_NQ).all()):
            raise FloatingPointError("class rows of the head hold NaN or infinite values: lower the learning rate")
        value, by_lse_N, by_sim_NP = self._loss(stats_NQ, for_backward)
        if not for_backward:
            self._release()
            return value
        total_N = stats_NQ[:, 0]
        # dL/dz_j = dL/dlse * e^z_j / total: everything but e^z_j is one number a sample
        self.coefficient_N = torch.where(total_N > 0, by_lse_N / total_N, 0.0).mul_(self.config.scale)
        self.by_sim_K = by_sim_NP[self.pairs.sample_K, self.pairs.column_K]
        self.dx_ND = pull_ND.mul_(self.coefficient_N[:, None])
        for lo in range(0, self.by_sim_K.numel(), PAIRS_AT_ONCE):
            part = slice(lo, lo + PAIRS_AT_ONCE)
            push_KD = self.rows.pick(self.pairs.at_K[part]).mul_(self.by_sim_K[part, None])
            self.dx_ND.index_add_(0, self.pairs.sample_K[part], push_KD)
        # every collective is started in the forward pass, which all ranks take in the same order; this sum
        # travels while the encoder's other losses or the rows' gradient are computed
        self.dx_sum = ranks.sum_later_(self.dx_ND)
        return value

    def _scan(self, for_backward: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Every chunk once.

        Returns: similarity of own pairs (K,), sum of exponentials (N,), their pull on each sample (N, D).
        """
        x_ND = self.batch.x_ND
        sims_K = x_ND.new_empty(self.pairs.at_K.numel())
        total_N, pull_ND = x_ND.new_zeros(self.count), torch.zeros_like(x_ND)
        self.x_DN = (x_ND * self.config.scale).t()
        kept = self._reserve(for_backward)
        for index, (lo, hi) in enumerate(self.spans):
            z_RN = self._piece(index + 1 if index < kept else 0, hi - lo)
            unit_RD = self.rows.chunk(lo, hi)
            first, last = self.pair_spans[index]
            torch.mm(unit_RD, self.x_DN, out=z_RN)
            at, sample = self.pairs.at_K[first:last] - lo, self.pairs.sample_K[first:last]
            sims_K[first:last] = z_RN[at, sample] / self.config.scale
            z_RN[at, sample] = -torch.inf  # a sample's own positives are no negatives of it
            if self.top_N is not None:
                top_N = torch.maximum(self.top_N, z_RN.amax(dim=0))
                shrink_N = _exp_difference(self.top_N, top_N)
                total_N.mul_(shrink_N)
                pull_ND.mul_(shrink_N[:, None])
                self.top_N = top_N
                self._subtract_top_(z_RN, top_N)
            z_RN.exp_()
            total_N.add_(z_RN.sum(dim=0))
            if for_backward:
                pull_ND.addmm_(z_RN.t(), unit_RD)
                if index < kept:
                    self.kept.append(z_RN)
                    if self.top_N is not None:
                        self.chunk_top.append(self.top_N)
        return sims_K, total_N, pull_ND

    def _reserve(self, for_backward: bool) -> int:
        """Takes room for one chunk of logits and for those kept; returns how many are."""
        chunk = self.step * self.count
        budget = int(self.config.memory_mb * 2**20) // self.batch.x_ND.element_size()
        kept = min(len(self.spans), budget // max(chunk, 1)) if for_backward else 0
        self.memory = self.scratch.take("logits", (1 + kept) * chunk, self.batch.x_ND)
        return kept

    def _piece(self, place: int, rows: int) -> Tensor:
        start = place * self.step * self.count
        return self.memory[start : start + rows * self.count].view(rows, self.count)

    def _release(self) -> None:
        self.kept.clear()
        self.scratch.give("logits", self.memory)
        self.rows.release()

    @staticmethod
    def _subtract_top_(z_RN: Tensor, top_N: Tensor) -> None:
        # a sample without any negative so far has top -inf and only -inf logits: leave them, -inf + inf
        # is NaN
        z_RN.sub_(torch.where(torch.isfinite(top_N), top_N, 0.0))

    def _loss(self, stats_NQ: Tensor, for_backward: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Mean loss and its derivatives by the log-sum-exp (N,) and the similarities (N, P)."""
        lse_N = stats_NQ[:, 0].log()
        if self.top_N is not None:
            lse_N = lse_N + torch.where(torch.isfinite(self.top_N), self.top_N, 0.0)
        sim_NP = stats_NQ[:, 1:].clone()
        weight_N = self.batch.weight_N
        mask_NP = (self.batch.ids_NP >= 0) & (weight_N > 0)[:, None]
        with torch.set_grad_enabled(for_backward):
            lse_N.requires_grad_(for_backward)
            sim_NP.requires_grad_(for_backward)
            logits_NP = self.config.scale * apply_margin(sim_NP, self.config.margin)
            loss_N = self.config.loss(lse_N, logits_NP, mask_NP)
            counted_N = torch.where(weight_N > 0, loss_N, 0.0) * weight_N
            value = counted_N.sum() / self.batch.weight_sum.clamp_min(torch.finfo(weight_N.dtype).tiny)
            if not for_backward:
                return value, lse_N, sim_NP
            by_lse_N, by_sim_NP = torch.autograd.grad(value, (lse_N, sim_NP))
        return value.detach(), by_lse_N, by_sim_NP

    # --- backward ---------------------------------------------------------------------------------------

    def backward(self, factor: Tensor, pending: PendingRows) -> Tensor:
        """Adds the rows' gradient to `pending`; returns that of own embeddings; both times `factor`."""
        x_ND = self.batch.x_ND
        places_S = pending.make_room(self.rows.ids_S, self.w_CD)
        scaled_ND = x_ND * self.coefficient_N[:, None]
        for index, (lo, hi) in enumerate(self.spans):
            unit_RD = self.rows.chunk(lo, hi)
            first, last = self.pair_spans[index]
            at, sample = self.pairs.at_K[first:last] - lo, self.pairs.sample_K[first:last]
            by_ND = scaled_ND
            if index < len(self.kept):
                e_RN = self.kept[index]
                if self.top_N is not None:
                    by_ND = scaled_ND * _exp_difference(self.chunk_top[index], self.top_N)[:, None]
            else:
                e_RN = self._exponentials(unit_RD, at, sample)
            grad_RD = torch.mm(e_RN, by_ND)
            for begin in range(0, at.numel(), PAIRS_AT_ONCE):
                part = slice(begin, begin + PAIRS_AT_ONCE)
                weight_K = self.by_sim_K[first:last][part, None]
                grad_RD.index_add_(0, at[part], x_ND[sample[part]].mul_(weight_K))
            pending.add(places_S, lo, hi, self.rows.pull_back_(grad_RD, unit_RD, lo, hi), factor)
        self._release()
        if self.dx_sum is not None:
            self.dx_sum.wait()
        assert self.dx_ND is not None
        return self.dx_ND[self.batch.lo : self.batch.hi] * factor

    def _exponentials(self, unit_RD: Tensor, at: Tensor, sample: Tensor) -> Tensor:
        """A chunk's exponentials again, relative to the maximum over everything."""
        z_RN = self._piece(0, unit_RD.shape[0])
        torch.mm(unit_RD, self.x_DN, out=z_RN)
        z_RN[at, sample] = -torch.inf
        if self.top_N is not None:
            self._subtract_top_(z_RN, self.top_N)
        return z_RN.exp_()


def _exp_difference(lower_N: Tensor, upper_N: Tensor) -> Tensor:
    """e^(lower - upper), 0 where lower is -inf."""
    return torch.where(torch.isfinite(lower_N), (lower_N - upper_N).exp(), 0.0)
