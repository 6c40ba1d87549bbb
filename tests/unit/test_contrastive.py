"""The in-batch softmax: values by hand, masking, limits."""

from __future__ import annotations

import math

import pytest
import torch

from labelmill.evaluation.ranking import with_prior
from labelmill.losses.contrastive import in_batch_softmax


def unit(*angles: float) -> torch.Tensor:
    return torch.tensor([[math.cos(a), math.sin(a)] for a in angles])


def test_value_by_hand() -> None:
    query, key = unit(0.0), 3.0 * unit(0.0, math.pi / 2, math.pi)
    loss = in_batch_softmax(query, key, torch.tensor([7]), torch.tensor([7, 8, 9]), torch.tensor([0]), scale=2.0)
    expected = -2.0 + math.log(math.exp(2.0) + math.exp(0.0) + math.exp(-2.0))
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_same_class_and_holes_take_no_part() -> None:
    query, key = unit(0.3), unit(0.0, 0.5, 1.0, 2.0)
    ids = torch.tensor([7, 7, -1, 9])
    loss = in_batch_softmax(query, key, torch.tensor([7]), ids, torch.tensor([0]), scale=5.0)
    alone = in_batch_softmax(query, key[[0, 3]], torch.tensor([7]), ids[[0, 3]], torch.tensor([0]), scale=5.0)
    torch.testing.assert_close(loss, alone)
    nobody = in_batch_softmax(query, key[:1], torch.tensor([7]), ids[:1], torch.tensor([0]), scale=5.0)
    assert nobody.item() == pytest.approx(0.0, abs=1e-6)


def test_gradient_reaches_both_sides() -> None:
    query, key = unit(0.3, 1.0).requires_grad_(), unit(0.0, 1.5).requires_grad_()
    ids = torch.tensor([0, 1])
    in_batch_softmax(query, key, ids, ids, torch.tensor([0, 1]), 4.0).sum().backward()
    assert query.grad is not None
    assert key.grad is not None
    assert bool((query.grad.abs().sum(1) > 0).all())
    assert bool((key.grad.abs().sum(1) > 0).all())


def test_prior_ranks_again_and_zero_changes_nothing() -> None:
    scores, ids = torch.tensor([[0.9, 0.8, 0.8]]), torch.tensor([[2, 0, 1]])
    log_prior = torch.tensor([0.0, 0.0, -10.0])
    same_scores, same_ids = with_prior(scores, ids, log_prior, 0.0)
    assert same_ids.tolist() == ids.tolist()
    torch.testing.assert_close(same_scores, scores)
    ranked, order = with_prior(scores, ids, log_prior, 0.1)
    assert order.tolist() == [[0, 1, 2]], "equal scores keep their order"
    assert ranked[0].tolist() == pytest.approx([0.8, 0.8, -0.1])


def test_info_nce_by_hand() -> None:
    from labelmill.losses.contrastive import info_nce

    query, key = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.8, 0.6]])
    queue = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
    assert info_nce(query, key, queue, 0.2).item() == pytest.approx(0.0182711071, abs=1e-7)
    assert info_nce(7 * query, 3 * key, queue, 0.2).item() == pytest.approx(0.0182711071, abs=1e-7)
