"""The engine's AdamW computes what torch's does, and leaves torch's compiler where it is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CODE = """
import sys, torch
from labelmill.training.adamw import AdamW

def train(kind):
    torch.manual_seed(0)
    layer = torch.nn.Linear(5, 3)
    groups = [{"params": [layer.weight], "weight_decay": 0.1}, {"params": [layer.bias], "weight_decay": 0.0}]
    optimizer = kind(groups, lr=0.1, betas=(0.8, 0.9))
    for _ in range(5):
        layer(torch.randn(4, 5)).pow(2).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    kept = optimizer.state_dict()["state"][0]
    assert layer.weight.requires_grad
    return layer.weight.detach(), layer.bias.detach(), kept["exp_avg"], kept["exp_avg_sq"]

ours = train(AdamW)
assert "torch._dynamo" not in sys.modules
theirs = train(torch.optim.AdamW)
assert "torch._dynamo" in sys.modules
assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
print("equal")
"""


def test_it_is_torchs_without_the_import_of_the_compiler() -> None:
    env = os.environ | {"PYTHONPATH": str(ROOT / "platform")}
    done = subprocess.run([sys.executable, "-c", CODE], env=env, capture_output=True, text=True, timeout=120)
    assert done.stdout == "equal\n", done.stderr
