"""Mean and range of the metrics of several runs of one job: python ci/summarize.py RUN_FOLDER..."""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

from labelmill.tracking.report import Report


def main(folders: list[str]) -> None:
    """Prints a Markdown table of every metric that all runs have."""
    reports = [Report.load(Path(folder) / "report") for folder in folders]
    shared = [name for name in reports[0].metrics if all(name in report.metrics for report in reports)]
    print(f"| metric | mean of {len(reports)} | lowest | highest |\n|---|---|---|---|")
    for name in shared:
        values = [report.metrics[name] for report in reports]
        print(f"| {name} | {statistics.mean(values):.4g} | {min(values):.4g} | {max(values):.4g} |")


if __name__ == "__main__":
    main(sys.argv[1:])
