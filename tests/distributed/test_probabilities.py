"""Probabilities of a sharded head against a dense softmax, on one rank and on two with batches of different sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from labelmill.heads.config import HeadConfig
from labelmill.heads.probabilities import class_probabilities
from labelmill.heads.sharded import ShardedHead
from labelmill.training.local import spawn

CLASSES, DIM = 37, 6
CASES: list[dict[str, Any]] = [
    {"scale": 8.0},
    {"scale": 200.0},  # exponentials overflow unless the maximum is taken off
    {"normalize": False, "scale": 3.0},
    {"sub_centres": 2, "scale": 5.0},
]


def probabilities(rank: int, world: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x_ND = torch.randn(9, DIM, generator=generator)
    given_N = torch.randint(0, CLASSES, (9,), generator=generator)
    given_N[4] = -1
    mine = slice(0, 9) if world == 1 else (slice(0, 6), slice(6, 9))[rank]
    out = {}
    for number, fields in enumerate(CASES):
        head = ShardedHead(CLASSES, DIM, HeadConfig(block_rows=8, init_std=1.0, **fields), seed=number)
        found = class_probabilities(head, x_ND[mine], given_N[mine], 5)
        for name in ("given_B", "entropy_B", "class_id_Bk", "prob_Bk"):
            out[f"{number}.{name}"] = getattr(found, name)
        if world == 1:
            out |= {f"{number}.want.{k}": v for k, v in dense(head, x_ND, given_N).items()}
    return out


def dense(head: ShardedHead, x_ND: Tensor, given_N: Tensor) -> dict[str, Tensor]:
    w_CD, config = head.w_CD.double(), head.config
    x_ND = x_ND.double()
    if config.normalize:
        w_CD, x_ND = (torch.nn.functional.normalize(t, dim=1) for t in (w_CD, x_ND))
    z_NC = (config.scale * x_ND @ w_CD.t()).unflatten(1, (CLASSES, -1)).amax(dim=2)
    p_NC = torch.softmax(z_NC, dim=1)
    prob, ids = p_NC.topk(5)
    given = p_NC.gather(1, given_N.clamp_min(0)[:, None])[:, 0] * (given_N >= 0)
    return {
        "given_B": given,
        "entropy_B": -torch.special.xlogy(p_NC, p_NC).sum(dim=1),
        "class_id_Bk": ids,
        "prob_Bk": prob,
    }


@pytest.fixture(scope="module")
def alone() -> dict[str, Tensor]:
    return probabilities(0, 1)


@pytest.mark.parametrize("number", range(len(CASES)))
def test_equal_to_a_dense_softmax(alone: dict[str, Tensor], number: int) -> None:
    for name in ("given_B", "entropy_B", "prob_Bk"):
        want = alone[f"{number}.want.{name}"].float()
        torch.testing.assert_close(alone[f"{number}.{name}"], want, atol=2e-4, rtol=2e-3)
    assert (alone[f"{number}.class_id_Bk"][:, 0] == alone[f"{number}.want.class_id_Bk"][:, 0]).all()


def test_two_ranks_agree_with_one(alone: dict[str, Tensor]) -> None:
    parts = spawn(probabilities, 2)
    for name in (name for name in alone if "want" not in name):
        torch.testing.assert_close(torch.cat([part[name] for part in parts]), alone[name], atol=1e-4, rtol=1e-3)
