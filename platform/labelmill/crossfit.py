"""Out-of-sample predictions for a whole data set: K models, each predicts the fold that it didn't train on.

Folds are drawn by a hash of the sample key (`labelmill.data.folds`), so they don't depend on the shards or on how many
workers there are. Predictions lie in Parquet files and are read in batches.

Shape legend: N samples, B samples of a batch, M best classes of a sample.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from labelmill.data.folds import make_folds
from labelmill.data.selection import KeepRows
from labelmill.data.spec import AnySpec, StreamSpec
from labelmill.errors import DataError
from labelmill.evaluation.confident import RowFacts, ThresholdSums, facts_of_top
from labelmill.run import Run
from labelmill.stages import Fitted
from labelmill.training.config import TrainConfig
from labelmill.training.objective import Objective

_BATCH_ROWS = 1 << 16


def crossfit(
    run: Run,
    folder: Path,
    objective: Callable[[], Objective],
    train: AnySpec,
    config: TrainConfig,
    folds: int,
    seed: int = 0,
    eval_batch: int = 1024,
    augment: bool = False,
) -> dict[str, Any]:
    """Stage: for each fold trains on the others and predicts it, by the objective's `predict`.

    Folds are fitted side by side where the cluster holds several groups of the job's workers (`Run.fit_each`), otherwise one
    after the other; a fold that is done is kept. `train` may carry a selection of rows: only these are trained on and
    predicted. Returns {"folds", "seconds", "warnings"}.

    Raises DataError for a mix, a selection with quotas, or folds that don't work (see `make_folds`).
    """
    if not isinstance(train, StreamSpec):
        raise DataError(
            "crossfit takes one training set, not a mix: its predictions belong to the samples of that set."
        )
    within = train.selection
    if within is not None and not isinstance(within, KeepRows):
        raise DataError("crossfit takes a selection of keys or classes (each sample once), not one with quotas.")
    found, warnings = make_folds(train.manifest, folds, seed)
    folder.mkdir(parents=True, exist_ok=True)
    stream = train

    def fit_fold(f: int, rest: KeepRows, held: KeepRows) -> Fitted:
        rest_spec = replace(stream, selection=rest.save(str(folder / f"fold-{f}-train.arrow")))
        held_spec = replace(
            stream,
            selection=held.save(str(folder / f"fold-{f}-held-out.arrow")),
            shuffle=False,
            global_batch=eval_batch,
        )
        run.progress.line(f"fold {f + 1} of {folds}: {rest.samples} samples train, {held.samples} are predicted")
        return run.fit(
            folder / f"fold-{f}", objective, rest_spec, config, predict={"held_out": held_spec}, augment=augment
        )

    fits = run.fit_each(
        [partial(fit_fold, f, _both(fold.train, within), _both(fold.held_out, within)) for f, fold in enumerate(found)]
    )
    seconds = [sum(fitted.seconds.values()) for fitted in fits]
    return {"folds": folds, "seconds": seconds, "warnings": warnings}


def _both(selection: KeepRows, within: KeepRows | None) -> KeepRows:
    if within is None:
        return selection
    shards = range(len(selection.shard_samples))
    return KeepRows.of((selection.mask(i) & within.mask(i) for i in shards), selection.data, selection.about)


def held_out_batches(folder: Path, folds: int) -> Iterator[pa.RecordBatch]:
    """The held-out predictions of a `crossfit` folder, fold by fold, in batches; rows of a fold by rank."""
    for f in range(folds):
        for path in sorted((folder / f"fold-{f}" / "predictions" / "held_out").glob("part-*.parquet")):
            yield from pq.ParquetFile(path).iter_batches(batch_size=_BATCH_ROWS)


def audit_held_out(folder: Path, folds: int, num_classes: int) -> tuple[RowFacts, pa.Array, np.ndarray]:
    """Both passes of confident learning over stored predictions with the columns label, self_confidence, entropy, class_id, prob.

    Returns (facts of N rows, their keys, thresholds (K,)). Raises DataError when there is no prediction.
    """
    sums = ThresholdSums(num_classes)
    for batch in held_out_batches(folder, folds):
        sums.add(_numbers(batch, "label"), _numbers(batch, "self_confidence"))
    if not sums.count_K.sum():
        raise DataError(f"{folder}: no held-out predictions here.")
    thresholds_K = sums.thresholds()
    parts, keys = [], []
    for batch in held_out_batches(folder, folds):
        parts.append(
            facts_of_top(
                _numbers(batch, "label"),
                _numbers(batch, "self_confidence"),
                _matrix(batch, "class_id"),
                _matrix(batch, "prob"),
                _numbers(batch, "entropy"),
                thresholds_K,
            )
        )
        keys.append(batch.column("key"))
    return RowFacts.concat(parts), pa.concat_arrays(keys), thresholds_K


def _numbers(batch: pa.RecordBatch, name: str) -> np.ndarray:
    column = batch.column(name)
    column = column.flatten() if pa.types.is_fixed_size_list(column.type) else column
    return column.to_numpy(zero_copy_only=False)


def _matrix(batch: pa.RecordBatch, name: str) -> np.ndarray:
    return _numbers(batch, name).reshape(len(batch), -1)
