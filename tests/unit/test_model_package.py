"""The packaged model: what is written is what predicts, lazily, without the engine."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from labelmill.encoders import Encoder, build_encoder
from labelmill.errors import DataError
from labelmill.heads.storage import save_range
from labelmill.tracking.model import load_model, read_spec, write_model

WORDS = ["hello", "world", "banana", "orange", "apple", "grape", "melon"]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """On a busy host the threads of small matrix products wait for each other, 20 times longer than they work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def text_encoder() -> Encoder:
    torch.manual_seed(0)
    return build_encoder({"kind": "char_ngrams", "dim": 32, "buckets": 1024, "hidden": 16})


def save_head(folder: Path, rows_CD: Tensor, *cuts: int) -> None:
    for start, stop in zip((0, *cuts), (*cuts, len(rows_CD)), strict=True):
        save_range(folder, "rows", {"rows": rows_CD[start:stop]}, start, stop, {})


def unit_rows(encoder: Encoder) -> Tensor:
    return F.normalize(encoder.embed(WORDS), dim=1)


def package(folder: Path, *cuts: int) -> Path:
    folder.mkdir()
    encoder = text_encoder()
    save_head(folder, unit_rows(encoder), *cuts)
    write_model(
        folder,
        encoder=encoder,
        input_kind="text",
        classes=pa.table({"name": WORDS, "count": range(len(WORDS))}),
        scale=16.0,
        manifest_digest="d" * 64,
        code_version="1.2",
        extra={"job": {"seed": 0}},
    )
    return folder


@pytest.mark.parametrize("cuts", [(), (3,), (1, 2, 6)])
def test_topk_equals_a_dense_reference(tmp_path: Path, cuts: tuple[int, ...]) -> None:
    model = load_model(package(tmp_path / "m", *cuts))
    typos = ["helo", "bananna", "grpe", "hello"]
    answers = model.predict(typos, k=3)
    assert answers.column_names == ["input", "rank", "class_id", "class", "score"]
    encoder = text_encoder().eval()
    scores = F.normalize(encoder.embed(typos), dim=1) @ unit_rows(encoder).T
    want = scores.topk(3, dim=1)
    assert answers["class_id"].to_pylist() == want.indices.flatten().tolist()
    assert answers["score"].to_numpy() == pytest.approx(want.values.flatten().numpy(), abs=1e-5)
    assert answers["class"].to_pylist() == [WORDS[i] for i in want.indices.flatten()]
    assert answers["input"].to_pylist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert answers["rank"].to_pylist() == [1, 2, 3] * 4
    assert answers["class"].to_pylist()[9] == "hello"


def test_spec_holds_where_the_model_comes_from(tmp_path: Path) -> None:
    spec = read_spec(package(tmp_path / "m", 4))
    assert (spec.num_classes, spec.dim, spec.scale, spec.dtype) == (7, 32, 16.0, "float32")
    assert (spec.manifest, spec.code_version, spec.extra) == ("d" * 64, "1.2", {"job": {"seed": 0}})
    assert [(s.start, s.stop) for s in spec.shards] == [(0, 4), (4, 7)]
    assert not [f for f in (tmp_path / "m").rglob("*") if f.suffix in {".pkl", ".pt", ".pickle", ".partial"}]


def test_odd_requests(tmp_path: Path) -> None:
    model = load_model(package(tmp_path / "m", 3))
    assert model.predict([], k=2).num_rows == 0
    assert model.predict(["a", "a"], k=100).num_rows == 2 * len(WORDS)
    with pytest.raises(DataError, match="k must be at least 1"):
        model.predict(["a"], k=0)
    with pytest.raises(DataError, match="input 1: expected a text, got int"):
        model.predict(["a", 3])  # type: ignore[list-item]
    with pytest.raises(DataError, match="a list of inputs"):
        model.predict("a")


def test_embed_rule_needs_no_classes(tmp_path: Path) -> None:
    encoder = text_encoder()
    write_model(tmp_path, encoder=encoder, input_kind="text", predictor="embed")
    answers = load_model(tmp_path).predict(WORDS)
    got = np.stack(answers["embedding"].to_pylist())
    assert got == pytest.approx(unit_rows(encoder).numpy(), abs=1e-6)


def test_an_unnormalised_head_scores_by_inner_product(tmp_path: Path) -> None:
    encoder = text_encoder()
    rows_CD = 3 * torch.randn(7, 32, generator=torch.Generator().manual_seed(1))
    save_head(tmp_path, rows_CD, 2)
    options = {"encoder": encoder, "input_kind": "text", "classes": pa.table({"name": WORDS})}
    with pytest.raises(DataError, match="aren't unit vectors"):
        write_model(tmp_path, **options)
    write_model(tmp_path, normalized=False, **options)
    got = load_model(tmp_path).predict(["helo"], k=1)
    want = (encoder.eval().embed(["helo"]) @ rows_CD.T).max(dim=1)
    assert got["class_id"].to_pylist() == want.indices.tolist()
    assert got["score"][0].as_py() == pytest.approx(float(want.values), rel=1e-5)


def test_bfloat16_rows(tmp_path: Path) -> None:
    encoder = text_encoder()
    save_head(tmp_path, unit_rows(encoder).bfloat16(), 3)
    write_model(tmp_path, encoder=encoder, input_kind="text", classes=pa.table({"name": WORDS}))
    assert read_spec(tmp_path).dtype == "bfloat16"
    assert load_model(tmp_path).predict(["banana"], k=1)["class"].to_pylist() == ["banana"]


def test_images_as_pixels_and_as_files(tmp_path: Path) -> None:
    import io

    from PIL import Image

    torch.manual_seed(0)
    encoder = build_encoder({"kind": "pixels", "image_size": 8})
    pixels = np.random.default_rng(0).integers(0, 255, (5, 8, 8, 1), dtype=np.uint8)
    save_head(tmp_path, F.normalize(encoder.embed(pixels), dim=1), 2)
    write_model(tmp_path, encoder=encoder, input_kind="image", classes=pa.table({"name": list("abcde")}))
    model = load_model(tmp_path)
    assert model.predict(pixels, k=1)["class"].to_pylist() == list("abcde")
    encoded = []
    for image in pixels:
        buffer = io.BytesIO()
        Image.fromarray(image[..., 0]).save(buffer, "PNG")
        encoded.append(buffer.getvalue())
    assert model.predict(encoded, k=1)["class"].to_pylist() == list("abcde")
    with pytest.raises(DataError, match="input 1: not a readable image"):
        model.predict([encoded[0], b"no image"])
    assert model.predict([], k=1).num_rows == 0


def test_loading_leaves_the_random_numbers_alone(tmp_path: Path) -> None:
    folder = package(tmp_path / "m")
    torch.manual_seed(5)
    want = torch.rand(3)
    torch.manual_seed(5)
    load_model(folder)
    assert torch.equal(torch.rand(3), want)


class TestWhatIsRefused:
    def test_a_gap_between_head_files(self, tmp_path: Path) -> None:
        rows_CD = unit_rows(text_encoder())
        save_range(tmp_path, "rows", {"rows": rows_CD[:3]}, 0, 3, {})
        save_range(tmp_path, "rows", {"rows": rows_CD[4:]}, 4, 7, {})
        with pytest.raises(DataError, match=r"\[3, 4\)"):
            write_model(tmp_path, encoder=text_encoder(), input_kind="text", classes=pa.table({"name": WORDS}))
        assert not (tmp_path / "model.json").exists()

    def test_fewer_rows_than_classes(self, tmp_path: Path) -> None:
        save_head(tmp_path, unit_rows(text_encoder())[:5])
        with pytest.raises(DataError, match=r"\[5, 7\)"):
            write_model(tmp_path, encoder=text_encoder(), input_kind="text", classes=pa.table({"name": WORDS}))

    def test_rows_of_another_width(self, tmp_path: Path) -> None:
        save_head(tmp_path, F.normalize(torch.ones(7, 16), dim=1))
        with pytest.raises(DataError, match=r"shape \(7, 16\), expected \(7, 32\)"):
            write_model(tmp_path, encoder=text_encoder(), input_kind="text", classes=pa.table({"name": WORDS}))

    def test_classes_without_names(self, tmp_path: Path) -> None:
        save_head(tmp_path, unit_rows(text_encoder()))
        with pytest.raises(DataError, match="column 'name'"):
            write_model(tmp_path, encoder=text_encoder(), input_kind="text", classes=pa.table({"n": WORDS}))

    def test_an_unknown_rule(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="Did you mean 'topk'"):
            write_model(tmp_path, encoder=text_encoder(), input_kind="text", predictor="topn")

    def test_folders_that_are_no_model(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"model\.json: missing"):
            load_model(tmp_path)
        (tmp_path / "model.json").write_text("{")
        with pytest.raises(DataError, match="unreadable"):
            load_model(tmp_path)
        (tmp_path / "model.json").write_text('{"format_version": 7}')
        with pytest.raises(DataError, match="format version 7"):
            load_model(tmp_path)
        (tmp_path / "model.json").write_text('{"format_version": 1}')
        with pytest.raises(DataError, match="predictor"):
            load_model(tmp_path)

    def test_missing_and_broken_files(self, tmp_path: Path) -> None:
        folder = package(tmp_path / "m", 3)
        shard = folder / read_spec(folder).shards[1].file
        content = shard.read_bytes()
        shard.unlink()
        with pytest.raises(DataError, match=r"holds the classes \[3, 7\)"):
            load_model(folder)
        shard.write_bytes(content[: len(content) // 2])
        with pytest.raises(DataError, match="its content isn't what was written"):
            load_model(folder).predict(["a"])
        # a model that was written before hashes were kept
        spec = json.loads((folder / "model.json").read_text())
        (folder / "model.json").write_text(json.dumps(spec | {"files": {}}))
        with pytest.raises(DataError, match="not a readable head file"):
            load_model(folder).predict(["a"])
        shard.write_bytes(content)
        save_file({"other": torch.zeros(2)}, folder / "encoder.safetensors")
        with pytest.raises(DataError, match=r"doesn't fit model\.json"):
            load_model(folder)


def test_a_million_classes_load_and_answer_within_a_second(tmp_path: Path) -> None:
    """Files of 1,000,000 x 128 half-precision rows; loading reads none of them, the first answer compares hashes."""
    torch.manual_seed(0)
    encoder = build_encoder({"kind": "char_ngrams", "dim": 128, "buckets": 4096, "hidden": 0})
    row_D = F.normalize(torch.randn(1, 128), dim=1)
    rows_CD = row_D.half().expand(1_000_000, 128).contiguous()
    rows_CD[777_777] = F.normalize(encoder.embed(["needle"]), dim=1)[0].half()
    save_head(tmp_path, rows_CD, 500_000)
    del rows_CD
    write_model(
        tmp_path,
        encoder=encoder,
        input_kind="text",
        classes=pa.table({"name": [str(i) for i in range(1_000_000)]}),
    )
    began = time.perf_counter()
    model = load_model(tmp_path)
    loaded = time.perf_counter()
    model.predict(["needle"], k=5)
    first = time.perf_counter()
    answers = model.predict(["needle"] * 10, k=5)
    done = time.perf_counter()
    assert answers["class"].to_pylist()[::5] == ["777777"] * 10
    print(f"load {loaded - began:.2f} s, first {first - loaded:.2f} s, ten queries {done - first:.2f} s")
    assert loaded - began < 1
    assert done - first < 1


def test_prediction_imports_no_engine(tmp_path: Path) -> None:
    folder = package(tmp_path / "m", 3)
    code = (
        "import sys\n"
        "from labelmill.tracking.model import load_model\n"
        f"print(load_model({str(folder)!r}).predict(['bananna'], k=1)['class'][0])\n"
        "engine = {'ray', 'deepspeed', 'mlflow', 'transformers', 'matplotlib'} & set(sys.modules)\n"
        "own = [m for m in sys.modules if m.startswith(('labelmill.training', 'labelmill.data.stream'))]\n"
        "assert not engine and not own, (engine, own)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "banana"
