"""Losses against a teacher: values worked out by hand or by another program, limits, invariances, gradients."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor
from torch.nn import functional as F

from labelmill.errors import DataError
from labelmill.losses import features
from labelmill.losses.class_sums import Listed, dense_distillation, solved, whole
from labelmill.losses.distillation import (
    DIST,
    DKD,
    KD,
    BinaryKL,
    BinaryKLNorm,
    CrossEntropy,
    ListedKD,
    LogitLossConfig,
    LogitMSE,
    StandardizedKD,
)
from labelmill.losses.soft_targets import aligned_gradients, masked_soft_bce, soft_entropy

S = torch.tensor([[1.0, 2, 3], [0.5, -1, 0]], dtype=torch.float64)
TEACHER = torch.tensor([[3.0, 1, 0], [2, 0, -1]], dtype=torch.float64)
Y = torch.tensor([0, 0])
ALL = [KD(), StandardizedKD(), DKD(), DIST(), BinaryKLNorm(), BinaryKL(), LogitMSE()]


def mean(loss: Any, s: Tensor = S, t: Tensor = TEACHER, y: Tensor = Y) -> float:
    return dense_distillation(loss, s, t, y).mean().item()


@pytest.mark.parametrize(
    ("loss", "want"),
    [
        (KD(temperature=1), 0.9786429184084807),
        (KD(temperature=2), 1.264845484617532),
        (KD(temperature=4), 1.3452968454675749),
        (KD(temperature=1000), 1.3473728654),
        (DKD(temperature=2, alpha=1, beta=8), 5.0015850541647575),
        (StandardizedKD(temperature=2), 0.7881988937973662),
        (BinaryKLNorm(temperature=1), 0.9539153098972327),
        (BinaryKLNorm(temperature=2), 1.079787681593047),
        (BinaryKLNorm(temperature=4), 1.1240514456936444),
        (BinaryKL(temperature=1), 0.7536368371159266),
        (BinaryKL(temperature=2), 0.9973212989700913),
        (BinaryKL(temperature=4), 1.0997076283649267),
        (BinaryKLNorm(temperature=1e4), 1.1406249945),
    ],
)
def test_known_values(loss: Any, want: float) -> None:
    assert mean(loss) == pytest.approx(want, rel=1e-8)


def test_kd_limits_and_gradient() -> None:
    gap = S - TEACHER
    limit = (gap - gap.mean(1, keepdim=True)).square().sum(1).mean().item() / (2 * 3)
    assert limit == pytest.approx(1.3472222222)
    assert mean(KD(temperature=1e5)) == pytest.approx(limit, rel=1e-5)
    assert mean(KD(temperature=2), S + 5, TEACHER - 3) == pytest.approx(mean(KD(temperature=2))), "offsets don't matter"
    s = S[:1].clone().requires_grad_()
    dense_distillation(KD(temperature=4), s, TEACHER[:1]).sum().backward()
    want = torch.tensor([[-0.9069962027, 0.1389594883, 0.7680367144]], dtype=torch.float64)
    torch.testing.assert_close(s.grad, want, atol=1e-9, rtol=0)


def test_dkd_parts_make_up_kd() -> None:
    loss = DKD(temperature=2)
    part = whole(S, TEACHER, Y)
    target, other, p = loss.parts(solved(loss, part))
    torch.testing.assert_close(target, torch.tensor([1.8918572998, 0.2739156116], dtype=torch.float64) / 4)
    torch.testing.assert_close(other, torch.tensor([0.4898373248] * 2, dtype=torch.float64) / 4)
    torch.testing.assert_close(p, torch.tensor([0.6285317192] * 2, dtype=torch.float64))
    assert 4 * (target + (1 - p) * other).mean().item() == pytest.approx(1.264845484617532)
    # a target a thousand logits above the others leaves their softmax as it was
    shift = torch.tensor([[1000.0, 0, 0]], dtype=torch.float64)
    far = solved(loss, whole(S + shift, TEACHER + shift, Y))
    torch.testing.assert_close(loss.parts(far)[1], other)


def test_dist_values() -> None:
    loss = DIST()
    inter, intra = loss.parts(solved(loss, whole(S, TEACHER, Y)))
    assert inter.mean().item() == pytest.approx(0.9681464967)
    assert intra.item() == pytest.approx(1.0, abs=1e-6), "the teacher's columns are constant"
    s, t = torch.cat([S, S.new_tensor([[0, 0, 1]])]), torch.cat([TEACHER, TEACHER.new_tensor([[0, 1, 2]])])
    inter, intra = loss.parts(solved(loss, whole(s, t, None)))
    assert inter.mean().item() == pytest.approx(0.6568815158, rel=1e-6)
    assert intra.item() == pytest.approx(0.7402402986, rel=1e-6)
    skip = DIST(skip_constant=True)
    assert skip.parts(solved(skip, whole(S, TEACHER, Y)))[1].item() == 0.0
    with pytest.raises(DataError, match="two or more"):
        dense_distillation(loss, S[:1], TEACHER[:1])


def test_standardised_logits_ignore_scale_and_offset() -> None:
    want = mean(StandardizedKD(temperature=2))
    assert mean(StandardizedKD(temperature=2), 5 * S + 7) == pytest.approx(want, abs=1e-6)
    assert mean(StandardizedKD(temperature=2), S, 3 * TEACHER - 2) == pytest.approx(want, abs=1e-6)
    flat = torch.ones(1, 3, dtype=torch.float64, requires_grad=True)
    dense_distillation(StandardizedKD(), flat, TEACHER[:1]).sum().backward()
    assert flat.grad is not None
    assert bool(torch.isfinite(flat.grad).all())


def test_binary_kl_norm_is_a_logit_regression() -> None:
    loss = BinaryKLNorm(temperature=2)
    assert mean(loss, S + 1, TEACHER + 1) == pytest.approx(mean(loss)), "it depends on s - t alone"
    assert mean(BinaryKL(temperature=2), S + 1, TEACHER + 1) == pytest.approx(0.837566673082102)
    assert (S - TEACHER).square().sum().item() / 16 == pytest.approx(1.140625)
    s = S.clone().requires_grad_()
    dense_distillation(loss, s, TEACHER).mean().backward()
    torch.testing.assert_close(s.grad, torch.tanh((S - TEACHER) / 4) * 2 / 4)
    want = [[-0.2310585786, 0.1224593312, 0.3175744762], [-0.1791786992, -0.1224593312, 0.1224593312]]
    torch.testing.assert_close(s.grad, torch.tensor(want, dtype=torch.float64), atol=1e-9, rtol=0)
    a, b = torch.tensor([[2.0, 3, 4]], dtype=torch.float64), torch.tensor([[-2.0, -1, 0]], dtype=torch.float64)
    assert dense_distillation(KD(), a, b).item() == pytest.approx(0, abs=1e-12), "the softmax is blind to this"
    assert dense_distillation(loss, a, b).item() == pytest.approx(5.205369965796326)
    assert dense_distillation(BinaryKL(temperature=2), a, b).item() == pytest.approx(5.472611775797565)
    far = dense_distillation(loss, torch.tensor([[40.0]]), torch.tensor([[0.0]])).item()
    assert far == pytest.approx(37.22741128600483, rel=1e-6), "float32, where a clamped sigmoid gives inf"
    q = torch.sigmoid((S - TEACHER) / 2)
    direct = 4 * (0.5 * (0.5 / q).log() + 0.5 * (0.5 / (1 - q)).log()).sum(1)
    torch.testing.assert_close(dense_distillation(loss, S, TEACHER), direct)
    assert mean(BinaryKLNorm(reduction="mean")) == pytest.approx(mean(BinaryKLNorm()) / 3)


def direct(loss: Any, s: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """The same losses by torch's own softmax, written independently."""
    T = getattr(loss, "temperature", 1.0)
    if isinstance(loss, StandardizedKD):
        s, t = ((x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True) + 1e-7) for x in (s, t))
    if isinstance(loss, KD | StandardizedKD):
        return T**2 * F.kl_div(F.log_softmax(s / T, 1), F.softmax(t / T, 1), reduction="none").sum(1)
    if isinstance(loss, DKD):
        p, q = F.softmax(s / T, 1), F.softmax(t / T, 1)
        p_y, q_y = (x.gather(1, y[:, None])[:, 0] for x in (p, q))
        target = q_y * (q_y / p_y).log() + (1 - q_y) * ((1 - q_y) / (1 - p_y)).log()
        other = ~F.one_hot(y, s.shape[1]).bool()
        s_o, t_o = (x[other].view(len(x), -1) / T for x in (s, t))
        rest = F.kl_div(F.log_softmax(s_o, 1), F.softmax(t_o, 1), reduction="none").sum(1)
        return T**2 * (loss.alpha * target + loss.beta * rest)
    if isinstance(loss, DIST):
        a, b = F.softmax(s / T, 1), F.softmax(t / T, 1)

        def pearson(x: Tensor, y: Tensor) -> Tensor:
            return F.cosine_similarity(x - x.mean(1, keepdim=True), y - y.mean(1, keepdim=True), dim=1, eps=1e-8)

        return T**2 * (loss.beta * (1 - pearson(a, b)) + loss.gamma * (1 - pearson(a.T, b.T)).mean())
    if isinstance(loss, BinaryKL):
        p, q = torch.sigmoid(s / T), torch.sigmoid(t / T)
        return T**2 * (q * (q / p).log() + (1 - q) * ((1 - q) / (1 - p)).log()).sum(1)
    if isinstance(loss, LogitMSE):
        return (s - t).square().mean(1)
    return T**2 * torch.log(torch.cosh((s - t) / (2 * T))).sum(1)


@pytest.mark.parametrize("loss", ALL, ids=lambda loss: loss.kind)
def test_losses_and_gradients_equal_torchs_own_arithmetic(loss: Any) -> None:
    torch.manual_seed(0)
    s, t, y = torch.randn(6, 11).double() * 2, torch.randn(6, 11).double() * 3, torch.randint(0, 11, (6,))
    a, b = s.clone().requires_grad_(), s.clone().requires_grad_()
    found, want = dense_distillation(loss, a, t, y), direct(loss, b, t, y)
    torch.testing.assert_close(found, want, rtol=1e-6, atol=1e-9)
    found.mean().backward()
    want.mean().backward()
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("loss", [*ALL, DIST(skip_constant=True), CrossEntropy(), ListedKD()], ids=lambda x: x.kind)
@pytest.mark.parametrize("far", [0.0, 30.0])
def test_gradients_are_the_slope_of_the_values(loss: Any, far: float) -> None:
    """By finite differences, also with logits far from 0, a sample without weight and one without label."""
    torch.manual_seed(3)
    s, t = torch.randn(5, 9).double() * 2 + far, torch.randn(5, 9).double() * 3 - far
    y, weight = torch.tensor([0, 8, 3, 3, -1]), torch.tensor([1.0, 2, 0, 1, 0])
    logits, ids = t.topk(3)
    tail = torch.logsumexp(t.scatter(1, ids, -torch.inf) / 4, 1)
    listed = Listed(ids, logits, tail, 4.0) if isinstance(loss, ListedKD) else None
    t_NC = None if listed else t

    def value(x: Tensor) -> Tensor:
        return dense_distillation(loss, x, t_NC, y, weight, listed)

    s.requires_grad_()
    assert torch.autograd.gradcheck(value, (s,), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("loss", ALL, ids=lambda loss: loss.kind)
def test_nothing_to_learn_from_oneself(loss: Any) -> None:
    torch.manual_seed(1)
    s = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    t = s.detach().clone().requires_grad_()
    found = dense_distillation(loss, s, t, torch.arange(5))
    assert found.abs().max().item() < 1e-5, "dist has 1e-8 in its denominators"
    found.sum().backward()
    assert s.grad is not None
    assert s.grad.abs().max().item() < 1e-5
    assert t.grad is None, "the teacher doesn't learn"


@pytest.mark.parametrize("loss", ALL, ids=lambda loss: loss.kind)
def test_a_sample_without_weight_is_gone(loss: Any) -> None:
    torch.manual_seed(2)
    s, t, y = torch.randn(5, 7).double(), torch.randn(5, 7).double(), torch.arange(5)
    weight = torch.tensor([1.0, 1, 0, 1, 1])
    kept = weight > 0
    torch.testing.assert_close(
        dense_distillation(loss, s, t, y, weight)[kept], dense_distillation(loss, s[kept], t[kept], y[kept])
    )
    a = s.clone().requires_grad_()
    dense_distillation(loss, a, t, y, weight).sum().backward()
    assert a.grad is not None
    assert not a.grad[2].any()


def test_listed_classes_with_a_tail() -> None:
    t, s = torch.tensor([[4.0, 2, 1, 0, -1]]).double(), torch.tensor([[2, 2.5, 0, 1, 0]]).double()

    def listed(k: int) -> Listed:
        logits, ids = t.topk(k)
        rest = t.scatter(1, ids, -torch.inf)
        return Listed(ids, logits, torch.logsumexp(rest, 1))

    def value(k: int) -> float:
        return dense_distillation(ListedKD(temperature=1), s, None, listed=listed(k)).item()

    assert dense_distillation(KD(temperature=1), s, t).item() == pytest.approx(0.6164667140)
    assert value(2) == pytest.approx(0.5871334018)
    assert value(4) == pytest.approx(0.6164667140), "one class in the tail: nothing is lost"
    assert value(1) <= value(2) <= value(3) <= 0.6164667141
    p, q = F.log_softmax(s[:, :2], 1), F.softmax(t[:, :2], 1)
    assert F.kl_div(p, q, reduction="sum").item() == pytest.approx(0.5491416681), "what dropping the tail would give"
    with pytest.raises(DataError, match="temperature 1, the loss has 3"):
        dense_distillation(ListedKD(temperature=3), s, None, listed=listed(2))
    with pytest.raises(DataError, match=r"keep teacher\.columns topk"):
        dense_distillation(ListedKD(), s, t)
    with pytest.raises(DataError, match="listed_kd"):
        dense_distillation(KD(), s, None, listed=listed(2))


def test_feature_losses() -> None:
    g = torch.tensor([[1, 0], [0, 1], [0.6, 0.8]]).double()
    h = torch.tensor([[0.8, 0.6], [0, 1], [1, 0]]).double()
    own = torch.arange(3)
    found = features.contrastive_distillation(g, h, own, temperature=0.1).mean().item()
    assert found == pytest.approx(1.9838475087)
    pairs = torch.tensor([[9.0, 3], [7, 6]]), torch.tensor([[5.0, 4], [4, 5]])
    assert features.margin_mse(*pairs).item() == pytest.approx(14.5)
    st, te = torch.tensor([[0, 0], [3, 4], [0, 1]]).double(), torch.tensor([[0, 0], [1, 0], [0, 2]]).double()
    assert features.rkd_distance(st, te).item() == pytest.approx(0.1693225676)
    assert features.rkd_distance(10 * st, te).item() == pytest.approx(0.1693225676), "scale doesn't matter"
    for same in (features.rkd_distance, features.rkd_angle, features.similarity_preserving, features.fitnet):
        x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
        value = same(x, x.detach().clone())
        value.backward()
        assert value.item() == pytest.approx(0, abs=1e-12)
        assert x.grad is not None
        assert bool(torch.isfinite(x.grad).all())
    turned = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))[0]
    x = torch.randn(5, 4, dtype=torch.float64)
    assert features.rkd(x, 3 * x @ turned).item() == pytest.approx(0, abs=1e-10), "turning and scaling don't matter"
    maps = torch.randn(2, 3, 4, 4).double(), torch.randn(2, 5, 4, 4).double()
    assert features.attention_transfer(maps[0], 2 * maps[0]).sum().item() == pytest.approx(0, abs=1e-12)
    assert features.attention_transfer(*maps).min().item() > 0
    flat, peak = torch.ones(1, 1, 2, 2).double(), torch.zeros(1, 2, 2, 2).double()
    peak[0, 0, 0, 0] = 2  # maps (1/2, 1/2, 1/2, 1/2) and (1, 0, 0, 0)
    torch.testing.assert_close(features.attention_transfer(flat, peak), torch.tensor([0.25]).double())
    assert features.embedding_cosine(x, 5 * x).abs().max().item() < 1e-12
    torch.testing.assert_close(
        4 * features.listwise_kl(S, TEACHER, 2), dense_distillation(KD(temperature=2), S, TEACHER)
    )
    alone = torch.tensor([True, True, False])
    masked = features.contrastive_distillation(g[:2], h, own[:2], 0.1, alone)
    torch.testing.assert_close(masked, features.contrastive_distillation(g[:2], h[:2], own[:2], 0.1))


def test_soft_binary_targets() -> None:
    o = torch.tensor([[2, 0, -1, 0.5, -1.5], [0, 1, 1, -0.5, 3]], dtype=torch.float64, requires_grad=True)
    q, weight = torch.tensor([[0.9, 0.2], [0.5, 1]], dtype=torch.float64), torch.ones(2)
    ce = F.cross_entropy(o[:, :3], torch.tensor([0, 2]))
    bce = masked_soft_bce(o[:, 3:], q, weight)
    assert ce.item() == pytest.approx(0.5159204118072684)
    assert bce.item() == pytest.approx(0.44953864947917693)
    (ce + 4 * bce).backward()
    want = torch.tensor([[-0.2775406688, -0.0175744762], [-0.1224593312, -0.0474258732]], dtype=torch.float64)
    assert o.grad is not None
    torch.testing.assert_close(o.grad[:, 3:], want, atol=1e-9, rtol=0)
    assert soft_entropy(q, weight).item() == pytest.approx(0.3796581443723953)
    q[0, 1] = torch.nan
    assert masked_soft_bce(o[:, 3:], q, weight).item() == pytest.approx(0.4322471066446518)
    q[0] = torch.nan
    o.grad = None
    masked_soft_bce(o[:, 3:], q, weight).backward()
    assert not bool(torch.isnan(o.grad).any())
    assert not o.grad[0].any()


def test_one_sided_alignment() -> None:
    def total(a: list[float], b: list[float]) -> list[float]:
        (found,) = aligned_gradients([torch.tensor(a).double()], [torch.tensor(b).double()])
        assert found is not None
        return found.tolist()

    assert total([1, 2, 0], [-2, 0, 1]) == pytest.approx([-0.6, 2.8, 1.0])
    assert total([1, 2, 0], [1, 0, 1]) == pytest.approx([2, 2, 1])
    found = aligned_gradients([torch.ones(2), None], [None, torch.ones(3)])
    assert [g.tolist() for g in found if g is not None] == [[1, 1], [1, 1, 1]]


def test_settings_are_checked() -> None:
    adapter: TypeAdapter[Any] = TypeAdapter(LogitLossConfig)
    with pytest.raises(ValidationError, match="greater than 0"):
        adapter.validate_python({"kind": "kd", "temperature": 0})
    with pytest.raises(DataError, match=r"\(2, 4\) and the student's \(2, 3\)"):
        dense_distillation(KD(), S, torch.zeros(2, 4).double())
    assert dense_distillation(CrossEntropy(), S, None, Y).mean().item() == pytest.approx(F.cross_entropy(S, Y).item())
    assert math.isfinite(mean(KD(temperature=1), S.half(), TEACHER.half()))
