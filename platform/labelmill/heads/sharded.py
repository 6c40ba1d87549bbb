"""The class-sharded head (partial FC): each rank owns the rows of a range of classes.

After An et al., Partial FC (CVPR 2022): positives always take part, of the other classes a uniform sample
does. The loss and both gradients are exact for the classes that take part, whatever the number of ranks.

A head is not an nn.Module on purpose: an engine that wraps a module would average its rows over ranks as if
they were replicas. It has its own gradient buffer and row optimizer:

    loss = head.loss(emb_BD, labels)      # the same global mean on each rank
    loss.backward()                       # gradient of the embeddings; rows collect theirs in the head
    head.step(lr)                         # moves the touched rows

Shape legend: B samples of this rank, N samples of all ranks, P positives of a sample (padded with -1), C
classes of this rank, D embedding size, k results.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from labelmill.errors import DataError
from labelmill.heads import sampling, saving
from labelmill.heads.config import HeadConfig
from labelmill.heads.ranks import Ranks
from labelmill.heads.rows import PendingRows, Scratch, StepRows
from labelmill.heads.snapshot import RowSnapshot
from labelmill.heads.statistics import GlobalBatch, HeadPass, Pairs, needs_maximum
from labelmill.heads.topk import merge_topk, topk_rows

ROWS_AT_ONCE = 4096


class HasIds(Protocol):
    """Labels in batch form, as `labelmill.data.labels.Labels`."""

    @property
    def form(self) -> str: ...

    @property
    def ids_BP(self) -> Tensor: ...


class ShardedHead:
    """This rank's part of a class axis.

    Args:
        num_classes: over all ranks.
        dim: embedding size D.
        config: loss, margin, sampling, row optimizer.
        seed: of the first rows and of the sampled classes.
        group: the ranks that share the axis; the default group when torch.distributed is initialised, else
            one rank.
        dtype: of the rows and of all arithmetic; float32, or float64 for checks.

    Attributes:
        start, stop: the classes that this rank owns; may be empty.
        w_CD: their rows, raw (not unit length).
        state: the optimizer's tensors by name, first axis C.
        steps: optimizer steps taken; selects the sampled classes.
        grad_scale: the gradient of the embeddings is multiplied by this. It is the number of ranks, because a
            data-parallel engine averages over ranks while the loss is already the global mean. The rows' own
            gradient is not affected.
    """

    def __init__(
        self,
        num_classes: int,
        dim: int,
        config: HeadConfig,
        seed: int = 0,
        group: dist.ProcessGroup | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if num_classes < 1 or dim < 1:
            raise ValueError(f"a head needs at least one class and one dimension, got {num_classes} x {dim}")
        self.num_classes, self.dim, self.config, self.seed = num_classes, dim, config, seed
        self.ranks = Ranks(group)
        self.device, self.dtype = torch.device(device), dtype
        self.start, self.stop = sampling.class_range(num_classes, config.block_rows, self.ranks.rank, self.ranks.world)
        self.w_CD = sampling.initial_rows(
            num_classes, dim, config.block_rows, self.start, self.stop, seed, config.init_std, dtype
        ).to(self.device)
        self.state = config.optimizer.state(len(self.w_CD), dim, dtype, self.device)
        self.steps = 0
        self.grad_scale = float(self.ranks.world)
        self._scratch = Scratch()
        self._pending = PendingRows(self._scratch)
        self._use_max = needs_maximum(config.normalize, config.scale, num_classes, dtype)
        self._drawn: tuple[int, Tensor] | None = None  # (step, local rows drawn for it)
        self.snapshot: RowSnapshot | None = None  # of a save that is being written
        # makes the loss differentiable also when the embeddings are not (a frozen encoder)
        self._anchor = torch.zeros((), requires_grad=True)

    def to(self, device: torch.device | str) -> ShardedHead:
        """Moves rows and optimizer state, as `nn.Module.to` does for parameters; before training."""
        self.device = torch.device(device)
        self.w_CD = self.w_CD.to(self.device)
        self.state = {name: tensor.to(self.device) for name, tensor in self.state.items()}
        self._drawn = None
        return self

    def set_rows(self, classes: range | Tensor, rows_KD: Tensor) -> None:
        """Sets rows of own classes, given by global id (imprinting), and forgets their optimizer state.

        Raises ValueError for classes of another rank, or for rows that are not finite or have no direction.
        """
        ids_K = torch.tensor(classes) if isinstance(classes, range) else classes
        ids_K = ids_K.to(self.device)
        if ids_K.numel() and (int(ids_K.min()) < self.start or int(ids_K.max()) >= self.stop):
            raise ValueError(
                f"rank {self.ranks.rank} owns the classes [{self.start}, {self.stop}), not all of {classes}"
            )
        rows_KD = rows_KD.to(self.device, self.dtype)
        if not bool(torch.isfinite(rows_KD).all()) or (self.config.normalize and bool((rows_KD == 0).all(dim=1).any())):
            raise ValueError("class rows must be finite and, for a normalised head, not zero")
        self.protect(torch.unique(ids_K - self.start))
        self.w_CD[ids_K - self.start] = rows_KD
        for tensor in self.state.values():
            tensor[ids_K - self.start] = 0

    # --- training ---------------------------------------------------------------------------------------

    def loss(self, emb_BD: Tensor, labels: HasIds | Tensor, weight_B: Tensor | None = None) -> Tensor:
        """Weighted mean loss over the batches of all ranks: a scalar of the head's dtype, equal on each rank.

        Collective: every rank calls it, with batches of any size (also 0). `backward()` adds the gradient of
            the rows
        to the head and gives the embeddings theirs times `grad_scale`; it must come before `step`.

        Args:
            emb_BD: any floating dtype, not normalised.
            labels: Labels of form single or multi, or int64 class ids, (B,) or (B, P) padded with -1.
            weight_B: non-negative; 0 leaves a sample out (its labels may be empty). All 1 by default.

        Raises (on all ranks alike):
            DataError: a class id out of range, or a sample with weight and no positive; names rank and
                sample.
            FloatingPointError: embeddings or rows that are not finite.
        """
        ids_BP = _class_ids(labels, len(emb_BD)).to(self.device)
        if weight_B is None:
            weight_B = torch.ones(len(emb_BD))
        x_BD = emb_BD.to(self.device, self.dtype)
        if self.config.normalize:
            x_BD = torch.nn.functional.normalize(x_BD, dim=1, eps=1e-6)
        return _HeadLoss.apply(x_BD, self._anchor, self, ids_BP, weight_B.to(self.device))

    def pending_sq_norm(self) -> Tensor:
        """Squared norm of the gradient of this rank's rows, a float64 scalar; sum it over the ranks."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for _, grad_RD in self._pending.chunks(ROWS_AT_ONCE):
            total += grad_RD.square().sum(dtype=torch.float64)
        return total

    def pending_rows(self) -> tuple[Tensor, Tensor]:
        """Global class ids (U,) of the touched rows and their gradient (U, D), a view."""
        grad_UD = self._pending.grad_UD
        if grad_UD is None:
            return torch.empty(0, dtype=torch.int64, device=self.device), self.w_CD[:0]
        local_U = self._pending.ids_U
        local_U = torch.arange(len(grad_UD), device=self.device) if local_U is None else local_U
        return local_U + self.start, grad_UD

    @torch.no_grad()
    def step(self, lr: float, scale: float = 1.0) -> None:
        """Moves the touched rows by their gradient times `scale` (clipping), clears it, counts the step."""
        for local, grad_RD in self._pending.chunks(ROWS_AT_ONCE):
            if scale != 1.0:
                grad_RD.mul_(scale)
            self.protect(local)
            rows_RD = self.w_CD[local]  # a view for a slice, a copy for ids
            state = {name: tensor[local] for name, tensor in self.state.items()}
            self.config.optimizer.update_(rows_RD, grad_RD, state, lr * self.config.lr_multiplier)
            if isinstance(local, Tensor):
                self.w_CD.index_copy_(0, local, rows_RD)
                for name, tensor in self.state.items():
                    tensor.index_copy_(0, local, state[name])
        self._pending.clear()
        self.steps += 1

    def zero_pending(self) -> None:
        """Drops the collected gradient (a skipped step); `steps` stays."""
        self._pending.clear()

    # --- using the rows ---------------------------------------------------------------------------------

    @torch.no_grad()
    def topk(self, emb_BD: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k best classes: scores (B, k), highest first, and class ids (B, k) int64.

        Collective, batches of any size. Scores are cosines, or inner products if the head doesn't normalise;
        equal ones are ordered by class id. Raises ValueError for k > num_classes.
        """
        if not 1 <= k <= self.num_classes:
            raise ValueError(f"k must be between 1 and the number of classes {self.num_classes}, got {k}")
        x_BD = emb_BD.to(self.device, self.dtype)
        if self.config.normalize:
            x_BD = torch.nn.functional.normalize(x_BD, dim=1, eps=1e-6)
        counts = [n for (n,) in self.ranks.gather_numbers([len(x_BD)], self.device)]
        x_ND = self.ranks.gather_rows(x_BD, counts)
        scores_Nk, ids_Nk = topk_rows(x_ND, self.w_CD, k, self.start, normalize_rows=self.config.normalize)
        world, first = self.ranks.world, sum(counts[: self.ranks.rank])
        even = [len(x_ND)] * world
        mine = slice(first, first + len(x_BD))
        scores = self.ranks.gather_rows(scores_Nk, even).view(world, len(x_ND), k)[:, mine]
        ids = self.ranks.gather_rows(ids_Nk, even).view(world, len(x_ND), k)[:, mine]
        # ranks own ascending classes, so that among equal scores the lower class stands first
        return merge_topk(scores.transpose(0, 1).flatten(1), ids.transpose(0, 1).flatten(1), k)

    # --- files ------------------------------------------------------------------------------------------

    def state_tensors(self) -> dict[str, Tensor]:
        """This rank's rows and optimizer state by name, first axis C (views)."""
        return {"rows": self.w_CD, **{f"{self.config.optimizer.kind}.{n}": t for n, t in self.state.items()}}

    def notes(self) -> dict[str, Any]:
        """What a saved head needs besides its tensors, as JSON values; equal on each rank."""
        config = self.config
        return {
            "dim": self.dim,
            "seed": self.seed,
            "steps": self.steps,
            "block_rows": config.block_rows,
            "init_std": config.init_std,
            "normalize": config.normalize,
            "optimizer": config.optimizer.kind,
        }

    def save(self, folder: str | Path) -> dict[str, Any]:
        """Writes own rows and optimizer state; returns this rank's part of the index (`saving.HeadSave`)."""
        return saving.HeadSave(self, folder).write()

    def begin_save(self, folder: str | Path, memory_bytes: int) -> saving.HeadSave:
        """Takes a snapshot now, which a thread can write while training goes on (`saving.HeadSave`)."""
        return saving.HeadSave(self, folder, memory_bytes)

    def protect(self, local: slice | Tensor) -> None:
        """Must be called before local rows or their state change: a save may still have to write them."""
        if self.snapshot is not None:
            self.snapshot.protect(local)

    def load(self, folder: str | Path) -> None:
        """Reads own classes from a head saved by any number of ranks (`saving.load_head`)."""
        saving.load_head(self, folder)

    def take_notes(self, notes: Mapping[str, Any]) -> None:
        """Goes on from a saved head's `notes`, after own rows were replaced."""
        self.steps = int(notes["steps"])
        self._pending.clear()
        self._drawn = None

    def export_rows(self, folder: str | Path, dtype: torch.dtype = torch.float32) -> list[dict[str, Any]]:
        """Writes own rows alone, unit length if the head normalises (`saving.export_rows`)."""
        return saving.export_rows(self, folder, dtype)

    # --- parts of the loss ------------------------------------------------------------------------------

    def _gather(self, x_BD: Tensor, ids_BP: Tensor, weight_B: Tensor) -> GlobalBatch:
        """The batch of all ranks: sizes first, so that they may differ."""
        sizes = self.ranks.gather_numbers([len(x_BD), ids_BP.shape[1]], self.device)
        counts = [count for count, _ in sizes]
        width = max(positives for _, positives in sizes)
        # ids and weights travel together; the weight's bits ride along as one more integer column
        packed = ids_BP.new_full((len(x_BD), width + 1), -1)
        packed[:, : ids_BP.shape[1]] = ids_BP
        packed[:, width] = weight_B.to(torch.float64).view(torch.int64)
        packed = self.ranks.gather_rows(packed, counts)
        lo = sum(counts[: self.ranks.rank])
        weight_N = packed[:, width].contiguous().view(torch.float64).to(self.dtype)
        batch = GlobalBatch(self.ranks.gather_rows(x_BD, counts), packed[:, :width], weight_N, lo, lo + len(x_BD))
        self._check(batch, counts)
        return batch

    def _check(self, batch: GlobalBatch, counts: Sequence[int]) -> None:
        """Every rank sees the whole batch, so every rank raises."""
        if not len(batch.x_ND):
            return
        ids_NP, used_N = batch.ids_NP, batch.weight_N > 0
        if not bool(torch.isfinite(batch.x_ND).all()):
            bad = (~torch.isfinite(batch.x_ND).all(dim=1)).nonzero()[:, 0]
            raise FloatingPointError(f"the embedding of {_where(int(bad[0]), counts)} holds NaN or infinite values")
        if not bool((batch.weight_N >= 0).all()) or not bool(torch.isfinite(batch.weight_N).all()):
            bad = (~((batch.weight_N >= 0) & torch.isfinite(batch.weight_N))).nonzero()[:, 0]
            raise DataError(f"the weight of {_where(int(bad[0]), counts)} is negative or not a number.")
        if ids_NP.numel() and (int(ids_NP.max()) >= self.num_classes or int(ids_NP.min()) < -1):
            row, column = ((ids_NP >= self.num_classes) | (ids_NP < -1)).nonzero()[0].tolist()
            raise DataError(
                f"label {int(ids_NP[row, column])} of {_where(row, counts)} is out of range: class ids run "
                f"from 0 to {self.num_classes - 1} (-1 pads)."
            )
        empty_N = used_N & ~(ids_NP >= 0).any(dim=1)
        if bool(empty_N.any()):
            raise DataError(
                f"{_where(int(empty_N.nonzero()[0]), counts)} has no positive class. Drop such "
                "samples or give them weight 0."
            )

    def _own_pairs(self, batch: GlobalBatch) -> tuple[Pairs, StepRows]:
        """Own positives of samples with weight, and the rows that take part: the drawn ones and these."""
        own_NP = (batch.ids_NP >= self.start) & (batch.ids_NP < self.stop) & (batch.weight_N > 0)[:, None]
        sample_K, column_K = own_NP.nonzero(as_tuple=True)
        local_K = batch.ids_NP[sample_K, column_K] - self.start
        drawn_S = self._drawn_rows()
        ids_S = None if drawn_S is None else torch.unique(torch.cat([drawn_S, local_K]))
        rows = StepRows(self.w_CD, ids_S, self.config.normalize, self._scratch)
        at_K, order_K = torch.sort(rows.locate(local_K))
        return Pairs(sample_K[order_K], column_K[order_K], at_K), rows

    def _drawn_rows(self) -> Tensor | None:
        """Own rows drawn for the coming optimizer step; None for all."""
        if self.config.sample_rate >= 1:
            return None
        if self._drawn is None or self._drawn[0] != self.steps:
            classes = sampling.sampled_classes(self.num_classes, self.config.sample_rate, self.seed, self.steps)
            lo, hi = torch.searchsorted(classes, torch.tensor([self.start, self.stop])).tolist()
            self._drawn = (self.steps, (classes[lo:hi] - self.start).to(self.device))
        return self._drawn[1]

    def _begin(self, x_BD: Tensor, ids_BP: Tensor, weight_B: Tensor, for_backward: bool) -> tuple[Tensor, HeadPass]:
        batch = self._gather(x_BD, ids_BP, weight_B)
        pairs, rows = self._own_pairs(batch)
        work = HeadPass(self.config, self.w_CD, rows, batch, pairs, self._use_max, self._scratch)
        return work.forward(self.ranks, for_backward), work

    def _end(self, work: HeadPass, grad_value: Tensor) -> Tensor:
        return work.backward(grad_value.to(self.dtype), self._pending).mul_(self.grad_scale)


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BD: Tensor, anchor: Tensor, head: ShardedHead, ids_BP: Tensor, weight_B: Tensor) -> Tensor:
        value, work = head._begin(x_BD.detach(), ids_BP, weight_B, ctx.needs_input_grad[1])
        ctx.head, ctx.work = head, work
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_value: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.work is None:
            raise RuntimeError("the head's loss was already differentiated once")
        grad_BD = ctx.head._end(ctx.work, grad_value)
        ctx.work = None
        return grad_BD, None, None, None, None


def _class_ids(labels: HasIds | Tensor, count: int) -> Tensor:
    """(B, P) int64 ids from Labels or a tensor."""
    if isinstance(labels, Tensor):
        ids = labels
    else:
        if labels.form not in ("single", "multi"):
            raise DataError(f"a sharded head trains on labels of form single or multi, not {labels.form}.")
        ids = labels.ids_BP
    ids = ids[:, None] if ids.ndim == 1 else ids
    if ids.dtype != torch.int64:
        raise TypeError(f"class ids must be int64 (narrower types lose large ids), got {ids.dtype}")
    if ids.ndim != 2 or len(ids) != count:
        raise ValueError(f"class ids of shape {tuple(ids.shape)} don't fit {count} embeddings")
    return ids


def _where(index: int, counts: Sequence[int]) -> str:
    """`sample 3 of rank 1's batch`."""
    rank = 0
    while index >= counts[rank]:
        index -= counts[rank]
        rank += 1
    return f"sample {index} of rank {rank}'s batch"
