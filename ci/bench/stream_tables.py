"""The benchmark's results as Markdown, and their ratios to the aims."""

from __future__ import annotations

import os
import statistics
from pathlib import Path
from typing import Any

from stream_loaders import RIVALS

OURS = "labelmill"
DISTURBED = 0.1


def middle(values: list[float]) -> float:
    """Median, or nan."""
    return statistics.median(values) if values else float("nan")


def column(result: dict[str, Any], loader: str, key: str, number: int = -1) -> list[float]:
    """A figure of pass `number` (0 cold, -1 warm) over the rounds."""
    return [records[number][key] for records in result["runs"].get(loader, [])]


def spread(values: list[float], form: str = ",.0f") -> str:
    """Median and range."""
    if not values:
        return "-"
    text = format(middle(values), form)
    if len(values) > 1:
        text += f" ({format(min(values), form)}-{format(max(values), form)})"
    return text


def table(result: dict[str, Any]) -> str:
    """The loaders of one data set as Markdown."""
    head = (
        f"### {result['name']}\n\n| loader | warm samples/s | steady samples/s | cold samples/s | CPU s/1k (Ray's daemons) "
        "| first batch s, warm / cold | peak MB (shared, mapped files) | daemons MB |\n|---|---|---|---|---|---|---|---|"
    )
    rows = []
    for loader in result["runs"]:
        memory = result["memory"].get(loader, {})
        peak = "-"
        if memory:
            peak = f"{memory['peak_mb']:,.0f} ({memory['shared_mb']:,.0f}, {memory['files_mb']:,.0f})"
        aside = column(result, loader, "daemon_cpu_per_1k")
        daemon_cpu = f" (+{middle(aside):.3f})" if middle(aside) > 0 else ""
        daemons = f"{memory['daemons_mb']:,.0f}" if memory.get("daemons_mb") else "-"
        first = [column(result, loader, "first_s", number) for number in (-1, 0)]
        rows.append(
            f"| {loader} | {spread(column(result, loader, 'rate'))} | {spread(column(result, loader, 'steady'))} "
            f"| {spread(column(result, loader, 'rate', 0))} | {spread(column(result, loader, 'cpu_per_1k'), '.3f')}"
            f"{daemon_cpu} | {middle(first[0]):.2f} / {middle(first[1]):.2f} | {peak} | {daemons} |"
        )
    if result["limit"]:
        rates, cpu = ([one[key] for one in result["limit"]] for key in ("rate", "cpu_per_1k"))
        ways = f"{result['limit'][0]['cores']} {result['limit'][0]['best']}"
        rows.append(f"| *decode alone, {ways}* | {spread(rates)} | | | {spread(cpu, '.3f')} | | | |")
    passes = [record for rounds in result["runs"].values() for records in rounds for record in records]
    disturbed = [record["others"] for record in passes if record.get("others", 0.0) > DISTURBED]
    if disturbed:
        rows.append(
            f"\nIn {len(disturbed)} of {len(passes)} passes other processes took more than {DISTURBED:.0%} of the machine "
            f"(up to {max(disturbed):.0%}): run it again on an idle machine. With S3, the server is one of them."
        )
    return "\n".join([head, *rows])


def is_rival(loader: str) -> bool:
    """Whether the aims compare with it: another library, not shuffling."""
    return loader.split("-")[0] in RIVALS and "shuffle" not in loader


def aims(result: dict[str, Any]) -> str:
    """The ratios to the aims, where both sides were run."""
    rows: list[str] = []

    def add(what: str, value: float, wanted: float, at_least: bool = True) -> None:
        if value == value:  # not nan: both sides are there
            held = value >= wanted if at_least else value <= wanted
            sign = ">=" if at_least else "<="
            rows.append(f"| {what} | {value:.2f} | {sign} {wanted:g} | {'yes' if held else 'no'} |")

    def of(loader: str, key: str) -> float:
        return middle(column(result, loader, key))

    jpeg = result["name"] == "jp"
    rivals = [loader for loader in result["runs"] if is_rival(loader)]
    for key, word in (("rate", "warm"), ("steady", "steady")):
        best = max(((of(r, key), r) for r in rivals if of(r, key) > 0), default=None)
        if best:
            add(f"{word} samples/s over the best other, {best[1]}", of(OURS, key) / best[0], 1.2 if jpeg else 1.0)
    add("warm samples/s over ray-webdataset", of(OURS, "rate") / of("ray-webdataset", "rate"), 3.0)
    if jpeg and result["limit"]:
        rate, cpu = (middle([one[key] for one in result["limit"]]) for key in ("rate", "cpu_per_1k"))
        add("warm samples/s over the decode limit", of(OURS, "rate") / rate, 0.8)
        add("steady samples/s over the decode limit", of(OURS, "steady") / rate, 0.8)
        add("CPU per 1,000 samples over pure decode", of(OURS, "cpu_per_1k") / cpu, 1.25, False)
    add("first batch in a warm session, s", of(OURS, "first_s"), 0.5, False)
    add("warm samples/s from S3 over disk", of("labelmill-s3", "rate") / of(OURS, "rate"), 0.9)
    memory = result["memory"]
    if OURS in memory:
        for word, less in (("", 0.0), (" without mapped files", 1.0)):
            used = {name: m["peak_mb"] - less * m["files_mb"] for name, m in memory.items()}
            others = [used[name] for name in rivals if name in used]
            if others:
                add(f"peak memory{word} over the lightest other", used[OURS] / min(others), 1.0, False)
    return "\n".join(["| aim | measured | wanted | held |", "|---|---|---|---|", *rows]) if rows else ""


def machine() -> str:
    """Processor, cores and memory."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "?")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{cpu}, {os.cpu_count()} cores, {memory:.0f} GiB"
