"""The one place that chooses devices and collective backends."""

from __future__ import annotations

import contextlib
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


def keep_freed_memory() -> None:
    """Makes glibc keep memory that is freed, for the next step, instead of giving it back to the kernel.

    Activations of a step are freed and asked for again, and every page of them is then cleared and mapped anew: 2 to 13 %
    of a small encoder's CPU time a step (ci/bench/README.md). A user's own allocator or settings (`LD_PRELOAD`,
    `MALLOC_...`) are left alone. The process's memory stays at its peak.
    """
    import ctypes

    if os.environ.get("LD_PRELOAD") or any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return
    trim_threshold, mmap_threshold, size = -1, -3, 1 << 30
    with contextlib.suppress(OSError, AttributeError):  # another libc
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(mmap_threshold, size)
        libc.mallopt(trim_threshold, size)


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
