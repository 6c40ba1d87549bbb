"""Head files and snapshots: any cut reads back, damage is named, training doesn't reach into a save."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from labelmill.errors import DataError
from labelmill.heads import storage
from labelmill.heads.config import HeadConfig
from labelmill.heads.optim import SGD, AdamW
from labelmill.heads.sharded import ShardedHead
from labelmill.heads.snapshot import Background, RowSnapshot
from labelmill.heads.source import open_rows
from labelmill.heads.storage import part_of, specs_of, write_index, write_rows

CLASSES, DIM = 1003, 12


def tensors(count: int = CLASSES) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "rows": torch.randn(count, DIM, generator=generator),
        "half": torch.randn(count, 3, generator=generator).bfloat16(),
        "steps": torch.randint(9, (count,), generator=generator, dtype=torch.int32),
        "wide": torch.randn(count, 2, 2, generator=generator, dtype=torch.float64),
    }


def save(folder: Path, edges: list[int], content: Mapping[str, Tensor], notes: Any = None, **options: Any) -> None:
    """As ranks that own [edges[i], edges[i + 1]) would."""
    parts = []
    for lo, hi in pairwise(edges):
        files = write_rows(
            folder, "head", specs_of(content), lo, hi, lambda a, b: {n: t[a:b] for n, t in content.items()}, **options
        )
        parts.append(part_of(specs_of(content), lo, hi, files, notes or {"steps": 4}))
    write_index(folder, edges[-1], parts)


@pytest.fixture
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "PAGE_BYTES", 4000)  # 40 rows


@pytest.mark.parametrize("edges", [[0, 1003], [0, 500, 500, 1003], [0, 1, 77, 1003]])
def test_any_range_reads_back(tmp_path: Path, small_pages: None, edges: list[int]) -> None:
    want = tensors()
    save(tmp_path, edges, want, file_bytes=30_000)
    source = open_rows(tmp_path)
    assert (source.num_classes, source.dim, source.notes) == (CLASSES, DIM, {"steps": 4})
    assert len(source.files) >= 4
    assert all(entry.bytes == (tmp_path / entry.file).stat().st_size <= 31_000 for entry in source.files)
    for lo, hi in [(0, 1003), (0, 0), (76, 78), (499, 501), (1002, 1003), (13, 990)]:
        got = source.read(lo, hi)
        assert all(torch.equal(got[name], want[name][lo:hi]) for name in want)
    ids = torch.randperm(CLASSES)[:300]
    picked = {name: want[name][:300].clone() for name in want}
    source.take_into(picked, ids)
    assert all(torch.equal(picked[name], want[name][ids]) for name in want)
    theirs = load_file(tmp_path / source.files[1].file)  # plain safetensors for everybody else
    entry = source.files[1]
    assert all(torch.equal(theirs[name], want[name][entry.start : entry.stop]) for name in want)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([storage.INDEX, *(e.file for e in source.files)])


def test_narrower_floats_are_widened_and_wider_ones_refused(tmp_path: Path) -> None:
    want = tensors()
    save(tmp_path, [0, CLASSES], want)
    source = open_rows(tmp_path)
    into = torch.empty(10, 3)
    source.read_into({"half": into}, 5, 15)
    assert torch.equal(into, want["half"][5:15].float())
    for wrong in (torch.empty(10, DIM, dtype=torch.float16), torch.empty(10, DIM, dtype=torch.int64)):
        with pytest.raises(DataError, match=r"'rows' is float32, the head's is .* lose digits"):
            source.read_into({"rows": wrong}, 0, 10)
    with pytest.raises(DataError, match=r"'rows' has shape \[12\], the head needs \[13\]"):
        source.read_into({"rows": torch.empty(10, 13)}, 0, 10)
    with pytest.raises(DataError, match=r"not 'sum': another row optimizer"):
        source.read_into({"sum": torch.empty(10)}, 0, 10)
    with pytest.raises(DataError, match="class 1003 is out of range: it holds 0 to 1002"):
        source.take_into({"rows": torch.empty(2, DIM)}, torch.tensor([0, 1003]))


def test_damage_is_named(tmp_path: Path, small_pages: None) -> None:
    def fresh(name: str) -> tuple[Path, Path, storage.RowFile]:
        folder = tmp_path / name
        save(folder, [0, 500, 1003], tensors(), file_bytes=30_000)
        entry = open_rows(folder).files[2]
        return folder, folder / entry.file, entry

    folder, path, entry = fresh("missing")
    path.unlink()
    with pytest.raises(DataError, match=rf"{path.name}: missing; it holds the classes \[{entry.start}, {entry.stop}\)"):
        open_rows(folder).verify()
    open_rows(folder).read(0, entry.start)  # what doesn't need it still loads

    folder, path, _ = fresh("cut")
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match=rf"{path.name}: cut off: it has"):
        open_rows(folder).verify()
    path.write_bytes(b"\x09")
    with pytest.raises(DataError, match=rf"{path.name}: cut off or not a safetensors file"):
        open_rows(folder).verify()

    folder, path, entry = fresh("flipped")
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=rf"{path.name}: damaged: 'half' of the classes \[\d+, {entry.stop}\)"):
        open_rows(folder).verify()
    open_rows(folder).read(entry.start, entry.start + 3)  # pages that are whole still load

    folder, path, _ = fresh("other")
    save_file({name: t[:1] for name, t in tensors().items()}, path)
    with pytest.raises(DataError, match=r"bytes, its index says"):
        open_rows(folder).verify()

    folder, _, _ = fresh("index")
    (folder / storage.INDEX).write_text("{")
    with pytest.raises(DataError, match=r"head\.json: not a readable index"):
        open_rows(folder)
    (folder / storage.INDEX).write_text(json.dumps({"format": "labelmill-head", "version": 2}))
    with pytest.raises(DataError, match="'version': 2"):
        open_rows(folder)
    with pytest.raises(DataError, match="holds no head"):
        open_rows(tmp_path)


def test_missing_overlapping_and_mixed_parts(tmp_path: Path) -> None:
    content = tensors()

    def part(lo: int, hi: int, folder: Path = tmp_path, steps: int = 4) -> dict[str, Any]:
        files = write_rows(
            folder, "head", specs_of(content), lo, hi, lambda a, b: {n: t[a:b] for n, t in content.items()}
        )
        return part_of(specs_of(content), lo, hi, files, {"steps": steps})

    with pytest.raises(DataError, match=r"no file holds the classes \[500, 501\)"):
        write_index(tmp_path, CLASSES, [part(0, 500), part(501, CLASSES)])
    with pytest.raises(DataError, match=r"two files hold the classes \[400, 500\).*different numbers of workers"):
        write_index(tmp_path, CLASSES, [part(0, 500), part(400, CLASSES)])
    with pytest.raises(DataError, match="the files hold 1003 classes, the head has 900"):
        write_index(tmp_path, 900, [part(0, CLASSES)])
    with pytest.raises(DataError, match="were not saved together: steps is 5 and 4"):
        write_index(tmp_path, CLASSES, [part(0, 500), part(500, CLASSES, steps=5)])
    assert not (tmp_path / storage.INDEX).exists()
    # without an index, names tell: saves of one and of two workers lie here together
    with pytest.raises(DataError, match="two files hold"):
        open_rows(tmp_path)
    part(0, 500, tmp_path / "named")
    part(500, CLASSES, tmp_path / "named")
    got = open_rows(tmp_path / "named").read(490, 510)
    assert torch.equal(got["rows"], content["rows"][490:510])


def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path, small_pages: None) -> None:
    def fetch(lo: int, hi: int) -> dict[str, Tensor]:
        if lo > 600:
            raise OSError(28, "No space left on device")
        return {"rows": torch.zeros(hi - lo, DIM)}

    with pytest.raises(OSError, match="No space"):
        write_rows(tmp_path, "head", specs_of({"rows": torch.zeros(0, DIM)}), 0, CLASSES, fetch, file_bytes=10_000)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


# --- snapshots ----------------------------------------------------------------------------------------------


def read_all(snapshot: RowSnapshot, pause: Callable[[], None], step: int = 32) -> dict[str, Tensor]:
    pages = []
    for lo in range(snapshot.start, snapshot.start + snapshot.rows, step):
        pages.append(snapshot.page(lo, min(lo + step, snapshot.start + snapshot.rows)))
        pause()
    return {name: torch.cat([page[name] for page in pages]) for name in snapshot.specs}


@pytest.mark.parametrize("memory", [1 << 30, 5000, 1])
@pytest.mark.parametrize("every_row", [True, False])
def test_a_snapshot_is_the_state_at_its_moment(memory: int, every_row: bool) -> None:
    """Rows move while a slow writer reads; with a small pool the trainer waits for it."""
    live = tensors()
    want = {name: tensor.clone() for name, tensor in live.items()}
    snapshot = RowSnapshot(live, 70, memory)
    got: dict[str, Tensor] = {}
    writer = threading.Thread(target=lambda: got.update(read_all(snapshot, lambda: time.sleep(0.001))))
    writer.start()
    generator = torch.Generator().manual_seed(1)
    for _ in range(30):
        if every_row:
            for lo in range(0, CLASSES, 100):
                rows: slice | Tensor = slice(lo, lo + 100)
                snapshot.protect(rows)
                for tensor in live.values():
                    tensor[rows] += 1
        else:
            rows = torch.randperm(CLASSES, generator=generator)[:50]
            snapshot.protect(rows)
            for tensor in live.values():
                tensor[rows] += 1
    writer.join()
    snapshot.close()
    assert all(torch.equal(got[name], want[name]) for name in want)
    assert not torch.equal(live["rows"], want["rows"])


def test_a_failed_writer_lets_training_go_on() -> None:
    snapshot = RowSnapshot(tensors(), 0, 1)
    threading.Timer(0.05, snapshot.close).start()
    snapshot.protect(slice(0, CLASSES))  # would wait for a writer that isn't there
    snapshot.protect(slice(0, CLASSES))


def test_background_errors_surface_once_and_work_never_overlaps() -> None:
    running: list[int] = []
    overlaps: list[int] = []

    def work() -> None:
        running.append(1)
        overlaps.append(len(running))
        time.sleep(0.01)
        running.pop()

    background = Background("test")
    for _ in range(3):
        background.start(work)
    assert background.finish()
    assert overlaps == [1, 1, 1]

    def fail() -> None:
        raise OSError("disk full")

    background.start(fail)
    with pytest.raises(OSError, match="disk full"):
        background.start(work)
    assert background.finish()


def test_a_head_trains_while_it_is_saved(tmp_path: Path, small_pages: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is read back is the head at the moment of the save, bit for bit, whatever training did meanwhile."""
    pwrite = storage._pwrite
    monkeypatch.setattr(storage, "_pwrite", lambda *args: (time.sleep(0.001), pwrite(*args)))  # a slow disk
    for optimizer in (SGD(momentum=0.9), AdamW()):
        for rate in (1.0, 0.1):
            head = ShardedHead(CLASSES, DIM, HeadConfig(optimizer=optimizer, sample_rate=rate, init_std=1.0))

            def train(steps: int, head: ShardedHead = head) -> None:
                for _ in range(steps):
                    x_BD = torch.randn(8, DIM, requires_grad=True)
                    head.loss(x_BD, torch.randint(CLASSES, (8,))).backward()
                    head.step(0.1)

            train(2)
            want = {name: tensor.clone() for name, tensor in head.state_tensors().items()}
            folder = tmp_path / f"{optimizer.kind}-{rate}"
            save_ = head.begin_save(folder, 20_000)
            with pytest.raises(RuntimeError, match="still being saved"):
                head.begin_save(folder, 20_000)
            part: list[Any] = []
            thread = threading.Thread(target=lambda s=save_, p=part: p.append(s.write()))
            train(1) if rate < 1 else None  # before the writer begins
            thread.start()
            train(3)
            head.set_rows(torch.tensor([1002, 5]), torch.ones(2, DIM))
            thread.join()
            write_index(folder, CLASSES, part)
            source = open_rows(folder)
            got = source.read(0, CLASSES)
            assert all(torch.equal(got[name], want[name]) for name in want)
            assert source.notes["steps"] == 2
            assert head.rows.snapshot is None
            again = ShardedHead(CLASSES, DIM, head.config, seed=1)
            again.load(folder)
            assert torch.equal(again.w_CD, want["rows"])
            assert again.steps == 2


def test_a_save_that_was_cut_off_is_no_smaller_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an index the files are read by their names; what is missing at the end is noticed all the same."""
    monkeypatch.setattr(storage, "write_rows", partial(write_rows, file_bytes=1))
    monkeypatch.setattr(storage, "PAGE_BYTES", 20_000)
    head = ShardedHead(CLASSES, DIM, HeadConfig())
    head.save(tmp_path)  # the index is written by whoever gathers the ranks' parts
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 2
    assert open_rows(tmp_path).num_classes == CLASSES
    files[-1].unlink()
    with pytest.raises(DataError, match=r"no file holds the classes \[\d+, 1003\) of the head"):
        open_rows(tmp_path)
