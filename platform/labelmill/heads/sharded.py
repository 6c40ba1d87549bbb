"""The class-sharded head (partial FC): each rank owns the rows of a range of classes.

After An et al., Partial FC (CVPR 2022): positives always take part, of the other classes a uniform sample
does. The loss and both gradients are exact for the classes that take part, whatever the number of ranks.

A head is not an nn.Module on purpose: an engine that wraps a module would average its rows over ranks as if
they were replicas. It has its own gradient buffer and row optimizer:

    loss = head.loss(emb_BD, labels)      # the same global mean on each rank
    loss.backward()                       # gradient of the embeddings; rows collect theirs in the head
    head.step(lr)                         # moves the touched rows

With `head.shards` below the number of ranks, these are laid out as replicas x shards (`ranks.Grid`): each
replica holds all classes and works on its own part of the batch. The drawn classes and the positives of the
whole batch take part in every replica, and the rows' gradient is summed over the replicas, so the layout
changes no result.

Where a step has one loss and nothing scales its gradient afterwards, `head.begin_step(lr)` before the loss lets the
backward pass move each chunk of rows while it is in cache; no gradient of the rows is stored then. Replicas have to
sum their gradients first, so with several of them the step goes the ordinary way.

Shape legend: B samples of this rank, N samples of all ranks, P positives of a sample (padded with -1), C
classes of this rank, D embedding size, k results.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from labelmill.errors import DataError
from labelmill.heads import sampling, saving
from labelmill.heads.batch import (
    HasIds,
    NotFiniteError,
    check_batch,
    class_ids,
    first_error,
    gather_batch,
    gather_queries,
    gather_replica,
    locate,
)
from labelmill.heads.config import HeadConfig
from labelmill.heads.drawing import Drawing
from labelmill.heads.precision import matmul_precision
from labelmill.heads.ranks import lay_grid
from labelmill.heads.rows import ROWS_AT_ONCE, ClassRows, PendingRows, Scratch
from labelmill.heads.statistics import HeadPass, Move, Pairs, needs_maximum
from labelmill.heads.topk import topk_sharded
from labelmill.losses.classification import SampleError


class ShardedHead:
    """This rank's part of a class axis.

    Args:
        num_classes: over all ranks.
        dim: embedding size D.
        config: loss, margin, sampling, row optimizer.
        seed: of the first rows and of the sampled classes.
        group: the ranks of the head; the default group when torch.distributed is initialised, else one rank.
        dtype: of the rows and of all arithmetic; float32, or float64 for checks.

    Attributes:
        grid: the layout of the ranks; `ranks` are those that split the class axis.
        start, stop: the classes that this rank owns; may be empty. Each replica owns all of them once.
        w_CD: their rows, raw (not unit length); `sub_centres` rows a class, one after the other.
        state: the optimizer's tensors by name, first axis as that of `w_CD`.
        steps: optimizer steps taken; selects the sampled classes.
        draw: which sample of the classes a step takes: losses of one step with other numbers have other negatives.
        grad_scale: the gradient of the embeddings is multiplied by this. It is the number of ranks, because a
            data-parallel engine averages over ranks while the loss is already the global mean. The rows' own
            gradient is not affected.
        loss_scale: what the loss is multiplied by before `backward`, to keep half-precision gradients of the encoder
            from vanishing. The rows' gradient is divided by it again.
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
        self.grid = lay_grid(group, config.shards)
        self.ranks = self.grid.shards
        self.device, self.dtype = torch.device(device), dtype
        self.start, self.stop = sampling.class_range(num_classes, config.block_rows, self.ranks.rank, self.ranks.world)
        self.rows = self._first_rows()
        self.steps = 0
        self.draw = 0
        self.grad_scale = float(self.grid.world.world)
        self.loss_scale = 1.0
        self._scratch = Scratch()
        self._pending = PendingRows(self._scratch)
        self._use_max = needs_maximum(config.normalize, config.scale / config.loss.temperature, num_classes, dtype)
        self._drawing = Drawing(config, num_classes, self.start, self.stop, self.rows)
        self._move_lr: float | None = None  # the coming backward pass may move the rows, with this rate
        self._moved: float | None = None  # it has
        self._summed = False  # the pending gradient is the sum over the replicas
        self._open: weakref.WeakSet[HeadPass] = weakref.WeakSet()  # losses that may still be differentiated
        # makes the loss differentiable also when the embeddings are not (a frozen encoder)
        self._anchor = torch.zeros((), requires_grad=True)

    def _first_rows(self) -> ClassRows:
        config, group = self.config, self.config.sub_centres
        narrow = config.rows_dtype != "fp32"
        if narrow and self.dtype != torch.float32:
            raise ValueError(f"rows_dtype {config.rows_dtype!r} goes with float32 arithmetic, not {self.dtype}")
        rows = sampling.initial_rows(
            self.num_classes,
            self.dim * group,
            config.block_rows,
            self.start,
            self.stop,
            self.seed,
            config.init_std,
            torch.bfloat16 if narrow else self.dtype,
        )
        w_CD = rows.view(-1, self.dim).to(self.device)
        master = config.rows_dtype == "bf16+master"
        return ClassRows(w_CD, config.optimizer, config.normalize, self.dtype, master, self.seed + self.ranks.rank)

    @property
    def w_CD(self) -> Tensor:
        return self.rows.w_CD

    @property
    def state(self) -> dict[str, Tensor]:
        return self.rows.state

    def to(self, device: torch.device | str) -> ShardedHead:
        """Moves rows and optimizer state, as `nn.Module.to` does for parameters; before training."""
        self.device = torch.device(device)
        self.rows.to(self.device)
        self._drawing.forget()
        return self

    @torch.no_grad()
    def set_rows(self, classes: range | Tensor, rows_KD: Tensor) -> None:
        """Sets rows of own classes, given by global id (imprinting), and forgets their optimizer state.

        With sub-centres `rows_KD` is (K, centres, D), or (K, D): then all centres of a class start from its row, each
        a little beside it.

        Raises ValueError for classes of another rank, or for rows that are not finite or have no direction.
        """
        ids_K = torch.arange(classes.start, classes.stop, classes.step) if isinstance(classes, range) else classes
        ids_K = ids_K.to(self.device)
        if ids_K.numel() and (int(ids_K.min()) < self.start or int(ids_K.max()) >= self.stop):
            raise ValueError(
                f"rank {self.ranks.rank} owns the classes [{self.start}, {self.stop}), not all of {classes}"
            )
        rows_KD = rows_KD.to(self.device, self.dtype)
        if not bool(torch.isfinite(rows_KD).all()) or (
            self.config.normalize and bool((rows_KD == 0).all(dim=-1).any())
        ):
            raise ValueError("class rows must be finite and, for a normalised head, not zero")
        local_K = self._rows_of(ids_K - self.start)
        group = self.config.sub_centres
        if rows_KD.ndim == 3:
            rows_KD = rows_KD.flatten(0, 1)
        elif group > 1:
            rows_KD = rows_KD.repeat_interleave(group, dim=0)
            noise = torch.Generator(self.device).manual_seed(self.seed)
            length_K1 = torch.linalg.vector_norm(rows_KD, dim=1, keepdim=True) / self.dim**0.5
            beside = torch.randn(rows_KD.shape, generator=noise, device=self.device, dtype=self.dtype)
            rows_KD = rows_KD + 0.1 * length_K1 * beside
        self.rows.set(local_K, rows_KD, self.steps)

    def _rows_of(self, class_K: Tensor) -> Tensor:
        """All rows of local classes."""
        group = self.config.sub_centres
        if group == 1:
            return class_K
        return (class_K[:, None] * group + torch.arange(group, device=class_K.device)).flatten()

    # --- training ---------------------------------------------------------------------------------------

    def loss(self, emb_BD: Tensor, labels: HasIds | Tensor, weight_B: Tensor | None = None) -> Tensor:
        """Weighted mean loss over the batches of all ranks: a scalar of the head's dtype, equal on each rank.

        Collective: every rank calls it, with batches of any size (also 0). `backward()` adds the gradient of the rows
        to the head and gives the embeddings theirs times `grad_scale`; it must come before `step`.

        Args:
            emb_BD: any floating dtype, not normalised.
            labels: Labels of form single or multi, or int64 class ids, (B,) or (B, P) padded with -1.
            weight_B: non-negative; 0 leaves a sample out (its labels may be empty). All 1 by default.

        Raises (on all ranks alike):
            SampleError (a DataError): a class id out of range, a sample with weight and no positive, or one that the
                loss can't take; names rank and sample.
            NotFiniteError (a FloatingPointError): embeddings or rows that are not finite, a row of length zero;
                nothing was changed.
        """
        if self._moved is not None and torch.is_grad_enabled():
            raise RuntimeError("the rows of this optimizer step have moved already: call step before the next loss")
        ids_BP, target_BP = class_ids(labels, len(emb_BD))
        if target_BP is not None and not self.config.loss.soft:
            raise DataError(f"loss {self.config.loss.kind} takes no soft labels. Use loss.kind soft_targets.")
        if weight_B is None:
            weight_B = torch.ones(len(emb_BD))
        x_BD = emb_BD.to(self.device, self.dtype)
        if self.config.normalize:
            x_BD = torch.nn.functional.normalize(x_BD, dim=1, eps=1e-6)
        targets = None if target_BP is None else target_BP.to(self.device)
        args = (ids_BP.to(self.device), weight_B.to(self.device), targets)
        return _HeadLoss.apply(x_BD, self._anchor, self, *args)

    def begin_step(self, lr: float) -> None:
        """Lets the backward pass of the coming loss move the rows with `lr`, instead of storing their gradient.

        For optimizer steps of one loss whose gradient is neither accumulated, clipped nor scaled. `step` with the same
        `lr` must follow the backward pass. With more than one loss differentiated together, or without a backward
        pass, or with several replicas, the step goes the ordinary way.
        """
        if self.grid.replicas.world == 1:
            self._move_lr = lr

    def pending_sq_norm(self) -> Tensor:
        """This rank's share of the squared norm of the rows' gradient, a float64 scalar; sum it over the ranks.

        Collective over replicas. With several of them no `backward` may follow before `step` or `zero_pending`.
        """
        self._sum_replicas()
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for _, grad_RD in self._pending.chunks(ROWS_AT_ONCE):
            total += grad_RD.square().sum(dtype=torch.float64)
        return total / self.grid.replicas.world

    def pending_rows(self) -> tuple[Tensor, Tensor]:
        """Global class ids (U,) of the touched rows and their gradient (U, D), a view.

        Collective over replicas, as `pending_sq_norm`.
        """
        self._sum_replicas()
        grad_UD = self._pending.grad_UD  # rows of sub-centres have the number of their row, not of their class
        if grad_UD is None:
            return torch.empty(0, dtype=torch.int64, device=self.device), self.w_CD[:0]
        local_U = self._pending.ids_U
        local_U = torch.arange(len(grad_UD), device=self.device) if local_U is None else local_U
        return local_U + self.start * self.config.sub_centres, grad_UD

    @torch.no_grad()
    def step(self, lr: float, scale: float = 1.0) -> None:
        """Moves the touched rows by their gradient times `scale` (clipping), clears it, counts the step.

        After a backward pass that moved the rows itself (`begin_step`), only counts. Raises RuntimeError for another
        rate or scale than it moved them with. Collective over replicas.
        """
        rate = lr * self.config.lr_multiplier
        if self._moved is not None and (self._moved != lr or scale != 1.0):
            raise RuntimeError(f"the rows have moved with rate {self._moved} and scale 1, not {lr} and {scale}")
        self._sum_replicas()
        for local, grad_RD in self._pending.chunks(ROWS_AT_ONCE):
            if scale != 1.0:
                grad_RD.mul_(scale)
            w_RD = self.rows.read(local, self._scratch, "rows")
            self.rows.move(local, w_RD, grad_RD, rate, self.steps, self._scratch)
        self.zero_pending()
        self.steps += 1
        if self.rows.lag and self.rows.lag.advance(rate):
            self._catch_up()

    def zero_pending(self) -> None:
        """Drops the collected gradient (a skipped step); `steps` stays. Rows that have moved stay moved."""
        self._pending.clear()
        self._move_lr = self._moved = None
        self._summed = False

    def _sum_replicas(self) -> None:
        """The rows' gradient summed over the replicas, which have touched the same rows; once a step."""
        grad_UD = self._pending.grad_UD
        if grad_UD is None or self._summed or self.grid.replicas.world == 1:
            return
        if grad_UD.numel():
            self.grid.replicas.sum_(grad_UD)
        self._summed = True

    @torch.no_grad()
    def _catch_up(self) -> None:
        """Every row as a dense optimizer would have it now."""
        self.rows.catch_up_all(self._scratch, self.steps)
        if self.rows.lag:
            self.rows.lag.reset(self.steps)

    # --- using the rows ---------------------------------------------------------------------------------

    @torch.no_grad()
    def topk(self, emb_BD: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k best classes: scores (B, k), highest first, and class ids (B, k) int64.

        Collective over all ranks, batches of any size. Scores are cosines, or inner products if the head doesn't
        normalise; equal ones are ordered by class id. Raises ValueError for k > num_classes, and NotFiniteError, on all
        ranks alike, for embeddings that are not finite.
        """
        if not 1 <= k <= self.num_classes:
            raise ValueError(f"k must be between 1 and the number of classes {self.num_classes}, got {k}")
        x_BD = emb_BD.to(self.device, self.dtype)
        if self.config.normalize:
            x_BD = torch.nn.functional.normalize(x_BD, dim=1, eps=1e-6)
        self._catch_up()
        x_ND, counts, _ = gather_queries(self.grid, x_BD)
        shape = (k, self.start, self.config.sub_centres, self.config.normalize)
        return topk_sharded(self.ranks, x_ND, counts, self.w_CD, *shape)

    # --- files ------------------------------------------------------------------------------------------

    def state_tensors(self) -> dict[str, Tensor]:
        """This rank's rows and optimizer state by name, first axis C (views).

        With sub-centres their axis is the second. Rows that were skipped have caught up.
        """
        self._catch_up()
        group = self.config.sub_centres
        tensors = {"rows": self.w_CD, **{f"{self.config.optimizer.kind}.{n}": t for n, t in self.state.items()}}
        return {name: t if group == 1 else t.view(-1, group, *t.shape[1:]) for name, t in tensors.items()}

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

    def take_notes(self, notes: Mapping[str, Any]) -> None:
        """Goes on from a saved head's `notes`, after own rows and their state were replaced."""
        self.steps = int(notes["steps"])
        self.rows.replaced(self.steps)
        self.zero_pending()

    def save(self, folder: str | Path) -> dict[str, Any]:
        """Writes own rows and optimizer state; returns this rank's part of the index (`saving.HeadSave`).

        Collective over replicas, of which the first writes.
        """
        return saving.HeadSave(self, folder).write()

    def begin_save(self, folder: str | Path, memory_bytes: int) -> saving.HeadSave:
        """Takes a snapshot now, which a thread can write while training goes on (`saving.HeadSave`)."""
        return saving.HeadSave(self, folder, memory_bytes)

    def load(self, folder: str | Path) -> None:
        """Reads own classes from a head saved by any number of ranks (`saving.load_head`)."""
        saving.load_head(self, folder)

    def export_rows(self, folder: str | Path, dtype: torch.dtype = torch.float32) -> list[dict[str, Any]]:
        """Writes own rows alone, unit length if the head normalises (`saving.export_rows`)."""
        return saving.export_rows(self, folder, dtype)

    # --- parts of the loss ------------------------------------------------------------------------------

    def _begin(
        self, x_BD: Tensor, ids_BP: Tensor, weight_B: Tensor, target_BP: Tensor | None, for_backward: bool
    ) -> tuple[Tensor, HeadPass]:
        same = {
            "the number of classes": self.num_classes,
            "the embedding size": self.dim,
            "the seed": self.seed,
            "the number of optimizer steps": self.steps,
        }
        if self.grid.replicas.world == 1:
            batch = gather_batch(self.ranks, x_BD, ids_BP, weight_B, target_BP, same)
            check_batch(batch, self.num_classes)
        else:
            batch = gather_replica(self.grid, x_BD, ids_BP, weight_B, target_BP, same, self.num_classes)
        self.rows.refresh()
        own_NP = (batch.ids_NP >= self.start) & (batch.ids_NP < self.stop) & (batch.weight_N > 0)[:, None]
        sample_K, column_K = own_NP.nonzero(as_tuple=True)
        class_K = batch.ids_NP[sample_K, column_K] - self.start
        touched_T = class_K
        if batch.whole is not None:
            # every replica touches the same rows, so that their gradients can be summed
            all_T = batch.whole.positive_T
            touched_T = all_T[(all_T >= self.start) & (all_T < self.stop)] - self.start
        seed = self.seed + (self.draw << 32)
        rows, weight_S = self._drawing.plan(self.grid, batch.x_ND, sample_K, class_K, touched_T, seed, self.steps)
        row_K = class_K * self.config.sub_centres
        at_K, order_K = torch.sort(rows.locate(row_K))
        pairs = Pairs(sample_K[order_K], column_K[order_K], at_K, row_K[order_K])
        args = (batch, pairs, self._use_max, self._scratch, self.steps)
        work = HeadPass(self.config, self.rows, rows, weight_S, *args)
        with matmul_precision(self.config.matmul):
            value = self._forward(work, for_backward)
        if for_backward:
            self._open.add(work)
        return value, work

    def _forward(self, work: HeadPass, for_backward: bool) -> Tensor:
        """The loss over all replicas. What one of them refuses, all do."""
        value = work.batch.x_ND.new_zeros(())
        refusal: Exception | None = None
        try:
            value = work.forward(self.ranks, for_backward)
        except SampleError as error:
            at = locate(error.index, work.batch.counts, work.batch.first)
            refusal = SampleError(error.text, error.index, at)
        except NotFiniteError:
            refusal = self._bad_row()
        except DataError as error:
            refusal = error
        if self.grid.replicas.world > 1:
            value, refused = self.grid.replicas.sum_(torch.stack([value, value.new_tensor(float(refusal is not None))]))
            refusal = first_error(self.grid.world, refusal) if refused else None
        if refusal is not None:
            raise refusal
        return value

    def _bad_row(self) -> NotFiniteError:
        """What is wrong when sums over this replica's rows aren't finite. Collective over its ranks."""
        row = self.rows.first_bad(self._scratch)
        own = -1 if row < 0 else self.start + row // self.config.sub_centres
        found = [number for (number,) in self.ranks.gather_numbers([own], self.device) if number >= 0]
        if not found:
            return NotFiniteError("logits of the head are too large: embeddings, class rows or head.scale")
        return NotFiniteError(
            f"class rows of the head hold NaN or infinite values, or a row of length zero: class {found[0]} first"
        )

    def _end(self, work: HeadPass, grad_value: Tensor) -> Tensor:
        if self._summed:
            raise RuntimeError("the rows' gradient was already summed over the replicas: step comes first")
        factor = float(grad_value)
        alone = len(self._open) == 1 and self._pending.grad_UD is None and self._moved is None
        move = None
        if self._move_lr is not None and alone and factor == 1.0 and self.loss_scale == 1.0:
            move = Move(self._move_lr * self.config.lr_multiplier, self.steps)
            self._moved = self._move_lr
        self._open.discard(work)
        with matmul_precision(self.config.matmul):
            return work.backward(factor / self.loss_scale, self._pending, move).mul_(self.grad_scale * factor)


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_BD: Tensor,
        anchor: Tensor,
        head: ShardedHead,
        ids_BP: Tensor,
        weight_B: Tensor,
        target_BP: Tensor | None,
    ) -> Tensor:
        value, work = head._begin(x_BD.detach(), ids_BP, weight_B, target_BP, ctx.needs_input_grad[1])
        ctx.head, ctx.work = head, work
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_value: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.work is None:
            raise RuntimeError("the head's loss was already differentiated once")
        grad_BD = ctx.head._end(ctx.work, grad_value)
        ctx.work = None
        return grad_BD, None, None, None, None, None
