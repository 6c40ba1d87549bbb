"""One rank's head: memory, top-k, export, and the labels that it takes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from labelmill.data.labels import Labels
from labelmill.errors import DataError
from labelmill.heads.config import HeadConfig
from labelmill.heads.optim import SGD
from labelmill.heads.sharded import ShardedHead
from labelmill.heads.topk import topk_rows
from labelmill.losses.classification import MLCD
from labelmill.losses.margins import CosFace


class LargestTensor(TorchDispatchMode):
    """Remembers the size of the largest tensor that an operation makes, apart from the storages given."""

    def __init__(self, apart: set[int]) -> None:
        super().__init__()
        self.apart, self.elements = apart, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in self.apart:
                size = tensor.untyped_storage().nbytes() // tensor.element_size()
                self.elements = max(self.elements, size)
        return out


@pytest.mark.parametrize(("rate", "memory_mb"), [(0.01, 64.0), (0.01, 0.0), (1.0, 0.0)])
def test_nothing_of_batch_times_classes_or_a_dense_gradient(rate: float, memory_mb: float) -> None:
    num_classes, dim, batch = 40_000, 32, 128
    config = HeadConfig(sample_rate=rate, memory_mb=memory_mb, margin=CosFace(), optimizer=SGD(momentum=0.9))
    head = ShardedHead(num_classes, dim, config)
    x_BD = torch.randn(batch, dim, requires_grad=True)
    ids_B = torch.randint(num_classes, (batch,))
    shard = {head.w_CD.untyped_storage().data_ptr(), head.state["momentum"].untyped_storage().data_ptr()}
    with LargestTensor(shard) as largest:
        for _ in range(2):
            head.loss(x_BD, ids_B).backward()
        head.step(0.1)
        head.topk(x_BD.detach(), 5)
    logits = 4096 * batch  # of the largest chunk
    if rate < 1:
        touched = num_classes * rate + 2 * batch
        assert largest.elements <= 2 * touched * batch < num_classes * dim / 7
    else:
        # every row is touched: the collected gradient is as large as the shard, logits are not
        assert largest.elements <= max(num_classes * dim, 2 * logits) < num_classes * batch


def test_topk_of_many_rows_and_ties() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(-2, 3, (9000, 6), generator=generator).float()  # many equal scores, exactly
    queries = torch.randint(-2, 3, (1100, 6), generator=generator).float()
    scores, ids = topk_rows(queries, rows, 9, offset=100)
    dense = queries @ rows.T
    order = torch.sort(dense, dim=1, descending=True, stable=True)
    assert torch.equal(scores, order.values[:, :9])
    assert torch.equal(ids, order.indices[:, :9] + 100)
    rising = torch.arange(5000.0)[:, None].repeat(1, 2)  # every chunk beats all before it
    assert topk_rows(torch.ones(3, 2), rising, 4)[1].tolist() == [[4999, 4998, 4997, 4996]] * 3
    scores, ids = topk_rows(queries[:2], rows[:3], 5)
    assert ids[:, 3:].tolist() == [[-1, -1]] * 2
    assert scores[0, 3:].tolist() == [-math.inf] * 2
    half = topk_rows(queries, rows.half(), 9, normalize_rows=True)[0]
    want = (queries @ F.normalize(rows).T).topk(9).values
    torch.testing.assert_close(half, want, rtol=0, atol=1e-5)
    with pytest.raises(FloatingPointError, match="queries"):
        topk_rows(torch.full((1, 6), torch.nan), rows, 1)


def small_head(**fields: Any) -> ShardedHead:
    return ShardedHead(203, 12, HeadConfig(init_std=1.0, **fields))


def test_labels_in_batch_form() -> None:
    head = small_head(loss=MLCD())
    emb_BD = torch.randn(3, 12)
    ids_BP = torch.tensor([[1, 2], [3, -1], [202, 0]])
    assert head.loss(emb_BD, Labels("multi", ids_BP)) == head.loss(emb_BD, ids_BP)
    assert head.loss(emb_BD, Labels("single", ids_BP[:, :1])) == head.loss(emb_BD, ids_BP[:, 0])
    with pytest.raises(DataError, match="form single or multi, not soft"):
        head.loss(emb_BD, Labels("soft", ids_BP, weights_BP=torch.ones(3, 2)))
    with pytest.raises(ValueError, match="don't fit 3 embeddings"):
        head.loss(emb_BD, ids_BP[:2])


def test_second_backward_is_refused() -> None:
    loss = small_head().loss(torch.randn(3, 12, requires_grad=True), torch.tensor([1, 2, 3]))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="already differentiated"):
        loss.backward()


def test_export_is_unit_rows(tmp_path: Path) -> None:
    head = small_head()
    (entry,) = head.export_rows(tmp_path, torch.float16)
    assert (entry["start"], entry["stop"]) == (0, 203)
    rows = load_file(tmp_path / entry["file"])["rows"]
    assert rows.dtype == torch.float16
    torch.testing.assert_close(rows.float(), F.normalize(head.w_CD), rtol=0, atol=1e-3)
    assert [path.name for path in tmp_path.iterdir()] == [entry["file"]]  # nothing half-written stays
