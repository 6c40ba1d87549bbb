"""Does a hard-class sample of the classes reach what a ten times larger uniform one reaches? Misspelt words.

One class a word, in the order of frequency or of the alphabet; queries are random typos that are no words themselves.
The encoder learns from scratch with the class rows. One process, one thread, single pass over fresh typos. The rate at
which rows learn is chosen for every method apart, by a run with a seed and typos that no reported run has. For every
way of sampling: top-1 accuracy on held-out typos at the end, and the CPU seconds of training until it first reached the
levels asked for (`-` where a seed never did).

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
import pyarrow as pa
import torch

from labelmill.encoders import CharNgramsConfig, build_encoder
from labelmill.heads.config import HeadConfig
from labelmill.heads.optim import SGD
from labelmill.heads.plan import BlockSampling, HardSampling, SamplingConfig, UniformSampling
from labelmill.heads.sharded import ShardedHead
from labelmill.losses.margins import CosFace
from workloads.discrimination.words import make_typos, read_words

TUNING_SEED = 1000
METHODS = ("full 1", "uniform 0.01", "uniform 0.02", "uniform 0.1", "hard 0.01", "hard/1 0.01")


def sampling_of(kind: str) -> SamplingConfig:
    """A sampling section from its name."""
    name, _, number = kind.partition("/")
    if name == "blocks":
        return BlockSampling(stride=int(number or 1))
    if name == "hard":
        return HardSampling(share=float(number or 0.5))
    return UniformSampling()


def run(method: str, rate: float, words: np.ndarray, options: dict[str, Any], seed: int) -> list[dict[str, float]]:
    """Trains once, rows learning `rate` times as fast as the encoder; a record of every part of the run."""
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
        lr_multiplier=rate,
        block_rows=256,
    )
    head = ShardedHead(len(words), options["dim"], config, seed=seed)
    optimizer = torch.optim.Adam(encoder.parameters(), lr=options["lr"])
    steps, parts, batch = options["steps"], options["parts"], options["batch"]
    tests, answers = typos_of(words, rng, options["queries"])
    texts, labels = typos_of(words, rng, steps * batch)
    spent, records = 0.0, []
    for step in range(steps):
        mine = slice(step * batch, (step + 1) * batch)
        inputs = encoder.prepare(texts[mine])
        lr = options["lr"] * (1.0 - step / steps)
        start = time.process_time()
        optimizer.param_groups[0]["lr"] = lr
        head.begin_step(lr)
        head.loss(encoder(inputs), labels[mine]).backward()
        optimizer.step()
        optimizer.zero_grad()
        head.step(lr)
        spent += time.process_time() - start
        if (step + 1) % (steps // parts) == 0:
            with torch.no_grad():
                _, found = head.topk(encoder.embed(tests), 1)
            accuracy = float((found[:, 0] == answers).double().mean())
            records.append({"step": step + 1, "seconds": spent, "accuracy": accuracy})
    return records


def typos_of(words: np.ndarray, rng: np.random.Generator, count: int) -> tuple[list[str], torch.Tensor]:
    """Typos of random words, and the words they are of; few more are drawn than needed, some come out as words."""
    drawn = rng.integers(len(words), size=count + count // 8 + 8)
    typos, _ = make_typos(words, drawn, 0.0, rng, pa.array(words))
    good = np.flatnonzero(typos != "")[:count]
    return typos[good].tolist(), torch.from_numpy(drawn[good])


def reached(records: list[dict[str, float]], accuracy: float) -> float | None:
    """Seconds until the accuracy was first seen."""
    return next((record["seconds"] for record in records if record["accuracy"] >= accuracy), None)


def row(method: str, rate: float, runs: list[list[dict[str, float]]], levels: list[float]) -> str:
    """The Markdown row of a method."""
    final = [100 * records[-1]["accuracy"] for records in runs]
    cells = [f"{method} | {rate:g}", f"{statistics.mean(final):.1f} ({min(final):.1f}-{max(final):.1f})"]
    for level in levels:
        times = [reached(records, level) for records in runs]
        known = [t for t in times if t is not None]
        cells.append(f"{statistics.mean(known):.0f}" if len(known) == len(times) else "-")
    cells.append(f"{statistics.mean(records[-1]['seconds'] for records in runs):.0f}")
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--words", type=int, default=20_000)
    parser.add_argument("--order", choices=["frequency", "alphabet"], default="frequency", help="of the class ids")
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--parts", type=int, default=20)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--queries", type=int, default=4000)
    parser.add_argument("--dim", type=int, default=96)
    parser.add_argument("--scale", type=float, default=24.0)
    parser.add_argument("--lr", type=float, default=0.003)
    parser.add_argument("--rates", type=float, nargs="*", default=[10.0, 30.0], help="rows, times --lr: tried once")
    parser.add_argument("--levels", type=float, nargs="*", default=[0.3, 0.4, 0.5], help="accuracies to be timed")
    parser.add_argument("--json", type=Path)
    options = vars(parser.parse_args())
    path = options.pop("json")
    torch.set_num_threads(1)
    words, _ = read_words(("en",), options["words"])
    if options["order"] == "alphabet":
        words = np.sort(words)
    levels = options["levels"]
    print(f"| {len(words):,} words by {options['order']}, batch {options['batch']} | rows' rate | top-1 % (range over "
          f"{options['seeds']} seeds) | {' | '.join(f's to {100 * level:.0f} %' for level in levels)} | s in all |")  # fmt: skip
    print("|" + "---|" * (4 + len(levels)))
    everything = {}
    for method in options["methods"]:
        tried = {rate: run(method, rate, words, options, TUNING_SEED) for rate in options["rates"]}
        rate = max(tried, key=lambda rate: tried[rate][-1]["accuracy"])
        runs = [run(method, rate, words, options, seed) for seed in range(options["seeds"])]
        everything[method] = {"rate": rate, "runs": runs, "tried": {str(key): value for key, value in tried.items()}}
        print(row(method, rate, runs, levels), flush=True)
    if path:
        path.write_text(json.dumps({"options": options, "runs": everything}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
