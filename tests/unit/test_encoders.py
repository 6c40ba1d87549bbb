"""Encoders: shapes, determinism, stable hashes, gradients, library models from local folders."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from labelmill.encoders import (
    KINDS,
    CharNgramsConfig,
    build_encoder,
    prepared_rows,
    slice_prepared,
    to_device,
)
from labelmill.encoders.linear import LinearProjection, fit_pca
from labelmill.encoders.vision import SmallVitConfig, prepare_images
from labelmill.errors import DataError, JobError

torch.set_num_threads(1)

TINY_VIT = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "patch_size": 8,
}
TINY_BERT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
TINY_CONVNEXT = {"hidden_sizes": [8, 12], "depths": [1, 1], "num_stages": 2}
WORDS = ["hello", "world", "a", "", "straße", "你好", "𝒳y", "x" * 50]

CONFIGS: dict[str, dict[str, Any]] = {
    "char_ngrams": {"dim": 16, "buckets": 500, "hidden": 8},
    "small_cnn": {"dim": 12, "width": 8, "stages": 2},
    "small_vit": {"dim": 12, "width": 16, "depth": 1, "heads": 2, "patch": 7},
    "mlp": {"dim": 12, "hidden": (16,)},
    "hf_image": {"architecture": "vit", "options": TINY_VIT, "image_size": 32, "dim": 10},
    "hf_text": {"architecture": "bert", "options": TINY_BERT, "max_length": 16},
    "linear": {"in_dim": 28 * 28, "dim": 9},
    "pixels": {"image_size": 28},
}


def build(kind: str, seed: int = 0, **options: Any):  # type: ignore[no-untyped-def]
    torch.manual_seed(seed)
    return build_encoder({"kind": kind, **CONFIGS[kind], **options})


def images(count: int = 4, size: int = 28, channels: int = 1) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, size, size, channels), dtype=np.uint8)


def raw_for(kind: str) -> Any:
    return WORDS if kind in ("char_ngrams", "hf_text") else images(8)


@pytest.mark.parametrize("kind", KINDS)
def test_every_encoder_prepares_encodes_and_learns(kind: str) -> None:
    encoder = build(kind)
    encoder.eval()
    prepared = encoder.prepare(raw_for(kind))
    assert prepared_rows(prepared) == 8
    emb = encoder(to_device(prepared, "cpu"))
    assert emb.shape == (8, encoder.dim)
    assert emb.is_floating_point()
    assert bool(torch.isfinite(emb).all())
    parts = [encoder(slice_prepared(prepared, lo, lo + 4)) for lo in (0, 4)]
    assert torch.allclose(torch.cat(parts), emb, atol=1e-5), "an embedding must not depend on its batch"
    if kind != "pixels":
        emb.square().sum().backward()
        trainable = {n: p for n, p in encoder.named_parameters() if p.requires_grad}
        assert trainable
        assert all(p.grad is not None for p in trainable.values())


@pytest.mark.parametrize("kind", KINDS)
def test_the_seed_fixes_the_weights(kind: str) -> None:
    raw = raw_for(kind)
    first, same = build(kind, seed=3).embed(raw), build(kind, seed=3).embed(raw, batch=3)
    assert torch.allclose(first, same, atol=1e-5)
    if kind != "pixels":
        assert not torch.allclose(first, build(kind, seed=4).embed(raw))
    assert build(kind).embed(raw[:0]).shape == (0, build(kind).dim)


def test_unknown_kind_and_wrong_options() -> None:
    with pytest.raises(JobError, match=r"unknown encoder 'smal_cnn'. Did you mean 'small_cnn'"):
        build_encoder({"kind": "smal_cnn"})
    with pytest.raises(JobError, match=r"unknown encoder None"):
        build_encoder({})
    with pytest.raises(JobError, match=r"encoder.widht: Extra inputs"):
        build_encoder({"kind": "small_cnn", "widht": 8})
    with pytest.raises(JobError, match="patch 5 doesn't divide image_size 28"):
        build_encoder({"kind": "small_vit", "patch": 5})
    with pytest.raises(JobError, match="at least one of orders"):
        build_encoder({"kind": "char_ngrams", "orders": (), "placed": (), "gaps": (), "deletions": False})
    with pytest.raises(ValidationError, match="distinct numbers"):
        CharNgramsConfig(orders=(2, 2))
    with pytest.raises(ValidationError, match="heads 3"):
        SmallVitConfig(heads=3)


# --- images ------------------------------------------------------------------------------------------------


def test_prepare_images_normalises_resizes_and_repeats_channels() -> None:
    encoder = build("small_cnn", mean=(0.25,), std=(0.5,))
    prepared = encoder.prepare(np.full((2, 28, 28), 255, np.uint8))
    assert prepared.shape == (2, 1, 28, 28)
    assert prepared.dtype == torch.float32
    assert torch.allclose(prepared, torch.tensor(1.5))
    colour = build("small_cnn", channels=3, mean=(0.0, 0.5, 1.0), std=(1.0, 1.0, 0.5), image_size=16)
    prepared = colour.prepare(np.full((2, 40, 30, 1), 255, np.uint8))
    assert prepared.shape == (2, 3, 16, 16)
    assert torch.allclose(prepared[0, :, 3, 3], torch.tensor([1.0, 0.5, 0.0]))
    raw = images(3)
    assert torch.equal(encoder.prepare(raw), encoder.prepare(torch.from_numpy(raw)))


def test_prepare_images_refuses_what_it_cannot_read() -> None:
    encoder = build("small_cnn")
    with pytest.raises(DataError, match=r"uint8 images"):
        encoder.prepare(np.zeros((2, 28, 28, 1), np.float32))
    with pytest.raises(DataError, match=r"have 3 channels and the encoder takes 1"):
        encoder.prepare(np.zeros((2, 28, 28, 3), np.uint8))
    with pytest.raises(ValidationError, match="mean has 2 numbers"):
        SmallVitConfig(channels=3, mean=(0.1, 0.2))
    with pytest.raises(ValidationError, match="std must be positive"):
        SmallVitConfig(std=(0.0,))


def test_augmentation_only_with_rng() -> None:
    encoder = build("small_vit", augment={"shift": 3, "flip": 0.5})
    raw = images()
    assert torch.equal(encoder.prepare(raw), prepare_images(raw, encoder.config))
    assert not torch.equal(encoder.prepare(raw, np.random.default_rng(0)), encoder.prepare(raw))
    assert torch.equal(encoder.prepare(raw, np.random.default_rng(0)), encoder.prepare(raw, np.random.default_rng(0)))


# --- linear ------------------------------------------------------------------------------------------------


def test_pca_equals_scikit_learn() -> None:
    from sklearn.decomposition import PCA

    values = images(60, 6).reshape(60, -1).astype(np.float32) / 255.0
    weight, centre, share = fit_pca(torch.from_numpy(values), 5)
    reference = PCA(5, svd_solver="full").fit(values.astype(np.float64))
    assert np.allclose(np.abs(weight.numpy()), np.abs(reference.components_), atol=1e-5)
    assert np.allclose(share.numpy(), reference.explained_variance_ratio_, atol=1e-6)
    assert bool((weight.gather(1, weight.abs().argmax(1, keepdim=True)) > 0).all())
    encoder = build("linear", in_dim=36, dim=5)
    assert isinstance(encoder, LinearProjection)
    encoder.set_weights(weight, centre)
    emb = encoder.embed(images(60, 6))
    assert np.allclose(np.abs(emb.numpy()), np.abs(reference.transform(values)), atol=1e-4)
    assert not encoder.weight_DI.requires_grad
    white, _, _ = fit_pca(torch.from_numpy(values), 5, whiten=True)
    assert torch.allclose(encoder.set_weights(white, centre).embed(images(60, 6)).var(dim=0), torch.ones(5), atol=1e-3)
    with pytest.raises(ValueError, match="PCA to 40"):
        fit_pca(torch.zeros(50, 36), 40)
    with pytest.raises(DataError, match=r"has 784 numbers, encoder.in_dim is 36"):
        encoder.prepare(images(2))


def test_pixels_are_the_normalised_image() -> None:
    emb = build("pixels", mean=(0.0,), std=(1.0,)).embed(images(3))
    assert emb.shape == (3, 784)
    assert np.allclose(emb.numpy(), images(3).reshape(3, -1) / 255.0, atol=1e-6)
