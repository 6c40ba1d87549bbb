"""What the methods for noisy labels share: a classifier that tells probabilities, noise added on purpose, samples by key.

Shape legend: B samples of this rank, K classes, k best classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from labelmill.data.decode import decode_images
from labelmill.data.manifest import Manifest
from labelmill.data.noise import NoiseConfig, read_clean_labels, write_noisy_version
from labelmill.data.shards import read_labels, read_shard
from labelmill.data.spec import AnySpec
from labelmill.data.stream import Batch
from labelmill.encoders import EncoderConfig
from labelmill.errors import JobError
from labelmill.heads.config import HeadConfig
from labelmill.heads.probabilities import class_probabilities
from labelmill.run import Run
from labelmill.stages import Fitted, Stage
from labelmill.training.config import TrainConfig
from labelmill.training.objective import Losses
from workloads.discrimination.mlcd import decode_all
from workloads.discrimination.partial_fc import Classifier


class AuditedClassifier(Classifier):
    """A classifier with a sharded head that predicts probabilities: of the given label, and of the k best classes.

    Labels of form soft with one class are samples with a weight (`corrections.weight`).
    """

    def forward(self, batch: Batch) -> Losses:
        ids_BP, weight_B = batch.labels.ids_BP, batch.weight_B
        if batch.labels.weights_BP is not None:
            weight_B = weight_B * batch.labels.weights_BP[:, 0]
        return Losses(self.head.loss(self.encoder(batch.inputs["sample"]), ids_BP, weight_B))

    @torch.no_grad()
    def predict(self, batch: Batch) -> dict[str, Tensor]:
        given_B = batch.labels.ids_BP[:, 0]
        found = class_probabilities(self.head, self.encoder(batch.inputs["sample"]), given_B, self.k)
        return {
            "label": given_B,
            "self_confidence": found.given_B,
            "entropy": found.entropy_B,
            "class_id": found.class_id_Bk,
            "prob": found.prob_Bk,
        }


def audited(
    encoder: EncoderConfig, head: HeadConfig, num_classes: int, seed: int, k: int
) -> partial[AuditedClassifier]:
    """Builds the classifier on the workers."""
    return partial(AuditedClassifier, encoder, head, num_classes, seed, k=k)


def fit_audited(
    run: Run,
    folder: Path,
    train: AnySpec,
    predict: Mapping[str, AnySpec],
    encoder: EncoderConfig,
    head: HeadConfig,
    config: TrainConfig,
    seed: int,
    augment: bool,
    k: int,
) -> dict[str, Any]:
    """Stage: trains a classifier and predicts the streams of `predict` with probabilities."""
    assert train.label.num_classes is not None
    objective = audited(encoder, head, train.label.num_classes, seed, k)
    return {
        "seconds": run.fit(folder, objective, train, config, predict, augment).seconds,
        "samples": train.epoch_samples,
    }


def add_noise(
    run: Run, folder: Path, train: Manifest, test: Manifest, noise: NoiseConfig, field: str, image: dict[str, Any]
) -> dict[str, Any]:
    """Stage: noisy versions of both sets, in `train` and `test` below the folder; the clean labels lie beside them."""
    changed = {}
    for name, data in (("train", train), ("test", test)):
        features = None
        if noise.kind == "instance":
            if data.fields[field].kind != "image":
                raise JobError(f"noise.kind instance takes images; field {field!r} is {data.fields[field].kind}.")
            features = decode_all(data, field, image["image_size"], image["channels"]).reshape(data.num_samples, -1)
        # a stage that crashed here may have left a data set
        made = write_noisy_version(data, folder / name, noise, features, overwrite=True)
        changed[name] = int(made.created_by["changed"])
    return {"changed": changed}


def require_single(data: Manifest, method: str) -> None:
    """Raises JobError for a data set whose samples don't have one label each."""
    if data.label.form != "single" or data.label.num_classes is None:
        raise JobError(f"{method} takes a single label a sample; {data.name!r} has labels of form {data.label.form}.")


def labels_by_key(data: Manifest) -> dict[str, int]:
    """Key -> label of a set of single labels."""
    tables = [read_labels(data, i) for i in range(len(data.shards))]
    table = pa.concat_tables(tables)
    return dict(zip(table.column("key").to_pylist(), table.column("label").to_pylist(), strict=True))


def clean_labels(data: Manifest) -> Mapping[str, int] | None:
    """Key -> clean label where noise was added on purpose; None for data that came with its labels."""
    return read_clean_labels(data) if "clean_labels" in data.created_by else None


def class_names(data: Manifest) -> list[str]:
    """A name for each class; its number where the set has none."""
    if data.classes:
        return [str(name) for name in data.load_classes().column("name").to_pylist()]
    return [str(i) for i in range(data.label.num_classes or 0)]


def samples_by_key(data: Manifest, keys: Sequence[str], field: str) -> dict[str, Any]:
    """Stored values of a field (bytes, text) of some samples."""
    wanted, found = pa.array(keys, pa.string()), dict[str, Any]()
    for i in range(len(data.shards)):
        table = read_shard(data, i)
        table = table.filter(pc.is_in(table.column("key"), value_set=wanted))
        found |= dict(zip(table.column("key").to_pylist(), table.column(field).to_pylist(), strict=True))
        if len(found) == len(keys):
            break
    return found


def images_by_key(data: Manifest, keys: Sequence[str], field: str, image: Mapping[str, Any]) -> np.ndarray:
    """uint8 (len(keys), H, W, C), in the order of `keys`."""
    stored = samples_by_key(data, keys, field)
    column = pa.chunked_array([pa.array([stored[key] for key in keys], pa.binary())])
    return decode_images(column, list(keys), size=image["image_size"], channels=image["channels"])[0]


def predicted_classes(fit: Stage, name: str = "test") -> tuple[list[str], np.ndarray]:
    """(keys, most probable class int64) of a stream that `fit_audited` predicted."""
    table = Fitted(fit.folder).predictions(name)
    best = table.column("class_id").combine_chunks().flatten().to_numpy(zero_copy_only=False).reshape(len(table), -1)
    return table.column("key").to_pylist(), best[:, 0].astype(np.int64)
