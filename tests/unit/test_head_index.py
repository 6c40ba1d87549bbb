"""The approximate index over class rows, and the command line of saved heads."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from typer.testing import CliRunner

from labelmill.cli import app
from labelmill.errors import DataError, UserError
from labelmill.heads import index
from labelmill.heads.config import HeadConfig
from labelmill.heads.index import build_index, exact_topk, load_index, measure_recall
from labelmill.heads.sharded import ShardedHead
from labelmill.heads.source import open_rows
from labelmill.heads.storage import write_index

CLASSES, DIM = 3000, 24


@pytest.fixture
def rows(tmp_path: Path) -> tuple[ShardedHead, Path, torch.Tensor]:
    """A head in clusters, the folder of a model with its rows in two files, and queries near some classes."""
    generator = torch.Generator().manual_seed(0)
    centre = torch.randn(60, DIM, generator=generator)
    head = ShardedHead(CLASSES, DIM, HeadConfig())
    head.set_rows(
        torch.arange(CLASSES), centre.repeat_interleave(50, 0) + 0.5 * torch.randn(CLASSES, DIM, generator=generator)
    )
    head.export_rows(tmp_path / "model")
    queries = head.w_CD[:: CLASSES // 40] + 0.2 * torch.randn(40, DIM, generator=generator)
    return head, tmp_path / "model", queries


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "CHUNK_BYTES", 700 * DIM * 4)


def test_exact_search_over_files(rows: tuple[ShardedHead, Path, torch.Tensor]) -> None:
    head, folder, queries = rows
    scores, ids = exact_topk(folder, queries, 7)
    want_scores, want_ids = head.topk(queries, 7)
    torch.testing.assert_close(scores, want_scores, rtol=0, atol=1e-5)
    assert torch.equal(ids, want_ids)


@pytest.mark.parametrize(
    ("kind", "factory", "least"),
    [
        ("faiss", "Flat", 1.0),
        ("faiss", "IVF32,SQ8", 0.9),
        ("faiss", "HNSW16", 0.9),
        ("usearch", "f32", 0.9),
        ("usearch", "i8", 0.7),
    ],
)
def test_recall_of_an_index(
    rows: tuple[ShardedHead, Path, torch.Tensor], kind: Any, factory: str, least: float
) -> None:
    head, folder, queries = rows
    info = build_index(folder, kind, factory, probes=16)
    assert (info.num_classes, info.dim, info.normalized) == (CLASSES, DIM, True)
    found = measure_recall(folder, queries, k=10)
    assert set(found) == {"recall@1", "recall@10", "exact_ms", "index_ms"}
    assert least <= found["recall@10"] <= 1.0
    assert json.loads((folder / "index.json").read_text())["recall"]["recall@10"] == found["recall@10"]
    scores, ids = load_index(folder).search(queries, 5)
    cosines = (F.normalize(queries)[:, None] * F.normalize(head.w_CD)[ids]).sum(dim=2)
    torch.testing.assert_close(scores, cosines, rtol=0, atol=0.05 if factory == "i8" else 5e-3)
    assert (scores[:, :-1] >= scores[:, 1:]).all()


def test_default_indexes(rows: tuple[ShardedHead, Path, torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    _, folder, queries = rows
    assert build_index(folder).factory == "Flat"
    assert measure_recall(folder, queries, keep=False)["recall@1"] == 1.0
    assert build_index(folder, "usearch").factory == "f16"
    assert load_index(folder).info.kind == "usearch"


def test_what_is_refused(
    rows: tuple[ShardedHead, Path, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    head, folder, queries = rows
    with pytest.raises(DataError, match="has no index"):
        load_index(folder)
    with pytest.raises(UserError, match="faiss knows no index 'Flatt'"):
        build_index(folder, "faiss", "Flatt")
    with pytest.raises(UserError, match="can't make 'IVF4000,Flat' of 3000 rows"):
        build_index(folder, "faiss", "IVF4000,Flat")
    with pytest.raises(UserError, match="usearch dtype 'f8'"):
        build_index(folder, "usearch", "f8")
    assert not (folder / "index.json").exists()
    build_index(folder, "faiss")
    with pytest.raises(DataError, match=r"at least one row of 24 numbers"):
        measure_recall(folder, queries[:, :3])
    with pytest.raises(ValueError, match="don't have 24 columns"):
        load_index(folder).search(queries[:, :3], 1)
    head.w_CD[0, 0] += 1
    for file in folder.glob("rows-*"):
        file.unlink()
    head.export_rows(folder, dtype=torch.float16)
    with pytest.raises(DataError, match="built from other rows"):
        load_index(folder)
    build_index(folder, "faiss")
    data = (folder / "index.faiss").read_bytes()
    (folder / "index.faiss").write_bytes(data[:-1] + b"x")
    with pytest.raises(DataError, match="missing or damaged"):
        load_index(folder)
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(UserError, match="faiss isn't installed: pip install"):
        build_index(folder, "faiss")


# --- command line -------------------------------------------------------------------------------------------


def call(*args: object) -> str:
    done = CliRunner().invoke(app, ["head", *map(str, args)])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return " ".join(done.output.split())


def test_a_head_through_the_command_line(tmp_path: Path) -> None:
    head = ShardedHead(300, DIM, HeadConfig(block_rows=16))
    saved = tmp_path / "saved"
    write_index(saved, 300, [head.save(saved)])
    shown = call("show", saved, "--verify")
    assert "300 classes, 1 file(s)" in shown
    assert "sgd.momentum float32 [24]" in shown
    assert "every file is whole" in shown
    assert "4 file(s)" in call("convert", saved, tmp_path / "four", "--files", 4, "--dtype", "bfloat16")
    assert "1 file(s)" in call("merge", tmp_path / "four", tmp_path / "one")
    assert "320 classes" in call("grow", saved, tmp_path / "grown", "--classes", 320)
    (tmp_path / "drop.txt").write_text("1\n5\n")
    assert "298 classes" in call("shrink", saved, tmp_path / "less", "--drop", tmp_path / "drop.txt")
    (tmp_path / "old.txt").write_text("\n".join(f"class {i}" for i in range(300)))
    (tmp_path / "new.txt").write_text("\n".join(["fresh", *(f"class {i}" for i in range(299, 9, -1))]))
    call("remap", saved, tmp_path / "named", "--old-names", tmp_path / "old.txt", "--new-names", tmp_path / "new.txt")
    assert torch.equal(open_rows(tmp_path / "named").read(1, 291)["rows"], head.w_CD[10:].flip(0))
    np.save(tmp_path / "map.npy", np.arange(300) // 2)
    call("remap", saved, tmp_path / "half", "--map", tmp_path / "map.npy", "--merge", "first")
    assert open_rows(tmp_path / "half").num_classes == 150
    call("export", saved, tmp_path / "m.npy", "--raw", "--names", tmp_path / "old.txt")
    assert np.array_equal(np.load(tmp_path / "m.npy"), head.w_CD.numpy())
    torch.save({"weight": head.w_CD[:150].clone()}, tmp_path / "softmax_fc_gpu_0.pt")
    torch.save({"weight": head.w_CD[150:].clone()}, tmp_path / "softmax_fc_gpu_1.pt")
    assert "300 classes" in call("import-insightface", tmp_path, "--out", tmp_path / "imported", "--classes", 300)
    assert "faiss Flat: 300 classes" in call("index", "build", saved)
    np.save(tmp_path / "q.npy", head.w_CD[:20].numpy())
    assert "recall@1 1.0000" in call("index", "recall", saved, "--queries", tmp_path / "q.npy", "-k", 5)
    with pytest.raises(UserError, match="give --map, or both"):
        call("remap", saved, tmp_path / "x")
    with pytest.raises(DataError, match="is there already"):
        call("merge", saved, tmp_path / "one")


def test_errors_end_with_code_2(tmp_path: Path) -> None:
    program = Path(sys.executable).with_name("labelmill")
    done = subprocess.run([program, "head", "show", tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "holds no head" in done.stderr


def test_a_write_that_fails_leaves_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    head = ShardedHead(50, 4, HeadConfig(init_std=1.0))
    write_index(tmp_path, 50, [head.save(tmp_path)])
    before = sorted(path.name for path in tmp_path.iterdir())
    faiss = pytest.importorskip("faiss")

    def full(index: Any, path: str) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(faiss, "write_index", full)
    with pytest.raises(OSError, match="No space left"):
        build_index(tmp_path, "faiss")
    assert sorted(path.name for path in tmp_path.iterdir()) == before
