"""Several streams as one: which source each position belongs to, as a pure function of the position.

Weights become small whole shares. Each period of P = sum(shares) positions holds every source exactly its share, so the
proportions are exact in every period, and a mixed stream resumes from one integer like a plain one: `local` gives every
source's own cursor. A source has positions of its own without an end; when it is shorter than the others it goes on into
its next epoch.

Shape legend: K sources, P positions of a period, B positions asked for.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from fractions import Fraction
from functools import cached_property
from math import gcd, isfinite, lcm

import numpy as np

from labelmill.data.plan import MIX_ORDER, philox
from labelmill.errors import DataError


class Mix:
    """The interleaving of K sources.

    Args:
        weights: positive numbers, one for each source, in any unit.
        seed: None spreads each source evenly: at any position a source is less than one sample away from its exact
            proportion (Tijdeman 1980, The chairman assignment problem). A number shuffles each period by that seed.
        max_period: longest period. Weights whose exact shares need a longer one are rounded to it by largest remainder;
            `describe` says what is used.

    Raises DataError: no weight, a weight that isn't positive and finite, or too small for one place in a period.
    """

    def __init__(self, weights: Sequence[float | Fraction], seed: int | None = None, max_period: int = 10_000) -> None:
        self.weights, self.seed = tuple(weights), seed
        self.shares = whole_shares(self.weights, max_period)
        self.period = sum(self.shares)

    @property
    def proportions(self) -> tuple[float, ...]:
        """The share of each source that is really used."""
        return tuple(share / self.period for share in self.shares)

    @property
    def exact(self) -> bool:
        """Whether the shares are in exactly the proportions of the weights."""
        exact = [_fraction(weight) for weight in self.weights]
        return all(share * sum(exact) == weight * self.period for share, weight in zip(self.shares, exact, strict=True))

    def describe(self) -> str:
        """What is used, for a log or a report: `7 + 3 of every 10 samples (70%, 30%)`."""
        percent = ", ".join(f"{100 * p:.4g}%" for p in self.proportions)
        rounded = "" if self.exact else f", rounded from weights {', '.join(map(str, self.weights))}"
        return f"{' + '.join(map(str, self.shares))} of every {self.period} samples ({percent}{rounded})"

    @cached_property
    def digest(self) -> str:
        """sha256 (hex) of the interleaving: a mixed cursor is valid for one digest only."""
        return hashlib.sha256(json.dumps(["mix", 1, self.shares, self.seed]).encode()).hexdigest()

    def source_of(self, positions: np.ndarray) -> np.ndarray:
        """The source of each global position (B,): int64 (B,). Positions are >= 0, in any order."""
        period_B, place_B = np.divmod(np.asarray(positions, dtype=np.int64), self.period)
        if self.seed is None:
            return self._pattern[place_B]
        found = np.empty(place_B.shape, np.int64)
        for period in np.unique(period_B).tolist():
            here = period_B == period
            found[here] = self._period(period)[place_B[here]]
        return found

    def local(self, position: int) -> np.ndarray:
        """Cursors of the sources at global `position`: int64 (K,), samples that each has given before it."""
        period, place = divmod(position, self.period)
        before = np.bincount(self._period(period)[:place], minlength=len(self.shares))
        return period * np.array(self.shares, np.int64) + before

    def ranges(self, start: int, stop: int) -> np.ndarray:
        """Each source's own positions `[a, b)` that the global `[start, stop)` is made of: int64 (K, 2)."""
        return np.stack([self.local(start), self.local(stop)], axis=1)

    def order(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """The interleaving of `[start, stop)`: the source, int64 (B,), and its own position, int64 (B,), at each place."""
        whole = np.arange(start // self.period, -(-stop // self.period))
        parts = [self._period(period) for period in whole.tolist()] or [np.empty(0, np.int64)]
        skip = start % self.period
        source_B = np.concatenate(parts)[skip : skip + max(0, stop - start)]
        local_B = np.empty(len(source_B), np.int64)
        for k, first in enumerate(self.local(start).tolist()):
            mine = source_B == k
            local_B[mine] = np.arange(first, first + int(np.count_nonzero(mine)))
        return source_B, local_B

    @cached_property
    def _pattern(self) -> np.ndarray:
        return spread(self.shares)

    def _period(self, period: int) -> np.ndarray:
        """The sources of a period, in order: int64 (P,)."""
        return self._pattern if self.seed is None else philox(self.seed, MIX_ORDER, period).permutation(self._pattern)


def whole_shares(weights: Sequence[float | Fraction], max_period: int) -> tuple[int, ...]:
    """Weights as whole numbers without a common divisor whose sum is at most `max_period`.

    Numbers are taken as they are written: 0.7 and 0.3 are 7 and 3. Raises DataError as `Mix`.
    """
    exact = [_fraction(weight) for weight in weights]
    if not exact:
        raise DataError("a mix needs a weight for each of its streams; there is none.")
    whole = [int(w * lcm(*(v.denominator for v in exact))) for w in exact]
    common = gcd(*whole)
    whole = [w // common for w in whole]
    if (total := sum(whole)) <= max_period:
        return tuple(whole)
    divided = [divmod(w * max_period, total) for w in whole]
    shares = [share for share, _ in divided]
    for k in sorted(range(len(shares)), key=lambda k: -divided[k][1])[: max_period - sum(shares)]:
        shares[k] += 1
    if 0 in shares:
        raise DataError(
            f"weight {weights[shares.index(0)]} of a mix is less than one in {max_period} samples. Leave that stream "
            "out, or give it a larger weight."
        )
    common = gcd(*shares)
    return tuple(share // common for share in shares)


def _fraction(weight: float | Fraction) -> Fraction:
    if isinstance(weight, bool) or not isfinite(weight) or weight <= 0:
        raise DataError(f"weight {weight} of a mix: weights are positive numbers, such as 0.7 or 3.")
    # by way of text: what was written, not its neighbour among the binary fractions
    return weight if isinstance(weight, Fraction) else Fraction(str(weight))


def spread(shares: Sequence[int]) -> np.ndarray:
    """A period with each source `shares[k]` times, spread evenly: int64 (P,).

    Tijdeman's rule. With n = 2 (K - 1) and the debt d_k = s_k t / P - x_k of source k at place t = 1 ... P, x_k being the
    places it has got, the place goes to the source with d_k >= 1/n whose debt is the first to reach 1 - 1/n. All debts
    then stay between -1 and 1. Debts are kept in units of 1/(n P), so that they are whole numbers.
    """
    share_K, period = np.array(shares, np.int64), sum(shares)
    if len(shares) == 1:
        return np.zeros(period, np.int64)
    n = 2 * (len(shares) - 1)
    debt_K = np.zeros(len(shares), np.int64)
    found = np.empty(period, np.int64)
    for t in range(period):
        debt_K += n * share_K
        left_K = (period * (n - 1) - debt_K) / share_K
        left_K[debt_K < period] = np.inf
        found[t] = k = int(left_K.argmin())
        debt_K[k] -= n * period
    return found
