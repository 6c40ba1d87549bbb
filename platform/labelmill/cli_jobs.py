"""The commands for jobs on a cluster: submit, and what one does with a submitted job."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from labelmill.submission.client import JobState

console = Console()
jobs_app = typer.Typer(help="Jobs on a cluster: list, logs, status, stop.", no_args_is_help=True)

AddressOption = Annotated[
    str | None,
    typer.Option("--address", metavar="URL", help="the job server, http://HOST:8265; default $RAY_API_SERVER_ADDRESS"),
]
IdArgument = Annotated[str, typer.Argument(metavar="ID", help="as `labelmill submit` prints it")]
_COLORS = {"SUCCEEDED": "green", "RUNNING": "cyan", "PENDING": "yellow", "FAILED": "red", "STOPPED": "magenta"}


def add_job_commands(app: typer.Typer) -> None:
    """Adds `submit`, `jobs` and what a submitted job runs."""
    app.command()(submit)
    app.command("run-submitted", hidden=True)(run_submitted)
    app.add_typer(jobs_app, name="jobs")


def submit(
    job: Annotated[Path, typer.Argument(help="a job file (YAML), as for `labelmill run`")],
    address: AddressOption = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="PATH=VALUE", help="override a field, e.g. train.epochs=1")
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", help="show the run as if it were here, until it ends")] = False,
    wait: Annotated[bool, typer.Option("--wait", help="return when the job has ended")] = False,
    tune: Annotated[bool, typer.Option("--tune", help="search as the job's search section says")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="start over instead of keeping finished stages")] = False,
    submission_id: Annotated[str | None, typer.Option("--id", help="instead of the job's name and a number")] = None,
    workdir: Annotated[
        Path | None, typer.Option("--workdir", help="on the cluster: where relative paths begin; default: this folder")
    ] = None,
    package: Annotated[
        list[str] | None, typer.Option("--package", help="an installed package to ship besides the method's; repeat")
    ] = None,
    env: Annotated[
        list[str] | None,
        typer.Option("--env", metavar="NAME", help="a variable to hand over, as in cluster.env; repeat"),
    ] = None,
    driver_cpus: Annotated[float, typer.Option(min=0, help="CPUs that the driver reserves")] = 0.1,
    driver_anywhere: Annotated[
        bool, typer.Option("--driver-anywhere", help="let the driver run on any node, not only on the head")
    ] = False,
    python: Annotated[str, typer.Option(help="the interpreter on the cluster")] = "python",
) -> None:
    """Run a job on a cluster, or search with it (--tune): its driver runs there, and this call may end."""
    from labelmill.submission import client as jobs

    with jobs.connected(address) as server:
        sent = jobs.submit(
            server,
            job,
            overrides or [],
            verb="tune" if tune else "run",
            fresh=fresh,
            submission_id=submission_id,
            workdir=workdir,
            packages=package or [],
            env=env or [],
            driver_cpus=driver_cpus,
            driver_anywhere=driver_anywhere,
            python=python,
            columns=console.width,
        )
        console.print(f"submitted {sent.id} with {', '.join(sent.wheels)}", highlight=False, soft_wrap=True)
        if sent.variables:
            console.print(f"handed over: {', '.join(sent.variables)}", highlight=False, soft_wrap=True)
            if jobs.travels_openly(address):
                console.print("they crossed the network unencrypted; an SSH tunnel or https avoids it", style="yellow")
        if sent.search_left:
            console.print("runs the job as it is; --tune would search as its search section says", highlight=False)
        if follow:
            _follow(server, sent.id)
        elif wait:
            _end(jobs.wait(server, sent.id))
        else:
            console.print(f"follow it: labelmill jobs logs {sent.id} --follow", highlight=False, soft_wrap=True)


def run_submitted() -> None:
    """Run the job that the environment holds; what a submitted job does on the cluster."""
    from labelmill import api
    from labelmill.submission.entry import received

    with received() as (verb, job, fresh):
        getattr(api, verb)(job, fresh=fresh, console=console)


@jobs_app.command("list")
def jobs_list(
    address: AddressOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of a table")] = False,
) -> None:
    """Jobs that the cluster remembers, the newest first."""
    from labelmill.submission import client as jobs

    with jobs.connected(address) as server:
        found = jobs.states(server)
    if as_json:
        print(json.dumps([_as_json(job) for job in found], indent=2))
        return
    table = Table("id", "status", "workload", "began", "took", box=None, header_style="bold", pad_edge=False)
    for job in found:
        began = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(job.started)) if job.started else ""
        table.add_row(job.id, f"[{_COLORS.get(job.status, 'default')}]{job.status}[/]", job.workload, began, _took(job))
    console.print(table)


@jobs_app.command("status")
def jobs_status(
    job_id: IdArgument,
    address: AddressOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of a line")] = False,
) -> None:
    """What became of a job."""
    from labelmill.submission import client as jobs

    with jobs.connected(address) as server:
        found = jobs.state(server, job_id)
    if as_json:
        print(json.dumps(_as_json(found), indent=2))
    else:
        console.print(f"{found.id}: {found.status} {_took(found)}\n{_message(found)}", highlight=False, soft_wrap=True)


@jobs_app.command("logs")
def jobs_logs(
    job_id: IdArgument,
    address: AddressOption = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="go on until the job ends")] = False,
) -> None:
    """What a job has printed."""
    from labelmill.submission import client as jobs

    with jobs.connected(address) as server:
        if follow:
            _follow(server, job_id)
        else:
            print(jobs.logs(server, job_id), end="")


@jobs_app.command("stop")
def jobs_stop(job_id: IdArgument, address: AddressOption = None) -> None:
    """End a job; submitted again, its run continues."""
    from labelmill.submission import client as jobs

    with jobs.connected(address) as server:
        found = jobs.stop(server, job_id)
    console.print(f"{found.id}: {found.status}", highlight=False)


def _follow(server: Any, job_id: str) -> None:
    from labelmill.progress import ProgressView, Replay
    from labelmill.submission import client as jobs

    try:
        with ProgressView(console) as view:
            found = jobs.follow(server, job_id, Replay(view).line)
    except KeyboardInterrupt:
        console.print(
            f"{job_id} goes on without you: labelmill jobs logs {job_id} --follow; to end it: labelmill jobs stop {job_id}",
            highlight=False,
            soft_wrap=True,
        )
        raise typer.Exit(130) from None
    _end(found)


def _end(found: JobState) -> None:
    """Ends this command as the run's own would have ended."""
    console.print(f"{found.id}: {found.status} {_took(found)}", highlight=False)
    if found.status == "SUCCEEDED":
        return
    if found.status == "STOPPED":
        raise typer.Exit(143)
    console.print(_message(found), highlight=False, soft_wrap=True, markup=False)
    raise typer.Exit(found.exit_code or 1)


def _took(job: JobState) -> str:
    if job.started is None:
        return ""
    return f"{(job.ended or time.time()) - job.started:.0f} s"


def _message(job: JobState) -> str:
    # Ray repeats the end of the log here
    return job.message.partition(", last available logs")[0]


def _as_json(job: JobState) -> dict[str, Any]:
    from dataclasses import asdict

    return asdict(job)
