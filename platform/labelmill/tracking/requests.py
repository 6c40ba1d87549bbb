"""Deletion requests in the registry: which data a version was trained on, and which request it answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from labelmill.data.deletion import contains
from labelmill.data.manifest import Manifest, load_manifest
from labelmill.errors import DataError, TrackingError
from labelmill.job import TrackingConfig
from labelmill.tracking.config import Store, client_env
from labelmill.tracking.registry import DataInput, ModelVersion, fetch_artifacts, load_version

REQUEST = "labelmill.request"
"""Tag of a version that answers a deletion request: its digest."""
FOLDER = "request"
"""Artifact folder of the run, with the kept request."""
EARLIER = "earlier_requests"
"""Artifact folder with the requests that the parents answered, one a subfolder: versions may be deleted."""


@dataclass(frozen=True)
class Trained:
    """A registered version with the data sets of its run."""

    version: ModelVersion
    train: Manifest
    test: Manifest | None


def trained_on(
    config: TrackingConfig, output: str | Path, ref: str, train: str | None = None, test: str | None = None
) -> Trained:
    """A version with the training set that was recorded with it, checked by digest; and the test set, if any.

    Args:
        train, test: where the sets lie now, if they have moved.

    Raises TrackingError for an unknown version or one without recorded data, DataError for a set that isn't where it was or
    isn't the same any more.
    """
    with client_env(Store.of(config, output)) as client:
        version = load_version(client, ref)
    inputs = {found.context: found for found in version.data}
    if "train" not in inputs:
        mixed = sorted(context for context in inputs if context.startswith("train"))
        why = f"it was trained on a mix ({', '.join(mixed)})" if mixed else "its run recorded no training set"
        raise TrackingError(f"{version.name}/{version.version}: {why}, so a deletion request can't be resolved.")
    known_test = inputs.get("test")
    return Trained(
        version,
        _open(inputs["train"], train, "data.train"),
        _open(known_test, test, "data.test") if known_test else load_manifest(test) if test else None,
    )


def _open(known: DataInput, given: str | None, where: str) -> Manifest:
    place = given or known.source
    try:
        found = load_manifest(place)
    except DataError as error:
        if given:
            raise
        what = f"{known.context} data {known.name!r} of the model"
        raise DataError(f"{what}: {error} If it has moved, name it in {where}.") from None
    if found.digest != known.digest:
        raise DataError(
            f"{place}: not the {known.context} data that the model was made with (manifest {found.digest[:12]}, recorded "
            f"{known.digest[:12]}). Name the recorded version in {where}."
        )
    return found


def fetch_requests(config: TrackingConfig, output: str | Path, version: ModelVersion, into: Path) -> list[Path]:
    """The kept requests that a version answers, its own first; then those that it inherited. Empty for a plain version.

    Raises TrackingError when they are gone.
    """
    if not version.tags.get(REQUEST):
        return []
    own = fetch_artifacts(config, output, version, FOLDER, into)
    assert own is not None, "its tag says that there is one"
    earlier = fetch_artifacts(config, output, version, EARLIER, into, missing_ok=True)
    return [own, *(sorted(path for path in earlier.iterdir() if path.is_dir()) if earlier else ())]


def forgotten(config: TrackingConfig, output: str | Path, ref: str, keys: Sequence[str]) -> tuple[dict[str, bool], str]:
    """Whether ids were among those that a version, or one it was made from, was made to forget; and its request's digest.

    Raises TrackingError for a version that answers no request or whose request is gone, DataError for a changed one.
    """
    with client_env(Store.of(config, output)) as client:
        version = load_version(client, ref)
    digest = version.tags.get(REQUEST, "")
    if not digest:
        raise TrackingError(f"{version.name}/{version.version} doesn't answer a deletion request.")
    with TemporaryDirectory() as folder:
        own, *earlier = fetch_requests(config, output, version, Path(folder))
        found = [contains(own, keys, digest), *(contains(place, keys) for place in earlier)]
    return {key: any(one[key] for one in found) for key in keys}, digest
