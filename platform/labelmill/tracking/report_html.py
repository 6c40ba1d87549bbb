"""A report as one HTML page that needs no other file and no network: figures are inside, nothing is executed."""

from __future__ import annotations

import base64
import html
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from labelmill.tracking.report import Report, Table

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #2b2b2b; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin: 2rem 0 .4rem; }
.caption, dl { color: #6b6b6b; font-size: .85rem; }
table { border-collapse: collapse; font-size: .85rem; }
th, td { padding: .2rem .7rem; border-bottom: 1px solid #e3e3e3; text-align: left; vertical-align: top; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
img { max-width: 100%; } dt { float: left; clear: left; margin-right: .6rem; } dd { margin: 0; overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
"""


def to_html(report: Report) -> str:
    """The page. Every text of the report is escaped."""
    from labelmill.tracking.report import metrics_table

    title = html.escape(report.title)
    parts = [f"<h1>{title}</h1>", *(f"<p>{html.escape(note)}</p>" for note in report.notes)]
    for name in report.figures:
        data = base64.b64encode(report.figure_path(name).read_bytes()).decode()
        label = html.escape(name)
        parts.append(f'<h2>{label}</h2><img alt="{label}" src="data:image/png;base64,{data}">')
    for name, table in report.tables.items():
        parts.append(_table(name, table))
    if report.metrics:
        parts.append(_table("metrics", metrics_table(report.metrics)))
    facts = "".join(f"<dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd>" for k, v in report.meta.items())
    parts.append(f"<dl>{facts}</dl>" if facts else "")
    head = f'<meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n' + "\n".join(parts) + "\n</body></html>\n"


def _table(name: str, table: Table) -> str:
    from labelmill.tracking.report import format_cell

    marks = [' class="number"' if table.is_numeric(i) else "" for i in range(len(table.columns))]

    def row(cells: list[str], tag: str) -> str:
        inner = (f"<{tag}{mark}>{html.escape(cell)}</{tag}>" for cell, mark in zip(cells, marks, strict=True))
        return f"<tr>{''.join(inner)}</tr>"

    body = "\n".join(row([format_cell(cell) for cell in cells], "td") for cells in table.rows)
    caption = f'<p class="caption">{html.escape(table.caption)}</p>' if table.caption else ""
    heading = row(table.columns, "th")
    return f'<h2>{html.escape(name)}</h2>{caption}<div class="wide"><table>{heading}\n{body}</table></div>'
