"""The extreme classification repository's text format, Debian's index files, and WordNet's data files."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from labelmill.cli import app
from labelmill.data.extreme import PLACEHOLDER, import_extreme, read_sparse_labels
from labelmill.data.shards import read_shard
from labelmill.errors import DataError
from workloads.extreme import packages


def write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_both_kinds_of_sparse_files(tmp_path: Path) -> None:
    pairs = read_sparse_labels(write(tmp_path / "trn_X_Y.txt", "3 5", "4:1.0 0:0.5", "", "2:1"))
    assert pairs.ids.tolist() == [0, 4, 2]
    assert pairs.lengths_N.tolist() == [2, 0, 1]
    assert pairs.values.tolist() == [0.5, 1.0, 1.0]
    features = read_sparse_labels(write(tmp_path / "train.txt", "3 7 5", "4,0 1:0.3 6:0.1", " 2:0.5", "3 0:1"))
    assert features.ids.tolist() == [0, 4, 3]
    assert features.lengths_N.tolist() == [2, 0, 1]
    assert features.num_labels == 5


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["3"], "line 1: expected"),
        (["2 5", "1:1"], "says 2 rows, 1 follow"),
        (["1 5", "5:1"], "line 2: label 5 is out of range: ids run from 0 to 4"),
        (["1 5", "1:1 1:1"], "line 2: label 1 stands there twice"),
        (["1 5", "x:1"], "line 2: 'x:1' is no label"),
    ],
)
def test_damaged_sparse_files_name_the_line(tmp_path: Path, lines: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_sparse_labels(write(tmp_path / "y.txt", *lines))


def test_a_data_set_of_texts_and_labels(tmp_path: Path) -> None:
    texts = tmp_path / "trn_X.txt.gz"
    texts.write_bytes(gzip.compress("first->ä\nsecond\nthird\n".encode()))
    labels = write(tmp_path / "trn_X_Y.txt", "3 3", "2:1.0 0:0.5", "", "1:1")
    names = write(tmp_path / "Y.txt", "zero", "", "two")
    data, dropped, missing = import_extreme(tmp_path / "trn_X.txt", labels, names, tmp_path / "out", name="toy")
    assert (data.num_samples, dropped, missing) == (2, 1, 1)
    table = read_shard(data, 0).to_pydict()
    rows = {key: (text, ids) for key, text, ids in zip(table["key"], table["text"], table["label"], strict=True)}
    assert rows == {"toy-00000000": ("first->ä", [0, 2]), "toy-00000002": ("third", [1])}
    classes = data.load_classes().to_pydict()
    assert classes["name"] == ["zero", PLACEHOLDER, "two"]
    assert classes["count"] == [1, 1, 1]
    soft, _, _ = import_extreme(texts, labels, names, tmp_path / "soft", soft=True, shuffle=False)
    assert soft.label.form == "soft"
    assert read_shard(soft, 0)["label_weight"].to_pylist()[0] == [0.5, 1.0]
    with pytest.raises(DataError, match="has 2 lines"):
        import_extreme(texts, labels, write(tmp_path / "Y2.txt", "a", "b"), tmp_path / "no")
    with pytest.raises(DataError, match="has 1 lines"):
        import_extreme(write(tmp_path / "X2.txt", "a"), labels, names, tmp_path / "no")


def test_the_command(tmp_path: Path) -> None:
    texts, names = write(tmp_path / "x.txt", "first", "second"), write(tmp_path / "y.txt", "zero", "one")
    labels = write(tmp_path / "x_y.txt", "2 2", "0:1", "")
    options = ["--labels", str(labels), "--label-texts", str(names), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, ["data", "import", "extreme", str(texts), *options])
    assert result.exit_code == 0, result.output
    assert "1 samples, 1 shard(s)" in result.output
    assert "1 samples without a label were left out" in result.output


PACKAGES = """Package: aa
Source: one (1.2)
Section: libs
Maintainer: M
Description-md5: 1
Depends: libc6 (>= 2), x | y
Tag: use::{editing,viewing}, role::program,
 works-with::text

Package: b.c
Section: libs
Description: short of b
Description-md5: 2
Tag: role::program
"""


def test_debian_index_files(tmp_path: Path) -> None:
    (tmp_path / "x_Packages").write_text(PACKAGES)
    (tmp_path / "x_Translation-en").write_text(
        "Package: aa\nDescription-md5: 1\nDescription-en: short of a\n long text\n"
    )
    first, second = packages.packages(tmp_path)
    assert (first["short"], second["short"]) == ("short of a", "short of b")
    assert packages.tags_of(first) == ["role::program", "use::editing", "use::viewing", "works-with::text"]
    assert packages.source_of(first) == "one"
    assert packages.table_row(first)["depends"] == ["libc6", "x", "y"]
    made = packages.write_tags(tmp_path, tmp_path / "tags", fewest=2)
    assert sum(part.num_samples for part in made.values()) == 2
    part = next(iter(made.values()))
    assert part.load_classes().to_pydict()["name"] == ["role program"]
    sections = packages.write_sections(tmp_path, tmp_path / "sections", fewest=1) if len(made) > 2 else None
    assert sections is None or sum(part.num_samples for part in sections.values()) == 2
    with pytest.raises(DataError, match="no \\*_Packages"):
        packages.packages(tmp_path / "tags")


def test_wordnet_data_files(tmp_path: Path) -> None:
    licence = "  1 This software"
    noun = '00001740 03 n 02 entity 0 big_Thing(a) 0 000 | that which is; "an example"; "more"'
    for kind in ("noun", "verb", "adj", "adv"):
        write(tmp_path / f"data.{kind}", licence, *([noun] if kind == "noun" else []))
    assert list(packages.synsets(tmp_path)) == [("wn-noun-00001740", ["entity", "big thing"], "that which is")]


def test_parts_are_a_matter_of_the_group() -> None:
    parts = [packages.part_of(f"source-{i}") for i in range(4000)]
    assert np.mean([p == "test" for p in parts]) == pytest.approx(0.2, abs=0.02)
    assert np.mean([p == "dev" for p in parts]) == pytest.approx(0.08, abs=0.02)
    assert parts == [packages.part_of(f"source-{i}") for i in range(4000)]
