"""Ray Tune's searchers and schedulers as a job's `search` section names them."""

from __future__ import annotations

from typing import Any

from labelmill.errors import JobError
from labelmill.search_config import Asha, BohbSearch, HyperBand, OptunaSearch, Pbt, SearchConfig
from labelmill.tuning.space import domain, mutation

VALUE, STEP, BUDGET = "value", "step", "budget"
"""Keys of a result: the metric, optimizer steps, and steps in units of HyperBand's smallest budget."""


def scheduler(search: SearchConfig, steps: int | None) -> Any:
    """The trial scheduler; `steps` are the optimizer steps of a trial, where they are known beforehand."""
    from ray.tune import schedulers

    kind = search.scheduler
    match kind:
        case Asha():
            # rungs reach as far as any trial; a trial on its last rung is left to end
            most = steps or kind.grace_steps * int(kind.reduction**12)
            return schedulers.ASHAScheduler(
                time_attr=STEP,
                max_t=max(most, kind.grace_steps),
                grace_period=kind.grace_steps,
                reduction_factor=kind.reduction,
                stop_last_trials=False,
            )
        case HyperBand():
            assert steps is not None
            of = schedulers.HyperBandForBOHB if search.searcher.kind == "bohb" else schedulers.HyperBandScheduler
            return of(
                time_attr=BUDGET,
                max_t=max(1, steps // kind.first_steps),
                reduction_factor=kind.reduction,
                stop_last_trials=False,
            )
        case Pbt():
            return schedulers.PopulationBasedTraining(
                time_attr=STEP,
                perturbation_interval=kind.interval_steps,
                hyperparam_mutations={path: mutation(space) for path, space in search.space.items()},
                quantile_fraction=kind.quantile,
                resample_probability=kind.resample,
                perturbation_factors=kind.factors,
                log_config=False,
            )
    return schedulers.FIFOScheduler()


def searcher(search: SearchConfig) -> Any:
    """The search algorithm; None where Tune draws from the space itself.

    Raises JobError when its package isn't installed.
    """
    from ray.tune.search import BasicVariantGenerator

    kind = search.searcher
    if not isinstance(kind, OptunaSearch | BohbSearch):
        # PBT takes no search algorithm at all; its draws follow the global seed
        return None if isinstance(search.scheduler, Pbt) else BasicVariantGenerator(random_state=search.seed)
    try:
        import optuna
    except ImportError:
        raise JobError(
            f"search.searcher: {kind.kind} needs the package optuna; `pip install 'labelmill[search]'` brings it."
        ) from None
    from ray.tune.search.optuna import OptunaSearch as RayOptuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    sampler = optuna.samplers.TPESampler(
        n_startup_trials=kind.startup,
        multivariate=kind.kind == "bohb" or kind.multivariate,
        constant_liar=True,  # trials that run at once are not to be the same
        seed=search.seed,
        warn_independent_sampling=False,
    )
    if isinstance(kind, OptunaSearch):
        return RayOptuna(sampler=sampler)
    return _bohb(RayOptuna)(sampler=sampler)


def _bohb(base: type) -> type:
    """Optuna's Parzen estimator as the model of BOHB.

    It ranks unfinished trials by their value at the largest budget they reached, as BOHB does. HpBandSter, the authors'
    package, has had no release since 2018.
    """

    class Bohb(base):  # type: ignore[misc]
        def on_pause(self, trial_id: str) -> None:
            """A trial waits for the others of its bracket; proposals don't depend on it."""

        def on_unpause(self, trial_id: str) -> None:
            """It goes on."""

    return Bohb


def param_space(search: SearchConfig) -> dict[str, Any]:
    """What Tune draws for every trial, by dotted field."""
    from ray import tune

    if search.searcher.kind == "grid":
        return {path: tune.grid_search(_grid_draws(space)) for path, space in search.space.items()}
    return {path: domain(space) for path, space in search.space.items()}


def _grid_draws(space: Any) -> list[Any]:
    listed = space.listed() or []
    return list(range(len(listed))) if space.kind == "choice" else listed
