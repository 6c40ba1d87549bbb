"""The report: lossless JSON, folders, terminal and Markdown output."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from labelmill.errors import DataError
from labelmill.tracking.report import Report, Table, format_cell

PIXEL = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108060000001f15c4890000000d49444154789c6360606060000000050001"
    "a5f645400000000049454e44ae426082"
)


def example(folder: Path) -> Report:
    figure = folder / "loss.png"
    figure.write_bytes(PIXEL)
    report = Report(
        "Spelling over 1,000,000 classes",
        metrics={"test/top1": 0.8125, "count": 12345.0, "broken": math.nan, "gain": -math.inf},
        figures={"loss": str(figure)},
        notes=["Two workers; [bold] is no markup here.", "Déjà vu: ünïcode"],
        meta={"run": "abc", "seed": "0"},
    )
    rows = [["head | tail", 1, 0.123456789, True, None], ["x\ny", 10**12, math.inf, False, "n/a"]]
    report.add_table("bands", ["band", "n", "top-1", "kept", "remark"], rows, "by frequency")
    return report


def same(left: Report, right: Report) -> bool:
    # NaN differs from itself, its text doesn't
    return left.to_json() == right.to_json()


def test_json_is_lossless_and_strict(tmp_path: Path) -> None:
    report = example(tmp_path)
    text = report.to_json()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} isn't JSON"))
    back = Report.from_json(text)
    assert same(back, report)
    assert math.isnan(back.metrics["broken"])
    assert back.metrics["gain"] == -math.inf
    row = back.tables["bands"].rows[0]
    assert row == ["head | tail", 1, 0.123456789, True, None]
    assert [type(cell) for cell in row] == [str, int, float, bool, type(None)]


def test_numpy_cells_become_plain_numbers() -> None:
    table = Table(["a", "b", "c"], [[np.float32(0.5), np.int64(3), np.bool_(True)]])
    assert table.rows == [[0.5, 3, True]]
    assert [type(cell) for cell in table.rows[0]] == [float, int, bool]


def test_a_row_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="row 1 has 1 cells, but there are 2 columns"):
        Table(["a", "b"], [[1, 2], [3]])


def test_save_and_load(tmp_path: Path) -> None:
    report = example(tmp_path)
    report.save(tmp_path / "out")
    back = Report.load(tmp_path / "out")
    assert same(back, report)
    assert back.figures == {"loss": "figures/loss.png"}
    assert back.figure_path("loss").read_bytes() == PIXEL
    assert "![loss](<figures/loss.png>)" in (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    # saving again, into its own folder and elsewhere
    back.save(tmp_path / "out")
    back.save(tmp_path / "copy")
    assert (tmp_path / "copy" / "figures" / "loss.png").read_bytes() == PIXEL


def test_a_missing_figure_is_named(tmp_path: Path) -> None:
    report = Report("t", figures={"grid": str(tmp_path / "grid.png")})
    with pytest.raises(DataError, match=r"figure 'grid' of the report: .*grid\.png doesn't exist"):
        report.save(tmp_path / "out")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema_version": 1}', "null"])
def test_what_is_no_report_is_refused(text: str) -> None:
    with pytest.raises(DataError, match="not a labelmill report"):
        Report.from_json(text)


def test_a_newer_schema_is_refused(tmp_path: Path) -> None:
    text = example(tmp_path).to_json().replace('"schema_version": 1', '"schema_version": 9')
    with pytest.raises(DataError, match="schema version 9"):
        Report.from_json(text)


def test_a_folder_without_report_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no report\.json"):
        Report.load(tmp_path)


@pytest.mark.parametrize("width", [40, 100])
def test_render_on_a_plain_console(tmp_path: Path, width: int) -> None:
    out = io.StringIO()
    report = example(tmp_path)
    report.render(Console(file=out, width=width))
    text = out.getvalue()
    assert "\x1b" not in text
    for part in ("12,345", "0.8125", "[bold] is no markup", "nan", "run: abc", str(tmp_path / "loss.png")):
        assert part in text if width > 40 else part in text.replace("\n  ", " ")


def test_markdown_escapes_table_cells(tmp_path: Path) -> None:
    markdown = example(tmp_path).to_markdown()
    assert "| head \\| tail | 1 | 0.1235 | yes |  |" in markdown
    assert "| x y | 1,000,000,000,000 | inf | no | n/a |" in markdown
    assert "| --- | ---: | ---: | --- | --- |" in markdown


@pytest.mark.parametrize(
    ("cell", "text"),
    [(0.0, "0.0000"), (1.5, "1.500"), (12.345678, "12.35"), (123456.7, "123,457"), (3e-7, "3.000e-07"),
     (1234567, "1,234,567"), (True, "yes"), (None, ""), ("a", "a"), (-0.25, "-0.2500"), (9.99999, "10.000")],
)  # fmt: skip
def test_cells_for_people(cell: object, text: str) -> None:
    assert format_cell(cell) == text  # type: ignore[arg-type]


def test_the_page_is_whole_and_executes_nothing(tmp_path: Path) -> None:
    report = example(tmp_path)
    report.notes.append("<script>alert(1)</script> & more")
    page = (report.save(tmp_path / "report") / "report.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; more" in page
    assert "data:image/png;base64,iVBORw0KGgo" in page
    assert page.count("<img") == 1
    assert "http" not in page
    assert '<td class="number">1,000,000,000,000</td>' in page
    assert "head | tail" in page
