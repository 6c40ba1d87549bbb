"""Requests of the prediction server: what is understood, what is refused by which name, and answers in common."""

from __future__ import annotations

import asyncio
import base64
import json
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F

from labelmill.encoders import build_encoder
from labelmill.heads.storage import save_range
from labelmill.serving.protocol import RequestError, read_request
from labelmill.serving.together import Together
from labelmill.tracking.model import ClassPrior, ModelSpec, Predictor, load_model, write_model

TEXT = ModelSpec(predictor="topk", encoder={}, field="word", input="text", dim=2)
VECTOR = ModelSpec(predictor="topk", encoder={}, field="vector", input="array", shape=(2, 2), dim=2)
IMAGE = ModelSpec(predictor="topk", encoder={}, field="photo", input="image", dim=2)


def read(content: Any, spec: ModelSpec = TEXT) -> tuple[list[Any], int]:
    query = read_request(json.dumps(content).encode(), spec, most=4)
    return query.inputs, query.k


def test_every_form_of_a_request() -> None:
    for body in (
        {"inputs": ["a", "b"]},
        {"instances": ["a", "b"]},
        {"inputs": {"word": ["a", "b"]}},
        {"dataframe_split": {"columns": ["id", "word"], "data": [[1, "a"], [2, "b"]], "index": [0, 1]}},
        {"dataframe_records": [{"word": "a", "id": 1}, {"word": "b"}]},
    ):
        assert read(body) == (["a", "b"], 5)
    assert read({"inputs": [], "params": {"k": 3}}) == ([], 3)
    assert read({"inputs": ["a"], "params": {"k": 2.0}}) == (["a"], 2)
    numbers = [[[1, 2.5], [3, 4]]]
    assert read({"inputs": numbers}, VECTOR)[0] == numbers
    assert read({"inputs": [base64.b64encode(b"\x89PNG").decode()]}, IMAGE)[0] == [b"\x89PNG"]


@pytest.mark.parametrize(
    ("content", "spec", "message"),
    [
        ([], TEXT, "body: an object is needed"),
        ({}, TEXT, "inputs: missing"),
        ({"inputs": ["a"], "instances": ["a"]}, TEXT, "instances: one too many"),
        ({"inputs": ["a"], "k": 3}, TEXT, "k: unknown field"),
        ({"inputs": "a"}, TEXT, "inputs: a list is needed, not a text"),
        ({"inputs": ["a", 3]}, TEXT, "inputs[1]: a text is needed, not a number"),
        ({"inputs": ["a", "\ud800"]}, TEXT, "inputs[1]: half of a surrogate pair"),
        ({"inputs": ["a"] * 5}, TEXT, "inputs: 5 inputs, at most 4"),
        ({"inputs": {"words": ["a"]}}, TEXT, "inputs.words: the model takes the field 'word' alone"),
        ({"dataframe_split": {"columns": ["w"], "data": []}}, TEXT, "dataframe_split.columns: 'word' is missing"),
        ({"dataframe_split": {"columns": ["word"], "data": ["a"]}}, TEXT, "dataframe_split.data[0]: a list of 1"),
        ({"dataframe_records": [{"word": "a"}, {"w": "a"}]}, TEXT, "dataframe_records[1].word: missing"),
        ({"inputs": ["a"], "params": 3}, TEXT, "params: an object"),
        ({"inputs": ["a"], "params": {"K": 3}}, TEXT, "params.K: unknown"),
        ({"inputs": ["a"], "params": {"k": "3"}}, TEXT, "params.k: a whole number is needed, not a text"),
        ({"inputs": ["a"], "params": {"k": True}}, TEXT, "params.k: a whole number is needed, not a truth value"),
        ({"inputs": ["a"], "params": {"k": 0}}, TEXT, "params.k: 0 isn't between"),
        ({"inputs": [[[1, 2], [3, "4"]]]}, VECTOR, "inputs[0][1][1]: a number is needed, not a text"),
        ({"inputs": [[[1, 2], [3]]]}, VECTOR, "inputs[0][1]: shape (1,), but inputs[0][0] has (2,)"),
        ({"inputs": [[[1, 2]]]}, VECTOR, "inputs[0]: shape (1, 2), the model takes (2, 2)"),
        ({"inputs": [[[1, float("nan")], [3, 4]]]}, VECTOR, "inputs[0][0][1]: nan is no number"),
        ({"inputs": [[[1, None], [3, 4]]]}, VECTOR, "inputs[0][0][1]: a number is needed, not null"),
        ({"inputs": ["!!"]}, IMAGE, "inputs[0]: not base64"),
        ({"inputs": [3]}, IMAGE, "inputs[0]: a base64 text is needed"),
    ],
)
def test_what_is_wrong_is_named(content: Any, spec: ModelSpec, message: str) -> None:
    with pytest.raises(RequestError, match="^" + re.escape(message)):
        read(content, spec)


def test_bodies_that_are_no_json() -> None:
    for body in (b"", b"{", b"\xff", b"[" * 100_000):
        with pytest.raises(RequestError, match=r"^body: "):
            read_request(body, TEXT, 4)


@pytest.fixture
def predictor(tmp_path: Path) -> Predictor:
    """Vectors of three numbers to four classes, ranked with a prior, so that k has a say in the candidates."""
    torch.manual_seed(0)
    encoder = build_encoder({"kind": "linear", "field": "vector", "in_dim": 3, "dim": 3})
    save_range(tmp_path, "rows", {"rows": F.normalize(torch.randn(4, 3), dim=1)}, 0, 4, {})
    classes = pa.table({"name": list("abcd"), "count": [0.1, 0.2, 0.3, 0.4]})
    prior = ClassPrior(column="count", weight=0.5, candidates=2)
    write_model(tmp_path, encoder=encoder, input_kind="array", classes=classes, prior=prior)
    return load_model(tmp_path)


def test_answers_in_common_are_those_of_each_alone(predictor: Predictor) -> None:
    from labelmill.serving.http import answer_together

    rng = np.random.default_rng(0)
    queries = [(rng.standard_normal((n, 3), dtype=np.float32), k) for n, k in ((1, 1), (3, 4), (2, 1), (1, 2))]
    found = answer_together(predictor, queries)
    for (raw, k), records in zip(queries, found, strict=True):
        alone = predictor.predict(raw, k).to_pylist()
        assert [(r["input"], r["rank"], r["class"]) for r in records] == [
            (r["input"], r["rank"], r["class"]) for r in alone
        ]
        np.testing.assert_allclose([r["score"] for r in records], [r["score"] for r in alone], atol=1e-6)


def test_a_bad_request_fails_alone(predictor: Predictor) -> None:
    from labelmill.serving.http import answer_together

    good, bad = np.eye(3, dtype=np.float32)[:1], np.full((1, 3), np.nan, np.float32)
    wrong = np.ones((1, 2), np.float32)
    found = answer_together(predictor, [(good, 2), (bad, 2), (wrong, 2), (good, 2)])
    assert len(found[0]) == len(found[3]) == 2
    assert isinstance(found[1], FloatingPointError)
    assert "in_dim" in str(found[2])


def test_what_arrives_meanwhile_is_answered_together() -> None:
    calls: list[list[int]] = []

    def answer(queries: list[int]) -> list[Any]:
        time.sleep(0.05)
        calls.append(list(queries))
        return [ValueError("three") if q == 3 else 10 * q for q in queries]

    async def clients() -> list[Any]:
        together = Together(answer, most=8)
        first = asyncio.create_task(together.ask(0))
        await asyncio.sleep(0.01)
        rest = [asyncio.create_task(together.ask(q)) for q in range(1, 12)]
        await asyncio.sleep(0)
        rest[4].cancel()  # a client that leaves
        found = await asyncio.gather(first, *rest, return_exceptions=True)
        return [*found, await together.ask(20)]

    found = asyncio.run(clients())
    assert calls == [[0], [1, 2, 3, 4, 6, 7, 8], [9, 10, 11], [20]]
    assert isinstance(found[3], ValueError)
    assert isinstance(found[5], asyncio.CancelledError)
    assert [value for value in found if isinstance(value, int)] == [0, 10, 20, 40, 60, 70, 80, 90, 100, 110, 200]


def test_a_failure_of_the_function_reaches_everyone_and_ends_nothing() -> None:
    def answer(queries: list[int]) -> list[Any]:
        if 1 in queries:
            raise RuntimeError("broken")
        return queries

    async def clients() -> list[Any]:
        together = Together(answer, most=8)
        both = await asyncio.gather(together.ask(1), together.ask(2), return_exceptions=True)
        return [*both, await together.ask(3)]

    found = asyncio.run(clients())
    assert [str(value) for value in found] == ["broken", "broken", "3"]
