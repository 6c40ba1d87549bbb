"""Runs a function in several processes of this host that share a gloo group: for tests and small experiments.

Training proper goes through Ray; this needs nothing but torch.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import io
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch


def spawn(fn: Callable[..., Any], world: int, *args: Any, timeout_s: float = 300.0) -> list[Any]:
    """Calls `fn(rank, world, *args)` in `world` fresh processes and returns their values in rank order.

    Each process has one torch thread and, for any `world`, a gloo group. `fn` is a function of a module;
    values are tensors, numbers, strings, and lists, tuples or dicts of them.

    Raises:
        RuntimeError: with the traceback of the first rank that failed; the others are ended.
        TimeoutError: `timeout_s` seconds have passed.
    """
    context = torch.multiprocessing.get_context("spawn")
    where = (fn.__module__, inspect.getsourcefile(fn), fn.__qualname__)
    with tempfile.TemporaryDirectory(prefix="labelmill-") as folder:
        workers, pipes = [], []
        for rank in range(world):
            ours, theirs = context.Pipe(duplex=False)
            store = f"file://{folder}/store"
            worker = context.Process(target=_work, args=(theirs, store, rank, world, where, args), daemon=True)
            worker.start()
            theirs.close()
            workers.append(worker)
            pipes.append(ours)
        try:
            return _collect(workers, pipes, time.monotonic() + timeout_s)
        finally:
            for worker in workers:
                if worker.is_alive():
                    worker.kill()
                worker.join()


def _collect(workers: list[Any], pipes: list[Connection], deadline: float) -> list[Any]:
    values: dict[int, Any] = {}
    while len(values) < len(workers):
        waiting = {pipe: rank for rank, pipe in enumerate(pipes) if rank not in values}
        ready: list[Any] = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise TimeoutError(f"ranks {sorted(waiting.values())} of {len(workers)} did not finish in time")
        for pipe in ready:
            rank = waiting[pipe]
            try:
                ok, payload = pipe.recv()
            except EOFError:
                workers[rank].join()
                raise RuntimeError(f"rank {rank} died with exit code {workers[rank].exitcode}") from None
            if not ok:
                raise RuntimeError(f"rank {rank} failed:\n{payload}")
            values[rank] = torch.load(io.BytesIO(payload), weights_only=True)
    for worker in workers:
        worker.join(timeout=10)
    return [values[rank] for rank in range(len(workers))]


def _work(pipe: Connection, store: str, rank: int, world: int, where: tuple[str, str, str], args: Any) -> None:
    torch.set_num_threads(1)
    if sys.platform == "linux":
        # all ranks are here: the loopback always answers, the host's own name may not resolve
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    # what a launcher sets and DeepSpeed asks for
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
    try:
        torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
        value = _find(*where)(rank, world, *args)
        buffer = io.BytesIO()
        torch.save(value, buffer)
        pipe.send((True, buffer.getvalue()))
        torch.distributed.barrier()  # a group must not be torn down under a rank that still uses it
        torch.distributed.destroy_process_group()
    except BaseException:
        pipe.send((False, traceback.format_exc()))
        raise SystemExit(1) from None


def _find(module: str, file: str, qualname: str) -> Callable[..., Any]:
    """The function again; test modules have no importable name, so their file is the second way."""
    try:
        found: Any = importlib.import_module(module)
    except ImportError:
        spec = importlib.util.spec_from_file_location(Path(file).stem, file)
        assert spec is not None, file
        assert spec.loader is not None, file
        found = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(found)
    for part in qualname.split("."):
        found = getattr(found, part)
    return found
