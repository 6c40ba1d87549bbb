"""The errors a person can mend. Everything else is a failure of the program.

A `UserError` ends a command with exit code 2 and one paragraph: what was wrong, where (file, field, sample
key) and what to write instead. It is raised before any worker starts wherever that is possible.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator


class UserError(Exception):
    """Something the user can mend; the message says how."""


class JobError(UserError):
    """The job file, an override or a field of it is wrong."""


class DataError(UserError):
    """Shards, labels or a manifest are wrong or missing."""


class ClusterError(UserError):
    """The cluster can't run the job as described."""


class TrackingError(UserError):
    """The tracking server or the registry doesn't answer or doesn't hold what was asked."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`" Did you mean 'x'?"`, or `" Known: a, b."` when nothing is near."""
    names = sorted(known)
    near = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    if near:
        return f" Did you mean {near[0]!r}?"
    shown = ", ".join(names[:30]) + (", ..." if len(names) > 30 else "")
    return f" Known: {shown}." if names else ""


def errors_behind(error: BaseException | None) -> Iterator[BaseException]:
    """An exception that crossed processes, its causes, and per-worker failures with theirs."""
    seen: set[int] = set()
    waiting = [error]
    while waiting:
        item = waiting.pop()
        if item is None or id(item) in seen:
            continue
        seen.add(id(item))
        yield item
        waiting += [item.__cause__, item.__context__, getattr(item, "cause", None)]
        failures = getattr(item, "worker_failures", None)
        waiting += list(failures.values()) if isinstance(failures, dict) else []


def user_error_in(error: BaseException | None) -> UserError | None:
    """The `UserError` behind an exception that crossed processes."""
    for item in errors_behind(error):
        if isinstance(item, UserError):
            # Ray makes exceptions of two classes at once; hand on the plain one
            return next((c for c in type(item).__mro__ if c.__module__ == __name__), UserError)(_message(item))
    return None


def _message(error: UserError) -> str:
    cause = getattr(error, "cause", None)
    return str(cause) if isinstance(cause, UserError) else str(error)
