"""The command line as a person meets it: real processes, their exit codes and what they print."""

from __future__ import annotations

import gzip
import json
import os
import re
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

LABELMILL = Path(sys.executable).with_name("labelmill")
HEAVY = ("torch", "ray", "mlflow", "deepspeed", "transformers", "pandas", "pyarrow", "sklearn")

BARS = {
    "workload": "discrimination.partial_fc",
    "name": "bars",
    "data": {"train": "nowhere/train", "test": "nowhere/test"},
    "cluster": {"workers": 2, "cpus_per_worker": 0.5},
    "encoder": {"kind": "small_cnn", "image_size": 8, "channels": 1, "dim": 16, "width": 8, "stages": 2},
    "train": {"global_batch": 48, "steps": 12},
}
WORDS = {
    "workload": "discrimination.spelling",
    "name": "words",
    "words": {"languages": ["en"], "count": 400},
    "train": {"global_batch": 128, "epochs": 2},
}


@dataclass(frozen=True)
class Done:
    """A command that ended."""

    code: int
    out: str
    err: str
    seconds: float

    @property
    def text(self) -> str:
        """Both outputs with line breaks and table borders folded into spaces."""
        return re.sub(r"[\s│┃]+", " ", self.out + self.err)


def labelmill(folder: Path, *args: object, **environment: str) -> Done:
    """One call in `folder`."""
    env = os.environ | {"COLUMNS": "160", "OMP_NUM_THREADS": "1", "TMPDIR": str(folder)} | environment
    began = time.monotonic()
    done = subprocess.run(
        [str(LABELMILL), *map(str, args)], cwd=folder, env=env, capture_output=True, text=True, timeout=120
    )
    return Done(done.returncode, done.stdout, done.stderr, time.monotonic() - began)


def several(folder: Path, *commands: Sequence[object]) -> list[Done]:
    """Independent calls, two at a time."""
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda args: labelmill(folder, *args), commands))


def refused(done: Done, *parts: str) -> None:
    """It ended with 2 and one message that holds `parts`; no traceback."""
    assert done.code == 2, done.text
    assert "Traceback" not in done.out + done.err
    assert done.err.startswith("error: ")
    assert done.err.strip().count("\n\n") == 0, "one paragraph"
    for part in parts:
        assert part in done.text


def write_job(path: Path, job: dict[str, Any], **changes: Any) -> Path:
    path.write_text(yaml.safe_dump(job | changes))
    return path


# --- methods and jobs ----------------------------------------------------------------------------------


def test_help_is_there_at_once(tmp_path: Path) -> None:
    bare, known, models, unknown = several(tmp_path, [], ["--help"], ["models", "--help"], ["frobnicate"])
    assert (bare.code, known.code, models.code) == (2, 0, 0)
    for command in ("run", "validate", "schema", "workloads", "doctor", "models", "data"):
        assert command in bare.out
        assert command in known.out
    assert "promote" in models.out
    assert unknown.code == 2
    assert "No such command 'frobnicate'" in unknown.err

    code = "import sys, labelmill.cli; print([m for m in sys.argv[1:] if m in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", code, *HEAVY], capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == "[]", "the command line loads these only when a command needs them"


def test_methods_and_their_schemas(tmp_path: Path) -> None:
    listed, card, schema, unknown = several(
        tmp_path,
        ["workloads"],
        ["workloads", "discrimination.partial_fc"],
        ["schema", "discrimination.spelling"],
        ["schema", "discrimination.speling"],
    )
    assert (listed.code, card.code, schema.code) == (0, 0, 0)
    for name in ("discrimination.mlcd", "discrimination.partial_fc", "discrimination.spelling"):
        assert name in listed.out
    assert "discrimination.partial_fc" in card.text
    assert len(card.text) > 300
    assert "discrimination.mlcd" not in card.text, "one card, not the whole page"
    found = json.loads(schema.out)
    assert found["additionalProperties"] is False
    assert {"workload", "name", "words", "encoder", "head", "train"} <= found["properties"].keys()
    refused(unknown, "'discrimination.speling' is not known", "Did you mean 'discrimination.spelling'?")


def test_a_job_is_checked_and_shown_in_full(tmp_path: Path) -> None:
    job = write_job(tmp_path / "job.yaml", WORDS)
    misspelt = write_job(tmp_path / "misspelt.yaml", WORDS | {"train": {"global_batch": 128, "epoch": 2}})
    unknown = write_job(tmp_path / "unknown.yaml", WORDS | {"workload": "spelling"})
    right, *wrong = several(
        tmp_path,
        ["validate", job, "--set", "train.learning_rate=0.5", "--set", "words.languages=[en, de]"],
        ["validate", misspelt],
        ["validate", unknown],
        ["validate", job, "--set", "train.global_batch"],
        ["validate", job, "--set", "train.global_batch=7", "--set", "cluster.workers=2"],
        ["run", "nowhere.yaml"],
    )
    assert right.code == 0
    resolved = json.loads(right.out)
    assert resolved["train"]["learning_rate"] == 0.5
    assert resolved["words"]["languages"] == ["en", "de"]
    assert resolved["head"]["normalize"] is True, "defaults are filled in"

    refused(wrong[0], str(misspelt), "train.epoch: unknown field. Did you mean 'epochs'?")
    refused(wrong[1], str(unknown), "workload 'spelling' is not known", "discrimination.spelling")
    refused(wrong[2], "write it as path=value")
    refused(wrong[3], "train.global_batch 7", "not divisible by cluster.workers 2")
    refused(wrong[4], "nowhere.yaml: no such job file")
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".yaml"] * 3, "nothing was made"


def test_what_is_missing_is_said_before_anything_starts(tmp_path: Path) -> None:
    job = write_job(tmp_path / "bars.yaml", BARS)
    words = write_job(tmp_path / "words.yaml", WORDS)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections and never answers
        server = f"http://127.0.0.1:{silent.getsockname()[1]}"
        absent, dead = several(
            tmp_path,
            ["run", job],
            ["run", words, "--set", f"tracking.uri={server}", "--set", "tracking.timeout_s=3"],
        )
    refused(absent, str(tmp_path / "nowhere" / "train"), "labelmill data import")
    assert absent.seconds < 30
    assert not (tmp_path / "runs" / "bars" / "stages").exists()
    refused(dead, f"{server} doesn't answer within 3 s", "MLFLOW_TRACKING_URI")
    assert dead.seconds < 25, "3 s and the start of a process on a busy machine"
    assert not (tmp_path / "runs" / "words" / "stages").exists()
    assert not list(tmp_path.glob("ray*")), "no Ray session in the folder for temporary files"


# --- failures of the program ---------------------------------------------------------------------------

BROKEN = '''"""Fails."""
from labelmill.job import Job
from labelmill.workload import workload

@workload("mine.broken", Job)
def broken(job, run):
    raise ZeroDivisionError("a bug\\nwith [details]")
'''


def test_a_failure_names_the_file_with_its_traceback(tmp_path: Path) -> None:
    # a package of the user's own, which announces two methods
    info = tmp_path / "mine" / "mine-1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1\n")
    methods = "mine.broken = broken_method\nmine.absent = absent_method\n"
    (info / "entry_points.txt").write_text(f"[labelmill.workloads]\n{methods}")
    (tmp_path / "mine" / "broken_method.py").write_text(BROKEN)
    job = write_job(tmp_path / "job.yaml", {"workload": "mine.broken", "name": "b", "output": str(tmp_path / "out")})
    path = {"PYTHONPATH": str(tmp_path / "mine")}

    in_run = labelmill(tmp_path, "run", job, "--set", "tracking.system_metrics=false", **path)
    assert in_run.code == 1
    assert "failed: ZeroDivisionError: a bug" in in_run.err
    assert "Traceback (most" not in in_run.out + in_run.err
    log = tmp_path / "out" / "b" / "run.log"
    assert str(log) in in_run.text
    assert "Traceback (most recent call last)" in log.read_text()
    assert "with [details]" in log.read_text()

    outside = labelmill(tmp_path, "workloads", "mine.absent", **path)
    assert outside.code == 1
    assert "failed: ModuleNotFoundError" in outside.err
    place = re.search(r"The traceback is in (\S+\.log)", outside.err)
    assert place is not None
    assert "No module named 'absent_method'" in Path(place.group(1)).read_text()


# --- data ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data as people have it: IDX files, image folders, a table, a WebDataset."""
    import tarfile

    folder = tmp_path_factory.mktemp("sources")
    rng = np.random.default_rng(0)
    images_NHW = rng.integers(0, 255, (60, 8, 8)).astype(np.uint8)
    labels_N = (np.arange(60) % 3).astype(np.uint8)
    with gzip.open(folder / "images.gz", "wb") as file:
        file.write(struct.pack(">BBBBIII", 0, 0, 8, 3, *images_NHW.shape) + images_NHW.tobytes())
    (folder / "labels").write_bytes(struct.pack(">BBBBI", 0, 0, 8, 1, 60) + labels_N.tobytes())
    with tarfile.open(folder / "old-0000.tar", "w") as tar:
        for i, (image, label) in enumerate(zip(images_NHW[:12], labels_N, strict=False)):
            path = folder / "pictures" / "abc"[label] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
            (folder / "label").write_text(str(label))
            tar.add(path, f"sample{i}.png")
            tar.add(folder / "label", f"sample{i}.cls")
    rows = "".join(f"word {i},{i % 3}\n" for i in range(30))
    (folder / "table.csv").write_text(f"words,class\n{rows}")
    return folder


@pytest.fixture(scope="module")
def imported(sources: Path) -> dict[str, Done]:
    """Every importer, called once."""
    table = ["data", "import", "table", "table.csv", "--text", "words", "--label", "class"]
    idx = ["data", "import", "idx", "--images", "images.gz", "--labels", "labels"]
    commands: dict[str, list[object]] = {
        "idx": [*idx, "--out", "idx", "--split", "train=0.5,test=0.5", "--layout", "tar", "--shard-mb", "0.01"],
        "folder": ["data", "import", "image-folder", "pictures", "--out", "folder", "--name", "letters"],
        "table": [*table, "--out", "table", "--class", "zero", "--class", "one", "--class", "two"],
        "webdataset": ["data", "import", "webdataset", "old-0000.tar", "--out", "webdataset"],
        "out of range": [*table, "--out", "range", "--num-classes", "2"],
        "no split": [*table, "--out", "split", "--split", "train"],
        "no size": [*table, "--out", "size", "--shard-mb", "0"],
        "no folder": ["data", "import", "image-folder", "nowhere", "--out", "nothing"],
    }
    return dict(zip(commands, several(sources, *commands.values()), strict=True))


def manifest_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "manifest.json").read_text())


def test_importing(imported: dict[str, Done], sources: Path) -> None:
    for name in ("idx", "folder", "table", "webdataset"):
        assert imported[name].code == 0, imported[name].text
    train, test = manifest_of(sources / "idx" / "train"), manifest_of(sources / "idx" / "test")
    assert sum(shard["samples"] for part in (train, test) for shard in part["shards"]) == 60
    assert train["label"] == test["label"]
    assert len(train["shards"]) > 2
    assert re.search(r"train: \d+ samples, \d+ shard\(s\), .* labels: single of 3 classes -> ", imported["idx"].out)
    assert manifest_of(sources / "folder")["name"] == "letters"
    assert manifest_of(sources / "table")["label"]["num_classes"] == 3
    assert "12 samples, 1 shard(s)" in imported["webdataset"].out


def test_importing_refuses(imported: dict[str, Done], sources: Path) -> None:
    refused(imported["out of range"], "table.csv: row 3", "label 2 is out of range", "2 classes", "0 ... 1")
    refused(imported["no split"], "--split train: write it as train=0.9,test=0.1")
    refused(imported["no size"], "--shard-mb 0")
    refused(imported["no folder"], "nowhere", "no such folder")
    for name in ("range", "split", "size", "nothing"):
        assert not (sources / name).exists()


def test_looking_at_data(imported: dict[str, Done], sources: Path) -> None:
    pictures, words, no_sheet, absent = several(
        sources,
        ["data", "inspect", "idx/train", "--samples", "4", "--sheet", "sheets/idx.png"],
        ["data", "inspect", "table", "--samples", "30"],
        ["data", "inspect", "table", "--sheet", "sheets/table.png"],
        ["data", "inspect", "nowhere"],
    )
    assert pictures.code == 0, pictures.text
    for part in ("form single", "classes 3", "samples a class", "thumbnail 8x8", "images: sheets/idx.png"):
        assert part in pictures.text
    with Image.open(sources / "sheets" / "idx.png") as sheet:
        assert sheet.width > 4 * 8
    assert words.code == 0
    assert "word 17" in words.text
    assert "zero (10), one (10), two (10)" in words.text
    assert no_sheet.code == 2
    assert "sheets/table.png: no image to show" in no_sheet.err
    refused(absent, str(sources / "nowhere"), "labelmill data import")


def test_checking_data(imported: dict[str, Done], sources: Path) -> None:
    import shutil
    import tarfile

    cut, swapped, empty = (sources / name for name in ("cut", "swapped", "empty"))
    for copy in (cut, swapped, empty):
        shutil.copytree(sources / "idx" / "train", copy)
    shards = [shard["path"] for shard in manifest_of(cut)["shards"]]
    with tarfile.open(cut / shards[1]) as tar:
        members = tar.getmembers()
    (cut / shards[1]).write_bytes((cut / shards[1]).read_bytes()[: members[2].offset_data + 5])
    torn = members[2].name.rpartition(".")[0]
    content = bytearray((swapped / shards[0]).read_bytes())
    with tarfile.open(swapped / shards[0]) as tar:
        picture = next(member for member in tar.getmembers()[2:] if member.name.endswith(".png"))
    content[picture.offset_data : picture.offset_data + 8] = b"not PNG!"
    (swapped / shards[0]).write_bytes(content)
    nothing = manifest_of(empty) | {"shards": []}
    (empty / "manifest.json").write_text(json.dumps(nothing))

    whole, in_place, short, other, none = several(
        sources, *(["data", "verify", name] for name in ("idx/train", "webdataset", "cut", "swapped", "empty"))
    )
    assert (whole.code, in_place.code) == (0, 0)
    assert "every one is whole" in whole.out
    for bad, shard, key in ((short, shards[1], torn), (other, shards[0], picture.name.removesuffix(".png"))):
        assert bad.code == 2
        assert "Traceback" not in bad.err
        assert shard in bad.text
        assert f"First bad sample: {key!r}" in bad.text
    refused(none, str(empty), "no shard")


# --- models, machine -----------------------------------------------------------------------------------


def test_models_of_an_empty_store(tmp_path: Path) -> None:
    store = ["--output", "none"]
    server = ["--tracking-uri", "http://127.0.0.1:9"]
    for done in several(
        tmp_path,
        ["models", "list", *store],
        ["models", "show", "bars", *store],
        ["models", "promote", "bars", *store],
        ["models", "predict", "bars@candidate", "--text", "x", *store],
    ):
        refused(done, str(tmp_path / "none"), "no tracking store yet")
    none, absent, dead = several(
        tmp_path,
        ["models", "predict", "bars", *store],
        ["models", "predict", "bars", "--image", "nowhere.png"],
        ["models", "list", *server],
    )
    refused(none, "nothing to predict")
    refused(absent, "nowhere.png: no such file")
    refused(dead, "127.0.0.1:9")
    assert not (tmp_path / "none").exists(), "asking makes nothing"


def test_doctor(tmp_path: Path) -> None:
    done = labelmill(tmp_path, "doctor")
    assert done.code == 0, done.text
    marks = dict(re.findall(r"^(?:.*?\b)?(ok|note|fail)\s+(\w+)", line)[0][::-1] for line in done.out.splitlines()[1:])
    assert {"python", "torch", "ray", "deepspeed", "mlflow", "s3", "compiler", "workloads"} <= marks.keys()
    assert "fail" not in marks.values()
    assert marks["ray"] == marks["deepspeed"] == marks["mlflow"] == "ok"
