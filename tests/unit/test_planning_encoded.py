"""The formula for a step with all labels as negatives; `ci/bench/extreme_scale.py` holds it against measured peaks."""

from __future__ import annotations

from dataclasses import replace

import pytest

from labelmill.planning.encoded import EncodedSetup, encoded_memory


def test_parts_grow_with_what_they_hold() -> None:
    setup = EncodedSetup(1_000_000, 2, 64, 256, 2_000_000, 104.0, 1536.0, chunk=8192)
    parts = encoded_memory(setup)
    assert parts["label rows"] == parts["gradient of label rows"] == 500_000 * 64 * 4
    assert parts["kept scores"] == 256 * 500_000 * 4 < 512 * 2**20
    assert encoded_memory(replace(setup, batch=1024))["kept scores"] == 512 * 2**20, "no more than there is room for"
    assert parts["prepared labels"] == 500_000 * 104
    eight = encoded_memory(replace(setup, ranks=8))
    assert eight["label rows"] == pytest.approx(parts["label rows"] / 4)
    assert eight["label texts"] == parts["label texts"], "every rank has all texts"
    assert encoded_memory(replace(setup, chunk=4096))["activations of a chunk"] == parts["activations of a chunk"] / 2
