"""Tar headers, read and written directly.

Python's tarfile costs more than decoding a small image, and in stream mode takes a damaged header for the end
of
the archive: samples vanish without an error. Here every header's checksum is verified, a member must lie
inside the buffer, and whether the end-of-archive marker was seen is part of the result.

Format: POSIX.1-1988 ustar and POSIX.1-2001 pax headers, GNU long names and base-256 sizes.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

BLOCK = 512
END = bytes(2 * BLOCK)
"""End-of-archive marker."""

_ZERO = bytes(BLOCK)
_REGULAR = frozenset(b"0\x007")
_KINDS = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a device",
    b"4": "a device",
    b"6": "a pipe",
    b"S": "sparse",
}


@dataclass
class TarIndex:
    """Regular files of a tar, in order.

    Attributes:
        names: member names.
        offsets: byte offset of each member's content.
        sizes: bytes of each member's content.
        starts: byte offset of each member's first header, long-name headers included.
        end: byte offset behind the last member.
        ended: whether the end-of-archive marker is there. Without it the tar may have been cut between two
            members.
    """

    names: list[str] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    end: int = 0
    ended: bool = False

    def head(self, count: int) -> TarIndex:
        """The first `count` members."""
        return TarIndex(self.names[:count], self.offsets[:count], self.sizes[:count], self.starts[:count])


class TarDamage(ValueError):
    """A tar that can't be read to its end.

    Attributes:
        reason: what is wrong.
        offset: byte offset of the header or member concerned.
        index: the whole members before it.
        name: the member concerned, where its header is whole.
    """

    def __init__(self, reason: str, offset: int, index: TarIndex, name: str = "") -> None:
        super().__init__(f"{reason} at byte {offset}")
        self.reason, self.offset, self.index, self.name = reason, offset, index, name


def parse_tar(data: memoryview) -> TarIndex:
    """Indexes the members of a tar that lies in memory as one buffer; contents are not copied.

    Directories are skipped. Raises TarDamage for a header that fails its checksum, a member that reaches past
    the end of the data, a member that is neither file nor directory, content behind the end marker, or a
    compressed file.
    """
    index = TarIndex()
    if bytes(data[:2]) == b"\x1f\x8b":
        raise TarDamage("compressed with gzip (unpack it: shards are read by position)", 0, index)
    headers: list[int] = []
    owners: list[int] = []
    problem: TarDamage | None = None
    try:
        _walk(data, index, headers, owners)
    except TarDamage as damage:
        problem = damage
    # Checksums of all headers at once. A damaged header may have led the walk astray, so the first one that
    # fails is the cause, whatever the walk stumbled over later.
    if (bad := _first_bad_checksum(data, headers)) is not None:
        raise TarDamage("damaged header (its checksum is wrong)", headers[bad], index.head(owners[bad]))
    if problem is not None:
        raise problem
    return index


def _walk(data: memoryview, index: TarIndex, headers: list[int], owners: list[int]) -> None:
    """Fills `index`; `headers` gets each header's offset, `owners` the number of members found before it."""
    names, offsets, sizes = index.names, index.offsets, index.sizes
    at, total = 0, len(data)
    long_name: str | None = None
    long_size: int | None = None

    def damage(reason: str, name: str = "", where: int | None = None) -> TarDamage:
        return TarDamage(reason, start if where is None else where, index, name)

    start = 0  # first header of the member at hand, long-name headers included
    while at < total:
        if long_name is None and long_size is None:
            start = at
        header = bytes(data[at : at + BLOCK])
        if header == _ZERO:
            _check_end(data, at, index)
            index.ended = True
            break
        if len(header) < BLOCK:
            raise damage(f"cut inside a header ({total - at} of {BLOCK} bytes)", long_name or "", at)
        headers.append(at)
        owners.append(len(names))
        try:
            size = _number(header[124:136])
        except ValueError:
            raise damage("damaged header (size isn't a number)", where=at) from None
        kind = header[156:157]
        if long_size is not None and kind not in b"xLKg":
            size = long_size
        body = at + BLOCK
        at = body + -(-size // BLOCK) * BLOCK
        if kind[0] in _REGULAR:
            name = _name(header) if long_name is None else long_name
            if body + size > total:
                raise damage(f"cut inside a member ({total - body} of {size} bytes)", name)
            names.append(name)
            offsets.append(body)
            sizes.append(size)
            index.starts.append(start)
            long_name = long_size = None
            continue
        if body + size > total:
            raise damage(f"cut inside a header's extension ({total - body} of {size} bytes)")
        if kind == b"L":
            long_name = _text(bytes(data[body : body + size]).rstrip(b"\0"))
        elif kind == b"x":
            try:
                records = _pax(bytes(data[body : body + size]))
                long_name = records.get("path", long_name)
                long_size = int(records["size"]) if "size" in records else long_size
            except (ValueError, IndexError):
                raise damage("damaged pax header") from None
        elif kind == b"5":
            long_name = long_size = None
        elif kind not in (b"K", b"g"):
            name = _name(header) if long_name is None else long_name
            what = _KINDS.get(kind, f"of unknown type {kind!r}")
            raise damage(f"member {name!r} is {what}, not a file (pack files themselves: tar --dereference)", name)
    index.end = min(at, total)


def _check_end(data: memoryview, at: int, index: TarIndex) -> None:
    """Zeros up to the end of the data: a header overwritten with zeros must not pass for the end marker."""
    rest = np.frombuffer(data, dtype=np.uint8)[at:]
    if rest.any():
        behind = at + int(np.argmax(rest != 0))
        raise TarDamage(
            f"end marker, but content follows from byte {behind}: damaged, or tars glued together", at, index
        )


def _first_bad_checksum(data: memoryview, headers: list[int]) -> int | None:
    if not headers:
        return None
    blocks = np.frombuffer(data, dtype=np.uint8, count=len(data) // BLOCK * BLOCK).reshape(-1, BLOCK)
    for first in range(0, len(headers), 8192):  # bounds the memory of the copies
        rows = blocks[np.array(headers[first : first + 8192]) // BLOCK]
        # the checksum field itself counts as eight spaces
        sums = rows.sum(axis=1, dtype=np.int64) - rows[:, 148:156].sum(axis=1, dtype=np.int64) + 256
        for i in np.flatnonzero(sums != _octal_checksums(rows)):
            if not checksum_is(bytes(rows[i])):
                return first + int(i)
    return None


def _octal_checksums(rows: np.ndarray) -> np.ndarray:
    """Checksums in the usual spelling, six octal digits; fields in another come out wrong or negative."""
    digits = rows[:, 148:154].astype(np.int64) - ord("0")
    value = digits @ (8 ** np.arange(5, -1, -1))
    return np.where(((digits < 0) | (digits > 7)).any(axis=1), -1, value)


def checksum_is(header: bytes) -> bool:
    """One header's checksum in any spelling; some old writers summed signed bytes."""
    try:
        wanted = _number(header[148:156])
    except ValueError:
        return False
    cells = np.frombuffer(header, dtype=np.uint8).copy()
    cells[148:156] = ord(" ")
    return wanted in (int(cells.sum()), int(cells.view(np.int8).sum()))


def _number(raw: bytes) -> int:
    """Octal text, or GNU base-256 when the top bit is set. Raises ValueError, also when negative."""
    if raw[0] & 0x80:
        if raw[0] & 0x40:
            raise ValueError("negative")
        return int.from_bytes(raw, "big") - (0x80 << 8 * (len(raw) - 1))
    text = raw.strip(b" \0")
    if text and not text.isdigit():  # int() would take signs and underscores
        raise ValueError("not octal")
    return int(text, 8) if text else 0


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogateescape")


def _name(header: bytes) -> str:
    name = header[:100].partition(b"\0")[0]
    # only the POSIX magic has a prefix field; GNU keeps times there
    if header[257:263] == b"ustar\0" and header[345]:
        name = header[345:500].partition(b"\0")[0] + b"/" + name
    return _text(name)


def _pax(raw: bytes) -> dict[str, str]:
    """Records `length key=value\\n`. Raises ValueError when one is malformed."""
    out, at = {}, 0
    while at < len(raw) and raw[at]:
        space = raw.index(b" ", at)
        length = int(raw[at:space])
        record = raw[space + 1 : at + length]
        if length <= space - at or not record.endswith(b"\n"):
            raise ValueError("malformed record")
        key, _, value = record[:-1].partition(b"=")
        out[_text(key)] = _text(value)
        at += length
    return out


# --- writing --------------------------------------------------------------------------------------------


def tar_header(name: str, size: int) -> bytes:
    """Header of a regular file, with a pax header before it where the name or the size doesn't fit ustar.

    Owner, mode and time are fixed, so that equal content gives equal bytes.
    """
    raw = name.encode()
    records = b""
    if len(raw) > 100:
        records += _pax_record(b"path", raw)
        raw = raw[:100].decode(errors="ignore").encode()
    if size >= 8**11:
        records += _pax_record(b"size", str(size).encode())
        size = 0
    header = _ustar(raw, size, b"0")
    if not records:
        return header
    return _ustar(b"pax_header", len(records), b"x") + records + padding(len(records)) + header


def padding(size: int) -> bytes:
    """Zeros up to the next block."""
    return bytes(-size % BLOCK)


def _pax_record(key: bytes, value: bytes) -> bytes:
    length = len(key) + len(value) + 3  # space, '=', newline; the number counts its own digits
    while len(str(length)) + len(key) + len(value) + 3 != length:
        length = len(str(length)) + len(key) + len(value) + 3
    return b"%d %s=%s\n" % (length, key, value)


# everything but name, size, checksum and kind is the same in each header
_OWNER = b"0000644\0" + b"0000000\0" * 2
_TIME = b"00000000000\0"
_BACK = bytes(100) + b"ustar\x0000" + bytes(247)
_FIXED_SUM = sum(_OWNER) + sum(_TIME) + sum(_BACK) + 8 * ord(" ")


def _ustar(name: bytes, size: int, kind: bytes) -> bytes:
    digits = b"%011o\0" % size
    checksum = b"%06o\0 " % (sum(name) + sum(digits) + kind[0] + _FIXED_SUM)
    return b"".join((name.ljust(100, b"\0"), _OWNER, digits, _TIME, checksum, kind, _BACK))
