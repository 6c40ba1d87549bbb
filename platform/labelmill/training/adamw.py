"""torch's AdamW without torch's compiler.

Making an optimizer and its first step import all of `torch._dynamo`, to tell the compiler not to look into them, and so
does a module of DeepSpeed: a second of every worker's start (ci/bench/README.md). Nothing here compiles an optimizer. A
method that compiles a model imports the compiler by that, and finds it as ever.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any

import torch

_step: Callable[..., Any] | None = getattr(torch.optim.Adam.step, "__wrapped__", None)


class AdamW(torch.optim.AdamW):
    """The same numbers: only how `step` is wrapped differs."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        _leave_the_compiler_out()
        super().__init__(*args, **kwargs)

    if _step is not None:  # as torch 2.13 has it; otherwise its own step, with the import
        step = torch.no_grad()(_step)


def _leave_the_compiler_out() -> None:
    """Methods that are marked `torch._disable_dynamo` look up what to call in a note of the plain one."""
    if "torch._dynamo" in sys.modules:
        return
    for method in vars(torch.optim.Optimizer).values():
        plain = getattr(method, "__wrapped__", None)
        if plain is not None and getattr(method, "__globals__", {}).get("__name__") == "torch._compile":
            plain.__dict__.setdefault("__dynamo_disable", plain)


def import_muon_plain() -> None:
    """DeepSpeed's ZeRO asks whether an optimizer is its Muon, whose module compiles a function when it is imported."""
    from deepspeed.runtime import compiler

    original = compiler.compile
    compiler.compile = lambda *_, **__: lambda function: function
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    except ImportError:
        pass
    finally:
        compiler.compile = original
