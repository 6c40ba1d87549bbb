"""The recorded experiments of extreme classification, a few minutes of one core each (`negatives` half an hour).

    python ci/experiments/extreme.py losses        which loss, dual encoder on Debian's tags
    python ci/experiments/extreme.py parametric    label texts against rows on the same data, by how frequent a tag is
    python ci/experiments/extreme.py negatives     the batch's, mined, all: dual encoder on WordNet's 147 thousand lemmas
    python ci/experiments/extreme.py spherical     Z-loss with a factored head against softmax: the next word of a gloss
    python ci/experiments/extreme.py tables        ways of sharing an embedding table: Debian's section of a package

Every arm of a comparison gets the same number of trials on the dev set. Prints Markdown tables of mean (lowest - highest) in
percent and keeps them in `runs/experiments`; what was trained before isn't trained again. Needs the data of
`make extreme-data`.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import study
import torch
from in_memory import Arm, Kept, Remembered, Task, Trial, compare, ranked
from safetensors.numpy import save_file

from labelmill.data.categorical import Feature, FeatureSet
from labelmill.encoders import CharNgramsConfig
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

Build = Callable[[Trial, int], Objective]


def text_config(options: argparse.Namespace) -> CharNgramsConfig:
    """One family of hashed 3-grams."""
    return CharNgramsConfig(
        dim=options.dim, buckets=options.buckets, orders=(3,), placed=(), gaps=(), deletions=False,
        hidden=2 * options.dim, max_length=96, lowercase=True,
    )  # fmt: skip


def grid(**values: Any) -> list[Trial]:
    """All combinations."""
    found: list[Trial] = [{}]
    for name, choices in values.items():
        found = [trial | {name: choice} for trial in found for choice in choices]
    return found


class Texts:
    """A task of texts, whose models share what their encoders have hashed."""

    def __init__(self, folder: str, batch: int, options: argparse.Namespace) -> None:
        self.task, self.config = Task(folder, "text", batch), text_config(options)
        self.shared: Remembered | None = None

    def model(self, model: Any) -> Any:
        """The model, its encoder's `prepare` remembered."""
        self.shared = self.shared or Remembered(model.encoder.prepare)
        model.encoder.prepare = self.shared
        return model

    def towers(self, loss: Any, negatives: Any) -> Build:
        """Dual encoders."""
        return lambda trial, seed: self.model(
            DualEncoder(self.config, loss, negatives, self.task.data, seed=seed, k=50)
        )


def losses(options: argparse.Namespace, kept: Kept) -> str:
    texts = Texts("data/debian-tags", 512, options)
    sections = {
        "softmax": SoftmaxSection(),
        "decoupled": DecoupledSection(),
        "decoupled, one drawn": DecoupledSection(positives="one"),
        "BCE, bias -5": BCESection(bias=-5.0),
        "BCE, bias -10": BCESection(bias=-10.0),
        "soft top-k, k = positives, alpha 2": SoftTopKSection(k="num_pos"),
        "soft top-k, k = positives, alpha 0.5": SoftTopKSection(k="num_pos", alpha=0.5),
        "soft top-5, alpha 2": SoftTopKSection(k=5),
        "soft top-5, alpha 0.5": SoftTopKSection(k=5, alpha=0.5),
    }
    trials, steps = grid(rate=(0.01, 0.02, 0.04, 0.08)), texts.task.steps(options.epochs or 10)
    arms = {name: Arm(texts.towers(loss, FullNegatives()), trials, steps) for name, loss in sections.items()}
    shown = ("P@1", "P@5", "PSP@1", "PSP@5", "R@10", "R@50", "tail R@5")
    return compare(arms, texts.task, lambda m, p: ranked(m, texts.task, p), shown, options.seeds, kept)


def parametric(options: argparse.Namespace, kept: Kept) -> str:
    texts = Texts("data/debian-tags", 512, options)
    steps = texts.task.steps(options.epochs or 4)

    def rows(objective: Any, **section: Any) -> Build:
        def build(trial: Trial, seed: int) -> Objective:
            scale = trial.get("scale", 20.0)
            head = HeadConfig(optimizer=Adagrad(), lr_multiplier=trial["rows"], scale=scale, **section)
            return texts.model(RowRanker(texts.config, head, texts.task.classes, seed, objective, 50))

        return build

    mlcd = rows(Together(), loss=MLCD(), margin=CosFace(m=0.3))
    drawn = rows(SampledSum(draws=3), loss=Softmax(), margin=CosFace(m=0.3), class_filter=0.75)
    scaled = grid(rate=(0.04,), rows=(5.0, 20.0), scale=(16.0, 64.0))
    one_by_one = grid(rate=(0.01, 0.02, 0.04, 0.08))
    arms = {
        "label texts, decoupled": Arm(texts.towers(DecoupledSection(), FullNegatives()), one_by_one, steps),
        "rows, decoupled": Arm(rows(Together(), loss=Decoupled()), grid(rate=(0.02, 0.08), rows=(5.0, 20.0)), steps),
        "rows, MLCD, CosFace 0.3": Arm(mlcd, scaled, steps),
        "rows, sampled sum, CosFace 0.3, filter 0.75": Arm(drawn, scaled, steps),
    }
    shown = ("P@1", "P@5", "PSP@1", "PSP@5", "head R@5", "torso R@5", "tail R@5", "macro R@5")
    return compare(arms, texts.task, lambda m, p: ranked(m, texts.task, p), shown, options.seeds, kept)


def negatives(options: argparse.Namespace, kept: Kept) -> str:
    texts, steps = Texts("data/wordnet-lemmas", 512, options), options.steps
    trials = grid(rate=(0.02, 0.08))

    def arm(section: Any, times: int) -> Arm:
        return Arm(texts.towers(DecoupledSection(positives="one"), section), trials, times * steps)

    def mined(times: int) -> MinedNegatives:
        return MinedNegatives(start=times * steps // 3, every=times * steps // 3, top=100, per_query=1)

    arms = {
        "in-batch": arm(InBatchNegatives(), 1),
        "mined": arm(mined(1), 1),
        "all labels": arm(FullNegatives(), 1),
        "mined, 2 x the steps": arm(mined(2), 2),
        "in-batch, 30 x the steps": arm(InBatchNegatives(), 30),
    }
    arms = {name: made for name, made in arms.items() if not options.arms or name in options.arms}
    shown = ("P@1", "P@5", "R@10", "R@50", "tail R@5")
    return compare(arms, texts.task, lambda m, p: ranked(m, texts.task, p), shown, options.seeds, kept)


def spherical(options: argparse.Namespace, kept: Kept) -> str:
    texts, steps = Texts("data/wordnet-words", 256, options), 5 * options.steps

    def z(trial: Trial, seed: int) -> Objective:
        loss = ZLoss(a=trial["a"], b=trial["b"])
        head = FactoredConfig(loss=loss, lr_multiplier=trial["rows"], init_std=0.05)
        return texts.model(RowClassifier(texts.config, head, texts.task.classes, seed, 0.1, 50))

    def softmax(trial: Trial, seed: int) -> Objective:
        section: dict[str, Any] = {"optimizer": Adagrad(), "lr_multiplier": trial["rows"], "init_std": 0.05}
        head = HeadConfig(loss=Softmax(), normalize=False, scale=1.0, **section)
        return texts.model(RowClassifier(texts.config, head, texts.task.classes, seed, 0.1, 50))

    trials = grid(rate=(0.01,), a=(0.1,), b=(3.0, 10.0), rows=(1e3, 1e4))
    arms = {
        "factored Z-loss": Arm(z, trials, steps),
        "softmax over all classes": Arm(softmax, grid(rate=(0.003, 0.01), rows=(20.0, 80.0)), steps),
        "factored Z-loss, 4 x the steps": Arm(z, trials, 4 * steps),
    }
    arms = {name: made for name, made in arms.items() if not options.arms or name in options.arms}
    judge = lambda m, p: ranked(m, texts.task, p, (1, 5), (10, 50))  # noqa: E731
    return compare(arms, texts.task, judge, ("P@1", "R@10", "R@50"), options.seeds, kept)


FEATURES = FeatureSet(
    features=(
        Feature(name="maintainer"),
        Feature(name="architecture"),
        Feature(name="priority"),
        Feature(name="depends", many=True, most=16),
        Feature(name="name_tokens", many=True, most=6),
    )
)


def tables(options: argparse.Namespace, kept: Kept) -> str:
    task = Task("data/debian-sections", "row", 512)
    values = count_values(task.data, "row", FEATURES)
    parts = ["distinct training values: " + ", ".join(f"{name} {len(found):,}" for name, found in values.items())]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "values.safetensors"
        save_file({name: found.view(np.int64) for name, found in values.items()}, file)
        for budget in options.budgets:
            sharings = ["separate", "hashing_trick", "multiplexed", *(["collisionless"] if budget >= 1 else [])]
            arms = {
                f"{budget:g}: {sharing}": Arm(
                    table_arm(task, file, sharing, budget), grid(rate=(0.003, 0.01)), task.steps(options.epochs or 6)
                )
                for sharing in sharings
            }
            shown = ("accuracy", "macro F1")
            parts.append(compare(arms, task, lambda m, p: classified(m, task, p), shown, options.seeds, kept))
    return "\n\n".join(parts)


def table_arm(task: Task, file: Path, sharing: Any, budget: float) -> Build:
    """Models of one way of sharing; rows of the table are looked up once for all of them."""
    known: dict[str, dict[str, torch.Tensor]] = {}

    def build(trial: Trial, seed: int) -> Objective:
        size = {} if sharing == "collisionless" else {"budget": budget}
        model = TableClassifier(
            FEATURES, TableSection(sharing=sharing, dim=16, **size), NetworkSection(), file, task.classes, seed
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
        return model

    return build


@torch.no_grad()
def classified(model: Objective, task: Task, part: str) -> dict[str, float]:
    """Accuracy and macro F1 on a part."""
    split = task.parts[part]
    parts = [np.arange(lo, min(lo + 2048, len(split))) for lo in range(0, len(split), 2048)]
    found = np.concatenate([model.predict(task.take(model, part, at, None))["class_id"].numpy() for at in parts])
    label = split.labels.single_B.numpy()
    return {"accuracy": float((found == label).mean()), "macro F1": macro_f1(label, found, int(label.max()) + 1)}


STUDIES: dict[str, Callable[[argparse.Namespace, Kept], str]] = {
    f.__name__: f for f in (losses, parametric, negatives, spherical, tables)
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=STUDIES)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, help="of losses (10), parametric (4) and tables (6)")
    parser.add_argument("--steps", type=int, default=60, help="of negatives; of spherical five times as many")
    parser.add_argument("--buckets", type=int, default=8192)
    parser.add_argument("--dim", type=int, default=32)
    parser.add_argument("--budgets", type=float, nargs="+", default=[1.0, 0.1, 0.02])
    parser.add_argument("--arms", nargs="+", help="of negatives and spherical: these alone")
    options = parser.parse_args()
    torch.set_num_threads(1)
    settings = {"buckets": options.buckets, "dim": options.dim}
    text = STUDIES[options.experiment](options, Kept(options.experiment, settings))
    study.write("extreme", options.experiment, text)


if __name__ == "__main__":
    main()
