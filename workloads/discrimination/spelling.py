"""Spelling correction as classification over a million words.

One class a word; the encoder reads hashed character n-grams and the head holds one row a word, started as the embedding
of the clean spelling. Two losses: partial FC over sampled classes, and a softmax over the clean spellings of the batch. When
training is complete all rows are set to the embeddings of the clean spellings again. Words are ranked by cosine and, with
a weight chosen on dev queries, by their frequency. The baselines are what a corrector does without training.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field

from labelmill.data.config import StreamConfig
from labelmill.data.manifest import Manifest
from labelmill.encoders import CharNgramsConfig
from labelmill.evaluation.ranking import with_prior
from labelmill.heads.config import HeadConfig
from labelmill.job import StrictModel
from labelmill.reporting import report_ranking, report_training
from labelmill.run import Run
from labelmill.stages import Fitted, Stage
from labelmill.tracking.model import ClassPrior
from labelmill.training.config import TrainJob
from labelmill.workload import workload
from workloads.discrimination.partial_fc import (
    CLASSIFIER_METRICS,
    CLASSIFIER_TRAINING_METRICS,
    fit_classifier,
    input_options,
    ranked_classes,
)
from workloads.discrimination.words import BANDS, read_queries, write_words

CANDIDATES = 32
"""Words ranked by similarity, which their frequency then ranks again."""
PRIOR_WEIGHTS = (0.0, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.06)


class WordsConfig(StrictModel):
    """Which words, and how they are misspelt."""

    languages: tuple[str, ...] = Field(("en", "de", "fr", "es"), min_length=1)
    count: int = Field(1_000_000, ge=100, description="classes: the most frequent distinct words")
    typos_per_word: int = Field(2, ge=1, description="training misspellings of every word")
    queries: int = Field(4_000, ge=8, description="test misspellings, equally many from each frequency band")
    two_edits: float = Field(0.25, ge=0, le=1, description="share of misspellings with two edits")


class SpellingJob(TrainJob):
    """Words, encoder, head, training, and whether to run the baselines."""

    workload: Literal["discrimination.spelling"]
    words: WordsConfig = WordsConfig()
    data: StreamConfig = StreamConfig()
    encoder: CharNgramsConfig = CharNgramsConfig()
    head: HeadConfig = HeadConfig()
    align: float = Field(1.0, ge=0, description="weight of the softmax over clean spellings of the batch")
    baselines: bool = True

    changeable: ClassVar[frozenset[str]] = frozenset({"align"})

    def class_count(self) -> int:
        return self.words.count


def import_words(run: Run, folder: Path, words: WordsConfig, seed: int) -> dict[str, Any]:
    """Stage: word lists -> shards with misspellings."""
    options = words.model_dump()
    return write_words(folder, seed=seed, **options)


def run_baselines(run: Run, folder: Path, data: Manifest, k: int) -> dict[str, Any]:
    """Stage: both baselines on every test query."""
    from workloads.discrimination.spelling_baselines import edit_rule, ngram_nearest

    words, queries = data.load_classes()["name"].to_pylist(), read_queries(data)
    shortlist = ngram_nearest(words, queries, 50, progress=lambda done: run.progress.update(done, len(queries)))
    np.save(folder / "n-gram nearest.npy", shortlist[:, :k])
    np.save(folder / "edit rule.npy", edit_rule(words, queries, shortlist, k))
    return {}


def choose_prior(fit: Stage, log_frequency_C: torch.Tensor) -> float:
    """The weight of the words' log frequency in the ranking: the best of a grid on the dev queries."""
    ids_QK, scores_QK, label_QP = (torch.from_numpy(a) for a in ranked_classes(fit, "dev"))
    correct = {
        weight: float(
            (with_prior(scores_QK, ids_QK, log_frequency_C, weight)[1][:, 0] == label_QP[:, 0]).double().mean()
        )
        for weight in PRIOR_WEIGHTS
    }
    return max(correct, key=lambda weight: (correct[weight], -weight))


@workload("discrimination.spelling", SpellingJob, CLASSIFIER_METRICS, CLASSIFIER_TRAINING_METRICS)
def spelling(job: SpellingJob, run: Run) -> None:
    words = run.stage("words", import_words, words=job.words, seed=job.seed)
    train, dev, test = (words.manifest(split) for split in ("train", "dev", "test"))
    options = input_options(job.encoder, job.seed)
    stream = job.data.training_stream(train, run.folder / "data", global_batch=job.train.global_batch, **options)
    run.track_data(train=stream, dev=dev, test=test)
    fit = run.stage(
        "fit",
        fit_classifier,
        train=stream,
        predict={
            name: job.data.stream(queries, global_batch=2048, shuffle=False, **options)
            for name, queries in (("dev", dev), ("test", test))
        },
        evaluate=job.data.stream(dev, global_batch=2048, **options),
        encoder=job.encoder,
        head=job.head,
        config=job.train,
        seed=job.seed,
        imprint=True,
        align=job.align,
        augment=True,
        k=CANDIDATES,
    )
    classes = test.load_classes()
    log_frequency_C = torch.from_numpy(np.log(classes["frequency"].to_numpy())).float()
    weight = choose_prior(fit, log_frequency_C)
    ids_QK, scores_QK, label_QP = ranked_classes(fit)
    _, ranked_QK = with_prior(torch.from_numpy(scores_QK), torch.from_numpy(ids_QK), log_frequency_C, weight)
    systems = {"labelmill": ranked_QK.numpy(), "without frequency": ids_QK}
    if job.baselines:
        rules = run.stage("baselines", run_baselines, data=test, k=5)
        names = ("edit rule", "n-gram nearest")
        systems |= {name: np.load(rules.folder / f"{name}.npy", allow_pickle=False) for name in names}
    bands = classes["group"].to_numpy(zero_copy_only=False)[label_QP[:, 0]]
    order = [name for _, name in BANDS if (bands == name).any()]
    report_training(run, Fitted(fit.folder), fit["seconds"])
    report_ranking(run, "test", systems, label_QP, bands, order, "frequency rank")
    run.report.metrics |= {"classes": float(job.words.count), "prior_weight": weight}
    run.report_data_health(Fitted(fit.folder))
    if job.register_as:
        prior = ClassPrior(column="frequency", weight=weight, candidates=min(CANDIDATES, job.words.count))
        run.register(job.register_as, fit, encoder=job.encoder, head=job.head, data=train, prior=prior)
        run.report.notes.append(
            f'Predict with it: labelmill models predict {job.register_as}@candidate --text "langwage" --text "pronounciaton"'
        )
