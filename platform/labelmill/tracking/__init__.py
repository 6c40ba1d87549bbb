"""MLflow runs, reports, packaged models and the model registry.

Import from the modules: `report` and `model` need no MLflow, `run` and `registry` load it when they are used.
"""
