"""Classification with a class-sharded head and sampled classes (partial FC).

An et al., Partial FC: Training 10 Million Identities on a Single Machine (ICCV Workshops 2021) and Killing Two Birds with
One Stone (CVPR 2022); margins after CosFace (Wang et al., CVPR 2018) and ArcFace (Deng et al., CVPR 2019).

Use it for any data set with one or several labels a sample, from ten classes to millions.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from labelmill.data.config import DataConfig, StreamConfig
from labelmill.data.manifest import Manifest
from labelmill.data.stream import Batch
from labelmill.encoders import EncoderConfig, build_encoder
from labelmill.heads.config import HeadConfig
from labelmill.heads.sharded import ShardedHead
from labelmill.reporting import report_ranking, report_training
from labelmill.run import Fitted, Run, Stage
from labelmill.training.config import TrainConfig, TrainJob
from labelmill.training.objective import Losses, Objective
from labelmill.workload import workload

IMPRINT_ROWS = 8192


class Classifier(Objective):
    """Encoder and a sharded head over the classes.

    Args:
        encoder, head: config sections.
        num_classes: of the label space.
        seed: of the class rows and of the classes sampled in each step.
        names: a data set with class names: rows start as the encoder's embedding of the class's name (imprinting: Qi et al.,
            CVPR 2018); an encoder of text only.
        k: classes that `predict` ranks.
    """

    def __init__(
        self,
        encoder: EncoderConfig,
        head: HeadConfig,
        num_classes: int,
        seed: int,
        names: Manifest | None = None,
        k: int = 5,
    ) -> None:
        super().__init__()
        self.encoder = build_encoder(encoder)
        self._heads = {"classes": ShardedHead(num_classes, self.encoder.dim, head, seed=seed)}
        self._names, self._k = names, min(k, num_classes)

    @property
    def heads(self) -> Mapping[str, ShardedHead]:
        return self._heads

    def prepare(self, raw: Any, rng: np.ndarray | None) -> Any:
        return self.encoder.prepare(raw, rng)

    @torch.no_grad()
    def start(self) -> None:
        if self._names is None:
            return
        head = self._heads["classes"]
        names = self._names.load_classes().column("name").slice(head.start, head.stop - head.start)
        for lo in range(0, len(names), IMPRINT_ROWS):
            rows_KD = self.encoder.embed(names.slice(lo, IMPRINT_ROWS).to_pylist())
            head.set_rows(range(head.start + lo, head.start + lo + len(rows_KD)), rows_KD)

    def forward(self, batch: Batch) -> Losses:
        emb_BD = self.encoder(batch.inputs)
        return Losses(self._heads["classes"].loss(emb_BD, batch.labels, batch.weight_B))

    @torch.no_grad()
    def predict(self, batch: Batch) -> dict[str, Tensor]:
        scores_BK, ids_BK = self._heads["classes"].topk(self.encoder(batch.inputs), self._k)
        return {"class_id": ids_BK, "score": scores_BK, "label": batch.labels.ids_BP}


class PartialFCJob(TrainJob):
    """A classifier over a training and a test set."""

    workload: Literal["discrimination.partial_fc"]
    data: DataConfig
    encoder: EncoderConfig
    head: HeadConfig = HeadConfig()
    imprint: bool = Field(False, description="start class rows as the embedding of the class names (text encoders)")
    augment: bool = Field(True, description="the encoder's training augmentation, if it has one")
    eval_batch: int = Field(1024, ge=1)


def image_options(encoder: EncoderConfig) -> dict[str, Any]:
    """How the stream decodes images for an encoder."""
    size = getattr(encoder, "image_size", None)
    return {"image_size": size, "channels": getattr(encoder, "channels", 3)}


def fit_classifier(
    run: Run,
    folder: Path,
    train: Manifest,
    test: Manifest,
    encoder: EncoderConfig,
    head: HeadConfig,
    config: TrainConfig,
    data: StreamConfig,
    seed: int,
    imprint: bool,
    augment: bool,
    eval_batch: int,
) -> dict[str, Any]:
    """Stage: trains a classifier and ranks the classes of every test sample."""
    assert train.label.num_classes is not None
    stream = partial(data.stream, field=encoder.field, seed=seed, **image_options(encoder))
    fitted = run.fit(
        folder,
        partial(Classifier, encoder, head, train.label.num_classes, seed, train if imprint else None),
        stream(train, global_batch=config.global_batch),
        config,
        predict={"test": stream(test, global_batch=eval_batch, shuffle=False)},
        augment=augment,
    )
    return {"seconds": fitted.seconds}


def ranked_classes(fit: Stage, name: str = "test") -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What `Classifier.predict` gave: (class ids (Q, K), scores (Q, K), labels (Q, P) padded with -1)."""
    table = Fitted(fit.folder).predictions(name)

    def matrix(column: str) -> np.ndarray:
        values = table.column(column).combine_chunks()
        return values.flatten().to_numpy(zero_copy_only=False).reshape(len(table), -1).copy()

    return matrix("class_id"), matrix("score"), matrix("label")


@workload("discrimination.partial_fc", PartialFCJob)
def partial_fc(job: PartialFCJob, run: Run) -> None:
    train, test = job.data.open()
    run.track_data(train=train, test=test)
    fit = run.stage(
        "fit",
        fit_classifier,
        train=train,
        test=test,
        encoder=job.encoder,
        head=job.head,
        config=job.train,
        data=StreamConfig(**job.data.model_dump(exclude={"train", "test"})),
        seed=job.seed,
        imprint=job.imprint,
        augment=job.augment,
        eval_batch=job.eval_batch,
    )
    ids_QK, _, label_QP = ranked_classes(fit)
    report_training(run, Fitted(fit.folder), fit["seconds"])
    report_ranking(run, "test", {"partial FC": ids_QK}, label_QP)
    run.report_data_health(Fitted(fit.folder))
    if job.register_as:
        run.register(job.register_as, fit, encoder=job.encoder, head=job.head, data=train)


