"""The dual encoder's objective: its kinds of negatives, draws and mining, on one rank and on two, and a whole job."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from pydantic import ValidationError
from rich.console import Console
from torch import Tensor

from labelmill.data.extreme import label_lists, write_multi_label
from labelmill.data.labels import Labels, LabelSpec
from labelmill.data.manifest import Manifest, load_manifest
from labelmill.data.stream import Batch
from labelmill.encoders import CharNgramsConfig
from labelmill.errors import DataError, JobError
from labelmill.execution import execute
from labelmill.heads.ranks import Ranks
from labelmill.host import Host
from labelmill.losses.classification import dense_loss
from labelmill.losses.retrieval import DecoupledSection, SoftmaxSection
from labelmill.training.inprocess import fit_here
from labelmill.training.local import spawn
from workloads.extreme.dual_encoder import DualEncoderJob, check_label_space, dual_encoder
from workloads.extreme.ranking import read_filter
from workloads.extreme.towers import DualEncoder, FullNegatives, InBatchNegatives, MinedNegatives, draw_hard

ENCODER = CharNgramsConfig(dim=16, buckets=512, hidden=0, orders=(2, 3), placed=(), gaps=(), deletions=False)
WORDS = [f"{a}{b}" for a in ("red", "green", "blue", "dark", "pale") for b in ("cat", "dog", "fish", "bird")]


def data_set(folder: Path, count: int, seed: int) -> Manifest:
    """Texts that hold one to three of 20 words; the words are the labels."""
    rng = np.random.default_rng(seed)
    rows = [sorted(rng.choice(20, rng.integers(1, 4), replace=False).tolist()) for _ in range(count)]
    texts = [" ".join(WORDS[i] for i in rng.permutation(row)) for row in rows]
    keys = [f"q{seed}-{i:04d}" for i in range(count)]
    spec = LabelSpec(form="multi", num_classes=20)
    classes = pa.table({"name": WORDS})
    return write_multi_label(keys, texts, {"label": label_lists(rows)}, spec, classes, folder, "words")


def batch_for(model: DualEncoder, texts: list[str], ids: Tensor, keys: np.ndarray) -> Batch:
    labels = Labels("multi", ids)
    inputs = model.prepare(texts, labels, keys)
    return Batch([f"k{i}" for i in range(len(ids))], inputs, labels, torch.ones(len(ids)), torch.arange(len(ids)))


TEXTS = ["redcat greendog", "bluefish", "palebird darkdog", "redcat", "greenbird bluecat", "redfish"]
IDS = torch.tensor([[0, 5, -1], [10, -1, -1], [19, 13, 0], [0, -1, -1], [7, 8, -1], [2, -1, -1]])
KEYS = np.arange(6, dtype=np.uint64) * np.uint64(7919)


def loss_of_rank(rank: int, world: int, root: str, kind: str) -> list[Tensor]:
    data = load_manifest(root)
    torch.manual_seed(0)
    negatives: Any = {
        "full": FullNegatives(chunk=4),
        "in_batch": InBatchNegatives(chunk=2),
        "mined": MinedNegatives(chunk=3, start=0, every=2, top=6, per_query=2),
    }[kind]
    model = DualEncoder(ENCODER, DecoupledSection(positives="one"), negatives, data)
    part = slice(rank * 6 // world, (rank + 1) * 6 // world)
    values = []
    for _ in range(2):
        value = model.forward(batch_for(model, TEXTS[part], IDS[part], KEYS[part])).total
        value.backward()
        values.append(value.detach())
    grads = [Ranks().sum_(p.grad.clone()) / world for p in model.encoder.parameters()]
    return [torch.stack(values), *grads]


@pytest.mark.parametrize("kind", ["full", "in_batch", "mined"])
def test_two_ranks_are_one(tmp_path: Path, kind: str) -> None:
    data = data_set(tmp_path / "d", 30, 0)
    one = loss_of_rank(0, 1, data.root, kind)
    for two in spawn(loss_of_rank, 2, data.root, kind):
        for a, b in zip(one, two, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_full_negatives_are_the_dense_loss(tmp_path: Path) -> None:
    data = data_set(tmp_path / "d", 30, 0)
    torch.manual_seed(0)
    model = DualEncoder(ENCODER, SoftmaxSection(), FullNegatives(chunk=7), data, temperature=0.1)
    value = model.forward(batch_for(model, TEXTS, IDS, KEYS)).total
    unit = torch.nn.functional.normalize
    scores = unit(model.encoder.embed(TEXTS)) @ unit(model.encoder.embed(WORDS)).T * 10
    want = dense_loss(SoftmaxSection().row_loss(), scores, IDS).mean()
    torch.testing.assert_close(value.detach(), want, rtol=1e-5, atol=1e-6)


def test_in_batch_masks_positives_that_were_not_drawn(tmp_path: Path) -> None:
    """The pool holds the drawn positives; one that is another query's undrawn positive is no negative for it."""
    data = data_set(tmp_path / "d", 30, 0)
    torch.manual_seed(0)
    model = DualEncoder(ENCODER, DecoupledSection(positives="one"), InBatchNegatives(), data, temperature=0.5)
    batch = batch_for(model, TEXTS, IDS, KEYS)
    drawn = batch.inputs["drawn"]
    pool = sorted({int(i) for i in IDS[drawn > 0]})
    losses = model.forward(batch)
    assert int(losses.parts["pool"]) == len(pool)
    unit = torch.nn.functional.normalize
    scores = 2 * unit(model.encoder.embed(TEXTS)) @ unit(model.encoder.embed([WORDS[i] for i in pool])).T
    total = 0.0
    for n in range(6):
        (mine,) = IDS[n][drawn[n] > 0].tolist()
        others = [j for j, label in enumerate(pool) if label not in IDS[n].tolist()]
        s = scores[n]
        total += float(torch.logsumexp(s[[pool.index(mine), *others]], 0) - s[pool.index(mine)])
    assert float(losses.total.detach()) == pytest.approx(total / 6, rel=1e-5)


def test_hard_negatives_are_never_positives() -> None:
    found = torch.tensor([[3, 1, 4, 0], [5, 6, 7, 8]])
    ids = torch.tensor([[1, 3, 4], [9, -1, -1]])
    drawn = draw_hard(found, ids, torch.tensor([5, 6]), 2)
    assert drawn[0].tolist() == [0, -1], "only one is left"
    assert set(drawn[1].tolist()) < {5, 6, 7, 8}
    assert len(set(drawn[1].tolist())) == 2
    assert torch.equal(drawn[1], draw_hard(found[1:, [2, 0, 3, 1]], ids[1:], torch.tensor([6]), 2)[0])


def job(tmp_path: Path, **sections: Any) -> DualEncoderJob:
    train, test = data_set(tmp_path / "train", 400, 1), data_set(tmp_path / "test", 80, 2)
    base = {
        "workload": "extreme.dual_encoder",
        "name": "small",
        "output": str(tmp_path / "runs"),
        "data": {"train": train.root, "test": test.root, "dev": test.root},
        "encoder": ENCODER.model_dump(),
        "train": {"global_batch": 40, "steps": 60, "learning_rate": 0.02, "evaluate_every": 60, "evaluate_samples": 40},
        "ranking": {"ks": [1, 3], "recall_ks": [5]},
    }
    return DualEncoderJob.model_validate(base | sections)


def run(job: DualEncoderJob, tmp_path: Path) -> Any:
    return execute(
        job,
        dual_encoder.run,
        host=Host(tmp_path / "runs" / job.name, fit=fit_here),
        console=Console(file=io.StringIO()),
    )


def test_a_job_learns_ranks_indexes_and_filters(tmp_path: Path) -> None:
    (tmp_path / "filter.csv").write_text("q2-0000,3\nq2-0000,4\n")
    sections: dict[str, Any] = {"ranking": {"ks": [1, 3], "recall_ks": [5], "filter": str(tmp_path / "filter.csv")}}
    sections |= {"index": {"kind": "faiss"}, "negatives": {"kind": "mined", "start": 20, "every": 20, "top": 8}}
    report = run(job(tmp_path, **sections), tmp_path)
    assert report.metrics["test/P@1"] > 0.9
    assert report.metrics["test/R@5"] > 0.9
    assert report.metrics["index/recall@5"] == 1.0
    assert report.metrics["index/P@1"] == report.metrics["test/P@1"]
    assert {"ranking", "index"} <= set(report.tables)


def check(job: DualEncoderJob) -> None:
    check_label_space(job, job.data.open()[0])


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="greater than 0"):
        job(tmp_path / "a", temperature=0.0)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        job(tmp_path / "b", temperature=1.0)
    assert any("scores lie within" in str(w.message) for w in told)
    with pytest.raises(JobError, match="0 < k < number of labels, which is 20"):
        check(job(tmp_path / "c", loss={"kind": "soft_topk", "k": 20}))
    with pytest.raises(JobError, match="k up to 50, but there are 20 labels"):
        check(job(tmp_path / "d", ranking={}))
    train = {"global_batch": 40, "steps": 1, "zero_stage": 3}
    with pytest.raises(ValidationError, match=r"use train\.zero_stage 0 to 2"):
        job(tmp_path / "e", train=train, cluster={"workers": 2})
    with pytest.raises(ValidationError, match="is measured on the test set"):
        job(tmp_path / "g", search={"metric": "test/P@1", "space": {"temperature": [0.05, 0.1]}, "trials": 2})
    (tmp_path / "f.csv").write_text("k,1\nk\n")
    with pytest.raises(DataError, match=r"line 2: write `key,label id`"):
        read_filter(str(tmp_path / "f.csv"), 5)
    (tmp_path / "f.csv").write_text("k,9\n")
    with pytest.raises(DataError, match="label 9 is out of range"):
        read_filter(str(tmp_path / "f.csv"), 5)


def test_labels_without_text_warn_and_queries_without_labels_weigh_nothing(tmp_path: Path) -> None:
    spec = LabelSpec(form="multi", num_classes=20)
    classes = pa.table({"name": ["", *WORDS[1:]]})
    rows = label_lists([[1], [], [2]])
    data = write_multi_label(["a", "b", "c"], ["x", "y", "z"], {"label": rows}, spec, classes, tmp_path / "d", "d")
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="1 labels have no text"):
        model = DualEncoder(ENCODER, DecoupledSection(), FullNegatives(), data)
    ids = torch.tensor([[1], [-1], [2]])
    three = model.forward(batch_for(model, TEXTS[:3], ids, KEYS[:3])).total
    two = model.forward(batch_for(model, [TEXTS[0], TEXTS[2]], ids[[0, 2]], KEYS[[0, 2]])).total
    torch.testing.assert_close(three, two)
