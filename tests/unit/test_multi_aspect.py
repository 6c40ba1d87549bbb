"""Questions and answers as further targets: tables, scorers, the student's loss, what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from labelmill.data.config import StreamConfig
from labelmill.data.manifest import Manifest
from labelmill.data.source import LocalSource
from labelmill.data.stream import Batch, RankStream
from labelmill.encoders import CharNgramsConfig
from labelmill.errors import DataError
from labelmill.language import LlmClient, LocalLlm, Reply, clients
from workloads.distillation.aspects import (
    FILE,
    AspectTable,
    LlmAspects,
    ask_questions,
    question_hash,
    score_with_llm,
    write_aspects,
)
from workloads.distillation.multi_aspect import AspectArm, AspectStudent

ENCODER = CharNgramsConfig(dim=8, buckets=256, hidden=16)
QUESTIONS = ("even?", "small?")
Make = Callable[..., Manifest]


class Judge:
    """A deterministic stand-in: word-i is even or not, and nothing is known of word-5."""

    name = "judge"

    def score(self, prompt: str, choices: Any) -> Reply:
        number = int(prompt.split("word-")[1].split()[0])
        yes = 0.9 if (number % 2 == 0 if "even?" in prompt else number < 10) else 0.05
        share = 0.1 if number == 5 else 1.0
        return Reply([[math.log(yes * share), math.log((1 - yes) * share)], 1 - share], 7, 1)

    def complete(self, prompt: str, schema: Any) -> Reply:
        return Reply('Sure: {"questions": ["even?", "small?", "even?"]}', 7, 9)


def test_a_judge_answers_once(make_text_data: Make, tmp_path: Path) -> None:
    data = make_text_data(20, 8)
    aspects = LlmAspects(llm=LocalLlm(), questions=QUESTIONS)
    asked = LlmClient(Judge(), tmp_path / "cache")
    clients.kept[f"LocalLlm {aspects.llm.model_dump_json()} {tmp_path}"] = asked
    run: Any = SimpleNamespace(progress=SimpleNamespace(update=lambda *a: None))
    found = score_with_llm(run, tmp_path, data, None, aspects, str(tmp_path))
    assert found["usage"]["calls"] == 40
    assert found["junk"] == pytest.approx(2 / 40), "word-5"
    table = AspectTable(tmp_path / FILE, QUESTIONS)
    diff = table.read(["s00004", "s00005", "s00013"])
    assert diff[0].tolist() == pytest.approx([math.log(9), math.log(9)])
    assert torch.isnan(diff[1]).all()
    assert diff[2].tolist() == pytest.approx([math.log(0.05 / 0.95)] * 2)
    score_with_llm(run, tmp_path, data, None, aspects, str(tmp_path))
    assert (asked.usage.calls, asked.usage.cached) == (40, 40)
    assert ask_questions(asked, ["a", "b"], 2) == ["even?", "small?"]
    with pytest.raises(DataError, match="2 different questions, 3 were asked for"):
        ask_questions(asked, ["a", "b"], 3)


def test_the_students_loss(make_text_data: Make, tmp_path: Path) -> None:
    data = make_text_data(40, 40)
    diff = np.random.default_rng(0).normal(size=(40, 2)) * 3
    diff[3, 1] = np.nan
    keys = [f"s{i:05d}" for i in range(40)]
    write_aspects(tmp_path / FILE, keys, diff, QUESTIONS)

    def student(**arm: Any) -> AspectStudent:
        torch.manual_seed(0)
        truth = [(0, 2), (1,)]
        return AspectStudent(ENCODER, 7, AspectArm(**arm), str(tmp_path / FILE), QUESTIONS, "logit_diff", truth, False)

    spec = StreamConfig().stream(data, "text", 16, shuffle=False)
    model = student(alpha=4, tau=2)
    batch: Batch = next(iter(RankStream(spec, LocalSource(spec, 0, 1), 0, 1, model.prepare)))
    losses = model.forward(batch)
    emb = model.encoder(batch.inputs)
    q = torch.sigmoid(torch.from_numpy(diff[:16]).float() / 2)
    known = ~torch.isnan(q)
    bce = F.binary_cross_entropy_with_logits(model.aspects(emb)[known], q[known])
    ce = F.cross_entropy(model.classes(emb), batch.labels.single_B)
    assert losses.total.item() == pytest.approx((ce + 4 * bce).item(), rel=1e-5)
    assert losses.parts["aspect_kl"].item() >= 0
    assert student(alpha=0).forward(batch).total.item() == pytest.approx(ce.item(), rel=1e-6)
    (own,) = torch.autograd.grad(losses.parts["ce"], model.classes.weight, retain_graph=True)
    assert own.abs().sum() > 0
    assert torch.autograd.grad(losses.parts["ce"], model.aspects.weight, allow_unused=True) == (None,)
    hard = student(targets="hard").target(batch)
    assert hard[:3].tolist() == [[1, 0], [0, 1], [1, 0]]
    shuffled = student(targets="shuffled", tau=2).target(batch)
    torch.testing.assert_close(shuffled, q.roll(1, 0), equal_nan=True)


def test_what_is_refused(tmp_path: Path) -> None:
    write_aspects(tmp_path / FILE, ["a", "b"], np.array([[0.5, 3], [0.1, 0.2]]), QUESTIONS)
    with pytest.raises(DataError, match="must be probabilities; did you store raw logits"):
        AspectTable(tmp_path / FILE, QUESTIONS, "probability")
    with pytest.raises(DataError, match="2 answers a sample, 3 questions"):
        AspectTable(tmp_path / FILE, (*QUESTIONS, "x?"))
    with pytest.raises(DataError, match="other questions, or to another order"):
        AspectTable(tmp_path / FILE, QUESTIONS[::-1])
    with pytest.raises(DataError, match="occurs twice"):
        question_hash(["a?", "a?"])
    with pytest.raises(DataError, match="1 training samples have no answers: 'c'"):
        AspectTable(tmp_path / FILE, QUESTIONS).read(["a", "c"], allow_missing=False)
