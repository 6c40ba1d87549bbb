"""Optuna's Parzen estimator behind Ray Tune; imported only where optuna is installed."""

from __future__ import annotations

from typing import Any

from ray.tune.search.optuna import OptunaSearch

from labelmill.tuning.state import FINAL


class Parzen(OptunaSearch):
    """Optuna, told the truth about trials that a scheduler stopped.

    Ray hands their last value over as if they had trained to their end. As pruned trials they are ranked below the others,
    by the steps they reached and then by value: what BOHB (Falkner et al., ICML 2018) does with smaller budgets.
    """

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """A trial has ended."""
        ended = error or (result is not None and bool(result.get(FINAL)))
        super().on_trial_complete(trial_id, result if ended else None, error)

    def on_pause(self, trial_id: str) -> None:
        """HyperBand lets a trial wait for others of its bracket; what is proposed doesn't depend on it."""

    def on_unpause(self, trial_id: str) -> None:
        """It goes on."""
