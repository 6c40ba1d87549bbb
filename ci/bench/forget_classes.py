"""Forgetting identities of a head with very many classes, beside training the model again without them.

    PYTHONPATH=platform:. .venv/bin/python ci/bench/forget_classes.py [--classes N] [--forget K] [--folder PATH]

Made-up identities: a class is a direction, its samples lie around it. A classifier is trained and registered, a request of K
classes is answered by `remove_classes` (rows end, neighbours settle), and the same recipe trains on what is retained.
Everything runs in one process with one thread, by the same jobs as on a cluster.
"""

from __future__ import annotations

import argparse
import io
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import yaml
from rich.console import Console

from labelmill import api
from labelmill.data.labels import LabelSpec
from labelmill.data.manifest import FieldSpec
from labelmill.data.writer import ShardWriter
from labelmill.evaluation.groups import wilson_interval
from labelmill.tracking.model import load_model


def write_set(folder: Path, centres_CD: np.ndarray, label_N: np.ndarray, spread: float, seed: int) -> None:
    """Samples around the centres of their classes, as arrays."""
    rng, dim = np.random.default_rng(seed), centres_CD.shape[1]
    fields = {"x": FieldSpec(kind="array", ext="npy", shape=(dim,), dtype="float32")}
    label = LabelSpec(form="single", num_classes=len(centres_CD))
    with ShardWriter(folder, folder.name, fields, label, "packed", samples_per_shard=50_000) as writer:
        for lo in range(0, len(label_N), 10_000):
            part = label_N[lo : lo + 10_000]
            x = centres_CD[part] + spread * rng.normal(size=(len(part), dim))
            values = pa.FixedSizeListArray.from_arrays(pa.array(x.astype(np.float32).reshape(-1)), dim)
            keys = pa.array([f"{folder.name}-{lo + i:08d}" for i in range(len(part))])
            writer.write_table(pa.table({"key": keys, "x": values, "label": pa.array(part)}))
        writer.close()


def run(folder: Path, job: dict[str, Any]) -> Any:
    path = folder / f"{job['name']}.yaml"
    path.write_text(yaml.safe_dump({"output": str(folder / "runs"), "cluster": {"in_process": True}, **job}))
    return api.run(path, console=Console(file=io.StringIO(), width=200))


def stage(folder: Path, job: str, name: str) -> Path:
    (found,) = (folder / "runs" / job / "stages").glob(f"{name}-*")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--classes", type=int, default=100_000)
    parser.add_argument("--forget", type=int, default=100)
    parser.add_argument("--dim", type=int, default=32)
    parser.add_argument("--per-class", type=int, default=3)
    parser.add_argument("--spread", type=float, default=0.08)
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--repair", type=int, default=20)
    parser.add_argument("--folder", type=Path)
    args = parser.parse_args()
    folder = args.folder or Path(tempfile.mkdtemp(prefix="forget-classes-"))
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(args.classes, args.dim))
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    everyone = np.arange(args.classes)
    gone = np.sort(rng.choice(everyone, args.forget, replace=False))
    tested = np.concatenate(
        [gone, rng.choice(np.setdiff1d(everyone, gone), min(10_000, args.classes // 2), replace=False)]
    )
    if not (folder / "train").exists():
        write_set(folder / "train", centres, np.repeat(everyone, args.per_class), args.spread, 1)
        write_set(folder / "test", centres, tested, args.spread, 2)
    train = {"global_batch": 512, "epochs": args.epochs, "learning_rate": 0.003, "log_every": 200, "zero_stage": 0}
    run(
        folder,
        {
            "workload": "discrimination.partial_fc",
            "name": "train",
            "data": {"train": str(folder / "train"), "test": str(folder / "test")},
            "encoder": {"kind": "linear", "field": "x", "in_dim": args.dim, "dim": args.dim},
            "head": {"scale": 32.0, "sample_rate": 0.05, "optimizer": {"kind": "adagrad"}, "lr_multiplier": 30.0},
            "train": train,
            "register_as": "identities",
        },
    )
    report = run(
        folder,
        {
            "workload": "unlearning.forget",
            "name": "forget",
            "model": "identities",
            "request": {"kind": "classes", "ids": gone.tolist()},
            # rows settle slowly: they are trained already, and their optimizer starts afresh
            "method": {
                "kind": "remove_classes",
                "repair": args.repair,
                "train": train | {"learning_rate": 0.0001, "schedule": "constant", "warmup": 0.0},
            },
            "train": train,
            "audit": {"samples": 5000, "splits": 1, "attacks": ["threshold"]},
        },
    )
    names = {name: i for i, name in enumerate(report.tables["audit"].columns)}
    rows = {row[0]: row for row in report.tables["audit"].rows}
    model = load_model(
        stage(folder, "forget", "forget")
        / json.loads((stage(folder, "forget", "forget") / "stage.json").read_text())["values"]["package"]
    )
    asked = centres[gone] + args.spread * rng.normal(size=(len(gone), args.dim))
    answers = model.predict(asked.astype(np.float32), 5)
    reached = np.isin(model.classes["trained_id"].to_numpy()[answers["class_id"].to_numpy()], gone).sum()
    seconds = {}
    for name in ("forget", "retrain"):
        kept = json.loads((stage(folder, "forget", name) / "stage.json").read_text())
        seconds[name] = kept["seconds"]
    n = len(tested) - len(gone)
    low, high = wilson_interval(rows["test_r"][names["parent"]] / 100 * n, n)
    print(
        f"{args.classes:,} classes of {args.dim} numbers, {args.forget} forgotten; test: {n:,} samples of retained classes\n"
    )
    print("| measure | original | classes removed | trained again |\n|---|---|---|---|")
    columns = [names[c] for c in ("parent", "remove_classes", "retrain")]
    titles = {
        "test_r": "top-1 on retained classes, %",
        "test_f": "top-1 on forgotten classes, %",
        "train_r": "top-1 on training samples of retained classes, %",
    }
    for measure, title in titles.items():
        print(f"| {title} | " + " | ".join(f"{rows[measure][c]:.2f}" for c in columns) + " |")
    print(f"| top-5 answers out of {5 * len(gone)} that name a forgotten class | - | {reached} | - |")
    print(f"| seconds of the stage | - | {seconds['forget']:.1f} | {seconds['retrain']:.1f} |")
    print(f"| share of training again, % | - | {100 * seconds['forget'] / seconds['retrain']:.1f} | 100 |")
    print(f"\nhalf width of the interval of a top-1: {50 * (high - low):.2f} points")


if __name__ == "__main__":
    main()
