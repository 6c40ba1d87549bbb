"""A packaged model as an MLflow model: `mlflow.pyfunc` loads it where labelmill isn't installed."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import warnings
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from labelmill.tracking.config import client_env, import_mlflow
from labelmill.tracking.run import Tracker

if TYPE_CHECKING:
    from mlflow.entities import LoggedModel

    from labelmill.tracking.model import ModelSpec


def log_model(tracker: Tracker, model_dir: str | Path, name: str = "model") -> LoggedModel:
    """Logs a packaged model to the tracker's run; `.model_uri` of the answer is what `mlflow.pyfunc` loads.

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
            client.log_model_artifacts(model.model_id, str(folder))
        except BaseException:
            with contextlib.suppress(Exception):  # the store may be what failed
                client.finalize_logged_model(model.model_id, LoggedModelStatus.FAILED)
            raise
        client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
        client.log_outputs(tracker.run_id, [LoggedModelOutput(model.model_id, step=0)])
        return model


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
