"""A packaged model as an MLflow model: `mlflow.pyfunc` loads it where labelmill isn't installed."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from labelmill.errors import DataError
from labelmill.tracking.config import client_env, import_mlflow
from labelmill.tracking.run import Tracker

if TYPE_CHECKING:
    from mlflow.entities import LoggedModel

    from labelmill.tracking.model import ModelSpec

PACKAGE = Path("artifacts/model")  # of a logged model: the packaged one
MODEL_SUM, CODE_SUM = "labelmill.model_sha256", "labelmill.code_sha256"


def log_model(tracker: Tracker, model_dir: str | Path, name: str = "model") -> tuple[LoggedModel, dict[str, str]]:
    """Logs a packaged model to the tracker's run; `.model_uri` of the answer is what `mlflow.pyfunc` loads.

    With it come digests for the registry (`digests`): what the artifact store gives back is compared with them.

    The files are copied once, into the artifact store. Raises DataError for a folder that isn't a finished
    model and TrackingError when the store fails.
    """
    from mlflow.entities import LoggedModelOutput, LoggedModelStatus

    from labelmill.tracking.model import read_spec

    model_dir = Path(model_dir).resolve()
    spec = read_spec(model_dir)
    with client_env(tracker.store, create=True) as client, tempfile.TemporaryDirectory() as temporary:
        experiment_id = client.get_run(tracker.run_id).info.experiment_id
        model = client.create_logged_model(experiment_id, name, source_run_id=tracker.run_id)
        try:
            folder = _mlflow_folder(Path(temporary, "model"), model_dir, spec, model)
            sums = digests(folder)
            client.log_model_artifacts(model.model_id, str(folder))
        except BaseException:
            with contextlib.suppress(Exception):  # the store may be what failed
                client.finalize_logged_model(model.model_id, LoggedModelStatus.FAILED)
            raise
        client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
        client.log_outputs(tracker.run_id, [LoggedModelOutput(model.model_id, step=0)])
        return model, sums


def digests(folder: Path) -> dict[str, str]:
    """Of the folder of a logged model: the sha256 of its `model.json`, which has those of the packaged model's other
    files, and one digest of everything that MLflow reads or runs."""
    from labelmill.tracking.model import sha256_of

    apart = {"registered_model_meta", "__pycache__"}  # the first is MLflow's note of where it was downloaded from
    outside = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_file() and not name.is_relative_to(PACKAGE) and not apart & {*name.parts}:
            outside.update(f"{name.as_posix()} {sha256_of(path)}\n".encode())
    return {MODEL_SUM: sha256_of(folder / PACKAGE / "model.json"), CODE_SUM: outside.hexdigest()}


def check_package(folder: Path, tags: Mapping[str, str], ref: str) -> None:
    """Raises DataError when a packaged model isn't the one that the registry knows by `tags`."""
    from labelmill.tracking.model import sha256_of

    wanted = tags.get(MODEL_SUM)  # versions of an older labelmill have none
    if wanted and sha256_of(folder / "model.json") != wanted:
        raise DataError(
            f"{ref}: {folder / 'model.json'} isn't what was registered (sha256 differs). Somebody changed it in the "
            "artifact store: register the model again."
        )


def check_logged(folder: Path, tags: Mapping[str, str], ref: str) -> None:
    """The same for a logged model with the code that MLflow runs. Raises DataError."""
    check_package(folder / PACKAGE, tags, ref)
    wanted = tags.get(CODE_SUM)
    if wanted and digests(folder)[CODE_SUM] != wanted:
        raise DataError(
            f"{ref}: the code or settings in {folder} aren't what was registered (sha256 differs). Nothing of it was run; "
            "register the model again."
        )


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
    import numpy as np
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema, TensorSpec
    from mlflow.types.schema import Array, DataType

    answer: list[Any] = [ColSpec(DataType.long, "input")]
    if spec.predictor == "embed":
        answer.append(ColSpec(Array(DataType.float), "embedding"))
    else:
        answer += [ColSpec(DataType.long, "rank"), ColSpec(DataType.long, "class_id"),
                   ColSpec(DataType.string, "class"), ColSpec(DataType.double, "score")]  # fmt: skip
    if spec.input == "array":
        # a column of arrays would refuse plain nested lists, and its errors wouldn't name the field
        taken: Any = TensorSpec(np.dtype(np.float64), (-1, *(spec.shape or (-1,))), name=spec.field)
    else:
        # the column has no name here, so that a plain list of inputs is taken as well as a DataFrame
        taken = ColSpec({"text": DataType.string, "image": DataType.binary}[spec.input])
    return ModelSignature(
        inputs=Schema([taken]),
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
