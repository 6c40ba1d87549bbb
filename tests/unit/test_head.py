"""One rank's head: memory, top-k, export, and the labels that it takes."""

from __future__ import annotations

import math
import subprocess
import sys
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
from labelmill.heads.optim import LAMB, SGD, Lag
from labelmill.heads.plan import BlockSampling, HardSampling, UniformSampling
from labelmill.heads.sharded import ShardedHead
from labelmill.heads.topk import topk_rows
from labelmill.heads.traffic import head_collectives
from labelmill.losses.classification import MLCD, SoftTargets
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


def largest_tensor(rate: float, **fields: Any) -> tuple[int, ShardedHead]:
    """Elements of the largest tensor that three steps make, apart from rows and state."""
    config = HeadConfig(sample_rate=rate, margin=CosFace(), optimizer=SGD(momentum=0.9), **fields)
    head = ShardedHead(CLASSES, DIM, config)
    x_BD = torch.randn(BATCH, DIM, requires_grad=True)
    ids_B = torch.randint(CLASSES, (BATCH,))
    shard = {head.w_CD.untyped_storage().data_ptr(), head.state["momentum"].untyped_storage().data_ptr()}
    with LargestTensor(shard) as largest:
        for _ in range(3):
            head.begin_step(0.1)
            head.loss(x_BD, ids_B).backward()
            head.step(0.1)
        head.topk(x_BD.detach(), 5)
    return largest.elements, head


CLASSES, DIM, BATCH = 60_000, 32, 128
CHUNK = 1024 * BATCH  # logits


@pytest.mark.parametrize("sampling", [UniformSampling(), BlockSampling()])
@pytest.mark.parametrize(("rate", "memory_mb"), [(0.01, 64.0), (0.01, 0.0), (1.0, 0.0)])
def test_nothing_of_batch_times_classes_or_of_the_shard(rate: float, memory_mb: float, sampling: Any) -> None:
    """Rows that move in the backward pass: one column of the shard is all that has a class axis."""
    elements, _ = largest_tensor(rate, memory_mb=memory_mb, sampling=sampling)
    kept = 2 * (CLASSES * rate + 2 * BATCH) * BATCH if memory_mb else 0
    assert elements <= max(CLASSES, CHUNK, kept) < CLASSES * DIM / 5


def test_kept_logits_stay_within_their_budget() -> None:
    elements, _ = largest_tensor(1.0, memory_mb=2.0)
    assert elements <= 2 * 2**20 / 4 + CHUNK < CLASSES * BATCH / 10


def test_stored_gradient_is_of_the_touched_rows_only() -> None:
    head = ShardedHead(CLASSES, DIM, HeadConfig(sample_rate=0.01, optimizer=SGD()))
    shard = {head.w_CD.untyped_storage().data_ptr(), head.state["momentum"].untyped_storage().data_ptr()}
    x_BD = torch.randn(BATCH, DIM, requires_grad=True)
    with LargestTensor(shard) as largest:
        for _ in range(3):
            head.loss(x_BD, torch.randint(CLASSES, (BATCH,))).backward()
        head.step(0.1)
    assert largest.elements <= max(CLASSES, 2 * (CLASSES * 0.01 + 4 * BATCH) * BATCH) < CLASSES * DIM / 5


def test_peak_memory_of_a_step_is_the_rows_and_their_state() -> None:
    """What the process really held, not what torch was asked for."""
    code = (
        "import torch\n"
        "from pathlib import Path\n"
        "from labelmill.heads.config import HeadConfig\n"
        "from labelmill.heads.sharded import ShardedHead\n"
        "def peak(): return int(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0]) * 1024\n"
        "torch.set_num_threads(1)\n"
        "def run(classes, steps):\n"
        "    head = ShardedHead(classes, 256, HeadConfig(sample_rate=0.2, memory_mb=8.0))\n"
        "    for _ in range(steps):\n"
        "        head.begin_step(0.1)\n"
        "        head.loss(torch.randn(64, 256, requires_grad=True), torch.randint(classes, (64,))).backward()\n"
        "        head.step(0.1)\n"
        "    return head\n"
        "run(2000, 2)\n"
        "before = peak()\n"
        "head = run(100_000, 3)\n"
        "print((peak() - before) / (2 * head.w_CD.numel() * 4))\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(out.stdout) < 1.10


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
    with pytest.raises(DataError, match="loss mlcd takes no soft labels"):
        head.loss(emb_BD, Labels("soft", ids_BP, weights_BP=torch.ones(3, 2)))
    with pytest.raises(DataError, match="form single, multi or soft, not complementary"):
        head.loss(emb_BD, Labels("complementary", ids_BP))
    with pytest.raises(DataError, match=r"add up to 2, more than 1\. Set loss\.tail to drop"):
        small_head(loss=SoftTargets()).loss(emb_BD, Labels("soft", ids_BP, weights_BP=torch.ones(3, 2)))
    with pytest.raises(ValueError, match="don't fit 3 embeddings"):
        head.loss(emb_BD, ids_BP[:2])


def test_scale_at_the_exponent_bound() -> None:
    """Without a maximum taken off, sums of exponentials of float32 still hold; beyond it the maximum comes in."""
    for scale in (74.0, 90.0):
        head = ShardedHead(3000, 12, HeadConfig(init_std=1.0, scale=scale))
        assert head._use_max == (scale > 80)
        rows = F.normalize(head.w_CD)
        x_BD = torch.cat([rows[:2], -rows[2:4]])  # logits of +scale and -scale
        ids = torch.tensor([0, 7, 2, 9])
        got = head.loss(x_BD, ids)
        want = F.cross_entropy(scale * F.normalize(x_BD.double()) @ rows.double().T, ids)
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


def test_bf16_products_are_close() -> None:
    x_BD, ids = torch.randn(8, 12), torch.randint(203, (8,))
    exact, rounded = (small_head(matmul=kind).loss(x_BD, ids) for kind in ("fp32", "bf16"))
    torch.testing.assert_close(exact, rounded, rtol=0.02, atol=0.05)
    assert torch.backends.mkldnn.matmul.fp32_precision != "bf16", "only the head's own products are rounded"


def test_stochastic_rounding_is_right_on_average() -> None:
    from labelmill.heads.rounding import round_stochastically

    generator = torch.Generator().manual_seed(0)
    x = torch.tensor([1.0 + 2**-10, -3.3, 1e-30, 0.0])
    mean = torch.stack([round_stochastically(x, torch.bfloat16, generator).float() for _ in range(4000)]).mean(0)
    torch.testing.assert_close(mean, x, rtol=3e-4, atol=0)
    assert {*round_stochastically(x[:1].repeat(100), torch.bfloat16, generator).tolist()} == {1.0, 1.0078125}


def test_a_row_catches_up_to_what_dense_sgd_would_hold() -> None:
    optimizer = SGD(momentum=0.8, weight_decay=0.1, skipped="exact")
    lag = Lag(3, optimizer, torch.device("cpu"))
    w, m = torch.randn(3, 5, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    got_w, got_m = w.clone(), m.clone()
    for step in range(7):
        lr = 0.1 * (step + 1)
        for row in range(3):
            if step >= 3 * row:  # rows are 7, 4 and 1 steps behind
                m[row] = 0.8 * m[row] + 0.1 * w[row]
                w[row] -= lr * m[row]
        lag.advance(lr)
    lag.apply_(got_w, got_m, torch.tensor([7, 4, 1]))
    torch.testing.assert_close(got_w, w)
    torch.testing.assert_close(got_m, m)


def test_lamb_turns_rows_by_the_rate_whatever_their_length() -> None:
    optimizer = LAMB()
    w = torch.tensor([[3.0, 0.0], [0.03, 0.0]])
    state = optimizer.state(2, 2, torch.float32, torch.device("cpu"))
    optimizer.update_(w, torch.tensor([[0.0, 10.0], [0.0, 1e-4]]), state, 0.05)
    torch.testing.assert_close(w[:, 1] / w[:, 0], torch.tensor([-0.05, -0.05]), rtol=1e-3, atol=0)


def test_rows_written_from_outside_are_noticed() -> None:
    head = small_head()
    x_BD, ids = torch.randn(3, 12), torch.tensor([1, 2, 3])
    head.loss(x_BD, ids)
    with torch.no_grad():
        head.w_CD.mul_(torch.linspace(0.5, 2.0, 203)[:, None])  # other lengths, same directions
        stretched = head.loss(x_BD, ids)
    torch.testing.assert_close(stretched, small_head().loss(x_BD, ids).detach())


def test_screen_follows_the_rows() -> None:
    head = small_head(sample_rate=0.2, sampling=HardSampling(share=0.5), scale=8.0)
    for _ in range(5):
        head.begin_step(0.5)
        head.loss(torch.randn(6, 12, requires_grad=True), torch.randint(203, (6,))).backward()
        head.step(0.5)
    screen = head._drawing.screen
    assert screen is not None
    unit = screen.q_CD.float() * screen.scale_C[:, None]
    assert (unit - F.normalize(head.w_CD)).abs().max() < 1 / 200
    x = F.normalize(torch.randn(6, 12))
    none = torch.empty(0, dtype=torch.int64)
    assert (screen.scores(x, none, none) - (x @ F.normalize(head.w_CD).T).amax(0)).abs().max() < 0.02


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


def test_the_table_of_traffic_in_the_readme_is_that_of_the_code() -> None:
    """Names, axes, collectives and bytes, with and without replicas; two numbers each pin a formula down."""
    text = Path("platform/README.md").read_text(encoding="utf-8")
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")
    ]
    table = {cells[0].split(",")[0]: cells for cells in lines if len(cells) == 5 and "all-" in cells[2]}
    found = {}
    for shards, replicas in ((4, 1), (2, 3)):
        for item in head_collectives(7, 2, 16, 50, shards, replicas, maximum=True, hard=(300, 20)):
            found[item.what] = (item.axis, item.kind.replace("_", "-"), item.each)
            b, p, d, u, c, h, s, r = 7, 2, 16, 50, 300, 20, shards, replicas
            w, n = s * r, s * b
            ring_s, ring_r = 2 * (s - 1) / s, 2 * (r - 1) / r
            formulas = {
                "(W−1) · 56; with replicas · 64": (w - 1) * (56 if r == 1 else 64),
                "(S−1) · B (4 D + 8 (P+1))": (s - 1) * b * (4 * d + 8 * (p + 1)),
                "(W−1) · 8 B (P+1)": (w - 1) * 8 * b * (p + 1),
                "(S−1) · 4 B D": (s - 1) * 4 * b * d,
                "2 (R−1)/R · 4": ring_r * 4,
                "2 (R−1)/R · 4 C": ring_r * 4 * c,
                "(S−1) · 8": (s - 1) * 8,
                "(S−1) · 4 H": (s - 1) * 4 * h,
                "2 (S−1)/S · 4 N": ring_s * 4 * n,
                "2 (S−1)/S · 4 N (1+P)": ring_s * 4 * n * (1 + p),
                "2 (S−1)/S · 4 N D": ring_s * 4 * n * d,
                "2 (R−1)/R · 8": ring_r * 8,
                "2 (R−1)/R · 4 U D": ring_r * 4 * u * d,
            }
            assert item.sent == pytest.approx(formulas[table[item.what][3]]), item.what
    assert {name: (cells[1], cells[2], cells[4]) for name, cells in table.items()} == found
