"""The classifier objective on 1 and 2 workers: same losses, same rows; imprinting; clustering on Ray."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from labelmill.data.labels import LabelSpec
from labelmill.data.manifest import FieldSpec, load_manifest
from labelmill.data.spec import StreamSpec
from labelmill.data.writer import ShardWriter
from labelmill.encoders import CharNgramsConfig, LinearConfig, build_encoder
from labelmill.heads.batch import NotFiniteError
from labelmill.heads.config import HeadConfig
from labelmill.heads.source import open_rows
from labelmill.training.checkpoint import read_dense, read_index
from labelmill.training.config import TrainConfig
from labelmill.training.events import ListSink
from labelmill.training.local import spawn
from labelmill.training.worker import FitTask, run_worker
from workloads.discrimination.partial_fc import Classifier

ENCODER = CharNgramsConfig(dim=16, buckets=512, hidden=16)
NAMES = [f"{a}{b}{c}" for a in "bdgk" for b in "aeiou" for c in "lmnrst"]


def make_data(folder: Path) -> None:
    import pyarrow as pa

    label = LabelSpec(form="single", num_classes=len(NAMES))
    with ShardWriter(
        folder, "syllables", {"text": FieldSpec(kind="text", ext="txt")}, label, layout="packed", samples_per_shard=50
    ) as writer:
        for i in range(2 * len(NAMES)):
            name = NAMES[i % len(NAMES)]
            writer.write(f"s{i}", {"text": name + "aeiou"[i % 5]}, {"label": i % len(NAMES)})
        writer.close(classes=pa.table({"name": NAMES}))


def train(
    rank: int, world: int, data: str, work: str, align: float, stage: int, evaluate_every: int = 3
) -> dict[str, Any]:
    manifest = load_manifest(data)
    head = HeadConfig(scale=12.0, sample_rate=0.5, block_rows=16)
    task = FitTask(
        partial(Classifier, ENCODER, head, len(NAMES), 1, manifest, align, 3),
        TrainConfig(
            global_batch=24,
            steps=8,
            learning_rate=0.01,
            zero_stage=stage,
            log_every=1,
            evaluate_every=evaluate_every,
            evaluate_samples=46,
        ),
        StreamSpec(manifest, "text", 24, seed=2, window=2),
        predict={"test": StreamSpec(manifest, "text", 23, shuffle=False)},
        evaluate=StreamSpec(manifest, "text", 14, seed=3),
        work=Path(work),
        seed=1,
        transport="local",
    )
    sink = ListSink()
    run_worker(task, rank, world, sink)
    metrics = [e["values"] for e in sink.events if e["kind"] == "metrics"]
    return {
        "losses": [values["train/loss"] for values in metrics],
        "judged": {step: v["eval/top1"] for step, v in enumerate(metrics, start=1) if "eval/top1" in v},
    }


@pytest.mark.parametrize("align", [0.0, 1.0])
def test_one_and_two_workers_agree(tmp_path: Path, align: float) -> None:
    from labelmill.stages import Fitted

    make_data(tmp_path / "data")
    curves, rows, predictions, judged = [], [], [], []
    for world, stage in ((1, 0), (2, 2)):
        work = tmp_path / f"work{world}"
        results = spawn(train, world, str(tmp_path / "data"), str(work), align, stage)
        curves.append(results[0]["losses"])
        judged.append(results[0]["judged"])
        rows.append(Fitted(work).head_rows("classes"))
        assert len(sorted((work / "predictions" / "test").glob("part-*.parquet"))) == world
        predictions.append(Fitted(work).predictions("test"))
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)
    assert sorted(judged[0]) == [3, 6, 8]
    assert judged[0] == pytest.approx(judged[1], abs=1.01 / 46), "46 samples, whatever the batches and workers"
    assert all(value * 46 == pytest.approx(round(value * 46)) for value in judged[0].values())
    torch.testing.assert_close(rows[0], rows[1], atol=1e-4, rtol=1e-3)
    assert predictions[0].num_rows == 2 * len(NAMES), "every sample is predicted once, for any number of workers"
    assert predictions[0].column("key").to_pylist() == predictions[1].column("key").to_pylist()
    same = [a == b for a, b in zip(*(p.column("class_id").to_pylist() for p in predictions), strict=True)]
    assert sum(same) / len(same) > 0.98
    encoder = build_encoder(ENCODER)
    encoder.load_state_dict(Fitted(tmp_path / "work1").dense("encoder."))
    expected = torch.nn.functional.normalize(encoder.embed(NAMES))
    torch.testing.assert_close(rows[0], expected, atol=1e-5, rtol=1e-4)


def test_being_judged_while_training_changes_nothing(tmp_path: Path) -> None:
    make_data(tmp_path / "data")
    judged, plain = (
        spawn(train, 1, str(tmp_path / "data"), str(tmp_path / f"{every}"), 1.0, 0, every)[0] for every in (2, 0)
    )
    assert judged["losses"] == plain["losses"]
    assert len(judged["judged"]) == 4
    assert not plain["judged"]


def test_clustering_on_ray_equals_the_reference(tmp_path: Path, ray_session: None) -> None:
    from safetensors.torch import save_file

    from labelmill.evaluation.clustering import spherical_kmeans as reference
    from labelmill.training.passes import spherical_kmeans

    generator = torch.Generator().manual_seed(0)
    emb = torch.randn(300, 8, generator=generator) + 2 * torch.randn(6, 8, generator=generator).repeat(50, 1)
    valid = torch.ones(300, dtype=torch.bool)
    valid[7] = False
    for i in range(3):
        part = slice(100 * i, 100 * (i + 1))
        save_file(
            {"emb": emb[part].contiguous(), "valid": valid[part].contiguous()}, tmp_path / f"emb-{i:05d}.safetensors"
        )
    centres, history = spherical_kmeans(tmp_path, 6, 8, 3, lambda done, total: None, cpus=0.5)
    again, _ = spherical_kmeans(tmp_path, 6, 8, 3, lambda done, total: None, cpus=1.0)
    torch.testing.assert_close(centres, again, atol=0, rtol=0)
    cosines = [record["mean_cosine"] for record in history]
    assert all(b >= a - 1e-6 for a, b in pairwise(cosines))
    torch.testing.assert_close(centres.norm(dim=1), torch.ones(6))
    best = max(reference(torch.nn.functional.normalize(emb[valid]), 6, 8, seed).mean_cosine[-1] for seed in range(3))
    assert cosines[-1] > best - 0.1


def train_on_numbers(rank: int, world: int, data: str, work: str) -> list[dict[str, Any]]:
    """A job's worker over arrays of which one holds a NaN, with one step that may be left out and with none."""
    manifest, found = load_manifest(data), []
    head = HeadConfig(scale=12.0, sample_rate=0.5, block_rows=16)
    for allowed in (1, 0):
        task = FitTask(
            partial(Classifier, LinearConfig(field="numbers", in_dim=6, dim=8), head, 40, 1),
            TrainConfig(
                global_batch=8,
                steps=6,
                learning_rate=0.05,
                log_every=1,
                checkpoint_every=1,
                keep_checkpoints=9,
                max_skipped_steps=allowed,
            ),
            StreamSpec(manifest, "numbers", 8, seed=2, window=2),
            work=Path(work) / str(allowed),
            seed=1,
            transport="local",
        )
        sink, error = ListSink(), ""
        try:
            run_worker(task, rank, world, sink)
        except NotFiniteError as raised:
            error = str(raised)
        skipped = [e["values"].get("train/skipped_steps", 0) for e in sink.events if e["kind"] == "metrics"]
        found.append({"error": error, "skipped": skipped})
    return found


def test_a_job_leaves_steps_with_nan_out_and_stops_after_its_limit(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    label = LabelSpec(form="single", num_classes=40)
    with ShardWriter(tmp_path / "data", "numbers", {"numbers": FieldSpec(kind="array", ext="npy")}, label) as writer:
        for i in range(48):
            numbers = generator.standard_normal(6).astype(np.float32)
            if i == 20:
                numbers[2] = np.nan
            writer.write(f"s{i:02d}", {"numbers": numbers}, {"label": i % 40})
        writer.close()
    both = spawn(train_on_numbers, 2, str(tmp_path / "data"), str(tmp_path / "work"))
    for number, allowed in enumerate((1, 0)):
        ranks = [found[number] for found in both]
        folders = sorted((tmp_path / "work" / str(allowed) / "checkpoints").glob("step-*"))
        if allowed:
            assert ranks[0]["error"] == ranks[1]["error"] == ""
            assert ranks[0]["skipped"][-1] == 1
            at = ranks[0]["skipped"].index(1)
            assert [read_index(folder)["skipped"] for folder in folders] == [int(step >= at) for step in range(6)]
            states = [open_rows(folder / "head-classes").read(0, 40) for folder in folders]
            denses = [read_dense(folder) for folder in folders]
            for step in range(1, 6):
                same = [torch.equal(states[step][n], states[step - 1][n]) for n in states[step]]
                same += [torch.equal(denses[step][n], denses[step - 1][n]) for n in denses[step] if "weight" in n]
                assert all(same) if step == at else not any(same), step
        else:
            assert ranks[0]["error"] == ranks[1]["error"]
            assert "the embedding of sample" in ranks[0]["error"]
            assert "train.max_skipped_steps is 0" in ranks[0]["error"]
            assert len(folders) == at, "the last checkpoint is the one before the step"
