"""A plan for people (tables) and for programs (JSON)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from labelmill.planning.advice import Advice, verdict
from labelmill.planning.estimate import Estimate, head_precision


def as_json(plan: Estimate, advice: Sequence[Advice] = ()) -> dict[str, Any]:
    """Bytes and seconds of a plan, with its verdict and advice."""
    setup = plan.setup
    return {
        "cluster": plan.spec.model_dump(),
        "job": {
            "classes": setup.num_classes,
            "dim": setup.dim,
            "workers": setup.workers,
            "shards": setup.shards,
            "replicas": setup.replicas,
            "global_batch": setup.train.global_batch,
            "accumulation": setup.train.accumulation,
            "sample_rate": setup.head.sample_rate,
            "zero_stage": setup.train.zero_stage,
            "precision": setup.train.precision,
            "head_precision": head_precision(setup, plan.spec),
            "sub_centres": setup.head.sub_centres,
            "rows_dtype": setup.head.rows_dtype,
            "encoder_parameters": setup.encoder.parameters,
            "encoder_train_flops": setup.encoder.train_flops,
        },
        "fits": plan.fits,
        "memory_bytes": plan.memory,
        "memory_total": plan.total_memory,
        "memory_limit": plan.spec.memory,
        "seconds": plan.seconds,
        "step_seconds": plan.step_seconds,
        "samples_per_second": plan.samples_a_second,
        "sent_bytes": [{"what": what, "over": axis, "bytes": sent} for (what, axis), sent in plan.sent.items()],
        "verdict": verdict(plan),
        "advice": [
            {"text": a.text, "fits": a.plan.fits, "memory": a.plan.total_memory, "step_seconds": a.plan.step_seconds}
            for a in advice
        ],
    }


def show(plan: Estimate, advice: Sequence[Advice], measured: bool, console: Console) -> None:
    """Prints the plan of one setup."""
    setup, spec = plan.setup, plan.spec
    layout = f"{setup.shards} class shards x {setup.replicas} replica{'s' if setup.replicas > 1 else ''}"
    console.print(
        f"{setup.num_classes:,} classes x {setup.dim}, encoder {setup.encoder.parameters / 1e6:.1f} M parameters; "
        f"{setup.workers} workers on {spec.name}, {layout}, batch {setup.batch} a worker",
        highlight=False,
        soft_wrap=True,
    )
    for title, values, unit, scale in (
        ("memory of a worker", plan.memory, "GB", 1e-9),
        ("time of a step", plan.seconds, "ms", 1e3),
    ):
        table = Table(title, unit, "", box=None, header_style="bold", pad_edge=False)
        total = sum(values.values())
        for name, value in sorted(values.items(), key=lambda item: -item[1]):
            if value >= 0.0005 * total:
                table.add_row(name, f"{value * scale:.2f}", f"{100 * value / total:.0f}%")
        table.add_row("[bold]sum[/]", f"[bold]{total * scale:.2f}[/]")
        console.print()
        console.print(table)
    if plan.sent:
        table = Table("sent by a worker in a step", "over", "MB", box=None, header_style="bold", pad_edge=False)
        for (what, axis), sent in sorted(plan.sent.items(), key=lambda item: -item[1]):
            table.add_row(what, axis, f"{sent / 1e6:.3f}")
        console.print()
        console.print(table)
    console.print()
    console.print(verdict(plan), style="green" if plan.fits else "bold red", highlight=False, soft_wrap=True)
    for item in advice:
        console.print(f"- {item.text}", highlight=False, soft_wrap=True)
    console.print(f"{plan.samples_a_second:,.0f} samples/s. {basis(plan, measured)}", highlight=False, soft_wrap=True)


def basis(plan: Estimate, measured: bool) -> str:
    """Where the rates come from."""
    if measured:
        return "Rates were measured on this machine just now, with the job's own encoder and head at small sizes."
    e = plan.spec.efficiency
    return (
        f"Rates of {plan.spec.name} are as described, not measured; assumed of them: encoder {100 * e.encoder:.0f}%, head "
        f"{100 * e.head:.0f}%, memory {100 * e.memory:.0f}%, network {100 * e.network:.0f}%, nothing overlapped."
    )


def show_table(plans: Sequence[Estimate], console: Console) -> None:
    """One line a plan, as a Markdown table."""
    columns = [
        "classes",
        "workers",
        "shards × replicas",
        "global batch",
        "GB each",
        "fits",
        "step ms",
        "links ms",
        "samples/s",
    ]
    console.print(f"| {' | '.join(columns)} |", soft_wrap=True)
    console.print("|---" * len(columns) + "|", soft_wrap=True)
    for plan in plans:
        s = plan.setup
        links = sum(value for name, value in plan.seconds.items() if name.endswith("collectives"))
        console.print(
            f"| {s.num_classes:,} | {s.workers} | {s.shards} × {s.replicas} | {s.train.global_batch:,} | "
            f"{plan.total_memory / 1e9:.1f} | {'yes' if plan.fits else 'no'} | {1e3 * plan.step_seconds:.1f} | "
            f"{1e3 * links:.1f} | {plan.samples_a_second:,.0f} |",
            highlight=False,
            soft_wrap=True,
        )
    console.print()
    console.print(basis(plans[0], False), highlight=False, soft_wrap=True)
