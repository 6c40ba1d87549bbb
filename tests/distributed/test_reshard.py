"""Training that changes its number of workers, saves in the background, grows and evaluates. Real gloo processes.

Each world is started once and goes through its part of the story; what it returns is compared here.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from labelmill.data.labels import Labels
from labelmill.data.stream import Batch
from labelmill.errors import DataError
from labelmill.heads import storage
from labelmill.heads.config import HeadConfig
from labelmill.heads.counts import label_ranks
from labelmill.heads.optim import SGD, AdamW
from labelmill.heads.reshard import grow, load_with_map
from labelmill.heads.sharded import ShardedHead
from labelmill.heads.source import open_rows
from labelmill.losses.margins import CosFace
from labelmill.training.checkpoint import (
    Checkpointer,
    CheckpointError,
    Position,
    latest_checkpoint,
    read_dense,
    restore,
)
from labelmill.training.config import TrainConfig
from labelmill.training.engine import Engine, load_dense
from labelmill.training.local import spawn
from labelmill.training.objective import Losses, Objective

CLASSES, DIM, INPUT, BATCH = 1003, 16, 12, 12
LEGS = [(2, 0, 6), (3, 6, 12), (1, 12, 18)]
"""(workers, first step, last step) of the run that is resharded twice."""


class Toy(Objective):
    """A small encoder and a sharded head with sampled classes and momentum that catches up."""

    def __init__(self, optimizer: Any, num_classes: int = CLASSES) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(INPUT, 24), torch.nn.Tanh(), torch.nn.Linear(24, DIM))
        config = HeadConfig(
            scale=16.0, margin=CosFace(m=0.2), optimizer=optimizer, block_rows=32, sample_rate=0.3, init_std=0.1
        )
        self._heads = {"classes": ShardedHead(num_classes, DIM, config, seed=3)}

    @property
    def heads(self) -> dict[str, ShardedHead]:
        return self._heads

    def forward(self, batch: Batch) -> Losses:
        return Losses(self._heads["classes"].loss(self.net(batch.inputs), batch.labels, batch.weight_B))


def make_batch(step: int, rank: int, world: int, num_classes: int = CLASSES) -> Batch:
    """Rank's slice of a global batch that depends on the step only."""
    generator = torch.Generator().manual_seed(1000 + step)
    inputs = torch.randn(BATCH, INPUT, generator=generator)
    ids = torch.randint(0, num_classes, (BATCH, 1), generator=generator)
    part = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
    n = part.stop - part.start
    return Batch([str(i) for i in range(n)], inputs[part], Labels("single", ids[part]), torch.ones(n), torch.arange(n))


OPTIMIZERS: list[Any] = [SGD(momentum=0.9, weight_decay=1e-3), AdamW()]


def leg(rank: int, world: int, folder: str, first: int, last: int, index: int) -> dict[str, Any]:
    """Steps [first, last) of a run of 18, from the newest checkpoint if there is one; two saves, in the background."""
    config = TrainConfig(global_batch=BATCH, steps=18, learning_rate=0.05, max_grad_norm=5.0, zero_stage=1)
    torch.manual_seed(0)
    objective = Toy(OPTIMIZERS[index])
    root = Path(folder, str(index))
    found = latest_checkpoint(root)
    if found:
        load_dense(objective, read_dense(found))
    engine = Engine(objective, config, torch.device("cpu"))
    start = restore(found, engine, objective) if found else Position(0, 0, "toy")
    assert start.step == first
    head = objective.heads["classes"]
    assert head.steps == first
    saver, losses = Checkpointer(root, keep=3, background=True, memory_bytes=4096), []
    for step in range(first, last):
        loss = engine.forward(make_batch(step, rank, world))
        losses.append(float(loss.total.detach()))
        engine.backward(loss)
        engine.step(config.rate(step, 18))
        if step + 1 in (first + 3, last):
            saver.save(engine, Position(step + 1, 0, "toy"))
            saved = {name: tensor.clone() for name, tensor in head.state_tensors().items()}
        if step + 1 == first + 3:
            middle = saved
    saver.finish()
    for at, want in ((first + 3, middle), (last, saved)):
        source = open_rows(root / f"step-{at:08d}" / "head-classes")
        got = source.read(head.start, head.stop)
        assert all(torch.equal(got[name], want[name]) for name in want), "training reached into the save"
    return {"losses": losses}


def continued(rank: int, world: int, folder: str, first: int, last: int) -> list[dict[str, Any]]:
    return [leg(rank, world, folder, first, last, index) for index in range(len(OPTIMIZERS))]


def straight(rank: int, world: int, folder: str) -> list[dict[str, Any]]:
    return [leg(rank, world, folder + "/straight", 0, 18, index) for index in range(len(OPTIMIZERS))]


def slow_disk() -> None:
    """Pages take a while, so that training runs into the writer."""
    write = storage._pwrite
    storage.PAGE_BYTES = 4096
    storage._pwrite = lambda *args: (time.sleep(0.0005), write(*args))


def first_leg(rank: int, world: int, folder: str) -> dict[str, Any]:
    slow_disk()
    curves = continued(rank, world, folder, *LEGS[0][1:])
    whole = straight(rank, world, folder)
    failed_save(rank, world, folder)
    return {"curves": curves, "straight": whole, "evaluation": evaluate(rank, world)}


def second_leg(rank: int, world: int, folder: str) -> dict[str, Any]:
    return {"curves": continued(rank, world, folder, *LEGS[1][1:]), "evaluation": evaluate(rank, world)}


def third_leg(rank: int, world: int, folder: str) -> dict[str, Any]:
    curves = continued(rank, world, folder, *LEGS[2][1:])
    return {"curves": curves, "evaluation": evaluate(rank, world), "nightly": nightly(folder, rank, world)}


def four(rank: int, world: int, folder: str) -> dict[str, Any]:
    return {"evaluation": evaluate(rank, world)}


def failed_save(rank: int, world: int, folder: str) -> None:
    """One rank's disk is full: every rank hears of it in the next call, and the checkpoint before stays the newest."""
    config = TrainConfig(global_batch=BATCH, steps=18, learning_rate=0.05)
    engine = Engine(Toy(SGD()), config, torch.device("cpu"))
    root = Path(folder, "full")
    saver = Checkpointer(root, keep=2, background=True)
    saver.save(engine, Position(1, 0, "toy"))
    saver.finish()
    write = storage.write_rows
    if rank == 1:

        def full(*args: Any, **options: Any) -> Any:
            raise OSError(28, "No space left on device")

        storage.write_rows = full
    saver.save(engine, Position(2, 0, "toy"))
    for step in range(3):  # training doesn't wait for a writer that has failed
        loss = engine.forward(make_batch(step, rank, world))
        engine.backward(loss)
        engine.step(0.01)
    with pytest.raises(CheckpointError, match=r"rank 1: OSError: .*No space left"):
        saver.save(engine, Position(3, 0, "toy"))
    storage.write_rows = write
    assert latest_checkpoint(root) == root / "step-00000001"
    saver.save(engine, Position(4, 0, "toy"))
    saver.finish()
    assert latest_checkpoint(root) == root / "step-00000004"
    torch.distributed.barrier()


def nightly(folder: str, rank: int, world: int) -> dict[str, Any]:
    """New classes in a run that goes on: offline and directly, to the same end."""
    saved = latest_checkpoint(Path(folder, "0"))
    assert saved is not None
    grown = Path(folder, "grown")
    grow(saved / "head-classes", grown, CLASSES + 50)
    curves = []
    for direct in (False, True):
        torch.manual_seed(0)
        objective = Toy(OPTIMIZERS[0], CLASSES + 50)
        head = objective.heads["classes"]
        load_dense(objective, read_dense(saved))
        engine = Engine(objective, TrainConfig(global_batch=BATCH, steps=10, learning_rate=0.05), torch.device("cpu"))
        load_with_map(head, saved / "head-classes") if direct else head.load(grown)
        losses = []
        for step in range(4):
            loss = engine.forward(make_batch(step, rank, world, CLASSES + 50))
            losses.append(float(loss.total.detach()))
            engine.backward(loss)
            engine.step(0.02)
        curves.append(losses)
    return {"curves": curves}


def evaluate(rank: int, world: int) -> dict[str, Any]:
    """Top-k and counted ranks equal the dense ones; equal scores stand by class id. Uneven batches, also empty ones."""
    sizes = {1: [11], 2: [7, 4], 3: [5, 0, 6], 4: [2, 0, 6, 3]}[world]
    lo = sum(sizes[:rank])
    mine = slice(lo, lo + sizes[rank])
    for options in ({}, {"normalize": False}, {"sub_centres": 3, "margin": CosFace()}):
        head = ShardedHead(
            CLASSES, DIM, HeadConfig(scale=8.0, block_rows=32, init_std=1.0, **options), dtype=torch.float64
        )
        group = head.config.sub_centres
        counts = [n for (n,) in head.ranks.gather_numbers([len(head.w_CD)], head.device)]
        w_CGD = head.ranks.gather_rows(head.w_CD, counts).view(CLASSES, group, DIM)
        generator = torch.Generator().manual_seed(5)
        x_ND = torch.randn(11, DIM, dtype=torch.float64, generator=generator)
        ids_NP = torch.randint(CLASSES, (11, 2), generator=generator)
        ids_NP[4, 1] = -1
        score_NC = dense_scores(x_ND, w_CGD, head.config.normalize)
        got = label_ranks(head, x_ND[mine], ids_NP[mine])
        own_NP = score_NC.gather(1, ids_NP.clamp_min(0))
        rank_NP = torch.where(ids_NP >= 0, (score_NC[:, None] > own_NP[:, :, None]).sum(dim=2) + 1, 0)
        assert torch.equal(got.rank_BP, rank_NP[mine])
        lse_N = torch.logsumexp(8.0 * score_NC, dim=1)
        torch.testing.assert_close(got.lse_B, lse_N[mine])
        nll_N = F.cross_entropy(8.0 * score_NC, ids_NP[:, 0], reduction="none")
        torch.testing.assert_close(got.nll_BP[:, 0], nll_N[mine])
        for k, value_B in got.recall([1, 500]).items():
            want = ((rank_NP <= int(k[7:])) & (ids_NP >= 0)).sum(dim=1) / (ids_NP >= 0).sum(dim=1)
            torch.testing.assert_close(value_B, want[mine])
        scores, ids = head.topk(x_ND[mine], 40)
        want = score_NC.sort(dim=1, descending=True, stable=True)
        torch.testing.assert_close(scores, want.values[mine, :40])
        assert torch.equal(ids, want.indices[mine, :40])
    ties = ShardedHead(200, DIM, HeadConfig(normalize=False))
    own = torch.arange(ties.start, ties.stop)
    ties.set_rows(own, (own % 5 == 3).float()[:, None].expand(-1, DIM))
    ids_B2 = torch.tensor([[3, 199], [8, 0]])
    found = label_ranks(ties, torch.ones(2, DIM), ids_B2)
    assert found.rank_BP.tolist() == [[1, 200], [2, 41]]
    assert ties.topk(torch.ones(2, DIM), 3)[1].tolist() == [[3, 8, 13]] * 2
    with pytest.raises(DataError, match=rf"label 200 of sample 0 of rank {world - 1}.* 0 to 199"):
        label_ranks(ties, torch.ones(1, DIM), torch.tensor([200 if rank == world - 1 else 1]))
    with pytest.raises(FloatingPointError, match="sample 0 of rank 0"):
        label_ranks(ties, torch.full((1, DIM), torch.nan), torch.tensor([1]))
    tiny = ShardedHead(3, DIM, HeadConfig())  # ranks without a class
    assert label_ranks(tiny, torch.randn(2, DIM), torch.tensor([1, 2])).rank_BP.max() <= 3
    return {"done": True}


def dense_scores(x_ND: Tensor, w_CGD: Tensor, normalize: bool) -> Tensor:
    if normalize:
        x_ND, w_CGD = F.normalize(x_ND, dim=1), F.normalize(w_CGD, dim=2)
    return torch.einsum("nd,cgd->ncg", x_ND, w_CGD).amax(dim=2)


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """Results of each world, by its number of workers, in the order of the legs."""
    folder = str(tmp_path_factory.mktemp("story"))
    return {
        world: spawn(work, world, folder)
        for world, work in ((2, first_leg), (3, second_leg), (1, third_leg), (4, four))
    }


@pytest.mark.parametrize("index", range(len(OPTIMIZERS)))
def test_two_three_and_one_workers_continue_one_curve(story: dict[int, list[dict[str, Any]]], index: int) -> None:
    whole = story[2][0]["straight"][index]["losses"]
    legs = [loss for world, _, _ in LEGS for loss in story[world][0]["curves"][index]["losses"]]
    assert legs == pytest.approx(whole, rel=1e-5)
    assert len(whole) == 18
    assert max(whole) > min(whole) + 1
    for world, _, _ in LEGS:
        assert len({tuple(result["curves"][index]["losses"]) for result in story[world]}) == 1


def test_new_classes_in_a_nightly_run(story: dict[int, list[dict[str, Any]]]) -> None:
    offline, direct = story[1][0]["nightly"]["curves"]
    assert offline == direct


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_evaluation_equals_the_dense_one(story: dict[int, list[dict[str, Any]]], world: int) -> None:
    assert all(result["evaluation"]["done"] for result in story[world])
