"""Keeping replicas of class rows equal.

Replicas apply the same summed gradient to the same rows, so they stay equal to the bit as long as their
hardware rounds alike and nothing else writes rows. That is checked, not assumed: before a checkpoint the
replicas compare digests of their blocks, and blocks that differ are copied from the first replica.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor

from labelmill.heads.ranks import Ranks

ROWS_A_BLOCK = 4096
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def mend_replicas(replicas: Ranks, tensors: Mapping[str, Tensor]) -> int:
    """Copies blocks of rows in which a replica differs from the first; returns how many it were, with a warning.

    Collective over `replicas`. The tensors' first axis is the class; the replicas hold the same shapes.
    """
    if replicas.world == 1:
        return 0
    mended = 0
    for name in sorted(tensors):
        digest_K = block_digests(tensors[name])
        if not digest_K.numel():
            continue
        digest_RK = replicas.gather_rows(digest_K[None], [1] * replicas.world)
        for block in (digest_RK != digest_RK[0]).any(dim=0).nonzero()[:, 0].tolist():
            part = tensors[name][block * ROWS_A_BLOCK : (block + 1) * ROWS_A_BLOCK]
            part.copy_(replicas.copy_from_first_(part.contiguous()))
            mended += 1
    if mended:
        warnings.warn(
            f"the replicas of the class rows differed in {mended} blocks; these were copied from the first replica",
            RuntimeWarning,
            stacklevel=2,
        )
    return mended


def block_digests(rows: Tensor) -> Tensor:
    """A digest of the bits of each block of rows, int64; equal bits in an equal order give equal digests."""
    digests = []
    for lo in range(0, len(rows), ROWS_A_BLOCK):
        part = rows[lo : lo + ROWS_A_BLOCK].contiguous()
        bits = part.view(_INTEGERS[part.element_size()]).flatten().to(torch.int64)
        # odd factors that differ from place to place; int64 wraps around, which is what a digest wants
        place = torch.arange(bits.numel(), device=bits.device).mul_(0x9E3779B97F4A7C1).bitwise_or_(1)
        digests.append((bits * place).sum())
    return torch.stack(digests) if digests else torch.empty(0, dtype=torch.int64, device=rows.device)
