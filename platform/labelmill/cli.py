"""The command line: thin commands over the Python verbs.

Exit codes: 0 done; 2 something the user can mend (one paragraph, no traceback); 1 a failure of the program (the
traceback goes to the run's log file, its place is named).
"""

from __future__ import annotations

import json
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markdown import Markdown
from rich.markup import escape
from rich.table import Table

from labelmill import __version__
from labelmill.cli_checkpoints import checkpoints_app
from labelmill.cli_data import data_app
from labelmill.cli_head import head_app
from labelmill.cli_jobs import add_job_commands
from labelmill.cli_models import models_app, serve, status
from labelmill.cli_tune import tune
from labelmill.errors import UserError
from labelmill.masking import masked

app = typer.Typer(
    name="labelmill",
    help="Distributed streaming training where the labels are the hard part.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(models_app, name="models")
app.add_typer(data_app, name="data")
app.add_typer(head_app, name="head")
app.add_typer(checkpoints_app, name="checkpoints")
app.command()(serve)
app.command()(status)
app.command()(tune)
add_job_commands(app)

console = Console()

SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="PATH=VALUE", help="override a field, e.g. train.epochs=1")
]


@app.command()
def run(
    job: Annotated[Path, typer.Argument(help="a job file (YAML)")],
    overrides: SetOption = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="start over instead of keeping finished stages")] = False,
    profile: Annotated[bool, typer.Option("--profile", help="record a Chrome trace of a few training steps")] = False,
) -> None:
    """Run a job to its report; a run that was interrupted continues."""
    from labelmill import api

    api.run(job, overrides or [], fresh=fresh, console=console, profile=profile)


@app.command()
def validate(job: Annotated[Path, typer.Argument(help="a job file (YAML)")], overrides: SetOption = None) -> None:
    """Check a job file and print it with every default filled in."""
    from labelmill import api

    console.print_json(json.dumps(api.resolved(api.check(job, overrides or []))))


@app.command()
def plan(
    job: Annotated[Path, typer.Argument(help="a job file (YAML)")],
    cluster: Annotated[
        str,
        typer.Option(
            "--cluster",
            metavar="SPEC",
            help="h100:64 (also h200, a100), with changes h100:64,memory_gb=40, a .yaml file, or local: measure here",
        ),
    ],
    overrides: SetOption = None,
    classes: Annotated[
        str | None, typer.Option("--classes", help="instead of the job's; N or N,N,... for a table")
    ] = None,
    workers: Annotated[
        str | None, typer.Option("--workers", help="instead of SPEC's; N or N,N,... for a table")
    ] = None,
    batch: Annotated[
        int | None, typer.Option("--batch-per-worker", min=1, help="instead of train.global_batch: of a micro batch")
    ] = None,
    head_precision: Annotated[
        str | None, typer.Option(help="of the head's matrix products: fp32, tf32 or bf16; default: head.matmul's")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of tables")] = False,
) -> None:
    """Say what a job needs on a cluster: memory, communication, time of a step, and what to change."""
    from labelmill import api
    from labelmill.planning import report

    counts, numbers = _numbers("--classes", classes), _numbers("--workers", workers)
    if len(counts) > 1 or len(numbers) > 1:
        plans = api.plan_table(job, cluster, counts, numbers, overrides or [], batch, head_precision)
        if as_json:
            print(json.dumps([report.as_json(found) for found in plans], indent=2))
        else:
            report.show_table(plans, console)
        return
    one = [values[0] if values else None for values in (counts, numbers)]
    found, advice = api.plan(job, cluster, overrides or [], one[0], one[1], batch, head_precision)
    if as_json:
        print(json.dumps(report.as_json(found, advice), indent=2))
    else:
        report.show(found, advice, cluster == "local", console)


def _numbers(option: str, text: str | None) -> list[int]:
    """`8,16` -> [8, 16]; underscores may group digits."""
    try:
        values = [int(part) for part in (text or "").split(",") if part.strip()]
    except ValueError:
        raise UserError(f"{option} {text!r}: write whole numbers with commas between them.") from None
    if any(value < 1 for value in values):
        raise UserError(f"{option} {text!r}: numbers must be at least 1.")
    return values


@app.command()
def schema(workload: Annotated[str, typer.Argument(help="as `labelmill workloads` lists it")]) -> None:
    """Print the JSON schema of a workload's job file."""
    from labelmill import api

    print(json.dumps(api.schema(workload), indent=2))


@app.command()
def workloads(name: Annotated[str | None, typer.Argument(help="show this method's card")] = None) -> None:
    """List the methods, or show the card of one."""
    from labelmill import api
    from labelmill.workload import find_workload

    if name:
        console.print(Markdown(api.card(name)))
        return
    table = Table("workload", "what it does", box=None, header_style="bold", pad_edge=False)
    for known in api.workload_names():
        table.add_row(known, find_workload(known).summary)
    console.print(table)


@app.command()
def doctor() -> None:
    """Say what works on this machine, and what to do about what doesn't."""
    from labelmill.doctor import examine

    findings = examine()
    table = Table("", "part", "finding", "what to do", box=None, header_style="bold", pad_edge=False)
    for finding in findings:
        mark = {"ok": "[green]ok[/]", "note": "[yellow]note[/]", "fail": "[red]fail[/]"}[finding.state]
        table.add_row(mark, finding.part, finding.text, finding.advice)
    console.print(table)
    if any(finding.state == "fail" for finding in findings):
        raise typer.Exit(1)


# --- main -----------------------------------------------------------------------------------------------------


def main() -> None:
    """Entry point: maps errors to exit codes."""
    from labelmill.cluster import set_environment

    set_environment()
    try:
        code = app(standalone_mode=False)
    except UserError as error:
        Console(stderr=True, soft_wrap=True).print(f"[bold red]error:[/] {escape(masked(str(error)))}", highlight=False)
        sys.exit(2)
    except (KeyboardInterrupt, SystemExit, typer.Abort) as stop:
        # Ray turns SIGTERM into SystemExit
        Console(stderr=True).print("stopped; run the same command again to continue", highlight=False)
        sys.exit(143 if isinstance(stop, SystemExit) else 130)
    except Exception as error:
        # click's own usage errors know how to show themselves
        if hasattr(error, "exit_code") and hasattr(error, "show"):
            error.show()
            sys.exit(2)
        place = getattr(error, "labelmill_log", None) or _write_traceback()
        name = type(error).__name__
        first = (str(error).strip().splitlines() or [""])[0][:300]
        Console(stderr=True, soft_wrap=True).print(
            f"[bold red]failed:[/] {escape(masked(f'{name}: {first}'))}\nThe traceback is in {place}", highlight=False
        )
        sys.exit(1)
    sys.exit(code if isinstance(code, int) else 0)


def _write_traceback() -> str:
    with tempfile.NamedTemporaryFile("w", prefix="labelmill-", suffix=".log", delete=False) as file:
        file.write(f"labelmill {__version__}, {' '.join(sys.argv)}\n{masked(traceback.format_exc())}")
    return file.name


if __name__ == "__main__":
    main()
