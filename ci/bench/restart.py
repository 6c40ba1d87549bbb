"""How long a worker takes from an empty process to the first step after a checkpoint.

    PYTHONPATH=platform:. python ci/bench/restart.py [--classes N,N] [--workers N,N]

Process start and imports are measured apart: they are Python's, torch's and DeepSpeed's. CPU seconds are those of rank 0
beyond them, which other programs on the machine change little. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from labelmill.data.manifest import load_manifest
from labelmill.data.spec import StreamSpec
from labelmill.data.writer import ShardWriter
from labelmill.training.local import spawn

DIM, STEPS = 64, 6
PARTS = ("build model", "restore checkpoint", "first step")


def write_words(folder: Path, classes: int) -> str:
    """A data set of 4,000 words with labels all over the classes."""
    from labelmill.data.labels import LabelSpec
    from labelmill.data.manifest import FieldSpec

    label = LabelSpec(form="single", num_classes=classes)
    with ShardWriter(folder, "words", {"text": FieldSpec(kind="text", ext="txt")}, label, layout="packed") as writer:
        for i in range(4000):
            writer.write(f"s{i}", {"text": f"word-{i}"}, {"label": i * 7919 % classes})
        return str(writer.close().root)


def leg(rank: int, world: int, data: str, work: str, classes: int, steps: int, started: float) -> dict[str, Any]:
    """Trains to `steps`; seconds of imports and of the parts up to the first step."""
    arrived = time.time()
    from labelmill.encoders import CharNgramsConfig
    from labelmill.heads.config import HeadConfig
    from labelmill.training.config import TrainConfig
    from labelmill.training.device import quiet_deepspeed
    from labelmill.training.events import ListSink
    from labelmill.training.worker import FitTask, run_worker
    from workloads.discrimination.partial_fc import Classifier

    quiet_deepspeed()
    import deepspeed  # noqa: F401

    config = TrainConfig(global_batch=64, steps=steps, learning_rate=0.01, log_every=1, schedule="constant")
    head = HeadConfig(scale=16.0, sample_rate=0.1)
    objective = partial(Classifier, CharNgramsConfig(dim=DIM, buckets=1 << 16, hidden=0), head, classes, 1)
    stream = StreamSpec(load_manifest(data), "text", 64, seed=2)

    class FirstStep(ListSink):
        cpu = 0.0

        def post(self, **event: Any) -> None:
            if event["kind"] == "metrics" and not self.cpu:
                self.cpu = time.process_time()
            super().post(**event)

    sink, imported, cpu = FirstStep(), time.time(), time.process_time()
    timing = run_worker(
        FitTask(objective, config, stream, work=Path(work), seed=1, transport="local"), rank, world, sink
    )
    seconds = {"process and imports": arrived - started + (imported - arrived)}
    first = [event["time"] for event in sink.events if event["kind"] == "metrics"]
    if first and "restore checkpoint" in timing:
        seconds |= {part: timing[part] for part in PARTS[:2]}
        seconds["CPU"] = sink.cpu - cpu
        seconds["first step"] = first[0] - imported - sum(timing[part] for part in PARTS[:2])
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--classes", default="10000,1000000")
    parser.add_argument("--workers", default="1,2")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    print(
        "| classes | workers | process and imports s | build model s | restore s | first step s | beyond the process s "
        "| CPU s |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for classes in map(int, args.classes.split(",")):
        for workers in map(int, args.workers.split(",")):
            with tempfile.TemporaryDirectory() as folder:
                data, work = write_words(Path(folder, "data"), classes), str(Path(folder, "work"))
                spawn(leg, workers, data, work, classes, STEPS, time.time())
                Path(work, "export").rename(Path(work, "before"))
                found = spawn(leg, workers, data, work, classes, 2 * STEPS, time.time())[0]
                parts = [found[part] for part in PARTS]
                cells = [f"{value:.2f}" for value in (found["process and imports"], *parts, sum(parts), found["CPU"])]
                print(f"| {classes:,} | {workers} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
