"""A head of the spherical family whose step does not depend on the number of classes, and is exact.

Vincent, de Brebisson, Bouthillier: Efficient Exact Gradient Update for training Deep Networks with Very Large Sparse Targets
(NIPS 2015, arXiv 1412.7091). The class rows are W = V U + 1 omega^T. A step touches the small factors and, of V, the rows of
the batch's targets: it equals plain SGD on W to rounding. Kept beside them are Q = W^T W and wbar = W^T 1, which give every
sample the squared sum and the sum of all its logits.

V is split over the ranks by class; U, omega, Q and wbar are equal on all of them. A step sends the batch (m x d), the
targets' logits (m x K) and one more m x d matrix.

Shape legend: m samples of all ranks, K targets of a sample (padded with -1), D classes, C those of this rank, d embedding
size, n distinct targets.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor
from torch.autograd.function import once_differentiable

from labelmill.errors import DataError
from labelmill.heads.batch import GlobalBatch, check_batch, class_ids, gather_batch, gather_queries, locate
from labelmill.heads.config import HeadConfig
from labelmill.heads.optim import SGD
from labelmill.heads.rows import ROWS_AT_ONCE
from labelmill.heads.sharded import ShardedHead
from labelmill.heads.topk import merge_topk, topk_sharded
from labelmill.job import StrictModel
from labelmill.losses.classification import SampleError
from labelmill.losses.spherical import (
    SMALLEST_SIGMA,
    SphericalLossConfig,
    TaylorSoftmax,
    ZLoss,
    deviation,
    spherical_gradients,
)


class FactoredConfig(StrictModel):
    """A factored head. Its rows move by plain SGD, nothing else is exact."""

    loss: SphericalLossConfig = ZLoss()
    lr_multiplier: float = Field(1.0, gt=0, description="class rows learn this much faster than the encoder")
    weight_decay: float = Field(0.0, ge=0, description="coupled, of all rows, at no cost")
    init_std: float = Field(0.01, gt=0, description="standard deviation of the first class rows")
    block_rows: int = Field(1024, ge=1, description="classes are dealt to ranks in blocks of at most this size")
    stabilise_every: int = Field(100, ge=1, description="steps between looks at the singular values of U")
    recompute_every: int = Field(1000, ge=1, description="steps between recomputations of Q and wbar from all rows")

    @property
    def head(self) -> HeadConfig:
        """The section of the sharded rows underneath."""
        shape = {"init_std": self.init_std, "block_rows": self.block_rows, "lr_multiplier": self.lr_multiplier}
        return HeadConfig(normalize=False, scale=1.0, optimizer=SGD(momentum=0.0), **shape)


@dataclass
class Touched:
    """What the backward passes of an optimizer step have left: rows of the batch and the loss's derivatives by A, q, s."""

    H_md: Tensor
    ids_mK: Tensor
    gA_mK: Tensor
    gq_m: Tensor
    gs_m: Tensor


class FactoredHead(ShardedHead):
    """This rank's part of the class axis, and the factors.

    Args:
        num_classes, dim, seed, group, device, dtype: as of `ShardedHead`.
        factored: the section.

    Attributes:
        U_dd, omega_d, Q_dd, wbar_d: the factors and the sums over all classes.
        flat: samples whose logits were all equal (no direction, no gradient), in this process so far.

    `w_CD` is V. What is saved, exported and loaded is W: the factors are multiplied in before.
    """

    def __init__(
        self,
        num_classes: int,
        dim: int,
        factored: FactoredConfig,
        seed: int = 0,
        group: dist.ProcessGroup | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if num_classes < 2:
            raise DataError(f"losses of the spherical family need at least two classes, not {num_classes}.")
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"a factored head is exact in float32 or float64 only, not {dtype}")
        super().__init__(num_classes, dim, factored.head, seed, group, device, dtype)
        self.factored, self.flat = factored, 0
        self._touched: list[Touched] = []
        self._reset_factors()

    def _reset_factors(self) -> None:
        options: dict[str, Any] = {"dtype": self.dtype, "device": self.device}
        self.U_dd, self.omega_d = torch.eye(self.dim, **options), torch.zeros(self.dim, **options)
        self.Q_dd, self.wbar_d = torch.zeros(self.dim, self.dim, **options), torch.zeros(self.dim, **options)
        self._stale = True  # Q and wbar are to be made from the rows

    def to(self, device: torch.device | str) -> FactoredHead:
        super().to(device)
        self.U_dd, self.omega_d = self.U_dd.to(self.device), self.omega_d.to(self.device)
        self.Q_dd, self.wbar_d = self.Q_dd.to(self.device), self.wbar_d.to(self.device)
        return self

    # --- training ---------------------------------------------------------------------------------------

    def loss(self, emb_BD: Tensor, labels: Any, weight_B: Tensor | None = None) -> Tensor:
        """Weighted mean loss over the batches of all ranks; as `ShardedHead.loss`.

        Raises, besides, SampleError for a target that a sample names twice.
        """
        ids_BP, target_BP = class_ids(labels, len(emb_BD))
        if target_BP is not None:
            raise DataError("a factored head takes no soft labels: use labels of form single or multi.")
        weight_B = torch.ones(len(emb_BD)) if weight_B is None else weight_B
        x_BD = emb_BD.to(self.device, self.dtype)
        return _FactoredLoss.apply(x_BD, self._anchor, self, ids_BP.to(self.device), weight_B.to(self.device))

    def begin_step(self, lr: float) -> None:
        """Nothing: the factors move in `step`."""

    def sums_of(self, H_md: Tensor) -> tuple[Tensor, Tensor]:
        """Squared sum and sum of all D logits of each row, at a cost of d^2. Collective where rows have changed."""
        self._refresh()
        return (H_md @ self.Q_dd * H_md).sum(dim=1), H_md @ self.wbar_d

    def _forward_pass(self, batch: GlobalBatch) -> tuple[Tensor, Tensor, Touched]:
        """The loss, the gradient of H, and what a step needs. Collective."""
        H_md, ids_mK = batch.x_ND, batch.ids_NP
        q_m, s_m = self.sums_of(H_md)
        mask_mK = (ids_mK >= 0) & (batch.weight_N > 0)[:, None]
        A_mK = self.ranks.sum_(self._own_logits(H_md, ids_mK))
        weight_m = batch.weight_N / batch.weight_N.sum().clamp_min(torch.finfo(self.dtype).tiny)
        loss_m, gA_mK, gq_m, gs_m = spherical_gradients(
            self.factored.loss, A_mK, q_m, s_m, mask_mK, weight_m, self.num_classes
        )
        self.flat += int((deviation(q_m, s_m, self.num_classes)[1] <= SMALLEST_SIGMA).sum())
        touched = Touched(H_md, ids_mK, gA_mK, gq_m, gs_m)
        gH_md = 2 * gq_m[:, None] * (H_md @ self.Q_dd) + self._pulls(touched)
        return (torch.where(weight_m > 0, loss_m, 0.0) * weight_m).sum(), gH_md, touched

    def _own(self, ids_mK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(sample, column, local row) of targets that this rank owns."""
        own_mK = (ids_mK >= self.start) & (ids_mK < self.stop)
        sample, column = own_mK.nonzero(as_tuple=True)
        return sample, column, ids_mK[sample, column] - self.start

    def _own_logits(self, H_md: Tensor, ids_mK: Tensor) -> Tensor:
        """Logits of own targets (m, K), 0 elsewhere."""
        sample, column, row = self._own(ids_mK)
        A_mK = H_md.new_zeros(ids_mK.shape)
        side_d = (H_md @ self.U_dd.t())[sample]
        A_mK[sample, column] = (side_d * self.w_CD[row]).sum(dim=1) + (H_md @ self.omega_d)[sample]
        return A_mK

    def _pulls(self, touched: Touched) -> Tensor:
        """Z of each sample (m, d): sum_k gA W[y_k] + gs wbar. Collective."""
        sample, column, row = self._own(touched.ids_mK)
        own_md = torch.zeros_like(touched.H_md)
        own_md.index_add_(0, sample, touched.gA_mK[sample, column][:, None] * self.w_CD[row])
        pulled_md = self.ranks.sum_(own_md) @ self.U_dd
        return pulled_md + torch.outer(touched.gA_mK.sum(1), self.omega_d) + torch.outer(touched.gs_m, self.wbar_d)

    def _all_touched(self) -> Touched:
        """The micro batches' as one; a step's gradient is the sum over all of them."""
        if len(self._touched) > 1:
            width = max(t.ids_mK.shape[1] for t in self._touched)
            parts = [
                Touched(t.H_md, _wide(t.ids_mK, width, -1), _wide(t.gA_mK, width, 0.0), t.gq_m, t.gs_m)
                for t in self._touched
            ]
            names = ("H_md", "ids_mK", "gA_mK", "gq_m", "gs_m")
            self._touched = [Touched(*(torch.cat([getattr(p, name) for p in parts]) for name in names))]
        return self._touched[0]

    def _gram(self, t: Touched, Z_md: Tensor) -> Tensor:
        """M (m, m): inner products of the samples' gradients by all D logits."""
        twice_md = 2 * t.gq_m[:, None] * t.H_md
        X_mm = twice_md @ Z_md.t()
        distinct, place_mK = torch.unique(t.ids_mK, return_inverse=True)
        Y_mn = t.H_md.new_zeros(len(t.H_md), len(distinct)).scatter_add_(1, place_mK, t.gA_mK)
        ybar_m, gs_m = t.gA_mK.sum(dim=1), t.gs_m
        cross_mm = torch.outer(gs_m, ybar_m)
        return (
            twice_md @ self.Q_dd @ twice_md.t()
            + self.num_classes * torch.outer(gs_m, gs_m)
            + Y_mn @ Y_mn.t()
            + cross_mm
            + cross_mm.t()
            + X_mm
            + X_mm.t()
        )

    @torch.no_grad()
    def pending_sq_norm(self) -> Tensor:
        """This rank's share of |G^T H|^2 = trace(M H H^T), a float64 scalar. Collective."""
        if not self._touched:
            return torch.zeros((), dtype=torch.float64, device=self.device)
        t = self._all_touched()
        gram_mm = self._gram(t, self._pulls(t))
        return (gram_mm * (t.H_md @ t.H_md.t())).sum().double() / self.grid.world.world

    @torch.no_grad()
    def step(self, lr: float, scale: float = 1.0) -> None:
        """W <- (1 - eta wd) W - eta G^T H, with eta = lr times `lr_multiplier`, exactly. Collective."""
        if self._touched:
            self._move(lr * self.factored.lr_multiplier, scale)
        self.zero_pending()
        self.steps += 1
        if self.steps % self.factored.stabilise_every == 0:
            self._stabilise()
        if self.steps % self.factored.recompute_every == 0:
            self._stale = True

    def _move(self, eta: float, scale: float) -> None:
        t = self._all_touched()
        if scale != 1.0:
            t = Touched(t.H_md, t.ids_mK, t.gA_mK * scale, t.gq_m * scale, t.gs_m * scale)
        H_md, gs_m, ybar_m, keep = t.H_md, t.gs_m, t.gA_mK.sum(dim=1), 1.0 - eta * self.factored.weight_decay
        twice_md = 2 * t.gq_m[:, None] * H_md
        Z_md = self._pulls(t)
        gH_md = twice_md @ self.Q_dd + Z_md
        M_mm = self._gram(t, Z_md)
        # every right-hand side has the old factors
        U_dd = keep * self.U_dd - eta * ((H_md @ self.U_dd.t()).t() @ twice_md)
        omega_d = keep * self.omega_d - eta * (H_md.t() @ (twice_md @ self.omega_d + gs_m))
        cross_dd = H_md.t() @ gH_md
        Q_dd = keep**2 * self.Q_dd - keep * eta * (cross_dd + cross_dd.t()) + eta**2 * (H_md.t() @ M_mm @ H_md)
        by_sum_m = twice_md @ self.wbar_d + self.num_classes * gs_m + ybar_m
        self.wbar_d = keep * self.wbar_d - eta * (H_md.t() @ by_sum_m)
        self.U_dd, self.omega_d, self.Q_dd = U_dd, omega_d, (Q_dd + Q_dd.t()) / 2
        sample, column, row = self._own(t.ids_mK)
        self.rows.protect(row)
        turned_md = torch.linalg.solve(U_dd.t(), H_md.t()).t()  # H U^-1 with the new U
        self.w_CD.index_add_(0, row, turned_md[sample] * (-eta * t.gA_mK[sample, column])[:, None])

    def zero_pending(self) -> None:
        super().zero_pending()
        self._touched = []

    # --- the factors ------------------------------------------------------------------------------------

    @torch.no_grad()
    def _stabilise(self) -> None:
        """Singular values of U outside [1/2, 2] go back to 1, their inverse into V; many at once un-factor it.

        First the ranks' factors are made equal again; they drift apart by hardware that rounds differently alone.
        """
        for value in (self.U_dd, self.omega_d, self.Q_dd, self.wbar_d):
            self.ranks.copy_from_first_(value)
        left_dd, values_d, _ = torch.linalg.svd(self.U_dd)
        outside = ((values_d < 0.5) | (values_d > 2.0)).nonzero()[:, 0]
        if not len(outside):
            return
        if len(outside) > self.dim // 3:
            self.unfactor()
            return
        self.rows.protect(slice(0, len(self.rows)))
        for index in outside.tolist():
            u_d, alpha = left_dd[:, index], (1.0 - values_d[index]) / values_d[index]
            self.U_dd += alpha * torch.outer(u_d, self.U_dd.t() @ u_d)
            self.w_CD.addr_(self.w_CD @ u_d, u_d, alpha=float(-alpha / (1.0 + alpha)))

    @torch.no_grad()
    def unfactor(self) -> None:
        """V <- V U + 1 omega^T, U <- 1, omega <- 0: `w_CD` holds W itself."""
        eye_dd = torch.eye(self.dim, dtype=self.dtype, device=self.device)
        if torch.equal(self.U_dd, eye_dd) and not bool(self.omega_d.any()):
            return
        self.rows.protect(slice(0, len(self.rows)))
        for lo in range(0, len(self.rows), ROWS_AT_ONCE):
            part = self.w_CD[lo : lo + ROWS_AT_ONCE]
            part.copy_(part @ self.U_dd + self.omega_d)
        self.U_dd, self.omega_d = eye_dd, torch.zeros_like(self.omega_d)

    @torch.no_grad()
    def _refresh(self) -> None:
        """Q and wbar from the rows, where these were replaced or enough steps have passed. Collective."""
        if not self._stale:
            return
        V_Cd = self.w_CD
        packed = V_Cd.new_zeros(self.dim + 1, self.dim)
        for lo in range(0, len(V_Cd), ROWS_AT_ONCE):
            part = V_Cd[lo : lo + ROWS_AT_ONCE]
            packed[:-1].addmm_(part.t(), part)
            packed[-1] += part.sum(dim=0)
        self.ranks.sum_(packed)
        U, omega, sum_d = self.U_dd, self.omega_d, packed[-1] @ self.U_dd
        cross_dd = torch.outer(sum_d, omega)
        self.Q_dd = U.t() @ packed[:-1] @ U + cross_dd + cross_dd.t() + self.num_classes * torch.outer(omega, omega)
        self.wbar_d = sum_d + self.num_classes * omega
        self._stale = False

    def state_tensors(self) -> dict[str, Tensor]:
        """Own rows W; the factors have been multiplied in."""
        self.unfactor()
        self._stale = True  # a run that goes on from the files makes Q anew, so does this one
        return super().state_tensors()

    def take_notes(self, notes: Mapping[str, Any]) -> None:
        super().take_notes(notes)
        self._reset_factors()

    def set_rows(self, classes: range | Tensor, rows_KD: Tensor) -> None:
        """As `ShardedHead.set_rows`."""
        self.unfactor()
        super().set_rows(classes, rows_KD)
        self._stale = True

    # --- use --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def topk(self, emb_BD: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k best classes, exact; scores are logits, of losses that rank by magnitude their distance from its zero.

        Collective over all ranks; as `ShardedHead.topk`.
        """
        if not 1 <= k <= self.num_classes:
            raise ValueError(f"k must be between 1 and the number of classes {self.num_classes}, got {k}")
        x_BD = emb_BD.to(self.device, self.dtype)
        x_ND, counts, _ = gather_queries(self.grid, x_BD)
        turned_Nd = x_ND @ self.U_dd.t()
        shift_B1 = (x_BD @ self.omega_d)[:, None]
        shape = (k, self.start, 1, False)
        scores, ids = topk_sharded(self.ranks, turned_Nd, counts, self.w_CD, *shape)
        scores = scores + shift_B1
        if self.factored.loss.scores_are_logits:
            return scores, ids
        # o^2 or 1 + o + o^2 / 2: the classes furthest from 0 or from -1, on either side
        centre = -1.0 if isinstance(self.factored.loss, TaylorSoftmax) else 0.0
        lowest, low_ids = topk_sharded(self.ranks, -turned_Nd, counts, self.w_CD, *shape)
        both = torch.cat([(scores - centre).abs(), (lowest - shift_B1 + centre).abs()], dim=1)
        both_ids = torch.cat([ids, low_ids], dim=1)
        # a class may stand on both lists where k exceeds half of the classes: once is enough
        seen = (both_ids[:, :, None] == both_ids[:, None, :]).tril(-1).any(dim=2)
        return merge_topk(both.masked_fill(seen, -torch.inf), both_ids, k)


def _wide(value: Tensor, width: int, fill: float) -> Tensor:
    return torch.nn.functional.pad(value, (0, width - value.shape[1]), value=fill)


class _FactoredLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BD: Tensor, anchor: Tensor, head: FactoredHead, ids_BP: Tensor, weight_B: Tensor) -> Tensor:
        same = {
            "the number of classes": head.num_classes,
            "the embedding size": head.dim,
            "the seed": head.seed,
            "the number of optimizer steps": head.steps,
        }
        batch = gather_batch(head.ranks, x_BD.detach(), ids_BP, weight_B, None, same)
        check_batch(batch, head.num_classes)
        check_distinct(batch)
        value, gH_md, touched = head._forward_pass(batch)
        ctx.head, ctx.touched = head, touched
        ctx.save_for_backward(gH_md[batch.lo : batch.hi])
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_value: Tensor) -> tuple[Tensor | None, ...]:
        (gH_BD,) = ctx.saved_tensors
        head, t, factor = ctx.head, ctx.touched, float(grad_value)
        own = factor / head.loss_scale
        head._touched.append(Touched(t.H_md, t.ids_mK, t.gA_mK * own, t.gq_m * own, t.gs_m * own))
        return gH_BD * (head.grad_scale * factor), None, None, None, None


def check_distinct(batch: GlobalBatch) -> None:
    """Raises SampleError, on all ranks alike, for a sample that names a target twice."""
    ordered_NP = batch.ids_NP.sort(dim=1).values
    twice_N = ((ordered_NP[:, 1:] == ordered_NP[:, :-1]) & (ordered_NP[:, 1:] >= 0)).any(dim=1)
    if bool(twice_N.any()):
        index = int(twice_N.nonzero()[0])
        raise SampleError("{sample} names a class twice.", index, locate(index, batch.counts))
