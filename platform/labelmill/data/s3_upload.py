"""Uploads to S3 that are looked at afterwards: size and checksum as the store has them.

Each part goes up with its MD5, which every S3 store checks or ignores (checksums in trailers, the newer way,
are stored as data by some gateways). Then the object's size and ETag are compared; where the ETag is no MD5,
as with KMS encryption, the object is read once more.
"""

from __future__ import annotations

import base64
import hashlib
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from labelmill.data import s3_objects
from labelmill.data.s3 import StoreError, attempts, split

PART = 16 << 20
_SIDE_BY_SIDE = 3
_MOST_PARTS = 10_000


class Upload:
    """A binary file to write to `uri`. `close` publishes it, whole and verified; `abort` leaves nothing.

    Args:
        uri: `s3://bucket/key`.
        sha256: hex digest of what will be written, if known; kept with the object.

    Raises StoreError. Not for use by several threads.
    """

    def __init__(self, uri: str, sha256: str | None = None) -> None:
        self.uri, (self._bucket, self._key) = uri, split(uri)
        self._meta = {"Metadata": {"sha256": sha256}} if sha256 else {}
        self._pending: list[memoryview] = []
        self._waiting = 0
        self._part_bytes = PART
        self._sent: list[tuple[int, bytes]] = []  # bytes and MD5 of each part
        self._etags: dict[int, str] = {}
        self._id: str | None = None
        self._pool: ThreadPoolExecutor | None = None
        self._running: deque[Future[None]] = deque()
        self._size = 0
        self.closed = False  # pyarrow's writers ask for it

    def write(self, data: Any) -> int:
        """Takes bytes, a buffer or a view."""
        view = memoryview(data).cast("B")
        self._pending.append(view if isinstance(data, bytes) else memoryview(bytes(view)))
        self._waiting += len(view)
        self._size += len(view)
        while self._waiting > self._part_bytes:  # something is left for the last part
            self._send_part(self._take(self._part_bytes))
        return len(view)

    def tell(self) -> int:
        """Bytes written so far."""
        return self._size

    def flush(self) -> None:
        """Nothing: parts go up when they are full."""

    def close(self) -> None:
        """Publishes the object and verifies it. Raises StoreError when the store has other bytes."""
        self.closed = True
        if self._id is None:
            etag = self._put(self._take(self._waiting))
        else:
            self._send_part(self._take(self._waiting))
            etag = self._complete()
        self._verify(etag)

    def abort(self) -> None:
        """Drops what was sent."""
        self.closed = True
        if self._pool:
            self._pool.shutdown(cancel_futures=True)
        if self._id is not None:
            with suppress(StoreError):
                self._call("given up", "abort_multipart_upload", UploadId=self._id)
            self._id = None

    def _take(self, count: int) -> bytes:
        out: list[memoryview] = []
        self._waiting -= count
        while count:
            view = self._pending[0]
            out.append(view[:count])
            if len(view) <= count:
                self._pending.pop(0)
            else:
                self._pending[0] = view[count:]
            count -= len(out[-1])
        return b"".join(out)

    def _call(self, doing: str, operation: str, **options: Any) -> Any:
        where = {"Bucket": self._bucket, "Key": self._key}
        return attempts(self.uri, doing, lambda c: getattr(c.client, operation)(**where, **options))

    def _put(self, data: bytes) -> str:
        md5 = _md5(data)
        self._sent = [(len(data), md5)]
        return self._call("written", "put_object", Body=data, ContentMD5=_base64(md5), **self._meta).get("ETag", "")

    def _send_part(self, data: bytes) -> None:
        if self._pool is None:
            self._id = self._call("written", "create_multipart_upload", **self._meta)["UploadId"]
            self._pool = ThreadPoolExecutor(_SIDE_BY_SIDE, thread_name_prefix="s3-write")
        md5 = _md5(data)
        self._sent.append((len(data), md5))
        number = len(self._sent)
        if number % 1000 == 0:  # so that 10,000 parts hold several TB
            self._part_bytes *= 2

        def send() -> None:
            options = {"UploadId": self._id, "PartNumber": number, "Body": data, "ContentMD5": _base64(md5)}
            self._etags[number] = self._call("written", "upload_part", **options)["ETag"]

        self._running.append(self._pool.submit(send))
        if len(self._running) >= _SIDE_BY_SIDE:
            self._running.popleft().result()

    def _complete(self) -> str:
        assert self._pool is not None
        while self._running:
            self._running.popleft().result()
        self._pool.shutdown()
        parts = [{"PartNumber": n, "ETag": self._etags[n]} for n in sorted(self._etags)]
        upload, self._id = self._id, None
        try:
            answer = self._call(
                "written", "complete_multipart_upload", UploadId=upload, MultipartUpload={"Parts": parts}
            )
            return answer.get("ETag", "")
        except StoreError as error:
            # a first attempt may have succeeded without its answer reaching us: the check that follows tells
            if error.reason == "missing" and error.attempts > 1:
                return ""
            self._id = upload
            raise

    def _verify(self, etag: str) -> None:
        found = s3_objects.head(self.uri)
        if found is None:
            raise self._unlike("the store took it and doesn't have it", delete=False)
        if etag and found.etag != etag:
            raise self._unlike("another writer replaced it", delete=False)
        if found.size != self._size:
            raise self._unlike(f"the store has {found.size:,} bytes, {self._size:,} were written")
        if found.etag.strip('"') in self._expected_etags():
            return
        at = 0
        for number, (size, md5) in enumerate(self._sent, 1):
            if _md5(s3_objects.read(self.uri, at, size)) != md5:
                raise self._unlike(f"the store has other bytes than were written (part {number}, from byte {at:,})")
            at += size

    def _expected_etags(self) -> set[str]:
        md5s = [md5 for _, md5 in self._sent]
        joined = f"{_md5(b''.join(md5s)).hex()}-{len(md5s)}"
        return {joined, md5s[0].hex()} if len(md5s) == 1 else {joined}

    def _unlike(self, text: str, delete: bool = True) -> StoreError:
        if delete:
            with suppress(StoreError):
                s3_objects.delete([self.uri])
        text = (
            f"{self.uri}: the upload went wrong: {text}. Check the gateway before the store: some keep the framing "
            "of chunked uploads as data; use a release that speaks the current S3 protocol."
        )
        return StoreError.of(text, self.uri, "verify")


def _md5(data: Any) -> bytes:
    return hashlib.md5(data, usedforsecurity=False).digest()


def _base64(digest: bytes) -> str:
    return base64.b64encode(digest).decode()
