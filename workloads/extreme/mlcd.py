"""Multi-label cluster discrimination on labels at hand: a threshold between positives and negatives (MLCD).

An, Yang, Dai, Feng, Deng: Multi-label Cluster Discrimination for Visual Representation Learning (ECCV 2024, Eq. 5), with the
sum over drawn positives and the inter-class filter of the trainers that the authors released later. `discrimination.mlcd`
makes the labels by clustering; here they are given.
"""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from labelmill.heads.config import HeadConfig
from labelmill.heads.optim import Adagrad
from labelmill.losses.classification import MLCD, Softmax
from labelmill.losses.margins import CosFace
from labelmill.run import Run
from labelmill.workload import workload
from workloads.extreme.partial_fc import METRICS, RowsJob, rows_run
from workloads.extreme.rows import SampledSum


class MlcdJob(RowsJob):
    """See the module."""

    workload: Literal["extreme.mlcd"]
    head: HeadConfig = HeadConfig(
        loss=MLCD(), margin=CosFace(m=0.3), scale=64.0, optimizer=Adagrad(), lr_multiplier=5.0
    )

    @model_validator(mode="after")
    def _fits(self) -> MlcdJob:
        if isinstance(self.objective, SampledSum) and not isinstance(self.head.loss, Softmax):
            raise ValueError(
                f"objective sampled_sum adds up single-label losses: head.loss softmax, not {self.head.loss.kind}"
            )
        return self


@workload("extreme.mlcd", MlcdJob, METRICS, ("eval/p1",))
def mlcd(job: MlcdJob, run: Run) -> None:
    rows_run(job, run)
