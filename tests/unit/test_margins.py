"""Margins on the cosine of a positive."""

from __future__ import annotations

import math

import pytest
import torch

from labelmill.losses.margins import ArcFace, Combined, CosFace, Margin, NoMargin, apply_margin


def test_values() -> None:
    cos = torch.tensor([0.8, 0.5], dtype=torch.float64)
    want = torch.tensor([0.5869570673, 0.2217402383], dtype=torch.float64)
    torch.testing.assert_close(apply_margin(cos, ArcFace(m=0.3)), want, rtol=0, atol=1e-10)
    torch.testing.assert_close(apply_margin(cos, CosFace(m=0.3)), cos - 0.3)
    assert apply_margin(cos, NoMargin()) is cos
    torch.testing.assert_close(apply_margin(cos, Combined(m2=0.3)), want, rtol=0, atol=1e-10)
    torch.testing.assert_close(apply_margin(cos, Combined(m1=1.0, m3=0.2)), cos - 0.2)


@pytest.mark.parametrize("margin", [ArcFace(m=0.5), CosFace(), Combined(m1=1.5, m2=0.2, m3=0.1)])
def test_derivative_is_exact(margin: Margin) -> None:
    cos = torch.linspace(-0.99, 0.99, 23, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda c: apply_margin(c, margin), (cos,))


def test_arcface_derivative_in_closed_form() -> None:
    cos = torch.tensor([0.8, -0.3], dtype=torch.float64, requires_grad=True)
    apply_margin(cos, ArcFace(m=0.3)).sum().backward()
    angle = torch.acos(cos.detach())
    torch.testing.assert_close(cos.grad, torch.sin(angle + 0.3) / torch.sin(angle))


@pytest.mark.parametrize("margin", [ArcFace(m=0.5, straight_through=True), Combined(m2=0.5, straight_through=True)])
def test_straight_through_keeps_the_plain_gradient(margin: Margin) -> None:
    cos = torch.linspace(-1, 1, 9, dtype=torch.float64, requires_grad=True)
    value = apply_margin(cos, margin)
    value.sum().backward()
    assert (cos.grad == 1).all()
    torch.testing.assert_close(value.detach(), torch.cos(torch.acos(cos.detach()) + 0.5), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("margin", [ArcFace(m=0.5), Combined(m1=2.0, m2=0.3)])
def test_safe_at_and_past_the_ends(margin: Margin, dtype: torch.dtype) -> None:
    cos = torch.tensor([-1.0001, -1.0, -0.9999999, 0.9999999, 1.0, 1.0001], dtype=dtype, requires_grad=True)
    value = apply_margin(cos, margin)
    value.sum().backward()
    assert torch.isfinite(value).all()
    assert torch.isfinite(cos.grad).all()
    assert (cos.grad > 0).all()


@pytest.mark.parametrize("margin", [ArcFace(m=1.0), Combined(m1=3.0, m2=0.5)])
def test_falls_with_the_angle_everywhere(margin: Margin) -> None:
    """A farther positive never looks nearer: past pi the bare cosine would rise again."""
    angle = torch.linspace(0.0, math.pi, 400, dtype=torch.float64)
    value = apply_margin(torch.cos(angle), margin)
    assert (value.diff() < 1e-9).all()
