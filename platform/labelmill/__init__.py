"""labelmill: distributed streaming training where the labels are the hard part."""

from __future__ import annotations

__version__ = "0.1.0"
