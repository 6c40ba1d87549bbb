"""The distillation experiments: python ci/experiments/distillation.py [losses glosses active views aspects]

losses    every loss, one head or two, on Fashion-MNIST: one teacher for all
glosses   the same on 503 classes of WordNet's glosses, taught by a sentence encoder with a classifier
active    whom to ask a fallible teacher about
views     label augmentation by rotations against training of the same cost
aspects   answers to questions beside the classes

Small on purpose: multilayer perceptrons and character n-grams, a few hundred steps. Every arm of a comparison gets the same
number of trials, judged on held-out training samples with a seed of its own; the test set is only looked at in the end.
Wants `make fashion-mnist`, for `glosses` also `make gloss-data`. What has finished is not run again.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from study import ROOT, RUNS, Metrics, best, cut, gain, paired, run, spread, table, write

FASHION = ROOT / "data" / "fashion-mnist"
GLOSSES = ROOT / "data" / "wordnet-glosses"
PARTS = ROOT / "data" / "experiments" / "distillation"
SEEDS, TUNING_SEED = (0, 1, 2), 100
MLP = {"kind": "mlp", "image_size": 28, "channels": 1, "hidden": [64], "dim": 64, "batch_norm": True}

Setting = dict[str, Any]
"""Of an arm; what stands under `train` is the job's, for the arms that have it in common."""
Go = Callable[..., Metrics]
"""Runs a job of a name under settings."""


def part(name: str) -> Path:
    """Disjoint samples of the training set, by key: 40,000 for the teacher, 17,000 for students, 3,000 to choose settings on."""
    start, stop = {"teacher": (0, 40_000), "students": (40_000, 57_000), "dev": (57_000, 60_000)}[name]
    return cut(FASHION / "train", PARTS / name, start, stop)


def fits(go: Go, name: str, arms: Mapping[str, Setting], **more: Any) -> dict[str, float]:
    """Metrics of arms: a job for those that are trained alike."""
    metrics: dict[str, float] = {}
    for train in {json.dumps(arm.get("train", {})): arm.get("train", {}) for arm in arms.values()}.values():
        alike = {
            key: {field: value for field, value in arm.items() if field != "train"}
            for key, arm in arms.items()
            if arm.get("train", {}) == train
        }
        tag = "".join(f"-{value:g}" for value in train.values())
        metrics |= go(f"{name}{tag}", arms=alike, **{f"train__{key}": value for key, value in train.items()}, **more)
    return metrics


def tuned(
    go: Go,
    study: str,
    arms: Mapping[str, Sequence[Setting]],
    rates: Iterable[float],
    judged: Mapping[str, str] | None = None,
    share: str = "",
    **more: Any,
) -> dict[str, Setting]:
    """The best settings of each arm: the learning rate with its first ones, then the others at that rate.

    `judged` names the metric of arms that aren't judged by `test`. `share` is a field of `train` that the first arm has chosen
    and the others try as well, at their best settings.
    """

    def look(name: str, tried: Mapping[str, Mapping[str, Setting]]) -> dict[str, dict[str, float]]:
        every = {f"{arm} {key}": setting for arm, settings in tried.items() for key, setting in settings.items()}
        metrics = fits(go, f"{study}-{name}", every, seed=TUNING_SEED, **more)
        return {
            arm: {key: metrics[f"{(judged or {}).get(arm, 'test')}/{arm} {key}"] for key in keys}
            for arm, keys in tried.items()
        }

    def at(setting: Setting, rate: float) -> Setting:
        return setting | {"train": {"learning_rate": rate} | setting.get("train", {})}

    tried = {arm: {f"{rate:g}": at(settings[0], rate) for rate in rates} for arm, settings in arms.items()}
    found = look("rates", tried)
    others: dict[str, dict[str, Setting]] = {}
    for arm, settings in arms.items():
        rate = tried[arm][best(found[arm])]["train"]["learning_rate"]
        others[arm] = {str(i): at(setting, rate) for i, setting in enumerate(settings[1:], 1)}
    if any(others.values()):
        for arm, values in look("settings", others).items():
            found[arm] |= values
            tried[arm] |= others[arm]
    chosen = {arm: tried[arm][best(found[arm])] for arm in arms}
    first, *rest = chosen
    if share in chosen[first]["train"]:
        value = {share: chosen[first]["train"][share]}
        again = {arm: {"shared": chosen[arm] | {"train": chosen[arm]["train"] | value}} for arm in rest}
        for arm, values in look("shared", again).items():
            chosen[arm] = (again[arm] | tried[arm])[best(found[arm] | values)]
    return chosen


def shown(setting: Setting) -> str:
    """Settings in short: numbers and kinds, without braces."""

    def flat(value: Any, name: str = "") -> list[str]:
        if isinstance(value, dict):
            return [text for key, inner in value.items() for text in flat(inner, key)]
        if isinstance(value, list):
            return [text for inner in value for text in flat(inner, name)]
        return [] if name in ("kind", "shuffled", "views") else [f"{name.replace('_', ' ')} {value}"]

    return ", ".join(flat(setting))


def over(results: Sequence[Metrics], metric: str) -> list[float]:
    """A metric over the seeds."""
    return [metrics[metric] for metrics in results]


# --- losses ------------------------------------------------------------------------------------------------

TEMPERATURES = (4.0, 1.0, 2.0, 8.0)
RATES = (0.001, 0.003, 0.01, 0.03)


def logit(kind: str, temperature: float, weight: float, ce: float = 1.0, **more: Any) -> Setting:
    """An arm with one loss between logits."""
    loss = {"kind": kind, "temperature": temperature} | ({"beta": 2.0} if kind == "dkd" else {})
    return {"ce": ce, "losses": [{"weight": weight, "loss": loss}]} | more


def feature(kind: str, weights: Iterable[float]) -> list[Setting]:
    """Arms with one loss between embeddings."""
    return [{"features": [{"kind": kind, "weight": weight}]} for weight in weights]


def hinton(temperatures: Iterable[float], weights: Iterable[float], **more: Any) -> list[Setting]:
    """(1 - w) CE + w KD."""
    return [logit("kd", t, w, round(1 - w, 3), **more) for t in temperatures for w in weights]


def grid(kind: str, temperatures: Iterable[float], weights: Iterable[float], **more: Any) -> list[Setting]:
    """CE + w times a loss."""
    return [logit(kind, t, w, **more) for t in temperatures for w in weights]


def doubled(least: float) -> list[float]:
    """Eight weights from `least` on, each twice the one before; the third comes first."""
    weights = [least * 2**i for i in range(8)]
    return [weights[2], *weights[:2], *weights[3:]]


LOSSES: dict[str, list[Setting]] = {
    "CE": [
        {},
        *({"train": {"weight_decay": decay}} for decay in (0.0, 0.1, 0.3, 1.0)),
        *({"train": {"learning_rate": rate}} for rate in (0.0003, 0.0005, 0.002)),
    ],
    "KD": hinton(TEMPERATURES, (0.9, 0.5)),
    "KD shuffled": hinton(TEMPERATURES, (0.9, 0.5), shuffled=True),
    "standardized": grid("standardized_kd", TEMPERATURES, (1.0, 4.0)),
    "DKD": grid("dkd", TEMPERATURES, (0.5, 0.1)),
    "DIST": grid("dist", TEMPERATURES, (2.0, 0.5)),
    "BinaryKL": grid("binary_kl", TEMPERATURES, (1.0, 0.1)),
    "norm": grid("binary_kl_norm", TEMPERATURES, (1.0, 0.1)),
    "norm only": grid("binary_kl_norm", (2.0, 0.25, 0.5, 1.0, 4.0, 8.0, 16.0, 32.0), (1.0,), ce=0.0),
    "linear": grid("binary_kl_norm", TEMPERATURES, (1.0, 0.1), aux="linear"),
    "linear aligned": grid("binary_kl_norm", TEMPERATURES, (1.0, 0.1), aux="linear", align="all"),
    "nonlinear": grid("binary_kl_norm", TEMPERATURES, (1.0, 0.1), aux="nonlinear"),
    "nonlinear aligned": grid("binary_kl_norm", TEMPERATURES, (1.0, 0.1), aux="nonlinear", align="all"),
    "cosine": feature("cosine", doubled(0.25)),
    "RKD": feature("rkd", doubled(0.0125)),
    "CRD": feature("crd", doubled(0.1)),
    "FitNet": feature("fitnet", doubled(0.25)),
}


def outputs_of(name: str, stage: str) -> str:
    """Where a run has kept its teacher's outputs: of the training set (`teach`) or of the test set (`teach-test`)."""
    return str(next((RUNS / name / "stages").glob(f"{stage}-[0-9a-f]*")) / "outputs")


def compared(
    study: str,
    job: str,
    teacher: str,
    parts: Mapping[str, Path],
    arms: Mapping[str, Sequence[Setting]],
    rates: Iterable[float],
    seeds: Sequence[int],
    share: str = "",
    **base: Any,
) -> None:
    """Arms at their best against plain training, one registered teacher for all of them.

    `parts`: `students`, `dev` and `test` samples, none of which the teacher has seen.
    """
    base |= {"data__train": parts["students"]}

    def kept(test: str) -> dict[str, Any]:
        # one step of training, for what the teacher says meanwhile
        short = {"global_batch": 64, "steps": 1}
        section = {"kind": "registered", "model": teacher, "columns": ["logits", "embedding"]}
        name = f"{study}-teacher-{test}"
        more = {"samples": None, "train": short, "arms": {"CE": {}}, "data__test": parts[test]}
        accuracy[test] = run(job, name, teacher=section, **(base | more))["test/teacher"]
        return {"kind": "cached", "folder": outputs_of(name, "teach"), "test": outputs_of(name, "teach-test")}

    def go(name: str, **more: Any) -> Metrics:
        return run(job, name, **base, **more)

    accuracy: dict[str, float] = {}
    chosen = tuned(go, study, arms, rates, share=share, teacher=kept("dev"), data__test=parts["dev"])
    if "KD" in chosen:  # and with the outputs of other samples at the same settings
        chosen = {**chosen, "as KD, shuffled": chosen["KD"] | {"shuffled": True}}
    final = kept("test")
    results = [
        fits(go, f"{study}-s{seed}", chosen, seed=seed, teacher=final, data__test=parts["test"]) for seed in seeds
    ]
    rows = [["teacher", f"{100 * accuracy['test']:.1f}", "", "", "", "", ""]]
    for arm, setting in chosen.items():
        test = over(results, f"test/{arm}")
        against = ["" if arm == other else gain(test, over(results, f"test/{other}")) for other in ("CE", "KD")]
        rest = [spread(over(results, f"{metric}/{arm}")) for metric in ("ece", "agreement")]
        rows.append([arm, spread(test, digits=2), *against, *rest, shown(setting)])
    head = ["arm", "test %", "over CE", "over KD", "ECE %", "agreement with the teacher %", "settings chosen"]
    write("distillation", study, table(head, rows))


def losses() -> None:
    """Every loss on 2,000 images."""
    parts = {"students": part("students"), "dev": part("dev"), "test": FASHION / "test"}
    run(
        "distillation/jobs/teacher-fashion.yaml",
        "distillation-teacher",
        data__train=part("teacher"),
        data__test=FASHION / "test",
        data__dev=parts["dev"],
        train__log_every=100,
    )
    train = {"global_batch": 128, "epochs": 15, "weight_decay": 0.01, "zero_stage": 0, "log_every": 100}
    base = {"encoder": MLP, "samples": 2000, "train": train}
    compared("losses", "distillation/jobs/kd-fashion.yaml", "fashion-teacher", parts, LOSSES, RATES, SEEDS, **base)


# --- many classes ------------------------------------------------------------------------------------------


def few(kind: str, weights: tuple[float, float], **more: Any) -> list[Setting]:
    """Four settings of CE + w times a loss between logits."""
    return grid(kind, (2.0, 4.0), weights, **more)


MANY: dict[str, list[Setting]] = {
    "CE": [{}, *({"train": {"weight_decay": decay}} for decay in (0.0, 0.1, 1.0))],
    "KD": hinton((2.0, 4.0), (0.9, 0.5)),
    "KD shuffled": hinton((2.0, 4.0), (0.9, 0.5), shuffled=True),
    "standardized": few("standardized_kd", (1.0, 4.0)),
    "DKD": few("dkd", (0.5, 2.0)),
    "DIST": grid("dist", (1.0, 2.0), (2.0, 8.0)),
    "BinaryKL": few("binary_kl", (0.1, 0.01)),
    "norm": few("binary_kl_norm", (0.1, 0.01)),
    "norm only": grid("binary_kl_norm", (2.0, 4.0, 1.0, 8.0), (1.0,), ce=0.0),
    "linear": few("binary_kl_norm", (0.1, 0.01), aux="linear"),
    "linear aligned": few("binary_kl_norm", (0.1, 0.01), aux="linear", align="all"),
    "cosine": feature("cosine", (2.0, 8.0, 32.0, 128.0)),
    "CRD": feature("crd", (1.0, 0.3, 3.0, 10.0)),
}


def glosses() -> None:
    """Character n-grams that know 6,000 glosses, taught by a sentence encoder."""
    parts = {"students": GLOSSES / "student", "dev": GLOSSES / "dev", "test": GLOSSES / "test"}
    run("distillation/jobs/teacher-glosses.yaml", "distillation-gloss-teacher", train__log_every=100)
    base = {"share": "weight_decay", "samples": 6000, "train__zero_stage": 0, "train__log_every": 100}
    rates = (0.01, 0.03)
    compared("glosses", "distillation/jobs/kd-glosses.yaml", "gloss-teacher", parts, MANY, rates, SEEDS, **base)


# --- active ------------------------------------------------------------------------------------------------

BUYERS = ("random", "margin", "entropy", "confident", "robust")
BUDGETS = (500, 2000, 5000)


def active() -> None:
    """Budgets that buy answers of a teacher with 85 to 90 % for a student that starts at 70 %."""
    base: dict[str, Any] = {
        "teacher": {
            "kind": "fit",
            "encoder": MLP | {"hidden": [256]},
            "samples": 30_000,
            "train": {"global_batch": 128, "epochs": 6, "learning_rate": 0.003, "max_grad_norm": 5.0},
        },
        "encoder": MLP,
        "labelled": 100,
        "pool": 10_000,
        "validation": 500,
        "train": {"global_batch": 64, "steps": 300, "weight_decay": 0.01, "zero_stage": 0, "log_every": 100},
        "data__train": cut(FASHION / "train", PARTS / "all-but-dev", 0, 57_000),
    }

    def go(name: str, rate: float, **more: Any) -> Metrics:
        return run("distillation/jobs/active-fashion.yaml", name, **base, train__learning_rate=rate, **more)

    # one rate for all buyers: that of the best mean
    tried: dict[float, Metrics] = {}
    for rate in (0.003, 0.01):
        tried[rate] = go(f"active-tune-{rate:g}", rate, seed=TUNING_SEED, budget=2000, rounds=2, data__test=part("dev"))
    rate = best({rate: sum(metrics[f"test/{buyer}"] for buyer in BUYERS) for rate, metrics in tried.items()})
    parts = [f"learning rate {rate:g}", ""]
    for budget in BUDGETS:
        results = [
            go(f"active-{budget}-s{seed}", rate, seed=seed, budget=budget, rounds=2, data__test=FASHION / "test")
            for seed in SEEDS
        ]
        rows = [["labels alone", spread(over(results, "test/labelled only"), digits=2), "", "", ""]]
        for buyer in BUYERS:
            test = over(results, f"test/{buyer}")
            right = spread(over(results, f"right/{buyer}"))
            others = ["" if buyer == o else paired(test, over(results, f"test/{o}")) for o in ("random", "margin")]
            rows.append([buyer, spread(test, digits=2), right, *others])
        known = spread(over(results, "teacher/accuracy"))
        head = ["buyer", "test %", "right answers %", "over random", "over margin"]
        parts += [f"{budget} answers, teacher {known} % right", "", table(head, rows), ""]
        write("distillation", "active", "\n".join(parts))


# --- views -------------------------------------------------------------------------------------------------

VIEWS: dict[str, list[Setting]] = {
    "plain": [{"kind": "plain"}],
    "plain, four times as long": [{"kind": "plain", "longer": 4}],
    "rotations as augmentation": [{"kind": "augment"}],
    "rotations as a second task": [{"kind": "multi_task"}],
    "SLA": [{"kind": "joint"}],
    "SLA+SD": [{"kind": "joint_distilled"}],
}


def views() -> None:
    """Few images: label augmentation against training at the same cost."""
    base = {
        "encoder": MLP | {"hidden": [128]},
        "data__train": cut(FASHION / "train", PARTS / "all-but-dev", 0, 57_000),
        "train": {"global_batch": 64, "steps": 250, "weight_decay": 0.01, "zero_stage": 0, "log_every": 100},
    }

    def go(name: str, **more: Any) -> Metrics:
        return run("distillation/jobs/sla-fashion.yaml", name, **base, **more)

    judged = {"SLA": "vote", "rotations as a second task": "vote", "rotations as augmentation": "vote"}
    parts = []
    for count in (500, 2000):
        rates = (0.001, 0.003, 0.01)
        chosen = tuned(go, f"views-{count}", VIEWS, rates, judged, samples=count, data__test=part("dev"))
        results = [
            fits(go, f"views-{count}-s{seed}", chosen, seed=seed, samples=count, data__test=FASHION / "test")
            for seed in SEEDS
        ]
        longest = "plain, four times as long"
        plain = {other: over(results, f"test/{other}") for other in ("plain", longest)}
        rows = []
        for arm, setting in chosen.items():
            one, vote = over(results, f"test/{arm}"), over(results, f"vote/{arm}")
            several = not arm.startswith("plain")
            rows.append(
                [
                    arm,
                    spread(one, digits=2),
                    *("" if arm == other else paired(one, values) for other, values in plain.items()),
                    spread(vote, digits=2) if several else "",
                    *(paired(vote, values) if several else "" for values in plain.values()),
                    spread(over(results, f"told/{arm}")) if f"told/{arm}" in results[0] else "",
                    f"{setting['train']['learning_rate']:g}",
                ]
            )
        head = ["arm", "one view %", "over plain", "over plain x 4", "vote %", "over plain", "over plain x 4"]
        parts += [f"{count} images", "", table([*head, "view told %", "rate"], rows), ""]
        write("distillation", "views", "\n".join(parts))


# --- aspects -----------------------------------------------------------------------------------------------

ASPECTS: dict[str, list[Setting]] = {
    "base": [{"alpha": 0}],
    **{f"alpha {alpha:g}": [{"alpha": alpha}] for alpha in (0.5, 1.0, 2.0, 4.0)},
    "hard 0/1 answers, alpha 2": [{"alpha": 2, "targets": "hard"}],
    "another sample's answers, alpha 2": [{"alpha": 2, "targets": "shuffled"}],
}
MANY_SEEDS = tuple(range(10))


def aspects() -> None:
    """Paired seeds: what answers are worth beside the classes."""
    base: dict[str, Any] = {
        "encoder": MLP,
        "aspects__encoder": MLP | {"hidden": [256]},
        "aspects__samples": 20_000,
        "aspects__train": {"global_batch": 128, "epochs": 4, "learning_rate": 0.003, "max_grad_norm": 5.0},
        "data__train": cut(FASHION / "train", PARTS / "all-but-dev", 0, 57_000),
        "train": {"global_batch": 32, "steps": 250, "weight_decay": 0.01, "zero_stage": 0, "log_every": 100},
    }

    def go(name: str, **more: Any) -> Metrics:
        return run("distillation/jobs/multi-aspect-fashion.yaml", name, **base, **more)

    parts = []
    for count in (300,):
        rates = (0.001, 0.003, 0.01)
        chosen = tuned(go, f"aspects-{count}", ASPECTS, rates, samples=count, data__test=part("dev"))
        results = [
            fits(go, f"aspects-{count}-s{seed}", chosen, seed=seed, samples=count, data__test=FASHION / "test")
            for seed in MANY_SEEDS
        ]
        rows = []
        for arm, setting in chosen.items():
            test = over(results, f"test/{arm}")
            against = ["" if arm == o else paired(test, over(results, f"test/{o}")) for o in ("base", [*ASPECTS][-1])]
            auc = spread(over(results, f"aspect_auc/{arm}"))
            rows.append([arm, spread(test, digits=2), *against, auc, f"{setting['train']['learning_rate']:g}"])
        head = ["arm", "test %", "over base", "over another sample's answers", "AUC of the answers %", "rate"]
        parts += [f"{count} images", "", table(head, rows), ""]
        write("distillation", "aspects", "\n".join(parts))


STUDIES = {"losses": losses, "glosses": glosses, "active": active, "views": views, "aspects": aspects}

if __name__ == "__main__":
    for study in sys.argv[1:] or STUDIES:
        STUDIES[study]()
