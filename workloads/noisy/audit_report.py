"""The report of a label audit: what is wrong and where, for a person; and what acting on it was worth.

Shape legend: K classes, Q test samples.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
from scipy.sparse import csr_array

from labelmill.data.manifest import Manifest
from labelmill.errors import DataError
from labelmill.evaluation.groups import wilson_interval
from labelmill.evaluation.noise_rates import class_errors, largest_confusions, noise_rates
from labelmill.evaluation.reranking import CorrectedAccuracy, corrected_accuracy, swap_table
from labelmill.reporting import report_training
from labelmill.run import Run
from labelmill.stages import Fitted, Stage
from labelmill.tracking import figures
from workloads.noisy.audited import class_names, images_by_key, labels_by_key, predicted_classes, samples_by_key

SHOWN = 50  # worst samples
_PICTURED = 40  # classes of the noise matrix at most
_LONGEST = 160  # characters of a text


def report_audit(
    run: Run,
    audit: Stage,
    data: Manifest,
    joint: csr_array,
    issues: pa.Table,
    by: str,
    field: str,
    image: Mapping[str, Any],
) -> None:
    """Estimated noise as numbers, tables and a picture; the worst samples; how good the filters are, where that is known."""
    names = class_names(data)
    summary = audit["summary"]
    run.report.notes += audit["warnings"]
    run.report.notes.append(
        f"an estimated {100 * summary['error_rate']:.1f} % of the {int(summary['rows']):,} training labels are wrong; "
        f"{audit['issues'][by]:,} are acted on ({by})."
    )
    run.report.metrics |= {f"audit/{name}": value for name, value in summary.items()}
    _report_filters(run, audit)
    errors = class_errors(joint)
    order = np.argsort(-errors["wrong"] / np.maximum(errors["given"], 1), kind="stable")[:SHOWN]
    rows = [
        [
            names[c],
            int(errors["given"][c]),
            round(100 * errors["wrong"][c] / max(errors["given"][c], 1e-9), 1),
            round(100 * errors["missed"][c] / max(errors["true"][c], 1e-9), 1),
        ]
        for c in order
    ]
    columns = ["class", "labels", "wrong %", "missed %"]
    caption = "estimated: labels of the class that are wrong; samples of the class that are labelled otherwise"
    run.report.add_table("classes", columns, rows, caption)
    pairs = [[names[a], names[b], round(n, 1)] for a, b, n in largest_confusions(joint, 20)]
    run.report.add_table("confusions", ["given", "true", "samples"], pairs, "estimated numbers, largest first")
    if len(names) <= _PICTURED:
        counts = np.asarray(joint.sum(axis=1)).ravel()
        rates = noise_rates(joint, counts).transition.toarray()
        figures.matrix(
            rates, names, names, run.figure("noise_matrix"), "given label", "true label",
            "estimated P(given | true), percent",
        )  # fmt: skip
    _report_worst(run, data, issues.slice(0, SHOWN), names, field, image)


def _report_filters(run: Run, audit: Stage) -> None:
    quality = audit["quality"]
    rows: list[list[Any]] = []
    for name, number in audit["issues"].items():
        known = quality.get(name)
        rows.append([name, number] + ([round(100 * known[q], 1) for q in ("precision", "recall")] if known else []))
        if known:
            run.report.metrics |= {f"audit/{q}/{name}": known[q] for q in ("precision", "recall")}
    columns = ["filter", "issues"] + (["precision %", "recall %"] if quality else [])
    caption = "samples that each filter flags"
    if quality:
        base = 100 * quality["base_rate"]["precision"]
        caption += f"; noise was added on purpose: {base:.1f} % of the labels are wrong"
    run.report.add_table("filters", columns, rows, caption)


def _report_worst(
    run: Run, data: Manifest, issues: pa.Table, names: list[str], field: str, image: Mapping[str, Any]
) -> None:
    if not issues.num_rows:
        return
    keys = issues["key"].to_pylist()
    given = [names[c] for c in issues["given"].to_pylist()]
    suggested = [names[c] for c in issues["suggested"].to_pylist()]
    columns: dict[str, list[Any]] = {"sample": keys, "given": given, "suggested": suggested}
    if "clean" in issues.column_names:
        columns["really"] = [names[c] for c in issues["clean"].to_pylist()]
    columns["P(given)"] = [round(p, 4) for p in issues["self_confidence"].to_pylist()]
    kind = data.fields[field].kind
    if kind == "text":
        texts = samples_by_key(data, keys, field)
        columns["text"] = [texts[key][:_LONGEST] for key in keys]
    rows = [list(row) for row in zip(*columns.values(), strict=True)]
    run.report.add_table("worst samples", list(columns), rows, "most suspicious first; issues.parquet has them all")
    if kind == "image":
        across = 8
        images = images_by_key(data, keys, field, image)
        titles = [f"{a[:6]} → {b[:6]}" for a, b in zip(given, suggested, strict=True)]
        down = -(-len(keys) // across)
        missing = down * across - len(keys)
        images = np.concatenate([images, np.full((missing, *images.shape[1:]), 255, np.uint8)])
        figures.image_grid(
            images, [*titles, *[""] * missing], run.figure("worst_samples"), down, across,
            title="worst labels: given → suggested", queries=False,
        )  # fmt: skip


def report_models(run: Run, fits: Mapping[str, Stage], test: Manifest, noisy_test: Manifest | None) -> None:
    """Accuracy of every arm on the test labels and, where there are some, on noisy ones; and where arms swap."""
    true = labels_by_key(test)
    given = labels_by_key(noisy_test) if noisy_test else None
    rows, compared = [], dict[str, CorrectedAccuracy]()
    for name, fit in fits.items():
        keys, predicted_Q = predicted_classes(fit)
        true_Q = np.array([true[key] for key in keys])
        right = int((predicted_Q == true_Q).sum())
        low, high = wilson_interval(right, len(keys))
        key = name.replace(" ", "_")
        run.report.metrics[f"test/{key}"] = right / len(keys)
        row = [name, fit["samples"], f"{100 * right / len(keys):.2f} ± {50 * (high - low):.2f}"]
        if given:
            given_Q = np.array([given[key] for key in keys])
            noisy = float((predicted_Q == given_Q).mean())
            run.report.metrics[f"noisy_test/{key}"] = noisy
            row.append(f"{100 * noisy:.2f}")
            try:
                compared[name] = corrected_accuracy(predicted_Q, given_Q, true_Q)
            except DataError as error:
                run.report.notes.append(f"re-ranking: {error}")
        rows.append(row)
        report_training(run, Fitted(fit.folder), fit["seconds"], key)
        run.report_data_health(Fitted(fit.folder))
    tested = {name: run.report.metrics[f"test/{name.replace(' ', '_')}"] for name in fits}
    if "all labels" in tested and "cleaned" in tested:
        others = [
            f"{name} {100 * value:.1f} %" for name, value in tested.items() if name not in ("all labels", "cleaned")
        ]
        compare = f" ({', '.join(others)})" if others else ""
        run.report.notes.append(
            f"test accuracy before, trained on all labels: {100 * tested['all labels']:.1f} %; after acting on the issues: "
            f"{100 * tested['cleaned']:.1f} %{compare}."
        )
    columns = ["trained on", "samples", "clean test %" if given else "test %"] + (["noisy test %"] if given else [])
    run.report.add_table("accuracy", columns, rows, "the interval is that of the test sample, not of the seed")
    if compared:
        report_ranking(run, compared)


def report_ranking(run: Run, compared: Mapping[str, CorrectedAccuracy]) -> list[tuple[str, str, float]]:
    """Accuracy of models on test rows with right and with wrong labels, and where they swap (returned as well)."""
    rows = [
        [name, *(round(100 * v, 2) for v in (a.benign, a.original_errors, a.corrected_errors, a.original, a.corrected))]
        for name, a in compared.items()
    ]
    run.report.add_table(
        "re-ranking",
        ["model", "right rows %", "wrong rows, given label %", "wrong rows, true label %", "by given %", "by true %"],
        rows,
        "accuracy on test rows with right and with wrong labels",
    )
    swaps = swap_table(compared)
    if swaps:
        caption = "share of wrong rows in the test set from which on the second model is the better one by true labels"
        shown = [[a, b, round(nu, 4)] for a, b, nu in swaps]
        run.report.add_table("swaps", ["first", "second", "prevalence"], shown, caption)
    return swaps
