"""Metrics as pure functions of tensors: no Ray, no DeepSpeed, no MLflow."""
