"""Checkpoints that are copied, damaged, lost, or don't fit on the disk: the same weights, or a stop that says why."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from labelmill.data import store
from labelmill.errors import DataError
from labelmill.stages import Fitted
from labelmill.training.checkpoint import CheckpointError
from labelmill.training.checkpoint_copies import Copies
from labelmill.training.checkpoint_files import complete, fenced_off, raise_fence, read_dense, verify
from labelmill.training.checkpoint_tools import export_checkpoint, find, verify_entry
from labelmill.training.events import ListSink
from labelmill.training.local import spawn
from labelmill.training.worker import run_worker
from tests.faults import FaultServer, Rule
from tests.survival import assert_as_uninterrupted, assert_no_orphans, fit_task, train_locally, write_texts

PLACE = "s3://data/copies/run"


def leg(rank: int, world: int, data: str, work: str, steps: int, **options: Any) -> list[str]:
    """Trains to `steps` and forgets what was exported, so that the next leg goes on. Returns rank 0's notes."""
    sink = ListSink()
    if rank == 0:
        shutil.rmtree(Path(work, "export"), ignore_errors=True)
    torch.distributed.barrier()
    run_worker(fit_task(data, Path(work), steps, transport="local", **options), rank, world, sink)
    return [event["text"] for event in sink.events if event["kind"] == "note"]


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def damage(work: Path, number: int, file: str) -> Path:
    """A flipped bit near the end of a file of the `number`-th checkpoint."""
    folder = complete(work / "checkpoints")[number]
    (path,) = folder.glob(file)
    flip(path, path.stat().st_size - 3)
    return folder


def damaged_legs(rank: int, world: int, data: str, folder: str) -> dict[str, Any]:
    """Legs to step 24 with damage of several kinds before them, each in a folder of its own."""
    notes = {}
    for case in ("dense", "optimizer", "rows", "head index", "both"):
        work = Path(folder, case)
        if rank == 0:
            shutil.copytree(Path(folder, "half"), work)
            if case == "dense":
                damage(work, 1, "dense.safetensors")
            if case == "optimizer":
                damage(work, 1, "optimizer.safetensors")
            if case == "rows":
                damage(work, 1, "head-classes/head-*.safetensors") if world == 1 else _damage_last_rows(work)
            if case == "head index":
                damage(work, 1, "head-classes/head.json")
            if case == "both":
                damage(work, 0, "dense.safetensors")
                damage(work, 1, "dense.safetensors")
        torch.distributed.barrier()
        try:
            notes[case] = leg(rank, world, data, str(work), 24)
        except DataError as error:
            notes[case] = [f"DataError {error}"]
    return notes


def _damage_last_rows(work: Path) -> None:
    """Of the second rank, which alone meets it."""
    path = max(complete(work / "checkpoints")[1].glob("head-classes/head-*.safetensors"))
    flip(path, path.stat().st_size - 3)


def skewed_legs(rank: int, world: int, data: str, folder: str) -> None:
    """The second rank's clock is an hour ahead, and jumps a day back between the legs."""
    real = time.time
    for steps, skew_s in ((12, 3600.0), (24, -82800.0)):
        if rank == 1:
            time.time = lambda skew_s=skew_s: real() + skew_s
        leg(rank, world, data, f"{folder}/skewed", steps, train={"checkpoint_every_s": 0.2, "checkpoint_every": 0})
    time.time = real


def all_legs(rank: int, world: int, data: str, folder: str) -> dict[str, Any]:
    """What these tests look at, in one process group: starting processes is what costs."""
    train_locally(rank, world, data, f"{folder}/whole", 24)
    leg(rank, world, data, f"{folder}/half", 12)
    found: dict[str, Any] = {"damaged": damaged_legs(rank, world, data, folder)}
    skewed_legs(rank, world, data, folder)
    copied = {"checkpoint_to": PLACE}
    leg(rank, world, data, f"{folder}/copied", 12, **copied)
    if rank == 0:
        shutil.rmtree(Path(folder, "copied", "checkpoints"))  # the disk is lost, the copies stay
    torch.distributed.barrier()
    found["copied"] = leg(rank, world, data, f"{folder}/copied", 24, **copied)
    began = time.monotonic()
    leg(rank, world, data, f"{folder}/copied", 24, **copied)
    found["warm"] = time.monotonic() - began
    return found


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, Any]]]:
    from tests.conftest import s3_environment

    folder = tmp_path_factory.mktemp("checkpoints")
    with FaultServer() as server, pytest.MonkeyPatch.context() as patch:
        server.buckets.add("data")
        for name, value in s3_environment(server).items():
            patch.setenv(name, value)
        data = write_texts(folder)
        yield folder, spawn(all_legs, 2, data, str(folder))[0]


@pytest.mark.parametrize("case", ["dense", "optimizer", "rows", "head index"])
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_it_taken(story: Any, case: str) -> None:
    folder, found = story
    (note,) = found["damaged"][case]
    assert "damaged" in note
    assert "kept as damaged-step-00000012" in note
    work = folder / case
    (aside,) = (work / "checkpoints").glob("damaged-*")
    assert verify(aside)
    assert [entry.state for entry in find(str(work))] == ["damaged", "whole", "whole"]
    shutil.rmtree(aside)
    assert_as_uninterrupted(work, folder / "whole")


def test_without_a_sound_checkpoint_training_does_not_begin_again(story: Any) -> None:
    _, found = story
    notes = found["damaged"]["both"]
    assert notes[-1].startswith("DataError")
    assert "no sound checkpoint is left. Start over with --fresh" in notes[-1]


def test_a_lost_disk_is_replaced_by_the_copies(story: Any) -> None:
    folder, found = story
    assert found["copied"] == []
    assert_as_uninterrupted(folder / "copied", folder / "whole")
    assert Copies(PLACE, 2).steps() == [20, 24]
    names = store.list_files(PLACE)
    assert {name.split("/")[0] for name in names} == {"step-00000020", "step-00000024"}, "old copies are removed"
    entries = find("s3://data/copies")
    assert [(entry.state, entry.step, entry.cursor, entry.world) for entry in entries] == [
        ("copy", 20, 480, 2),
        ("copy", 24, 576, 2),
    ]
    assert [verify_entry(entry) for entry in entries] == [[], []]


def test_clocks_that_differ_change_nothing(story: Any) -> None:
    folder, _ = story
    assert_as_uninterrupted(folder / "skewed", folder / "whole")


def test_export_gives_plain_weights(story: Any, tmp_path: Path) -> None:
    folder, _ = story
    for place in (str(folder / "whole"), PLACE):
        out = tmp_path / place[-3:]
        written = export_checkpoint(place, out)
        assert written["step"] == 24
        rows = load_file(out / "head-classes.safetensors")["rows"]
        torch.testing.assert_close(rows, Fitted(folder / "whole").head_rows("classes"), rtol=1e-4, atol=1e-6)
        dense = read_dense(folder / "whole" / "checkpoints" / "step-00000024")
        assert all(torch.allclose(load_file(out / "dense.safetensors")[n], v, rtol=1e-4) for n, v in dense.items())
    with pytest.raises(DataError, match="no sound checkpoint of step 3"):
        export_checkpoint(str(folder / "whole"), tmp_path / "none", step=3)
    with pytest.raises(DataError, match="several trainings"):
        export_checkpoint(str(folder), tmp_path / "none")


def test_the_commands(story: Any, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from labelmill.cli import app

    folder, _ = story
    run = CliRunner().invoke
    listed = run(app, ["checkpoints", "list", str(folder / "whole"), "--json"])
    assert [(e["step"], e["cursor"], e["world"], e["state"]) for e in json.loads(listed.stdout)] == [
        (20, 480, 2, "whole"),
        (24, 576, 2, "whole"),
    ]
    assert "step-00000024" in run(app, ["checkpoints", "list", str(folder / "whole")]).stdout
    assert run(app, ["checkpoints", "verify", str(folder / "whole")]).stdout.count("sound") == 2
    work = tmp_path / "run"
    shutil.copytree(folder / "whole", work)
    bad = damage(work, 0, "dense.safetensors")
    failed = run(app, ["checkpoints", "verify", str(work)])
    assert isinstance(failed.exception, DataError)
    assert f"{bad}/dense.safetensors: damaged: its sha256" in str(failed.exception)
    done = run(app, ["checkpoints", "export", str(work), str(tmp_path / "out"), "--dtype", "float16"])
    assert done.exit_code == 0, done.stdout
    assert load_file(tmp_path / "out" / "head-classes.safetensors")["rows"].dtype == torch.float16


def test_an_index_that_names_files_elsewhere_is_refused(story: Any, tmp_path: Path) -> None:
    folder, _ = story
    work = tmp_path / "step-00000024"
    shutil.copytree(folder / "whole" / "checkpoints" / "step-00000024", work)
    index = json.loads((work / "checkpoint.json").read_text())
    index["files"]["../../secret"] = {"bytes": 1, "sha256": None}
    (work / "checkpoint.json").write_text(json.dumps(index))
    assert "isn't below its folder" in verify(work)[0]
    assert complete(tmp_path) == []


# --- storage that fails while training runs ----------------------------------------------------------------


def outage(rank: int, world: int, data: str, work: str, flag: str) -> dict[str, Any]:
    """A leg during which the place of copies doesn't answer, and one after it does again."""
    from labelmill.data import s3

    s3.BACKOFF_S = 0.005
    began = time.monotonic()
    during = leg(rank, world, data, work, 12, checkpoint_to=PLACE)
    seconds = time.monotonic() - began
    if rank == 0:
        Path(flag).touch()
        while Path(flag).exists():
            time.sleep(0.05)
    torch.distributed.barrier()
    return {"during": during, "seconds": seconds, "after": leg(rank, world, data, work, 24, checkpoint_to=PLACE)}


def test_training_goes_on_while_s3_is_down(
    faulty: FaultServer, make_text_data: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import threading

    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    data = make_text_data(200, 20)
    # some files of each copy arrive, the others don't
    faulty.rules = [Rule("503", key=f"data/copies/*/{name}", method="PUT", times=None) for name in ("optim*", "head*")]
    flag = tmp_path / "flag"
    back = threading.Event()

    def mend() -> None:
        while not flag.exists() and not back.is_set():
            time.sleep(0.05)
        faulty.calm()
        flag.unlink(missing_ok=True)

    threading.Thread(target=mend, daemon=True).start()
    spawn(train_locally, 1, data.root, str(tmp_path / "whole"), 24)
    found = spawn(outage, 1, data.root, str(tmp_path / "run"), str(flag))[0]
    back.set()
    assert found["during"]
    assert all("could not be copied to s3://data/copies/run" in note for note in found["during"])
    assert found["after"] == []
    assert_as_uninterrupted(tmp_path / "run", tmp_path / "whole")
    assert Copies(PLACE, 2).steps() == [20, 24]
    assert {name.split("/")[0] for name in store.list_files(PLACE)} == {"step-00000020", "step-00000024"}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB; needs the right to mount."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"mounting a small file system: {mounted.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


class Filling(ListSink):
    """Fills the disk at one step, once the checkpoint before is written, and makes room at another."""

    def __init__(self, run: Path, full_at: int, room_at: int) -> None:
        super().__init__()
        self.filler, self.checkpoints = run.parent / "filler", run / "checkpoints"
        self.full_at, self.room_at = full_at, room_at

    def post(self, **event: Any) -> None:
        super().post(**event)
        if event["kind"] != "metrics":
            return
        if event["step"] == self.full_at:
            until = time.monotonic() + 60
            while not complete(self.checkpoints) and time.monotonic() < until:
                time.sleep(0.05)
            free = os.statvfs(self.filler.parent)
            with self.filler.open("wb") as out:
                out.write(bytes(free.f_bavail * free.f_frsize))
        if event["step"] == self.room_at:
            self.filler.unlink()


def on_small_disk(rank: int, world: int, data: str, disk: str, full: str) -> dict[str, Any]:
    train_locally(rank, world, data, f"{full}/whole", 24)
    sink = Filling(Path(disk, "run"), 6, 17)
    options = {"max_failed_checkpoints": 3, "checkpoint_async": True}
    task = fit_task(data, Path(disk, "run"), 24, transport="local", train=options)
    run_worker(task, rank, world, sink if rank == 0 else ListSink())
    notes = [event["text"] for event in sink.events if event["kind"] == "note"]
    lasting = replace(task, work=Path(disk, "lasting"))
    try:
        run_worker(lasting, rank, world, Filling(lasting.work, 6, 99) if rank == 0 else ListSink())
    except CheckpointError as error:
        return {"notes": notes, "error": str(error)}
    return {"notes": notes, "error": ""}


def test_a_full_disk_costs_checkpoints_and_nothing_else(
    small_disk: Path, make_text_data: Callable[..., Any], tmp_path: Path
) -> None:
    data = make_text_data(200, 20)
    found = spawn(on_small_disk, 2, data.root, str(small_disk), str(tmp_path))[0]
    assert found["notes"]
    assert all("No space left" in note and "Training goes on" in note for note in found["notes"])
    assert_as_uninterrupted(small_disk / "run", tmp_path / "whole")
    assert "No space left" in found["error"]
    (small_disk / "filler").unlink()
    (left,) = complete(small_disk / "lasting" / "checkpoints")
    assert left.name == "step-00000004", "the checkpoint before the disk was full is whole"
    assert_no_orphans(small_disk / "lasting")


def test_what_is_left_of_an_older_attempt_commits_nothing(tmp_path: Path) -> None:
    raise_fence(tmp_path, 3)
    assert not fenced_off(tmp_path, 3)
    assert not fenced_off(tmp_path, None)
    raise_fence(tmp_path, 4)
    assert fenced_off(tmp_path, 3)
