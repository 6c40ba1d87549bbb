"""The student of the distillation methods, without workers: what its heads learn from, schedules, alignment, controls."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch.nn import functional as F

from labelmill.data.config import StreamConfig
from labelmill.data.labels import Labels
from labelmill.data.manifest import Manifest
from labelmill.data.outputs import OutputsInfo, class_map, finish_outputs, outputs_file, write_outputs
from labelmill.data.shards import read_labels
from labelmill.data.source import LocalSource
from labelmill.data.stream import Batch, RankStream
from labelmill.encoders import CharNgramsConfig, MlpConfig, SmallCnnConfig, SmallVitConfig, build_encoder
from labelmill.errors import DataError, JobError
from labelmill.heads.config import HeadConfig
from labelmill.losses.class_sums import dense_distillation
from labelmill.losses.distillation import DKD, KD, BinaryKLNorm, ListedKD
from workloads.distillation.arms import Arm, FeatureTerm, LogitTerm
from workloads.distillation.common import carve
from workloads.distillation.student import Student, TeacherPlace

ENCODER = CharNgramsConfig(dim=8, buckets=256, hidden=16)
Make = Callable[..., Manifest]
NORM = (LogitTerm(loss=BinaryKLNorm()),)


def outputs(data: Manifest, folder: Path) -> TeacherPlace:
    """Random outputs of a teacher."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(len(data.shards)):
        keys = read_labels(data, i).column("key").to_pylist()
        logits = rng.normal(size=(len(keys), 7)).astype(np.float32) * 3
        ids = np.argsort(-logits, axis=1)[:, :2]
        rest = logits.copy()
        np.put_along_axis(rest, ids, -np.inf, axis=1)
        tail = np.log(np.exp(rest / 4).sum(1, keepdims=True)).astype(np.float32)
        columns = {"logits": logits, "embedding": rng.normal(size=(len(keys), 5)).astype(np.float32)}
        top = {"ids": ids.astype(np.int32), "values": np.take_along_axis(logits, ids, 1), "tail": tail}
        write_outputs(outputs_file(folder, i), keys, np.ones(len(keys), bool), columns | top)
    info = OutputsInfo(
        manifest=data.digest,
        classes=class_map(None, 7),
        num_classes=7,
        model="m",
        columns=("logits", "topk", "embedding"),
    )
    finish_outputs(folder, info.model_copy(update={"temperatures": (4.0,)}))
    return TeacherPlace(outputs=str(folder), width=5, temperatures=(4.0,))


def student(arm: Arm, place: TeacherPlace | None, head: HeadConfig | None = None) -> Student:
    torch.manual_seed(0)
    return Student(ENCODER, head, 7, arm, 0, place, epoch_steps=2.5, step_samples=16)


def batch_of(data: Manifest, model: Student, count: int = 16) -> Batch:
    spec = StreamConfig().stream(data, "text", count, shuffle=False)
    return next(iter(RankStream(spec, LocalSource(spec, 0, 1), 0, 1, model.prepare, join=model.join)))


def test_main_head_learns_from_labels_and_second_from_the_teacher(make_text_data: Make, tmp_path: Path) -> None:
    data = make_text_data(40, 15)
    place = outputs(data, tmp_path / "out")
    dual = student(Arm(losses=NORM, aux="linear"), place)
    batch = batch_of(data, dual)
    batch.weight_B[3] = 0
    losses = dual.forward(batch)
    (ce_main,) = torch.autograd.grad(losses.parts["ce"], dual.classes.weight, retain_graph=True)
    none = torch.autograd.grad(losses.parts["ce"], dual.aux.weight, retain_graph=True, allow_unused=True)
    other = torch.autograd.grad(
        losses.parts["binary_kl_norm"], dual.classes.weight, retain_graph=True, allow_unused=True
    )
    assert ce_main.abs().sum() > 0
    assert none == (None,)
    assert other == (None,)
    rows = dual.teach(batch)
    assert rows.logits_BC is not None
    want = dense_distillation(BinaryKLNorm(), dual.aux(dual.encoder(batch.inputs["student"])), rows.logits_BC)
    kept = batch.weight_B > 0
    assert losses.parts["binary_kl_norm"].item() == pytest.approx(want[kept].mean().item(), rel=1e-5)
    plain = student(Arm(), None)
    assert torch.equal(plain.classes.weight, dual.classes.weight), "the second head is drawn after the first"
    assert plain.forward(batch).total.item() == losses.parts["ce"].item()
    alone = student(Arm(losses=(LogitTerm(loss=BinaryKLNorm(), weight=0),), aux="linear"), place)
    assert alone.forward(batch).total.item() == plain.forward(batch).total.item()
    assert set(dual.predict(batch)) == {"label", "class_id", "prob", "logits"}
    torch.testing.assert_close(dual.predict(batch)["logits"], dual.classes(dual.encoder(batch.inputs["student"])))


@pytest.mark.parametrize("scope", ["all", "backbone"])
def test_alignment_takes_off_what_opposes_the_labels(make_text_data: Make, tmp_path: Path, scope: Any) -> None:
    data = make_text_data(40, 15)
    place = outputs(data, tmp_path / "out")
    model = student(Arm(losses=(LogitTerm(loss=BinaryKLNorm(), weight=50.0),), aux="linear", align=scope), place)
    batch = batch_of(data, model)
    plain = student(Arm(losses=(LogitTerm(loss=BinaryKLNorm(), weight=50.0),), aux="linear"), place)
    losses = plain.forward(batch)
    named = dict(plain.named_parameters())

    def grads(loss: torch.Tensor) -> dict[str, torch.Tensor]:
        found = torch.autograd.grad(loss, list(named.values()), retain_graph=True, allow_unused=True)
        return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(named.items(), found, strict=True)}

    one, two = grads(losses.parts["ce"]), grads(50.0 * losses.parts["binary_kl_norm"])
    inside = [n for n in named if scope == "all" or n.startswith("encoder.")]
    dot = sum((one[n] * two[n]).sum() for n in inside)
    square = sum(one[n].square().sum() for n in inside)
    aligned = model.forward(batch)
    assert aligned.total.item() == pytest.approx(losses.total.item(), rel=1e-6)
    aligned.total.backward()
    for name, parameter in model.named_parameters():
        want = one[name] + two[name]
        if dot < 0 and name in inside:
            want = want - dot / square * one[name]
        torch.testing.assert_close(parameter.grad, want, atol=1e-5, rtol=1e-4)


def test_schedules_and_controls(make_text_data: Make, tmp_path: Path) -> None:
    data = make_text_data(40, 15)
    place = outputs(data, tmp_path / "out")
    term = LogitTerm(loss=KD(), weight=2.0, warmup_epochs=4, off_epoch=6)
    assert [term.at(e) for e in (0, 1, 3, 5.9, 6)] == [0.5, 1.0, 2.0, 2.0, 0.0]
    model = student(Arm(losses=(LogitTerm(loss=KD(), off_epoch=1),)), place)
    batch = batch_of(data, model)
    assert "kd" in model.forward(batch).parts
    batch.positions_B += 40
    assert model.epoch_of(batch) == pytest.approx(0.8), "position 40 is in step 2 of 2.5"
    batch.positions_B += 40
    assert "kd" not in model.forward(batch).parts
    shuffled = student(Arm(losses=NORM, shuffled=True), place)
    rows, others = model.teach(batch), shuffled.teach(batch)
    assert rows.logits_BC is not None
    assert others.logits_BC is not None
    assert torch.equal(others.logits_BC, rows.logits_BC.roll(1, 0))
    for kind in ("fitnet", "cosine", "crd", "rkd", "sp"):
        taught = student(Arm(ce=0, features=(FeatureTerm(kind=kind),)), place)
        loss = taught.forward(batch).total
        loss.backward()
        grads = [p.grad for p in taught.encoder.parameters() if p.grad is not None]
        assert loss.item() > 0
        assert any(bool(g.abs().sum() > 0) for g in grads)


@pytest.mark.parametrize("loss", [KD(), DKD(beta=2), ListedKD(temperature=4)], ids=lambda loss: loss.kind)
def test_a_sharded_student_has_the_same_loss(make_text_data: Make, tmp_path: Path, loss: Any) -> None:
    data = make_text_data(40, 15)
    place = outputs(data, tmp_path / "out")
    arm = Arm(ce=0.5, losses=(LogitTerm(loss=loss, weight=0.5),))
    model = student(arm, place, HeadConfig(scale=8.0))
    batch = batch_of(data, model)
    batch.weight_B[2] = 0
    emb_BD = model.encoder(batch.inputs["student"])
    logits = 8.0 * F.normalize(emb_BD, dim=1) @ F.normalize(model.sharded["classes"].w_CD, dim=1).T
    rows, y = model.teach(batch), batch.labels.single_B
    listed = model._listed(rows, 4.0) if loss.kind == "listed_kd" else None
    loss_B = 0.5 * dense_distillation(loss, logits, None if listed else rows.logits_BC, y, listed=listed)
    loss_B = loss_B + 0.5 * F.cross_entropy(logits, y, reduction="none")
    total = model.forward(batch).total
    assert total.item() == pytest.approx(loss_B[batch.weight_B > 0].mean().item(), rel=1e-5)
    total.backward()
    assert model.predict(batch)["logits"].shape == (16, 7)
    dual = student(Arm(losses=NORM, aux="linear"), place, HeadConfig(scale=8.0))
    assert set(dual.heads) == {"classes", "aux"}
    assert not any("aux" in name for name, _ in dual.named_parameters())
    dual.forward(batch).total.backward()


def test_what_is_refused(make_text_data: Make, tmp_path: Path) -> None:
    data = make_text_data(40, 15)
    place = outputs(data, tmp_path / "out")
    with pytest.raises(ValidationError, match="needs losses"):
        Arm(aux="linear")
    with pytest.raises(ValidationError, match="nothing to learn from"):
        Arm(ce=0)
    with pytest.raises(JobError, match="leave head out"):
        student(Arm(losses=NORM, align="all"), place, HeadConfig())
    model = student(Arm(losses=NORM, aux="nonlinear"), place)
    with pytest.raises(DataError, match="use aux linear"):
        model.forward(batch_of(data, model, 1))
    model = student(Arm(losses=(LogitTerm(loss=ListedKD(temperature=3)),)), place)
    batch = batch_of(data, model)
    with pytest.raises(DataError, match=r"kept for temperatures \(4\.0,\), not 3"):
        model.forward(batch)
    with pytest.raises(DataError, match="41 samples asked for"):
        carve(data, tmp_path / "carve", {"teacher": 30, "student": 11}, 0)
    parts = carve(data, tmp_path / "carve", {"teacher": 25, "student": 10}, 0)
    both = [np.concatenate([p.mask(i) for i in range(3)]) for p in parts.values()]
    assert [int(m.sum()) for m in both] == [25, 10]
    assert not (both[0] & both[1]).any()


def test_cosine_of_both_gradients(make_text_data: Make, tmp_path: Path) -> None:
    data = make_text_data(40, 15)
    place = outputs(data, tmp_path / "out")
    model = student(Arm(losses=NORM, aux="linear", cosine=True), place)
    batch = batch_of(data, model)
    found = model.forward(batch).parts
    plain = student(Arm(losses=NORM, aux="linear"), place)
    parts = plain.forward(batch).parts
    assert set(found) - set(parts) == {"cosine_all", "cosine_backbone", "cosine_heads"}

    def flat(loss: torch.Tensor, modules: list[torch.nn.Module]) -> torch.Tensor:
        params = [p for module in modules for p in module.parameters()]
        grads = torch.autograd.grad(loss, params, retain_graph=True, allow_unused=True)
        return torch.cat([torch.zeros_like(p).flatten() if g is None else g.flatten() for p, g in zip(params, grads)])  # noqa: B905

    ce, norm = parts["ce"], parts["binary_kl_norm"]
    scopes = {
        "cosine_all": (flat(ce, [plain]), flat(norm, [plain])),
        "cosine_backbone": (flat(ce, [plain.encoder]), flat(norm, [plain.encoder])),
        "cosine_heads": (flat(ce, [plain.classes]), flat(norm, [plain.aux])),
    }
    for name, (one, two) in scopes.items():
        assert found[name].item() == pytest.approx(F.cosine_similarity(one, two, dim=0).item(), abs=1e-5), name
    model.log_every = 5
    model.begin(2, 10)
    assert "cosine_all" not in model.forward(batch).parts, "only where metrics are logged"
    model.begin(4, 10)
    assert "cosine_all" in model.forward(batch).parts
    with pytest.raises(ValidationError, match="cosine compares two gradients"):
        Arm(cosine=True)


def picture_batch(model: Student, count: int = 6) -> Batch:
    rng = np.random.default_rng(0)
    labels = Labels("single", (torch.arange(count) % 7)[:, None])
    raw = rng.integers(0, 255, (count, 12, 12, 1)).astype(np.uint8)
    keys = [f"p{i}" for i in range(count)]
    return Batch(keys, model.prepare(raw, labels, None), labels, torch.ones(count), torch.arange(count))


CNN = SmallCnnConfig(image_size=12, channels=1, dim=8, width=8)


def map_student(*terms: FeatureTerm, teacher: Any = None) -> Student:
    torch.manual_seed(0)
    place = TeacherPlace(encoder=teacher or SmallCnnConfig(image_size=12, channels=1, dim=5, width=16), width=5)
    return Student(CNN, None, 7, Arm(ce=0, features=terms), 0, place, epoch_steps=1, step_samples=6)


def test_feature_maps_of_a_live_teacher() -> None:
    model = map_student(FeatureTerm(kind="attention"), FeatureTerm(kind="fitnet_maps", stages=((1, 1),)))
    batch = picture_batch(model)
    batch.weight_B[2] = 0
    parts = model.forward(batch).parts
    emb_BD, own = model.encoder.maps(batch.inputs["student"])
    torch.testing.assert_close(emb_BD, model.encoder(batch.inputs["student"]))
    assert [m.shape[1:] for m in own] == [(8, 12, 12), (16, 6, 6), (32, 3, 3)]
    with torch.no_grad():
        other = model.live[0].encoder.maps(batch.inputs["teacher"])[1]
    kept = batch.weight_B > 0

    def attention(s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        a, b = (F.normalize(x.pow(2).mean(1).flatten(1), dim=1) for x in (s, t))
        return (a - b).pow(2).mean(1)[kept].mean()

    want = torch.stack([attention(s, t) for s, t in zip(own, other, strict=True)]).mean()
    assert parts["attention"].item() == pytest.approx(want.item(), rel=1e-5)
    assert model.matching is not None
    hint = F.mse_loss(model.matching.hints[0](own[1])[kept], other[1][kept])
    assert parts["fitnet_maps"].item() == pytest.approx(hint.item(), rel=1e-5)
    model.forward(batch).total.backward()
    assert not any("live" in name or "teacher" in name for name, _ in model.named_parameters())
    vit = map_student(
        FeatureTerm(kind="attention"), teacher=SmallVitConfig(image_size=12, channels=1, patch=4, dim=5, width=16)
    )
    assert vit.matching is not None
    assert vit.matching.pairs["attention"] == [(2, 3)], "3 x 3 patches: the last block with the last stage"


@pytest.mark.parametrize(
    ("term", "teacher", "message"),
    [
        ({"stages": [[0, 1]]}, None, r"stages \[0, 1\] aren't two maps of one size: the student's maps are 12 x 12"),
        ({"stages": [[7, 0]]}, None, r"stages \[7, 0\]"),
        ({}, MlpConfig(image_size=12, channels=1, hidden=(), dim=5), "encoder 'mlp' has no feature maps; small_cnn"),
        ({}, SmallVitConfig(image_size=12, channels=1, patch=6, dim=5, width=16), "no two maps of one size.*2 x 2"),
    ],
)
def test_feature_maps_that_do_not_go_together(term: Any, teacher: Any, message: str) -> None:
    with pytest.raises(JobError, match=message):
        map_student(FeatureTerm(kind="attention", **term), teacher=teacher)


def test_feature_maps_are_not_kept(make_text_data: Make, tmp_path: Path) -> None:
    place = outputs(make_text_data(40, 15), tmp_path / "out")
    with pytest.raises(JobError, match=r"set teacher\.live to true"):
        student(Arm(features=(FeatureTerm(kind="attention"),)), place)


@pytest.mark.parametrize("config", [CNN, SmallVitConfig(image_size=12, channels=1, patch=4, dim=5, width=16)])
def test_maps_leave_the_embedding_as_it_is(config: Any) -> None:
    encoder = build_encoder(config).eval()
    x = torch.randn(2, 1, 12, 12)
    emb, maps = encoder.maps(x)
    torch.testing.assert_close(emb, encoder(x))
    assert all(m.shape[2] == m.shape[3] for m in maps)
