"""The script of the extreme experiments: every arm trains, on small data of the same forms; nothing is trained twice."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from labelmill.data.extreme import label_lists, write_multi_label
from labelmill.data.labels import LabelSpec
from labelmill.data.manifest import FieldSpec
from labelmill.data.writer import ShardWriter

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "ci" / "experiments"))

import extreme  # noqa: E402
import in_memory  # noqa: E402
import study  # noqa: E402

LABELS = 60
SIZES = {"train": 24, "dev": 8, "test": 8}


def write_texts(folder: Path, rng: np.random.Generator, most: int) -> None:
    spec = LabelSpec(form="multi", num_classes=LABELS)
    classes = pa.table({"name": [f"label {i}" for i in range(LABELS)]})
    for part, size in SIZES.items():
        rows = [sorted(rng.choice(LABELS, rng.integers(1, most + 1), replace=False).tolist()) for _ in range(size)]
        keys, texts = [f"{part}{i}" for i in range(size)], [f"text {row}" for row in rows]
        write_multi_label(keys, texts, {"label": label_lists(rows)}, spec, classes, folder / part, "small")


def write_sections(folder: Path, rng: np.random.Generator) -> None:
    for part, size in SIZES.items():
        label = LabelSpec(form="single", num_classes=4)
        fields = {"row": FieldSpec(kind="text", ext="json")}
        with ShardWriter(folder / part, "small", fields, label, layout="packed") as writer:
            for i in range(size):
                row: dict[str, Any] = {
                    name: f"v{rng.integers(5)}" for name in ("maintainer", "architecture", "priority")
                }
                row |= {name: [f"w{rng.integers(9)}"] for name in ("depends", "name_tokens")}
                writer.write(f"{part}{i}", {"row": json.dumps(row)}, {"label": i % 4})
            writer.close()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, rng = tmp_path_factory.mktemp("small"), np.random.default_rng(0)
    for name, most in (("debian-tags", 3), ("wordnet-lemmas", 3), ("wordnet-words", 1)):
        write_texts(folder / "data" / name, rng, most)
    write_sections(folder / "data" / "debian-sections", rng)
    return folder


@pytest.mark.parametrize("name", extreme.STUDIES)
def test_every_arm_of_a_study_trains(place: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setattr(study, "RUNS", place / "runs")
    plain = in_memory.Task.__init__
    monkeypatch.setattr(in_memory.Task, "__init__", lambda self, folder, field, batch: plain(self, folder, field, 12))
    # one trial and one step of each arm
    monkeypatch.setattr(extreme, "grid", lambda **values: [{key: choices[0] for key, choices in values.items()}])
    monkeypatch.setattr(in_memory, "fit", lambda *args: fit(*args[:3], 1, args[4]))
    options = argparse.Namespace(seeds=1, epochs=1, steps=3, buckets=64, dim=8, budgets=[1.0, 0.5], arms=None)
    text = extreme.STUDIES[name](options, in_memory.Kept(name, {}))
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(rows) > 3
    monkeypatch.setattr(in_memory, "fit", None)
    assert extreme.STUDIES[name](options, in_memory.Kept(name, {})) == text, "the second time from what was kept"


fit = in_memory.fit


def test_the_best_trial_is_chosen_on_dev(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "RUNS", place / "other")
    monkeypatch.setattr(in_memory, "fit", lambda *args: 1.0)
    judged: list[tuple[Any, str]] = []

    def judge(model: Any, part: str) -> dict[str, float]:
        judged.append((model, part))
        return {"P@1": {0.1: 0.5, 0.2: 0.7}[model[0]] + (0.01 * model[1] if part == "test" else 0.0)}

    arm = in_memory.Arm(lambda trial, seed: (trial["rate"], seed), [{"rate": 0.1}, {"rate": 0.2}], 5)  # type: ignore[arg-type, return-value]
    kept = in_memory.Kept("choice", {})
    text = in_memory.compare({"a": arm}, None, judge, ("P@1",), 3, kept)  # type: ignore[arg-type]
    assert judged == [((0.1, 100), "dev"), ((0.2, 100), "dev"), *(((0.2, seed), "test") for seed in range(3))]
    assert text.splitlines()[-1] == "| a | rate 0.2 | 71.0 (70.0 - 72.0) | 1 | rate 0.1: 50.0, rate 0.2: 70.0 |"
