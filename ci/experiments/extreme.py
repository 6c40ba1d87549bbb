"""The recorded experiments of extreme classification: arms tuned on dev, then three seeds on the test set.

    python ci/experiments/extreme.py losses             which loss, on Debian's tags
    python ci/experiments/extreme.py parametric         label texts against rows, by how frequent a label is
    python ci/experiments/extreme.py negatives          all labels, the batch's, mined ones, on 147 thousand lemmas
    python ci/experiments/extreme.py spherical          Z-loss against softmax, the next word of a gloss
    python ci/experiments/extreme.py tables             ways of sharing the rows of an embedding table

Every arm of a comparison gets the same trials on the dev set (seed 100), then the seeds. Everything runs in this process,
without Ray. Prints Markdown tables of mean (lowest - highest) in percent. Run it at the root of the
repository, with labelmill and workloads on PYTHONPATH, after `make extreme-data`.
"""

from __future__ import annotations

import argparse
import importlib
import io
import json
import statistics
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from labelmill.host import Host
from labelmill.job import read_job_file
from labelmill.run import execute
from labelmill.training.inprocess import fit_here

ROOT = Path(__file__).resolve().parents[2]
JOBS = ROOT / "workloads/extreme/jobs"
TUNING_SEED = 100
Arm = dict[str, Any]


def run(job_file: str, name: str, out: Path, settings: Arm) -> dict[str, float]:
    """A job to its metrics; a job that ran before is not run again."""
    raw = read_job_file(JOBS / job_file, [f"{k}={json.dumps(v)}" for k, v in settings.items()])
    raw |= {"name": name, "output": str(out)}
    method = importlib.import_module(f"workloads.{raw['workload']}")
    found = next(v for v in vars(method).values() if getattr(v, "name", None) == raw["workload"] and hasattr(v, "run"))
    began = time.process_time()
    host = Host(out / name, fit=fit_here)
    report = execute(found.job_type.model_validate(raw), found.run, host=host, console=Console(file=io.StringIO()))
    return report.metrics | {"cpu_s": time.process_time() - began}


def compare(
    job_file: str | dict[str, str],
    arms: dict[str, Arm],
    trials: list[Arm] | dict[str, list[Arm]],
    shown: list[str],
    options: argparse.Namespace,
    tune_by: str = "test/P@1",
    common: Arm | None = None,
) -> None:
    """Tunes every arm on dev, runs its seeds, prints the table."""
    dev = {"seed": TUNING_SEED}
    print(f"| arm | chosen on dev | {' | '.join(shown)} | CPU s |\n|{'---|' * (3 + len(shown))}", flush=True)
    for arm, settings in arms.items():
        job = job_file if isinstance(job_file, str) else job_file[arm]
        data = read_job_file(JOBS / job)["data"]["dev"]
        mine = trials if isinstance(trials, list) else trials[arm]
        best, chosen = -1.0, mine[0]
        for number, trial in enumerate(mine if len(mine) > 1 else []):
            given = (common or {}) | settings | trial | dev | {"data.test": data}
            value = run(job, f"{arm}-dev{number}".replace(" ", "-"), options.out, given)[tune_by]
            print(f"<!-- {arm} {json.dumps(trial)}: {tune_by} on dev {100 * value:.2f} -->", flush=True)
            if value > best:
                best, chosen = value, trial
        seeds = [
            run(
                job,
                f"{arm}-s{seed}".replace(" ", "-"),
                options.out,
                (common or {}) | settings | chosen | {"seed": seed},
            )
            for seed in range(options.seeds)
        ]
        cells = []
        for metric in shown:
            values = [100 * found[metric] for found in seeds]
            cells.append(f"{statistics.mean(values):.2f} ({min(values):.2f} - {max(values):.2f})")
        cost = statistics.mean(found["cpu_s"] for found in seeds)
        print(f"| {arm} | {json.dumps(chosen)} | {' | '.join(cells)} | {cost:.0f} |", flush=True)


RATES: list[Arm] = [{"train.learning_rate": 0.003}, {"train.learning_rate": 0.01}]
SHOWN = ["test/P@1", "test/P@5", "test/PSP@1", "test/PSP@5", "test/R@10", "test/R@50"]


def losses(options: argparse.Namespace) -> None:
    """Five losses on tags, all of them over all labels."""
    arms: dict[str, Arm] = {
        "softmax": {"loss": {"kind": "softmax"}},
        "decoupled": {"loss": {"kind": "decoupled"}},
        "BCE": {"loss": {"kind": "bce", "bias": -5}},
        "soft top-k, k = positives": {"loss": {"kind": "soft_topk", "k": "num_pos"}},
        "soft top-5": {"loss": {"kind": "soft_topk", "k": 5}},
        "decoupled, one drawn": {"loss": {"kind": "decoupled", "positives": "one"}},
    }
    compare("tags.yaml", arms, RATES, SHOWN, options, common={"index": None})


def parametric(options: argparse.Namespace) -> None:
    """Label texts, rows, and MLCD's objectives on rows, by band of frequency."""
    jobs = {"dual encoder": "tags.yaml", "rows, decoupled": "tags-rows.yaml", "rows, MLCD": "tags-mlcd.yaml"}
    jobs["rows, sampled sum"] = "tags-mlcd.yaml"
    drawn = {"head.loss": {"kind": "softmax"}, "head.scale": 32, "objective": {"kind": "sampled_sum", "draws": 3}}
    drawn["head.class_filter"] = 0.75
    arms: dict[str, Arm] = {"dual encoder": {"index": None}, "rows, decoupled": {}, "rows, MLCD": {}}
    arms["rows, sampled sum"] = drawn
    shown = ["test/P@1", "test/P@5", "test/PSP@1", "test/head R@5", "test/torso R@5", "test/tail R@5", "test/macro R@5"]
    trials = dict.fromkeys(arms, RATES)
    trials["rows, MLCD"] = [r | {"head.scale": s} for r in RATES for s in (16, 64)]
    compare(jobs, arms, trials, shown, options)


def negatives(options: argparse.Namespace) -> None:
    """Equal steps; then the batch's and mined negatives with the seconds that all labels take."""
    mined = {"kind": "mined", "start": 50, "every": 50, "top": 100, "per_query": 1}
    few, many = {"train.steps": options.steps}, {"train.steps": 12 * options.steps}
    longer = mined | {"start": 300, "every": 300}
    arms: dict[str, Arm] = {
        "in-batch": few | {"negatives": {"kind": "in_batch"}},
        "mined": few | {"negatives": mined},
        "all labels": few | {"negatives": {"kind": "full", "chunk": 8192}},
        "in-batch, 12 x the steps": many | {"negatives": {"kind": "in_batch"}},
        "mined, 12 x the steps": many | {"negatives": longer},
    }
    shown = ["test/P@1", "test/P@5", "test/R@10", "test/R@50", "test/tail R@5"]
    compare("lemmas.yaml", arms, [{"train.learning_rate": 0.01}], shown, options, common={"index": None})


def spherical(options: argparse.Namespace) -> None:
    """The factored Z-loss, and softmax over all classes; each its own rates and, for Z, its own a and b."""
    arms: dict[str, Arm] = {"Z-loss": {"compare": None}}
    trials = [
        {"factored": {"loss": {"kind": "z", "a": a, "b": b}, "lr_multiplier": m, "init_std": 0.05}}
        for a, b in ((0.1, 10.0), (1.0, 3.0), (0.1, 30.0))
        for m in (300.0, 3000.0)
    ]
    shown = ["test/P@1", "test/R@10", "test/R@50"]
    compare("next-word.yaml", arms, trials, shown, options, common={"train.steps": options.steps})
    job, steps = "next-word.yaml", {"train.steps": options.steps}
    found: dict[float, float] = {}
    dev = {"seed": TUNING_SEED, "data.test": "data/wordnet-words/dev"}
    prefix = "test/softmax over all classes"
    for rate in (0.003, 0.01):
        value = run(job, f"softmax-dev-{rate}", options.out, steps | dev | {"compare_learning_rate": rate})
        found[rate] = value[f"{prefix}/P@1"]
    best = max(found, key=lambda rate: found[rate])
    seeds = [
        run(job, f"softmax-s{s}", options.out, steps | {"seed": s, "compare_learning_rate": best})
        for s in range(options.seeds)
    ]
    cells = []
    for metric in ("P@1", "R@10", "R@50"):
        values = [100 * record[f"{prefix}/{metric}"] for record in seeds]
        cells.append(f"{statistics.mean(values):.2f} ({min(values):.2f} - {max(values):.2f})")
    names = ("z", "softmax over all classes")
    z_s, softmax_s = (statistics.mean(record[f"seconds/{name}"] for record in seeds) for name in names)
    print(f"| softmax | rate {best} | {' | '.join(cells)} | |")
    print(f"\nSeconds of training side by side: Z {z_s:.0f}, softmax {softmax_s:.0f}.")


def tables(options: argparse.Namespace) -> None:
    """Ways of sharing rows at equal memory, three budgets."""
    shown = ["test/accuracy", "test/macro_f1"]
    for budget in (1.0, 0.1, 0.02):
        print(f"\nrows = {budget} x distinct training values\n")
        arms: dict[str, Arm] = {
            sharing: {"table.sharing": sharing, "table.budget": budget, "compare": []}
            for sharing in ("multiplexed", "separate", "hashing_trick", "collisionless")
        }
        out = argparse.Namespace(**vars(options) | {"out": options.out / f"budget-{budget}"})
        compare("sections.yaml", arms, [{}], shown, out, tune_by="test/accuracy")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = {f.__name__: f for f in (losses, parametric, negatives, spherical, tables)}
    parser.add_argument("experiment", choices=every)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300, help="of `negatives` and `spherical`")
    parser.add_argument("--out", type=Path, default=Path("runs/extreme"))
    options = parser.parse_args()
    options.out = options.out / options.experiment
    every[options.experiment](options)


if __name__ == "__main__":
    main()
