"""The classes of a step: those drawn for it, the hard ones of the batch, and the batch's positives.

Shape legend: C classes of this rank, N samples of this replica, K own positives of them, T own positives of all
replicas, S rows of the step, D embedding size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from labelmill.heads import plan, sampling
from labelmill.heads.ranks import Grid
from labelmill.heads.rows import ClassRows
from labelmill.heads.screen import Screen

if TYPE_CHECKING:
    from labelmill.heads.config import HeadConfig


class Drawing:
    """Draws the classes of [start, stop) that take part in a step.

    Attributes:
        screen: finds hard classes; None for other kinds of sampling.
        hard_count, uniform_count: classes of a step, over all ranks, that are hard and that are drawn uniformly.
        probability: of a class to be drawn, other than as a hard one.
    """

    def __init__(self, config: HeadConfig, num_classes: int, start: int, stop: int, rows: ClassRows) -> None:
        self.config, self.num_classes, self.start, self.stop, self.rows = config, num_classes, start, stop, rows
        kind, count = config.sampling, round(config.sample_rate * num_classes)
        hard = isinstance(kind, plan.HardSampling) and config.sample_rate < 1
        self.screen = Screen(rows) if hard else None
        self.hard_count = max(1, round(kind.share * count)) if isinstance(kind, plan.HardSampling) else 0
        self.uniform_count = max(1, count) - self.hard_count
        self.probability = self.uniform_count / num_classes
        if isinstance(kind, plan.BlockSampling):
            _, _, blocks = plan.dealt_blocks(num_classes, config.block_rows, kind.stride)
            self.probability = max(1, round(config.sample_rate * blocks)) / blocks
        self._drawn: tuple[tuple[int, int], Any] | None = None  # (seed, step) and what was drawn for them

    def forget(self) -> None:
        """Draws anew in the next step: rows are on another device now."""
        self._drawn = None

    def plan(
        self, grid: Grid, x_ND: Tensor, sample_K: Tensor, class_K: Tensor, touched_T: Tensor, seed: int, step: int
    ) -> tuple[plan.StepPlan, Tensor | None]:
        """The rows that take part (the drawn ones and own positives) and their weights as negatives.

        Collective where the classes are hard ones. Drawn once for (seed, step).

        Args:
            sample_K, class_K: own positives of this replica's samples; `touched_T` those of all replicas.
        """
        config, classes, group = self.config, self.stop - self.start, self.config.sub_centres
        if config.sample_rate >= 1:
            return plan.everything(len(self.rows)), None
        if self._drawn is None or self._drawn[0] != (seed, step):
            self._drawn = ((seed, step), self._draw(seed, step, x_ND.device))
        drawn = self._drawn[1]
        sure_C = touched_T  # classes that take part for certain
        if isinstance(config.sampling, plan.BlockSampling):
            sections = plan.of_blocks(drawn, touched_T, classes)
        else:
            parts = [drawn, touched_T]
            if self.screen is not None:
                hard_S = self.screen.hardest(grid, x_ND, sample_K, class_K, self.hard_count, group)
                sure_C = torch.cat([touched_T, hard_S])
                parts.append(hard_S)
            sections = plan.of_rows(torch.unique(torch.cat(parts)), classes)
        scaled = plan.of_groups(sections, group, len(self.rows))
        if not config.importance:
            return scaled, None
        # with hard classes alone nothing is drawn, and every class is certain
        weight_S = x_ND.new_full((sections.total,), 1.0 / self.probability if self.probability else 1.0)
        weight_S[sections.locate(sure_C)] = 1.0
        return scaled, weight_S.repeat_interleave(group)

    def _draw(self, seed: int, step: int, device: torch.device) -> Any:
        """What (seed, step) draws of own classes: local ids, or slices for block sampling."""
        config = self.config
        if isinstance(config.sampling, plan.BlockSampling):
            shape = (self.num_classes, config.block_rows, config.sampling.stride, config.sample_rate)
            return plan.drawn_blocks(*shape, seed, step, self.start, self.stop)
        if self.uniform_count < 1:
            return torch.empty(0, dtype=torch.int64, device=device)
        classes = sampling.sampled_classes(self.num_classes, self.probability, seed, step)
        lo, hi = torch.searchsorted(classes, torch.tensor([self.start, self.stop])).tolist()
        return (classes[lo:hi] - self.start).to(device)
