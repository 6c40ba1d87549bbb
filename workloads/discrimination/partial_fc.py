"""Classification with a class-sharded head and sampled classes (partial FC).

An et al., Partial FC: Training 10 Million Identities on a Single Machine (ICCV Workshops 2021) and Killing Two Birds with
One Stone (CVPR 2022); margins after CosFace (Wang et al., CVPR 2018) and ArcFace (Deng et al., CVPR 2019).

Use it for any data set with one or several labels a sample, from ten classes to millions.

Shape legend: B samples of this rank, N of all ranks, P labels of a sample, K class rows or ranked classes, D embedding width.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
import torch
from pydantic import Field, model_validator
from torch import Tensor

from labelmill.data.config import DataConfig
from labelmill.data.labels import Labels
from labelmill.data.manifest import Manifest
from labelmill.data.spec import AnySpec
from labelmill.data.stream import Batch
from labelmill.encoders import EncoderConfig, build_encoder
from labelmill.errors import JobError
from labelmill.heads.batch import check_finite
from labelmill.heads.config import HeadConfig
from labelmill.heads.index import IndexConfig
from labelmill.heads.ranks import Ranks
from labelmill.heads.sharded import ShardedHead
from labelmill.losses.contrastive import in_batch_softmax
from labelmill.reporting import report_ranking, report_training
from labelmill.run import Run
from labelmill.stages import Fitted, Stage
from labelmill.training.config import TrainConfig, TrainJob
from labelmill.training.initial import HeadStart, find_start, keep_class_names
from labelmill.training.objective import Losses, Objective, Progress
from labelmill.workload import workload

IMPRINT_ROWS = 8192


class Classifier(Objective):
    """Encoder and a sharded head over the classes.

    Args:
        encoder, head: config sections.
        num_classes: of the label space.
        seed: of the class rows and of the classes sampled in each step.
        names: a data set whose class names the encoder can read. Rows then start as the embeddings of the names
            (imprinting: Qi et al., CVPR 2018) and are set to them again when training is complete.
        align: weight of a second loss that needs `names`: softmax of each sample over the names of the batch, with gradient
            to both sides. A name's embedding also becomes its class's row, so that the head's positives are never stale.
        k: classes that `predict` ranks.
    """

    def __init__(
        self,
        encoder: EncoderConfig,
        head: HeadConfig,
        num_classes: int,
        seed: int,
        names: Manifest | None = None,
        align: float = 0.0,
        k: int = 5,
    ) -> None:
        super().__init__()
        self.encoder = build_encoder(encoder)
        self.head = ShardedHead(num_classes, self.encoder.dim, head, seed=seed)
        self.ranks = Ranks()
        self.names = names.load_classes().column("name") if names else None
        self.align, self.k = align, min(k, num_classes)

    @property
    def heads(self) -> Mapping[str, ShardedHead]:
        return {"classes": self.head}

    def prepare(self, raw: Any, labels: Labels, rng: np.ndarray | None) -> Any:
        inputs = {"sample": self.encoder.prepare(raw, rng)}
        if self.training and self.align:
            assert self.names is not None
            names = self.names.take(pa.array(labels.single_B.numpy())).to_pylist()
            inputs["name"] = self.encoder.prepare(names)
        return inputs

    @torch.no_grad()
    def imprint(self, progress: Progress) -> None:
        """Sets own rows to the embeddings of the class names."""
        if self.names is None:
            return
        start, stop = self.head.start, self.head.stop
        for lo in range(start, stop, IMPRINT_ROWS):
            rows_KD = self.encoder.embed(self.names.slice(lo, min(IMPRINT_ROWS, stop - lo)).to_pylist())
            self.head.set_rows(range(lo, lo + len(rows_KD)), rows_KD)
            progress(lo + len(rows_KD) - start, stop - start)

    start = imprint
    finish = imprint

    def forward(self, batch: Batch) -> Losses:
        emb_BD = self.encoder(batch.inputs["sample"])
        if not self.align:
            return Losses(self.head.loss(emb_BD, batch.labels, batch.weight_B))
        align = self._align(emb_BD, self.encoder(batch.inputs["name"]), batch)
        classes = self.head.loss(emb_BD, batch.labels, batch.weight_B)
        return Losses(classes + self.align * align, {"head_loss": classes, "align_loss": align})

    def _align(self, emb_BD: Tensor, name_BD: Tensor, batch: Batch) -> Tensor:
        """Mean over the global batch of the softmax over names; refreshes the rows of the batch's classes."""
        ranks, id_B = self.ranks, batch.labels.single_B
        counts = check_finite(ranks, emb_BD.detach(), name_BD.detach())  # before rows are written
        name_ND = ranks.gather_rows_with_grad(name_BD, counts)
        id_N = ranks.gather_rows(torch.where(batch.weight_B > 0, id_B, -1), counts)
        own_B = sum(counts[: ranks.rank]) + torch.arange(len(id_B), device=id_B.device)
        loss_B = in_batch_softmax(emb_BD, name_ND, id_B, id_N, own_B, self.head.config.scale)
        mine = ((id_N >= self.head.start) & (id_N < self.head.stop)).nonzero()[:, 0]
        self.head.set_rows(id_N[mine], name_ND.detach()[mine])
        # the engine averages over ranks: a share of the global mean times the number of ranks
        total = ranks.sum_(batch.weight_B.sum())
        return (loss_B * batch.weight_B).sum() * ranks.world / total

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> dict[str, Tensor]:
        _, ids_BK = self.head.topk(self.encoder(batch.inputs["sample"]), 1)
        return {"top1": (batch.labels.ids_BP == ids_BK).any(1)}

    @torch.no_grad()
    def predict(self, batch: Batch) -> dict[str, Tensor]:
        scores_BK, ids_BK = self.head.topk(self.encoder(batch.inputs["sample"]), self.k)
        return {"class_id": ids_BK, "score": scores_BK, "label": batch.labels.ids_BP}


class PartialFCJob(TrainJob):
    """A classifier over a training and a test set."""

    workload: Literal["discrimination.partial_fc"]
    data: DataConfig
    encoder: EncoderConfig
    head: HeadConfig = HeadConfig()
    imprint: bool = Field(
        False, description="class rows start and end as embeddings of the class names (text encoders)"
    )
    align: float = Field(0.0, ge=0, description="weight of the softmax over class names of the batch; needs imprint")
    augment: bool = Field(True, description="the encoder's training augmentation, if it has one")
    eval_batch: int = Field(1024, ge=1)
    index: IndexConfig | None = Field(None, description="an approximate index in the registered model")
    continued_heads = ("head",)

    changeable: ClassVar[frozenset[str]] = frozenset({"align"})

    def class_count(self) -> int | None:
        return self.data.open()[0].label.num_classes

    @model_validator(mode="after")
    def _search_leaves_the_test_set_alone(self) -> PartialFCJob:
        if self.search and self.search.metric.startswith("eval/") and not self.data.dev:
            raise ValueError(
                f"search.metric {self.search.metric} would be measured on the test set: name a held-out set in data.dev"
            )
        return self

    @model_validator(mode="after")
    def _align_needs_names(self) -> PartialFCJob:
        if self.align and not self.imprint:
            raise ValueError("align compares samples with class names: set imprint to true")
        return self


def image_options(encoder: EncoderConfig) -> dict[str, Any]:
    """How the stream decodes images for an encoder."""
    size = getattr(encoder, "image_size", None)
    return {"image_size": size, "channels": getattr(encoder, "channels", 3)}


def input_options(encoder: EncoderConfig, seed: int) -> dict[str, Any]:
    """What every stream of a run is opened with: the encoder's field, how its images are decoded, the seed."""
    return {"field": encoder.field, "seed": seed, **image_options(encoder)}


def fit_classifier(
    run: Run,
    folder: Path,
    train: AnySpec,
    predict: Mapping[str, AnySpec],
    evaluate: AnySpec,
    encoder: EncoderConfig,
    head: HeadConfig,
    config: TrainConfig,
    seed: int,
    imprint: bool,
    align: float,
    augment: bool,
    k: int = 5,
    initial: HeadStart | None = None,
) -> dict[str, Any]:
    """Stage: trains a classifier and ranks `k` classes for every sample of the streams of `predict`.

    `evaluate` holds the samples that `train.evaluate_every` judges it by meanwhile.
    """
    assert train.label.num_classes is not None
    if align and train.label.form != "single":
        raise JobError(f"align: needs one label a sample; {train.name!r} has labels of form {train.label.form}.")
    manifest = train.parts[0].manifest
    keep_class_names(folder, manifest)
    names = manifest if imprint else None
    objective = partial(Classifier, encoder, head, train.label.num_classes, seed, names, align, k)
    start = {"classes": initial} if initial else None
    fitted = run.fit(folder, objective, train, config, predict, augment, evaluate=evaluate, initial=start)
    return {"seconds": fitted.seconds}


def ranked_classes(fit: Stage, name: str = "test") -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What `Classifier.predict` gave: (class ids (Q, K), scores (Q, K), labels (Q, P) padded with -1)."""
    table = Fitted(fit.folder).predictions(name)

    def matrix(column: str) -> np.ndarray:
        values = table.column(column).combine_chunks()
        return values.flatten().to_numpy(zero_copy_only=False).reshape(len(table), -1).copy()

    return matrix("class_id"), matrix("score"), matrix("label")


def start_of(job: PartialFCJob, run: Run, train: Manifest) -> HeadStart:
    """What `head.initial` names, checked. Raises DataError, TrackingError for an unknown registered model."""
    head, initial = job.head, job.head.initial
    assert initial is not None
    if initial.checkpoint.startswith("models:/"):
        place = {"checkpoint": str(run.model(initial.checkpoint).resolve())}
        head = head.model_copy(update={"initial": initial.model_copy(update=place)})
    encoder = build_encoder(job.encoder)
    weights = dict(encoder.named_parameters(prefix="encoder")) | dict(encoder.named_buffers(prefix="encoder"))
    return find_start(head, train, weights, encoder.dim, run.folder / "initial")


CLASSIFIER_METRICS = ("test/top1", "test/top5", "train/final_loss", "train/samples_per_second")
CLASSIFIER_TRAINING_METRICS = ("train/head_loss", "train/align_loss", "eval/top1")


@workload("discrimination.partial_fc", PartialFCJob, CLASSIFIER_METRICS, CLASSIFIER_TRAINING_METRICS)
def partial_fc(job: PartialFCJob, run: Run) -> None:
    train, test = job.data.open()
    options = input_options(job.encoder, job.seed)
    stream = job.data.training_stream(train, run.folder / "data", global_batch=job.train.global_batch, **options)
    run.track_data(train=stream, test=test)
    goes_on: dict[str, HeadStart] = {}
    if job.head.initial:
        goes_on["initial"] = start_of(job, run, train)
        run.progress.line(f"head.initial: {goes_on['initial']}")
    fit = run.stage(
        "fit",
        fit_classifier,
        train=stream,
        encoder=job.encoder,
        head=job.head,
        config=job.train,
        seed=job.seed,
        imprint=job.imprint,
        align=job.align,
        augment=job.augment,
        **goes_on,
        **job.data.judging(test, global_batch=job.eval_batch, **options),
    )
    ids_QK, _, label_QP = ranked_classes(fit)
    report_training(run, Fitted(fit.folder), fit["seconds"])
    report_ranking(run, "test", {"partial FC": ids_QK}, label_QP)
    run.report_data_health(Fitted(fit.folder))
    if job.register_as:
        run.register(job.register_as, fit, encoder=job.encoder, head=job.head, data=train, index=job.index)
