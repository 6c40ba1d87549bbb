"""Measured steps beside the estimates of `labelmill plan --cluster local`: DeepSpeed engine, encoder and sharded head.

    PYTHONPATH=platform:. .venv/bin/python ci/bench/plan_calibration.py

Two gloo ranks with one thread each. The constants come from the plan's own probe, which runs at other sizes than
the measured steps. Prints a Markdown table; takes about three minutes on two quiet cores.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import warnings
from typing import Any

import torch
import torch.distributed as dist

from labelmill.encoders import build_encoder
from labelmill.encoders.linear import LinearConfig
from labelmill.encoders.text import CharNgramsConfig
from labelmill.encoders.vision import SmallCnnConfig
from labelmill.heads.config import HeadConfig
from labelmill.heads.optim import SGD
from labelmill.losses.margins import CosFace
from labelmill.planning.estimate import Setup, estimate
from labelmill.planning.probe import ProbeObjective, make_batch, probe, timed, train_step
from labelmill.planning.trace import trace_encoder
from labelmill.training.config import TrainConfig
from labelmill.training.engine import Engine
from labelmill.training.local import spawn

WORLD = 2
ENCODERS: dict[str, Any] = {
    "linear 512": LinearConfig(in_dim=512, dim=512),
    "char_ngrams 128": CharNgramsConfig(dim=128, buckets=16384),
    "small_cnn 256": SmallCnnConfig(dim=256, width=16),
}
# encoder, classes, global batch, sample rate, class shards of a replica
CASES: list[tuple[str, int, int, float, int]] = [
    ("linear 512", 100_000, 128, 0.1, 2),
    ("linear 512", 100_000, 256, 0.1, 2),
    ("linear 512", 300_000, 128, 0.1, 2),
    ("linear 512", 300_000, 128, 0.01, 2),
    ("linear 512", 100_000, 128, 0.1, 1),
    ("linear 512", 50_000, 128, 1.0, 2),
    ("linear 512", 100_000, 256, 1.0, 2),
    ("char_ngrams 128", 300_000, 512, 0.05, 2),
    ("char_ngrams 128", 1_000_000, 512, 0.02, 2),
    ("char_ngrams 128", 100_000, 512, 1.0, 2),
    ("small_cnn 256", 100_000, 128, 0.2, 2),
    ("small_cnn 256", 200_000, 64, 0.05, 2),
]


def setup_of(case: tuple[str, int, int, float, int], traced: Any) -> Setup:
    _, classes, batch, rate, shards = case
    head = HeadConfig(
        scale=64.0,
        margin=CosFace(m=0.4),
        sample_rate=rate,
        shards=shards,
        optimizer=SGD(momentum=0.9, weight_decay=5e-4),
    )
    return Setup(traced, head, classes, TrainConfig(global_batch=batch, steps=10, zero_stage=1), WORLD)


def measure(rank: int, world: int, setups: list[Setup], names: list[str]) -> list[float]:
    """Seconds of real steps (lower quartile), case by case."""
    warnings.simplefilter("ignore", FutureWarning)
    found = []
    for setup, name in zip(setups, names, strict=True):
        torch.manual_seed(0)
        encoder = build_encoder(ENCODERS[name])
        engine = Engine(ProbeObjective(encoder, setup.head, setup.num_classes), setup.train, torch.device("cpu"))
        batches = [make_batch(encoder, setup.batch, setup.num_classes, 1, 17 * i + rank) for i in range(3)]
        turn = iter(range(10**6))
        found.append(timed(lambda e=engine, b=batches, t=turn: train_step(e, b[next(t) % 3]), repeats=9, warm=6))
        del engine, encoder
        gc.collect()
        dist.barrier()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the first case of each encoder only")
    parser.add_argument("--parts", action="store_true", help="also the parts of each estimate")
    arguments = parser.parse_args()
    quick = arguments.quick
    warnings.simplefilter("ignore", FutureWarning)
    cases = [c for i, c in enumerate(CASES) if not quick or c[0] not in [d[0] for d in CASES[:i]]]
    traced = {name: trace_encoder(build_encoder(ENCODERS[name])) for name in {c[0] for c in cases}}
    setups = [setup_of(case, traced[case[0]]) for case in cases]
    machines: dict[tuple[str, bool], Any] = {}
    estimates = []
    for case, setup in zip(cases, setups, strict=True):
        key = (case[0], setup.head.sample_rate < 1)
        if key not in machines:
            machines[key] = probe(setup, ENCODERS[case[0]])
        estimates.append(estimate(setup, machines[key]))
    measured = spawn(measure, WORLD, setups, [case[0] for case in cases], timeout_s=900)[0]
    print("| encoder, D | classes | batch | rate | shards x replicas | measured ms | estimate ms | error |")
    print("|---|---|---|---|---|---|---|---|")
    errors = []
    for case, setup, plan, seconds in zip(cases, setups, estimates, measured, strict=True):
        error = plan.step_seconds / seconds - 1
        errors.append(abs(error))
        layout = f"{setup.shards} x {setup.replicas}"
        print(
            f"| {case[0]} | {case[1]:,} | {case[2]} | {case[3]:g} | {layout} | {1e3 * seconds:.1f} | "
            f"{1e3 * plan.step_seconds:.1f} | {100 * error:+.0f}% |"
        )
        if arguments.parts:
            print("  ".join(f"{name} {1e3 * value:.1f}" for name, value in plan.seconds.items() if value > 5e-5))
    print(f"\nlargest error {100 * max(errors):.0f}%, median {100 * statistics.median(errors):.0f}%")
    machine = next(iter(machines.values()))
    print(f"GEMM {machine.spec.tflops['fp32'] * 1e3:.0f} GFLOP/s, copy {machine.spec.memory_gbps:.1f} GB/s a rank")


if __name__ == "__main__":
    main()
