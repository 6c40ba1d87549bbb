#!/usr/bin/env python
"""Runs jobs of the distillation family with several seeds in this one process, and prints means as a Markdown table.

    python ci/experiments/distillation.py workloads/distillation/jobs/kd-fashion.yaml --seeds 0 1 2 --set train.epochs=20

Training runs without Ray workers (`cluster.in_process`), with one worker, so that small fits aren't mostly start-up.
Finished stages are kept in --output: an interrupted call goes on.
"""

from __future__ import annotations

import argparse
import io
import json
import math
from pathlib import Path

import numpy as np
from rich.console import Console

from labelmill.execution import execute
from labelmill.workload import load_job


def run_one(path: str, seed: int, overrides: list[str], output: Path, tag: str) -> dict[str, float]:
    """Metrics of the report of one seed."""
    name = f"{Path(path).stem}{tag}-s{seed}"
    here = {"cluster": "{workers: 1, in_process: true}", "tracking.system_metrics": "false", "train.log_every": "50"}
    own = {"seed": seed, "name": name, "output": output} | here
    method, job = load_job(path, [*overrides, *(f"{key}={value}" for key, value in own.items())])
    return execute(job, method.run, console=Console(file=io.StringIO(), width=160)).metrics


def table(found: dict[int, dict[str, float]], metrics: list[str]) -> str:
    """Arms as rows, mean and standard deviation over the seeds; the last column is paired with the first arm."""
    seeds = sorted(found)
    arms = [key.removeprefix("test/") for key in found[seeds[0]] if key.startswith("test/")]
    base = next((arm for arm in arms if arm != "teacher"), arms[0])
    lines = [f"| arm | {' | '.join(metrics)} | test - {base} |", f"|{'---|' * (len(metrics) + 2)}"]
    for arm in arms:
        cells = []
        for metric in metrics:
            values = np.array([found[s].get(f"{metric}/{arm}", math.nan) for s in seeds])
            scale, digits = (1, 3) if metric == "kl" else (100, 2)
            spread = values.std(ddof=1) if len(values) > 1 else 0.0
            shown = f"{scale * values.mean():.{digits}f} ± {scale * spread:.{digits}f}"
            cells.append("" if np.isnan(values).all() else shown)
        gap = 100 * np.array([found[s][f"test/{arm}"] - found[s][f"test/{base}"] for s in seeds])
        spread = gap.std(ddof=1) if len(gap) > 1 else 0.0
        lines.append(f"| {arm} | {' | '.join(cells)} | {gap.mean():+.2f} ± {spread:.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--output", type=Path, default=Path("runs/distillation"))
    parser.add_argument("--tag", default="", help="tells runs with other settings apart")
    parser.add_argument("--metrics", nargs="+", default=["test", "ece", "agreement", "kl"])
    args = parser.parse_args()
    output = args.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    found: dict[int, dict[str, float]] = {}
    for seed in args.seeds:
        found[seed] = run_one(args.job, seed, args.overrides, output, args.tag)
        (output / f"{Path(args.job).stem}{args.tag}.json").write_text(json.dumps(found, indent=1))
        print(f"\nafter seed {seed}:\n\n{table(found, args.metrics)}", flush=True)


if __name__ == "__main__":
    main()
