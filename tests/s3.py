"""S3 servers for tests, as fixtures (tests/conftest.py imports them).

    moto          moto's server: the most complete one; `moto.keys_checked()` makes it refuse wrong keys
    localbucket   plain folders on disk, no bulk delete, no object metadata, ETags of its own
    s3_store      each of the two in turn, with the environment pointing at it and a bucket s3://data
    faulty        tests/faults.py, with the environment pointing at it and a bucket s3://data

All listen on loopback, in threads of the test process, and may be reached from Ray workers.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.faults import FaultServer


def use(monkeypatch: pytest.MonkeyPatch, url: str, key: str = "test-key", secret: str = "test-secret") -> None:
    """Points the environment at an S3 server."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
    monkeypatch.setenv("AWS_REGION", "us-east-1")


def no_settings() -> None:
    """Takes the user's own S3 settings out of the environment, and any look-up beyond loopback."""
    for name in [n for n in os.environ if n.startswith(("AWS_", "LABELMILL_S3_"))]:
        del os.environ[name]
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        os.environ[name] = os.devnull
    os.environ["AWS_EC2_METADATA_DISABLED"] = "true"


@dataclass
class Moto:
    """moto's server with one user who may do anything in S3."""

    url: str
    key: str
    secret: str

    @contextmanager
    def keys_checked(self) -> Iterator[None]:
        """Wrong keys and signatures are refused (presigned links too: moto can't check them)."""
        from moto import settings

        settings.INITIAL_NO_AUTH_ACTION_COUNT = 0
        try:
            yield
        finally:
            settings.INITIAL_NO_AUTH_ACTION_COUNT = float("inf")


@pytest.fixture(scope="session")
def moto() -> Iterator[Moto]:
    """See Moto. Buckets are those that tests make."""
    import boto3
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    iam = boto3.client(
        "iam", endpoint_url=url, region_name="us-east-1", aws_access_key_id="any", aws_secret_access_key="any"
    )
    iam.create_user(UserName="reader")
    allow = {"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "s3:*", "Resource": "*"}]}
    iam.put_user_policy(UserName="reader", PolicyName="all", PolicyDocument=json.dumps(allow))
    made = iam.create_access_key(UserName="reader")["AccessKey"]
    yield Moto(url, made["AccessKeyId"], made["SecretAccessKey"])
    server.stop()


@pytest.fixture
def localbucket(tmp_path: Path) -> Iterator[str]:
    """URL of a localbucket server; its buckets are folders of `tmp_path/buckets`."""
    import localbucket as package

    logging.getLogger("localbucket").setLevel(logging.ERROR)
    root = tmp_path / "buckets"
    root.mkdir()
    handler = type("Handler", (package.S3Handler,), {"data_root": root, "disable_nagle_algorithm": True})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


@pytest.fixture(params=["moto", "localbucket"])
def s3_store(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Name of the implementation. The bucket s3://data is there, and empty."""
    from labelmill.data import store

    server: Any = request.getfixturevalue(request.param)
    if isinstance(server, str):
        use(monkeypatch, server)
    else:
        use(monkeypatch, server.url, server.key, server.secret)
    store.make_bucket("s3://data")
    store.delete_many(f"s3://data/{name}" for name in store.list_files("s3://data"))
    return request.param


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultServer]:
    """A server that misbehaves on demand. Waits between attempts are short."""
    from labelmill.data import s3

    monkeypatch.setattr(s3, "BACKOFF_S", 0.005)
    monkeypatch.setattr(s3, "_retries", type(s3._retries)())
    with FaultServer() as server:
        server.buckets.add("data")
        use(monkeypatch, server.url)
        yield server
