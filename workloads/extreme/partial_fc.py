"""Parametric rows on extreme multi-label data: the rival of the dual encoder.

An et al., Killing Two Birds with One Stone (partial FC, CVPR 2022), with the losses for several positives, and the metrics of
extreme classification. Every label has a row of its own: nothing is known of labels that training never saw.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from labelmill.data.config import DataConfig
from labelmill.data.spec import AnySpec
from labelmill.encoders import EncoderConfig
from labelmill.errors import JobError
from labelmill.heads.config import HeadConfig
from labelmill.heads.index import IndexConfig
from labelmill.heads.optim import Adagrad
from labelmill.losses.classification import Decoupled
from labelmill.reporting import report_training
from labelmill.run import Run
from labelmill.stages import Fitted
from labelmill.training.config import TrainConfig, TrainJob
from labelmill.training.initial import keep_class_names
from labelmill.workload import workload
from workloads.discrimination.partial_fc import input_options
from workloads.extreme.ranking import RankingSection, ranked_for, refuse_test_search, report_extreme
from workloads.extreme.rows import RowRanker, SampledSum, Together

AnyObjective = Annotated[Together | SampledSum, Field(discriminator="kind")]


class RowsJob(TrainJob):
    """Queries with several labels, a row a label."""

    data: DataConfig
    encoder: EncoderConfig
    head: HeadConfig = HeadConfig(loss=Decoupled(), scale=20.0, optimizer=Adagrad(), lr_multiplier=5.0)
    objective: AnyObjective = Together()
    ranking: RankingSection = RankingSection()
    eval_batch: int = Field(1024, ge=1)
    index: IndexConfig | None = Field(None, description="an approximate index in the registered model")

    def class_count(self) -> int | None:
        return self.data.open()[0].label.num_classes

    @model_validator(mode="after")
    def _search_leaves_the_test_set_alone(self) -> RowsJob:
        refuse_test_search(self.search, self.data.dev)
        return self


class PartialFCJob(RowsJob):
    """See the module."""

    workload: Literal["extreme.partial_fc"]


def fit_rows(
    run: Run,
    folder: Path,
    train: AnySpec,
    predict: Mapping[str, AnySpec],
    evaluate: AnySpec,
    encoder: EncoderConfig,
    head: HeadConfig,
    objective: AnyObjective,
    config: TrainConfig,
    seed: int,
    k: int,
) -> dict[str, Any]:
    """Stage: trains, and ranks `k` labels for every query of the streams of `predict`."""
    assert train.label.num_classes is not None
    keep_class_names(folder, train.parts[0].manifest)
    model = partial(RowRanker, encoder, head, train.label.num_classes, seed, objective, k)
    return {"seconds": run.fit(folder, model, train, config, predict, augment=True, evaluate=evaluate).seconds}


def rows_run(job: RowsJob, run: Run) -> None:
    """Trains and reports, whatever the loss."""
    train, test = job.data.open()
    if train.label.form not in ("single", "multi"):
        raise JobError(f"{job.workload} takes labels of form single or multi, not {train.label.form}.")
    k = ranked_for(job.ranking, test)
    options = input_options(job.encoder, job.seed)
    stream = job.data.training_stream(train, run.folder / "data", global_batch=job.train.global_batch, **options)
    run.track_data(train=stream, test=test)
    fit = run.stage(
        "fit",
        fit_rows,
        train=stream,
        encoder=job.encoder,
        head=job.head,
        objective=job.objective,
        config=job.train,
        seed=job.seed,
        k=k,
        **job.data.judging(test, global_batch=job.eval_batch, **options),
    )
    report_training(run, Fitted(fit.folder), fit["seconds"])
    report_extreme(run, {"rows": fit}, job.ranking, train, test)
    run.report_data_health(Fitted(fit.folder))
    if job.register_as:
        run.register(job.register_as, fit, encoder=job.encoder, head=job.head, data=train, index=job.index)


METRICS = ("test/P@1", "test/P@5", "test/PSP@1", "test/PSP@5", "test/nDCG@5", "test/R@10", "train/final_loss")


@workload("extreme.partial_fc", PartialFCJob, METRICS, ("eval/p1",))
def partial_fc(job: PartialFCJob, run: Run) -> None:
    rows_run(job, run)
