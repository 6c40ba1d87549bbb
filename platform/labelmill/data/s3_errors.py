"""What went wrong at the store: which failures may pass, and what to mend for those that don't."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from typing import Any

from labelmill.errors import DataError


class StoreError(DataError):
    """A store that doesn't give or take what was asked.

    Attributes:
        uri: the object.
        reason: one word, as in `store.retries()`, or missing, no-bucket, denied, key, expired, no-credentials,
            truncated, region, verify, ...
        attempts: how often it was tried.
        span: bytes [start, stop) that were asked for; stop None: to the end.
    """

    uri: str = ""
    reason: str = ""
    attempts: int = 1
    span: tuple[int, int | None] | None = None

    @classmethod
    def of(
        cls, text: str, uri: str, reason: str, attempts: int = 1, span: tuple[int, int | None] | None = None
    ) -> StoreError:
        """Not the constructor: exceptions travel between processes by their message."""
        error = cls(text)
        error.uri, error.reason, error.attempts, error.span = uri, reason, attempts, span
        return error


class BadBody(Exception):
    """An answer that began well and isn't what was asked for."""

    def __init__(self, reason: str, text: str, retry: bool = True) -> None:
        super().__init__(text)
        self.reason, self.text, self.retry = reason, text, retry


@dataclass(frozen=True)
class Failure:
    """A failed request: one word for it, a sentence, and whether trying again may help."""

    reason: str
    text: str
    retry: bool
    answered: bool = True
    wait_s: float = 0.0


_EXPIRED = {"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "RequestExpired"}
_SLOW = {
    "SlowDown",
    "Throttling",
    "ThrottlingException",
    "TooManyRequests",
    "RequestLimitExceeded",
    "ServiceUnavailable",
}
_DENIED = {"AccessDenied", "403", "Forbidden", "AllAccessDisabled", "AccountProblem"}
_REGION = {"PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "301"}
_CHECKSUM = {"BadDigest", "InvalidDigest", "XAmzContentSHA256Mismatch", "IncompleteBody"}
_SAYS = {
    "expired": "the credentials have expired",
    "key": "the store doesn't know the access key",
    "secret": "the secret doesn't fit the access key",
    "denied": "no permission",
    "missing": "no such object",
    "no-bucket": "no such bucket",
    "clock": "the clock of this machine is off",
    "slow-down": "the store asked to slow down",
}


def classify(error: BaseException) -> Failure | None:
    """The failure behind an exception of botocore, urllib3 or the socket; None for any other."""
    if isinstance(error, BadBody):
        return Failure(error.reason, error.text, error.retry)
    from botocore import exceptions as boto
    from urllib3.exceptions import HTTPError as Urllib3Error

    if isinstance(error, boto.ClientError):
        return _refused(error)
    if isinstance(error, boto.ProfileNotFound | boto.ConfigParseError | boto.ConfigNotFound):
        return Failure("profile", _first(error), False, answered=False)
    if isinstance(error, boto.NoCredentialsError | boto.PartialCredentialsError):
        return Failure("no-credentials", _first(error), False, answered=False)
    if isinstance(
        error,
        boto.CredentialRetrievalError | boto.TokenRetrievalError | boto.SSOError | boto.MetadataRetrievalError,
    ):
        return Failure("credentials", _first(error), False, answered=False)
    if isinstance(error, boto.ParamValidationError):
        return Failure("address", _first(error), False, answered=False)
    if isinstance(error, boto.SSLError):
        return Failure("tls", _first(error), False, answered=False)
    if isinstance(error, boto.ReadTimeoutError):
        return Failure("timeout", "the store stopped sending", True)
    if isinstance(error, boto.ConnectTimeoutError | boto.EndpointConnectionError | boto.ProxyConnectionError):
        return Failure("connection", _first(error).rstrip(". "), True, answered=False)
    if type(error).__name__ == "ResponseParserError":
        return Failure("answer", "the endpoint answered with something that isn't S3's", True)
    if isinstance(error, boto.IncompleteReadError | boto.ResponseStreamingError):
        return Failure("cut", "the connection broke in the middle of the answer", True)
    if isinstance(error, boto.HTTPClientError | Urllib3Error | ConnectionError | TimeoutError):
        return Failure("connection", "the connection broke", True)
    if isinstance(error, boto.BotoCoreError):
        return Failure("setting", _first(error), False, answered=False)
    return None


def _refused(error: Any) -> Failure:
    """An answer with an error code."""
    code = str(error.response.get("Error", {}).get("Code", ""))
    said = str(error.response.get("Error", {}).get("Message", ""))
    answer = error.response.get("ResponseMetadata", {})
    status = int(answer.get("HTTPStatusCode") or 0)
    shown = f"{code}: {said}" if said and said != code else code
    if code in _EXPIRED:
        return _named("expired", shown)
    if code in ("InvalidAccessKeyId", "InvalidClientTokenId", "InvalidToken", "AuthFailure"):
        return _named("key", shown)
    if code == "SignatureDoesNotMatch":
        return _named("secret", shown)
    if code == "RequestTimeTooSkewed":
        return _named("clock", shown)
    if code == "NoSuchBucket":
        return _named("no-bucket", code)
    if code in _SLOW or status in (429, 503):
        headers = answer.get("HTTPHeaders", {})
        wait = float(headers["retry-after"]) if str(headers.get("retry-after", "")).isdigit() else 0.0
        return Failure("slow-down", f"{_SAYS['slow-down']} ({shown})", True, wait_s=min(wait, 60.0))
    if code in ("NoSuchKey", "404", "NoSuchUpload"):
        return _named("missing", code)
    if code in _REGION or status == 301:
        region = answer.get("HTTPHeaders", {}).get("x-amz-bucket-region")
        return Failure("region", f"the bucket is in another region{f', {region}' if region else ''} ({shown})", False)
    if code in _CHECKSUM:
        return Failure("checksum", f"the bytes changed on the way ({shown})", True)
    if code in ("PreconditionFailed", "412"):
        return Failure("changed", "the object was replaced while it was read", True)
    if code == "RequestTimeout":
        return Failure("timeout", "the store waited too long for bytes", True)
    if code in _DENIED or status == 403:
        return _named("denied", shown)
    if status >= 500 and status != 501:
        return Failure("server", f"the store failed ({status} {shown})", True)
    return Failure("refused", f"the store refused it ({status} {shown})", False)


def _named(reason: str, shown: str) -> Failure:
    return Failure(reason, f"{_SAYS[reason]} ({shown})", False)


def _first(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0] if len(text.splitlines()) == 1 else "; ".join(t.strip() for t in text.splitlines()[:3])


def failed_before(failures: Counter[str]) -> str:
    """` (after 8 attempts: 5 x slow-down, 3 x cut)`, or nothing for a single one."""
    if failures.total() == 1:
        return ""
    listed = ", ".join(f"{n} x {reason}" for reason, n in failures.most_common())
    return f" (after {failures.total()} attempts: {listed})"


def remedy(failure: Failure | None, connection: Any) -> str:
    """What to check or to write."""
    if failure is None:
        return ""
    source = connection.source if connection else "the environment"
    endpoint = connection.endpoint if connection else ""
    return {
        "connection": f"Is {endpoint} the right address, and does it answer? It comes from AWS_ENDPOINT_URL (or "
        "AWS_ENDPOINT_URL_S3, or endpoint_url of the profile); without it AWS is asked.",
        "answer": f"Check that {endpoint} is the S3 address of the store, not its console.",
        "timeout": "The store or the network is too slow or hangs; LABELMILL_S3_TIMEOUT_S raises the patience.",
        "cut": "Check the store's log and what lies between: proxies cut long answers.",
        "server": "Check the store's own log and health.",
        "slow-down": "Read with fewer tasks, or spread the data over more prefixes; AWS_MAX_ATTEMPTS raises the patience.",
        "wrong-range": "Something between ignores or changes byte ranges: check proxies and caches before the store.",
        "truncated": "Copy the object again from where it came from.",
        "changed": "Something writes to this object. Data sets are read-only: write a new one elsewhere.",
        "checksum": "Check the network and the memory of this machine.",
        "expired": f"They come from {source}: sign in again, or set AWS_SESSION_TOKEN with its keys anew, then "
        "start the same command again.",
        "key": f"It comes from {source}; is it one of {endpoint}?",
        "secret": f"Both come from {source}; copy the secret again, and check that {endpoint} is the store they belong to.",
        "clock": "Set the clock: signatures are valid for minutes.",
        "denied": f"The keys come from {source}. They need s3:GetObject and s3:ListBucket to read, s3:PutObject and "
        "s3:DeleteObject to write; without s3:ListBucket a missing object looks forbidden too.",
        "missing": "Check the address; was the object moved or deleted?",
        "no-bucket": f"Check the name and the endpoint ({endpoint}), or make the bucket first.",
        "region": f"Set AWS_REGION to it; now it is {connection.region if connection else 'not set'}.",
        "no-credentials": "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE; for a public bucket "
        "AWS_NO_SIGN_REQUEST=1.",
        "credentials": f"They come from {source}; sign in again, or check its credential_process.",
        "profile": f"AWS_PROFILE is {os.environ.get('AWS_PROFILE')!r}; `aws configure list-profiles` shows those there are.",
        "tls": f"If the certificate of {endpoint} isn't trusted here, set AWS_CA_BUNDLE to its authority's file; if the "
        "store speaks no TLS, write http:// in the address.",
        "address": "Write s3://BUCKET/FOLDER.",
        "setting": "Check the AWS_ variables of the environment and the profile.",
    }.get(failure.reason, "")
