"""`labelmill models ...`: what is registered, which version is the champion, and predicting with it."""

from __future__ import annotations

import contextlib
import json
import signal
import threading
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from labelmill.errors import UserError

models_app = typer.Typer(
    help="Registered models: list, show, compare, promote, rollback, predict.", no_args_is_help=True
)

console = Console()

OutputOption = Annotated[Path, typer.Option("--output", help="folder of runs and of the local tracking store")]
UriOption = Annotated[
    str | None, typer.Option("--tracking-uri", help="MLflow URI; default $MLFLOW_TRACKING_URI, else the local store")
]
Reference = Annotated[str, typer.Argument(help="NAME, NAME@alias or NAME/version")]

NOT_PROMOTED = 3
"""Exit code of a promotion whose rule doesn't hold."""


def tracking_config(uri: str | None) -> Any:
    from labelmill.job import TrackingConfig

    return TrackingConfig(uri=uri)


@models_app.command("list")
def models_list(output: OutputOption = Path("runs"), tracking_uri: UriOption = None) -> None:
    """Registered models with their versions and aliases."""
    from labelmill.tracking import registry

    table = Table("model", "latest", "aliases", "predictor", box=None, header_style="bold", pad_edge=False)
    for model in registry.list_models(tracking_config(tracking_uri), output):
        aliases = ", ".join(f"{alias} → {version}" for alias, version in sorted(model.aliases.items()))
        table.add_row(model.name, str(model.latest), aliases, model.predictor)
    console.print(table)


@models_app.command("show")
def models_show(name: str, output: OutputOption = Path("runs"), tracking_uri: UriOption = None) -> None:
    """Versions of a model: aliases, run, the data and models it comes from, metrics."""
    from labelmill.tracking import registry

    for version in registry.show(tracking_config(tracking_uri), output, name):
        registry.render_version(version, console)


@models_app.command("lineage")
def models_lineage(model: Reference, output: OutputOption = Path("runs"), tracking_uri: UriOption = None) -> None:
    """What a version comes from: its data, the models it was made from, and theirs."""
    from labelmill.tracking import promotion

    for depth, version in promotion.lineage(tracking_config(tracking_uri), output, model):
        indent = "  " * depth
        aliases = f" ({', '.join(version.aliases)})" if version.aliases else ""
        console.print(f"{indent}{version.name}/{version.version}{aliases}", highlight=False, markup=False)
        for data in version.data:
            made_of = f", made from {', '.join(d[:12] for d in data.parents)}" if data.parents else ""
            line = f"{indent}  {data.context} data {data.name} {data.digest[:12]} ({data.source}){made_of}"
            console.print(line, highlight=False, markup=False, soft_wrap=True)


@models_app.command("compare")
def models_compare(
    first: Reference,
    second: Annotated[str, typer.Argument(help="likewise")],
    output: OutputOption = Path("runs"),
    tracking_uri: UriOption = None,
) -> None:
    """Two versions side by side: metrics, and the fields of their jobs that differ."""
    from labelmill.tracking import promotion

    promotion.render_comparison(promotion.compare(tracking_config(tracking_uri), output, first, second), console)


@models_app.command("promote")
def models_promote(
    name: str,
    version: Annotated[str, typer.Option(help="a version number or an alias")] = "candidate",
    rule: Annotated[
        str | None, typer.Option("--if", metavar="RULE", help='e.g. "test/top1 >= champion + 0.2"; else exit code 3')
    ] = None,
    output: OutputOption = Path("runs"),
    tracking_uri: UriOption = None,
) -> None:
    """Make a version the champion, if a rule holds; the former champion stays under the alias `previous`."""
    from labelmill import api

    if rule is None:
        moved = api.promote(name, version, output, tracking_config(tracking_uri))
        console.print(f"{name}: champion is now version {moved}", highlight=False)
        return
    from labelmill.tracking import promotion

    decision = promotion.promote_if(tracking_config(tracking_uri), output, name, rule, version)
    promotion.render_decision(name, decision, console)
    if not decision.promoted:
        raise typer.Exit(NOT_PROMOTED)


@models_app.command("rollback")
def models_rollback(name: str, output: OutputOption = Path("runs"), tracking_uri: UriOption = None) -> None:
    """Make the champion before the present one champion again."""
    from labelmill.tracking import promotion

    fallen, back = promotion.rollback(tracking_config(tracking_uri), output, name)
    console.print(f"{name}: champion is version {back} again, not {fallen}", highlight=False)


@models_app.command("revoke")
def models_revoke(
    model: Reference,
    champion: Annotated[
        str | None, typer.Option(help="version or alias that becomes the champion first, if this one is it")
    ] = None,
    why: Annotated[str, typer.Option(help="kept with the version; no personal data")] = "",
    output: OutputOption = Path("runs"),
    tracking_uri: UriOption = None,
) -> None:
    """Take a version out of use for good: prediction, serving and promotion refuse it."""
    from labelmill.tracking import promotion

    old, now = promotion.revoke(tracking_config(tracking_uri), output, model, champion, why)
    crowned = "there is no champion" if now is None else f"champion is version {now}"
    console.print(f"{old.name}/{old.version} is revoked; {crowned}", highlight=False)


@models_app.command("forgotten")
def models_forgotten(
    model: Reference,
    ids: Annotated[list[str], typer.Option("--id", help="a sample's id; repeat for several")],
    output: OutputOption = Path("runs"),
    tracking_uri: UriOption = None,
) -> None:
    """Say whether ids were among those that a version was made to forget, by the kept request alone."""
    from labelmill.tracking.requests import forgotten

    found, digest = forgotten(tracking_config(tracking_uri), output, model, ids)
    for key, there in found.items():
        text = "forgotten" if there else "not in the request"
        console.print(f"{key}: {text}", highlight=False, markup=False, soft_wrap=True)
    console.print(f"by request {digest}", highlight=False, soft_wrap=True)
    if not all(found.values()):
        raise typer.Exit(NOT_PROMOTED)


@models_app.command("predict")
def models_predict(
    model: Reference,
    text: Annotated[list[str] | None, typer.Option("--text", help="an input; repeat for several")] = None,
    image: Annotated[list[Path] | None, typer.Option("--image", help="an image file; repeat for several")] = None,
    file: Annotated[Path | None, typer.Option("--file", help="a text file, an input a line")] = None,
    data: Annotated[str | None, typer.Option("--data", help="a data set (folder or s3://), predicted on Ray")] = None,
    out: Annotated[
        str | None, typer.Option("--out", help="with --data: folder or s3:// of a part for each shard")
    ] = None,
    k: Annotated[int, typer.Option("-k", help="ranked classes an input")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="JSON lines instead of a table")] = False,
    field: Annotated[str | None, typer.Option(help="with --data: the field to predict from")] = None,
    workers: Annotated[int, typer.Option(min=1, help="with --data: shards at once")] = 1,
    cpus: Annotated[float, typer.Option(help="with --data: CPUs a worker")] = 0.75,
    gpus: Annotated[float, typer.Option(min=0, help="with --data: GPUs a worker")] = 0.0,
    address: Annotated[str | None, typer.Option(help="with --data: a Ray cluster; else one of its own")] = None,
    max_bad: Annotated[int, typer.Option(min=0, help="with --data: unusable samples to let pass")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="with --data: replace other predictions")] = False,
    output: OutputOption = Path("runs"),
    tracking_uri: UriOption = None,
) -> None:
    """Ask a registered model, or predict a whole data set; a killed prediction goes on where it was."""
    from labelmill import api

    if data is not None or out is not None:
        if data is None or out is None or text or image or file:
            raise UserError("--data and --out go together, and without --text, --image and --file.")
        from labelmill.progress import ProgressView

        cluster = {"address": address, "workers": workers, "cpus_per_worker": cpus, "gpus_per_worker": gpus}
        with ProgressView(console) as view, view.stage("predict"):
            done = api.predict_data(
                model,
                data,
                out,
                k,
                field,
                max_bad,
                cluster,
                overwrite,
                output,
                tracking_config(tracking_uri),
                view.update,
            )
        bad = f", {done['bad']} of them unusable" if done["bad"] else ""
        line = f"{done['model']}: {done['rows']:,} samples{bad} in {len(done['parts'])} part(s) -> {out}"
        console.print(line, highlight=False, markup=False, soft_wrap=True)
        return
    inputs: list[Any] = list(text or [])
    if file:
        if not file.is_file():
            raise UserError(f"--file {file}: no such file.")
        inputs += [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    for path in image or []:
        if not path.is_file():
            raise UserError(f"--image {path}: no such file.")
        inputs.append(path.read_bytes())
    if not inputs:
        raise UserError("nothing to predict: give --text, --image or --file.")
    frame = api.predict(model, inputs, k, output, tracking_config(tracking_uri))
    names = [t if isinstance(t, str) else str((image or [])[i - len(inputs)]) for i, t in enumerate(inputs)]
    if as_json:
        for record in frame.to_dict("records"):
            print(json.dumps(record | {"input": names[int(record["input"])]}, ensure_ascii=False, default=list))
        return
    table = Table("input", "answers, best first", box=None, header_style="bold", pad_edge=False)
    for index, name in enumerate(names):
        rows = frame[frame["input"] == index]
        if "class" in rows:
            answers = ", ".join(f"{row['class']} ({row['score']:.2f})" for _, row in rows.iterrows())
        else:
            answers = str(rows.iloc[0].drop("input").to_dict())[:200]
        table.add_row(name, answers)
    console.print(table)


def serve(
    model: Reference,
    host: Annotated[str, typer.Option(help="there is no authentication: anything but loopback is open to that net")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    replicas: Annotated[
        int, typer.Option(min=1, help="copies of the model; on one host they share its mapped files")
    ] = 1,
    cpus: Annotated[float, typer.Option(help="CPUs a replica")] = 0.75,
    gpus: Annotated[float, typer.Option(min=0, help="GPUs a replica")] = 0.0,
    max_batch: Annotated[int, typer.Option(min=1, help="requests answered together")] = 32,
    address: Annotated[str | None, typer.Option(help="a Ray cluster; else one of its own")] = None,
    output: OutputOption = Path("runs"),
    tracking_uri: UriOption = None,
) -> None:
    """Serve a registered model over HTTP until it is stopped; the protocol is that of `mlflow models serve`."""
    from labelmill import api

    cluster = {"address": address, "workers": replicas, "cpus_per_worker": cpus, "gpus_per_worker": gpus}
    with api.serve(
        model, host, port, cluster, max_batch, output, tracking_config(tracking_uri)
    ) as (url, version):  # fmt: skip
        console.print(f"{version} answers on {url}/invocations; stop it with Ctrl-C", highlight=False, soft_wrap=True)
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()


def status(
    run: Annotated[str, typer.Argument(help="MLflow id or name of a run (the newest of that name)")],
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of text")] = False,
    output: OutputOption = Path("runs"),
    tracking_uri: UriOption = None,
) -> None:
    """Say how a run stands, from its MLflow run alone: stage, step, rate, metrics, damage, restarts."""
    from labelmill.tracking.status import read_status, render_status

    found = read_status(tracking_config(tracking_uri), output, run)
    if as_json:
        print(json.dumps(found.as_json(), indent=1))
    else:
        render_status(found, console)
