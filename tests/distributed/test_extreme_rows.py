"""Parametric rows on several labels: the sum over drawn positives, the inter-class filter, and two whole jobs."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from rich.console import Console

from labelmill.data.extreme import label_lists, write_multi_label
from labelmill.data.labels import Labels, LabelSpec
from labelmill.data.stream import Batch
from labelmill.encoders import CharNgramsConfig
from labelmill.execution import execute
from labelmill.heads.config import HeadConfig
from labelmill.heads.sharded import ShardedHead
from labelmill.host import Host
from labelmill.losses.classification import Decoupled, Softmax, dense_loss
from labelmill.losses.margins import CosFace
from labelmill.training.inprocess import fit_here
from workloads.extreme.mlcd import MlcdJob, mlcd
from workloads.extreme.partial_fc import PartialFCJob, partial_fc
from workloads.extreme.rows import RowRanker, SampledSum, drawn_columns

ENCODER = CharNgramsConfig(dim=16, buckets=512, hidden=0, orders=(2, 3), placed=(), gaps=(), deletions=False)
COS = torch.tensor([[0.8, 0.5, 0.1, -0.2, 0.3]], dtype=torch.float64)
POSITIVES = torch.tensor([[0, 1]])


def test_other_positives_are_negatives_in_the_sampled_sum() -> None:
    """Oracles of the two forms, scale 8: per positive with the other one as a negative, and with it taken out."""
    each = [float(dense_loss(Softmax(), COS, torch.tensor([[i]]), scale=8.0)) for i in (0, 1)]
    assert each == pytest.approx([0.1071191949, 2.5071191949], abs=1e-9)
    decoupled = float(dense_loss(Decoupled(), COS, POSITIVES, scale=8.0))
    assert decoupled == pytest.approx((0.0221028868 + 0.2202245638) / 2, abs=1e-9)


@pytest.mark.parametrize("kept", [512.0, 0.0])
def test_the_inter_class_filter_is_the_dense_one(kept: float) -> None:
    """Negatives with a cosine above it count as cosine 0 and have no gradient, kept or recomputed."""
    noise = torch.Generator().manual_seed(0)
    x = torch.randn(6, 4, generator=noise, dtype=torch.float64)
    ids = torch.randint(40, (6,), generator=noise)
    config = HeadConfig(scale=8.0, margin=CosFace(m=0.2), class_filter=0.5, init_std=1.0, memory_mb=kept)
    head = ShardedHead(40, 4, config, dtype=torch.float64)
    W, own, dense = head.w_CD.clone().requires_grad_(), x.clone().requires_grad_(), x.clone().requires_grad_()
    value = head.loss(own, ids)
    value.backward()
    cos = F.normalize(dense) @ F.normalize(W).T
    target = F.one_hot(ids, 40).bool()
    filtered = (cos > 0.5) & ~target
    assert int(filtered.sum()) > 5
    logits = 8 * torch.where(filtered, 0.0, cos - 0.2 * target)
    want = F.cross_entropy(logits, ids)
    want.backward()
    torch.testing.assert_close(value.detach(), want.detach())
    torch.testing.assert_close(own.grad, dense.grad, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(head.pending_rows()[1], W.grad, rtol=1e-6, atol=1e-9)
    with pytest.raises(ValidationError, match="class_filter acts on cosines"):
        HeadConfig(class_filter=0.5, normalize=False)


def test_drawn_positives() -> None:
    ids = np.array([[4, 7, 9, -1], [2, -1, -1, -1], [-1, -1, -1, -1]])
    keys = np.array([1, 2, 3], np.uint64)
    found = drawn_columns(keys, ids, 3)
    assert sorted(found[0]) == [4, 7, 9]
    assert found[1].tolist() == [2, 2, 2]
    assert found[2].tolist() == [-1, -1, -1]
    first = drawn_columns(np.arange(9000, dtype=np.uint64), np.tile(ids[:1], (9000, 1)), 1)[:, 0]
    assert np.bincount(first)[[4, 7, 9]] / 9000 == pytest.approx([1 / 3] * 3, abs=0.02)


def test_each_drawn_positive_has_negatives_of_its_own() -> None:
    torch.manual_seed(0)
    config = HeadConfig(scale=8.0, sample_rate=0.2)
    model = RowRanker(ENCODER, config, 100, 3, SampledSum(draws=2), 5)
    labels = Labels("multi", torch.tensor([[1, 2], [3, -1], [50, 51]]))
    inputs = model.prepare(["ab", "cd", "ef"], labels, np.arange(3, dtype=np.uint64))
    batch = Batch(["a", "b", "c"], inputs, labels, torch.ones(3), torch.arange(3))
    total = model.forward(batch).total
    values, touched = [], []
    for draw in range(2):
        head = ShardedHead(100, 16, config, seed=3)
        head.draw = draw
        value = head.loss(model.encoder(inputs["sample"]), inputs["drawn"][:, draw])
        value.backward()
        values.append(value.detach())
        touched.append(set(head.pending_rows()[0].tolist()))
    torch.testing.assert_close(total.detach(), sum(values) / 2)
    assert len(touched[0] - touched[1]) > 5, "other negatives"
    total.backward()
    assert set(model.head.pending_rows()[0].tolist()) == touched[0] | touched[1]


WORDS = [f"{a}{b}" for a in ("red", "green", "blue", "dark", "pale") for b in ("cat", "dog", "fish", "bird")]


def data_set(folder: Path, count: int, seed: int) -> str:
    rng = np.random.default_rng(seed)
    rows = [sorted(rng.choice(20, rng.integers(1, 4), replace=False).tolist()) for _ in range(count)]
    texts = [" ".join(WORDS[i] for i in row) for row in rows]
    keys = [f"q{seed}-{i}" for i in range(count)]
    classes = pa.table({"name": WORDS})
    spec = LabelSpec(form="multi", num_classes=20)
    return write_multi_label(keys, texts, {"label": label_lists(rows)}, spec, classes, folder, "w").root


def test_two_jobs(tmp_path: Path) -> None:
    base: dict[str, Any] = {
        "output": str(tmp_path / "runs"),
        "data": {"train": data_set(tmp_path / "a", 400, 1), "test": data_set(tmp_path / "b", 80, 2)},
        "encoder": ENCODER.model_dump(),
        "train": {"global_batch": 40, "steps": 80, "learning_rate": 0.02},
        "ranking": {"ks": [1, 3], "recall_ks": [5]},
    }
    for kind, job_type, method, least in (("partial_fc", PartialFCJob, partial_fc, 0.9), ("mlcd", MlcdJob, mlcd, 0.8)):
        job = job_type.model_validate(base | {"workload": f"extreme.{kind}", "name": kind})
        host = Host(tmp_path / "runs" / kind, fit=fit_here)
        report = execute(
            job, method.run, host=Host(tmp_path / "runs" / kind, fit=host.fit), console=Console(file=io.StringIO())
        )
        assert report.metrics["test/P@1"] > least, kind
    with pytest.raises(ValidationError, match="adds up single-label losses"):
        MlcdJob.model_validate(base | {"workload": "extreme.mlcd", "name": "x", "objective": {"kind": "sampled_sum"}})
