"""From tar members to samples: which bytes of a shard belong to which sample and field.

Shards as they are usually written (ustar headers, ASCII names) are scanned with numpy over all headers at once;
anything else, and everything damaged, goes through the general walk of tar.py member by member. The vectorised way
never reports damage itself: where something is unusual it gives up, so that errors come from one place.

Shape legend: M members, G samples, W longest name in bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from labelmill.data.damage import ShardDamage
from labelmill.data.tar import BLOCK, TarIndex, parse_tar

_MAGIC = int.from_bytes(b"\0ust", "little")  # bytes 256-259 of a header: end of the link name, "ustar"
_MAGIC_WORD = 64
_LANES = np.uint64(0x00FF00FF00FF00FF)
_ZERO, _SEVEN = ord("0"), ord("7")
_MAX_EXTS = 64


@dataclass(frozen=True)
class Places:
    """Where the G samples of a tar lie. In a packed shard a block of samples takes the place of a sample.

    Attributes:
        keys: string (G,).
        start, stop: int64 (G,): bytes of the sample, headers and padding included.
        members: by extension, offset and size of the sample's member, each int64 (G,); offset -1 where it has none.
        ended: whether the end-of-archive marker is there.
        end: byte offset behind the last member.
    """

    keys: pa.StringArray
    start: np.ndarray
    stop: np.ndarray
    members: dict[str, tuple[np.ndarray, np.ndarray]]
    ended: bool
    end: int

    def __len__(self) -> int:
        return len(self.keys)

    def member(self, exts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Offset and size, int64 (G,), of the first of `exts` that a sample has; offset -1 where it has none."""
        found: tuple[np.ndarray, np.ndarray] | None = None
        for ext in exts:
            if (more := self.members.get(ext)) is None:
                continue
            if found is None:
                found = more
            else:
                lacking = found[0] < 0
                found = np.where(lacking, more[0], found[0]), np.where(lacking, more[1], found[1])
        return found or (np.full(len(self), -1, dtype=np.int64), np.zeros(len(self), dtype=np.int64))

    def head(self, count: int) -> Places:
        """The first `count` samples."""
        members = {e: (o[:count], s[:count]) for e, (o, s) in self.members.items()}
        return Places(self.keys[:count], self.start[:count], self.stop[:count], members, self.ended, self.end)


def scan(data: memoryview, where: str) -> Places:
    """The samples of a tar that lies in memory as one buffer; contents are not copied.

    Raises TarDamage (see `parse_tar`), and ShardDamage where members can't be grouped (see `group_members`).
    """
    found = scan_fast(data)
    return found if found is not None else scan_slow(data, where)


def scan_slow(data: memoryview, where: str) -> Places:
    """`scan` by the general walk."""
    return places_of(parse_tar(data), where)


def places_of(index: TarIndex, where: str) -> Places:
    """The samples of a walked tar. Raises ShardDamage as `group_members`, and for a name that isn't UTF-8."""
    samples = group_members(index, where)
    count = len(samples.keys)
    members: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    start, stop = np.zeros(count, dtype=np.int64), np.zeros(count, dtype=np.int64)
    for g, by_ext in enumerate(samples.members):
        for ext, m in by_ext.items():
            if ext not in members:
                members[ext] = np.full(count, -1, dtype=np.int64), np.zeros(count, dtype=np.int64)
            members[ext][0][g], members[ext][1][g] = index.offsets[m], index.sizes[m]
        mine = list(by_ext.values())
        start[g], stop[g] = index.starts[mine[0]], _padded(index.offsets[mine[-1]] + index.sizes[mine[-1]])
    try:
        keys = pa.array(samples.keys, pa.string())
    except UnicodeEncodeError:
        g = next(g for g, key in enumerate(samples.keys) if not is_utf8(key))
        shown = samples.keys[g].encode("utf-8", "surrogateescape")
        raise ShardDamage.of(where, f"the name of sample {shown!r} isn't UTF-8", int(start[g]), None, g) from None
    return Places(keys, start, stop, members, index.ended, index.end)


def _padded(stop: int) -> int:
    return -(-stop // BLOCK) * BLOCK


def is_utf8(text: str) -> bool:
    """Whether a member's name is text; other names hold surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


# --- one by one ----------------------------------------------------------------------------------------


@dataclass
class Samples:
    """A tar's samples: `members[i]` maps extension to member number of sample `keys[i]`."""

    keys: list[str]
    members: list[dict[str, int]]


def split_name(name: str) -> tuple[str, str] | None:
    """(key, extension) of a member by WebDataset's rule: the key ends at the base name's first dot.

    None for files without an extension and hidden files, which WebDataset passes over.
    """
    base = name.rfind("/") + 1
    dot = name.find(".", base)
    return None if dot <= base else (name[:dot], name[dot + 1 :].lower())


def group_members(index: TarIndex, where: str) -> Samples:
    """Groups consecutive members of one key. Files that `split_name` refuses are passed over.

    Raises ShardDamage when a sample has two members of one extension, or its members don't follow each other.
    """
    keys: list[str] = []
    members: list[dict[str, int]] = []
    seen: set[str] = set()
    current: str | None = None
    for i, name in enumerate(index.names):
        parts = split_name(name)
        if parts is None:
            continue
        key, ext = parts
        if key != current:
            if key in seen:
                reason = f"sample {key!r} occurs twice, or its members don't follow each other"
                raise ShardDamage.of(where, reason, offset=index.offsets[i], key=key, found=len(keys) - 1)
            current = key
            seen.add(key)
            keys.append(key)
            members.append({})
        if ext in members[-1]:
            reason = f"sample {key!r} has two members of extension {ext!r}"
            raise ShardDamage.of(where, reason, offset=index.offsets[i], key=key, found=len(keys) - 1)
        members[-1][ext] = i
    return Samples(keys, members)


# --- all at once ---------------------------------------------------------------------------------------


def scan_fast(data: memoryview) -> Places | None:
    """`scan` of a usual tar with numpy; None where anything is out of the ordinary."""
    if len(data) % BLOCK or not len(data):
        return None
    blocks = np.frombuffer(data, dtype=np.uint8).reshape(-1, BLOCK)
    at = np.flatnonzero(blocks.view("<u4")[:, _MAGIC_WORD] == _MAGIC)
    if not len(at) or at[0] != 0:
        return None
    heads = blocks[at]
    size = _sizes(heads)
    if size is None or not _checksums_fit(heads):
        return None
    behind = at + 1 + -(-size // BLOCK)  # block behind each member
    if (behind[:-1] != at[1:]).any() or behind[-1] > len(blocks) or blocks[behind[-1] :].any():
        return None
    return _group(heads, at * BLOCK, size, ended=bool(behind[-1] < len(blocks)))


def _sizes(heads: np.ndarray) -> np.ndarray | None:
    """int64 (M,): sizes in the usual spelling, eleven octal digits and an end; regular files without prefix only."""
    kind = heads[:, 156]
    if not ((kind == _ZERO) | (kind == 0) | (kind == _SEVEN)).all():
        return None
    posix = heads[:, 262] == 0  # "ustar\0"; GNU's "ustar " has no prefix
    if (heads[:, 260] != ord("a")).any() or (heads[:, 261] != ord("r")).any() or (posix & (heads[:, 345] != 0)).any():
        return None
    digits = heads[:, 124:135] - np.uint8(_ZERO)  # below "0" wraps around to large values
    end = heads[:, 135]
    if (digits > 7).any() or ((end != 0) & (end != ord(" "))).any():
        return None
    return digits @ (8 ** np.arange(10, -1, -1, dtype=np.int64))


def _checksums_fit(heads: np.ndarray) -> bool:
    """Whether each header's checksum is there in the usual spelling, six octal digits, and right."""
    digits = heads[:, 148:154] - np.uint8(_ZERO)
    if (digits > 7).any() or (heads[:, 154:156] & ~np.uint8(0x20)).any():  # NUL and blank, in any order
        return False
    wanted = digits @ (8 ** np.arange(5, -1, -1, dtype=np.int64))
    words = heads.view("<u8")
    # bytes of each word summed in four 16-bit lanes: 64 words x 2 x 255 fits
    lanes = ((words & _LANES) + ((words >> np.uint64(8)) & _LANES)).sum(axis=1)
    total = lanes.view("<u2").reshape(-1, 4).sum(axis=1, dtype=np.int64)
    total += 8 * ord(" ") - heads[:, 148:156].sum(axis=1, dtype=np.int64)  # the field itself counts as blanks
    return bool((total == wanted).all())


def _group(heads: np.ndarray, header: np.ndarray, size: np.ndarray, ended: bool) -> Places | None:
    names = heads[:, :100]
    length = np.where((ends := names == 0).any(axis=1), ends.argmax(axis=1), 100)
    names = names[:, : max(1, int(length.max()))]
    column = np.arange(names.shape[1])
    inside = column < length[:, None]
    if (names >= 0x80).any() or not length.all():
        return None
    base = np.where((names == ord("/")) & inside, column + 1, 0).max(axis=1)
    dots = (names == ord(".")) & inside & (column >= base[:, None])
    dot = dots.argmax(axis=1)
    if not (dot > base).all():  # a file to pass over
        return None
    key_W = np.where(column < dot[:, None], names, 0)
    is_new = np.ones(len(names), dtype=bool)
    is_new[1:] = (key_W[1:] != key_W[:-1]).any(axis=1)
    first = np.flatnonzero(is_new)
    keys = _string_array(key_W[first][column < dot[first][:, None]], dot[first])
    if pc.count_distinct(keys).as_py() != len(keys):
        return None
    numbers = _by_extension(names, dot, length, np.cumsum(is_new) - 1, len(first))
    if numbers is None:
        return None
    offset = header + BLOCK
    stop = _ceil(offset + size)
    members = {}
    for ext, m in numbers.items():
        has = m >= 0
        members[ext] = np.where(has, offset[m], -1), np.where(has, size[m], 0)
    last = np.append(first[1:], len(names)) - 1
    return Places(keys, header[first], stop[last], members, ended, int(stop[-1]))


def _ceil(stop: np.ndarray) -> np.ndarray:
    return -(-stop // BLOCK) * BLOCK


def _string_array(content: np.ndarray, lengths: np.ndarray) -> pa.StringArray:
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(np.ascontiguousarray(content))]
    return pa.Array.from_buffers(pa.string(), len(lengths), buffers)


def _by_extension(
    names: np.ndarray, dot: np.ndarray, length: np.ndarray, sample: np.ndarray, count: int
) -> dict[str, np.ndarray] | None:
    """Number of each sample's member (G,), -1 for none, by extension.

    None when a sample has two members of one extension, or there are very many extensions.
    """
    width = int((length - dot).max()) - 1
    if width < 1:
        return {"": np.arange(count)} if count == len(names) else None
    column = dot[:, None] + 1 + np.arange(width)
    ext = np.where(column < length[:, None], np.take_along_axis(names, np.minimum(column, names.shape[1] - 1), 1), 0)
    ext = np.where((ext >= ord("A")) & (ext <= ord("Z")), ext + np.uint8(32), ext)
    if width <= 8:  # whole numbers sort faster than text
        words = np.zeros((len(ext), 8), dtype=np.uint8)
        words[:, :width] = ext
        codes = words.view("<u8").ravel()
        kinds, which = np.unique(codes, return_inverse=True)
        texts = [int(k).to_bytes(8, "little").rstrip(b"\0").decode("ascii") for k in kinds]
    else:
        found, which = np.unique(np.ascontiguousarray(ext).view(f"S{width}").ravel(), return_inverse=True)
        texts = [bytes(t).decode("ascii") for t in found]
    if len(texts) > _MAX_EXTS:
        return None
    if np.bincount(sample * len(texts) + which, minlength=1).max() > 1:
        return None
    members = np.full((len(texts), count), -1, dtype=np.int64)
    members[which, sample] = np.arange(len(names))
    return dict(zip(texts, members, strict=True))
