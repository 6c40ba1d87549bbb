"""WordNet's glosses: classes are hypernyms, parts share no gloss, the encoder's view is that of the gloss."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from labelmill.data.manifest import load_manifest
from labelmill.data.shards import read_shard
from labelmill.encoders.library import HfTextConfig
from labelmill.errors import DataError
from workloads.distillation.glosses import SHARES, classes_of, encode, nouns, write_glosses

TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


def wordnet(folder: Path) -> Path:
    """A tree in WordNet's format: 1 above 2 and 3; below each of these 40 synsets, and a chain of two below the first."""
    rows = ["  1 This software and database is being provided to you, the LICENSEE, by Princeton University"]

    def add(offset: int, name: str, above: int, gloss: str, pointer: str = "@") -> None:
        # a meronym first, as real lines have it: only @ and @i count
        pointers = f"002 #p {offset:08d} n 0000 {pointer} {above:08d} n 0000" if above else "000"
        rows.append(f'{offset:08d} 03 n 02 {name} 0 other_{name} 0 {pointers} | {gloss}; "a sentence with {name}"  ')

    add(1, "entity", 0, "that which is")
    for top in (2, 3):
        add(top, ("animal", "green_plant")[top - 2], 1, f"something alive of kind {top}")
        for i in range(40):
            add(100 * top + i, f"w{top}_{i}", top, f"the {i}th of kind {top}", "@i" if i % 2 else "@")
    add(500, "deep", 200, "a kind of the first animal")
    add(501, "deeper", 500, "a kind of the first animal")  # word for word the one above
    (folder / "data.noun").write_text("\n".join(rows) + "\n")
    return folder


def test_a_class_is_the_nearest_hypernym_that_is_large_enough(tmp_path: Path) -> None:
    found = nouns(wordnet(tmp_path))
    assert found["00000003"].name == "green plant"
    assert found["00000003"].above == "00000001"
    assert found["00000200"].gloss == "the 0th of kind 2"
    classes = classes_of(found, above=10)
    assert classes["00000201"] == "00000002"
    assert classes["00000501"] == "00000002", "two hypernyms up: those between are small"
    assert classes["00000002"] == "00000001"
    assert "00000001" not in classes
    assert classes_of(found, above=42) == {key: "00000001" for key in found if key != "00000001"}


def test_parts_share_no_gloss_and_hold_what_the_encoder_says(tmp_path: Path) -> None:
    torch.manual_seed(0)
    encoder = HfTextConfig(architecture="bert", options=TINY, max_length=32, frozen=True)
    folder = wordnet(tmp_path)
    write_glosses(folder, encoder, tmp_path / "out", above=10, fewest=30, most=38)
    seen: dict[str, str] = {}
    labels: list[int] = []
    for part, _ in SHARES:
        data = load_manifest(tmp_path / "out" / part)
        assert [str(n) for n in data.load_classes().column("name").to_pylist()] == ["animal", "green plant"]
        for i in range(len(data.shards)):
            table = read_shard(data, i)
            labels += table["label"].to_pylist()
            for text in table["text"].to_pylist():
                assert seen.setdefault(text, part) == part
            length = np.linalg.norm(np.array(table["sentence"].to_pylist()), axis=1)
            assert length == pytest.approx(np.ones(len(table)), abs=1e-5)
    assert labels.count(0) == labels.count(1) == 38, "at most so many of a class"
    with pytest.raises(DataError, match="lower fewest"):
        write_glosses(folder, encoder, tmp_path / "none", fewest=1000)
    with pytest.raises(DataError, match=r"ci/gloss_data\.sh"):
        nouns(tmp_path / "none")


def test_texts_of_any_length_are_encoded_as_each_alone() -> None:
    config = HfTextConfig(architecture="bert", options=TINY, max_length=32, frozen=True)

    def seeded(texts: list[str]) -> np.ndarray:
        torch.manual_seed(0)
        return encode(texts, config)

    texts = ["a long gloss of many letters", "short", "neither of both"]
    for text, row in zip(texts, seeded(texts), strict=True):
        assert seeded([text])[0] == pytest.approx(row, abs=1e-5)
