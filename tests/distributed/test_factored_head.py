"""The factored head of the spherical family against dense autograd and SGD in double precision, on real gloo processes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from labelmill.errors import DataError
from labelmill.heads.factored import FactoredConfig, FactoredHead
from labelmill.heads.storage import write_index
from labelmill.losses.spherical import (
    SphericalSoftmax,
    SquaredError,
    TaylorSoftmax,
    ZLoss,
    dense_spherical,
)
from labelmill.training.local import spawn

LOGITS = torch.tensor([[2.0, 0.0, -1.0, 1.0, 0.5]], dtype=torch.float64)
FIRST = torch.tensor([[0]])


@pytest.mark.parametrize(("a", "b", "value"), [(1, 0, 0.2014132780), (0.1, 2, 7.1845964801), (1, 2, 0.9740769842)])
def test_z_loss_values(a: float, b: float, value: float) -> None:
    assert float(dense_spherical(ZLoss(a=a, b=b), LOGITS, FIRST)) == pytest.approx(value, abs=1e-9)


def test_z_loss_gradient_and_invariances() -> None:
    o = LOGITS.clone().requires_grad_()
    loss = dense_spherical(ZLoss(), o, FIRST)
    loss.backward()
    expected = [-0.0638489333, 0.0091212762, -0.0456063810, 0.0638489333, 0.0364851048]
    assert o.grad[0].tolist() == pytest.approx(expected, abs=1e-9)
    assert float(o.grad.sum()) == pytest.approx(0, abs=1e-12)
    assert float((o.grad * LOGITS).sum()) == pytest.approx(0, abs=1e-12)
    assert float(dense_spherical(ZLoss(), 3 * LOGITS + 7, FIRST)) == pytest.approx(float(loss.detach()), abs=1e-12)
    assert float(dense_spherical(ZLoss(), -LOGITS, FIRST)) != pytest.approx(float(loss.detach()), abs=1e-3)
    hinge = dense_spherical(ZLoss(a=1e4, b=2), LOGITS, FIRST)
    assert float(hinge) == pytest.approx(0.5, abs=1e-3), "a -> infinity: relu(b - z), z is 1.5 here"
    one_hot = torch.eye(5, dtype=torch.float64)[:1]
    assert float(dense_spherical(ZLoss(a=1e4, b=3), one_hot, FIRST)) == pytest.approx(1.0, abs=1e-3), (
        "z is 2 at the most"
    )
    flat = torch.ones(1, 5, dtype=torch.float64, requires_grad=True)
    dense_spherical(ZLoss(), flat, FIRST).backward()
    assert float(flat.grad.abs().max()) == 0.0, "all logits equal: no direction"


LOSSES = [ZLoss(a=1, b=2), SquaredError(), SphericalSoftmax(eps=0.1), TaylorSoftmax()]
RATES = [0.2, 0.01, 0.2, 0.2]
CLASSES, DIM = 300, 12
SPLITS = {1: [7], 2: [3, 4], 3: [4, 0, 3]}


def batches(step: int, targets: int) -> tuple[Tensor, Tensor, Tensor]:
    """7 samples; the same class for two of them, and one without weight."""
    noise = torch.Generator().manual_seed(step)
    H = torch.randn(7, DIM, generator=noise, dtype=torch.float64)
    ids = torch.randint(CLASSES, (7, targets), generator=noise)
    ids[5, 0] = ids[2, 0]
    if targets > 1:
        ids[:, 1] = (ids[:, 0] + 1 + ids[:, 1] % (CLASSES - 1)) % CLASSES
        ids[4, 1] = -1
    weight = torch.ones(7, dtype=torch.float64)
    weight[6] = 0.0
    return H, ids, weight


def dense_run(W: Tensor, index: int, steps: int, targets: int, decay: float) -> tuple[Tensor, list[Tensor]]:
    W, seen = W.clone(), []
    for step in range(steps):
        H, ids, weight = batches(step, targets)
        H.requires_grad_()
        W.requires_grad_()
        loss = (dense_spherical(LOSSES[index], H @ W.T, ids) * weight).sum() / weight.sum()
        loss.backward()
        seen.append(torch.cat([loss.detach()[None], H.grad.flatten()]))
        W = ((1 - RATES[index] * decay) * W - RATES[index] * W.grad).detach()
    return W, seen


def factored_run(rank: int, world: int, index: int, steps: int, targets: int, decay: float, every: int) -> list[Tensor]:
    config = FactoredConfig(loss=LOSSES[index], init_std=0.1, weight_decay=decay, stabilise_every=every)
    head = FactoredHead(CLASSES, DIM, config, seed=3, dtype=torch.float64)
    head.grad_scale = 1.0
    first = head.w_CD.clone()
    lo = sum(SPLITS[world][:rank])
    mine = slice(lo, lo + SPLITS[world][rank])
    seen = []
    for step in range(steps):
        H, ids, weight = batches(step, targets)
        own = H[mine].clone().requires_grad_()
        loss = head.loss(own, ids[mine], weight[mine])
        loss.backward()
        head.step(RATES[index])
        seen.append(torch.cat([loss.detach()[None], own.grad.flatten()]))
    sums = head.sums_of(batches(0, targets)[0])
    scores, found = head.topk(batches(0, targets)[0][mine], 5)
    kept = [head.Q_dd.clone(), head.wbar_d.clone()]
    return [first, head.state_tensors()["rows"], *kept, scores, found, *sums, torch.stack(seen)]


@pytest.mark.parametrize("index", range(len(LOSSES)))
def test_factored_is_dense_sgd(index: int) -> None:
    for targets, decay in ((1, 0.0), (2, 0.01)):
        if targets > 1 and index == 2:
            decay = 0.0
        first, W, Q, wbar, *_, seen = factored_run(0, 1, index, 60, targets, decay, 10)
        want, expected = dense_run(first, index, 60, targets, decay)
        torch.testing.assert_close(seen, torch.stack(expected), rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(W, want, rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(Q, want.T @ want, rtol=1e-8, atol=1e-9)
        torch.testing.assert_close(wbar, want.sum(0), rtol=1e-8, atol=1e-9)


def test_a_thousand_steps_with_stabilisation() -> None:
    """U leaves [1/2, 2] many times under a large rate, and goes back; nothing else changes."""
    first, W, Q, _, scores, found, q, s, seen = factored_run(0, 1, 0, 1000, 1, 0.05, 10)
    want, expected = dense_run(first, 0, 1000, 1, 0.05)
    assert float((W - want).norm() / want.norm()) < 1e-6
    assert float((seen - torch.stack(expected)).abs().max()) < 1e-6
    assert float((Q - want.T @ want).norm() / Q.norm()) < 1e-6
    logits = batches(0, 1)[0] @ want.T
    best, ids = logits.topk(5)
    torch.testing.assert_close(scores, best, rtol=1e-6, atol=1e-6)
    assert torch.equal(found, ids)
    torch.testing.assert_close(q, logits.square().sum(1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(s, logits.sum(1), rtol=1e-6, atol=1e-6)


def two_losses(rank: int, world: int) -> list[list[Tensor]]:
    return [factored_run(rank, world, index, 15, 2, 0.01, 5) for index in (0, 2)]


@pytest.mark.parametrize("world", [3])
def test_sharded_is_one_rank(world: int) -> None:
    parts = spawn(two_losses, world)
    for place, index in enumerate((0, 2)):
        alone = factored_run(0, 1, index, 15, 2, 0.01, 5)
        ranks = [part[place] for part in parts]
        torch.testing.assert_close(torch.cat([r[1] for r in ranks]), alone[1], rtol=1e-9, atol=1e-11)
        for rank in ranks:
            torch.testing.assert_close(rank[2], alone[2], rtol=1e-9, atol=1e-10)
            torch.testing.assert_close(rank[8][:, 0], alone[8][:, 0], rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(torch.cat([r[4] for r in ranks]), alone[4], rtol=1e-9, atol=1e-10)
        assert torch.equal(torch.cat([r[5] for r in ranks]), alone[5])


def test_stabilising_and_unfactoring_change_no_row() -> None:
    for values, whole in (([3.0, 0.2, 1.0, 1.1, 0.9, 1.0, 1.0, 1.0], False), ([3.0, 0.2, 4.0, 0.1, 1, 1, 1, 1], True)):
        head = FactoredHead(60, 8, FactoredConfig(init_std=1.0), dtype=torch.float64)
        noise = torch.Generator().manual_seed(0)
        turns = [torch.linalg.qr(torch.randn(8, 8, generator=noise, dtype=torch.float64))[0] for _ in range(2)]
        head.U_dd = turns[0] @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ turns[1]
        head.omega_d = torch.randn(8, generator=noise, dtype=torch.float64)
        want = head.w_CD @ head.U_dd + head.omega_d
        head._stabilise()
        after = torch.linalg.svdvals(head.U_dd)
        assert bool(((after > 0.5) & (after < 2.0)).all())
        assert torch.equal(head.U_dd, torch.eye(8, dtype=torch.float64)) == whole, "many at once un-factor"
        torch.testing.assert_close(head.w_CD @ head.U_dd + head.omega_d, want, rtol=1e-10, atol=1e-10)
        q, s = head.sums_of(torch.eye(8, dtype=torch.float64))
        torch.testing.assert_close(q, want.square().sum(0))
        torch.testing.assert_close(s, want.sum(0))


def test_magnitudes_rank_on_both_sides() -> None:
    for loss, centre in ((SphericalSoftmax(), 0.0), (TaylorSoftmax(), -1.0)):
        head = FactoredHead(9, 4, FactoredConfig(loss=loss, init_std=1.0), dtype=torch.float64)
        x = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        _, found = head.topk(x, 9)
        assert torch.equal(found, (x @ head.w_CD.T - centre).abs().argsort(1, descending=True))


def test_accumulation_clipping_and_the_norm() -> None:
    config = FactoredConfig(init_std=0.1)
    whole, parts = (FactoredHead(50, 6, config, seed=1, dtype=torch.float64) for _ in range(2))
    noise = torch.Generator().manual_seed(1)
    H = torch.randn(8, 6, generator=noise, dtype=torch.float64)
    ids = torch.randint(50, (8,), generator=noise)
    W = whole.w_CD.clone().requires_grad_()
    dense_spherical(ZLoss(), H @ W.T, ids[:, None]).mean().backward()
    whole.loss(H, ids).backward()
    assert float(whole.pending_sq_norm()) == pytest.approx(float(W.grad.square().sum()), rel=1e-9)
    whole.step(0.3, scale=0.25)
    for part in (slice(0, 4), slice(4, 8)):
        (parts.loss(H[part], ids[part]) / 2).backward()
    assert float(parts.pending_sq_norm()) == pytest.approx(float(W.grad.square().sum()), rel=1e-9)
    parts.step(0.3, scale=0.25)
    want = W.detach() - 0.3 * 0.25 * W.grad
    for head in (whole, parts):
        torch.testing.assert_close(head.state_tensors()["rows"], want, rtol=1e-9, atol=1e-12)


def test_saved_and_loaded_in_the_middle(tmp_path: Path) -> None:
    def steps(head: FactoredHead, first: int, last: int) -> None:
        for step in range(first, last):
            H, ids, _ = batches(step, 1)
            head.loss(H, ids).backward()
            head.step(0.2)

    config = FactoredConfig(loss=LOSSES[0], init_std=0.1)
    one, two = (FactoredHead(CLASSES, DIM, config, seed=3, dtype=torch.float64) for _ in range(2))
    steps(one, 0, 8)
    write_index(tmp_path, CLASSES, [one.save(tmp_path)])
    two.load(tmp_path)
    assert two.steps == 8
    for head in (one, two):
        steps(head, 8, 16)
    assert torch.equal(one.state_tensors()["rows"], two.state_tensors()["rows"]), "to the bit"


def test_float32_drifts_little() -> None:
    torch.manual_seed(0)
    head = FactoredHead(2000, 32, FactoredConfig(loss=ZLoss(b=3), init_std=0.2, recompute_every=10**6))
    W = head.w_CD.double().clone()
    for step in range(400):
        noise = torch.Generator().manual_seed(step)
        H, ids = torch.randn(32, 32, generator=noise), torch.randint(2000, (32, 1), generator=noise)
        head.loss(H, ids).backward()
        head.step(3.2)
        W.requires_grad_()
        dense_spherical(ZLoss(b=3), H.double() @ W.T, ids).mean().backward()
        W = (W - 3.2 * W.grad).detach()
    rows = head.state_tensors()["rows"].double()
    assert float((rows - W).norm() / W.norm()) < 2e-5
    assert float((head.Q_dd.double() - W.T @ W).norm() / (W.T @ W).norm()) < 2e-5


def test_bad_input() -> None:
    with pytest.raises(DataError, match="at least two classes, not 1"):
        FactoredHead(1, 4, FactoredConfig())
    with pytest.raises(ValueError, match="float32 or float64 only"):
        FactoredHead(5, 4, FactoredConfig(), dtype=torch.bfloat16)
    head = FactoredHead(5, 4, FactoredConfig())
    with pytest.raises(DataError, match="sample 1 of rank 0's batch names a class twice"):
        head.loss(torch.randn(2, 4), torch.tensor([[1, 2], [3, 3]]))
    with pytest.raises(DataError, match="label 5 of sample 0"):
        head.loss(torch.randn(1, 4), torch.tensor([5]))
    value = head.loss(torch.zeros(2, 4), torch.tensor([1, 2]))
    assert bool(torch.isfinite(value))
    assert head.flat == 2
