"""Dual-head distillation (DHKD): labels teach the main head, logits a second one that is thrown away; both the encoder.

Yang, Zong, Huang, Feng, An: Dual-Head Knowledge Distillation (arXiv 2411.08937). The authors' code was read; the section that
derives the method was not, so the argument for two heads is reconstructed.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from labelmill.losses.distillation import KD, BinaryKL, BinaryKLNorm
from labelmill.run import Run
from labelmill.workload import workload
from workloads.distillation.kd import DistillJob, distill
from workloads.distillation.student import Arm, Arms, LogitTerm

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
    distill(job, run)
