"""The state of a head's rows at one moment, read by a thread that writes it while training goes on.

Copy on write, row by row: a row that is about to move and isn't written yet is copied first. The copies lie in a pool
of bounded size; when it is full, training waits until the writer has passed some of them. So a snapshot costs

    memory   the pool (`memory_bytes`, touched only as far as it is used) + 4 bytes a class + one page
    time     one copy of each row that moves before it is written

With sampled classes the pool holds what a few steps touch. When every class moves in every step, the first step after
a save ends when all rows but a pool's worth are written; a pool of the size of the rows never waits.

Rows on another device than the CPU are copied to host memory at once: device memory is the scarce one there.

Shape legend: C classes of this rank, K rows about to move.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from labelmill.heads.storage import specs_of


class RowSnapshot:
    """What `tensors` (first axis C) held when this was made; C may be 0.

    With sub-centres a class has `rows_a_class` rows, one after the other.

    One thread reads pages in ascending order with `page`; another calls `protect` before it changes rows, and goes on
    changing `tensors` in place.
    """

    def __init__(self, tensors: Mapping[str, Tensor], start: int, memory_bytes: int, rows_a_class: int = 1) -> None:
        self.rows_a_class = rows_a_class
        self.start, self.specs = start, specs_of(tensors)
        self._tensors = {name: tensor.detach() for name, tensor in tensors.items()}
        self.rows = min((len(tensor) for tensor in tensors.values()), default=0)
        self._turn = threading.Condition()
        self._passed = 0  # rows before this one are out of the writer's hands
        self._closed = not self.rows
        self._pool: dict[str, Tensor] = {}
        if any(tensor.device.type != "cpu" for tensor in tensors.values()):
            self._tensors = {name: tensor.cpu() for name, tensor in self._tensors.items()}
            self._closed = True
        if self._closed:
            return
        row_bytes = sum(spec.row_bytes for spec in self.specs.values())
        room = max(1, min(self.rows, memory_bytes // max(1, row_bytes)))
        self._slot_C = torch.full((self.rows,), -1, dtype=torch.int32)
        self._pool = {name: spec.empty(room) for name, spec in self.specs.items()}
        self._free = torch.arange(room, dtype=torch.int32)
        self._room = room  # the first so many of `_free` are free

    def protect(self, rows: slice | Tensor) -> None:
        """Keeps the state of local rows that are about to change; a slice, or int64 ids (K,)."""
        if self._closed:
            return
        group = self.rows_a_class
        ids_K = torch.arange(*rows.indices(self.rows * group)) if isinstance(rows, slice) else rows.cpu().unique()
        if group > 1:
            ids_K = (ids_K // group).unique_consecutive()
        with self._turn:
            while not self._closed:
                ids_K = ids_K[(ids_K >= self._passed) & (self._slot_C[ids_K] < 0)]
                if not ids_K.numel():
                    return
                if not self._room:
                    self._turn.wait()
                    continue
                now_K = ids_K[: self._room]
                slot_K = self._free[self._room - len(now_K) : self._room].long()
                for name, tensor in self._tensors.items():
                    self._pool[name][slot_K] = tensor[now_K]
                self._slot_C[now_K] = slot_K.int()
                self._room -= len(now_K)

    def page(self, lo: int, hi: int) -> dict[str, Tensor]:
        """The tensors of the classes [lo, hi) (global ids) as they were; ranges ascend and don't overlap."""
        here = slice(lo - self.start, hi - self.start)
        if self._closed:
            return {name: tensor[here] for name, tensor in self._tensors.items()}
        with self._turn:
            page = {name: tensor[here].clone() for name, tensor in self._tensors.items()}
            slot_R = self._slot_C[here]
            kept = (slot_R >= 0).nonzero()[:, 0]
            if kept.numel():
                slots = slot_R[kept].long()
                for name, tensor in page.items():
                    tensor[kept] = self._pool[name][slots]
                self._free[self._room : self._room + len(slots)] = slots.int()
                self._room += len(slots)
            self._passed = here.stop
            self._turn.notify_all()
        return page

    def close(self) -> None:
        """Ends the protection, after the last page or a failure; whoever waits goes on."""
        with self._turn:
            self._closed = True
            self._turn.notify_all()
            self._pool = {}


class Background:
    """Runs one piece of work at a time in a thread. Its error surfaces in the next `start` or `finish`."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, work: Any) -> None:
        """Starts `work()` once the work before it has finished."""
        self.finish()

        def run() -> None:
            try:
                work()
            except BaseException as error:
                self._error = error

        self._thread = threading.Thread(target=run, name=self._name, daemon=True)
        self._thread.start()

    def finish(self, timeout_s: float | None = None) -> bool:
        """Waits for the work and raises its error. False when it goes on after `timeout_s`."""
        if self._thread is not None:
            self._thread.join(timeout_s)
            if self._thread.is_alive():
                return False
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        return True
