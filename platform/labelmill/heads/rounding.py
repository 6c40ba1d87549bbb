"""Rounding to a narrower floating type that is right on average."""

from __future__ import annotations

import torch
from torch import Tensor


def round_stochastically(x: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """float32 -> bfloat16, up or down with the probability that makes the mean exact.

    An update smaller than half a unit in the last place would otherwise never change a row (Gupta et al., Deep
    Learning with Limited Numerical Precision, ICML 2015). Raises TypeError for other types.
    """
    if dtype != torch.bfloat16 or x.dtype != torch.float32:
        raise TypeError(f"stochastic rounding goes from float32 to bfloat16, not from {x.dtype} to {dtype}")
    bits = x.contiguous().view(torch.int32)
    noise = torch.randint(0, 1 << 16, bits.shape, dtype=torch.int32, device=x.device, generator=generator)
    # a bfloat16 is the upper half of a float32: adding noise below it carries as often as the lower half is large
    return (bits + noise).bitwise_and_(-(1 << 16)).view(torch.float32).to(dtype)
