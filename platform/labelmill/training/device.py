"""The one place that chooses devices and collective backends."""

from __future__ import annotations

import os

import torch


def worker_device(use_gpu: bool) -> torch.device:
    """The device of this worker: its GPU when the job reserves one, else the CPU."""
    if not use_gpu:
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def backend(use_gpu: bool) -> str:
    """Collective backend of the worker group."""
    return "nccl" if use_gpu else "gloo"


def quiet_deepspeed() -> None:
    """Settings DeepSpeed needs before its import: no compiler at run time, no chatter.

    The shared-memory all-reduce is compiled on first use even on CPUs and serves inference only; a process killed
    during that build would block every later one.
    """
    import logging
    import warnings

    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    import deepspeed.ops
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
