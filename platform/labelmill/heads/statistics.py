"""One forward and backward pass over a rank's class rows, in row statistics.

Forward: logits in chunks of rows; of each sample only sums over its negatives and the logits of its positives are
kept, summed over the ranks in one collective, and handed to the loss with autograd. Backward: the derivative of the
loss by those statistics, spread over the chunks; each chunk's rows move at once where the optimizer step allows it.
Nothing of the size of batch x classes or classes x D is made.

The gradient of an embedding needs the softmax only up to a factor of the sample, so it is accumulated
unnormalised in the forward pass, while a chunk of exponentials is still in cache, and scaled when the sums
are known.

Shape legend: N samples of this replica's ranks, P positives of a sample (padded with -1), S rows of the step, R rows of
a chunk, K (sample, positive) pairs whose class this rank owns, D embedding size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from labelmill.heads.batch import GlobalBatch, NotFiniteError
from labelmill.heads.chunk import exp_difference, keep_best_of_group_, subtract_top_, to_tangent_
from labelmill.heads.plan import Piece, StepPlan
from labelmill.heads.ranks import Ranks
from labelmill.heads.rows import ClassRows, PendingRows, Scratch
from labelmill.losses.classification import Extras
from labelmill.losses.margins import apply_margin

if TYPE_CHECKING:
    from labelmill.heads.config import HeadConfig

LOGITS_OF_CHUNK = 2**17  # they and the rows beside them stay near a core's cache
UPDATE_ELEMENTS = 2**17  # rows x D that are moved at once: row, momentum and gradient together in cache
ACCELERATOR_FACTOR = 256  # there, few large kernels beat small ones
PAIRS_AT_ONCE = 4096


@dataclass
class Pairs:
    """Positives whose class this rank owns, ordered by their place among the step's rows; `row_K` in the shard."""

    sample_K: Tensor
    column_K: Tensor
    at_K: Tensor
    row_K: Tensor


def chunk_rows(batch: int) -> int:
    """Rows of a chunk for a global batch of that many samples."""
    return min(1024, max(256, LOGITS_OF_CHUNK // max(batch, 1)))


def needs_maximum(normalize: bool, scale: float, num_classes: int, dtype: torch.dtype) -> bool:
    """Whether exponentials of the logits may overflow (or all vanish) unless the largest logit is taken off.

    Cosine logits lie in [-scale, scale]: while scale + ln C stays under the exponent's range, neither can
    happen.
    """
    limit = math.log(torch.finfo(dtype).max) - 3.0
    return not normalize or scale + math.log(num_classes) > limit


@dataclass
class Move:
    """What a backward pass needs to move the rows itself: learning rate and the step it belongs to."""

    lr: float
    step: int


class HeadPass:
    """What one call of the loss computes and keeps for its backward pass.

    Args:
        config: the head's.
        rows: of this rank, up to date.
        plan: the rows that take part, grouped by `config.sub_centres`.
        weight_S: importance of each row as a negative, in the order of the plan; None for all 1.
        batch: of this replica.
        pairs: own positives; `at_K` is the place of the class's first row.
        step: optimizer steps taken, for rows that catch up.
    """

    def __init__(
        self,
        config: HeadConfig,
        rows: ClassRows,
        plan: StepPlan,
        weight_S: Tensor | None,
        batch: GlobalBatch,
        pairs: Pairs,
        use_max: bool,
        scratch: Scratch,
        step: int,
    ) -> None:
        self.config, self.rows, self.plan, self.weight_S = config, rows, plan, weight_S
        self.batch, self.pairs, self.scratch, self.step = batch, pairs, scratch, step
        self.count, self.dim = batch.x_ND.shape
        self.loss = config.loss
        self.scale = config.scale / self.loss.temperature
        self.elementwise = self.loss.elementwise
        group = config.sub_centres
        factor = 1 if batch.x_ND.device.type == "cpu" else ACCELERATOR_FACTOR
        # the same chunks in every replica: rows that catch up on their way are rounded chunk by chunk
        most = self.count if batch.whole is None else batch.whole.most
        self.chunk = max(1, min(chunk_rows(most) * factor, plan.total) // group) * group
        self.update_rows = max(1, max(64, UPDATE_ELEMENTS // self.dim) * factor // group) * group
        self.pieces = plan.pieces(self.chunk)
        self.top_N = batch.x_ND.new_full((self.count,), -torch.inf) if use_max and not self.elementwise else None
        self.chunk_top: list[Tensor] = []  # the maximum that each chunk's exponentials are relative to
        self.kept: list[Tensor] = []  # exponentials of the first chunks, as many as the memory budget holds
        self.dx_ND: Tensor | None = None
        self.dx_sum: dist.Work | None = None

    # --- forward ----------------------------------------------------------------------------------------

    def forward(self, ranks: Ranks, for_backward: bool) -> Tensor:
        """This replica's part of the weighted mean loss over all ranks, the same scalar on each of its ranks."""
        sims_K, total_N, pull_ND = self._scan(for_backward)
        extra = 2 if self.loss.needs_sum else 0
        stats_NQ = total_N.new_zeros(self.count, 1 + extra + self.batch.ids_NP.shape[1])
        if self.top_N is not None:
            own_top_N = self.top_N
            self.top_N = ranks.max_(own_top_N.clone())
            shrink_N = exp_difference(own_top_N, self.top_N)
            total_N.mul_(shrink_N)
            pull_ND.mul_(shrink_N[:, None])
        stats_NQ[:, 0] = total_N
        if extra:
            stats_NQ[:, 1:3] = self._sums(sims_K)
        stats_NQ[self.pairs.sample_K, 1 + extra + self.pairs.column_K] = sims_K
        ranks.sum_(stats_NQ)
        if not bool(torch.isfinite(stats_NQ).all()):
            raise NotFiniteError("sums over class rows are not finite")
        value, by_total_N, by_sum_N, by_sim_NP = self._loss(stats_NQ, for_backward)
        if not for_backward:
            self._release()
            return value
        # dL/dz_j is e^z_j (or the slope of the loss's own term) times one number a sample
        self.coefficient_N = by_total_N.mul_(self.scale)
        self.by_sim_K = by_sim_NP[self.pairs.sample_K, self.pairs.column_K]
        self.dx_ND = pull_ND.mul_(self.coefficient_N[:, None])
        self.push_D: Tensor | None = None  # what the sum of logits adds to every row's gradient
        if by_sum_N is not None:
            self._add_sum(by_sum_N.mul_(self.scale))
        for lo in range(0, self.by_sim_K.numel(), PAIRS_AT_ONCE):
            part = slice(lo, lo + PAIRS_AT_ONCE)
            row_K, by_K = self.pairs.row_K[part], self.by_sim_K[part]
            inverse_K = self.rows.inverse(row_K)
            by_K = by_K if inverse_K is None else by_K * inverse_K
            push_KD = self.rows.read(row_K, self.scratch, "positives").mul_(by_K[:, None])
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
        pairs = self.pairs
        edges = torch.tensor([piece.lo for piece in self.pieces] + [self.plan.total], device=x_ND.device)
        self.cuts: list[int] = torch.searchsorted(pairs.at_K, edges).tolist()
        sims_K, total_N, pull_ND = (
            x_ND.new_empty(pairs.at_K.numel()),
            x_ND.new_zeros(self.count),
            torch.zeros_like(x_ND),
        )
        self.mass_D = x_ND.new_zeros(self.dim) if self.loss.needs_sum else None
        self.x_DN = (x_ND * self.scale).t().contiguous()
        ones_R = x_ND.new_ones(self.chunk)
        kept = self._reserve(for_backward)
        for index, piece in enumerate(self.pieces):
            z_RN = self._memory_of(piece, keep=index < kept)
            self.rows.catch_up(piece.where, self.scratch, self.step)
            w_RD = self.rows.read(piece.where, self.scratch, "rows")
            inverse_R = self.rows.inverse(piece.where)
            first, last = self.cuts[index], self.cuts[index + 1]
            self._logits(w_RD, inverse_R, z_RN, pairs, first, last, piece.lo, sims_K)
            filtered_RN = self._filter_(z_RN)
            if self.top_N is not None:
                self._follow_maximum(z_RN, total_N, pull_ND)
            weight_R = None if self.weight_S is None else self.weight_S[piece.lo : piece.hi, None]
            self._terms_(z_RN, weight_R, total_N, ones_R)
            if filtered_RN is not None:
                z_RN.masked_fill_(filtered_RN, 0.0)
            if self.mass_D is not None:
                by_R = ones_R[: len(w_RD)] if inverse_R is None else inverse_R
                self.mass_D.addmv_(w_RD.t(), by_R if weight_R is None else by_R * weight_R[:, 0])
            if for_backward:
                if inverse_R is not None:
                    z_RN.mul_(inverse_R[:, None])
                pull_ND.addmm_(z_RN.t(), w_RD)
                if index < kept:
                    self.kept.append(z_RN)
                    if self.top_N is not None:
                        self.chunk_top.append(self.top_N)
        return sims_K, total_N, pull_ND

    def _logits(
        self,
        w_RD: Tensor,
        inverse_R: Tensor | None,
        z_RN: Tensor,
        pairs: Pairs,
        first: int,
        last: int,
        lo: int,
        sims_K: Tensor | None,
    ) -> None:
        """Logits of a chunk's negatives; those of own positives go to `sims_K`, and -inf to their place."""
        torch.mm(w_RD, self.x_DN, out=z_RN)
        if inverse_R is not None:
            z_RN.mul_(inverse_R[:, None])
        group = self.config.sub_centres
        if group > 1:
            best_1 = keep_best_of_group_(z_RN, group)
            if sims_K is not None and last > first:
                at, sample = pairs.at_K[first:last], pairs.sample_K[first:last]
                best_K = best_1[(at - lo) // group, sample]
                at.add_(best_K)
                pairs.row_K[first:last].add_(best_K)
        if last == first:
            return
        at, sample = pairs.at_K[first:last] - lo, pairs.sample_K[first:last]
        if sims_K is not None:
            sims_K[first:last] = z_RN[at, sample] / self.scale
        z_RN[at, sample] = -torch.inf  # a sample's own positives are no negatives of it

    def _filter_(self, z_RN: Tensor) -> Tensor | None:
        """Negatives that are nearer than the inter-class filter get logit 0; which ones, for they have no gradient."""
        if self.config.class_filter is None:
            return None
        filtered_RN = z_RN > self.config.class_filter * self.scale
        z_RN.masked_fill_(filtered_RN, 0.0)
        return filtered_RN

    def _terms_(self, z_RN: Tensor, weight_R: Tensor | None, total_N: Tensor | None, ones_R: Tensor | None) -> None:
        """Logits -> what a negative's derivative is made of, in place; adds up the negatives' terms."""
        if self.elementwise:
            if total_N is not None:
                term_RN = self.loss.negative_term(z_RN)
                total_N.add_((term_RN if weight_R is None else term_RN * weight_R).sum(dim=0))
            z_RN.copy_(self.loss.negative_slope(z_RN))
        else:
            z_RN.exp_()
        if weight_R is not None:
            z_RN.mul_(weight_R)
        if total_N is not None and not self.elementwise:
            total_N.add_(z_RN.sum(dim=0))

    def _follow_maximum(self, z_RN: Tensor, total_N: Tensor, pull_ND: Tensor) -> None:
        assert self.top_N is not None
        top_N = torch.maximum(self.top_N, z_RN.amax(dim=0))
        shrink_N = exp_difference(self.top_N, top_N)
        total_N.mul_(shrink_N)
        pull_ND.mul_(shrink_N[:, None])
        self.top_N = top_N
        subtract_top_(z_RN, top_N)

    def _reserve(self, for_backward: bool) -> int:
        """Takes room for the logits that are kept and a chunk of those that aren't; returns how many are kept."""
        budget = int(self.config.memory_mb * 2**20) // (self.batch.x_ND.element_size() * max(1, self.count))
        kept = sum(piece.hi <= budget for piece in self.pieces) if for_backward else 0
        self.kept_rows = self.pieces[kept - 1].hi if kept else 0
        spare = self.chunk if kept < len(self.pieces) else 0
        self.memory = self.scratch.take("logits", (self.kept_rows + spare) * self.count, self.batch.x_ND)
        return kept

    def _memory_of(self, piece: Piece, keep: bool) -> Tensor:
        rows = piece.hi - piece.lo
        start = (piece.lo if keep else self.kept_rows) * self.count
        return self.memory[start : start + rows * self.count].view(rows, self.count)

    def _release(self) -> None:
        self.kept.clear()
        self.scratch.give("logits", self.memory)

    def _sums(self, sims_K: Tensor) -> Tensor:
        """Sum of the negatives' logits and their number, (N, 2): all rows of the step less own positives."""
        assert self.mass_D is not None
        out_N2 = sims_K.new_empty(self.count, 2)
        rows = self.plan.total if self.weight_S is None else self.weight_S.sum()
        out_N2[:, 0] = self.batch.x_ND @ self.mass_D * self.scale
        out_N2[:, 1] = rows
        weight_K = torch.ones_like(sims_K) if self.weight_S is None else self.weight_S[self.pairs.at_K]
        out_N2.index_add_(0, self.pairs.sample_K, -torch.stack([sims_K * self.scale * weight_K, weight_K], dim=1))
        return out_N2

    def _add_sum(self, by_sum_N: Tensor) -> None:
        """The derivative by the sum of logits: one vector for all rows, taken back where a row is a positive."""
        assert self.mass_D is not None
        assert self.dx_ND is not None
        self.push_D = by_sum_N @ self.batch.x_ND
        self.dx_ND.addr_(by_sum_N, self.mass_D)
        back_K = by_sum_N[self.pairs.sample_K]
        self.by_sim_K = self.by_sim_K - (back_K if self.weight_S is None else back_K * self.weight_S[self.pairs.at_K])

    def _loss(self, stats_NQ: Tensor, for_backward: bool) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """Mean loss and its derivatives by the negatives' total (N,), by their sum (N,) and by similarities (N, P)."""
        total_N = stats_NQ[:, 0].clone()
        negatives_N = total_N
        if not self.elementwise:
            negatives_N = total_N.log()
            if self.top_N is not None:
                negatives_N = negatives_N + torch.where(torch.isfinite(self.top_N), self.top_N, 0.0)
        width = self.batch.ids_NP.shape[1]
        sim_NP = stats_NQ[:, stats_NQ.shape[1] - width :].clone()
        weight_N = self.batch.weight_N
        mask_NP = (self.batch.ids_NP >= 0) & (weight_N > 0)[:, None]
        sum_N, number_N = (stats_NQ[:, 1].clone(), stats_NQ[:, 2]) if self.loss.needs_sum else (None, None)
        inputs = [negatives_N, sim_NP] if sum_N is None else [negatives_N, sim_NP, sum_N]
        with torch.set_grad_enabled(for_backward):
            for tensor in inputs:
                tensor.requires_grad_(for_backward)
            logits_NP = self.scale * apply_margin(sim_NP, self.config.margin)
            loss_N = self.loss(negatives_N, logits_NP, mask_NP, Extras(sum_N, number_N, self.batch.target_NP))
            counted_N = torch.where(weight_N > 0, loss_N, 0.0) * weight_N
            weight = weight_N.sum() if self.batch.whole is None else self.batch.whole.weight_sum
            value = counted_N.sum() / weight.clamp_min(torch.finfo(weight_N.dtype).tiny)
            if not for_backward:
                return value, negatives_N, sum_N, sim_NP
            grads = torch.autograd.grad(value, inputs, allow_unused=True, materialize_grads=True)
        by_total_N = grads[0] if self.elementwise else torch.where(total_N > 0, grads[0] / total_N, 0.0)
        return value.detach(), by_total_N, grads[2] if sum_N is not None else None, grads[1]

    # --- backward ---------------------------------------------------------------------------------------

    def backward(self, factor: float, pending: PendingRows | None, move: Move | None) -> Tensor:
        """Moves the rows, or adds their gradient to `pending`; returns the gradient of own embeddings.

        Both times `factor`. The embeddings' gradient is multiplied by the caller for other scales.
        """
        places_S = None
        if move is None:
            assert pending is not None
            ids_S = self.plan.ids(self.batch.x_ND.device)
            places_S = pending.make_room(ids_S, len(self.rows), self.batch.x_ND[:0])
        self.x_by_ND = self.batch.x_ND * (self.coefficient_N * factor)[:, None]
        self.by_row_K = self.by_sim_K * factor
        push_D = None if self.push_D is None else self.push_D * factor
        for index, piece in enumerate(self.pieces):
            e_RN, by_ND = self._exponentials(index, piece)
            cut = self.cuts[index]
            for part in piece.parts(self.update_rows):
                w_RD = self.rows.read(part.where, self.scratch, "rows")
                inverse_R = self.rows.inverse(part.where)
                grad_RD = self.scratch.borrow("chunk gradient", tuple(w_RD.shape), self.batch.x_ND)
                torch.mm(e_RN[part.lo - piece.lo : part.hi - piece.lo], by_ND, out=grad_RD)
                cut = self._add_positives(grad_RD, inverse_R, part, cut, self.cuts[index + 1])
                if push_D is not None:
                    self._add_push(grad_RD, inverse_R, push_D, part)
                if inverse_R is not None:
                    to_tangent_(grad_RD, w_RD, inverse_R)
                if move is None:
                    assert pending is not None
                    pending.add(places_S, part.lo, part.hi, grad_RD)
                else:
                    self.rows.move(part.where, w_RD, grad_RD, move.lr, move.step, self.scratch)
        self._release()
        if self.dx_sum is not None:
            self.dx_sum.wait()
        assert self.dx_ND is not None
        return self.dx_ND[self.batch.lo : self.batch.hi]

    def _add_positives(self, grad_RD: Tensor, inverse_R: Tensor | None, part: Piece, cut: int, end: int) -> int:
        """Adds the positives' share to a part's gradient; returns where the next part's begin."""
        if cut == end:
            return cut
        stop = cut + int(torch.searchsorted(self.pairs.at_K[cut:end], part.hi))
        for lo in range(cut, stop, PAIRS_AT_ONCE):
            pick = slice(lo, min(lo + PAIRS_AT_ONCE, stop))
            at, by_K = self.pairs.at_K[pick] - part.lo, self.by_row_K[pick]
            by_K = by_K if inverse_R is None else by_K * inverse_R[at]
            grad_RD.index_add_(0, at, self.batch.x_ND[self.pairs.sample_K[pick]].mul_(by_K[:, None]))
        return stop

    def _add_push(self, grad_RD: Tensor, inverse_R: Tensor | None, push_D: Tensor, part: Piece) -> None:
        by_R = torch.ones_like(grad_RD[:, 0]) if inverse_R is None else inverse_R
        if self.weight_S is not None:
            by_R = by_R * self.weight_S[part.lo : part.hi]
        grad_RD.addr_(by_R, push_D)

    def _exponentials(self, index: int, piece: Piece) -> tuple[Tensor, Tensor]:
        """A chunk's terms, times 1 / length of the row, and the samples they are to be multiplied by."""
        if index < len(self.kept):
            if self.top_N is None:
                return self.kept[index], self.x_by_ND
            return self.kept[index], self.x_by_ND * exp_difference(self.chunk_top[index], self.top_N)[:, None]
        z_RN = self._memory_of(piece, keep=False)
        w_RD = self.rows.read(piece.where, self.scratch, "rows")
        inverse_R = self.rows.inverse(piece.where)
        first, last = self.cuts[index], self.cuts[index + 1]
        self._logits(w_RD, inverse_R, z_RN, self.pairs, first, last, piece.lo, None)
        filtered_RN = self._filter_(z_RN)
        if self.top_N is not None:
            subtract_top_(z_RN, self.top_N)
        self._terms_(z_RN, None if self.weight_S is None else self.weight_S[piece.lo : piece.hi, None], None, None)
        if filtered_RN is not None:
            z_RN.masked_fill_(filtered_RN, 0.0)
        if inverse_R is not None:
            z_RN.mul_(inverse_R[:, None])
        return z_RN, self.x_by_ND
