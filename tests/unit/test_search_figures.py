"""Figures of a search: every kind of setting, many and few trials."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from labelmill.tracking.search_figures import Axis, learning_curves, metric_by_parameter, parallel_coordinates


def drawn(path: Path) -> bool:
    """A picture with something in it."""
    with Image.open(path) as image:
        return image.width >= 800 and np.asarray(image.convert("L")).std() > 3


def test_settings_of_any_kind_are_drawn(tmp_path: Path) -> None:
    axes = {
        "train.learning_rate": Axis([1e-4, 1e-2, 3e-3, 1e-3], log=True),
        "head.scale": Axis([8.0, 8.0, 8.0, 8.0]),
        "encoder.dim": Axis([16, 32, 16, 64], log=True),
        "head.margin": Axis(["none", "cosface 0.2", "none", "none"], choices=["none", "cosface 0.2", "never drawn"]),
    }
    kinds = ["finished", "best", "stopped", "failed"]
    for draw in (parallel_coordinates, metric_by_parameter):
        for higher in (True, False):
            assert drawn(draw(axes, "eval/top1", [0.1, 0.7, 0.3, 0.2], kinds, higher, tmp_path / "figure.png"))
        one = {"x": Axis([0.5])}
        assert drawn(draw(one, "m", [1.0], ["best"], True, tmp_path / "one.png"))
    many = {f"section.field{i}": Axis(list(range(4))) for i in range(20)}
    assert drawn(metric_by_parameter(many, "m", [1.0, 2.0, 3.0, 4.0], kinds, True, tmp_path / "many.png"))
    curves = {1: [(10, 0.1), (20, 0.2)], 2: [(10, 0.3), (30, 0.6)]}
    assert drawn(learning_curves(curves, "m", 2, tmp_path / "curves.png"))
    assert drawn(learning_curves(curves, "m", None, tmp_path / "none.png"))


def test_places_follow_the_scale() -> None:
    np.testing.assert_allclose(Axis([0.01, 0.1, 1.0], log=True).places(), [0, 0.5, 1], atol=1e-12)
    np.testing.assert_allclose(Axis([0, 5, 10]).places(), [0, 0.5, 1])
    np.testing.assert_allclose(Axis([3, 3]).places(), [0.5, 0.5])
    assert Axis(["b", "a"], choices=["a", "b"]).ends() == [(0.0, "a"), (1.0, "b")]
