"""Categorical features in one hashed, sharded table: the hash, the budgets, the exchange, and a whole job."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from rich.console import Console
from torch import Tensor

from labelmill.data.categorical import (
    Feature,
    FeatureSet,
    RowMap,
    check_same_rows,
    read_rows,
    split_budget,
    value_hashes,
)
from labelmill.data.labels import LabelSpec
from labelmill.data.manifest import FieldSpec
from labelmill.data.writer import ShardWriter
from labelmill.errors import DataError
from labelmill.execution import execute
from labelmill.heads.optim import SGD
from labelmill.heads.table import ShardedTable
from labelmill.host import Host
from labelmill.training.inprocess import fit_here
from labelmill.training.local import spawn
from workloads.extreme.unified_embedding import UnifiedJob, macro_f1, unified_embedding

ONE = Feature(name="one")


def test_used_rows_are_as_many_as_chance_says() -> None:
    """1000 tokens in 500 rows: 432.4677 used ones, and a token shares its row with probability 0.8646648."""
    tokens = [f"t{i}" for i in range(1000)]
    used, shared = [], []
    for salt in range(60):
        feature = Feature(name=f"f{salt}")
        places = RowMap(FeatureSet(features=(feature,)), 500).places(value_hashes(tokens, feature), feature, 0)
        count = np.bincount(places, minlength=500)
        used.append((count > 0).sum())
        shared.append((count[places] > 1).mean())
    assert np.mean(used) == pytest.approx(432.4677, abs=3 * np.std(used) / math.sqrt(60))
    assert np.mean(shared) == pytest.approx(0.8646648, abs=3 * np.std(shared) / math.sqrt(60))


def test_colliders_within_a_feature_by_budget() -> None:
    """900 and 100 values in 500 rows: (1.798, 0.198) others a token when multiplexed, (1.998, 1.98) with split tables."""
    features = FeatureSet(features=(Feature(name="a"), Feature(name="b")))
    values = {"a": [f"a{i}" for i in range(900)], "b": [f"b{i}" for i in range(100)]}
    both = {}
    for sharing in ("multiplexed", "separate"):
        table = RowMap(features, 500, sharing, {"a": 900, "b": 100})
        both[sharing] = []
        for feature in features.features:
            places = table.places(value_hashes(values[feature.name], feature), feature, 0)
            assert places.max() < 500
            both[sharing].append(float((np.bincount(places, minlength=500)[places] - 1).mean()))
    assert both["multiplexed"] == pytest.approx([1.798, 0.198], abs=0.35)
    assert both["separate"] == pytest.approx([1.998, 1.98], abs=0.6)
    assert split_budget(features, 500, {"a": 900, "b": 100}) == {"a": (0, 450), "b": (450, 50)}


def test_rows_are_the_same_in_every_process_and_stay_when_features_are_added() -> None:
    feature = Feature(name="x", chunks=2)
    more = RowMap(FeatureSet(features=(feature, Feature(name="y"))), 1000)
    here = more.look_up({"x": ["ä", None, ""], "y": ["ä"] * 3})
    assert here["x"].ravel().tolist() == [65, 349, 252, 668, 619, 360], "found once in another process; never to change"
    assert len(set(here["x"][:, 0, 0])) == 3, "null and the empty string are two values"
    many = [f"v{i}" for i in range(20_000)]
    rows = more.look_up({"x": many, "y": many})
    equal = (rows["x"][:, 0] == rows["x"][:, 1]).mean(), (rows["x"][:, 0, 0] == rows["y"][:, 0, 0]).mean()
    assert equal == pytest.approx((0.001, 0.001), abs=0.0008), "chunks and features hash independently"
    trick = RowMap(FeatureSet(features=(ONE, Feature(name="two"))), 1000, "hashing_trick")
    found = trick.look_up({"one": ["a"], "two": ["a"]})
    assert found["one"].tolist() == found["two"].tolist()


def test_lists_are_padded_and_unknown_values_have_rows() -> None:
    tags = Feature(name="tags", many=True, chunks=3, most=2)
    number = Feature(name="id", dtype="integer")
    features = FeatureSet(features=(tags, number))
    found = RowMap(features, 50).look_up({"tags": [["a", "b", "c"], [], ["a"]], "id": [7, "07", 7.0]})
    assert found["tags"].shape == (3, 3, 2)
    assert (found["tags"][1] == -1).all()
    assert found["tags"][2, :, 0].tolist() == found["tags"][0, :, 0].tolist()
    assert len(set(found["id"].ravel())) == 1, "7 and '07' are one integer"
    known = {"tags": np.sort(value_hashes(["a", "b"], tags)), "id": np.sort(value_hashes([7], number))}
    exact = RowMap(features, 0, "collisionless", values=known)
    assert exact.rows == 3 * 3 + 2
    rows = exact.look_up({"tags": [["a", "b"], ["new", "newer"]], "id": [7, 8]})
    assert len(set(rows["tags"][0].ravel())) == 6
    assert len(set(rows["tags"][1].ravel())) == 3, "all unknown values share a row"


def test_bad_input() -> None:
    features = FeatureSet(features=(ONE,))
    with pytest.raises(DataError, match=r"feature 'one' is missing from a sample that has \['two'\]"):
        read_rows(['{"two": 1}'], features)
    with pytest.raises(DataError, match=r"is a real number\. Bucketise it first"):
        RowMap(features, 9).look_up({"one": [0.5]})
    with pytest.raises(ValidationError, match="feature 'one' is there twice"):
        FeatureSet(features=(ONE, ONE))
    with pytest.raises(ValidationError, match="greater than or equal to 1"):
        Feature(name="x", chunks=0)
    with pytest.raises(DataError, match="at least 2 rows, not 1"):
        RowMap(features, 1)
    with pytest.raises(DataError, match="'x' is no integer"):
        value_hashes(["x"], Feature(name="n", dtype="integer"))
    other = FeatureSet(features=(Feature(name="one", chunks=2),))
    with pytest.raises(DataError, match="belongs to other features: features: saved"):
        check_same_rows(features.digest(), other.digest())
    table = ShardedTable(10, 3)
    with pytest.raises(IndexError, match="from 0 to 9"):
        table.look_up(torch.tensor([10]))


def test_contributions_to_a_shared_row() -> None:
    """One example of a feature with label 1, two of another with label 0, in one zero row: sum of (p - y) theta."""
    for second, expected in (([0.0, 1.0], [-0.5, 1.0]), ([1.0, 0.0], [0.5, 0.0])):
        table = ShardedTable(4, 2, SGD(momentum=0.0), init_std=1e-30, dtype=torch.float64)
        found = table.look_up(torch.tensor([1, 1, 1]))
        theta = torch.tensor([[1.0, 0.0], second, second], dtype=torch.float64)
        logits, y = (found * theta).sum(1), torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
        torch.nn.functional.binary_cross_entropy_with_logits(logits, y, reduction="sum").backward()
        ids, grad = table.pending_rows()
        assert ids.tolist() == [1]
        assert grad[0].tolist() == pytest.approx(expected, abs=1e-9)


def table_steps(rank: int, world: int) -> Tensor:
    table = ShardedTable(700, 5, SGD(momentum=0.0), lr_multiplier=2.0, seed=4, dtype=torch.float64)
    for step in range(3):
        noise = torch.Generator().manual_seed(step)
        rows, weight = torch.randint(700, (12, 8), generator=noise), torch.randn(5, generator=noise)
        mine = rows[rank * 12 // world : (rank + 1) * 12 // world]
        loss = (table.look_up(mine.flatten()) @ weight.double()).view(len(mine), -1).pow(2).sum(1).mean()
        loss.backward()
        table.step(0.1)
    return table.state_tensors()["rows"]


def test_the_sharded_table_is_a_dense_one() -> None:
    first = ShardedTable(700, 5, seed=4, dtype=torch.float64).w_CD.clone()
    for step in range(3):
        noise = torch.Generator().manual_seed(step)
        rows, weight = torch.randint(700, (12, 8), generator=noise), torch.randn(5, generator=noise)
        first.requires_grad_()
        (first[rows.flatten()] @ weight.double()).view(12, -1).pow(2).sum(1).mean().backward()
        first = (first - 0.2 * first.grad).detach()
    torch.testing.assert_close(table_steps(0, 1), first)
    torch.testing.assert_close(torch.cat(spawn(table_steps, 2)), first)


def write_rows(folder: Path, count: int, seed: int) -> str:
    """The class follows from two of three columns."""
    rng = np.random.default_rng(seed)
    label = LabelSpec(form="single", num_classes=4)
    with ShardWriter(folder, "t", {"row": FieldSpec(kind="text", ext="json")}, label, layout="packed") as writer:
        for i in range(count):
            colour, shape = int(rng.integers(30)), int(rng.integers(30))
            row = {"colour": f"c{colour}", "parts": [f"p{shape}", "p0"], "noise": int(rng.integers(50))}
            writer.write(f"s{seed}-{i}", {"row": json.dumps(row)}, {"label": colour % 2 + 2 * (shape % 2)})
        return writer.close().root


def test_a_job_compares_ways_of_sharing(tmp_path: Path) -> None:
    raw: dict[str, Any] = {
        "workload": "extreme.unified_embedding",
        "name": "u",
        "output": str(tmp_path / "runs"),
        "data": {"train": write_rows(tmp_path / "a", 1500, 1), "test": write_rows(tmp_path / "b", 300, 2)},
        "features": [
            {"name": "colour", "chunks": 2},
            {"name": "parts", "many": True},
            {"name": "noise", "dtype": "integer"},
        ],
        "table": {"budget": 0.5, "dim": 8},
        "compare": ["separate", "collisionless"],
        "train": {"global_batch": 50, "steps": 200, "learning_rate": 0.01},
    }
    job = UnifiedJob.model_validate(raw)
    console = Console(file=io.StringIO())
    report = execute(job, unified_embedding.run, host=Host(tmp_path / "runs" / "u", fit=fit_here), console=console)
    assert report.metrics["test/collisionless/accuracy"] > 0.95
    assert report.metrics["test/accuracy"] > 0.6
    assert [row[0] for row in report.tables["tables"].rows] == ["multiplexed", "separate", "collisionless"]
    with pytest.raises(ValidationError, match="exactly one of"):
        UnifiedJob.model_validate(raw | {"table": {"rows": 5, "budget": 0.5}})
    assert macro_f1(np.array([0, 0, 1]), np.array([0, 1, 1]), 3) == pytest.approx(2 / 3)
