"""Distillation losses on a class-sharded student, on one to three ranks, against dense float64 logits."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from labelmill.errors import DataError, JobError
from labelmill.heads import distilled
from labelmill.heads.config import HeadConfig
from labelmill.heads.distilled import distillation_loss
from labelmill.heads.optim import SGD
from labelmill.heads.sharded import ShardedHead
from labelmill.heads.teaching import ListedTeacher, LogitTeacher, RowTeacher
from labelmill.losses.class_sums import Listed, dense_distillation
from labelmill.losses.distillation import (
    DIST,
    DKD,
    KD,
    BinaryKL,
    BinaryKLNorm,
    CrossEntropy,
    ListedKD,
    LogitMSE,
    StandardizedKD,
)
from labelmill.losses.margins import CosFace
from labelmill.training.local import spawn

CLASSES, DIM, SAMPLES = 29, 6, 10
MIXES: dict[str, list[tuple[float, Any]]] = {
    "kd": [(0.1, CrossEntropy()), (0.9, KD(temperature=3))],
    "standardized": [(1.0, StandardizedKD())],
    "dkd": [(1.0, CrossEntropy()), (0.5, DKD(beta=2))],
    "dist": [(2.0, DIST(temperature=2))],
    "norm": [(0.7, BinaryKLNorm()), (0.3, BinaryKL()), (0.1, LogitMSE())],
    "listed": [(1.0, ListedKD(temperature=2)), (1.0, CrossEntropy())],
}
HEADS: dict[str, dict[str, Any]] = {
    "cosine": {"scale": 6.0},
    "plain": {"normalize": False, "scale": 1.0, "memory_mb": 0.0},
}


def material() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x_ND = torch.randn(SAMPLES, DIM, generator=generator).double()
    h_NE = torch.randn(SAMPLES, 4, generator=generator).double()
    w_CE = torch.randn(CLASSES, 4, generator=generator).double()
    label_N = torch.randint(0, CLASSES, (SAMPLES,), generator=generator)
    weight_N = torch.ones(SAMPLES).double()
    weight_N[4], weight_N[1] = 0, 2
    return x_ND, h_NE, w_CE, 1.5 * h_NE @ w_CE.T, label_N, weight_N


def listed_of(t_NC: Tensor, temperature: float) -> Listed:
    logits, ids = t_NC.topk(4)
    return Listed(ids, logits, torch.logsumexp(t_NC.scatter(1, ids, -torch.inf) / temperature, 1), temperature)


def make_head(fields: dict[str, Any], **more: Any) -> ShardedHead:
    config = HeadConfig(block_rows=4, init_std=1.0, optimizer=SGD(momentum=0.0), **fields, **more)
    return ShardedHead(CLASSES, DIM, config, seed=1, dtype=torch.float64)


def sharded(rank: int, world: int) -> dict[str, Tensor]:
    with mock.patch.object(distilled, "chunk_rows", return_value=5):  # several chunks a rank, the last one smaller
        return passes(rank, world)


def passes(rank: int, world: int) -> dict[str, Tensor]:
    x_ND, h_NE, w_CE, t_NC, label_N, weight_N = material()
    cuts = [0, SAMPLES] if world == 1 else [0, 7, SAMPLES] if world == 2 else [0, 7, 7, SAMPLES]
    mine = slice(cuts[rank], cuts[rank + 1])
    out = {}
    for shape, fields in HEADS.items():
        for name, losses in MIXES.items():
            for moving in (False, True):
                head = make_head(fields)
                x = x_ND[mine].clone().requires_grad_()
                teacher: Any = LogitTeacher(t_NC[mine])
                if name == "listed":
                    found = listed_of(t_NC[mine], 2.0)
                    teacher = ListedTeacher(found)
                elif moving:
                    teacher = RowTeacher(h_NE[mine], w_CE[head.start : head.stop], 1.5)
                if moving:
                    head.begin_step(0.1)
                loss = distillation_loss(head, x, losses, teacher, label_N[mine], weight_N[mine])
                loss.backward()
                if not moving:
                    out[f"{shape}.{name}.norm"] = head.pending_sq_norm()[None]
                head.step(0.1)
                key = f"{shape}.{name}.{'moved' if moving else 'stepped'}"
                assert x.grad is not None
                out |= {
                    f"{key}.loss": loss.detach()[None],
                    f"{key}.dx": x.grad / world,
                    f"{key}.rows": head.w_CD.clone(),
                }
    return out


def dense(shape: str, name: str) -> dict[str, Tensor]:
    x_ND, _, _, t_NC, label_N, weight_N = material()
    head = make_head(HEADS[shape])
    x, w = x_ND.clone().requires_grad_(), head.w_CD.clone().requires_grad_()
    a, b = (torch.nn.functional.normalize(v, dim=1) for v in (x, w)) if head.config.normalize else (x, w)
    s_NC = head.config.scale * a @ b.T
    total = torch.zeros((), dtype=torch.float64)
    for factor, loss in MIXES[name]:
        listed = listed_of(t_NC, 2.0) if name == "listed" else None
        loss_N = dense_distillation(loss, s_NC, None if listed else t_NC, label_N, weight_N, listed)
        total = total + factor * (loss_N * weight_N).sum() / weight_N.sum()
    total.backward()
    assert x.grad is not None
    assert w.grad is not None
    return {
        "loss": total.detach()[None],
        "dx": x.grad,
        "rows": w.detach() - 0.1 * w.grad,
        "norm": w.grad.square().sum()[None],
    }


@pytest.fixture(scope="module", params=[1, 2, 3])
def parts(request: pytest.FixtureRequest) -> list[dict[str, Tensor]]:
    return [sharded(0, 1)] if request.param == 1 else spawn(sharded, request.param)


@pytest.mark.parametrize("name", MIXES)
@pytest.mark.parametrize("shape", HEADS)
def test_equal_to_dense(parts: list[dict[str, Tensor]], shape: str, name: str) -> None:
    want = dense(shape, name)
    for way in ("stepped", "moved"):
        key = f"{shape}.{name}.{way}"
        for part in parts:
            torch.testing.assert_close(part[f"{key}.loss"], want["loss"], rtol=1e-10, atol=1e-12)
        for what in ("dx", "rows"):
            found = torch.cat([part[f"{key}.{what}"] for part in parts])
            torch.testing.assert_close(found, want[what], rtol=1e-7, atol=1e-9, msg=lambda m: f"{key}.{what}: {m}")  # noqa: B023
    norm = sum(part[f"{shape}.{name}.norm"] for part in parts)
    torch.testing.assert_close(norm, want["norm"], rtol=1e-7, atol=1e-9)


def test_sampled_classes_share_one_subset() -> None:
    """Both softmaxes are over the drawn classes, labels among them."""
    x_ND, _, _, t_NC, label_N, _ = material()
    head = make_head({"scale": 6.0}, sample_rate=0.3)
    loss = distillation_loss(head, x_ND, [(1.0, KD()), (1.0, CrossEntropy())], LogitTeacher(t_NC), label_N)
    loss.backward()
    ids, _ = head.pending_rows()
    assert set(label_N.tolist()) <= set(ids.tolist()) < set(range(CLASSES))
    a, b = (torch.nn.functional.normalize(v, dim=1) for v in (x_ND, head.w_CD))
    s = (6.0 * a @ b.T)[:, ids]
    place = torch.searchsorted(ids, label_N)
    want = dense_distillation(KD(), s, t_NC[:, ids]) + torch.nn.functional.cross_entropy(s, place, reduction="none")
    assert loss.item() == pytest.approx(want.mean().item())


def test_what_is_refused() -> None:
    x_ND, _, _, t_NC, label_N, _ = material()
    with pytest.raises(JobError, match=r"margin\.kind to none"):
        distillation_loss(make_head({"margin": CosFace()}), x_ND, [(1.0, KD())], LogitTeacher(t_NC), label_N)
    head = make_head({})
    with pytest.raises(DataError, match="teacher has 28 classes and the student 29"):
        distillation_loss(head, x_ND, [(1.0, KD())], LogitTeacher(t_NC[:, 1:]), label_N)
    with pytest.raises(DataError, match="class id 29"):
        distillation_loss(head, x_ND, [(1.0, KD())], LogitTeacher(t_NC), label_N.clone().fill_(29))
    with pytest.raises(DataError, match="dkd takes a label"):
        distillation_loss(head, x_ND, [(1.0, DKD())], LogitTeacher(t_NC))
    with pytest.raises(FloatingPointError):
        distillation_loss(head, x_ND * torch.nan, [(1.0, KD())], LogitTeacher(t_NC), label_N)
    with pytest.raises(FloatingPointError, match="not finite"):
        distillation_loss(head, x_ND, [(1.0, KD())], LogitTeacher(t_NC * torch.nan), label_N)
