"""Losses of dual encoders against values computed by hand and by other means, in double precision."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from labelmill.losses.classification import dense_loss
from labelmill.losses.retrieval import (
    BCESection,
    DecoupledSection,
    SoftmaxSection,
    SoftTopKSection,
    draw_positives,
    most_positives,
    soft_topk_loss,
    soft_topk_threshold,
)

S = torch.tensor([[2.0, 0.5, 1.0, -1.0]], dtype=torch.float64)
P = torch.tensor([[0, 1]])


def value_and_grad(loss, s: Tensor = S, ids: Tensor = P, **options) -> tuple[float, list[float]]:
    s = s.clone().requires_grad_()
    value = dense_loss(loss, s, ids, **options).sum()
    value.backward()
    return float(value.detach()), s.grad[0].tolist()


def test_decoupled_softmax_takes_other_positives_out() -> None:
    loss = DecoupledSection().row_loss()
    value, grad = value_and_grad(loss)
    assert value == pytest.approx(0.7019845682, abs=1e-10)
    assert grad == pytest.approx([-0.1473077437, -0.3258962861, 0.4167967267, 0.0564073031], abs=1e-10)
    for weight, expected in (([1.0, 0.0], 0.3490122168), ([0.0, 1.0], 1.0549569196)):
        one, _ = value_and_grad(loss, target_NP=torch.tensor([weight], dtype=torch.float64))
        assert one == pytest.approx(expected, abs=1e-10), "a positive of weight 0 is neither pulled nor pushed"
    high = S.clone()
    high[0, 0] = 10.0
    _, grad = value_and_grad(loss, high)
    assert grad[0] == pytest.approx(-7.0e-05, rel=1e-2)
    assert grad[1] == pytest.approx(-0.3258962861, abs=1e-10), "the hard positive doesn't feel the easy one"


def test_softmax_pushes_an_easy_positive_down() -> None:
    loss = SoftmaxSection().row_loss()
    value, grad = value_and_grad(loss)
    assert 2 * value == pytest.approx(2.4903637962, abs=1e-10), "the sum over positives, here their mean"
    assert 2 * grad[0] == pytest.approx(0.2189200752, abs=1e-10)
    high = S.clone()
    high[0, 0] = 10.0
    assert 2 * value_and_grad(loss, high)[1][0] == pytest.approx(0.9995701657, abs=1e-10)


def test_one_positive_is_cross_entropy_and_bce_is_its_own() -> None:
    one, _ = value_and_grad(DecoupledSection().row_loss(), ids=torch.tensor([[0]]))
    assert one == pytest.approx(float(torch.nn.functional.cross_entropy(S, torch.tensor([0]))), abs=1e-12)
    value, _ = value_and_grad(BCESection().row_loss())
    assert value / 4 == pytest.approx(0.5568820926, abs=1e-10)
    moved, _ = value_and_grad(BCESection(bias=-3.0).row_loss(), S + 3.0)
    assert moved == pytest.approx(value, abs=1e-12)


def test_constants_change_only_bce() -> None:
    for section in (SoftmaxSection(), DecoupledSection()):
        assert value_and_grad(section.row_loss(), S + 5)[0] == pytest.approx(value_and_grad(section.row_loss())[0])
    assert value_and_grad(BCESection().row_loss(), S + 5)[0] != pytest.approx(
        value_and_grad(BCESection().row_loss())[0]
    )
    k = torch.tensor([2.0])
    assert float(soft_topk_loss(S + 5, P, k, 2.0)) == pytest.approx(float(soft_topk_loss(S, P, k, 2.0)), abs=1e-9)


def test_soft_topk() -> None:
    k = torch.tensor([2.0], dtype=torch.float64)
    t = soft_topk_threshold(S, k, 2.0)
    assert float(t) == pytest.approx(-0.7089598965, abs=1e-9)
    p = torch.sigmoid(2 * (S + t))[0].tolist()
    assert p == pytest.approx([0.9296993498, 0.3970146324, 0.6415459213, 0.0317400964], abs=1e-9)
    s = S.clone().requires_grad_()
    loss = soft_topk_loss(s, P, k, 2.0)
    loss.sum().backward()
    assert float(loss.detach()) == pytest.approx(0.4983380832, abs=1e-9)
    assert s.grad[0].tolist() == pytest.approx([0.0075222362, -0.3179368725, 0.2738209925, 0.0365936437], abs=1e-9)
    assert float(s.grad.sum()) == pytest.approx(0.0, abs=1e-12)
    step = 1e-5
    for i in range(4):
        up, down = S.clone(), S.clone()
        up[0, i] += step
        down[0, i] -= step
        rise = float(soft_topk_loss(up, P, k, 2.0) - soft_topk_loss(down, P, k, 2.0)) / (2 * step)
        assert rise == pytest.approx(float(s.grad[0, i]), abs=1e-9)
    hard = torch.sigmoid(20 * (S + soft_topk_threshold(S, k, 20.0)))[0].tolist()
    assert hard == pytest.approx([1, 0.0067, 0.9933, 0], abs=1e-4)
    one = torch.tensor([1.0], dtype=torch.float64)
    t = soft_topk_threshold(S, one, 1.0)
    assert float(t) == pytest.approx(-1.9981171566, abs=1e-9)
    assert float(torch.sigmoid(S[0, 0] + t)) == pytest.approx(0.5004707107, abs=1e-9)
    same = torch.zeros(1, 5000, dtype=torch.float64)
    assert float(torch.sigmoid(same + soft_topk_threshold(same, one, 1.0)).sum()) == pytest.approx(1.0, abs=1e-6)


def test_soft_topk_leaves_out_positives_of_weight_zero_and_refuses_impossible_places() -> None:
    k = torch.tensor([2.0], dtype=torch.float64)
    part = soft_topk_loss(S, P, k, 2.0, torch.tensor([[1.0, 0.0]], dtype=torch.float64))
    alone = soft_topk_loss(S[:, [0, 2, 3]], torch.tensor([[0]]), k, 2.0)
    assert float(part) == pytest.approx(float(alone), abs=1e-9)
    for places in (0.0, 4.0):
        with pytest.raises(ValueError, match="0 < k < number of labels"):
            soft_topk_loss(S, P, torch.tensor([places]), 2.0)


def test_a_step_draws_positives_without_replacement_and_in_proportion() -> None:
    ids = np.tile(np.array([[3, 8, 11, -1]]), (20_000, 1))
    keys = np.arange(20_000, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    one = draw_positives(keys, ids, None, 1)
    assert (one.sum(axis=1) == 1).all()
    assert (one[:, 3] == 0).all()
    assert one.mean(axis=0)[:3] == pytest.approx([1 / 3] * 3, abs=0.02)
    two = draw_positives(keys, ids, None, 2)
    assert (two.sum(axis=1) == 2).all()
    weighted = draw_positives(keys, ids, np.tile(np.array([[0.5, 0.25, 0.25, 0]], np.float32), (20_000, 1)), 1)
    assert (weighted > 0).mean(axis=0)[:3] == pytest.approx([0.5, 0.25, 0.25], abs=0.02)
    assert (draw_positives(keys, ids, None, None)[:, :3] == 1).all()
    again = draw_positives(keys[5:6], ids[:1, [1, 0, 3, 2]], None, 1)
    assert ids[0, [1, 0, 3, 2]][again[0] > 0] == ids[0][one[5] > 0], "not a matter of the order"
    sections = (SoftTopKSection(k=5), SoftTopKSection(k="num_pos"), DecoupledSection(positives="one"), SoftmaxSection())
    assert [most_positives(s) for s in sections] == [5, None, 1, None]
