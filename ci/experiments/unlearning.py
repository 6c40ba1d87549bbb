"""Methods of unlearning on a part of Fashion-MNIST: python ci/experiments/unlearning.py [class random noisy sisa]

2,000 training samples, a perceptron 784-256-64; less than an hour of one core in all. Every method,
LAF and the simplest baseline alike, has four settings to choose from. They are tried with a seed of its own on a dev part of
the training set, by the gap to retraining; the test set is only looked at with the other seeds, in the end.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from noisy import FASHION, SEEDS, TUNING_SEED, dev_part, train_part
from study import ROOT, Metrics, best, run, table, write

from labelmill.data.manifest import load_manifest
from labelmill.data.shards import read_labels
from labelmill.evaluation.forgetting import interval
from workloads.unlearning.audit import file_name
from workloads.unlearning.task import unit

SAMPLES = 2000
PARTS = ROOT / "data" / "experiments" / "unlearning"
BATCH: dict[str, Any] = {"global_batch": 64, "log_every": 100}
CONSTANT = {"schedule": "constant", "warmup": 0.0}
Setting = dict[str, Any]


def budget(rate: float, epochs: float = 3, **more: Any) -> Setting:
    """A `train` section."""
    return {"train": BATCH | {"learning_rate": rate, "epochs": epochs} | more}


def laf(rate: float, epochs: float, temperature: float, unlearn_rate: float = 0.5) -> Setting:
    """`rate` is that of the alignment, the authors' lr_RA; lr_UE is `unlearn_rate` times it."""
    turns = budget(rate, epochs, **CONSTANT)
    return {"kind": "laf", "temperature": temperature, "unlearn_rate": unlearn_rate} | turns


def repaired(rate: float, layers: int, temperature: float) -> Setting:
    """LAF+R: `layers` learn in the repair, 0: all."""
    return laf(rate, 20, temperature) | {"repair": budget(0.002, 1)["train"], "repair_layers": layers}


def trials(task: str) -> dict[str, list[Setting]]:
    """Four settings of each method."""
    temperature = 5.0 if task == "random" else 20.0
    rates = (0.0001, 0.0005, 0.001, 0.002)
    arms: dict[str, list[Setting]] = {
        "LAF": [laf(rate, epochs, temperature) for rate, epochs in product((1e-4, 5e-4), (20, 40))],
        "LAF+R": [repaired(rate, layers, temperature) for rate, layers in product((1e-4, 5e-4), (1, 0))],
        "fine-tuning": [
            {"kind": "finetune"} | budget(rate, epochs) for rate, epochs in product((0.0005, 0.002), (3, 10))
        ],
        "NegGrad": [{"kind": "ascent"} | budget(rate) for rate in (3e-6, 1e-5, 3e-5, 1e-4)],
        "NegGrad+": [
            {"kind": "neggrad_plus", "alpha": alpha} | budget(rate)
            for alpha, rate in product((0.95, 0.999), (0.0002, 0.001))
        ],
        "random labels": [{"kind": "random_labels"} | budget(rate) for rate in rates],
        "boundary shrink": [
            {"kind": "boundary_shrink", "step": step} | budget(rate)
            for step, rate in product((0.1, 0.3), (3e-5, 1e-4))
        ],
        "bad teacher": [
            {"kind": "bad_teacher", "temperature": t} | budget(rate) for t, rate in product((1.0, 4.0), (0.0002, 0.001))
        ],
        "SCRUB": [
            {"kind": "scrub", "maximise": share} | budget(rate)
            for share, rate in product((0.2, 0.5), (0.0002, 0.001))
        ],
        "dampening": [
            {"kind": "dampening", "alpha": a, "lam": lam, "group": 4} | budget(0.001, 1)
            for a, lam in product((1.5, 5.0), (0.1, 1.0))
        ],
        "Fisher noise": [
            {"kind": "fisher_noise", "alpha": a, "group": 4} | budget(0.001, 1) for a in (1e-8, 1e-7, 1e-6, 1e-5)
        ],
        "CF-k": [
            {"kind": "last_layers", "k": k} | budget(rate) for k, rate in product((1, 2), (0.0005, 0.002))
        ],
        "EU-k": [
            {"kind": "last_layers", "k": k, "fresh": True} | budget(rate)
            for k, rate in product((1, 2), (0.002, 0.01))
        ],
    }  # fmt: skip
    if task == "class":
        arms["UNSIR"] = [
            {"kind": "unsir", "impair": share} | budget(rate) for share, rate in product((0.3, 0.6), (0.0005, 0.002))
        ]
    else:
        arms["SCRUB+R"] = [setting | {"rewind": True} for setting in arms["SCRUB"]]
    return arms


def go(task: str, name: str, seed: int, test: Path, methods: dict[str, Setting], **more: Any) -> Metrics:
    """One seed of the job of a task, with these methods."""
    return run(
        f"unlearning/jobs/{task}-fashion.yaml",
        f"unlearning-{task}-{name}",
        data={"train": str(train_part(SAMPLES)), "test": str(test), "dev": str(dev_part())},
        samples=None,
        seeds=[seed],
        methods=methods,
        **more,
    )


SWEEP = {
    f"rate {rate} x {unlearn}, temperature {temperature:g}, {epochs} epochs": laf(rate, epochs, temperature, unlearn)
    for rate, unlearn, temperature, epochs in (
        (1e-4, 0.5, 5.0, 20),  # the authors'
        (1e-4, 0.5, 5.0, 100),
        (1e-3, 0.5, 5.0, 20),
        (1e-3, 0.5, 5.0, 60),
        (1e-3, 0.5, 1.0, 20),
        (1e-3, 0.5, 0.2, 20),
        (3e-4, 5.0, 5.0, 20),
        (3e-4, 5.0, 5.0, 60),
        (3e-4, 0.1, 0.2, 40),
        (3e-3, 0.5, 5.0, 20),
    )
}
"""Does a longer training or another setting make LAF forget random samples?"""

COLUMNS = {
    "D_r": "train_r",
    "D_f": "train_f",
    "test_r": "test_r",
    "test_f": "test_f",
    "gap": "gap",
    "JS": "js_to_retrain",
    "ZRF": "zrf",
    "relearn": "relearn",
    "MIA boosted": "mia_boosted_by_class",
    "MIA logistic": "mia_logistic_by_class",
    "MIA threshold": "mia_threshold_by_class",
    "LiRA": "mia_lira_auc",
    "time": "time",
}
DIGITS = {"js_to_retrain": 3, "zrf": 3, "gap": 2}


def study(task: str) -> None:
    """Chooses a setting of each method, runs them with the other seeds, writes the tables."""
    arms = trials(task)
    tried = {f"{name} {i}": setting for name, settings in arms.items() for i, setting in enumerate(settings)}
    sweep = {f"sweep {i}": setting for i, setting in enumerate(SWEEP.values())} if task == "random" else {}
    only_accuracies = {"samples": 600, "attacks": []}
    tuned = go(task, "tune", TUNING_SEED, dev_part(), tried | sweep, audit=only_accuracies)
    # a setting that diverged has no gap
    gaps = {name: tuned.get(f"{file_name(name)}/gap", math.inf) for name in tried | sweep}
    chosen = {name: best({i: -gaps[f"{name} {i}"] for i in range(len(settings))}) for name, settings in arms.items()}
    finals = {name: arms[name][i] for name, i in chosen.items()}
    if sweep:
        finals["LAF, best of sweep"] = sweep[best({name: -gaps[name] for name in sweep})]
    results = {seed: go(task, f"s{seed}", seed, FASHION / "test", finals) for seed in SEEDS}

    def values(name: str, column: str) -> list[float]:
        return [results[seed].get(f"{file_name(name)}/{column}", math.nan) for seed in SEEDS]

    versions = ["original", "retrain", *finals]
    shown = {title: c for title, c in COLUMNS.items() if any(not math.isnan(v) for n in versions for v in values(n, c))}
    rows = [[name, *(cell(values(name, c), DIGITS.get(c, 1)) for c in shown.values())] for name in versions]
    by_seed = [[name, *(f"{gap:.2f}" for gap in values(name, "gap"))] for name in versions]
    settings = [
        [name, told(finals[name]), ", ".join(f"{gaps[f'{name} {i}']:.2f}" for i in range(len(arms[name])))]
        for name in arms
    ]
    parts = [
        *("percent; JS in bits; mean and half width of the 95 % interval", "", table(["version", *shown], rows), ""),
        *("gap by seed", "", table(["version", *map(str, SEEDS)], by_seed), ""),
        *("settings", "", table(["method", "chosen by the gap on the dev part", "gaps of the four"], settings)),
    ]
    if sweep:
        looked = {"original": "original", "retrain": "retrain"} | dict(zip(SWEEP, sweep, strict=True))
        rows = [
            [
                told_,
                *(
                    f"{tuned.get(f'{file_name(name)}/{c}', math.nan):.1f}"
                    for c in ("train_r", "train_f", "test_r", "gap")
                ),
            ]
            for told_, name in looked.items()
        ]
        parts += ["", "LAF on the tuning seed", "", table(["setting", "D_r", "D_f", "dev", "gap"], rows)]
    write("unlearning", task, "\n".join(parts))


def cell(values: list[float], digits: int) -> str:
    """`mean ± half width of the 95 % interval`."""
    mean, half = interval(values)
    return "-" if math.isnan(mean) else f"{mean:.{digits}f} ± {half:.{digits}f}"


def told(setting: Setting) -> str:
    """A setting in words."""
    train = setting["train"]
    own = [f"{k} {v}" for k, v in setting.items() if k not in ("kind", "train", "repair", "group")]
    return ", ".join([f"rate {train['learning_rate']}, {train['epochs']:g} epochs", *own])


# --- SISA ------------------------------------------------------------------------------------------------------

LAYOUTS = {"one model": (1, 1), "4 x 3": (4, 3), "8 x 3": (8, 3)}
"""Shards and slices."""
DELETED = (1, 10, 100)


def sisa_run(name: str, layout: str, seed: int, test: Path, rate: float, epochs: int, **more: Any) -> Metrics:
    """A training with shards and slices."""
    shards, slices = LAYOUTS[layout]
    return run(
        "unlearning/jobs/sisa-fashion.yaml",
        f"unlearning-sisa-{file_name(layout)}-{name}",
        data={"train": str(train_part(SAMPLES)), "test": str(test)},
        sisa={"shards": shards, "slices": slices},
        train=BATCH | {"learning_rate": rate, "epochs": epochs},
        seed=seed,
        **more,
    )


def sisa() -> None:
    """What shards and slices cost in accuracy, and what they save when samples are deleted."""
    data = load_manifest(str(train_part(SAMPLES)))
    keys = [key for i in range(len(data.shards)) for key in read_labels(data, i).column("key").to_pylist()]
    rows, settings = [], []
    for layout in LAYOUTS:
        dev = {
            (rate, epochs): sisa_run(
                f"tune-{rate}-{epochs}", layout, TUNING_SEED, dev_part(), rate, epochs, register_as=None
            )["test/top1"]
            for rate, epochs in product((0.002, 0.005), (15, 45))
        }
        rate, epochs = best(dev)
        settings.append([layout, f"rate {rate}, {epochs} epochs", ", ".join(f"{100 * v:.1f}" for v in dev.values())])
        found: dict[str, list[float]] = {}
        for seed in SEEDS:
            model = f"sisa-{file_name(layout)}-{seed}"
            made = sisa_run(f"s{seed}", layout, seed, FASHION / "test", rate, epochs, register_as=model)
            found.setdefault("test", []).append(100 * made["test/top1"])
            found.setdefault("a constituent", []).append(100 * made["test/constituents"])
            for count in DELETED:
                forgot = delete(model, f"{file_name(layout)}-{count}-s{seed}", keys, count, seed)
                found.setdefault(f"{count} deleted: turns", []).append(forgot["forget/turns"])
                found.setdefault(f"cost of {count}", []).append(forgot["forget/share"])
        rows.append([layout, *(cell(values, 1) for values in found.values())])
    text = [
        *("percent, cost of training all turns; mean and half width of the 95 % interval", ""),
        *(table(["shards x slices", *found], rows), ""),
        table(["shards x slices", "chosen on the dev part", "dev of the four"], settings),
    ]
    write("unlearning", "sisa", "\n".join(text))


def delete(model: str, name: str, keys: list[str], count: int, seed: int) -> Metrics:
    """A request for `count` samples, drawn by their keys."""
    PARTS.mkdir(parents=True, exist_ok=True)
    file = PARTS / f"delete-{count}-{seed}.txt"
    file.write_text("\n".join(sorted(keys, key=lambda key: unit(key, f"delete|{seed}"))[:count]) + "\n")
    return run(
        "unlearning/jobs/forget-ids.yaml",
        f"unlearning-sisa-delete-{name}",
        model=f"{model}/1",
        request={"kind": "ids", "file": str(file)},
        method={"kind": "sisa"},
        train=BATCH | {"epochs": 1},  # the recipe is that of the model
        reference=False,
        audit={"samples": 600, "attacks": []},
    )


STUDIES: dict[str, Callable[[], None]] = {
    **{task: partial(study, task) for task in ("class", "random", "noisy")},
    "sisa": sisa,
}

if __name__ == "__main__":
    for name in sys.argv[1:] or STUDIES:
        STUDIES[name]()
