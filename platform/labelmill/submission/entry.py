"""What the driver of a submitted job does before it runs the job: it takes over what came with it."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml

from labelmill import handover, masking
from labelmill.errors import ClusterError, UserError


@contextmanager
def received() -> Iterator[tuple[str, Path, bool]]:
    """The verb, the job file and whether to start over, as `submit` put them into the environment.

    Inside, the folder is the one in which relative paths of the job are meant, and RAY_ADDRESS names the cluster. At the
    end the variables that were handed over are deleted from the cluster. Raises UserError kinds.
    """
    if "LABELMILL_JOB" not in os.environ:
        raise UserError(
            "run-submitted is what a submitted job runs on the cluster; use labelmill run or labelmill submit."
        )
    if not handover.taken():
        raise ClusterError("the variables that came with the job are gone from the cluster; submit it again.")
    masking.know(*os.environ.get(handover.NAMES, "").split())
    try:
        raw = json.loads(os.environ["LABELMILL_JOB"])
        (raw.get("cluster") or {}).pop("address", None)
        _enter(Path(os.environ["LABELMILL_WORKDIR"]), str(raw.get("output", "runs")))
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / os.environ["LABELMILL_JOB_FILE"]
            file.write_text(yaml.safe_dump(raw), encoding="utf-8")
            yield os.environ["LABELMILL_VERB"], file, bool(os.environ["LABELMILL_FRESH"])
    finally:
        handover.withdraw()


def _enter(folder: Path, output: str) -> None:
    """Makes relative paths mean what they meant where the job was submitted, on storage that the cluster shares."""
    if folder.is_dir():
        os.chdir(folder)
    elif not Path(output).is_absolute():
        raise ClusterError(
            f"output {output!r}: the folder {folder}, in which the job was submitted, isn't on this node. Submit with "
            "--workdir and a folder of the cluster's shared storage, or write absolute paths into the job."
        )
