"""Parts of a report that many methods share: how training went, how well classes are ranked.

Shape legend: Q queries, K ranked classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from labelmill.evaluation.groups import metrics_by_group
from labelmill.evaluation.ranking import hits, topk_accuracy
from labelmill.run import Run
from labelmill.stages import Fitted
from labelmill.tracking import figures


def report_training(run: Run, fitted: Fitted, seconds: Mapping[str, float], name: str = "", drawn: bool = True) -> None:
    """Loss curve, parts of a step, throughput, and where the wall time of the fit went; figures if `drawn`."""
    label = f"{name} " if name else ""
    prefix = f"{name}_" if name else ""
    history = fitted.history
    if history:
        curve = [{"step": h["step"], "loss": h["train/loss"], "lr": h["train/learning_rate"]} for h in history]
        if drawn:
            figures.loss_curve(curve, run.figure(f"{prefix}loss"), title=f"{label}training loss")
        # the first record holds the start of the stream
        steady = history[1:] or history
        parts = {
            key.removeprefix("seconds/"): [h[key] for h in steady] for key in steady[0] if key.startswith("seconds/")
        }
        if drawn:
            figures.stacked_parts(parts, run.figure(f"{prefix}step_time"), title=f"{label}where a step's time goes")
        run.report.metrics[f"{prefix}train/samples_per_second"] = float(
            np.median([h["train/samples_per_second"] for h in steady])
        )
        run.report.metrics[f"{prefix}train/final_loss"] = history[-1]["train/loss"]
    rows = [[part, round(value, 1)] for part, value in seconds.items()]
    run.report.add_table(
        f"{label}fit", ["part", "seconds"], rows, "wall time inside the fit, start of workers included"
    )


def report_ranking(
    run: Run,
    name: str,
    ranked: Mapping[str, np.ndarray],
    target_Q: np.ndarray,
    groups_Q: Sequence[str] | np.ndarray | None = None,
    order: Sequence[str] | None = None,
    group_title: str = "group",
) -> None:
    """Top-1 and top-5 of several systems on one set of queries, over all and by group, with 95 % intervals.

    Args:
        name: of the evaluation; names metrics, table and figure.
        ranked: system -> class ids int64 (Q, K); -1 where a system gave none. The first is the one that matters.
        target_Q: true class ids, (Q,) or (Q, P) padded with -1.
        groups_Q: a group of each query.
        order: of the groups.
    """
    target = torch.from_numpy(np.ascontiguousarray(target_Q))
    rows, bars, errors = [], {}, {}
    for index, (system, ids_QK) in enumerate(ranked.items()):
        hit_QK = hits(torch.from_numpy(np.ascontiguousarray(ids_QK)), target)
        ks = tuple(k for k in (1, 5) if k <= hit_QK.shape[1])
        accuracy = topk_accuracy(hit_QK, ks)
        prefix = name if index == 0 else f"{name}/{system}"
        run.report.metrics |= {f"{prefix}/{k}": value for k, value in accuracy.items()}
        groups = ["all"] * len(hit_QK) if groups_Q is None else groups_Q
        total = None if groups_Q is None else "all"
        first = metrics_by_group(groups, hit_QK[:, 0].numpy(), order=order, total=total)
        best = metrics_by_group(groups, hit_QK[:, : ks[-1]].any(1).numpy(), order=order, total=total)
        for one, five in zip(first, best, strict=True):
            interval = f"± {50 * (one.high - one.low):.1f}"
            rows.append(
                [system, one.group, one.count, f"{100 * one.accuracy:.1f} {interval}", f"{100 * five.accuracy:.1f}"]
            )
        if groups_Q is not None:
            bars[system] = [100 * m.accuracy for m in first]
            errors[system] = [50 * (m.high - m.low) for m in first]
            labels = [m.group for m in first]
    caption = "percent of queries, with the half-width of the 95 % interval"
    run.report.add_table(name, ["system", group_title, "queries", "top-1", "top-5"], rows, caption)
    if bars:
        figures.bars_by_group(
            labels, bars, "top-1 (%)", run.figure(f"{name}_by_group"), errors=errors, xlabel=group_title
        )
