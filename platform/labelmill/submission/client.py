"""Jobs on a cluster, from outside of it: submit, follow, list, read logs, stop. Everything goes over HTTP to Ray's job
server, which listens beside the dashboard."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import re
import secrets as random
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from labelmill import __version__, handover
from labelmill.errors import ClusterError, JobError, UserError
from labelmill.job import Job, read_job_file, references
from labelmill.submission import wheel
from labelmill.workload import check_job, distribution_of

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

ENTRYPOINT = "-m labelmill.cli run-submitted"
_PATIENCE_S = 15.0
_MOST_JOB_BYTES = 100_000  # the kernel takes 128 KiB in one variable
# what Ray writes above the job's own lines
_RAYS = re.compile(
    r"^(Running entrypoint for job \S+: .*|\S+ \S+\s+INFO job_manager.py:\d+ -- Runtime env is setting up.)\n?",
    re.MULTILINE,
)


@dataclass(frozen=True)
class Submission:
    """A job that was handed over: its id, and the addresses and names that were sent, for a person to read.

    `search_left`: the job could be searched with, and is run.
    """

    id: str
    wheels: tuple[str, ...]
    variables: tuple[str, ...]
    search_left: bool = False


@dataclass(frozen=True)
class JobState:
    """What the job server knows of a job. Times are Unix seconds; `exit_code` is the driver's."""

    id: str
    status: str
    message: str
    name: str
    workload: str
    started: float | None
    ended: float | None
    exit_code: int | None

    @property
    def finished(self) -> bool:
        """Whether nothing more will happen to it."""
        return self.status in ("SUCCEEDED", "FAILED", "STOPPED")


# --- the job server -----------------------------------------------------------------------------------------


def job_server(address: str | None) -> str:
    """The HTTP address of a cluster's job server: given, or `$RAY_API_SERVER_ADDRESS`. Raises ClusterError."""
    address = address or os.environ.get("RAY_API_SERVER_ADDRESS") or ""
    shown = "http://HOST:8265"
    if not address:
        raise ClusterError(f"--address: give the cluster's job server, {shown}, or set RAY_API_SERVER_ADDRESS to it.")
    if address.startswith("ray://"):
        raise ClusterError(
            f"--address {address}: Ray Client (ray://) runs the driver here and ties the run to this connection: when it "
            f"drops, the run is lost. A submitted job's driver runs on the cluster. Give its job server: {shown}."
        )
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ClusterError(f"--address {address}: not the address of a job server. Write it as {shown}.")
    if parts.username or parts.password:
        raise ClusterError(
            "--address: leave user and password out of it; Ray's token comes from RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH."
        )
    return address.rstrip("/")


def travels_openly(address: str | None) -> bool:
    """Whether what is sent to a job server can be read on the way."""
    parts = urlsplit(job_server(address))
    return parts.scheme == "http" and parts.hostname not in ("localhost", "127.0.0.1", "::1")


@contextlib.contextmanager
def connected(address: str | None) -> Iterator[JobSubmissionClient]:
    """A client of a cluster's job server. Raises ClusterError when it doesn't answer or refuses."""
    from labelmill.cluster import set_environment

    url = job_server(address)
    set_environment()
    import requests
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    try:
        # Ray prefers its variables to what it is told
        with _without("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
            client = JobSubmissionClient(url)
        yield client
    except AuthenticationError as error:
        raise ClusterError(
            f"{url} wants a token ({str(error).splitlines()[0]}). Set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH to a file that "
            "holds it; `ray get-auth-token` prints it on the cluster's head."
        ) from None
    except (ConnectionError, requests.exceptions.RequestException) as error:
        reason = type(error).__name__
        raise ClusterError(
            f"{url}: no job server answers ({reason}). It listens on the head's loopback address unless the head was "
            "started with --dashboard-host; a tunnel reaches it: ssh -L 8265:localhost:8265 HEAD, then "
            "--address http://localhost:8265."
        ) from None


@contextlib.contextmanager
def _without(*names: str) -> Iterator[None]:
    kept = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)


# --- submit -------------------------------------------------------------------------------------------------


def submit(
    client: JobSubmissionClient,
    job_file: str | Path,
    overrides: Sequence[str] = (),
    *,
    verb: str = "run",
    fresh: bool = False,
    submission_id: str | None = None,
    workdir: str | Path | None = None,
    packages: Sequence[str] = (),
    env: Sequence[str] = (),
    driver_cpus: float = 0.1,
    driver_anywhere: bool = False,
    python: str = "python",
    columns: int | None = None,
) -> Submission:
    """Sends a job file, the code it needs and the variables it names; returns when the job server has it.

    Args:
        verb: function of `labelmill.api` that the driver calls with the job: `run`, or `tune` for its search.
        workdir: folder on the cluster in which relative paths of the job are meant; the current one by default.
        packages: installed distributions to ship beside labelmill and the one that announces the workload.
        env: variables as in `cluster.env`, beside those.
        driver_cpus: CPUs that the driver reserves.
        driver_anywhere: on any node, instead of the head.
        python: the interpreter on the cluster.

    Raises JobError for what is wrong with the job and ClusterError when the cluster refuses it.
    """
    raw = read_job_file(job_file, overrides)
    method, job = check_job(raw, str(job_file))
    if verb == "tune":
        from labelmill.tuning.check import check_search

        check_search(job, raw, method, str(job_file))
    values = _values(raw, job, env)
    wheels = [wheel.build(found, values) for found in _distributions(job.workload, packages)]
    variables = {"LABELMILL_VERB": verb} | _variables(raw, job_file, fresh, workdir, columns)
    key = handover.new_key()
    submission_id = submission_id or f"{job.name}-{random.token_hex(3)}"
    with tempfile.TemporaryDirectory() as folder:
        modules = [str(found.write(Path(folder))) for found in wheels]
        if values:
            variables |= handover.variables(key)
            _send(client, key, handover.pack(values))
        with _quiet(), _taken_back(client, key if values else ""):
            client.submit_job(
                entrypoint=f"{python} {ENTRYPOINT}",
                submission_id=submission_id,
                runtime_env={"py_modules": modules, "env_vars": variables},
                metadata={"labelmill": __version__, "name": job.name, "workload": job.workload, "verb": verb}
                | ({"handover": key} if values else {}),
                entrypoint_num_cpus=driver_cpus or None,
                # with the head the cluster ends anyway; any other node may be lost alone
                entrypoint_resources=None if driver_anywhere else {"node:__internal_head__": 0.001},
            )
    names = tuple(found.name for found in wheels)
    return Submission(submission_id, names, tuple(sorted(values)), verb == "run" and job.search is not None)


def _values(raw: Mapping[str, Any], job: Job, env: Sequence[str]) -> dict[str, str]:
    """What the job's processes get from the environment here: variables that it names, and the tracking store's."""
    named = references(raw)
    for field in ("username", "password", "token"):
        given = (raw.get("tracking") or {}).get(field)
        if isinstance(given, str) and not given.startswith("${env:"):
            raise JobError(
                f"tracking.{field}: a job that is submitted can be read by everyone on the cluster. Write ${{env:NAME}} "
                "here and the secret into the variable NAME."
            )
    names = [*named, *job.cluster.env, *env]
    if job.tracking.uri is None and os.environ.get("MLFLOW_TRACKING_URI"):
        names += [name for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI") if os.environ.get(name)]
    return handover.collect(names)


def _distributions(workload: str, packages: Sequence[str]) -> list[metadata.Distribution]:
    found = {"labelmill": metadata.distribution("labelmill")}
    if announced := distribution_of(workload):
        found.setdefault(announced.metadata["Name"], announced)
    for name in packages:
        try:
            found.setdefault(name, metadata.distribution(name))
        except metadata.PackageNotFoundError:
            raise JobError(
                f"--package {name}: not installed here. Give the name that `pip list` shows, after pip install -e ."
            ) from None
    return list(found.values())


def _variables(
    raw: Mapping[str, Any], job_file: str | Path, fresh: bool, workdir: str | Path | None, columns: int | None
) -> dict[str, str]:
    text = json.dumps(raw, default=str)
    if len(text) > _MOST_JOB_BYTES:
        raise JobError(
            f"{job_file}: {len(text):,} bytes, at most {_MOST_JOB_BYTES:,} can be sent. Move lists into files."
        )
    from labelmill.tracking.run import code_version

    return {
        "LABELMILL_JOB": text,
        "LABELMILL_JOB_FILE": Path(job_file).name,
        "LABELMILL_FRESH": "1" if fresh else "",
        "LABELMILL_WORKDIR": str(Path(workdir or ".").absolute()),
        "LABELMILL_CODE": json.dumps(code_version()),
        "LABELMILL_PROGRESS_S": "1",
        **({"COLUMNS": str(columns)} if columns else {}),
    }


def _send(client: JobSubmissionClient, key: str, content: bytes) -> None:
    answer = client._do_request("PUT", f"/api/packages/{key.replace('://', '/')}", data=content)
    if answer.status_code != 200:
        raise ClusterError(f"the cluster doesn't take the job's variables: HTTP {answer.status_code}")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Ray reports each upload and each ignore file in its log."""
    names = (
        "ray.dashboard.modules.dashboard_sdk",
        "ray._private.runtime_env.packaging",
        "ray.dashboard.modules.job.sdk",
    )
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    except RuntimeError as error:
        raise ClusterError(_reason(error)) from None
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _reason(error: Exception) -> str:
    """What a job server's answer says, without the traceback that it sends along."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip(" .")]
    last = lines[-1] if lines else type(error).__name__
    last = re.sub(r"^\w+(\.\w+)*(Error|Exception): ", "", last)
    return f"the job server refuses: {last[:300]}"


# --- look, follow, stop -------------------------------------------------------------------------------------


def state(client: JobSubmissionClient, job_id: str) -> JobState:
    """What the job server knows of a job. Raises UserError for an unknown id."""
    answer = client._do_request("GET", f"/api/jobs/{job_id}")
    if answer.status_code == 404:
        raise UserError(f"{job_id}: the cluster knows no such job. `labelmill jobs list` shows those it knows.")
    if answer.status_code != 200:
        raise ClusterError(f"the job server answers HTTP {answer.status_code}")
    found = _state(answer.json())
    _clean(client, found, answer.json())
    return found


def states(client: JobSubmissionClient) -> list[JobState]:
    """All submitted jobs that the cluster remembers, the newest first."""
    answer = client._do_request("GET", "/api/jobs/")
    if answer.status_code != 200:
        raise ClusterError(f"the job server answers HTTP {answer.status_code}")
    found = [_state(details) for details in answer.json() if details.get("submission_id")]
    return sorted(found, key=lambda job: -(job.started or 0))


def _state(details: Mapping[str, Any]) -> JobState:
    known = details.get("metadata") or {}
    start, end = details.get("start_time"), details.get("end_time")
    return JobState(
        id=details.get("submission_id") or details.get("job_id") or "",
        status=details["status"],
        message=(details.get("message") or "").strip(),
        name=known.get("name", ""),
        workload=known.get("workload", ""),
        started=start / 1000 if start else None,
        ended=end / 1000 if end else None,
        exit_code=details.get("driver_exit_code"),
    )


def _clean(client: JobSubmissionClient, found: JobState, details: Mapping[str, Any]) -> None:
    """Has the cluster delete what a job was handed and couldn't delete itself, being killed or never started.

    A look at a package gives it a life of ten minutes, at whose end nobody uses it.
    """
    key = (details.get("metadata") or {}).get("handover")
    if found.finished and key:
        _let_go(client, key)


def _let_go(client: JobSubmissionClient, key: str) -> None:
    client._do_request("GET", f"/api/packages/{key.replace('://', '/')}")


@contextlib.contextmanager
def _taken_back(client: JobSubmissionClient, key: str) -> Iterator[None]:
    """What was handed over for a job that the server then refuses is deleted."""
    try:
        yield
    except Exception:
        if key:
            _let_go(client, key)
        raise


def logs(client: JobSubmissionClient, job_id: str) -> str:
    """Everything that the job has printed."""
    state(client, job_id)
    with _quiet():
        return _RAYS.sub("", client.get_job_logs(job_id))


def stop(client: JobSubmissionClient, job_id: str, timeout_s: float = 60.0) -> JobState:
    """Ends a job and waits until it has ended. The run continues when it is submitted again."""
    found = state(client, job_id)
    if not found.finished:
        with _quiet():
            client.stop_job(job_id)
    until = time.monotonic() + timeout_s
    while not (found := state(client, job_id)).finished:
        if time.monotonic() > until:
            raise ClusterError(
                f"{job_id} hasn't ended {timeout_s:g} s after it was told to; look at `labelmill jobs status`."
            )
        time.sleep(0.3)
    return found


def wait(client: JobSubmissionClient, job_id: str) -> JobState:
    """Returns when the job has ended."""
    while not (found := state(client, job_id)).finished:
        time.sleep(0.5)
    return found


def follow(client: JobSubmissionClient, job_id: str, on_line: Callable[[str], None]) -> JobState:
    """Calls `on_line` with each line that the job has printed and prints, until it has ended."""
    tail = _Tail(client, job_id, on_line)
    began, told = time.monotonic(), False
    while (found := state(client, job_id)).status == "PENDING":
        if not told and time.monotonic() > began + _PATIENCE_S:
            on_line(f"waiting for the cluster: {found.message}")
            told = True
        time.sleep(0.3)
    while True:
        before = state(client, job_id)
        try:
            with _quiet():
                asyncio.run(tail.read())
        except (ClusterError, OSError):
            # a connection that breaks is made again, where it stood
            if before.finished:
                return before
            time.sleep(0.5)
        else:
            return wait(client, job_id)


class _Tail:
    """The lines of a job's log, each once, over as many connections as it takes; each begins at the first line."""

    def __init__(self, client: JobSubmissionClient, job_id: str, on_line: Callable[[str], None]) -> None:
        self.client, self.job_id, self.on_line = client, job_id, on_line
        self.seen = 0

    async def read(self) -> None:
        """Reads until the connection ends."""
        count, rest = 0, ""
        async for text in self.client.tail_job_logs(self.job_id):
            *lines, rest = (rest + text).split("\n")
            for line in lines:
                count += 1
                if count > self.seen:
                    self.seen = count
                    if not _RAYS.match(line):
                        self.on_line(line)
