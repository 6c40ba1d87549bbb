"""Saved heads made into others: files, dtypes, classes; exports and imports; bounded memory."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from labelmill.errors import DataError
from labelmill.heads import storage
from labelmill.heads.classmap import class_map, map_by_name, read_ids, read_map
from labelmill.heads.config import HeadConfig
from labelmill.heads.export import export
from labelmill.heads.insightface import first_class, import_insightface, share
from labelmill.heads.optim import SGD, AdamW
from labelmill.heads.refill import first_rows
from labelmill.heads.reshard import convert, grow, load_with_map, remap, shrink
from labelmill.heads.sharded import ShardedHead
from labelmill.heads.source import open_rows
from labelmill.heads.storage import part_of, specs_of, write_index, write_rows
from labelmill.losses.margins import CosFace

CLASSES, DIM = 403, 8


@pytest.fixture(autouse=True)
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "PAGE_BYTES", 2000)


def make_head(num_classes: int = CLASSES, seed: int = 5, **config: Any) -> ShardedHead:
    return ShardedHead(num_classes, DIM, HeadConfig(**({"optimizer": AdamW(), "block_rows": 10} | config)), seed=seed)


@pytest.fixture
def saved(tmp_path: Path) -> tuple[ShardedHead, Path]:
    """A head after three steps, with its files."""
    head = make_head(sample_rate=0.3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        x_BD = torch.randn(9, DIM, generator=generator)
        head.loss(x_BD, torch.randint(CLASSES, (9,), generator=generator)).backward()
        head.step(0.1)
    write_index(tmp_path / "saved", CLASSES, [head.save(tmp_path / "saved")])
    return head, tmp_path / "saved"


def everything(folder: Path) -> dict[str, Tensor]:
    source = open_rows(folder)
    return source.read(0, source.num_classes)


def test_convert_changes_files_and_dtypes_only(tmp_path: Path, saved: tuple[ShardedHead, Path]) -> None:
    head, folder = saved
    want = head.state_tensors()
    assert len(convert(folder, tmp_path / "one", files=1).files) == 1
    assert len(convert(tmp_path / "one", tmp_path / "seven", files=7).files) == 7
    assert len(convert(tmp_path / "seven", tmp_path / "small", file_mb=0.004).files) > 7
    for name in ("one", "seven", "small"):
        got = everything(tmp_path / name)
        assert all(torch.equal(got[key], want[key]) for key in want)
        again = make_head(seed=1)
        again.load(tmp_path / name)
        assert torch.equal(again.w_CD, head.w_CD)
        assert again.steps == 3
    half = convert(folder, tmp_path / "half", dtype=torch.bfloat16, state_dtype=torch.float16).read(0, CLASSES)
    assert torch.equal(half["rows"], head.w_CD.bfloat16())
    assert half["adamw.mean"].dtype == torch.float16
    assert half["adamw.touched"].dtype == torch.int32
    make_head().load(tmp_path / "half")  # wider rows take narrower ones
    assert set(convert(folder, tmp_path / "rows", weights_only=True).specs) == {"rows"}
    with pytest.raises(DataError, match="is there already"):
        convert(folder, tmp_path / "one")
    with pytest.raises(DataError, match="can't be cut into 404 files"):
        convert(folder, tmp_path / "many", files=CLASSES + 1)
    with pytest.raises(DataError, match="not both"):
        convert(folder, tmp_path / "both", files=2, file_mb=1.0)
    head.w_CD[77, 3] = 1e6
    write_index(tmp_path / "large", CLASSES, [head.save(tmp_path / "large")])
    with pytest.raises(DataError, match=r"'rows' holds 1e\+06, which torch.float16 can't hold"):
        convert(tmp_path / "large", tmp_path / "overflow", dtype=torch.float16)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["half", "large", "one", "rows", "saved", "seven", "small"]


@pytest.mark.parametrize("grown", [CLASSES, CLASSES + 1, 999])
def test_grown_classes_are_what_a_fresh_head_draws(tmp_path: Path, saved: tuple[ShardedHead, Path], grown: int) -> None:
    head, folder = saved
    grow(folder, tmp_path / "grown", grown, memory_mb=0.002)
    bigger = make_head(grown)  # same seed
    fresh = {name: value.clone() for name, value in bigger.state_tensors().items()}
    bigger.load(tmp_path / "grown")
    for name, value in bigger.state_tensors().items():
        assert torch.equal(value[:CLASSES], head.state_tensors()[name])
        assert torch.equal(value[CLASSES:], fresh[name][CLASSES:])
    assert bigger.steps == 3
    # the same without a folder between, into a head that has drawn its rows
    direct = make_head(grown)
    plan = load_with_map(direct, folder)
    assert (plan.fresh, plan.dropped) == (grown - CLASSES, 0)
    assert all(
        torch.equal(a, b) for a, b in zip(direct.state_tensors().values(), bigger.state_tensors().values(), strict=True)
    )
    # nightly: the grown head trains on, labels of the new classes included
    bigger.loss(torch.randn(4, DIM), torch.tensor([0, CLASSES - 1, grown - 1, grown - 1])).backward()
    bigger.step(0.1)


def test_grow_with_given_rows_and_other_seeds(tmp_path: Path, saved: tuple[ShardedHead, Path]) -> None:
    _, folder = saved
    rows = np.random.default_rng(0).standard_normal((7, DIM)).astype(np.float32)
    np.save(tmp_path / "rows.npy", rows)
    got = grow(folder, tmp_path / "given", CLASSES + 7, rows=tmp_path / "rows.npy", memory_mb=0.001).read(
        CLASSES, CLASSES + 7
    )
    assert np.array_equal(got["rows"].numpy(), rows)
    assert not got["adamw.square"].any()
    other = grow(folder, tmp_path / "seed", CLASSES + 7, seed=6).read(CLASSES, CLASSES + 7)
    assert torch.equal(other["rows"], make_head(CLASSES + 7, seed=6).w_CD[CLASSES:])
    with pytest.raises(DataError, match=r"7 new classes need rows \(7, 8\)"):
        grow(folder, tmp_path / "bad", CLASSES + 7, rows=torch.zeros(6, DIM))
    with pytest.raises(DataError, match="row 2 for a new class is zero"):
        grow(
            folder,
            tmp_path / "bad",
            CLASSES + 7,
            rows=torch.eye(7, DIM) * torch.tensor([1, 1, 0, 1, 1, 1, 1.0])[:, None],
        )
    with pytest.raises(DataError, match=r"403 classes; 402 are fewer: use `shrink`"):
        grow(folder, tmp_path / "bad", CLASSES - 1)


def test_first_rows_of_unaligned_ranges() -> None:
    fresh = make_head(1000)
    for lo, hi in [(0, 1000), (7, 8), (403, 999), (990, 1000)]:
        assert torch.equal(
            first_rows(1000, storage.TensorSpec("F32", (DIM,)), fresh.notes(), lo, hi), fresh.w_CD[lo:hi]
        )


def test_shrink_and_remap_carry_the_state(tmp_path: Path, saved: tuple[ShardedHead, Path]) -> None:
    head, folder = saved
    old = head.state_tensors()
    gone = torch.tensor([0, 17, CLASSES - 1])
    stay = torch.tensor([i for i in range(CLASSES) if i not in gone.tolist()])
    shrink(folder, tmp_path / "shrunk", gone, memory_mb=0.002)
    assert all(torch.equal(v, old[n][stay]) for n, v in everything(tmp_path / "shrunk").items())
    shrink(folder, tmp_path / "first", num_classes=100)
    assert all(torch.equal(v, old[n][:100]) for n, v in everything(tmp_path / "first").items())
    # a shuffle with holes, dropped classes and new ones
    generator = torch.Generator().manual_seed(3)
    new_of_old = torch.randperm(600, generator=generator)[:CLASSES]
    new_of_old[gone] = -1
    kept = new_of_old >= 0
    for memory in (256.0, 0.002):
        got = remap(folder, tmp_path / f"map-{memory}", new_of_old, 600, memory_mb=memory)
        read = got.read(0, 600)
        fresh = make_head(600)
        untouched = torch.ones(600, dtype=torch.bool)
        untouched[new_of_old[kept]] = False
        for name, value in read.items():
            assert torch.equal(value[new_of_old[kept]], old[name][kept])
            assert torch.equal(value[untouched], fresh.state_tensors()[name][untouched])
    direct = make_head(600)
    load_with_map(direct, folder, new_of_old)
    assert all(torch.equal(direct.state_tensors()[name], read[name]) for name in read)
    assert direct.steps == 3


def test_merged_classes(tmp_path: Path, saved: tuple[ShardedHead, Path]) -> None:
    head, folder = saved
    head.w_CD[9] = -head.w_CD[8]  # opposite: no mean direction
    write_index(tmp_path / "head", CLASSES, [head.save(tmp_path / "head")])
    folder = tmp_path / "head"
    old = head.state_tensors()
    new_of_old = torch.arange(CLASSES) // 2
    with pytest.raises(DataError, match=r"sends both 0 and 1 to 0 \(201 such classes\)"):
        remap(folder, tmp_path / "refused", new_of_old)
    first = remap(folder, tmp_path / "first", new_of_old, merge="first", memory_mb=0.002).read(0, 202)
    assert all(torch.equal(value, old[name][::2]) for name, value in first.items())
    mean = remap(folder, tmp_path / "mean", new_of_old, merge="mean", memory_mb=0.002).read(0, 202)
    a, b = old["rows"][0:402:2], old["rows"][1:402:2]
    direction = F.normalize(F.normalize(a) + F.normalize(b))
    direction[4] = F.normalize(a)[4]
    length = (a.norm(dim=1) + b.norm(dim=1)) / 2
    torch.testing.assert_close(mean["rows"][:201], direction * length[:, None], rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(mean["adamw.mean"][:201], (old["adamw.mean"][0:402:2] + old["adamw.mean"][1:402:2]) / 2)
    most = torch.maximum(old["adamw.touched"][0:402:2], old["adamw.touched"][1:402:2])
    assert torch.equal(mean["adamw.touched"][:201], most)
    assert all(torch.equal(value[201], old[name][402]) for name, value in mean.items())  # alone: as it was


@pytest.mark.parametrize("config", [{"sub_centres": 3}, {"rows_dtype": "bf16+master"}, {"rows_dtype": "bf16"}])
def test_sub_centres_and_narrow_rows(tmp_path: Path, config: dict[str, Any]) -> None:
    """What a class owns goes along as a whole, and the rows of new classes are those of a fresh head."""
    config = {"margin": CosFace(), "optimizer": SGD(), "init_std": 0.3} | config
    head = make_head(**config)
    for _ in range(2):
        head.loss(torch.randn(9, DIM), torch.randint(CLASSES, (9,))).backward()
        head.step(0.1)
    old = {name: value.clone() for name, value in head.state_tensors().items()}
    write_index(tmp_path / "in", CLASSES, [head.save(tmp_path / "in")])
    new_of_old = torch.randperm(500)[:CLASSES]
    fresh = torch.ones(500, dtype=torch.bool)
    fresh[new_of_old] = False
    remap(tmp_path / "in", tmp_path / "out", new_of_old, 500)
    other, direct = make_head(500, **config), make_head(500, **config)
    drawn = {name: value.clone() for name, value in other.state_tensors().items()}
    other.load(tmp_path / "out")
    load_with_map(direct, tmp_path / "in", new_of_old)
    for name, value in other.state_tensors().items():
        assert torch.equal(value[new_of_old], old[name])
        assert torch.equal(value[fresh], drawn[name][fresh])
        assert torch.equal(direct.state_tensors()[name], value)
    for one in (other, direct):  # what is derived from the rows follows
        x_BD, ids_B = torch.ones(4, DIM), torch.tensor([0, 2, 3, 499])
        assert torch.equal(one.loss(x_BD, ids_B).detach(), other.loss(x_BD, ids_B).detach())
    again = make_head(500, seed=9, **config)
    load_with_map(again, tmp_path / "out", optimizer="fresh")
    if config.get("rows_dtype") != "bf16":  # which rounds at random
        assert torch.equal(again.w_CD, other.w_CD)
    assert not again.state["momentum"].any()
    merged = remap(tmp_path / "in", tmp_path / "mean", torch.arange(CLASSES) // 2, merge="mean").read(0, 202)
    master = merged.get("sgd.master", merged["rows"].float())
    assert torch.equal(merged["rows"], master.to(merged["rows"].dtype))
    if "sub_centres" in config:
        with pytest.raises(DataError, match="3 sub-centres a class"):
            export(tmp_path / "in", tmp_path / "m.npy")
        with pytest.raises(DataError, match="3 x 8 numbers a class, the head's 1 x 8"):
            load_with_map(make_head(CLASSES), tmp_path / "in")


def test_loaded_rows_are_what_the_loss_uses(tmp_path: Path) -> None:
    head = make_head()
    head.w_CD.mul_(7)  # lengths are derived and must not stay those of before
    write_index(tmp_path / "long", CLASSES, [head.save(tmp_path / "long")])
    x_BD, ids_B = torch.randn(4, DIM), torch.tensor([0, 2, 3, 402])
    other = make_head(seed=8)
    other.loss(x_BD, ids_B)
    other.load(tmp_path / "long")
    assert torch.equal(other.loss(x_BD, ids_B).detach(), head.loss(x_BD, ids_B).detach())


def test_maps_that_do_not_fit(tmp_path: Path, saved: tuple[ShardedHead, Path]) -> None:
    _, folder = saved
    ids = torch.arange(CLASSES)
    for wrong, message in [
        (ids[:-1], "has 402 entries, the saved head 403 classes"),
        (ids.float(), "vector of integers"),
        (torch.where(ids == 5, 403, ids), "sends class 5 to 403: new ids run from 0 to 402"),
        (torch.where(ids == 6, -2, ids), "sends class 6 to -2"),
    ]:
        with pytest.raises(DataError, match=message):
            remap(folder, tmp_path / "out", wrong, CLASSES)
        with pytest.raises(DataError, match=message):
            load_with_map(make_head(), folder, wrong)
    with pytest.raises(DataError, match="leaves no class"):
        remap(folder, tmp_path / "out", torch.full((CLASSES,), -1))
    with pytest.raises(DataError, match="leaves no class"):
        shrink(folder, tmp_path / "out", ids)
    with pytest.raises(DataError, match="class 403 to drop is out of range"):
        shrink(folder, tmp_path / "out", torch.tensor([1, 403]))
    with pytest.raises(DataError, match="can't keep the first 404"):
        shrink(folder, tmp_path / "out", num_classes=404)
    with pytest.raises(DataError, match="another row optimizer"):
        load_with_map(make_head(optimizer=SGD()), folder)
    load_with_map(make_head(optimizer=SGD()), folder, optimizer="fresh")
    with pytest.raises(DataError, match="rows have 1 x 8 numbers a class, the head's 1 x 9"):
        load_with_map(ShardedHead(CLASSES, 9, HeadConfig()), folder)
    assert not (tmp_path / "out").exists()
    assert class_map(ids, CLASSES).fresh == 0


def test_maps_from_files_and_names(tmp_path: Path) -> None:
    np.save(tmp_path / "map.npy", np.array([2, -1, 0]))
    assert read_map(tmp_path / "map.npy", 3).tolist() == [2, -1, 0]
    (tmp_path / "map.csv").write_text("old,new\n2,0\n0,2\n3,\n")
    assert read_map(tmp_path / "map.csv", 4).tolist() == [2, -1, 0, -1]
    for text, message in [
        ("a,b\n1,2\n", "needs the columns old and new"),
        ("old,new\n1,2\n1,3\n", "line 3: old class 1 stands twice"),
        ("old,new\n9,2\n", r"line 2: old class 9 is out of range \(0 to 3\)"),
        ("old,new\n1,x\n", "line 2: invalid literal"),
    ]:
        (tmp_path / "bad.csv").write_text(text)
        with pytest.raises(DataError, match=message):
            read_map(tmp_path / "bad.csv", 4)
    (tmp_path / "ids.txt").write_text("3\n1\n")
    assert read_ids(tmp_path / "ids.txt").tolist() == [3, 1]
    found = map_by_name(pa.array(["cat", "dog", "cow"]), pa.chunked_array([["ant", "cow"], ["cat"]]))
    assert found.tolist() == [2, -1, 1]
    with pytest.raises(DataError, match="new class names hold 'cow' more than once"):
        map_by_name(pa.array(["cat"]), pa.array(["cow", "cow"]))


def test_export_as_a_matrix(tmp_path: Path, saved: tuple[ShardedHead, Path]) -> None:
    head, folder = saved
    want = F.normalize(head.w_CD)
    assert torch.equal(torch.from_numpy(np.load(export(folder, tmp_path / "m.npy"))), want)
    raw = np.load(export(folder, tmp_path / "raw.npy", unit=False, dtype=torch.float16))
    assert torch.equal(torch.from_numpy(raw), head.w_CD.half())
    (tmp_path / "names.txt").write_text("\n".join(f"c{i}" for i in range(CLASSES)))
    out = export(folder, tmp_path / "m.safetensors", dtype=torch.bfloat16, names=tmp_path / "names.txt")
    assert torch.equal(load_file(out)["rows"], want.bfloat16())
    assert (tmp_path / "m.classes.txt").is_file()
    (tmp_path / "names.txt").write_text("only one")
    with pytest.raises(DataError, match="holds 1 names"):
        export(folder, tmp_path / "x.npy", names=tmp_path / "names.txt")
    with pytest.raises(DataError, match="can't hold bfloat16"):
        export(folder, tmp_path / "x.npy", dtype=torch.bfloat16)
    with pytest.raises(DataError, match=r"write \.npy or \.safetensors"):
        export(folder, tmp_path / "x.pt")
    head.export_rows(tmp_path / "model")  # a packaged model's files are a source as well
    torch.testing.assert_close(torch.from_numpy(np.load(export(tmp_path / "model", tmp_path / "n.npy"))), want)
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


# --- InsightFace --------------------------------------------------------------------------------------------


def write_insightface(folder: Path, weight_CD: Tensor, world: int, form: str) -> None:
    folder.mkdir(exist_ok=True)
    for rank in range(world):
        first = first_class(len(weight_CD), rank, world)
        part = weight_CD[first : first + share(len(weight_CD), rank, world)].clone()
        if form == "v2":
            momentum = {"state": {0: {"momentum_buffer": torch.zeros_like(part)}}, "param_groups": [{"lr": 0.1}]}
            content: Any = {
                "epoch": 3,
                "global_step": 1000,
                "state_dict_backbone": {"conv.weight": torch.zeros(2, 2)},
                "state_dict_softmax_fc": {"weight": torch.nn.Parameter(part)},
                "state_optimizer": momentum,
                "state_lr_scheduler": {"base_lrs": [0.1]},
            }
            torch.save(content, folder / f"checkpoint_gpu_{rank}.pt")
        elif form == "v1":
            torch.save({"weight": part}, folder / f"softmax_fc_gpu_{rank}.pt")
        else:
            torch.save(part, folder / f"rank_{rank}_softmax_weight.pt", _use_new_zipfile_serialization=False)


@pytest.mark.parametrize("form", ["v2", "v1", "first"])
@pytest.mark.parametrize("world", [1, 3, 12])
def test_insightface_tensors_round_trip(tmp_path: Path, form: str, world: int) -> None:
    weight = torch.randn(103, DIM)  # uneven, and with 12 ranks the last files pass ten in name order
    write_insightface(tmp_path / "run", weight, world, form)
    source = import_insightface(tmp_path / "run", tmp_path / "head", num_classes=103, file_mb=0.001)
    assert len(source.files) > 1
    assert torch.equal(source.read(0, 103)["rows"], weight)
    assert np.array_equal(np.load(export(tmp_path / "head", tmp_path / "m.npy", unit=False)), weight.numpy())
    head = make_head(110)
    drawn = head.w_CD.clone()
    load_with_map(head, tmp_path / "head")
    assert torch.equal(head.w_CD, torch.cat([weight, drawn[103:]]))
    assert not any(tensor.any() for tensor in head.state.values())


def test_insightface_files_that_do_not_fit(tmp_path: Path) -> None:
    weight = torch.randn(103, DIM)
    run = tmp_path / "run"

    def refused(message: str, files: Any = run, **options: Any) -> None:
        with pytest.raises(DataError, match=message):
            import_insightface(files, tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()

    write_insightface(run, weight, 4, "v1")
    refused("4 files hold 103 classes, not 104", num_classes=104)
    refused("are both of rank 1", [run / "softmax_fc_gpu_1.pt", run / "rank_1.pt"])
    refused(r"doesn't tell the rank", [run / "weight.pt"])
    (run / "softmax_fc_gpu_2.pt").rename(tmp_path / "two")
    refused("the file of rank 2 is missing")
    torch.save({"weight": weight[:27]}, run / "softmax_fc_gpu_2.pt")
    refused(r"softmax_fc_gpu_2.pt: holds 27 classes; rank 2 of 4 owns 26 of 104")
    torch.save({"weight": weight[:26, :4]}, run / "softmax_fc_gpu_2.pt")
    refused("differ in width or dtype")
    torch.save({"bias": weight}, run / "softmax_fc_gpu_2.pt")
    refused(r"holds \['bias'\], no `weight`")
    torch.save({"weight": Evil()}, run / "softmax_fc_gpu_2.pt")
    refused("holds more than tensors and plain values, and isn't opened")
    assert not (tmp_path / "executed").exists()
    (run / "softmax_fc_gpu_2.pt").write_bytes((tmp_path / "two").read_bytes()[:-200])
    refused("cut off or not a file of torch.save")
    broken = weight[54:80].clone()
    broken[3] = 0
    (tmp_path / "two").rename(run / "softmax_fc_gpu_2.pt")
    torch.save({"weight": broken[:25]}, run / "softmax_fc_gpu_3.pt")
    refused("softmax_fc_gpu_3.pt: the row of class 81 is zero")
    write_insightface(run, weight, 4, "v2")
    refused("needs the files of one kind")
    refused("found none", tmp_path)


class Evil:
    """Would write a file if it were unpickled."""

    def __reduce__(self) -> Any:
        return (open, ("executed", "w"))


# --- memory -------------------------------------------------------------------------------------------------

MEASURE = """
import json, sys
from pathlib import Path
import torch
from labelmill.heads import insightface, reshard, export
from labelmill.heads.source import open_rows

def peak():
    return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) * 1024

torch.set_num_threads(1)
folder, used = Path(sys.argv[1]), {}
for size in ("small", "big"):  # the small one loads what the verbs need
    head = folder / size
    count = open_rows(head).num_classes
    verbs = {
        "verify": lambda: open_rows(head).verify(),
        "convert": lambda: reshard.convert(head, folder / f"c{size}", files=3, dtype=torch.bfloat16),
        "grow": lambda: reshard.grow(head, folder / f"g{size}", count + 5000, memory_mb=8),
        "remap": lambda: reshard.remap(head, folder / f"r{size}", torch.arange(count).flip(0), memory_mb=8),
        "export": lambda: export.export(head, folder / f"{size}.npy"),
    }
    for name, verb in verbs.items():
        open("/proc/self/clear_refs", "w").write("5")  # the peak starts from here
        before = peak()
        verb()
        used[name] = peak() - before
print(json.dumps(used))
"""


def test_memory_is_bounded_by_the_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # pages of 4 MiB
    rows, dim = 80_000, 128  # with momentum 78 MiB
    notes = {"dim": dim, "steps": 0, "seed": 0, "block_rows": 1024, "init_std": 0.01, "normalize": True}
    state = {"rows": torch.randn(rows, dim), "sgd.momentum": torch.randn(rows, dim)}
    for name, count in (("big", rows), ("small", 900)):
        files = write_rows(
            tmp_path / name,
            "head",
            specs_of(state),
            0,
            count,
            lambda a, b: {n: t[a:b] for n, t in state.items()},
            2**24,
        )
        write_index(tmp_path / name, count, [part_of(specs_of(state), 0, count, files, notes)])
    done = subprocess.run([sys.executable, "-c", MEASURE, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    used = json.loads(done.stdout)
    chunk = {"grow": 8, "remap": 8}
    for verb, size in used.items():
        # chunks and a few pages of 4 MiB; the head is 78 MiB
        assert size <= (3 * chunk.get(verb, 0) + 32) * 2**20, used


def test_rows_without_optimizer_state_keep_the_step_counter(tmp_path: Path) -> None:
    """Plain SGD has no state of its own; a head of it goes on where it stood, and takes other widths of a class too."""
    config = HeadConfig(optimizer=SGD(momentum=0.0), init_std=1.0)
    head = ShardedHead(30, 6, config)
    head.steps = 7
    write_index(tmp_path / "head", 30, [head.save(tmp_path / "head")])
    other = ShardedHead(34, 6, config, seed=5)
    load_with_map(other, tmp_path / "head")
    assert other.steps == 7
    assert torch.equal(other.w_CD[:30], head.w_CD)
    wide = ShardedHead(30, 6, config.model_copy(update={"sub_centres": 3}))
    load_with_map(wide, tmp_path / "head")
    unit = torch.nn.functional.normalize
    assert ((unit(wide.w_CD.view(30, 3, 6), dim=-1) * unit(head.w_CD)[:, None]).sum(-1) > 0.8).all()


def test_an_export_that_was_killed_or_fails_is_in_nobodys_way(tmp_path: Path, saved: tuple[ShardedHead, Path]) -> None:
    _, folder = saved
    (tmp_path / ".rows.safetensors.part").mkdir()
    (tmp_path / ".rows.safetensors.part" / "left").write_text("over")
    export(folder, tmp_path / "rows.safetensors")
    damaged = shutil.copytree(folder, tmp_path / "damaged")
    file = next(damaged.glob("head-*.safetensors"))
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    for name in ("rows.npy", "more.safetensors"):
        with pytest.raises(DataError, match="doesn't fit its checksum"):
            export(damaged, tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["rows.safetensors"]
    assert not list(tmp_path.glob(".*.part"))
