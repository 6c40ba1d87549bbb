"""The model registry: packaged models as versions of a name, found by alias.

A new version is the `candidate`. `promote` makes it the `champion` and the champion it replaces the
`previous` one. A reference is `NAME` (champion, else candidate, else the newest version), `NAME@alias` or
`NAME/version`.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from labelmill.errors import DataError, TrackingError, did_you_mean
from labelmill.job import TrackingConfig
from labelmill.tracking.config import Store, client_env, first_line, import_mlflow
from labelmill.tracking.run import Tracker

if TYPE_CHECKING:
    import pandas as pd
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel
    from rich.console import Console

    from labelmill.tracking.model import ModelSpec

CANDIDATE, CHAMPION, PREVIOUS = "candidate", "champion", "previous"
_REFERENCE = re.compile(r"(?P<name>[^@/:]+)(?:@(?P<alias>[^@/:]+)|/(?P<version>\d+))?")


@dataclass(frozen=True)
class ModelVersion:
    """A version of a registered model.

    Attributes:
        uri: what `mlflow.pyfunc.load_model` takes, by version number.
        aliases: names that point at this version now.
        run_id: the MLflow run that made it.
        created_ms: Unix time in milliseconds.
        metrics: final metrics of the run (`show` alone fills them).
    """

    name: str
    version: int
    aliases: tuple[str, ...]
    run_id: str
    created_ms: int
    tags: dict[str, str]
    metrics: dict[str, float] = field(default_factory=dict)

    @property
    def uri(self) -> str:
        """`models:/NAME/VERSION`."""
        return f"models:/{self.name}/{self.version}"


@dataclass(frozen=True)
class RegisteredModel:
    """A registered name: its newest version, where its aliases point, and the newest version's predictor rule."""

    name: str
    latest: int
    aliases: dict[str, int]
    predictor: str
    updated_ms: int


# --- putting in ---------------------------------------------------------------------------------------------


def log_model(tracker: Tracker, model_dir: str | Path, name: str = "model") -> str:
    """Logs a packaged model to the tracker's run as an MLflow model; returns its URI (`models:/m-...`).

    The files are copied once, into the artifact store. Raises DataError for a folder that isn't a finished
    model and TrackingError when the store fails.
    """
    return _log_model(tracker, Path(model_dir).resolve(), name).model_uri


def _log_model(tracker: Tracker, model_dir: Path, name: str) -> LoggedModel:
    from mlflow.entities import LoggedModelOutput, LoggedModelStatus

    from labelmill.tracking.model import read_spec

    spec = read_spec(model_dir)
    with client_env(tracker.store, create=True) as client, tempfile.TemporaryDirectory() as temporary:
        experiment_id = client.get_run(tracker.run_id).info.experiment_id
        model = client.create_logged_model(experiment_id, name, source_run_id=tracker.run_id)
        try:
            folder = _mlflow_folder(Path(temporary, "model"), model_dir, spec, model)
            client.log_model_artifacts(model.model_id, str(folder))
        except BaseException:
            client.finalize_logged_model(model.model_id, LoggedModelStatus.FAILED)
            raise
        client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
        client.log_outputs(tracker.run_id, [LoggedModelOutput(model.model_id, step=0)])
        return model


def register(
    tracker: Tracker, model_dir: str | Path, name: str, tags: Mapping[str, str] | None = None
) -> int:
    """Logs a packaged model and registers it as a new version of `name`, which becomes the `candidate`.

    Raises TrackingError for a name the registry can't hold or a store that fails, DataError for a broken
    model.
    """
    from labelmill.tracking.model import read_spec

    if not name or not re.fullmatch(r"[^@/:]+", name):
        raise TrackingError(f"model name {name!r}: it must not be empty or hold '@', '/' or ':'.")
    spec = read_spec(model_dir)
    model = _log_model(tracker, Path(model_dir).resolve(), "model")
    own = {
        "labelmill.manifest": spec.manifest,
        "labelmill.code_version": spec.code_version,
        "labelmill.num_classes": str(spec.num_classes),
        "labelmill.predictor": spec.predictor,
        "labelmill.encoder": str(spec.encoder.get("kind", "")),
    }
    with client_env(tracker.store) as client:
        _ensure_registered(client, name)
        version = client.create_model_version(
            name, model.model_uri, tracker.run_id, {**own, **(tags or {})}, model_id=model.model_id
        ).version
        client.set_registered_model_alias(name, CANDIDATE, str(version))
    tracker.tags({"labelmill.model": f"{name}/{version}"})
    return int(version)


def _ensure_registered(client: MlflowClient, name: str) -> None:
    mlflow = import_mlflow()
    try:
        client.create_registered_model(name)
    except mlflow.exceptions.MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _mlflow_folder(path: Path, model_dir: Path, spec: ModelSpec, model: LoggedModel) -> Path:
    """An MLflow model at `path` whose large files are links to `model_dir`.

    Code, signature and requirements are written by MLflow. The model's own files are linked in afterwards,
    because MLflow would copy them here before it copies them to the artifact store.
    """
    mlflow = import_mlflow()
    package = Path(__file__).resolve().parents[1]
    meta = mlflow.models.Model(
        artifact_path=model.artifact_location,
        model_uuid=model.model_id,
        run_id=model.source_run_id,
        model_id=model.model_id,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mlflow.pyfunc.save_model(
            path=str(path),
            python_model=str(package / "tracking" / "pyfunc_model.py"),
            code_paths=[str(package)],
            mlflow_model=meta,
            signature=_signature(spec),
            pip_requirements=requirements(spec),
            model_config={"device": "cpu"},
            metadata={"labelmill": {"predictor": spec.predictor, "num_classes": spec.num_classes}},
        )
    for cache in path.rglob("__pycache__"):
        shutil.rmtree(cache)
    for source in sorted(model_dir.rglob("*")):
        if source.is_file():
            target = path / "artifacts" / "model" / source.relative_to(model_dir)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(source)
    meta.flavors[mlflow.pyfunc.FLAVOR_NAME]["artifacts"] = {
        "model": {"path": "artifacts/model", "uri": "artifacts/model"}
    }
    meta.model_size_bytes = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    meta.save(str(path / "MLmodel"))
    return path


def _signature(spec: ModelSpec) -> Any:
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema
    from mlflow.types.schema import Array, DataType

    kinds = {"text": DataType.string, "image": DataType.binary, "array": Array(DataType.double)}
    answer = [ColSpec(DataType.long, "input")]
    if spec.predictor == "embed":
        answer.append(ColSpec(Array(DataType.float), "embedding"))
    else:
        answer += [ColSpec(DataType.long, "rank"), ColSpec(DataType.long, "class_id"),
                   ColSpec(DataType.string, "class"), ColSpec(DataType.double, "score")]  # fmt: skip
    # the input column has no name here, so that a plain list of inputs is taken as well as a DataFrame
    return ModelSignature(
        inputs=Schema([ColSpec(kinds[spec.input])]),
        outputs=Schema(answer),
        params=ParamSchema([ParamSpec("k", DataType.long, 5)]),
    )


def requirements(spec: ModelSpec) -> list[str]:
    """What prediction imports, pinned to the installed versions."""
    names = ["torch", "safetensors", "pyarrow", "numpy", "pandas", "pydantic", "pyyaml", "mlflow"]
    if spec.input == "image":
        names += ["pillow", "simplejpeg"]
    if str(spec.encoder.get("kind", "")).startswith("hf_"):
        names += ["transformers"]
    found = []
    for name in names:
        try:
            # a local build such as 2.13.0+cpu isn't on the public index
            found.append(f"{name}=={metadata.version(name).partition('+')[0]}")
        except metadata.PackageNotFoundError:
            continue
    return found


# --- looking up ---------------------------------------------------------------------------------------------


def list_models(config: TrackingConfig, output_dir: str | Path = "runs") -> list[RegisteredModel]:
    """Every registered model, by name."""
    with client_env(Store.of(config, output_dir)) as client:
        models = []
        for model in _all_models(client):
            # the search leaves aliases out
            full = client.get_registered_model(model.name)
            versions = client.search_model_versions(
                _named(model.name), max_results=1, order_by=["version_number DESC"]
            )
            aliases = {alias: int(version) for alias, version in sorted(full.aliases.items())}
            latest, predictor = 0, ""
            if versions:
                latest, predictor = int(versions[0].version), versions[0].tags.get("labelmill.predictor", "")
            updated = full.last_updated_timestamp or 0
            models.append(RegisteredModel(model.name, latest, aliases, predictor, updated))
    return sorted(models, key=lambda model: model.name)


def show(config: TrackingConfig, output_dir: str | Path, name: str) -> list[ModelVersion]:
    """All versions of a model, newest first, with the metrics of their runs.

    Raises TrackingError for an unknown model.
    """
    with client_env(Store.of(config, output_dir)) as client:
        model = _model(client, name)
        return [
            _version(v, model.aliases, _metrics(client, v.run_id))
            for v in client.search_model_versions(_named(name), order_by=["version_number DESC"])
        ]


def resolve(config: TrackingConfig, output_dir: str | Path, ref: str) -> ModelVersion:
    """The version a reference means. Raises TrackingError that names the models, aliases or versions known."""
    with client_env(Store.of(config, output_dir)) as client:
        return _resolve(client, ref)


def promote(
    config: TrackingConfig, output_dir: str | Path, name: str, version_or_alias: str | int = CANDIDATE
) -> str:
    """Makes a version the `champion`; the champion it replaces becomes `previous`. Returns the version's number.

    Promoting the champion again changes nothing. Raises TrackingError for an unknown name, version or alias.
    """
    wanted = str(version_or_alias)
    with client_env(Store.of(config, output_dir)) as client:
        version = _resolve(client, f"{name}/{wanted}" if wanted.isdigit() else f"{name}@{wanted}").version
        former = _model(client, name).aliases.get(CHAMPION)
        if former is not None and int(former) != version:
            # first: whatever happens between the two, the old champion stays reachable
            client.set_registered_model_alias(name, PREVIOUS, str(former))
        client.set_registered_model_alias(name, CHAMPION, str(version))
    return str(version)


def render_version(version: ModelVersion, console: Console) -> None:
    """Prints a version: aliases, run, tags, metrics."""
    from rich.text import Text

    from labelmill.tracking.report import format_cell

    heading = Text(f"{version.name}/{version.version}", style="bold")
    if version.aliases:
        heading.append("  " + ", ".join(version.aliases), style="green")
    console.print(heading)
    made = datetime.fromtimestamp(version.created_ms / 1000).strftime("%Y-%m-%d %H:%M:%S")
    rows = {"created": made, "run": version.run_id, **version.tags}
    rows |= {name: format_cell(value) for name, value in version.metrics.items()}
    width = max(map(len, rows))
    for key, value in rows.items():
        # one line a value, however narrow the console: ids and digests are copied
        console.print(Text(f"  {key:<{width}}  {value}"), soft_wrap=True)


def predict(
    config: TrackingConfig, output_dir: str | Path, ref: str, inputs: Sequence[Any], k: int = 5
) -> pd.DataFrame:
    """Predicts with a registered model, as any MLflow client would; the columns are those of `Predictor.predict`.

    Image inputs may be paths or encoded bytes. Raises TrackingError for an unknown model, DataError for a bad
    input.
    """
    import pandas as pd

    mlflow = import_mlflow()
    with client_env(Store.of(config, output_dir)) as client:
        version = _resolve(client, ref)
        path = list(sys.path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = mlflow.pyfunc.load_model(version.uri)
        # MLflow puts the code logged with the model in front; this process goes on with its own
        sys.path[:] = path
        signature = model.metadata.signature
        values = list(inputs)
        if "binary" in str(signature.inputs.input_types()[0]):
            values = [_read(value) for value in values]
        return model.predict(pd.DataFrame({0: values}), params={"k": int(k)})


def _read(value: Any) -> bytes:
    if isinstance(value, str | os.PathLike):
        try:
            return Path(value).read_bytes()
        except OSError as error:
            raise DataError(f"{value}: can't read this image: {first_line(error)}") from error
    return bytes(value)


def _named(name: str) -> str:
    escaped = name.replace("'", "''")
    return f"name = '{escaped}'"


def _all_models(client: MlflowClient) -> list[Any]:
    found, token = [], None
    while True:
        page = client.search_registered_models(max_results=100, page_token=token)
        found.extend(page)
        token = page.token
        if not token:
            return found


def _model(client: MlflowClient, name: str) -> Any:
    mlflow = import_mlflow()
    try:
        return client.get_registered_model(name)
    except mlflow.exceptions.MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "NOT_FOUND"):
            raise
        known = [model.name for model in _all_models(client)]
        hint = did_you_mean(name, known) or " None is registered yet: a job with register_as registers one."
        raise TrackingError(f"registered model {name!r} doesn't exist.{hint}") from None


def _resolve(client: MlflowClient, ref: str) -> ModelVersion:
    match = _REFERENCE.fullmatch(ref.removeprefix("models:/"))
    if match is None:
        raise TrackingError(f"model reference {ref!r}: write NAME, NAME@alias or NAME/version.")
    name = match["name"]
    model = _model(client, name)
    aliases: dict[str, str] = dict(model.aliases)
    newest = [
        str(v.version) for v in client.search_model_versions(_named(name), order_by=["version_number DESC"])
    ]
    if not newest:
        raise TrackingError(f"registered model {name!r} has no version.")
    if alias := match["alias"]:
        if alias not in aliases:
            hint = did_you_mean(alias, aliases) or " It has none."
            raise TrackingError(f"registered model {name!r} has no alias {alias!r}.{hint}")
        wanted = str(aliases[alias])
    elif match["version"]:
        wanted = str(int(match["version"]))
        if wanted not in newest:
            raise TrackingError(
                f"registered model {name!r} has no version {wanted}. Known: {', '.join(newest[:30])}."
            )
    else:
        wanted = str(aliases.get(CHAMPION) or aliases.get(CANDIDATE) or newest[0])
    return _version(client.get_model_version(name, wanted), aliases, {})


def _metrics(client: MlflowClient, run_id: str | None) -> dict[str, float]:
    mlflow = import_mlflow()
    if not run_id:
        return {}
    try:
        metrics = client.get_run(run_id).data.metrics
    except mlflow.exceptions.MlflowException:  # the run was deleted; the version outlives it
        return {}
    return {key: value for key, value in sorted(metrics.items()) if not key.startswith("system/")}


def _version(version: Any, aliases: Mapping[str, Any], metrics: dict[str, float]) -> ModelVersion:
    number = int(version.version)
    return ModelVersion(
        name=version.name,
        version=number,
        aliases=tuple(sorted(alias for alias, target in aliases.items() if int(target) == number)),
        run_id=version.run_id or "",
        created_ms=int(version.creation_timestamp or 0),
        tags=dict(version.tags),
        metrics=metrics,
    )
