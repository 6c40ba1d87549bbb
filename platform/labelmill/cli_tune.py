"""`labelmill tune`: search over settings of a job."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console


def tune(
    job: Annotated[Path, typer.Argument(help="a job file (YAML) with a search section")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="PATH=VALUE", help="override a field, e.g. search.trials=20")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="start over instead of continuing")] = False,
) -> None:
    """Search over settings of a job; a search that was interrupted continues, finished trials aren't run again."""
    from labelmill import api

    api.tune(job, overrides or [], fresh=fresh, console=Console())
