"""An S3 server of our own that can be told to misbehave: objects in memory, path-style addresses, no signatures.

    with FaultServer() as server:
        server.put("bucket/a.tar", data)
        server.rules = [Rule("503", key="*.tar", times=2), Rule("cut", key="*.tar", first=3, after=1000)]
        ...                                  # AWS_ENDPOINT_URL=server.url, any key and secret
        assert [r.fault for r in server.log] == ["503", "503", "cut", None]

It answers GET (ranges, If-Match), HEAD, LIST v2 with paging, PUT, multipart uploads, DELETE and bulk delete.
The first rule that takes a request decides. `latency_s` and `bandwidth` (bytes/s of each connection) make it a far-away
store for benchmarks.
"""

from __future__ import annotations

import hashlib
import threading
import uuid
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatch
from http.server import ThreadingHTTPServer
from types import TracebackType
from typing import Any

from tests.faults_http import BODIES, ERRORS, Handler, Request

__all__ = ["BODIES", "ERRORS", "FaultServer", "Request", "Rule", "Stored"]


@dataclass
class Rule:
    """A fault and the requests that get it.

    Attributes:
        fault: a key of ERRORS, one of BODIES, "hang-up" (no answer at all), "framing" (a PUT is stored with its
            transfer encoding, as some gateways do), "swallow" (a PUT is acknowledged and its second half lost),
            or "call" (nothing but `call`).
        key: pattern of `bucket/key`.
        method: GET, HEAD, PUT, POST, DELETE, LIST or *.
        first, times: of the matching requests of each key (counted from 1), which ones; times None: all from there.
        overlaps: (start, stop) in bytes: only GETs that read some of it.
        after: bytes of the body before the fault; below 0: counted from its end; None: half of it.
        seconds: of a stall or between pieces.
        call: called with the request before it is answered, e.g. to replace the object.
    """

    fault: str
    key: str = "*"
    method: str = "GET"
    first: int = 1
    times: int | None = 1
    overlaps: tuple[int, int] | None = None
    after: int | None = None
    seconds: float = 30.0
    call: Callable[[Request], None] | None = None
    _seen: Counter[str] = field(default_factory=Counter, repr=False)

    def takes(self, request: Request) -> bool:
        """Whether this request is one of the rule's. Counts it."""
        if not fnmatch(request.path, self.key) or self.method not in ("*", request.method):
            return False
        if self.overlaps and not (request.start < self.overlaps[1] and request.stop > self.overlaps[0]):
            return False
        self._seen[request.path] += 1
        nth = self._seen[request.path] - self.first
        return nth >= 0 and (self.times is None or nth < self.times)


@dataclass
class Stored:
    """An object."""

    data: bytes
    etag: str
    meta: dict[str, str] = field(default_factory=dict)


class FaultServer:
    """The server, listening on loopback in threads of this process. Use as a context manager, or start / stop."""

    def __init__(self, port: int = 0) -> None:
        self.objects: dict[str, Stored] = {}
        self.buckets: set[str] = set()
        self.uploads: dict[str, dict[int, bytes]] = {}
        self.upload_meta: dict[str, dict[str, str]] = {}
        self.rules: list[Rule] = []
        self.log: list[Request] = []
        self.opaque_etags = False  # True: they say nothing of the content, as with KMS encryption
        self.latency_s = 0.0
        self.bandwidth = 0.0
        self.lock = threading.RLock()
        self.stopping = threading.Event()
        handler = type("Bound", (Handler,), {"server_state": self})
        self._http = _Server(("127.0.0.1", port), handler)
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"

    def start(self) -> FaultServer:
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def stop(self) -> None:
        self.stopping.set()
        self._http.shutdown()
        self._http.server_close()

    def __enter__(self) -> FaultServer:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def put(self, path: str, data: bytes, meta: dict[str, str] | None = None) -> Stored:
        """Stores an object at `bucket/key`."""
        with self.lock:
            self.buckets.add(path.partition("/")[0])
            etag = uuid.uuid4().hex if self.opaque_etags else hashlib.md5(data).hexdigest()
            self.objects[path] = Stored(bytes(data), f'"{etag}"', meta or {})
            return self.objects[path]

    def calm(self) -> None:
        """No faults and an empty log from here on."""
        with self.lock:
            self.rules, self.log = [], []

    def gets(self, key: str = "*") -> list[Request]:
        """The GETs of objects so far."""
        return [r for r in list(self.log) if r.method == "GET" and fnmatch(r.path, key)]


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # clients that hang up are what this is for
