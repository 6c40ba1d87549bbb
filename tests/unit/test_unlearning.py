"""Unlearning's losses against the values of their equations, and each method against its limits."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from labelmill.data.deletion import ClassesRequest, resolve, unlabelled
from labelmill.data.labels import LabelSpec
from labelmill.data.manifest import FieldSpec, Manifest
from labelmill.data.source import LocalSource
from labelmill.data.spec import MixedSpec, StreamSpec
from labelmill.data.stream import Batch, RankStream
from labelmill.data.writer import ShardWriter
from labelmill.encoders import LinearConfig, build_encoder
from labelmill.errors import DataError, JobError
from labelmill.losses.unlearning import (
    alignment,
    cosine_distance,
    dampened,
    fisher_noise_variance,
    kl_to_teacher,
    latent_kl,
    other_label,
    psi,
    reconstruction,
)
from labelmill.tracking.model import load_model, write_model
from workloads.unlearning import methods as m
from workloads.unlearning.laf import Laf, LafConfig, Vae, write_embeddings
from workloads.unlearning.model import Dense, save_hashes
from workloads.unlearning.remove import drop_rows, neighbours
from workloads.unlearning.unlearn import keys_of, same_classes, stream_of, unlearn

DIM, WIDTH, CLASSES = 4, 6, 5


# --- LAF's equations ---------------------------------------------------------------------------------------------


def test_psi_is_bounded() -> None:
    r = torch.tensor([0.0, 1.0, 25.0, 1e6], dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(
        psi(r), torch.tensor([1.0, 1.648721, 2.615718, 2.718279], dtype=torch.float64), atol=1e-6, rtol=0
    )
    psi(r).sum().backward()
    assert r.grad is not None
    want = torch.tensor([1.0, 0.412180, 3.869405e-03, 2.718274e-12], dtype=torch.float64)
    torch.testing.assert_close(r.grad, want, atol=1e-6, rtol=1e-5)


def test_reconstruction_and_kl_by_hand() -> None:
    e, h = torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[0.0, 2.0], [3.0, 4.0]])
    r = reconstruction(e, h)
    assert r.tolist() == [1.0, 25.0]
    assert psi(r.double()).sum().item() == pytest.approx(4.264438831, abs=1e-8)
    mu, sigma = (torch.tensor([values], dtype=torch.float64) for values in ([0.5, -1.0], [0.8, 1.2]))
    assert latent_kl(mu, sigma, eps=0).item() == pytest.approx(0.7058219945, abs=1e-9)
    assert latent_kl(mu, sigma).item() == pytest.approx(0.7058219822, abs=2e-9)


def test_alignment_by_hand_and_at_the_original() -> None:
    def rows(*values: list[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float64)

    c1 = cosine_distance(rows([1, 0], [0, 1]), rows([1, 0], [1, 1]))
    c2 = cosine_distance(rows([1, 0], [-1, 0], [0, 1]), rows([0, 1], [1, 0], [0, 1]))
    torch.testing.assert_close(c1, torch.tensor([0, 0.2928932188], dtype=torch.float64))
    torch.testing.assert_close(c2, torch.tensor([1.0, 2.0, 0.0], dtype=torch.float64), atol=1e-12, rtol=0)
    for temperature, want in ((1, -4.5223187101), (5, -2.3309096464), (20, -2.0059976781)):
        assert alignment(c1, c2, temperature).item() == pytest.approx(want, abs=1e-9)
    assert alignment(torch.zeros(2), torch.zeros(3), 7.0).item() == pytest.approx(-2 * math.log(3), rel=1e-6)
    with pytest.raises(ValueError, match="above 0"):
        alignment(c1, c2, 0)
    with pytest.raises(DataError, match="retained and forgotten"):
        alignment(c1, c2[:0], 1)
    for bad in (0.0, math.nan):
        with pytest.raises(DataError, match="embedding 1 of a batch has no direction"):
            cosine_distance(rows([1, 0], [bad, bad]), rows([1, 0], [1, 1]))


def test_other_losses_by_hand() -> None:
    z, t = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    want = 9 * F.kl_div(F.log_softmax(z / 3, 1), F.softmax(t / 3, 1), reduction="none").sum(1)
    torch.testing.assert_close(kl_to_teacher(z, t, 3.0), want)
    assert kl_to_teacher(t, t).abs().max() < 1e-12
    value, everyone = torch.tensor([1.0, 2.0, -4.0, 5.0]), torch.tensor([1.0, 1.0, 2.0, 0.0])
    forget = torch.tensor([1.0, 4.0, 40.0, 0.0])
    torch.testing.assert_close(dampened(value, everyone, forget, 2.0, 1.0), torch.tensor([1.0, 0.5, -0.2, 5.0]))
    torch.testing.assert_close(dampened(value, everyone, forget, 1e9, 1.0), value)
    torch.testing.assert_close(dampened(value, everyone, forget, 2.0, 1e9), value)
    label, hashes = torch.arange(4).repeat(3), torch.arange(12)
    drawn = other_label(label, hashes, 4)
    assert bool((drawn != label).all())
    assert set(drawn[label == 1].tolist()) == {0, 2, 3} or len(set(drawn[label == 1].tolist())) > 1
    with pytest.raises(DataError, match="one class"):
        other_label(label, hashes, 1)


# --- methods ------------------------------------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path: Path) -> Manifest:
    rng = np.random.default_rng(0)
    fields = {"x": FieldSpec(kind="array", ext="npy", shape=(WIDTH,), dtype="float32")}
    with ShardWriter(
        tmp_path / "data", "x", fields, LabelSpec(form="single", num_classes=CLASSES), "packed", samples_per_shard=20
    ) as w:
        for i in range(50):
            w.write(f"s{i:03d}", {"x": rng.normal(size=WIDTH).astype(np.float32)}, {"label": i % CLASSES})
        return w.close()


@pytest.fixture
def package(tmp_path: Path) -> Path:
    folder = tmp_path / "package"
    folder.mkdir()
    torch.manual_seed(3)
    encoder = build_encoder(LinearConfig(field="x", in_dim=WIDTH, dim=DIM))
    rows = F.normalize(torch.randn(CLASSES, DIM), dim=1)
    save_file({"rows": rows}, folder / f"rows-0-{CLASSES}.safetensors")
    classes = pa.table({"name": [f"c{i}" for i in range(CLASSES)]})
    write_model(folder, encoder=encoder, input_kind="array", classes=classes, scale=8.0)
    return folder


@pytest.fixture
def streams(data: Manifest) -> tuple[StreamSpec, StreamSpec]:
    found = resolve(ClassesRequest(ids=(2,)), data)
    spec = StreamSpec(data, "x", 20, seed=1)
    return replace(spec, selection=found.retain), replace(spec, selection=found.forget)


Make = Callable[..., Any]


@pytest.fixture
def make(package: Path, streams: tuple[StreamSpec, StreamSpec], tmp_path: Path) -> Make:
    """An objective of a method, at its start, and a batch of 16 retained and 4 forgotten samples."""
    keys = save_hashes(keys_of(streams[1]), tmp_path / "forget.npy")

    def build(config: Any, classes: tuple[int, ...] = (2,)) -> tuple[Any, Batch]:
        objective = m.UNLEARNERS[config.kind](str(package), keys, config, 0, classes)
        spec = stream_of(*streams, (True, True), 20)
        batch = next(iter(RankStream(spec, LocalSource(spec, 0, 1), 0, 1, objective.prepare)))
        return objective, batch

    return build


def grads(objective: Any, batch: Batch) -> torch.Tensor:
    objective.zero_grad()
    objective.forward(batch).total.backward()
    return torch.cat(
        [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in objective.model.parameters()]
    )


def parts(objective: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits, labels, which are forgotten."""
    forget = torch.tensor([int(key[1:]) % CLASSES == 2 for key in batch.keys])
    return objective.model(batch.inputs), batch.labels.single_B, forget


def test_the_dense_model_is_the_packaged_one(make: Make, package: Path) -> None:
    objective, batch = make(m.Finetune())
    scores, ids = load_model(package).topk(batch.inputs.numpy(), CLASSES)
    torch.testing.assert_close(objective.model(batch.inputs).gather(1, ids), 8.0 * scores)
    assert int(objective.forgotten(batch).sum()) == 4


def test_finetuning_ascent_and_their_mixture(make: Make) -> None:
    fine, batch = make(m.Finetune())
    z, y, f = parts(fine, batch)
    retain, forget = F.cross_entropy(z[~f], y[~f]), F.cross_entropy(z[f], y[f])
    assert fine.forward(batch).total.item() == pytest.approx(retain.item())
    ascent, _ = make(m.Ascent())
    assert ascent.forward(batch).total.item() == pytest.approx(-forget.item())
    mixed = {alpha: grads(make(m.NegGradPlus(alpha=alpha))[0], batch) for alpha in (0.0, 0.3, 1.0)}
    torch.testing.assert_close(mixed[1.0], grads(fine, batch))
    torch.testing.assert_close(mixed[0.0], grads(ascent, batch))
    torch.testing.assert_close(mixed[0.3], 0.3 * mixed[1.0] + 0.7 * mixed[0.0])


def test_holes_take_no_part(make: Make) -> None:
    fine, batch = make(m.NegGradPlus())
    want = make(m.NegGradPlus())[0].forward(batch).total.item()
    f = fine.forgotten(batch)
    batch.weight_B[f.nonzero()[0]] = 0
    batch.weight_B[(~f).nonzero()[0]] = 0
    assert fine.forward(batch).total.item() != pytest.approx(want)
    z, y, _ = parts(fine, batch)
    alive = batch.weight_B > 0
    r, f = ~f & alive, f & alive
    assert fine.forward(batch).total.item() == pytest.approx(
        (0.95 * F.cross_entropy(z[r], y[r]) - 0.05 * F.cross_entropy(z[f], y[f])).item()
    )


def test_random_labels_are_drawn_once_and_never_true(make: Make) -> None:
    objective, batch = make(m.RandomLabels())
    z, y, f = parts(objective, batch)
    first = objective.forward(batch).total.item()
    assert first == objective.forward(batch).total.item()
    lowest = min(
        (F.cross_entropy(z[~f], y[~f], reduction="sum") + per.sum()) / len(y)
        for per in [
            torch.stack([F.cross_entropy(z[f], torch.full_like(y[f], c), reduction="none") for c in (0, 1, 3, 4)])
            .min(0)
            .values
        ]
    )
    assert first >= lowest.item() - 1e-5


def test_shrinking_takes_the_nearest_other_class(make: Make) -> None:
    objective, batch = make(m.BoundaryShrink(step=0.3))
    y = batch.labels.single_B
    x = batch.inputs.clone().requires_grad_(True)
    (grad,) = torch.autograd.grad(F.cross_entropy(Dense(objective.package)(x), y, reduction="sum"), x)
    z = Dense(objective.package)(batch.inputs + 0.3 * grad.sign())
    z[torch.arange(len(y)), y] = -torch.inf
    found = objective.nearest(batch.inputs, y)
    assert torch.equal(found, z.argmax(1))
    assert bool((found != y).all())
    assert objective.teacher.rows_CD.grad is None
    with pytest.raises(JobError, match="not texts"):
        objective.nearest({"ids": batch.inputs}, y)


def test_teachers(make: Make) -> None:
    bad, batch = make(m.BadTeacher())
    z, _, f = parts(bad, batch)
    mixed = torch.where(f[:, None], bad.bad(batch.inputs), bad.good(batch.inputs))
    assert bad.forward(batch).total.item() == pytest.approx(kl_to_teacher(z, mixed).mean().item())
    assert bad.bad(batch.inputs).std() > 0
    scrub, _ = make(m.Scrub(gamma=0.0))
    scrub.begin(0, 10)
    assert grads(scrub, batch).abs().max() < 1e-5, "at the original both turns rest"
    scrub.begin(1, 10)
    assert grads(scrub, batch).abs().max() < 1e-5
    with torch.no_grad():
        scrub.model.rows_CD.add_(0.1 * torch.randn_like(scrub.model.rows_CD))
    z = scrub.model(batch.inputs)
    kl = kl_to_teacher(z, scrub.teacher(batch.inputs), 4.0)
    scrub.begin(0, 10)
    assert scrub.forward(batch).total.item() == pytest.approx(-kl[f].mean().item(), rel=1e-4)
    for step in (1, 6):  # the second is past the turns that maximise
        scrub.begin(step, 10)
        assert scrub.forward(batch).total.item() == pytest.approx(0.5 * kl[~f].mean().item(), rel=1e-4)


def test_last_layers(make: Make, package: Path) -> None:
    cf, batch = make(m.LastLayers(k=1))
    grads(cf, batch)
    assert cf.model.encoder.weight_DI.grad is None
    assert cf.model.rows_CD.grad is not None
    original = Dense(package)
    eu, _ = make(m.LastLayers(k=1, fresh=True))
    assert torch.equal(eu.model.encoder.weight_DI, original.encoder.weight_DI)
    assert not torch.equal(eu.model.rows_CD, original.rows_CD)
    with pytest.raises(JobError, match="3 layers of the 2"):
        make(m.LastLayers(k=3))


def test_noise_is_of_high_loss_and_the_same_each_time(make: Make) -> None:
    objective, batch = make(m.Unsir(noise=5, noise_steps=30, penalty=0.0))
    x, y = objective.noise(batch.inputs)
    assert x.shape == (5, WIDTH)
    assert y.tolist() == [2] * 5
    start = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(0))
    teacher = objective.teacher
    assert F.cross_entropy(teacher(x), y) > F.cross_entropy(teacher(start), y) + 1
    assert torch.equal(x, make(m.Unsir(noise=5, noise_steps=30, penalty=0.0))[0].noise(batch.inputs)[0])
    objective.begin(9, 10)
    assert objective.forward(batch).total.item() == pytest.approx(make(m.Finetune())[0].forward(batch).total.item())
    with pytest.raises(JobError, match="no class is forgotten whole"):
        make(m.Unsir(), classes=())


def test_dampening_uses_the_exact_diagonal(make: Make, package: Path) -> None:
    objective, batch = make(m.Dampening(alpha=1.0, lam=0.5))
    assert grads(objective, batch).abs().max() == 0, "nothing moves while gradients are added up"
    _, y, f = parts(objective, batch)
    squares = []
    for i in range(len(y)):
        model = Dense(package)
        F.cross_entropy(model(batch.inputs[i : i + 1]), y[i : i + 1]).backward()
        squares.append(torch.cat([p.grad.flatten() for p in model.parameters()]).square())  # type: ignore[union-attr]
    all_P, forget_P = torch.stack(squares).mean(0), torch.stack(squares)[f].mean(0)
    retain_P = torch.stack(squares)[~f].mean(0)
    for found, want in zip(objective.information(), (all_P, retain_P, forget_P), strict=True):
        torch.testing.assert_close(found, want, atol=1e-6, rtol=1e-4)
    before = torch.cat([p.detach().flatten() for p in objective.model.parameters()])
    objective.finish(lambda done, of: None)
    after = torch.cat([p.detach().flatten() for p in objective.model.parameters()])
    torch.testing.assert_close(after, dampened(before, all_P, forget_P, 1.0, 0.5), atol=1e-5, rtol=1e-3)
    assert (after != before).any()


def test_fisher_noise_has_the_variance_of_the_equation(make: Make) -> None:
    retain = torch.tensor([0.0, 1e-4, 0.5, 2.0])
    torch.testing.assert_close(fisher_noise_variance(retain, 0.1, 1e3), torch.tensor([100.0, 100.0, 0.2, 0.05]))
    before = torch.cat([p.detach().flatten() for p in make(m.Finetune())[0].model.parameters()])

    def after(seed: int, **options: float) -> tuple[torch.Tensor, torch.Tensor]:
        objective, batch = make(m.FisherNoise(**options))
        objective.seed = seed
        objective.forward(batch)
        objective.finish(lambda done, of: None)
        return torch.cat([p.detach().flatten() for p in objective.model.parameters()]), objective.information()[1]

    assert torch.equal(after(0, alpha=0.0)[0], before), "without noise the model stays"
    moved, retain_P = after(0, alpha=1e-3)
    assert torch.equal(moved, after(0, alpha=1e-3)[0])
    drawn = torch.stack([after(seed, alpha=1e-3)[0] - before for seed in range(60)])
    ratio = drawn.square().mean(0) / fisher_noise_variance(retain_P, 1e-3, 1e3)
    assert abs(ratio.mean().item() - 1) < 4 * (2 / drawn.numel()) ** 0.5, "a chi-square over all draws"
    assert abs(drawn.mean(0).div(drawn.std(0)).mean().item()) < 4 / drawn.numel() ** 0.5


# --- streams and refusals -----------------------------------------------------------------------------------------


def test_batches_hold_fixed_numbers_of_both(streams: tuple[StreamSpec, StreamSpec]) -> None:
    natural = stream_of(*streams, (True, True), 20)
    assert isinstance(natural, MixedSpec)
    assert natural.mix.shares == (4, 1)
    half = stream_of(*streams, (True, True), 20, share=0.5)
    assert isinstance(half, MixedSpec)
    assert half.parts[0] is streams[1]
    assert half.epoch_samples == 20, "an epoch is a pass over the forgotten samples"
    few = stream_of(*streams, (True, True), 100, share=0.5)
    assert isinstance(few, MixedSpec)
    assert few.mix.shares == (1, 9), "never more forgotten samples than there are"
    assert stream_of(*streams, (False, True), 8).epoch_samples == 10
    with pytest.raises(JobError, match="at least 2"):
        stream_of(*streams, (True, True), 1)


def test_held_out_samples_are_of_the_forgotten_classes(streams: tuple[StreamSpec, StreamSpec]) -> None:
    retain, forget = streams
    whole = replace(retain, selection=None)
    found = same_classes(whole, forget)
    assert found.epoch_samples == 10
    assert keys_of(found) == keys_of(forget)


def test_overlapping_sets_and_wrong_models_are_refused(
    streams: tuple[StreamSpec, StreamSpec], package: Path, tmp_path: Path
) -> None:
    from labelmill.training.config import TrainConfig

    retain, forget = streams
    budget = TrainConfig(global_batch=8, steps=1)

    def ask(r: StreamSpec, f: StreamSpec, config: TrainConfig = budget) -> None:
        unlearn(None, tmp_path / "work", package, r, f, m.Finetune(), config, 0)  # type: ignore[arg-type]

    with pytest.raises(JobError, match="both retained and forgotten"):
        ask(retain, replace(retain, global_batch=4))
    with pytest.raises(JobError, match="needs a mask"):
        ask(replace(retain, selection=None), forget)
    with pytest.raises(JobError, match="zero_stage 0, 1 or 2"):
        ask(retain, forget, budget.model_copy(update={"zero_stage": 3}))
    embeds = tmp_path / "embeds"
    encoder = build_encoder(LinearConfig(field="x", in_dim=WIDTH, dim=DIM))
    write_model(embeds, encoder=encoder, input_kind="array", predictor="embed")
    with pytest.raises(JobError, match="only embeds"):
        unlearn(None, tmp_path / "work", embeds, retain, forget, m.Finetune(), budget, 0)  # type: ignore[arg-type]


# --- LAF's objective ------------------------------------------------------------------------------------------------


@pytest.fixture
def laf(package: Path, streams: tuple[StreamSpec, StreamSpec], tmp_path: Path) -> tuple[Laf, Batch]:
    config = LafConfig(latent=2, temperature=5.0)
    for name in ("all", "forget"):
        torch.manual_seed(len(name))
        folder = tmp_path / name / "export"
        folder.mkdir(parents=True)
        save_file({f"vae.{k}": v for k, v in Vae(DIM, 2, "linear").state_dict().items()}, folder / "dense.safetensors")
    keys = save_hashes(keys_of(streams[1]), tmp_path / "f.npy")
    objective = Laf(str(package), keys, config, str(tmp_path / "all"), str(tmp_path / "forget"), 20, 0)
    bare = unlabelled(streams[0].manifest)
    spec = stream_of(*(replace(s, manifest=bare) for s in streams), (True, True), 20, share=0.5)
    return objective, next(iter(RankStream(spec, LocalSource(spec, 0, 1), 0, 1, objective.prepare)))


def test_laf_never_sees_a_label_and_never_touches_the_rows(laf: tuple[Laf, Batch]) -> None:
    objective, batch = laf
    assert batch.labels.form == "none"
    assert not batch.columns
    assert not any("rows" in name for name, _ in objective.named_parameters())
    trained = {name for name, p in objective.named_parameters() if p.requires_grad}
    assert trained == {"encoder.weight_DI"}
    labelled = replace_labels(batch)
    with pytest.raises(JobError, match="without labels"):
        objective.forward(labelled)


def test_laf_is_the_same_whatever_the_labels_are(laf: tuple[Laf, Batch], data: Manifest, tmp_path: Path) -> None:
    """The same samples with permuted labels and the same masks: bit for bit the same losses and gradients."""
    from labelmill.data.corrections import relabel

    objective, batch = laf
    others = relabel(data, tmp_path / "others", {f"s{i:03d}": (i + 1 + i // 7) % CLASSES for i in range(50)})
    found = resolve(ClassesRequest(ids=(2,)), data)
    streams = [
        StreamSpec(
            unlabelled(others),
            "x",
            20,
            seed=1,
            selection=type(mask).of([mask.mask(i) for i in range(len(data.shards))], unlabelled(others).digest),
        )
        for mask in (found.retain, found.forget)
    ]
    spec = stream_of(streams[0], streams[1], (True, True), 20, share=0.5)
    again = next(iter(RankStream(spec, LocalSource(spec, 0, 1), 0, 1, objective.prepare)))
    assert again.keys == batch.keys
    for step in (0, 1):
        objective.begin(step, 4)
        results = []
        for one in (batch, again):
            objective.zero_grad()
            loss = objective.forward(one).total
            loss.backward()
            results.append((loss.detach().clone(), objective.encoder.weight_DI.grad.clone()))
        assert torch.equal(results[0][0], results[1][0])
        assert torch.equal(results[0][1], results[1][1])


def test_the_sigmoid_decoder_stays_within_0_and_1() -> None:
    torch.manual_seed(0)
    e = 10 * torch.randn(20, DIM)
    for decoder, bounded in (("sigmoid", True), ("linear", False)):
        vae = Vae(DIM, 2, decoder)
        for parameter in vae.parameters():
            parameter.data.mul_(3)
        h = vae(e, torch.randn(20, 2))[0]
        assert bool(((h >= 0) & (h <= 1)).all()) == bounded


def replace_labels(batch: Batch) -> Batch:
    from labelmill.data.labels import Labels

    return replace(batch, labels=Labels("single", torch.zeros(len(batch), 1, dtype=torch.int64)))


def test_laf_turns_are_the_equations(laf: tuple[Laf, Batch]) -> None:
    objective, batch = laf
    f = objective.forgotten(batch)
    assert int(f.sum()) == 10
    objective.begin(1, 4)
    assert objective.forward(batch).total.item() == pytest.approx(-10 * math.log(10), rel=1e-5), "model == teacher"
    objective.begin(0, 4)
    from workloads.unlearning.laf import batch_noise

    eps = batch_noise(batch, 20, 2, 0)
    e = objective.encoder(batch.inputs)
    r, r_f = (reconstruction(e, h(e, eps)[0]) for h in (objective.h, objective.h_f))
    want = psi(r[~f]).sum() - psi(r_f[f]).sum()
    assert objective.forward(batch).total.item() == pytest.approx(want.item(), rel=1e-3)
    objective.h_f.load_state_dict(objective.h.state_dict())
    batch.inputs[f] = batch.inputs[~f]
    batch.positions_B[f] = batch.positions_B[~f]
    assert objective.forward(batch).total.item() == pytest.approx(0.0, abs=1e-4), "the same rows, the same autoencoder"


def test_embeddings_without_direction_are_named(tmp_path: Path, data: Manifest) -> None:
    import pyarrow.parquet as pq

    folder = tmp_path / "predictions"
    folder.mkdir()
    values = np.ones((3, 2), np.float32)
    values[1] = np.nan
    emb = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), 2)
    table = pa.table({"key": ["a", "b", "c"], "position": [0, 1, 2], "embedding": emb})
    pq.write_table(table, folder / "part-00000.parquet")
    with pytest.raises(DataError, match=r"'b'.*no direction"):
        write_embeddings(folder, tmp_path / "out", data)


# --- removing classes ------------------------------------------------------------------------------------------------


def test_removed_classes_are_unreachable_and_the_others_keep_their_scores(package: Path, tmp_path: Path) -> None:
    out = drop_rows(package, tmp_path / "less", (1, 3))
    before, after = load_model(package), load_model(out)
    assert after.classes["name"].to_pylist() == ["c0", "c2", "c4"]
    assert after.classes["trained_id"].to_pylist() == [0, 2, 4]
    x = np.random.default_rng(0).normal(size=(40, WIDTH)).astype(np.float32)
    table = after.predict(x, 3)
    assert set(table["class"].to_pylist()) <= {"c0", "c2", "c4"}
    full = {(r["input"], r["class"]): r["score"] for r in before.predict(x, CLASSES).to_pylist()}
    for row in table.to_pylist():
        assert row["score"] == pytest.approx(full[row["input"], row["class"]], abs=1e-6)
    again = drop_rows(out, tmp_path / "lesser", (2,))
    assert load_model(again).classes["trained_id"].to_pylist() == [0, 4]
    with pytest.raises(JobError, match="class 1 isn't one"):
        drop_rows(out, tmp_path / "no", (1,))
    with pytest.raises(JobError, match="no class would be left"):
        drop_rows(out, tmp_path / "no", (0, 2, 4))
    with pytest.raises(JobError, match="classes were removed"):
        Dense(out)


def test_neighbours_are_the_nearest_rows(package: Path) -> None:
    w = Dense(package).rows_CD.detach()
    cosine = w @ w.t()
    order = cosine[1].argsort(descending=True).tolist()
    assert neighbours(package, (1,), 2).tolist() == sorted([i for i in order if i != 1][:2])
