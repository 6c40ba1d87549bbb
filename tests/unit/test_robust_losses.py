"""Losses for noisy labels: values worked out by hand, limits, gradients, and the memory of samples."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from labelmill.errors import DataError
from labelmill.losses.classification import GCE, LDR, MAE, SCE, Softmax, dense_loss
from labelmill.losses.sample_state import ALDR, ELR, NormalizedLDR, kl_to_uniform, ldr_kl, normalize_scores
from labelmill.training.local import spawn
from labelmill.training.sample_state import SampleState

F = torch.tensor([[2.0, 1.0, -1.0]], dtype=torch.float64)
P = torch.softmax(F, 1)[0]


def at(loss: Any, label: int, f: torch.Tensor = F) -> float:
    return dense_loss(loss, f, torch.tensor([[label]])).item()


# --- without memory ---


def test_mae_gce_and_sce_by_hand() -> None:
    for label in range(3):
        p = float(P[label])
        assert at(MAE(), label) == pytest.approx(2 * (1 - p), abs=1e-12)
        assert at(GCE(q=0.7), label) == pytest.approx((1 - p**0.7) / 0.7, abs=1e-12)
        assert at(SCE(alpha=0.1, beta=1.0), label) == pytest.approx(-0.1 * math.log(p) + 4 * (1 - p), abs=1e-12)
    assert at(GCE(q=1.0), 1) == pytest.approx(at(MAE(), 1) / 2)
    assert at(GCE(q=1e-7), 1) == pytest.approx(at(Softmax(), 1), abs=1e-6)


def test_symmetric_losses_sum_to_a_constant_over_the_labels() -> None:
    for f in (F, torch.randn(1, 3, dtype=torch.float64)):
        assert sum(at(MAE(), y, f) for y in range(3)) == pytest.approx(4.0)  # 2 (K - 1)
        assert sum(at(SCE(alpha=0.0), y, f) for y in range(3)) == pytest.approx(8.0)
    assert sum(at(Softmax(), y) for y in range(3)) != pytest.approx(sum(at(Softmax(), y, 2 * F) for y in range(3)))


def test_gradients_are_finite_far_out() -> None:
    for loss in (MAE(), GCE(), SCE(), LDR()):
        f = torch.tensor([[500.0, -500.0, 0.0]], requires_grad=True)
        for label in (0, 1):
            (grad,) = torch.autograd.grad(dense_loss(loss, f, torch.tensor([[label]])).sum(), f)
            assert torch.isfinite(grad).all()


# --- LDR and ALDR ---


def test_ldr_agrees_with_the_row_loss_and_has_the_papers_limits() -> None:
    lam = torch.ones(1, dtype=torch.float64)
    for label, value in ((0, -0.7190854341), (1, 0.3253955549)):
        assert ldr_kl(F, torch.tensor([label]), lam, 0.1).item() == pytest.approx(value, abs=1e-9)
    assert ldr_kl(F, torch.tensor([0]), lam, 0.0).item() == pytest.approx(at(Softmax(), 0) - math.log(3))
    assert ldr_kl(F, torch.tensor([1]), 1e-3 * lam, 0.1).item() == pytest.approx(1.1, abs=2e-3)
    assert ldr_kl(F, torch.tensor([1]), 1e6 * lam, 0.1).item() == pytest.approx(-0.2666666667, abs=1e-5)
    loss, state = NormalizedLDR(lam=2.0, normalize="none")(F, torch.tensor([1]), torch.zeros(1, 0))
    assert loss.item() == pytest.approx(at(LDR(lam=2.0), 1))
    assert state.shape == (1, 0)


def test_the_gradient_of_ldr_is_the_worst_distribution_less_the_label() -> None:
    f = F.clone().requires_grad_()
    lam = torch.tensor([0.7], dtype=torch.float64)
    (grad,) = torch.autograd.grad(ldr_kl(f, torch.tensor([1]), lam, 0.1).sum(), f)
    delta = torch.tensor([1.1, 0.0, -1.9], dtype=torch.float64)
    want = torch.softmax(delta / 0.7, 0) - torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(grad[0], want)


def test_aldr_at_its_exact_maximum() -> None:
    loss = ALDR(lam0=1.0, alpha=2.0, gap=0.1, normalize="none")
    value, lam = loss.maximum(F, torch.tensor([1]))
    assert lam.item() == pytest.approx(0.7517299131, abs=1e-9)
    assert value.item() == pytest.approx(0.3741424812, abs=1e-9)
    grid = torch.linspace(0.5, 1.0, 20001, dtype=torch.float64)
    values = loss.value(F.expand(len(grid), 3), torch.ones(len(grid), dtype=torch.int64), grid)
    assert values.max().item() == pytest.approx(value.item(), abs=1e-8)
    far, _ = ALDR(lam0=1.0, alpha=1e9, normalize="none").maximum(F, torch.tensor([1]))
    assert far.item() == pytest.approx(0.3253955549, abs=1e-6), "without adaptivity it is LDR"


def test_aldr_moves_the_temperature_between_its_bounds() -> None:
    loss = ALDR(lam0=2.0, alpha=4.0, normalize="none")
    lam = torch.full((1,), 2.0, dtype=torch.float64)
    assert loss.temperature(torch.zeros(1, 3, dtype=torch.float64), lam).item() == pytest.approx(2.0)
    sure = torch.tensor([[900.0, 0.0, 0.0]], dtype=torch.float64)
    assert loss.temperature(sure, lam).item() == pytest.approx(1.5, abs=1e-3)
    value, state = loss(F, torch.tensor([1]), lam[:, None])
    assert state.item() == pytest.approx(loss.temperature(F, lam).item())
    assert value.item() == pytest.approx(loss.value(F, torch.tensor([1]), state[:, 0]).item())
    _, again = ALDR(lam0=2.0, alpha=4.0, normalize="none", iterations=50)(F, torch.tensor([1]), 0.1 + 0 * lam[:, None])
    assert loss.temperature(F, again[:, 0]).item() == pytest.approx(again.item()), "a fixed point, whatever was kept"


def test_scores_are_normalised_as_in_the_paper() -> None:
    torch.testing.assert_close(normalize_scores(F, "l1")[0], torch.tensor([1.5, 0.75, -0.75], dtype=torch.float64))
    soft = normalize_scores(F, "softplus")[0]
    torch.testing.assert_close(
        soft, torch.tensor([1.6999779, 1.0496433, 0.2503789], dtype=torch.float64), atol=1e-6, rtol=0
    )
    assert torch.isfinite(normalize_scores(torch.zeros(1, 3), "l1")).all()
    assert kl_to_uniform(torch.tensor([[1.0, 0.0, 0.0]])).item() == pytest.approx(math.log(3))


def test_settings_out_of_range_are_refused() -> None:
    for wrong in ({"alpha": 1.0}, {"lam0": 0.0}, {"normalize": "l2"}):
        with pytest.raises(ValidationError):
            ALDR(**wrong)  # type: ignore[arg-type]


# --- ELR ---


def test_elr_by_hand_over_two_visits() -> None:
    loss, label = ELR(lam=3.0, beta=0.7), torch.tensor([1])
    first, state = loss(F, label, torch.zeros(1, 3, dtype=torch.float64))
    torch.testing.assert_close(state[0], 0.3 * P)
    assert first.item() == pytest.approx(-math.log(P[1]) + 3 * math.log(1 - 0.3 * float((P * P).sum())))
    g = torch.tensor([[0.0, 2.0, 0.0]], dtype=torch.float64, requires_grad=True)
    second, state = loss(g, label, state)
    q = torch.softmax(g.detach(), 1)[0]
    t = 0.7 * 0.3 * P + 0.3 * q
    torch.testing.assert_close(state[0], t)
    (grad,) = torch.autograd.grad(second.sum(), g)
    inner = float((q * t).sum())
    want = q - torch.tensor([0.0, 1.0, 0.0]) - 3.0 * q * (t - inner) / (1 - inner)  # eq. 7: the targets are constants
    torch.testing.assert_close(grad[0], want)


# --- the memory ---


def test_samples_are_remembered_by_key() -> None:
    state = SampleState([f"k{i}" for i in range(50)], 2, initial=0.5)
    rows = state.rows(["k7", "k3", "k7"])
    assert rows[0] == rows[2] != rows[1]
    new = torch.tensor([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]])
    state.write(rows, new, torch.tensor([1.0, 1.0, 1.0]))
    assert state.read(state.rows(["k3", "k7", "k8"])).tolist() == [[2, 2], [3, 3], [0.5, 0.5]]
    state.write(state.rows(["k8", "k3"]), torch.full((2, 2), 9.0), torch.tensor([0.0, 1.0]))
    assert state.read(state.rows(["k3", "k8"])).tolist() == [[9, 9], [0.5, 0.5]], "holes leave no trace"
    assert set(dict(state.named_buffers())) == {"values_NW"}, "what checkpoints hold"
    with pytest.raises(DataError, match="sample 'x' isn't among the 50 samples"):
        state.rows(["k1", "x"])
    with pytest.raises(DataError, match="'a' and 'a' can't be told apart"):
        SampleState(["a", "b", "a"], 1)


def _two_ranks(rank: int, world: int) -> torch.Tensor:
    state = SampleState([f"k{i}" for i in range(10)], 1)
    keys = ["k1", "k2", "k3"] if rank == 0 else ["k4", "k2"]  # batches of different sizes
    state.write(state.rows(keys), torch.full((len(keys), 1), rank + 1.0), torch.ones(len(keys)))
    return state.read(state.rows([f"k{i}" for i in range(6)]))[:, 0]


def test_all_ranks_remember_the_same() -> None:
    for values in spawn(_two_ranks, 2):
        assert values.tolist() == [0, 1, 2, 1, 2, 0]


def test_state_survives_a_file(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    keys = [f"k{i}" for i in range(10)]
    state = SampleState(keys, 1)
    state.write(state.rows(["k4"]), torch.tensor([[7.0]]), torch.ones(1))
    save_file(dict(state.named_buffers()), tmp_path / "s.safetensors")
    other = SampleState(keys[::-1], 1)  # the keys may come in another order
    other.values_NW.copy_(load_file(tmp_path / "s.safetensors")["values_NW"])
    assert other.read(other.rows(["k4", "k5"])).tolist() == [[7], [0]]
