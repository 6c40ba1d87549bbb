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
                synch=kind.synchronous,
            )
    return schedulers.FIFOScheduler()


def searcher(search: SearchConfig, at_once: int) -> Any:
    """The search algorithm, for `at_once` trials at a time.

    Raises JobError when its package isn't installed.
    """
    from ray.tune.search import BasicVariantGenerator

    kind = search.searcher
    if not isinstance(kind, OptunaSearch | BohbSearch):
        # Tune's own max_concurrent_trials is ignored beside a generator that was made here
        return BasicVariantGenerator(max_concurrent=at_once, random_state=search.seed)
    try:
        import optuna
    except ImportError:
        raise JobError(
            f"search.searcher: {kind.kind} needs the package optuna; `pip install 'labelmill[search]'` brings it."
        ) from None
    from labelmill.tuning.parzen import Parzen

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    sampler = optuna.samplers.TPESampler(
        n_startup_trials=kind.startup,
        multivariate=isinstance(kind, BohbSearch) or kind.multivariate,
        constant_liar=True,  # trials that run at once are not to be the same
        seed=search.seed,
    )
    return Parzen(sampler=sampler)


def param_space(search: SearchConfig) -> dict[str, Any]:
    """What Tune draws for every trial, by dotted field."""
    from ray import tune

    if search.searcher.kind == "grid":
        return {path: tune.grid_search(_grid_draws(space)) for path, space in search.space.items()}
    return {path: domain(space) for path, space in search.space.items()}


def _grid_draws(space: Any) -> list[Any]:
    listed = space.listed() or []
    return list(range(len(listed))) if space.kind == "choice" else listed
