"""The MLflow face of a packaged model, logged as code, not as a pickle: MLflow runs this file to load it.

The folder of the package lies beside it in the logged model, so that it loads where labelmill isn't
installed.
"""

from __future__ import annotations

import base64
import binascii
from typing import Any

import mlflow
import numpy as np
import pandas as pd


class PackagedModel(mlflow.pyfunc.PythonModel):  # type: ignore[name-defined]
    """Predicts from a DataFrame with the model's input column, or from a list of inputs."""

    def load_context(self, context: Any) -> None:
        """Opens the model; `device` may be given as `model_config` of `mlflow.pyfunc.load_model`."""
        from labelmill.tracking.model import load_model

        self.predictor = load_model(context.artifacts["model"], (context.model_config or {}).get("device", "cpu"))

    # MLflow reads a type hint of model_input as a second schema; the logged signature is the one that counts
    _skip_type_hint_validation = True

    def predict(self, context, model_input, params=None):
        """Answers as a DataFrame; params: `k`, answers per input.

        An input that can't be used raises MLflow's exception of a bad request, so that a server answers 400 with what
        was wrong instead of a traceback.
        """
        from labelmill.errors import UserError

        spec = self.predictor.spec
        try:
            k = int((params or {}).get("k", 5))
            if k < 1:
                raise ValueError(f"params.k: must be at least 1, not {k}")
            return self.predictor.predict(self._inputs(model_input), k).to_pandas()
        except (UserError, ValueError, TypeError, FloatingPointError) as error:
            text = str(error)
            raise mlflow.exceptions.MlflowException.invalid_parameter_value(
                text if text.startswith("params.") or "column" in text else f"{spec.field}: {text}"
            ) from error

    def _inputs(self, model_input: Any) -> Any:
        spec = self.predictor.spec
        if isinstance(model_input, pd.Series):
            model_input = model_input.to_frame()
        if isinstance(model_input, dict):  # of a signature with a named tensor
            model_input = model_input[spec.field]
        if isinstance(model_input, pd.DataFrame):
            model_input = self._column(model_input)
        if isinstance(model_input, np.ndarray) and model_input.dtype != object:
            return model_input
        values = list(model_input)
        if spec.input == "image":
            return [_from_base64(number, value) for number, value in enumerate(values)]
        return values

    def _column(self, frame: pd.DataFrame) -> list[Any]:
        spec = self.predictor.spec
        for name in (spec.field, spec.input):
            if name in frame.columns:
                return frame[name].tolist()
        if list(frame.columns) == [0]:  # a plain list of inputs, as MLflow hands it on
            return frame[0].tolist()
        raise ValueError(f"the model needs a column {spec.field!r}; the input's first is {frame.columns[0]!r}")


def _from_base64(number: int, value: Any) -> Any:
    """JSON has no bytes: an image arrives as base64, which MLflow decodes in DataFrames, but not in `inputs`."""
    text = value if isinstance(value, str) else value.decode("ascii") if _looks_like_text(value) else None
    if text is None:
        return value
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error:
        raise ValueError(f"input {number}: neither an image nor base64") from None


def _looks_like_text(value: Any) -> bool:
    # no image file is without a byte above 127 or a control character
    return isinstance(value, bytes) and value.isascii() and value.decode("ascii").isprintable()


mlflow.models.set_model(PackagedModel())
