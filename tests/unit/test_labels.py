"""Label forms: tensors, checks, round trips."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from labelmill.data.labels import (
    LabelError,
    Labels,
    LabelSpec,
    check_labels,
    count_labels,
    labels_from_table,
)
from labelmill.errors import DataError

IDS, REALS = pa.list_(pa.int64()), pa.list_(pa.float32())


def table(**columns: pa.Array) -> pa.Table:
    rows = len(next(iter(columns.values())))
    return pa.table({"key": [f"k{i}" for i in range(rows)], **columns})


def ids(*rows: list[int] | None) -> pa.Array:
    return pa.array(list(rows), IDS)


def spec(form: str, **sizes: int) -> LabelSpec:
    return LabelSpec(form=form, **(sizes or {"num_classes": 5}))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("form", "sizes", "word"),
    [
        ("single", {}, "num_classes"),
        ("continuous", {}, "dim"),
        ("continuous", {"dim": 2, "num_classes": 3}, "num_classes"),
        ("multi", {"num_classes": 3, "dim": 1}, "dim"),
        ("multi", {"num_classes": 0}, "greater"),
        ("many", {"num_classes": 3}, "single"),
    ],
)
def test_spec_refuses_sizes_that_do_not_fit_the_form(form, sizes, word):
    with pytest.raises(ValidationError, match=word):
        LabelSpec(form=form, **sizes)


def test_single_labels_become_one_column():
    labels = labels_from_table(table(label=pa.array([3, 0, 4])), spec("single"))
    assert labels.ids_BP.tolist() == [[3], [0], [4]]
    assert labels.single_B.tolist() == [3, 0, 4]
    assert len(labels) == 3
    labels.ids_BP[0, 0] = 1  # writable


def test_list_labels_are_padded_with_minus_one():
    labels = labels_from_table(table(label=ids([1, 2], [], [4])), spec("multi"))
    assert labels.ids_BP.tolist() == [[1, 2], [-1, -1], [4, -1]]
    with pytest.raises(DataError, match="multi"):
        _ = labels.single_B


def test_soft_partial_complementary_continuous_and_none():
    soft = table(label=ids([1, 2], [4]), label_weight=pa.array([[0.25, 0.75], [1.0]], REALS))
    labels = labels_from_table(soft, spec("soft"))
    assert labels.weights_BP is not None
    assert labels.weights_BP.tolist() == [[0.25, 0.75], [1.0, 0.0]]
    partial = labels_from_table(table(label=ids([1], []), label_negative=ids([0, 2], [3])), spec("partial"))
    assert partial.ids_BP.tolist() == [[1], [-1]]
    assert partial.negatives_BQ is not None
    assert partial.negatives_BQ.tolist() == [[0, 2], [3, -1]]
    complementary = labels_from_table(table(label=ids([1], [0, 2])), spec("complementary"))
    assert complementary.ids_BP.shape == (2, 0)  # nothing is known to be positive
    assert complementary.negatives_BQ is not None
    assert complementary.negatives_BQ.tolist() == [[1, -1], [0, 2]]
    values = labels_from_table(table(label=pa.array([[1.0, 2.0], [3.0, 4.0]], REALS)), spec("continuous", dim=2))
    assert values.values_BD is not None
    assert values.values_BD.tolist() == [[1.0, 2.0], [3.0, 4.0]]
    none = labels_from_table(pa.table({"key": ["a", "b"]}), LabelSpec(form="none"))
    assert len(none) == 2
    assert none.ids_BP.shape == (2, 0)


def test_tables_of_many_chunks_and_slices_give_the_same_labels():
    whole = table(label=ids([1, 2], [0], [3, 4, 1], []))
    chunked = pa.concat_tables([whole.slice(0, 1), whole.slice(1, 2), whole.slice(3)])
    assert labels_from_table(chunked, spec("multi")).ids_BP.equal(labels_from_table(whole, spec("multi")).ids_BP)
    assert labels_from_table(whole.slice(1, 2), spec("multi")).ids_BP.tolist() == [[0, -1, -1], [3, 4, 1]]
    check_labels(whole.slice(2), spec("multi"), "x")
    assert len(labels_from_table(whole.slice(0, 0), spec("multi"))) == 0


def test_slice_to_and_concat():
    soft = table(label=ids([1, 2], [4], [0]), label_weight=pa.array([[0.25, 0.75], [1.0], [2.0]], REALS))
    labels = labels_from_table(soft, spec("soft"))
    back = Labels.concat([labels.slice(0, 1), labels.slice(1, 3).to("cpu")])
    assert back.ids_BP.equal(labels.ids_BP)
    assert back.weights_BP is not None
    assert back.weights_BP.equal(labels.weights_BP)
    narrow = Labels("multi", torch.tensor([[7]]))
    wide = Labels("multi", torch.tensor([[1, 2, 3]]))
    assert Labels.concat([narrow, wide]).ids_BP.tolist() == [[7, -1, -1], [1, 2, 3]]
    with pytest.raises(ValueError, match="forms"):
        Labels.concat([narrow, labels])


def soft_table(weights: list[list[float]]) -> pa.Table:
    return table(label=ids([0], [1, 2], [3]), label_weight=pa.array(weights, REALS))


@pytest.mark.parametrize(
    ("wrong", "form", "sizes", "key", "words"),
    [
        (table(label=pa.array([0, 5, 9])), "single", {}, "k1", ["label 5", "0 ... 4", "1 more"]),
        (table(label=pa.array([0, 1, -1])), "single", {}, "k2", ["label -1"]),
        (table(label=pa.array([0, None, 1])), "single", {}, "k1", ["missing"]),
        (table(label=ids([0], [1, 7], [2])), "multi", {}, "k1", ["label 7", "5 classes"]),
        (table(label=ids([3, 1, 3], [1], [2])), "multi", {}, "k0", ["class 3 twice"]),
        (table(label=ids([0], None, [2])), "multi", {}, "k1", ["missing"]),
        (table(label=pa.array([[0], [1, None], []], IDS)), "multi", {}, "k1", ["null"]),
        (soft_table([[1.0], [0.5, -0.5], [1.0]]), "soft", {}, "k1", ["-0.5"]),
        (soft_table([[1.0], [0.5, float("nan")], [1.0]]), "soft", {}, "k1", ["nan"]),
        (soft_table([[1.0], [0.5], [1.0]]), "soft", {}, "k1", ["2 class", "1 weight"]),
        (soft_table([[1.0], [0.5, 0.5], [0.0]]), "soft", {}, "k2", ["above 0"]),
        (table(label=ids([1], [2]), label_negative=ids([0], [3, 2])), "partial", {}, "k1", ["class 2", "negative"]),
        (table(label=ids([1], [2]), label_negative=ids([9], [3])), "partial", {}, "k0", ["label_negative 9"]),
        (table(label=ids([1], [0, 1, 2, 3, 4])), "complementary", {}, "k1", ["none is left"]),
        (table(label=pa.array([[1.0], [1.0, 2.0]], REALS)), "continuous", {"dim": 1}, "k1", ["2 value", "have 1"]),
        (table(label=pa.array([[1.0], [float("inf")]], REALS)), "continuous", {"dim": 1}, "k1", ["inf"]),
    ],
)
def test_checks_name_sample_value_and_range(wrong, form, sizes, key, words):
    with pytest.raises(LabelError) as caught:
        check_labels(wrong, spec(form, **sizes), "shard-7.tar")
    message = str(caught.value)
    assert message.startswith("shard-7.tar: ")
    assert caught.value.key == key
    assert all(word in message for word in [repr(key), *words]), message


def test_checks_name_rows_on_request_and_missing_or_mistyped_columns():
    with pytest.raises(DataError, match="row 12: label 9"):
        check_labels(pa.table({"label": [0, 1, 9]}), spec("single"), "x.csv", first_row=10)
    with pytest.raises(DataError, match="label_weight"):
        check_labels(table(label=ids([1])), spec("soft"), "x")
    with pytest.raises(DataError, match="string"):
        check_labels(table(label=pa.array(["cat"])), spec("single"), "x")
    check_labels(table(label=pa.array([1, 2], pa.int16())), spec("single"), "x")  # castable is fine


def test_a_million_rows_are_checked_fast():
    import time

    rows = 1_000_000
    offsets = np.arange(0, 3 * rows + 1, 3).astype(np.int32)
    values = (np.arange(3 * rows) % 3 + (np.arange(3 * rows) // 3) % 999_000).astype(np.int64)
    big = pa.table({"label": pa.ListArray.from_arrays(offsets, values)})
    began = time.process_time()
    check_labels(big, spec("multi", num_classes=rows), "x")
    assert count_labels(big, spec("multi", num_classes=rows)).sum() == 3 * rows
    assert time.process_time() - began < 3


def test_counts():
    assert count_labels(table(label=pa.array([1, 1, 4])), spec("single")).tolist() == [0, 2, 0, 0, 1]
    assert count_labels(table(label=ids([1, 2], [2])), spec("multi")).tolist() == [0, 1, 2, 0, 0]
    assert count_labels(soft_table([[1.0], [0.0, 0.5], [1.0]]), spec("soft")).tolist() == [1, 0, 1, 1, 0]
    with pytest.raises(DataError, match="none"):
        count_labels(pa.table({"key": ["a"]}), LabelSpec(form="none"))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(0, 9), unique=True, max_size=6), max_size=20))
def test_padding_keeps_every_id(rows):
    labels = labels_from_table(
        table(label=ids(*rows)) if rows else pa.table({"label": ids()}), spec("multi", num_classes=10)
    )
    assert [[i for i in row if i >= 0] for row in labels.ids_BP.tolist()] == rows


@settings(max_examples=80, deadline=None)
@given(st.lists(st.lists(st.integers(-2, 6), max_size=5), min_size=1, max_size=12))
def test_check_agrees_with_a_plain_loop(rows):
    bad = [i for i, row in enumerate(rows) if any(not 0 <= x < 5 for x in row)]
    twice = [i for i, row in enumerate(rows) if len(set(row)) < len(row)]
    first = bad[0] if bad else twice[0] if twice else None
    if first is None:
        check_labels(table(label=ids(*rows)), spec("multi"), "x")
        return
    with pytest.raises(LabelError) as caught:
        check_labels(table(label=ids(*rows)), spec("multi"), "x")
    assert caught.value.key == f"k{first}"
