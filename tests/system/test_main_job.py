"""The main job for real: two DeepSpeed workers on Ray, sharded head, MLflow run, registry, prediction."""

from __future__ import annotations

import io
import json
import platform
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from rich.console import Console

from labelmill import api
from labelmill.errors import ClusterError, DataError
from labelmill.heads.index import measure_recall

SPELLING = {
    "workload": "discrimination.spelling",
    "name": "tiny",
    "words": {"languages": ["en"], "count": 400, "typos_per_word": 4, "queries": 60},
    "cluster": {"workers": 2, "cpus_per_worker": 0.5},
    "encoder": {"kind": "char_ngrams", "dim": 64, "buckets": 8192, "hidden": 0},
    "head": {"sample_rate": 0.25, "scale": 16.0, "optimizer": {"kind": "adagrad"}, "block_rows": 64},
    "train": {"global_batch": 128, "epochs": 2, "learning_rate": 0.002, "log_every": 2, "max_grad_norm": 10.0},
    "tracking": {"interval_s": 1},
    "register_as": "tiny-words",
}


def write_job(folder: Path, job: dict[str, Any]) -> Path:
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(job))
    return path


def run(path: Path, output: Path, *overrides: str) -> tuple[Any, str]:
    text = io.StringIO()
    console = Console(file=text, width=200)
    report = api.run(path, [f"output={output}", *overrides], console=console)
    return report, text.getvalue()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, ray_session: None) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("main")
    path = write_job(folder, SPELLING)
    report, text = run(path, folder / "runs")
    return {"path": path, "output": folder / "runs", "report": report, "text": text}


def test_it_learns_and_reports(finished: dict[str, Any]) -> None:
    report, text = finished["report"], finished["text"]
    # short words, many of them a letter apart; chance is 5 in 400
    assert report.metrics["test/top5"] > 0.35
    assert report.metrics["test/top1"] > 0.15
    assert set(report.figures) == {"loss", "step_time", "test_by_group"}
    assert {"test", "stages", "fit"} <= set(report.tables)
    systems = {row[0] for row in report.tables["test"].rows}
    assert systems == {"labelmill", "without frequency", "n-gram nearest", "edit rule"}
    assert "samples/s" in text, "progress is shown as plain lines when there is no terminal"
    assert "models predict tiny-words@candidate" in text


def test_the_mlflow_run_holds_everything(finished: dict[str, Any], tmp_path: Path) -> None:
    from labelmill.job import TrackingConfig
    from labelmill.tracking.config import Store, client_env
    from labelmill.tracking.run import read_report

    state = json.loads((finished["output"] / "tiny" / "run.json").read_text())
    with client_env(Store.of(TrackingConfig(), finished["output"])) as client:
        found = client.get_run(state["mlflow_run"])
        assert found.info.status == "FINISHED"
        history = client.get_metric_history(state["mlflow_run"], "train/loss")
        assert len(history) >= 5
        assert found.data.metrics["test/top1"] == pytest.approx(finished["report"].metrics["test/top1"])
        assert found.data.params["train.global_batch"] == "128"
        names = {artifact.path for artifact in client.list_artifacts(state["mlflow_run"])}
        assert {"job.yaml", "data", "report"} <= names
        inputs = found.inputs.dataset_inputs
        assert len(inputs) == 3
        digests = {tag.value for item in inputs for tag in item.tags if tag.key == "manifest_sha256"}
        assert digests == {finished["report"].meta[f"data_{split}"] for split in ("train", "dev", "test")}
    again = read_report(TrackingConfig(), finished["output"], state["mlflow_run"], folder=tmp_path)
    assert again.metrics == pytest.approx(finished["report"].metrics)
    assert again.tables.keys() == finished["report"].tables.keys()


def test_the_registered_model_predicts(finished: dict[str, Any]) -> None:
    frame = api.predict("tiny-words@candidate", ["abouut", "therre"], k=3, output=finished["output"])
    assert list(frame["rank"]) == [1, 2, 3, 1, 2, 3]
    top = set(frame[frame["input"] == 0]["class"])
    assert "about" in top
    assert api.promote("tiny-words", output=finished["output"]) == "1"


def test_a_second_call_does_nothing_and_other_training_keeps_the_data(finished: dict[str, Any]) -> None:
    _, text = run(finished["path"], finished["output"])
    assert "nothing has changed" in text
    report, text = run(
        finished["path"],
        finished["output"],
        "train.epochs=1",
        "train.zero_stage=2",
        "baselines=false",
        "cluster.workers=1",
    )
    assert "words: kept from before" in text
    assert "fit: done in" in text
    assert report.metrics["test/top5"] > 0.2


def test_too_many_workers_is_an_error_that_says_what_is_free(finished: dict[str, Any], tmp_path: Path) -> None:
    overrides = ["name=crowd", "cluster.workers=64", "cluster.cpus_per_worker=1"]
    with pytest.raises(ClusterError, match=r"64 workers x 1 CPU .* are free. \d+ worker\(s\) fit"):
        run(finished["path"], tmp_path, *overrides)


def image_data(folder: Path) -> tuple[Path, Path]:
    """Two kinds of pictures, bars across and bars down, as IDX files -> data sets."""
    import gzip
    import struct

    from labelmill.data.importers import import_idx

    rng = np.random.default_rng(0)
    for split, count in (("train", 240), ("test", 80)):
        labels = rng.integers(0, 2, count).astype(np.uint8)
        images = rng.integers(0, 60, (count, 16, 16)).astype(np.uint8)
        for image, label in zip(images, labels, strict=True):
            place = rng.integers(0, 14)
            image[place : place + 2, :] += np.uint8(150) if label else np.uint8(0)
            image[:, place : place + 2] += np.uint8(0) if label else np.uint8(150)
        with gzip.open(folder / f"{split}-images.gz", "wb") as file:
            file.write(struct.pack(">BBBBIII", 0, 0, 8, 3, *images.shape) + images.tobytes())
        with gzip.open(folder / f"{split}-labels.gz", "wb") as file:
            file.write(struct.pack(">BBBBI", 0, 0, 8, 1, count) + labels.tobytes())
        import_idx(
            folder / f"{split}-images.gz",
            folder / f"{split}-labels.gz",
            folder / split,
            class_names=["down", "across"],
            samples_per_shard=50,
            layout="tar" if split == "train" else "packed",
        )
    return folder / "train", folder / "test"


IMAGES = {
    "cluster": {"workers": 2, "cpus_per_worker": 0.5},
    "encoder": {"kind": "small_cnn", "image_size": 16, "channels": 1, "dim": 16, "width": 8, "stages": 2},
    "train": {"global_batch": 48, "steps": 12, "learning_rate": 0.01, "log_every": 4},
}


def test_mlcd_stages_on_images(tmp_path: Path, ray_session: None) -> None:
    train, test = image_data(tmp_path)
    job = IMAGES | {
        "workload": "discrimination.mlcd",
        "name": "mlcd",
        "data": {"train": str(train), "test": str(test)},
        "teacher": {"kind": "pca", "dim": 8},
        "clusters": {"count": 12, "passes": 4, "nearest": 3},
        "probe": {"num_labels": 60, "neighbours": 5},
        "head": {
            "loss": {"kind": "mlcd"},
            "margin": {"kind": "cosface", "m": 0.3},
            "scale": 32.0,
            "optimizer": {"kind": "adamw"},
            "lr_multiplier": 5.0,
        },
        "register_as": "bars",
    }
    report, text = run(write_job(tmp_path, job), tmp_path / "runs")
    for name in ("mlcd", "cross_entropy", "untrained"):
        assert 0.3 < report.metrics[f"test/probe/{name}"] <= 1.0
    assert {"neighbours", "cosines", "MLCD_loss"} <= set(report.figures)
    assert report.metrics["cosine/mlcd/positive"] > report.metrics["cosine/mlcd/negative"]
    assert "registered bars version 1" in text
    image = next(iter((tmp_path / "runs").glob("mlcd/stages/assign-*/manifest.json")))
    assert json.loads(image.read_text())["label"]["form"] == "multi"


def spoil(data: Path, count: int) -> list[str]:
    """Overwrites the pixel data of the first samples' PNGs in a tar shard, checksums and sizes made right again."""
    import hashlib
    import tarfile

    manifest = json.loads((data / "manifest.json").read_text())
    shard = data / manifest["shards"][0]["path"]
    content, keys = bytearray(shard.read_bytes()), []
    with tarfile.open(shard) as tar:
        for member in [m for m in tar.getmembers() if m.name.endswith(".png")][:count]:
            content[member.offset_data : member.offset_data + 20] = b"x" * 20
            keys.append(member.name.rsplit(".", 1)[0])
    shard.write_bytes(content)
    manifest["shards"][0]["sha256"] = hashlib.sha256(content).hexdigest()
    (data / "manifest.json").write_text(json.dumps(manifest))
    return keys


def test_undecodable_images_are_counted_named_and_limited(tmp_path: Path, ray_session: None) -> None:
    train, test = image_data(tmp_path)
    keys = spoil(train, 2)
    job = IMAGES | {
        "workload": "discrimination.partial_fc",
        "name": "bars",
        "data": {"train": str(train), "test": str(test)},
        "register_as": "indexed-bars",
        "index": {"kind": "faiss"},
    }
    path = write_job(tmp_path, job)
    with pytest.raises(DataError, match="can't be used") as caught:
        run(path, tmp_path / "runs", "data.max_bad_samples=1")
    assert any(key in str(caught.value) for key in keys)
    report, _ = run(path, tmp_path / "runs", "data.max_bad_samples=2")
    assert report.metrics["data/bad_samples"] == 2
    assert {row[0] for row in report.tables["bad samples"].rows} == set(keys)
    assert report.metrics["test/top1"] > 0.6
    logged = next((tmp_path / "runs" / "mlartifacts").rglob("index.json"))
    assert measure_recall(logged.parent, torch.randn(9, 16), k=2)["recall@2"] == 1.0


def test_import_platform_is_the_standard_module(ray_session: None) -> None:
    import ray

    def where() -> str:
        import platform as module

        return str(module.__file__)

    standard = str(Path(sys.base_prefix).resolve())
    assert not (Path("platform") / "__init__.py").exists()
    assert not list(Path("platform").glob("**/conftest.py"))
    assert str(Path(str(platform.__file__)).resolve()).startswith(standard)
    assert str(Path(ray.get(ray.remote(num_cpus=0.1)(where).remote())).resolve()).startswith(standard)
