"""Objectives trained by a plain loop in this process, on data in memory whose inputs are prepared once.

For comparisons of many short trainings. Every arm gets its trials on the dev set (seed 100), then the best one's seeds on the
test set. Each training is written down when it ends, and isn't run again: a study that was stopped goes on where it was.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import study
import torch

from labelmill.data.labels import Labels, labels_from_table
from labelmill.data.manifest import Manifest, load_manifest
from labelmill.data.shards import label_counts, read_shard
from labelmill.data.stream import Batch
from labelmill.evaluation.extreme import RankedSums, frequency_bands, inverse_propensities
from labelmill.training.objective import Objective

TUNING_SEED = 100
Trial = dict[str, Any]


class Split:
    """A part of a data set in memory."""

    def __init__(self, data: Manifest, field: str) -> None:
        tables = [read_shard(data, i) for i in range(len(data.shards))]
        self.raw = [value for t in tables for value in t.column(field).to_pylist()]
        self.labels = Labels.concat([labels_from_table(t, data.label) for t in tables])

    def __len__(self) -> int:
        return len(self.labels)


class Task:
    """A data set with its parts, and how to make batches of it."""

    def __init__(self, folder: str, field: str, batch: int) -> None:
        self.data = load_manifest(f"{folder}/train")
        self.parts = {name: Split(load_manifest(f"{folder}/{name}"), field) for name in ("train", "dev", "test")}
        self.batch = batch

    @property
    def classes(self) -> int:
        assert self.data.label.num_classes is not None
        return self.data.label.num_classes

    def steps(self, epochs: int) -> int:
        """Whole batches in so many epochs."""
        return epochs * len(self.parts["train"]) // self.batch

    def take(self, model: Objective, part: str, at: np.ndarray, keys: np.ndarray | None) -> Batch:
        """Some samples as the engine's streams would give them."""
        split = self.parts[part]
        labels = Labels(split.labels.form, split.labels.ids_BP[at])
        model.train(keys is not None)
        inputs = model.prepare([split.raw[i] for i in at], labels, keys)
        return Batch([""] * len(at), inputs, labels, torch.ones(len(at)), torch.arange(len(at)))


class Remembered:
    """An encoder's `prepare`, remembered by text: hashing is most of the work otherwise."""

    def __init__(self, prepare: Callable[..., Any]) -> None:
        self.prepare, self.known = prepare, dict[str, torch.Tensor]()

    def __call__(self, raw: Any, rng: Any = None) -> torch.Tensor:
        new = [text for text in dict.fromkeys(raw) if text not in self.known]
        if new:
            made = self.prepare(new)
            lengths = (made != 0).any(dim=1).sum(dim=1).tolist()
            self.known |= {
                text: ids[:, :length].t().clone() for text, ids, length in zip(new, made, lengths, strict=True)
            }
        return torch.nn.utils.rnn.pad_sequence([self.known[text] for text in raw], batch_first=True).transpose(1, 2)


def fit(model: Objective, task: Task, rate: float, steps: int, seed: int) -> float:
    """Trains with AdamW, a tenth of the steps of warm-up and a linear fall; CPU seconds."""
    dense = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(dense, lr=rate, weight_decay=0.0)
    rng, began = np.random.default_rng(seed), time.process_time()
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
    model: Objective, task: Task, part: str, ks: tuple[int, ...] = (1, 3, 5), recall_ks: tuple[int, ...] = (10, 50)
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


@dataclass(frozen=True)
class Arm:
    """One row of a comparison.

    Attributes:
        build: an objective with a trial's settings and a seed.
        trials: settings to choose from; `rate` is AdamW's.
        steps: of a training.
    """

    build: Callable[[Trial, int], Objective]
    trials: list[Trial]
    steps: int


class Kept:
    """Results of single trainings, a line of JSON each, in `runs/experiments/extreme-<name>.jsonl`."""

    def __init__(self, name: str, settings: dict[str, Any]) -> None:
        self.file, self.settings = study.RUNS / f"extreme-{name}.jsonl", settings
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        self.known = {line["of"]: line["found"] for line in map(json.loads, lines)}

    def result(self, of: dict[str, Any], make: Callable[[], dict[str, float]]) -> dict[str, float]:
        """What is kept of a training, or what `make` finds now."""
        key = json.dumps(self.settings | of, sort_keys=True)
        if key not in self.known:
            self.known[key] = make()
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("a") as out:
                out.write(json.dumps({"of": key, "found": self.known[key]}) + "\n")
        return self.known[key]


def compare(
    arms: dict[str, Arm],
    task: Task,
    judge: Callable[[Objective, str], dict[str, float]],
    shown: tuple[str, ...],
    seeds: int,
    kept: Kept,
) -> str:
    """A table: every arm's best trial by the first metric shown, its mean (lowest - highest) over the seeds in percent."""

    def one(name: str, trial: Trial, seed: int, part: str) -> dict[str, float]:
        arm = arms[name]

        def make() -> dict[str, float]:
            torch.manual_seed(seed)
            model = arm.build(trial, seed)
            spent = fit(model, task, trial["rate"], arm.steps, seed)
            found = judge(model, part) | {"cpu_s": spent}
            print(f"{time.strftime('%H:%M:%S')} {name} {show(trial)} {part}: {found[shown[0]]:.4f}", flush=True)
            return found

        return kept.result({"arm": name, "trial": trial, "steps": arm.steps, "seed": seed, "part": part}, make)

    rows = []
    for name, arm in arms.items():
        tried = [one(name, trial, TUNING_SEED, "dev")[shown[0]] for trial in arm.trials]
        best = arm.trials[int(np.argmax(tried))]
        found = [one(name, best, seed, "test") for seed in range(seeds)]
        told = ", ".join(f"{show(trial)}: {100 * value:.1f}" for trial, value in zip(arm.trials, tried, strict=True))
        cells = [spread([100 * f[metric] for f in found]) for metric in shown]
        rows.append([name, show(best), *cells, f"{statistics.mean(f['cpu_s'] for f in found):.0f}", told])
    return study.table(["arm", "chosen", *shown, "CPU s", f"tried (dev {shown[0]})"], rows)


def spread(values: list[float]) -> str:
    """`mean (lowest - highest)`."""
    return f"{statistics.mean(values):.1f} ({min(values):.1f} - {max(values):.1f})"


def show(trial: Trial) -> str:
    """Settings in short."""
    return " ".join(f"{name} {value:g}" for name, value in trial.items())
