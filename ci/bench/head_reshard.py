"""Saving, loading and resharding a head beside plain writes, reads and copies of the same bytes on the same disk.

    PYTHONPATH=platform:. .venv/bin/python ci/bench/head_reshard.py [--classes N] [--dim D] [--folder PATH]

By default 1,000,000 classes of 512 numbers with momentum, 4.1 GB; needs three times that on the disk and about 6 GB of
memory. Gloo ranks with one thread each. Before every read the files' pages are dropped from the page cache, and every
write ends with fsync, so that the disk is measured and not memory. Each plain line is taken right before the lines
below it. Prints a Markdown table.
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

from labelmill.heads.config import HeadConfig
from labelmill.heads.optim import SGD
from labelmill.heads.reshard import convert, grow, remap
from labelmill.heads.sharded import ShardedHead
from labelmill.heads.snapshot import Background
from labelmill.heads.source import open_rows
from labelmill.heads.storage import write_index
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


def saves(rank: int, world: int, classes: int, dim: int, folder: str) -> dict[str, Any]:
    """A save as it is, torch.save of each rank's tensors, and a save while steps go on."""
    head, out = make(classes, dim), Path(folder, "saved")
    head.state["momentum"].copy_(head.w_CD)  # pages that are in use, and numbers that don't compress

    def save() -> None:
        parts: list[Any] = [None] * world
        dist.all_gather_object(parts, head.save(out))
        if rank == 0:
            write_index(out, classes, parts)

    def torch_save() -> None:
        path = Path(folder, f"torch-{rank}.pt")
        with path.open("wb") as file:
            torch.save(head.state_tensors(), file)
            file.flush()
            os.fsync(file.fileno())

    result: dict[str, Any] = {"torch.save": timed(torch_save)}
    Path(folder, f"torch-{rank}.pt").unlink()
    result["save"] = timed(save)
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


def loads(rank: int, world: int, classes: int, dim: int, folder: str) -> dict[str, Any]:
    head = make(classes, dim)
    head.w_CD.zero_()
    return {"load": timed(lambda: head.load(Path(folder, "saved")))}


def plain_write(folder: Path, size: int) -> float:
    """Seconds to write and flush so many random bytes in files of 256 MiB."""
    block, began = os.urandom(BLOCK), time.perf_counter()
    for number in range(0, size, 2**28):
        with (folder / f"plain-{number}").open("wb", buffering=0) as out:
            for _ in range(number, min(number + 2**28, size), BLOCK):
                out.write(block)
            os.fsync(out.fileno())
    seconds = time.perf_counter() - began
    for path in folder.glob("plain-*"):
        path.unlink()
    return seconds


def plain_read(source: Path) -> float:
    forget(source)
    buffer, began = bytearray(BLOCK), time.perf_counter()
    for path in sorted(source.iterdir()):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - began


def plain_copy(source: Path, out: Path) -> float:
    forget(source)
    out.mkdir()
    began = time.perf_counter()
    for path in sorted(source.iterdir()):
        with path.open("rb", buffering=0) as file, (out / path.name).open("wb", buffering=0) as copy:
            while block := file.read(BLOCK):
                copy.write(block)
            os.fsync(copy.fileno())
    seconds = time.perf_counter() - began
    shutil.rmtree(out)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--classes", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--folder", type=Path, help="where to write; a temporary folder by default")
    options = parser.parse_args()
    torch.set_num_threads(1)
    classes, dim = options.classes, options.dim
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="head-reshard-") as name:
        folder = Path(name)
        size = classes * dim * 8
        rows: list[tuple[str, float, float | None, int | None]] = []

        def row(what: str, seconds: float, plain: float | None = None, peak: int | None = None) -> None:
            rows.append((what, seconds, plain, peak))
            print(f"  {what}: {seconds:.2f} s", flush=True)

        write = plain_write(folder, size)
        row("plain write", write)
        saved = spawn(saves, 2, classes, dim, name, timeout_s=900)
        row("torch.save of each rank's tensors, 2 ranks", saved[0]["torch.save"][0], write, saved[0]["torch.save"][1])
        row("save, 2 ranks", saved[0]["save"][0], write, saved[0]["save"][1])
        row("save behind training steps, 2 ranks", saved[0]["behind"][0], write, max(r["behind"][1] for r in saved))
        source = folder / "saved"
        read = plain_read(source)
        row("plain read", read)
        for world in (1, 2, 3):
            forget(source)
            found = spawn(loads, world, classes, dim, name, timeout_s=900)[0]["load"]
            row(f"load, {world} rank{'s' * (world > 1)}", found[0], read, found[1])
        copy = plain_copy(source, folder / "copy")
        row("plain copy", copy)
        files = len(open_rows(source).files)
        verbs: dict[str, Callable[[Path], Any]] = {
            f"convert, {files} files -> 5": lambda out: convert(source, out, files=5),
            "convert to bfloat16 (half the bytes written)": lambda out: convert(
                source, out, dtype=torch.bfloat16, state_dtype=torch.bfloat16
            ),
            "grow by 10%": lambda out: grow(source, out, classes + classes // 10),
            "remap, every tenth class dropped": lambda out: remap(source, out, dropped(classes)),
        }
        for what, verb in verbs.items():
            forget(source)
            peak, began = peak_from_here(), time.perf_counter()
            verb(folder / "out")
            row(what, time.perf_counter() - began, copy, peak())
            shutil.rmtree(folder / "out")
        show(rows, size, saved[0])


def dropped(classes: int) -> torch.Tensor:
    keep = torch.arange(classes) % 10 > 0
    return torch.where(keep, keep.cumsum(0) - 1, -1)


def show(rows: list[tuple[str, float, float | None, int | None]], size: int, saved: dict[str, Any]) -> None:
    print(f"\n{size / 1e9:.2f} GB of rows and momentum\n")
    print("| what | s | GB/s | x plain | peak memory, MiB a process |\n|---|---|---|---|---|")
    for what, seconds, plain, peak in rows:
        ratio = "" if plain is None else f"{seconds / plain:.2f}"
        memory = "" if peak is None else f"{peak / 2**20:,.0f}"
        print(f"| {what} | {seconds:.2f} | {size / 1e9 / seconds:.2f} | {ratio} | {memory} |")
    middle, longest, count = saved["steps during"]
    print(
        f"\nTraining step (10% of the classes, 64 samples a rank): {1000 * saved['step']:.0f} ms alone; while a save is "
        f"written {1000 * middle:.0f} ms (median of {count}), {1000 * longest:.0f} ms at most. "
        f"Beginning the save: {1000 * saved['begin']:.1f} ms."
    )


if __name__ == "__main__":
    main()
