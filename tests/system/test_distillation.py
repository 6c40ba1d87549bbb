"""The distillation methods for real, small: training in process, the report, the registry, a teacher used again."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from rich.console import Console

from labelmill import api
from labelmill.data.labels import LabelSpec
from labelmill.data.manifest import FieldSpec, load_manifest
from labelmill.data.shards import read_shard
from labelmill.data.writer import ShardWriter
from labelmill.errors import DataError, JobError
from labelmill.job import TrackingConfig
from labelmill.teachers import TeacherModel
from labelmill.tracking import registry
from labelmill.tracking.model import load_model
from workloads.distillation.active import check_gains

JOBS = Path(__file__).resolve().parents[2] / "workloads" / "distillation" / "jobs"
SIDE = 12
CNN = "{kind: small_cnn, image_size: 12, channels: 1, dim: 16, width: 8}"
MLP = "{kind: mlp, image_size: 12, channels: 1, hidden: [16], dim: 16, batch_norm: true}"


def bars(folder: Path, count: int, seed: int) -> Path:
    """Pictures of a bright bar across, down, or both: three classes, easily told apart."""
    from PIL import Image

    rng = np.random.default_rng(seed)
    fields = {"image": FieldSpec(kind="image", ext="png")}
    label = LabelSpec(form="single", num_classes=3)
    with ShardWriter(folder, "bars", fields, label, layout="packed", samples_per_shard=100) as writer:
        for i in range(count):
            picture = rng.integers(0, 80, (SIDE, SIDE)).astype(np.uint8)
            at = rng.integers(0, SIDE - 2)
            if i % 3 != 1:
                picture[at : at + 2, :] += np.uint8(150)
            if i % 3 != 0:
                picture[:, at : at + 2] = 230
            file = io.BytesIO()
            Image.fromarray(picture).save(file, "png")
            writer.write(f"s{i:05d}", {"image": file.getvalue()}, {"label": i % 3})
        writer.close(classes=pa.table({"name": ["across", "down", "both"]}))
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bars")
    bars(folder / "train", 500, 0)
    bars(folder / "test", 150, 1)
    return folder


def run(job: str, data: Path, output: Path, **overrides: Any) -> Any:
    small = {
        "data.train": data / "train",
        "data.test": data / "test",
        "output": output,
        "cluster": "{workers: 1, in_process: true}",
        "tracking.system_metrics": "false",
        "encoder": MLP,
        "eval_batch": 150,
    }
    values = [f"{k}={v}" for k, v in (small | overrides).items()]
    return api.run(JOBS / job, values, console=Console(file=io.StringIO(), width=200))


TEACHER = "{kind: fit, encoder: " + CNN + ", train: {global_batch: 50, epochs: 8, learning_rate: 0.01}, samples: 300"


def test_a_student_in_the_registry_knows_its_teacher(data: Path, tmp_path: Path) -> None:
    """The teacher is registered first; a second job reuses its kept outputs; the student has its parent's name."""
    made = api.run(_plain_job(data, tmp_path), [f"output={tmp_path}"], console=Console(file=io.StringIO(), width=200))
    assert made.metrics["test/top1"] > 0.8
    taught = {
        "teacher": "{kind: registered, model: bars-teacher, columns: [logits, topk, embedding], k: 2}",
        "samples": 100,
        "head": "{scale: 16, lr_multiplier: 10}",
        "arms": "{CE: {}, KD: {losses: [{loss: {kind: kd}}], features: [{kind: cosine}]}, "
        "listed: {losses: [{loss: {kind: listed_kd}}]}}",
        "train": "{global_batch: 50, epochs: 8, learning_rate: 0.01}",
    }
    report = run("kd-fashion.yaml", data, tmp_path, register_as="bars-student", **taught)
    assert report.metrics["test/teacher"] == pytest.approx(made.metrics["test/top1"], abs=0.02)
    assert report.metrics["model/student/parameters"] < report.metrics["model/teacher/parameters"] * 2
    assert {"students", "size and speed"} <= set(report.tables)
    assert {"reliability", "agreement", "losses"} <= set(report.figures)
    assert all(0 <= report.metrics[f"agreement/{arm}"] <= 1 for arm in ("CE", "KD", "listed"))
    version = registry.resolve(TrackingConfig(), tmp_path, "bars-student")
    assert version.parents == ("bars-teacher/1",)
    assert version.tags["labelmill.teacher_outputs"] == report.meta["teacher_outputs"]
    (outputs,) = (tmp_path / "kd-fashion" / "stages").glob("teach-[0-9a-f]*/outputs")
    (held,) = (tmp_path / "kd-fashion" / "stages").glob("teach-test-*/outputs")
    again = {"teacher": f"{{kind: cached, folder: {outputs}, test: {held}}}", "name": "again"}
    alike = run("kd-fashion.yaml", data, tmp_path, **(taught | again))
    for metric in ("test/KD", "test/teacher", "agreement/KD"):
        assert alike.metrics[metric] == report.metrics[metric], "the same outputs, the same student"
    with pytest.raises(DataError, match="digest"):
        run("kd-fashion.yaml", data, tmp_path, **(taught | again | {"data.train": data / "test", "name": "stale"}))


def _plain_job(data: Path, folder: Path) -> Path:
    path = folder / "teacher.yaml"
    path.write_text(
        f"""
workload: discrimination.partial_fc
name: teacher
data: {{train: {data}/train, test: {data}/test}}
cluster: {{workers: 1, in_process: true}}
tracking: {{system_metrics: false}}
encoder: {CNN}
head: {{scale: 16, lr_multiplier: 10}}
train: {{global_batch: 50, epochs: 8, learning_rate: 0.01}}
register_as: bars-teacher
"""
    )
    return path


OTHERS: dict[str, dict[str, str]] = {
    "dual-head-fashion.yaml": {
        "teacher": TEACHER + "}",
        "samples": "100",
        "arms": "{CE: {}, dual: {losses: [{loss: {kind: binary_kl_norm}, off_epoch: 6}], aux: nonlinear, align: all}}",
    },
    "sla-fashion.yaml": {"samples": "200", "arms": "{plain: {kind: plain}, SLA+SD: {kind: joint_distilled}}"},
    "active-fashion.yaml": {
        "teacher": TEACHER + "}",
        "labelled": "60",
        "pool": "80",
        "validation": "40",
        "budget": "20",
        "arms": "{margin: {kind: margin}, robust: {}}",
    },
    "multi-aspect-fashion.yaml": {
        "aspects": "{kind: attributes, questions: {across: [0, 2], down: [1, 2]}, samples: 300, encoder: "
        + CNN
        + ", train: {global_batch: 50, epochs: 4, learning_rate: 0.01}}",
        "samples": "100",
        "arms": "{base: {alpha: 0}, aspects: {alpha: 1}}",
    },
}


@pytest.mark.parametrize("job", OTHERS)
def test_the_other_methods(data: Path, tmp_path: Path, job: str) -> None:
    train = "{global_batch: 20, epochs: 8, learning_rate: 0.01}"
    report = run(job, data, tmp_path, train=train, **OTHERS[job])
    accuracies = {name: value for name, value in report.metrics.items() if name.startswith("test/")}
    assert len(accuracies) >= 2
    assert min(accuracies.values()) > 0.4, accuracies
    assert not any(np.isnan(value) for value in report.metrics.values())


def test_a_pool_is_apart_from_the_test_set_and_its_gains_are_numbers(data: Path, tmp_path: Path) -> None:
    with pytest.raises(JobError, match="would leak into the test"):
        run(
            "active-fashion.yaml",
            data,
            tmp_path,
            **(OTHERS["active-fashion.yaml"] | {"data.test": str(data / "train")}),
        )
    gains = {"margin": np.array([0.1, -1e-3, np.nan])}
    with pytest.raises(DataError, match="margin is negative or not finite for 2 samples of the pool: 'b', 'c'"):
        check_gains(gains, np.array(["a", "b", "c"]))


def test_kept_outputs_do_not_go_with_augmentation(data: Path, tmp_path: Path) -> None:
    shifted = CNN[:-1] + ", augment: {shift: 2}}"
    with pytest.raises(JobError, match=r"set teacher\.live to true, or augment to false"):
        run("kd-fashion.yaml", data, tmp_path, encoder=shifted)


def test_a_live_teacher_and_a_registered_student_with_a_dense_head(data: Path, tmp_path: Path) -> None:
    job = {
        "teacher": TEACHER + ", live: true}",
        "samples": "150",
        "encoder": CNN,
        "arms": "{maps: {losses: [{loss: {kind: kd}}], features: [{kind: attention}, {kind: fitnet_maps, weight: 0.1}]}}",
        "train": "{global_batch: 50, epochs: 8, learning_rate: 0.01, evaluate_every: 8}",
    }
    report = run("kd-fashion.yaml", data, tmp_path, register_as="bars-dense", **job)
    assert {"losses", "cross_entropy", "accuracy", "reliability"} <= set(report.figures)
    assert report.metrics["test/maps"] > 0.4
    assert report.tables["size and speed"].rows[-1][0] == "maps"
    (package,) = (tmp_path / "kd-fashion" / "stages").glob("register-*/model")
    predictor, test = load_model(package), load_manifest(str(data / "test"))
    table = pa.concat_tables([read_shard(test, i) for i in range(len(test.shards))])
    images, label_Q = table.column("image").to_pylist(), np.array(table.column("label").to_pylist()).ravel()
    best = predictor.predict(images, k=1)["class_id"].to_numpy()
    assert float((best == label_Q).mean()) == pytest.approx(report.metrics["test/maps"], abs=1e-6), "the bias counts"
    model = TeacherModel.of(package)
    _, logits = model(model.encoder.prepare(predictor.read(images)))
    assert logits is not None
    assert np.array_equal(logits.argmax(1).numpy(), best), "and so it does where the student is a teacher"
    with pytest.raises(JobError, match="no two maps of one size"):
        run("kd-fashion.yaml", data, tmp_path, name="sizes", **(job | {"encoder": CNN.replace("size: 12", "size: 20")}))


def test_feature_maps_need_a_live_teacher(data: Path, tmp_path: Path) -> None:
    arms = "{maps: {features: [{kind: attention}]}}"
    with pytest.raises(JobError, match="feature maps are too large to keep"):
        run("kd-fashion.yaml", data, tmp_path, teacher=TEACHER + "}", arms=arms)


@pytest.mark.slow
def test_two_workers_on_ray_with_a_live_teacher(data: Path, tmp_path: Path, ray_session: None) -> None:
    report = run(
        "kd-fashion.yaml",
        data,
        tmp_path,
        **{
            "cluster": "{workers: 2, cpus_per_worker: 0.5}",
            "teacher": TEACHER + ", live: true}",
            "samples": "150",
            "head": "{scale: 16, lr_multiplier: 10}",
            "arms": "{KD: {losses: [{loss: {kind: kd}}], features: [{kind: rkd, weight: 0.01}, {kind: crd}]}}",
            "train": "{global_batch: 50, epochs: 24, learning_rate: 0.01}",
        },
    )
    assert report.metrics["test/KD"] > 0.45
