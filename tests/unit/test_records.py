"""Values that are files of their own: safetensors and Arrow, against their libraries and against damage."""

from __future__ import annotations

import json
from contextlib import suppress

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save
from safetensors.torch import save as save_torch

from labelmill.data.labels import LabelSpec
from labelmill.data.manifest import FieldSpec
from labelmill.data.records import decode_arrow, decode_npy, decode_safetensors
from labelmill.data.shards import read_shard
from labelmill.data.writer import ShardWriter

rng = np.random.default_rng(0)
TENSORS = {
    **{
        k: rng.integers(0, 100, (3, 2)).astype(k)
        for k in ("float16", "float32", "float64", "int8", "int64", "uint16", "bool")
    },
    "empty": np.zeros((0, 7), dtype=np.float32),
    "number": np.array(3.5, dtype=np.float32),
}
RAW = save(TENSORS, metadata={"made": "by hand"})
TABLE = pa.table({"a": [1, 2, None], "b": ["x", "é", ""], "c": [[1.5], [], None]})


def arrow_bytes(as_file: bool) -> bytes:
    sink = pa.BufferOutputStream()
    with (pa.ipc.new_file if as_file else pa.ipc.new_stream)(sink, TABLE.schema) as writer:
        writer.write_table(TABLE)
    return sink.getvalue().to_pybytes()


def test_safetensors_are_what_the_library_wrote():
    found = decode_safetensors(RAW)
    assert found.keys() == TENSORS.keys()
    for name, array in TENSORS.items():
        assert found[name].dtype == array.dtype
        assert found[name].shape == array.shape
        assert np.array_equal(found[name], array)
    half = torch.tensor([[1.5, -2.0, 3e38]], dtype=torch.bfloat16)
    decoded = decode_safetensors(save_torch({"half": half}))["half"]
    assert torch.equal(torch.from_numpy(decoded), half.float())


@settings(max_examples=300, deadline=None)
@given(st.integers(0, len(RAW) - 1), st.integers(1, 255), st.integers(0, len(RAW)))
def test_damaged_safetensors_decode_or_say_why(at, flip, cut):
    for raw in (RAW[:at] + bytes([RAW[at] ^ flip]) + RAW[at + 1 :], RAW[:cut]):
        with suppress(ValueError):  # and nothing else
            decode_safetensors(raw)
    if cut < len(RAW):
        with pytest.raises(ValueError, match="safetensors"):
            decode_safetensors(RAW[:cut])


def with_header(header: object, body: bytes = bytes(16)) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ([1], "isn't a JSON object"),
        ({"a": 1}, "'a' has no valid dtype"),
        ({"a": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}}, "of type 'F8_E4M3'"),
        ({"a": {"dtype": "F32", "shape": [4], "data_offsets": [4, 20]}}, "ends at byte 20 of 16"),
        ({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 16]}}, "has 16 bytes"),
        ({"a": {"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]}}, "no valid dtype"),
        ({"a": {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 0]}}, "has 0 bytes"),
        ({"a": {"dtype": "F32", "shape": [2**70, 0], "data_offsets": [0, 0]}}, "impossible shape"),
        ({n: {"dtype": "F32", "shape": [2], "data_offsets": [o, o + 8]} for n, o in (("a", 0), ("b", 4))}, "overlap"),
    ],
)
def test_wrong_safetensors_name_the_tensor(header, words):
    with pytest.raises(ValueError, match=words):
        decode_safetensors(with_header(header))


@pytest.mark.parametrize("as_file", [True, False])
def test_arrow_streams_and_files(as_file):
    raw = arrow_bytes(as_file)
    assert decode_arrow(raw).equals(TABLE)
    assert decode_arrow(pa.py_buffer(raw)).equals(TABLE)
    assert decode_arrow(memoryview(raw)).equals(TABLE)
    for wrong in (b"", b"ARROW1\0\0", raw[:40], b"{}" * 20):
        with pytest.raises(ValueError, match="Arrow: "):
            decode_arrow(wrong)


def test_npy_that_is_none():
    for raw in (b"", b"?", b"\x93NUMPY\x01\x00\x10\x00{'a\0\0\0\0\0\0\0\0\0\0\0\0"):
        with pytest.raises(ValueError, match="NPY"):
            decode_npy(raw)


@pytest.mark.parametrize("layout", ["tar", "packed"])
def test_records_are_fields_of_a_data_set(tmp_path, layout):
    fields = {
        "tensors": FieldSpec(kind="safetensors", ext="safetensors"),
        "table": FieldSpec(kind="arrow", ext="arrow"),
    }
    with ShardWriter(tmp_path / "a", "r", fields, LabelSpec(form="none"), layout) as writer:
        for i in range(3):
            writer.write(f"k{i}", {"tensors": save({"x": np.full(2, i)}), "table": arrow_bytes(False)})
    table = read_shard(writer.manifest, 0)
    assert [decode_safetensors(v.as_buffer())["x"].tolist() for v in table.column("tensors")] == [
        [i, i] for i in range(3)
    ]
    assert all(decode_arrow(v.as_buffer()).equals(TABLE) for v in table.column("table"))
