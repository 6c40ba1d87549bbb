"""Nested dropout and co-teaching: values worked out by hand and limits."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from labelmill.data.labels import Labels
from labelmill.data.stream import Batch
from labelmill.encoders import CharNgramsConfig, build_encoder
from labelmill.errors import DataError
from labelmill.losses.coteaching import (
    best_prefix,
    cross_selection,
    draw_prefix,
    forget_rate,
    keep_prefix,
    prefix_distribution,
    prefix_hits,
    small_loss,
)
from workloads.noisy.best_weights import kept_weights
from workloads.noisy.nested_coteaching import CompressedNet, Compression, CoTeaching, CoTeachingSection, NestedJob

ENCODER = CharNgramsConfig(dim=16, buckets=256, hidden=16)
Z = torch.tensor([[1.0, -2.0, 0.5, 3.0]], dtype=torch.float64)
W = torch.tensor([[1.0, 0.0, 2.0, 0.5], [0.0, 1.0, -1.0, 0.5]], dtype=torch.float64)  # (K, D)


def test_the_distribution_of_prefixes() -> None:
    p = prefix_distribution(4, 2.0)
    want = [0.6130382513, 0.2895787655, 0.0829657054, 0.0144172778]
    torch.testing.assert_close(p, torch.tensor(want, dtype=torch.float64), atol=1e-9, rtol=0)
    kept = p.flip(0).cumsum(0).flip(0)
    torch.testing.assert_close(
        kept[1:3], torch.tensor([0.3869617487, 0.0973829832], dtype=torch.float64), atol=1e-9, rtol=0
    )
    k = torch.arange(1, 513, dtype=torch.float64)
    for eta, mean in ((10.0, 5.97), (100.0, 56.74)):
        assert float((prefix_distribution(512, eta) * k).sum()) == pytest.approx(mean, abs=0.01)
    assert prefix_distribution(5, 1e9).tolist() == pytest.approx([0.2] * 5)
    assert prefix_distribution(5, 1e-2)[0] == 1.0


def test_draws_follow_it_and_are_the_same_on_every_rank() -> None:
    draws = [draw_prefix(4, 2.0, seed=7, step=step) for step in range(4000)]
    assert draws[:50] == [draw_prefix(4, 2.0, seed=7, step=step) for step in range(50)]
    assert draws[:50] != [draw_prefix(4, 2.0, seed=8, step=step) for step in range(50)]
    share = torch.bincount(torch.tensor(draws), minlength=5)[1:] / 4000
    torch.testing.assert_close(share.double(), prefix_distribution(4, 2.0), atol=0.025, rtol=0)


def test_prefix_logits_losses_and_the_decomposition_of_risk() -> None:
    logits = torch.stack([keep_prefix(Z, k) @ W.t() for k in range(1, 5)])[:, 0]
    assert logits.tolist() == [[1, 0], [1, -2], [2, -2.5], [3.5, -1]]
    ce = -torch.log_softmax(logits, 1)[:, 0]
    want = torch.tensor([0.3132616875, 0.0485873516, 0.0110477448, 0.0110477448], dtype=torch.float64)
    torch.testing.assert_close(ce, want, atol=1e-9, rtol=0)
    p = prefix_distribution(4, 2.0)
    assert float((p * ce).sum()) == pytest.approx(0.2071871248, abs=1e-9)
    # bias and variance of the paper's theorem, with the target distribution (.8, .2)
    target, log_q = torch.tensor([0.8, 0.2], dtype=torch.float64), torch.log_softmax(logits, 1)
    risk = float((p[:, None] * -(target * log_q)).sum())
    mean = (p[:, None] * log_q).sum(0)
    variance = -math.log(float(mean.exp().sum()))
    bias = float((target * (target.log() - torch.log_softmax(mean, 0))).sum())
    assert (risk, bias, variance) == pytest.approx((0.5911867192, 0.0204045436, 0.0703797520), abs=1e-9)
    assert risk == pytest.approx(float(-(target * target.log()).sum()) + bias + variance)


def test_prefix_accuracy_and_its_tie_rule() -> None:
    generator = torch.Generator().manual_seed(0)
    z, w = torch.randn(40, 6, generator=generator), torch.randn(3, 6, generator=generator)
    label = torch.randint(0, 3, (40,), generator=generator)
    want = [float(((keep_prefix(z, k) @ w.t()).argmax(1) == label).sum()) for k in range(1, 7)]
    assert prefix_hits(z, w, label).tolist() == want
    assert best_prefix(torch.tensor([0.5, 0.6, 0.6, 0.6])) == 2
    assert best_prefix(torch.tensor([0.7, 0.6, 0.5])) == 1


def test_a_full_prefix_changes_nothing_and_dropped_channels_get_no_gradient() -> None:
    assert keep_prefix(Z, 4) is Z
    layer = nn.Linear(4, 2, bias=False)
    layer(keep_prefix(Z.float(), 2)).sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad[:, 2:].abs().max() == 0
    assert layer.weight.grad[:, :2].abs().min() > 0


def test_the_nets_choose_for_each_other() -> None:
    first = torch.tensor([0.1, 2, 0.3, 0.05, 1.5, *[9.0] * 5])
    second = torch.tensor([*[9.0] * 5, 0.9, 0.2, 3, 0.4, 0.1])
    for_first, for_second = cross_selection(first, second, 0.2)
    assert for_second.tolist() == [3, 0, 2, 4]
    assert (for_first - 5).tolist() == [4, 1, 3, 0]
    all_first, all_second = cross_selection(first, second, 0.0)
    assert (sorted(all_first.tolist()), sorted(all_second.tolist())) == ([5, 6, 7, 8, 9], [0, 1, 2, 3, 4])
    classic_first, classic_second = cross_selection(first[:5], first[:5].flip(0), 0.4, split=False)
    assert (classic_second.tolist(), classic_first.tolist()) == ([3, 0, 2], [1, 4, 2])
    with pytest.raises(DataError, match="9 samples on a worker can't be split"):
        cross_selection(first[:9], second[:9], 0.2)


def test_small_losses_of_samples_that_are_there() -> None:
    loss = torch.tensor([3.0, 1.0, 2.0, 0.0])
    assert small_loss(loss, 0.5, torch.tensor([1.0, 1.0, 1.0, 0.0])).tolist() == [1]
    assert len(small_loss(torch.rand(10), 0.8)) == 2
    assert len(small_loss(torch.rand(10), 0.9)) == 1
    assert len(small_loss(torch.rand(10), 0.99)) == 1, "never none"
    with pytest.raises(DataError, match="of no sample"):
        small_loss(loss, 0.5, torch.zeros(4))
    assert [forget_rate(s, 0.4, 10) for s in (0, 5, 10, 20)] == pytest.approx([0, 0.2, 0.4, 0.4])
    assert forget_rate(0, 0.4, 0) == 0.4
    with pytest.raises(DataError, match="forget rate 1"):
        forget_rate(0, 1.0, 0)
    with pytest.raises(DataError, match="eta is 0"):
        prefix_distribution(4, 0)


# --- the objectives ---


def batch_of(count: int = 8) -> Batch:
    encoder = build_encoder(ENCODER)
    words = [f"{'abcd'[i % 4] * 3}{i}" for i in range(count)]
    ids = torch.arange(count)[:, None] % 4
    return Batch(words, encoder.prepare(words), Labels("single", ids), torch.ones(count), torch.arange(count))


def net(kind: str, seed: int = 0, **options: Any) -> CompressedNet:
    torch.manual_seed(seed)
    return CompressedNet(ENCODER, 4, Compression(kind=kind, **options), seed)


def test_without_compression_it_is_plain_cross_entropy() -> None:
    batch, plain = batch_of(), net("none")
    want = F.cross_entropy(plain.classes(plain.encoder(batch.inputs)), batch.labels.single_B)
    assert plain.forward(batch).total.item() == want.item()
    assert net("nested", eta=1e9).drawn_prefix() <= 16
    wide, narrow = net("nested", eta=1e-2), net("nested", eta=1e9)
    wide.forward(batch)
    assert (wide.step.item(), wide.drawn_prefix()) == (1, 1)
    assert len({narrow.drawn_prefix() for _ in range(20) if narrow.step.add_(1) is not None}) > 3


def test_the_classes_of_all_prefixes() -> None:
    batch, nested = batch_of(), net("nested")
    found = nested.predict(batch)["by_prefix"]
    assert found.shape == (8, 16)
    with torch.no_grad():
        for k in (1, 7, 16):
            assert (nested.logits(batch.inputs, k).argmax(1) == found[:, k - 1]).all()
    assert net("dropout").predict(batch)["by_prefix"].shape == (8, 1)


def test_two_nets_teach_each_other(tmp_path: Path) -> None:
    batch, nets = batch_of(), [net("nested", seed, eta=4.0) for seed in (1, 2)]
    paths = [str(tmp_path / f"{i}.safetensors") for i in (0, 1)]
    for one, path, k in zip(nets, paths, (3, 5), strict=True):
        one.prefix.fill_(k)
        save_file(one.state_dict(), path)
    compression = nets[0].compression
    both = CoTeaching(ENCODER, 4, compression, paths, CoTeachingSection(rate=0.5), 10, seed=9)
    first, second = both.judge(batch)
    with torch.no_grad():
        want = F.cross_entropy(nets[0].logits(batch.inputs, 3), batch.labels.single_B, reduction="none")
    torch.testing.assert_close(first, want)
    both.forward(batch).total.backward()
    prefix = draw_prefix(16, 4.0, 9, 0)
    for_first, for_second = cross_selection(first, second, 0.5)
    for one, rows in zip(nets, (for_first, for_second), strict=True):
        F.cross_entropy(one.logits(batch.inputs, prefix)[rows], batch.labels.single_B[rows]).backward()
    for one, own in zip(nets, both.pair, strict=True):
        torch.testing.assert_close(own.classes.weight.grad, one.classes.weight.grad)
        assert int(own.prefix) in (3, 5), "the number of channels is part of the model"
    mean = sum(one.logits(batch.inputs, 16) for one in nets)
    assert (both.predict(batch)["by_prefix"][:, -1] == mean.argmax(1)).all()


def test_the_weights_of_the_best_evaluation_are_kept(tmp_path: Path) -> None:
    batch = batch_of()
    torch.manual_seed(0)
    kept = CompressedNet(ENCODER, 4, Compression(kind="nested", eta=4.0), 0, keep_best=True)
    optimizer = torch.optim.Adam(kept.parameters(), lr=0.05)

    def accuracy() -> tuple[float, int]:
        found = kept.predict(batch)["by_prefix"]
        of_D = (found == batch.labels.ids_BP).double().mean(dim=0)
        k = best_prefix(of_D)
        return float(of_D[k - 1]), k

    assert kept.best is not None
    for _ in range(40):
        optimizer.zero_grad()
        kept.forward(batch).total.backward()
        optimizer.step()
    first, prefix = accuracy()  # nothing was evaluated: the live weights
    assert first > 0.7
    kept.evaluate(batch)
    best = {name: value.clone() for name, value in kept.named_parameters()}
    kept.forward(batch)  # the next step settles the evaluation
    assert float(kept.best.score) == pytest.approx(first - 1e-5 * (prefix - 1))
    with torch.no_grad():
        for parameter in kept.parameters():
            parameter.zero_()  # training goes wrong
    kept.evaluate(batch)
    kept.finish(lambda done, total: None)
    assert accuracy() == (first, prefix), "worse weights aren't kept, and predictions come from the best"
    assert not any(bool(parameter.any()) for parameter in kept.parameters()), "live weights are as they were"

    again = CompressedNet(ENCODER, 4, kept.compression, 0, keep_best=True)
    again.load_state_dict(kept.state_dict())
    assert again.best is not None
    assert float(again.best.score) == float(kept.best.score), "a resume goes on from the best so far"
    state = kept_weights(kept.state_dict())
    assert not any(name.startswith("best.") for name in state)
    for name, value in best.items():
        torch.testing.assert_close(state[name], value)
    save_file({name: value.contiguous() for name, value in state.items()}, tmp_path / "net.safetensors")
    paths = [str(tmp_path / "net.safetensors")] * 2
    both = CoTeaching(ENCODER, 4, kept.compression, paths, CoTeachingSection(rate=0.5), 10, seed=9, keep_best=True)
    both.evaluate(batch)
    both.forward(batch)
    assert [int(one.prefix) for one in both.pair] == [prefix, prefix], "both judge with what the evaluation found"


def test_jobs_that_cannot_work_are_refused() -> None:
    data = {"train": "a", "test": "b"}
    job = {
        "workload": "noisy.nested_coteaching", "name": "x", "data": data, "encoder": {"kind": "char_ngrams", "dim": 16},
        "coteaching": {"rate": 0.4}, "train": {"global_batch": 8, "steps": 8}, "cluster": {"workers": 2},
        "noise": {"kind": "symmetric", "rate": 0.4},
    }  # fmt: skip
    second = NestedJob.model_validate(job).second_stage()
    assert (second.steps, second.learning_rate) == (2, pytest.approx(1e-4))
    for change, message in (
        ({"noise": None}, "chosen on clean samples"),
        ({"train": {"global_batch": 6, "steps": 8}}, "halves a worker's 3 samples"),
        ({"coteaching": {"rate": 1.0}}, "less than 1"),
        ({"train": {"global_batch": 8, "steps": 8, "evaluate_every": 4, "zero_stage": 3}}, "zero_stage 0, 1 or 2"),
        ({"arms": {"a": {"kind": "nested", "eta": 0}}}, "greater than 0"),
    ):
        with pytest.raises(ValidationError, match=message):
            NestedJob.model_validate(job | change)
