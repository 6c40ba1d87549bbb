"""Connecting to Ray: a cluster that exists, or a local one of our own; and what is free on it."""

from __future__ import annotations

import logging
import os
import secrets
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from labelmill import handover
from labelmill.errors import ClusterError
from labelmill.job import ClusterConfig

_LONGEST_TEMP = 30
_RELEASE_S = 2.0  # what a job held that has just ended is free a little later
_OURS = "LABELMILL_RAY_AUTH"  # set where RAY_AUTH_MODE is disabled by our choice

# Read when ray is imported; inherited by every Ray process.
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.3",  # the controller's poll, which ends every fit
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # training/attempt.py heeds drains; one process fewer to start
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "120",  # a busy machine imports slowly
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_DEDUP_LOGS": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "HF_HUB_OFFLINE": "1",
    "DO_NOT_TRACK": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


def set_environment() -> None:
    """Sets what Ray reads at import, without overriding what the user has set."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if "RAY_AUTH_MODE" not in os.environ:
        os.environ.pop(_OURS, None)
        if _has_token():
            os.environ["RAY_AUTH_MODE"] = "token"
        else:
            os.environ |= {"RAY_AUTH_MODE": "disabled", _OURS: "1"}


@contextmanager
def _locked() -> Iterator[None]:
    """Inside, a cluster that starts wants a token that only its own processes and this one have.

    Ray listens on all interfaces, and who can connect can run programs. A mode that the user chose stays.
    """
    if _OURS not in os.environ:
        yield
        return
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    _read_auth_mode()
    try:
        yield
    finally:
        # other programs that this process starts have nothing to do with this cluster
        os.environ["RAY_AUTH_MODE"] = "disabled"
        del os.environ["RAY_AUTH_TOKEN"]


def _read_auth_mode() -> None:
    """Ray reads mode and token once; this makes it look again."""
    import ray._raylet

    raylet: Any = ray._raylet
    raylet.AuthenticationTokenLoader.instance().reset_cache()
    raylet.Config.initialize("")


def _has_token() -> bool:
    """Whether the user has a token for Ray clusters."""
    if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"):
        return True
    return (Path.home() / ".ray" / "auth_token").is_file()


@contextmanager
def connect(cluster: ClusterConfig, log_to_driver: bool = False) -> Iterator[None]:
    """A Ray session for a run: joins the one already open in this process, else starts or joins a cluster.

    Raises ClusterError when the cluster doesn't answer or has too little free for the job's workers.
    """
    set_environment()
    import ray

    opened, submitted = not ray.is_initialized(), handover.KEY in os.environ
    if opened:
        start(cluster, log_to_driver)
    try:
        check_resources(cluster)
        yield
    finally:
        if opened:
            if not submitted:
                handover.withdraw()
            ray.shutdown()


def start(cluster: ClusterConfig, log_to_driver: bool = False) -> None:
    """`ray.init` for a job; without an address always a cluster of our own, never one that happens to run here."""
    set_environment()
    import ray

    logging.getLogger("ray").setLevel(logging.ERROR)
    address = cluster.address or os.environ.get("RAY_ADDRESS")
    if address:
        # a submitted job has its key already, and its workers read it
        values = {} if handover.KEY in os.environ else handover.collect(cluster.env)
        options: dict[str, Any] = {"runtime_env": handover.offer(values)} if values else {}
        _read_auth_mode()  # ray may have been imported before the environment was set
        try:
            ray.init(address=address, log_to_driver=log_to_driver, logging_level=logging.ERROR, **options)
            handover.publish(values)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise ClusterError(
                f"cluster.address {address!r} doesn't answer: {error}. Start the cluster, correct the address, set "
                "RAY_AUTH_TOKEN if it wants a token, or leave the address out to run on this machine."
            ) from error
        return
    # an own cluster must not grow beyond what a laptop spares: 30 % of memory is Ray's default, 2 GiB ours
    store = (cluster.object_store_mb or 1024) << 20
    options = {
        "num_cpus": os.cpu_count(),
        "include_dashboard": False,
        "log_to_driver": log_to_driver,
        "logging_level": logging.ERROR,
        "object_store_memory": store,
        # Ray puts sockets below it, and a socket's path may have 107 bytes
        "_temp_dir": "/tmp/ray" if len(tempfile.gettempdir()) > _LONGEST_TEMP else None,
    }
    with _locked():
        try:
            ray.init(address="local", **options)
        except Exception as error:
            # Ray gives its own processes 30 s, which a machine full of other work can take longer than
            if "timed out during startup" not in str(error):
                raise
            ray.shutdown()
            ray.init(address="local", **options)


def check_resources(cluster: ClusterConfig) -> None:
    """Raises ClusterError when the workers and one read task don't fit in what is free now; they would wait forever."""
    import ray

    total, free = ray.cluster_resources(), ray.available_resources()
    for kind, per_worker, extra, field in (
        ("CPU", cluster.cpus_per_worker, cluster.read_cpus, "cluster.cpus_per_worker"),
        ("GPU", cluster.gpus_per_worker, 0.0, "cluster.gpus_per_worker"),
    ):
        if not per_worker:
            continue
        counted = "min_workers" if cluster.min_workers else "workers"
        workers = cluster.min_workers or cluster.workers
        need = workers * per_worker + extra
        deadline = time.monotonic() + _RELEASE_S
        while (have := free.get(kind, 0.0)) + 1e-6 < need <= total.get(kind, 0.0) and time.monotonic() < deadline:
            time.sleep(0.1)
            free = ray.available_resources()
        if need > have + 1e-6:
            fits = max(0, int((have - extra) / per_worker + 1e-6))
            reading = f" + {extra:g} for reading" if extra else ""
            raise ClusterError(
                f"cluster.{counted}: {workers} workers x {per_worker:g} {kind}{reading} = {need:g} {kind}, but "
                f"{have:g} of {total.get(kind, 0.0):g} are free. {fits} worker(s) fit; use fewer, a smaller {field}, "
                "or a larger cluster."
            )
