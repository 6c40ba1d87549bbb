"""The noisy-label methods for real, small: a data set with wrong labels, the report and the new version.

They train in this process (`cluster.in_process`): that the engine does the same on Ray is shown elsewhere.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from labelmill import api
from labelmill.data.labels import LabelSpec
from labelmill.data.manifest import FieldSpec, load_manifest
from labelmill.data.writer import ShardWriter

JOBS = Path(__file__).resolve().parents[2] / "workloads" / "noisy" / "jobs"
SIDE = 12


def bars(folder: Path, count: int, seed: int) -> Path:
    """Pictures of a bright bar across, down, or both: three classes, easily told apart."""
    import pyarrow as pa
    from PIL import Image

    rng = np.random.default_rng(seed)
    fields = {"image": FieldSpec(kind="image", ext="png")}
    with ShardWriter(
        folder, "bars", fields, LabelSpec(form="single", num_classes=3), layout="packed", samples_per_shard=100
    ) as writer:
        for i in range(count):
            label = i % 3
            picture = rng.integers(0, 80, (SIDE, SIDE)).astype(np.uint8)
            at = rng.integers(0, SIDE - 2)
            if label in (0, 2):
                picture[at : at + 2, :] += np.uint8(150)
            if label in (1, 2):
                picture[:, at : at + 2] = 230
            file = io.BytesIO()
            Image.fromarray(picture).save(file, "png")
            writer.write(f"s{i:05d}", {"image": file.getvalue()}, {"label": label})
        writer.close(classes=pa.table({"name": ["across", "down", "both"]}))
    return folder


def run(job: str, folder: Path, **overrides: Any) -> Any:
    data = {"data.train": bars(folder / "train", 600, 0), "data.test": bars(folder / "test", 150, 1)}
    small = {
        "output": folder / "runs",
        "cluster.workers": 1,
        "cluster.in_process": "true",
        "train.global_batch": 60,
        "train.learning_rate": 0.005,
        "eval_batch": 120,
    }
    text = "{kind: small_cnn, image_size: 12, channels: 1, dim: 16, width: 8}"
    values = [f"{k}={v}" for k, v in (data | small | {"encoder": text} | overrides).items()]
    return api.run(JOBS / job, values, console=Console(file=io.StringIO(), width=200))


def test_an_audit_finds_the_wrong_labels_and_makes_a_new_version(tmp_path: Path) -> None:
    report = run(
        "confident-fashion.yaml",
        tmp_path,
        **{
            "noise": "{kind: asymmetric, rate: 0.25, map: {0: 1, 1: 2}}",
            "train.epochs": 20,
            "audit.folds": 2,
            "audit.keep": 3,
            "register_as": "bars-cleaned",
        },
    )
    precision = report.metrics["audit/precision/prune_by_noise_rate"]
    recall = report.metrics["audit/recall/prune_by_noise_rate"]
    assert min(precision, recall) > 0.5, (precision, recall)  # a sixth is wrong
    assert 0.08 < report.metrics["audit/error_rate"] < 0.3
    assert report.metrics["test/cleaned"] > 0.85
    assert report.metrics["test/oracle_removal"] > 0.85
    samples = {row[0]: row[1] for row in report.tables["accuracy"].rows}
    assert samples["all labels"] == 600
    assert samples["random removal"] == samples["cleaned"] < 600
    assert samples["oracle removal"] == 600 - 100, "a quarter of two of three classes"
    assert report.metrics["noisy_test/cleaned"] < report.metrics["test/cleaned"]
    assert {"filters", "classes", "confusions", "worst samples", "accuracy", "re-ranking"} <= set(report.tables)
    assert {"noise_matrix", "worst_samples"} <= set(report.figures)
    assert report.tables["confusions"].rows[0][0] in ("down", "both")

    page = (tmp_path / "runs" / "confident-fashion" / "report" / "report.html").read_text(encoding="utf-8")
    for name in ("noise_matrix", "worst_samples"):
        assert f'alt="{name}" src="data:image/png;base64,' in page
    for text in (
        "test accuracy before, trained on all labels:",
        "<h2>classes</h2>",
        "missed %",
        "<h2>worst samples</h2>",
    ):
        assert text in page

    stages = tmp_path / "runs" / "confident-fashion" / "stages"
    (acted,), (noisy,), (audit,) = (list(stages.glob(f"{name}-*")) for name in ("act", "noise", "audit"))
    cleaned, data = load_manifest(acted / "data"), load_manifest(noisy / "train")
    assert cleaned.parents == (data.digest,)
    assert cleaned.created_by["filter"] == "prune_by_noise_rate"
    issues = pq.read_table(audit / "issues.parquet")
    assert cleaned.num_samples == 600 - sum(issues["by_prune_by_noise_rate"].to_pylist())
    assert np.all(np.diff(issues["self_confidence"].to_numpy()) >= 0), "most suspicious first"


SMALL_NETS = {
    "ldr-fashion.yaml": {
        "noise": "{kind: symmetric, rate: 0.3}",
        "losses": "{CE: {kind: softmax}, ALDR: {kind: aldr}}",
        "train.epochs": 10,
    },
    "nested-fashion.yaml": {
        "noise": "{kind: symmetric, rate: 0.3}",
        "arms": "{nested: {kind: nested, eta: 8}}",
        "coteaching.rate": 0.3,
        "train.epochs": 10,
        "train.evaluate_every": 25,
    },
    "rcal-fashion.yaml": {
        "long_tail": "{largest: 120, ratio: 4}",
        "noise": "{kind: frequency, rate: 0.2}",
        "contrast": "{queue: 64}",
        "contrast_train": "{global_batch: 60, epochs: 4, learning_rate: 0.003}",
        "arms": "{RCAL: {}}",
        "train.epochs": 20,
    },
}


@pytest.mark.parametrize("job", SMALL_NETS)
def test_the_other_methods_learn_from_wrong_labels(tmp_path: Path, job: str) -> None:
    report = run(job, tmp_path, **SMALL_NETS[job])
    accuracies = {name: value for name, value in report.metrics.items() if name.startswith("test/")}
    assert accuracies
    assert min(accuracies.values()) > 0.6, accuracies
    assert not any(np.isnan(value) for value in report.metrics.values())


@pytest.mark.parametrize("action", ["relabel", "weight"])
def test_relabelled_and_weighted_versions_train(tmp_path: Path, action: str) -> None:
    """The other actions, on stages alone: what `act` writes is what the classifier takes."""
    import pyarrow as pa
    import torch

    from labelmill.data.config import StreamConfig
    from labelmill.data.source import LocalSource
    from labelmill.data.stream import RankStream
    from labelmill.encoders import SmallCnnConfig
    from labelmill.heads.config import HeadConfig
    from labelmill.stages import Stage
    from workloads.noisy import confident
    from workloads.noisy.audited import AuditedClassifier

    data = load_manifest(bars(tmp_path / "data", 30, 0))
    keys = [f"s{i:05d}" for i in (4, 9)]
    pq.write_table(pa.table({"key": keys, "suggested": [0, 2], "by_both": [True, True]}), tmp_path / "issues.parquet")
    audit = Stage("audit", "k", tmp_path, {}, 0.0)
    confident.act(None, tmp_path / "act", data, audit, "both", action, 0.25)  # type: ignore[arg-type]
    version = load_manifest(tmp_path / "act" / "data")
    model = AuditedClassifier(SmallCnnConfig(image_size=SIDE, channels=1, dim=8), HeadConfig(scale=8.0), 3, seed=0, k=2)
    spec = StreamConfig().stream(version, "image", 30, shuffle=False, image_size=SIDE, channels=1)
    (batch,) = RankStream(spec, LocalSource(spec, 0, 1), 0, 1, model.prepare)
    loss = model.forward(batch).total
    loss.backward()
    ids, weight = batch.labels.ids_BP[:, 0], torch.ones(30)
    if action == "relabel":
        assert ids[[4, 9]].tolist() == [0, 2]
    else:
        weight[[4, 9]] = 0.25
    want = model.head.loss(model.encoder(batch.inputs["sample"]), ids, weight)
    torch.testing.assert_close(loss, want)
    found = model.predict(batch)
    assert set(found) == {"label", "self_confidence", "entropy", "class_id", "prob"}
