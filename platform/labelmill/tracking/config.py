"""Which MLflow store a run belongs to, and the settings MLflow takes from the environment.

MLflow reads its URI, credentials, time-outs and telemetry switch from environment variables and module
globals. Everything here sets them for the length of a `with` block and puts them back, one thread at a time.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from labelmill.errors import TrackingError
from labelmill.job import TrackingConfig

if TYPE_CHECKING:
    from mlflow import MlflowClient

_ENV_LOCK = threading.RLock()
ARTIFACT_TIMEOUT_S = 600  # a proxying server answers an upload only when it has stored it


@dataclass(frozen=True)
class Store:
    """Where runs, artifacts and registered models are kept.

    Attributes:
        uri: MLflow tracking URI.
        registry_uri: MLflow registry URI; the same unless `$MLFLOW_REGISTRY_URI` goes with the tracking
            variable.
        artifacts: root of new experiments' artifacts; None leaves it to the server.
        config: the job's section, for credentials and time-outs.
    """

    uri: str
    registry_uri: str
    artifacts: str | None
    config: TrackingConfig

    @classmethod
    def of(cls, config: TrackingConfig, output: str | Path = "runs") -> Store:
        """The store a config means: `uri`, else `$MLFLOW_TRACKING_URI`, else sqlite and a folder in `output`.

        Raises TrackingError for a plain folder, which MLflow no longer supports.
        """
        output = Path(output).resolve()
        environment = os.environ.get("MLFLOW_TRACKING_URI", "").strip()
        uri = config.uri or environment or _sqlite_uri(output / "mlflow.db")
        registry = os.environ.get("MLFLOW_REGISTRY_URI", "").strip() if not config.uri and environment else ""
        scheme = urlsplit(uri).scheme
        if scheme in ("", "file"):
            raise TrackingError(
                f"tracking store {uri}: MLflow no longer keeps runs in plain folders. Give an http(s) "
                "server or a database such as sqlite:///runs/mlflow.db in tracking.uri or in "
                "MLFLOW_TRACKING_URI."
            )
        file = _sqlite_file(uri)
        if file is not None:
            uri = _sqlite_uri(file)
        artifacts = None if scheme.startswith("http") or scheme.startswith("databricks") else output / "mlartifacts"
        if file is not None:
            artifacts = file.parent / "mlartifacts"
        return cls(uri, registry or uri, None if artifacts is None else artifacts.as_uri(), config)

    @property
    def is_server(self) -> bool:
        """Whether it is reached over HTTP."""
        return self.uri.startswith(("http://", "https://"))

    def check(self, create: bool = False) -> None:
        """Raises TrackingError when the server doesn't answer in time or the local store isn't there.

        With `create` the folder of a local store is made; MLflow makes the database in it.
        """
        if self.is_server:
            check_server(self)
        file = _sqlite_file(self.uri)
        if file is None:
            return
        if create:
            file.parent.mkdir(parents=True, exist_ok=True)
        elif not file.is_file():
            raise TrackingError(
                f"{file}: there is no tracking store yet. Run a job first, or point tracking.uri or "
                "MLFLOW_TRACKING_URI at the store that holds the runs."
            )

    def credentials(self) -> dict[str, str]:
        """Environment variables that carry the config's user, password and token."""
        secrets = {
            "MLFLOW_TRACKING_USERNAME": self.config.username,
            "MLFLOW_TRACKING_PASSWORD": self.config.password,
            "MLFLOW_TRACKING_TOKEN": self.config.token,
        }
        return {name: secret.get_secret_value() for name, secret in secrets.items() if secret is not None}


def check_server(store: Store) -> None:
    """Asks an HTTP server for /health. Raises TrackingError when it doesn't answer in `config.timeout_s`."""
    uri, timeout_s = store.uri, store.config.timeout_s
    failure: list[str] = ["no answer"]

    def ask() -> None:
        try:
            with urllib.request.urlopen(uri.rstrip("/") + "/health", timeout=timeout_s):
                failure.clear()
        except urllib.error.HTTPError as error:
            # another product in front of MLflow may not know /health; it is the API that counts then
            failure[0] = f"HTTP {error.code} {error.reason}"
            if error.code < 500 and error.code not in (401, 403, 407):
                failure.clear()
        except (OSError, ValueError) as error:
            failure[0] = str(getattr(error, "reason", error)) or type(error).__name__

    # in a thread of its own, because name resolution has no time-out
    thread = threading.Thread(target=ask, name="tracking-health", daemon=True)
    thread.start()
    thread.join(timeout_s)
    if failure:
        raise TrackingError(
            f"tracking server {uri} doesn't answer within {timeout_s:g} s ({failure[0]}). Start it, correct "
            "tracking.uri, unset MLFLOW_TRACKING_URI to use a local store in the output folder, or set "
            "tracking.required to false to send everything later."
        )


def import_mlflow() -> Any:
    """The mlflow module: no telemetry, no chatter."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("DO_NOT_TRACK", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    # migrations of a new database log hundreds of lines, set up by alembic's own configuration
    os.environ.setdefault("MLFLOW_CONFIGURE_LOGGING", "false")
    for name, level in (("mlflow", logging.ERROR), ("alembic", logging.WARNING), ("urllib3", logging.ERROR)):
        logging.getLogger(name).setLevel(level)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import mlflow
        import mlflow.pyfunc

    logging.getLogger("mlflow").setLevel(logging.ERROR)
    return mlflow


@contextlib.contextmanager
def settings(store: Store, timeout_s: float, retries: int, keep_user: bool = False) -> Iterator[None]:
    """MLflow's environment for calls to `store`, put back afterwards.

    With `keep_user` limits that the user's own environment sets stay as they are.
    """
    values = {
        **store.credentials(),
        "MLFLOW_HTTP_REQUEST_TIMEOUT": str(max(1, round(timeout_s))),
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": str(retries),
        "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    }
    if keep_user:
        values = {k: v for k, v in values.items() if not (k.startswith("MLFLOW_HTTP_") and k in os.environ)}
    with _ENV_LOCK, _environ(values):
        yield


@contextlib.contextmanager
def client_env(store: Store, create: bool = False) -> Iterator[MlflowClient]:
    """A client of `store`, which is also what mlflow's module functions use inside the block.

    Raises TrackingError when the store doesn't answer, and in place of any MLflow error inside the block.
    """
    store.check(create)
    mlflow = import_mlflow()
    uris = {"MLFLOW_TRACKING_URI": store.uri, "MLFLOW_REGISTRY_URI": store.registry_uri}
    with settings(store, ARTIFACT_TIMEOUT_S, retries=2, keep_user=True):
        set_by_code = mlflow.get_tracking_uri() if mlflow.is_tracking_uri_set() else None
        if set_by_code == os.environ.get("MLFLOW_TRACKING_URI"):
            set_by_code = None
        with _environ(uris):
            mlflow.set_tracking_uri(store.uri)
            mlflow.set_registry_uri(store.registry_uri)
            try:
                yield mlflow.MlflowClient(store.uri, store.registry_uri)
            except mlflow.exceptions.MlflowException as error:
                raise TrackingError(f"tracking store {store.uri}: {first_line(error)}") from error
            finally:
                mlflow.set_tracking_uri(set_by_code)
                mlflow.set_registry_uri("")


def first_line(error: BaseException) -> str:
    """The first line of an error's text, at most 300 characters."""
    text = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return text if len(text) <= 300 else text[:297] + "..."


@contextlib.contextmanager
def _environ(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _sqlite_uri(file: Path) -> str:
    return f"sqlite:///{file}"


def _sqlite_file(uri: str) -> Path | None:
    if not uri.startswith("sqlite:///"):
        return None
    return Path(unquote(uri.removeprefix("sqlite:///"))).resolve()
