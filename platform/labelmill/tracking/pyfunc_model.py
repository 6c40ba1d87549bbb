"""The MLflow face of a packaged model, logged as code, not as a pickle: MLflow runs this file to load it.

The folder of the package lies beside it in the logged model, so that it loads where labelmill isn't
installed.
"""

from __future__ import annotations

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
        """Answers as a DataFrame; params: `k`, answers per input."""
        k = int((params or {}).get("k", 5))
        return self.predictor.predict(self._inputs(model_input), k).to_pandas()

    def _inputs(self, model_input: Any) -> Any:
        spec = self.predictor.spec
        if isinstance(model_input, pd.Series):
            model_input = model_input.to_frame()
        if not isinstance(model_input, pd.DataFrame):
            return model_input if isinstance(model_input, np.ndarray) else list(model_input)
        for name in (spec.field, spec.input):
            if name in model_input.columns:
                return model_input[name].tolist()
        if list(model_input.columns) == [0]:  # a plain list of inputs, as MLflow hands it on
            return model_input[0].tolist()
        raise ValueError(f"the model needs a column {spec.field!r}; the input's first is {model_input.columns[0]!r}")


mlflow.models.set_model(PackagedModel())
