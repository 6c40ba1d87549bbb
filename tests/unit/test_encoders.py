"""Encoders: shapes, determinism, stable hashes, gradients, library models from local folders."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from labelmill.encoders import (
    KINDS,
    CharNgrams,
    CharNgramsConfig,
    build_encoder,
    prepared_rows,
    sample_keys,
    slice_prepared,
    to_device,
)
from labelmill.encoders.augment import ImageAugment, Typos, apply_typos, augment_images, code_points
from labelmill.encoders.hashing import SampleRandom, mix64
from labelmill.encoders.library import bytes_to_ids
from labelmill.encoders.linear import LinearProjection, fit_pca
from labelmill.encoders.text import sum_rows
from labelmill.encoders.vision import SmallVitConfig, prepare_images
from labelmill.errors import DataError, JobError
from pydantic import ValidationError

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
    assert emb.shape == (8, encoder.dim) and emb.is_floating_point() and bool(torch.isfinite(emb).all())
    parts = [encoder(slice_prepared(prepared, lo, lo + 4)) for lo in (0, 4)]
    assert torch.allclose(torch.cat(parts), emb, atol=1e-5), "an embedding must not depend on its batch"
    if kind != "pixels":
        emb.square().sum().backward()
        trainable = {n: p for n, p in encoder.named_parameters() if p.requires_grad}
        assert trainable and all(p.grad is not None for p in trainable.values())


@pytest.mark.parametrize("kind", KINDS)
def test_the_seed_fixes_the_weights(kind: str) -> None:
    raw = raw_for(kind)
    first, same = build(kind, seed=3).embed(raw), build(kind, seed=3).embed(raw, batch=3)
    assert torch.allclose(first, same, atol=1e-5)
    if kind != "pixels":
        assert not torch.allclose(first, build(kind, seed=4).embed(raw))
    assert build(kind).embed(raw[:0]).shape == (0, build(kind).dim)


def test_unknown_kind_and_wrong_options() -> None:
    with pytest.raises(JobError, match="unknown encoder 'smal_cnn'. Did you mean 'small_cnn'"):
        build_encoder({"kind": "smal_cnn"})
    with pytest.raises(JobError, match="unknown encoder None"):
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


# --- hashing -----------------------------------------------------------------------------------------------


def test_hash_golden_values() -> None:
    # SplitMix64 finaliser of 1, and bucket ids: a change here makes every saved table useless
    assert int(mix64(np.array([1], dtype=np.uint64))[0]) == 0x5692161D100B05E5
    encoder = build("char_ngrams", buckets=65536)
    ids = encoder.prepare(["typo", "ß你"])
    assert ids.shape == (2, 10, 6) and ids.dtype == torch.int32
    assert ids[0, 0].tolist() == [23965, 14393, 12761, 14910, 30158, 60735]
    assert ids[1, 9].tolist() == [40065, 7590, 47213, 0, 0, 0]
    assert int(ids.long().sum()) == 2493312


def test_hashes_are_the_same_in_another_process() -> None:
    code = (
        "from labelmill.encoders import build_encoder\n"
        "e = build_encoder({'kind': 'char_ngrams', 'dim': 16, 'buckets': 500, 'hidden': 8})\n"
        "print(e.prepare(['hello', 'straße']).long().sum().item())"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(out.stdout) == int(build("char_ngrams").prepare(["hello", "straße"]).long().sum())


def families_of(word: str, **options: Any) -> dict[str, list[int]]:
    encoder = build("char_ngrams", buckets=1_000_003, **options)
    ids = encoder.prepare([word])[0]
    return {name: [v for v in ids[f].tolist() if v] for f, name in enumerate(encoder.families)}


def test_families_count_what_they_should() -> None:
    found = families_of("banana")  # 6 letters, 8 places with the boundary marks
    counts = {name: len(values) for name, values in found.items()}
    assert counts == {
        "gram1": 8, "gram2": 7, "gram3": 6, "gram4": 5, "head1": 8, "tail1": 8, "head2": 7, "tail2": 7,
        "gap1": 6, "deletion": 7,
    }  # fmt: skip
    assert found["gram2"][2] == found["gram2"][4], "'an' twice is the same feature"
    assert found["head2"][2] != found["head2"][4], "but not in the same place"
    assert all(1 <= v < 1_000_003 for values in found.values() for v in values)
    assert len(families_of("ab", probes=3)["gram1"]) == 12


def test_head_and_tail_features_follow_the_two_ends() -> None:
    word, longer = families_of("straße"), families_of("sstraße")
    assert len(set(word["tail1"]) & set(longer["tail1"])) == 7, (
        "counted from the end, an insertion moves nothing"
    )
    assert len(set(word["head1"]) & set(longer["head1"])) < 4
    end = families_of("straßen")
    assert len(set(word["head1"]) & set(end["head1"])) == 7


@pytest.mark.parametrize("typo", ["helo", "helllo", "hallo", "hlelo", "hell", "xhello"])
def test_one_edit_leaves_a_shared_deletion(typo: str) -> None:
    assert set(families_of("hello")["deletion"]) & set(families_of(typo)["deletion"])
    assert not set(families_of("hello")["deletion"]) & set(families_of("goodbye")["deletion"])


def test_short_empty_missing_and_long_strings() -> None:
    encoder = build("char_ngrams", max_length=6)
    ids = encoder.prepare(["", None, "a", "abcdef", "abcdefgh"])
    assert torch.equal(ids[0], ids[1])
    assert torch.equal(ids[3], ids[4]), "letters beyond max_length are ignored"
    assert bool(torch.isfinite(encoder(ids)).all())
    assert encoder.prepare([]).shape[0] == 0
    lower = build("char_ngrams", lowercase=True)
    assert torch.equal(lower.prepare(["HeLLo"]), lower.prepare(["hello"]))


def test_sum_rows_equals_the_plain_sum_and_its_gradient() -> None:
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 7, (12, 5), generator=g, dtype=torch.int32)
    table = torch.randn(7, 3, generator=g, dtype=torch.float64, requires_grad=True)
    mask = (ids != 0).double()[:, :, None]
    want = (table[ids.long()] * mask).sum(dim=1)
    assert torch.allclose(sum_rows(ids, table), want)
    weight = torch.randn(12, 3, generator=g, dtype=torch.float64)
    (expected,) = torch.autograd.grad((want * weight).sum(), table)
    (found,) = torch.autograd.grad((sum_rows(ids, table) * weight).sum(), table)
    assert torch.allclose(found, expected)
    (empty,) = torch.autograd.grad(sum_rows(torch.zeros_like(ids), table).sum(), table)
    assert not empty.any()


def test_a_fresh_text_encoder_puts_typos_near() -> None:
    words = ["international", "development", "university", "programming", "restaurant", "government"]
    encoder = build("char_ngrams", dim=128, buckets=65536)
    assert isinstance(encoder, CharNgrams)
    typos = apply_typos(words, np.random.default_rng(0))
    cos = F.normalize(encoder.embed(typos)) @ F.normalize(encoder.embed(words)).T
    assert cos.argmax(dim=1).tolist() == list(range(6))


# --- augmentation --------------------------------------------------------------------------------------------


def edit_distance(a: str, b: str) -> int:
    """Optimal string alignment: substitute, insert, delete, transpose."""
    d = np.zeros((len(a) + 1, len(b) + 1), dtype=int)
    d[:, 0], d[0, :] = range(len(a) + 1), range(len(b) + 1)
    for i in range(1, len(a) + 1):
        for j in range(1, len(b) + 1):
            d[i, j] = min(d[i - 1, j] + 1, d[i, j - 1] + 1, d[i - 1, j - 1] + (a[i - 1] != b[j - 1]))
            if i > 1 and j > 1 and a[i - 1] == b[j - 2] and a[i - 2] == b[j - 1]:
                d[i, j] = min(d[i, j], d[i - 2, j - 2] + 1)
    return int(d[-1, -1])


def test_typos_are_the_edits_they_say() -> None:
    words = ["hello", "aaa", "ab", "x", "straße", "international"] * 200
    one = apply_typos(words, np.random.default_rng(0), Typos(edits=(0.0, 1.0)))
    assert {edit_distance(w, t) for w, t in zip(words, one, strict=True)} == {1}
    changes = {len(t) - len(w) for w, t in zip(words, one, strict=True)}
    assert changes == {-1, 0, 1}
    assert any(sorted(w) == sorted(t) for w, t in zip(words, one, strict=True)), "transpositions happen"
    mixed = apply_typos(words, np.random.default_rng(0), Typos(edits=(0.2, 0.5, 0.3)))
    distances = [edit_distance(w, t) for w, t in zip(words, mixed, strict=True)]
    # the measure counts an edit inside a swapped pair as three, so two edits can read 3
    assert max(distances) <= 3 and 0.15 < np.mean(np.array(distances) == 0) < 0.25
    assert all(apply_typos(["", "q"] * 50, np.random.default_rng(1)))
    assert apply_typos([], np.random.default_rng(0)) == []


def test_typos_depend_on_the_sample_not_on_the_batch() -> None:
    words = ["hello", "world", "typo", "augmentation"]
    keys = sample_keys(7, 0, np.arange(4))
    whole = apply_typos(words, keys)
    assert whole == apply_typos(words[:1], keys[:1]) + apply_typos(words[1:], keys[1:])
    assert whole != apply_typos(words, sample_keys(7, 1, np.arange(4)))
    encoder = build("char_ngrams", typos={"edits": (0.0, 1.0)})
    assert torch.equal(encoder.prepare(words), encoder.prepare(words)), "no typos without rng"
    assert encoder.prepare(words, keys).ne(0).sum() > 0
    assert not torch.equal(encoder(encoder.prepare(words, keys)), encoder(encoder.prepare(words)))
    with pytest.raises(ValueError, match="one key per sample"):
        apply_typos(words, keys[:2])
    with pytest.raises(ValidationError, match="sum to 1"):
        Typos(edits=(0.5, 0.2))
    with pytest.raises(ValidationError, match="two different letters"):
        Typos(letters="aaa")


def test_sample_random_is_uniform_and_normal() -> None:
    random = SampleRandom(np.random.default_rng(0), 4000)
    u, z = random.uniform(0, 5), random.normal(1, 5)
    assert u.shape == (4000, 5) and 0 <= u.min() and u.max() < 1
    assert u.mean() == pytest.approx(0.5, abs=0.01) and z.std() == pytest.approx(1.0, abs=0.02)
    assert abs(np.corrcoef(u.T) - np.eye(5)).max() < 0.06
    assert sorted(set(random.integers(2, 3).tolist())) == [0, 1, 2]
    assert np.array_equal(sample_keys(1, 2, np.arange(5))[3:], sample_keys(1, 2, np.array([3, 4])))
    assert len(set(sample_keys(-1, 0, np.arange(1000)).tolist())) == 1000


def test_code_points_of_ragged_strings() -> None:
    codes, lengths = code_points(["ab", "", None, "你𝒳c"])
    assert lengths.tolist() == [2, 0, 0, 3]
    assert codes.tolist() == [[97, 98, 0], [0, 0, 0], [0, 0, 0], [0x4F60, 0x1D4B3, 99]]
    cut, lengths = code_points(["abcd", "x", "efg"], 2)
    assert cut.tolist() == [[97, 98], [120, 0], [101, 102]] and lengths.tolist() == [2, 1, 2]


def test_image_augmentation() -> None:
    raw = images(64, 12)
    keys = sample_keys(0, 0, np.arange(64))
    assert np.array_equal(augment_images(raw, ImageAugment(), keys), raw.transpose(0, 3, 1, 2))
    flipped = augment_images(raw, ImageAugment(flip=1.0), keys)
    assert np.array_equal(flipped, raw.transpose(0, 3, 1, 2)[..., ::-1])
    shifted = augment_images(raw, ImageAugment(shift=2), keys)
    middle = raw[:, 4:8, 4:8, 0]
    offsets = set()
    for b in range(64):
        places = [
            (dy, dx) for dy in range(-2, 3) for dx in range(-2, 3)
            if np.array_equal(shifted[b, 0, 4 + dy : 8 + dy, 4 + dx : 8 + dx], middle[b])
        ]  # fmt: skip
        assert len(places) == 1
        offsets.add(places[0])
    assert len(offsets) > 15
    cut = augment_images(np.full((64, 12, 12, 1), 9, np.uint8), ImageAugment(cutout=5), keys)
    holes = (cut == 0).sum(axis=(1, 2, 3))
    assert holes.max() == 25 and holes.min() >= 1
    everything = ImageAugment(shift=2, flip=0.5, cutout=3, noise=0.1)
    whole = augment_images(raw, everything, keys)
    assert np.array_equal(whole[10:20], augment_images(raw[10:20], everything, keys[10:20]))
    noisy = augment_images(np.full((64, 12, 12, 1), 100, np.uint8), ImageAugment(noise=0.1), keys)
    assert noisy.std() == pytest.approx(25.5, rel=0.05)


# --- images ------------------------------------------------------------------------------------------------


def test_prepare_images_normalises_resizes_and_repeats_channels() -> None:
    encoder = build("small_cnn", mean=(0.25,), std=(0.5,))
    prepared = encoder.prepare(np.full((2, 28, 28), 255, np.uint8))
    assert prepared.shape == (2, 1, 28, 28) and prepared.dtype == torch.float32
    assert torch.allclose(prepared, torch.tensor(1.5))
    colour = build("small_cnn", channels=3, mean=(0.0, 0.5, 1.0), std=(1.0, 1.0, 0.5), image_size=16)
    prepared = colour.prepare(np.full((2, 40, 30, 1), 255, np.uint8))
    assert prepared.shape == (2, 3, 16, 16)
    assert torch.allclose(prepared[0, :, 3, 3], torch.tensor([1.0, 0.5, 0.0]))
    raw = images(3)
    assert torch.equal(encoder.prepare(raw), encoder.prepare(torch.from_numpy(raw)))


def test_prepare_images_refuses_what_it_cannot_read() -> None:
    encoder = build("small_cnn")
    with pytest.raises(DataError, match="uint8 images"):
        encoder.prepare(np.zeros((2, 28, 28, 1), np.float32))
    with pytest.raises(DataError, match="have 3 channels and the encoder takes 1"):
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
    assert torch.equal(
        encoder.prepare(raw, np.random.default_rng(0)), encoder.prepare(raw, np.random.default_rng(0))
    )


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
    assert torch.allclose(
        encoder.set_weights(white, centre).embed(images(60, 6)).var(dim=0), torch.ones(5), atol=1e-3
    )
    with pytest.raises(ValueError, match="PCA to 40"):
        fit_pca(torch.zeros(50, 36), 40)
    with pytest.raises(DataError, match="has 784 numbers, encoder.in_dim is 36"):
        encoder.prepare(images(2))


def test_pixels_are_the_normalised_image() -> None:
    emb = build("pixels", mean=(0.0,), std=(1.0,)).embed(images(3))
    assert emb.shape == (3, 784)
    assert np.allclose(emb.numpy(), images(3).reshape(3, -1) / 255.0, atol=1e-6)


# --- library -----------------------------------------------------------------------------------------------


def test_byte_tokens() -> None:
    tokens = bytes_to_ids(["ab", "", "é" * 9], max_length=6)
    assert tokens["input_ids"].tolist() == [
        [1, 100, 101, 2, 0, 0], [1, 2, 0, 0, 0, 0], [1, 198, 172, 198, 172, 2],
    ]  # fmt: skip
    assert tokens["attention_mask"].sum(dim=1).tolist() == [4, 2, 6]


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("hf_image", {"architecture": "vit", "options": TINY_VIT, "image_size": 32}),
        ("hf_image", {"architecture": "convnext", "options": TINY_CONVNEXT, "image_size": 32}),
        ("hf_text", {"architecture": "bert", "options": TINY_BERT, "max_length": 16}),
    ],
)
def test_library_models_save_and_load_from_a_folder(
    kind: str, options: dict[str, Any], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    fresh = build_encoder({"kind": kind, **options})
    raw = raw_for(kind)
    fresh.model.save_pretrained(tmp_path / "model", safe_serialization=True)
    source = {k: v for k, v in options.items() if k in ("image_size", "max_length")}
    path = {"kind": kind, "path": "model", **source, **({"tokenizer": None} if kind == "hf_text" else {})}
    if kind == "hf_text":
        _save_tokenizer(tmp_path / "model")
    loaded = build_encoder(path, root=tmp_path)
    if kind == "hf_image":
        assert torch.allclose(loaded.embed(raw), fresh.embed(raw), atol=1e-5)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    config = loaded.portable(elsewhere)
    assert config.path is None and config.architecture == options["architecture"]
    rebuilt = build_encoder(type(config).model_validate_json(config.model_dump_json()), root=elsewhere)
    rebuilt.load_state_dict(loaded.state_dict())
    assert torch.allclose(rebuilt.embed(raw), loaded.embed(raw), atol=1e-6)


def _save_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"[PAD]": 0, "[UNK]": 1, "hello": 2, "world": 3}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(
        folder
    )


def test_library_pooling_frozen_and_unused_parameters() -> None:
    cls = build("hf_text", pooling="cls", frozen=True, dim=7)
    assert cls.dim == 7
    assert [n for n, p in cls.named_parameters() if p.requires_grad] == ["project.weight", "project.bias"]
    cls.train()
    assert not cls.model.training and cls.training
    free = build("hf_text")
    assert not any(p.requires_grad for n, p in free.named_parameters() if "pooler" in n), (
        "the pooler isn't used"
    )
    assert build("hf_image", pooling="cls").embed(images(2)).shape == (2, 10)
    with pytest.raises(JobError, match="class token"):
        build("hf_image", architecture="convnext", options=TINY_CONVNEXT, pooling="cls")


def test_library_errors_are_for_the_person(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(JobError, match="no folder .*nothing is downloaded"):
        build_encoder({"kind": "hf_image", "path": str(tmp_path / "missing")})
    with pytest.raises(JobError, match=r"lacks config.json and \*.safetensors"):
        build_encoder({"kind": "hf_image", "path": str(tmp_path)})
    (tmp_path / "config.json").write_text("{")
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(JobError, match="can't be loaded"):
        build_encoder({"kind": "hf_image", "path": str(tmp_path)})
    with pytest.raises(JobError, match="no tokenizer that can be read"):
        build_encoder({"kind": "hf_text", "architecture": "bert", "tokenizer": str(tmp_path)})
    with pytest.raises(JobError, match="knows no 'vitt'. Did you mean"):
        build_encoder({"kind": "hf_image", "architecture": "vitt"})
    with pytest.raises(
        JobError, match="encoder.options.hiden_size: not an option of vit. Did you mean 'hidden_size'"
    ):
        build_encoder({"kind": "hf_image", "architecture": "vit", "options": {"hiden_size": 3}})
    with pytest.raises(JobError, match="either path"):
        build_encoder({"kind": "hf_image"})
    with pytest.raises(JobError, match="options belong to architecture"):
        build_encoder({"kind": "hf_text", "path": "x", "options": {"hidden_size": 3}})
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(JobError, match="need the package transformers"):
        build("hf_image")


def test_importing_encoders_leaves_transformers_alone() -> None:
    code = "import sys, labelmill.encoders; assert not {'transformers', 'ray', 'sklearn'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
