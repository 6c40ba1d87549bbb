"""`labelmill checkpoints ...`: what checkpoints a run has, whether they are sound, and one of them as plain weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from labelmill.errors import DataError, UserError

checkpoints_app = typer.Typer(help="Checkpoints of a run: list, verify, export.", no_args_is_help=True)
console = Console()

Place = Annotated[
    str, typer.Argument(help="a run's folder, a checkpoint, or the place of copies (a folder or s3:// address)")
]


@checkpoints_app.command("list")
def list_checkpoints(
    place: Place, as_json: Annotated[bool, typer.Option("--json", help="JSON instead of a table")] = False
) -> None:
    """Steps, sizes and places of the checkpoints below a folder, and of what is left of unfinished ones."""
    from labelmill.training.checkpoint_tools import find

    found = find(place)
    if as_json:
        print(json.dumps([entry.as_json() for entry in found], indent=2))
        return
    table = Table("step", "samples", "workers", "MiB", "state", "place", box=None, header_style="bold", pad_edge=False)
    for entry in found:
        numbers = [f"{n:,}" if n is not None else "-" for n in (entry.step, entry.cursor, entry.world)]
        table.add_row(*numbers, f"{entry.bytes / 2**20:,.1f}", entry.state, entry.place, style=_style(entry.state))
    Console(width=200 if not console.is_terminal else None).print(table)


def _style(state: str) -> str:
    return "" if state in ("whole", "copy") else "yellow"


@checkpoints_app.command()
def verify(place: Place) -> None:
    """Read every byte of the checkpoints below a folder and compare it with its checksum."""
    from labelmill.training.checkpoint_tools import find, verify_entry

    problems, checked = [], 0
    for entry in find(place):
        if entry.state in ("whole", "copy", "incomplete"):
            checked += 1
            found = verify_entry(entry)
            problems += found
            mark = "[red]damaged[/]" if found else "[green]sound[/]"
            console.print(f"{mark} {entry.place}", highlight=False, soft_wrap=True)
    if problems:
        raise DataError("\n".join(problems))
    if not checked:
        raise UserError(f"{place}: holds no checkpoint.")


@checkpoints_app.command()
def export(
    place: Place,
    out: Annotated[Path, typer.Argument(help="the new folder")],
    step: Annotated[int | None, typer.Option(help="of the checkpoint; the newest sound one by default")] = None,
    dtype: Annotated[str, typer.Option(help="of the class rows: float32, float16 or bfloat16")] = "float32",
) -> None:
    """Write the weights of a checkpoint, verified: dense.safetensors and class rows, without optimizer state."""
    from labelmill.training.checkpoint_tools import export_checkpoint

    written: dict[str, Any] = export_checkpoint(place, out, step, dtype)
    console.print(
        f"step {written['step']:,}: {written['parameters']:,} dense parameters, heads {written['heads']} -> {out}",
        highlight=False,
        soft_wrap=True,
    )
