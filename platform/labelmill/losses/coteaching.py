"""Nested dropout and small-loss selection: compressed features, and two nets that choose samples for each other.

Chen, Hu, Shen, Ai, Suykens: Compressing Features for Learning with Noisy Labels (TNNLS 2022, arXiv 2206.13140); Rippel et al.
(ICML 2014) for nested dropout; Han et al. (NeurIPS 2018) for co-teaching.

Shape legend: N samples, D channels, K classes, J prefixes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from labelmill.errors import DataError


def prefix_distribution(channels: int, eta: float, mu: float = 0.0) -> Tensor:
    """P(k), float64 (D,), of keeping the first k = 1 ... D channels: proportional to exp(-((k - mu) / eta)^2)."""
    if eta <= 0:
        raise DataError(f"eta is {eta}; the spread of the number of channels must be above 0.")
    k = torch.arange(1, channels + 1, dtype=torch.float64)
    return torch.softmax(-(((k - mu) / eta) ** 2), dim=0)


def draw_prefix(channels: int, eta: float, seed: int, step: int, mu: float = 0.0) -> int:
    """The k of a step, the same on all ranks: one draw a batch, from a generator of (seed, step)."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)
    return 1 + int(torch.multinomial(prefix_distribution(channels, eta, mu), 1, generator=generator))


def keep_prefix(z_ND: Tensor, k: int) -> Tensor:
    """z with the channels from k on set to 0; the others aren't rescaled."""
    return z_ND if k >= z_ND.shape[1] else torch.nn.functional.pad(z_ND[:, :k], (0, z_ND.shape[1] - k))


def prefix_hits(z_ND: Tensor, w_KD: Tensor, label_N: Tensor, weight_N: Tensor | None = None) -> Tensor:
    """How many samples each prefix gets right, float64 (D,): logits grow channel by channel, N x D x K is never there."""
    logits_NK = z_ND.new_zeros(len(z_ND), w_KD.shape[0])
    weight_N = torch.ones(len(z_ND), dtype=torch.float64) if weight_N is None else weight_N.double().cpu()
    hits = torch.zeros(z_ND.shape[1], dtype=torch.float64)
    for k in range(z_ND.shape[1]):
        logits_NK += z_ND[:, k : k + 1] * w_KD[:, k]
        hits[k] = ((logits_NK.argmax(dim=1) == label_N).cpu() * weight_N).sum()
    return hits


def best_prefix(accuracy_D: Tensor) -> int:
    """The shortest of the best: argmax of a_k - 1e-5 (k - 1), counted from 1. A best prefix of one channel is one channel."""
    penalty = 1e-5 * torch.arange(len(accuracy_D), dtype=torch.float64)
    return 1 + int((accuracy_D.double() - penalty).argmax())


def forget_rate(step: int, rate: float, ramp_steps: int) -> float:
    """R of a step: rises linearly from 0 to `rate` over `ramp_steps` (0: constant)."""
    if not 0 <= rate < 1:
        raise DataError(f"forget rate {rate} must lie in [0, 1).")
    return rate * min(1.0, step / ramp_steps) if ramp_steps else rate


def small_loss(loss_N: Tensor, rate: float, weight_N: Tensor | None = None) -> Tensor:
    """The samples with the smallest losses, smallest first: max(1, floor((1 - rate) n)) of those with weight.

    Raises DataError when no sample has weight.
    """
    alive = torch.ones(len(loss_N), dtype=torch.bool, device=loss_N.device) if weight_N is None else weight_N > 0
    count = int(alive.sum())
    if not count:
        raise DataError("small-loss selection of no sample: every one is a hole. Use larger batches.")
    keep = max(1, math.floor((1 - rate) * count + 1e-9))
    return torch.argsort(loss_N.masked_fill(~alive, torch.inf), stable=True)[:keep]


def cross_selection(
    first_N: Tensor, second_N: Tensor, rate: float, weight_N: Tensor | None = None, split: bool = True
) -> tuple[Tensor, Tensor]:
    """(samples for net 1, samples for net 2), as indices into the batch: each net trains on what the other chose.

    Args:
        first_N, second_N: losses of the batch under either net.
        rate: share that is left out.
        weight_N: 0 for holes.
        split: net 1 chooses among the first half and net 2 among the second (the paper's code); otherwise both choose
            among all (the classic form).

    Raises DataError for an odd batch with `split`.
    """
    if not split:
        return small_loss(second_N, rate, weight_N), small_loss(first_N, rate, weight_N)
    if len(first_N) % 2:
        raise DataError(f"a batch of {len(first_N)} samples on a worker can't be split in halves: use an even one.")
    half = len(first_N) // 2
    weights = (None, None) if weight_N is None else (weight_N[:half], weight_N[half:])
    return half + small_loss(second_N[half:], rate, weights[1]), small_loss(first_N[:half], rate, weights[0])
