"""WordNet's noun glosses with a class of their hypernyms, and a frozen sentence encoder's view of each as a second field.

    python -m workloads.distillation.glosses FOLDER_OF_DATA_NOUN FOLDER_OF_ENCODER data/wordnet-glosses

A gloss belongs to the nearest hypernym with more than `above` synsets below it; classes with fewer than `fewest` glosses are
left out, and at most `most` of a class are taken. Parts teacher, student, dev and test share no gloss, not even one that two
synsets have word for word. `ci/gloss_data.sh` fetches what is needed.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch

from labelmill.data.extreme import read_lines
from labelmill.data.labels import LabelSpec
from labelmill.data.manifest import FieldSpec, Manifest
from labelmill.data.writer import ShardWriter
from labelmill.encoders import build_encoder
from labelmill.encoders.library import HfTextConfig
from labelmill.errors import DataError
from workloads.extreme.packages import part_of

SHARES = (("test", 0.16), ("dev", 0.06), ("student", 0.32), ("teacher", 0.46))
TEXT, SENTENCE = "text", "sentence"
_SHARDS, _BATCH = 4, 256


class Noun(NamedTuple):
    """A synset: its first lemma, its first hypernym ("" at the root), its gloss without example sentences."""

    name: str
    above: str
    gloss: str


def nouns(folder: str | os.PathLike[str]) -> dict[str, Noun]:
    """The noun synsets by offset. Raises DataError for a folder without data.noun."""
    path = Path(folder) / "data.noun"
    if not path.is_file():
        raise DataError(f"{path}: no such file. ci/gloss_data.sh fetches WordNet.")
    found = {}
    for line in read_lines(path):
        if line.startswith("  "):  # the licence
            continue
        head, _, gloss = line.partition(" | ")
        fields = head.split()
        at = 4 + 2 * int(fields[3], 16)  # lemmas come in pairs, pointers in fours behind their number
        pointers = [fields[at + 1 + 4 * i : at + 5 + 4 * i] for i in range(int(fields[at]))]
        above = next((to for kind, to, part, _ in pointers if kind in ("@", "@i") and part == "n"), "")
        found[fields[0]] = Noun(fields[4].replace("_", " ").lower(), above, gloss.partition('; "')[0].strip())
    return found


def classes_of(found: Mapping[str, Noun], above: int) -> dict[str, str]:
    """Synset -> the nearest of its hypernyms with more than `above` synsets below; synsets without one are left out."""
    below = Counter[str]()
    for key in found:
        at = found[key].above
        while at:
            below[at] += 1
            at = found[at].above
    classes = {}
    for key in found:
        at = found[key].above
        while at and below[at] <= above:
            at = found[at].above
        if at:
            classes[key] = at
    return classes


def _drawn(keys: Sequence[str]) -> list[str]:
    return sorted(keys, key=lambda key: hashlib.sha256(key.encode()).digest())


@torch.no_grad()
def encode(texts: Sequence[str], config: HfTextConfig) -> np.ndarray:
    """float32 (N, E) of unit length. Batches are of texts of like length: little padding."""
    encoder = build_encoder(config).eval()
    out = np.empty((len(texts), encoder.dim), np.float32)
    order = np.argsort([len(text) for text in texts], kind="stable")
    for lo in range(0, len(order), _BATCH):
        at = order[lo : lo + _BATCH]
        emb_BE = encoder(encoder.prepare([texts[i] for i in at]))
        out[at] = torch.nn.functional.normalize(emb_BE, dim=1).numpy()
    return out


def write_glosses(
    folder: str | os.PathLike[str],
    encoder: HfTextConfig,
    out: str | os.PathLike[str],
    above: int = 80,
    fewest: int = 40,
    most: int = 50,
) -> dict[str, Manifest]:
    """Writes the parts, fields `text` and `sentence`, classes in the order of their synsets. Raises DataError without classes."""
    found = nouns(folder)
    of = defaultdict[str, list[str]](list)
    for key, name in classes_of(found, above).items():
        of[name].append(key)
    names = sorted(name for name, keys in of.items() if len(keys) >= fewest)
    if not names:
        raise DataError(f"{folder}: no hypernym has {fewest} glosses of its own: lower fewest or above.")
    rows = [(key, number) for number, name in enumerate(names) for key in _drawn(of[name])[:most]]
    sentence = dict(zip((key for key, _ in rows), encode([found[key].gloss for key, _ in rows], encoder), strict=True))
    width = len(sentence[rows[0][0]])
    fields = {
        TEXT: FieldSpec(kind="text", ext="txt"),
        SENTENCE: FieldSpec(kind="array", ext="npy", shape=(width,), dtype="float32"),
    }
    classes = pa.table({"name": [found[name].name for name in names], "synset": [f"wn-noun-{name}" for name in names]})
    labels, made = dict(rows), {}
    for part, _ in SHARES:
        mine = _drawn([key for key, _ in rows if part_of(found[key].gloss.lower(), SHARES) == part])
        size = max(1, -(-len(mine) // _SHARDS))
        spec = LabelSpec(form="single", num_classes=len(names))
        place = os.path.join(os.fspath(out), part)
        with ShardWriter(place, f"glosses-{part}", fields, spec, "packed", samples_per_shard=size) as writer:
            for key in mine:
                values = {TEXT: found[key].gloss, SENTENCE: sentence[key]}
                writer.write(f"wn-noun-{key}", values, {"label": labels[key]})
            made[part] = writer.close(classes=classes)
    return made


def main(arguments: list[str]) -> None:
    """The command line."""
    if len(arguments) != 3:
        raise SystemExit("usage: python -m workloads.distillation.glosses FOLDER_OF_DATA_NOUN FOLDER_OF_ENCODER OUT")
    encoder = HfTextConfig(path=arguments[1], frozen=True, max_length=64)
    for part, manifest in write_glosses(arguments[0], encoder, arguments[2]).items():
        print(f"{part}: {manifest.num_samples:,} samples, {manifest.label.num_classes:,} classes -> {manifest.root}")


if __name__ == "__main__":
    main(sys.argv[1:])
