"""Deletion requests: resolved exactly, bad ones named, provable without the ids."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from labelmill.data.config import StreamConfig
from labelmill.data.deletion import (
    REQUEST,
    ClassesRequest,
    Condition,
    IdsRequest,
    WhereRequest,
    contains,
    request_digest,
    resolve,
    unlabelled,
)
from labelmill.data.manifest import Manifest
from labelmill.data.shards import read_shard
from labelmill.data.source import LocalSource
from labelmill.data.stream import RankStream
from labelmill.errors import DataError

Make = Callable[..., Manifest]


def ids_file(folder: Path, *keys: str) -> str:
    (folder / "ids.txt").write_text("\n".join(keys) + "\n")
    return str(folder / "ids.txt")


def test_ids_become_two_masks_that_are_all_samples(make_text_data: Make, tmp_path: Path) -> None:
    data = make_text_data(40, 15)
    found = resolve(IdsRequest(file=ids_file(tmp_path, "s00003", "s00017", "s00039")), data)
    assert found.forget.samples == 3
    assert found.retain.samples == 37
    for i in range(len(data.shards)):
        assert np.array_equal(found.forget.mask(i), ~found.retain.mask(i))
    assert found.keys(data) == ["s00003", "s00017", "s00039"]
    assert found.classes == ()


def test_conditions_over_keys_labels_and_text_fields(make_text_data: Make) -> None:
    data = make_text_data(40, 15, classes=4)

    def keys(*conditions: dict[str, Any]) -> list[str]:
        return resolve(WhereRequest(all=tuple(Condition(**c) for c in conditions)), data).keys(data)

    assert keys({"field": "key", "glob": "s0001?"}) == [f"s0001{i}" for i in range(10)]
    assert keys({"field": "key", "regex": "[12]7$"}) == ["s00017", "s00027"]
    assert keys({"field": "text", "equals": "word-5"}) == ["s00005"]
    both = {"field": "text", "contains": "word-3"}, {"field": "label", "any_of": [3]}
    assert keys(*both) == ["s00003", "s00031", "s00035", "s00039"]
    with pytest.raises(DataError, match=r"'texx' can't be asked about. Did you mean 'text'"):
        keys({"field": "texx", "equals": "a"})
    with pytest.raises(DataError, match="no pattern"):
        keys({"field": "key", "regex": "("})
    with pytest.raises(DataError, match="keeps none"):
        keys({"field": "key", "equals": "nobody"})


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        ({"field": "key"}, "0 are given"),
        ({"field": "key", "equals": "a", "glob": "b"}, "2 are given"),
        ({"field": "label", "glob": "3"}, "equals or any_of"),
        ({"field": "label", "equals": "3"}, "whole numbers"),
        ({"field": "key", "any_of": [3]}, "texts"),
    ],
)
def test_conditions_that_make_no_sense(condition: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Condition(**condition)


def test_a_class_and_what_is_gone_with_it(make_text_data: Make, tmp_path: Path) -> None:
    data = make_text_data(42, 15)
    found = resolve(ClassesRequest(ids=(2,)), data)
    assert found.forget.samples == 6
    assert found.classes == (2,)
    every_second = [f"s{i:05d}" for i in range(2, 42, 7)]
    assert resolve(IdsRequest(file=ids_file(tmp_path, *every_second)), data).classes == (2,)
    with pytest.raises(DataError, match="no class 9"):
        resolve(ClassesRequest(ids=(9,)), data)
    with pytest.raises(DataError, match="class 1 is listed twice"):
        resolve(ClassesRequest(ids=(1, 1)), data)


def test_classes_by_name(make_text_data: Make, tmp_path: Path) -> None:
    data = make_text_data(12, 5, classes=3, named=("ant", "bee", "3"))
    found = resolve(ClassesRequest(ids=("3", 0)), data)
    assert found.classes == (0, 2)
    found.save(tmp_path, data)
    assert json.loads((tmp_path / REQUEST).read_text())["classes"] == [2, 0]
    with pytest.raises(DataError, match=r"no class 'bea'. Did you mean 'bee'"):
        resolve(ClassesRequest(ids=("bea",)), data)
    with pytest.raises(DataError, match="class 0 is listed twice"):
        resolve(ClassesRequest(ids=("ant", 0)), data)


def test_bad_requests_are_refused_by_name(make_text_data: Make, tmp_path: Path) -> None:
    data = make_text_data(10, 5)

    def ask(*keys: str) -> None:
        resolve(IdsRequest(file=ids_file(tmp_path, *keys)), data)

    with pytest.raises(DataError, match=r"ids\.txt: .* 6 key\(s\) aren't in it: 'x0', 'x1', 'x2', 'x3', 'x4', \.\.\."):
        ask("s00001", *(f"x{i}" for i in range(6)))
    with pytest.raises(DataError, match="'s00001' occurs 2 times"):
        ask("s00001", "s00001")
    with pytest.raises(DataError, match="holds no id"):
        ask("")
    with pytest.raises(DataError, match="all 10 samples"):
        ask(*(f"s{i:05d}" for i in range(10)))
    with pytest.raises(DataError, match="all 10 samples"):
        resolve(ClassesRequest(ids=tuple(range(7))), data)


def test_the_kept_request_proves_the_deletion_and_keeps_no_id(make_text_data: Make, tmp_path: Path) -> None:
    data = make_text_data(40, 15)
    found = resolve(IdsRequest(file=ids_file(tmp_path, "s00003", "s00017")), data)
    folder = tmp_path / "kept"
    digest = found.save(folder, data)
    assert request_digest(folder) == digest == found.save(folder, data), "the same request, the same digest"
    assert contains(folder, ["s00003", "s00004", "s00017"], digest) == {
        "s00003": True,
        "s00004": False,
        "s00017": True,
    }
    for path in folder.iterdir():
        assert b"s000" not in path.read_bytes()
        assert b"ids.txt" not in path.read_bytes()
    assert found.save(tmp_path / "other", data) != digest, "another salt: requests can't be compared by their hashes"
    with pytest.raises(DataError, match="not 0000"):
        contains(folder, ["s00003"], "0000")
    content = json.loads((folder / "request.json").read_text())
    (folder / "request.json").write_text(json.dumps(content | {"samples": 3}))
    with pytest.raises(DataError, match="not the hashes"):
        request_digest(folder)


@pytest.mark.parametrize("overlay", [False, True])
def test_labels_are_not_in_the_stream_of_an_unlabelled_set(make_text_data: Make, tmp_path: Path, overlay: bool) -> None:
    from labelmill.data.noise import SymmetricNoise, write_noisy_version

    data = make_text_data(40, 15)
    if overlay:
        data = write_noisy_version(data, tmp_path / "noisy", SymmetricNoise(rate=0.5))
    bare = unlabelled(data)
    assert bare.digest != data.digest
    assert read_shard(bare, 0).column_names == ["key", "text"]
    spec = StreamConfig().stream(bare, "text", 8)
    batch = next(iter(RankStream(spec, LocalSource(spec, 0, 1), 0, 1, lambda raw, labels, rng: raw)))
    assert batch.labels.form == "none"
    assert batch.labels.ids_BP.shape == (8, 0)
    assert not batch.columns
    forget = resolve(ClassesRequest(ids=(2,)), data).forget
    from dataclasses import replace

    spec = replace(spec, selection=forget)
    assert spec.epoch_samples == forget.samples, "a mask made with labels fits the stream without"
