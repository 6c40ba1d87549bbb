"""Real words and their misspellings as a data set: one class a word, samples are seeded typos.

The words come from the frequency lists of the package `wordfreq` (code Apache-2.0, data CC-BY-SA 4.0), read as files.
A typo is one or two random edits (substitute, insert, delete, swap two neighbours), drawn from the letter frequencies of
the words; a result that is itself a word of the vocabulary is drawn again, so every query is a misspelling.

Shape legend: N samples, L padded letters.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from labelmill.data.labels import LabelSpec
from labelmill.data.manifest import FieldSpec, Manifest
from labelmill.data.shards import read_shard
from labelmill.data.writer import ShardWriter
from labelmill.errors import DataError, JobError

MIN_LETTERS, MAX_LETTERS = 3, 20
BANDS = ((10_000, "top 10k"), (100_000, "10k-100k"), (400_000, "100k-400k"), (10**9, "rarer"))
"""Frequency bands by rank."""

_THIRDS = {"test": (0, 1), "dev": (2,)}  # which thirds of a band's drawn words a split gets


def read_words(languages: tuple[str, ...], count: int) -> tuple[np.ndarray, np.ndarray]:
    """The `count` most frequent distinct words of the languages: (words `<U20`, frequency float64), frequent first.

    Raises JobError when the package is missing or lacks a language, or has too few words.
    """
    spec = find_spec("wordfreq")
    if spec is None or not spec.submodule_search_locations:
        raise JobError("words: the package wordfreq is not installed; `pip install 'labelmill[examples]'` brings it.")
    import msgpack

    folder = Path(spec.submodule_search_locations[0]) / "data"
    best: dict[str, float] = {}
    for language in languages:
        path = next(
            (p for size in ("large", "small") if (p := folder / f"{size}_{language}.msgpack.gz").is_file()), None
        )
        if path is None:
            raise JobError(f"words.languages: wordfreq has no list for {language!r}; try en, de, fr, es, it, nl, pt.")
        with gzip.open(path) as file:
            bins = msgpack.load(file, raw=False)
        # item 0 is a header; item i holds the words of frequency 10^(-(i-1)/100)
        for i, words in enumerate(bins[1:]):
            frequency = 10 ** (-i / 100)
            for word in words:
                if MIN_LETTERS <= len(word) <= MAX_LETTERS and word.isalpha() and best.get(word, 0.0) < frequency:
                    best[word] = frequency
    if len(best) < count:
        raise JobError(f"words.count: {count:,} words asked, but {', '.join(languages)} have {len(best):,}.")
    # equal frequencies in an order that has nothing to do with the alphabet, so that a cut takes no part of it
    ranked = sorted(best, key=lambda word: (-best[word], zlib.crc32(word.encode())))[:count]
    return np.array(ranked, dtype=f"<U{MAX_LETTERS}"), np.array([best[word] for word in ranked])


def band_of_rank(ranks: np.ndarray) -> np.ndarray:
    """Name of the frequency band of each rank."""
    names = np.array([name for _, name in BANDS])
    return names[np.searchsorted([limit for limit, _ in BANDS], ranks, side="right")]


def _letters(words: np.ndarray) -> np.ndarray:
    """`<U` strings -> uint32 code points (N, L), zero padded."""
    return words.view(np.uint32).reshape(len(words), -1)


def _edit(codes_NL: np.ndarray, letters: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One random edit of every row; rows keep their width, so the last column must be free (zero)."""
    n, width = codes_NL.shape
    length = (codes_NL > 0).sum(1)
    kind = rng.integers(0, 4, size=(n,))  # substitute, insert, delete, swap
    # a swap of two equal letters would change nothing; such rows substitute instead
    place = (rng.random(n) * np.where(kind == 1, length + 1, np.where(kind == 3, length - 1, length))).astype(np.int64)
    row = np.arange(n)
    neighbour = np.minimum(place + 1, width - 1)
    kind[(kind == 3) & (codes_NL[row, place] == codes_NL[row, neighbour])] = 0
    column = np.arange(width)[None, :]
    shift = np.where((kind == 1)[:, None] & (column > place[:, None]), -1, 0)
    shift = np.where((kind == 2)[:, None] & (column >= place[:, None]), 1, shift)
    taken = np.clip(column + shift, 0, width - 1)
    out = np.take_along_axis(codes_NL, taken, axis=1)
    out[(column + shift) >= width] = 0
    written = (kind == 0) | (kind == 1)
    out[row[written], place[written]] = rng.choice(letters, written.sum())
    swapped = kind == 3
    out[row[swapped], place[swapped]] = codes_NL[row[swapped], neighbour[swapped]]
    out[row[swapped], neighbour[swapped]] = codes_NL[row[swapped], place[swapped]]
    return out


def make_typos(
    words: np.ndarray, of: np.ndarray, two_edits: float, rng: np.random.Generator, vocabulary: pa.Array
) -> tuple[np.ndarray, np.ndarray]:
    """Misspellings of `words[of]`: (`<U` strings (N,), edits int64 (N,)); `""` where eight tries gave only words.

    Args:
        words: the vocabulary.
        of: indices into it.
        two_edits: share of samples with two edits; words of three letters always get one.
        rng: of the draws.
        vocabulary: the same words as an Arrow array, to recognise words.
    """
    codes = _letters(words)
    letters = codes[: min(len(codes), 200_000)].ravel()
    letters = letters[letters > 0]
    letters = letters[rng.integers(0, len(letters), 65_536)]  # a sample keeps the letters' frequencies
    width = MAX_LETTERS + 2
    typos = np.full(len(of), "", dtype=f"<U{width}")
    edits = np.where((rng.random(len(of)) < two_edits) & (np.char.str_len(words[of]) > 3), 2, 1)
    todo = np.arange(len(of))
    for _ in range(8):
        source = np.zeros((len(todo), width), dtype=np.uint32)
        source[:, :MAX_LETTERS] = codes[of[todo]]
        edited = _edit(source, letters, rng)
        twice = edits[todo] == 2
        edited[twice] = _edit(edited[twice], letters, rng)
        drawn = np.ascontiguousarray(edited).view(f"<U{width}").ravel()
        is_word = pc.is_in(pa.array(drawn), value_set=vocabulary).to_numpy(zero_copy_only=False)
        fine = ~is_word & (np.char.str_len(drawn) > 1)
        typos[todo[fine]] = drawn[fine]
        todo = todo[~fine]
        if not len(todo):
            break
    return typos, edits


def write_words(
    out: Path, languages: tuple[str, ...], count: int, typos_per_word: int, queries: int, two_edits: float, seed: int
) -> dict[str, int]:
    """Writes `out/train`, `out/dev` and `out/test` (packed shards, one label space); returns their sample counts.

    Train has `typos_per_word` misspellings of every word. Test has `queries` misspellings, equally many from each
    frequency band, dev half as many of other words; neither holds one that train has for the same word.
    """
    words, frequency = read_words(languages, count)
    vocabulary = pa.array(words)
    bands = band_of_rank(np.arange(count))
    classes = pa.table({"name": vocabulary, "frequency": frequency, "group": bands})

    def write(split: str, tables: Iterable[pa.Table]) -> int:
        fields, label = {"text": FieldSpec(kind="text", ext="txt")}, LabelSpec(form="single", num_classes=count)
        # a stage that crashed here may have left a data set
        with ShardWriter(
            out / split,
            f"words-{split}",
            fields,
            label,
            layout="packed",
            target_bytes=2 << 20,
            rows_per_member=8192,
            overwrite=True,
        ) as writer:
            for table in tables:
                writer.write_table(table)
            return writer.close(classes=classes).num_samples

    rng = np.random.default_rng([seed, 1])
    present = [name for _, name in BANDS if (bands == name).any()]
    drawn = [rng.permutation(np.flatnonzero(bands == name))[: queries * 3 // 2 // len(present)] for name in present]
    asked = {split: np.concatenate([band[i::3] for band in drawn for i in part]) for split, part in _THIRDS.items()}
    held_out: dict[int, str] = {}
    tables, sizes = {}, {}
    for split, of in asked.items():
        of = rng.permutation(of)
        typos, edits = make_typos(words, of, two_edits, rng, vocabulary)
        held_out |= dict(zip(of.tolist(), typos.tolist(), strict=True))
        kept = typos != ""
        tables[split] = _table("q-", typos[kept], of[kept], edits[kept])
    for split, table in tables.items():
        sizes[split] = write(split, [table])

    def training() -> Iterator[pa.Table]:
        held = np.fromiter(held_out, dtype=np.int64)
        for part in range(typos_per_word):
            rng = np.random.default_rng([seed, 2, part])
            typos, edits = make_typos(words, np.arange(count), two_edits, rng, vocabulary)
            kept = typos != ""
            kept[held] &= typos[held] != np.array([held_out[i] for i in held.tolist()])
            order = rng.permutation(np.flatnonzero(kept))
            yield _table(f"t{part}-", typos[order], order, edits[order])

    sizes["train"] = write("train", training())
    if sizes["train"] < 0.95 * count * typos_per_word:
        raise DataError(f"{out}: only {sizes['train']:,} of {count * typos_per_word:,} misspellings could be made.")
    return sizes


def _table(prefix: str, typos: np.ndarray, of: np.ndarray, edits: np.ndarray) -> pa.Table:
    """Rows of a shard; the key says which word, and how many edits."""
    keys = np.char.add(np.char.add(prefix, of.astype(str)), np.char.add("-", edits.astype(str)))
    return pa.table({"key": pa.array(keys), "text": pa.array(typos), "label": pa.array(of)})


def read_queries(data: Manifest) -> list[str]:
    """All misspellings of a split, in the order of the shards."""
    return pa.concat_tables([read_shard(data, i) for i in range(len(data.shards))])["text"].to_pylist()
