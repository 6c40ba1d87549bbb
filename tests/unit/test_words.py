"""Words and misspellings: edits are edits, nothing held out is trained on, everything follows the seed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from rapidfuzz.distance import OSA

from labelmill.data.manifest import load_manifest
from labelmill.data.shards import read_shard
from labelmill.errors import JobError
from workloads.discrimination.spelling_baselines import edit_rule, ngram_nearest
from workloads.discrimination.words import make_typos, read_queries, read_words, write_words

WORDS, FREQUENCY = read_words(("en",), 3000)


def test_words_are_distinct_and_ranked() -> None:
    assert len(set(WORDS.tolist())) == 3000
    assert (np.diff(FREQUENCY) <= 0).all()
    assert "the" in WORDS[:5].tolist()
    assert all(3 <= len(w) <= 20 and w.isalpha() for w in WORDS.tolist())


def test_typos_are_within_the_edits_they_claim_and_are_no_words() -> None:
    of = np.arange(3000)
    typos, edits = make_typos(WORDS, of, 0.4, np.random.default_rng(1), pa.array(WORDS))
    again, _ = make_typos(WORDS, of, 0.4, np.random.default_rng(1), pa.array(WORDS))
    assert (typos == again).all()
    vocabulary = set(WORDS.tolist())
    kept = np.flatnonzero(typos != "")
    assert len(kept) > 2990
    for i in kept.tolist():
        assert typos[i] not in vocabulary
        # two random edits may meet at one place, and cost one more than an alignment without overlaps allows
        assert 1 <= OSA.distance(str(WORDS[i]), str(typos[i])) <= edits[i] + 1
    ones = kept[edits[kept] == 1]
    assert all(OSA.distance(str(WORDS[i]), str(typos[i])) == 1 for i in ones.tolist())
    assert 0.3 < (edits[kept] == 2).mean() < 0.5


def test_splits_share_no_misspelling_and_follow_the_seed(tmp_path: Path) -> None:
    def make(name: str, seed: int) -> dict[str, set[tuple[str, int]]]:
        out = tmp_path / name
        write_words(out, ("en",), 3000, 2, 400, 0.25, seed)
        found = {}
        for split in ("train", "dev", "test"):
            data = load_manifest(out / split)
            table = pa.concat_tables([read_shard(data, i) for i in range(len(data.shards))])
            found[split] = set(zip(table["text"].to_pylist(), table["label"].to_pylist(), strict=True))
        return found

    first = make("a", 0)
    assert not first["train"] & (first["test"] | first["dev"])
    assert not {label for _, label in first["test"]} & {label for _, label in first["dev"]}
    assert 380 <= len(first["test"]) <= 400
    assert 180 <= len(first["dev"]) <= 200
    digests = {name: load_manifest(tmp_path / "a" / name).digest for name in ("train", "dev", "test")}
    make("b", 0)
    assert digests == {name: load_manifest(tmp_path / "b" / name).digest for name in digests}
    make("c", 1)
    assert digests["test"] != load_manifest(tmp_path / "c" / "test").digest
    assert len(read_queries(load_manifest(tmp_path / "a" / "test"))) == len(first["test"])


def test_baselines_find_what_they_should() -> None:
    words = ["the", "there", "their", "house", "mouse", "language"]
    queries = ["langauge", "hosue", "ther"]
    shortlist = ngram_nearest(words, queries, 5)
    ranked = edit_rule(words, queries, shortlist, 3)
    assert [words[row[0]] for row in ranked[:2]] == ["language", "house"]
    assert [words[i] for i in ranked[2][:2]] == ["the", "there"], "equal distances are ranked by frequency"
    assert words[shortlist[0][0]] == "language"


@pytest.mark.parametrize(
    ("languages", "count", "expected"),
    [(("xx",), 10, "no list for 'xx'"), (("en",), 10**7, "words asked, but en have")],
)
def test_bad_requests(languages: tuple[str, ...], count: int, expected: str) -> None:
    with pytest.raises(JobError, match=expected):
        read_words(languages, count)
