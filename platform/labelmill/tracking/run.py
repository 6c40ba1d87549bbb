"""One MLflow run: what a job logs while it works, and how its report is read back.

Nothing here raises once the run is open. A call that the store doesn't take goes to a spool file in the run's
folder and is sent again, in order, with a later call; a call that the store refuses for good (a value it
can't hold) is kept in a second file and counted.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

from labelmill.errors import DataError, TrackingError
from labelmill.job import TrackingConfig
from labelmill.tracking.config import (
    ARTIFACT_TIMEOUT_S,
    Store,
    client_env,
    first_line,
    import_mlflow,
    settings,
)
from labelmill.tracking.report import Report
from labelmill.tracking.spool import Record, Spool
from labelmill.tracking.system import SystemMetrics
from labelmill.tracking.values import MAX_KEY, as_text, flatten, safe_folder, safe_key

if TYPE_CHECKING:
    from mlflow import MlflowClient

_log = logging.getLogger(__name__)

MetricRow = tuple[str, float, int, int | None]
"""name, value, step, Unix time in milliseconds (None = now)."""

Status = Literal["FINISHED", "FAILED", "KILLED"]

# limits of MLflow servers; that of params is the one of older servers: the whole job is in job.yaml anyway
_BATCH, _PARAM_BATCH, _PARAM, _TAG, _DIGEST = 1000, 100, 500, 5000, 36
_REFUSALS = {
    "INVALID_PARAMETER_VALUE",
    "BAD_REQUEST",
    "RESOURCE_ALREADY_EXISTS",
    "PERMISSION_DENIED",
    "NOT_FOUND",
    "RESOURCE_DOES_NOT_EXIST",
    "INVALID_STATE",
    "MALFORMED_REQUEST",
}
_MAX_HOLD_S = 60.0
_PENDING = "pending"


class Tracker:
    """Logs to one MLflow run from one process. Make it with `Tracker.open`.

    Attributes:
        store: where the run is kept.
        run_id: MLflow's id of the run; empty until a server that was away at the start has answered.
        on_open: called with the id of a run that could be opened only later.
        run_dir: local folder of the spool, the report and `job.yaml`.
        refused: calls the store won't ever take; they are in `tracking-refused.jsonl`.
    """

    def __init__(self, store: Store, client: MlflowClient, run_id: str, run_dir: Path) -> None:
        self.store = store
        self.run_id = run_id
        self.run_dir = run_dir
        self.refused = 0
        self._client = client
        self._lock = threading.RLock()
        self.on_open: Callable[[str], None] = lambda run_id: None
        self._opening: Callable[[], str] | None = None
        self._spool = Spool(_spool_path(run_dir, run_id or _PENDING))
        if run_id and _spool_path(run_dir, _PENDING).is_file():
            self._spool.take_over(_spool_path(run_dir, _PENDING))
        self._buffer: list[list[Any]] = []
        self._flushed_at = time.monotonic()
        self._failures = 0
        self._retry_at = 0.0
        self._ended = False
        self._system: SystemMetrics | None = None

    @classmethod
    @contextlib.contextmanager
    def open(
        cls,
        config: TrackingConfig,
        output_dir: str | Path,
        run_name: str,
        run_id: str | None = None,
        tags: Mapping[str, str] | None = None,
        parent_run_id: str | None = None,
        run_dir: str | Path | None = None,
    ) -> Iterator[Tracker]:
        """Starts a run, or goes on with `run_id`, and ends it with the block: FINISHED, FAILED or KILLED.

        `output_dir` holds the local store, `run_dir` (default `output_dir/run_name`) the run's own files.

        Raises TrackingError, within `config.timeout_s` of a server that doesn't answer, when the run can't be
        opened. With `config.required` false everything then goes to the spool, and the run is opened later.
        """
        store = Store.of(config, output_dir)
        run_dir = Path(run_dir) if run_dir is not None else Path(output_dir) / run_name
        all_tags = {**_code_tags(), **(tags or {})}
        opened, began_s = "", time.time()
        try:
            with client_env(store, create=True) as client, settings(store, config.timeout_s, retries=1):
                opened = _open_run(client, store, run_name, run_id, all_tags, parent_run_id)
                began_s = client.get_run(opened).info.start_time / 1000
        except TrackingError as error:
            if config.required or not store.is_server:
                raise
            _log.warning("%s Going on without; all calls are kept in %s.", error, run_dir)
            client = import_mlflow().MlflowClient(store.uri, store.registry_uri)
        tracker = cls(store, client, opened, run_dir)
        if not opened:
            tracker._opening = lambda: _open_run(client, store, run_name, run_id, all_tags, parent_run_id)
        if config.system_metrics:
            tracker._system = SystemMetrics(tracker, began_s)
        try:
            yield tracker
        except BaseException as error:
            tracker.finish("KILLED" if isinstance(error, KeyboardInterrupt | SystemExit) else "FAILED")
            raise
        tracker.finish("FINISHED")

    # --- what a job logs ------------------------------------------------------------------------------------

    @property
    def spooled(self) -> int:
        """Calls that wait in the spool file."""
        return len(self._spool)

    def params(self, values: Mapping[str, Any]) -> None:
        """Logs settings: nested mappings are flattened (`head.margin`), long values cut.

        MLflow params can't change; a changed one is kept as the tag `param.<name>`.
        """
        flat = {safe_key(key): as_text(value)[:_PARAM] for key, value in flatten(values)}
        self._submit({"op": "params", "values": flat})

    def tags(self, values: Mapping[str, Any]) -> None:
        """Sets tags."""
        self._submit({"op": "tags", "values": {safe_key(k): as_text(v)[:_TAG] for k, v in values.items()}})

    def metrics(self, rows: Iterable[MetricRow]) -> None:
        """Takes metric points; they are sent together every `interval_s` seconds and by `flush`."""
        now = int(time.time() * 1000)
        with self._lock:
            for name, value, step, when in rows:
                # as text: JSON has no NaN and no infinity
                self._buffer.append([safe_key(name), repr(float(value)), int(step), now if when is None else int(when)])
            due = time.monotonic() - self._flushed_at >= self.store.config.interval_s
            if len(self._buffer) >= _BATCH or due:
                self.flush()

    def flush(self) -> None:
        """Sends buffered metrics now."""
        with self._lock:
            self._flushed_at = time.monotonic()
            rows, self._buffer = self._buffer, []
            for start in range(0, len(rows), _BATCH):
                self._submit({"op": "metrics", "rows": rows[start : start + _BATCH]})

    def artifact(self, path: str | Path, folder: str = "") -> None:
        """Uploads a file, or what is in a folder, to `folder` of the run's artifacts.

        The path must stay until it is uploaded, which may be later than this call.
        """
        self._submit({"op": "artifact", "path": str(Path(path).resolve()), "folder": folder})

    def figure(self, path: str | Path) -> None:
        """Uploads the file of a figure to `figures/`."""
        self.artifact(path, "figures")

    def config(self, job: Mapping[str, Any]) -> None:
        """Keeps the resolved job (`labelmill.job.resolved`, secrets masked) as `job.yaml`."""
        path = self.run_dir / "job.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(dict(job), sort_keys=False, allow_unicode=True), encoding="utf-8")
        self.artifact(path)

    def dataset(
        self,
        digest: str,
        name: str,
        source: str,
        context: str = "training",
        profile: Mapping[str, Any] | None = None,
    ) -> None:
        """Notes that the run read a data set: `digest` of its manifest, `source` its path or URI.

        MLflow holds 36 characters of a digest; the whole one is the input's tag `manifest_sha256`.
        """
        self._submit(
            {"op": "dataset", "digest": digest, "name": name, "source": str(source), "context": context,
             "profile": dict(profile or {})}
        )  # fmt: skip

    def report(self, report: Report) -> None:
        """Keeps a report: its metrics as the run's metrics, the rest as artifacts under `report/`."""
        folder = report.save(self.run_dir / "report")
        self.metrics([(name, value, 0, None) for name, value in report.metrics.items()])
        self.flush()
        self.artifact(folder, "report")

    def finish(self, status: Status = "FINISHED") -> None:
        """Sends what is left and ends the run. A second call does nothing."""
        if self._ended:
            return
        if self._system:
            self._system.stop()
        with self._lock:
            self._ended = True
            self._retry_at = 0.0
            self.flush()
            self._submit({"op": "finish", "status": status})
        if self.spooled:
            _log.warning(
                "%d tracking calls of run %s couldn't be sent to %s; they are in %s and go out when the run "
                "is opened again", self.spooled, self.run_id, self.store.uri, self._spool.path,
            )  # fmt: skip

    # --- sending --------------------------------------------------------------------------------------------

    def _submit(self, record: Record) -> None:
        with self._lock:
            waiting = time.monotonic() < self._retry_at
            if waiting or not self._spool.replay(self._try) or not self._try(record):
                self._spool.append(record)

    def _try(self, record: Record) -> bool:
        """Sends one record. False: try again later. Refused records count as sent."""
        try:
            if self._opening is not None:
                self._open_late(self._opening)
            getattr(self, f"_send_{record['op']}")(record)
        except Exception as error:  # whatever goes wrong in tracking must not stop the training
            # two runs that log one data set at once: MLflow inserts it twice, and works when asked again
            race = "UNIQUE constraint" in str(error) or "duplicate key" in str(error)
            refused = getattr(error, "error_code", None) in _REFUSALS and not race
            if isinstance(error, FileNotFoundError) or refused:
                self._refuse(record, error)
                return True
            self._failures += 1
            hold = min(_MAX_HOLD_S, self.store.config.interval_s * 2 ** min(self._failures, 10))
            self._retry_at = time.monotonic() + hold
            if self._failures == 1:
                _log.warning("tracking is interrupted (%s); calls are kept in %s", first_line(error), self._spool.path)
            return False
        if self._failures:
            _log.warning("tracking works again")
        self._failures = 0
        return True

    def _open_late(self, opening: Callable[[], str]) -> None:
        self.store.check(create=True)
        with self._quick():
            self.run_id = opening()
        self._opening = None
        self._spool.move(_spool_path(self.run_dir, self.run_id))
        self.on_open(self.run_id)

    def _refuse(self, record: Record, error: Exception) -> None:
        self.refused += 1
        _log.warning("the tracking store refused a call (%s): %s", record["op"], first_line(error))
        self.run_dir.mkdir(parents=True, exist_ok=True)
        with open(self.run_dir / "tracking-refused.jsonl", "a", encoding="utf-8") as out:
            out.write(json.dumps({**record, "error": first_line(error)}, ensure_ascii=False) + "\n")

    def _quick(self) -> contextlib.AbstractContextManager[None]:
        return settings(self.store, self.store.config.timeout_s, retries=0)

    def _send_metrics(self, record: Record) -> None:
        from mlflow.entities import Metric

        points = [Metric(name, float(value), when, step) for name, value, step, when in record["rows"]]
        with self._quick():
            self._client.log_batch(self.run_id, metrics=points, synchronous=True)

    def _send_params(self, record: Record) -> None:
        from mlflow.entities import Param, RunTag

        with self._quick():
            held = self._client.get_run(self.run_id).data.params
            values: dict[str, str] = record["values"]
            new = [Param(key, value) for key, value in values.items() if key not in held]
            changed = [RunTag(f"param.{k}"[:MAX_KEY], v) for k, v in values.items() if k in held and held[k] != v]
            for start in range(0, len(new), _PARAM_BATCH):
                self._client.log_batch(self.run_id, params=new[start : start + _PARAM_BATCH], synchronous=True)
            for start in range(0, len(changed), _PARAM_BATCH):
                self._client.log_batch(self.run_id, tags=changed[start : start + _PARAM_BATCH], synchronous=True)

    def _send_tags(self, record: Record) -> None:
        from mlflow.entities import RunTag

        items = [RunTag(key, value) for key, value in record["values"].items()]
        with self._quick():
            for start in range(0, len(items), _PARAM_BATCH):
                self._client.log_batch(self.run_id, tags=items[start : start + _PARAM_BATCH], synchronous=True)

    def _send_artifact(self, record: Record) -> None:
        path, folder = Path(record["path"]), record["folder"] or None
        if not path.exists():
            raise FileNotFoundError(path)
        # uploads have a long time-out, so ask first whether anyone is there
        self.store.check(create=True)
        with settings(self.store, ARTIFACT_TIMEOUT_S, retries=1, keep_user=True):
            if path.is_dir():
                self._client.log_artifacts(self.run_id, str(path), folder)
            else:
                self._client.log_artifact(self.run_id, str(path), folder)

    def _send_dataset(self, record: Record) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        source = record["source"]
        kind = source.partition("://")[0] if "://" in source else "local"
        dataset = Dataset(
            name=record["name"],
            digest=record["digest"][:_DIGEST],
            source_type=kind,
            source=json.dumps({"uri": source}),
            profile=json.dumps(record["profile"]),
        )
        tags = [
            InputTag("mlflow.data.context", record["context"]),
            InputTag("manifest_sha256", record["digest"]),
        ]
        with self._quick():
            self._client.log_inputs(self.run_id, [DatasetInput(dataset, tags)])

    def _send_finish(self, record: Record) -> None:
        with self._quick():
            self._client.set_terminated(self.run_id, record["status"])


def spools(run_dir: Path) -> list[Path]:
    """Files of calls that wait to be sent."""
    return sorted(run_dir.glob("tracking-spool-*.jsonl"))


def _spool_path(run_dir: Path, run_id: str) -> Path:
    return run_dir / f"tracking-spool-{run_id}.jsonl"


def read_report(
    config: TrackingConfig, output_dir: str | Path, run_id: str, folder: str | Path | None = None
) -> Report:
    """The report of a run, rebuilt from the MLflow run alone; figures go into `folder` (or a temporary one).

    Raises TrackingError for an unknown run or one without a report.
    """
    store = Store.of(config, output_dir)
    target = Path(folder) if folder is not None else Path(tempfile.mkdtemp(prefix="labelmill-report-"))
    target.mkdir(parents=True, exist_ok=True)
    with client_env(store) as client:
        client.get_run(run_id)
        if not client.list_artifacts(run_id, "report"):
            raise TrackingError(f"run {run_id} in {store.uri} holds no report; it didn't end, or wasn't labelmill's.")
        found = client.download_artifacts(run_id, "report", str(target))
    try:
        return Report.load(found)
    except DataError as error:
        raise TrackingError(f"report of run {run_id}: {error}") from error


def code_version() -> dict[str, str]:
    """`version` of the package and, in a git checkout, `commit` and `dirty` (`true` or `false`).

    A job on a cluster takes them from the machine that its code came from.
    """
    if told := os.environ.get("LABELMILL_CODE"):
        return dict(json.loads(told))
    try:
        version = {"version": metadata.version("labelmill")}
    except metadata.PackageNotFoundError:
        version = {"version": "unknown"}
    here = Path(__file__).resolve().parent
    try:
        commit, status = (
            subprocess.run(["git", *args], cwd=here, capture_output=True, text=True, timeout=10, check=True).stdout
            for args in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        )
        return {**version, "commit": commit.strip(), "dirty": str(bool(status.strip())).lower()}
    except (OSError, subprocess.SubprocessError):
        return version


def _code_tags() -> dict[str, str]:
    version = code_version()
    tags = {f"labelmill.{key}": value for key, value in version.items()}
    if "commit" in version:
        tags["mlflow.source.git.commit"] = version["commit"]
    return {**tags, "mlflow.source.type": "LOCAL", "mlflow.source.name": "labelmill"}


def _open_run(
    client: MlflowClient,
    store: Store,
    run_name: str,
    run_id: str | None,
    tags: dict[str, str],
    parent_run_id: str | None,
) -> str:
    if run_id is not None:
        client.get_run(run_id)
        client.update_run(run_id, status="RUNNING")
        for key, value in tags.items():
            client.set_tag(run_id, key, value)
        return run_id
    name = store.config.experiment
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        try:
            location = f"{store.artifacts}/{safe_folder(name)}" if store.artifacts else None
            experiment = client.get_experiment(client.create_experiment(name, artifact_location=location))
        except import_mlflow().exceptions.MlflowException:
            experiment = client.get_experiment_by_name(name)  # another process was faster
            if experiment is None:
                raise
    if experiment.lifecycle_stage != "active":
        raise TrackingError(
            f"MLflow experiment {name!r} in {store.uri} is deleted. Restore it (`mlflow experiments restore "
            f"--experiment-id {experiment.experiment_id}`) or set tracking.experiment to another name."
        )
    if parent_run_id is not None:
        tags = {**tags, "mlflow.parentRunId": parent_run_id}
    return client.create_run(experiment.experiment_id, tags=tags, run_name=run_name).info.run_id
