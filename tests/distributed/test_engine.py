"""The engine and its heads against a dense float64 reference; 1 and 2 workers; checkpoints. Real gloo processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from labelmill.data.labels import Labels
from labelmill.data.stream import Batch
from labelmill.errors import DataError
from labelmill.heads.batch import NotFiniteError
from labelmill.heads.config import HeadConfig
from labelmill.heads.optim import SGD, AdamW
from labelmill.heads.plan import BlockSampling, UniformSampling
from labelmill.heads.sharded import ShardedHead
from labelmill.losses.margins import CosFace
from labelmill.training.checkpoint import Position, latest_checkpoint, read_dense, restore, save_checkpoint
from labelmill.training.config import TrainConfig
from labelmill.training.engine import Engine, load_dense
from labelmill.training.local import spawn
from labelmill.training.loop import train
from labelmill.training.objective import Losses, Objective

CLASSES, DIM, INPUT = 203, 16, 12


class Toy(Objective):
    """A small encoder and a sharded head."""

    def __init__(self, head: HeadConfig, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(INPUT, 24), torch.nn.Tanh(), torch.nn.Linear(24, DIM))
        self._heads = {"classes": ShardedHead(CLASSES, DIM, head, seed=3, dtype=dtype)}

    @property
    def heads(self) -> dict[str, ShardedHead]:
        return self._heads

    def forward(self, batch: Batch) -> Losses:
        return Losses(self._heads["classes"].loss(self.net(batch.inputs), batch.labels, batch.weight_B))


def make_batch(step: int, size: int, rank: int = 0, world: int = 1) -> Batch:
    """Rank's slice of a global batch that depends on the step only."""
    generator = torch.Generator().manual_seed(1000 + step)
    inputs = torch.randn(size, INPUT, generator=generator)
    ids = torch.randint(0, CLASSES, (size, 1), generator=generator)
    part = slice(rank * size // world, (rank + 1) * size // world)
    n = part.stop - part.start
    return Batch([str(i) for i in range(n)], inputs[part], Labels("single", ids[part]), torch.ones(n), torch.arange(n))


def run_steps(
    rank: int, world: int, stage: int, accumulation: int, clip: float | None, steps: int, options: dict[str, Any]
) -> dict[str, Any]:
    head = HeadConfig(
        scale=16.0,
        margin=CosFace(m=0.2),
        optimizer=options.get("rows", SGD(momentum=0.9)),
        block_rows=32,
        sample_rate=options.get("sample_rate", 1.0),
        shards=options.get("shards"),
        sampling=options.get("sampling", UniformSampling()),
    )
    config = TrainConfig(
        global_batch=12 * accumulation,
        steps=steps,
        accumulation=accumulation,
        learning_rate=0.05,
        zero_stage=stage,
        max_grad_norm=clip,
        schedule="cosine",
        warmup=0.2,
        precision=options.get("precision", "fp32"),
        weight_decay=0.01,
    )
    torch.manual_seed(0)
    objective = Toy(head)
    folder = options.get("checkpoint")
    start = Position(0, 0, "toy")
    found = latest_checkpoint(Path(folder)) if folder else None
    if found:
        load_dense(objective, read_dense(found))
    engine = Engine(objective, config, torch.device("cpu"))
    if found:
        start = restore(found, engine, objective)
    losses, norms = [], []
    for step in range(start.step, options.get("until", steps)):
        total = 0.0
        if step in options.get("leave_out", ()):
            continue
        if options.get("begin", True):
            engine.begin(config.rate(step, steps))
        for micro in range(accumulation):
            batch = engine.to_device(make_batch(step * accumulation + micro, 12, rank, world))
            value = engine.forward(batch)
            total += float(value.total.detach()) / accumulation
            engine.backward(value)
            norm = engine.step(config.rate(step, steps))
        losses.append(total)
        norms.append(norm)
        if folder and step + 1 == options.get("save_at"):
            save_checkpoint(Path(folder), engine, Position(step + 1, 0, "toy"), keep=2)
    ids, rows = objective.heads["classes"].start, objective.heads["classes"].w_CD
    return {"losses": losses, "norms": norms, "dense": engine.dense_state(), "start": ids, "rows": rows.clone()}


def reference(accumulation: int, clip: float | None, steps: int) -> dict[str, Any]:
    """Plain torch in float64, one process, all classes at once."""
    config = TrainConfig(global_batch=12 * accumulation, steps=steps, learning_rate=0.05, schedule="cosine", warmup=0.2)
    torch.manual_seed(0)
    head = HeadConfig(block_rows=32)
    toy = Toy(head)
    rows = torch.nn.Parameter(toy.heads["classes"].w_CD.double().clone())
    net = toy.net.double()
    weights = [p for p in net.parameters() if p.ndim > 1]
    biases = [p for p in net.parameters() if p.ndim == 1]
    dense = torch.optim.AdamW(
        [{"params": weights, "weight_decay": 0.01}, {"params": biases, "weight_decay": 0.0}], lr=1
    )
    sgd = torch.optim.SGD([rows], lr=1, momentum=0.9)
    losses, norms = [], []
    for step in range(steps):
        total = 0.0
        for micro in range(accumulation):
            batch = make_batch(step * accumulation + micro, 12)
            emb = torch.nn.functional.normalize(net(batch.inputs.double()))
            target = batch.labels.ids_BP[:, 0]
            logits = emb @ torch.nn.functional.normalize(rows).T
            logits = 16.0 * (logits - 0.2 * torch.nn.functional.one_hot(target, CLASSES))
            loss = torch.nn.functional.cross_entropy(logits, target) / accumulation
            loss.backward()
            total += loss.item()
        parameters = [*net.parameters(), rows]
        norm = torch.nn.utils.clip_grad_norm_(parameters, clip if clip else 1e12)
        for optimizer in (dense, sgd):
            for group in optimizer.param_groups:
                group["lr"] = config.rate(step, steps)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(total)
        norms.append(float(norm))
    return {
        "losses": losses,
        "norms": norms,
        "dense": {k: v.detach() for k, v in net.named_parameters()},
        "rows": rows.detach(),
    }


def all_rows(results: list[dict[str, Any]]) -> torch.Tensor:
    return torch.cat([r["rows"] for r in sorted(results, key=lambda r: r["start"])])


def several(rank: int, world: int, cases: list[tuple[Any, ...]]) -> list[dict[str, Any]]:
    """Many cases in one process group: starting processes is what costs."""
    return [run_steps(rank, world, *case) for case in cases]


CASES = [
    (stage, accumulation, clip, 6, options)
    for stage in (0, 1, 2, 3)
    # rows moved in the backward pass; the same steps with rows moved afterwards; accumulated and clipped
    for accumulation, clip, options in ((1, None, {}), (1, None, {"begin": False}), (3, 1.5, {}))
    if stage < 2 or options.get("begin", True)
]


@pytest.mark.parametrize("world", [1, 2])
def test_equals_dense_reference(world: int) -> None:
    by_rank = spawn(several, world, CASES)
    for index, (stage, accumulation, clip, steps, options) in enumerate(CASES):
        results = [ranks[index] for ranks in by_rank]
        expected = reference(accumulation, clip, steps)
        label = f"stage {stage}, accumulation {accumulation}, clip {clip}, {options}"
        assert results[0]["losses"] == pytest.approx(expected["losses"], rel=2e-5), label
        if clip:
            assert results[0]["norms"] == pytest.approx(expected["norms"], rel=1e-4), label
            assert max(expected["norms"]) > clip, "the case must clip"
        torch.testing.assert_close(all_rows(results).double(), expected["rows"], atol=2e-5, rtol=1e-4, msg=label)
        for name, value in expected["dense"].items():
            got = results[0]["dense"][f"net.{name}"].double()
            torch.testing.assert_close(got, value, atol=5e-4, rtol=1e-3, msg=f"{label}: {name}")


def test_replicas_of_the_head_equal_the_dense_reference() -> None:
    clip = (3, 1.5)
    cases = [(0, *clip, 6, {"shards": 1}), (1, *clip, 6, {"shards": 1}), (2, 1, None, 6, {"shards": 1})]
    for index, ranks in enumerate(zip(*spawn(several, 2, cases), strict=True)):
        expected = reference(*cases[index][1:4])
        for result in ranks:  # either replica holds all rows
            assert result["losses"] == pytest.approx(expected["losses"], rel=2e-5)
            torch.testing.assert_close(result["rows"].double(), expected["rows"], atol=2e-5, rtol=1e-4)
        assert torch.equal(ranks[0]["rows"], ranks[1]["rows"])
        if cases[index][2]:
            assert ranks[0]["norms"] == pytest.approx(expected["norms"], rel=1e-4)


def test_one_and_two_workers_give_the_same_curve_over_50_steps() -> None:
    cases = [(0, 1, 5.0, 50, {"sample_rate": 0.3})]
    cases += [(2, 1, None, 50, {"sample_rate": 0.3, "sampling": BlockSampling()})]
    one, two = spawn(several, 1, cases)[0], spawn(several, 2, cases)[0]
    for a, b in zip(one, two, strict=True):
        assert a["losses"] == pytest.approx(b["losses"], rel=1e-4)


def test_resume_continues_the_uninterrupted_run(tmp_path: Path) -> None:
    cases = []
    for stage in (0, 1, 2, 3):
        folder = str(tmp_path / f"stage{stage}")
        rows = AdamW() if stage == 2 else SGD(momentum=0.9)
        options = {"sample_rate": 0.5, "rows": rows}
        cases += [
            (stage, 1, 2.0, 8, options),
            (stage, 1, 2.0, 8, options | {"checkpoint": folder, "save_at": 4, "until": 6}),
            (stage, 1, 2.0, 8, options | {"checkpoint": folder}),
        ]
    by_rank = spawn(several, 2, cases)
    for stage in (0, 1, 2, 3):
        whole, _, resumed = ([ranks[3 * stage + i] for ranks in by_rank] for i in range(3))
        assert resumed[0]["losses"] == pytest.approx(whole[0]["losses"][4:], rel=1e-6)
        torch.testing.assert_close(all_rows(resumed), all_rows(whole), atol=1e-6, rtol=1e-5)


def test_bf16_follows_fp32() -> None:
    cases = [(stage, 1, None, 10, {"precision": precision}) for stage in (1, 2) for precision in ("fp32", "bf16")]
    results = spawn(several, 2, cases)[0]
    for index in (0, 2):
        assert results[index + 1]["losses"] == pytest.approx(results[index]["losses"], rel=0.03)


LEFT_OUT = [(stage, accumulation) for stage in (0, 1, 2, 3) for accumulation in (1, 3)]


def with_bad_batch(rank: int, world: int, cases: list[tuple[int, int]]) -> list[dict[str, Any]]:
    """The real loop over six steps; an input of the last rank is NaN in the third, in a micro batch of the middle."""
    results = []
    for stage, accumulation in cases:
        config = TrainConfig(
            global_batch=12 * accumulation,
            steps=6,
            accumulation=accumulation,
            learning_rate=0.05,
            zero_stage=stage,
            schedule="cosine",
            warmup=0.2,
            weight_decay=0.01,
            max_skipped_steps=1,
        )
        torch.manual_seed(0)
        toy = Toy(HeadConfig(scale=16.0, margin=CosFace(m=0.2), optimizer=SGD(momentum=0.9), block_rows=32))
        engine = Engine(toy, config, torch.device("cpu"))
        batches = [make_batch(i, 12, rank, world) for i in range(6 * accumulation)]
        if rank == world - 1:
            batches[2 * accumulation + accumulation // 2].inputs[1, 0] = torch.nan
        start = Position(0, 0, "toy")
        end = train(engine, iter(batches), config, start, 6, None, lambda position: None)
        assert end.step == 6
        head = toy.heads["classes"]
        results.append({"dense": engine.dense_state(), "start": head.start, "rows": head.w_CD.clone()})
        bad = [make_batch(i, 12, rank, world) for i in range(2 * accumulation)]
        for batch in bad:
            batch.inputs[1, 0] = torch.nan
        with pytest.raises(NotFiniteError, match=r"step 2: the embedding of sample 1 .* 1 steps were left out"):
            train(engine, iter(bad), config, start, 2, None, lambda position: None)
        with pytest.raises(NotFiniteError, match=r"step 1: .* 1 steps were left out"):  # also those before a restart
            train(engine, iter(bad), config, Position(0, 0, "toy", skipped=1), 2, None, lambda position: None)
    wrong = make_batch(0, 12, rank, world)
    if rank == world - 1:
        wrong.labels.ids_BP[1] = CLASSES
    with pytest.raises(DataError, match=rf"label {CLASSES} of sample 1 of rank {world - 1}.* sample's key is '1'"):
        train(engine, iter([wrong] * 6), config, start, 2, None, lambda position: None)
    return results


def test_step_with_a_nan_embedding_is_left_out_whole() -> None:
    """Weights, rows and moments are those of a run that never saw the step, for every ZeRO stage."""
    by_rank = spawn(with_bad_batch, 2, LEFT_OUT)
    cases = [(stage, accumulation, None, 6, {"leave_out": (2,)}) for stage, accumulation in LEFT_OUT]
    wanted = spawn(several, 2, cases)
    for index, case in enumerate(LEFT_OUT):
        got, want = [ranks[index] for ranks in by_rank], [ranks[index] for ranks in wanted]
        torch.testing.assert_close(all_rows(got), all_rows(want), atol=1e-6, rtol=1e-5, msg=str(case))
        for name, value in want[0]["dense"].items():
            torch.testing.assert_close(got[0]["dense"][name], value, atol=1e-6, rtol=1e-5, msg=f"{case} {name}")
