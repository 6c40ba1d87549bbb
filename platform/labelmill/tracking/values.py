"""Names and values as MLflow takes them."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

MAX_KEY = 250


def safe_key(name: str) -> str:
    """A name MLflow accepts: letters, digits and `_ - . / ` and space, no empty path parts."""
    clean = re.sub(r"[^\w\-. /]", "_", str(name), flags=re.ASCII)
    parts = [part for part in clean.split("/") if part.strip(". ")]
    return ("/".join(parts) or "_")[:MAX_KEY].rstrip("/")


def safe_folder(name: str) -> str:
    """A folder name without surprises on any file system."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", name).strip(".") or "experiment"


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(`a.b.c`, leaf) of nested mappings."""
    for key, value in values.items():
        path = f"{prefix}.{key}" if prefix else str(key)
        if isinstance(value, Mapping) and value:
            yield from flatten(value, path)
        else:
            yield path, value


def as_text(value: Any) -> str:
    """A param or tag value: texts as they are, everything else as JSON."""
    if isinstance(value, str | os.PathLike):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    try:
        return json.dumps(value, default=str, ensure_ascii=False)
    except (TypeError, ValueError):
        return str(value)
