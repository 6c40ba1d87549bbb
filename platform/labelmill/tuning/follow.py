"""What happens beside Tune while trials run: lines for a person, the limit of failures, old checkpoints dropped."""

from __future__ import annotations

import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

from ray import tune
from rich.console import Console

from labelmill.training.groups import end_group
from labelmill.tuning.pointer import Pointer, sweep
from labelmill.tuning.state import SearchFolder, read_record

console: Console | None = None
"""Where lines go; not a part of the callback, which Tune keeps in a file."""

_LINE_EVERY_S = 5.0
_SWEEP_EVERY_S = 10.0


class Follow(tune.Callback):
    """Prints how trials do, ends the search when too many fail, and drops checkpoints that nobody starts from."""

    def __init__(self, root: str) -> None:
        self._root = root
        self._last_line = self._last_sweep = 0.0
        self._failed: set[str] = set()

    @property
    def _folder(self) -> SearchFolder:
        return SearchFolder(Path(self._root))

    def _say(self, trials: list[Any], trial: Any, text: str) -> None:
        number = trials.index(trial) + 1
        if console is not None:
            console.print(f"trial {number}: {text}", highlight=False, soft_wrap=True, markup=False)

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial starts, or goes on."""
        before = (self._folder.trial(trial.trial_id) / "settings.jsonl").is_file()
        self._say(trials, trial, "goes on" if before else "starts")

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """A trial told its metric."""
        if time.monotonic() - self._last_line >= _LINE_EVERY_S:
            self._last_line = time.monotonic()
            self._say(trials, trial, f"step {result['step']:,}: {result['value']:.4g}")

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial has ended, or was stopped."""
        record = read_record(self._folder.trial(trial.trial_id))
        if record.status == "finished":
            self._say(trials, trial, f"finished: {record.value:.4g} after {record.step:,} steps")
        else:
            self._say(trials, trial, f"stopped at step {record.step:,}")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial failed for good."""
        folder = self._folder
        outcome = read_record(folder.trial(trial.trial_id)).outcome
        reason = outcome.get("error", "its process died; see the trial's folder")
        self._say(trials, trial, f"failed: {reason}")
        self._failed.add(trial.trial_id)
        limit = int(folder.state["max_failed"])
        if outcome.get("fatal"):
            folder.stop_file.write_text(
                f"every trial would fail like trial {trial.trial_id}: {reason}", encoding="utf-8"
            )
        elif len(self._failed) > limit:
            folder.stop_file.write_text(
                f"{len(self._failed)} trials failed, search.max_failed is {limit}; the last one: {reason}",
                encoding="utf-8",
            )

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Tune has done a round."""
        if time.monotonic() - self._last_sweep < _SWEEP_EVERY_S:
            return
        self._last_sweep = time.monotonic()
        folder = self._folder
        end_groups(folder, {trial.trial_id for trial in trials if trial.status in ("RUNNING", "PENDING")})
        pointers = [Pointer.load(t.checkpoint.path) for t in trials if t.checkpoint is not None and not t.is_finished()]
        sweep(folder.kept, {pointer.path for pointer in pointers if pointer is not None})


def end_groups(folder: SearchFolder, running: Collection[str] = ()) -> None:
    """Ends the workers of trials whose process is gone; one that ends by itself has ended them."""
    for file in folder.trial("").glob("*/group"):
        if file.parent.name not in running:
            end_group(file.read_text(encoding="utf-8"))
            file.unlink(missing_ok=True)


class StopOnFile(tune.Stopper):
    """Ends the search when its stop file is there."""

    def __init__(self, file: str) -> None:
        self._file = file

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """No single trial is stopped here."""
        return False

    def stop_all(self) -> bool:
        """Whether the search is to end."""
        return Path(self._file).is_file()
