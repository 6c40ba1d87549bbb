"""The formula for a step with all labels as negatives; `ci/bench/extreme_scale.py` holds it against measured peaks."""

from __future__ import annotations

from dataclasses import replace

import pyarrow as pa
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from labelmill.encoders import CharNgramsConfig, build_encoder
from labelmill.heads.encoded import EncodedHead, encode_cached, encoded_head_config
from labelmill.losses.retrieval import DecoupledSection
from labelmill.planning.encoded import EncodedSetup, encoded_memory
from workloads.extreme.towers import LabelSide


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


def test_a_step_allocates_what_the_formula_says() -> None:
    """Tensors of two steps by torch's own count of its allocations, in one process."""
    labels, dim, batch, chunk = 20_000, 32, 64, 1000
    config = CharNgramsConfig(
        dim=dim, buckets=1024, orders=(3,), placed=(), gaps=(), deletions=False, hidden=dim, max_length=16
    )
    texts = pa.chunked_array([pa.array([f"label {i}" for i in range(labels)])])
    ids = torch.arange(batch)[:, None] * 7
    queries = [f"label {i}" for i in ids[:, 0].tolist()]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        encoder, loss = build_encoder(config), DecoupledSection()
        head = EncodedHead(labels, dim, loss, encoded_head_config(loss))
        side = LabelSide(texts, head.start, head.stop, chunk, 64.0)
        optimizer = torch.optim.AdamW(encoder.parameters())
        for _ in range(2):
            emb = encoder(encoder.prepare(queries))
            rows = encode_cached(encoder, lambda i: side.own(encoder, i), side.sizes, head.room_for_rows())
            head.encoded_loss(emb, rows, ids, None, torch.ones(batch)).backward()
            optimizer.step()
            optimizer.zero_grad()
    now = top = 0
    for event in seen.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            now += event.nbytes()
            top = max(top, now)
    numbers = sum(p.numel() for p in encoder.parameters())
    setup = EncodedSetup(labels, 1, dim, batch, numbers, 0.0, 10 * 4.0 * dim, chunk, cache_mb=0.0, text_bytes=0.0)
    # prepared texts are numpy's, which torch doesn't count
    assert top == pytest.approx(sum(encoded_memory(setup).values()), rel=0.15)
