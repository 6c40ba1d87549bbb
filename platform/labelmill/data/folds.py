"""Folds of a data set by a stable hash of the sample key: a sample stays in its fold when others come or go.

Shape legend: N samples, F folds, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from labelmill.data.keys import key_hashes
from labelmill.data.manifest import Manifest
from labelmill.data.selection import KeepRows
from labelmill.data.shards import read_labels
from labelmill.errors import DataError


def fold_of(keys: Sequence[str], folds: int, seed: int = 0) -> np.ndarray:
    """int64 (N,): the fold of each key, 0 ... folds - 1."""
    return (key_hashes([f"fold|{seed}|{key}" for key in keys])[0] % np.uint64(folds)).astype(np.int64)


@dataclass(frozen=True)
class Fold:
    """The rows that a fold's model trains on, and those that it predicts."""

    train: KeepRows
    held_out: KeepRows


def make_folds(manifest: Manifest, folds: int, seed: int = 0) -> tuple[list[Fold], list[str]]:
    """All folds of a data set, and warnings about classes that are too small for them.

    Raises DataError: fewer than two folds, an empty fold, or a class that lies in one fold alone, so that the model which
    predicts it never saw it (class and fold are named).
    """
    if folds < 2:
        raise DataError(f"folds is {folds}; out-of-sample prediction needs at least 2.")
    tables = [read_labels(manifest, i) for i in range(len(manifest.shards))]
    fold_of_shard = [fold_of(table.column("key").to_pylist(), folds, seed) for table in tables]
    every = np.concatenate(fold_of_shard)
    if len(empty := np.flatnonzero(np.bincount(every, minlength=folds) == 0)):
        raise DataError(f"fold {empty[0]} of {folds} gets none of the {len(every)} samples. Use fewer folds.")
    warnings: list[str] = []
    if manifest.label.form == "single":
        label_N = np.concatenate([table.column("label").to_numpy() for table in tables])
        warnings = _check_classes(label_N, every, folds, manifest)
    masks = [[shard == f for shard in fold_of_shard] for f in range(folds)]
    found = []
    for f, own in enumerate(masks):
        about = {"rule": f"fold {f} of {folds}", "seed": seed}
        held = KeepRows.of(own, manifest.digest, about)
        found.append(Fold(KeepRows.of((~mask for mask in own), manifest.digest, {**about, "rest": True}), held))
    return found, warnings


def _check_classes(label_N: np.ndarray, fold_N: np.ndarray, folds: int, manifest: Manifest) -> list[str]:
    count_KF = np.zeros((manifest.label.num_classes or 0, folds), np.int64)
    np.add.at(count_KF, (label_N, fold_N), 1)
    total_K = count_KF.sum(axis=1)
    alone = np.flatnonzero((count_KF.max(axis=1) == total_K) & (total_K > 0))
    if len(alone):
        c = int(alone[0])
        f = int(count_KF[c].argmax())
        raise DataError(
            f"data set {manifest.name!r}: all {total_K[c]} sample(s) of class {c} lie in fold {f}: its model would never see "
            f"that class ({len(alone)} class(es) are so). Leave small classes out (data.select), or use another seed."
        )
    small = np.flatnonzero((total_K > 0) & (total_K < folds))
    return [f"{len(small)} class(es) have fewer samples than folds, such as class {small[0]}."] if len(small) else []
