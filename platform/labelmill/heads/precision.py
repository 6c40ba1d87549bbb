"""Precision of matrix products: process-wide settings of torch, changed for the head's own products only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def matmul_precision(kind: str) -> Iterator[None]:
    """Precision of what is multiplied, for the head's own products only."""
    if kind == "fp32":
        yield
        return
    backends = (torch.backends.mkldnn.matmul, torch.backends.cuda.matmul)  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend, name in zip(backends, ("bf16", "tf32"), strict=True):
            backend.fp32_precision = name
        yield
    finally:
        for backend, name in zip(backends, before, strict=True):
            backend.fp32_precision = name
