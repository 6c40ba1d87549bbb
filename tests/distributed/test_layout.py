"""Class shards x replicas on 1, 2 and 4 gloo ranks: against a dense float64 model, the 1-D layout, and counted bytes."""

from __future__ import annotations

import time
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from labelmill.data.labels import Labels
from labelmill.errors import DataError, JobError
from labelmill.heads import statistics
from labelmill.heads.config import HeadConfig
from labelmill.heads.counts import label_ranks
from labelmill.heads.optim import SGD, AdamW
from labelmill.heads.plan import BlockSampling, HardSampling
from labelmill.heads.ranks import check_shards
from labelmill.heads.replicas import block_digests, mend_replicas
from labelmill.heads.sampling import sampled_classes
from labelmill.heads.sharded import ShardedHead
from labelmill.heads.storage import write_index
from labelmill.heads.traffic import head_collectives, sent_bytes, tcp_bytes_sent
from labelmill.losses.classification import MLCD, SmoothedSoftmax, SoftTargets
from labelmill.losses.margins import ArcFace, CosFace
from labelmill.training.local import spawn

DIM, CLASSES = 12, 1003
LAYOUTS = {1: [1], 2: [1, 2], 4: [1, 2, 4]}
"""Shards of a replica, by number of ranks."""
SPLITS = {1: [11], 2: [7, 4], 4: [5, 0, 2, 4]}
"""Local batch sizes: uneven, and a rank without samples."""
CASES: dict[str, dict[str, Any]] = {
    "cosface": {"margin": CosFace(m=0.3)},
    "arcface sampled": {"margin": ArcFace(m=0.3), "sample_rate": 0.1},
    "mlcd sampled": {"loss": MLCD(), "sample_rate": 0.05, "memory_mb": 0.0},
    "linear sampled": {"normalize": False, "scale": 2.0, "sample_rate": 0.2},
    "soft": {"loss": SoftTargets(), "margin": CosFace(m=0.1)},
    "soft sampled": {"loss": SoftTargets(), "sample_rate": 0.1, "memory_mb": 0.0},
    "soft without tail, linear": {"loss": SoftTargets(tail="drop"), "normalize": False, "sample_rate": 0.3},
    "smoothed": {"loss": SmoothedSoftmax(smoothing=0.2)},
    "smoothed sampled": {"loss": SmoothedSoftmax(), "sample_rate": 0.1, "importance": True},
}
KINDS: dict[str, dict[str, Any]] = {
    "hard": {"loss": MLCD(), "sample_rate": 0.1, "sampling": HardSampling(share=0.5), "importance": True},
    "blocks": {"loss": MLCD(), "sample_rate": 0.2, "sampling": BlockSampling(stride=4)},
    "sub-centres": {"sub_centres": 3, "sample_rate": 0.2, "sampling": HardSampling()},
    "dense momentum": {"loss": MLCD(), "sample_rate": 0.1, "optimizer": SGD(momentum=0.9, skipped="exact")},
    "bf16": {
        "loss": MLCD(),
        "sample_rate": 0.1,
        "rows_dtype": "bf16",
        "optimizer": SGD(momentum=0.9, skipped="exact"),
    },
}


def make(shards: int | None, seed: int = 0, dtype: torch.dtype = torch.float64, **fields: Any) -> ShardedHead:
    config = HeadConfig(init_std=1.0, block_rows=64, shards=shards, **{"scale": 6.0, **fields})
    return ShardedHead(CLASSES, DIM, config, seed=seed, dtype=dtype)


class Data:
    """A global batch of one or several labels a sample, and this rank's part of it."""

    def __init__(self, rank: int, world: int, positives: int, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        count = sum(SPLITS[world])
        self.x_ND = torch.randn(count, DIM, dtype=torch.float64, generator=generator)
        self.weight_N = torch.rand(count, dtype=torch.float64, generator=generator) + 0.5
        self.weight_N[3] = 0.0
        self.ids_NP = torch.stack([torch.randperm(CLASSES, generator=generator)[:positives] for _ in range(count)])
        self.ids_NP[2] = self.ids_NP[1]
        self.ids_NP[3] = -1
        share_NP = torch.rand(self.ids_NP.shape, dtype=torch.float64, generator=generator) + 0.1
        # weights of soft labels: exact in float32, and together less than 1
        self.target_NP = (0.8 * share_NP / share_NP.sum(dim=1, keepdim=True)).float().double()
        lo = sum(SPLITS[world][:rank])
        self.mine = slice(lo, lo + SPLITS[world][rank])

    def loss(self, head: ShardedHead, x_BD: Tensor) -> Tensor:
        ids: Any = self.ids_NP[self.mine]
        if head.config.loss.soft:
            ids = Labels("soft", ids, weights_BP=self.target_NP[self.mine].float())
        return head.loss(x_BD, ids, self.weight_N[self.mine])


def dense_loss(w_CD: Tensor, data: Data, x_ND: Tensor, config: HeadConfig, drawn: Tensor) -> Tensor:
    """The weighted mean loss from its definition, over the drawn classes and the batch's positives."""
    used_N = data.weight_N > 0
    present_C = torch.zeros(CLASSES, dtype=torch.bool)
    present_C[drawn] = True
    present_C[data.ids_NP[used_N].flatten()] = True
    sim_NC = F.normalize(x_ND) @ F.normalize(w_CD).T if config.normalize else x_ND @ w_CD.T
    own_NC = torch.zeros(sim_NC.shape, dtype=torch.bool)
    own_NC[used_N] = own_NC[used_N].scatter(1, data.ids_NP[used_N], True)
    moved_NC = sim_NC
    if isinstance(config.margin, CosFace):
        moved_NC = sim_NC - config.margin.m
    if isinstance(config.margin, ArcFace):
        moved_NC = torch.cos(torch.acos(sim_NC.clamp(-1 + 1e-12, 1 - 1e-12)) + config.margin.m)
    total = torch.zeros((), dtype=torch.float64)
    for n in used_N.nonzero()[:, 0]:
        negative = config.scale * sim_NC[n, present_C & ~own_NC[n]]
        positive = config.scale * moved_NC[n, own_NC[n]]
        count = torch.ones_like(negative)
        if config.importance:  # a class that is nobody's positive counts 1 / its probability
            certain_C = torch.zeros(CLASSES, dtype=torch.bool)
            certain_C[data.ids_NP[used_N].flatten()] = True
            count[~certain_C[present_C & ~own_NC[n]]] = CLASSES / len(drawn)
        lse = torch.log(positive.exp().sum() + (count * negative.exp()).sum())
        if isinstance(config.loss, SoftTargets):
            q = data.target_NP[n, data.ids_NP[n].argsort()]  # own classes stand in the order of their ids
            q = q / q.sum() if config.loss.tail == "drop" else q
            value = (q * (lse - positive)).sum() + (1 - q.sum()) * (lse - (count * negative).sum() / count.sum())
        elif isinstance(config.loss, SmoothedSoftmax):
            mean = (positive.sum() + (count * negative).sum()) / (1 + count.sum())
            value = lse - (1 - config.loss.smoothing) * positive[0] - config.loss.smoothing * mean
        elif isinstance(config.loss, MLCD):
            value = torch.log1p(negative.exp().sum()) + torch.log1p((-positive).exp().sum())
        else:
            value = -torch.log_softmax(torch.cat([positive, negative]), 0)[0]
        total = total + data.weight_N[n] * value
    return total / data.weight_N.sum()


def drawn_classes(head: ShardedHead) -> Tensor:
    rate = head.config.sample_rate
    return torch.arange(CLASSES) if rate >= 1 else sampled_classes(CLASSES, rate, head.seed, head.steps)


def whole(head: ShardedHead, tensor: Tensor) -> Tensor:
    """A replica's rows of all classes."""
    counts = [n for (n,) in head.ranks.gather_numbers([len(tensor)], head.device)]
    return head.ranks.gather_rows(tensor, counts)


def close(got: Tensor, want: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


# --- on every rank --------------------------------------------------------------------------------------


def check_dense_equality(rank: int, world: int, shards: int) -> None:
    for seed, (name, fields) in enumerate(CASES.items()):
        head = make(shards, seed, **fields)
        assert head.grid.replicas.world * head.ranks.world == world
        w_CD = whole(head, head.w_CD).clone().requires_grad_()
        for micro in range(2):  # the second adds to the first, with other positives
            data = Data(rank, world, 3 if name.startswith(("mlcd", "soft")) else 1, seed=10 * seed + micro)
            x_ND = data.x_ND.clone().requires_grad_()
            want = dense_loss(w_CD, data, x_ND, head.config, drawn_classes(head))
            (want / 2).backward()
            x_BD = data.x_ND[data.mine].clone().requires_grad_()
            got = data.loss(head, x_BD)
            (got / 2).backward()
            close(got.detach(), want.detach())
            assert x_BD.grad is not None
            assert x_ND.grad is not None
            close(x_BD.grad, world * x_ND.grad[data.mine])
        assert w_CD.grad is not None
        close(head.grid.world.sum_(head.pending_sq_norm()), w_CD.grad.square().sum(), 1e-9)
        ids, grad = head.pending_rows()
        dense = torch.zeros_like(head.w_CD).index_copy(0, ids - head.start, grad)
        close(dense, w_CD.grad[head.start : head.stop])
        if head.grid.replicas.world > 1:
            with pytest.raises(RuntimeError, match="step comes first"):
                data.loss(head, x_BD).backward()
        head.zero_pending()
        assert head.pending_sq_norm() == 0


def check_errors_reach_every_rank(rank: int, world: int, shards: int) -> None:
    head = make(shards)
    x_BD, good = torch.randn(3, DIM, dtype=torch.float64), torch.tensor([1, 2, 3])
    last = rank == world - 1
    broken = x_BD.clone()
    broken[1, 0] = torch.nan
    with pytest.raises(FloatingPointError, match=f"sample 1 of rank {world - 1}'s batch"):
        head.loss(broken if last else x_BD, good)
    with pytest.raises(DataError, match=rf"label {CLASSES} of sample 2 of rank {world - 1}"):
        head.loss(x_BD, torch.tensor([1, 2, CLASSES]) if last else good)
    with pytest.raises(DataError, match=rf"one positive a sample, sample 0 of rank {world - 1}'s batch has 2"):
        head.loss(x_BD, torch.tensor([[1, 2], [3, -1], [4, -1]]) if last else good[:, None])
    kept = head.w_CD.clone()
    if rank == 0 and len(kept):
        head.w_CD[-1, 0] = torch.nan  # in the first replica alone
    with pytest.raises(FloatingPointError, match="class rows of the head hold NaN"):
        head.loss(x_BD, good)
    head.w_CD.copy_(kept)
    assert torch.isfinite(head.loss(x_BD, good))
    # also where nothing is trained: evaluation has the same number of batches on all ranks
    for wrong in (CLASSES, -2):
        with pytest.raises(DataError, match=rf"label {wrong} of sample 1 of rank {world - 1}'s batch is out of range"):
            label_ranks(head, x_BD, torch.tensor([[1, 2], [2, wrong], [3, -1]]) if last else good)
    for query in (lambda x: label_ranks(head, x, good), lambda x: head.topk(x, 2)):
        with pytest.raises(FloatingPointError, match=f"embedding of sample 1 of rank {world - 1}'s batch"):
            query(broken if last else x_BD)
    assert label_ranks(head, x_BD[:0] if last else x_BD, good[:0] if last else good).rank_BP.shape[1] == 1
    soft = make(shards, loss=SoftTargets())
    weights = torch.tensor([[0.5], [1.5], [0.1]]) if last else torch.full((3, 1), 0.9)
    with pytest.raises(DataError, match=rf"label weights of sample 1 of rank {world - 1}'s batch add up to 1\.5"):
        soft.loss(x_BD, Labels("soft", good[:, None], weights_BP=weights))


def check_replicas_are_mended(rank: int, world: int, shards: int, folder: str) -> None:
    head = make(shards)
    assert mend_replicas(head.grid.replicas, head.state_tensors()) == 0
    if head.grid.replicas.world == 1:
        return
    first = head.w_CD.clone()
    if head.grid.replicas.rank == 1:
        head.w_CD[3, 2] = torch.nextafter(head.w_CD[3, 2], torch.tensor(torch.inf, dtype=torch.float64))
    with pytest.warns(RuntimeWarning, match="differed in 1 blocks"):
        head.save(folder)
    assert torch.equal(head.w_CD, first)


def trace_training(rank: int, world: int, shards: int, folder: str) -> dict[str, Any]:
    """Losses and rows of a sampled run that is saved halfway, loaded, and clipped in every step."""
    options: dict[str, Any] = {"loss": MLCD(), "sample_rate": 0.1, "optimizer": AdamW(weight_decay=0.01)}
    head = make(shards, 7, **options)
    losses, written = [], 0
    for step in range(6):
        data = Data(rank, world, 3, seed=step)
        loss = data.loss(head, data.x_ND[data.mine].clone().requires_grad_())
        loss.backward()
        norm = float(head.grid.world.sum_(head.pending_sq_norm())) ** 0.5
        head.step(0.05, scale=min(1.0, 0.1 / norm))
        losses += [loss.item(), norm]
        if step == 2:
            saving = head.begin_save(folder, 2**20)
            part = saving.write()
            written = part["stop"] - part["start"]
            export = head.export_rows(folder)
            assert sum(e["stop"] - e["start"] for e in export) == written
            parts = [part] * world
            torch.distributed.all_gather_object(parts, part)
            if rank == 0:
                write_index(folder, CLASSES, parts)
            torch.distributed.barrier()
            head = make(shards, 8, **options)
            head.load(folder)
            head.seed = 7
    return {
        "losses": losses,
        "rows": whole(head, head.w_CD),
        "digest": block_digests(head.w_CD),
        "shard": head.ranks.rank,
        "written": written,
    }


def trace_kinds(rank: int, world: int, shards: int) -> dict[str, Any]:
    """Losses and rows of short runs with everything that draws, stores or moves rows another way."""
    traces = {}
    for seed, (name, options) in enumerate(KINDS.items()):
        head = make(shards, seed, dtype=torch.float32 if "rows_dtype" in options else torch.float64, **options)
        losses = []
        for step in range(4):
            data = Data(rank, world, 1 if options.get("sub_centres", 1) > 1 else 3, seed=step)
            head.begin_step(0.05)  # several replicas go the ordinary way
            loss = data.loss(head, data.x_ND[data.mine].clone().requires_grad_())
            loss.backward()
            head.step(0.05)
            losses.append(loss.item())
        rows = head.state_tensors()["rows"]
        traces[name] = {"losses": losses, "rows": whole(head, rows), "digest": block_digests(rows)}
    return traces


def trace_reload(rank: int, world: int, shards: int, folder: str) -> Tensor:
    """Rows of a checkpoint that another layout wrote."""
    head = make(shards, 8, loss=MLCD(), sample_rate=0.1, optimizer=AdamW(weight_decay=0.01))
    head.load(folder)
    return whole(head, head.w_CD)


def count_traffic(rank: int, world: int, shards: int) -> None:
    """Counted bytes of a step equal the formula, kind by kind; the sockets carry what was counted."""
    batch, positives, rate = 256, 2, 0.2
    for normalize in (True, False):
        head = make(shards, 3, normalize=normalize, scale=4.0, sample_rate=rate, loss=MLCD())
        generator = torch.Generator().manual_seed(rank)
        x_BD = torch.randn(batch, DIM, generator=generator, dtype=torch.float64)
        ids_BP = torch.stack([torch.randperm(CLASSES, generator=generator)[:positives] for _ in range(batch)])
        axes = {id(ranks): ranks for ranks in (head.grid.world, head.grid.shards, head.grid.replicas)}.values()
        for ranks in axes:
            ranks.traffic.clear()
        torch.distributed.barrier()
        time.sleep(0.05)
        before = tcp_bytes_sent()
        accumulation = 3
        for _ in range(accumulation):
            (head.loss(x_BD.requires_grad_(), ids_BP) / accumulation).backward()
        touched = len(head._pending.grad_UD)
        head.step(0.1)
        torch.distributed.barrier()
        time.sleep(0.05)
        on_wire = tcp_bytes_sent() - before
        replicas = head.grid.replicas.world
        wanted = head_collectives(batch, positives, DIM, touched, shards, replicas, 8, maximum=not normalize)
        for kind in ("all_gather", "all_reduce"):
            counted = sum(ranks.traffic.sent.get(kind, 0.0) for ranks in axes)
            times = {"micro batch": accumulation, "step": 1}
            formula = sum(c.sent * times[c.each] for c in wanted if c.kind == kind)
            calls = sum(times[c.each] for c in wanted if c.kind == kind)
            assert counted == pytest.approx(formula, rel=1e-12), (kind, world, shards)
            assert sum(ranks.traffic.calls[kind] for ranks in axes) == calls
        total = sum(sum(ranks.traffic.sent.values()) for ranks in axes)
        if on_wire and total:
            # headers, and two barriers; small all-reduces are cut into unequal pieces, so over all ranks
            both = torch.tensor([float(on_wire), total], dtype=torch.float64)
            torch.distributed.all_reduce(both)
            messages = world * sum(sum(ranks.traffic.calls.values()) for ranks in axes)
            assert 0 <= both[0] - both[1] < 0.01 * both[1] + 1200 * messages, (both, world, shards)
            assert both[1] > 3 * 1200 * messages, "large enough for a wrong factor to show"


def run_layouts(rank: int, world: int, folder: str) -> dict[str, Any]:
    statistics.chunk_rows = lambda batch: 64  # several chunks also for a thousand classes
    warnings.simplefilter("ignore", FutureWarning)
    traces: dict[str, Any] = {}
    for shards in LAYOUTS[world]:
        place = f"{folder}/{world}-{shards}"
        check_dense_equality(rank, world, shards)
        check_errors_reach_every_rank(rank, world, shards)
        check_replicas_are_mended(rank, world, shards, f"{place}-mended")
        count_traffic(rank, world, shards)
        traces[str(shards)] = trace_training(rank, world, shards, place)
        traces[f"kinds {shards}"] = trace_kinds(rank, world, shards)
    if world == 4:
        for shards in LAYOUTS[world]:
            traces[f"reload {shards}"] = trace_reload(rank, world, shards, f"{folder}/4-2")
        traces["saved"] = trace_reload(rank, world, 2, f"{folder}/4-4")
        with pytest.raises(JobError, match=r"head\.shards: 3 doesn't divide the 4 workers; 1, 2 or 4 would"):
            make(3)
    return traces


# --- the tests ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    folder = str(tmp_path_factory.mktemp("layout"))
    return {world: spawn(run_layouts, world, folder) for world in LAYOUTS}


def test_every_layout_gives_the_run_of_one_rank(results: dict[int, list[dict[str, Any]]]) -> None:
    one = results[1][0]["1"]
    for world, layouts in LAYOUTS.items():
        for shards in layouts:
            for result in results[world]:
                got = result[str(shards)]
                assert got["losses"] == pytest.approx(one["losses"], rel=1e-9), (world, shards)
                close(got["rows"], one["rows"], 1e-8)


def test_replicas_stay_equal_to_the_bit_and_one_writes(results: dict[int, list[dict[str, Any]]]) -> None:
    for world, layouts in LAYOUTS.items():
        for shards in layouts:
            traces = [result[str(shards)] for result in results[world]]
            for trace in traces:
                first = next(t for t in traces if t["shard"] == trace["shard"])
                assert torch.equal(trace["digest"], first["digest"]), (world, shards)
            assert [t["written"] > 0 for t in traces] == [rank < shards for rank in range(world)]
            assert sum(t["written"] for t in traces) == CLASSES


@pytest.mark.parametrize("kind", list(KINDS))
def test_layouts_draw_store_and_move_rows_alike(results: dict[int, list[dict[str, Any]]], kind: str) -> None:
    one = results[1][0]["kinds 1"][kind]
    exact = "rows_dtype" not in KINDS[kind]  # stochastic rounding differs from shard to shard
    for world, layouts in LAYOUTS.items():
        for shards in layouts:
            traces = [result[f"kinds {shards}"][kind] for result in results[world]]
            for rank, trace in enumerate(traces):
                assert torch.equal(trace["digest"], traces[rank % shards]["digest"]), (world, shards)
                assert trace["losses"] == pytest.approx(one["losses"], rel=1e-9 if exact else 0.02), (world, shards)
                if exact:
                    close(trace["rows"], one["rows"], 1e-8)


def test_a_checkpoint_fits_every_layout(results: dict[int, list[dict[str, Any]]]) -> None:
    for result in results[4]:
        for shards in LAYOUTS[4]:
            assert torch.equal(result[f"reload {shards}"], results[4][0]["reload 2"])
        close(result["saved"], result["reload 2"], 1e-9)


def test_shards_must_divide_the_workers() -> None:
    check_shards(2, 4)
    with pytest.raises(JobError, match=r"head\.shards: 5 doesn't divide the 3 workers; 1 or 3 would"):
        check_shards(5, 3)


def test_formula() -> None:
    assert sent_bytes("all_gather", 10, 4) == 30
    assert sent_bytes("all_reduce", 10, 4) == 15
    assert sent_bytes("all_reduce", 10, 1) == 0
    assert not head_collectives(8, 1, 16, 100, 1, 1)
    flat = head_collectives(64, 1, 512, 0, 4, 1)
    assert {c.axis for c in flat} == {"world", "shards"}
    # the embeddings there, their gradient back: 3 (g - 1) B D e
    wide = [c for c in flat if c.what.startswith("embedding")]
    ids = 64 * 2 * 8  # travel with the embeddings
    assert sum(c.sent for c in wide) == 3 * (3 * 64 * 512 * 4 + ids)
    grid = head_collectives(64, 1, 512, 1000, 2, 2)
    rows = next(c for c in grid if c.what == "row gradient")
    assert (rows.sent, rows.each) == (1000 * 512 * 4, "step")
