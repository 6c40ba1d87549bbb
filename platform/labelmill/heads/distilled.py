"""Distillation losses on a class-sharded student head: no batch x classes is gathered, and none is kept beyond `memory_mb`.

Each rank has the logits of its own class rows, chunk by chunk, and the teacher's logits of the same classes. A loss adds up
a few numbers of each sample over the chunks, joined over the ranks level by level (`labelmill.losses.distillation`). The
gradient of a chunk's logits then follows from the derivative of the loss by those numbers, by autograd within the chunk.

Shape legend: B samples of this rank, N of all ranks, R rows of a chunk, D embedding width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from labelmill.errors import DataError, JobError
from labelmill.heads.batch import NotFiniteError
from labelmill.heads.chunk import to_tangent_
from labelmill.heads.plan import Piece, StepPlan
from labelmill.heads.sharded import ShardedHead
from labelmill.heads.statistics import chunk_rows
from labelmill.heads.teaching import NoTeacher, Teacher
from labelmill.losses.distillation import Level, LogitLoss, Part

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
        work = _Pass(head, losses, teacher, x_BD.detach(), label_B, weight_B)
        value = work.forward(ctx.needs_input_grad[1])
        ctx.work = work if ctx.needs_input_grad[1] else None
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_value: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.work is None:
            raise RuntimeError("the head's loss was already differentiated once")
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
        self.pieces = self.plan.pieces(max(1, min(chunk_rows(len(self.x_ND)), self.plan.total)))
        self.kept: dict[int, Tensor] = {}
        self.budget = int(head.config.memory_mb * 2**20) // (self.x_ND.element_size() * max(1, len(self.x_ND)))
        self.known: list[dict[str, Tensor]] = [{} for _ in losses]
        self.slopes: list[dict[str, Tensor]] = [{} for _ in losses]

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

    # --- chunks -----------------------------------------------------------------------------------------

    def _local(self, piece: Piece) -> Tensor:
        where = piece.where
        if isinstance(where, Tensor):
            return where
        return torch.arange(where.start, where.stop, where.step or 1, device=self.x_ND.device)

    def _logits(self, index: int, piece: Piece) -> Tensor:
        """z_NR of a chunk; the first chunks' are kept, as many as fit the memory."""
        if index in self.kept:
            return self.kept[index]
        head = self.head
        head.rows.catch_up(piece.where, head._scratch, head.steps)
        w_RD = head.rows.read(piece.where, head._scratch, "rows")
        z_NR = self.x_ND @ w_RD.T
        inverse_R = head.rows.inverse(piece.where)
        z_NR *= head.config.scale if inverse_R is None else head.config.scale * inverse_R
        if piece.hi <= self.budget:
            self.kept[index] = z_NR
        return z_NR

    def _parts(self, grad: bool) -> Iterator[tuple[Piece, Part]]:
        live_N = self.weight_N > 0
        for index, piece in enumerate(self.pieces):
            local_R = self._local(piece)
            ids_R = local_R + self.head.start
            s_NR = self._logits(index, piece).detach()
            s_NR = s_NR.clone().requires_grad_() if grad else s_NR
            needs = any(loss.needs_teacher for _, loss in self.losses)
            t_NR = self.teacher.logits(local_R) if needs else None
            if t_NR is not None:
                t_NR = torch.where(live_N[:, None], t_NR, 0.0)  # of a hole it may be anything
            own_NR = self.label_N[:, None] == ids_R
            yield piece, Part(s_NR, t_NR, own_NR, ids_R, self.weight_N, self.classes, self.teacher.listed)

    def _whole(self) -> Part:
        """What values may look at: nothing of single classes."""
        none = self.x_ND.new_empty(len(self.x_ND), 0)
        ids = self.label_N[:0]
        return Part(none, none, none > 0, ids, self.weight_N, self.classes, self.teacher.listed)

    # --- forward ----------------------------------------------------------------------------------------

    def forward(self, for_backward: bool) -> Tensor:
        with torch.no_grad():
            for number in range(max((loss.levels for _, loss in self.losses), default=0)):
                self._join(number)
        value = self._value(for_backward)
        if not for_backward:
            return value
        for number in reversed(range(1, max((loss.levels for _, loss in self.losses), default=0))):
            self._pull_back(number)
        dx_ND = torch.zeros_like(self.x_ND)
        for piece, slope_NR in self._slopes():
            dx_ND.addmm_(slope_NR, self.head.rows.read(piece.where, self.head._scratch, "rows"))
        self.dx_ND = self.ranks.sum_(dx_ND)
        return value

    def _join(self, number: int) -> None:
        """Level `number` of every loss over all chunks and ranks."""
        empty = self._empty(number)
        found = [{name: t.clone() for name, t in (*level.tops.items(), *level.sums.items())} for level in empty]
        for _, part in self._parts(grad=False):
            for i, (_, loss) in enumerate(self.losses):
                if number >= loss.levels:
                    continue
                level = loss.level(number, part, self.known[i])
                for name, top in level.tops.items():
                    torch.maximum(found[i][name], top, out=found[i][name])
                for name, total in level.sums.items():
                    found[i][name] += total
        self._reduce(found, [set(level.tops) for level in empty])
        for i, values in enumerate(found):
            if not all(bool(torch.isfinite(v).all()) for v in values.values()):
                raise NotFiniteError("sums over class rows are not finite")
            self.known[i] |= values

    def _empty(self, number: int) -> list[Level]:
        """What no class at all gives: the shapes, zeros and lowest maxima."""
        part, nothing = self._whole(), Level({}, {})
        return [
            loss.level(number, part, self.known[i]) if number < loss.levels else nothing
            for i, (_, loss) in enumerate(self.losses)
        ]

    def _reduce(self, found: list[dict[str, Tensor]], tops: list[set[str]]) -> None:
        """Maxima in one collective, sums in another."""
        for wanted, join in ((True, self.ranks.max_), (False, self.ranks.sum_)):
            chosen = [v for i, values in enumerate(found) for n, v in values.items() if (n in tops[i]) == wanted]
            if not chosen or self.ranks.world == 1:
                continue
            flat = torch.cat([v.reshape(-1) for v in chosen])
            join(flat)
            lo = 0
            for v in chosen:
                v.copy_(flat[lo : lo + v.numel()].view_as(v))
                lo += v.numel()

    def _value(self, for_backward: bool) -> Tensor:
        """The scalar, and its derivative by every sum."""
        part, live_N = self._whole(), self.weight_N > 0
        total = self.x_ND.new_zeros(())
        weight = self.weight_N.sum().clamp_min(torch.finfo(self.x_ND.dtype).tiny)
        leaves: list[tuple[int, str, Tensor]] = []
        with torch.set_grad_enabled(for_backward):
            for i, (factor, loss) in enumerate(self.losses):
                state = {name: v.detach().requires_grad_(for_backward) for name, v in self.known[i].items()}
                leaves += [(i, name, v) for name, v in state.items()]
                loss_N = loss.value(state, part)
                total = total + factor * (torch.where(live_N, loss_N, 0.0) * self.weight_N).sum() / weight
            if for_backward and leaves:
                grads = torch.autograd.grad(total, [v for _, _, v in leaves], allow_unused=True)
                for (i, name, _), grad in zip(leaves, grads, strict=True):
                    if grad is not None:
                        self.slopes[i][name] = grad
        return total.detach()

    def _pull_back(self, number: int) -> None:
        """The derivative by sums of earlier levels that goes through level `number`."""
        gathered: list[dict[str, Tensor]] = [{} for _ in self.losses]
        for i, (_, loss) in enumerate(self.losses):
            if number not in loss.pulls_back:
                continue
            for name, value in self.known[i].items():
                gathered[i][name] = torch.zeros_like(value)
        if not any(gathered):
            return
        for _, part in self._parts(grad=False):
            for i, (_, loss) in enumerate(self.losses):
                if not gathered[i]:
                    continue
                with torch.enable_grad():
                    state = {name: v.detach().requires_grad_() for name, v in self.known[i].items()}
                    total = self._total(loss.level(number, part, state).sums, i)
                    if total is None:
                        continue
                    grads = torch.autograd.grad(total, list(state.values()), allow_unused=True)
                for name, grad in zip(state, grads, strict=True):
                    if grad is not None:
                        gathered[i][name] += grad
        self._reduce(gathered, [set() for _ in gathered])
        for i, values in enumerate(gathered):
            for name, grad in values.items():
                self.slopes[i][name] = self.slopes[i].get(name, 0.0) + grad

    def _total(self, sums: Any, i: int) -> Tensor | None:
        terms = [(self.slopes[i][name] * v).sum() for name, v in sums.items() if name in self.slopes[i]]
        terms = [term for term in terms if term.requires_grad]
        return sum(terms[1:], terms[0]) if terms else None

    def _slopes(self) -> Iterator[tuple[Piece, Tensor]]:
        """Derivative of the scalar by x @ w of each chunk, (N, R)."""
        scale = self.head.config.scale
        for piece, part in self._parts(grad=True):
            with torch.enable_grad():
                terms = []
                for i, (_, loss) in enumerate(self.losses):
                    for number in range(loss.levels):
                        term = self._total(loss.level(number, part, self.known[i]).sums, i)
                        terms += [] if term is None else [term]
                (slope_NR,) = (
                    torch.autograd.grad(sum(terms[1:], terms[0]), part.s_NR)
                    if terms
                    else (torch.zeros_like(part.s_NR),)
                )
            inverse_R = self.head.rows.inverse(piece.where)
            yield piece, slope_NR * (scale if inverse_R is None else scale * inverse_R)

    # --- backward ---------------------------------------------------------------------------------------

    def backward(self, factor: float) -> Tensor:
        """Moves the rows or collects their gradient; returns that of own embeddings."""
        head = self.head
        rows, scratch = head.rows, head._scratch
        by = factor / head.loss_scale
        alone = head._pending.grad_UD is None and head._moved is None and not len(head._open)
        lr = head._move_lr if alone and factor == 1.0 and head.loss_scale == 1.0 else None
        places_S = None
        if lr is None:
            places_S = head._pending.make_room(self.plan.ids(self.x_ND.device), len(rows), self.x_ND[:1])
        for piece, slope_NR in self._slopes():
            w_RD, inverse_R = rows.read(piece.where, scratch, "rows"), rows.inverse(piece.where)
            grad_RD = slope_NR.T @ self.x_ND * by
            if inverse_R is not None:
                to_tangent_(grad_RD, w_RD, inverse_R)
            if lr is None:
                head._pending.add(places_S, piece.lo, piece.hi, grad_RD)
            else:
                rows.move(piece.where, w_RD, grad_RD, lr * head.config.lr_multiplier, head.steps, scratch)
        if lr is not None:
            head._moved = lr
        self.kept.clear()
        lo = sum(self.counts[: self.ranks.rank])
        return self.dx_ND[lo : lo + self.counts[self.ranks.rank]] * (head.grad_scale * factor)
