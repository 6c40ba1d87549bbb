"""The family's objectives in the engine: two ranks under ZeRO are one, with accumulation and clipping, and after a resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.numpy import save_file
from torch import Tensor

from labelmill.data.categorical import Feature, FeatureSet, value_hashes
from labelmill.data.extreme import label_lists, write_multi_label
from labelmill.data.labels import Labels, LabelSpec
from labelmill.data.manifest import load_manifest
from labelmill.data.stream import Batch
from labelmill.encoders import CharNgramsConfig
from labelmill.heads.factored import FactoredConfig
from labelmill.losses.retrieval import DecoupledSection, SoftTopKSection
from labelmill.losses.spherical import ZLoss
from labelmill.training.checkpoint import Position, latest_checkpoint, read_dense, restore, save_checkpoint
from labelmill.training.config import TrainConfig
from labelmill.training.engine import Engine, load_dense
from labelmill.training.local import spawn
from labelmill.training.objective import Objective
from workloads.extreme.spherical import RowClassifier
from workloads.extreme.towers import DualEncoder, FullNegatives, MinedNegatives
from workloads.extreme.unified import NetworkSection, TableClassifier, TableSection

# two families: the gain of a single one has no gradient under a cosine, and AdamW would follow its rounding
ENCODER = CharNgramsConfig(dim=8, buckets=128, hidden=8, orders=(2, 3), placed=(), gaps=(), deletions=False)
LABELS = 40
FEATURES = FeatureSet(features=(Feature(name="a", chunks=2), Feature(name="b", many=True)))
KINDS = {"full": "text", "topk": "text", "mined": "text", "factored": "text", "table": "row"}


def build(kind: str, root: str) -> Objective:
    torch.manual_seed(0)
    if kind == "factored":
        head = FactoredConfig(loss=ZLoss(b=2), lr_multiplier=50, init_std=0.1, stabilise_every=2)
        return RowClassifier(ENCODER, head, LABELS, 3, bias=0.1)
    if kind == "table":
        table = TableSection(rows=60, dim=4)
        return TableClassifier(
            FEATURES, table, NetworkSection(hidden=(8,)), Path(root) / "values.safetensors", LABELS, 3
        )
    data = load_manifest(root)
    if kind == "topk":
        return DualEncoder(ENCODER, SoftTopKSection(k=2), FullNegatives(chunk=6), data)
    negatives: Any = FullNegatives(chunk=6) if kind == "full" else MinedNegatives(start=2, every=3, top=8)
    return DualEncoder(ENCODER, DecoupledSection(), negatives, data)


def make_batch(model: Objective, kind: str, step: int, rank: int, world: int) -> Batch:
    """Rank's slice of 8 samples that depend on the step only."""
    rng = np.random.default_rng(step)
    ids = torch.from_numpy(rng.integers(LABELS, size=(8, 1)))
    if KINDS[kind] == "row":
        raw = [json.dumps({"a": f"v{i % 9}", "b": [f"w{i % 5}", "x"]}) for i in ids[:, 0].tolist()]
    else:
        raw = [f"label {i} q{rng.integers(9)}" for i in ids[:, 0].tolist()]
    part = slice(rank * 8 // world, (rank + 1) * 8 // world)
    keys = (np.arange(8) + 8 * step).astype(np.uint64)[part]
    labels = Labels("single", ids[part])
    n = len(labels)
    inputs = model.prepare(raw[part], labels, keys)
    return Batch([str(k) for k in keys], inputs, labels, torch.ones(n), torch.arange(n))


def run(kind: str, root: str, rank: int, world: int, stage: int, folder: str, steps: int = 5) -> list[Tensor]:
    accumulation = 1 if kind == "mined" else 2
    config = TrainConfig(
        global_batch=8 * accumulation,
        steps=5,
        accumulation=accumulation,
        learning_rate=0.01,
        zero_stage=stage,
        max_grad_norm=0.5,
    )
    model = build(kind, root)
    found = latest_checkpoint(Path(folder)) if folder else None
    if found:
        load_dense(model, read_dense(found))
    engine, start = Engine(model, config, torch.device("cpu")), Position(0, 0, "x")
    if found:
        start = restore(found, engine, model)
    losses = []
    for step in range(start.step, steps):
        engine.begin(0.01)
        for micro in range(accumulation):
            value = engine.forward(make_batch(model, kind, step * accumulation + micro, rank, world))
            losses.append(value.total.detach())
            engine.backward(value)
            engine.step(0.01)
    if folder and not found:
        save_checkpoint(Path(folder), engine, Position(steps, 0, "x"), keep=2)
    state = engine.dense_state()
    loss_S = torch.stack(losses)
    if kind == "table":  # a loss made on the rank alone
        torch.distributed.all_reduce(loss_S)
        loss_S /= world
    return [loss_S, *(state[name] for name in sorted(state))]


def everything(rank: int, world: int, root: str, stage: int) -> dict[str, list[Tensor]]:
    return {kind: run(kind, root, rank, world, stage, "") for kind in KINDS}


def and_resumed(rank: int, world: int, root: str, folder: str) -> list[dict[str, list[Tensor]]]:
    for kind in KINDS:
        run(kind, root, rank, world, 1, f"{folder}/{kind}", steps=3)
    again = {kind: run(kind, root, rank, world, 1, f"{folder}/{kind}") for kind in KINDS}
    return [everything(rank, world, root, 1), again]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("data")
    classes = pa.table({"name": [f"label {i}" for i in range(LABELS)]})
    spec = LabelSpec(form="multi", num_classes=LABELS)
    write_multi_label(["k"], ["x"], {"label": label_lists([[0]])}, spec, classes, folder / "d", "d")
    values = {f.name: np.sort(value_hashes([f"v{i}" for i in range(9)], f)) for f in FEATURES.features}
    save_file({name: v.view(np.int64) for name, v in values.items()}, folder / "d" / "values.safetensors")
    return str(folder / "d")


def test_two_ranks_are_one_and_a_resume_goes_on(root: str, tmp_path: Path) -> None:
    (alone,) = spawn(everything, 1, root, 1)
    two = spawn(and_resumed, 2, root, str(tmp_path))
    for kind, expected in alone.items():
        for rank in two:
            for name, found in zip(("two ranks", "resumed"), rank, strict=True):
                losses, *dense = found[kind]
                last = expected[0][-len(losses) :]
                torch.testing.assert_close(losses, last, rtol=2e-3, atol=2e-4, msg=f"{kind} {name}")
                for a, b in zip(dense, expected[1:], strict=True):
                    # AdamW's first steps have the size of the rate whatever the gradient: a few may differ by rounding
                    close = torch.isclose(a.double(), b.double(), rtol=1e-3, atol=1e-4)
                    assert float(close.double().mean()) > 0.98, f"{kind} {name}"
