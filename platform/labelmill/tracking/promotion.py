"""Which version is the champion, and why: promotion by a rule, rollback, comparison, lineage.

The registered model's tag `labelmill.champions` lists the versions that were champion, oldest first; alias `previous`
points at the one before. A registry has no compare-and-set, so two people who promote at the same moment both succeed,
the later one last.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from labelmill.errors import TrackingError
from labelmill.job import TrackingConfig
from labelmill.tracking import rules
from labelmill.tracking.config import Store, client_env
from labelmill.tracking.registry import (
    CANDIDATE,
    CHAMPION,
    CHAMPIONS,
    PREVIOUS,
    REVOKED,
    ModelVersion,
    champions,
    crown,
    load_version,
)

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class Decision:
    """What `promote_if` came to.

    Attributes:
        version: that was to be promoted.
        champion: the champion's version before; None without one.
        outcomes: the rule's comparisons with their numbers.
        promoted: whether the champion is `version` now.
        notes: what to read the numbers with.
    """

    version: int
    champion: int | None
    outcomes: list[rules.Outcome]
    promoted: bool
    notes: list[str] = field(default_factory=list)


def promote_if(
    config: TrackingConfig, output_dir: str | Path, name: str, rule: str, version_or_alias: str | int = CANDIDATE
) -> Decision:
    """Makes a version the champion if a rule (tracking/rules.py) holds; changes nothing if it doesn't.

    Raises RuleError for a rule that can't be read or a metric that isn't there, TrackingError for an unknown name,
    version or alias.
    """
    parsed = rules.parse(rule)
    with client_env(Store.of(config, output_dir)) as client:
        wanted = str(version_or_alias)
        mine = load_version(client, f"{name}/{wanted}" if wanted.isdigit() else f"{name}@{wanted}")
        aliases = {alias: int(v) for alias, v in client.get_registered_model(name).aliases.items()}
        champion = aliases.get(CHAMPION)
        if champion == mine.version:
            return Decision(mine.version, champion, [], True, [f"version {champion} is the champion already"])
        others: dict[str, ModelVersion | None] = {}
        for who in sorted(parsed.who):
            number = int(who) if who.isdigit() else aliases.get(who)
            others[who] = None if number is None else load_version(client, f"{name}/{number}")
        metrics = {who: None if other is None else other.metrics for who, other in others.items()}
        outcomes = rules.evaluate(parsed, mine.metrics, metrics, f"version {mine.version}")
        notes = [note for other in others.values() if other is not None for note in _unlike_tests(mine, other)]
        holds = all(outcome.holds for outcome in outcomes)
        if holds:
            crown(client, name, mine.version)
            client.set_model_version_tag(name, str(mine.version), "labelmill.rule", parsed.text)
        return Decision(mine.version, champion, outcomes, holds, notes)


def rollback(config: TrackingConfig, output_dir: str | Path, name: str) -> tuple[int, int]:
    """Makes the champion before the present one champion again; returns (version that fell, version that came back).

    `previous` then points at the champion before that, so that a second rollback goes one further back. Versions deleted
    since are passed over. Raises TrackingError when there is nothing to go back to.
    """
    with client_env(Store.of(config, output_dir)) as client:
        load_version(client, name)  # an unknown name is named with what there is
        model = client.get_registered_model(name)
        if CHAMPION not in model.aliases:
            raise TrackingError(
                f"registered model {name!r} has no champion; `labelmill models promote {name}` makes one."
            )
        fallen = int(model.aliases[CHAMPION])
        past = champions(model)
        if past and past[-1] == fallen:
            past.pop()
        elif PREVIOUS in model.aliases:  # the alias was moved by other hands: the list is no longer the truth
            past = [int(model.aliases[PREVIOUS])]
        versions = client.search_model_versions(f"name = '{name}'")
        alive = {int(v.version) for v in versions if REVOKED not in v.tags}
        past = [version for version in past if version in alive and version != fallen]
        if not past:
            raise TrackingError(f"registered model {name!r}: no champion before version {fallen} to go back to.")
        back = past[-1]
        client.set_registered_model_alias(name, CHAMPION, str(back))
        client.set_registered_model_tag(name, CHAMPIONS, " ".join(map(str, past)))
        if len(past) > 1:
            client.set_registered_model_alias(name, PREVIOUS, str(past[-2]))
        else:
            client.delete_registered_model_alias(name, PREVIOUS)
        when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        client.set_model_version_tag(name, str(fallen), "labelmill.rolled_back", f"{when} to version {back}")
    return fallen, back


def revoke(
    config: TrackingConfig, output_dir: str | Path, ref: str, champion: str | int | None = None, why: str = ""
) -> tuple[ModelVersion, int | None]:
    """Takes a version out of use for good: it is refused for prediction, serving and promotion. Its files stay.

    `champion` (a version or alias of the same model) becomes the champion first, in one call of the registry: at no moment
    is a revoked version the champion. The same call finishes what was killed. Aliases of the revoked version go.

    Returns (the version, the champion now). Raises TrackingError for an unknown reference, a champion that was
    revoked itself, or a version that is the champion when no other is named.
    """
    with client_env(Store.of(config, output_dir)) as client:
        old = load_version(client, ref)
        name = old.name
        if champion is not None:
            wanted = str(champion)
            new = load_version(client, f"{name}/{wanted}" if wanted.isdigit() else f"{name}@{wanted}")
            if new.version == old.version:
                raise TrackingError(f"{name}/{old.version} can't be revoked and be the champion as well.")
            crown(client, name, new.version)
        aliases = {alias: int(v) for alias, v in client.get_registered_model(name).aliases.items()}
        if aliases.get(CHAMPION) == old.version:
            raise TrackingError(
                f"{name}/{old.version} is the champion: name the version that takes its place "
                f"(labelmill models revoke {name}/{old.version} --champion VERSION)."
            )
        if not old.revoked:
            when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            client.set_model_version_tag(name, str(old.version), REVOKED, f"{when} {why}".strip())
        for alias, version in aliases.items():
            if version == old.version:
                client.delete_registered_model_alias(name, alias)
        return load_version(client, f"{name}/{old.version}"), aliases.get(CHAMPION)


# --- comparison and lineage -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """Two versions side by side.

    Attributes:
        metrics: (name, of the first, of the second); None where a run lacks it.
        params: those of the jobs that differ, likewise.
        notes: differences that make the numbers hard to compare.
    """

    first: ModelVersion
    second: ModelVersion
    metrics: list[tuple[str, float | None, float | None]]
    params: list[tuple[str, str | None, str | None]]
    notes: list[str]


def compare(config: TrackingConfig, output_dir: str | Path, first: str, second: str) -> Comparison:
    """Metrics and differing params of two versions, each a reference. Raises TrackingError for an unknown one."""
    with client_env(Store.of(config, output_dir)) as client:
        a, b = load_version(client, first), load_version(client, second)
        params = [_params(client, version.run_id) for version in (a, b)]
    names = sorted(a.metrics.keys() | b.metrics.keys())
    metrics = [(n, a.metrics.get(n), b.metrics.get(n)) for n in names]
    differ = [(n, params[0].get(n), params[1].get(n)) for n in sorted(params[0].keys() | params[1].keys())]
    return Comparison(a, b, metrics, [row for row in differ if row[1] != row[2]], _unlike_tests(a, b))


def _params(client: Any, run_id: str) -> dict[str, str]:
    from mlflow.exceptions import MlflowException

    try:
        return dict(client.get_run(run_id).data.params) if run_id else {}
    except MlflowException:  # the run was deleted; the version outlives it
        return {}


def _unlike_tests(a: ModelVersion, b: ModelVersion) -> list[str]:
    """A sentence for each kind of test data that the two runs don't share."""
    mine, its = ({d.context: d.digest for d in v.data if d.context not in ("train", "training")} for v in (a, b))
    contexts = [c for c in sorted(mine.keys() & its.keys()) if mine[c] != its[c]]
    return [
        f"the {c} data of versions {a.version} ({mine[c][:12]}) and {b.version} ({its[c][:12]}) differ"
        for c in contexts
    ]


def lineage(config: TrackingConfig, output_dir: str | Path, ref: str) -> list[tuple[int, ModelVersion]]:
    """A version and the models it was made from, nearest first, each with its distance; every version once.

    A parent that was deleted is left out. Raises TrackingError for an unknown reference.
    """
    with client_env(Store.of(config, output_dir)) as client:
        found: list[tuple[int, ModelVersion]] = []
        waiting, seen = [(0, load_version(client, ref))], set[str]()
        while waiting:
            depth, version = waiting.pop(0)
            if version.uri in seen:
                continue
            seen.add(version.uri)
            found.append((depth, version))
            for parent in version.parents:
                try:
                    waiting.append((depth + 1, load_version(client, parent)))
                except TrackingError:
                    continue
    return found


# --- for people -----------------------------------------------------------------------------------------------


def render_decision(name: str, decision: Decision, console: Console) -> None:
    """Prints the rule's comparisons with their numbers and what came of it."""
    from labelmill.tracking.report import format_cell

    for outcome in decision.outcomes:
        numbers = outcome.note or f"{format_cell(outcome.left)} and {format_cell(outcome.right)}"
        mark = "holds" if outcome.holds else "doesn't hold"
        console.print(f"{outcome.text}: {mark} ({numbers})", highlight=False, markup=False, soft_wrap=True)
    for note in decision.notes:
        console.print(f"note: {note}", highlight=False, markup=False, soft_wrap=True)
    if decision.promoted:
        text = f"{name}: champion is now version {decision.version}"
    else:
        kept = "there is no champion" if decision.champion is None else f"champion stays version {decision.champion}"
        text = f"{name}: version {decision.version} wasn't promoted; {kept}"
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def render_comparison(comparison: Comparison, console: Console) -> None:
    """Prints two versions side by side."""
    from rich.table import Table

    from labelmill.tracking.report import format_cell

    a, b = comparison.first, comparison.second
    heads = [f"{v.name}/{v.version}" + (f" ({', '.join(v.aliases)})" if v.aliases else "") for v in (a, b)]
    table = Table("metric", *heads, "change", box=None, header_style="bold", pad_edge=False)
    for name, left, right in comparison.metrics:
        change = "" if left is None or right is None else format_cell(right - left)
        if change and right is not None and left is not None and right > left:
            change = f"+{change}"
        table.add_row(name, format_cell(left), format_cell(right), change)
    console.print(table)
    if comparison.params:
        params = Table("param", *heads, box=None, header_style="bold", pad_edge=False)
        for name, *values in comparison.params:
            params.add_row(name, *("" if v is None else v for v in values))
        console.print(params)
    for note in comparison.notes:
        console.print(f"note: {note}", highlight=False, markup=False, soft_wrap=True)
