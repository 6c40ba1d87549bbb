"""The base of every config section."""

from __future__ import annotations

from typing import ClassVar

from pydantic import BaseModel, ConfigDict


class StrictModel(BaseModel):
    """A frozen config section: unknown keys are refused, defaults are validated."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, protected_namespaces=())

    changeable: ClassVar[frozenset[str]] = frozenset()
    """Fields that may change between two parts of one training run: no weight, order or file depends on them."""
