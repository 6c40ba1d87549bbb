"""The tar parser against the standard library, and against damage."""

from __future__ import annotations

import io
import tarfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from labelmill.data.damage import ShardDamage
from labelmill.data.scan import Places, scan, scan_fast, scan_slow
from labelmill.data.tar import BLOCK, END, TarDamage, TarIndex, padding, parse_tar, tar_header

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def tar_of(members: list[tuple[str, bytes]], fmt: int = tarfile.PAX_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=fmt) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


def contents(data: bytes) -> list[tuple[str, bytes]]:
    index = parse_tar(memoryview(data))
    spans = zip(index.names, index.offsets, index.sizes, strict=True)
    return [(name, data[offset : offset + size]) for name, offset, size in spans]


@pytest.mark.parametrize("fmt", list(FORMATS))
def test_reads_what_the_standard_library_writes(fmt):
    long = "d" * 90 + "/" + "f" * 60 + ".txt"  # needs the prefix, a GNU long name, or pax
    members = [("a.txt", b"1"), (long, b"x" * 513), ("empty.bin", b""), ("dir/b.cls", b"7" * 512)]
    if fmt != "ustar":
        members += [("y" * 300 + ".txt", b"long"), ("ü/ß.txt", "é".encode())]
    data = tar_of(members, FORMATS[fmt])
    assert contents(data) == members
    assert parse_tar(memoryview(data)).ended


def test_directories_are_passed_over():
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        info = tarfile.TarInfo("folder/a.txt")
        info.size = 2
        tar.addfile(info, io.BytesIO(b"hi"))
    assert contents(out.getvalue()) == [("folder/a.txt", b"hi")]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_refused(kind):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        info = tarfile.TarInfo("a.txt")
        info.type, info.linkname = kind, "b.txt"
        tar.addfile(info)
    with pytest.raises(TarDamage, match=r"'a\.txt' is a"):
        parse_tar(memoryview(out.getvalue()))


def test_base_256_sizes():
    data = bytearray(tar_of([("a.bin", b"q" * 700)]))
    data[124:136] = b"\x80" + (700).to_bytes(11, "big")
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    assert contents(bytes(data)) == [("a.bin", b"q" * 700)]


def test_compressed_tars_are_named():
    import gzip

    with pytest.raises(TarDamage, match="gzip"):
        parse_tar(memoryview(gzip.compress(tar_of([("a", b"")]))))


def test_empty_buffers_and_bare_end_markers():
    assert not parse_tar(memoryview(b"")).ended
    assert parse_tar(memoryview(END)).ended


def test_content_behind_the_end_marker_is_an_error():
    one = tar_of([("a.txt", b"1")])
    with pytest.raises(TarDamage, match="content follows"):
        parse_tar(memoryview(one + one))


def test_a_header_full_of_zeros_is_not_the_end():
    data = bytearray(tar_of([(f"{i}.txt", b"x") for i in range(4)]))
    data[2 * 1024 : 2 * 1024 + 512] = bytes(512)
    with pytest.raises(TarDamage) as caught:
        parse_tar(memoryview(data))
    assert caught.value.offset == 2048
    assert caught.value.index.names == ["0.txt", "1.txt"]


MEMBERS = [(f"{i:03d}.{ext}", bytes([i]) * (100 * i + len(ext))) for i in range(6) for ext in ("png", "cls")]
DATA = tar_of(MEMBERS, tarfile.USTAR_FORMAT)


def last_byte() -> int:
    index = parse_tar(memoryview(DATA))
    return index.offsets[-1] + index.sizes[-1]


def parse(data: bytes | bytearray) -> tuple[TarIndex, TarDamage | None]:
    """The members found, and the damage if there is any."""
    try:
        return parse_tar(memoryview(data)), None
    except TarDamage as damage:
        return damage.index, damage


@settings(max_examples=200, deadline=None)
@given(st.integers(0, len(DATA)))
def test_a_cut_is_seen_at_every_offset(cut):
    whole, _ = parse(DATA)
    found, damage = parse(DATA[:cut])
    if damage is not None:
        assert damage.offset <= cut
    else:  # at a boundary between members, or in the zeros behind the last
        assert not found.ended or cut > whole.offsets[-1] + whole.sizes[-1]
    before = [n for n, o, s in zip(whole.names, whole.offsets, whole.sizes, strict=True) if o + s <= cut]
    assert found.names in (before, before[:-1])


@settings(max_examples=200, deadline=None)
@given(st.integers(0, len(MEMBERS) - 1), st.integers(0, BLOCK - 1), st.integers(1, 255))
def test_any_changed_header_byte_is_seen(member, byte, flip):
    offset = parse(DATA)[0].offsets[member] - BLOCK
    data = bytearray(DATA)
    data[offset + byte] ^= flip
    found, damage = parse(data)
    if damage is None:  # only the spelling of the checksum changed
        assert 148 <= byte < 156
        assert found.names == [n for n, _ in MEMBERS]
        return
    assert damage.offset == offset
    assert found.names == [n for n, _ in MEMBERS[:member]]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="/"), min_size=1, max_size=180),
            st.binary(max_size=1100),
        ),
        max_size=6,
    )
)
def test_what_we_write_we_and_the_standard_library_read(members):
    data = b"".join(tar_header(n, len(c)) + c + padding(len(c)) for n, c in members) + END
    assert contents(data) == members
    with tarfile.open(fileobj=io.BytesIO(data), encoding="utf-8") as tar:
        found = [(m.name, tar.extractfile(m).read()) for m in tar.getmembers()]  # type: ignore[union-attr]
    assert found == members


def test_huge_sizes_get_a_pax_record():
    header = tar_header("big.bin", 9 * 2**30)
    info = tarfile.TarInfo.frombuf(header[1024:1536], "utf-8", "strict")
    assert b" size=9663676416\n" in header
    assert info.name == "big.bin"


# --- the vectorised scan -------------------------------------------------------------------------------


def same_places(one: Places, other: Places) -> bool:
    arrays = [(one.start, other.start), (one.stop, other.stop)]
    arrays += [pair for ext in one.members for pair in zip(one.members[ext], other.members[ext], strict=True)]
    return (
        one.keys.equals(other.keys)
        and one.members.keys() == other.members.keys()
        and all(np.array_equal(a, b) for a, b in arrays)
        and (one.ended, one.end) == (other.ended, other.end)
    )


def check_scan(data: bytes) -> bool:
    """The vectorised scan either gives up or finds what the walk finds; whether it found something."""
    fast = scan_fast(memoryview(data))
    if fast is None:
        return False
    assert same_places(fast, scan_slow(memoryview(data), "x.tar"))  # and the walk raises nothing
    return True


parts = st.text(st.sampled_from("ab01.-_/A\u00e9"), min_size=1, max_size=9)
names = st.one_of(
    parts,
    st.builds("{}/{}.{}".format, parts, parts, st.sampled_from(["png", "JPG", "cls", "left.png", "a_long_extension"])),
    st.builds("{:06d}.{}".format, st.integers(0, 5), st.sampled_from(["png", "cls", "txt", "labels.json"])),
    st.just("d" * 90 + "/" + "f" * 60 + ".txt"),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(names, st.binary(max_size=1100)), max_size=8), st.sampled_from(list(FORMATS)), st.booleans())
def test_the_vectorised_scan_is_the_walk(members, fmt, in_order):
    members = sorted(members) if in_order else members
    try:
        data = tar_of(members, FORMATS[fmt])
    except ValueError:  # ustar can't hold every name
        return
    check_scan(data)
    check_scan(data[: len(data) - 1024])
    check_scan(b"".join(tar_header(n, len(c)) + c + padding(len(c)) for n, c in members) + END)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, len(DATA) - 1), st.integers(1, 255), st.integers(0, len(DATA)), st.booleans())
def test_the_vectorised_scan_of_damage_is_the_walk(at, flip, cut, header):
    at = at // 512 * 512 + at % 160 if header else at
    check_scan(DATA[:at] + bytes([DATA[at] ^ flip]) + DATA[at + 1 :])
    check_scan(DATA[:cut])
    check_scan(DATA[: cut // 512 * 512])


@pytest.mark.parametrize("fmt", list(FORMATS))
def test_usual_tars_take_the_vectorised_way(fmt):
    assert check_scan(tar_of(MEMBERS, FORMATS[fmt]))
    assert check_scan(tar_of([("./dir.d/" + n, c) for n, c in MEMBERS], FORMATS[fmt]))
    assert check_scan(tar_of(MEMBERS, FORMATS[fmt])[: -10 * 1024])  # no end marker
    assert check_scan(b"".join(tar_header(n, len(c)) + c + padding(len(c)) for n, c in MEMBERS) + END)
    nested = tar_of([("0.tar", tar_of(MEMBERS)), ("0.cls", b"1")], FORMATS[fmt])
    assert not check_scan(nested)  # headers inside of a member: left to the walk
    assert len(scan(memoryview(nested), "x.tar")) == 1


def test_names_that_are_no_text_are_refused():
    data = bytearray(tar_of([("a.txt", b"1")], tarfile.USTAR_FORMAT))
    data[0] = 0xFF
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    with pytest.raises(ShardDamage, match="isn't UTF-8"):
        scan(memoryview(data), "x.tar")
