"""The noisy-label experiments on parts of Fashion-MNIST: python ci/experiments/noisy.py [ldr confident nested rcal reranking]

Small on purpose: 5,000 or 10,000 training samples and multilayer perceptrons (a small convolutional net for `rcal`), so
that everything runs on one core in less than an hour. Settings of every arm, baselines included, are chosen on a part of
the training set with noisy labels, with a seed of its own; the clean test set is only looked at in the end.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
from study import ROOT, Metrics, best, cut, gain, run, spread, table, write

from labelmill.data.corrections import relabel
from labelmill.data.manifest import load_manifest
from labelmill.data.shards import read_labels
from workloads.discrimination.mlcd import decode_all

FASHION = ROOT / "data" / "fashion-mnist"
PARTS = ROOT / "data" / "experiments" / "noisy"
SEEDS, TUNING_SEED = (0, 1, 2), 100
RATES = (0.001, 0.004)  # learning rates tried
PAIRS = {0: 6, 6: 0, 2: 4, 4: 2, 5: 7, 7: 9, 9: 7, 1: 3, 3: 1, 8: 2}
NOISES: dict[str, dict[str, Any]] = {
    "symmetric 20 %": {"kind": "symmetric", "rate": 0.2},
    "symmetric 40 %": {"kind": "symmetric", "rate": 0.4},
    "asymmetric 20 %": {"kind": "asymmetric", "rate": 0.2, "map": PAIRS},
    "asymmetric 40 %": {"kind": "asymmetric", "rate": 0.4, "map": PAIRS},
}
MLP_INPUT = {"image_size": 28, "channels": 1}
MLP = MLP_INPUT | {"kind": "mlp", "hidden": [128], "dim": 64}


def train_part(samples: int) -> Path:
    """The first samples of the training set by key."""
    return cut(FASHION / "train", PARTS / f"train-{samples}", 0, samples)


def dev_part() -> Path:
    """3,000 other samples of the training set."""
    return cut(FASHION / "train", PARTS / "dev", 57_000, 60_000)


def short(noise: str) -> str:
    """`symmetric 20 %` -> `sym20`."""
    kind, rate, _ = noise.split()
    return kind.removesuffix("metric") + rate


def hardest(noise: str) -> str:
    """The noise that settings are chosen on: the same kind at 40 %."""
    return f"{noise.split()[0]} 40 %"


Arms = dict[str, list[dict[str, Any]]]
"""Settings to choose from, by arm."""
Chosen = dict[str, dict[str, tuple[float, int]]]
"""Learning rate and number of the setting, by noise and arm."""


def settled(go: Callable[..., Metrics], study: str, field: str, arms: Arms, metric: str, **more: Any) -> Chosen:
    """The best learning rate and setting of each arm at 40 % noise, by the metric named for it, with a seed of its own."""
    tried = {f"{name}-{i}": arm for name, settings in arms.items() for i, arm in enumerate(settings)}
    chosen: Chosen = {}
    for kind in ("symmetric 40 %", "asymmetric 40 %"):
        same = {"noise": NOISES[kind] | {"seed": TUNING_SEED}, "seed": TUNING_SEED, "data__test": dev_part()}
        found = {
            rate: go(f"{study}-tune-{short(kind)}-{rate}", rate, **{field: tried}, **same, **more) for rate in RATES
        }
        chosen[kind] = {
            name: best({(r, i): found[r][metric.format(f"{name}-{i}")] for i in range(len(settings)) for r in RATES})
            for name, settings in arms.items()
        }
    return chosen


def at_their_best(
    go: Callable[..., Metrics],
    study: str,
    field: str,
    arms: Arms,
    chosen: Chosen,
    more: Callable[[dict[str, Any]], dict[str, Any]],
) -> dict[tuple[str, int], dict[str, float]]:
    """Metrics on the clean test set by noise and seed. Arms of one learning rate are a job; `more`: settings by noise."""
    results: dict[tuple[str, int], dict[str, float]] = {}
    for seed in SEEDS:
        for kind, noise in NOISES.items():
            for rate in RATES:
                taken = {n: arms[n][i] for n, (r, i) in chosen[hardest(kind)].items() if r == rate}
                if taken:
                    same = {"noise": noise | {"seed": seed}, "seed": seed, "data__test": FASHION / "test"}
                    metrics = go(f"{study}-{short(kind)}-{rate}-s{seed}", rate, **{field: taken}, **same, **more(noise))
                    results.setdefault((kind, seed), {}).update(metrics)
    return results


# --- losses side by side -----------------------------------------------------------------------------------

LOSSES: Arms = {
    "CE": [{"kind": "softmax"}],
    "smoothing": [{"kind": "smoothed_softmax", "smoothing": 0.1}],
    "MAE": [{"kind": "mae"}],
    "GCE": [{"kind": "gce", "q": 0.7}],
    "SCE": [{"kind": "sce"}],
    "ELR": [{"kind": "elr", "lam": lam} for lam in (1.0, 3.0)],
    "LDR": [{"kind": "ldr_normalized", "lam": lam} for lam in (1.0, 10.0)],
    "ALDR": [{"kind": "aldr", "lam0": lam} for lam in (1.0, 10.0)],
}


def ldr() -> None:
    """Every loss at its best of a few settings, at the end of a training long enough to learn wrong labels by heart."""
    base: dict[str, Any] = {
        "data__train": train_part(5000),
        "encoder": MLP,
        "train": {"global_batch": 256, "epochs": 30, "log_every": 100, "max_grad_norm": 5.0},
    }

    def go(name: str, rate: float, **more: Any) -> Metrics:
        return run("noisy/jobs/ldr-fashion.yaml", name, **base, train__learning_rate=rate, **more)

    chosen = settled(go, "ldr", "losses", LOSSES, "noisy_test/{}")
    results = at_their_best(go, "ldr", "losses", LOSSES, chosen, lambda noise: {})

    def over_seeds(metric: str, kind: str, arm: str) -> list[float]:
        return [results[kind, seed][f"{metric}/{arm}"] for seed in SEEDS]

    parts = []
    for metric, title in (
        ("test", "clean test accuracy, %"),
        ("memorised", "wrong training labels learnt by heart, %"),
    ):
        rows = [[arm, *(spread(over_seeds(metric, kind, arm)) for kind in NOISES)] for arm in LOSSES]
        parts += [title, "", table(["loss", *NOISES], rows), ""]
    rows = [
        [arm, *(gain(over_seeds("test", kind, arm), over_seeds("test", kind, "CE")) for kind in NOISES)]
        for arm in LOSSES
        if arm != "CE"
    ]
    parts += ["points over CE (seeds in which it is ahead)", "", table(["loss", *NOISES], rows), ""]
    temperatures = [
        [
            kind,
            *(spread([results[kind, s][f"temperature/ALDR/{g}"] for s in SEEDS], 1.0, 3) for g in ("right", "wrong")),
        ]
        for kind in NOISES
    ]
    parts += ["ALDR's temperature", "", table(["noise", "right labels", "wrong labels"], temperatures), ""]
    settings = [
        [arm, *(f"rate {chosen[k][arm][0]}, {_options(LOSSES[arm][chosen[k][arm][1]])}" for k in chosen)]
        for arm in LOSSES
    ]
    parts += ["settings chosen", "", table(["loss", *chosen], settings)]
    write("noisy", "ldr", "\n".join(parts))


def _options(loss: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in loss.items() if key != "kind") or "-"


# --- confident learning ------------------------------------------------------------------------------------

FILTERS = ("both", "confident_learning", "prune_by_noise_rate", "prune_by_class", "predicted_neq_given")
ARMS = {
    "all labels": "all_labels",
    "cleaned": "cleaned",
    "random removal": "random_removal",
    "oracle removal": "oracle_removal",
}


def confident() -> None:
    """How good the filters are, and what training without the issues is worth against equal-size random removal."""
    base: dict[str, Any] = {
        "data__train": train_part(10_000),
        "encoder": MLP,
        "audit": {"folds": 4, "filter": "prune_by_noise_rate", "keep": 10},
        "train": {"global_batch": 256, "epochs": 8, "log_every": 100, "max_grad_norm": 5.0},
        "register_as": None,
    }

    def go(name: str, rate: float, **more: Any) -> Metrics:
        return run("noisy/jobs/confident-fashion.yaml", name, **base, train__learning_rate=rate, **more)

    chosen = {}
    for kind in ("symmetric 40 %", "asymmetric 40 %"):
        noise = NOISES[kind] | {"seed": TUNING_SEED}
        found = {
            rate: go(
                f"confident-tune-{short(kind)}-{rate}", rate, noise=noise, seed=TUNING_SEED, data__test=dev_part()
            )["noisy_test/all_labels"]
            for rate in RATES
        }
        chosen[kind] = best(found)
    results = {
        (kind, seed): go(
            f"confident-{short(kind)}-s{seed}",
            chosen[hardest(kind)],
            noise=noise | {"seed": seed},
            seed=seed,
            data__test=FASHION / "test",
        )
        for seed in SEEDS
        for kind, noise in NOISES.items()
    }

    def over_seeds(metric: str, kind: str) -> list[float]:
        return [results[kind, seed][metric] for seed in SEEDS]

    def quality(name: str, kind: str) -> str:
        return " / ".join(spread(over_seeds(f"audit/{what}/{name}", kind)) for what in ("precision", "recall"))

    rows = [[name, *(quality(name, kind) for kind in NOISES)] for name in FILTERS]
    parts = ["precision / recall of the flagged labels, %", "", table(["filter", *NOISES], rows), ""]
    rows = [["estimated error rate, %", *(spread(over_seeds("audit/error_rate", kind)) for kind in NOISES)]]
    parts += [table(["", *NOISES], rows), ""]
    rows = [[arm, *(spread(over_seeds(f"test/{key}", kind)) for kind in NOISES)] for arm, key in ARMS.items()]
    parts += ["clean test accuracy after training again, %", "", table(["trained on", *NOISES], rows), ""]
    rows = [
        [
            f"cleaned against {arm}",
            *(gain(over_seeds("test/cleaned", kind), over_seeds(f"test/{ARMS[arm]}", kind)) for kind in NOISES),
        ]
        for arm in ("random removal", "all labels", "oracle removal")
    ]
    parts += [table(["points (seeds in which it is ahead)", *NOISES], rows), "", f"learning rates: {chosen}"]
    write("noisy", "confident", "\n".join(parts))


# --- nested dropout and co-teaching ------------------------------------------------------------------------

COMPRESSIONS: Arms = {
    "CE": [{"kind": "none"}],
    "dropout": [{"kind": "dropout", "p": p} for p in (0.5, 0.8)],
    "nested": [{"kind": "nested", "eta": eta} for eta in (8, 24)],
}
STEPS = {"one net": "one_net", "mean of two": "mean_of_two", "co-teaching": "co-teaching"}


def nested() -> None:
    """Each compression alone, as the mean of two nets (the control) and after co-teaching.

    A tenth of the training samples keep their clean labels, as the method wants it; settings are chosen on these too.
    """
    length = {"global_batch": 256, "log_every": 100, "max_grad_norm": 5.0}
    base: dict[str, Any] = {
        "data__train": train_part(5000),
        "encoder": MLP,
        "train": length | {"epochs": 30},
    }

    def go(name: str, rate: float, **more: Any) -> Metrics:
        return run("noisy/jobs/nested-fashion.yaml", name, **base, train__learning_rate=rate, **more)

    stage_1 = {"rate": 0.4, "train": length | {"steps": 1}}  # only that is looked at
    chosen = settled(go, "nested", "arms", COMPRESSIONS, "validation/{}/one_net", coteaching=stage_1)
    results = at_their_best(
        go, "nested", "arms", COMPRESSIONS, chosen, lambda noise: {"coteaching": {"rate": noise["rate"]}}
    )

    def over_seeds(arm: str, step: str, kind: str) -> list[float]:
        return [results[kind, seed][f"test/{arm}/{STEPS[step]}"] for seed in SEEDS]

    rows = [
        [arm, step, *(spread(over_seeds(arm, step, kind)) for kind in NOISES)] for arm in COMPRESSIONS for step in STEPS
    ]
    parts = ["clean test accuracy at the end of training, %", "", table(["arm", "stage", *NOISES], rows), ""]
    rows = [
        [
            f"{arm} against CE, one net",
            *(gain(over_seeds(arm, "one net", kind), over_seeds("CE", "one net", kind)) for kind in NOISES),
        ]
        for arm in ("dropout", "nested")
    ]
    rows += [
        [
            f"{arm}: co-teaching against mean of two",
            *(gain(over_seeds(arm, "co-teaching", kind), over_seeds(arm, "mean of two", kind)) for kind in NOISES),
        ]
        for arm in COMPRESSIONS
    ]
    settings = [
        [arm, *(f"rate {chosen[k][arm][0]}, {_options(COMPRESSIONS[arm][chosen[k][arm][1]])}" for k in chosen)]
        for arm in COMPRESSIONS
    ]
    parts += [table(["points (seeds in which it is ahead)", *NOISES], rows), ""]
    parts += ["settings chosen", "", table(["arm", *chosen], settings)]
    write("noisy", "nested", "\n".join(parts))


# --- long tails --------------------------------------------------------------------------------------------

FROM_SCRATCH = {"pretrained": False, "synthetic": 0, "anchor": 0}
TAILS: dict[str, dict[str, Any]] = {
    "CE": FROM_SCRATCH | {"mixup": 0},
    "balanced CE": FROM_SCRATCH | {"mixup": 0, "balanced": True},
    "mixup": FROM_SCRATCH,
    "contrast": {"synthetic": 0, "anchor": 0, "mixup": 0},
    "RCAL without outlier removal": {"neighbours": 0},
    "RCAL without lending": {"borrow": 0, "spread": 0},
    "RCAL without anchor": {"anchor": 0},
    "RCAL": {},
}


def rcal() -> None:
    """A long tail with labels that turn into frequent classes: what each part of RCAL is worth, overall and on rare classes."""
    pool = cut(FASHION / "train", PARTS / "pool", 0, 20_000)
    cnn = {"kind": "small_cnn", "image_size": 14, "channels": 1, "dim": 32, "width": 8}
    length = {"global_batch": 128, "log_every": 100, "max_grad_norm": 5.0}
    base: dict[str, Any] = {
        "data__train": pool,
        "encoder": cnn | {"augment": {"shift": 1}},
        "long_tail": {"largest": 1000, "ratio": 50},
        "contrast": {
            "queue": 2048,
            "temperature": 0.1,
            "encoder": cnn | {"augment": {"shift": 2, "cutout": 5, "noise": 0.1}},
        },
        "contrast_train": length | {"epochs": 25, "learning_rate": 0.004},
        "train": length | {"epochs": 15},
    }
    noises = {f"{100 * rate:.0f} %": {"kind": "frequency", "rate": rate} for rate in (0.2, 0.4)}

    def go(name: str, rate: float, **more: Any) -> Metrics:
        return run("noisy/jobs/rcal-fashion.yaml", name, **base, train__learning_rate=rate, **more)

    tried = {arm: TAILS[arm] for arm in ("CE", "balanced CE", "mixup", "contrast", "RCAL")}
    ablations = [arm for arm in TAILS if arm not in tried]  # at 40 % only
    noise = noises["40 %"] | {"seed": TUNING_SEED}
    found = {
        rate: go(f"rcal-tune-{rate}", rate, noise=noise, seed=TUNING_SEED, arms=tried, data__test=dev_part())
        for rate in RATES
    }
    chosen = {arm: best({rate: found[rate][f"noisy_test/{arm}"] for rate in RATES}) for arm in tried}
    results: dict[tuple[str, int], dict[str, float]] = {}
    for seed in SEEDS:
        for kind, noise in noises.items():
            for rate in RATES:
                # the ablations are trained as the whole method
                arms = {
                    arm: TAILS[arm]
                    for arm in TAILS
                    if chosen.get(arm, chosen["RCAL"]) == rate and (arm in tried or kind == "40 %")
                }
                if arms:
                    metrics = go(
                        f"rcal-{kind[:2]}-{rate}-s{seed}",
                        rate,
                        noise=noise | {"seed": seed},
                        seed=seed,
                        arms=arms,
                        data__test=FASHION / "test",
                    )
                    results.setdefault((kind, seed), {}).update(metrics)

    def over_seeds(metric: str, arm: str, kind: str) -> list[float]:
        return [results[kind, seed][f"{metric}/{arm}"] for seed in SEEDS]

    def ran(arm: str, kind: str) -> bool:
        return arm not in ablations or kind == "40 %"

    shown = {
        f"{kind}, {what}": (metric, kind) for kind in noises for what, metric in (("all", "test"), ("few", "test_few"))
    }
    rows = [
        [arm, *(spread(over_seeds(m, arm, kind)) if ran(arm, kind) else "" for m, kind in shown.values())]
        for arm in TAILS
    ]
    parts = ["balanced test accuracy, %, over all classes and over the third with the fewest samples", ""]
    parts += [table(["arm", *shown], rows), ""]
    rows = [
        [
            f"RCAL against {arm}",
            *(
                gain(over_seeds(m, "RCAL", kind), over_seeds(m, arm, kind)) if ran(arm, kind) else ""
                for m, kind in shown.values()
            ),
        ]
        for arm in TAILS
        if arm != "RCAL"
    ]
    parts += [table(["points (seeds in which it is ahead)", *shown], rows), ""]
    estimates = ("raw", "without_outliers", "lent")
    rows = [
        [what.replace("_", " "), *(spread(over_seeds("mean_distance/RCAL", what, kind), 1.0, 3) for kind in noises)]
        for what in estimates
    ]
    parts += ["distance of estimated class means to those of the clean labels", "", table(["estimate", *noises], rows)]
    parts += ["", f"learning rates: {chosen}"]
    write("noisy", "rcal", "\n".join(parts))


# --- models on corrected labels ----------------------------------------------------------------------------

TAKEN_FOR = {0: 6, 2: 4, 3: 4}
SIZES: dict[str, dict[str, Any]] = {
    "linear": {
        "encoder": MLP_INPUT | {"kind": "linear", "in_dim": 784, "dim": 64},
        "head__normalize": False,
        "head__scale": 1.0,
    },
    "mlp-64": {"encoder": MLP_INPUT | {"kind": "mlp", "hidden": [], "dim": 64}},
    "mlp-512x2": {"encoder": MLP_INPUT | {"kind": "mlp", "hidden": [512], "dim": 512}},
}


def systematic(source: Path, out: Path) -> Path:
    """A version in which some samples of three classes have the label of another one, by a rule that can be learnt.

    A sample is changed where exactly one of two holds: its left half is brighter than its right one, by more than the median
    of its class; and so its top half.
    """
    if not (out / "manifest.json").is_file():
        data = load_manifest(str(source))
        keys = [key for i in range(len(data.shards)) for key in read_labels(data, i).column("key").to_pylist()]
        label_N = np.concatenate([read_labels(data, i).column("label").to_numpy() for i in range(len(data.shards))])
        pixels = decode_all(data, "image", 28, 1).reshape(-1, 28, 28).astype(np.float64)
        sides = [
            pixels[:, :, :14].mean((1, 2)) - pixels[:, :, 14:].mean((1, 2)),
            pixels[:, :14].mean((1, 2)) - pixels[:, 14:].mean((1, 2)),
        ]
        new: dict[str, int] = {}
        for given, taken_for in TAKEN_FOR.items():
            rows = np.flatnonzero(label_N == given)
            left, top = (side[rows] > np.median(side[rows]) for side in sides)
            new |= {keys[i]: taken_for for i in rows[left ^ top]}
        relabel(data, out, new, {"rule": "brightness of halves"}, overwrite=True)
    return out


def reranking() -> None:
    """Models of three sizes trained on labels with wrong ones that a large model can learn, on given and on true test labels."""
    train = systematic(train_part(12_000), PARTS / "train-systematic")
    test = systematic(FASHION / "test", PARTS / "test-systematic")
    found: list[Metrics] = []
    for seed in SEEDS:
        for name, size in SIZES.items():
            run(
                "noisy/jobs/mlp-fashion.yaml",
                f"reranking-{name}-s{seed}",
                data={"train": str(train), "test": str(test)},
                train={"global_batch": 128, "epochs": 12, "learning_rate": 0.001, "log_every": 100},
                seed=seed,
                register_as=f"reranking-{name}-s{seed}",
                **size,
            )
        metrics = run(
            "noisy/jobs/reranking-fashion.yaml",
            f"reranking-s{seed}",
            models=[f"reranking-{name}-s{seed}" for name in SIZES],
            test=test,
            noise=None,
            corrected=FASHION / "test",
        )
        found.append(
            {key.replace(f"-s{seed}/1", "").replace("reranking-", ""): value for key, value in metrics.items()}
        )
    columns = {
        "wrong rows, given label": "original_errors",
        "wrong rows, true label": "corrected_errors",
        "right rows": "benign",
        "all, given labels": "original",
        "all, true labels": "corrected",
    }
    rows = [[name, *(spread([m[f"{key}/{name}"] for m in found]) for key in columns.values())] for name in SIZES]
    parts = ["test accuracy, %", "", table(["model", *columns], rows), ""]
    order = [*SIZES]
    pairs = [(small, large) for i, small in enumerate(order) for large in order[i + 1 :]]
    rows = [
        [
            f"{small} against {large}",
            gain([m[f"corrected_errors/{small}"] for m in found], [m[f"corrected_errors/{large}"] for m in found]),
            gain([m[f"corrected/{small}"] for m in found], [m[f"corrected/{large}"] for m in found]),
            ", ".join(f"{100 * nu:.1f} %" if (nu := m.get(f"swap/{large} -> {small}")) else "never" for m in found),
        ]
        for small, large in pairs
    ]
    head = ["smaller against larger", "wrong rows, true label", "all, true labels", "swap at a share of wrong rows of"]
    parts += ["points (seeds in which it is ahead)", "", table(head, rows), ""]
    parts += [
        f"wrong rows in the test set: {100 * found[0]['prevalence']:.1f} %; largest distance of the closed form to the "
        f"mean of 20 simulations: {100 * max(m['simulation_off'] for m in found):.2f} points"
    ]
    write("noisy", "reranking", "\n".join(parts))


STUDIES = {"ldr": ldr, "confident": confident, "nested": nested, "rcal": rcal, "reranking": reranking}

if __name__ == "__main__":
    for study in sys.argv[1:] or STUDIES:
        STUDIES[study]()
