"""Label noise on purpose: a new version of a data set with some labels changed, the clean ones kept where no loss sees them.

symmetric     an exact share of each class, to any other class
asymmetric    an exact share of the classes of a map, each to its one confusable class
frequency     each sample with the same chance, to other classes in proportion to their size (RCAL, ICCV 2023, section 4)
instance      a chance that depends on the sample's features (Xia et al., Part-dependent Label Noise, NeurIPS 2020)

What becomes of a sample depends on its key and the seed, not on its place in the shards. The clean labels of a noisy
version lie in `clean-labels.arrow` beside its manifest. Streams read what the manifest lists for a shard, and that file
isn't among it.

Shape legend: N samples, K classes, D features.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field, model_validator

from labelmill.data import store
from labelmill.data.keys import key_hashes
from labelmill.data.manifest import Manifest, classes_bytes
from labelmill.data.overlay import write_label_overlay
from labelmill.data.shards import read_labels
from labelmill.data.staging import Staging
from labelmill.errors import DataError
from labelmill.job import StrictModel

CLEAN_FILE = "clean-labels.arrow"


class _Noise(StrictModel):
    rate: float = Field(gt=0, lt=1, description="share of the labels that become wrong")
    seed: int = Field(0, ge=0, description="of which labels become wrong, and how")

    def apply(
        self, label_N: np.ndarray, keys: Sequence[str], num_classes: int, features_ND: np.ndarray | None = None
    ) -> np.ndarray:
        """Noisy labels int64 (N,). Raises DataError where the kind doesn't fit the data."""
        raise NotImplementedError

    def _draws(self, keys: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Two independent numbers in [0, 1) for each key."""
        a, b = key_hashes([f"{self.seed}|{key}" for key in keys])
        return (a >> np.uint64(11)) / 2.0**53, (b >> np.uint64(11)) / 2.0**53

    def _chosen(self, label_N: np.ndarray, draw_N: np.ndarray, classes: np.ndarray) -> np.ndarray:
        """bool (N,): int(rate * n_c) samples of each of `classes`, those with the lowest draws."""
        count_K = np.bincount(label_N, minlength=int(classes.max(initial=0)) + 1)
        number_K = np.zeros(len(count_K), np.int64)
        number_K[classes] = np.floor(self.rate * count_K[classes] + 1e-9).astype(np.int64)
        order = np.lexsort((draw_N, label_N))
        starts = np.cumsum(count_K) - count_K
        mask = np.zeros(len(label_N), np.bool_)
        mask[order] = np.arange(len(order)) - starts[label_N[order]] < number_K[label_N[order]]
        return mask


class SymmetricNoise(_Noise):
    """An exact share int(rate * n_c) of each class, to another class drawn uniformly."""

    kind: Literal["symmetric"] = "symmetric"

    def apply(
        self, label_N: np.ndarray, keys: Sequence[str], num_classes: int, features_ND: np.ndarray | None = None
    ) -> np.ndarray:
        if num_classes < 2:
            raise DataError("label noise needs at least two classes.")
        which_N, where_N = self._draws(keys)
        wrong_N = self._chosen(label_N, which_N, np.arange(num_classes))
        step_N = 1 + (where_N * (num_classes - 1)).astype(np.int64)
        return np.where(wrong_N, (label_N + step_N) % num_classes, label_N)


class AsymmetricNoise(_Noise):
    """An exact share of each class of the map, to the class that it is taken for."""

    kind: Literal["asymmetric"] = "asymmetric"
    map: dict[int, int] = Field(min_length=1, description="class id -> class id that it is taken for")

    @model_validator(mode="after")
    def _moves(self) -> AsymmetricNoise:
        if still := [a for a, b in self.map.items() if a == b]:
            raise ValueError(f"class {still[0]} is mapped to itself; leave it out")
        return self

    def apply(
        self, label_N: np.ndarray, keys: Sequence[str], num_classes: int, features_ND: np.ndarray | None = None
    ) -> np.ndarray:
        named = {*self.map, *self.map.values()}
        if wrong := sorted(c for c in named if not 0 <= c < num_classes):
            raise DataError(f"noise map: no class {wrong[0]}; the classes are 0 ... {num_classes - 1}.")
        target_K = np.arange(num_classes)
        target_K[list(self.map)] = list(self.map.values())
        wrong_N = self._chosen(label_N, self._draws(keys)[0], np.array(sorted(self.map)))
        return np.where(wrong_N, target_K[label_N], label_N)


class FrequencyNoise(_Noise):
    """P(j | i) = rate * n_j / (N - n_i) for j != i: labels of rare classes turn into frequent ones."""

    kind: Literal["frequency"] = "frequency"

    def apply(
        self, label_N: np.ndarray, keys: Sequence[str], num_classes: int, features_ND: np.ndarray | None = None
    ) -> np.ndarray:
        count_K = np.bincount(label_N, minlength=num_classes).astype(np.float64)
        which_N, where_N = self._draws(keys)
        out = label_N.copy()
        for i in np.flatnonzero(count_K):
            rows = np.flatnonzero((label_N == i) & (which_N < self.rate))
            others = count_K.copy()
            others[i] = 0
            if not others.sum():
                raise DataError("label noise needs samples of at least two classes.")
            out[rows] = np.searchsorted(np.cumsum(others) / others.sum(), where_N[rows], side="right")
        return out

    def matrix(self, count_K: np.ndarray) -> np.ndarray:
        """T float64 (K, K), row-stochastic: P(given = j | true = i)."""
        count = np.asarray(count_K, np.float64)
        t = self.rate * count[None, :] / (count.sum() - count[:, None])
        np.fill_diagonal(t, 1 - self.rate)
        return t


class InstanceNoise(_Noise):
    """A chance of its own for each sample, about `rate` on the mean, and targets by its features.

    q_i ~ N(rate, spread^2) cut to [0, 1]; P(j | x_i, y_i) = q_i softmax over j != y_i of (x_i W_y)_j with a random W_y
    (Xia et al. 2020, algorithm 2). Features are standardised first.
    """

    kind: Literal["instance"] = "instance"
    spread: float = Field(0.1, ge=0, description="standard deviation of a sample's chance")

    def apply(
        self, label_N: np.ndarray, keys: Sequence[str], num_classes: int, features_ND: np.ndarray | None = None
    ) -> np.ndarray:
        from scipy.stats import truncnorm

        if features_ND is None or len(features_ND) != len(label_N):
            raise DataError("instance-dependent noise needs the features of every sample: numbers (N, D).")
        x = np.asarray(features_ND, np.float64).reshape(len(label_N), -1)
        spread_D = x.std(axis=0)
        x = (x - x.mean(axis=0)) / np.where(spread_D > 1e-9, spread_D, 1.0)
        which_N, where_N = self._draws(keys)
        chance_N = np.full(len(x), self.rate)
        if self.spread:
            low, high = -self.rate / self.spread, (1 - self.rate) / self.spread
            again, _ = key_hashes([f"{self.seed}|chance|{key}" for key in keys])
            unit = ((again >> np.uint64(11)) + 0.5) / 2.0**53
            chance_N = truncnorm.ppf(unit, low, high, loc=self.rate, scale=self.spread)
        rng = np.random.default_rng(self.seed)
        out = label_N.copy()
        for y in range(num_classes):
            weight_DK = rng.normal(size=(x.shape[1], num_classes)) / np.sqrt(x.shape[1])
            rows = np.flatnonzero((label_N == y) & (which_N < chance_N))
            logits = x[rows] @ weight_DK
            logits[:, y] = -np.inf
            p = np.exp(logits - logits.max(axis=1, keepdims=True))
            edges = np.cumsum(p, axis=1) / p.sum(axis=1, keepdims=True)
            out[rows] = np.minimum((edges <= where_N[rows, None]).sum(axis=1), num_classes - 1)
        return out


NoiseConfig = Annotated[SymmetricNoise | AsymmetricNoise | FrequencyNoise | InstanceNoise, Field(discriminator="kind")]
"""A `noise` section; `kind` says which."""


def long_tail_counts(num_classes: int, largest: int, ratio: float) -> np.ndarray:
    """int64 (K,): n_k = largest * ratio^(-k / (K - 1)), floored: an exponential long tail from `largest` to largest / ratio."""
    k = np.arange(num_classes) / max(num_classes - 1, 1)
    return np.floor(largest * ratio**-k + 1e-9).astype(np.int64)


# --- versions -------------------------------------------------------------------------------------------


def write_noisy_version(
    manifest: Manifest,
    out: str | os.PathLike[str],
    noise: SymmetricNoise | AsymmetricNoise | FrequencyNoise | InstanceNoise,
    features_ND: np.ndarray | None = None,
    *,
    overwrite: bool = False,
) -> Manifest:
    """A new version with noisy labels; the shards stay. `read_clean_labels` gives the old labels back, by key.

    Args:
        manifest: data set of single labels.
        out: folder of the new version.
        noise: what is done.
        features_ND: for instance-dependent noise, a row a sample in the order of the shards.

    Raises DataError for labels of another form, or noise that doesn't fit.
    """
    if manifest.label.form != "single" or manifest.label.num_classes is None:
        raise DataError(f"data set {manifest.name!r}: label noise needs single labels, not {manifest.label.form}.")
    tables = [read_labels(manifest, i) for i in range(len(manifest.shards))]
    whole = pa.concat_tables(tables)
    label_N = whole.column("label").to_numpy().astype(np.int64)
    noisy_N = noise.apply(label_N, whole.column("key").to_pylist(), manifest.label.num_classes, features_ND)
    staging = Staging(store.normal(out), overwrite)
    clean = classes_bytes(pa.table({"key": whole.column("key"), "clean": label_N}))
    store.write_bytes(staging.path(CLEAN_FILE), clean)
    edges = np.cumsum([t.num_rows for t in tables])[:-1]
    parts = (
        pa.table({"key": t.column("key"), "label": labels})
        for t, labels in zip(tables, np.split(noisy_N, edges), strict=True)
    )
    about = {
        "noise": noise.model_dump_json(),
        "changed": str(int((noisy_N != label_N).sum())),
        "clean_labels": CLEAN_FILE,
        "clean_labels_sha256": hashlib.sha256(clean).hexdigest(),
    }
    return write_label_overlay(
        manifest, out, manifest.label, parts, created_by=about, check_keys_align=False, staging=staging
    )


def read_clean_labels(manifest: Manifest) -> Mapping[str, int]:
    """Key -> clean label of a version made by `write_noisy_version`. Raises DataError for another one, or a changed file."""
    about = manifest.created_by
    if "clean_labels" not in about:
        raise DataError(f"data set {manifest.name!r} doesn't keep clean labels: no noise was added to it on purpose.")
    path = store.join(manifest.root, about["clean_labels"])
    if not store.exists(path):
        raise DataError(
            f"{path}: the clean labels aren't here. Copies of a data set have what readers need; copy this file as well."
        )
    data = store.read_bytes(path)
    if hashlib.sha256(data).hexdigest() != about["clean_labels_sha256"]:
        raise DataError(f"{path}: the clean labels changed since they were written (sha256 differs).")
    table = pa.ipc.open_file(data).read_all()
    return dict(zip(table.column("key").to_pylist(), table.column("clean").to_pylist(), strict=True))
