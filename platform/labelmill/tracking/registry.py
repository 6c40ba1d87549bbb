"""The model registry: packaged models as versions of a name, found by alias.

A new version is the `candidate`. `promote` makes it the `champion` and the champion it replaces the
`previous` one. A reference is `NAME` (champion, else candidate, else the newest version), `NAME@alias` or
`NAME/version`.
"""

from __future__ import annotations

import json
import os
import re
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from labelmill.errors import DataError, TrackingError, did_you_mean
from labelmill.job import TrackingConfig
from labelmill.tracking.config import Store, client_env, first_line, import_mlflow
from labelmill.tracking.mlflow_model import check_logged, log_model
from labelmill.tracking.run import Tracker

if TYPE_CHECKING:
    import pandas as pd
    from mlflow import MlflowClient
    from rich.console import Console

CANDIDATE, CHAMPION, PREVIOUS = "candidate", "champion", "previous"
CHAMPIONS = "labelmill.champions"
"""Tag of a registered model: the versions that were champion, oldest first."""
_PARENTS = "labelmill.parents"
REVOKED = "labelmill.revoked"
"""Tag of a version that must not answer any more: when and why."""
_REFERENCE = re.compile(r"(?P<name>[^@/:]+)(?:@(?P<alias>[^@/:]+)|/(?P<version>\d+))?")


@dataclass(frozen=True)
class DataInput:
    """A data set that the run of a model read.

    Attributes:
        context: what for (`train`, `test`).
        digest: of its manifest.
        parents: digests of the versions that it was made from.
    """

    context: str
    name: str
    digest: str
    source: str
    parents: tuple[str, ...] = ()


@dataclass(frozen=True)
class ModelVersion:
    """A version of a registered model.

    Attributes:
        uri: what `mlflow.pyfunc.load_model` takes, by version number.
        aliases: names that point at this version now.
        run_id: the MLflow run that made it.
        created_ms: Unix time in milliseconds.
        metrics: final metrics of the run; `show` and `load_version` alone fill metrics and data.
        data: what the run read.
    """

    name: str
    version: int
    aliases: tuple[str, ...]
    run_id: str
    created_ms: int
    tags: dict[str, str]
    metrics: dict[str, float] = field(default_factory=dict)
    data: tuple[DataInput, ...] = ()

    @property
    def parents(self) -> tuple[str, ...]:
        """The models it was made from, as `NAME/VERSION`."""
        return tuple(json.loads(self.tags.get(_PARENTS, "[]")))

    @property
    def revoked(self) -> str:
        """When and why it was revoked; empty if it wasn't."""
        return self.tags.get(REVOKED, "")

    @property
    def uri(self) -> str:
        """`models:/NAME/VERSION`."""
        return f"models:/{self.name}/{self.version}"


@dataclass(frozen=True)
class RegisteredModel:
    """A registered name: its newest version, where its aliases point, the newest version's predictor rule."""

    name: str
    latest: int
    aliases: dict[str, int]
    predictor: str
    updated_ms: int


# --- putting in ---------------------------------------------------------------------------------------------


def register(
    tracker: Tracker,
    model_dir: str | Path,
    name: str,
    tags: Mapping[str, str] | None = None,
    parents: Sequence[str] = (),
) -> int:
    """Logs a packaged model and registers it as a new version of `name`, which becomes the `candidate`.

    `parents` are references of the registered models it was made from (a teacher, a model that was gone on with); they
    are kept by version number.

    Raises TrackingError for a name the registry can't hold or a store that fails, DataError for a broken
    model.
    """
    from labelmill.tracking.model import read_spec

    if not name or not re.fullmatch(r"[^@/:]+", name):
        raise TrackingError(f"model name {name!r}: it must not be empty or hold '@', '/' or ':'.")
    spec = read_spec(model_dir)
    model, sums = log_model(tracker, model_dir)
    own = {
        "labelmill.manifest": spec.manifest,
        "labelmill.code_version": spec.code_version,
        "labelmill.num_classes": str(spec.num_classes),
        "labelmill.predictor": spec.predictor,
        "labelmill.encoder": str(spec.encoder.get("kind", "")),
        **sums,
    }
    with client_env(tracker.store) as client:
        _ensure_registered(client, name)
        if parents:
            own[_PARENTS] = json.dumps(_log_parents(client, tracker.run_id, parents))
        version = client.create_model_version(
            name, model.model_uri, tracker.run_id, {**own, **(tags or {})}, model_id=model.model_id
        ).version
        client.set_registered_model_alias(name, CANDIDATE, str(version))
    tracker.tags({"labelmill.model": f"{name}/{version}"})
    return int(version)


def _log_parents(client: MlflowClient, run_id: str, parents: Sequence[str]) -> list[str]:
    """Notes the parents as the run's model inputs, where MLflow shows them; returns them as `NAME/VERSION`."""
    from mlflow.entities import LoggedModelInput

    found = [_resolve(client, parent) for parent in parents]
    ids = [client.get_model_version(v.name, str(v.version)).model_id for v in found]
    models = [LoggedModelInput(model_id=model_id) for model_id in ids if model_id]
    if models:
        client.log_inputs(run_id, models=models)
    return [f"{v.name}/{v.version}" for v in found]


def _ensure_registered(client: MlflowClient, name: str) -> None:
    mlflow = import_mlflow()
    try:
        client.create_registered_model(name)
    except mlflow.exceptions.MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


# --- looking up ---------------------------------------------------------------------------------------------


def list_models(config: TrackingConfig, output_dir: str | Path = "runs") -> list[RegisteredModel]:
    """Every registered model, by name."""
    with client_env(Store.of(config, output_dir)) as client:
        models = []
        for model in _all_models(client):
            # the search leaves aliases out
            full = client.get_registered_model(model.name)
            versions = client.search_model_versions(_named(model.name), max_results=1, order_by=["version_number DESC"])
            aliases = {alias: int(version) for alias, version in sorted(full.aliases.items())}
            latest, predictor = 0, ""
            if versions:
                latest, predictor = int(versions[0].version), versions[0].tags.get("labelmill.predictor", "")
            updated = full.last_updated_timestamp or 0
            models.append(RegisteredModel(model.name, latest, aliases, predictor, updated))
    return sorted(models, key=lambda model: model.name)


def show(config: TrackingConfig, output_dir: str | Path, name: str) -> list[ModelVersion]:
    """All versions of a model, newest first, with the metrics and data of their runs.

    Raises TrackingError for an unknown model.
    """
    with client_env(Store.of(config, output_dir)) as client:
        model = _model(client, name)
        return [
            _version(v, model.aliases, *_of_run(client, v.run_id))
            for v in client.search_model_versions(_named(name), order_by=["version_number DESC"])
        ]


def load_version(client: MlflowClient, ref: str) -> ModelVersion:
    """The version a reference means, with the metrics and data of its run. Raises TrackingError."""
    version = _resolve(client, ref)
    metrics, data = _of_run(client, version.run_id)
    return replace(version, metrics=metrics, data=data)


def fetch_artifacts(
    config: TrackingConfig,
    output_dir: str | Path,
    version: ModelVersion,
    name: str,
    into: Path,
    missing_ok: bool = False,
) -> Path | None:
    """A folder of the artifacts of the run that made a version, copied below `into`.

    Raises TrackingError when the run keeps nothing under that name; with `missing_ok` gives None then.
    """
    from mlflow.exceptions import MlflowException

    into.mkdir(parents=True, exist_ok=True)
    with client_env(Store.of(config, output_dir)) as client:
        try:
            if name in {entry.path for entry in client.list_artifacts(version.run_id)}:
                return Path(client.download_artifacts(version.run_id, name, str(into)))
        except (MlflowException, OSError) as error:
            raise TrackingError(
                f"{version.name}/{version.version}: its run's {name!r} can't be read: {error}"
            ) from error
    if missing_ok:
        return None
    raise TrackingError(f"{version.name}/{version.version}: its run keeps no {name!r} any more.")


def resolve(config: TrackingConfig, output_dir: str | Path, ref: str) -> ModelVersion:
    """The version a reference means. Raises TrackingError that names what there is when it means none."""
    with client_env(Store.of(config, output_dir)) as client:
        return _resolve(client, ref)


def promote(config: TrackingConfig, output_dir: str | Path, name: str, version_or_alias: str | int = CANDIDATE) -> str:
    """Makes a version the `champion`, the champion it replaces `previous`; returns the version's number.

    Promoting the champion again changes nothing. Raises TrackingError for an unknown name, version or alias.
    """
    wanted = str(version_or_alias)
    with client_env(Store.of(config, output_dir)) as client:
        version = _resolve(client, f"{name}/{wanted}" if wanted.isdigit() else f"{name}@{wanted}").version
        crown(client, name, version)
    return str(version)


def crown(client: MlflowClient, name: str, version: int) -> None:
    """Moves `champion` to a version, `previous` to the champion it replaces, and writes both down."""
    model = _model(client, name)
    former = model.aliases.get(CHAMPION)
    if former is not None and int(former) == version:
        return
    usable(_resolve(client, f"{name}/{version}"))
    if former is not None:
        # first: whatever happens between the two, the old champion stays reachable
        client.set_registered_model_alias(name, PREVIOUS, str(former))
    client.set_registered_model_alias(name, CHAMPION, str(version))
    past = champions(model)
    if former is not None and past[-1:] != [int(former)]:  # it was made champion by other hands
        past.append(int(former))
    # a tag holds 5,000 characters; nobody goes back further than this
    client.set_registered_model_tag(name, CHAMPIONS, " ".join(map(str, [*past, version][-100:])))


def usable(version: ModelVersion) -> ModelVersion:
    """The version. Raises TrackingError when it was revoked."""
    if version.revoked:
        raise TrackingError(
            f"{version.name}/{version.version} was revoked ({version.revoked}) and answers no more. `labelmill models show "
            f"{version.name}` lists the others."
        )
    return version


def champions(model: Any) -> list[int]:
    """The versions that were champion, oldest first, as MLflow's entity of a registered model has them."""
    return [int(part) for part in model.tags.get(CHAMPIONS, "").split() if part.isdigit()]


def render_version(version: ModelVersion, console: Console) -> None:
    """Prints a version: aliases, run, the data and the models it comes from, tags, metrics."""
    from rich.text import Text

    from labelmill.tracking.report import format_cell

    heading = Text(f"{version.name}/{version.version}", style="bold")
    if version.aliases:
        heading.append("  " + ", ".join(version.aliases), style="green")
    console.print(heading)
    made = datetime.fromtimestamp(version.created_ms / 1000).strftime("%Y-%m-%d %H:%M:%S")
    rows = {"created": made, "run": version.run_id}
    for data in version.data:
        made_of = f", made from {', '.join(digest[:12] for digest in data.parents)}" if data.parents else ""
        rows[f"{data.context} data"] = f"{data.name} {data.digest} ({data.source}){made_of}"
    if version.parents:
        rows["parent models"] = ", ".join(version.parents)
    rows |= {key: value for key, value in version.tags.items() if key != _PARENTS}
    rows |= {name: format_cell(value) for name, value in version.metrics.items()}
    width = max(map(len, rows))
    for key, value in rows.items():
        # one line a value, however narrow the console: ids and digests are copied
        console.print(Text(f"  {key:<{width}}  {value}"), soft_wrap=True)


def predict(
    config: TrackingConfig, output_dir: str | Path, ref: str, inputs: Sequence[Any], k: int = 5
) -> pd.DataFrame:
    """Predicts with a registered model, as any MLflow client would; columns as of `Predictor.predict`.

    Image inputs may be paths or encoded bytes. Raises TrackingError for an unknown model, DataError for a bad
    input or files that aren't those that were registered.
    """
    import pandas as pd

    mlflow = import_mlflow()
    values = list(inputs)
    if not values:
        raise DataError("there is nothing to predict: give at least one input")
    with client_env(Store.of(config, output_dir)) as client:
        version = usable(_resolve(client, ref))
        path = list(sys.path)
        folder = mlflow.artifacts.download_artifacts(artifact_uri=version.uri)
        check_logged(Path(folder), version.tags, version.uri)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = mlflow.pyfunc.load_model(folder)
        # MLflow puts the code logged with the model in front; this process goes on with its own
        sys.path[:] = path
        kind = str(model.metadata.signature.inputs.input_types()[0])
        wrong = next((i for i, value in enumerate(values) if not isinstance(value, str)), None)
        if "string" in kind and wrong is not None:
            raise DataError(f"input {wrong}: expected a text, got {type(values[wrong]).__name__}")
        if "float" in kind:  # arrays
            import numpy as np

            return model.predict(np.asarray(values, np.float64), params={"k": int(k)})
        if "binary" in kind:
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
    found: list[Any] = []
    token = None
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
    newest = [str(v.version) for v in client.search_model_versions(_named(name), order_by=["version_number DESC"])]
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
            raise TrackingError(f"registered model {name!r} has no version {wanted}. Known: {', '.join(newest[:30])}.")
    else:
        wanted = str(aliases.get(CHAMPION) or aliases.get(CANDIDATE) or newest[0])
    return _version(client.get_model_version(name, wanted), aliases, {})


def _of_run(client: MlflowClient, run_id: str | None) -> tuple[dict[str, float], tuple[DataInput, ...]]:
    """Metrics and data of a run; nothing when it was deleted, for the version outlives it."""
    mlflow = import_mlflow()
    if not run_id:
        return {}, ()
    try:
        run = client.get_run(run_id)
    except mlflow.exceptions.MlflowException:
        return {}, ()
    metrics = {key: value for key, value in sorted(run.data.metrics.items()) if not key.startswith("system/")}
    inputs = run.inputs.dataset_inputs if run.inputs else []
    return metrics, tuple(_data_input(found) for found in inputs)


def _data_input(found: Any) -> DataInput:
    tags = {tag.key: tag.value for tag in found.tags}
    data = found.dataset

    def read(text: str | None) -> dict[str, Any]:
        try:
            content = json.loads(text or "{}")
        except ValueError:
            return {}
        return content if isinstance(content, dict) else {}

    return DataInput(
        context=tags.get("mlflow.data.context", ""),
        name=data.name,
        digest=tags.get("manifest_sha256", data.digest),
        source=str(read(data.source).get("uri", "")),
        parents=tuple(str(digest) for digest in read(data.profile).get("parents", ())),
    )


def _version(
    version: Any, aliases: Mapping[str, Any], metrics: dict[str, float], data: tuple[DataInput, ...] = ()
) -> ModelVersion:
    number = int(version.version)
    return ModelVersion(
        name=version.name,
        version=number,
        aliases=tuple(sorted(alias for alias, target in aliases.items() if int(target) == number)),
        run_id=version.run_id or "",
        created_ms=int(version.creation_timestamp or 0),
        tags=dict(version.tags),
        metrics=metrics,
        data=data,
    )
