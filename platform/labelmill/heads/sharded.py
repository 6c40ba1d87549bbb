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

Shape legend: B samples of this rank, N samples of all ranks, P positives of a sample (padded with -1), C
classes of this rank, D embedding size, k results.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from labelmill.errors import DataError
from labelmill.heads import sampling, storage
from labelmill.heads.config import HeadConfig
from labelmill.heads.ranks import lay_grid
from labelmill.heads.replicas import mend_replicas
from labelmill.heads.rows import PendingRows, Scratch, StepRows
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
        group: the ranks of the head; the default group when torch.distributed is initialised, else one rank.
        dtype: of the rows and of all arithmetic; float32, or float64 for checks.

    Attributes:
        grid: the layout of the ranks; `ranks` are those that split the class axis.
        start, stop: the classes that this rank owns; may be empty. Each replica owns all of them once.
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
        self.grid = lay_grid(group, config.shards)
        self.ranks = self.grid.shards
        self.device, self.dtype = torch.device(device), dtype
        self.start, self.stop = sampling.class_range(num_classes, config.block_rows, self.ranks.rank, self.ranks.world)
        self.w_CD = sampling.initial_rows(
            num_classes, dim, config.block_rows, self.start, self.stop, seed, config.init_std, dtype
        ).to(self.device)
        self.state = config.optimizer.state(len(self.w_CD), dim, dtype, self.device)
        self.steps = 0
        self.grad_scale = float(self.grid.world.world)
        self._scratch = Scratch()
        self._pending = PendingRows(self._scratch)
        self._summed = False  # the pending gradient is the sum over the replicas
        self._use_max = needs_maximum(config.normalize, config.scale, num_classes, dtype)
        self._drawn: tuple[int, Tensor] | None = None  # (step, local rows drawn for it)
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
        grad_UD = self._pending.grad_UD
        if grad_UD is None:
            return torch.empty(0, dtype=torch.int64, device=self.device), self.w_CD[:0]
        local_U = self._pending.ids_U
        local_U = torch.arange(len(grad_UD), device=self.device) if local_U is None else local_U
        return local_U + self.start, grad_UD

    @torch.no_grad()
    def step(self, lr: float, scale: float = 1.0) -> None:
        """Moves the touched rows by their gradient times `scale` (clipping), clears it, counts the step.

        Collective over replicas.
        """
        self._sum_replicas()
        for local, grad_RD in self._pending.chunks(ROWS_AT_ONCE):
            if scale != 1.0:
                grad_RD.mul_(scale)
            rows_RD = self.w_CD[local]  # a view for a slice, a copy for ids
            state = {name: tensor[local] for name, tensor in self.state.items()}
            self.config.optimizer.update_(rows_RD, grad_RD, state, lr * self.config.lr_multiplier)
            if isinstance(local, Tensor):
                self.w_CD.index_copy_(0, local, rows_RD)
                for name, tensor in self.state.items():
                    tensor.index_copy_(0, local, state[name])
        self.zero_pending()
        self.steps += 1

    def zero_pending(self) -> None:
        """Drops the collected gradient (a skipped step); `steps` stays."""
        self._pending.clear()
        self._summed = False

    def _sum_replicas(self) -> None:
        """The rows' gradient summed over the replicas, which have touched the same rows; once a step."""
        grad_UD = self._pending.grad_UD
        if grad_UD is None or self._summed or self.grid.replicas.world == 1:
            return
        if grad_UD.numel():
            self.grid.replicas.sum_(grad_UD)
        self._summed = True

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

    def save(self, folder: str | Path) -> dict[str, Any]:
        """Writes own rows and optimizer state to one safetensors file; returns its {file, start, stop}.

        Collective over replicas: only the first writes, the entry of the others is empty. Replicas whose rows
        differ from the first one's get its rows before that.
        """
        mend_replicas(self.grid.replicas, self.state_tensors())
        notes = {"num_classes": self.num_classes, "dim": self.dim, "seed": self.seed, "steps": self.steps}
        return storage.save_range(folder, "head", self.state_tensors(), self.start, self._written_stop, notes)

    def load(self, folder: str | Path, entries: Iterable[Mapping[str, Any]]) -> None:
        """Reads own classes from the files of `save`, written by any number of ranks.

        Raises DataError for missing or doubled classes, missing files, other sizes or another row optimizer.
        """
        ordered = storage.check_cover(entries, self.num_classes, folder)
        notes = storage.load_range(folder, ordered, self.state_tensors(), self.start, self.stop)
        self.steps = int(notes["steps"])
        self.zero_pending()
        self._drawn = None

    def export_rows(self, folder: str | Path, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
        """Writes own rows alone, unit length if the head normalises, to `rows-<start>-<stop>.safetensors`.

        Only the first replica writes; the entry of the others is empty.
        """
        rows_CD = torch.empty(self.w_CD.shape, dtype=dtype)
        for lo in range(0, len(rows_CD), ROWS_AT_ONCE):
            part = self.w_CD[lo : lo + ROWS_AT_ONCE]
            rows_CD[lo : lo + ROWS_AT_ONCE] = torch.nn.functional.normalize(part) if self.config.normalize else part
        notes = {"num_classes": self.num_classes, "dim": self.dim, "normalized": self.config.normalize}
        return storage.save_range(folder, "rows", {"rows": rows_CD}, self.start, self._written_stop, notes)

    @property
    def _written_stop(self) -> int:
        """End of the classes that this rank writes: none in all replicas but the first."""
        return self.stop if self.grid.replicas.rank == 0 else self.start

    # --- parts of the loss ------------------------------------------------------------------------------

    def _gather(self, x_BD: Tensor, ids_BP: Tensor, weight_B: Tensor) -> GlobalBatch:
        """The batch of this replica, with the labels of all: sizes first, so that they may differ."""
        world, replicas = self.grid.world, self.grid.replicas
        finite_B = torch.isfinite(x_BD).all(dim=1)
        broken = -1 if bool(finite_B.all()) else int((~finite_B).nonzero()[0])
        sizes = world.gather_numbers([len(x_BD), ids_BP.shape[1], broken], self.device)
        counts = [count for count, _, _ in sizes]
        width = max(positives for _, positives, _ in sizes)
        # ids and weights travel together; the weight's bits ride along as one more integer column
        packed = ids_BP.new_full((len(x_BD), width + 1), -1)
        packed[:, : ids_BP.shape[1]] = ids_BP
        packed[:, width] = weight_B.to(torch.float64).view(torch.int64)
        packed = world.gather_rows(packed, counts)
        ids_WP, weight_W = packed[:, :width], packed[:, width].contiguous().view(torch.float64).to(self.dtype)
        self._check(ids_WP, weight_W, counts, [first for _, _, first in sizes])
        ours = slice(replicas.rank * self.ranks.world, (replicas.rank + 1) * self.ranks.world)
        begin, lo = sum(counts[: ours.start]), sum(counts[ours.start : world.rank])
        part = slice(begin, begin + sum(counts[ours]))
        return GlobalBatch(
            self.ranks.gather_rows(x_BD, counts[ours]),
            ids_WP[part],
            weight_W[part],
            lo,
            lo + len(x_BD),
            weight_W.sum(),
            ids_WP[weight_W > 0] if replicas.world > 1 else None,
        )

    def _check(self, ids_NP: Tensor, weight_N: Tensor, counts: Sequence[int], broken: Sequence[int]) -> None:
        """Every rank sees the labels of all ranks, so every rank raises."""
        if not len(weight_N):
            return
        used_N = weight_N > 0
        if max(broken) >= 0:
            rank = next(r for r, sample in enumerate(broken) if sample >= 0)
            raise FloatingPointError(
                f"the embedding of sample {broken[rank]} of rank {rank}'s batch holds NaN or infinite values"
            )
        if not bool((weight_N >= 0).all()) or not bool(torch.isfinite(weight_N).all()):
            bad = (~((weight_N >= 0) & torch.isfinite(weight_N))).nonzero()[:, 0]
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
        positive_T = local_K
        if batch.positives_WP is not None:
            # every replica touches the same rows, so that their gradients can be summed
            all_WP = batch.positives_WP
            positive_T = all_WP[(all_WP >= self.start) & (all_WP < self.stop)] - self.start
        ids_S = None if drawn_S is None else torch.unique(torch.cat([drawn_S, positive_T]))
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
        if self.grid.replicas.world == 1:
            return work.forward(self.ranks, for_backward), work
        try:
            value, refusal = work.forward(self.ranks, for_backward), None
        except (DataError, FloatingPointError) as error:
            value, refusal = batch.x_ND.new_zeros(()), error
        value, refused = self.grid.replicas.sum_(torch.stack([value, value.new_tensor(float(refusal is not None))]))
        if refusal is None and refused:
            refusal = FloatingPointError("another replica of the class rows refused its batch; its error says why")
        if refusal is not None:
            raise refusal
        return value, work

    def _end(self, work: HeadPass, grad_value: Tensor) -> Tensor:
        if self._summed:
            raise RuntimeError("the rows' gradient was already summed over the replicas: step comes first")
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
