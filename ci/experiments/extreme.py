"""The recorded experiments of extreme classification, each a few minutes of one core.

    python ci/experiments/extreme.py losses        which loss, dual encoder on Debian's tags
    python ci/experiments/extreme.py parametric    label texts against rows on the same data, by how frequent a tag is
    python ci/experiments/extreme.py negatives     the batch's, mined, all: dual encoder on WordNet's 147 thousand lemmas
    python ci/experiments/extreme.py spherical     Z-loss with a factored head against softmax: the next word of a gloss
    python ci/experiments/extreme.py tables        ways of sharing an embedding table: Debian's section of a package

The objectives of the workloads, trained by a plain loop in this process on inputs that are prepared once. Every arm of a
comparison gets the same number of trials on the dev set (seed 100), then the seeds on the test set. Prints Markdown tables of
mean (lowest - highest) in percent. Run it at the root of the repository, with labelmill and workloads on PYTHONPATH, after
`make extreme-data`.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file

from labelmill.data.categorical import Feature, FeatureSet
from labelmill.data.labels import Labels, labels_from_table
from labelmill.data.manifest import Manifest, load_manifest
from labelmill.data.shards import label_counts, read_shard
from labelmill.data.stream import Batch
from labelmill.encoders import CharNgramsConfig
from labelmill.evaluation.extreme import RankedSums, frequency_bands, inverse_propensities
from labelmill.heads.config import HeadConfig
from labelmill.heads.factored import FactoredConfig
from labelmill.heads.optim import Adagrad
from labelmill.losses.classification import MLCD, Decoupled, Softmax
from labelmill.losses.margins import CosFace
from labelmill.losses.retrieval import BCESection, DecoupledSection, SoftmaxSection, SoftTopKSection
from labelmill.losses.spherical import ZLoss
from labelmill.training.objective import Objective
from workloads.extreme.rows import RowRanker, SampledSum, Together
from workloads.extreme.spherical import RowClassifier
from workloads.extreme.towers import DualEncoder, FullNegatives, InBatchNegatives, MinedNegatives
from workloads.extreme.unified import NetworkSection, TableClassifier, TableSection, count_values
from workloads.extreme.unified_embedding import macro_f1

TUNING_SEED = 100
Trial = dict[str, Any]


class Split:
    """A part of a data set in memory."""

    def __init__(self, data: Manifest, field: str) -> None:
        tables = [read_shard(data, i) for i in range(len(data.shards))]
        self.raw = [value for t in tables for value in t.column(field).to_pylist()]
        self.labels = Labels.concat([labels_from_table(t, data.label) for t in tables])
        self.prepared: Any = None  # of the texts alone, by the first model: all models of a comparison hash alike

    def __len__(self) -> int:
        return len(self.labels)


class Task:
    """A data set with its parts, and how to make batches of it."""

    def __init__(self, folder: str, field: str, batch: int) -> None:
        self.data = load_manifest(f"{folder}/train")
        self.parts = {name: Split(load_manifest(f"{folder}/{name}"), field) for name in ("train", "dev", "test")}
        self.batch = batch

    def take(self, model: Objective, part: str, at: np.ndarray, keys: np.ndarray | None) -> Batch:
        """Some samples as the engine's streams would give them."""
        split = self.parts[part]
        labels = Labels(split.labels.form, split.labels.ids_BP[at])
        model.train(keys is not None)
        inputs = model.prepare([split.raw[i] for i in at], labels, keys)
        return Batch([""] * len(at), inputs, labels, torch.ones(len(at)), torch.arange(len(at)))


class Remembered:
    """An encoder's or a row map's `prepare`, remembered by input: hashing is most of the work otherwise."""

    def __init__(self, prepare: Callable[..., Any], width: int) -> None:
        self.prepare, self.width, self.known = prepare, width, dict[str, torch.Tensor]()

    def __call__(self, raw: Any, rng: Any = None) -> torch.Tensor:
        new = [text for text in dict.fromkeys(raw) if text not in self.known]
        if new:
            made = self.prepare(new)
            made = torch.nn.functional.pad(made, (0, max(0, self.width - made.shape[2])))
            self.known |= zip(new, made, strict=True)
        return torch.stack([self.known[text] for text in raw])


def fit(model: Objective, task: Task, rate: float, steps: int, seed: int) -> float:
    """Trains; CPU seconds."""
    dense = [p for p in model.parameters() if p.requires_grad]
    optimizer, rng, began = (
        torch.optim.AdamW(dense, lr=rate, weight_decay=0.0),
        np.random.default_rng(seed),
        time.process_time(),
    )
    size, order = len(task.parts["train"]), np.empty(0, np.int64)
    warm = max(1, steps // 10)
    for step in range(steps):
        if len(order) < task.batch:
            order = rng.permutation(size)
        at, order = order[: task.batch], order[task.batch :]
        now = rate * min((step + 1) / warm, (steps - step) / max(1, steps - warm))
        optimizer.param_groups[0]["lr"] = now
        for head in model.heads.values():
            head.begin_step(now)
        keys = rng.integers(0, 2**63, task.batch).astype(np.uint64)
        model.forward(task.take(model, "train", at, keys)).total.backward()
        optimizer.step()
        optimizer.zero_grad()
        for head in model.heads.values():
            head.step(now)
    return time.process_time() - began


@torch.no_grad()
def ranked(
    model: Objective, task: Task, part: str, ks: tuple[int, ...], recall_ks: tuple[int, ...]
) -> dict[str, float]:
    """Ranking metrics on a part."""
    count_L = label_counts(task.data)
    inverse, bands = inverse_propensities(count_L, task.data.num_samples), frequency_bands(count_L)
    sums = RankedSums(ks, recall_ks, inverse, bands, len(count_L))
    split = task.parts[part]
    for lo in range(0, len(split), 1024):
        at = np.arange(lo, min(lo + 1024, len(split)))
        found = model.predict(task.take(model, part, at, None))["class_id"]
        sums.add(found.numpy(), split.labels.ids_BP[at].numpy())
    return sums.metrics()


def compare(
    arms: dict[str, Callable[[Trial, int], tuple[Objective, float, int]]],
    trials: dict[str, list[Trial]],
    task: Task,
    judge: Callable[[Objective, str], dict[str, float]],
    shown: tuple[str, ...],
    seeds: int,
) -> None:
    """Tunes every arm on dev by the first metric shown, runs its seeds, prints its row."""
    print(
        f"| arm | settings (dev {shown[0]}) | {' | '.join(shown)} | CPU s a run |\n|{'---|' * (3 + len(shown))}",
        flush=True,
    )
    for name, build in arms.items():
        tried = []
        for trial in trials[name] if len(trials[name]) > 1 else []:
            model, rate, steps = build(trial, TUNING_SEED)
            fit(model, task, rate, steps, TUNING_SEED)
            tried.append(judge(model, "dev")[shown[0]])
        best = int(np.argmax(tried)) if tried else 0
        found, spent = [], []
        for seed in range(seeds):
            model, rate, steps = build(trials[name][best], seed)
            spent.append(fit(model, task, rate, steps, seed))
            found.append(judge(model, "test"))
        told = "; ".join(f"{show(t)}: {100 * v:.1f}" for t, v in zip(trials[name], tried, strict=False))
        cells = []
        for metric in shown:
            values = [100 * f[metric] for f in found]
            cells.append(f"{statistics.mean(values):.1f} ({min(values):.1f} - {max(values):.1f})")
        chosen = f"{show(trials[name][best])}" + (f" ({told})" if told else "")
        print(f"| {name} | {chosen} | {' | '.join(cells)} | {statistics.mean(spent):.0f} |", flush=True)


def show(trial: Trial) -> str:
    """Settings in short."""
    return ", ".join(f"{name} {value:g}" for name, value in trial.items())


def text_config(options: argparse.Namespace) -> CharNgramsConfig:
    """One family of hashed 3-grams."""
    return CharNgramsConfig(
        dim=options.dim, buckets=options.buckets, orders=(3,), placed=(), gaps=(), deletions=False,
        hidden=2 * options.dim, max_length=96, lowercase=True,
    )  # fmt: skip


RATES: list[Trial] = [{"rate": 0.005}, {"rate": 0.02}]
TAGS = ("P@1", "P@5", "PSP@1", "PSP@5", "R@10", "R@50", "tail R@5")


def remember(model: Any, cache: dict[str, Remembered], width: int = 98) -> Any:
    """Lets a model's encoder use what others have hashed."""
    made = cache.setdefault("texts", Remembered(model.encoder.prepare, width))
    model.encoder.prepare = made
    return model


def losses(options: argparse.Namespace) -> None:
    task, config, cache = Task("data/debian-tags", "text", 512), text_config(options), dict[str, Remembered]()
    steps = options.epochs * len(task.parts["train"]) // task.batch
    sections = {
        "softmax": SoftmaxSection(),
        "decoupled": DecoupledSection(),
        "BCE, bias -5": BCESection(bias=-5.0),
        "soft top-k, k = positives": SoftTopKSection(k="num_pos"),
        "soft top-5": SoftTopKSection(k=5),
        "decoupled, one drawn": DecoupledSection(positives="one"),
    }

    def arm(loss: Any) -> Callable[[Trial, int], tuple[Objective, float, int]]:
        def build(trial: Trial, seed: int) -> tuple[Objective, float, int]:
            torch.manual_seed(seed)
            model = DualEncoder(config, loss, FullNegatives(), task.data, seed=seed, k=50)
            return remember(model, cache), trial["rate"], steps

        return build

    arms = {name: arm(loss) for name, loss in sections.items()}
    compare(
        arms,
        dict.fromkeys(arms, RATES),
        task,
        lambda m, p: ranked(m, task, p, (1, 3, 5), (10, 50)),
        TAGS,
        options.seeds,
    )


def parametric(options: argparse.Namespace) -> None:
    task, config, cache = Task("data/debian-tags", "text", 512), text_config(options), dict[str, Remembered]()
    steps = options.epochs * len(task.parts["train"]) // task.batch
    assert task.data.label.num_classes is not None
    classes = task.data.label.num_classes

    def texts(trial: Trial, seed: int) -> tuple[Objective, float, int]:
        torch.manual_seed(seed)
        model = DualEncoder(config, DecoupledSection(), FullNegatives(), task.data, seed=seed, k=50)
        return remember(model, cache), trial["rate"], steps

    def rows(objective: Any, **section: Any) -> Callable[[Trial, int], tuple[Objective, float, int]]:
        def build(trial: Trial, seed: int) -> tuple[Objective, float, int]:
            torch.manual_seed(seed)
            head = HeadConfig(
                optimizer=Adagrad(), lr_multiplier=trial["rows"], scale=trial.get("scale", 20.0), **section
            )
            return remember(RowRanker(config, head, classes, seed, objective, 50), cache), trial["rate"], steps

        return build

    arms = {
        "label texts, decoupled": texts,
        "rows, decoupled": rows(Together(), loss=Decoupled()),
        "rows, MLCD, CosFace 0.3": rows(Together(), loss=MLCD(), margin=CosFace(m=0.3)),
        "rows, sampled sum, CosFace 0.3, filter 0.75": rows(
            SampledSum(draws=3), loss=Softmax(), margin=CosFace(m=0.3), class_filter=0.75
        ),
    }
    each = [r | {"rows": m} for r in RATES for m in (5.0, 20.0)]
    scaled = [{"rate": 0.02, "rows": m, "scale": s} for m in (5.0, 20.0) for s in (16.0, 64.0)]
    names = [*arms]
    trials = {
        names[0]: [{"rate": r} for r in (0.005, 0.01, 0.02, 0.04)],
        names[1]: each,
        names[2]: scaled,
        names[3]: scaled,
    }
    shown = ("P@1", "P@5", "PSP@1", "PSP@5", "head R@5", "torso R@5", "tail R@5", "macro R@5")
    compare(arms, trials, task, lambda m, p: ranked(m, task, p, (1, 3, 5), (10, 50)), shown, options.seeds)


def negatives(options: argparse.Namespace) -> None:
    task, config, cache = Task("data/wordnet-lemmas", "text", 512), text_config(options), dict[str, Remembered]()
    few, many = options.steps, 10 * options.steps

    def arm(section: Any, steps: int) -> Callable[[Trial, int], tuple[Objective, float, int]]:
        def build(trial: Trial, seed: int) -> tuple[Objective, float, int]:
            torch.manual_seed(seed)
            model = DualEncoder(config, DecoupledSection(positives="one"), section, task.data, seed=seed, k=50)
            return remember(model, cache), trial["rate"], steps

        return build

    mined = {"top": 100, "per_query": 1}
    arms = {
        "in-batch": arm(InBatchNegatives(), few),
        "mined": arm(MinedNegatives(start=few // 3, every=few // 3, **mined), few),
        "all labels": arm(FullNegatives(chunk=16384), few),
        "in-batch, 10 x the steps": arm(InBatchNegatives(), many),
        "mined, 10 x the steps": arm(MinedNegatives(start=many // 5, every=many // 5, **mined), many),
    }
    trials = {name: [{"rate": 0.02}] for name in arms}
    shown = ("P@1", "P@5", "R@10", "R@50", "tail R@5")
    compare(arms, trials, task, lambda m, p: ranked(m, task, p, (1, 5), (10, 50)), shown, options.seeds)


def spherical(options: argparse.Namespace) -> None:
    task, config, cache = Task("data/wordnet-words", "text", 256), text_config(options), dict[str, Remembered]()
    assert task.data.label.num_classes is not None
    classes, steps = task.data.label.num_classes, options.steps

    def z(trial: Trial, seed: int) -> tuple[Objective, float, int]:
        torch.manual_seed(seed)
        head = FactoredConfig(loss=ZLoss(a=trial["a"], b=trial["b"]), lr_multiplier=trial["rows"], init_std=0.05)
        return remember(RowClassifier(config, head, classes, seed, 0.1, 50), cache, 50), trial["rate"], steps

    def softmax(trial: Trial, seed: int) -> tuple[Objective, float, int]:
        torch.manual_seed(seed)
        section = {"optimizer": Adagrad(), "lr_multiplier": trial["rows"], "init_std": 0.05}
        head = HeadConfig(loss=Softmax(), normalize=False, scale=1.0, **section)
        return remember(RowClassifier(config, head, classes, seed, 0.1, 50), cache, 50), trial["rate"], steps

    trials = {
        "factored Z-loss": [
            {"rate": 0.01, "rows": m, "a": a, "b": b} for a, b in ((0.1, 10.0), (1.0, 5.0)) for m in (1e3, 1e4, 1e5)
        ],
        "softmax over all classes": [{"rate": r, "rows": m} for r in (0.003, 0.01) for m in (20.0, 80.0, 320.0)],
    }
    arms = {"factored Z-loss": z, "softmax over all classes": softmax}
    compare(
        arms, trials, task, lambda m, p: ranked(m, task, p, (1, 5), (10, 50)), ("P@1", "R@10", "R@50"), options.seeds
    )


FEATURES = FeatureSet(
    features=(
        Feature(name="maintainer"),
        Feature(name="architecture"),
        Feature(name="priority"),
        Feature(name="depends", many=True, most=16),
        Feature(name="name_tokens", many=True, most=6),
    )
)


def tables(options: argparse.Namespace) -> None:
    task = Task("data/debian-sections", "row", 512)
    assert task.data.label.num_classes is not None
    classes, steps = task.data.label.num_classes, options.epochs * len(task.parts["train"]) // task.batch
    values = count_values(task.data, "row", FEATURES)
    print("distinct training values: " + ", ".join(f"{name} {len(found):,}" for name, found in values.items()))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "values.safetensors"
        save_file({name: found.view(np.int64) for name, found in values.items()}, file)
        for budget in options.budgets:
            print(f"\nrows = {budget:g} x distinct training values\n")
            arms = {
                s: table_arm(task, file, s, budget, classes, steps)
                for s in ("separate", "hashing_trick", "multiplexed")
            }
            if budget == options.budgets[0]:
                arms["collisionless"] = table_arm(task, file, "collisionless", budget, classes, steps)
            trials = {name: [{"rate": 0.003}, {"rate": 0.01}] for name in arms}
            compare(arms, trials, task, lambda m, p: classified(m, task, p), ("accuracy", "macro F1"), options.seeds)


def table_arm(
    task: Task, file: Path, sharing: Any, budget: float, classes: int, steps: int
) -> Callable[[Trial, int], tuple[Objective, float, int]]:
    """Models of one way of sharing; rows of the table are looked up once for all of them."""
    known: dict[str, dict[str, torch.Tensor]] = {}

    def build(trial: Trial, seed: int) -> tuple[Objective, float, int]:
        torch.manual_seed(seed)
        size = {} if sharing == "collisionless" else {"budget": budget}
        model = TableClassifier(
            FEATURES, TableSection(sharing=sharing, dim=16, **size), NetworkSection(), file, classes, seed
        )
        plain = model.prepare

        def prepare(raw: Any, labels: Any, rng: Any) -> Any:
            new = [row for row in dict.fromkeys(raw) if row not in known]
            if new:
                made = plain(new, None, None)  # type: ignore[arg-type]
                wide = {f.name: f.most if f.many else 1 for f in FEATURES.features}
                made = {n: torch.nn.functional.pad(r, (0, wide[n] - r.shape[2]), value=-1) for n, r in made.items()}
                known.update((row, {n: r[i] for n, r in made.items()}) for i, row in enumerate(new))
            return {f.name: torch.stack([known[row][f.name] for row in raw]) for f in FEATURES.features}

        model.prepare = prepare  # type: ignore[method-assign]
        return model, trial["rate"], steps

    return build


@torch.no_grad()
def classified(model: Objective, task: Task, part: str) -> dict[str, float]:
    """Accuracy and macro F1 on a part."""
    split = task.parts[part]
    parts = [np.arange(lo, min(lo + 2048, len(split))) for lo in range(0, len(split), 2048)]
    found = np.concatenate([model.predict(task.take(model, part, at, None))["class_id"].numpy() for at in parts])
    label = split.labels.single_B.numpy()
    return {"accuracy": float((found == label).mean()), "macro F1": macro_f1(label, found, int(label.max()) + 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = {f.__name__: f for f in (losses, parametric, negatives, spherical, tables)}
    parser.add_argument("experiment", choices=every)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=6, help="of losses, parametric and tables")
    parser.add_argument("--steps", type=int, default=60, help="of negatives and spherical")
    parser.add_argument("--buckets", type=int, default=8192)
    parser.add_argument("--dim", type=int, default=32)
    parser.add_argument("--budgets", type=float, nargs="+", default=[1.0, 0.1, 0.02])
    options = parser.parse_args()
    torch.set_num_threads(1)
    every[options.experiment](options)


if __name__ == "__main__":
    main()
