"""The folder of a registered model on this machine.

A store on this machine's disks gives its own folder, which is memory-mapped where it lies. From any other store the
files come once to a cache, which the processes of a host share, and appear there whole or not at all.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

from labelmill.errors import TrackingError
from labelmill.job import TrackingConfig
from labelmill.tracking import registry
from labelmill.tracking.config import Store, client_env, import_mlflow
from labelmill.tracking.mlflow_model import PACKAGE, check_package
from labelmill.tracking.registry import ModelVersion


def cache_folder() -> Path:
    """`$LABELMILL_MODELS`, else a folder of this user's under the system's for temporary files. Made if need be.

    Raises TrackingError when it belongs to somebody else, who could put other models there.
    """
    given = os.environ.get("LABELMILL_MODELS")
    folder = Path(given) if given else Path(tempfile.gettempdir()) / f"labelmill-models-{os.getuid()}"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise TrackingError(
            f"{folder}: this folder for models belongs to another user; set LABELMILL_MODELS to your own."
        )
    return folder


def fetch_package(config: TrackingConfig, output: str | Path, ref: str) -> tuple[ModelVersion, Path]:
    """The version a reference means, and its package (tracking/model.py) as a local folder.

    Raises TrackingError for an unknown reference, a revoked version, or one that labelmill didn't log, DataError for a
    package that isn't what was registered.
    """
    store = Store.of(config, output)
    with client_env(store) as client:
        version = registry.usable(registry.resolve(config, output, ref))
        uri = client.get_model_version_download_uri(version.name, str(version.version))
        place = urlsplit(uri)
        if place.scheme in ("", "file"):
            folder = Path(unquote(place.path)) / PACKAGE
        else:
            key = hashlib.sha256(f"{store.uri}\n{uri}".encode()).hexdigest()[:20]
            folder = cache_folder() / key
            with _locked(folder.with_suffix(".lock")):
                if not folder.is_dir():
                    _download(version, folder)
    if not (folder / "model.json").is_file():
        raise TrackingError(f"{version.name}/{version.version}: no packaged model of labelmill in {uri}.")
    check_package(folder, version.tags, version.uri)
    return version, folder


def _download(version: ModelVersion, folder: Path) -> None:
    mlflow = import_mlflow()
    part = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        found = mlflow.artifacts.download_artifacts(artifact_uri=version.uri, dst_path=str(part))
        os.replace(Path(found) / PACKAGE, folder)
    except OSError as error:
        raise TrackingError(f"{version.uri}: its files couldn't be put into {folder.parent}: {error}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path, "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
