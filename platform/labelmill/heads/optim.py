"""Optimizers of class rows: only rows that were touched in a step are read or written.

All are lazy: a row that was not sampled keeps its state frozen, without decay of weight or momentum. With
`sample_rate` 1 every row is touched in every step, and SGD and AdamW equal torch's.

Shape legend: S touched rows, D embedding size.
"""

from __future__ import annotations

from typing import Annotated, Literal, Protocol

import torch
from pydantic import Field
from torch import Tensor

from labelmill.job import StrictModel


class RowOptimizer(Protocol):
    """How touched rows move."""

    kind: str

    def state(self, rows: int, dim: int, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        """Fresh state: tensors by name whose first axis is the row."""
        ...

    def update_(self, w_SD: Tensor, g_SD: Tensor, state: dict[str, Tensor], lr: float) -> None:
        """Moves `w_SD` and `state` in place; may overwrite `g_SD`."""
        ...


class SGD(StrictModel):
    """Momentum SGD with coupled weight decay, as torch.optim.SGD: m <- mu m + (g + wd w); w <- w - lr m."""

    kind: Literal["sgd"] = "sgd"
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: float = Field(0.0, ge=0)

    def state(self, rows: int, dim: int, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        return {"momentum": torch.zeros(rows, dim, dtype=dtype, device=device)} if self.momentum else {}

    def update_(self, w_SD: Tensor, g_SD: Tensor, state: dict[str, Tensor], lr: float) -> None:
        if self.weight_decay:
            g_SD.add_(w_SD, alpha=self.weight_decay)
        step_SD = state["momentum"].mul_(self.momentum).add_(g_SD) if self.momentum else g_SD
        w_SD.sub_(step_SD, alpha=lr)


class AdamW(StrictModel):
    """AdamW (Loshchilov & Hutter, ICLR 2019); the bias correction counts the steps that touched the row."""

    kind: Literal["adamw"] = "adamw"
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.0, ge=0)

    def state(self, rows: int, dim: int, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        return {
            "mean": torch.zeros(rows, dim, dtype=dtype, device=device),
            "square": torch.zeros(rows, dim, dtype=dtype, device=device),
            "touched": torch.zeros(rows, dtype=torch.int32, device=device),
        }

    def update_(self, w_SD: Tensor, g_SD: Tensor, state: dict[str, Tensor], lr: float) -> None:
        beta1, beta2 = self.betas
        count_S = state["touched"].add_(1).to(torch.float64)
        correct1_S = (1.0 - beta1**count_S).to(w_SD.dtype)
        correct2_S = (1.0 - beta2**count_S).to(w_SD.dtype)
        if self.weight_decay:
            w_SD.mul_(1.0 - lr * self.weight_decay)
        mean_SD = state["mean"].lerp_(g_SD, 1.0 - beta1)
        square_SD = state["square"].mul_(beta2).addcmul_(g_SD, g_SD, value=1.0 - beta2)
        root_SD = torch.sqrt(square_SD, out=g_SD).div_(correct2_S.sqrt()[:, None]).add_(self.eps)
        w_SD.sub_((mean_SD / root_SD).mul_((lr / correct1_S)[:, None]))


class Adagrad(StrictModel):
    """Row-wise Adagrad: one accumulator a row, a <- a + mean(g^2); w <- w - lr g / (sqrt(a) + eps).

    A class's steps shrink with how often and how strongly it was pushed, which suits a long tail; the state
    is one number a class instead of D.
    """

    kind: Literal["adagrad"] = "adagrad"
    eps: float = Field(1e-10, gt=0)
    weight_decay: float = Field(0.0, ge=0)

    def state(self, rows: int, dim: int, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        return {"sum": torch.zeros(rows, dtype=dtype, device=device)}

    def update_(self, w_SD: Tensor, g_SD: Tensor, state: dict[str, Tensor], lr: float) -> None:
        if self.weight_decay:
            g_SD.add_(w_SD, alpha=self.weight_decay)
        sum_S = state["sum"].add_(g_SD.square().mean(dim=1))
        w_SD.sub_(g_SD.mul_((lr / (sum_S.sqrt() + self.eps))[:, None]))


RowOptimizerConfig = Annotated[SGD | AdamW | Adagrad, Field(discriminator="kind")]
