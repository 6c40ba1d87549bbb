"""Objects of S3: ranges into one buffer, verified uploads, listing, deleting, links.

A read gives exactly the bytes that were asked for, of one version of the object, or raises. An attempt that
failed leaves nothing: the next one fetches its whole range again.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from labelmill.data.s3 import BadBody, Connection, StoreError, attempts, read_timeout, split

PARALLEL_FROM = 32 << 20
"""Longer reads are made of several ranges side by side, unless one connection is fast enough: to a far store one
is slow, to a near one several cost CPU for nothing (ci/bench/store_read.py)."""
PART = 16 << 20
THREADS = 4
_FAST = 200e6  # bytes/s of one connection from which it is fast enough
_WHOLE = 1 << 40  # end of a range that means: to the end
_PIECE = 1 << 18  # bytes taken from the socket at once; they stay in the cache while they are copied
_SLOWEST = 1 << 16  # bytes/s below which an attempt is given up


class _Changed(Exception):
    """Parts are of different versions of the object."""


@dataclass
class _Reply:
    """An answer whose head is right: bytes [start, stop) of an object of `total` bytes will come."""

    body: Any
    start: int
    stop: int
    total: int
    etag: str


def read(uri: str, offset: int = 0, length: int | None = None, or_less: bool = False) -> pa.Buffer:
    """Bytes [offset, offset + length) of an object, by default to its end, as one buffer.

    Args:
        uri: `s3://bucket/key`.
        offset, length: the range.
        or_less: accept a shorter object.

    Raises StoreError: see s3_errors.py; reason "truncated" when the object ends before the range does.
    """
    if length == 0:
        return pa.py_buffer(b"")
    stop = None if length is None else offset + length
    for again in (True, True, False):
        try:
            return _read(uri, offset, stop, or_less)
        except _Changed:
            if not again:
                text = f"{uri}: the object is replaced faster than it can be read."
                raise StoreError.of(text, uri, "changed", 3) from None
    raise AssertionError


def _read(uri: str, start: int, stop: int | None, or_less: bool) -> pa.Buffer:
    length = None if stop is None else stop - start

    def begin(connection: Connection) -> tuple[_Reply, int, int]:
        """The first part's answer, the length of parts, and where the read ends."""
        alone = connection.fast or (length is not None and length <= PARALLEL_FROM)
        step = length or _WHOLE if alone else PART
        reply = _open(
            connection, uri, start, start + step if stop is None else min(start + step, stop), whole=stop is None
        )
        end = reply.total if stop is None else min(stop, reply.total)
        step = max(step, reply.stop - start)
        try:
            if stop is not None and end < stop and not or_less:
                raise BadBody("truncated", f"the object has {reply.total:,} bytes only", retry=False)
            if reply.stop != min(start + step, end):
                raise _wrong(reply, start, min(start + step, end))
        except BadBody:
            _close(reply)
            raise
        return reply, step, end

    reply, step, end = attempts(uri, "read", begin, (start, stop))
    buffer = pa.allocate_buffer(end - start)
    view, etag, first = memoryview(buffer).cast("B"), reply.etag, [reply]

    def part(at: int) -> None:
        """Bytes [at, at + step) into their place, of the version that the first answer had."""

        def call(connection: Connection) -> None:
            until = min(at + step, end)
            answer = first.pop() if at == start and first else _open(connection, uri, at, until, etag)
            try:
                if answer.etag != etag:
                    raise _Changed
                if answer.stop != until:
                    raise _wrong(answer, at, until)
                _fill(connection, answer, view[at - start : until - start])
            except BaseException:
                _close(answer)
                raise

        attempts(uri, "read", call, (at, min(at + step, end)))

    if end - start <= step:
        part(start)
        return buffer
    with ThreadPoolExecutor(THREADS - 1, thread_name_prefix="s3-read") as pool:
        waiting = [pool.submit(part, at) for at in range(start + step, end, step)]
        try:
            part(start)
            for future in waiting:
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return buffer


def _open(
    connection: Connection, uri: str, start: int, stop: int, etag: str | None = None, whole: bool = False
) -> _Reply:
    """Asks for bytes [start, stop) and checks the head of the answer. It may end earlier, with the object.

    With `whole`, the whole object is as good. With `etag`, another version of the object raises _Changed.
    """
    from botocore.exceptions import ClientError

    bucket, key = split(uri)
    more = {"IfMatch": etag} if etag else {}
    try:
        answer = connection.client.get_object(Bucket=bucket, Key=key, Range=f"bytes={start}-{stop - 1}", **more)
    except ClientError as error:
        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        if status == 412:
            raise _Changed from None
        if status not in (400, 416) or error.response["Error"].get("Code") not in ("InvalidRange", "InvalidArgument"):
            raise
        # nothing at `start`; or, to some stores, a range that ends behind the object is no range
        total = connection.client.head_object(Bucket=bucket, Key=key)["ContentLength"]
        if start < total < stop:
            return _open(connection, uri, start, total, etag)
        if total >= stop:
            raise BadBody("wrong-range", f"the store says that a range of its {total:,} bytes isn't there") from None
        if start or total:
            raise BadBody("truncated", f"the object has {total:,} bytes only", retry=False) from None
        return _Reply(None, 0, 0, 0, "")
    body, length, tag = answer["Body"], answer.get("ContentLength"), answer.get("ETag", "")
    if answer["ResponseMetadata"]["HTTPStatusCode"] == 200:
        # the whole object, from a store that knows no ranges: welcome where it is what was asked for
        if start == 0 and length is not None and (whole or length <= stop):
            return _Reply(body, 0, length, length, tag)
        body.close()
        raise BadBody("wrong-range", "the store sent the whole object instead of the range")
    match = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", answer.get("ContentRange", ""))
    if match is None:
        body.close()
        raise BadBody("wrong-range", f"the answer has no usable Content-Range ({answer.get('ContentRange')})")
    first, last, total = map(int, match.groups())
    reply = _Reply(body, first, last + 1, total, tag)
    if first != start or last + 1 > stop or (length is not None and length != last + 1 - first):
        body.close()
        raise _wrong(reply, start, stop)
    return reply


def _wrong(reply: _Reply, start: int, stop: int) -> BadBody:
    return BadBody("wrong-range", f"the store sent bytes {reply.start:,} to {reply.stop:,}, not {start:,} to {stop:,}")


def _fill(connection: Connection, reply: _Reply, view: memoryview) -> None:
    """The body into `view`: all of it, within a time that grows with its length."""
    at, size, began = 0, len(view), time.monotonic()
    deadline = began + read_timeout() + size / _SLOWEST
    while at < size:
        got = reply.body.readinto(view[at : at + _PIECE])
        if not got:
            raise BadBody("cut", f"the answer ended after {at:,} of {size:,} bytes")
        at += got
        if at < size and time.monotonic() > deadline:
            raise BadBody("timeout", f"only {at:,} of {size:,} bytes came in time")
    if size >= PART // 4:
        connection.fast = size > _FAST * (time.monotonic() - began)


def _close(reply: _Reply) -> None:
    """After an error. A body that was read whole gives its connection back by itself."""
    if reply.body is not None:
        with suppress(Exception):
            reply.body.close()


# --- looking -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Head:
    """What a store says of an object. `sha256` is what its writer noted, if it did."""

    size: int
    etag: str
    sha256: str | None


def head(uri: str) -> Head | None:
    """None when there is no such object. Raises StoreError."""
    bucket, key = split(uri)
    if not key:
        return None
    try:
        answer = attempts(uri, "looked up", lambda c: c.client.head_object(Bucket=bucket, Key=key))
    except StoreError as error:
        if error.reason == "missing":
            return None
        if error.reason in ("refused", "denied", "region"):
            _explain(uri, bucket)  # answers to HEAD have no text: ask in a way that has one
        raise
    return Head(answer["ContentLength"], answer.get("ETag", ""), answer.get("Metadata", {}).get("sha256"))


def _explain(uri: str, bucket: str) -> None:
    attempts(uri, "looked up", lambda c: c.client.list_objects_v2(Bucket=bucket, MaxKeys=1))


def has_children(uri: str) -> bool:
    """Whether an object lies under `uri/`. Raises StoreError, among others for a missing bucket."""
    return next(_list(uri, True, most=1), None) is not None


def list_files(uri: str, recursive: bool = True) -> list[str]:
    """Keys of the objects under `uri/`, relative, sorted; folder markers left out."""
    return sorted(_list(uri, recursive))


def _list(uri: str, recursive: bool, most: int = 1000) -> Iterator[str]:
    bucket, key = split(uri)
    prefix = key.rstrip("/") + "/" if key else ""
    options: dict[str, Any] = {"Bucket": bucket, "Prefix": prefix, "MaxKeys": most}
    if not recursive:
        options["Delimiter"] = "/"
    while True:
        page = attempts(uri, "listed", lambda c: c.client.list_objects_v2(**options))
        for entry in page.get("Contents", []):
            if not entry["Key"].endswith("/"):
                yield entry["Key"].removeprefix(prefix)
        following = page.get("NextContinuationToken")
        if not page.get("IsTruncated") or not following or following == options.get("ContinuationToken"):
            return
        options["ContinuationToken"] = following


# --- deleting, buckets, links --------------------------------------------------------------------------


def delete(uris: Iterable[str]) -> None:
    """Removes objects, those of a bucket together where the store can. Missing ones are no error."""
    by_bucket: dict[str, list[str]] = {}
    for uri in uris:
        bucket, key = split(uri)
        by_bucket.setdefault(bucket, []).append(key)
    for bucket, keys in by_bucket.items():
        for at in range(0, len(keys), 1000):
            _delete_some(bucket, keys[at : at + 1000])


def _delete_some(bucket: str, keys: list[str]) -> None:
    left = keys
    if len(keys) > 1:
        wanted = {"Objects": [{"Key": key} for key in keys], "Quiet": True}
        try:
            answer = attempts(
                f"s3://{bucket}", "cleared", lambda c: c.client.delete_objects(Bucket=bucket, Delete=wanted)
            )
            left = [entry["Key"] for entry in answer.get("Errors", [])]
        except StoreError as error:
            # one by one, then: stores don't know the request, want another checksum, or can't sign it
            if error.reason not in ("refused", "server", "denied", "secret", "checksum"):
                raise
    for key in left:
        _delete_one(bucket, key)


def _delete_one(bucket: str, key: str) -> None:
    try:
        attempts(f"s3://{bucket}/{key}", "deleted", lambda c: c.client.delete_object(Bucket=bucket, Key=key))
    except StoreError as error:
        if error.reason != "missing":
            raise


def make_bucket(uri: str) -> None:
    """Makes the bucket of `uri`, unless it is there and ours."""
    bucket, _ = split(uri)

    def call(connection: Connection) -> None:
        options: dict[str, Any] = {"Bucket": bucket}
        if not connection.custom and connection.region != "us-east-1":
            options["CreateBucketConfiguration"] = {"LocationConstraint": connection.region}
        try:
            connection.client.create_bucket(**options)
        except connection.client.exceptions.BucketAlreadyOwnedByYou:
            return

    attempts(f"s3://{bucket}", "made", call)


def presign(uri: str, seconds: int, method: str = "get") -> str:
    """A link that reads (or, with "put", writes) the object without credentials for some time.

    Raises StoreError without credentials, or for a time that S3 doesn't allow (up to 7 days).
    """
    bucket, key = split(uri)
    if not 0 < seconds <= 7 * 86400:
        raise StoreError(f"{uri}: a link lasts 1 to {7 * 86400} seconds, not {seconds}.")
    params = {"Bucket": bucket, "Key": key}
    return attempts(
        uri, "linked", lambda c: c.client.generate_presigned_url(f"{method}_object", Params=params, ExpiresIn=seconds)
    )
