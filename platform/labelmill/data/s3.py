"""The connection to S3: one configuration, one rule for retries, and errors in words that say what to mend.

Endpoint, region and credentials are what botocore finds: environment, profile (with its `endpoint_url` and
`services`), credential processes, roles. boto3 and pyarrow get the same ones. boto3 reads and writes: into a
buffer of ours it takes half the CPU of pyarrow.fs for a shard (ci/bench/store_read.py).

Clients belong to a process: they don't survive a fork, and they are never pickled, nor are secrets.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pyarrow import fs

from labelmill.data.s3_errors import BadBody, Failure, StoreError, classify, failed_before, remedy

T = TypeVar("T")
Span = tuple[int, int | None] | None

ATTEMPTS = 8
"""Attempts of a request, the first included; AWS_MAX_ATTEMPTS overrides it."""
FIRST_CONTACT_ATTEMPTS = 3
"""Attempts while the endpoint never answered: more likely its address is wrong."""
BACKOFF_S, MAX_BACKOFF_S = 0.1, 10.0
CONNECT_TIMEOUT_S = 5.0
READ_TIMEOUT_S = 30.0
"""Seconds without a byte before an attempt is given up; LABELMILL_S3_TIMEOUT_S overrides it."""

_retries: Counter[str] = Counter()
_connections: dict[tuple[Any, ...], Connection] = {}
_lock = threading.RLock()


def _after_fork() -> None:
    global _lock
    _lock = threading.RLock()  # a thread of the parent may have held it
    _connections.clear()


os.register_at_fork(after_in_child=_after_fork)


@dataclass
class Connection:
    """A client with the settings it was made from.

    Attributes:
        client: boto3 S3 client, without retries of its own.
        session: botocore session; the source of credentials.
        endpoint, region: as resolved. `custom`: the endpoint isn't AWS.
        profile: name, or None for the environment and the default profile.
        virtual: the bucket goes into the host name.
        signed: False for anonymous access.
        answered: the endpoint has answered once.
        fast: one request at a time is enough for large objects, by the last one seen.
    """

    client: Any
    session: Any
    endpoint: str
    region: str
    custom: bool
    profile: str | None
    virtual: bool
    signed: bool
    answered: bool = False
    fast: bool = False
    _arrow: dict[tuple[Any, ...], fs.S3FileSystem] = field(default_factory=dict)

    def frozen_credentials(self) -> tuple[str | None, str | None, str | None]:
        """Access key, secret and token, refreshed if they were about to expire."""
        found = self.session.get_credentials() if self.signed else None
        if found is None:
            return None, None, None
        frozen = found.get_frozen_credentials()
        return frozen.access_key, frozen.secret_key, frozen.token

    @property
    def source(self) -> str:
        """Where the credentials come from, in words."""
        if self.signed and (found := self.session.get_credentials()) is not None:
            if found.method == "env":
                return "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY of the environment"
            return f"profile {self.profile or 'default'!r} ({found.method})"
        return f"profile {self.profile!r}" if self.profile else "the environment"


def split(uri: str) -> tuple[str, str]:
    """Bucket and key of an `s3://` URI. Raises StoreError without a bucket."""
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    if not bucket:
        raise StoreError(f"{uri}: no bucket in this address; write s3://BUCKET/FOLDER.")
    return bucket, key


def retries() -> dict[str, int]:
    """Requests of this process that were made again, by reason: slow-down, server, cut, timeout, connection,
    wrong-range, changed, checksum, answer, expired."""
    with _lock:
        return dict(_retries)


def count_retry(reason: str) -> None:
    """Adds to `retries()`."""
    with _lock:
        _retries[reason] += 1


def read_timeout() -> float:
    """Seconds without a byte before an attempt is given up."""
    return _number("LABELMILL_S3_TIMEOUT_S", READ_TIMEOUT_S)


def _number(name: str, default: float) -> float:
    text = os.environ.get(name)
    try:
        value = float(text) if text else default
    except ValueError:
        value = -1
    if value <= 0:
        raise StoreError(f"{name}={text}: write a number above 0.")
    return value


# --- connecting ----------------------------------------------------------------------------------------


def connect() -> Connection:
    """The connection that the environment of now describes; made once, then kept.

    Raises StoreError for a profile or an endpoint that can't be used.
    """
    settings = tuple((k, v) for k, v in os.environ.items() if k.startswith(("AWS_", "LABELMILL_S3_")))
    key = (os.getpid(), settings)
    with _lock:
        if key not in _connections:
            if len(_connections) >= 8:
                _connections.pop(next(iter(_connections)))
            _connections[key] = _make()
        return _connections[key]


def forget(connection: Connection) -> None:
    """The next `connect` reads the credentials again."""
    with _lock:
        for key in [k for k, v in _connections.items() if v is connection]:
            del _connections[key]


def _make() -> Connection:
    try:
        import boto3
    except ImportError:
        raise StoreError("s3:// needs the package boto3: pip install boto3") from None
    from botocore import UNSIGNED
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError

    signed = os.environ.get("AWS_NO_SIGN_REQUEST", "").lower() not in ("1", "yes", "true")
    timeout = read_timeout()
    try:
        session = boto3.session.Session()
        scoped = session._session.get_scoped_config().get("s3")
        style = scoped.get("addressing_style") if isinstance(scoped, dict) else None
        region = os.environ.get("AWS_REGION") or session.region_name or "us-east-1"

        def client(style: str | None) -> Any:
            return session.client(
                "s3",
                region_name=region,
                config=Config(
                    signature_version="s3v4" if signed else UNSIGNED,
                    retries={"total_max_attempts": 1},  # attempts() retries, and counts
                    connect_timeout=min(CONNECT_TIMEOUT_S, timeout),
                    read_timeout=timeout,
                    max_pool_connections=32,
                    tcp_keepalive=True,
                    s3={"addressing_style": style or "auto"},
                    # checksums in trailers are stored as data by some gateways; uploads are verified another way
                    request_checksum_calculation="when_required",
                    response_checksum_validation="when_required",
                    user_agent_extra="labelmill",
                ),
            )

        made = client(style)
        endpoint = made.meta.endpoint_url
        custom = not _is_aws(endpoint)
        if custom and style is None:
            made = client("path")
        profile = os.environ.get("AWS_PROFILE") or os.environ.get("AWS_DEFAULT_PROFILE")
        return Connection(made, session._session, endpoint, region, custom, profile, style == "virtual", signed)
    except (BotoCoreError, ValueError) as error:
        failure = classify(error) or Failure("setting", str(error), retry=False)
        text = f"S3 can't be set up: {failure.text.rstrip('.')}. {remedy(failure, None)}"
        raise StoreError.of(text, "s3://", failure.reason) from error


def _is_aws(endpoint: str) -> bool:
    host = endpoint.partition("://")[2].partition("/")[0].partition(":")[0]
    return host.endswith((".amazonaws.com", ".amazonaws.com.cn"))


class _ArrowS3(fs.S3FileSystem):
    """pyarrow's file system; pickled it carries the bucket's name and no secret."""

    bucket = ""

    def __reduce__(self) -> Any:
        return filesystem, (self.bucket,)


def filesystem(bucket: str) -> fs.S3FileSystem:
    """pyarrow's file system with the same endpoint, region and credentials. Ask again for each use: the
    credentials in it may expire, and asking is cheap."""
    connection = connect()
    access, secret, token = connection.frozen_credentials()
    region = connection.region if connection.custom or _region_given(connection) else _region_of(bucket)
    key = (access, secret, token, region, bucket)
    if (found := connection._arrow.get(key)) is not None:
        return found
    options: dict[str, Any] = {
        "region": region,
        "request_timeout": read_timeout(),
        "connect_timeout": CONNECT_TIMEOUT_S,
    }
    if connection.custom:
        scheme, _, host = connection.endpoint.partition("://")
        options |= {"endpoint_override": host.rstrip("/"), "scheme": scheme}
        # as for boto3; pyarrow's SDK can be told by the environment only
        os.environ.setdefault("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
    if access:
        options |= {"access_key": access, "secret_key": secret, "session_token": token}
    else:
        options |= {"anonymous": True}
    if bundle := os.environ.get("AWS_CA_BUNDLE"):
        options["tls_ca_file_path"] = bundle
    made = _ArrowS3(**options, force_virtual_addressing=connection.virtual)
    made.bucket = bucket
    connection._arrow.clear()  # those with older credentials
    connection._arrow[key] = made
    return made


def _region_given(connection: Connection) -> bool:
    return bool(os.environ.get("AWS_REGION") or connection.session.get_config_variable("region"))


def _region_of(bucket: str) -> str:
    try:
        return fs.resolve_s3_region(bucket)
    except OSError:
        return "us-east-1"


# --- trying --------------------------------------------------------------------------------------------


def attempts(uri: str, doing: str, call: Callable[[Connection], T], span: Span = None) -> T:
    """`call(connection)`, made again after failures that may pass.

    Args:
        uri: what it is about, for the message.
        doing: "read", "written", ...: also for the message.
        call: makes one whole request; nothing of a failed one is used.
        span: bytes [start, stop) asked for, for the message; stop None: to the end.

    Raises StoreError: at once for what no repetition mends (keys, permissions, missing things), else after the
    last attempt.
    """
    failures: Counter[str] = Counter()
    while True:
        connection = connect()
        try:
            result = call(connection)
            connection.answered = True
            return result
        except StoreError:
            raise
        except BaseException as error:
            failure = classify(error)
            if failure is None:
                raise
            connection.answered = connection.answered or failure.answered
            failures[failure.reason] += 1
            if not _again(connection, failure, failures):
                raise _final(uri, doing, span, connection, failure, failures) from error
            count_retry(failure.reason)
            _pause(failures.total(), failure)


def _again(connection: Connection, failure: Failure, failures: Counter[str]) -> bool:
    if failure.reason == "expired" and failures["expired"] == 1:
        old = connection.frozen_credentials()  # someone may have renewed them in the files
        forget(connection)
        return connect().frozen_credentials() != old
    most = int(_number("AWS_MAX_ATTEMPTS", ATTEMPTS))
    if not connection.answered:
        most = min(most, FIRST_CONTACT_ATTEMPTS)
    return failure.retry and failures.total() < most


def _pause(attempt: int, failure: Failure) -> None:
    limit = min(MAX_BACKOFF_S, BACKOFF_S * 2 ** (attempt - 1))
    time.sleep(max(limit * random.uniform(0.5, 1.0), failure.wait_s))


def _final(
    uri: str,
    doing: str,
    span: Span,
    connection: Connection,
    failure: Failure,
    failures: Counter[str],
) -> StoreError:
    what = f"can't be {doing}"
    if span and failure.reason not in ("missing", "no-bucket", "no-credentials", "key", "secret"):
        what = f"bytes {span[0]:,} to {'the end' if span[1] is None else format(span[1], ',')} {what}"
    tries = failures.total()
    text = f"{uri}: {what}: {failure.text}{failed_before(failures)}. {remedy(failure, connection)}".rstrip()
    return StoreError.of(text, uri=uri, reason=failure.reason, attempts=tries, span=span)


__all__ = [
    "BadBody",
    "Connection",
    "StoreError",
    "attempts",
    "connect",
    "count_retry",
    "filesystem",
    "read_timeout",
    "retries",
    "split",
]
