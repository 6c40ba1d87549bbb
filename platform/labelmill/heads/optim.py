"""Optimizers of class rows: only rows that were touched in a step are read or written.

A row that was not sampled keeps its state frozen, without decay of weight or momentum. With `sample_rate` 1 every row
is touched in every step, and SGD and AdamW equal torch's. SGD can also catch up (`skipped: exact`): then a row that
comes back holds what a dense optimizer would have made of it meanwhile.

Shape legend: C rows of a rank, S touched rows, R rows of a chunk, D embedding size.
"""

from __future__ import annotations

from typing import Annotated, Literal, Protocol

import torch
from pydantic import Field
from torch import Tensor

from labelmill.job import StrictModel

_fused_sgd = getattr(torch, "_fused_sgd_", None)


class RowOptimizer(Protocol):
    """How touched rows move."""

    kind: str

    @property
    def catches_up(self) -> bool:
        """Whether rows that were skipped are moved later by what they missed."""
        ...

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
    skipped: Literal["frozen", "exact"] = Field(
        "frozen", description="rows not drawn: left as they are, or moved later by what dense SGD would have done"
    )

    @property
    def catches_up(self) -> bool:
        return self.skipped == "exact" and (self.momentum > 0 or self.weight_decay > 0)

    def state(self, rows: int, dim: int, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        needed = self.momentum or self.catches_up
        return {"momentum": torch.zeros(rows, dim, dtype=dtype, device=device)} if needed else {}

    def update_(self, w_SD: Tensor, g_SD: Tensor, state: dict[str, Tensor], lr: float) -> None:
        m_SD = state.get("momentum")
        if m_SD is not None and _fused_sgd and w_SD.is_contiguous() and m_SD.is_contiguous():
            options = {"weight_decay": self.weight_decay, "momentum": self.momentum, "lr": lr, "dampening": 0.0}
            # one pass over the three instead of five
            _fused_sgd([w_SD], [g_SD], [m_SD], nesterov=False, maximize=False, is_first_step=False, **options)
            return
        if self.weight_decay:
            g_SD.add_(w_SD, alpha=self.weight_decay)
        step_SD = g_SD if m_SD is None else m_SD.mul_(self.momentum).add_(g_SD)
        w_SD.sub_(step_SD, alpha=lr)


class _Adam(StrictModel):
    """What AdamW and LAMB share: two moments, corrected by the steps that touched the row."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.0, ge=0)

    @property
    def catches_up(self) -> bool:
        # the square of a skipped row decays, its direction doesn't: there is no closed form to catch up with
        return False

    def state(self, rows: int, dim: int, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        return {
            "mean": torch.zeros(rows, dim, dtype=dtype, device=device),
            "square": torch.zeros(rows, dim, dtype=dtype, device=device),
            "touched": torch.zeros(rows, dtype=torch.int32, device=device),
        }

    def _direction(self, g_SD: Tensor, state: dict[str, Tensor]) -> Tensor:
        """Corrected mean / (root of corrected square + eps), in the memory of `g_SD`."""
        beta1, beta2 = self.betas
        count_S = state["touched"].add_(1).to(torch.float64)
        correct1_S = (1.0 - beta1**count_S).to(g_SD.dtype)
        correct2_S = (1.0 - beta2**count_S).to(g_SD.dtype)
        mean_SD = state["mean"].lerp_(g_SD, 1.0 - beta1)
        square_SD = state["square"].mul_(beta2).addcmul_(g_SD, g_SD, value=1.0 - beta2)
        root_SD = torch.sqrt(square_SD, out=g_SD).div_(correct2_S.sqrt()[:, None]).add_(self.eps)
        return torch.div(mean_SD, root_SD, out=g_SD).div_(correct1_S[:, None])


class AdamW(_Adam):
    """AdamW (Loshchilov & Hutter, ICLR 2019); the bias correction counts the steps that touched the row."""

    kind: Literal["adamw"] = "adamw"

    def update_(self, w_SD: Tensor, g_SD: Tensor, state: dict[str, Tensor], lr: float) -> None:
        step_SD = self._direction(g_SD, state)
        if self.weight_decay:
            w_SD.mul_(1.0 - lr * self.weight_decay)
        w_SD.sub_(step_SD, alpha=lr)


class LAMB(_Adam):
    """LAMB (You et al., ICLR 2020, alg. 2) with the trust ratio of each row.

    r = Adam's direction + wd w; w <- w - lr (|w| / |r|) r. A row turns by about lr radians in a step whatever its
    length and however strong its gradient: rare classes move as far as frequent ones when they are drawn.
    """

    kind: Literal["lamb"] = "lamb"

    def update_(self, w_SD: Tensor, g_SD: Tensor, state: dict[str, Tensor], lr: float) -> None:
        step_SD = self._direction(g_SD, state)
        if self.weight_decay:
            step_SD.add_(w_SD, alpha=self.weight_decay)
        length_S, step_S = torch.linalg.vector_norm(w_SD, dim=1), torch.linalg.vector_norm(step_SD, dim=1)
        trust_S = torch.where((length_S > 0) & (step_S > 0), length_S / step_S, 1.0)
        w_SD.addcmul_(step_SD, trust_S[:, None], value=-lr)


class Adagrad(StrictModel):
    """Row-wise Adagrad: one accumulator a row, a <- a + mean(g^2); w <- w - lr g / (sqrt(a) + eps).

    A class's steps shrink with how often and how strongly it was pushed, which suits a long tail; the state
    is one number a class instead of D.
    """

    kind: Literal["adagrad"] = "adagrad"
    eps: float = Field(1e-10, gt=0)
    weight_decay: float = Field(0.0, ge=0)

    @property
    def catches_up(self) -> bool:
        return False

    def state(self, rows: int, dim: int, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        return {"sum": torch.zeros(rows, dtype=dtype, device=device)}

    def update_(self, w_SD: Tensor, g_SD: Tensor, state: dict[str, Tensor], lr: float) -> None:
        if self.weight_decay:
            g_SD.add_(w_SD, alpha=self.weight_decay)
        sum_S = state["sum"].add_(g_SD.square().mean(dim=1))
        w_SD.sub_(g_SD.mul_((lr / (sum_S.sqrt() + self.eps))[:, None]))


RowOptimizerConfig = Annotated[SGD | AdamW | LAMB | Adagrad, Field(discriminator="kind")]


class Lag:
    """What momentum SGD does to a row while no gradient reaches it, applied all at once.

    A step without gradient is linear: (w, m) <- [[1 - lr wd, -lr mu], [wd, mu]] (w, m). The products of the last
    steps' matrices are kept, so that a row that missed k steps needs one 2 x 2 product, whatever the learning rates
    were (they may change every step).

    Attributes:
        last_C: optimizer steps that each row has seen.
    """

    LIMIT = 4096
    """Products kept. The head lets every row catch up before any is further behind."""

    def __init__(self, rows: int, optimizer: SGD | AdamW | LAMB | Adagrad, device: torch.device) -> None:
        assert isinstance(optimizer, SGD), "only SGD has a closed form"
        self.momentum, self.decay = optimizer.momentum, optimizer.weight_decay
        self.last_C = torch.zeros(rows, dtype=torch.int64, device=device)
        self._product_K22 = torch.eye(2, dtype=torch.float64)[None]  # [k]: of the last k steps

    def to(self, device: torch.device) -> None:
        """Moves the counters."""
        self.last_C = self.last_C.to(device)

    def reset(self, step: int) -> None:
        """Every row is up to date at `step`."""
        self.last_C.fill_(step)
        self._product_K22 = torch.eye(2, dtype=torch.float64)[None]

    def advance(self, lr: float) -> bool:
        """A step with learning rate `lr` was taken. True when all rows must catch up now."""
        step_22 = torch.tensor(
            [[1.0 - lr * self.decay, -lr * self.momentum], [self.decay, self.momentum]], dtype=torch.float64
        )
        identity = torch.eye(2, dtype=torch.float64)[None]
        self._product_K22 = torch.cat([identity, step_22 @ self._product_K22])
        return len(self._product_K22) > self.LIMIT

    def apply_(self, w_RD: Tensor, m_RD: Tensor, behind_R: Tensor) -> None:
        """Moves rows and momentum by the `behind_R` last steps, in place."""
        product_R22 = self._product_K22[behind_R.cpu()].to(w_RD.device, w_RD.dtype)
        decayed_RD = w_RD * product_R22[:, 1, 0, None]
        w_RD.mul_(product_R22[:, 0, 0, None]).addcmul_(m_RD, product_R22[:, 0, 1, None])
        m_RD.mul_(product_R22[:, 1, 1, None]).add_(decayed_RD)
