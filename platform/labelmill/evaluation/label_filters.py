"""Which labels look wrong: the filters and ranking scores of confident learning, and the table of issues.

Northcutt, Jiang, Chuang: Confident Learning (JAIR 2021); the filters and their names are those of `cleanlab` 2.9.

Shape legend: N rows, K classes, M best other classes kept of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
import pyarrow as pa
from scipy.sparse import csr_array

from labelmill.errors import DataError
from labelmill.evaluation.confident import SLACK, GuessRule, RowFacts
from labelmill.evaluation.noise_rates import calibrated_joint, confident_joint, error_rate, rounded_joint

Filter = Literal[
    "confident_learning",
    "prune_by_class",
    "prune_by_noise_rate",
    "both",
    "predicted_neq_given",
    "low_self_confidence",
    "low_normalized_margin",
]
FILTERS: tuple[Filter, ...] = get_args(Filter)
Score = Literal["self_confidence", "normalized_margin", "confidence_weighted_entropy"]
SCORES: tuple[Score, ...] = get_args(Score)


# --- scores ---------------------------------------------------------------------------------------------


def label_scores(facts: RowFacts, score: Score = "self_confidence") -> np.ndarray:
    """float64 (N,): how good each given label looks; low is suspicious.

    self_confidence: P[given]. normalized_margin: (P[given] - max other + 1) / 2. confidence_weighted_entropy:
    ln(1 + r) / r with r = (entropy / ln K) / P[given].
    """
    if score == "self_confidence":
        return facts.self_N
    if score == "normalized_margin":
        return (facts.self_N - facts.other_N + 1) / 2
    ratio = facts.entropy_N / np.log(facts.num_classes) / np.maximum(facts.self_N, SLACK)
    return np.log(ratio + 1) / np.maximum(ratio, SLACK)


# --- filters --------------------------------------------------------------------------------------------


def find_issues(
    facts: RowFacts,
    by: Filter = "prune_by_noise_rate",
    counts: csr_array | None = None,
    frac_noise: float = 1.0,
    min_examples: int = 1,
    rule: GuessRule = "library",
) -> np.ndarray:
    """bool (N,): rows whose label is thought wrong.

    Args:
        facts: of the rows.
        by: the filter. `confident_learning`: guess is another class. `prune_by_class`: for each class the rows with
            the lowest self-confidence, as many as the joint says are wrong. `prune_by_noise_rate`: for each pair the
            rows with the largest margin, as many as the joint says. `both`: flagged by the last two.
            `predicted_neq_given`: the model says something else. `low_...`: the lowest scores, as many as
            `confident_learning` flags.
        counts: the calibrated joint rounded to counts; None estimates it.
        frac_noise: share of the estimated noise that the `prune` filters take away.
        min_examples: rows that they leave in each class.
        rule: see `RowFacts.guess_N`.

    Rows whose given label the model finds most probable are never flagged, except by `low_...`.
    """
    if by not in FILTERS:
        raise DataError(f"filter {by!r} is unknown; use one of {', '.join(FILTERS)}.")
    if not 0 < frac_noise <= 1:
        raise DataError(f"frac_noise {frac_noise} must lie in (0, 1].")
    if by == "predicted_neq_given":
        return (facts.predicted_N != facts.given_N) & ~facts.agrees_N
    guess_N = facts.guess_N(rule)
    confident = (guess_N >= 0) & (guess_N != facts.given_N) & ~facts.agrees_N
    if by == "confident_learning":
        return confident
    if by in ("low_self_confidence", "low_normalized_margin"):
        score = label_scores(facts, "self_confidence" if by == "low_self_confidence" else "normalized_margin")
        flagged = np.zeros(len(facts), np.bool_)
        flagged[np.argsort(score, kind="stable")[: int(confident.sum())]] = True
        return flagged
    if counts is None:
        counts = rounded_joint(calibrated_joint(confident_joint(facts, rule), facts.label_counts))
    kept = keep_at_least(counts, min_examples, frac_noise)
    flagged = np.ones(len(facts), np.bool_)
    if by in ("prune_by_class", "both"):
        flagged &= _prune_by_class(facts, kept, min_examples)
    if by in ("prune_by_noise_rate", "both"):
        flagged &= _prune_by_noise_rate(facts, kept, min_examples)
    return flagged & ~facts.agrees_N


def keep_at_least(counts: csr_array, least: int, frac_noise: float = 1.0) -> csr_array:
    """Counts int64 whose diagonal is at least `least`, paid for by the row's other entries; those scaled by `frac_noise`."""
    matrix = csr_array(counts, dtype=np.float64, copy=True).tocoo()
    size = matrix.shape[0]
    diagonal = counts.diagonal().astype(np.float64)
    raised = np.maximum(diagonal, least)
    entries = np.bincount(matrix.row, matrix.data != 0, size)
    cost = (raised - diagonal) / np.maximum(entries - 1, 1)
    off = matrix.row != matrix.col
    row, col = matrix.row[off], matrix.col[off]
    value = np.maximum(matrix.data[off] - cost[row], 0.0)
    left = value * frac_noise
    raised += np.bincount(row, value - left, size)
    ids = np.arange(size)
    out = csr_array(
        (np.concatenate([left, raised]).astype(np.int64), (np.concatenate([row, ids]), np.concatenate([col, ids]))),
        shape=matrix.shape,
    )
    out.eliminate_zeros()
    return out


def _prune_by_class(facts: RowFacts, kept: csr_array, least: int) -> np.ndarray:
    """For each class its rows with the lowest self-confidence: their number less the diagonal."""
    count_K = facts.label_counts
    wrong_K = np.where((count_K > least) & (count_K > 1), count_K - kept.diagonal(), 0)
    order = np.lexsort((np.arange(len(facts)), facts.self_N, facts.given_N))  # by class, lowest first
    starts = np.concatenate([[0], np.cumsum(count_K)])[:-1]
    rank = np.arange(len(facts)) - starts[facts.given_N[order]]
    flagged = np.zeros(len(facts), np.bool_)
    flagged[order[rank < wrong_K[facts.given_N[order]]]] = True
    return flagged


def _prune_by_noise_rate(facts: RowFacts, kept: csr_array, least: int) -> np.ndarray:
    """For each pair (given a, true b) the rows given a with the largest P[b] - P[a], `kept[a, b]` of them."""
    count_K = facts.label_counts
    pairs = kept.tocoo()
    wanted = (pairs.row != pairs.col) & (pairs.data > 0) & (count_K[pairs.row] > max(least, 1))
    size = facts.num_classes
    pair_P = pairs.row[wanted].astype(np.int64) * size + pairs.col[wanted]
    number_P = pairs.data[wanted]
    order_P = np.argsort(pair_P)
    pair_P, number_P = pair_P[order_P], number_P[order_P]
    flagged = np.zeros(len(facts), np.bool_)
    if not len(pair_P):
        return flagged
    # candidates: (row, kept other class) whose pair is wanted
    row, slot = np.nonzero(facts.top_id_NM >= 0)
    pair = facts.given_N[row] * size + facts.top_id_NM[row, slot]
    at = np.minimum(np.searchsorted(pair_P, pair), len(pair_P) - 1)
    hit = pair_P[at] == pair
    row, slot, at = row[hit], slot[hit], at[hit]
    margin = facts.top_NM[row, slot].astype(np.float64) - facts.self_N[row]
    order = np.lexsort((row, -margin, at))
    row, at = row[order], at[order]
    starts = np.searchsorted(at, np.arange(len(pair_P)))
    rank = np.arange(len(at)) - starts[at]
    flagged[row[rank < number_P[at]]] = True
    return flagged


# --- an audit as a whole --------------------------------------------------------------------------------


def in_sample_warning(facts: RowFacts) -> str | None:
    """A warning when the probabilities look as if the model had trained on these labels, else None."""
    same = float((facts.predicted_N == facts.given_N).mean()) if len(facts) else 0.0
    joint = confident_joint(facts)
    if same >= 0.999 and joint.sum() == joint.diagonal().sum():
        return (
            f"the probabilities look in-sample: the model repeats {100 * same:.1f} % of the given labels, mean self-confidence "
            f"{facts.self_N.mean():.3f}. No label error can be found so; use crossfit."
        )
    return None


def issue_table(
    facts: RowFacts,
    keys: Sequence[str] | pa.Array,
    flags: dict[Filter, np.ndarray],
    score: Score = "self_confidence",
    extra: dict[str, np.ndarray] | None = None,
) -> pa.Table:
    """Every row flagged by one of the filters, most suspicious first.

    Columns: key, given, suggested (the model's most probable class), guess (the confident one, -1 for none), the three
    scores, for each filter a bool `by_<filter>`, and the columns of `extra`, one value a row of `facts`.
    """
    if len(keys) != len(facts):
        raise DataError(f"{len(keys)} keys for {len(facts)} rows.")
    flagged = np.flatnonzero(np.any(list(flags.values()), axis=0)) if flags else np.empty(0, np.int64)
    scores = {name: label_scores(facts, name) for name in SCORES}
    rows = flagged[np.argsort(scores[score][flagged], kind="stable")]
    columns: dict[str, pa.Array | np.ndarray] = {
        "key": (keys if isinstance(keys, pa.Array) else pa.array(keys, pa.string())).take(pa.array(rows)),
        "given": facts.given_N[rows],
        "suggested": facts.predicted_N[rows],
        "guess": facts.guess_N()[rows],
        **{name: values[rows] for name, values in scores.items()},
        **{f"by_{name}": mask[rows] for name, mask in flags.items()},
        **{name: np.asarray(values)[rows] for name, values in (extra or {}).items()},
    }
    return pa.table(columns)


def audit_summary(facts: RowFacts, rule: GuessRule = "library") -> dict[str, float]:
    """Numbers of an audit: estimated error rate un-rounded and as the library rounds it, rows counted, rows flagged."""
    joint = confident_joint(facts, rule)
    calibrated = calibrated_joint(joint, facts.label_counts)
    rounded = rounded_joint(calibrated)
    out = {
        "rows": float(len(facts)),
        "error_rate": error_rate(calibrated),
        "error_rate_rounded": error_rate(rounded),
        "counted_share": float((facts.guess_N(rule) >= 0).mean()),
        "disagreement": float((facts.predicted_N != facts.given_N).mean()),
    }
    for name in FILTERS:
        out[f"flagged/{name}"] = float(find_issues(facts, name, rounded, rule=rule).sum())
    return out
