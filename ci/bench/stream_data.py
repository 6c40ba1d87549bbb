"""Data for the stream benchmarks, the same everywhere: python ci/bench/stream_data.py [--data FOLDER] [NAME...]

    jp   20,000 JPEG 224x224 (quality 90, 4:2:0), 16 labels each: 4x4 collages of tinted Fashion-MNIST with noise
    fm   60,000 PNG 28x28 grey, one label: Fashion-MNIST
    tx   117,659 texts, one label: the glosses of WordNet, by part of speech

Sources are the Debian packages `dataset-fashion-mnist` and `wordnet-base`, fetched without root. Each set is written in
our tar layout (which webdataset reads as well), fm and tx packed too, and with `--rivals PYTHON` in the formats of
litdata and mosaicml-streaming. What is there is kept.
"""

from __future__ import annotations

import argparse
import gzip
import os
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import simplejpeg
from PIL import Image

from labelmill.data.decode import encode_png
from labelmill.data.importers import read_idx
from labelmill.data.labels import LabelSpec
from labelmill.data.manifest import FieldSpec
from labelmill.data.writer import ShardWriter

HERE = Path(__file__).resolve().parent
DEFAULT = os.environ.get("LABELMILL_BENCH_DATA", "/tmp/labelmill-bench")
_IDX = ("/usr/share/datasets/fashion-mnist", HERE.parents[1] / "data/fashion-mnist-idx")
_WORDNET = "/usr/share/wordnet"
_PARTS_OF_SPEECH = ("noun", "verb", "adj", "adv")
_NOISE = 8.6  # standard deviation; makes a collage 18 KB, about what a photograph of that size takes
_CHUNK = 500


@dataclass(frozen=True)
class Kind:
    """A data set of the benchmark: samples in `shards` of `per_shard`, layouts it is written in."""

    name: str
    field: str
    samples: int
    per_shard: int
    spec: FieldSpec
    label: LabelSpec
    layouts: tuple[str, ...]


def _kind(name: str, field: str, samples: int, per_shard: int, ext: str, classes: int) -> Kind:
    spec = FieldSpec(kind="text" if field == "text" else "image", ext=ext)
    label = LabelSpec(form="multi" if name == "jp" else "single", num_classes=classes)
    return Kind(name, field, samples, per_shard, spec, label, ("tar",) if name == "jp" else ("tar", "packed"))


KINDS = {
    "jp": _kind("jp", "image", 20_000, 1_000, "jpg", 10),
    "fm": _kind("fm", "image", 60_000, 2_000, "png", 10),
    "tx": _kind("tx", "text", 117_659, 4_000, "txt", 4),
}


def debian_package(name: str, folder: Path) -> Path:
    """Unpacks a Debian package into `folder`, without root. Raises SystemExit where there is no apt."""
    if folder.is_dir():
        return folder
    print(f"fetching the Debian package {name}", flush=True)
    with tempfile.TemporaryDirectory() as work:
        for part in ("lists/partial", "cache/archives/partial"):
            os.makedirs(f"{work}/{part}")
        # lists of our own: works without root and leaves the system's alone
        places = {"Dir::State::Lists": f"{work}/lists", "Dir::Cache": f"{work}/cache"}
        options = places | {"APT::Sandbox::User": "", "Acquire::Languages": "none"}
        apt = ["apt-get", "-qq", *(word for k, v in options.items() for word in ("-o", f"{k}={v}"))]
        try:
            subprocess.run([*apt, "update"], check=True)
            subprocess.run([*apt, "download", name], check=True, cwd=work)
        except (OSError, subprocess.CalledProcessError) as error:
            raise SystemExit(f"the Debian package {name} can't be fetched: {error}") from None
        (archive,) = Path(work).glob(f"{name}_*.deb")
        subprocess.run(["dpkg", "-x", str(archive), f"{work}/tree"], check=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(["cp", "-r", f"{work}/tree", str(folder)], check=True)
    return folder


def _fashion_mnist(data: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 (60000, 28, 28), labels (60000,)."""
    place = next((Path(p) for p in _IDX if Path(p, "train-images-idx3-ubyte.gz").exists()), None)
    if place is None:
        tree = debian_package("dataset-fashion-mnist", data / "packages/dataset-fashion-mnist")
        place = tree / "usr/share/datasets/fashion-mnist"
    images, labels = (next(place.glob(f"train-{part}-idx*")) for part in ("images", "labels"))
    return read_idx(images), read_idx(labels)


def _glosses(data: Path) -> tuple[list[str], np.ndarray]:
    """Gloss of each synset, and its part of speech as a class."""
    place = Path(_WORDNET)
    if not place.is_dir():
        place = debian_package("wordnet-base", data / "packages/wordnet-base") / "usr/share/wordnet"
    texts, labels = [], []
    for number, part in enumerate(_PARTS_OF_SPEECH):
        file = place / f"data.{part}"
        raw = file.read_bytes() if file.exists() else gzip.decompress(Path(f"{file}.gz").read_bytes())
        found = [line.partition("| ")[2].strip() for line in raw.decode().splitlines() if not line.startswith("  ")]
        texts += found
        labels += [number] * len(found)
    order = np.random.default_rng(0).permutation(len(texts))
    return [texts[i] for i in order], np.array(labels)[order]


@lru_cache(maxsize=1)
def _source(data: Path) -> tuple[np.ndarray, np.ndarray]:
    return _fashion_mnist(data)


def _collages(data: Path, first: int, count: int) -> list[tuple[bytes, list[int]]]:
    """Collages `first` to `first + count`: JPEG and the distinct classes in it."""
    images, labels = _source(data)
    out = []
    for i in range(first, first + count):
        rng = np.random.default_rng([1, i])
        picked = rng.integers(0, len(images), 16)
        tints = rng.uniform(0.25, 1.0, (16, 3))
        canvas = np.empty((224, 224, 3), dtype=np.float32)
        for place, (which, tint) in enumerate(zip(picked, tints, strict=True)):
            y, x = divmod(place, 4)
            large = Image.fromarray(images[which]).resize((56, 56), Image.Resampling.BICUBIC)
            canvas[y * 56 : y * 56 + 56, x * 56 : x * 56 + 56] = np.asarray(large)[:, :, None] * tint
        canvas += rng.normal(0, _NOISE, canvas.shape).astype(np.float32)
        pixels = np.clip(canvas, 0, 255).astype(np.uint8)
        jpeg = simplejpeg.encode_jpeg(pixels, quality=90, colorsubsampling="420")
        out.append((jpeg, sorted({int(labels[which]) for which in picked})))
    return out


def _rows(kind: Kind, data: Path) -> Iterator[tuple[list[Any], list[Any]]]:
    """Values and labels, a chunk at a time."""
    if kind.name == "jp":
        starts = range(0, kind.samples, _CHUNK)
        with ProcessPoolExecutor() as pool:
            for chunk in pool.map(_collages, [data] * len(starts), starts, [_CHUNK] * len(starts)):
                yield [jpeg for jpeg, _ in chunk], [label for _, label in chunk]
        return
    if kind.name == "fm":
        images, labels = _fashion_mnist(data)
        for a in range(0, kind.samples, kind.per_shard):
            z = a + kind.per_shard
            yield [encode_png(image) for image in images[a:z]], labels[a:z].tolist()
        return
    texts, labels = _glosses(data)
    if len(texts) != kind.samples:
        raise SystemExit(f"WordNet has {len(texts)} glosses here instead of {kind.samples}: another version?")
    for a in range(0, kind.samples, kind.per_shard):
        yield texts[a : a + kind.per_shard], labels[a : a + kind.per_shard].tolist()


def make(name: str, data: Path) -> None:
    """Writes data set `name` in all its layouts under `data/name/`."""
    kind = KINDS[name]
    missing = [layout for layout in kind.layouts if not (data / name / layout / "manifest.json").exists()]
    if not missing:
        return
    print(f"making {name}: {kind.samples:,} samples ({', '.join(missing)})", flush=True)
    writers = [
        ShardWriter(
            data / name / layout,
            name,
            {kind.field: kind.spec},
            kind.label,
            layout=layout,
            target_bytes=2**40,
            samples_per_shard=kind.per_shard,
            overwrite=True,
            created_by={"benchmark": name},
        )
        for layout in missing
    ]
    at = 0
    for values, labels in _rows(kind, data):
        keys = [f"{i:08d}" for i in range(at, at + len(values))]
        at += len(values)
        schema = pa.schema([("key", pa.string()), (kind.field, kind.spec.arrow_type), *kind.label.columns.items()])
        table = pa.table({"key": keys, kind.field: values, "label": labels}, schema=schema)
        for writer in writers:
            writer.write_table(table)
    for writer in writers:
        writer.close()


def convert(name: str, data: Path, python: str) -> None:
    """The same samples in the formats of litdata and mosaicml-streaming, by that environment's Python."""
    if all((data / name / form / "index.json").exists() for form in ("mds", "litdata")):
        return
    subprocess.run([python, str(HERE / "stream_rivals.py"), "convert", name, "--data", str(data)], check=True)


def main() -> None:
    """Makes what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="jp, fm, tx (default: all)")
    parser.add_argument("--data", type=Path, default=Path(DEFAULT), help="folder for all data sets")
    parser.add_argument("--rivals", help="Python of the environment made by ci/bench/rivals.sh")
    options = parser.parse_args()
    for name in options.names or KINDS:
        make(name, options.data)
        if options.rivals:
            convert(name, options.data, options.rivals)


if __name__ == "__main__":
    main()
