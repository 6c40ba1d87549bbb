"""A label audit over streamed probabilities at three sizes: CPU seconds, samples a CPU second, peak memory.

    python ci/bench/audit_scale.py --samples 250000 500000 1000000 --classes 1000

Both passes of confident learning, then the joint and all filters. Each size runs in a process of its own. The probabilities
are made batch by batch from the batch's number, twice, as a store would give them twice; making them isn't counted.
Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time

import numpy as np

from labelmill.evaluation.confident import RowFacts, ThresholdSums, row_facts
from labelmill.evaluation.label_filters import FILTERS, find_issues
from labelmill.evaluation.noise_rates import calibrated_joint, confident_joint, error_rate, rounded_joint

POOL = 2048
NOISE = 0.2


def pool_of(classes: int) -> np.ndarray:
    """Softmax rows with the true class in column 0: some sure, some doubtful, some wrong."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(POOL, classes)).astype(np.float32) * 2
    logits[:, 0] += rng.uniform(4, 14, POOL)
    p = np.exp(logits - logits.max(1, keepdims=True))
    return p / p.sum(1, keepdims=True)


def batch(pool: np.ndarray, number: int, rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(given, true, probabilities) of batch `number`: labels wrong with chance NOISE, always the class after the true one."""
    rng = np.random.default_rng(number)
    classes = pool.shape[1]
    true = rng.integers(0, classes, rows)
    given = np.where(rng.random(rows) < NOISE, (true + 1) % classes, true)
    columns = (np.arange(classes)[None, :] - true[:, None]) % classes
    return given, true, np.take_along_axis(pool[rng.integers(0, POOL, rows)], columns, axis=1)


def measure(samples: int, classes: int, rows: int) -> str:
    """One row of the table."""
    pool, seconds = pool_of(classes), [0.0, 0.0, 0.0]
    sizes = [min(rows, samples - lo) for lo in range(0, samples, rows)]
    sums = ThresholdSums(classes)
    for number, size in enumerate(sizes):
        given, _, probs = batch(pool, number, size)
        clock = time.process_time()
        sums.add_probs(given, probs)
        seconds[0] += time.process_time() - clock
    thresholds, parts, wrong = sums.thresholds(), [], []
    for number, size in enumerate(sizes):
        given, true, probs = batch(pool, number, size)
        clock = time.process_time()
        parts.append(row_facts(given, probs, thresholds))
        seconds[1] += time.process_time() - clock
        wrong.append(given != true)
    clock = time.process_time()
    facts = RowFacts.concat(parts)
    parts.clear()
    calibrated = calibrated_joint(confident_joint(facts), facts.label_counts)
    counts = rounded_joint(calibrated)
    flags = {name: find_issues(facts, name, counts) for name in FILTERS}
    seconds[2] = time.process_time() - clock
    truth, found = np.concatenate(wrong), flags["prune_by_noise_rate"]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    cells = [
        f"{samples:,}", f"{classes:,}", *(f"{s:.1f}" for s in seconds), f"{samples / sum(seconds):,.0f}", f"{peak:.2f}",
        f"{100 * error_rate(calibrated):.1f}", f"{100 * (found & truth).sum() / max(1, found.sum()):.1f}",
        f"{100 * (found & truth).sum() / truth.sum():.1f}",
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, nargs="+", default=[250_000, 500_000, 1_000_000])
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--one", action="store_true", help="print one row, for one size")
    options = parser.parse_args()
    if options.one:
        print(measure(options.samples[0], options.classes, options.batch))
        return
    columns = [
        "samples",
        "classes",
        "pass 1 CPU s",
        "pass 2 CPU s",
        "joint and filters CPU s",
        "samples/CPU s",
        "peak GiB",
    ]
    columns += ["estimated wrong %", "precision %", "recall %"]
    print("| " + " | ".join(columns) + " |\n|" + "---:|" * len(columns))
    for samples in options.samples:
        command = [sys.executable, __file__, "--one", "--samples", str(samples), "--classes", str(options.classes)]
        command += ["--batch", str(options.batch)]
        print(subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip(), flush=True)


if __name__ == "__main__":
    main()
