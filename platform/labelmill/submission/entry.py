"""The driver of a submitted job, on the cluster: what `labelmill run` does, with the job from the environment."""

from __future__ import annotations

import json
import os
from pathlib import Path

from rich.console import Console

from labelmill import handover, masking
from labelmill.errors import ClusterError, UserError
from labelmill.workload import check_job


def run_submitted(console: Console) -> None:
    """Runs the job that `submit` put into the environment. Raises UserError kinds as `labelmill run` does."""
    if "LABELMILL_JOB" not in os.environ:
        raise UserError(
            "run-submitted is what a submitted job runs on the cluster; use labelmill run or labelmill submit."
        )
    if not handover.taken():
        raise ClusterError("the variables that came with the job are gone from the cluster; submit it again.")
    masking.know(*os.environ.get(handover.NAMES, "").split())
    try:
        _run(console)
    finally:
        handover.withdraw()


def _run(console: Console) -> None:
    raw = json.loads(os.environ["LABELMILL_JOB"])
    # RAY_ADDRESS names the cluster that the job was submitted to
    (raw.get("cluster") or {}).pop("address", None)
    _enter(Path(os.environ["LABELMILL_WORKDIR"]), str(raw.get("output", "runs")))
    method, job = check_job(raw, os.environ["LABELMILL_JOB_FILE"])
    from labelmill.run import execute

    execute(job, method.run, fresh=bool(os.environ["LABELMILL_FRESH"]), console=console)


def _enter(folder: Path, output: str) -> None:
    """Makes relative paths mean what they meant where the job was submitted, on storage that the cluster shares."""
    if folder.is_dir():
        os.chdir(folder)
    elif not Path(output).is_absolute():
        raise ClusterError(
            f"output {output!r}: the folder {folder}, in which the job was submitted, isn't on this node. Submit with "
            "--workdir and a folder of the cluster's shared storage, or write absolute paths into the job."
        )
