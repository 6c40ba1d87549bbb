"""Reading stored out-of-sample predictions: the same audit as from whole rows, in batches, fold by fold."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from labelmill.crossfit import audit_held_out, held_out_batches
from labelmill.errors import DataError
from labelmill.evaluation.confident import ThresholdSums, row_facts
from labelmill.evaluation.label_filters import FILTERS, find_issues


def write_part(folder: Path, keys: list[str], given: np.ndarray, probs: np.ndarray, k: int) -> None:
    """What a rank writes for its held-out samples."""
    ids = np.argsort(-probs, axis=1, kind="stable")[:, :k]
    best = np.take_along_axis(probs, ids, 1)
    columns = {
        "key": pa.array(keys),
        "label": pa.array(given),
        "self_confidence": pa.array(probs[np.arange(len(given)), given]),
        "entropy": pa.array(-(probs * np.log(probs)).sum(1)),
        "class_id": pa.FixedSizeListArray.from_arrays(pa.array(ids.reshape(-1)), k),
        "prob": pa.FixedSizeListArray.from_arrays(pa.array(best.reshape(-1)), k),
    }
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), folder / f"part-{len(list(folder.glob('part-*'))):05d}.parquet")


def test_stored_predictions_give_the_audit_of_whole_rows(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    given = rng.integers(0, 5, 400)
    logits = (
        rng.normal(size=(400, 5)) + 2.5 * np.eye(5)[np.where(rng.random(400) < 0.2, rng.integers(0, 5, 400), given)]
    )
    probs = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    keys = [f"s{i}" for i in range(400)]
    for f, lo, hi in ((0, 0, 150), (0, 150, 190), (1, 190, 400)):
        rows = slice(lo, hi)
        write_part(tmp_path / f"fold-{f}" / "predictions" / "held_out", keys[rows], given[rows], probs[rows], 5)
    assert sum(len(batch) for batch in held_out_batches(tmp_path, 2)) == 400
    facts, found_keys, thresholds = audit_held_out(tmp_path, 2, 5)
    sums = ThresholdSums(5)
    sums.add_probs(given, probs)
    np.testing.assert_allclose(thresholds, sums.thresholds(), rtol=1e-12)
    whole = row_facts(given, probs, sums.thresholds(), keep=4)
    assert found_keys.to_pylist() == keys
    for name in FILTERS:
        np.testing.assert_array_equal(find_issues(facts, name), find_issues(whole, name), err_msg=name)


def test_nothing_stored_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no held-out predictions"):
        audit_held_out(tmp_path, 2, 5)
