"""Dual-head distillation (DHKD): labels teach the main head, logits a second one that is thrown away; both the encoder.

Yang, Zong, Huang, Feng, An: Dual-Head Knowledge Distillation (arXiv 2411.08937). The authors' code was read; the section that
derives the method was not, so the argument for two heads is reconstructed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np
from pydantic import Field

from labelmill.losses.distillation import KD, BinaryKL, BinaryKLNorm
from labelmill.run import Run
from labelmill.stages import Fitted, Stage
from labelmill.tracking import figures
from labelmill.workload import workload
from workloads.distillation.arms import Arm, Arms, LogitTerm
from workloads.distillation.kd import DistillJob, distill

_NORM = (LogitTerm(loss=BinaryKLNorm()),)
ARMS = {
    "CE": Arm(),
    "KD": Arm(ce=0.1, losses=(LogitTerm(weight=0.9, loss=KD()),)),
    "norm only": Arm(ce=0, losses=_NORM),
    "one head norm": Arm(losses=_NORM),
    "one head BinaryKL": Arm(losses=(LogitTerm(loss=BinaryKL()),)),
    "linear": Arm(losses=_NORM, aux="linear"),
    "linear aligned": Arm(losses=_NORM, aux="linear", align="all"),
    "nonlinear": Arm(losses=_NORM, aux="nonlinear"),
    "nonlinear aligned": Arm(losses=_NORM, aux="nonlinear", align="all"),
}


class DualHeadJob(DistillJob):
    """Arms with a second head, and every control."""

    workload: Literal["distillation.dual_head"]
    arms: Arms = Field(ARMS, min_length=1)


@workload("distillation.dual_head", DualHeadJob)
def dual_head(job: DualHeadJob, run: Run) -> None:
    for name, arm in job.arms.items():
        total = sum(term.weight for term in arm.losses if getattr(term.loss, "reduction", "") == "sum")
        classes = job.class_count() or 0
        if total * classes > 1000 * max(arm.ce, 1e-9) and arm.ce:
            run.report.notes.append(
                f"arm {name}: a loss that sums over {classes} classes outweighs cross-entropy: lower its weight, or set "
                "loss.reduction to mean"
            )
    if not job.head and job.train.zero_stage < 3:
        job = job.model_copy(update={"arms": {name: _watched(arm) for name, arm in job.arms.items()}})
    fits, _, _ = distill(job, run)
    report_cosines(run, fits)


def _watched(arm: Arm) -> Arm:
    """The arm with its gradients' cosine logged, if it has two."""
    return arm.model_copy(update={"cosine": bool(arm.ce and arm.losses)})


def report_cosines(run: Run, fits: Mapping[str, Stage]) -> None:
    """How the gradients of labels and teacher stand to each other: do they oppose in the heads and agree in the encoder?"""
    scopes = {"cosine_heads": "heads", "cosine_backbone": "encoder", "cosine_all": "all"}
    rows, curves = [], {}
    for name, fit in fits.items():
        history = Fitted(fit.folder).history
        shown = []
        for scope, title in scopes.items():
            found = [(h["step"], h[f"train/{scope}"]) for h in history if f"train/{scope}" in h]
            if not found:
                shown += ["", ""]
                continue
            quarter = max(1, len(found) // 4)
            first, last = (float(np.mean([v for _, v in part])) for part in (found[:quarter], found[-quarter:]))
            shown += [f"{first:+.2f}", f"{last:+.2f}"]
            run.report.metrics[f"{scope}/{name}"] = last
            if scope != "cosine_all":
                curves[f"{name}, {title}"] = ([s for s, _ in found], [v for _, v in found])
        if any(shown):
            rows.append([name, *shown])
    if not rows:
        return
    header = ["arm", *(f"{title}, {when}" for title in scopes.values() for when in ("first", "last"))]
    caption = "mean over the first and the last quarter of the logged steps; heads: of the two heads, class by class"
    run.report.add_table("cosine of both gradients", header, rows, caption)
    figures.lines(curves, "step", "cosine of the gradients", run.figure("cosines"))
