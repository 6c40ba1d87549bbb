"""LAF on one and on two workers: the same weights; with rates of zero nothing moves, and labels play no part."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from labelmill.data.deletion import ClassesRequest, resolve, unlabelled
from labelmill.data.labels import LabelSpec
from labelmill.data.manifest import FieldSpec, Manifest, load_manifest
from labelmill.data.selection import load_selection
from labelmill.data.spec import StreamSpec
from labelmill.data.writer import ShardWriter
from labelmill.encoders import LinearConfig, build_encoder
from labelmill.stages import Fitted
from labelmill.tracking.model import write_model
from labelmill.training.config import TrainConfig
from labelmill.training.events import ListSink
from labelmill.training.local import spawn
from labelmill.training.worker import FitTask, run_worker
from workloads.unlearning.laf import Laf, LafConfig, Vae
from workloads.unlearning.model import save_hashes
from workloads.unlearning.unlearn import keys_of, stream_of

WIDTH, DIM, CLASSES = 6, 4, 3


def prepare(folder: Path) -> None:
    rng = np.random.default_rng(0)
    fields = {"x": FieldSpec(kind="array", ext="npy", shape=(WIDTH,), dtype="float32")}
    label = LabelSpec(form="single", num_classes=CLASSES)
    with ShardWriter(folder / "data", "x", fields, label, "packed", samples_per_shard=20) as writer:
        for i in range(60):
            writer.write(f"s{i:03d}", {"x": rng.normal(size=WIDTH).astype(np.float32)}, {"label": i % CLASSES})
    torch.manual_seed(0)
    encoder = build_encoder(LinearConfig(field="x", in_dim=WIDTH, dim=DIM))
    package = folder / "package"
    package.mkdir()
    save_file({"rows": F.normalize(torch.randn(CLASSES, DIM), dim=1)}, package / f"rows-0-{CLASSES}.safetensors")
    write_model(package, encoder=encoder, input_kind="array", classes=pa.table({"name": ["a", "b", "c"]}))
    for name in ("all", "forget"):
        (folder / name / "export").mkdir(parents=True)
        state = {f"vae.{k}": v for k, v in Vae(DIM, 2, "linear").state_dict().items()}
        save_file(state, folder / name / "export" / "dense.safetensors")
    data = load_manifest(folder / "data")
    found = resolve(ClassesRequest(ids=(1,)), data)
    found.forget.save(str(folder / "forget.arrow"))
    found.retain.save(str(folder / "retain.arrow"))
    spec = StreamSpec(data, "x", 12, selection=found.forget)
    save_hashes(keys_of(spec), folder / "keys.npy")


def train(rank: int, world: int, folder: str, work: str, rate: float, stage: int) -> list[float]:
    place = Path(folder)
    bare: Manifest = unlabelled(load_manifest(place / "data"))
    streams = [
        StreamSpec(bare, "x", 12, seed=3, selection=load_selection(str(place / f"{name}.arrow")))
        for name in ("retain", "forget")
    ]
    stream = stream_of(streams[0], streams[1], (True, True), 12, share=0.5)
    objective = partial(
        Laf,
        folder + "/package",
        folder + "/keys.npy",
        LafConfig(latent=2, temperature=5.0),
        folder + "/all",
        folder + "/forget",
        12,
        0,
    )
    config = TrainConfig(
        global_batch=12, steps=8, learning_rate=rate, schedule="constant", warmup=0.0, log_every=1, zero_stage=stage
    )
    sink = ListSink()
    run_worker(FitTask(objective, config, stream, work=Path(work), seed=1, transport="local"), rank, world, sink)
    return [e["values"]["train/loss"] for e in sink.events if e["kind"] == "metrics"]


def test_the_number_of_workers_changes_nothing(tmp_path: Path) -> None:
    prepare(tmp_path)
    run = partial(spawn, train)
    one = run(1, str(tmp_path), str(tmp_path / "one"), 0.01, 0)[0]
    two = run(2, str(tmp_path), str(tmp_path / "two"), 0.01, 1)[0]
    torch.testing.assert_close(torch.tensor(one), torch.tensor(two), atol=1e-4, rtol=1e-4)
    assert one[1] != one[3], "it learns"
    weights = [Fitted(tmp_path / name).dense("encoder.")["weight_DI"] for name in ("one", "two")]
    torch.testing.assert_close(weights[0], weights[1], atol=1e-5, rtol=1e-4)
    teacher = Fitted(tmp_path / "one").dense("teacher.")["weight_DI"]
    assert not torch.equal(weights[0], teacher)
    # rates next to nothing: the original comes back
    run(1, str(tmp_path), str(tmp_path / "still"), 1e-12, 0)
    still = Fitted(tmp_path / "still").dense("encoder.")["weight_DI"]
    torch.testing.assert_close(still, teacher, atol=1e-9, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_every_zero_stage_gives_the_same_model(tmp_path: Path, stage: int) -> None:
    prepare(tmp_path)
    one = spawn(train, 1, str(tmp_path), str(tmp_path / "one"), 0.01, stage)[0]
    two = spawn(train, 2, str(tmp_path), str(tmp_path / "two"), 0.01, stage)[0]
    plain = spawn(train, 1, str(tmp_path), str(tmp_path / "plain"), 0.01, 0)[0]
    for losses in (one, two):
        torch.testing.assert_close(torch.tensor(losses), torch.tensor(plain), atol=1e-4, rtol=1e-4)
    want = Fitted(tmp_path / "plain").dense("encoder.")["weight_DI"]
    for name in ("one", "two"):
        torch.testing.assert_close(Fitted(tmp_path / name).dense("encoder.")["weight_DI"], want, atol=1e-5, rtol=1e-4)
