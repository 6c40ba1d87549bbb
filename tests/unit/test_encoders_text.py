"""The character encoder, its hashes, and the augmentation of strings and images."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError

from labelmill.encoders import CharNgrams, build_encoder, sample_keys
from labelmill.encoders.augment import ImageAugment, Typos, apply_typos, augment_images, code_points
from labelmill.encoders.hashing import SampleRandom, mix64
from labelmill.encoders.text import sum_rows

torch.set_num_threads(1)


def build(seed: int = 0, **options: Any) -> CharNgrams:
    torch.manual_seed(seed)
    encoder = build_encoder(
        {"kind": "char_ngrams", "dim": 16, "buckets": 500, "hidden": 8, "placed": (1, 2), **options}
    )
    assert isinstance(encoder, CharNgrams)
    return encoder


def images(count: int, size: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 1), dtype=np.uint8)


def test_hash_golden_values() -> None:
    # SplitMix64 finaliser of 1, and bucket ids: a change here makes every saved table useless
    assert int(mix64(np.array([1], dtype=np.uint64))[0]) == 0x5692161D100B05E5
    encoder = build(buckets=65536)
    ids = encoder.prepare(["typo", "ß你"])
    assert ids.shape == (2, 10, 6)
    assert ids.dtype == torch.int32
    assert ids[0, 0].tolist() == [23965, 14393, 12761, 14910, 30158, 60735]
    assert ids[1, 9].tolist() == [40065, 7590, 47213, 0, 0, 0]
    assert int(ids.long().sum()) == 2493312


def test_hashes_are_the_same_in_another_process() -> None:
    code = (
        "from labelmill.encoders import build_encoder\n"
        "e = build_encoder({'kind': 'char_ngrams', 'placed': (1, 2), 'buckets': 500})\n"
        "print(e.prepare(['hello', 'straße']).long().sum().item())"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(out.stdout) == int(build().prepare(["hello", "straße"]).long().sum())


def families_of(word: str, **options: Any) -> dict[str, list[int]]:
    encoder = build(buckets=1_000_003, **options)
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
    assert len(set(word["tail1"]) & set(longer["tail1"])) == 7, "counted from the end, an insertion moves nothing"
    assert len(set(word["head1"]) & set(longer["head1"])) < 4
    end = families_of("straßen")
    assert len(set(word["head1"]) & set(end["head1"])) == 7


@pytest.mark.parametrize("typo", ["helo", "helllo", "hallo", "hlelo", "hell", "xhello"])
def test_one_edit_leaves_a_shared_deletion(typo: str) -> None:
    assert set(families_of("hello")["deletion"]) & set(families_of(typo)["deletion"])
    assert not set(families_of("hello")["deletion"]) & set(families_of("goodbye")["deletion"])


def test_short_empty_missing_and_long_strings() -> None:
    encoder = build(max_length=6)
    ids = encoder.prepare(["", None, "a", "abcdef", "abcdefgh"])
    assert torch.equal(ids[0], ids[1])
    assert torch.equal(ids[3], ids[4]), "letters beyond max_length are ignored"
    assert bool(torch.isfinite(encoder(ids)).all())
    assert encoder.prepare([]).shape[0] == 0
    lower = build(lowercase=True)
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
    encoder = build(dim=128, buckets=65536)
    typos = apply_typos(words, np.random.default_rng(0))
    cos = F.normalize(encoder.embed(typos)) @ F.normalize(encoder.embed(words)).T
    assert cos.argmax(dim=1).tolist() == list(range(6))


# --- augmentation --------------------------------------------------------------------------------


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
    assert max(distances) <= 3
    assert 0.15 < np.mean(np.array(distances) == 0) < 0.25
    assert all(apply_typos(["", "q"] * 50, np.random.default_rng(1)))
    assert apply_typos([], np.random.default_rng(0)) == []


def test_typos_depend_on_the_sample_not_on_the_batch() -> None:
    words = ["hello", "world", "typo", "augmentation"]
    keys = sample_keys(7, 0, np.arange(4))
    whole = apply_typos(words, keys)
    assert whole == apply_typos(words[:1], keys[:1]) + apply_typos(words[1:], keys[1:])
    assert whole != apply_typos(words, sample_keys(7, 1, np.arange(4)))
    encoder = build(typos={"edits": (0.0, 1.0)})
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
    assert u.shape == (4000, 5)
    assert u.min() >= 0
    assert u.max() < 1
    assert u.mean() == pytest.approx(0.5, abs=0.01)
    assert z.std() == pytest.approx(1.0, abs=0.02)
    assert abs(np.corrcoef(u.T) - np.eye(5)).max() < 0.06
    assert sorted(set(random.integers(2, 3).tolist())) == [0, 1, 2]
    assert np.array_equal(sample_keys(1, 2, np.arange(5))[3:], sample_keys(1, 2, np.array([3, 4])))
    assert len(set(sample_keys(-1, 0, np.arange(1000)).tolist())) == 1000


def test_code_points_of_ragged_strings() -> None:
    codes, lengths = code_points(["ab", "", None, "你𝒳c"])
    assert lengths.tolist() == [2, 0, 0, 3]
    assert codes.tolist() == [[97, 98, 0], [0, 0, 0], [0, 0, 0], [0x4F60, 0x1D4B3, 99]]
    cut, lengths = code_points(["abcd", "x", "efg"], 2)
    assert cut.tolist() == [[97, 98], [120, 0], [101, 102]]
    assert lengths.tolist() == [2, 1, 2]


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
    assert holes.max() == 25
    assert holes.min() >= 1
    everything = ImageAugment(shift=2, flip=0.5, cutout=3, noise=0.1)
    whole = augment_images(raw, everything, keys)
    assert np.array_equal(whole[10:20], augment_images(raw[10:20], everything, keys[10:20]))
    noisy = augment_images(np.full((64, 12, 12, 1), 100, np.uint8), ImageAugment(noise=0.1), keys)
    assert noisy.std() == pytest.approx(25.5, rel=0.05)
