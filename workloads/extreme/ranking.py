"""What the methods of the family report: ranking metrics of extreme classification from stored predictions.

Shape legend: Q queries, K ranked labels, P true labels of a query (padded with -1), L labels.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow.parquet as pq
import torch
from pydantic import Field

from labelmill.data.labels import labels_from_table
from labelmill.data.manifest import Manifest
from labelmill.data.shards import label_counts, read_labels
from labelmill.errors import DataError, JobError
from labelmill.evaluation.extreme import (
    PROPENSITIES,
    RankedSums,
    drop_filtered,
    frequency_bands,
    inverse_propensities,
)
from labelmill.heads.index import IndexConfig, build_index, load_index, measure_recall
from labelmill.job import StrictModel
from labelmill.run import Run
from labelmill.search_config import SearchConfig
from labelmill.stages import Fitted, Stage, second_name

ROWS = 2048
NO_QUERY_LABELS = "queries without a label"


class RankingSection(StrictModel):
    """What is measured on the test set."""

    ks: tuple[int, ...] = Field((1, 3, 5), min_length=1, description="k of P, nDCG and PSP")
    recall_ks: tuple[int, ...] = Field((10, 50), min_length=1, description="k of R")
    propensity: Literal["default", "amazon", "wikipedia"] = Field("default", description="A and B of propensities")
    filter: str | None = Field(None, description="CSV of `key,label`: pairs left out of the ranking, as a query itself")

    @property
    def most(self) -> int:
        """Labels that must be ranked."""
        return max(*self.ks, *self.recall_ks)


def refuse_test_search(search: SearchConfig | None, dev: str | None) -> None:
    """Raises ValueError for a search whose trials would be compared on the test set."""
    if search and search.metric.startswith("test/"):
        raise ValueError(
            f"search.metric {search.metric} is measured on the test set: search by eval/..., with data.dev"
        )
    if search and search.metric.startswith("eval/") and not dev:
        raise ValueError(
            f"search.metric {search.metric} would be measured on the test set: name a held-out set in data.dev"
        )


def read_filter(path: str | None, num_labels: int) -> dict[str, set[int]]:
    """Labels to leave out by sample key. Raises DataError, naming the line, for what is no pair or out of range."""
    pairs: dict[str, set[int]] = {}
    if path is None:
        return pairs
    if not Path(path).is_file():
        raise DataError(f"ranking.filter: no file {path}.")
    with open(path, encoding="utf-8", newline="") as file:
        for number, row in enumerate(csv.reader(file), start=1):
            if len(row) != 2 or not row[1].strip().isdigit():
                raise DataError(f"{path}: line {number}: write `key,label id`, not {','.join(row)!r}.")
            if not (label := int(row[1])) < num_labels:
                raise DataError(
                    f"{path}: line {number}: label {label} is out of range: ids run from 0 to {num_labels - 1}."
                )
            pairs.setdefault(row[0], set()).add(label)
    return pairs


def ranked_for(section: RankingSection, test: Manifest) -> int:
    """Labels to rank so that enough are left when a query's filtered ones are gone.

    Raises JobError for more places than labels; DataError for a filter file that can't be read or knows no test sample.
    """
    labels = test.label.num_classes or 0
    if section.most > labels:
        raise JobError(f"ranking: k up to {section.most}, but there are {labels} labels. Lower ks and recall_ks.")
    filtered = read_filter(section.filter, labels)
    keys = (key for i in range(len(test.shards)) for key in read_labels(test, i).column("key").to_pylist())
    if filtered and not any(key in filtered for key in keys):
        first = next(iter(filtered))
        raise DataError(f"{section.filter}: none of its keys, such as {first!r}, is in the test set {test.name!r}.")
    return min(section.most + max((len(ids) for ids in filtered.values()), default=0), labels)


def labels_by_key(data: Manifest) -> dict[str, np.ndarray]:
    """True label ids of every sample."""
    out: dict[str, np.ndarray] = {}
    for i in range(len(data.shards)):
        table = read_labels(data, i)
        ids_BP = labels_from_table(table, data.label).ids_BP.numpy()
        out |= zip(table.column("key").to_pylist(), ids_BP, strict=True)
    return out


def predicted_labels(folder: Path, name: str) -> Iterator[tuple[list[str], np.ndarray]]:
    """(keys, ranked ids (Q, K)) of stored predictions, some rows at a time."""
    for path in sorted((folder / "predictions" / name).glob("part-*.parquet")):
        for batch in pq.ParquetFile(path).iter_batches(ROWS, columns=["key", "class_id"]):
            ids = batch.column("class_id").flatten().to_numpy(zero_copy_only=False)
            yield batch.column("key").to_pylist(), ids.reshape(batch.num_rows, -1)


def ranked_sums(
    section: RankingSection,
    train: Manifest,
    truth: Mapping[str, np.ndarray],
    ranked: Iterator[tuple[list[str], np.ndarray]],
    filtered: dict[str, set[int]],
) -> RankedSums:
    """Sums over a stream of rankings; propensities and bands from the training set's counts."""
    count_L = label_counts(train)
    sums = RankedSums(
        ks=section.ks,
        recall_ks=section.recall_ks,
        inverse_L=inverse_propensities(count_L, train.num_samples, *PROPENSITIES[section.propensity]),
        band_L=frequency_bands(count_L),
        num_labels=len(count_L),
    )
    for keys, ids_QK in ranked:
        kept_QK = drop_filtered(ids_QK, keys, filtered, section.most) if filtered else ids_QK
        rows = [truth[key] for key in keys]
        true_QP = np.full((len(rows), max(len(r) for r in rows)), -1, np.int64)
        for row, ids_P in enumerate(rows):
            true_QP[row, : len(ids_P)] = ids_P
        sums.add(kept_QK, true_QP)
    return sums


def report_extreme(
    run: Run, systems: Mapping[str, Stage], section: RankingSection, train: Manifest, test: Manifest
) -> None:
    """One table, a system a row; metrics `test/<metric>` of the first system, `test/<system>/<metric>` of the others."""
    filtered = read_filter(section.filter, test.label.num_classes or 0)
    truth = labels_by_key(test)
    table: list[tuple[str, dict[str, float]]] = []
    for number, (system, fit) in enumerate(systems.items()):
        sums = ranked_sums(section, train, truth, predicted_labels(Fitted(fit.folder).folder, "test"), filtered)
        metrics = sums.metrics()
        prefix = "test" if number == 0 else f"test/{system}"
        run.report.metrics |= {f"{prefix}/{name}": value for name, value in metrics.items()}
        table.append((system, metrics))
        if sums.empty:
            run.report.metrics[f"data/{NO_QUERY_LABELS}"] = float(sums.empty)
    names = [*table[0][1]]
    rows = [[system, *(f"{100 * metrics[name]:.2f}" for name in names)] for system, metrics in table]
    caption = (
        "percent; bands by training uses of a label: head 50 %, torso 30 %, tail 20 %; PSP's propensities from training"
    )
    run.report.add_table("ranking", ["system", *names], rows, caption)


def measure_index(
    run: Run, folder: Path, fit: Stage, train: Manifest, test: Manifest, index: IndexConfig, section: RankingSection
) -> dict[str, Any]:
    """Stage: an approximate index over the label rows, its recall on test queries, and the metrics through it."""
    fitted = Fitted(fit.folder)
    for entry in fitted.head_shards("classes"):
        # rows are large and final
        second_name(fitted.folder / "export" / "head-classes" / entry["file"], folder / entry["file"])
    info = build_index(folder, index.kind, index.factory, index.probes)
    table = fitted.predictions("test")
    flat = table.column("emb").combine_chunks().flatten().to_numpy(zero_copy_only=False)
    emb_QD = torch.from_numpy(flat.reshape(len(table), -1).copy()).float()
    keys = table.column("key").to_pylist()
    most = ranked_for(section, test)
    recall = measure_recall(folder, emb_QD, section.most)
    found = load_index(folder)

    def ranked() -> Iterator[tuple[list[str], np.ndarray]]:
        for lo in range(0, len(keys), ROWS):
            ids = found.search(emb_QD[lo : lo + ROWS], most)[1].numpy()
            yield keys[lo : lo + ROWS], ids

    filtered = read_filter(section.filter, info.num_classes)
    metrics = ranked_sums(section, train, labels_by_key(test), ranked(), filtered).metrics()
    return {"recall": recall, "metrics": metrics, "factory": info.factory, "bytes": info.bytes}


def report_index(run: Run, measured: Stage) -> None:
    """The index beside the exact search."""
    run.report.metrics |= {f"index/{name}": value for name, value in measured["recall"].items()}
    run.report.metrics |= {f"index/{name}": value for name, value in measured["metrics"].items()}
    rows = [[name, f"{value:.4g}"] for name, value in (measured["recall"] | measured["metrics"]).items()]
    caption = f"{measured['factory']}, {measured['bytes'] / 2**20:.1f} MiB; recall@k: of the exact best k"
    run.report.add_table("index", ["measure", "value"], rows, caption)
