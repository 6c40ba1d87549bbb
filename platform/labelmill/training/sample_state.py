"""Numbers that a method remembers of each training sample, by its key: equal on all ranks, saved with the checkpoint.

A sample comes to another rank in another epoch, and to another number of ranks after a resume. So what was learnt of it is
kept under its key in a table that every rank has: N x W float32, for data sets up to some ten million samples.

Shape legend: N samples of the data set, B samples of this rank's batch, W numbers of a sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from labelmill.data.keys import key_hashes
from labelmill.data.manifest import Manifest
from labelmill.data.shards import read_labels
from labelmill.errors import DataError
from labelmill.heads.ranks import Ranks


class SampleState(nn.Module):
    """The table. A buffer of the objective's module, so that checkpoints hold it, whatever the number of workers.

    Args:
        keys: of all training samples (`of` reads them from a data set).
        width: W.
        initial: what is remembered of a sample that wasn't seen yet.

    Raises DataError for a key that occurs twice.
    """

    values_NW: Tensor

    def __init__(self, keys: Sequence[str], width: int, initial: float = 0.0) -> None:
        super().__init__()
        hashes = key_hashes(keys)[0]
        order = np.argsort(hashes, kind="stable")
        self._sorted = hashes[order]
        if len(twice := np.flatnonzero(self._sorted[1:] == self._sorted[:-1])):
            a, b = keys[order[twice[0]]], keys[order[twice[0] + 1]]
            raise DataError(f"samples {a!r} and {b!r} can't be told apart: every sample needs a key of its own.")
        self.register_buffer("values_NW", torch.full((len(hashes), width), initial))
        self.ranks = Ranks()

    def _apply(self, fn: Any, recurse: bool = True) -> SampleState:
        # moves with the module, but stays float32 where the module is cast to bf16
        self.values_NW = self.values_NW.to(fn(self.values_NW.new_empty(0)).device)
        return self

    @classmethod
    def of(cls, data: Manifest, width: int, initial: float = 0.0) -> SampleState:
        """For the samples of a data set; reads their keys."""
        keys = [key for i in range(len(data.shards)) for key in read_labels(data, i).column("key").to_pylist()]
        return cls(keys, width, initial)

    def rows(self, keys: Sequence[str]) -> Tensor:
        """int64 (B,): where the samples stand in the table. Raises DataError for an unknown key."""
        hashes = key_hashes(keys)[0]
        at = np.minimum(np.searchsorted(self._sorted, hashes), len(self._sorted) - 1)
        if len(unknown := np.flatnonzero(self._sorted[at] != hashes)):
            raise DataError(
                f"sample {keys[unknown[0]]!r} isn't among the {len(self._sorted)} samples that are remembered. Losses with a "
                "memory take one training set, without a mix."
            )
        return torch.from_numpy(at).to(self.values_NW.device)

    def read(self, rows_B: Tensor) -> Tensor:
        """(B, W), a copy."""
        return self.values_NW[rows_B]

    @torch.no_grad()
    def write(self, rows_B: Tensor, new_BW: Tensor, weight_B: Tensor) -> None:
        """Remembers `new_BW` of the samples with weight, on all ranks. Collective.

        Of a sample that comes twice in a global batch (padding, a selection that repeats), the last rank's last value stays.
        """
        ranks, rows_B = self.ranks, torch.where(weight_B > 0, rows_B, -1)
        counts = [n for (n,) in ranks.gather_numbers([len(rows_B)], rows_B.device)]
        rows_N = ranks.gather_rows(rows_B, counts)
        new_NW = ranks.gather_rows(new_BW.detach().to(self.values_NW.dtype), counts)
        for_row = (rows_N >= 0).nonzero()[:, 0]
        if len(rows_N) != len(rows_N.unique()):
            # an index that occurs twice is written in no certain order: keep its last place
            last = {int(row): i for i, row in enumerate(rows_N.tolist()) if row >= 0}
            for_row = torch.tensor(sorted(last.values()), dtype=torch.int64, device=rows_N.device)
        self.values_NW[rows_N[for_row]] = new_NW[for_row]
