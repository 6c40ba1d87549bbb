"""Distillation losses on a class-sharded student head: no batch x classes is gathered, and none is kept beyond `memory_mb`.

Each rank has the logits of its own class rows, chunk by chunk, and the teacher's logits of the same classes. A loss adds up
a few numbers of each sample over the chunks, joined over the ranks scan by scan (`labelmill.losses.class_sums`). The
derivative by a chunk's logits then follows from these numbers and the chunk alone; logits that aren't kept are made again.

Shape legend: B samples of this rank, N of all ranks, R rows of a chunk, D embedding width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from labelmill.errors import DataError, JobError
from labelmill.heads.batch import NotFiniteError
from labelmill.heads.chunk import to_tangent_
from labelmill.heads.plan import Piece, StepPlan
from labelmill.heads.precision import matmul_precision
from labelmill.heads.sharded import ShardedHead
from labelmill.heads.statistics import ACCELERATOR_FACTOR, UPDATE_ELEMENTS, chunk_rows
from labelmill.heads.teaching import NoTeacher, Teacher
from labelmill.losses.class_sums import Columns, LogitLoss, Pairs, Part, Sums, joined, shrink, whole

Weighted = Sequence[tuple[float, LogitLoss]]


def distillation_loss(
    head: ShardedHead,
    emb_BD: Tensor,
    losses: Weighted,
    teacher: Teacher | None = None,
    label_B: Tensor | None = None,
    weight_B: Tensor | None = None,
) -> Tensor:
    """sum_i w_i * weighted mean of loss i over the batches of all ranks: a scalar, equal on each rank. Collective.

    Logits are scale * similarity, without margin. Gradients go as those of `ShardedHead.loss`: `backward()` collects the
    rows' in the head (or moves them, after `begin_step`) and gives the embeddings theirs times `grad_scale`. With
    `head.sample_rate` below 1 both softmaxes are over the drawn classes, the labels and the teacher's listed classes.

    Args:
        losses: (weight, loss) pairs; those of weight 0 are left out.
        label_B: int64; -1 for a sample without label.
        weight_B: non-negative, 0 leaves a sample out.

    Raises DataError for a label out of range or missing, JobError for a head that these losses don't work on,
    NotFiniteError for values that aren't finite; on all ranks alike.
    """
    _check_head(head)
    losses = [(weight, loss) for weight, loss in losses if weight]
    count = len(emb_BD)
    label_B = torch.full((count,), -1, dtype=torch.int64) if label_B is None else label_B
    weight_B = torch.ones(count) if weight_B is None else weight_B
    x_BD = emb_BD.to(head.device, head.dtype)
    if head.config.normalize:
        x_BD = torch.nn.functional.normalize(x_BD, dim=1, eps=1e-6)
    return _Distilled.apply(
        x_BD, head._anchor, head, losses, teacher or NoTeacher(), label_B.to(head.device), weight_B.to(head.device)
    )


def _check_head(head: ShardedHead) -> None:
    config = head.config
    if config.margin.kind != "none":
        raise JobError(
            f"head.margin {config.margin.kind!r}: losses against a teacher have no margin; set margin.kind to none."
        )
    if config.sub_centres > 1 or config.importance or (config.sample_rate < 1 and config.sampling.kind == "hard"):
        raise JobError("losses against a teacher take head.sub_centres 1, no head.importance and no hard sampling.")
    if head.grid.replicas.world > 1:
        raise JobError("head.shards: losses against a teacher need all workers in one replica; leave head.shards out.")


class _Distilled(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_BD: Tensor,
        anchor: Tensor,
        head: ShardedHead,
        losses: Weighted,
        teacher: Teacher,
        label_B: Tensor,
        weight_B: Tensor,
    ) -> Tensor:
        with matmul_precision(head.config.matmul):
            work = _Pass(head, losses, teacher, x_BD.detach(), label_B, weight_B)
            value = work.forward(ctx.needs_input_grad[1])
        ctx.work = work if ctx.needs_input_grad[1] else None
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_value: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.work is None:
            raise RuntimeError("the head's loss was already differentiated once")
        with matmul_precision(ctx.work.head.config.matmul):
            grad_BD = ctx.work.backward(float(grad_value))
        ctx.work = None
        return grad_BD, None, None, None, None, None, None


class _Pass:
    """One forward and backward pass; see `distillation_loss`."""

    def __init__(
        self, head: ShardedHead, losses: Weighted, teacher: Teacher, x_BD: Tensor, label_B: Tensor, weight_B: Tensor
    ) -> None:
        self.head, self.losses, self.ranks = head, losses, head.ranks
        ranks = self.ranks
        self.counts = [n for (n,) in ranks.gather_numbers([len(x_BD)], head.device)]
        self.x_ND = ranks.gather_rows(x_BD, self.counts)
        self.label_N = ranks.gather_rows(label_B, self.counts)
        self.weight_N = ranks.gather_rows(weight_B.to(head.dtype), self.counts)
        if not bool(torch.isfinite(self.x_ND).all()):
            raise NotFiniteError("embeddings hold NaN or infinite values")
        self._check_labels()
        self.teacher = teacher.gather(ranks, self.counts, head)
        head.rows.refresh()
        self.plan = self._plan()
        self.classes = sum(n for (n,) in ranks.gather_numbers([self.plan.total], head.device))
        self._cut()
        self.kept: dict[int, Tensor] = {}
        self.budget = int(head.config.memory_mb * 2**20) // (self.x_ND.element_size() * max(1, len(self.x_ND)))
        self.known: list[Sums] = [{} for _ in losses]
        # what values may look at: nothing of single classes
        nothing = self.x_ND.new_empty(len(self.x_ND), 0)
        self.whole = replace(whole(nothing, nothing, None, self.weight_N, None), **self._shared())

    def _check_labels(self) -> None:
        live_N = self.weight_N > 0
        if live_N.any() and int(self.label_N[live_N].max()) >= self.head.num_classes:
            bad = int(self.label_N[live_N].max())
            raise DataError(f"class id {bad} is beyond the {self.head.num_classes} classes.")
        if any(loss.needs_label for _, loss in self.losses) and bool((self.label_N[live_N] < 0).any()):
            kinds = [getattr(loss, "kind", "") for _, loss in self.losses if loss.needs_label]
            raise DataError(f"loss {kinds[0]} takes a label of each sample, and some have none.")

    def _plan(self) -> StepPlan:
        head = self.head
        sure = [self.label_N[(self.weight_N > 0) & (self.label_N >= 0)]]
        if self.teacher.listed is not None:
            sure.append(self.teacher.listed.ids_Nk.flatten())
        ids = torch.unique(torch.cat(sure))
        mine = ids[(ids >= head.start) & (ids < head.stop)] - head.start
        sample = torch.zeros_like(mine)
        plan, _ = head._drawing.plan(head.grid, self.x_ND, sample, mine, mine, head.seed, head.steps)
        return plan

    def _cut(self) -> None:
        """The step's rows in chunks, and which chunk has whose label and listed classes."""
        # a loss works in several matrices of a chunk's size
        factor = 1 if self.x_ND.device.type == "cpu" else ACCELERATOR_FACTOR // 8
        self.pieces = self.plan.pieces(max(1, min(chunk_rows(len(self.x_ND)) * factor, self.plan.total)))
        self.update_rows = max(64, UPDATE_ELEMENTS // self.head.dim) * factor
        live_N = self.weight_N > 0
        self.own = self._pairs(torch.where(live_N, self.label_N, -1)[:, None])
        listed = self.teacher.listed
        self.named = self._pairs(self.label_N[:, None][:, :0] if listed is None else listed.ids_Nk)

    def _pairs(self, ids_NP: Tensor) -> list[Pairs]:
        """Own classes among these, chunk by chunk."""
        head = self.head
        sample_P, place_P = ((ids_NP >= head.start) & (ids_NP < head.stop)).nonzero(as_tuple=True)
        at_P, order_P = torch.sort(self.plan.locate(ids_NP[sample_P, place_P] - head.start))
        sample_P, place_P = sample_P[order_P], place_P[order_P]
        edges = torch.tensor([piece.lo for piece in self.pieces] + [self.plan.total], device=at_P.device)
        cuts = torch.searchsorted(at_P, edges).tolist()
        return [
            Pairs(sample_P[a:b], at_P[a:b] - piece.lo, place_P[a:b])
            for piece, a, b in zip(self.pieces, cuts, cuts[1:], strict=False)
        ]

    # --- chunks -----------------------------------------------------------------------------------------

    def _logits(self, index: int, piece: Piece) -> Tensor:
        """s_NR of a chunk; the first chunks' are kept, as many as fit the memory."""
        if index in self.kept:
            return self.kept[index]
        head = self.head
        head.rows.catch_up(piece.where, head._scratch, head.steps)
        w_RD = head.rows.read(piece.where, head._scratch, "rows")
        keep = piece.hi <= self.budget
        shape = (len(self.x_ND), len(w_RD))
        s_NR = self.x_ND.new_empty(shape) if keep else head._scratch.borrow("student logits", shape, self.x_ND)
        torch.mm(self.x_ND, w_RD.T, out=s_NR)
        inverse_R = head.rows.inverse(piece.where)
        s_NR *= head.config.scale if inverse_R is None else head.config.scale * inverse_R
        if keep:
            self.kept[index] = s_NR
        return s_NR

    def _room(self, i: int, columns: int) -> Callable[[int], Tensor]:
        """The matrices of loss i, (N, columns)."""
        shape = (len(self.x_ND), columns)
        return lambda number: self.head._scratch.borrow(f"loss {i} {number}", shape, self.x_ND)

    def _shared(self) -> dict[str, Any]:
        return {"weight_N": self.weight_N, "num_classes": self.classes, "listed": self.teacher.listed}

    def _parts(self) -> Iterator[tuple[Piece, Part]]:
        needs = any(loss.needs_teacher for _, loss in self.losses)
        hole_N = self.weight_N <= 0
        holes, shared = bool(hole_N.any()), self._shared()
        for index, piece in enumerate(self.pieces):
            t_NR = self.teacher.logits(piece.where, self.head._scratch) if needs else None
            if t_NR is not None and holes:
                t_NR = t_NR.masked_fill(hole_N[:, None], 0.0)  # of a hole it may be anything
            yield piece, Part(self._logits(index, piece), t_NR, self.own[index], self.named[index], **shared)

    # --- forward ----------------------------------------------------------------------------------------

    def forward(self, for_backward: bool) -> Tensor:
        for number in range(max((loss.scans for _, loss in self.losses), default=0)):
            self._scan(number)
        live_N, total = self.weight_N > 0, self.x_ND.new_zeros(())
        share_N = self.weight_N / self.weight_N.sum().clamp_min(torch.finfo(self.x_ND.dtype).tiny)
        for (factor, loss), known in zip(self.losses, self.known, strict=True):
            total += factor * (torch.where(live_N, loss.value(known, self.whole), 0.0) * share_N).sum()
        if for_backward:
            self.by_N1 = share_N[:, None]
            dx_ND = torch.zeros_like(self.x_ND)
            for piece, slope_NR in self._slopes():
                dx_ND.addmm_(slope_NR, self.head.rows.read(piece.where, self.head._scratch, "rows"))
            self.dx_ND, self.dx_sum = dx_ND, self.ranks.sum_later_(dx_ND)  # travels beside what the encoder computes
        return total

    def _scan(self, number: int) -> None:
        """Scan `number` of every loss over all chunks and ranks."""
        at = self._columns()
        found: list[list[Sums]] = [[] for _ in self.losses]
        wanted = [i for i, (_, loss) in enumerate(self.losses) if number < loss.scans]
        for part in (part for _, part in self._parts()) if self.pieces else (self.whole,):
            for i in wanted:
                part = replace(part, room=self._room(i, part.s_NR.shape[1]))
                found[i].append(self.losses[i][1].scan(number, part, at[i]))
        own = [joined(parts, self.losses[i][1].relative) if parts else {} for i, parts in enumerate(found)]
        self._join(own)
        for i in wanted:
            if not all(bool(torch.isfinite(v).all()) for v in own[i].values()):
                raise NotFiniteError("sums over class rows are not finite")
            self.known[i] |= own[i]
            self.known[i] |= self.losses[i][1].conclude(number, self.known[i], self.whole)

    def _columns(self) -> list[Columns]:
        return [Columns(known, self.x_ND) for known in self.known]

    def _join(self, found: list[Sums]) -> None:
        """The sums of all ranks: maxima in one collective, everything else in another."""
        if self.ranks.world == 1:
            return
        relative = [loss.relative for _, loss in self.losses]
        names = [(i, name) for i, sums in enumerate(found) for name in sums]
        tops = [(i, name) for i, name in names if name in relative[i].values()]
        before = [dict(sums) for sums in found]
        self._reduce(self.ranks.max_, found, tops)
        for i, name in names:
            if name in relative[i]:
                found[i][name] = found[i][name] * shrink(before[i], found[i], relative[i][name])
        self._reduce(self.ranks.sum_, found, [place for place in names if place not in tops])

    def _reduce(self, join: Callable[[Tensor], Tensor], found: list[Sums], places: list[tuple[int, str]]) -> None:
        if not places:
            return
        flat = torch.cat([found[i][name].reshape(-1) for i, name in places])
        join(flat)
        parts = flat.split([found[i][name].numel() for i, name in places])
        for (i, name), part in zip(places, parts, strict=True):
            found[i][name] = part.view_as(found[i][name])

    def _slopes(self) -> Iterator[tuple[Piece, Tensor]]:
        """Derivative of the scalar by x @ w of each chunk, (N, R)."""
        scale, at = self.head.config.scale, self._columns()
        by_N1 = [factor * self.by_N1 for factor, _ in self.losses]
        for piece, part in self._parts():
            slope_NR: Tensor | None = None
            for i, (_, loss) in enumerate(self.losses):
                part = replace(part, room=self._room(i, part.s_NR.shape[1]))
                more_NR = loss.slope(part, at[i], by_N1[i])
                slope_NR = more_NR if slope_NR is None else slope_NR.add_(more_NR)
            slope_NR = torch.zeros_like(part.s_NR) if slope_NR is None else slope_NR
            inverse_R = self.head.rows.inverse(piece.where)
            yield piece, slope_NR.mul_(scale if inverse_R is None else scale * inverse_R)

    # --- backward ---------------------------------------------------------------------------------------

    def backward(self, factor: float) -> Tensor:
        """Moves the rows or collects their gradient; returns that of own embeddings."""
        head = self.head
        rows, scratch = head.rows, head._scratch
        by_ND = self.x_ND * (factor / head.loss_scale)
        alone = head._pending.grad_UD is None and head._moved is None and not len(head._open)
        lr = head._move_lr if alone and factor == 1.0 and head.loss_scale == 1.0 else None
        places_S = None
        if lr is None:
            places_S = head._pending.make_room(self.plan.ids(self.x_ND.device), len(rows), self.x_ND[:1])
        for piece, slope_NR in self._slopes():
            for part in piece.parts(self.update_rows):
                w_RD, inverse_R = rows.read(part.where, scratch, "rows"), rows.inverse(part.where)
                grad_RD = scratch.borrow("chunk gradient", tuple(w_RD.shape), self.x_ND)
                torch.mm(slope_NR[:, part.lo - piece.lo : part.hi - piece.lo].T, by_ND, out=grad_RD)
                if inverse_R is not None:
                    to_tangent_(grad_RD, w_RD, inverse_R)
                if lr is None:
                    head._pending.add(places_S, part.lo, part.hi, grad_RD)
                else:
                    rows.move(part.where, w_RD, grad_RD, lr * head.config.lr_multiplier, head.steps, scratch)
        if lr is not None:
            head._moved = lr
        self.kept.clear()
        if self.dx_sum is not None:
            self.dx_sum.wait()
        lo = sum(self.counts[: self.ranks.rank])
        return self.dx_ND[lo : lo + self.counts[self.ranks.rank]] * (head.grad_scale * factor)
