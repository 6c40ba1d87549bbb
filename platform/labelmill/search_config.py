"""What `labelmill tune` searches: the `search` section of a job."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from labelmill.strict import StrictModel

_MOST_LISTED = 64


def _short_form(value: Any) -> Any:
    """`random` -> `{kind: random}`; a list of values -> `{kind: choice, values: [...]}`."""
    if isinstance(value, str):
        return {"kind": value}
    return {"kind": "choice", "values": value} if isinstance(value, list | tuple) else value


# --- spaces ---------------------------------------------------------------------------------------------


class _Range(StrictModel):
    @model_validator(mode="after")
    def _ordered(self) -> Any:
        low, high = getattr(self, "low", 0), getattr(self, "high", 1)
        if not low < high:
            raise ValueError(f"low {low} must be below high {high}")
        return self


class Uniform(_Range):
    """A number from `low` to `high`, every one as likely; with `step` only low, low + step, ..."""

    kind: Literal["uniform"] = "uniform"
    low: float
    high: float
    step: float | None = Field(None, gt=0)

    def listed(self) -> list[Any] | None:
        """Every value, if they are few; else None."""
        if self.step is None or (self.high - self.low) / self.step > _MOST_LISTED:
            return None
        return [self.low + i * self.step for i in range(math.floor((self.high - self.low) / self.step + 1e-9) + 1)]

    def probes(self) -> list[Any]:
        """Values that a job must accept for the space to make sense."""
        return self.listed() or [self.low, (self.low + self.high) / 2, self.high]


class LogUniform(_Range):
    """A number from `low` to `high`, every order of magnitude as likely."""

    kind: Literal["log_uniform"] = "log_uniform"
    low: float = Field(gt=0)
    high: float

    def listed(self) -> list[Any] | None:
        """None: there are too many."""
        return None

    def probes(self) -> list[Any]:
        """See `Uniform.probes`."""
        return [self.low, math.sqrt(self.low * self.high), self.high]


class Integer(_Range):
    """A whole number from `low` to `high`, both included; with `log` every order of magnitude as likely."""

    kind: Literal["integer"] = "integer"
    low: int
    high: int
    step: int = Field(1, ge=1)
    log: bool = False

    @model_validator(mode="after")
    def _log_needs_positive(self) -> Integer:
        if self.log and (self.low < 1 or self.step > 1):
            raise ValueError("log needs low of at least 1 and no step")
        return self

    def listed(self) -> list[Any] | None:
        """Every value, if they are few; else None."""
        values = range(self.low, self.high + 1, self.step)
        return list(values) if len(values) <= _MOST_LISTED and not self.log else None

    def probes(self) -> list[Any]:
        """See `Uniform.probes`."""
        return self.listed() or [self.low, (self.low + self.high) // 2, self.high]


class Choice(StrictModel):
    """One of some values of any kind: numbers, names, whole sections. Written as a list for short."""

    kind: Literal["choice"] = "choice"
    values: tuple[Any, ...] = Field(min_length=1)

    def listed(self) -> list[Any] | None:
        """Every value."""
        return list(self.values)

    def probes(self) -> list[Any]:
        """Every value."""
        return list(self.values)


Space = Annotated[
    Annotated[Uniform | LogUniform | Integer | Choice, Field(discriminator="kind")], BeforeValidator(_short_form)
]


# --- who proposes settings, and who stops trials --------------------------------------------------------


class RandomSearch(StrictModel):
    """Independent draws from the space."""

    kind: Literal["random"] = "random"


class GridSearch(StrictModel):
    """Every combination of the values."""

    kind: Literal["grid"] = "grid"


class OptunaSearch(StrictModel):
    """Tree-structured Parzen estimator (Bergstra et al., NeurIPS 2011), by Optuna."""

    kind: Literal["optuna"] = "optuna"
    startup: int = Field(10, ge=1, description="random trials before the model proposes")
    multivariate: bool = Field(True, description="model parameters together (Falkner et al., ICML 2018)")


class BohbSearch(StrictModel):
    """BOHB (Falkner et al., ICML 2018): HyperBand whose settings come from a multivariate Parzen estimator.

    The estimator is Optuna's: HpBandSter, the authors' package, has had no release for years.
    """

    kind: Literal["bohb"] = "bohb"
    startup: int = Field(6, ge=1, description="random trials before the model proposes")


Searcher = Annotated[
    Annotated[RandomSearch | GridSearch | OptunaSearch | BohbSearch, Field(discriminator="kind")],
    BeforeValidator(_short_form),
]


class NoScheduler(StrictModel):
    """Every trial runs to its end."""

    kind: Literal["none"] = "none"


class Asha(StrictModel):
    """Asynchronous successive halving (Li et al., MLSys 2020): at rungs a trial outside the best 1 / reduction stops."""

    kind: Literal["asha"] = "asha"
    grace_steps: int = Field(ge=1, description="optimizer steps of the first rung; the next are reduction times as far")
    reduction: float = Field(3.0, gt=1)


class HyperBand(StrictModel):
    """HyperBand (Li et al., JMLR 2018): brackets of trials that are halved together; who waits is paused."""

    kind: Literal["hyperband"] = "hyperband"
    first_steps: int = Field(ge=1, description="optimizer steps of the smallest budget; checkpoints are that far apart")
    reduction: float = Field(3.0, gt=1)


class Pbt(StrictModel):
    """Population-based training (Jaderberg et al., 2017): the worst take over the best's weights and changed settings."""

    kind: Literal["pbt"] = "pbt"
    interval_steps: int = Field(ge=1, description="optimizer steps between two comparisons; each saves a checkpoint")
    quantile: float = Field(0.25, gt=0, le=0.5, description="share of the population that is replaced, and copied from")
    resample: float = Field(
        0.25, ge=0, le=1, description="chance that a setting is drawn anew instead of changed a bit"
    )
    factors: tuple[float, float] = Field((1.2, 0.8), description="numbers are multiplied by one of them")
    synchronous: bool = Field(
        False,
        description="all wait for each other at every comparison: the same result whatever the timing, but slower",
    )


Scheduler = Annotated[
    Annotated[NoScheduler | Asha | HyperBand | Pbt, Field(discriminator="kind")], BeforeValidator(_short_form)
]


class SearchConfig(StrictModel):
    """Spaces over fields of the job, how they are searched, and what is best."""

    space: dict[str, Space] = Field(min_length=1, description="dotted field of the job -> where its values come from")
    metric: str = Field(min_length=1, description="what trials are compared by, as reports and MLflow name it")
    goal: Literal["max", "min"] = "max"
    searcher: Searcher = RandomSearch()
    scheduler: Scheduler = NoScheduler()
    trials: int | None = Field(None, ge=1, description="how many; a grid knows for itself")
    concurrent: int | None = Field(None, ge=1, description="trials at once; empty: as many as the cluster holds")
    minutes: float | None = Field(None, gt=0, description="after that no trial goes on; the best finished one counts")
    max_failed: int = Field(3, ge=0, description="trials that may fail before the search stops")
    engine: Literal["auto", "workers", "in_process"] = Field(
        "auto", description="in_process trains in the trial's own process, without Ray workers; auto: for one worker"
    )
    seed: int = Field(0, ge=0, lt=2**31, description="of the proposals; the job's own seed is the same in all trials")

    @model_validator(mode="after")
    def _fits_together(self) -> SearchConfig:
        searcher, scheduler = self.searcher.kind, self.scheduler.kind
        if searcher == "grid":
            if self.trials is not None:
                raise ValueError("trials: a grid runs every combination once; leave trials out")
            for path, space in self.space.items():
                if space.listed() is None:
                    raise ValueError(
                        f"space.{path}: a grid needs a few values, and {space.kind} has too many; list them, or give a step"
                    )
        elif self.trials is None:
            raise ValueError("trials: say how many trials to run, for example trials: 20")
        if searcher == "bohb" and scheduler != "hyperband":
            raise ValueError(
                "scheduler: bohb is HyperBand with proposals from a model; write scheduler: {kind: hyperband, first_steps: 50}"
            )
        if scheduler == "hyperband" and searcher == "optuna":
            raise ValueError("searcher: optuna with hyperband is bohb; write searcher: bohb")
        if scheduler == "pbt" and (searcher != "random" or (self.trials or 0) < 2):
            raise ValueError(
                "scheduler: pbt starts from a random population of two or more: searcher: random, trials: 4"
            )
        return self

    def grid(self) -> Iterator[dict[str, Any]]:
        """Every combination of a grid, by field."""
        listed = [space.listed() or [] for space in self.space.values()]
        for values in itertools.product(*listed):
            yield dict(zip(self.space, values, strict=True))

    @property
    def total(self) -> int:
        """Trials of the search."""
        return self.trials or math.prod(len(space.listed() or []) for space in self.space.values())

    @property
    def pauses(self) -> bool:
        """Whether a trial may have to go on from another place: it then reports with checkpoints."""
        return self.scheduler.kind in ("pbt", "hyperband")

    @property
    def report_steps(self) -> int:
        """Optimizer steps between two checkpoints of such a trial; 0 for the others."""
        match self.scheduler:
            case Pbt():
                return self.scheduler.interval_steps
            case HyperBand():
                return self.scheduler.first_steps
            case _:
                return 0
