"""Figures that compare the trials of a search."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from labelmill.tracking.figures import GRID, INK, MUTED, PALETTE, _figure, _label, _save

_COLOURS = {"best": PALETTE[4], "finished": PALETTE[0], "stopped": PALETTE[7], "failed": PALETTE[3]}
_MOST_PANELS = 12


@dataclass
class Axis:
    """A setting of all trials.

    Attributes:
        values: numbers, or some of `choices`.
        log: on a logarithmic scale.
        choices: names in their order; None for numbers.
    """

    values: list[Any]
    log: bool = False
    choices: list[Any] | None = None

    def places(self) -> np.ndarray:
        """Where the values lie, 0 to 1."""
        if self.choices is not None:
            return np.array([self.choices.index(value) for value in self.values]) / max(1, len(self.choices) - 1)
        numbers = np.array(self.values, dtype=float)
        numbers = np.log(numbers) if self.log else numbers
        low, high = numbers.min(), numbers.max()
        return (numbers - low) / (high - low) if high > low else np.full(len(numbers), 0.5)

    def ends(self) -> list[tuple[float, str]]:
        """(place, text) of what is written beside the axis."""
        if self.choices is not None:
            return [(i / max(1, len(self.choices) - 1), _text(choice)) for i, choice in enumerate(self.choices)]
        low, high = min(self.values), max(self.values)
        return [(0.0, _text(low)), (1.0, _text(high))] if high > low else [(0.5, _text(low))]


def _text(value: Any) -> str:
    text = f"{value:.3g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 18 else text[:16] + "…"


def parallel_coordinates(
    axes: Mapping[str, Axis], metric: str, values: Sequence[float], kinds: Sequence[str], higher: bool, path: str | Path
) -> Path:
    """A line a trial through its settings to the metric; the better, the darker; the best in its own colour."""
    columns = {**axes, metric: Axis(list(values))}
    places = np.stack([axis.places() for axis in columns.values()], axis=1)
    ranks = np.argsort(np.argsort(np.array(values) * (1 if higher else -1)))
    figure = _figure(3.8)
    plot = figure.subplots()
    for trial in np.argsort(ranks):
        best = kinds[trial] == "best"
        strength = (ranks[trial] + 1) / len(values)
        colour = _COLOURS["best"] if best else PALETTE[0]
        plot.plot(
            places[trial], color=colour, alpha=1.0 if best else 0.12 + 0.6 * strength, linewidth=2.4 if best else 1.3
        )
    for column, axis in enumerate(columns.values()):
        plot.axvline(column, color="#BBBBBB", linewidth=0.8, zorder=0)
        for place, text in axis.ends():
            plot.annotate(text, (column, place), (4, 2), textcoords="offset points", fontsize=7.5, color=MUTED)
    plot.set_xticks(range(len(columns)), [name.replace(".", ".\n") for name in columns], fontsize=8)
    plot.set_yticks([])
    plot.set_ylim(-0.06, 1.1)
    _label(plot, "", "", "trials by their settings")
    plot.spines["left"].set_visible(False)
    return _save(figure, path)


def metric_by_parameter(
    axes: Mapping[str, Axis], metric: str, values: Sequence[float], kinds: Sequence[str], higher: bool, path: str | Path
) -> Path:
    """The metric against each setting, a panel a setting (the first twelve); colours tell how a trial ended."""
    shown = list(axes.items())[:_MOST_PANELS]
    columns = min(3, len(shown))
    rows = math.ceil(len(shown) / columns)
    figure = _figure(2.6 * rows)
    panels = np.atleast_1d(figure.subplots(rows, columns, sharey=True)).reshape(-1)
    colours = [_COLOURS[kind] for kind in kinds]
    for index, (panel, (name, axis)) in enumerate(zip(panels, shown, strict=False)):
        if axis.choices is not None:
            x = [axis.choices.index(value) for value in axis.values]
            panel.set_xticks(range(len(axis.choices)), [_text(choice) for choice in axis.choices])
            panel.set_xlim(-0.5, len(axis.choices) - 0.5)
        else:
            x = axis.values
            if axis.log and max(x) >= 10 * min(x):
                panel.set_xscale("log")
        panel.scatter(x, values, c=colours, s=26, zorder=3)
        panel.grid(axis="y", color=GRID, linewidth=0.8)
        _label(panel, name, metric if index % columns == 0 else "")
    for panel in panels[len(shown) :]:
        panel.set_visible(False)
    for kind, colour in _COLOURS.items():
        if kind in kinds:
            panels[0].scatter([], [], c=colour, s=26, label=kind)
    panels[0].legend(frameon=False, fontsize=8, labelcolor=INK, handlelength=0.8)
    return _save(figure, path)


def learning_curves(
    curves: Mapping[int, Sequence[tuple[int, float]]], metric: str, best: int | None, path: str | Path
) -> Path:
    """The metric over optimizer steps, a line a trial; the best in its own colour, a dot where one ended."""
    figure = _figure(3.8)
    plot = figure.subplots()
    for number, curve in curves.items():
        is_best = number == best
        colour = _COLOURS["best"] if is_best else PALETTE[0]
        label = f"trial {number} (best)" if is_best else None
        steps, values = zip(*curve, strict=True)
        plot.plot(
            steps, values, color=colour, alpha=1.0 if is_best else 0.45, linewidth=2.2 if is_best else 1.2, label=label
        )
        plot.scatter(steps[-1:], values[-1:], color=colour, alpha=1.0 if is_best else 0.45, s=14)
    if best in curves:
        plot.legend(frameon=False, fontsize=9, labelcolor=INK)
    _label(plot, "optimizer step", metric, "trials while they train")
    return _save(figure, path)
