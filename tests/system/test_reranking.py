"""Registered models on given and on corrected labels: numbers known beforehand, and what people voted."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console

from labelmill.data.corrections import drop, relabel
from labelmill.data.labels import LabelSpec
from labelmill.data.manifest import FieldSpec, load_manifest
from labelmill.data.writer import ShardWriter
from labelmill.encoders import build_encoder
from labelmill.encoders.linear import LinearProjection
from labelmill.errors import DataError, JobError
from labelmill.execution import execute
from labelmill.heads.storage import save_range
from labelmill.job import TrackingConfig, validate_job
from labelmill.tracking import registry
from labelmill.tracking.model import write_model
from labelmill.tracking.report import Report
from labelmill.tracking.run import Tracker
from workloads.noisy.reranking import RerankingJob, reranking

FINE, WRONG, CLASSES = 100, 10, 3


def answers(right_fine: int, right_wrong: int) -> np.ndarray:
    """Answers of a model that is right on so many unchanged and so many corrected rows; elsewhere it says class 2 or 0.

    True labels are 0 on unchanged and 1 on corrected rows; the corrected ones were given as 0.
    """
    out = np.full(FINE + WRONG, 2)
    out[:right_fine] = 0
    out[FINE:] = 0
    out[FINE : FINE + right_wrong] = 1
    return out


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A test set whose inputs spell the answers of two models, and both models in a registry."""
    models = {"large": answers(90, 1), "small": answers(88, 4)}
    vectors = np.concatenate([np.eye(CLASSES, dtype=np.float32)[a] for a in models.values()], axis=1)
    fields = {"x": FieldSpec(kind="array", ext="npy", shape=(2 * CLASSES,), dtype="float32")}
    label = LabelSpec(form="single", num_classes=CLASSES)
    with ShardWriter(tmp_path / "test", "told", fields, label, layout="packed", samples_per_shard=40) as writer:
        for i, vector in enumerate(vectors):
            writer.write(f"s{i:03d}", {"x": vector}, {"label": 0})
    tracking = TrackingConfig(system_metrics=False)
    with Tracker.open(tracking, tmp_path / "runs", "train", run_dir=tmp_path / "train") as tracker:
        for number, name in enumerate(models):
            folder = tmp_path / name
            folder.mkdir()
            encoder = build_encoder({"kind": "linear", "field": "x", "in_dim": 2 * CLASSES, "dim": 2 * CLASSES})
            assert isinstance(encoder, LinearProjection)
            encoder.set_weights(torch.eye(2 * CLASSES), torch.zeros(2 * CLASSES))
            rows = torch.eye(2 * CLASSES)[number * CLASSES : (number + 1) * CLASSES]
            save_range(folder, "rows", {"rows": rows}, 0, CLASSES, {})
            write_model(folder, encoder=encoder, input_kind="array", classes=pa.table({"name": list("abc")}))
            registry.register(tracker, folder, name)
    return tmp_path


def keys(numbers: range) -> list[str]:
    return [f"s{i:03d}" for i in numbers]


def run(place: Path, **source: Any) -> Report:
    raw = {
        "workload": "noisy.reranking", "name": "rerank", "output": str(place / "runs"), "models": ["large", "small/1"],
        "test": str(place / "test"), "cluster": {"in_process": True}, "tracking": {"system_metrics": False}, **source,
    }  # fmt: skip
    return execute(
        validate_job(raw, RerankingJob), reranking.run, fresh=True, console=Console(file=io.StringIO(), width=200)
    )


def test_ranks_swap_where_the_closed_form_says(place: Path) -> None:
    test = load_manifest(place / "test")
    relabel(test, place / "corrected", dict.fromkeys(keys(range(FINE, FINE + WRONG)), 1), {})
    report = run(place, corrected=str(place / "corrected"))
    metrics = report.metrics
    assert metrics["original/large/1"] == pytest.approx(99 / 110)
    assert metrics["corrected/large/1"] == pytest.approx(91 / 110)
    assert metrics["corrected/small/1"] == pytest.approx(92 / 110)
    assert metrics["swap/large/1 -> small/1"] == pytest.approx(0.0625)
    assert metrics["prevalence"] == pytest.approx(10 / 110)
    assert metrics["simulation_off"] < 0.01
    ranks = {row[0]: (row[2], row[4]) for row in report.tables["accuracy"].rows}
    assert ranks == {"large/1": (1, 2), "small/1": (2, 1)}
    assert {"re-ranking", "swaps", "prevalence", "test labels"} <= set(report.tables)
    assert "prevalence" in report.figures

    drop(load_manifest(place / "corrected"), place / "agreed", keys(range(5)), {})
    fewer = run(place, corrected=str(place / "agreed"))
    assert fewer.metrics["original/large/1"] == pytest.approx(94 / 105), "rows without an agreed label don't count"

    made = run(place, noise={"kind": "asymmetric", "rate": 0.2, "map": {0: 1}})
    assert made.metrics["prevalence"] == pytest.approx(22 / 110)
    assert made.metrics["corrected/large/1"] == pytest.approx(99 / 110)


def test_votes_decide_what_is_corrected_and_what_is_left_out(place: Path) -> None:
    wrong = keys(range(FINE, FINE + WRONG))
    votes = {key: {"guessed": 3, "given": 2} for key in wrong}
    votes |= {"s000": {"both": 4}, "s001": {"neither": 3}, "s002": {"given": 5}, "s003": {"given": 2, "guessed": 2}}
    (place / "votes.json").write_text(json.dumps(votes))
    pq.write_table(pa.table({"key": wrong, "suggested": [1] * WRONG}), place / "issues.parquet")
    source = {"votes": str(place / "votes.json"), "guesses": str(place / "issues.parquet")}
    report = run(place, **source)
    assert report.metrics["original/large/1"] == pytest.approx((99 - 3) / 107)
    verdicts = {row[0]: row[1] for row in report.tables["test labels"].rows}
    assert verdicts == {"correctable": 10, "both": 1, "neither": 1, "given": 1, "no agreement": 1}

    pq.write_table(pa.table({"key": wrong[1:], "suggested": [1] * (WRONG - 1)}), place / "issues.parquet")
    with pytest.raises(DataError, match="no suggested label for sample 's100'"):
        run(place, **source)
    pq.write_table(pa.table({"key": wrong, "suggested": [7] * WRONG}), place / "issues.parquet")
    with pytest.raises(DataError, match=r"sample 's100': 7 is no class; they are 0 \.\.\. 2"):
        run(place, **source)
    (place / "votes.json").write_text(json.dumps({"elsewhere": {"given": 3}}))
    with pytest.raises(DataError, match="votes for sample 'elsewhere'"):
        run(place, **source)
    (place / "votes.json").write_text("[1, 2]")
    with pytest.raises(DataError, match="no votes of the form"):
        run(place, **source)


def test_what_cannot_be_compared_is_refused(place: Path) -> None:
    with pytest.raises(JobError, match="where are the corrected labels"):
        run(place)
    with pytest.raises(JobError, match="go together"):
        run(place, votes="v.json")
    with pytest.raises(JobError, match="leave corrected and votes out"):
        run(place, corrected="c", noise={"kind": "symmetric", "rate": 0.2})
    with pytest.raises(JobError, match="listed twice"):
        run(place, models=["large", "large"])
    with pytest.raises(DataError, match="no label was corrected"):
        run(place, corrected=str(place / "test"))
