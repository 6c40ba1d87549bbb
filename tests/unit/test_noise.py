"""Noise on purpose, corrections and folds: exact shares, lineage, and clean labels that no stream can give to a loss."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import TypeAdapter, ValidationError

from labelmill.data import corrections
from labelmill.data.config import StreamConfig
from labelmill.data.folds import fold_of, make_folds
from labelmill.data.manifest import Manifest, load_manifest
from labelmill.data.noise import (
    AsymmetricNoise,
    FrequencyNoise,
    InstanceNoise,
    NoiseConfig,
    SymmetricNoise,
    long_tail_counts,
    read_clean_labels,
    write_noisy_version,
)
from labelmill.data.shards import read_labels, read_shard
from labelmill.data.source import LocalSource
from labelmill.data.stream import RankStream
from labelmill.errors import DataError
from labelmill.evaluation.noise_rates import transition_matrix

Make = Callable[..., Manifest]
KEYS = [f"k{i}" for i in range(3000)]
LABELS = np.random.default_rng(0).choice(5, 3000, p=[0.4, 0.3, 0.15, 0.1, 0.05])


def labels_of(manifest: Manifest) -> dict[str, Any]:
    tables = [read_labels(manifest, i) for i in range(len(manifest.shards))]
    return {k: v for t in tables for k, v in zip(t["key"].to_pylist(), t["label"].to_pylist(), strict=True)}


# --- injectors ---


def test_symmetric_noise_changes_an_exact_share_of_each_class_to_all_others() -> None:
    noisy = SymmetricNoise(rate=0.4).apply(LABELS, KEYS, 5)
    for c in range(5):
        rows = c == LABELS
        assert (noisy[rows] != c).sum() == int(0.4 * rows.sum() + 1e-9)
    t = transition_matrix(LABELS, noisy, 5)
    off = t[~np.eye(5, dtype=bool)]
    assert off.min() > 0.03
    assert off.max() < 0.2


def test_noise_depends_on_key_and_seed_not_on_the_order() -> None:
    order = np.random.default_rng(1).permutation(len(KEYS))
    x = np.random.default_rng(2).normal(size=(len(KEYS), 4))
    for noise in (
        SymmetricNoise(rate=0.3),
        AsymmetricNoise(rate=0.3, map={0: 1, 1: 2}),
        FrequencyNoise(rate=0.3),
        InstanceNoise(rate=0.3),
    ):
        noisy = noise.apply(LABELS, KEYS, 5, x)
        again = noise.apply(LABELS[order], [KEYS[i] for i in order], 5, x[order])
        np.testing.assert_array_equal(noisy[order], again)
        other = noise.model_copy(update={"seed": 1}).apply(LABELS, KEYS, 5, x)
        assert (other != noisy).any()


def test_asymmetric_noise_goes_where_the_map_says() -> None:
    noisy = AsymmetricNoise(rate=0.3, map={0: 1, 1: 0, 3: 4}).apply(LABELS, KEYS, 5)
    changed = noisy != LABELS
    assert set(zip(LABELS[changed].tolist(), noisy[changed].tolist(), strict=True)) == {(0, 1), (1, 0), (3, 4)}
    for c in (0, 1, 3):
        assert (changed & (c == LABELS)).sum() == int(0.3 * (c == LABELS).sum() + 1e-9)


def test_frequency_noise_has_the_papers_matrix() -> None:
    t = FrequencyNoise(rate=0.4).matrix(np.array([100, 10, 1]))
    want = [[0.6, 0.363636, 0.036364], [0.396040, 0.6, 0.003960], [0.363636, 0.036364, 0.6]]
    np.testing.assert_allclose(t, want, atol=1e-6)
    np.testing.assert_allclose(np.array([100, 10, 1]) @ t, [64.324032, 42.4, 4.275968], atol=1e-5)
    noisy = FrequencyNoise(rate=0.4).apply(LABELS, KEYS, 5)
    found = transition_matrix(LABELS, noisy, 5)
    np.testing.assert_allclose(found, FrequencyNoise(rate=0.4).matrix(np.bincount(LABELS)), atol=0.09)


def test_instance_noise_has_the_rate_and_follows_the_features() -> None:
    x = np.random.default_rng(3).normal(size=(3000, 2))
    noise = InstanceNoise(rate=0.3, spread=0.1)
    noisy = noise.apply(LABELS, KEYS, 5, x)
    changed = noisy != LABELS
    assert changed.mean() == pytest.approx(0.3, abs=0.03)
    rows = changed & (LABELS == 0)
    # targets of one class differ in where their features lie
    centres = np.stack([x[rows & (noisy == j)].mean(0) for j in range(1, 5)])
    assert np.ptp(centres, axis=0).max() > 0.5
    with pytest.raises(DataError, match="needs the features"):
        noise.apply(LABELS, KEYS, 5)


def test_a_long_tail() -> None:
    assert long_tail_counts(10, 1000, 100).tolist() == [1000, 599, 359, 215, 129, 77, 46, 27, 16, 10]


def test_noise_sections_are_checked() -> None:
    read = TypeAdapter(NoiseConfig).validate_python
    assert read({"kind": "asymmetric", "rate": 0.2, "map": {"0": 1}}).map == {0: 1}
    with pytest.raises(ValidationError, match="mapped to itself"):
        read({"kind": "asymmetric", "rate": 0.2, "map": {1: 1}})
    with pytest.raises(ValidationError, match="less than 1"):
        read({"kind": "symmetric", "rate": 1.0})
    with pytest.raises(DataError, match="no class 9"):
        AsymmetricNoise(rate=0.2, map={0: 9}).apply(LABELS, KEYS, 5)


# --- versions ---


def test_a_noisy_version_keeps_clean_labels_where_no_stream_reads(make_text_data: Make, tmp_path: Path) -> None:
    clean = make_text_data(140, 40)
    noisy = write_noisy_version(clean, tmp_path / "noisy", SymmetricNoise(rate=0.5))
    assert noisy.parents == (clean.digest,)
    assert noisy.digest != clean.digest
    assert load_manifest(tmp_path / "noisy").created_by["changed"] == "70"
    now, before = labels_of(noisy), labels_of(clean)
    assert read_clean_labels(noisy) == before
    assert sum(now[k] != before[k] for k in now) == 70
    assert labels_of(clean) == before, "the old version is as it was"

    spec = StreamConfig().stream(noisy, "text", 20)
    batches = list(RankStream(spec, LocalSource(spec, 0, 1), 0, 1, lambda raw, labels, rng: raw))
    given = {k: int(y) for b in batches for k, y in zip(b.keys, b.labels.single_B, strict=True)}
    assert given == now, "what a loss gets are the noisy labels"
    assert all(b.columns == {} for b in batches), "and nothing beside them"
    with pytest.raises(DataError, match="doesn't keep clean labels"):
        read_clean_labels(clean)
    again = write_noisy_version(clean, tmp_path / "noisy", SymmetricNoise(rate=0.5), overwrite=True)
    assert again.digest == noisy.digest
    with open(tmp_path / "noisy" / "clean-labels.arrow", "ab") as file:
        file.write(b"x")
    with pytest.raises(DataError, match="changed since they were written"):
        read_clean_labels(noisy)
    (tmp_path / "noisy" / "clean-labels.arrow").unlink()
    with pytest.raises(DataError, match="copy this file as well"):
        read_clean_labels(noisy)


def test_relabel_weight_and_drop_make_new_versions(make_text_data: Make, tmp_path: Path) -> None:
    data = make_text_data(60, 25)
    before = labels_of(data)
    fixed = corrections.relabel(data, tmp_path / "fixed", {"s00003": 0, "s00059": 6}, {"by": "test"})
    assert fixed.parents == (data.digest,)
    assert fixed.created_by == {"action": "relabel", "samples": "2", "by": "test"}
    assert labels_of(fixed) == before | {"s00003": 0, "s00059": 6}
    weighted = corrections.weight(fixed, tmp_path / "weighted", {"s00004": 0.25})
    assert weighted.label.form == "soft"
    table = read_labels(weighted, 0)
    assert table["label"].to_pylist()[4] == [before["s00004"]]
    assert table["label_weight"].to_pylist()[3:5] == [[1.0], [0.25]]
    fewer = corrections.drop(fixed, tmp_path / "fewer", [f"s{i:05d}" for i in range(20, 55)])
    assert fewer.parents == (fixed.digest,)
    assert sorted(labels_of(fewer)) == [f"s{i:05d}" for i in (*range(20), *range(55, 60))]
    assert labels_of(fewer)["s00059"] == 6, "labels of the overlay go along"
    texts = [t for i in range(len(fewer.shards)) for t in read_shard(fewer, i)["text"].to_pylist()]
    assert texts[-1] == "word-59"
    assert load_manifest(tmp_path / "fewer").digest == fewer.digest


def test_bad_corrections_leave_nothing_behind(make_text_data: Make, tmp_path: Path) -> None:
    data = make_text_data(30, 10)
    for number, act in enumerate(
        (
            lambda out: corrections.relabel(data, out, {"nobody": 1}),
            lambda out: corrections.drop(data, out, ["nobody"]),
            lambda out: corrections.weight(data, out, {"nobody": 0.5}),
        )
    ):
        with pytest.raises(DataError, match=r"1 key\(s\) aren't in it: 'nobody'"):
            act(tmp_path / f"bad{number}")
        assert not (tmp_path / f"bad{number}").exists()
    with pytest.raises(DataError, match=r"must lie in \(0, 1\]"):
        corrections.weight(data, tmp_path / "bad", {"s00001": 0.0})
    with pytest.raises(DataError, match="out of range"):
        corrections.relabel(data, tmp_path / "bad", {"s00001": 7})


# --- folds ---


def test_folds_part_the_samples_by_key(make_text_data: Make) -> None:
    data = make_text_data(200, 60)
    folds, warnings = make_folds(data, 4)
    assert not warnings
    masks = np.stack([np.concatenate([f.held_out.mask(i) for i in range(len(data.shards))]) for f in folds])
    assert (masks.sum(0) == 1).all(), "each sample is predicted once"
    assert all(f.train.samples + f.held_out.samples == 200 for f in folds)
    assert min(f.held_out.samples for f in folds) > 30
    keys = [k for i in range(len(data.shards)) for k in read_labels(data, i)["key"].to_pylist()]
    np.testing.assert_array_equal(masks.argmax(0), fold_of(keys, 4))
    np.testing.assert_array_equal(fold_of(keys[5:9], 4), fold_of(keys, 4)[5:9])


def test_folds_name_what_is_too_small(make_text_data: Make) -> None:
    with pytest.raises(DataError, match="at least 2"):
        make_folds(make_text_data(20, 10), 1)
    with pytest.raises(DataError, match=r"class \d+ lie in fold \d+"):
        make_folds(make_text_data(8, 8, classes=8, name="single"), 2)
    _, warnings = make_folds(make_text_data(24, 12, classes=6, name="few"), 5)
    assert "fewer samples than folds" in warnings[0]
