"""All or nothing: a folder of files that becomes a data set in one step, or leaves nothing behind."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import suppress

from labelmill.data import store
from labelmill.data.manifest import MANIFEST_FILE, Manifest, load_manifest, save_manifest
from labelmill.errors import DataError
from labelmill.job import StrictModel

Reference = tuple[str, str | None, int | None]
"""A file that a manifest names: path, sha256, bytes if known."""


class Staging:
    """Where the files of a new data set are written until it is whole.

    Locally a hidden folder beside `out` that takes its name at the end. On an object store, which can't rename,
    files go to their place at once: the manifest, written last, is what makes them a data set. So there an
    overwritten data set is gone from the start; files of it that the new one doesn't have are removed at the end.

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
        self._old: set[str] = set()
        if self._remote and overwrite and store.exists(store.join(out, MANIFEST_FILE)):
            self._old = own_files(load_manifest(out))
            store.delete(store.join(out, MANIFEST_FILE))

    def path(self, name: str) -> str:
        """Path to write the data set's file `name` to."""
        self._files.append(name)
        return store.join(self._place, name)

    def commit(self, manifest: Manifest) -> Manifest:
        """Writes the manifest and publishes everything. Returns the manifest with its final root.

        Raises DataError for a remote data set that needs files of this machine.
        """
        if self._remote:
            for path, *_ in all_references(manifest):
                if not stays(path) and not store.is_uri(path):
                    raise DataError(
                        f"{self.out}: a data set there can't use {path}, a file of this machine. Write it to a local "
                        "folder first, then take everything along with `labelmill data copy`."
                    )
        save_manifest(manifest, self._place)
        if self._remote:
            stale = self._old - set(self._files)
            store.delete_many(store.join(self._place, name) for name in stale)
        else:
            self._move_in()
        return manifest.at(self.out)

    def discard(self) -> None:
        """Removes what was written."""
        if not self._remote:
            shutil.rmtree(self._place, ignore_errors=True)
            return
        with suppress(store.StoreError):  # the error that led here says more
            store.delete_many(store.join(self._place, name) for name in self._files)

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
    mine = {MANIFEST_FILE} | own_files(load_manifest(out))
    if foreign := [file for file in files if file not in mine]:
        raise DataError(f"{out}: won't overwrite: {foreign[0]!r} isn't part of the data set there. Move it away first.")


def references(model: StrictModel, size: int | None = None) -> Iterator[tuple[str, Reference]]:
    """The files that a manifest itself or one of its shards (of `size` bytes) names, by field.

    A field X with a field X_sha256 beside it names a file; `path` with `sha256` is the shard.
    """
    values = dict(model)
    for name, path in values.items():
        if name == "path" and "sha256" in values:
            yield name, (path, values["sha256"], size)
        elif f"{name}_sha256" in values and isinstance(path, str):
            yield name, (path, values[f"{name}_sha256"], None)


def all_references(manifest: Manifest) -> Iterator[Reference]:
    """All files that a manifest names."""
    for shard in manifest.shards:
        for _, reference in references(shard, shard.bytes):
            yield reference
    for _, reference in references(manifest):
        yield reference


def stays(path: str) -> bool:
    """Whether a path of a manifest is relative and inside the data set's folder."""
    return not store.is_uri(path) and not os.path.isabs(path) and ".." not in path.split("/")


def own_files(manifest: Manifest) -> set[str]:
    """The files of a data set that lie in its folder, relative to it: what readers need, and what its origin names beside."""
    beside = {manifest.created_by[name] for name in ("clean_labels",) if name in manifest.created_by}
    return {path for path, *_ in all_references(manifest) if stays(path)} | beside
