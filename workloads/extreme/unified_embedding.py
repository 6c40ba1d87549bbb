"""Unified embedding: one hashed table for many high-cardinality features (feature multiplexing).

Coleman, Kang, Fahrbach, Wang, Hong, Chi, Cheng: Unified Embedding: Battle-Tested Feature Representations for Web-Scale ML
Systems (NeurIPS 2023, arXiv 2305.12102). The table is split over the workers; a step touches the rows of its values alone.
Compared on request with separate tables, with the hashing trick, and with a row for every value.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, model_validator
from safetensors.numpy import save_file

from labelmill.data.categorical import Feature, FeatureSet
from labelmill.data.config import DataConfig
from labelmill.data.manifest import Manifest
from labelmill.data.spec import AnySpec
from labelmill.errors import JobError
from labelmill.evaluation.groups import wilson_interval
from labelmill.reporting import report_training
from labelmill.run import Run
from labelmill.stages import Fitted, Stage, write_json
from labelmill.training.config import TrainConfig, TrainJob
from labelmill.workload import workload
from workloads.extreme.ranking import refuse_test_search
from workloads.extreme.unified import NetworkSection, Sharing, TableClassifier, TableSection, count_values, row_map


class UnifiedJob(TrainJob):
    """A table of categorical columns (a JSON object a sample) and one label a sample."""

    workload: Literal["extreme.unified_embedding"]
    data: DataConfig
    field: str = Field("row", description="manifest field that holds the JSON object")
    features: tuple[Feature, ...] = Field(min_length=1)
    table: TableSection
    network: NetworkSection = NetworkSection()
    compare: tuple[Sharing, ...] = Field((), description="other ways of sharing the same number of rows, besides")
    eval_batch: int = Field(1024, ge=1)

    def class_count(self) -> int | None:
        return self.data.open()[0].label.num_classes

    @model_validator(mode="after")
    def _search_leaves_the_test_set_alone(self) -> UnifiedJob:
        refuse_test_search(self.search, self.data.dev)
        return self


def count(run: Run, folder: Path, train: Manifest, field: str, features: FeatureSet) -> dict[str, Any]:
    """Stage: distinct training values of each feature."""
    values = count_values(train, field, features)
    save_file({name: found.view(np.int64) for name, found in values.items()}, folder / "values.safetensors")
    return {"vocabulary": {name: len(found) for name, found in values.items()}}


def fit_table(
    run: Run,
    folder: Path,
    train: AnySpec,
    predict: Mapping[str, AnySpec],
    evaluate: AnySpec,
    values: Stage,
    features: FeatureSet,
    table: TableSection,
    network: NetworkSection,
    config: TrainConfig,
    seed: int,
) -> dict[str, Any]:
    """Stage: trains table and network, and classifies the streams of `predict`."""
    assert train.label.num_classes is not None
    if train.label.form != "single":
        raise JobError(f"extreme.unified_embedding takes one label a sample, not labels of form {train.label.form}.")
    values_file = values.folder.resolve() / "values.safetensors"
    objective = partial(TableClassifier, features, table, network, values_file, train.label.num_classes, seed)
    rows = row_map(features, table, values_file)
    # whoever opens the rows elsewhere needs to know what they stand for
    write_json(folder / "features.json", features.digest() | {"rows": rows.rows, "sharing": table.sharing})
    fitted = run.fit(folder, objective, train, config, predict, evaluate=evaluate)
    return {"seconds": fitted.seconds, "rows": rows.rows}


@workload("extreme.unified_embedding", UnifiedJob, ("test/accuracy", "test/macro_f1"), ("eval/accuracy",))
def unified_embedding(job: UnifiedJob, run: Run) -> None:
    train, test = job.data.open()
    features = FeatureSet(features=job.features)
    options: dict[str, Any] = {"field": job.field, "seed": job.seed}
    stream = job.data.training_stream(train, run.folder / "data", global_batch=job.train.global_batch, **options)
    run.track_data(train=stream, test=test)
    values = run.stage("count", count, train=train, field=job.field, features=features)
    fits: dict[str, Stage] = {}
    for sharing in (job.table.sharing, *(s for s in job.compare if s != job.table.sharing)):
        fits[sharing] = run.stage(
            f"fit-{sharing}",
            fit_table,
            train=stream,
            values=values,
            features=features,
            table=job.table.model_copy(update={"sharing": sharing}),
            network=job.network,
            config=job.train,
            seed=job.seed,
            **job.data.judging(test, global_batch=job.eval_batch, **options),
        )
    for number, (name, fit) in enumerate(fits.items()):
        report_training(run, Fitted(fit.folder), fit["seconds"], "" if number == 0 else name)
        run.report_data_health(Fitted(fit.folder))
    report_tables(run, fits, train.label.num_classes or 0)
    vocabulary = values["vocabulary"]
    rows = [[f.name, vocabulary[f.name], f.chunks, "yes" if f.many else ""] for f in job.features]
    run.report.add_table("features", ["feature", "distinct training values", "chunks", "list"], rows)


def macro_f1(label_N: np.ndarray, found_N: np.ndarray, classes: int) -> float:
    """Mean F1 over the classes that the labels have."""
    right = np.bincount(label_N[label_N == found_N], minlength=classes)
    true, said = np.bincount(label_N, minlength=classes), np.bincount(found_N, minlength=classes)
    seen = true > 0
    return float((2 * right[seen] / (true[seen] + said[seen])).mean())


def report_tables(run: Run, fits: Mapping[str, Stage], classes: int) -> None:
    """Accuracy and macro F1 of every way of sharing rows; how the rows of the table are used."""
    rows = []
    for number, (sharing, fit) in enumerate(fits.items()):
        fitted = Fitted(fit.folder)
        table = fitted.predictions("test")
        label_N, found_N = (table.column(name).to_numpy() for name in ("label", "class_id"))
        right = int((label_N == found_N).sum())
        low, high = wilson_interval(right, len(label_N))
        f1 = macro_f1(label_N, found_N, classes)
        prefix = "test" if number == 0 else f"test/{sharing}"
        run.report.metrics |= {f"{prefix}/accuracy": right / len(label_N), f"{prefix}/macro_f1": f1}
        length_M = fitted.head_rows("table").norm(dim=1)
        run.report.metrics[f"table/{sharing}/mean squared row length"] = float(length_M.square().mean())
        accuracy = f"{100 * right / len(label_N):.2f} ± {50 * (high - low):.2f}"
        rows.append([sharing, f"{fit['rows']:,}", accuracy, f"{100 * f1:.2f}", f"{length_M.square().mean():.3g}"])
    columns = ["rows", "table rows", "accuracy %", "macro F1 %", "mean squared row length"]
    run.report.add_table(
        "tables", columns, rows, "on the test set; the interval is that of the sample, not of the seed"
    )
