"""Measures of forgetting and membership attacks, against values by hand and limits."""

from __future__ import annotations

import math

import numpy as np
import pytest

from labelmill.evaluation.forgetting import gap, interval, js_divergence, relearn_steps, rewind, zrf
from labelmill.evaluation.membership import ATTACKS, Answers, attack, lira_scores, logit_confidence, roc


def test_gap_and_intervals_by_hand() -> None:
    found, reference = {"a": 90.0, "b": 10.0, "c": math.nan}, {"a": 92.0, "b": 0.0, "c": 5.0, "d": 1.0}
    assert gap(found, reference) == 6.0
    assert math.isnan(gap({}, reference))
    mean, half = interval([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert half == pytest.approx(4.302652729911275 / math.sqrt(3))  # t of 2 degrees of freedom, deviation 1
    assert math.isnan(interval([1.0])[1])


def test_divergence_by_hand_and_limits() -> None:
    p, q = np.array([[0.5, 0.5], [1.0, 0.0], [0.2, 0.8]]), np.array([[0.5, 0.5], [0.0, 1.0], [0.6, 0.4]])
    m = np.array([0.4, 0.6])
    third = sum(0.5 * (r * np.log2(r / m)).sum() for r in (p[2], q[2]))
    np.testing.assert_allclose(js_divergence(p, q), [0.0, 1.0, third], atol=1e-12)
    np.testing.assert_allclose(js_divergence(p, q), js_divergence(q, p))
    assert zrf(p[:1], p[:1]) == 1.0
    assert zrf(p[1:2], q[1:2]) == 0.0
    with pytest.raises(ValueError, match="distributions"):
        js_divergence(p, q * 2)


def test_relearning_and_rewinding() -> None:
    assert relearn_steps({10: 0.2, 30: 0.9, 20: 0.8}, 0.75) == 20
    assert relearn_steps({10: 0.2}, 0.75) is None
    assert rewind([0.0, 0.1, 0.35, 0.8], 0.3) == 2
    assert rewind([0.25, 0.75], 0.5) == 1
    with pytest.raises(ValueError, match="no checkpoint"):
        rewind([], 0.3)


def answers(rng: np.random.Generator, count: int, sharp: float, classes: int = 4, label: int | None = None) -> Answers:
    """Softmax answers; the larger `sharp`, the surer of the given class."""
    label_N = np.full(count, label) if label is not None else rng.integers(0, classes, count)
    logit_NK = rng.normal(size=(count, classes))
    logit_NK[np.arange(count), label_N] += sharp
    prob = np.exp(logit_NK) / np.exp(logit_NK).sum(1, keepdims=True)
    return Answers(label_N, prob[np.arange(count), label_N], -np.sort(-prob, axis=1))


@pytest.mark.parametrize("kind", ATTACKS)
def test_attacks_find_members_and_nothing_else(kind: str) -> None:
    rng = np.random.default_rng(0)
    members, unseen = answers(rng, 2000, 6.0), answers(rng, 2000, 1.0)
    assert attack(kind, answers(rng, 500, 6.0), members, unseen) > 0.85
    assert attack(kind, answers(rng, 500, 1.0), members, unseen) == pytest.approx(0.5, abs=0.06)
    # fresh and unseen alike are the same to the model: nothing to be found
    assert attack(kind, answers(rng, 500, 3.0), answers(rng, 2000, 3.0), answers(rng, 2000, 3.0)) == pytest.approx(
        0.5, abs=0.06
    )


@pytest.mark.parametrize("kind", ATTACKS)
def test_a_class_shift_is_not_membership(kind: str) -> None:
    """The model is unsure of class 0, of seen and unseen samples alike; only the matched attack says so."""
    rng = np.random.default_rng(1)

    def both(count: int, sharp: float) -> Answers:
        parts = [answers(rng, count, 0.0, label=0)] + [answers(rng, count, sharp, label=c) for c in (1, 2, 3)]
        return Answers(*(np.concatenate([getattr(p, n) for p in parts]) for n in ("label_N", "given_N", "prob_NK")))

    members, unseen, asked = both(700, 4.0), both(700, 3.0), answers(rng, 600, 0.0, label=0)
    members = members.take(np.flatnonzero(members.label_N != 0))
    assert attack(kind, asked, members, unseen) < 0.45
    assert attack(kind, asked, members, unseen, match_classes=True) == pytest.approx(0.5, abs=0.07)
    assert math.isnan(attack(kind, asked, members, answers(rng, 100, 3.0, label=1), match_classes=True))


def test_the_threshold_is_the_best_one() -> None:
    def of(given: list[float]) -> Answers:
        p = np.array(given)
        return Answers(np.zeros(len(p), int), p, np.stack([p, 1 - p], 1))

    is_member = ATTACKS["threshold"](of([0.9, 0.8, 0.3]), of([0.5, 0.4, 0.2]), np.ones(6), 0)
    assert is_member(of([0.95, 0.8, 0.79, 0.5])).tolist() == [True, True, False, False]


def test_shadow_models_by_hand_and_on_drawn_gaussians() -> None:
    shadow = np.array([[2.0, 0.0], [4.0, 0.0], [0.0, 1.0], [-2.0, 1.0]])
    inside = np.array([[1, 0], [1, 0], [0, 0], [0, 0]], bool)
    # out: means (-1, 0.5), squares 2 and 1 over 4 degrees; in: mean 3, squares 2 over 1
    scores = lira_scores(np.array([3.0, 0.5]), shadow, inside)
    out_sd, in_sd = math.sqrt(3 / 4), math.sqrt(2.0)
    want = -math.log(in_sd) - (-math.log(out_sd) - 16 / (2 * out_sd**2))
    assert scores[0] == pytest.approx(want)
    assert scores[1] == pytest.approx(math.log(2))
    with pytest.raises(ValueError, match="sample 0"):
        lira_scores(np.zeros(1), np.zeros((2, 1)), np.ones((2, 1), bool))
    rng = np.random.default_rng(0)
    member = rng.random(4000) < 0.5
    hard = rng.normal(0, 3, 4000)  # what the plain threshold is misled by
    inside = rng.permuted(np.repeat([[True], [False]], 4, axis=0).repeat(4000, 1), axis=0)  # each in half of them
    conf = hard + rng.normal(size=4000) + 2 * member
    shadow = hard + rng.normal(size=(8, 4000)) + 2 * inside
    area, at_low = roc(lira_scores(conf, shadow, inside)[member], lira_scores(conf, shadow, inside)[~member])
    plain = roc(conf[member], conf[~member])[0]
    assert area > 0.85 > 0.72 > plain
    assert at_low > 0.1
    np.testing.assert_allclose(logit_confidence(np.array([0.5, 0.0])), [0.0, math.log(1e-7)], rtol=1e-6, atol=1e-6)
