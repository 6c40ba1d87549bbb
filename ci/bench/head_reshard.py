"""Saving, loading and resharding a head beside plain writes, reads and copies of the same bytes on the same disk.

    PYTHONPATH=platform:. .venv/bin/python ci/bench/head_reshard.py [--classes N] [--dim D] [--folder PATH]

By default 1,000,000 classes of 512 numbers with momentum, 4.1 GB; needs three times that on the disk and about 6 GB of
memory. Gloo ranks with one thread each. Before every read the files' pages are dropped from the page cache, and every
write ends with fsync, so that the disk is measured and not memory. Disks of virtual machines vary by the minute: plain
and own lines alternate, `--rounds` times, and the table holds medians. `--part` takes one of the three parts.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from labelmill.heads import storage
from labelmill.heads.config import HeadConfig
from labelmill.heads.optim import SGD
from labelmill.heads.reshard import convert, grow, remap
from labelmill.heads.sharded import ShardedHead
from labelmill.heads.snapshot import Background
from labelmill.heads.source import open_rows
from labelmill.training.local import spawn

BLOCK = 2**23
STEPS = 12


def peak_from_here() -> Callable[[], int]:
    """Bytes by which this process's peak memory rises from now on."""

    def field(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024

    Path("/proc/self/clear_refs").write_text("5")
    before = field("VmRSS")
    return lambda: max(0, field("VmHWM") - before)


def forget(folder: Path) -> None:
    """Drops the files' pages from the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def make(classes: int, dim: int) -> ShardedHead:
    config = HeadConfig(optimizer=SGD(momentum=0.9), sample_rate=0.1, scale=64.0)
    return ShardedHead(classes, dim, config, seed=0)


def timed(work: Callable[[], Any]) -> tuple[float, int]:
    """Seconds until the last rank is done, and the largest rise of a rank's peak memory."""
    peak = peak_from_here()
    dist.barrier()
    began = time.perf_counter()
    work()
    dist.barrier()
    seconds = time.perf_counter() - began
    rise = torch.tensor([peak()])
    dist.all_reduce(rise, op=dist.ReduceOp.MAX)
    return seconds, int(rise)


def saves(rank: int, world: int, classes: int, dim: int, folder: str, rounds: int) -> dict[str, Any]:
    """A save as it is, torch.save of each rank's tensors, and a save while steps go on."""
    head, out = make(classes, dim), Path(folder, "saved")
    head.state["momentum"].copy_(head.w_CD)  # pages that are in use, and numbers that don't compress

    def save() -> None:
        parts: list[Any] = [None] * world
        dist.all_gather_object(parts, head.save(out))
        if rank == 0:
            storage.write_index(out, classes, parts)

    def torch_save() -> None:
        path = Path(folder, f"torch-{rank}.pt")
        with path.open("wb") as file:
            torch.save(head.state_tensors(), file)
            file.flush()
            os.fsync(file.fileno())

    result: dict[str, Any] = {"plain": [], "torch.save": [], "save": []}
    for _ in range(rounds):
        result["plain"].append(timed(lambda: plain_write(Path(folder), rank, classes * dim * 8 // world)))
        result["torch.save"].append(timed(torch_save))
        result["save"].append(timed(save))
        Path(folder, f"torch-{rank}.pt").unlink()
    result["step"] = statistics.median(steps(head, STEPS, dim))
    background, peak = Background("save"), peak_from_here()
    dist.barrier()
    began = time.perf_counter()
    saving = head.begin_save(Path(folder, "behind"), 2**28)
    background.start(saving.write)
    result["begin"] = time.perf_counter() - began
    during: list[float] = []
    while not during or (during_flag(background) and len(during) < 2000):
        during += steps(head, 1, dim)
    background.finish()
    result["behind"] = (time.perf_counter() - began, peak())
    result["steps during"] = (statistics.median(during), max(during), len(during))
    dist.barrier()
    if rank == 0:
        shutil.rmtree(Path(folder, "behind"))
    return result


def during_flag(background: Background) -> bool:
    """Whether any rank still writes; the same answer on all ranks, so that they step equally often."""
    busy = torch.tensor([int(not background.finish(0.0))])
    dist.all_reduce(busy)
    return bool(busy)


def steps(head: ShardedHead, count: int, dim: int) -> list[float]:
    """Seconds of training steps with 64 samples a rank."""
    seconds = []
    for _ in range(count):
        x_BD, ids_B = torch.randn(64, dim, requires_grad=True), torch.randint(head.num_classes, (64,))
        began = time.perf_counter()
        head.loss(x_BD, ids_B).backward()
        head.step(0.1)
        seconds.append(time.perf_counter() - began)
    return seconds


def loads(rank: int, world: int, classes: int, dim: int, folder: str, rounds: int) -> dict[str, Any]:
    """Loads of own classes, and plain reads of the files by the first rank."""
    head, source = make(classes, dim), Path(folder, "saved")
    for tensor in head.state_tensors().values():
        tensor.zero_()
    result: dict[str, Any] = {"plain": [], "load": []}
    for _ in range(rounds):
        for name, work in (("plain", lambda: rank or plain_read(source)), ("load", lambda: head.load(source))):
            if rank == 0:
                forget(source)
            result[name].append(timed(work))
    return result


def plain_write(folder: Path, rank: int, size: int) -> None:
    """Writes and flushes so many bytes in files of 256 MiB."""
    block = os.urandom(BLOCK)
    paths = []
    for number in range(0, size, 2**28):
        paths.append(folder / f"plain-{rank}-{number}")
        with paths[-1].open("wb", buffering=0) as out:
            for _ in range(number, min(number + 2**28, size), BLOCK):
                out.write(block)
            os.fsync(out.fileno())
    for path in paths:
        path.unlink()


def plain_read(source: Path) -> None:
    """Reads every file."""
    buffer = bytearray(BLOCK)
    for path in sorted(source.iterdir()):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def plain_copy(source: Path, out: Path) -> None:
    """Copies every file and flushes it."""
    out.mkdir()
    for path in sorted(source.iterdir()):
        with path.open("rb", buffering=0) as file, (out / path.name).open("wb", buffering=0) as copy:
            while block := file.read(BLOCK):
                copy.write(block)
            os.fsync(copy.fileno())


class Table:
    """Rows of the table; each is printed as soon as it is known."""

    def __init__(self, size: int) -> None:
        self.size = size
        print("| what | s | GB/s | x plain | peak memory, MiB a process |\n|---|---|---|---|---|")

    def row(self, what: str, found: list[tuple[float, int]], plain: list[tuple[float, int]] | None = None) -> None:
        seconds = statistics.median(s for s, _ in found)
        ratio = "" if plain is None else f"{seconds / statistics.median(s for s, _ in plain):.2f}"
        peak = max(p for _, p in found) / 2**20
        print(f"| {what} | {seconds:.2f} | {self.size / 1e9 / seconds:.2f} | {ratio} | {peak:,.0f} |", flush=True)


def save_part(table: Table, folder: Path, classes: int, dim: int, rounds: int) -> str:
    ranks = spawn(saves, 2, classes, dim, str(folder), rounds, timeout_s=900)
    saved = ranks[0]
    table.row("plain write, 2 processes", saved["plain"])
    table.row("torch.save of each rank's tensors, 2 ranks", saved["torch.save"], saved["plain"])
    table.row("save, 2 ranks", saved["save"], saved["plain"])
    table.row("save behind training steps, 2 ranks", [max(r["behind"] for r in ranks)], saved["plain"])
    middle, longest, count = saved["steps during"]
    return (
        f"Training step (10% of the classes, 64 samples a rank): {1000 * saved['step']:.0f} ms alone; while a save is "
        f"written {1000 * middle:.0f} ms (median of {count}), {1000 * longest:.0f} ms at most. Beginning the save: "
        f"{1000 * saved['begin']:.1f} ms. Of the peak, 256 MiB are rows kept for the writer."
    )


def write_saved(folder: Path, classes: int, dim: int) -> None:
    """A saved head for the other parts, page by page."""
    rows = torch.randn(2**16, dim)
    specs = storage.specs_of({"rows": rows, "sgd.momentum": rows})
    notes = make(1000, dim).notes()

    def fetch(lo: int, hi: int) -> dict[str, torch.Tensor]:
        return dict.fromkeys(specs, rows[: hi - lo])

    files = storage.write_rows(folder, "head", specs, 0, classes, fetch)
    storage.write_index(folder, classes, [storage.part_of(specs, 0, classes, files, notes)])


def load_part(table: Table, folder: Path, classes: int, dim: int, rounds: int) -> str:
    for world in (1, 2, 3):
        found = spawn(loads, world, classes, dim, str(folder), rounds, timeout_s=900)[0]
        table.row("plain read, 1 process", found["plain"])
        table.row(f"load, {world} rank{'s' * (world > 1)}", found["load"], found["plain"])
    return ""


def convert_part(table: Table, folder: Path, classes: int, dim: int, rounds: int) -> str:
    source, out = folder / "saved", folder / "out"
    files = len(open_rows(source).files)
    verbs: dict[str, Callable[[], Any]] = {
        "plain copy": lambda: plain_copy(source, out),
        f"convert, {files} files -> 5": lambda: convert(source, out, files=5),
        "convert to bfloat16 (half the bytes written)": lambda: convert(
            source, out, dtype=torch.bfloat16, state_dtype=torch.bfloat16
        ),
        "grow by 10%": lambda: grow(source, out, classes + classes // 10),
        "remap, every tenth class dropped": lambda: remap(source, out, dropped(classes)),
    }
    taken: dict[str, list[tuple[float, int]]] = {what: [] for what in verbs}
    for _ in range(rounds):
        for what, verb in verbs.items():
            forget(source)
            peak, began = peak_from_here(), time.perf_counter()
            verb()
            taken[what].append((time.perf_counter() - began, peak()))
            shutil.rmtree(out)
    for what, found in taken.items():
        table.row(what, found, None if what == "plain copy" else taken["plain copy"])
    return ""


PARTS = {"save": save_part, "load": load_part, "convert": convert_part}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--classes", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--part", choices=PARTS, action="append", help="default: all")
    parser.add_argument("--folder", type=Path, help="where to write; a temporary folder by default")
    options = parser.parse_args()
    torch.set_num_threads(1)
    size = options.classes * options.dim * 8
    print(f"{size / 1e9:.2f} GB of rows and momentum\n")
    table, remarks = Table(size), []
    for part in options.part or PARTS:
        with tempfile.TemporaryDirectory(dir=options.folder, prefix="head-reshard-") as name:
            if part != "save":
                write_saved(Path(name, "saved"), options.classes, options.dim)
            remarks.append(PARTS[part](table, Path(name), options.classes, options.dim, options.rounds))
    print("\n" + "\n".join(filter(None, remarks)))


def dropped(classes: int) -> torch.Tensor:
    keep = torch.arange(classes) % 10 > 0
    return torch.where(keep, keep.cumsum(0) - 1, -1)


if __name__ == "__main__":
    main()
