"""The report of a run: one object that is printed, logged and read back.

A report knows nothing of MLflow and of matplotlib: it holds numbers, tables, the files of figures and notes,
and turns into JSON, Markdown or terminal output. A folder made by `Report.save` holds all of it:

    report.json
    report.md
    report.html     the same as one page, figures inside
    figures/<name>.png
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from labelmill.errors import DataError
from labelmill.tracking.report_html import to_html

if TYPE_CHECKING:
    from rich.console import Console

Cell = str | int | float | bool | None
SCHEMA_VERSION = 1
_JSON = "report.json"
_MARKDOWN = "report.md"
_HTML = "report.html"
_FIGURES = "figures"


@dataclass
class Table:
    """Rows under named columns.

    Attributes:
        columns: headings.
        rows: cells: text, whole numbers, numbers, truth values or nothing.
        caption: one sentence that says what the table shows.
    """

    columns: list[str]
    rows: list[list[Cell]]
    caption: str = ""

    def __post_init__(self) -> None:
        self.columns = [str(column) for column in self.columns]
        self.rows = [[_plain(cell) for cell in row] for row in self.rows]
        for number, row in enumerate(self.rows):
            if len(row) != len(self.columns):
                raise ValueError(f"row {number} has {len(row)} cells, but there are {len(self.columns)} columns")

    def is_numeric(self, column: int) -> bool:
        """Whether a column holds numbers only (or nothing), so that it is set flush right."""
        cells = [row[column] for row in self.rows if row[column] is not None]
        return bool(cells) and all(isinstance(cell, int | float) and not isinstance(cell, bool) for cell in cells)


@dataclass
class Report:
    """What a run has to say.

    Attributes:
        title: heading.
        metrics: numbers by name (`test/top1`); they become the run's final metrics.
        tables: by name.
        figures: file of each figure by name, absolute or relative to `root`.
        notes: sentences shown first: what was run, what went wrong, what to read the numbers with.
        meta: identities: run id, data digest, code version, seed.
        root: folder that relative figure paths start from; not part of the content.
    """

    title: str
    metrics: dict[str, float] = field(default_factory=dict)
    tables: dict[str, Table] = field(default_factory=dict)
    figures: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    meta: dict[str, str] = field(default_factory=dict)
    root: Path | None = field(default=None, compare=False, repr=False)

    def add_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], caption: str = "") -> None:
        """Adds a table; numpy scalars are taken as plain numbers."""
        self.tables[name] = Table(list(columns), [list(row) for row in rows], caption)

    def figure_path(self, name: str) -> Path:
        """The file of a figure. Raises KeyError for an unknown name."""
        path = Path(self.figures[name])
        return path if path.is_absolute() or self.root is None else self.root / path

    # --- JSON -----------------------------------------------------------------------------------------------

    def to_json(self) -> str:
        """Strict JSON (a number that isn't finite becomes an object); `from_json` gives the report back."""
        content = {
            "schema_version": SCHEMA_VERSION,
            "title": self.title,
            "metrics": {name: _encode(float(value)) for name, value in self.metrics.items()},
            "tables": {
                name: {
                    "columns": table.columns,
                    "rows": [[_encode(cell) for cell in row] for row in table.rows],
                    "caption": table.caption,
                }
                for name, table in self.tables.items()
            },
            "figures": {name: str(path) for name, path in self.figures.items()},
            "notes": list(self.notes),
            "meta": {key: str(value) for key, value in self.meta.items()},
        }
        return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)

    @classmethod
    def from_json(cls, text: str, root: Path | None = None) -> Report:
        """Rebuilds a report. Raises DataError when the text isn't one."""
        try:
            content = json.loads(text)
            if content["schema_version"] != SCHEMA_VERSION:
                raise DataError(
                    f"the report has schema version {content['schema_version']}, this labelmill reads "
                    f"{SCHEMA_VERSION}. Read it with the version of labelmill that wrote it."
                )
            return cls(
                title=content["title"],
                metrics={name: float(_decode(value)) for name, value in content["metrics"].items()},
                tables={
                    name: Table(t["columns"], [[_decode(cell) for cell in row] for row in t["rows"]], t["caption"])
                    for name, t in content["tables"].items()
                },
                figures=content["figures"],
                notes=content["notes"],
                meta=content["meta"],
                root=root,
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(f"{root or 'text'}: not a labelmill report: {error!r}") from error

    # --- folders --------------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> Path:
        """Writes the report and copies its figures into `folder`; returns it.

        Afterwards this object's figure paths are relative to `folder`. Raises DataError for a figure whose
        file is missing.
        """
        folder = Path(folder)
        (folder / _FIGURES).mkdir(parents=True, exist_ok=True)
        saved: dict[str, str] = {}
        for name in self.figures:
            source = self.figure_path(name)
            if not source.is_file():
                raise DataError(f"figure {name!r} of the report: {source} doesn't exist")
            target = folder / _FIGURES / f"{name.replace('/', '-')}{source.suffix}"
            if not target.exists() or not source.samefile(target):
                shutil.copyfile(source, target)
            saved[name] = f"{_FIGURES}/{target.name}"
        self.figures, self.root = saved, folder
        (folder / _HTML).write_text(to_html(self), encoding="utf-8")
        (folder / _MARKDOWN).write_text(self.to_markdown(), encoding="utf-8")
        (folder / _JSON).write_text(self.to_json(), encoding="utf-8")
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> Report:
        """The report in a folder. Raises DataError when there is none."""
        folder = Path(folder)
        if not (folder / _JSON).is_file():
            raise DataError(f"{folder}: no {_JSON} in this folder")
        report = cls.from_json((folder / _JSON).read_text(encoding="utf-8"), root=folder)
        for name, path in report.figures.items():
            if Path(path).is_absolute() or ".." in Path(path).parts:
                raise DataError(f"{folder / _JSON}: figure {name!r}: {path} leads out of the report's folder")
        return report

    # --- for people -----------------------------------------------------------------------------------------

    def render(self, console: Console | None = None) -> None:
        """Prints the report; plain text where the console is no terminal."""
        from rich.console import Console
        from rich.padding import Padding
        from rich.text import Text

        console = console or Console()
        console.print()
        console.rule(Text(self.title, style="bold"), align="left")
        for note in self.notes:
            console.print(Padding(Text(note), (0, 2), expand=False))
        if self.metrics:
            console.print(_rich_table("metrics", metrics_table(self.metrics)))
        for name, table in self.tables.items():
            console.print(_rich_table(name, table))
        if self.figures:
            console.print(Text("figures", style="bold"))
            for name in self.figures:
                # one line a path, however narrow the console is: paths are copied from the terminal
                console.print(Text(f"  {name}: {self.figure_path(name)}"), soft_wrap=True)
        for key, value in self.meta.items():
            console.print(Text(f"{key}: {value}", style="dim"), soft_wrap=True)

    def to_markdown(self) -> str:
        """The report as Markdown, figures linked by their relative path."""
        parts = [f"# {self.title}", *self.notes]
        if self.metrics:
            parts.append(_markdown_table(metrics_table(self.metrics)))
        for name, table in self.tables.items():
            heading = f"## {name}" + (f"\n\n{table.caption}" if table.caption else "")
            parts.append(f"{heading}\n\n{_markdown_table(table)}")
        parts.extend(f"![{name}](<{path}>)" for name, path in self.figures.items())
        if self.meta:
            parts.append("\n".join(f"- {key}: `{value}`" for key, value in self.meta.items()))
        return "\n\n".join(parts) + "\n"


def format_cell(cell: Cell) -> str:
    """A cell for people: four significant digits, thousands grouped, `yes`/`no`, nothing for None."""
    if cell is None:
        return ""
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    if isinstance(cell, int):
        return f"{cell:,}"
    if isinstance(cell, str):
        return cell
    if not math.isfinite(cell):
        return str(cell)
    if cell != 0 and not 1e-4 <= abs(cell) < 1e15:
        return f"{cell:.3e}"
    if abs(cell) >= 1000:
        return f"{cell:,.0f}"
    decimals = 4 if abs(cell) < 1 else 3 - math.floor(math.log10(abs(cell)))
    return f"{cell:.{decimals}f}"


def metrics_table(metrics: dict[str, float]) -> Table:
    """Metrics as a table."""
    # a metric is a float by type; whole ones (counts) read better without decimals
    rows: list[list[Cell]] = [
        [
            name,
            int(value) if math.isfinite(value) and float(value).is_integer() and abs(value) >= 2 else float(value),
        ]
        for name, value in metrics.items()
    ]
    return Table(["metric", "value"], rows)


def _rich_table(name: str, table: Table) -> Any:
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    rich = RichTable(
        title=Text(name, style="bold"),
        caption=Text(table.caption) if table.caption else None,
        box=box.SIMPLE_HEAD,
        title_justify="left",
        caption_justify="left",
    )
    for index, column in enumerate(table.columns):
        rich.add_column(Text(column), justify="right" if table.is_numeric(index) else "left", overflow="fold")
    for row in table.rows:
        rich.add_row(*(Text(format_cell(cell)) for cell in row))
    return rich


def _markdown_table(table: Table) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    marks = ["---:" if table.is_numeric(index) else "---" for index in range(len(table.columns))]
    rows = [line([format_cell(cell) for cell in row]) for row in table.rows]
    return "\n".join([line(table.columns), line(marks), *rows])


def _plain(cell: Any) -> Cell:
    """numpy and torch scalars as Python numbers."""
    if cell is None or type(cell) in (str, int, float, bool):
        return cell
    if hasattr(cell, "item"):
        return _plain(cell.item())
    if isinstance(cell, bool | int | float | str):
        return cell
    return str(cell)


def _encode(value: Cell) -> Any:
    return {"float": str(value)} if isinstance(value, float) and not math.isfinite(value) else value


def _decode(value: Any) -> Any:
    return float(value["float"]) if isinstance(value, dict) else value
