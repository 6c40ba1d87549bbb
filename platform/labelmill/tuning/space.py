"""Spaces as Ray Tune samples them, and sampled values as a job takes them.

A choice is searched by the index of its value, so that a value may be anything that a job file can hold.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Mapping
from typing import Any

from labelmill.job import set_field
from labelmill.search_config import Choice, Integer, LogUniform, SearchConfig, Space, Uniform


def domain(space: Space) -> Any:
    """What Tune draws from; `value_of` makes the job's value of it."""
    from ray import tune

    match space:
        case LogUniform():
            return tune.loguniform(space.low, space.high)
        case Integer(log=True):
            return tune.lograndint(space.low, space.high + 1)
        case Integer(step=1):
            return tune.randint(space.low, space.high + 1)
        case Choice():
            return tune.choice(list(range(len(space.values))))
    half = (space.step or 0) / 2  # with steps, the first and the last value are as likely as the others
    return tune.uniform(space.low - half, _last(space) + half)


def mutation(space: Space) -> Any:
    """What PBT changes a drawn value by: a list is walked along, a domain's number is multiplied."""
    return list(range(len(space.values))) if isinstance(space, Choice) else domain(space)


def draw(space: Space, rng: random.Random) -> Any:
    """A value of the space, to look at before a search: every one is possible, none is proposed to Tune."""
    match space:
        case LogUniform():
            return min(space.high, space.low * (space.high / space.low) ** rng.random())
        case Integer():
            return rng.randrange(space.low, space.high + 1, space.step)
        case Choice():
            return rng.choice(space.values)
    return value_of(space, rng.uniform(space.low, space.high))


def value_of(space: Space, drawn: Any) -> Any:
    """The job's value of what was drawn from `domain`; what PBT pushed out of the space is brought to its edge."""
    match space:
        case Choice():
            return space.values[min(max(round(drawn), 0), len(space.values) - 1)]
        case Integer():
            steps = round((min(max(drawn, space.low), _last(space)) - space.low) / space.step)
            return space.low + space.step * steps
    number = min(max(float(drawn), space.low), _last(space))
    if isinstance(space, Uniform) and space.step:
        return space.low + space.step * round((number - space.low) / space.step)
    return number


def _last(space: Uniform | LogUniform | Integer) -> Any:
    """The highest value, which with steps may be below `high`."""
    if isinstance(space, LogUniform) or not space.step:
        return space.high
    return space.low + space.step * int((space.high - space.low) / space.step + 1e-9)


def values_of(search: SearchConfig, drawn: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted field -> value of the job, for the settings of a trial."""
    return {path: value_of(space, drawn[path]) for path, space in search.space.items()}


def with_values(raw: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """An unvalidated job with the values of a trial in it, and no `search` section."""
    changed = copy.deepcopy({key: value for key, value in raw.items() if key != "search"})
    for path, value in values.items():
        set_field(changed, path, copy.deepcopy(value), f"search.space.{path}")
    return changed
