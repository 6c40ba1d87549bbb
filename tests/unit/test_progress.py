"""What is shown of a run on a cluster is what would be shown of it here."""

from __future__ import annotations

import io
import re
from collections.abc import Callable

from rich.console import Console

from labelmill.progress import Eta, ProgressView, Replay


def drive(view: ProgressView, look: Callable[[], None]) -> None:
    """A run of two stages."""
    view.line("words: kept from before (3.0 s then)")
    for stage in ("fit", "evaluate all"):
        with view.stage(stage):
            for done in (0, 500, 1200):
                view.update(done, 1200, 88.4, "loss 1.25")
                look()
    view.line("report: starts with this line")


def shown(view: ProgressView) -> list[tuple[str, float, float | None, str]]:
    assert view._live is not None
    return [(task.description, task.completed, task.total, task.fields["text"]) for task in view._live.tasks]


def test_replayed_lines_show_the_same_bars() -> None:
    local, remote = [], []
    with ProgressView(Console(file=io.StringIO(), force_terminal=True, width=100)) as view:
        drive(view, lambda: local.extend(shown(view)))

    plain = io.StringIO()
    with ProgressView(Console(file=plain, width=100)) as silent:
        drive(silent, lambda: setattr(silent, "_last_line", 0.0))
    lines = plain.getvalue().splitlines()
    assert lines[:2] == ["words: kept from before (3.0 s then)", "fit: starts"]

    out = io.StringIO()
    with ProgressView(Console(file=out, force_terminal=True, width=100)) as view:
        replay = Replay(view)
        for line in lines:
            replay.line(line)
            if " / " in line:
                remote.extend(shown(view))
        assert shown(view) == [], "no bar is left"

    def timeless(rows: list[tuple[str, float, float | None, str]]) -> list[tuple[str, float, float | None, str]]:
        return [(*row[:3], re.sub(r" · ETA \d+ s", "", row[3])) for row in rows]

    assert timeless(remote) == timeless(local)
    assert local[1][:3] == ("fit", 500, 1200)
    for kept in ("words: kept from before", "fit: done in", "evaluate all: done in", "report: starts with this line"):
        assert kept in out.getvalue()


def test_without_a_terminal_lines_pass_as_they_are() -> None:
    out = io.StringIO()
    with ProgressView(Console(file=out, width=40)) as view:
        for line in ("fit: starts", "fit: 1 / 2 · 3 samples/s", "[bold]a table[/]", "x" * 90):
            Replay(view).line(line)
    assert out.getvalue().splitlines() == ["fit: starts", "fit: 1 / 2 · 3 samples/s", "[bold]a table[/]", "x" * 90]


def test_the_time_left_comes_from_the_progress_alone() -> None:
    eta = Eta()
    assert eta.update(10, 800, 100.0) == "", "a hundred seconds of starting workers are no pace"
    assert eta.update(20, 800, 101.0) == "ETA 78 s"
    assert eta.update(100, 2000, 102.0) == "", "another total: class rows, then steps"
    assert eta.update(600, 2000, 112.0) == "ETA 28 s"
    # workers were lost: 100 s of nothing, and training goes on from an older checkpoint
    assert eta.update(500, 2000, 212.0) == ""
    assert eta.update(510, 2000, 213.0) == "ETA 2 min"
    assert eta.update(2000, 2000, 300.0) == ""
