"""Nested dropout and co-teaching: values worked out by hand and limits."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from labelmill.errors import DataError
from labelmill.losses.coteaching import (
    best_prefix,
    cross_selection,
    draw_prefix,
    forget_rate,
    keep_prefix,
    prefix_distribution,
    prefix_hits,
    small_loss,
)

Z = torch.tensor([[1.0, -2.0, 0.5, 3.0]], dtype=torch.float64)
W = torch.tensor([[1.0, 0.0, 2.0, 0.5], [0.0, 1.0, -1.0, 0.5]], dtype=torch.float64)  # (K, D)


def test_the_distribution_of_prefixes() -> None:
    p = prefix_distribution(4, 2.0)
    want = [0.6130382513, 0.2895787655, 0.0829657054, 0.0144172778]
    torch.testing.assert_close(p, torch.tensor(want, dtype=torch.float64), atol=1e-9, rtol=0)
    kept = p.flip(0).cumsum(0).flip(0)
    torch.testing.assert_close(kept[1:3], torch.tensor([0.3869617487, 0.0973829832], dtype=torch.float64), atol=1e-9, rtol=0)
    k = torch.arange(1, 513, dtype=torch.float64)
    for eta, mean in ((10.0, 5.97), (100.0, 56.74)):
        assert float((prefix_distribution(512, eta) * k).sum()) == pytest.approx(mean, abs=0.01)
    assert prefix_distribution(5, 1e9).tolist() == pytest.approx([0.2] * 5)
    assert prefix_distribution(5, 1e-2)[0] == 1.0


def test_draws_follow_it_and_are_the_same_on_every_rank() -> None:
    draws = [draw_prefix(4, 2.0, seed=7, step=step) for step in range(4000)]
    assert draws[:50] == [draw_prefix(4, 2.0, seed=7, step=step) for step in range(50)]
    assert draws[:50] != [draw_prefix(4, 2.0, seed=8, step=step) for step in range(50)]
    share = torch.bincount(torch.tensor(draws), minlength=5)[1:] / 4000
    torch.testing.assert_close(share.double(), prefix_distribution(4, 2.0), atol=0.025, rtol=0)


def test_prefix_logits_losses_and_the_decomposition_of_risk() -> None:
    logits = torch.stack([keep_prefix(Z, k) @ W.t() for k in range(1, 5)])[:, 0]
    assert logits.tolist() == [[1, 0], [1, -2], [2, -2.5], [3.5, -1]]
    ce = -torch.log_softmax(logits, 1)[:, 0]
    want = torch.tensor([0.3132616875, 0.0485873516, 0.0110477448, 0.0110477448], dtype=torch.float64)
    torch.testing.assert_close(ce, want, atol=1e-9, rtol=0)
    p = prefix_distribution(4, 2.0)
    assert float((p * ce).sum()) == pytest.approx(0.2071871248, abs=1e-9)
    # bias and variance of the paper's theorem, with the target distribution (.8, .2)
    target, log_q = torch.tensor([0.8, 0.2], dtype=torch.float64), torch.log_softmax(logits, 1)
    risk = float((p[:, None] * -(target * log_q)).sum())
    mean = (p[:, None] * log_q).sum(0)
    variance = -math.log(float(mean.exp().sum()))
    bias = float((target * (target.log() - torch.log_softmax(mean, 0))).sum())
    assert (risk, bias, variance) == pytest.approx((0.5911867192, 0.0204045436, 0.0703797520), abs=1e-9)
    assert risk == pytest.approx(float(-(target * target.log()).sum()) + bias + variance)


def test_prefix_accuracy_and_its_tie_rule() -> None:
    generator = torch.Generator().manual_seed(0)
    z, w = torch.randn(40, 6, generator=generator), torch.randn(3, 6, generator=generator)
    label = torch.randint(0, 3, (40,), generator=generator)
    want = [float(((keep_prefix(z, k) @ w.t()).argmax(1) == label).sum()) for k in range(1, 7)]
    assert prefix_hits(z, w, label).tolist() == want
    assert best_prefix(torch.tensor([0.5, 0.6, 0.6, 0.6])) == 2
    assert best_prefix(torch.tensor([0.7, 0.6, 0.5])) == 1


def test_a_full_prefix_changes_nothing_and_dropped_channels_get_no_gradient() -> None:
    assert keep_prefix(Z, 4) is Z
    layer = nn.Linear(4, 2, bias=False)
    layer(keep_prefix(Z.float(), 2)).sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad[:, 2:].abs().max() == 0
    assert layer.weight.grad[:, :2].abs().min() > 0


def test_the_nets_choose_for_each_other() -> None:
    first = torch.tensor([0.1, 2, 0.3, 0.05, 1.5, *[9.0] * 5])
    second = torch.tensor([*[9.0] * 5, 0.9, 0.2, 3, 0.4, 0.1])
    for_first, for_second = cross_selection(first, second, 0.2)
    assert for_second.tolist() == [3, 0, 2, 4]
    assert (for_first - 5).tolist() == [4, 1, 3, 0]
    all_first, all_second = cross_selection(first, second, 0.0)
    assert (sorted(all_first.tolist()), sorted(all_second.tolist())) == ([5, 6, 7, 8, 9], [0, 1, 2, 3, 4])
    classic_first, classic_second = cross_selection(first[:5], first[:5].flip(0), 0.4, split=False)
    assert (classic_second.tolist(), classic_first.tolist()) == ([3, 0, 2], [1, 4, 2])
    with pytest.raises(DataError, match="9 samples on a worker can't be split"):
        cross_selection(first[:9], second[:9], 0.2)


def test_small_losses_of_samples_that_are_there() -> None:
    loss = torch.tensor([3.0, 1.0, 2.0, 0.0])
    assert small_loss(loss, 0.5, torch.tensor([1.0, 1.0, 1.0, 0.0])).tolist() == [1]
    assert len(small_loss(torch.rand(10), 0.8)) == 2
    assert len(small_loss(torch.rand(10), 0.9)) == 1
    assert len(small_loss(torch.rand(10), 0.99)) == 1, "never none"
    with pytest.raises(DataError, match="of no sample"):
        small_loss(loss, 0.5, torch.zeros(4))
    assert [forget_rate(s, 0.4, 10) for s in (0, 5, 10, 20)] == pytest.approx([0, 0.2, 0.4, 0.4])
    assert forget_rate(0, 0.4, 0) == 0.4
    with pytest.raises(DataError, match="forget rate 1"):
        forget_rate(0, 1.0, 0)
    with pytest.raises(DataError, match="eta is 0"):
        prefix_distribution(4, 0)
