"""Figures of reports: one look, readable at the width of a README (900 pixels).

matplotlib is imported when a figure is drawn. Only `Figure` objects are used, never pyplot: nothing global,
no display, safe in threads and workers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart by people with any colour vision; grey is for what is only compared with
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#7A6FAC", "#8C8C8C")
INK, MUTED, GRID = "#2B2B2B", "#6B6B6B", "#E3E3E3"
_DPI = 120
_WIDTH = 7.5  # inches; 900 pixels


def loss_curve(history: Sequence[Mapping[str, float]], path: str | Path, key: str = "loss", title: str = "") -> Path:
    """Training loss over steps: the raw values pale, their moving average strong, the learning rate below.

    `history` holds a mapping per logged step with `step`, `key` and, if there is a rate panel, `lr`.
    """
    points = [h for h in history if key in h and math.isfinite(h[key])]
    steps = np.array([h["step"] for h in points], dtype=float)
    values = np.array([h[key] for h in points], dtype=float)
    rates = [(h["step"], h["lr"]) for h in history if "lr" in h]
    figure = _figure(4.4 if rates else 3.8)
    if rates:
        axes, below = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
        below.plot(*zip(*rates, strict=True), color=MUTED, linewidth=1.4)
        below.set_ylim(bottom=0)
        _label(below, "step", "learning\nrate")
        _group_digits(below.xaxis)
        below.yaxis.set_major_locator(_max_ticks(2))
    else:
        axes = figure.subplots()
        _group_digits(axes.xaxis)
    axes.plot(steps, values, color=PALETTE[0], alpha=0.25, linewidth=1.0, label="each logged step")
    if len(values) >= 5:
        axes.plot(steps, _smooth(values), color=PALETTE[0], linewidth=2.0, label="moving average")
        _legend(axes)
    _label(axes, "" if rates else "step", key, title)
    return _save(figure, path)


def lines(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    xlabel: str,
    ylabel: str,
    path: str | Path,
    title: str = "",
    markers: bool = False,
    log_x: bool = False,
) -> Path:
    """Named curves: name -> (x, y)."""
    from matplotlib.ticker import MaxNLocator

    figure = _figure(3.8)
    axes = figure.subplots()
    for index, (name, (x, y)) in enumerate(series.items()):
        axes.plot(
            x,
            y,
            color=_color(index),
            linestyle=("-", "--", ":")[index // len(PALETTE) % 3],
            linewidth=2.0,
            marker="o" if markers else None,
            markersize=5,
            label=name,
        )
    if log_x:
        axes.set_xscale("log")
    else:
        if all(float(value).is_integer() for x, _ in series.values() for value in x):
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        _group_digits(axes.xaxis)
    if len(series) > 1:
        _legend(axes)
    _label(axes, xlabel, ylabel, title)
    return _save(figure, path)


def bars_by_group(
    groups: Sequence[str],
    series: Mapping[str, Sequence[float]],
    ylabel: str,
    path: str | Path,
    errors: Mapping[str, Sequence[float]] | None = None,
    xlabel: str = "",
    title: str = "",
) -> Path:
    """Bars side by side in each group, one colour a series; the first series is the one that matters.

    `errors` holds half-widths of intervals by series. Values are written over the bars while there are few.
    """
    figure = _figure(4.0)
    axes = figure.subplots()
    width = 0.8 / max(1, len(series))
    centres = np.arange(len(groups))
    for index, (name, values) in enumerate(series.items()):
        x = centres + (index - (len(series) - 1) / 2) * width
        spread = errors.get(name) if errors else None
        heights = np.array([np.nan if v is None else v for v in values], dtype=float)
        axes.bar(x, heights, width * 0.92, color=_color(index), label=name)
        if spread is not None:
            axes.errorbar(x, heights, yerr=spread, fmt="none", ecolor=INK, elinewidth=1, capsize=2)
        if len(groups) * len(series) <= 20:
            for number, (place, height) in enumerate(zip(x, heights, strict=True)):
                if math.isfinite(height):
                    top = height + (spread[number] if spread is not None else 0)
                    axes.annotate(
                        _short(height), (place, top), (0, 2), textcoords="offset points",
                        ha="center", va="bottom", fontsize=7.5, color=MUTED,
                    )  # fmt: skip
    axes.set_xticks(centres, groups)
    axes.tick_params(axis="x", length=0)
    axes.margins(y=0.12)
    if len(series) > 1:
        _legend(axes, outside=True, columns=min(4, len(series)))
    _label(axes, xlabel, ylabel, title, title_pad=28 if len(series) > 1 else 8)
    return _save(figure, path)


def stacked_parts(
    parts: Mapping[str, float | Sequence[float]], path: str | Path, title: str = "", label: str = "one step"
) -> Path:
    """Where the time of a step goes: a bar per part, each starting where the one above it ends.

    `parts` holds seconds by part, in the order of time: a mean, or the measured values, whose median is
    shown.
    """
    seconds = {name: float(np.median(v) if isinstance(v, Sequence | np.ndarray) else v) for name, v in parts.items()}
    total = sum(seconds.values())
    unit, scale = ("ms", 1e3) if total < 1 else ("s", 1.0)
    figure = _figure(0.9 + 0.3 * len(seconds))
    axes = figure.subplots()
    left = 0.0
    for row, part in enumerate(seconds.values()):
        width = part * scale
        axes.barh([row], [width], left=left, height=0.72, color=_color(row))
        text = f"{_short(width)} {unit}  {part / total if total else 0:.0%}"
        # beside the bar where there is room, else in it
        place, side, colour = left + width, "left", INK
        if left + width > 0.8 * total * scale:
            place, side, colour = (
                (left, "right", INK) if left > 0.2 * total * scale else (left + width, "right", "white")
            )
        axes.annotate(
            text, (place, row), (5 if side == "left" else -5, 0), textcoords="offset points", ha=side,
            va="center", fontsize=9, color=colour,
        )  # fmt: skip
        left += width
    axes.set_yticks(range(len(seconds)), list(seconds))
    axes.invert_yaxis()
    axes.set_xlim(0, left or 1)
    axes.grid(axis="x", color=GRID, linewidth=0.8)
    axes.tick_params(axis="y", length=0)
    _label(axes, f"{unit} of {label} ({_short(left)} {unit} in all)", "", title)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", colors=INK)
    return _save(figure, path)


def image_grid(
    images: np.ndarray,
    titles: Sequence[str],
    path: str | Path,
    rows: int,
    columns: int,
    column_titles: Sequence[str] = (),
    title: str = "",
    queries: bool = True,
) -> Path:
    """Images in rows. With `queries` (nearest neighbours) the first column is set apart by a gap and a frame.

    `images` is uint8 (rows x columns, H, W), (..., H, W, 1) or (..., H, W, 3), row by row; `titles` has one
    text per image (empty for none). Raises ValueError when the numbers don't fit.
    """
    if len(images) != rows * columns or len(titles) not in (0, rows * columns):
        raise ValueError(f"a grid of {rows} x {columns} needs {rows * columns} images and titles, not {len(images)}")
    from matplotlib.gridspec import GridSpec

    side = min(1.15, _WIDTH / (columns + 0.6))
    caption = 0.17 if any(titles) else 0.03
    width, height = (
        side * (columns + 0.35),
        rows * (side + caption) + (0.25 if column_titles else 0) + (0.3 if title else 0),
    )
    figure = _figure(height, width, layout=None)
    top = 1 - ((0.25 if column_titles else 0) + (0.3 if title else 0)) / height
    grid = GridSpec(
        rows, columns + 1, figure, left=0.01, right=0.99, bottom=0.01, top=top - caption / height * 0.9,
        wspace=0.08, hspace=(caption + 0.05) / side, width_ratios=[1, 0.22 if queries else 0.001, *([1] * (columns - 1))],
    )  # fmt: skip
    for row in range(rows):
        for column in range(columns):
            number = row * columns + column
            axes = figure.add_subplot(grid[row, column if column == 0 else column + 1])
            image = np.asarray(images[number])
            image = image[..., 0] if image.ndim == 3 and image.shape[-1] == 1 else image
            axes.imshow(image, cmap="gray" if image.ndim == 2 else None, vmin=0, vmax=255, interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
            axes.grid(False)
            for spine in axes.spines.values():
                spine.set_visible(queries and column == 0)
                spine.set_color(PALETTE[0])
                spine.set_linewidth(2)
            if titles and titles[number]:
                axes.set_title(titles[number], fontsize=7.5, color=MUTED, pad=2)
            if row == 0 and column_titles and column_titles[column]:
                axes.annotate(
                    column_titles[column], (0.5, 1), (0, 14 if any(titles) else 4), xycoords="axes fraction",
                    textcoords="offset points", ha="center", fontsize=9, color=INK,
                )  # fmt: skip
    if title:
        figure.suptitle(
            title, x=0.01, ha="left", y=1 - 0.08 / height, va="top", fontsize=11, color=INK, fontweight="bold"
        )
    return _save(figure, path)


def histograms(
    values: Mapping[str, Sequence[float] | np.ndarray],
    xlabel: str,
    path: str | Path,
    bins: int = 60,
    title: str = "",
    ylabel: str = "density",
) -> Path:
    """Distributions on one axis, each normalised to area 1: filled outlines in the colours of the series."""
    finite = {name: np.asarray(v, dtype=float)[np.isfinite(np.asarray(v, dtype=float))] for name, v in values.items()}
    filled = [v for v in finite.values() if len(v)]
    low, high = (min(v.min() for v in filled), max(v.max() for v in filled)) if filled else (0.0, 1.0)
    edges = np.linspace(low, high if high > low else low + 1, bins + 1)
    figure = _figure(3.6)
    axes = figure.subplots()
    for index, (name, numbers) in enumerate(finite.items()):
        if not len(numbers):
            continue
        heights, _ = np.histogram(numbers, edges, density=True)
        axes.stairs(heights, edges, fill=True, color=_color(index), alpha=0.22)
        axes.stairs(heights, edges, color=_color(index), linewidth=1.6, label=f"{name} (n = {len(numbers):,})")
    axes.set_ylim(bottom=0)
    _legend(axes)
    _label(axes, xlabel, ylabel, title)
    return _save(figure, path)


def matrix(
    values: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    path: str | Path,
    xlabel: str,
    ylabel: str,
    title: str = "",
    shares: bool = True,
    low: float = 0.0,
) -> Path:
    """A table of numbers as shades, each written in its cell; `shares` writes percent and leaves out what is below 0.5.

    `low` is the number that is white.
    """
    from matplotlib.colors import LinearSegmentedColormap

    height, width = values.shape
    side = min(0.62, max(0.26, (_WIDTH - 1.6) / width))
    figure = _figure(side * height + 1.6, side * width + 1.9)
    axes = figure.subplots()
    shades = LinearSegmentedColormap.from_list("shades", ["#FFFFFF", PALETTE[0]])
    off = values[~np.eye(height, width, dtype=bool)]
    # the diagonal outshines the errors: shades end where the largest of those lies
    top = float(off.max(initial=0.0)) or 1.0
    axes.imshow(np.minimum(values, top), cmap=shades, vmin=low, vmax=max(top, low + 1e-6))
    axes.set_xticks(range(width), columns, rotation=45, ha="right")
    axes.set_yticks(range(height), rows)
    for i in range(height):
        for j in range(width):
            text = (f"{100 * values[i, j]:.0f}" if values[i, j] >= 0.005 else "") if shares else f"{values[i, j]:,.0f}"
            color = "white" if min(values[i, j], top) - low > 0.6 * (top - low) else INK
            axes.text(j, i, text, ha="center", va="center", color=color, fontsize=7.5)
    _label(axes, xlabel, ylabel, title)
    axes.grid(False)
    return _save(figure, path)


def reliability_panels(systems: Mapping[str, tuple[np.ndarray, np.ndarray, np.ndarray]], path: str | Path) -> Path:
    """Accuracy over confidence in bins, a panel a system: name -> (confidence, accuracy, samples) of its bins.

    Dots as large as their share of the samples, lines to where a calibrated system would be.
    """
    columns = min(4, max(1, len(systems)))
    rows = -(-len(systems) // columns)
    figure = _figure(2.25 * rows + 0.5)  # square panels with their titles
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for axes in panels.ravel()[len(systems) :]:
        axes.set_axis_off()
    for index, (axes, (name, (x, y, count))) in enumerate(zip(panels.ravel(), systems.items(), strict=False)):
        axes.plot([0, 1], [0, 1], color=MUTED, linewidth=1.0, linestyle="--")
        axes.vlines(x, np.minimum(x, y), np.maximum(x, y), color=PALETTE[4], linewidth=1.2)
        axes.scatter(x, y, s=6 + 60 * np.sqrt(count / max(1, count.max())), color=PALETTE[0], linewidth=0, zorder=3)
        below = index // columns == rows - 1 or index + columns >= len(systems)
        _label(axes, "confidence" if below else "", "" if index % columns else "accuracy", name)
        axes.title.set_fontsize(9)
        axes.tick_params(labelbottom=below)
        axes.set(xlim=(0, 1.02), ylim=(0, 1.02), xticks=(0, 0.5, 1), yticks=(0, 0.5, 1), aspect="equal")
    return _save(figure, path)


# --- the look -----------------------------------------------------------------------------------------------


def _figure(height: float, width: float = _WIDTH, layout: Any = "constrained") -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=_DPI, layout=layout, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _label(axes: Axes, xlabel: str, ylabel: str, title: str = "", title_pad: float = 8) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#BBBBBB")
    axes.set_axisbelow(True)
    if axes.yaxis.get_gridlines() and ylabel:
        axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.tick_params(colors=MUTED, labelsize=9)
    axes.set_xlabel(xlabel, color=INK, fontsize=10)
    axes.set_ylabel(ylabel, color=INK, fontsize=10)
    if title:
        axes.set_title(title, loc="left", color=INK, fontsize=11, fontweight="bold", pad=title_pad)


def _legend(axes: Axes, outside: bool = False, columns: int = 1) -> None:
    place: dict[str, Any] = {"loc": "best"}
    if outside:
        place = {"loc": "lower left", "bbox_to_anchor": (0, 1.0), "ncols": columns, "borderaxespad": 0.2}
    axes.legend(frameon=False, fontsize=9, labelcolor=INK, handlelength=1.4, **place)


def _color(index: int) -> str:
    return PALETTE[index % len(PALETTE)]


def _group_digits(axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter

    axis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{value:,.0f}" if float(value).is_integer() else f"{value:g}")
    )


def _max_ticks(count: int) -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(count)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Centred moving average over a twentieth of the series, shorter at the ends."""
    width = max(3, len(values) // 20) | 1
    sums = np.convolve(values, np.ones(width), mode="same")
    return sums / np.convolve(np.ones(len(values)), np.ones(width), mode="same")


def _short(value: float) -> str:
    """Three significant digits without an exponent."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    decimals = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{min(decimals, 3)}f}"


def _save(figure: Figure, path: str | Path) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path
