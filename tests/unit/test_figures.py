"""Figures: each kind is drawn, at README width, with no pyplot state, also from odd input."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from labelmill.tracking import figures

HISTORY = [{"step": i * 10, "loss": 5 / (1 + i), "lr": 0.01 * i} for i in range(40)]
IMAGES = np.random.default_rng(0).integers(0, 255, (12, 8, 8), dtype=np.uint8)

DRAW: dict[str, Callable[[Path], Path]] = {
    "loss": lambda p: figures.loss_curve(HISTORY, p),
    "loss_without_rate": lambda p: figures.loss_curve([{"step": 1, "loss": 2.0}], p, title="t"),
    "loss_with_holes": lambda p: figures.loss_curve([*HISTORY, {"step": 4, "loss": math.nan}], p),
    "loss_of_nothing": lambda p: figures.loss_curve([], p),
    "bars": lambda p: figures.bars_by_group(
        ["a", "b"], {"ours": [0.5, math.nan], "theirs": [0.25, 0.2]}, "top-1", p, errors={"ours": [0.1, 0.1]}
    ),
    "parts": lambda p: figures.stacked_parts({"read": 0.001, "head": [0.1, 0.2], "rest": 0.05}, p),
    "one_part": lambda p: figures.stacked_parts({"all": 12.0, "rest": 0.0}, p),
    "histograms": lambda p: figures.histograms({"a": np.arange(9), "b": [1, math.nan], "c": []}, "cosine", p),
    "constant_histogram": lambda p: figures.histograms({"a": [1.0, 1.0]}, "cosine", p),
    "lines": lambda p: figures.lines({"a": ([1, 2], [0.1, 0.2]), "b": ([1, 2], [0.2, 0])}, "epoch", "y", p),
    "many_lines": lambda p: figures.lines({f"{i}": ([1, 2], [i, 2]) for i in range(10)}, "epoch", "y", p),
    "reliability": lambda p: figures.reliability_panels({n: (np.arange(3) / 3,) * 2 + (np.arange(3),) for n in "abcde"}, p),
    "log_lines": lambda p: figures.lines({"a": ([1, 100], [1, 2])}, "n", "y", p, log_x=True, markers=True),
}  # fmt: skip


@pytest.mark.parametrize("name", DRAW)
def test_a_figure_is_drawn(name: str, tmp_path: Path) -> None:
    path = tmp_path / "sub" / f"{name}.png"
    assert DRAW[name](path) == path
    with Image.open(path) as image:
        assert image.width == 900
        assert 150 < image.height < 700
        pixels = np.asarray(image.convert("L"))
    assert pixels.std() > 5  # something is on it
    # nothing is cut at the edge: a blank frame all around
    assert min(pixels[0].min(), pixels[-1].min(), pixels[:, 0].min()) > 200


@pytest.mark.parametrize("shape", [(8, 8), (8, 8, 1), (8, 8, 3)])
def test_image_grid(shape: tuple[int, ...], tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 255, (12, *shape), dtype=np.uint8)
    path = figures.image_grid(images, ["t"] * 12, tmp_path / "grid.png", 3, 4, ["query", "1", "2", "3"], title="near")
    with Image.open(path) as image:
        assert image.width <= 910


def test_image_grid_refuses_another_number_of_images(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="2 x 4 needs 8 images"):
        figures.image_grid(IMAGES, [], tmp_path / "grid.png", 2, 4)


def test_smoothing_keeps_a_constant_and_the_length() -> None:
    assert figures._smooth(np.full(100, 3.0)) == pytest.approx(np.full(100, 3.0))
    assert len(figures._smooth(np.arange(7.0))) == 7


def test_matplotlib_is_imported_late_and_pyplot_never(tmp_path: Path) -> None:
    code = (
        "import sys; from labelmill.tracking import figures\n"
        "assert 'matplotlib' not in sys.modules\n"
        f"figures.lines({{'a': ([1, 2], [3, 4])}}, 'x', 'y', {str(tmp_path / 'a.png')!r})\n"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
