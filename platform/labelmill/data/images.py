"""Image formats by name and by signature; no decoding."""

from __future__ import annotations

IMAGE_EXTS = frozenset({"png", "jpg", "jpeg", "webp", "gif", "bmp"})
"""File extensions that hold an image."""


def image_kind(head: bytes) -> str | None:
    """Extension of the format that the first bytes (12 or more) of a file show; None for anything else."""
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if head.startswith(b"\xff\xd8\xff"):
        return "jpg"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "webp"
    if head.startswith((b"GIF87a", b"GIF89a")):
        return "gif"
    return "bmp" if head.startswith(b"BM") else None
