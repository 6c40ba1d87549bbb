"""A teacher's pass over a data set: what is kept, what is found again, what is refused."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from labelmill import teachers
from labelmill.data.labels import LabelSpec
from labelmill.data.manifest import FieldSpec, Manifest
from labelmill.data.outputs import Outputs, check_logits, class_map, outputs_file
from labelmill.data.writer import ShardWriter
from labelmill.encoders import MlpConfig, build_encoder
from labelmill.errors import DataError
from labelmill.teachers import TeacherModel, check_frozen, check_teacher, teach
from labelmill.tracking.model import write_model

NAMES = ["ant", "bee", "cat"]
ENCODER = MlpConfig(image_size=6, channels=1, hidden=(), dim=5)
KEPT: dict[str, Any] = {
    "columns": ("logits", "topk", "embedding"),
    "k": 2,
    "temperatures": (1.0, 4.0),
    "dtype": "float16",
}


def pictures(folder: Path, count: int = 25, names: list[str] | None = NAMES) -> Manifest:
    rng = np.random.default_rng(0)
    fields = {"image": FieldSpec(kind="image", ext="png")}
    label = LabelSpec(form="single", num_classes=3)
    with ShardWriter(folder, "pictures", fields, label, layout="packed", samples_per_shard=10) as writer:
        for i in range(count):
            file = io.BytesIO()
            Image.fromarray(rng.integers(0, 255, (6, 6)).astype(np.uint8)).save(file, "png")
            writer.write(f"p{i:03d}", {"image": file.getvalue()}, {"label": i % 3})
        return writer.close(classes=pa.table({"name": names}) if names else None)


def package(folder: Path, names: list[str] = NAMES, big: float = 1.0) -> Path:
    torch.manual_seed(0)
    folder.mkdir()
    encoder = build_encoder(ENCODER)
    save_file({"rows": big * torch.randn(len(names), 5)}, folder / f"rows-0-{len(names)}.safetensors")
    write_model(folder, encoder=encoder, input_kind="image", classes=pa.table({"name": names}), normalized=False)
    return folder


@pytest.fixture(autouse=True)
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes run here, shard after shard, also where another test has started Ray."""
    monkeypatch.setattr("ray.is_initialized", lambda: False)


def here() -> Any:
    """A run that trains in its own process."""
    return SimpleNamespace(connect=lambda: None, progress=SimpleNamespace(update=lambda *a: None))


def run_teacher(folder: Path, data: Manifest, model: Path, **change: Any) -> Outputs:
    folder.mkdir(exist_ok=True)
    teach(here(), folder, data, model, None, "ants/1", max_bad=0, **(KEPT | change))
    return Outputs(folder / "outputs")


def test_outputs_are_those_of_the_model_by_key(tmp_path: Path) -> None:
    data, model = pictures(tmp_path / "data"), package(tmp_path / "model")
    kept = run_teacher(tmp_path / "out", data, model)
    kept.verify()
    kept.check(data)
    assert (len(kept), kept.info.model, kept.info.classes) == (25, "ants/1", class_map(NAMES, 3))
    keys = ["p024", "p000", "p013", "p000"]
    rows = kept.read(keys)
    from labelmill.data.shards import read_shard

    pngs = {
        k: v
        for i in range(3)
        for k, v in zip(*(read_shard(data, i).column(c).to_pylist() for c in ("key", "image")), strict=True)
    }
    teacher = TeacherModel.of(model)
    images = np.stack([np.array(Image.open(io.BytesIO(pngs[key]))) for key in keys])[..., None]
    emb, logits = teacher(teacher.encoder.prepare(images))
    assert logits is not None
    assert rows.logits_BC is not None
    assert rows.tail_BT is not None
    assert rows.ids_Bk is not None
    torch.testing.assert_close(rows.logits_BC, logits, atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(rows.embedding_BE, emb, atol=2e-3, rtol=2e-3)
    values, ids = logits.topk(2)
    assert torch.equal(rows.ids_Bk, ids)
    torch.testing.assert_close(rows.values_Bk, values, atol=2e-3, rtol=2e-3)
    rest = logits.scatter(1, ids, -torch.inf)
    want = torch.stack([torch.logsumexp(rest / t, 1) for t in (1.0, 4.0)], 1)
    torch.testing.assert_close(rows.tail_BT, want)
    with pytest.raises(DataError, match=r"2 samples have no outputs here: 'x', 'y'"):
        kept.read(["p001", "x", "y"])


def test_an_interrupted_pass_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, model = pictures(tmp_path / "data"), package(tmp_path / "model")
    real, calls = teachers.teach_shard, []

    def once(*args: Any, **more: Any) -> Any:
        calls.append(args[1])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **more)

    monkeypatch.setattr(teachers, "teach_shard", once)
    with pytest.raises(KeyboardInterrupt):
        run_teacher(tmp_path / "out", data, model)
    with pytest.raises(DataError, match=r"no finished outputs .*outputs\.json is missing"):
        Outputs(tmp_path / "out" / "outputs")
    kept = run_teacher(tmp_path / "out", data, model)
    assert calls == [0, 1, 1, 2], "the first shard isn't taught again"
    assert len(kept) == 25


def test_stale_outputs_and_other_classes_are_refused(tmp_path: Path, make_text_data: Callable[..., Any]) -> None:
    data, model = pictures(tmp_path / "data"), package(tmp_path / "model")
    kept = run_teacher(tmp_path / "out", data, model)
    other = pictures(tmp_path / "more", 26)
    with pytest.raises(DataError, match="are of the data set with digest"):
        kept.check(other)
    turned = data.model_copy(update={"classes": None, "parents": (data.digest,)})
    with pytest.raises(DataError, match="another list of class names"):
        kept.check(turned)
    with pytest.raises(DataError, match=r"'bee' as class 0, data set 'pictures' has 'ant' there"):
        check_teacher(package(tmp_path / "order", ["bee", "ant", "cat"]), data)
    with pytest.raises(DataError, match=r"have 2 classes, data set 'pictures' has 3"):
        check_teacher(package(tmp_path / "two", ["ant", "bee"]), data)
    with pytest.raises(DataError, match="reads field 'image'"):
        check_teacher(model, make_text_data(6, 6, classes=3))
    path = outputs_file(tmp_path / "out" / "outputs", 1)
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(DataError, match=r"outputs-000001\.arrow: changed since"):
        kept.verify()


def test_values_that_cannot_be_used_are_named_by_key(tmp_path: Path) -> None:
    data = pictures(tmp_path / "data")
    with pytest.raises(DataError, match=r"beyond what float16 holds \(65504\): 'p000'.*teacher\.dtype"):
        run_teacher(tmp_path / "a", data, package(tmp_path / "big", big=1e6))
    kept = run_teacher(tmp_path / "b", data, tmp_path / "big", dtype="float32", columns=("logits",))
    table = pa.ipc.open_file(outputs_file(kept.folder, 0)).read_all()
    flat = table.column("logits").combine_chunks().flatten().to_numpy().copy()
    flat[7 * 3] = np.nan
    columns = {"logits": flat.reshape(-1, 3)}
    from labelmill.data.outputs import finish_outputs, write_outputs

    keys = table.column("key").to_pylist()
    write_outputs(outputs_file(kept.folder, 0), keys, np.ones(len(keys), bool), columns)
    finish_outputs(kept.folder, kept.info)
    with pytest.raises(DataError, match=rf"1 sample of the model's logits hold NaN or infinite values: '{keys[7]}'"):
        Outputs(kept.folder).read(keys)
    with pytest.raises(DataError, match="look like probabilities"):
        check_logits(torch.softmax(torch.randn(5, 4), 1))
    check_logits(torch.randn(5, 4))
    Outputs(kept.folder).check_logits()
    for i in range(len(data.shards)):
        names = pa.ipc.open_file(outputs_file(kept.folder, i)).read_all().column("key").to_pylist()
        soft = torch.softmax(torch.randn(len(names), 3), 1).numpy()
        write_outputs(outputs_file(kept.folder, i), names, np.ones(len(names), bool), {"logits": soft})
    finish_outputs(kept.folder, kept.info.model_copy(update={"files": {}}))
    with pytest.raises(DataError, match="look like probabilities"):
        Outputs(kept.folder).check_logits()


def test_a_teacher_never_trains(tmp_path: Path) -> None:
    teacher = TeacherModel.of(package(tmp_path / "model"))
    teacher.train()
    check_frozen(teacher)
    emb, logits = teacher(torch.randn(4, 1, 6, 6))
    assert logits is not None
    assert not emb.requires_grad
    assert not logits.requires_grad
    with pytest.raises(DataError, match="in training mode"):
        check_frozen(torch.nn.Dropout())
    with pytest.raises(DataError, match="ask for gradients"):
        check_frozen(torch.nn.Linear(2, 2).eval())
