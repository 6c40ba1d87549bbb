"""The sharded head on 1, 2 and 3 gloo ranks against a dense double-precision model written in plain autograd.

Starting processes is slow, so each world is started once and goes through every check; a failed check fails
the tests of its world with its traceback. `trace_*` results are compared between worlds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from labelmill.errors import DataError
from labelmill.heads import statistics
from labelmill.heads.config import HeadConfig
from labelmill.heads.optim import SGD, Adagrad, AdamW
from labelmill.heads.sampling import sampled_classes
from labelmill.heads.sharded import ShardedHead
from labelmill.heads.storage import write_index
from labelmill.losses.classification import MLC, MLCD, Decoupled, MultiSoftmax
from labelmill.losses.margins import ArcFace, Combined, CosFace
from labelmill.training.local import spawn

DIM = 12
WORLDS = (1, 2, 3)
SPLITS = {1: [11], 2: [7, 4], 3: [5, 0, 6]}
"""Local batch sizes by world: uneven, and a rank without samples."""


# --- the dense reference --------------------------------------------------------------------------------


def reference_loss(
    w_CD: Tensor, x_ND: Tensor, ids: list[list[int]], weights: Tensor, config: HeadConfig, drawn: set[int]
) -> Tensor:
    """Weighted mean loss, sample by sample, from the definitions."""
    present = drawn | {c for n, row in enumerate(ids) if weights[n] > 0 for c in row}
    sim_NC = F.normalize(x_ND) @ F.normalize(w_CD).T if config.normalize else x_ND @ w_CD.T
    total = torch.zeros((), dtype=torch.float64)
    for n, row in enumerate(ids):
        if weights[n] == 0:
            continue
        negative = config.scale * sim_NC[n, sorted(present - set(row))]
        positive = config.scale * reference_margin(sim_NC[n, row], config.margin)
        total = total + weights[n] * REFERENCES[config.loss.kind](positive, negative)
    return total / weights.sum()


def reference_margin(cos: Tensor, margin: Any) -> Tensor:
    if margin.kind == "cosface":
        return cos - margin.m
    if margin.kind == "none":
        return cos
    m1, m2, m3 = (1.0, margin.m, 0.0) if margin.kind == "arcface" else (margin.m1, margin.m2, margin.m3)
    moved = torch.cos(m1 * torch.acos(cos) + m2) - m3
    return cos + (moved - cos).detach() if margin.straight_through else moved


def cross_entropy(positive: Tensor, others: Tensor) -> Tensor:
    return -torch.log_softmax(torch.cat([positive[None], others]), 0)[0]


REFERENCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "softmax": lambda p, n: cross_entropy(p[0], n),
    "multi_softmax": lambda p, n: torch.stack(
        [cross_entropy(p[i], torch.cat([p[:i], p[i + 1 :], n])) for i in range(len(p))]
    ).mean(),
    "decoupled": lambda p, n: torch.stack([cross_entropy(z, n) for z in p]).mean(),
    "mlc": lambda p, n: torch.log1p(n.exp().sum() * (-p).exp().sum()),
    "mlcd": lambda p, n: torch.log1p((-p).exp().sum()) + torch.log1p(n.exp().sum()),
}


# --- shared pieces of the checks ------------------------------------------------------------------------


class Data:
    """A global batch and this rank's part of it; the same on every rank."""

    def __init__(self, rank: int, world: int, num_classes: int, positives: int, seed: int = 0, top: int | None = None):
        generator = torch.Generator().manual_seed(seed)
        count = sum(SPLITS[world])
        self.x_ND = torch.randn(count, DIM, dtype=torch.float64, generator=generator)
        self.weights = torch.rand(count, dtype=torch.float64, generator=generator) + 0.5
        self.weights[3] = 0.0
        self.ids: list[list[int]] = []
        for n in range(count):
            many = 1 + n % positives
            self.ids.append(torch.randperm(top or num_classes, generator=generator)[:many].tolist())
        self.ids[2] = list(self.ids[1])  # two samples with the same classes
        self.ids_NP = torch.tensor([row + [-1] * (positives - len(row)) for row in self.ids])
        self.ids_NP[3] = -1  # a hole: no weight, no label
        self.ids[3] = []
        lo = sum(SPLITS[world][:rank])
        self.mine = slice(lo, lo + SPLITS[world][rank])

    def call(self, head: ShardedHead, x_BD: Tensor) -> Tensor:
        return head.loss(x_BD, self.ids_NP[self.mine], self.weights[self.mine])


def whole(head: ShardedHead, tensor: Tensor) -> Tensor:
    """All ranks' rows of a tensor whose first axis is the class."""
    counts = [n for (n,) in head.ranks.gather_numbers([len(tensor)], head.device)]
    return head.ranks.gather_rows(tensor, counts)


def dense_pending(head: ShardedHead) -> Tensor:
    """The collected gradient of own rows, zero where nothing was touched."""
    ids, grad = head.pending_rows()
    dense = torch.zeros_like(head.w_CD)
    dense[ids - head.start] = grad
    return dense


def drawn_classes(head: ShardedHead) -> set[int]:
    rate = head.config.sample_rate
    if rate >= 1:
        return set(range(head.num_classes))
    return set(sampled_classes(head.num_classes, rate, head.seed, head.steps).tolist())


def make(num_classes: int, seed: int = 0, **fields: Any) -> ShardedHead:
    config = HeadConfig(init_std=1.0, block_rows=64, **{"scale": 6.0, **fields})
    return ShardedHead(num_classes, DIM, config, seed=seed, dtype=torch.float64)


def close(got: Tensor, want: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


CASES: dict[str, tuple[int, int, dict[str, Any]]] = {
    # name: classes, positives a sample, config
    "softmax": (1003, 1, {}),
    "softmax sampled": (1003, 1, {"sample_rate": 0.1}),
    "softmax linear": (1003, 1, {"normalize": False, "scale": 1.0}),
    "softmax linear large logits": (1003, 1, {"normalize": False, "scale": 40.0, "sample_rate": 0.2}),
    "softmax past the exponent": (1003, 1, {"scale": 900.0}),
    "softmax recomputed": (1003, 1, {"memory_mb": 0.0}),
    "softmax linear half kept": (1003, 1, {"normalize": False, "scale": 3.0, "memory_mb": 0.02}),
    "cosface": (1003, 1, {"margin": CosFace(m=0.35), "sample_rate": 0.3}),
    "arcface": (1003, 1, {"margin": ArcFace(m=0.4)}),
    "arcface straight-through": (1003, 1, {"margin": ArcFace(m=0.4, straight_through=True)}),
    "combined": (203, 3, {"margin": Combined(m1=1.2, m2=0.1, m3=0.1), "loss": Decoupled()}),
    "mlcd": (1003, 4, {"loss": MLCD(), "margin": CosFace(m=0.3)}),
    "mlcd sampled": (1003, 4, {"loss": MLCD(), "sample_rate": 0.05, "memory_mb": 0.0}),
    "mlcd linear": (1003, 4, {"loss": MLCD(), "normalize": False, "scale": 1.0, "sample_rate": 0.5}),
    "mlcd more positives than drawn": (1003, 6, {"loss": MLCD(), "sample_rate": 0.001}),
    "mlc": (1003, 4, {"loss": MLC(), "sample_rate": 0.3}),
    "decoupled": (1003, 4, {"loss": Decoupled(), "sample_rate": 0.3}),
    "multi_softmax": (1003, 4, {"loss": MultiSoftmax(), "sample_rate": 0.3}),
    "fewer classes than ranks": (2, 1, {}),
    "two classes, both positive": (2, 2, {"loss": MLCD()}),
    "one class": (1, 1, {}),
    "one class linear": (1, 1, {"normalize": False}),
}


# --- checks that run on every rank ----------------------------------------------------------------------


def check_dense_equality(rank: int, world: int, folder: str) -> None:
    """Loss, gradient of the embeddings and gradient of the rows, for every loss, margin and sampling."""
    for number, (name, (num_classes, positives, fields)) in enumerate(CASES.items()):
        # some cases keep all positives in the first classes: the last ranks own none
        top = min(num_classes, 20) if number % 2 else num_classes
        data = Data(rank, world, num_classes, positives, seed=number, top=top)
        head = make(num_classes, seed=number, **fields)
        w_CD = whole(head, head.w_CD).clone().requires_grad_()
        x_ND = data.x_ND.clone().requires_grad_()
        want = reference_loss(w_CD, x_ND, data.ids, data.weights, head.config, drawn_classes(head))
        want.backward()
        x_BD = data.x_ND[data.mine].clone().requires_grad_()
        got = data.call(head, x_BD)
        try:
            close(got.detach(), want.detach())
            got.backward()
            close(x_BD.grad, world * x_ND.grad[data.mine])
            close(dense_pending(head), w_CD.grad[head.start : head.stop])
            with torch.no_grad():
                close(data.call(head, x_BD), want.detach())
            norm = head.ranks.sum_(head.pending_sq_norm())
            close(norm, w_CD.grad.square().sum(), 1e-9)
        except AssertionError as error:
            raise AssertionError(f"case {name!r} on rank {rank} of {world}: {error}") from error


def check_accumulation(rank: int, world: int, folder: str) -> None:
    """Micro batches add up, each with the factor of its own backward; the drawn classes stay for the step."""
    for rate in (1.0, 0.1):
        head = make(1003, loss=MLCD(), sample_rate=rate)
        w_CD = whole(head, head.w_CD).clone().requires_grad_()
        for micro in range(3):
            data = Data(rank, world, 1003, 3, seed=micro)
            x_BD = data.x_ND[data.mine].clone().requires_grad_()
            (data.call(head, x_BD) / 3).backward()
            args = (w_CD, data.x_ND, data.ids, data.weights, head.config, drawn_classes(head))
            (reference_loss(*args) / 3).backward()
        close(dense_pending(head), w_CD.grad[head.start : head.stop])
        first = drawn_classes(head)
        head.zero_pending()
        assert not head.pending_rows()[1].any()
        assert drawn_classes(head) == first
        head.step(0.1)
        assert rate == 1.0 or drawn_classes(head) != first
        close(whole(head, head.w_CD), w_CD.detach())


def check_two_losses_in_one_graph(rank: int, world: int, folder: str) -> None:
    """Two views through one head before one backward pass."""
    head = make(1003, sample_rate=0.2)
    w_CD = whole(head, head.w_CD).clone().requires_grad_()
    data = [Data(rank, world, 1003, 1, seed=s) for s in (1, 2)]
    x_BD = [d.x_ND[d.mine].clone().requires_grad_() for d in data]
    (data[0].call(head, x_BD[0]) + 2 * data[1].call(head, x_BD[1])).backward()
    drawn = drawn_classes(head)
    want = [reference_loss(w_CD, d.x_ND, d.ids, d.weights, head.config, drawn) for d in data]
    (want[0] + 2 * want[1]).backward()
    close(dense_pending(head), w_CD.grad[head.start : head.stop])


def check_optimizers(rank: int, world: int, folder: str) -> None:
    """Rows after several steps equal torch's optimizers on the dense matrix."""
    decay = 0.02
    optimizers = [
        SGD(momentum=0.9, weight_decay=decay),
        SGD(momentum=0.0, weight_decay=decay),
        AdamW(weight_decay=decay),
        Adagrad(weight_decay=decay),
    ]
    for optimizer in optimizers:
        head = make(203, optimizer=optimizer, lr_multiplier=2.0)
        w_CD = torch.nn.Parameter(whole(head, head.w_CD).clone())
        lr = 0.01 if optimizer.kind == "adamw" else 0.3
        dense: Any
        if optimizer.kind == "sgd":
            dense = torch.optim.SGD([w_CD], lr, momentum=optimizer.momentum, weight_decay=decay)
        elif optimizer.kind == "adamw":
            dense = torch.optim.AdamW([w_CD], lr, betas=optimizer.betas, eps=optimizer.eps, weight_decay=decay)
        sums = torch.zeros(203, dtype=torch.float64)
        for step in range(5):
            data = Data(rank, world, 203, 1, seed=step)
            x_BD = data.x_ND[data.mine].clone().requires_grad_()
            data.call(head, x_BD).backward()
            head.step(lr / 2, scale=0.5)
            w_CD.grad = None
            reference_loss(w_CD, data.x_ND, data.ids, data.weights, head.config, set(range(203))).backward()
            w_CD.grad.mul_(0.5)
            if optimizer.kind == "adagrad":
                with torch.no_grad():
                    grad = w_CD.grad + decay * w_CD
                    sums += grad.square().mean(1)
                    w_CD -= lr * grad / (sums.sqrt() + optimizer.eps)[:, None]
            else:
                dense.step()
        close(whole(head, head.w_CD), w_CD.detach(), 1e-9)


def check_touched_rows_only(rank: int, world: int, folder: str) -> None:
    """Rows that no step drew keep weight and state, to the bit."""
    head = make(1003, sample_rate=0.02, optimizer=AdamW(weight_decay=0.1))
    before = head.w_CD.clone()
    touched = torch.zeros(len(before), dtype=torch.bool)
    for step in range(3):
        data = Data(rank, world, 1003, 1, seed=step)
        data.call(head, data.x_ND[data.mine].clone().requires_grad_()).backward()
        ids = head.pending_rows()[0]
        want = drawn_classes(head) | {c for row in data.ids for c in row}
        assert ids.tolist() == sorted(c for c in want if head.start <= c < head.stop)
        touched[ids - head.start] = True
        head.step(0.1)
    assert torch.equal(head.w_CD[~touched], before[~touched])
    assert (head.w_CD[touched] != before[touched]).all()
    assert torch.equal(head.state["touched"] > 0, touched)
    assert touched.sum() < 120


def check_topk(rank: int, world: int, folder: str) -> None:
    """Best classes equal the dense ones, ties by class id, for uneven batches."""
    for normalize in (True, False):
        head = make(1003, normalize=normalize)
        w_CD = whole(head, head.w_CD)
        data = Data(rank, world, 1003, 1)
        dense = (F.normalize(data.x_ND) @ F.normalize(w_CD).T) if normalize else data.x_ND @ w_CD.T
        scores, ids = head.topk(data.x_ND[data.mine], 7)
        want = dense.topk(7, dim=1)
        close(scores, want.values[data.mine])
        assert torch.equal(ids, want.indices[data.mine])
    small = make(3)
    assert small.topk(data.x_ND[data.mine], 3)[1].sort(dim=1).values.tolist() == [[0, 1, 2]] * SPLITS[world][rank]
    ties = make(200, normalize=False)
    own = torch.arange(ties.start, ties.stop)
    ties.set_rows(own, (own % 5 == 3).double()[:, None].expand(-1, DIM))
    scores, ids = ties.topk(torch.ones(SPLITS[world][rank], DIM), 50)
    assert ids.tolist() == [[*range(3, 200, 5), 0, 1, 2, 4, 5, 6, 7, 9, 10, 11]] * SPLITS[world][rank]
    with pytest.raises(ValueError, match="between 1 and the number of classes 3"):
        small.topk(data.x_ND[data.mine], 4)


def check_bad_input(rank: int, world: int, folder: str) -> None:
    """Wrong input of one rank raises on every rank, and the head goes on afterwards."""
    head = make(50)
    last = world - 1
    x_BD = torch.randn(3, DIM, dtype=torch.float64)
    good = torch.tensor([1, 2, 49])

    def on_last(value: Tensor, other: Tensor) -> Tensor:
        return value if rank == last else other

    with pytest.raises(DataError, match=rf"label 50 of sample 1 of rank {last}'s batch .* 0 to 49"):
        head.loss(x_BD, on_last(torch.tensor([1, 50, 2]), good))
    with pytest.raises(DataError, match=rf"label -2 of sample 0 of rank {last}"):
        head.loss(x_BD, on_last(torch.tensor([-2, 0, 2]), good))
    with pytest.raises(DataError, match=rf"sample 2 of rank {last}'s batch has no positive"):
        head.loss(x_BD, on_last(torch.tensor([1, 0, -1]), good))
    with pytest.raises(DataError, match="one positive a sample"):
        head.loss(x_BD, on_last(torch.tensor([[1, 0], [2, -1], [3, -1]]), good[:, None]))
    with pytest.raises(DataError, match="weight of sample 1"):
        head.loss(x_BD, good, on_last(torch.tensor([1.0, -1.0, 1.0]), torch.ones(3)))
    broken = x_BD.clone()
    broken[2, 0] = torch.nan
    with pytest.raises(FloatingPointError, match=rf"embedding of sample 2 of rank {last}"):
        head.loss(on_last(broken, x_BD), good)
    with pytest.raises(TypeError, match="int64"):
        head.loss(x_BD, good.float())
    kept = head.w_CD.clone()
    if rank == last and len(kept):
        head.w_CD[-1, 0] = torch.nan
    with pytest.raises(FloatingPointError, match="class rows"):
        head.loss(x_BD, good)
    head.w_CD.copy_(kept)
    assert torch.isfinite(head.loss(x_BD, good))
    assert head.loss(x_BD, torch.full((3,), -1), torch.zeros(3)).item() == 0.0  # nothing but holes
    assert head.loss(x_BD[:0], good[:0]).item() == 0.0  # no samples at all


def check_single_precision(rank: int, world: int, folder: str) -> None:
    """float32 rows with bfloat16 embeddings at the usual scale of 64."""
    data = Data(rank, world, 1003, 4)
    config = HeadConfig(loss=MLCD(), margin=CosFace(m=0.3), scale=64.0, sample_rate=0.5, init_std=1.0)
    head = ShardedHead(1003, DIM, config)
    w_CD = whole(head, head.w_CD).double().requires_grad_()
    x_BD = data.x_ND[data.mine].bfloat16().requires_grad_()
    got = data.call(head, x_BD)
    got.backward()
    x_ND = data.x_ND.bfloat16().double().requires_grad_()
    want = reference_loss(w_CD, x_ND, data.ids, data.weights, config, drawn_classes(head))
    want.backward()
    assert got.dtype == torch.float32
    assert x_BD.grad.dtype == torch.bfloat16
    close(got.detach().double(), want.detach(), 2e-6)
    peak = w_CD.grad.abs().max()
    assert (dense_pending(head).double() - w_CD.grad[head.start : head.stop]).abs().max() < 2e-5 * peak


def check_frozen_encoder(rank: int, world: int, folder: str) -> None:
    """Rows learn also when the embeddings need no gradient."""
    head = make(203)
    data = Data(rank, world, 203, 1)
    data.call(head, data.x_ND[data.mine]).backward()
    assert head.pending_rows()[1].any() or head.start == head.stop
    # a loss that is never differentiated leaves nothing behind
    head.zero_pending()
    data.call(head, data.x_ND[data.mine])
    assert head.pending_sq_norm() == 0


def check_set_rows(rank: int, world: int, folder: str) -> None:
    """Imprinting sets own rows and forgets their state; other ranks' classes are refused."""
    head = make(203)
    data = Data(rank, world, 203, 1)
    data.call(head, data.x_ND[data.mine].clone().requires_grad_()).backward()
    head.step(0.1)
    rows = torch.ones(head.stop - head.start, DIM)
    head.set_rows(range(head.start, head.stop), rows)
    assert torch.equal(head.w_CD, rows.double())
    assert not head.state["momentum"].any()
    with pytest.raises(ValueError, match="owns the classes"):
        head.set_rows(range(head.stop, head.stop + 1), rows[:1])
    if len(rows):
        with pytest.raises(ValueError, match="not zero"):
            head.set_rows(torch.tensor([head.start]), torch.zeros(1, DIM))


def train(head: ShardedHead, rank: int, world: int, first: int, last: int) -> list[float]:
    losses = []
    for step in range(first, last):
        data = Data(rank, world, head.num_classes, 3, seed=step)
        loss = data.call(head, data.x_ND[data.mine].clone().requires_grad_())
        loss.backward()
        head.step(0.05)
        losses.append(loss.item())
    return losses


def saved_config() -> dict[str, Any]:
    return {"loss": MLCD(), "sample_rate": 0.1, "optimizer": AdamW(weight_decay=0.01)}


def trace_training(rank: int, world: int, folder: str) -> dict[str, Any]:
    """Losses and rows of a short sampled run; two ranks also save it halfway."""
    head = make(1003, seed=7, **saved_config())
    losses = train(head, rank, world, 0, 4)
    if world == 2:
        parts: list[Any] = [None] * world
        torch.distributed.all_gather_object(parts, head.save(folder))
        if rank == 0:
            write_index(folder, head.num_classes, parts)
    losses += train(head, rank, world, 4, 7)
    return {"losses": losses, "rows": whole(head, head.w_CD), "touched": whole(head, head.state["touched"])}


def trace_resumed(rank: int, world: int, folder: str) -> dict[str, Any]:
    """The run that two ranks saved, continued by this many."""
    if world == 2:
        torch.distributed.barrier()
    head = make(1003, seed=7, **saved_config())
    head.load(folder)
    assert head.steps == 4
    losses = train(head, rank, world, 4, 7)
    if head.start < head.stop:
        other = make(1003, seed=7, **{**saved_config(), "optimizer": SGD()})
        with pytest.raises(DataError, match="another row optimizer"):
            other.load(folder)
    with pytest.raises(DataError, match="the head has 900"):
        make(900, **saved_config()).load(folder)
    return {"losses": losses, "rows": whole(head, head.w_CD)}


CHECKS = [value for name, value in list(globals().items()) if name.startswith("check_")]
TRACES = [trace_training, trace_resumed]


def run_all(rank: int, world: int, folder: str) -> dict[str, Any]:
    statistics.chunk_rows = lambda batch: 64  # several chunks also for a thousand classes
    for check in CHECKS:
        check(rank, world, folder)
    return {trace.__name__: trace(rank, world, folder) for trace in TRACES}


# --- the tests ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], list[dict[str, Any]]]:
    """Results of each world, started on first use; world 2 writes the files that the others load."""
    folder = str(tmp_path_factory.mktemp("head"))
    results: dict[int, Any] = {}

    def get(world: int) -> list[dict[str, Any]]:
        for needed in dict.fromkeys((2, world)):
            if needed not in results:
                try:
                    results[needed] = spawn(run_all, needed, folder)
                except RuntimeError as error:
                    results[needed] = error
            if isinstance(results[needed], RuntimeError):
                raise results[needed]
        return results[world]

    return get


@pytest.mark.parametrize("world", WORLDS)
def test_every_check_passes(worlds: Callable[[int], list[dict[str, Any]]], world: int) -> None:
    assert len(worlds(world)) == world


@pytest.mark.parametrize("world", WORLDS)
def test_same_run_for_any_number_of_ranks(worlds: Callable[[int], list[dict[str, Any]]], world: int) -> None:
    one = worlds(1)[0]["trace_training"]
    for got in (result["trace_training"] for result in worlds(world)):
        assert got["losses"] == pytest.approx(one["losses"], rel=1e-10)
        assert torch.equal(got["touched"], one["touched"])
        close(got["rows"], one["rows"], 1e-9)
    assert one["losses"][0] != one["losses"][-1]


@pytest.mark.parametrize("world", WORLDS)
def test_saved_by_two_ranks_and_continued(worlds: Callable[[int], list[dict[str, Any]]], world: int) -> None:
    straight, resumed = worlds(2)[0]["trace_training"], worlds(world)[0]["trace_resumed"]
    assert resumed["losses"] == pytest.approx(straight["losses"][4:], rel=1e-10)
    close(resumed["rows"], straight["rows"], 1e-9)


def test_failure_of_a_rank_is_reported() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)rank 1 failed.*one of two"):
        spawn(fail_on_one, 2)


def fail_on_one(rank: int, world: int) -> int:
    if rank == 1:
        raise ValueError("one of two")
    torch.distributed.barrier()
    return rank
