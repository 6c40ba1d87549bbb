"""S3: the same face on two implementations, every fault of a third, and what a person is told."""

from __future__ import annotations

import os
import pickle
import urllib.request
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from labelmill.data import s3, s3_objects, s3_upload, store
from labelmill.errors import DataError
from tests.faults import FaultServer, Rule
from tests.s3 import Moto, use

DATA = bytes(range(256)) * 400  # 102,400 bytes, no two halves alike under shifts below 256
KEY = "data/set/a.tar"
URI = "s3://data/set/a.tar"


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reads and uploads of several parts, without the megabytes."""
    monkeypatch.setattr(s3_objects, "PART", 10_000)
    monkeypatch.setattr(s3_objects, "PARALLEL_FROM", 25_000)
    monkeypatch.setattr(s3_objects, "_FAST", float("inf"))  # however near the server is


# --- what every store must do --------------------------------------------------------------------------


def test_objects_of_every_kind_come_back(s3_store: str, small_parts: None) -> None:
    for name, content in {"empty": b"", "one": b"x", "odd name ä+%/b c.bin": DATA}.items():
        uri = f"s3://data/x/{name}"
        store.write_bytes(uri, content)
        assert store.read_bytes(uri).to_pybytes() == content
        assert store.size(uri) == len(content)
        assert store.read_head(uri, 5) == content[:5]
        assert store.exists(uri)
        assert not store.is_folder(uri)
    assert store.read_bytes(uri, 1000, 10).to_pybytes() == DATA[1000:1010]
    assert store.read_bytes(uri, 1000, 60_000).to_pybytes() == DATA[1000:61_000]
    assert store.read_bytes(uri, len(DATA) - 3).to_pybytes() == DATA[-3:]
    assert store.read_bytes(uri, 7, 0).size == 0
    assert store.list_files("s3://data/x") == ["empty", "odd name ä+%/b c.bin", "one"]
    assert store.list_files("s3://data/x", recursive=False) == ["empty", "one"]
    assert store.is_folder("s3://data/x")
    assert not store.exists("s3://data/y")
    store.delete_many([f"s3://data/x/{n}" for n in (*store.list_files("s3://data/x"), "never there")])
    assert store.list_files("s3://data") == []
    assert s3.retries().get("wrong-range") is None


def test_multipart_upload_is_verified(s3_store: str) -> None:
    content = os.urandom(1 << 20) * 17  # a part of 16 MiB and a rest
    with store.open_write("s3://data/big") as file:
        file.write(content[:5])
        file.write(memoryview(content)[5:])
        assert not store.exists("s3://data/big")
    assert store.read_bytes("s3://data/big").to_pybytes() == content

    def give_up() -> None:
        with store.open_write("s3://data/never") as file:
            file.write(content)
            raise KeyError

    with pytest.raises(KeyError):
        give_up()
    assert store.list_files("s3://data") == ["big"]


def test_listing_goes_through_pages(s3_store: str) -> None:
    names = [f"{i:03d}" for i in range(13)]
    for name in names:
        store.write_bytes(f"s3://data/p/{name}", b"x")
    assert sorted(s3_objects._list("s3://data/p", True, most=5)) == names


def test_links_and_pyarrow_use_the_same_store(s3_store: str) -> None:
    store.write_bytes("s3://data/k", b"content", sha256="ab" * 32)
    with urllib.request.urlopen(store.presign("s3://data/k", 60)) as answer:
        assert answer.read() == b"content"
    assert store.noted_sha256("s3://data/k") == ("ab" * 32 if s3_store == "moto" else None)
    system, inner = store.filesystem("s3://data/table.parquet")
    table = pa.table({"a": list(range(1000))})
    pq.write_table(table, inner, filesystem=system)
    assert pq.read_table(pa.BufferReader(store.read_bytes("s3://data/table.parquet"))).equals(table)
    content = os.urandom(1 << 20) * 11
    with system.open_output_stream("data/multipart") as stream:  # more than a part of pyarrow's
        stream.write(content)
    assert store.read_bytes("s3://data/multipart").to_pybytes() == content


# --- what a person is told -----------------------------------------------------------------------------


def _says(*words: str, uri: str = "s3://data/k") -> str:
    with pytest.raises(DataError) as caught:
        store.read_bytes(uri)
    text = str(caught.value)
    assert all(word in text for word in words), text
    assert caught.value.reason
    return text


def test_wrong_keys(moto: Moto, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use(monkeypatch, moto.url, moto.key, moto.secret)
    store.make_bucket("s3://data")
    store.write_bytes("s3://data/k", b"1")
    with moto.keys_checked():
        assert store.read_bytes("s3://data/k").to_pybytes() == b"1"
        use(monkeypatch, moto.url, "wrong", moto.secret)
        _says("doesn't know the access key", "AWS_ACCESS_KEY_ID", moto.url)
        use(monkeypatch, moto.url, moto.key, "wrong")
        _says("the secret doesn't fit", "AWS_SECRET_ACCESS_KEY")
        with pytest.raises(DataError, match="the secret doesn't fit"):  # a HEAD has no text of its own
            store.exists("s3://data/k")
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        _says("AWS_ACCESS_KEY_ID", "AWS_PROFILE")
        # everything from a profile: endpoint, region, keys
        monkeypatch.delenv("AWS_ENDPOINT_URL")
        monkeypatch.delenv("AWS_REGION")
        (tmp_path / "config").write_text(
            f"[profile lab]\nregion = us-east-1\nservices = lab\naws_access_key_id = {moto.key}\n"
            f"aws_secret_access_key = {moto.secret}\n[services lab]\ns3 =\n  endpoint_url = {moto.url}\n"
        )
        monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
        monkeypatch.setenv("AWS_PROFILE", "lab")
        assert store.read_bytes("s3://data/k").to_pybytes() == b"1"
        system, inner = store.filesystem("s3://data/k")
        assert system.open_input_file(inner).read() == b"1"
        monkeypatch.setenv("AWS_PROFILE", "lob")
        _says("lob", "list-profiles")


def test_missing_things(moto: Moto, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, moto.url)
    store.make_bucket("s3://data")
    _says("s3://data/none", "no such object", uri="s3://data/none")
    _says("no such bucket", moto.url, uri="s3://nobody/k")
    with pytest.raises(DataError, match="no such bucket"):
        store.exists("s3://nobody/k")
    with pytest.raises(DataError, match="no such bucket"):
        store.write_bytes("s3://nobody/k", b"")
    with pytest.raises(DataError, match="no bucket in this address"):
        store.read_bytes("s3:///k")
    with pytest.raises(DataError, match="only s3://"):
        store.presign("/tmp/x")


def test_unreachable_endpoints(monkeypatch: pytest.MonkeyPatch, faulty: FaultServer) -> None:
    for url in ("http://127.0.0.1:9", "http://nowhere.invalid"):
        use(monkeypatch, url)
        assert "after 3 attempts" in _says("s3://data/k", url, "AWS_ENDPOINT_URL")
    use(monkeypatch, faulty.url.replace("http", "https"))
    _says("http://", "AWS_CA_BUNDLE")
    use(monkeypatch, "nonsense")
    _says("nonsense", "AWS_")
    use(monkeypatch, faulty.url)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "many")
    faulty.rules = [Rule("500")]
    with pytest.raises(DataError, match="AWS_MAX_ATTEMPTS=many"):
        store.read_bytes("s3://data/k")


def test_expired_and_forbidden(faulty: FaultServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    faulty.put("data/k", b"1")
    faulty.rules = [Rule("expired", times=None)]
    _says("bytes 0 to the end", "have expired", "AWS_SESSION_TOKEN")
    assert len(faulty.gets()) == 1  # no repetition mends it
    faulty.rules = [Rule("denied", times=None)]
    _says("no permission", "s3:GetObject", "s3:ListBucket")
    # credentials in a file that someone renewed: read once more
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    file = tmp_path / "credentials"
    text = "[default]\naws_access_key_id = {}\naws_secret_access_key = s\naws_session_token = t\n"
    file.write_text(text.format("old"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    faulty.calm()
    faulty.rules = [Rule("expired", call=lambda request: file.write_text(text.format("new")) and None)]
    assert store.read_bytes("s3://data/k").to_pybytes() == b"1"
    used = [r.headers["authorization"] for r in faulty.gets()]
    assert "Credential=old" in used[0]
    assert "Credential=new" in used[1]


# --- faults --------------------------------------------------------------------------------------------

PASSING = {
    "500 at the start": ([Rule("500", times=2)], "server"),
    "503": ([Rule("503", times=3)], "slow-down"),
    "cut": ([Rule("cut", after=20_000, times=2)], "cut"),
    "cut at once": ([Rule("cut", after=0)], "cut"),
    "cut one byte short": ([Rule("cut", after=-1)], "cut"),
    "reset": ([Rule("reset", after=20_000)], "cut"),
    "no answer": ([Rule("hang-up")], "connection"),
    "stall": ([Rule("stall", after=20_000)], "timeout"),
    "drips": ([Rule("slow", seconds=0.1)], "timeout"),
    "other range": ([Rule("range-shifted", times=2)], "wrong-range"),
    "all of them": ([Rule(f, first=i + 1) for i, f in enumerate(("500", "cut", "503", "range-shifted"))], "cut"),
}


@pytest.mark.parametrize("name", PASSING)
@pytest.mark.parametrize("span", [(0, None), (0, len(DATA)), (512, 60_000)])
def test_faults_that_pass(name: str, span: tuple[int, int | None], faulty: FaultServer, monkeypatch) -> None:
    monkeypatch.setenv("LABELMILL_S3_TIMEOUT_S", "0.3")
    monkeypatch.setattr(s3_objects, "_SLOWEST", 1 << 20)
    monkeypatch.setattr(s3_objects, "_PIECE", 4096)
    faulty.put(KEY, DATA)
    rules, reason = PASSING[name]
    faulty.rules = [Rule(r.fault, first=r.first, times=r.times, after=r.after, seconds=r.seconds) for r in rules]
    offset, length = span
    stop = len(DATA) if length is None else offset + length
    assert store.read_bytes(URI, offset, length).to_pybytes() == DATA[offset:stop]
    assert reason in s3.retries()
    assert {(r.start, r.stop) for r in faulty.gets()} == {(offset, stop)}  # each attempt asks for the whole range


def test_faults_that_stay(faulty: FaultServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "4")
    monkeypatch.setenv("LABELMILL_S3_TIMEOUT_S", "0.2")
    faulty.put(KEY, DATA)
    for fault, words in {
        "500": "the store failed",
        "503": "slow down",
        "cut": "the answer ended|the connection broke",
        "stall": "stopped sending",
        "range-ignored": "the whole object instead of the range",
        "range-shifted": "the store sent bytes 1,012 to 2,012, not 500 to 1,500",
    }.items():
        faulty.calm()
        faulty.rules = [Rule(fault, times=None)]
        with pytest.raises(store.StoreError, match=words) as caught:
            store.read_bytes(URI, 500, 1000)
        error = caught.value
        assert f"{URI}: bytes 500 to 1,500" in str(error)
        assert "after 4 attempts" in str(error)
        assert (error.attempts, error.span, error.uri) == (4, (500, 1500), URI)
        assert str(pickle.loads(pickle.dumps(error))) == str(error)
        assert len(faulty.gets()) == 4


def test_truncated_objects_are_no_short_reads(faulty: FaultServer) -> None:
    faulty.put(KEY, DATA)
    faulty.rules = [Rule("truncated", method="*", times=None, after=1000)]
    for offset, length in ((0, len(DATA)), (500, 1000), (5000, 10)):
        with pytest.raises(store.StoreError, match="1,000 bytes only") as caught:
            store.read_bytes(URI, offset, length)
        assert caught.value.reason == "truncated"


def test_a_store_without_ranges_can_give_whole_objects(faulty: FaultServer, small_parts: None) -> None:
    faulty.put(KEY, DATA)
    faulty.rules = [Rule("range-ignored", times=None)]
    assert store.read_bytes(URI).to_pybytes() == DATA


def test_parts_side_by_side(faulty: FaultServer, small_parts: None) -> None:
    faulty.put(KEY, DATA)
    assert store.read_bytes(URI).to_pybytes() == DATA
    assert len(faulty.gets()) == 11
    assert all("if-match" in r.headers for r in faulty.gets()[1:])
    for fault in ("500", "cut", "reset", "range-shifted"):
        faulty.calm()
        faulty.rules = [Rule(fault, overlaps=(55_000, 56_000), times=2), Rule(fault, overlaps=(0, 1))]
        assert store.read_bytes(URI, 0, len(DATA)).to_pybytes() == DATA
        assert len(faulty.gets()) == 14
    faulty.rules = [Rule("500", overlaps=(55_000, 56_000), times=None)]
    with pytest.raises(DataError, match="bytes 50,000 to 60,000 can't be read"):
        store.read_bytes(URI)


def test_a_replaced_object_is_never_stitched(faulty: FaultServer, small_parts: None) -> None:
    other = bytes(reversed(DATA))
    faulty.put(KEY, DATA)
    faulty.rules = [Rule("call", first=4, call=lambda request: faulty.put(KEY, other) and None)]
    assert store.read_bytes(URI).to_pybytes() == other
    turn = iter(range(10_000))
    faulty.rules = [Rule("call", times=None, call=lambda request: faulty.put(KEY, b"%d" % next(turn) + DATA) and None)]
    with pytest.raises(DataError, match="replaced faster than it can be read"):
        store.read_bytes(URI)


# --- uploads -------------------------------------------------------------------------------------------


def test_uploads_survive_what_passes(faulty: FaultServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3_upload, "PART", 30_000)
    for method in ("PUT", "POST", "HEAD"):
        for fault in ("500", "503", "hang-up"):
            faulty.calm()
            faulty.rules = [Rule(fault, method=method, times=2)]
            store.write_bytes(URI, DATA)
            assert store.read_bytes(URI).to_pybytes() == DATA
    assert not faulty.uploads


def test_uploads_that_the_store_spoils_are_noticed(faulty: FaultServer, monkeypatch: pytest.MonkeyPatch) -> None:
    faulty.rules = [Rule("swallow", method="PUT", times=None)]
    with pytest.raises(DataError, match="the store has 51,200 bytes, 102,400 were written"):
        store.write_bytes(URI, DATA)
    monkeypatch.setattr(s3_upload, "PART", 30_000)
    with pytest.raises(DataError, match="the upload went wrong"):
        store.write_bytes(URI, DATA)
    assert not faulty.objects
    # same size, other bytes, and an ETag that says nothing
    faulty.opaque_etags = True
    faulty.rules = []
    store.write_bytes(URI, DATA)
    faulty.rules = [Rule("call", method="HEAD", times=None, call=lambda request: _spoil(faulty))]
    with pytest.raises(DataError, match="other bytes than were written"):
        store.write_bytes(URI, DATA)
    faulty.rules = [Rule("500", method="PUT", first=3, times=None)]
    with pytest.raises(DataError, match="the store failed"):
        store.write_bytes(URI, DATA)
    assert not faulty.uploads  # given up, not left to be paid for
    assert not faulty.objects


def _spoil(server: FaultServer) -> None:
    stored = server.objects[KEY]
    stored.data = stored.data[:-1] + b"!"


def test_stored_framing_is_noticed(faulty: FaultServer) -> None:
    """A gateway that keeps chunk framing can't hurt us, nor pyarrow, which is told not to use it."""
    faulty.rules = [Rule("framing", method="PUT", times=None)]
    store.write_bytes(URI, DATA)
    assert store.read_bytes(URI).to_pybytes() == DATA
    system, _ = store.filesystem(URI)
    with system.open_output_stream("data/p") as stream:
        stream.write(DATA * 120)
    assert faulty.objects["data/p"].data == DATA * 120


def test_clients_belong_to_a_process_and_carry_no_secrets(faulty: FaultServer, monkeypatch) -> None:
    faulty.put(KEY, DATA)
    store.read_bytes(URI)
    reader, writer = os.pipe()
    child = os.fork()
    if not child:  # nothing of pytest may run here
        ok = b"n"
        try:
            with s3._lock:
                ok = b"y" if not s3._connections and store.read_bytes(URI).to_pybytes() == DATA else b"n"
        finally:
            os.write(writer, ok)
            os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reader, 1) == b"y"
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-secret-to-look-for")
    system, inner = store.filesystem(URI)
    pickled = pickle.dumps(system)
    assert b"a-secret-to-look-for" not in pickled
    assert pickle.loads(pickled).open_input_file(inner).read() == DATA
