"""Multi-label cluster discrimination (MLCD): learn an encoder from clusters, several a sample.

An, Yang, Dai, Feng, Deng: Multi-label Cluster Discrimination for Visual Representation Learning (ECCV 2024). A frozen teacher
embeds the data, spherical k-means cuts the embeddings into fine clusters, and each sample's `nearest` clusters are its
positives on a sharded head with the loss of Eq. 5. Compared with the untrained encoder and with single-label cross-entropy.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from safetensors.torch import load_file, save_file

from labelmill.data.config import DataConfig
from labelmill.data.decode import decode_images
from labelmill.data.labels import LabelSpec
from labelmill.data.manifest import Manifest
from labelmill.data.overlay import write_label_overlay
from labelmill.data.shards import read_shard
from labelmill.data.spec import AnySpec
from labelmill.encoders import EncoderConfig, LinearConfig, build_encoder
from labelmill.encoders.linear import fit_pca
from labelmill.errors import JobError
from labelmill.evaluation.probe import knn_accuracy, linear_probe
from labelmill.evaluation.ranking import nearest_neighbours, unit_rows
from labelmill.heads.config import HeadConfig
from labelmill.job import StrictModel
from labelmill.losses.classification import MLCD, Softmax
from labelmill.losses.margins import CosFace
from labelmill.reporting import report_training
from labelmill.run import Run
from labelmill.stages import Fitted, Stage
from labelmill.tracking import figures
from labelmill.training.config import TrainConfig, TrainJob
from labelmill.training.passes import assign_nearest, load_embeddings, spherical_kmeans
from labelmill.workload import workload
from workloads.discrimination.partial_fc import Classifier, image_options, input_options


class PcaTeacher(StrictModel):
    """Teacher: principal components of the pixels, fitted on the training set."""

    kind: Literal["pca"] = "pca"
    dim: int = Field(64, ge=2)
    whiten: bool = False


class ClusterSection(StrictModel):
    """Spherical k-means on the teacher's embeddings."""

    count: int = Field(1000, ge=2, description="clusters; should be finer than the classes one hopes to find")
    passes: int = Field(15, ge=1)
    nearest: int = Field(4, ge=1, description="positives of a sample: its nearest clusters (l in the paper)")

    @model_validator(mode="after")
    def _enough(self) -> ClusterSection:
        if self.nearest > self.count:
            raise ValueError(f"nearest {self.nearest} exceeds count {self.count}")
        return self


class ProbeSection(StrictModel):
    """How encoders are judged: a linear probe on few labels, and kNN on all."""

    num_labels: int = Field(1000, ge=10)
    neighbours: int = Field(20, ge=1)


class MlcdJob(TrainJob):
    """Teacher, clusters, student encoder, head, training, probe."""

    workload: Literal["discrimination.mlcd"]
    data: DataConfig
    teacher: PcaTeacher = PcaTeacher()
    clusters: ClusterSection = ClusterSection()
    encoder: EncoderConfig
    head: HeadConfig = HeadConfig(loss=MLCD(), margin=CosFace(m=0.3), scale=64.0)
    baseline_head: HeadConfig = HeadConfig(loss=Softmax(), scale=16.0)
    probe: ProbeSection = ProbeSection()

    def class_count(self) -> int:
        return self.clusters.count

    def label_count(self) -> int:
        return self.clusters.nearest


def teach(
    run: Run, folder: Path, train: Manifest, teacher: PcaTeacher, field: str, image: dict[str, Any], max_bad: int
) -> dict[str, Any]:
    """Stage: fits the teacher and embeds the training set with it."""
    pixels = decode_all(train, field, image["image_size"], image["channels"])
    numbers = pixels[0].size
    if teacher.dim > min(len(pixels), numbers):
        raise JobError(
            f"teacher.dim: {teacher.dim} components asked for, but {len(pixels)} images of {numbers} numbers have "
            f"{min(len(pixels), numbers)} at the most."
        )
    weight_DI, centre_I, share_D = fit_pca(
        torch.from_numpy(pixels.reshape(len(pixels), -1)).float() / 255, teacher.dim, teacher.whiten
    )
    config = LinearConfig(field=field, in_dim=weight_DI.shape[1], dim=teacher.dim, **image)
    weights = {"weight_DI": weight_DI, "centre_I": centre_I}
    save_file(weights, folder / "teacher.safetensors")
    run.embed(folder / "train", train, config, weights, max_bad)
    return {"variance_kept": float(share_D.sum())}


def cluster(run: Run, folder: Path, embeddings: Stage, clusters: ClusterSection, seed: int) -> dict[str, Any]:
    """Stage: centres of the teacher's embeddings."""
    run.connect()
    centres_KD, history = spherical_kmeans(
        embeddings.folder / "train", clusters.count, clusters.passes, seed, run.progress.update
    )
    save_file({"centres": centres_KD}, folder / "centres.safetensors")
    return {"history": history}


def assign(
    run: Run, folder: Path, train: Manifest, embeddings: Stage, centres: Stage, count: int, nearest: int
) -> dict[str, Any]:
    """Stage: a new version of the training set, labelled with each sample's nearest clusters."""
    run.connect()
    form: Literal["single", "multi"] = "single" if nearest == 1 else "multi"
    centres_KD = load_file(centres.folder / "centres.safetensors")["centres"]
    tables = assign_nearest(train, embeddings.folder / "train", centres_KD, nearest, run.progress.update)
    # a stage that crashed here may have left a data set
    write_label_overlay(train, folder, LabelSpec(form=form, num_classes=count), tables, overwrite=True)
    return {}


def fit_student(
    run: Run,
    folder: Path,
    train: AnySpec,
    encoder: EncoderConfig,
    head: HeadConfig,
    config: TrainConfig,
    seed: int,
) -> dict[str, Any]:
    """Stage: trains the encoder to tell the clusters apart."""
    assert train.label.num_classes is not None
    objective = partial(Classifier, encoder, head, train.label.num_classes, seed)
    return {"seconds": run.fit(folder, objective, train, config, augment=True).seconds}


def embed_both(
    run: Run,
    folder: Path,
    train: Manifest,
    test: Manifest,
    encoder: EncoderConfig,
    fit: Stage | None,
    seed: int,
    max_bad: int,
) -> dict[str, Any]:
    """Stage: train and test embeddings of a fitted encoder, or of the fresh one."""
    weights = Fitted(fit.folder).dense("encoder.") if fit else fresh_weights(encoder, seed)
    for name, data in (("train", train), ("test", test)):
        run.embed(folder / name, data, encoder, weights, max_bad)
    return {}


def fresh_weights(encoder: EncoderConfig, seed: int) -> dict[str, torch.Tensor]:
    """Weights that training starts from."""
    torch.manual_seed(seed)
    return dict(build_encoder(encoder).state_dict())


def decode_all(data: Manifest, field: str, size: int | None, channels: int) -> np.ndarray:
    """Every image of a data set, uint8 (N, H, W, C), holes as zeros."""
    parts = []
    for i in range(len(data.shards)):
        table = read_shard(data, i)
        images, _, _ = decode_images(table.column(field), table.column("key").to_pylist(), size=size, channels=channels)
        parts.append(images)
    return np.concatenate(parts)


def class_labels(data: Manifest) -> np.ndarray:
    """True classes, int64 (N,), in the order of the shards."""
    return np.concatenate([read_shard(data, i).column("label").to_numpy() for i in range(len(data.shards))])


@workload("discrimination.mlcd", MlcdJob, metrics=("test/probe/mlcd", "test/knn/mlcd", "MLCD_train/final_loss"))
def mlcd(job: MlcdJob, run: Run) -> None:
    train, test = job.data.open()
    run.track_data(train=train, test=test)
    field, max_bad = job.encoder.field, job.data.max_bad_samples
    image = image_options(job.encoder)
    teacher = run.stage("teach", teach, train=train, teacher=job.teacher, field=field, image=image, max_bad=max_bad)
    centres = run.stage("cluster", cluster, embeddings=teacher, clusters=job.clusters, seed=job.seed)
    labels = partial(run.stage, train=train, embeddings=teacher, centres=centres, count=job.clusters.count)
    multi = labels("assign", assign, nearest=job.clusters.nearest)
    single = labels("assign-single", assign, nearest=1)

    stream = partial(
        job.data.training_stream,
        folder=run.folder / "data",
        global_batch=job.train.global_batch,
        **input_options(job.encoder, job.seed),
    )
    student = partial(run.stage, encoder=job.encoder, config=job.train, seed=job.seed)
    fits = {
        "MLCD": student("fit-mlcd", fit_student, train=stream(manifest=multi.manifest()), head=job.head),
        "cross-entropy": student(
            "fit-ce", fit_student, train=stream(manifest=single.manifest()), head=job.baseline_head
        ),
        "untrained": None,
    }
    report_encoders(job, run, train, test, fits, teacher, max_bad)
    for name, fit in fits.items():
        if fit:
            report_training(run, Fitted(fit.folder), fit["seconds"], name)
            run.report_data_health(Fitted(fit.folder))
    report_cosines(run, {name: fit for name, fit in fits.items() if fit}, multi.manifest(), job)
    if job.register_as:
        fitted = fits["MLCD"]
        assert fitted is not None
        run.register(
            job.register_as, fitted, encoder=job.encoder, head=job.head, data=multi.manifest(), predictor="embed"
        )


def report_encoders(
    job: MlcdJob, run: Run, train: Manifest, test: Manifest, fits: dict[str, Stage | None], teacher: Stage, max_bad: int
) -> None:
    """Linear probe and kNN of every encoder; nearest neighbours of some test images under MLCD."""
    train_y, test_y = class_labels(train), class_labels(test)
    rows = []
    for name, fit in fits.items():
        stage = run.stage(
            f"embed-{name.lower()}",
            embed_both,
            train=train,
            test=test,
            encoder=job.encoder,
            fit=fit,
            seed=job.seed,
            max_bad=max_bad,
        )
        (train_emb, train_ok), (test_emb, test_ok) = (load_embeddings(stage.folder / s) for s in ("train", "test"))
        a, b = train_ok.numpy(), test_ok.numpy()
        probe = linear_probe(
            train_emb[a], train_y[a], test_emb[b], test_y[b], seed=job.seed, num_labels=job.probe.num_labels
        )
        knn = knn_accuracy(
            train_emb[a], torch.from_numpy(train_y[a]), test_emb[b], torch.from_numpy(test_y[b]), k=job.probe.neighbours
        )
        key = name.lower().replace("-", "_")
        run.report.metrics |= {f"test/probe/{key}": probe.accuracy, f"test/knn/{key}": knn}
        rows.append([name, f"{100 * probe.accuracy:.2f} ± {50 * (probe.high - probe.low):.2f}", f"{100 * knn:.2f}"])
        if name == "MLCD":
            show_neighbours(run, job, train, test, train_emb, test_emb)
    run.report.add_table(
        "encoders",
        ["encoder", f"linear probe ({job.probe.num_labels} labels)", f"{job.probe.neighbours}-NN"],
        rows,
        "percent of test images; the interval is that of the test sample, not of the seed",
    )


def show_neighbours(
    run: Run, job: MlcdJob, train: Manifest, test: Manifest, train_emb: torch.Tensor, test_emb: torch.Tensor
) -> None:
    """A grid: a test image a row, its nearest training images beside it."""
    rng = np.random.default_rng(job.seed)
    queries = rng.choice(len(test_emb), 6, replace=False)
    _, found = nearest_neighbours(test_emb[queries], train_emb, 7)
    options = image_options(job.encoder)
    train_images = decode_all(train, job.encoder.field, options["image_size"], options["channels"])
    test_images = decode_all(test, job.encoder.field, options["image_size"], options["channels"])
    names = train.load_classes()["name"].to_pylist() if train.classes else [str(i) for i in range(10**4)]
    train_y, test_y = class_labels(train), class_labels(test)
    images, titles = [], []
    for query, row in zip(queries, found.numpy(), strict=True):
        images += [test_images[query], *train_images[row]]
        titles += [names[test_y[query]], *(names[train_y[i]] for i in row)]
    figures.image_grid(np.stack(images), titles, run.figure("neighbours"), rows=len(queries), columns=8)


def report_cosines(run: Run, fits: dict[str, Stage], labelled: Manifest, job: MlcdJob) -> None:
    """Cosines of training samples to their clusters' rows and to random other rows (the paper's Fig. 3)."""
    ids_NP = (
        np.stack([np.asarray(ids) for ids in read_shard(labelled, 0).column("label").to_pylist()[:2000]])
        if job.clusters.nearest > 1
        else read_shard(labelled, 0).column("label").to_numpy()[:2000, None]
    )
    rng = np.random.default_rng(job.seed)
    shown = {}
    for name in fits:
        stage = next(s for s in run.stages if s.name == f"embed-{name.lower()}")
        emb_ND = unit_rows(load_embeddings(stage.folder / "train")[0][: len(ids_NP)])
        rows_CD = Fitted(fits[name].folder).head_rows("classes")
        positive = (emb_ND[:, None, :] * rows_CD[torch.from_numpy(ids_NP)]).sum(-1)
        negative = (
            emb_ND[:, None, :] * rows_CD[torch.from_numpy(rng.integers(0, len(rows_CD), (len(ids_NP), 8)))]
        ).sum(-1)
        shown[f"{name}: own clusters"] = positive.flatten().numpy()
        shown[f"{name}: random clusters"] = negative.flatten().numpy()
        key = name.lower().replace("-", "_")
        run.report.metrics |= {
            f"cosine/{key}/positive": float(positive.mean()),
            f"cosine/{key}/negative": float(negative.mean()),
        }
    figures.histograms(shown, "cosine of a training image to a class row", run.figure("cosines"))
