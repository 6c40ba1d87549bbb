"""All or nothing: a folder of files that becomes a data set in one step, or leaves nothing behind."""

from __future__ import annotations

import os
import shutil
import uuid

from labelmill.data import store
from labelmill.data.manifest import MANIFEST_FILE, Manifest, load_manifest, save_manifest
from labelmill.errors import DataError


class Staging:
    """Where the files of a new data set are written until it is whole.

    Locally a hidden folder beside `out` that takes its name at the end. On an object store, which can't
    rename, files
    go to their place at once: the manifest, written last, is what makes them a data set.

    Args:
        out: normal path or URI of the data set to be.
        overwrite: replace a data set that is there.

    Raises DataError when `out` is taken.
    """

    def __init__(self, out: str, overwrite: bool) -> None:
        check_free(out, overwrite)
        self.out, self._overwrite = out, overwrite
        self._remote = store.is_uri(out)
        folder, base = os.path.split(out)
        self._place = out if self._remote else os.path.join(folder, f".{base}.{uuid.uuid4().hex[:8]}.part")
        self._files: list[str] = []
        if self._remote and overwrite:
            store.delete(store.join(out, MANIFEST_FILE))

    def path(self, name: str) -> str:
        """Path to write the data set's file `name` to."""
        self._files.append(name)
        return store.join(self._place, name)

    def commit(self, manifest: Manifest) -> Manifest:
        """Writes the manifest and publishes everything. Returns the manifest with its final root."""
        save_manifest(manifest, self._place)
        if not self._remote:
            self._move_in()
        return manifest.at(self.out)

    def discard(self) -> None:
        """Removes what was written."""
        if not self._remote:
            shutil.rmtree(self._place, ignore_errors=True)
            return
        for name in self._files:
            store.delete(store.join(self._place, name))

    def _move_in(self) -> None:
        check_free(self.out, self._overwrite)  # someone may have been faster
        old = f"{self._place}.old"
        if os.path.isdir(self.out):
            os.rename(self.out, old)
        try:
            os.rename(self._place, self.out)
        except OSError:
            if os.path.isdir(old):
                os.rename(old, self.out)
            raise
        shutil.rmtree(old, ignore_errors=True)


def check_free(out: str, overwrite: bool) -> None:
    """Raises DataError when a data set can't be written to `out`: one is there, or other files are."""
    files = store.list_files(out) if store.is_folder(out) else []
    if not files:
        if store.exists(out) and not store.is_folder(out):
            raise DataError(f"{out}: a file has this name; name a folder.")
        return
    if MANIFEST_FILE not in files:
        raise DataError(f"{out}: the folder holds {files[0]!r} and no data set. Name a new folder.")
    if not overwrite:
        raise DataError(f"{out}: a data set is there already. Name another folder, or ask to overwrite it.")
    old = load_manifest(out)
    mine = {MANIFEST_FILE, old.classes, *(f for s in old.shards for f in (s.path, s.labels, s.index))}
    if foreign := [file for file in files if file not in mine]:
        raise DataError(f"{out}: won't overwrite: {foreign[0]!r} isn't part of the data set there. Move it away first.")
