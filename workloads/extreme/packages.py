"""Extreme data sets from ordinary packages: Debian's tags of packages, and WordNet's glosses with their lemmas.

    python -m workloads.extreme.packages tags <folder of *_Packages and *_Translation-en> data/debian-tags
    python -m workloads.extreme.packages sections <the same folder> data/debian-sections
    python -m workloads.extreme.packages words <folder of data.noun, ...> data/wordnet-words
    python -m workloads.extreme.packages wordnet <folder of data.noun, ...> data/wordnet-lemmas

`ci/extreme_data.sh` fetches both without root. Every sample's part (train, dev, test) is a hash of its group, so that near
duplicates (packages of one source) stay together.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from labelmill.data.extreme import label_lists, read_lines, write_multi_label
from labelmill.data.labels import LabelSpec
from labelmill.data.manifest import FieldSpec, Manifest
from labelmill.data.writer import ShardWriter
from labelmill.errors import DataError

Stanza = dict[str, str]
SHARES = (("test", 0.2), ("dev", 0.08))
"""Shares of groups; the rest is train."""


def part_of(group: str, shares: tuple[tuple[str, float], ...] = SHARES) -> str:
    """train, dev or test, by a hash of the group's name."""
    at = int.from_bytes(hashlib.sha256(group.encode()).digest()[:8], "big") / 2**64
    for part, share in shares:
        if at < share:
            return part
        at -= share
    return "train"


def stanzas(path: str | os.PathLike[str]) -> Iterator[Stanza]:
    """The stanzas of an index file in Debian's control format; continued lines are joined by newlines."""
    current: Stanza = {}
    field = ""
    for line in [*read_lines(path), ""]:
        if not line.strip():
            if current:
                yield current
            current, field = {}, ""
        elif line[0] in " \t":
            current[field] = current.get(field, "") + "\n" + line.strip()
        else:
            field, _, value = line.partition(":")
            current[field] = value.strip()


def packages(folder: str | os.PathLike[str]) -> list[Stanza]:
    """Each package once, the first index that has it counts; `short` is its English one-line description."""
    root = Path(folder)
    texts: dict[str, str] = {}
    for path in sorted(root.glob("*_Translation-en")):
        for stanza in stanzas(path):
            texts[stanza.get("Description-md5", "")] = stanza.get("Description-en", "").partition("\n")[0]
    found: dict[str, Stanza] = {}
    for path in sorted(root.glob("*_Packages")):
        for stanza in stanzas(path):
            name = stanza.get("Package", "")
            short = texts.get(stanza.get("Description-md5", "")) or stanza.get("Description", "").partition("\n")[0]
            if name and short:
                found.setdefault(name, stanza | {"short": short})
    if not found:
        raise DataError(f"{root}: no *_Packages with descriptions here. ci/extreme_data.sh fetches them.")
    return [found[name] for name in sorted(found)]


def tags_of(stanza: Stanza) -> list[str]:
    """Tags of a package: `use::{editing,viewing}` stands for two."""
    tags: list[str] = []
    for item in re.findall(r"[^,{}\s]+\{[^}]*\}|[^,\s]+", stanza.get("Tag", "").replace("\n", " ")):
        facet, brace, rest = item.partition("{")
        tags += [facet + value.strip() for value in rest.rstrip("}").split(",")] if brace else [item]
    return sorted(set(tags))


def source_of(stanza: Stanza) -> str:
    """The source package's name."""
    return stanza.get("Source", stanza["Package"]).partition(" ")[0]


def key_of(stanza: Stanza) -> str:
    """Sample key of a package: keys hold no dots, and package names no underscores."""
    return f"deb-{stanza['Package'].replace('.', '_')}"


def write_tags(folder: str | os.PathLike[str], out: str | os.PathLike[str], fewest: int = 5) -> dict[str, Manifest]:
    """Short descriptions of packages with the tags that at least `fewest` packages have; a tag's text is `facet value`."""
    tagged = [(stanza, tags_of(stanza)) for stanza in packages(folder)]
    uses = Counter(tag for _, tags in tagged for tag in tags)
    names = sorted(tag for tag, count in uses.items() if count >= fewest)
    ids = {tag: number for number, tag in enumerate(names)}
    parts: dict[str, list[tuple[str, str, list[int]]]] = {}
    for stanza, tags in tagged:
        known = [ids[tag] for tag in tags if tag in ids]
        if known:
            row = (key_of(stanza), stanza["short"], sorted(known))
            parts.setdefault(part_of(source_of(stanza)), []).append(row)
    classes = pa.table({"name": [re.sub(r"::|[-_:]", " ", tag) for tag in names], "tag": names})
    return _write(out, parts, classes, "debian-tags")


def synsets(folder: str | os.PathLike[str]) -> Iterator[tuple[str, list[str], str]]:
    """(key, lemmas, gloss without its example sentences) of WordNet's data files."""
    root = Path(folder)
    for kind in ("noun", "verb", "adj", "adv"):
        for line in read_lines(root / f"data.{kind}"):
            if line.startswith("  "):  # the licence
                continue
            head, _, gloss = line.partition(" | ")
            fields = head.split()
            lemmas = [
                re.sub(r"\(.*\)$", "", fields[4 + 2 * i]).replace("_", " ").lower() for i in range(int(fields[3], 16))
            ]
            yield f"wn-{kind}-{fields[0]}", lemmas, gloss.partition('; "')[0].strip()


def write_wordnet(folder: str | os.PathLike[str], out: str | os.PathLike[str]) -> dict[str, Manifest]:
    """Glosses with the lemmas of their synset: a dictionary read backwards. A lemma's text is its spelling."""
    rows = list(synsets(folder))
    names = sorted({lemma for _, lemmas, _ in rows for lemma in lemmas})
    ids = {lemma: number for number, lemma in enumerate(names)}
    parts: dict[str, list[tuple[str, str, list[int]]]] = {}
    for key, lemmas, gloss in rows:
        part = part_of(key, (("test", 0.04), ("dev", 0.02)))
        parts.setdefault(part, []).append((key, gloss, sorted({ids[lemma] for lemma in lemmas})))
    return _write(out, parts, pa.table({"name": names}), "wordnet-lemmas")


def _write(
    out: str | os.PathLike[str], parts: dict[str, list[tuple[str, str, list[int]]]], classes: pa.Table, name: str
) -> dict[str, Manifest]:
    spec = LabelSpec(form="multi", num_classes=len(classes))
    made = {}
    for part, rows in sorted(parts.items()):
        keys, texts, ids = [r[0] for r in rows], [r[1] for r in rows], label_lists([r[2] for r in rows])
        place = os.path.join(os.fspath(out), part)
        shard = max(256, -(-len(rows) // 12))
        made[part] = write_multi_label(
            keys, texts, {"label": ids}, spec, classes, place, name, name=f"{name}-{part}", samples_per_shard=shard
        )
    return made


def write_words(
    folder: str | os.PathLike[str], out: str | os.PathLike[str], fewest: int = 2, a_gloss: int = 3
) -> dict[str, Manifest]:
    """Four words of a gloss in a row, and the word that follows as the one label, of words that occur `fewest` times.

    At most `a_gloss` places of a gloss, drawn by a hash.
    """
    glosses = [(key, re.findall(r"[a-z']+", gloss.lower())) for key, _, gloss in synsets(folder)]
    uses = Counter(word for _, words in glosses for word in words)
    names = sorted(word for word, count in uses.items() if count >= fewest)
    ids = {word: number for number, word in enumerate(names)}
    parts: dict[str, list[tuple[str, str, list[int]]]] = {}
    for key, words in glosses:
        places = [i for i in range(4, len(words)) if words[i] in ids]
        places.sort(key=lambda i: hashlib.sha256(f"{key} {i}".encode()).digest())
        part = part_of(key, (("test", 0.05), ("dev", 0.02)))
        for i in places[:a_gloss]:
            parts.setdefault(part, []).append((f"{key}-{i}", " ".join(words[i - 4 : i]), [ids[words[i]]]))
    return _write(out, parts, pa.table({"name": names}), "wordnet-words")


# --- a table of categorical columns -------------------------------------------------------------------------

COLUMNS = ("maintainer", "architecture", "priority", "depends", "name_tokens")
"""Columns that predict the section; the last two hold lists."""


def table_row(stanza: Stanza) -> dict[str, str | list[str]]:
    """The categorical columns of a package."""
    depends = ",".join(stanza.get(field, "") for field in ("Depends", "Pre-Depends", "Recommends"))
    names = {
        re.split(r"[\s(:]", alternative.strip())[0] for part in depends.split(",") for alternative in part.split("|")
    }
    return {
        "maintainer": stanza.get("Maintainer", ""),
        "architecture": stanza.get("Architecture", ""),
        "priority": stanza.get("Priority", ""),
        "depends": sorted(names - {""}),
        "name_tokens": [token for token in re.split(r"[-+.]|(?<=[a-z])(?=\d)", stanza["Package"]) if token],
    }


def write_sections(
    folder: str | os.PathLike[str], out: str | os.PathLike[str], fewest: int = 20
) -> dict[str, Manifest]:
    """Packages with their section as the one label, and a JSON object of categorical columns as the field `row`."""
    found = packages(folder)
    uses = Counter(stanza.get("Section", "") for stanza in found)
    names = sorted(section for section, count in uses.items() if section and count >= fewest)
    ids = {section: number for number, section in enumerate(names)}
    classes = pa.table({"name": names})
    made = {}
    for part in ("train", "dev", "test"):
        rows = [s for s in found if s.get("Section", "") in ids and part_of(source_of(s)) == part]
        order = np.argsort([hashlib.sha256(s["Package"].encode()).hexdigest() for s in rows])
        with ShardWriter(
            os.path.join(os.fspath(out), part),
            f"debian-sections-{part}",
            {"row": FieldSpec(kind="text", ext="json")},
            LabelSpec(form="single", num_classes=len(names)),
            layout="packed",
            samples_per_shard=max(256, -(-len(rows) // 12)),
        ) as writer:
            for place in order:
                stanza = rows[place]
                row = json.dumps(table_row(stanza), sort_keys=True)
                writer.write(key_of(stanza), {"row": row}, {"label": ids[stanza["Section"]]})
            made[part] = writer.close(classes=classes)
    return made


def main(arguments: list[str]) -> None:
    """The command line."""
    writers = {"tags": write_tags, "sections": write_sections, "wordnet": write_wordnet, "words": write_words}
    if len(arguments) != 3 or arguments[0] not in writers:
        raise SystemExit(f"usage: python -m workloads.extreme.packages {{{','.join(writers)}}} FOLDER OUT")
    for part, manifest in writers[arguments[0]](arguments[1], arguments[2]).items():
        print(f"{part}: {manifest.num_samples:,} samples, {manifest.label.num_classes:,} classes -> {manifest.root}")


if __name__ == "__main__":
    main(sys.argv[1:])
