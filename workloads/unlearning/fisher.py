"""Forgetting by the diagonal of the Fisher information, without a training step: dampening and noise.

Both look at squared gradients of single samples, of the forgotten and of the others: F_f, F_r, and F_D of all. These are
means over samples of (d ln p(y | x) / d theta)^2 at the given labels (the empirical Fisher).

Shape legend: B samples of this rank, P parameters.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from labelmill.data.stream import Batch
from labelmill.losses.unlearning import dampened, fisher_noise_variance
from labelmill.training.objective import Losses, Progress
from workloads.unlearning.model import Method, Unlearner


class Fisher(Method):
    """What both have."""

    group: int = Field(1, ge=1, description="samples whose gradient is squared together; 1 is the exact diagonal")


class Dampening(Fisher):
    """Selective synaptic dampening: theta min(lam F_D / F_f, 1) where F_f > alpha F_D (Foster et al., AAAI 2024)."""

    kind: Literal["dampening"] = "dampening"
    alpha: float = Field(
        10.0, gt=0, description="a weight is dampened where it matters so much more to D_f than to all"
    )
    lam: float = Field(1.0, gt=0, description="how little of it may stay")


class FisherNoise(Fisher):
    """theta + sqrt(alpha / F_r) n, n ~ N(0, 1): weights that D_r doesn't need become noise (Golatkar et al., CVPR 2020)."""

    kind: Literal["fisher_noise"] = "fisher_noise"
    alpha: float = Field(1e-6, ge=0, description="0 leaves the model as it is")
    most: float = Field(1e3, gt=0, description="limit of 1 / F_r: weights that D_r doesn't need at all")


class FisherUnlearner(Unlearner):
    """Adds up squared gradients of both kinds of samples while the stream goes by; weights change at the end alone."""

    retain_P: Tensor
    forget_P: Tensor
    seen_2: Tensor

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        size = sum(p.numel() for p in self.model.parameters())
        self.register_buffer("retain_P", torch.zeros(size))
        self.register_buffer("forget_P", torch.zeros(size))
        self.register_buffer("seen_2", torch.zeros(2))

    def forward(self, batch: Batch) -> Losses:
        forget_B = self.forgotten(batch)
        seen = torch.zeros_like(self.seen_2)
        for kind, mask_B in enumerate((~forget_B & (batch.weight_B > 0), forget_B)):
            squares_P = torch.zeros_like(self.forget_P)
            for rows in mask_B.nonzero()[:, 0].split(self.config.group):
                loss = F.cross_entropy(self.model(_rows_of(batch.inputs, rows)), batch.labels.single_B[rows])
                grads = torch.autograd.grad(loss, list(self.model.parameters()))
                squares_P.add_(torch.cat([g.flatten() for g in grads]).square(), alpha=float(len(rows)))
                seen[kind] += len(rows)
            (self.retain_P, self.forget_P)[kind].add_(self.ranks.sum_(squares_P))
        self.seen_2 += self.ranks.sum_(seen)
        nothing = torch.stack([p.sum() * 0.0 for p in self.model.parameters()]).sum()
        return Losses(nothing)

    def information(self) -> tuple[Tensor, Tensor, Tensor]:
        """(F_D, F_r, F_f), each (P,)."""
        everyone_P = (self.retain_P + self.forget_P) / self.seen_2.sum().clamp_min(1)
        return everyone_P, self.retain_P / self.seen_2[0].clamp_min(1), self.forget_P / self.seen_2[1].clamp_min(1)

    @torch.no_grad()
    def finish(self, progress: Progress) -> None:
        parameters = list(self.model.parameters())
        changed_P = self.changed(torch.cat([p.flatten() for p in parameters]))
        for parameter, value in zip(parameters, changed_P.split([p.numel() for p in parameters]), strict=True):
            parameter.copy_(value.view_as(parameter))

    def changed(self, value_P: Tensor) -> Tensor:
        """All weights after forgetting, (P,)."""
        raise NotImplementedError


class DampeningUnlearner(FisherUnlearner):
    def changed(self, value_P: Tensor) -> Tensor:
        everyone_P, _, forget_P = self.information()
        return dampened(value_P, everyone_P, forget_P, alpha=self.config.alpha, lam=self.config.lam)


class FisherNoiseUnlearner(FisherUnlearner):
    uses = (True, False)

    def changed(self, value_P: Tensor) -> Tensor:
        _, retain_P, _ = self.information()
        variance_P = fisher_noise_variance(retain_P, self.config.alpha, self.config.most)
        generator = torch.Generator().manual_seed(self.seed)  # on the CPU: all ranks draw the same
        return value_P + variance_P.sqrt() * torch.randn(len(value_P), generator=generator).to(value_P.device)


def _rows_of(inputs: Any, rows: Tensor) -> Any:
    return {name: value[rows] for name, value in inputs.items()} if isinstance(inputs, dict) else inputs[rows]
