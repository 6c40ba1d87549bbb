"""The encoded head on real gloo processes against plain autograd on dense scores, in double precision."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from labelmill.errors import DataError
from labelmill.heads.encoded import EncodedHead, encode_cached, encoded_head_config, in_pool, label_pool
from labelmill.heads.ranks import Ranks
from labelmill.losses.classification import dense_loss
from labelmill.losses.retrieval import (
    BCESection,
    DecoupledSection,
    RetrievalLoss,
    SoftmaxSection,
    SoftTopKSection,
    soft_topk_loss,
)
from labelmill.training.local import spawn

LABELS, DIM = 131, 6  # blocks of 2 labels: uneven shards
SPLITS = {1: [7], 2: [3, 4], 3: [4, 0, 3]}
LOSSES: list[RetrievalLoss] = [
    SoftmaxSection(),
    DecoupledSection(),
    BCESection(bias=-2.0),
    SoftTopKSection(k=3),
    SoftTopKSection(k="num_pos", alpha=1.5),
]


def problem() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Queries, raw label rows, positives, their weights, queries' weights; a positive on the last label of every shard."""
    noise = torch.Generator().manual_seed(3)
    x = torch.randn(7, DIM, generator=noise, dtype=torch.float64)
    rows = torch.randn(LABELS, DIM, generator=noise, dtype=torch.float64)
    ids = torch.tensor([[130, 4, -1], [65, -1, -1], [43, 87, 1], [0, 64, 66], [130, 0, -1], [2, -1, -1], [-1, -1, -1]])
    target = torch.where(ids >= 0, 1.0, 0.0).double()
    target[2, 1] = 0.0  # left out of the step
    target[3, 2] = 0.5
    weight = torch.tensor([1.0, 2.0, 1.0, 0.5, 1.0, 1.0, 0.0], dtype=torch.float64)
    return x, rows, ids, target, weight


def dense(loss: RetrievalLoss, normalize: bool, scale: float) -> list[Tensor]:
    x, rows, ids, target, weight = problem()
    x.requires_grad_()
    rows.requires_grad_()
    scores = (F.normalize(x) @ F.normalize(rows).T if normalize else x @ rows.T) * scale
    if isinstance(loss, SoftTopKSection):
        places = target.sum(1).ceil().clamp_min(1) if loss.k == "num_pos" else torch.full((7,), float(loss.k))
        value_N = soft_topk_loss(scores, ids, places, loss.alpha, target)
    else:
        value_N = dense_loss(loss.row_loss(), scores, ids, target_NP=target)
    value = (torch.where(weight > 0, value_N, 0.0) * weight).sum() / weight.sum()
    value.backward()
    return [value.detach(), x.grad, rows.grad]


def sharded(rank: int, world: int, index: int, normalize: bool, scale: float) -> list[Tensor]:
    loss = LOSSES[index]
    x, rows, ids, target, weight = problem()
    lo = sum(SPLITS[world][:rank])
    mine = slice(lo, lo + SPLITS[world][rank])
    config = encoded_head_config(loss, normalize, 1.0 / scale, memory_mb=0.05)
    head = EncodedHead(LABELS, DIM, loss, config, dtype=torch.float64)
    head.grad_scale = 1.0
    own_x, own_rows = x[mine].clone().requires_grad_(), rows[head.start : head.stop].clone().requires_grad_()
    value = head.encoded_loss(own_x, own_rows, ids[mine], target[mine], weight[mine])
    value.backward()
    head.step(0.1)
    assert head.steps == 1
    assert torch.equal(head.w_CD, own_rows.detach()), "rows don't move by themselves"
    scores, found = head.topk(x[mine], 4)
    return [value.detach(), own_x.grad, own_rows.grad, scores, found]


@pytest.mark.parametrize("normalize", [True, False])
def test_sharded_equals_dense(normalize: bool) -> None:
    scale = 4.0 if normalize else 1.0
    x, rows, *_ = problem()
    scores = F.normalize(x) @ F.normalize(rows).T if normalize else x @ rows.T
    best, ids = scores.topk(4)
    for world in SPLITS if normalize else (2,):
        for result in [spawn(every_loss, world, normalize, scale)]:
            for index, loss in enumerate(LOSSES):
                value, grad_x, grad_rows = dense(loss, normalize, scale)
                parts = [rank[index] for rank in result]
                for part in parts:
                    torch.testing.assert_close(part[0], value, rtol=1e-9, atol=1e-11)
                torch.testing.assert_close(torch.cat([p[1] for p in parts]), grad_x, rtol=1e-8, atol=1e-10)
                torch.testing.assert_close(torch.cat([p[2] for p in parts]), grad_rows, rtol=1e-8, atol=1e-10)
                torch.testing.assert_close(torch.cat([p[3] for p in parts]), best)
                assert torch.equal(torch.cat([p[4] for p in parts]), ids)


def every_loss(rank: int, world: int, normalize: bool, scale: float) -> list[list[Tensor]]:
    return [sharded(rank, world, index, normalize, scale) for index in range(len(LOSSES))]


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 16)
        self.net = nn.Sequential(nn.Dropout(0.3), nn.Linear(16, 32), nn.ReLU(), nn.Dropout(0.3), nn.Linear(32, DIM))

    def forward(self, ids: Tensor) -> Tensor:
        return self.net(self.table(ids).mean(1))


def gradients(cached: bool, chunks: list[Tensor], queries: Tensor) -> tuple[Tensor, list[Tensor]]:
    torch.manual_seed(0)
    tower, loss = Tower(), DecoupledSection()
    head = EncodedHead(len(torch.cat(chunks)), DIM, loss, encoded_head_config(loss))
    torch.manual_seed(5)
    x = tower(queries)
    if cached:
        sizes = [len(c) for c in chunks]
        rows = encode_cached(tower, chunks, sizes, head.room_for_rows())
    else:
        rows = torch.cat([tower(chunk) for chunk in chunks])
    value = head.encoded_loss(x, rows, torch.arange(len(queries))[:, None] * 3, None, torch.ones(len(queries)))
    value.backward()
    return value.detach(), [p.grad for p in tower.parameters()]


def test_the_gradient_cache_is_plain_autograd_with_dropout_on() -> None:
    noise = torch.Generator().manual_seed(1)
    chunks = [torch.randint(50, (size, 5), generator=noise) for size in (20, 20, 7)]
    queries = torch.randint(50, (9, 5), generator=noise)
    plain, cached = gradients(False, chunks, queries), gradients(True, chunks, queries)
    assert torch.equal(plain[0], cached[0])
    for a, b in zip(plain[1], cached[1], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_steps_hand_on_the_memory_of_rows_and_gradient(tmp_path: Path) -> None:
    torch.manual_seed(0)
    chunks = list(torch.randint(50, (47, 5)).split(20))
    tower, loss = Tower().eval(), DecoupledSection()
    head = EncodedHead(47, DIM, loss, encoded_head_config(loss))
    ids, weight = torch.tensor([[3], [40]]), torch.ones(2)

    def forward() -> tuple[Tensor, Tensor]:
        rows = encode_cached(tower, chunks, [20, 20, 7], head.room_for_rows())
        return head.encoded_loss(tower(chunks[0][:2]), rows, ids, None, weight), rows

    value, rows = forward()
    place, kept = rows.data_ptr(), rows.detach().clone()
    second, others = forward()
    assert others.data_ptr() != place, "the first pass is still to be differentiated"
    (value + second).backward()
    both = [p.grad.clone() for p in tower.parameters()]
    assert torch.equal(rows, kept)
    tower.zero_grad()
    lent = {g.data_ptr() for g in head._lent}
    value, rows = forward()
    assert rows.data_ptr() == others.data_ptr()
    value.backward()
    assert {g.data_ptr() for g in head._lent} <= lent
    for twice, once in zip(both, tower.parameters(), strict=True):
        torch.testing.assert_close(twice, 2 * once.grad)
    save = head.begin_save(tmp_path, 1 << 20)
    assert head.room_for_rows().data_ptr() != others.data_ptr(), "a save reads them"
    save.close()


def cached_ranks(rank: int, world: int) -> list[Tensor]:
    torch.manual_seed(0)
    tower, loss = Tower().eval(), SoftTopKSection(k=4)
    head = EncodedHead(LABELS, DIM, loss, encoded_head_config(loss))
    everything = torch.arange(LABELS * 5).view(LABELS, 5) % 50
    own = everything[head.start : head.stop]
    chunks = list(own.split(16))
    x = tower(everything[rank * 2 : rank * 2 + 2])
    rows = encode_cached(tower, chunks, [len(c) for c in chunks], head.room_for_rows())
    ids = torch.tensor([[rank * 2], [rank * 2 + 1]])
    value = head.encoded_loss(x, rows, ids, None, torch.ones(2))
    value.backward()
    # what a data-parallel engine does: the mean over ranks
    return [value.detach(), *(Ranks().sum_(p.grad) / world for p in tower.parameters())]


def test_encoders_of_two_ranks_learn_as_one() -> None:
    torch.manual_seed(0)
    tower = Tower().eval()
    everything = torch.arange(LABELS * 5).view(LABELS, 5) % 50
    scores = F.normalize(tower(everything[:4])) @ F.normalize(tower(everything)).T * 20
    expected = soft_topk_loss(scores, torch.arange(4)[:, None], torch.full((4,), 4.0), 2.0).mean()
    expected.backward()
    for value, *grads in spawn(cached_ranks, 2):
        torch.testing.assert_close(value, expected.detach(), rtol=1e-5, atol=1e-6)
        for grad, parameter in zip(grads, tower.parameters(), strict=True):
            torch.testing.assert_close(grad, parameter.grad, rtol=1e-3, atol=2e-6)


def test_pools() -> None:
    pool = label_pool(Ranks.alone(), torch.tensor([[7, 3], [-1, 7]]))
    assert pool.tolist() == [3, 7]
    assert in_pool(torch.tensor([[7, 5, -1, 3]]), pool).tolist() == [[1, -1, -1, 0]]


def test_bad_input() -> None:
    loss = SoftTopKSection(k=5)
    head = EncodedHead(5, DIM, loss, encoded_head_config(loss))
    x, rows = torch.randn(2, DIM), torch.randn(5, DIM)
    with pytest.raises(DataError, match="0 < k < number of labels; k is 5 and there are 5 labels"):
        head.encoded_loss(x, rows, torch.tensor([[0], [1]]), None, torch.ones(2))
    with pytest.raises(DataError, match="label 9 of sample 1"):
        head.encoded_loss(x, rows, torch.tensor([[0], [9]]), None, torch.ones(2))
    with pytest.raises(DataError, match="has no positive class"):
        head.encoded_loss(x, rows, torch.tensor([[0], [-1]]), None, torch.ones(2))
    with pytest.raises(ValueError, match="needed are"):
        head.encoded_loss(x, rows[:3], torch.tensor([[0], [1]]), None, torch.ones(2))
    loss2 = DecoupledSection()
    head = EncodedHead(2, DIM, loss2, encoded_head_config(loss2))
    value = head.encoded_loss(x, rows[:2], torch.tensor([[0, 1], [0, 1]]), None, torch.ones(2))
    assert float(value) == 0.0, "no negative, nothing to learn"
