"""The objectives and stages of RCAL, without workers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from labelmill.data.config import StreamConfig
from labelmill.data.manifest import Manifest, load_manifest
from labelmill.data.noise import FrequencyNoise, write_noisy_version
from labelmill.data.shards import read_labels
from labelmill.data.source import LocalSource
from labelmill.data.stream import Batch, RankStream
from labelmill.encoders import CharNgramsConfig
from labelmill.errors import DataError
from labelmill.stages import Stage
from workloads.noisy import rcal
from workloads.noisy.rcal_objectives import Calibrated, Calibration, Contrast, ContrastSection, balancing_weights

ENCODER = CharNgramsConfig(dim=8, buckets=256, hidden=16)
Make = Callable[..., Manifest]


def batch_of(data: Manifest, objective: Any, count: int = 16) -> Batch:
    spec = StreamConfig().stream(data, "text", count, shuffle=False)
    return next(iter(RankStream(spec, LocalSource(spec, 0, 1), 0, 1, objective.prepare)))


def test_contrast_moves_keys_slowly_and_fills_the_queue(make_text_data: Make) -> None:
    torch.manual_seed(0)
    model = Contrast(ENCODER, ContrastSection(width=4, queue=24, momentum=0.75), seed=1)
    batch = batch_of(make_text_data(40, 40), model)
    batch.weight_B[3] = 0
    before = model.queue_MD.clone()
    with torch.no_grad():
        for parameter in model.project.parameters():
            parameter.add_(0.1)
    old = [p.clone() for p in model.keys.parameters()]
    loss = model.forward(batch).total
    loss.backward()
    queries = [*model.encoder.parameters(), *model.project.parameters()]
    for key, was, query in zip(model.keys.parameters(), old, queries, strict=True):
        torch.testing.assert_close(key, 0.75 * was + 0.25 * query)
        assert not key.requires_grad
    assert int(model.place) == 15, "a hole is no negative"
    torch.testing.assert_close(model.queue_MD[15:], before[15:])
    torch.testing.assert_close(model.queue_MD.norm(dim=1), torch.ones(24))
    model.forward(batch)
    assert int(model.place) == (15 + 15) % 24
    assert all(p.grad is not None for p in model.project.parameters())


def files(folder: Path, data: Manifest, width: int = 8) -> tuple[str, str, str]:
    torch.manual_seed(5)
    encoder = Contrast(ENCODER, ContrastSection(width=4, queue=16), 0).encoder
    save_file({f"encoder.{k}": v for k, v in encoder.state_dict().items()}, folder / "w.safetensors")
    words = [f"word-{i}" for i in range(data.num_samples)]
    save_file({"emb": encoder.embed(words)}, folder / "z.safetensors")
    mean = torch.zeros(7, width)
    mean[:, 0] = torch.arange(7.0) * 100
    gaussians = {"mean": mean, "factor": torch.eye(width).expand(7, -1, -1).contiguous(), "missing": torch.arange(7.0)}
    save_file(gaussians, folder / "g.safetensors")
    return str(folder / "w.safetensors"), str(folder / "z.safetensors"), str(folder / "g.safetensors")


def test_the_parts_of_the_calibrated_loss(make_text_data: Make, tmp_path: Path) -> None:
    data = make_text_data(40, 40)
    paths = files(tmp_path, data)
    plain = Calibrated(ENCODER, data, Calibration(synthetic=0, anchor=0, mixup=0), *paths, seed=0)
    batch = batch_of(data, plain)
    want = F.cross_entropy(plain.classes(plain.encoder(batch.inputs)), batch.labels.single_B)
    assert plain.forward(batch).total.item() == pytest.approx(want.item())
    full = Calibrated(ENCODER, data, Calibration(anchor=0.5, synthetic=2.0), *paths, seed=0)
    losses = full.forward(batch)
    assert losses.parts["anchor"].item() == pytest.approx(0, abs=1e-10), "it starts where the stored features lie"
    assert losses.total.item() == pytest.approx(
        (losses.parts["mixup"] + 2 * losses.parts["synthetic"]).item(), rel=1e-6
    )
    with torch.no_grad():
        for parameter in full.encoder.parameters():
            parameter.add_(0.1)
    assert full.forward(batch).parts["anchor"].item() > 0
    drawn, classes = full.draw(4000, torch.Generator().manual_seed(0))
    share = torch.bincount(classes, minlength=7) / 4000
    torch.testing.assert_close(share, torch.arange(7.0) / 21, atol=0.03, rtol=0)
    assert (drawn[:, 0] - 100.0 * classes).abs().max() < 6, "features come from their class"


def test_balanced_weights_undo_the_class_sizes(make_text_data: Make, tmp_path: Path) -> None:
    data = make_text_data(40, 40)  # 7 classes, the first 5 with one sample more
    weight_K = balancing_weights(data)
    count_K = torch.bincount(torch.arange(40) % 7).float()
    torch.testing.assert_close(weight_K * count_K, torch.full((7,), 40 / 7))
    arm = Calibration(pretrained=False, synthetic=0, anchor=0, mixup=0, balanced=True)
    model = Calibrated(ENCODER, data, arm, "", "", "", seed=0)
    batch = batch_of(data, model)
    loss_B = F.cross_entropy(model.classes(model.encoder(batch.inputs)), batch.labels.single_B, reduction="none")
    want = (loss_B * weight_K[batch.labels.single_B]).mean()
    assert model.forward(batch).total.item() == pytest.approx(want.item())


def test_mixup_is_linear_in_the_labels_and_leaves_holes_out(make_text_data: Make, tmp_path: Path) -> None:
    data = make_text_data(40, 40)
    model = Calibrated(ENCODER, data, Calibration(synthetic=0, anchor=0, mixup=1e-3), *files(tmp_path, data), seed=0)
    batch = batch_of(data, model)
    # Beta(a, a) with a tiny a is 0 or 1: then each loss is that of one of both samples
    z, label = model.encoder(batch.inputs), batch.labels.single_B
    own = F.cross_entropy(model.classes(z), label, reduction="none")
    mixed = model._mixup(batch, z, label, torch.Generator().manual_seed(0))
    torch.testing.assert_close(mixed.sort().values, own.sort().values, atol=1e-4, rtol=1e-4)
    batch.weight_B[::2] = 0
    again = model._mixup(batch, z, label, torch.Generator().manual_seed(0))
    kept = batch.weight_B > 0
    torch.testing.assert_close(again[kept].sort().values, own[kept].sort().values, atol=1e-4, rtol=1e-4)


def test_stored_features_of_another_width_are_refused(make_text_data: Make, tmp_path: Path) -> None:
    data = make_text_data(40, 40)
    weights, _, gaussians = files(tmp_path, data)
    save_file({"emb": torch.zeros(40, 5)}, tmp_path / "other.safetensors")
    with pytest.raises(DataError, match=r"stored features \[40, 5\] for 40 samples and an encoder of width 8"):
        Calibrated(ENCODER, data, Calibration(), weights, str(tmp_path / "other.safetensors"), gaussians, seed=0)


def test_long_tail_and_gaussians_as_stages(make_text_data: Make, tmp_path: Path) -> None:
    data = make_text_data(420, 100)
    run: Any = None
    cut = rcal.cut_tail(run, tmp_path / "cut", data, rcal.LongTail(largest=60, ratio=10), seed=0)
    tail = load_manifest(tmp_path / "cut" / "train")
    label_N = np.concatenate([read_labels(tail, i)["label"].to_numpy() for i in range(len(tail.shards))])
    assert np.bincount(label_N).tolist() == [60, 40, 27, 18, 12, 8, 6]
    assert cut["left"] == tail.num_samples
    noisy = write_noisy_version(tail, tmp_path / "noisy", FrequencyNoise(rate=0.3))
    rng = np.random.default_rng(0)
    z = rng.normal(size=(7, 5))[label_N] * 6 + rng.normal(size=(len(label_N), 5))
    save_file(
        {"emb": torch.from_numpy(z), "valid": torch.ones(len(z), dtype=torch.bool)}, tmp_path / "features.safetensors"
    )
    features = Stage("features", "k", tmp_path, {}, 0.0)
    (tmp_path / "out").mkdir()
    arm = Calibration(neighbours=10, borrow=0.2)
    found = rcal.fit_gaussians(run, tmp_path / "out", noisy, features, arm, head_share=0.6)
    raw, robust = (np.mean(found["distances"][name]) for name in ("raw", "without outliers"))
    assert robust < raw, "outliers out, the means come nearer to the clean ones"
    content = load_file(tmp_path / "out" / "gaussians.safetensors")
    assert content["missing"][np.argmax(found["counts"])] == 0
    assert torch.isfinite(content["factor"]).all()


def test_jobs_that_cannot_work_are_refused() -> None:
    job = {
        "workload": "noisy.rcal", "name": "x", "data": {"train": "a", "test": "b"}, "encoder": {"kind": "char_ngrams"},
        "train": {"global_batch": 8, "steps": 8},
    }  # fmt: skip
    assert rcal.RcalJob.model_validate(job).arms["RCAL"].draws
    for change, message in (
        ({"train": {"global_batch": 8, "steps": 8, "zero_stage": 3}}, "zero_stage 0, 1 or 2"),
        ({"long_tail": {"largest": 10, "ratio": 1}}, "greater than 1"),
        ({"arms": {}}, "at least 1"),
        ({"contrast": {"encoder": {"kind": "char_ngrams", "dim": 9}}}, "augmentation only, not in dim"),
    ):
        with pytest.raises(ValidationError, match=message):
            rcal.RcalJob.model_validate(job | change)
