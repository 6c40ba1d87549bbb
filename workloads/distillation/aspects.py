"""Answers to yes/no questions about samples: from a language model, a classifier of attributes, or a file.

What is kept of an answer is logit(yes) - logit(no), NaN where there is none; q = sigmoid(difference / tau).

Shape legend: N samples, Q questions, B samples of a batch, D embedding width.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from pydantic import BaseModel, Field, model_validator
from torch import Tensor, nn

from labelmill.data.keys import key_hashes
from labelmill.data.labels import Labels
from labelmill.data.manifest import Manifest
from labelmill.data.selection import KeepRows
from labelmill.data.shards import read_shard
from labelmill.data.spec import AnySpec
from labelmill.data.stream import Batch
from labelmill.encoders import EncoderConfig, build_encoder
from labelmill.errors import DataError
from labelmill.job import StrictModel
from labelmill.language import LlmClient, LlmConfig, clients
from labelmill.losses.soft_targets import masked_soft_bce
from labelmill.run import Run
from labelmill.stages import Fitted
from labelmill.training.config import TrainConfig
from labelmill.training.objective import Losses, Objective

FILE = "aspects.parquet"
JUNK = 0.5  # an answer that is neither yes nor no with this probability is none


def question_hash(questions: Sequence[str]) -> str:
    """Identity of the questions in their order. Raises DataError for a question that occurs twice."""
    for question in questions:
        if list(questions).count(question) > 1:
            raise DataError(f"question {question!r} occurs twice.")
    return hashlib.sha256(json.dumps(list(questions)).encode()).hexdigest()[:16]


class AttributeAspects(StrictModel):
    """Questions that the class decides, answered by a classifier trained on other samples: soft, and partly wrong."""

    kind: Literal["attributes"] = "attributes"
    questions: dict[str, tuple[int, ...]] = Field(
        min_length=1, description="question -> classes where the answer is yes"
    )
    encoder: EncoderConfig
    train: TrainConfig
    samples: int = Field(10_000, ge=2, description="training samples of that classifier; the student doesn't see them")


class LlmAspects(StrictModel):
    """Questions that a language model answers about a text, once for each training sample."""

    kind: Literal["llm"] = "llm"
    llm: LlmConfig
    questions: tuple[str, ...] = Field((), description="empty: the model is asked for `ask` questions first")
    ask: int = Field(0, ge=0, description="how many questions to ask for")
    field: str = "text"
    prompt: str = Field(
        "{text}\n\nQuestion: {question} Answer Yes or No.\nAnswer:", description="with {text} and {question}"
    )
    choices: tuple[str, str] = Field((" Yes", " No"), description="one token each")
    threads: int = Field(1, ge=1, description="questions at once (HTTP)")

    @model_validator(mode="after")
    def _check(self) -> LlmAspects:
        if bool(self.questions) == bool(self.ask):
            raise ValueError("give questions, or how many to ask for")
        if "{text}" not in self.prompt or "{question}" not in self.prompt:
            raise ValueError("prompt must hold {text} and {question}")
        return self


class RecordedAspects(StrictModel):
    """Answers in a Parquet file: columns key and aspects (a list of Q numbers)."""

    kind: Literal["recorded"] = "recorded"
    path: str = Field(min_length=1)
    questions: tuple[str, ...] = Field(min_length=1)
    form: Literal["probability", "logit_diff"] = "probability"


AspectConfig = Annotated[AttributeAspects | LlmAspects | RecordedAspects, Field(discriminator="kind")]


def write_aspects(path: Path, keys: Sequence[str], diff_NQ: np.ndarray, questions: Sequence[str]) -> None:
    """The file of a stage; the questions and their hash go along."""
    flat = pa.array(np.ascontiguousarray(diff_NQ, np.float32).reshape(-1))
    table = pa.table(
        {"key": pa.array(keys, pa.string()), "aspects": pa.FixedSizeListArray.from_arrays(flat, diff_NQ.shape[1])}
    )
    notes = {"questions": json.dumps(list(questions)), "hash": question_hash(questions)}
    pq.write_table(table.replace_schema_metadata(notes), path)


class AspectTable:
    """Answers by sample key. Raises DataError for another number of questions, or another set of them."""

    def __init__(self, path: str | Path, questions: Sequence[str], form: str = "logit_diff") -> None:
        table = pq.read_table(path)
        keys = table.column("key").to_pylist()
        values = np.array(table.column("aspects").to_pylist(), dtype=np.float64).reshape(len(keys), -1)
        if values.shape[1] != len(questions):
            raise DataError(
                f"{path}: {values.shape[1]} answers a sample, {len(questions)} questions ({question_hash(questions)})."
            )
        known = (table.schema.metadata or {}).get(b"hash")
        if known is not None and known.decode() != question_hash(questions):
            raise DataError(f"{path}: answers to other questions, or to another order of them. Score them again.")
        if form == "probability":
            if np.nanmin(values, initial=0.5) < 0 or np.nanmax(values, initial=0.5) > 1:
                raise DataError(
                    f"{path}: aspect targets must be probabilities; did you store raw logits? Set aspects.form to logit_diff."
                )
            inside = np.clip(values, 1e-6, 1 - 1e-6)
            values = np.log(inside / (1 - inside))
        self.diff_NQ = torch.from_numpy(values.astype(np.float32))
        hashes = key_hashes(keys)[0]
        self._order = np.argsort(hashes, kind="stable")
        self._sorted = hashes[self._order]

    def read(self, keys: Sequence[str], allow_missing: bool = True) -> Tensor:
        """(B, Q); NaN for samples without answers. Raises DataError for these unless they are allowed."""
        hashes = key_hashes(keys)[0]
        at = np.minimum(np.searchsorted(self._sorted, hashes), len(self._sorted) - 1)
        found = self._sorted[at] == hashes
        if not allow_missing and not found.all():
            missing = [k for k, f in zip(keys, found, strict=True) if not f]
            raise DataError(f"{len(missing)} training samples have no answers: {', '.join(map(repr, missing[:5]))}.")
        out = self.diff_NQ[torch.from_numpy(self._order[at])].clone()
        out[torch.from_numpy(~found)] = torch.nan
        return out


# --- scorers -----------------------------------------------------------------------------------------------------


class AttributeNet(Objective):
    """An encoder and a logit for each question; learns from the classes of its own samples."""

    def __init__(self, encoder: EncoderConfig, truth: list[tuple[int, ...]]) -> None:
        super().__init__()
        self.encoder = build_encoder(encoder)
        self.aspects = nn.Linear(self.encoder.dim, len(truth))
        self.truth = truth

    def prepare(self, raw: Any, labels: Labels, rng: np.ndarray | None) -> Any:
        return self.encoder.prepare(raw, rng)

    def forward(self, batch: Batch) -> Losses:
        target_BQ = truth_of(batch.labels.single_B, self.truth)
        return Losses(masked_soft_bce(self.aspects(self.encoder(batch.inputs)), target_BQ, batch.weight_B))

    @torch.no_grad()
    def predict(self, batch: Batch) -> dict[str, Tensor]:
        return {"aspects": self.aspects(self.encoder(batch.inputs))}


def truth_of(label_B: Tensor, truth: Sequence[Sequence[int]]) -> Tensor:
    """0 or 1 for each question, float (B, Q)."""
    yes = [torch.isin(label_B, torch.tensor(list(classes), device=label_B.device)) for classes in truth]
    return torch.stack(yes, dim=1).float()


def score_attributes(
    run: Run, folder: Path, train: AnySpec, look: AnySpec, aspects: AttributeAspects, seed: int
) -> dict[str, Any]:
    """Stage: trains the classifier of attributes and lets it answer for the samples of `look`."""
    objective = partial(AttributeNet, aspects.encoder, list(aspects.questions.values()))
    fitted = run.fit(folder / "fit", objective, train, aspects.train, {"student": look}, augment=True, seed=seed)
    table = Fitted(folder / "fit").predictions("student")
    flat = table.column("aspects").combine_chunks().flatten().to_numpy(zero_copy_only=False)
    questions = list(aspects.questions)
    write_aspects(folder / FILE, table.column("key").to_pylist(), flat.reshape(len(table), -1), questions)
    return {"questions": questions, "seconds": fitted.seconds}


class Questions(BaseModel):
    """A list of questions, as a model gives them."""

    questions: list[str]


def ask_questions(client: LlmClient, names: Sequence[str], count: int) -> list[str]:
    """Yes/no questions that tell the classes apart: many first, then the `count` most useful and distinct of them.

    Raises DataError when there are too few.
    """
    classes = ", ".join(names)
    many = client.complete(
        f"These are classes: {classes}. Write {2 * count} short yes/no questions about features that tell them apart.",
        Questions,
    )
    listed = "\n".join(many.questions)
    best = client.complete(
        f"Classes: {classes}.\nQuestions:\n{listed}\nKeep the {count} questions that are most relevant and most different.",
        Questions,
    )
    kept = list(dict.fromkeys(best.questions))[:count]
    if len(kept) < count:
        raise DataError(f"{client.model.name} gave {len(kept)} different questions, {count} were asked for.")
    return kept


def score_with_llm(
    run: Run, folder: Path, data: Manifest, selection: KeepRows | None, aspects: LlmAspects, cache: str
) -> dict[str, Any]:
    """Stage: asks every question about every selected sample. Answers are cached, so an interrupted stage goes on.

    Returns {"questions", "usage", "junk"}: what it took, and the share of answers that were neither yes nor no.
    """
    client = clients.of(aspects.llm, cache)
    questions = list(aspects.questions)
    if not questions:
        names = data.load_classes().column("name").to_pylist() if data.classes else []
        questions = ask_questions(client, [str(n) for n in names], aspects.ask)
    keys: list[str] = []
    texts: list[str] = []
    for i in range(len(data.shards)):
        table = read_shard(data, i)
        table = table if selection is None else table.filter(pa.array(selection.mask(i)))
        keys += table.column("key").to_pylist()
        texts += table.column(aspects.field).to_pylist()

    def answer(text: str) -> list[float]:
        found = []
        for question in questions:
            scores = client.score(aspects.prompt.format(text=text, question=question), aspects.choices)
            yes, no = scores.log_probs
            known = scores.outside <= JUNK and math.isfinite(yes) and math.isfinite(no)
            found.append(yes - no if known else math.nan)
        return found

    rows = []
    with ThreadPoolExecutor(aspects.threads) as pool:
        for number, row in enumerate(pool.map(answer, texts), start=1):
            rows.append(row)
            run.progress.update(number, len(texts))
    diff_NQ = np.array(rows, dtype=np.float64).reshape(len(keys), len(questions))
    write_aspects(folder / FILE, keys, diff_NQ, questions)
    usage = dict(client.usage.table())
    return {"questions": questions, "usage": usage, "junk": float(np.isnan(diff_NQ).mean()) if diff_NQ.size else 0.0}


def usage_rows(values: Mapping[str, Any]) -> list[list[Any]]:
    """For a report."""
    return [[name, value] for name, value in values.items()]
