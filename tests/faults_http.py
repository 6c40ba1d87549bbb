"""The HTTP side of tests/faults.py: S3's requests answered from memory, with the faults of its rules."""

from __future__ import annotations

import hashlib
import re
import socket
import struct
import time
from dataclasses import dataclass
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit
from xml.etree import ElementTree
from xml.sax.saxutils import escape

ERRORS = {  # fault: (status, code)
    "500": (500, "InternalError"),
    "502": (502, "BadGateway"),
    "503": (503, "SlowDown"),
    "expired": (400, "ExpiredToken"),
    "denied": (403, "AccessDenied"),
    "missing": (404, "NoSuchKey"),
    "unimplemented": (501, "NotImplemented"),
}
BODIES = ("cut", "reset", "stall", "slow", "truncated", "range-ignored", "range-shifted", "flip", "shifted")
"""Faults of a GET that begins well:
cut: the connection closes after `after` bytes          reset: the same with a TCP reset
stall: nothing more for `seconds` after `after` bytes   slow: `seconds` pass between pieces of 1 KiB
truncated: an object of `after` bytes, honestly headed  range-ignored: the whole object with status 200
range-shifted: another range, honestly headed           shifted: the same under the headers of the right range
flip: one wrong bit in the middle
"""
_CHUNK = 1 << 20


@dataclass
class Request:
    """A request as logged. GETs of objects have the range asked for: [start, stop)."""

    method: str
    path: str
    headers: dict[str, str]
    start: int = 0
    stop: int = 0
    status: int = 0
    fault: str | None = None
    sent: int = 0


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server_state: Any  # the FaultServer

    def log_message(self, *args: Any) -> None:
        pass

    def handle(self) -> None:
        try:
            super().handle()
        except (ConnectionError, TimeoutError):
            self.close_connection = True

    def _begin(self, method: str) -> tuple[Request, dict[str, str]]:
        parts = urlsplit(self.path)
        query = {k: v[0] for k, v in parse_qs(parts.query, keep_blank_values=True).items()}
        path = unquote(parts.path).strip("/")
        if method == "GET" and "/" not in path:
            method = "LIST"
        request = Request(method, path, {k.lower(): v for k, v in self.headers.items()})
        state = self.server_state
        if state.latency_s:
            time.sleep(state.latency_s)
        stored = state.objects.get(path)
        if method == "GET" and stored is not None:
            request.start, request.stop = self._asked(request, len(stored.data))
        with state.lock:
            state.log.append(request)
            rule = next(iter([r for r in state.rules if r.takes(request)]), None)  # every rule counts it
        self.rule = rule
        if rule is not None:
            request.fault = rule.fault
            if rule.call is not None:
                rule.call(request)
        return request, query

    @staticmethod
    def _asked(request: Request, size: int) -> tuple[int, int]:
        match = re.fullmatch(r"bytes=(\d*)-(\d*)", request.headers.get("range", ""))
        if match is None or match.groups() == ("", ""):
            return 0, size
        first, last = match.groups()
        if not first:
            return max(0, size - int(last)), size
        return int(first), min(size, int(last) + 1) if last else size

    def _refused(self, request: Request) -> bool:
        """Answers with the rule's error, if it is one."""
        fault = self.rule.fault if self.rule else None
        if fault == "hang-up":
            self.close_connection = True
            self._drain()
            return True
        if fault in ERRORS:
            self._drain()
            self._error(request, *ERRORS[fault])
            return True
        return False

    def _drain(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            out = b""
            while size := int(self.rfile.readline().split(b";")[0] or b"0", 16):
                out += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return out
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _answer(self, request: Request, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        request.status = status
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), "x-amz-request-id": "0", **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if request.method != "HEAD":
            self.wfile.write(body)

    def _error(self, request: Request, status: int, code: str) -> None:
        body = (
            f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>made by a rule or the request</Message></Error>"
        )
        self._answer(request, status, body.encode(), {"Content-Type": "application/xml"})

    # --- reading ---

    def do_HEAD(self) -> None:
        request, _ = self._begin("HEAD")
        if self._refused(request):
            return
        state = self.server_state
        if "/" not in request.path:
            self._answer(request, 200 if request.path in state.buckets else 404)
            return
        stored = state.objects.get(request.path)
        if stored is None:
            self._answer(request, 404)
            return
        size = len(stored.data)
        if self.rule and self.rule.fault == "truncated":
            size = size // 2 if self.rule.after is None else self.rule.after
        self._answer(request, 200, headers=_headers(stored) | {"Content-Length": str(size)})

    def do_GET(self) -> None:
        request, query = self._begin("GET")
        if self._refused(request):
            return
        state = self.server_state
        if request.path.partition("/")[0] not in state.buckets:
            self._error(request, 404, "NoSuchBucket")
        elif request.method == "LIST":
            self._list(request, query)
        elif (stored := state.objects.get(request.path)) is None:
            self._error(request, 404, "NoSuchKey")
        elif request.headers.get("if-match", stored.etag) != stored.etag:
            self._error(request, 412, "PreconditionFailed")
        else:
            self._object(request, stored)

    def _object(self, request: Request, stored: Any) -> None:
        fault = self.rule.fault if self.rule else None
        after = self.rule.after if self.rule else None
        data = memoryview(stored.data)
        if fault == "truncated":
            data = data[: len(data) // 2 if after is None else after]
        start, stop = self._asked(request, len(data))
        ranged = "range" in request.headers and fault != "range-ignored"
        if not ranged:
            start, stop = 0, len(data)
        if ranged and start >= len(data):
            self._error(request, 416, "InvalidRange")
            return
        headers = _headers(stored) | {"Content-Length": str(stop - start)}
        shift = 512 if start + 512 < len(data) else -512
        if fault == "range-shifted":
            start, stop = max(0, start + shift), min(len(data), stop + shift)
            headers["Content-Length"] = str(stop - start)
        if ranged:
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
        body = data[start:stop]
        if fault == "shifted":
            body = memoryview(bytes(body[512:]) + bytes(body[:512]))
        if fault == "flip":
            wrong = bytearray(body)
            wrong[len(wrong) // 2] ^= 1
            body = memoryview(wrong)
        request.status = 206 if ranged else 200
        self.send_response(request.status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if after is None:
            after = len(body) // 2
        self._body(request, body, fault, max(0, len(body) + after) if after < 0 else min(after, len(body)))

    def _body(self, request: Request, body: memoryview, fault: str | None, after: int) -> None:
        state, rule = self.server_state, self.rule
        end = after if fault in ("cut", "reset", "stall") else len(body)
        piece = 1024 if fault == "slow" else 1 << 16 if state.bandwidth else _CHUNK
        for at in range(0, end, piece):
            some = body[at : min(end, at + piece)]
            self.wfile.write(some)
            request.sent += len(some)
            if state.bandwidth:
                time.sleep(len(some) / state.bandwidth)
            if fault == "slow" and rule and state.stopping.wait(rule.seconds):
                break
        if fault in ("cut", "reset", "stall"):
            self.close_connection = True
            self.wfile.flush()
        if fault == "stall" and rule:
            state.stopping.wait(rule.seconds)
        if fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()

    def _list(self, request: Request, query: dict[str, str]) -> None:
        if "location" in query:
            self._answer(request, 200, b"<LocationConstraint/>")
            return
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        most = int(query.get("max-keys", 1000))
        begin = query.get("continuation-token") or query.get("start-after", "")
        with self.server_state.lock:
            names = sorted(self.server_state.objects)
        keys = [n.partition("/")[2] for n in names if n.startswith(request.path + "/")]
        entries: dict[str, Any] = {}
        for key in keys:
            if not key.startswith(prefix):
                continue
            cut = key.find(delimiter, len(prefix)) if delimiter else -1
            name = key if cut < 0 else key[: cut + len(delimiter)]
            if name > begin:
                entries[name] = self.server_state.objects.get(f"{request.path}/{key}") if cut < 0 else None
        shown, more = list(entries.items())[:most], len(entries) > most
        out = [f"<Name>{request.path}</Name><KeyCount>{len(shown)}</KeyCount><MaxKeys>{most}</MaxKeys>"]
        out.append(f"<IsTruncated>{str(more).lower()}</IsTruncated><EncodingType>url</EncodingType>")
        if more:
            out.append(f"<NextContinuationToken>{escape(shown[-1][0])}</NextContinuationToken>")
        for name, stored in shown:
            if stored is None:
                out.append(f"<CommonPrefixes><Prefix>{quote(name)}</Prefix></CommonPrefixes>")
            else:
                out.append(
                    f"<Contents><Key>{quote(name)}</Key><Size>{len(stored.data)}</Size><ETag>{escape(stored.etag)}</ETag>"
                    "<LastModified>2020-01-01T00:00:00.000Z</LastModified></Contents>"
                )
        body = f"<?xml version='1.0'?><ListBucketResult>{''.join(out)}</ListBucketResult>"
        self._answer(request, 200, body.encode(), {"Content-Type": "application/xml"})

    # --- writing ---

    def do_PUT(self) -> None:
        request, query = self._begin("PUT")
        if self._refused(request):
            return
        state, data = self.server_state, self._drain()
        if "/" not in request.path:
            state.buckets.add(request.path)
            self._answer(request, 200)
            return
        if request.path.partition("/")[0] not in state.buckets:
            self._error(request, 404, "NoSuchBucket")
            return
        data = self._received(request, data)
        if "uploadId" in query:
            state.uploads[query["uploadId"]][int(query["partNumber"])] = data
            self._answer(request, 200, headers={"ETag": f'"{hashlib.md5(data).hexdigest()}"'})
            return
        stored = state.put(request.path, data, _meta(request))
        self._answer(request, 200, headers={"ETag": stored.etag})

    def _received(self, request: Request, data: bytes) -> bytes:
        fault = self.rule.fault if self.rule else None
        if fault == "swallow":
            return data[: len(data) // 2]
        framed = "aws-chunked" in request.headers.get("content-encoding", "")
        return _unframe(data) if framed and fault != "framing" else data

    def do_POST(self) -> None:
        request, query = self._begin("POST")
        if self._refused(request):
            return
        state, data = self.server_state, self._drain()
        bucket = request.path.partition("/")[0]
        if bucket not in state.buckets:
            self._error(request, 404, "NoSuchBucket")
        elif "uploads" in query:
            upload = f"upload-{len(state.upload_meta)}"
            state.uploads[upload], state.upload_meta[upload] = {}, _meta(request)
            body = f"<InitiateMultipartUploadResult><UploadId>{upload}</UploadId></InitiateMultipartUploadResult>"
            self._answer(request, 200, body.encode())
        elif "uploadId" in query:
            parts = [data for _, data in sorted(state.uploads.pop(query["uploadId"]).items())]
            stored = state.put(request.path, b"".join(parts), state.upload_meta[query["uploadId"]])
            md5s = b"".join(hashlib.md5(part).digest() for part in parts)
            if not state.opaque_etags:
                stored.etag = f'"{hashlib.md5(md5s).hexdigest()}-{len(parts)}"'
            body = f"<CompleteMultipartUploadResult><ETag>{escape(stored.etag)}</ETag></CompleteMultipartUploadResult>"
            self._answer(request, 200, body.encode())
        elif "delete" in query:
            keys = [e.text or "" for e in ElementTree.fromstring(data).iter() if e.tag.endswith("Key")]
            for key in keys:
                state.objects.pop(f"{bucket}/{key}", None)
            self._answer(request, 200, b"<DeleteResult/>")
        else:
            self._error(request, 501, "NotImplemented")

    def do_DELETE(self) -> None:
        request, query = self._begin("DELETE")
        if self._refused(request):
            return
        if "uploadId" in query:
            self.server_state.uploads.pop(query["uploadId"], None)
        else:
            self.server_state.objects.pop(request.path, None)
        self._answer(request, 204)


def _headers(stored: Any) -> dict[str, str]:
    meta = {f"x-amz-meta-{name}": value for name, value in stored.meta.items()}
    modified = {"Last-Modified": formatdate(1_600_000_000, usegmt=True)}
    return {"ETag": stored.etag, "Accept-Ranges": "bytes"} | modified | meta


def _meta(request: Request) -> dict[str, str]:
    return {k.removeprefix("x-amz-meta-"): v for k, v in request.headers.items() if k.startswith("x-amz-meta-")}


def _unframe(data: bytes) -> bytes:
    """The content of an aws-chunked body."""
    out, at = b"", 0
    while at < len(data):
        end = data.index(b"\r\n", at)
        size = int(data[at:end].split(b";")[0], 16)
        if not size:
            break
        out += data[end + 2 : end + 2 + size]
        at = end + 2 + size + 2
    return out
