"""A registered model behind HTTP on Ray Serve; the protocol is that of `mlflow models serve` (protocol.py).

Requests that arrive together are answered together: a large head is read once for all of them, and reading it is most of
the work. Replicas map the head's files and share their pages.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from ray import serve
from starlette.requests import Request
from starlette.responses import Response

from labelmill.errors import ClusterError, UserError
from labelmill.job import ClusterConfig, TrackingConfig
from labelmill.serving import protocol
from labelmill.serving.package import fetch_package
from labelmill.serving.together import Together
from labelmill.tracking.model import Predictor, load_model

log = logging.getLogger("labelmill")


@dataclass(frozen=True)
class ServeConfig:
    """How a model is served.

    Attributes:
        model: reference; resolved once, when the server starts.
        output, tracking: where the registry is.
        host, port: of HTTP; loopback unless told otherwise: there is no authentication.
        cluster: `workers` are replicas, with `cpus_per_worker` and `gpus_per_worker` each.
        max_batch: requests answered together.
        max_inputs: of a request.
        max_mb: of a request's body.
    """

    model: str
    output: str = "runs"
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    host: str = "127.0.0.1"
    port: int = 8000
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    max_batch: int = 32
    max_inputs: int = 1024
    max_mb: float = 64.0


class Model:
    """A replica: the model, and the queue of requests that it answers together."""

    def __init__(self, config: ServeConfig) -> None:
        import torch

        from labelmill.training.device import keep_freed_memory

        keep_freed_memory()
        torch.set_num_threads(max(1, int(config.cluster.cpus_per_worker)))
        self.config = config
        self.version, folder = fetch_package(config.tracking, config.output, config.model)
        device = "cuda" if config.cluster.gpus_per_worker else "cpu"
        self.predictor: Predictor = load_model(folder, device)
        self._together = Together(lambda queries: answer_together(self.predictor, queries), config.max_batch)

    async def __call__(self, request: Request) -> Response:
        """Routes: POST /invocations; GET /ping, /health, /model."""
        path = request.url.path.rstrip("/") or "/"
        if path == "/invocations" and request.method == "POST":
            return await self._invoke(request)
        if request.method == "GET" and path in ("/ping", "/health"):
            return Response("\n")
        if request.method == "GET" and path in ("/", "/model"):
            return Response(self._about(), media_type="application/json")
        return _refusal(404, "ENDPOINT_NOT_FOUND", f"{request.method} {path}: there are POST /invocations, GET /ping and "
                        "GET /model")  # fmt: skip

    def _about(self) -> bytes:
        spec = self.predictor.spec
        about = {"model": f"{self.version.name}/{self.version.version}", "field": spec.field, "input": spec.input,
                 "shape": spec.shape, "predictor": spec.predictor, "num_classes": spec.num_classes}  # fmt: skip
        return json.dumps(about).encode()

    async def _invoke(self, request: Request) -> Response:
        most = int(self.config.max_mb * 2**20)
        # a page in a browser may send text/plain anywhere without asking; JSON it may not
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            return _refusal(415, "BAD_REQUEST", "content-type: application/json is needed")
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > most:
                return _refusal(413, "BAD_REQUEST", f"body: more than {self.config.max_mb:g} MiB")
        try:
            query = protocol.read_request(bytes(body), self.predictor.spec, self.config.max_inputs)
            raw = await asyncio.to_thread(self.predictor.read, query.inputs)
            if not len(raw):
                return Response(protocol.write_answer([]), media_type="application/json")
            records = await self._together.ask((raw, query.k))
        except (UserError, FloatingPointError) as error:
            return _refusal(400, "BAD_REQUEST", _named(str(error)))
        return Response(await asyncio.to_thread(protocol.write_answer, records), media_type="application/json")


def _named(text: str) -> str:
    """A predictor's message, with the number of the input as a field."""
    return re.sub(r"^input (\d+)", r"inputs[\1]", text)


def _refusal(status: int, code: str, message: str) -> Response:
    return Response(protocol.write_error(code, message), status_code=status, media_type="application/json")


def answer_together(predictor: Predictor, queries: list[tuple[Any, int]]) -> list[Any]:
    """Records for each (inputs as `Predictor.read` gives them, k), or the exception that request caused."""
    answers: list[Any] = [None] * len(queries)
    # requests with another k are another question: a rule's candidates may depend on it
    groups: dict[Any, list[int]] = {}
    for i, (raw, k) in enumerate(queries):
        groups.setdefault((k, raw.shape[1:] if isinstance(raw, np.ndarray) else None), []).append(i)
    for (k, _), members in groups.items():
        try:
            found = _records(predictor, [queries[i][0] for i in members], k)
        except (UserError, FloatingPointError) as error:
            if len(members) == 1:
                answers[members[0]] = error
                continue
            found = [answer_together(predictor, [queries[i]])[0] for i in members]  # only the guilty one fails
        for i, records in zip(members, found, strict=True):
            answers[i] = records
    return answers


def _records(predictor: Predictor, parts: list[Any], k: int) -> list[list[dict[str, Any]]]:
    joined: Any = parts[0]
    if len(parts) > 1:
        joined = np.concatenate(parts) if isinstance(parts[0], np.ndarray) else list(itertools.chain(*parts))
    rows = predictor.predict(joined, k).to_pylist()
    out: list[list[dict[str, Any]]] = [[] for _ in parts]
    first = np.cumsum([0, *(len(part) for part in parts)])
    for row in rows:
        which = int(np.searchsorted(first, row["input"], side="right")) - 1
        out[which].append(row | {"input": row["input"] - int(first[which])})
    return out


# --- the server -----------------------------------------------------------------------------------------------


@contextmanager
def serving(config: ServeConfig) -> Iterator[str]:
    """Serves a model for the length of the block; gives its address.

    On a cluster of its own everything ends with the block; on one that was there before, the application does. Raises
    TrackingError for an unknown model, ClusterError when Serve can't start it.
    """
    import ray

    from labelmill.cluster import connect

    version, _ = fetch_package(config.tracking, config.output, config.model)
    pinned = f"{version.name}/{version.version}"
    name, cluster, joined = f"labelmill-{version.name}", config.cluster, ray.is_initialized()
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    if not (cluster.address or os.environ.get("RAY_ADDRESS")):
        _check_port(config)
    with connect(cluster):
        _start(config)
        deployment: Any = serve.deployment(
            Model,
            name=name,
            num_replicas=cluster.workers,
            ray_actor_options={"num_cpus": cluster.cpus_per_worker, "num_gpus": cluster.gpus_per_worker},
            max_ongoing_requests=4 * config.max_batch,
        )
        # replicas have another working directory, and the alias may move between the start of two of them
        fixed = replace(config, model=pinned, output=str(Path(config.output).resolve()))
        quiet = {"log_level": "WARNING", "enable_access_log": False}
        try:
            serve.run(deployment.bind(fixed), name=name, route_prefix="/", logging_config=quiet)
        except RuntimeError as error:
            why = str(error).strip().splitlines()[-1][:300]
            raise ClusterError(f"Ray Serve couldn't start {pinned}: {why}") from error
        try:
            yield f"http://{config.host}:{config.port}"
        finally:
            serve.delete(name)
            if joined and not cluster.address:
                serve.shutdown()


def _check_port(config: ServeConfig) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((config.host, config.port))
        except OSError as error:
            raise ClusterError(
                f"--port {config.port}: {config.host} can't be bound ({error}). Choose another."
            ) from None


def _start(config: ServeConfig) -> None:
    """Starts Serve. It has one HTTP address a cluster, and would silently keep the one that it has."""
    from ray.serve.config import HTTPOptions
    from ray.serve.context import _get_global_client

    serve.start(proxy_location="HeadOnly", http_options=HTTPOptions(host=config.host, port=config.port))
    client = _get_global_client()
    there = (client.http_config.host, client.http_config.port) if client else (config.host, config.port)
    if there != (config.host, config.port):
        raise ClusterError(
            f"this cluster already serves on {there[0]}:{there[1]}; give --host {there[0]} --port {there[1]}, or end what "
            "is served there."
        )
