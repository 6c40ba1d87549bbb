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
from labelmill.heads.optim import LAMB, SGD, Adagrad, AdamW
from labelmill.heads.plan import BlockSampling, HardSampling
from labelmill.heads.sampling import sampled_classes
from labelmill.heads.sharded import ShardedHead
from labelmill.heads.storage import write_index
from labelmill.losses.classification import (
    BCE,
    MLCD,
    Decoupled,
    SmoothedSoftmax,
)
from labelmill.losses.margins import CosFace
from labelmill.training.local import spawn
from tests.dense_head import (
    CASES,
    DIM,
    SPLITS,
    WORLDS,
    Data,
    close,
    dense_pending,
    drawn_classes,
    drawn_weight,
    make,
    reference_loss,
    whole,
)

# --- checks that run on every rank ----------------------------------------------------------------------


def check_dense_equality(rank: int, world: int, folder: str) -> None:
    """Loss, gradient of the embeddings and gradient of the rows, for every loss, margin and sampling."""
    for number, (name, (num_classes, positives, fields)) in enumerate(CASES.items()):
        # some cases keep all positives in the first classes: the last ranks own none
        top = min(num_classes, 20) if number % 2 else num_classes
        data = Data(rank, world, num_classes, positives, seed=number, top=top)
        if fields.get("loss", MLCD()).kind == "soft_targets":
            data.soften()
        head = make(num_classes, seed=number, **fields)
        w_CD = whole(head, head.w_CD).clone().requires_grad_()
        x_ND = data.x_ND.clone().requires_grad_()
        drawn = (drawn_classes(head), data.targets, drawn_weight(head))
        want = reference_loss(w_CD, x_ND, data.ids, data.weights, head.config, *drawn)
        want.backward()
        x_BD = data.x_ND[data.mine].clone().requires_grad_()
        got = data.call(head, x_BD)
        try:
            close(got.detach(), want.detach())
            got.backward()
            close(x_BD.grad, world * x_ND.grad[data.mine])
            own = slice(head.start * head.config.sub_centres, head.stop * head.config.sub_centres)
            close(dense_pending(head), w_CD.grad[own])
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


MOVED: dict[str, tuple[int, dict[str, Any]]] = {
    # name: positives a sample, config
    "all": (1, {"margin": CosFace(m=0.2)}),
    "all recomputed": (3, {"loss": MLCD(), "memory_mb": 0.0}),
    "uniform": (1, {"sample_rate": 0.1}),
    "blocks": (3, {"sample_rate": 0.2, "sampling": BlockSampling(), "loss": Decoupled()}),
    "blocks strided": (1, {"sample_rate": 0.2, "sampling": BlockSampling(stride=4), "loss": SmoothedSoftmax()}),
    "linear": (4, {"normalize": False, "scale": 1.0, "loss": BCE(), "sample_rate": 0.4}),
    "sub-centres": (1, {"sub_centres": 2, "sample_rate": 0.2}),
}


def check_rows_moved_in_the_backward_pass(rank: int, world: int, folder: str) -> None:
    """`begin_step` gives the rows, states and embedding gradients that storing the gradient gives."""
    for optimizer in (SGD(weight_decay=0.02), SGD(weight_decay=0.02, skipped="exact"), AdamW(), LAMB(), Adagrad()):
        for name, (positives, fields) in MOVED.items():
            stored, moved = (make(1003, optimizer=optimizer, lr_multiplier=1.5, **fields) for _ in range(2))
            for step in range(4):
                data = Data(rank, world, 1003, positives, seed=step)
                grads = []
                for head in (stored, moved):
                    x_BD = data.x_ND[data.mine].clone().requires_grad_()
                    if head is moved:
                        head.begin_step(0.1 / (step + 1))
                    data.call(head, x_BD).backward()
                    grads.append(x_BD.grad)
                    assert head is stored or head.pending_sq_norm() == 0
                    head.step(0.1 / (step + 1))
                close(grads[1], grads[0])
            for key, value in stored.state_tensors().items():
                torch.testing.assert_close(
                    moved.state_tensors()[key], value, rtol=1e-10, atol=1e-10, msg=f"{name} {optimizer} {key}"
                )


def check_begin_step_falls_back(rank: int, world: int, folder: str) -> None:
    """Two losses at once, no backward pass, a skipped step: never a wrong row."""
    data = [Data(rank, world, 1003, 1, seed=s) for s in (1, 2)]
    x_BD = [d.x_ND[d.mine].clone().requires_grad_() for d in data]
    heads = [make(1003, sample_rate=0.2) for _ in range(2)]
    for head in heads:
        if head is heads[1]:
            head.begin_step(0.1)
        (data[0].call(head, x_BD[0]) + 2 * data[1].call(head, x_BD[1])).backward()
        head.step(0.1)
    close(heads[1].w_CD, heads[0].w_CD)
    head, before = heads[1], heads[1].w_CD.clone()
    head.begin_step(0.1)
    data[0].call(head, x_BD[0])  # its graph is dropped
    head.step(0.1)
    assert torch.equal(head.w_CD, before)
    head.begin_step(0.1)
    loss = data[0].call(head, x_BD[0])
    head.zero_pending()
    loss.backward()
    assert torch.equal(head.w_CD, before)
    head.zero_pending()
    head.begin_step(0.1)
    data[0].call(head, x_BD[0]).backward()
    if head.start < head.stop:
        assert not torch.equal(head.w_CD, before)
    with pytest.raises(RuntimeError, match="have moved already"):
        data[1].call(head, x_BD[1])
    with pytest.raises(RuntimeError, match="moved with rate"):
        head.step(0.2)
    head.step(0.1)


def check_dense_momentum(rank: int, world: int, folder: str) -> None:
    """With `skipped: exact`, sampled rows equal dense momentum SGD over the whole matrix, learning rates changing."""
    for fields in ({"sample_rate": 0.1}, {"sample_rate": 0.2, "sampling": BlockSampling()}, {"sample_rate": 0.01}):
        head = make(1003, optimizer=SGD(momentum=0.9, weight_decay=0.01, skipped="exact"), **fields)
        w_CD = torch.nn.Parameter(whole(head, head.w_CD).clone())
        dense = torch.optim.SGD([w_CD], 1.0, momentum=0.9, weight_decay=0.01)
        for step in range(12):
            data = Data(rank, world, 1003, 1, seed=step)
            dense.param_groups[0]["lr"] = lr = 0.3 / (1 + step)
            w_CD.grad = None
            args = (data.ids, data.weights, head.config, drawn_classes(head))
            want = reference_loss(w_CD, data.x_ND, *args)
            want.backward()
            dense.step()
            if step % 2:
                head.begin_step(lr)
            got = data.call(head, data.x_ND[data.mine].clone().requires_grad_())
            close(got.detach(), want.detach(), 1e-9)
            got.backward()
            head.step(lr)
        tensors = head.state_tensors()
        close(whole(head, tensors["rows"]), w_CD.detach(), 1e-9)
        close(whole(head, tensors["sgd.momentum"]), dense.state[w_CD]["momentum_buffer"], 1e-9)


def check_hard_classes(rank: int, world: int, folder: str) -> None:
    """The hardest classes of the batch take part, found by comparing all rows with all samples."""
    for group in (1, 2):
        head = make(1003, sample_rate=0.05, sampling=HardSampling(share=0.6), sub_centres=group)
        for step in range(3):
            data = Data(rank, world, 1003, 1, seed=step)
            sim_NR = F.normalize(data.x_ND) @ F.normalize(whole(head, head.w_CD)).T
            sim_NC = sim_NR.unflatten(1, (-1, group)).amax(dim=2)
            for n, row in enumerate(data.ids):
                sim_NC[n, row] = -torch.inf
            exact = set(sim_NC[data.weights >= 0].amax(dim=0).topk(30).indices.tolist())
            data.call(head, data.x_ND[data.mine].clone().requires_grad_()).backward()
            rows = whole(head, head.pending_rows()[0])
            classes = set(torch.div(rows, group, rounding_mode="floor").tolist())
            positives = {c for row in data.ids for c in row}
            uniform = set(sampled_classes(1003, 20 / 1003, head.seed, head.steps).tolist())
            assert uniform | positives <= classes
            assert len(classes) <= 50 + len(positives)
            assert len(exact - classes) <= 3, "int8 may swap classes at the bar only"
            head.step(0.1)


def check_soft_sums(rank: int, world: int, folder: str) -> None:
    """Importance weights make the sampled denominator right on average."""
    whole_head = make(1003, seed=1)
    data = Data(rank, world, 1003, 1)
    with torch.no_grad():
        want = data.call(whole_head, data.x_ND[data.mine]).item()
        values = []
        for seed in range(60):
            head = make(1003, seed=1, sample_rate=0.2, importance=True)
            head.seed = 100 + seed
            values.append(data.call(head, data.x_ND[data.mine]).item())
    mean = sum(values) / len(values)
    spread = (sum((v - mean) ** 2 for v in values) / len(values) / len(values)) ** 0.5
    assert abs(mean - want) < 5 * spread + 0.01


def check_narrow_rows(rank: int, world: int, folder: str) -> None:
    """bfloat16 rows follow float32 ones; with a master the float32 rows are the same."""
    heads = {}
    for kind in ("fp32", "bf16", "bf16+master"):
        config = HeadConfig(rows_dtype=kind, init_std=1.0, block_rows=64, scale=6.0, sample_rate=0.5, lr_multiplier=3.0)
        head = heads[kind] = ShardedHead(203, DIM, config)
        start = head.w_CD.float().clone() if kind != "fp32" else None
        for step in range(20):
            data = Data(rank, world, 203, 1, seed=step)
            head.begin_step(0.1)
            data.call(head, data.x_ND[data.mine].float().requires_grad_()).backward()
            head.step(0.1)
        if start is not None and len(start):
            assert not torch.equal(start, head.w_CD.float())
    assert heads["bf16"].w_CD.dtype == torch.bfloat16
    for kind in ("bf16", "bf16+master"):
        error = (heads[kind].w_CD.float() - heads["fp32"].w_CD).norm() / heads["fp32"].w_CD.norm()
        assert not len(heads[kind].w_CD) or error < 0.02
    kept = heads["bf16+master"]
    torch.testing.assert_close(kept.state["master"].bfloat16(), kept.w_CD)


def check_mixed_ranks(rank: int, world: int, folder: str) -> None:
    """Ranks that were built for different jobs are told so, instead of waiting for each other."""
    if world == 1:
        return
    head = make(50 + rank)
    with pytest.raises(DataError, match=r"the number of classes is \d+ here and \d+ on rank"):
        head.loss(torch.randn(3, DIM), torch.tensor([1, 2, 3]))
    head = make(50)
    head.steps = rank
    with pytest.raises(DataError, match="the number of optimizer steps"):
        head.loss(torch.randn(3, DIM), torch.tensor([1, 2, 3]))


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
    with pytest.raises(FloatingPointError, match=r"class rows .* class 49 first"):
        head.loss(x_BD, good)
    head.w_CD.copy_(kept)
    if rank == last and len(kept):
        head.w_CD[-2] = 0.0
    with pytest.raises(FloatingPointError, match="length zero: class 48 first"):
        head.loss(x_BD, good)
    head.w_CD.copy_(kept)
    plain = make(50, normalize=False, scale=1e300)
    with pytest.raises(FloatingPointError, match="logits of the head are too large"):
        plain.loss(x_BD * 1e30, good)
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
