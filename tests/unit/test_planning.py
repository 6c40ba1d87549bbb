"""`labelmill plan`: clusters as written, memory against traced runs, verdicts, advice, and what must only grow or shrink."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from labelmill import api
from labelmill.cli import app
from labelmill.data.labels import Labels
from labelmill.encoders import build_encoder
from labelmill.errors import ClusterError, JobError
from labelmill.heads.config import HeadConfig
from labelmill.heads.optim import SGD, Adagrad, AdamW
from labelmill.heads.plan import HardSampling
from labelmill.heads.sharded import ShardedHead
from labelmill.losses.classification import SoftTargets
from labelmill.planning.advice import advise, best_layout, verdict
from labelmill.planning.estimate import Setup, SheetMachine, change, estimate, memory, traffic
from labelmill.planning.probe import fit, probe
from labelmill.planning.spec import ClusterSpec, read_spec
from labelmill.planning.trace import EncoderCost, PeakMemory, trace_encoder, trace_head
from labelmill.training.config import TrainConfig

VIT = EncoderCost(512, 86_000_000, 86_000_000, 35e9, 105e9, 800, 120e6, 150_528)
JOB = Path("workloads/discrimination/jobs/spelling-small.yaml")


def setup(classes: int = 10_000_000, workers: int = 8, **fields: Any) -> Setup:
    head = HeadConfig(sample_rate=0.1, scale=64.0, optimizer=SGD(momentum=0.9))
    train = TrainConfig(global_batch=128 * workers, steps=10, zero_stage=1)
    return change(Setup(VIT, head, classes, train, workers), **fields)


def h100(**fields: Any) -> ClusterSpec:
    return read_spec("h100:8", 1).model_copy(update=fields)


# --- SPEC ---------------------------------------------------------------------------------------------------


def test_spec_as_written(tmp_path: Path) -> None:
    assert read_spec("h100:64", 2).workers == 64
    assert read_spec("h100", 2).workers == 2
    spec = read_spec("h100:64,memory_gb=40,efficiency.encoder=0.3,tflops.fp32=60", 2)
    assert (spec.memory_gb, spec.efficiency.encoder, spec.tflops["fp32"], spec.tflops["bf16"]) == (40, 0.3, 60, 989.5)
    assert read_spec("h100", 2).tflops["fp32"] == 67, "a change must not stay in the preset"
    inline = read_spec("memory_gb=24,memory_gbps=300,tflops.fp32=30,intra_gbps=30,inter_gbps=3,workers=4", 2)
    assert (inline.workers, inline.workers_per_node) == (4, 8)
    (tmp_path / "c.yaml").write_text("preset: a100\nworkers: 16\nworkers_per_node: 4\n")
    assert read_spec(str(tmp_path / "c.yaml"), 2).model_dump(include={"workers", "memory_gb"}) == {
        "workers": 16,
        "memory_gb": 80,
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("h1000:8", "Did you mean 'h100'"),
        ("h100:many", r"workers: .*\(got 'many'\)"),
        ("h100:0", "workers: "),
        ("h100:8,memory=40", r"memory: unknown field\. Did you mean 'memory_gb'"),
        ("h100:8,memory_gb", "'memory_gb' is no change"),
        ("h100:8,memory_gb=-1", "memory_gb: "),
        ("h100:8,reserved_gb=90", "reserved_gb 90.0 leaves nothing"),
        ("h100:8,efficiency.encoder=2", "efficiency.encoder: "),
        ("h100:8,tflops.fp8=1", "tflops"),
        ("h100:8,tflops.fp32=0", "tflops must be positive"),
        ("memory_gb=24", "intra_gbps: this field is required"),
        ("nowhere.yaml", "nowhere.yaml: No such file"),
    ],
)
def test_wrong_spec_names_the_field(text: str, message: str) -> None:
    with pytest.raises(JobError, match=message):
        read_spec(text, 2)


def test_wrong_spec_file(tmp_path: Path) -> None:
    for text, message in (("- 1", "a mapping of fields"), ("a: [", "not readable"), ("preset: h10", "Did you mean")):
        (tmp_path / "c.yaml").write_text(text)
        with pytest.raises(JobError, match=message):
            read_spec(str(tmp_path / "c.yaml"), 2)


def test_links_follow_the_nodes() -> None:
    spec = h100(workers=64)
    share = spec.efficiency.network * 1e9
    assert spec.link(8)[0] == 450 * share
    assert spec.link(16)[0] == 400 * share  # eight adapters a node
    assert spec.link(8, apart=8)[0] == 50 * share  # one member a node, one adapter
    assert spec.link(4, apart=2)[0] == 450 * share  # all in one node
    assert spec.link(32, apart=2)[0] == 200 * share
    assert spec.seconds("all_reduce", 1e9, 1) == 0


# --- traced costs -------------------------------------------------------------------------------------------


def test_encoder_is_traced() -> None:
    config = {"kind": "linear", "in_dim": 96, "dim": 32}
    cost = trace_encoder(build_encoder(config))
    assert (cost.dim, cost.parameters, cost.trainable) == (32, 96 * 32, 96 * 32)
    assert cost.forward_flops == 2 * 96 * 32
    assert cost.train_flops == 2 * cost.forward_flops  # no gradient of the input
    vit = trace_encoder(build_encoder({"kind": "small_vit"}))
    assert vit.train_flops == pytest.approx(3 * vit.forward_flops, rel=0.02)
    assert vit.activation_bytes > 20 * vit.input_bytes


@pytest.mark.parametrize(
    "fields",
    [
        {"optimizer": SGD(momentum=0.9)},
        {"optimizer": SGD(momentum=0.0)},
        {"optimizer": AdamW()},
        {"optimizer": Adagrad()},
        {"sub_centres": 3},
        {"rows_dtype": "bf16"},
        {"rows_dtype": "bf16+master", "sub_centres": 2, "optimizer": AdamW()},
    ],
)
def test_bytes_of_a_row_are_those_of_the_head(fields: dict[str, Any]) -> None:
    config = HeadConfig(sample_rate=0.2, **fields)
    head = ShardedHead(1000, 24, config)
    tensors = head.state_tensors()
    held = sum(t.numel() * t.element_size() for t in tensors.values())
    assert trace_head(config, 24).class_bytes == pytest.approx(held / 1000)
    parts = memory(Setup(replace(VIT, dim=24), config, 1000, TrainConfig(global_batch=8, steps=1), 1), h100())
    rows = tensors["rows"]
    assert parts["class rows"] == rows.numel() * rows.element_size()
    assert parts["row optimizer"] == pytest.approx(held - parts["class rows"])


@pytest.mark.parametrize(
    "fields",
    [
        *({"sample_rate": rate, "memory_mb": kept} for rate in (0.1, 1.0) for kept in (0.0, 512.0)),
        {"sample_rate": 0.1, "sub_centres": 3},
        {"sample_rate": 0.3, "rows_dtype": "bf16"},
        {"sample_rate": 0.1, "loss": SoftTargets()},
        {"sample_rate": 0.1, "matmul": "bf16", "rows_dtype": "bf16+master"},
    ],
)
def test_memory_of_a_step_against_a_larger_run(fields: dict[str, Any]) -> None:
    """The plan is made from heads of a few thousand classes; a run with more stays within it, and near it."""
    dim, classes, batch = 64, 60_000, 512
    config = HeadConfig(optimizer=SGD(momentum=0.9), **fields)
    train = TrainConfig(global_batch=batch, steps=1, zero_stage=0)
    planned = Setup(replace(VIT, dim=dim), config, classes, train, 1, positives=4 if config.loss.soft else 1)
    parts = memory(planned, h100())
    expected = parts["rows of a step"] + parts["kept logits"] + parts["gathered batch"]
    head = ShardedHead(classes, dim, config)
    with PeakMemory() as found:
        for _ in range(2):
            x_BD = torch.randn(batch, dim, requires_grad=True)
            ids = torch.randint(classes, (batch, planned.positives))
            soft = Labels("soft", ids, weights_BP=torch.full(ids.shape, 0.2))
            head.loss(x_BD, soft if config.loss.soft else ids).backward()
            head.step(0.1)
    assert 0.8 * expected < found.peak < 1.15 * expected
    held = sum(t.numel() * t.element_size() for t in head.state_tensors().values())
    assert parts["class rows"] + parts["row optimizer"] == pytest.approx(held, rel=0.02)


def test_fit_is_non_negative_and_exact_where_it_can_be() -> None:
    assert fit([(1, 2), (1, 5), (1, 9)], [7, 16, 28]) == pytest.approx([1, 3])
    assert fit([(1, 2), (1, 5), (1, 9)], [6, 5, 4])[1] == 0


# --- verdicts and advice ------------------------------------------------------------------------------------


def test_fits_or_says_what_to_change() -> None:
    machine = SheetMachine(h100())
    small = estimate(setup(), machine)
    assert small.fits
    assert verdict(small).startswith(f"Fits: {small.total_memory / 1e9:.1f} GB of 78.0 GB")
    large = setup(classes=150_000_000)
    plan = estimate(large, machine)
    assert not plan.fits
    assert f"{(plan.total_memory - plan.spec.memory) / 1e9:.1f} GB too much (class rows" in verdict(plan)
    advice = advise(large, machine)
    assert any("head.optimizer.kind adagrad" in a.text and a.plan.fits for a in advice)
    hopeless = advise(setup(classes=2_000_000_000), machine)
    assert any("workers, batch a worker as now" in a.text and a.plan.fits for a in hopeless)
    assert all(not a.plan.fits for a in hopeless if "not enough alone" in a.text)


def test_advice_is_true() -> None:
    """Every piece of advice that promises memory or time holds for the setup that it describes."""
    for fields in ({"memory_gb": 12.0}, {"memory_gb": 80.0}):
        machine = SheetMachine(h100(**fields))
        job = setup(precision="fp32")
        now = estimate(job, machine)
        advice = advise(job, machine)
        assert advice
        for item in advice:
            assert estimate(item.plan.setup, machine).total_memory == item.plan.total_memory
            assert item.plan.fits or "not enough" in item.text
            assert now.fits is False or item.plan.step_seconds < now.step_seconds


def test_best_layout_is_the_best() -> None:
    machine = SheetMachine(h100(workers=64))
    job = setup(classes=1_000_000, workers=64)
    plans = [estimate(change(job, shards=s), machine) for s in (1, 2, 4, 8, 16, 32, 64)]
    assert best_layout(job, machine).step_seconds == min(p.step_seconds for p in plans if p.fits)


def test_more_of_it_needs_more_and_more_workers_need_less() -> None:
    machine = SheetMachine(h100(workers=64))
    base = setup(workers=64)

    def need(**fields: Any) -> tuple[float, float]:
        plan = estimate(change(base, **fields), machine)
        return plan.total_memory, plan.step_seconds

    def classes(count: int) -> tuple[float, float]:
        plan = estimate(replace(base, num_classes=count), machine)
        return plan.total_memory, plan.step_seconds

    for series in (
        [classes(n) for n in (10**6, 10**7, 10**8)],
        [need(sample_rate=r) for r in (0.01, 0.1, 0.5)],
        [need(global_batch=64 * b) for b in (32, 64, 128)],
    ):
        assert series == sorted(series)
        assert [t for _, t in series] == sorted(t for _, t in series)
    held = [memory(change(base, workers=w, global_batch=128 * w), machine.spec)["class rows"] for w in (8, 16, 64)]
    assert held == sorted(held, reverse=True)
    rows = [memory(change(base, shards=s), machine.spec)["class rows"] for s in (8, 32, 64)]
    assert rows == sorted(rows, reverse=True)
    states = [memory(change(base, zero_stage=z), machine.spec) for z in (0, 1, 2)]
    optimizer = [s["encoder optimizer"] + s["encoder gradients"] for s in states]
    assert optimizer == sorted(optimizer, reverse=True)
    slow, fast = (estimate(base, SheetMachine(h100(workers=64, inter_gbps=g))).step_seconds for g in (5, 50))
    assert slow > fast
    bf16, fp32 = need(precision="bf16"), need(precision="fp32")
    assert bf16[0] < fp32[0]
    assert bf16[1] < fp32[1]


def test_traffic_of_layouts() -> None:
    """Fewer shards: less of the batch to each rank, but the rows' gradient travels."""
    flat, grid = ({c.what: c.sent for c in traffic(change(setup(workers=64), shards=shards))} for shards in (None, 8))
    assert flat["embeddings and ids"] == pytest.approx(63 / 7 * grid["embeddings"] + grid["ids"])
    assert "row gradient" not in flat
    planned = change(setup(workers=64), shards=8)
    assert grid["row gradient"] == pytest.approx(2 * 7 / 8 * planned.touched_rows * 512 * 4)
    # about a tenth of the classes, and the positives that were not drawn
    assert 0 < planned.touched_rows - 0.1 * planned.rows <= 64 * 128


def test_time_follows_the_head() -> None:
    """Sub-centres, narrow rows, rounded products and hard sampling, part by part."""
    machine = SheetMachine(h100())

    def seconds(**fields: Any) -> dict[str, float]:
        return estimate(change(narrow_setup(), memory_mb=1e6, **fields), machine).seconds

    plain, grouped = seconds(), seconds(sub_centres=3)
    for part in ("head products", "row update"):
        assert grouped[part] == pytest.approx(3 * plain[part], rel=0.01)
    assert grouped["head collectives"] == pytest.approx(plain["head collectives"])
    rounded = seconds(matmul="bf16")
    assert rounded["head products"] == pytest.approx(plain["head products"] * 67 / 494.5)  # tf32 on a GPU
    assert seconds(matmul="bf16", head_precision="bf16")["head products"] < rounded["head products"]
    cpus = SheetMachine(
        read_spec("memory_gb=24,memory_gbps=300,tflops.fp32=2,tflops.bf16=8,intra_gbps=3,inter_gbps=3", 8)
    )
    slow, fast = (cpus.head(change(narrow_setup(), matmul=kind))["head products"] for kind in ("fp32", "bf16"))
    assert slow == pytest.approx(4 * fast)
    narrow = seconds(rows_dtype="bf16")
    assert narrow["row update"] < plain["row update"]
    assert narrow["head memory"] > plain["head memory"], "narrow rows are widened before each product"
    assert seconds(rows_dtype="bf16+master")["row update"] > plain["row update"]
    hard = seconds(sampling=HardSampling(), sample_rate=0.01)
    assert "hard screen" not in plain
    assert hard["hard screen"] > 0
    sampled = change(narrow_setup(), memory_mb=1e6, sampling=HardSampling(), sample_rate=0.01)
    half, whole = (machine.head(replace(sampled, num_classes=count)) for count in (25_000_000, 50_000_000))
    assert whole["hard screen"] == pytest.approx(2 * half["hard screen"], rel=0.01), "all classes are looked at"


def test_advice_on_rows_and_products() -> None:
    machine = SheetMachine(h100(memory_gb=17.0))
    texts = [a.text for a in advise(replace(narrow_setup(), num_classes=400_000_000), machine)]
    assert any("head.rows_dtype bf16 instead of fp32" in text for text in texts), texts
    wide = SheetMachine(h100())
    assert any("head.matmul bf16" in a.text for a in advise(narrow_setup(), wide))
    assert not any("head.matmul" in a.text for a in advise(change(narrow_setup(), matmul="bf16"), wide))


def narrow_setup() -> Setup:
    """Its heads are traced in a moment."""
    return replace(setup(classes=50_000_000), encoder=replace(VIT, dim=32, train_flops=1e9, activation_bytes=1e6))


# --- the command --------------------------------------------------------------------------------------------


def test_command_prints_tables_and_json() -> None:
    call = ["plan", str(JOB), "--cluster", "h100:4", "--classes", "1000000", "--batch-per-worker", "64"]
    shown = CliRunner().invoke(app, call)
    assert shown.exit_code == 0, shown.output
    for part in ("1,000,000 classes", "memory of a worker", "embedding gradient", "Fits:", "not measured"):
        assert part in shown.output
    found = json.loads(CliRunner().invoke(app, [*call, "--json"]).output)
    assert found["fits"] is True
    assert sum(found["memory_bytes"].values()) == pytest.approx(found["memory_total"])
    assert sum(found["seconds"].values()) == pytest.approx(found["step_seconds"])
    assert found["job"]["workers"] == 4
    assert found["samples_per_second"] == pytest.approx(256 / found["step_seconds"])
    rows = CliRunner().invoke(app, [*call[:4], "--classes", "1000,2000", "--workers", "1,2", "--batch-per-worker", "8"])
    assert rows.output.count("| 1,000 |") == 2
    assert rows.output.count("| 2 |") == 2


def test_command_refuses_what_does_not_divide() -> None:
    with pytest.raises(JobError, match=r"doesn't divide over 7 workers; .* train\.global_batch=\d+"):
        api.plan(JOB, "h100:7", classes=1000)
    with pytest.raises(JobError, match="head-precision"):
        api.plan(JOB, "h100:8", head_precision="fp8")
    with pytest.raises(JobError, match=r"head\.shards: 3 doesn't divide the 8 workers"):
        api.plan(JOB, "h100:8", ["cluster.workers=3", "head.shards=3", "train.global_batch=24"], batch_per_worker=8)
    with pytest.raises(JobError, match="one job as it is"):
        api.plan_table(JOB, "local", [1000, 2000])
    with pytest.raises(ClusterError, match="workers and this machine"):
        probe(setup(workers=100_000), build_encoder({"kind": "linear", "in_dim": 4, "dim": 4}).config)  # type: ignore[arg-type]


def test_job_refuses_shards_that_leave_a_part_of_a_replica() -> None:
    with pytest.raises(JobError, match=r"head\.shards: 2 doesn't divide the 3 workers"):
        api.check(JOB, ["cluster.workers=3", "head.shards=2", "train.global_batch=24"])
