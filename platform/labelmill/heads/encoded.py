"""The encoded head: its class rows come from an encoder of the labels instead of being parameters.

It stands on the same passes over sharded rows as the parametric head (`statistics`): every rank holds the rows of a range of
labels, a loss sees of each query the log-sum-exp over its negatives and the scores of its positives, and the rows' gradient
is handed back to the label encoder instead of moving the rows. Soft top-k, which needs more than those sums, works on blocks
of queries with the same collectives.

`encode_cached` is the gradient cache (Gao et al., RepL4NLP 2021; Gupta et al., ICLR 2024): labels are encoded in chunks
without a graph; when their gradient is known each chunk is encoded again, with the same random numbers, and differentiated.

Shape legend: B samples of this rank, N of all ranks, P positives of a sample, C labels of this rank, n queries of a block, D
embedding size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from labelmill.data.labels import Labels
from labelmill.encoders.base import Prepared
from labelmill.errors import DataError
from labelmill.heads.batch import GlobalBatch, NotFiniteError, check_batch, class_ids, gather_batch
from labelmill.heads.config import HeadConfig
from labelmill.heads.optim import SGD
from labelmill.heads.ranks import Ranks
from labelmill.heads.rows import ClassRows
from labelmill.heads.sharded import ShardedHead
from labelmill.losses.retrieval import (
    Reduce as Reductions,
)
from labelmill.losses.retrieval import (
    RetrievalLoss,
    SoftTopKSection,
    soft_topk_forward_backward,
    spread_positives,
)


def encoded_head_config(
    loss: RetrievalLoss, normalize: bool = True, temperature: float = 0.05, memory_mb: float = 512.0
) -> HeadConfig:
    """The section of an encoded head: score = similarity / temperature, all labels of the axis take part."""
    rows = {} if isinstance(loss, SoftTopKSection) else {"loss": loss.row_loss()}
    optimizer = SGD(momentum=0.0)
    return HeadConfig(normalize=normalize, scale=1.0 / temperature, memory_mb=memory_mb, optimizer=optimizer, **rows)


class EncodedHead(ShardedHead):
    """This rank's part of a label axis whose rows an encoder gives.

    Args:
        num_classes, dim, seed, group, device, dtype: as of `ShardedHead`.
        loss: of the retrieval family.
        config: from `encoded_head_config`.

    Top-k, saving, export and index work as those of the parametric head, on the rows that were given last.
    """

    def __init__(
        self,
        num_classes: int,
        dim: int,
        loss: RetrievalLoss,
        config: HeadConfig,
        seed: int = 0,
        group: dist.ProcessGroup | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if config.sample_rate < 1 or config.sub_centres > 1 or config.shards or config.rows_dtype != "fp32":
            raise ValueError("an encoded head takes all labels, one row each, split over all ranks, in fp32")
        super().__init__(num_classes, dim, config, seed, group, device, dtype)
        self.retrieval, self._given = loss, False
        self._lent: list[Tensor] = []  # gradients of rows that were handed out since the last loss

    def _first_rows(self) -> ClassRows:
        # pages of memory that nobody has written to take none
        return self._rows_from(torch.empty(self.stop - self.start, self.dim, dtype=self.dtype))

    def _rows_from(self, rows_CD: Tensor) -> ClassRows:
        return ClassRows(rows_CD, self.config.optimizer, self.config.normalize, self.dtype, False, self.seed)

    def topk(self, emb_BD: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """As `ShardedHead.topk`. Raises RuntimeError before any rows were given or loaded."""
        if not self._given:
            raise RuntimeError("the labels have not been encoded yet: give_rows comes first")
        return super().topk(emb_BD, k)

    def take_notes(self, notes: Mapping[str, Any]) -> None:
        super().take_notes(notes)
        self._given = True

    def room_for_rows(self) -> Tensor:
        """Memory (C, D) to encode own labels into: the last rows', unless a save or a pass to be differentiated reads them.

        Freed and asked for anew in every step, blocks of this size leave holes in the heap that the next one just misses.
        """
        if self._open or self.rows.snapshot is not None:
            return torch.empty_like(self.rows.w_CD)
        return self.rows.w_CD

    def give_rows(self, rows_CD: Tensor) -> None:
        """Own labels' embeddings (C, D), kept without a copy. Raises ValueError for another shape or type."""
        rows_CD = rows_CD.detach()
        if rows_CD.shape != (self.stop - self.start, self.dim) or rows_CD.dtype != self.dtype:
            wanted = (self.stop - self.start, self.dim)
            raise ValueError(f"rows {tuple(rows_CD.shape)} of {rows_CD.dtype}: needed are {wanted} of {self.dtype}")
        # another object each time: a pass that is still to be differentiated keeps the rows it has seen
        self.rows = self._drawing.rows = self._rows_from(rows_CD)
        self._given = True

    def encoded_loss(
        self, emb_BD: Tensor, rows_CD: Tensor, labels: Labels | Tensor, target_BP: Tensor | None, weight_B: Tensor
    ) -> Tensor:
        """Weighted mean loss over the batches of all ranks, differentiable in queries and own labels' rows.

        Collective. The gradients of both are multiplied by `grad_scale`: both come from modules that a data-parallel
        engine averages over the ranks.

        Args:
            emb_BD, rows_CD: queries, and own labels [start, stop); any floating type, not normalised.
            labels: all positives of each query.
            target_BP: weights of the positives, 0 for those that this step leaves out; None for 1.
            weight_B: non-negative; 0 leaves a query out.

        Raises (on all ranks alike): as `ShardedHead.loss`; DataError for a query with no fewer labels than k places.
        """
        ids_BP, _ = class_ids(labels, len(emb_BD))
        if target_BP is None:
            target_BP = (ids_BP >= 0).to(self.dtype)
        x_BD = emb_BD.to(self.device, self.dtype)
        rows_CD = rows_CD.to(self.device, self.dtype)
        if self.config.normalize:
            x_BD = torch.nn.functional.normalize(x_BD, dim=1, eps=1e-6)
        args = (ids_BP.to(self.device), weight_B.to(self.device), target_BP.to(self.device))
        if not self._open:  # the label encoder has used what it was lent
            while self._lent:
                self._scratch.give("gradient", self._lent.pop())
        self.give_rows(rows_CD)
        if isinstance(self.retrieval, SoftTopKSection):
            if self.config.normalize:
                rows_CD = torch.nn.functional.normalize(rows_CD, dim=1, eps=1e-6)
            return _SoftTopKLoss.apply(x_BD, rows_CD, self, *args)
        return _EncodedLoss.apply(x_BD, rows_CD, self, *args)

    def begin_step(self, lr: float) -> None:
        """Nothing: rows don't move by themselves."""

    def step(self, lr: float, scale: float = 1.0) -> None:
        """Counts the step."""
        self.zero_pending()
        self.steps += 1

    def _taken_gradient(self) -> Tensor:
        """The rows' gradient of the pass that was just differentiated; the caller's until the next loss."""
        grad_CD = self._pending.grad_UD
        assert grad_CD is not None
        self._lent.append(grad_CD)
        self._pending.ids_U = self._pending.grad_UD = None
        return grad_CD


class _EncodedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_BD: Tensor,
        rows_CD: Tensor,
        head: EncodedHead,
        ids_BP: Tensor,
        weight_B: Tensor,
        target_BP: Tensor,
    ) -> Tensor:
        needed = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        value, work = head._begin(x_BD.detach(), ids_BP, weight_B, target_BP, needed)
        ctx.head, ctx.work = head, work
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_value: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.work is None:
            raise RuntimeError("the head's loss was already differentiated once")
        head = ctx.head
        grad_BD = head._end(ctx.work, grad_value)
        ctx.work = None
        return grad_BD, head._taken_gradient().mul_(head.grad_scale), None, None, None, None


class _SoftTopKLoss(torch.autograd.Function):
    """Gradients are made in the forward pass, a block of queries at a time: no scores are kept."""

    @staticmethod
    def forward(
        ctx: Any,
        x_BD: Tensor,
        rows_CD: Tensor,
        head: EncodedHead,
        ids_BP: Tensor,
        weight_B: Tensor,
        target_BP: Tensor,
    ) -> Tensor:
        same = {"the number of classes": head.num_classes, "the embedding size": head.dim}
        batch = gather_batch(head.ranks, x_BD.detach(), ids_BP, weight_B, target_BP, same)
        check_batch(batch, head.num_classes)
        value, dx_ND, drows_CD = soft_topk_pass(head, batch, rows_CD.detach())
        ctx.head, ctx.lo, ctx.hi = head, batch.lo, batch.hi
        ctx.save_for_backward(dx_ND[batch.lo : batch.hi], drows_CD)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_value: Tensor) -> tuple[Tensor | None, ...]:
        dx_BD, drows_CD = ctx.saved_tensors
        factor = grad_value * ctx.head.grad_scale
        return dx_BD * factor, drows_CD.mul_(factor), None, None, None, None


def soft_topk_pass(head: EncodedHead, batch: GlobalBatch, rows_CD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Loss (a scalar) and gradients of queries (N, D) and own rows (C, D). Collective."""
    section, scale, ranks = head.retrieval, head.config.scale, head.ranks
    assert isinstance(section, SoftTopKSection)
    assert batch.target_NP is not None
    places_N = places_of(section, batch)
    if bool(((places_N >= head.num_classes) & (batch.weight_N > 0)).any()):
        most = float(places_N.max())
        raise DataError(f"soft top-k: 0 < k < number of labels; k is {most:g} and there are {head.num_classes} labels.")
    used_N = (batch.target_NP > 0).sum(dim=1).clamp_min(1)
    total = batch.weight_N.sum().clamp_min(torch.finfo(head.dtype).tiny)
    by_row_N = batch.weight_N / total / used_N
    reduce = Reductions(ranks.sum_, ranks.max_)
    value, dx_ND, drows_CD = batch.x_ND.new_zeros(()), torch.zeros_like(batch.x_ND), torch.zeros_like(rows_CD)
    largest = max(
        count for (count,) in ranks.gather_numbers([len(rows_CD)], rows_CD.device)
    )  # blocks must be equal on all ranks
    at_once = max(1, int(head.config.memory_mb * 2**20) // (6 * rows_CD.element_size() * max(1, largest)))
    for lo in range(0, len(batch.x_ND), at_once):
        part = slice(lo, lo + at_once)
        s_nC = (batch.x_ND[part] * scale) @ rows_CD.t()
        pos_nC, drop_nC = spread_positives(batch.ids_NP[part], batch.target_NP[part], len(rows_CD), head.start)
        s_nC.masked_fill_(drop_nC, -torch.inf)
        loss_n, grad_nC = soft_topk_forward_backward(
            s_nC, pos_nC, places_N[part], section.alpha, by_row_N[part], reduce
        )
        value += (loss_n * by_row_N[part]).sum()
        grad_nC.mul_(scale)
        dx_ND[part] = grad_nC @ rows_CD
        drows_CD.addmm_(grad_nC.t(), batch.x_ND[part])
    if not bool(torch.isfinite(value)):
        raise NotFiniteError("the soft top-k loss is not finite: label rows or queries are too large")
    return value, ranks.sum_(dx_ND), drows_CD


def places_of(section: SoftTopKSection, batch: GlobalBatch) -> Tensor:
    """k of each query (N,): fixed, or the number of its positives (their summed weight, rounded up)."""
    if section.k != "num_pos":
        return batch.x_ND.new_full((len(batch.x_ND),), float(section.k))
    assert batch.target_NP is not None
    return batch.target_NP.sum(dim=1).ceil().clamp_min(1.0)


# --- the gradient cache -------------------------------------------------------------------------------------


def encode_cached(
    encoder: nn.Module, chunks: Sequence[Prepared] | Callable[[int], Prepared], sizes: Sequence[int], out_CD: Tensor
) -> Tensor:
    """Embeddings (C, D) of prepared chunks, as if encoded in one piece: memory of one chunk's activations, two forwards.

    Random numbers (dropout) are those of the first pass when a chunk is encoded again, so that the gradient is exactly that
    of plain autograd over the same chunks. Encoders that change buffers in their forward pass would change them twice.

    Args:
        chunks: the chunks, or a function that prepares chunk i.
        sizes: rows of each.
        out_CD: memory for the embeddings; also says their type and device. One chunk alone, differentiated, doesn't use it.
    """
    give = chunks if callable(chunks) else chunks.__getitem__
    parameters = [p for p in encoder.parameters() if p.requires_grad]
    if not sizes or not parameters or not torch.is_grad_enabled():
        with torch.no_grad():
            return _encode(encoder, give, sizes, out_CD)
    if len(sizes) == 1:
        return encoder(give(0)).to(out_CD.dtype)
    return _Cached.apply(encoder, give, tuple(sizes), [out_CD], *parameters)


def _encode(
    encoder: nn.Module,
    give: Callable[[int], Prepared],
    sizes: Sequence[int],
    out_CD: Tensor,
    before: Callable[[int], None] = lambda index: None,
) -> Tensor:
    """Fills `out_CD`, calling `before` with the number of each chunk first; another tensor of the same memory."""
    lo = 0
    for index, size in enumerate(sizes):
        before(index)
        out_CD[lo : lo + size] = encoder(give(index))
        lo += size
    return out_CD.detach()


class _Cached(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        encoder: nn.Module,
        give: Callable[[int], Prepared],
        sizes: tuple[int, ...],
        out: list[Tensor],
        *parameters: Tensor,
    ) -> Tensor:
        (out_CD,) = out  # in a list: what is returned is no input
        ctx.encoder, ctx.give, ctx.sizes, ctx.parameters, ctx.device = encoder, give, sizes, parameters, out_CD.device
        # all in one piece: a small tensor that stays behind each chunk would split the memory that the next one needs
        ctx.states = [state.new_empty(len(sizes), len(state)) for state in _random_state(out_CD.device)]

        def note(index: int) -> None:
            for state_KS, state in zip(ctx.states, _random_state(out_CD.device), strict=True):
                state_KS[index] = state

        return _encode(encoder, give, sizes, out_CD, note)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_CD: Tensor) -> tuple[Tensor | None, ...]:
        totals: list[Tensor | None] = [None] * len(ctx.parameters)
        after, lo = _random_state(ctx.device), 0
        for index, size in enumerate(ctx.sizes):
            _set_random_state(ctx.device, [state_KS[index].clone() for state_KS in ctx.states])
            with torch.enable_grad():
                emb_RD = ctx.encoder(ctx.give(index))
            part_RD = grad_CD[lo : lo + size].to(emb_RD.dtype)
            grads = torch.autograd.grad(emb_RD, ctx.parameters, part_RD, allow_unused=True)
            for place, grad in enumerate(grads):
                if grad is not None:
                    total = totals[place]
                    totals[place] = grad.clone() if total is None else total.add_(grad)
            lo += size
        _set_random_state(ctx.device, after)
        return (None,) * 4 + tuple(totals)


def _random_state(device: torch.device) -> list[Tensor]:
    """Bytes of the generators that an encoder on the device draws from."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def _set_random_state(device: torch.device, states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    for state in states[1:]:
        torch.cuda.set_rng_state(state, device)


# --- pools --------------------------------------------------------------------------------------------------


def label_pool(ranks: Ranks, ids_BP: Tensor) -> Tensor:
    """The labels that any rank names (U,), ascending; -1 is no label. Collective."""
    width = max(w for (w,) in ranks.gather_numbers([ids_BP.numel()], ids_BP.device))
    mine = ids_BP.new_full((1, width), -1)
    mine[0, : ids_BP.numel()] = ids_BP.reshape(-1)
    pool_U = torch.unique(ranks.gather_rows(mine, [1] * ranks.world))
    return pool_U[pool_U >= 0]


def in_pool(ids_BP: Tensor, pool_U: Tensor) -> Tensor:
    """Places in the pool (B, P), -1 where a label isn't in it."""
    if not pool_U.numel():
        return torch.full_like(ids_BP, -1)
    at_BP = torch.searchsorted(pool_U, ids_BP.clamp_min(0)).clamp_max(len(pool_U) - 1)
    return torch.where((pool_U[at_BP] == ids_BP) & (ids_BP >= 0), at_BP, -1)
