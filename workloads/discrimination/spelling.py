"""Spelling correction as classification over a million words.

One class a word; the encoder reads hashed character n-grams and the head holds one row a word, started as the embedding
of the clean spelling. The method is partial FC with a CosFace margin on sampled classes; the baselines are what a
corrector does without training.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from labelmill.data.config import StreamConfig
from labelmill.data.manifest import Manifest
from labelmill.encoders import CharNgramsConfig
from labelmill.heads.config import HeadConfig
from labelmill.job import StrictModel
from labelmill.reporting import report_ranking, report_training
from labelmill.run import Fitted, Run
from labelmill.training.config import TrainJob
from labelmill.workload import workload
from workloads.discrimination.partial_fc import fit_classifier, ranked_classes
from workloads.discrimination.words import BANDS, read_queries, write_words


class WordsConfig(StrictModel):
    """Which words, and how they are misspelt."""

    languages: tuple[str, ...] = Field(("en", "de", "fr", "es"), min_length=1)
    count: int = Field(1_000_000, ge=100, description="classes: the most frequent distinct words")
    typos_per_word: int = Field(2, ge=1, description="training misspellings of every word")
    queries: int = Field(4_000, ge=4, description="test misspellings, equally many from each frequency band")
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


def import_words(run: Run, folder: Path, words: WordsConfig, seed: int) -> dict[str, Any]:
    """Stage: word lists -> shards with misspellings."""
    options = words.model_dump()
    return write_words(folder, seed=seed, **options)


def run_baselines(run: Run, folder: Path, data: Manifest, k: int) -> dict[str, Any]:
    """Stage: both baselines on every test query."""
    from workloads.discrimination.spelling_baselines import edit_rule, ngram_nearest

    words = data.load_classes()["name"].to_pylist()
    queries, _ = read_queries(data)
    shortlist = ngram_nearest(words, queries, 50, progress=lambda done: run.progress.update(done, len(queries)))
    np.save(folder / "n-gram nearest.npy", shortlist[:, :k])
    np.save(folder / "edit rule.npy", edit_rule(words, queries, shortlist, k))
    return {}


@workload("discrimination.spelling", SpellingJob)
def spelling(job: SpellingJob, run: Run) -> None:
    words = run.stage("words", import_words, words=job.words, seed=job.seed)
    train, test = words.manifest("train"), words.manifest("test")
    run.track_data(train=train, test=test)
    fit = run.stage(
        "fit",
        fit_classifier,
        train=train,
        test=test,
        encoder=job.encoder,
        head=job.head,
        config=job.train,
        data=job.data,
        seed=job.seed,
        imprint=True,
        align=job.align,
        augment=True,
        eval_batch=2048,
    )
    ids_QK, _, label_QP = ranked_classes(fit)
    systems = {"labelmill": ids_QK}
    if job.baselines:
        rules = run.stage("baselines", run_baselines, data=test, k=5)
        systems |= {name: np.load(rules.folder / f"{name}.npy") for name in ("n-gram nearest", "edit rule")}
    bands = test.load_classes()["group"].to_numpy(zero_copy_only=False)[label_QP[:, 0]]
    order = [name for _, name in BANDS if (bands == name).any()]
    report_training(run, Fitted(fit.folder), fit["seconds"])
    report_ranking(run, "test", systems, label_QP, bands, order, "frequency rank")
    run.report.metrics["classes"] = float(job.words.count)
    run.report_data_health(Fitted(fit.folder))
    if job.register_as:
        run.register(job.register_as, fit, encoder=job.encoder, head=job.head, data=train)
        run.report.notes.append(
            f'Predict with it: labelmill models predict {job.register_as}@candidate --text "recieve" --text "langauge"'
        )
