"""Copying a data set between any two places, verified on the way and able to go on where it stopped.

Every file that the manifest names goes along: shards, label overlays, indexes, the label space. What lies outside
the source's folder (absolute paths, URIs, `..`) comes into the copy's, so the copy stands by itself. Each file is
compared with the manifest's checksum before it is written. The manifest is written last: until then there is no
data set at the destination, only files that the next attempt keeps.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from threading import Lock

import pyarrow as pa

from labelmill.data import store
from labelmill.data.manifest import MANIFEST_FILE, Manifest, load_manifest, save_manifest
from labelmill.data.shards import ShardDamage
from labelmill.data.staging import all_references, own_files, references, stays
from labelmill.errors import DataError

JOBS = 4
"""Files copied side by side; each is in memory as a whole."""

_PARTIAL = re.compile(r"[.][0-9a-f]{8}[.]part$")  # what a killed copy leaves in a local folder
_Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class _File:
    """One file: where it is, its name in the copy, what it must contain."""

    source: str
    name: str
    sha256: str
    size: int | None


@dataclass
class CopyReport:
    """What a copy did. `manifest` is the copy's."""

    manifest: Manifest
    copied: int = 0
    kept: int = 0
    removed: int = 0
    bytes: int = 0
    _lock: Lock = field(default_factory=Lock, repr=False)


def copy_data(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    jobs: int = JOBS,
    progress: _Progress | None = None,
) -> CopyReport:
    """Copies a data set, from and to a local folder or a URI.

    Args:
        source: the data set.
        out: folder of the copy. Files of an unfinished copy of the same data set are kept if their size and
            checksum are right; those of a finished one are looked over in the same way.
        overwrite: replace another data set that is there.
        jobs: files copied side by side.
        progress: called with (files done, files in all), from one thread.

    Raises ShardDamage (a DataError) for a file that isn't what the manifest says, naming it, DataError when `out`
    is taken, StoreError when a place can't be read or written. What was copied until then stays, for the next
    attempt; there is no manifest yet.
    """
    manifest, place = load_manifest(source), store.normal(out)
    if place == manifest.root:
        raise DataError(f"{place}: a data set can't be copied onto itself.")
    files, copy = _plan(manifest)
    stale = _prepare(place, manifest, files, overwrite)
    report = CopyReport(copy.at(place))
    done = 0
    with ThreadPoolExecutor(max(1, jobs), thread_name_prefix="copy") as pool:
        waiting = [pool.submit(_copy_file, file, place, report) for file in files]
        try:
            for future in as_completed(waiting):
                future.result()
                done += 1
                if progress:
                    progress(done, len(files))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    save_manifest(copy, place)
    store.delete_many(store.join(place, name) for name in stale)
    report.removed = len(stale)
    return report


def parts_of(source: str | os.PathLike[str]) -> list[str]:
    """Names of the data sets in the folder `source` when it holds several (train, test) and is none itself."""
    place = store.normal(source)
    if place.endswith(".json") or not store.is_folder(place) or store.exists(store.join(place, MANIFEST_FILE)):
        return []
    files = store.list_files(place)
    return [p.partition("/")[0] for p in files if p.endswith("/" + MANIFEST_FILE) and p.count("/") == 1]


# --- what goes where -----------------------------------------------------------------------------------


def _plan(manifest: Manifest) -> tuple[list[_File], Manifest]:
    """The files to copy, and the manifest that names them in their new place."""
    names = _Names()
    files: dict[str, _File] = {}

    def moved(path: str, sha256: str | None, size: int | None) -> str:
        where = store.join(manifest.root, path)
        if sha256 is None:
            raise DataError(f"{where}: the manifest has no checksum for it, so a copy can't be verified. Import again.")
        file = files.setdefault(where, _File(where, names.of(where, path), sha256, size))
        if file.sha256 != sha256:
            raise DataError(f"{where}: the manifest names this file twice, with different checksums.")
        return file.name

    # names that can stay as they are have a right to them: they are dealt first
    for path, *_ in sorted(all_references(manifest), key=lambda ref: not stays(ref[0])):
        names.of(store.join(manifest.root, path), path)
    shards = []
    for shard in manifest.shards:
        update = {name: moved(*reference) for name, reference in references(shard, shard.bytes)}
        shards.append(shard.model_copy(update=update))
    update = {name: moved(*reference) for name, reference in references(manifest)}
    copy = manifest.model_copy(update={**update, "shards": tuple(shards)})
    return list(files.values()), copy


class _Names:
    """Names in the copy: as they were where that is inside its folder, else the file's own, made unique."""

    def __init__(self) -> None:
        self._by_source: dict[str, str] = {}
        self._taken = {MANIFEST_FILE}

    def of(self, source: str, path: str) -> str:
        if source not in self._by_source:
            name = os.path.normpath(path) if stays(path) else path.rstrip("/").rpartition("/")[2]
            stem, dot, ext = name.partition(".")
            number = 0
            while name in self._taken:
                number += 1
                name = f"{stem}-{number}{dot}{ext}"
            self._taken.add(name)
            self._by_source[source] = name
        return self._by_source[source]


def _prepare(place: str, manifest: Manifest, files: list[_File], overwrite: bool) -> list[str]:
    """Makes sure that the copy may go to `place`. Returns files to be removed after: those of a replaced data set."""
    there = set(store.list_files(place)) if store.is_folder(place) else set()
    if not there:
        if store.exists(place) and not store.is_folder(place):
            raise DataError(f"{place}: a file has this name; name a folder.")
        return []
    ours = {file.name for file in files} | {MANIFEST_FILE}
    partial = {name for name in there if _PARTIAL.sub("", name) in ours and name not in ours}
    old: set[str] = set()
    if MANIFEST_FILE in there:
        present = load_manifest(place)
        if present.digest != manifest.digest or overwrite:
            if not overwrite:
                raise DataError(
                    f"{place}: another data set, {present.name!r}, is there already. Name another folder, or ask to "
                    "overwrite it."
                )
            old = own_files(present)
    if foreign := sorted(there - ours - old - partial):
        raise DataError(f"{place}: {foreign[0]!r} isn't part of the data set. Name a new folder, or move it away.")
    if old:
        store.delete(store.join(place, MANIFEST_FILE))
    return sorted((old & there) - ours | partial)


# --- one file ------------------------------------------------------------------------------------------


def _copy_file(file: _File, place: str, report: CopyReport) -> None:
    target = store.join(place, file.name)
    if _is_there(target, file):
        with report._lock:
            report.kept += 1
        return
    data = store.read_bytes(file.source)
    if file.size is not None and data.size != file.size:
        raise ShardDamage.of(file.source, f"{data.size:,} bytes long instead of {file.size:,}")
    if (digest := _sha256(data)) != file.sha256:
        reason = f"the content changed since it was written (sha256 {digest[:12]}..., not {file.sha256[:12]}...)"
        raise ShardDamage.of(file.source, reason)
    store.write_bytes(target, data, sha256=file.sha256)
    with report._lock:
        report.copied += 1
        report.bytes += data.size


def _is_there(target: str, file: _File) -> bool:
    """Whether the destination has the file already. S3 objects of ours carry their checksum, bound to the content
    by the upload; anything else is read and hashed."""
    try:
        size = store.size(target)
    except store.StoreError as error:
        if error.reason == "missing":
            return False
        raise
    if file.size is not None and size != file.size:
        return False
    noted = store.noted_sha256(target)
    return (noted or _sha256(store.read_bytes(target))) == file.sha256


def _sha256(data: pa.Buffer) -> str:
    return hashlib.sha256(data).hexdigest()
