"""Copies of checkpoints at another place: an `s3://` address or a folder of another file system.

    <place>/step-00000200/<the checkpoint's files>      checkpoint.json last: with it the copy is whole

The place only ever shows whole files (`data.store`), so a copy is whole when its `checkpoint.json` is there.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from labelmill.data import store
from labelmill.errors import DataError
from labelmill.training.checkpoint_files import INDEX, check_file, folder_name, read_index, step_of, sync

log = logging.getLogger("labelmill")
_SIDE_BY_SIDE = 4
_PIECE = 16 << 20


class Copies:
    """The copies of one run's checkpoints below `place`, of which the newest `keep` stay."""

    def __init__(self, place: str, keep: int) -> None:
        self.place, self.keep = store.normal(place), keep

    def steps(self) -> list[int]:
        """Steps of the whole copies, ascending. Raises DataError when the place can't be asked."""
        found = [name.split("/") for name in store.list_files(self.place)]
        return sorted(step_of(Path(parts[0])) for parts in found if len(parts) == 2 and parts[1] == INDEX)

    def put(self, folder: Path) -> None:
        """Copies a checkpoint, then removes what is old or was never finished. Raises DataError."""
        target = store.join(self.place, folder.name)
        index = read_index(folder)
        if store.exists(store.join(target, INDEX)) and _index_at(target) == index:
            return
        store.delete(store.join(target, INDEX))

        def put(name: str) -> None:
            sha256 = index["files"][name].get("sha256")
            with store.open_write(store.join(target, name), sha256) as out, (folder / name).open("rb") as source:
                while piece := source.read(_PIECE):
                    out.write(piece)

        with ThreadPoolExecutor(_SIDE_BY_SIDE) as pool:
            list(pool.map(put, index["files"]))
        store.write_bytes(store.join(target, INDEX), (folder / INDEX).read_bytes())
        self._tidy()

    def _tidy(self) -> None:
        """Removes old copies, index first so that none is ever half a copy, and parts of unfinished ones."""
        kept = {folder_name(step) for step in self.steps()[-self.keep :]}
        gone = [name for name in store.list_files(self.place) if name.split("/")[0] not in kept]
        gone = [name for name in gone if name.startswith("step-")]
        gone.sort(key=lambda name: not name.endswith("/" + INDEX))
        store.delete_many(store.join(self.place, name) for name in gone)

    def fetch(self, step: int, root: Path) -> Path:
        """Brings a copy to `root/step-NNNNNNNN`. Raises DataError when it is damaged or can't be read."""
        name = folder_name(step)
        source, part = store.join(self.place, name), root / f".{name}.fetched"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        (part / INDEX).write_bytes(store.read_bytes(store.join(source, INDEX)))
        index = read_index(part)

        def get(file: str) -> None:
            size, target = int(index["files"][file]["bytes"]), part / file
            target.parent.mkdir(parents=True, exist_ok=True)
            place = store.join(source, file)
            if store.size(place) != size:
                raise DataError(f"{place}: has {store.size(place)} bytes, its checkpoint says {size}.")
            with target.open("wb") as out:
                for at in range(0, size, _PIECE):
                    out.write(memoryview(store.read_bytes(place, at, min(_PIECE, size - at))))
            sync(target)
            check_file(part, file, index)

        with ThreadPoolExecutor(_SIDE_BY_SIDE) as pool:
            list(pool.map(get, index["files"]))
        target = root / name
        shutil.rmtree(target, ignore_errors=True)
        part.rename(target)
        sync(root)
        return target


def _index_at(target: str) -> object:
    try:
        return json.loads(store.read_bytes(store.join(target, INDEX)).to_pybytes())
    except (DataError, ValueError):
        return None


def newest(root: Path, local: Path | None, copies: Copies | None, note: Callable[[str], None]) -> Path | None:
    """The newest checkpoint: `local`, or a copy that is newer, which is fetched to `root`.

    A place that doesn't answer is an error only when there is nothing to go on from: training must not begin again
    because its copies can't be read for a moment.

    Raises DataError.
    """
    if copies is None:
        return local
    try:
        steps = copies.steps()
    except DataError as error:
        if local is None:
            raise DataError(
                f"{copies.place}: copies of checkpoints can't be listed, and there is no checkpoint in {root}: {error} "
                "Mend the place, or take cluster.checkpoint_to out to start without copies."
            ) from error
        note(f"copies of checkpoints can't be listed, going on from {local.name}: {error}")
        return local
    for step in reversed(steps):
        if local is not None and step <= step_of(local):
            break
        try:
            return copies.fetch(step, root)
        except DataError as error:
            note(f"the copy of checkpoint {folder_name(step)} can't be used: {error}")
    return local
