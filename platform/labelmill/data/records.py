"""Values that are small files of their own: NPY, safetensors (a dict of tensors) and Arrow tables. No pickles.

Decoding raises ValueError with a reason that fits behind "sample 'k': ".
"""

from __future__ import annotations

import io
import json
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa

_HEADER_BYTES = 8
_DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
_ARROW_FILE = b"ARROW1\0\0"


def decode_safetensors(raw: bytes | memoryview | pa.Buffer) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file by name: views of `raw`, nothing is copied.

    bfloat16, which numpy lacks, comes as a float32 copy (exact).

    Raises ValueError: cut, a header that isn't JSON, an element type that numpy lacks, a tensor whose bytes lie outside
    of the file or don't fit its shape, overlapping tensors.
    """
    view = memoryview(raw).cast("B")
    if len(view) < _HEADER_BYTES:
        raise ValueError(f"safetensors: {len(view)} bytes are too few for a header")
    length = int.from_bytes(view[:_HEADER_BYTES], "little")
    if length > len(view) - _HEADER_BYTES:
        raise ValueError(f"safetensors: cut: a header of {length} bytes in a file of {len(view)}")
    try:
        header = json.loads(bytes(view[_HEADER_BYTES : _HEADER_BYTES + length]))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"safetensors: the header isn't JSON: {error}") from None
    if not isinstance(header, dict):
        raise ValueError("safetensors: the header isn't a JSON object")
    body = view[_HEADER_BYTES + length :]
    out: dict[str, np.ndarray] = {}
    used: list[tuple[int, int]] = []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        out[name], span = _tensor(name, entry, body)
        used.append(span)
    used.sort()
    if any(a[1] > b[0] for a, b in pairwise(used)):
        raise ValueError("safetensors: two tensors overlap")
    return out


def _tensor(name: str, entry: Any, body: memoryview) -> tuple[np.ndarray, tuple[int, int]]:
    try:
        kind, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
        numbers = [*shape, start, stop]
        if not all(type(n) is int and n >= 0 for n in numbers) or not isinstance(kind, str):
            raise TypeError
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"safetensors: tensor {name!r} has no valid dtype, shape and data_offsets") from None
    dtype = np.dtype("<u2") if kind == "BF16" else _DTYPES.get(kind)
    if dtype is None:
        raise ValueError(f"safetensors: tensor {name!r} is of type {kind!r}; known: {', '.join(_DTYPES)}, BF16")
    if not start <= stop <= len(body):
        raise ValueError(f"safetensors: cut: tensor {name!r} ends at byte {stop} of {len(body)}")
    count = 1
    for n in shape:  # Python integers: a shape from a damaged header may overflow int64
        count *= n
    if count * dtype.itemsize != stop - start:
        raise ValueError(f"safetensors: tensor {name!r} of shape {shape} and type {kind} has {stop - start} bytes")
    array = np.frombuffer(body, dtype=dtype, count=count, offset=start) if count else np.empty(0, dtype=dtype)
    if kind == "BF16":
        array = (array.astype(np.uint32) << 16).view(np.float32)
    try:
        return array.reshape(shape), (start, stop)
    except (ValueError, OverflowError):  # an empty tensor may have any other dimensions
        raise ValueError(f"safetensors: tensor {name!r} has the impossible shape {shape}") from None


def decode_npy(raw: bytes | memoryview | pa.Buffer) -> np.ndarray:
    """The array of an NPY file, without pickles. Raises ValueError when it isn't one."""
    try:
        return np.load(io.BytesIO(raw), allow_pickle=False)
    except Exception as error:  # numpy parses the header as Python text: damage raises whatever a parser can
        raise ValueError(f"not readable as NPY: {error}") from None


def decode_arrow(raw: bytes | memoryview | pa.Buffer) -> pa.Table:
    """The table in an Arrow IPC stream or file, in place where it isn't compressed.

    Raises ValueError when it isn't one, or its content is inconsistent (offsets, UTF-8).
    """
    buffer = raw if isinstance(raw, pa.Buffer) else pa.py_buffer(raw)
    is_file = buffer[: len(_ARROW_FILE)].to_pybytes() == _ARROW_FILE if buffer.size >= len(_ARROW_FILE) else False
    try:
        table = (pa.ipc.open_file if is_file else pa.ipc.open_stream)(buffer).read_all()
        table.validate(full=True)
    except (pa.ArrowException, OSError, IndexError) as error:
        raise ValueError(f"Arrow: {error}") from None
    return table
