"""How values of the caller's environment reach every process of a run on a cluster, without being written anywhere.

What Ray calls `env_vars` would do, but Ray shows them: in job details, in the dashboard, in the logs of the agent that
prepares workers. Here they lie in the memory of the cluster's control store under a random key. Processes of the job
know only the key; each reads the values when it starts (`take`, Ray's setup hook of a worker) and puts them into its own
environment. The driver deletes the key at the end (`withdraw`).
"""

from __future__ import annotations

import contextlib
import fnmatch
import json
import os
import secrets
from collections.abc import Iterable, Mapping
from typing import Any

from labelmill.errors import JobError

KEY = "LABELMILL_HANDOVER"
TAKEN = "LABELMILL_HANDOVER_TAKEN"
NAMES = "LABELMILL_HANDOVER_NAMES"
# Ray's own name for it; workers look at nothing else, and a job's description may only carry variables
HOOK = "__RAY_WORKER_PROCESS_SETUP_HOOK_ENV_VAR"
# Ray quotes the first bytes of a value that it can't store
_HEAD = b"labelmill values of the environment\n"


def collect(patterns: Iterable[str], environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """The variables that names or patterns (`AWS_*`) mean. Raises JobError for a name that isn't set."""
    environment = os.environ if environment is None else environment
    found: dict[str, str] = {}
    for pattern in patterns:
        if "*" in pattern:
            found |= {name: value for name, value in environment.items() if fnmatch.fnmatchcase(name, pattern)}
        elif pattern in environment:
            found[pattern] = environment[pattern]
        else:
            raise JobError(f"cluster.env: environment variable {pattern} is not set. Set it, or take it off the list.")
    return found


def new_key() -> str:
    """A name that nobody can guess, in the form of Ray's packages: that is what its HTTP interface stores."""
    return f"gcs://_ray_pkg_{secrets.token_hex(16)}.zip"


def pack(values: Mapping[str, str]) -> bytes:
    """Bytes for the control store."""
    return _HEAD + json.dumps(dict(values)).encode()


def variables(key: str) -> dict[str, str]:
    """What Ray may show: the name of the key and the hook that reads it."""
    return {KEY: key, HOOK: "labelmill.handover.take"}


def take() -> None:
    """Puts the values into this process's environment. Ray calls it in every worker process before its first task.

    A key that is gone is no error here, since a worker that fails so early leaves no message; `taken` tells.
    """
    key = os.environ.get(KEY)
    if not key:
        return
    import ray

    worker: Any = ray._private.worker.global_worker
    raw = worker.gcs_client.internal_kv_get(key.encode(), None)
    if raw is not None:
        values = json.loads(raw.removeprefix(_HEAD))
        os.environ.update(values)
        os.environ[TAKEN], os.environ[NAMES] = key, " ".join(values)


def taken() -> bool:
    """Whether this process, or the one that started it, has the values of its key."""
    return os.environ.get(KEY) == os.environ.get(TAKEN)


def offer(values: Mapping[str, str]) -> dict[str, Any]:
    """Runtime environment for a driver that is about to connect with values of its own; `publish` must follow."""
    if not values:
        return {}
    os.environ[KEY] = os.environ[TAKEN] = new_key()
    os.environ[NAMES] = " ".join(values)
    return {"env_vars": variables(os.environ[KEY])}


def publish(values: Mapping[str, str]) -> None:
    """Stores the values that were offered; the driver is connected and has started no worker yet."""
    if values:
        _store().internal_kv_put(os.environ[KEY].encode(), pack(values), True, None)


def withdraw() -> None:
    """Deletes the values from the control store. Processes that have them keep them."""
    os.environ.pop(TAKEN, None)
    if key := os.environ.pop(KEY, None):
        with contextlib.suppress(Exception):  # a cluster that is gone has taken them along
            _store().internal_kv_del(key.encode(), False, None, timeout=10)


def _store() -> Any:
    import ray

    if ray.is_initialized():
        worker: Any = ray._private.worker.global_worker
        return worker.gcs_client
    import ray._raylet

    raylet: Any = ray._raylet
    return raylet.GcsClient(address=os.environ["RAY_ADDRESS"])
