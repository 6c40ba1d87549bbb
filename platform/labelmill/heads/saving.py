"""A sharded head to files and back: each rank its own classes. Of several replicas the first writes.

Shape legend: C classes of this rank, D embedding size.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from labelmill.errors import DataError
from labelmill.heads import storage
from labelmill.heads.replicas import mend_replicas
from labelmill.heads.snapshot import RowSnapshot
from labelmill.heads.source import open_rows

if TYPE_CHECKING:
    from labelmill.heads.sharded import ShardedHead


class HeadSave:
    """A head's state at one moment, on its way to files.

    Making one is collective over the head's replicas: those whose rows differ from the first one's get its rows
    (`replicas.mend_replicas`). `write` is not; replicas but the first have nothing to write.

    Args:
        memory_bytes: take a snapshot, so that `write` may run in a thread while training goes on (`snapshot` says at
            what cost). None writes straight from the head's memory: leave the head alone meanwhile.

    Raises RuntimeError while another snapshot of the head is being written.
    """

    def __init__(self, head: ShardedHead, folder: str | Path, memory_bytes: int | None = None) -> None:
        if head.rows.snapshot is not None:
            raise RuntimeError("the head is still being saved")
        tensors = head.state_tensors()
        mend_replicas(head.grid.replicas, tensors)
        self.head, self.folder, self.notes = head, folder, head.notes()
        self.start, self.stop, self.specs = head.start, written_stop(head), storage.specs_of(tensors)
        self._tensors = tensors if memory_bytes is None else {}
        if memory_bytes is not None and head.grid.replicas.rank == 0:
            head.rows.snapshot = RowSnapshot(tensors, head.start, memory_bytes, head.config.sub_centres)
        self._snapshot = head.rows.snapshot

    def write(self) -> dict[str, Any]:
        """Writes own rows and optimizer state, once.

        Returns this rank's part of the folder's index: gather the parts and give them to `storage.write_index`.
        """
        try:
            # for who finds the files without an index, as after a save that was cut off
            metadata = {"num_classes": str(self.head.num_classes)}
            area = (self.start, self.stop, self._fetch)
            files = storage.write_rows(self.folder, "head", self.specs, *area, metadata=metadata)
        finally:
            self.close()
        return storage.part_of(self.specs, self.start, self.stop, files, self.notes)

    def close(self) -> None:
        """Lets go of the head; whoever gives up `write` must call it."""
        if self._snapshot is not None:
            if self.head.rows.snapshot is self._snapshot:
                self.head.rows.snapshot = None
            self._snapshot.close()

    def _fetch(self, lo: int, hi: int) -> Mapping[str, Tensor]:
        if self._snapshot is not None:
            return self._snapshot.page(lo, hi)
        return {name: tensor[lo - self.start : hi - self.start] for name, tensor in self._tensors.items()}


def written_stop(head: ShardedHead) -> int:
    """End of the classes that this rank writes: none in all replicas but the first."""
    return head.stop if head.grid.replicas.rank == 0 else head.start


def load_head(head: ShardedHead, folder: str | Path) -> None:
    """Reads own classes straight into the head's memory, from files that any number of ranks wrote.

    Raises DataError for missing, doubled, cut or damaged files, other sizes or another row optimizer.
    """
    source = open_rows(folder)
    tensors = head.state_tensors()
    if source.num_classes != head.num_classes:
        raise DataError(
            f"{folder}: the files hold {source.num_classes} classes, the head has {head.num_classes}. "
            "`labelmill head grow`, `shrink` or `remap` makes them fit."
        )
    if set(source.specs) != set(tensors):
        raise DataError(
            f"{folder}: holds {sorted(source.specs)}, the head needs {sorted(tensors)}: another row optimizer wrote it."
        )
    head.rows.protect(slice(0, len(head.rows)))
    source.read_into(tensors, head.start, head.stop)
    head.take_notes(source.notes)


def export_rows(head: ShardedHead, folder: str | Path, dtype: torch.dtype = torch.float32) -> list[dict[str, Any]]:
    """Writes own rows alone, unit length if the head normalises, to files `rows-<start>-<stop>.safetensors`.

    Returns {file, start, stop} of each; only the first replica writes.

    Raises ValueError for sub-centres: a plain matrix of rows can't say which of them is nearest.
    """
    if head.config.sub_centres > 1:
        raise ValueError(f"a head of {head.config.sub_centres} sub-centres a class has no one row a class to export")
    unit, rows_CD = head.config.normalize, head.state_tensors()["rows"]

    def fetch(lo: int, hi: int) -> dict[str, Tensor]:
        part = rows_CD[lo - head.start : hi - head.start].to(head.dtype)
        return {"rows": (torch.nn.functional.normalize(part) if unit else part).to(dtype)}

    specs = {"rows": storage.TensorSpec.of(torch.empty(0, head.dim, dtype=dtype))}
    metadata = {"num_classes": str(head.num_classes), "normalize": str(unit)}
    files = storage.write_rows(folder, "rows", specs, head.start, written_stop(head), fetch, metadata=metadata)
    return [{"file": entry.file, "start": entry.start, "stop": entry.stop} for entry in files]
