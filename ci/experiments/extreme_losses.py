"""Which loss for a dual encoder, on Debian's tags: small enough for a few minutes of one core.

    python ci/experiments/extreme_losses.py
    python ci/experiments/extreme_losses.py --buckets 32768 --dim 64 --epochs 8

The objective of `extreme.dual_encoder` with all labels as negatives, trained by a plain loop on texts that are hashed once.
Every loss gets the same two learning rates on the dev set (seed 100), then the seeds on the test set. Prints a Markdown table
of mean (lowest - highest) in percent. Run it at the root of the repository, with labelmill and workloads on PYTHONPATH, after
`make extreme-data`.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import numpy as np
import torch

from labelmill.data.labels import Labels, labels_from_table
from labelmill.data.manifest import Manifest, load_manifest
from labelmill.data.shards import label_counts, read_shard
from labelmill.data.stream import Batch
from labelmill.encoders import CharNgramsConfig, build_encoder
from labelmill.evaluation.extreme import RankedSums, frequency_bands, inverse_propensities
from labelmill.losses.retrieval import BCESection, DecoupledSection, SoftmaxSection, SoftTopKSection
from workloads.extreme.towers import DualEncoder, FullNegatives, draw_positives, most_positives

LOSSES: dict[str, Any] = {
    "softmax": SoftmaxSection(),
    "decoupled": DecoupledSection(),
    "BCE, bias -5": BCESection(bias=-5.0),
    "soft top-k, k = positives": SoftTopKSection(k="num_pos"),
    "decoupled, one drawn": DecoupledSection(positives="one"),
    "soft top-5": SoftTopKSection(k=5),
}
SHOWN = ("P@1", "P@5", "PSP@1", "PSP@5", "R@10", "R@50", "tail R@5")
TUNING_SEED = 100


class Split:
    """Texts of a part, hashed, and their labels."""

    def __init__(self, data: Manifest, encoder: Any) -> None:
        tables = [read_shard(data, i) for i in range(len(data.shards))]
        self.inputs = torch.cat([pad(encoder.prepare(t.column("text").to_pylist())) for t in tables])
        self.labels = Labels.concat([labels_from_table(t, data.label) for t in tables])

    def __len__(self) -> int:
        return len(self.labels)


def pad(ids_BFT: torch.Tensor, width: int = 98) -> torch.Tensor:
    """Prepared texts of one width."""
    return torch.nn.functional.pad(ids_BFT, (0, width - ids_BFT.shape[2]))


def train(
    config: CharNgramsConfig, data: Manifest, train: Split, loss: Any, rate: float, seed: int, options: Any
) -> DualEncoder:
    """One model."""
    torch.manual_seed(seed)
    model = DualEncoder(config, loss, FullNegatives(), data, temperature=0.05, seed=seed)
    optimizer = torch.optim.AdamW(model.encoder.parameters(), lr=rate, weight_decay=0.0)
    rng, batch = np.random.default_rng(seed), options.batch
    steps = options.epochs * (len(train) // batch)
    order = np.concatenate([rng.permutation(len(train))[: len(train) // batch * batch] for _ in range(options.epochs)])
    for step in range(steps):
        at = order[step * batch : (step + 1) * batch]
        ids = train.labels.ids_BP[at]
        keys = rng.integers(0, 2**63, batch).astype(np.uint64)
        drawn = torch.from_numpy(draw_positives(keys, ids.numpy(), None, most_positives(loss)))
        labels = Labels("multi", ids)
        inputs = {"query": train.inputs[at], "drawn": drawn}
        warm = max(1, steps // 10)
        optimizer.param_groups[0]["lr"] = rate * min((step + 1) / warm, (steps - step) / (steps - warm))
        model.forward(Batch([""] * batch, inputs, labels, torch.ones(batch), torch.arange(batch))).total.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.head.step(rate)
    return model.eval()


@torch.no_grad()
def judge(model: DualEncoder, data: Manifest, part: Split) -> dict[str, float]:
    """Metrics on a part."""
    model._settle()
    count_L = label_counts(data)
    sums = RankedSums(
        (1, 3, 5), (10, 50), inverse_propensities(count_L, data.num_samples), frequency_bands(count_L), len(count_L)
    )
    for lo in range(0, len(part), 1024):
        _, ids = model.head.topk(model.encoder(part.inputs[lo : lo + 1024]), 50)
        sums.add(ids.numpy(), part.labels.ids_BP[lo : lo + 1024].numpy())
    return sums.metrics()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data/debian-tags")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--buckets", type=int, default=8192)
    parser.add_argument("--dim", type=int, default=32)
    parser.add_argument("--rates", type=float, nargs="+", default=[0.005, 0.02])
    parser.add_argument("--losses", nargs="+", default=list(LOSSES))
    options = parser.parse_args()
    torch.set_num_threads(1)
    config = CharNgramsConfig(
        dim=options.dim, buckets=options.buckets, orders=(3,), placed=(), gaps=(), deletions=False,
        hidden=2 * options.dim, max_length=96, lowercase=True,
    )  # fmt: skip
    data = load_manifest(f"{options.data}/train")
    encoder = build_encoder(config)
    parts = {name: Split(load_manifest(f"{options.data}/{name}"), encoder) for name in ("train", "dev", "test")}
    print(
        f"| loss | rate (dev P@1 of each) | {' | '.join(SHOWN)} | CPU s a run |\n|{'---|' * (3 + len(SHOWN))}",
        flush=True,
    )
    for name in options.losses:
        loss, tried, spent = LOSSES[name], {}, []
        for rate in options.rates:
            model = train(config, data, parts["train"], loss, rate, TUNING_SEED, options)
            tried[rate] = judge(model, data, parts["dev"])["P@1"]
        best = max(tried, key=lambda rate: tried[rate])
        found = []
        for seed in range(options.seeds):
            began = time.process_time()
            model = train(config, data, parts["train"], loss, best, seed, options)
            spent.append(time.process_time() - began)
            found.append(judge(model, data, parts["test"]))
        chosen = f"{best:g} ({', '.join(f'{r:g}: {100 * p:.1f}' for r, p in tried.items())})"
        cells = []
        for metric in SHOWN:
            values = [100 * f[metric] for f in found]
            cells.append(f"{statistics.mean(values):.1f} ({min(values):.1f} - {max(values):.1f})")
        print(f"| {name} | {chosen} | {' | '.join(cells)} | {statistics.mean(spent):.0f} |", flush=True)


if __name__ == "__main__":
    main()
