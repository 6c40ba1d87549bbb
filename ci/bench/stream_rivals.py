"""The other loaders, each as good as its own settings allow; runs in the environment made by rivals.sh.

    python stream_rivals.py convert NAME --data FOLDER
    python stream_rivals.py run NAME LOADER --data FOLDER --workers N ...   (called by stream.py)

All of them share the same decoder (simplejpeg or Pillow), which writes into the rows of the batch: with worker
processes the batch is made in shared memory, as torch's own collate function does, so that it isn't copied again.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch
from PIL import Image
from stream_protocol import passes

os.environ.setdefault("LITDATA_DISABLE_VERSION_CHECK", "1")
BATCH = 256
SHAPES = {"jp": (224, 224, 3), "fm": (28, 28, 1)}
Raw = tuple[Any, Any]  # what a format stores: bytes or text, and the label


# --- decoding, the same for all ---


def _empty(shape: tuple[int, ...]) -> torch.Tensor:
    """uint8, in shared memory when a worker process makes it."""
    if torch.utils.data.get_worker_info() is None:
        return torch.empty(shape, dtype=torch.uint8)
    storage = torch.UntypedStorage._new_shared(int(np.prod(shape)))
    return torch.empty(0, dtype=torch.uint8).set_(storage, 0, shape)


def collate_jp(samples: Sequence[Raw]) -> tuple[torch.Tensor, Any]:
    """JPEG -> uint8 (B, 224, 224, 3); labels as a list of tensors would cost more, so one padded tensor (B, 10)."""
    images = _empty((len(samples), *SHAPES["jp"]))
    rows = images.numpy()
    labels = np.full((len(samples), 10), -1, dtype=np.int64)
    for i, (jpeg, label) in enumerate(samples):
        simplejpeg.decode_jpeg(jpeg, "RGB", buffer=rows[i])
        label = json.loads(label)["label"] if isinstance(label, bytes) else label
        labels[i, : len(label)] = label
    return images, torch.from_numpy(labels)


def collate_fm(samples: Sequence[Raw]) -> tuple[torch.Tensor, torch.Tensor]:
    """PNG -> uint8 (B, 28, 28, 1), labels int64 (B,)."""
    images = _empty((len(samples), *SHAPES["fm"]))
    rows = images.numpy()
    for i, (png, _) in enumerate(samples):
        rows[i, :, :, 0] = np.asarray(Image.open(io.BytesIO(png)))
    return images, torch.tensor([int(label) for _, label in samples])


def collate_tx(samples: Sequence[Raw]) -> tuple[list[str], torch.Tensor]:
    """UTF-8 -> list of text, labels int64 (B,)."""
    texts = [raw.decode() if isinstance(raw, bytes) else raw for raw, _ in samples]
    return texts, torch.tensor([int(label) for _, label in samples])


COLLATE: dict[str, Callable[[Sequence[Raw]], Any]] = {"jp": collate_jp, "fm": collate_fm, "tx": collate_tx}
EXTS = {"jp": ("jpg", "labels.json"), "fm": ("png", "cls"), "tx": ("txt", "cls")}


# --- the loaders ---


def _torch_options(workers: int) -> dict[str, Any]:
    return {"num_workers": workers, **({"persistent_workers": True, "prefetch_factor": 2} if workers else {})}


def webdataset(name: str, folder: Path, workers: int, shuffle: bool) -> Any:
    """Raw members, batched in the worker, decoded by the collate function."""
    import webdataset as wds

    shards = sorted(str(p) for p in (folder / "tar").glob("*.tar"))
    data = wds.WebDataset(
        shards, shardshuffle=len(shards) if shuffle else False, detshuffle=shuffle, seed=0, empty_check=False
    )
    if shuffle:
        data = data.compose(wds.filters.detshuffle(1000, 100, seed=0))
    data = data.to_tuple(*EXTS[name]).batched(BATCH, collation_fn=COLLATE[name])
    return torch.utils.data.DataLoader(data, batch_size=None, **_torch_options(workers))


def mosaicml(name: str, folder: Path, workers: int, shuffle: bool) -> Any:
    """Local MDS, no copy."""
    from streaming import StreamingDataset

    class Pairs(StreamingDataset):
        def __getitem__(self, at: int) -> Raw:
            sample = super().__getitem__(at)
            return sample["value"], sample["label"]

    data = Pairs(local=str(folder / "mds"), batch_size=BATCH, shuffle=shuffle, shuffle_seed=0)
    return torch.utils.data.DataLoader(data, batch_size=BATCH, collate_fn=COLLATE[name], **_torch_options(workers))


def litdata(name: str, folder: Path, workers: int, shuffle: bool) -> Any:
    """Local chunks."""
    from litdata import StreamingDataLoader, StreamingDataset

    data = StreamingDataset(str(folder / "litdata"), shuffle=shuffle, seed=0)
    return StreamingDataLoader(data, batch_size=BATCH, collate_fn=COLLATE[name], **_torch_options(workers))


LOADERS = {"webdataset": webdataset, "mosaicml": mosaicml, "litdata": litdata}


def run(name: str, loader: str, data: Path, workers: int, shuffle: bool, samples: int, count: int) -> None:
    """`count` passes in this process, measured by stream.py through the protocol."""
    module = {"mosaicml": "streaming"}.get(loader, loader)
    __import__(module)  # imports aren't part of a pass for any loader
    made: list[Any] = []

    def begin(number: int) -> Iterator[int]:
        if not made:
            made.append(LOADERS[loader](name, data / name, workers, shuffle))
        for values, _ in made[0]:
            yield len(values)

    passes(begin, samples, count)


# --- conversion ---


def members(name: str, data: Path) -> Iterator[dict[str, Any]]:
    """The samples of our tars, in order."""
    import webdataset as wds

    shards = sorted(str(p) for p in (data / name / "tar").glob("*.tar"))
    value, label = EXTS[name]
    for sample in wds.WebDataset(shards, shardshuffle=False, empty_check=False):
        if name == "jp":
            found = np.full(10, -1, dtype=np.int64)
            ids = json.loads(sample[label])["label"]
            found[: len(ids)] = ids
        else:
            found = int(sample[label])
        yield {"value": sample[value].decode() if name == "tx" else sample[value], "label": found}


def convert(name: str, data: Path) -> None:
    """MDS and litdata chunks from our tars; shards of their default 64 MB, uncompressed."""
    from litdata.streaming.writer import BinaryWriter
    from streaming import MDSWriter

    folder = data / name
    for form in ("mds", "litdata"):
        shutil.rmtree(folder / form, ignore_errors=True)
    columns = {"value": "str" if name == "tx" else "bytes", "label": "ndarray:int64:10" if name == "jp" else "int"}
    with MDSWriter(out=str(folder / "mds"), columns=columns) as writer:
        for sample in members(name, data):
            writer.write(sample)
    binary = BinaryWriter(str(folder / "litdata"), chunk_bytes=64 << 20)
    for number, sample in enumerate(members(name, data)):
        pair = (sample["value"], sample["label"])
        binary.add_item(number, pair)
    binary.done()
    binary.merge()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for word in ("convert", "run"):
        command = commands.add_parser(word)
        command.add_argument("name", choices=list(EXTS))
        if word == "run":
            command.add_argument("loader", choices=list(LOADERS))
            command.add_argument("--workers", type=int, default=2)
            command.add_argument("--shuffle", action="store_true")
            command.add_argument("--samples", type=int, default=2**62)
            command.add_argument("--passes", type=int, default=2)
        command.add_argument("--data", type=Path, required=True)
    options = parser.parse_args()
    if options.command == "convert":
        convert(options.name, options.data)
        return
    run(options.name, options.loader, options.data, options.workers, options.shuffle, options.samples, options.passes)


if __name__ == "__main__":
    main()
