"""Damage: what is wrong with a shard, as an error or as a list of holes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from labelmill.errors import DataError

Policy = Literal["raise", "shard", "sample"]
"""What damage does: raise stops; shard turns the whole shard into holes; sample only what can't be proved good."""

WHOLE_SHARD = -1
"""`Damage.row` of damage that concerns every row alike."""

_MEND = (
    "Copy the shard again from where it came from, or import the data set again; `labelmill data verify` "
    "checks every shard."
)


class ShardDamage(DataError):
    """A shard that isn't what the manifest says, or can't be read.

    Attributes:
        reason: what is wrong, without place and remedy.
        shard: path of the shard.
        offset: byte offset where it goes wrong, if known.
        key: first sample that can't be trusted, if known.
        found, expected: whole samples in the shard, samples by the manifest.
    """

    reason: str = ""
    shard: str = ""
    offset: int | None = None
    key: str | None = None
    found: int | None = None
    expected: int | None = None

    @classmethod
    def of(
        cls,
        shard: str,
        reason: str,
        offset: int | None = None,
        key: str | None = None,
        found: int | None = None,
        expected: int | None = None,
    ) -> ShardDamage:
        """Builds the message. (Not the constructor: exceptions travel between processes by their message.)"""
        text = f"{shard}: {reason}"
        text += f" at byte {offset}" if offset is not None else ""
        if found is not None:
            text += f"; {found} whole samples found" + (f", {expected} expected" if expected is not None else "")
        text += f"; first sample concerned: {key!r}" if key is not None else ""
        error = cls(f"{text}. {_MEND}")
        error.reason, error.shard, error.offset, error.key = reason, shard, offset, key
        error.found, error.expected = found, expected
        return error


@dataclass(frozen=True)
class Damage:
    """One hole, or one damaged place.

    Attributes:
        shard: path of the shard.
        row: the sample's place in the shard; `WHOLE_SHARD` when every row is concerned alike.
        key: the sample's key; empty where it can't be told.
        reason: what is wrong.
        offset: byte offset in the shard, if known.
    """

    shard: str
    row: int
    key: str
    reason: str
    offset: int | None
