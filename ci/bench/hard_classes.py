"""Does a hard-class sample of the classes reach what a ten times larger uniform one reaches? Misspelt words.

One class a word, in the order of frequency or of the alphabet; queries are random typos that are no words themselves.
The encoder learns from scratch with the class rows. One process, one thread, single pass over fresh typos. For every
way of sampling: top-1 accuracy on held-out typos after every part of the run, and the seconds spent.

    python ci/bench/hard_classes.py --words 20000 --seeds 3
    python ci/bench/hard_classes.py --order alphabet --methods "uniform 0.1" "blocks 0.1" "blocks/8 0.1"

A method is `kind share`, kind being full, uniform, blocks, blocks/<stride>, hard (half hard, half uniform) or hard/<share>.
Prints a Markdown table. Needs the package wordfreq, and labelmill and workloads on PYTHONPATH.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from labelmill.encoders import CharNgramsConfig, build_encoder
from labelmill.heads.config import HeadConfig
from labelmill.heads.optim import SGD
from labelmill.heads.plan import BlockSampling, HardSampling, SamplingConfig, UniformSampling
from labelmill.heads.sharded import ShardedHead
from labelmill.losses.margins import CosFace
from workloads.discrimination.words import make_typos, read_words

METHODS = ("full 1", "uniform 0.01", "uniform 0.02", "uniform 0.1", "hard 0.01", "hard/1 0.01")


def sampling_of(kind: str) -> SamplingConfig:
    """A sampling section from its name."""
    name, _, number = kind.partition("/")
    if name == "blocks":
        return BlockSampling(stride=int(number or 1))
    if name == "hard":
        return HardSampling(share=float(number or 0.5))
    return UniformSampling()


def run(method: str, words: np.ndarray, options: dict[str, Any], seed: int) -> list[dict[str, float]]:
    """Trains once; a record of every part of the run."""
    kind, share = method.split()
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    encoder = build_encoder(CharNgramsConfig(dim=options["dim"], buckets=1 << 15, hidden=options["dim"]))
    config = HeadConfig(
        scale=options["scale"],
        margin=CosFace(m=0.1),
        sample_rate=float(share),
        sampling=sampling_of(kind),
        optimizer=SGD(momentum=0.9),
        lr_multiplier=options["lr_multiplier"],
        block_rows=256,
    )
    head = ShardedHead(len(words), options["dim"], config, seed=seed)
    optimizer = torch.optim.Adam(encoder.parameters(), lr=options["lr"])
    tests, answers = typos_of(words, rng, options["queries"])
    spent, records = 0.0, []
    steps, parts = options["steps"], options["parts"]
    for step in range(steps):
        texts, labels = typos_of(words, rng, options["batch"])
        inputs = encoder.prepare(texts)
        rate = 1.0 - step / steps
        start = time.perf_counter()
        optimizer.param_groups[0]["lr"] = options["lr"] * rate
        head.begin_step(options["lr"] * rate)
        head.loss(encoder(inputs), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        head.step(options["lr"] * rate)
        spent += time.perf_counter() - start
        if (step + 1) % (steps // parts) == 0:
            with torch.no_grad():
                _, found = head.topk(encoder.embed(tests), 1)
            accuracy = float((found[:, 0] == answers).double().mean())
            records.append({"step": step + 1, "seconds": spent, "accuracy": accuracy})
    return records


def typos_of(words: np.ndarray, rng: np.random.Generator, count: int) -> tuple[list[str], torch.Tensor]:
    """Typos of random words, and the words they are of."""
    drawn = rng.integers(len(words), size=count)
    typos, _ = make_typos(words, drawn, rng)
    return typos.tolist(), torch.from_numpy(drawn)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--words", type=int, default=20_000)
    parser.add_argument("--order", choices=["frequency", "alphabet"], default="frequency", help="of the class ids")
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--parts", type=int, default=3)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--queries", type=int, default=4000)
    parser.add_argument("--dim", type=int, default=96)
    parser.add_argument("--scale", type=float, default=24.0)
    parser.add_argument("--lr", type=float, default=0.003)
    parser.add_argument("--lr-multiplier", type=float, default=10.0)
    parser.add_argument("--json", type=Path)
    options = vars(parser.parse_args())
    path = options.pop("json")
    torch.set_num_threads(1)
    words, _ = read_words(("en",), options["words"])
    if options["order"] == "alphabet":
        words = np.sort(words)
    print(f"| {len(words):,} words by {options['order']}, batch {options['batch']} "
          f"| top-1 % after each part: mean (range over {options['seeds']} seeds) | seconds |")  # fmt: skip
    print("|---|---|---|")
    everything = {}
    for method in options["methods"]:
        runs = [run(method, words, options, seed) for seed in range(options["seeds"])]
        everything[method] = runs
        cells = []
        for part in range(options["parts"]):
            values = [100 * records[part]["accuracy"] for records in runs]
            cells.append(f"{statistics.mean(values):.1f} ({min(values):.1f}-{max(values):.1f})")
        seconds = statistics.mean(records[-1]["seconds"] for records in runs)
        print(f"| {method} | {', '.join(cells)} | {seconds:.1f} |", flush=True)
    if path:
        path.write_text(json.dumps({"options": options, "runs": everything}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
