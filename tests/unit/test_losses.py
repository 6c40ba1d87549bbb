"""Losses in row statistics against values computed by hand and against plain autograd."""

from __future__ import annotations

import math

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from labelmill.errors import DataError
from labelmill.heads.config import HeadConfig
from labelmill.losses.classification import (
    ASL,
    BCE,
    GCE,
    LDR,
    MAE,
    MLC,
    MLCD,
    SCE,
    Decoupled,
    Loss,
    LossConfig,
    MultiSoftmax,
    RowLoss,
    SmoothedSoftmax,
    Softmax,
    SoftTargets,
    dense_loss,
    softplus,
)
from labelmill.losses.margins import ArcFace, CosFace

COS = torch.tensor([[0.8, 0.5, 0.1, -0.2, 0.3]], dtype=torch.float64)
TWO = torch.tensor([[0, 1]])
ONE = torch.tensor([[0, -1]])
OF_SUMS = [Softmax(), MultiSoftmax(), Decoupled(), MLC(), MLCD(), MLCD(threshold=0.7)]
EVERY = [*OF_SUMS, SmoothedSoftmax(), SoftTargets(), BCE(threshold=0.3), ASL(gamma_pos=1.0), ASL(gamma_neg=0.0), LDR()]
EVERY += [MAE(), GCE(), SCE()]
SINGLE = ("softmax", "smoothed_softmax", "ldr", "mae", "gce", "sce")


def close(got: torch.Tensor, want: float | list[float], tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(got, torch.tensor(want, dtype=got.dtype).reshape(got.shape), rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("loss", "scale", "want"),
    [
        (MLCD(), 1.0, 2.1731881828),
        (MLCD(), 8.0, 2.6905171634),
        (MLCD(), 64.0, 19.2000027654),
        (MLC(), 1.0, 1.4943932133),
        (MLC(), 8.0, 0.2379971294),
        (MLC(), 64.0, 2.7607763956e-06),
        (MultiSoftmax(), 8.0, (0.1071191949 + 2.5071191949) / 2),
        (Decoupled(), 8.0, (0.0221028868 + 0.2202245638) / 2),
    ],
)
def test_values_of_the_method_sheet(loss: Loss, scale: float, want: float) -> None:
    close(dense_loss(loss, COS, TWO, scale=scale), want, 1e-10 if want > 1e-3 else 1e-15)


def test_mlcd_gradient_of_the_method_sheet() -> None:
    cos = COS.clone().requires_grad_()
    dense_loss(MLCD(), cos, TWO).sum().backward()
    close(cos.grad, [-0.2185601385, -0.2950253279, 0.2585944916, 0.1915715111, 0.3158480252])


def test_margins_of_the_method_sheet() -> None:
    close(dense_loss(MLCD(), COS, TWO, margin=CosFace(m=0.3), scale=8.0), 2.8697616357)
    close(dense_loss(MLCD(), COS, TWO, margin=ArcFace(m=0.3), scale=8.0), 2.8352348279)


def test_one_positive_is_cross_entropy_but_for_mlcd() -> None:
    target = torch.nn.functional.cross_entropy(COS, torch.tensor([0]))
    close(target, 1.1668357699)
    for loss in (Softmax(), MultiSoftmax(), Decoupled(), MLC()):
        torch.testing.assert_close(dense_loss(loss, COS, ONE)[0], target, rtol=1e-14, atol=0)
    close(dense_loss(MLCD(), COS, ONE), 2.1498562414)


def test_mlcd_factorises() -> None:
    a, b = COS[0, 2:].exp().sum(), (-COS[0, :2]).exp().sum()
    close(torch.log(1 + a * b + a + b), 2.1731881828)
    close(dense_loss(MLCD(), torch.zeros(1, 5, dtype=torch.float64), TWO), math.log(3) + math.log(4))


def test_mlcd_tells_apart_what_mlc_does_not() -> None:
    low = torch.tensor([[0.4, 0.1]], dtype=torch.float64)
    high = torch.tensor([[0.8, 0.5]], dtype=torch.float64)
    for pair, mlcd in ((low, 1.2574119125), (high, 1.3451776502)):
        close(dense_loss(MLC(), pair, ONE), 0.5543552444)
        close(dense_loss(MLCD(), pair, ONE), mlcd)


def test_decoupled_values_of_the_dexml_sheet_do_not_move_with_other_positives() -> None:
    z = torch.tensor([[2.0, 0.5, 1.0, -1.0]], dtype=torch.float64, requires_grad=True)
    value = dense_loss(Decoupled(), z, TWO)
    value.sum().backward()
    close(value.detach(), 0.7019845682)
    close(z.grad, [-0.1473077437, -0.3258962861, 0.4167967267, 0.0564073031])
    close(2 * dense_loss(MultiSoftmax(), z.detach(), TWO), 2.4903637962)
    z = z.detach()
    alone = dense_loss(Decoupled(), z[:, [0, 2, 3]], ONE)
    other = dense_loss(Decoupled(), z[:, [1, 2, 3]], ONE)
    torch.testing.assert_close(dense_loss(Decoupled(), z, TWO), (alone + other) / 2)
    shifted = dense_loss(Decoupled(), z + 3.0, TWO)
    torch.testing.assert_close(shifted, dense_loss(Decoupled(), z, TWO))


@pytest.mark.parametrize("loss", EVERY, ids=lambda loss: loss.kind)
def test_gradients_are_those_of_finite_differences(loss: Loss) -> None:
    ids = torch.tensor([[1, -1], [3, -1], [0, -1]]) if loss.kind in SINGLE else torch.tensor([[1, 4], [3, -1], [0, 2]])
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(3, 6, dtype=torch.float64, generator=generator, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: dense_loss(loss, z, ids, scale=2.0), (z,))


@pytest.mark.parametrize("loss", OF_SUMS, ids=lambda loss: loss.kind)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extremes_stay_finite(loss: Loss, dtype: torch.dtype) -> None:
    """No negatives, no positives (padding only), and logits of hundreds."""
    lse = torch.tensor([-torch.inf, 2.0, 300.0, -300.0, -torch.inf], dtype=dtype, requires_grad=True)
    pos = torch.tensor([[1.0], [0.0], [-300.0], [300.0], [0.0]], dtype=dtype, requires_grad=True)
    mask = torch.tensor([[True], [False], [True], [True], [False]])
    value = loss(lse, pos, mask)
    value.sum().backward()
    assert torch.isfinite(value).all()
    assert torch.isfinite(lse.grad).all()
    assert torch.isfinite(pos.grad).all()
    assert (pos.grad[~mask] == 0).all()


def test_ldr_of_the_method_sheet() -> None:
    f = torch.tensor([[2.0, 1.0, -1.0]], dtype=torch.float64)
    cases = [(0, 1.0, 0.0, -0.7496000719), (0, 0.01, 0.1, -0.0109861229), (0, 1.0, 0.1, -0.7190854341)]
    cases += [(0, 10.0, 0.1, -1.1946141102), (0, 1e4, 0.1, -1.2665932235), (1, 0.01, 0.1, 1.0890138771)]
    cases += [(1, 1.0, 0.1, 0.3253955549), (1, 10.0, 0.1, -0.1910222314), (1, 1e4, 0.1, -0.2665898899)]
    for label, lam, gap, want in cases:
        close(dense_loss(LDR(lam=lam, gap=gap), f, torch.tensor([[label]])), want, 1e-9)
    total = sum(dense_loss(LDR(lam=1e6, gap=0.1), f, torch.tensor([[label]])).item() for label in range(3))
    assert total == pytest.approx(0.2, abs=1e-5)
    close(dense_loss(LDR(lam=1.0, gap=0.1), torch.zeros(1, 3, dtype=torch.float64), ONE[:, :1]), 0.0677651338)


def test_smoothing_is_that_of_torch() -> None:
    want = torch.nn.functional.cross_entropy(COS, torch.tensor([0]), label_smoothing=0.2)
    torch.testing.assert_close(dense_loss(SmoothedSoftmax(smoothing=0.2), COS, ONE)[0], want)


def test_soft_targets_are_cross_entropy_with_a_distribution() -> None:
    target = torch.tensor([[0.5, 0.2]], dtype=torch.float64)
    whole = torch.tensor([[0.5, 0.2, 0.1, 0.1, 0.1]], dtype=torch.float64)
    want = torch.nn.functional.cross_entropy(COS, whole)
    torch.testing.assert_close(dense_loss(SoftTargets(), COS, TWO, target_NP=target)[0], want)
    dropped = torch.nn.functional.cross_entropy(COS, torch.tensor([[5 / 7, 2 / 7, 0, 0, 0]], dtype=torch.float64))
    torch.testing.assert_close(dense_loss(SoftTargets(tail="drop"), COS, TWO, target_NP=target)[0], dropped)


def test_bce_and_asl_are_those_of_their_definitions() -> None:
    y = torch.tensor([[1.0, 1, 0, 0, 0]], dtype=torch.float64)
    want = torch.nn.functional.binary_cross_entropy_with_logits(COS, y, reduction="sum")
    for loss in (BCE(), ASL(gamma_neg=0.0, clip=0.0)):
        torch.testing.assert_close(dense_loss(loss, COS, TWO)[0], want)
    p = torch.sigmoid(COS[0])
    shifted = (p[2:] - 0.05).clamp_min(0)
    want = -((1 - p[:2]) * p[:2].log()).sum() - (shifted**4 * (1 - shifted).log()).sum()
    torch.testing.assert_close(dense_loss(ASL(gamma_pos=1.0), COS, TWO)[0], want)


@pytest.mark.parametrize("loss", [BCE(threshold=0.3), ASL(), ASL(gamma_neg=0.0), ASL(gamma_neg=1.0, clip=0.0)])
def test_slope_of_negatives(loss: RowLoss) -> None:
    z = torch.tensor([-80.0, -4.0, -0.3, 0.2, 3.0, 60.0], dtype=torch.float64)
    torch.testing.assert_close(loss.negative_slope(z), RowLoss.negative_slope(loss, z), rtol=1e-9, atol=1e-12)
    ends = torch.tensor([-torch.inf, -200.0, 200.0])
    assert torch.isfinite(loss.negative_slope(ends)).all()
    assert loss.negative_slope(ends)[0] == 0
    assert loss.negative_term(ends)[0] == 0


def test_softmax_refuses_two_positives() -> None:
    with pytest.raises(DataError, match="one positive a sample, sample 1 of the batch has 2"):
        dense_loss(Softmax(), COS.repeat(2, 1), torch.tensor([[0, -1], [0, 1]]))


def test_softplus_is_exact_far_out() -> None:
    x = torch.tensor([-40.0, 0.0, 25.0], dtype=torch.float64)
    torch.testing.assert_close(softplus(x), torch.log1p(x.exp()), rtol=1e-15, atol=0)


def test_configs_parse_by_kind_and_refuse_what_cannot_work() -> None:
    assert TypeAdapter(LossConfig).validate_python({"kind": "mlcd", "threshold": 1.0}) == MLCD(threshold=1.0)
    config = HeadConfig.model_validate(
        {"loss": {"kind": "mlc"}, "margin": {"kind": "arcface"}, "optimizer": {"kind": "adamw"}}
    )
    assert HeadConfig.model_validate(config.model_dump()) == config
    with pytest.raises(ValidationError, match="acts on cosines: set normalize to true"):
        HeadConfig.model_validate({"margin": {"kind": "cosface"}, "normalize": False})
    with pytest.raises(ValidationError):
        HeadConfig(sample_rate=0.0)
