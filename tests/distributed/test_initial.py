"""A run that goes on from last night's head with other classes: by name, with optimizer state; what is refused before."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
import yaml

from labelmill import api
from labelmill.cluster import ClusterError
from labelmill.data import store
from labelmill.data.labels import LabelSpec
from labelmill.data.manifest import FieldSpec, Manifest, load_manifest
from labelmill.data.spec import StreamSpec
from labelmill.data.writer import ShardWriter
from labelmill.encoders import CharNgramsConfig, build_encoder
from labelmill.errors import DataError, JobError
from labelmill.heads.classmap import read_names
from labelmill.heads.config import HeadConfig, InitialHead
from labelmill.heads.optim import SGD, AdamW
from labelmill.heads.source import open_rows
from labelmill.training.checkpoint import read_dense, read_index
from labelmill.training.config import TrainConfig
from labelmill.training.events import ListSink
from labelmill.training.initial import HeadStart, find_start, keep_class_names
from labelmill.training.local import spawn
from labelmill.training.worker import FitTask, run_worker
from workloads.discrimination.partial_fc import Classifier

ENCODER = CharNgramsConfig(dim=8, buckets=64, hidden=8)
NAMES = [f"{a}{b}{c}" for a in "bdgk" for b in "aeiou" for c in "lmn"]  # 60
TODAY = ["new one", *NAMES[:5:-1], "new two"]  # other order, six gone, two new
HEAD: dict[str, Any] = {"scale": 12.0, "block_rows": 16, "optimizer": AdamW()}


def make_data(folder: Path, names: list[str], bare: bool = False) -> Manifest:
    label = LabelSpec(form="single", num_classes=len(names))
    fields = {"text": FieldSpec(kind="text", ext="txt")}
    with ShardWriter(folder, "names", fields, label, layout="packed", samples_per_shard=64) as writer:
        for i in range(2 * len(names)):
            writer.write(f"s{i}", {"text": names[i % len(names)]}, {"label": i % len(names)})
        writer.close(classes=None if bare else pa.table({"name": names}))
    return load_manifest(folder)


def train(rank: int, world: int, data: str, work: str, steps: int, start: dict[str, Any] | None) -> None:
    manifest = load_manifest(data)
    count = manifest.label.num_classes
    assert count is not None
    if rank == 0:
        keep_class_names(Path(work), manifest)
    task = FitTask(
        partial(Classifier, ENCODER, HeadConfig(**HEAD), count, 1),
        TrainConfig(global_batch=24, steps=steps, learning_rate=1e-6 if start else 0.02, warmup=0.0, log_every=1),
        StreamSpec(manifest, "text", 24, seed=2, window=2),
        work=Path(work),
        seed=1,
        transport="local",
        initial={"classes": HeadStart(**start)} if start else {},
    )
    run_worker(task, rank, world, ListSink())


def weights() -> dict[str, torch.Tensor]:
    encoder = build_encoder(ENCODER)
    return dict(encoder.named_parameters(prefix="encoder")) | dict(encoder.named_buffers(prefix="encoder"))


def find(initial: dict[str, Any], data: Manifest, work: Path, **head: Any) -> HeadStart:
    config = HeadConfig(**{**HEAD, **head}, initial=InitialHead(**initial))
    return find_start(config, data, weights(), ENCODER.dim, work)


def step_of(work: Path) -> Path:
    (found,) = (work / "checkpoints").glob("step-*")
    return found


@pytest.fixture(scope="module")
def night(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Yesterday's data set and training, today's data set."""
    root = tmp_path_factory.mktemp("night")
    make_data(root / "yesterday", NAMES)
    make_data(root / "today", TODAY)
    spawn(train, 1, str(root / "yesterday"), str(root / "run/stages/fit-0"), 5, None)
    return root


def test_a_nightly_run_goes_on_class_by_class(night: Path, tmp_path: Path) -> None:
    """One step with hardly any rate: rows, optimizer state, encoder and counters are last night's, by name."""
    start = find({"checkpoint": str(night / "run")}, load_manifest(night / "today"), tmp_path / "initial")
    assert (start.kept, start.fresh, start.dropped) == (54, 2, 6)
    paths = {"folder": start.folder, "checkpoint": start.checkpoint, "map_file": start.map_file}
    spawn(train, 2, str(night / "today"), str(tmp_path / "work"), 1, start.model_dump() | paths)
    before, after = step_of(night / "run/stages/fit-0"), step_of(tmp_path / "work")
    old, new = open_rows(before / "head-classes"), open_rows(after / "head-classes")
    assert (old.notes["steps"], new.notes["steps"]) == (5, 6)
    assert [read_index(step)["optimizer_steps"] for step in (before, after)] == [5, 6]
    assert read_index(after)["step"] == 1, "its own schedule, from the beginning"
    was, now = old.read(0, len(NAMES)), new.read(0, len(TODAY))
    order = torch.tensor([NAMES.index(name) for name in TODAY[1:-1]])
    torch.testing.assert_close(now["rows"][1:-1], was["rows"][order], atol=1e-4, rtol=0)
    assert torch.equal(now["adamw.touched"], torch.tensor([1, *[6] * 54, 1], dtype=torch.int32))
    kept = 0.9 * was["adamw.mean"][order]  # what the one step leaves of it; the rest is its own gradient
    fresh = (now["adamw.mean"][1:-1] - kept).norm() / kept.norm()
    assert torch.equal(now["adamw.square"][1:-1] >= 0.998 * was["adamw.square"][order], torch.ones(54, 8, dtype=bool))
    assert fresh < 1.0
    for name, value in read_dense(before).items():
        torch.testing.assert_close(read_dense(after)[name], value, atol=1e-4, rtol=0)
    assert read_names(tmp_path / "work/classes.arrow").to_pylist() == TODAY


def test_places_and_label_spaces(night: Path, tmp_path: Path) -> None:
    """The same start by every way to name it, and what no way leads to."""
    today, work = load_manifest(night / "today"), tmp_path / "initial"
    fit = night / "run/stages/fit-0"
    want = find({"checkpoint": str(night / "run")}, today, work)
    for place in (fit, fit / "checkpoints", step_of(fit), step_of(fit) / "head-classes", f"file://{step_of(fit)}"):
        assert find({"checkpoint": str(place)}, today, work).digest == want.digest
    for classes in (night / "yesterday", night / "yesterday/classes.arrow"):
        given = {"checkpoint": str(step_of(fit)), "classes": str(classes)}
        assert find(given, today, work).digest == want.digest
    (tmp_path / "map.csv").write_text("old,new\n0,1\n3,0\n")
    assert find({"checkpoint": str(fit), "classes": str(tmp_path / "map.csv")}, today, work).kept == 2
    rows = find({"checkpoint": str(fit / "export/head-classes"), "encoder": "fresh"}, today, work)
    assert (rows.kept, rows.checkpoint) == (54, None)
    ids = find({"checkpoint": str(fit), "classes": "ids"}, today, work)
    assert (ids.kept, ids.fresh, ids.dropped) == (56, 0, 4)
    assert want.model_dump(mode="json").keys() == {"digest", "merge", "optimizer", "kept", "fresh", "dropped"}
    bare = make_data(tmp_path / "bare", TODAY, bare=True)
    head = shutil.copytree(step_of(fit) / "head-classes", tmp_path / "alone/head-classes")
    assert find({"checkpoint": str(head), "encoder": "fresh"}, bare, work).kept == 56, "no names anywhere: ids stay"


def test_a_checkpoint_in_a_bucket(night: Path, tmp_path: Path, s3_store: str) -> None:
    fit, today = night / "run/stages/fit-0", load_manifest(night / "today")
    for file in (path for path in fit.rglob("*") if path.is_file()):
        store.write_bytes(store.join("s3://data", str(file.relative_to(fit))), file.read_bytes())
    uri = f"s3://data/checkpoints/{step_of(fit).name}"
    start = find({"checkpoint": uri}, today, tmp_path / "initial")
    assert start.digest == find({"checkpoint": str(fit)}, today, tmp_path / "initial").digest
    assert Path(start.folder).is_relative_to(tmp_path)
    alone = find(
        {"checkpoint": f"{uri}/head-classes", "classes": "ids", "encoder": "fresh"}, today, tmp_path / "initial"
    )
    assert alone.kept == 56
    with pytest.raises(DataError, match="nothing holds neither a checkpoint nor a saved head"):
        find({"checkpoint": "s3://data/nothing"}, today, tmp_path / "initial")


def test_what_is_refused(night: Path, tmp_path: Path) -> None:
    today, run = load_manifest(night / "today"), str(night / "run")
    (tmp_path / "both.csv").write_text("old,new\n0,1\n3,1\n")
    (tmp_path / "far.csv").write_text("old,new\n0,1\n3,56\n")
    (tmp_path / "old.csv").write_text("old,new\n60,1\n")
    (tmp_path / "twice.txt").write_text("\n".join([*NAMES[:-1], NAMES[0]]))
    (tmp_path / "short.txt").write_text("\n".join(NAMES[:-1]))
    (tmp_path / "strange.txt").write_text("\n".join(f"x{i}" for i in range(60)))
    (tmp_path / "empty").mkdir()
    two = shutil.copytree(run, tmp_path / "two")
    shutil.copytree(two / "stages/fit-0", two / "stages/fit-1")
    torn = shutil.copytree(step_of(night / "run/stages/fit-0"), tmp_path / "torn")
    (torn / "head-classes/head.json").unlink()
    next((torn / "head-classes").glob("head-*")).unlink()
    alone = shutil.copytree(
        torn / "../two/stages/fit-0/checkpoints/step-00000005/head-classes", tmp_path / "a/head-classes"
    )
    bare = make_data(tmp_path / "bare", TODAY, bare=True)
    cases: list[tuple[str, dict[str, Any], str]] = [
        (str(tmp_path / "nowhere"), {}, r"head\.initial\.checkpoint: .*nowhere: no such folder"),
        (str(tmp_path / "empty"), {}, "holds neither a saved head"),
        (str(two), {}, r"several trainings; name one of\n.*fit-0.*\n.*fit-1"),
        (str(torn), {}, "holds no head: neither head.json nor"),
        (str(alone), {"classes": "ids"}, "no encoder's weights beside it"),
        (run, {"classes": str(tmp_path / "both.csv")}, r"sends both 0 and 3 to 1 .*head\.initial\.merge"),
        (run, {"classes": str(tmp_path / "far.csv")}, r"sends class 3 to 56: new ids run from 0 to 55"),
        (run, {"classes": str(tmp_path / "old.csv")}, r"line 2: old class 60 is out of range \(0 to 59\)"),
        (run, {"classes": str(tmp_path / "twice.txt")}, rf"old class names hold '{NAMES[0]}' more than once"),
        (run, {"classes": str(tmp_path / "short.txt")}, "holds 59 names, .* 60 classes"),
        (
            run,
            {"classes": str(tmp_path / "strange.txt")},
            r"none of the 60 saved classes \('x0', ...\) is one of the 56",
        ),
        (run, {"classes": str(tmp_path / "gone.csv")}, "gone.csv: not readable"),
        (run, {"classes": str(tmp_path / "gone")}, "gone"),
    ]
    for place, fields, message in cases:
        with pytest.raises(DataError, match=message):
            find({"checkpoint": place, **fields}, today, tmp_path / "initial")
    with pytest.raises(DataError, match=r"'names' has no class names, the other label space has.* write ids"):
        find({"checkpoint": run}, bare, tmp_path / "initial")
    with pytest.raises(DataError, match="another row optimizer wrote it"):
        find({"checkpoint": run}, today, tmp_path / "initial", optimizer=SGD())
    assert find({"checkpoint": run, "optimizer": "fresh"}, today, tmp_path / "initial", optimizer=SGD()).kept == 54
    with pytest.raises(DataError, match="rows have 1 x 8 numbers a class, the head's 1 x 6"):
        find_start(HeadConfig(initial=InitialHead(checkpoint=run)), today, weights(), 6, tmp_path / "initial")
    other = {**weights(), "encoder.more": torch.zeros(3)}
    with pytest.raises(DataError, match=r"another encoder: encoder\.more has shape None there and \[3\] here"):
        find_start(HeadConfig(**HEAD, initial=InitialHead(checkpoint=run)), today, other, 8, tmp_path / "initial")


def test_a_job_is_refused_before_anything_starts(night: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from labelmill.run import Run

    job = {
        "workload": "discrimination.partial_fc",
        "name": "today",
        "output": str(tmp_path / "runs"),
        "data": {"train": str(night / "today"), "test": str(night / "today")},
        "encoder": ENCODER.model_dump(),
        "head": {"optimizer": {"kind": "adamw"}, "initial": {"checkpoint": str(tmp_path / "nowhere")}},
        "train": {"global_batch": 24, "steps": 1},
        "tracking": {"system_metrics": False},
    }
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))

    def connect(self: Run) -> None:
        raise ClusterError("reached the cluster")

    monkeypatch.setattr(Run, "connect", connect)
    with pytest.raises(DataError, match=r"head\.initial\.checkpoint: .*nowhere: no such folder"):
        api.run(tmp_path / "job.yaml")
    with pytest.raises(ClusterError, match="reached the cluster"):
        api.run(tmp_path / "job.yaml", [f"head.initial.checkpoint={night / 'run'}"])
    with pytest.raises(JobError, match=r"head\.initial\.checkpoints: unknown field\. Did you mean 'checkpoint'"):
        api.check(tmp_path / "job.yaml", ["head.initial.checkpoints=x"])
    with pytest.raises(
        JobError, match=r"head\.initial: the classes of workload discrimination\.spelling are made anew"
    ):
        api.check("workloads/discrimination/jobs/spelling-small.yaml", ["head.initial.checkpoint=x"])
