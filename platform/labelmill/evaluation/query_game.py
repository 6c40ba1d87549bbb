"""Which samples to ask a fallible teacher about: a game against an adversary who may spoil m of its answers.

After Baykal et al., Robust Active Distillation (ICLR 2023, arXiv 2210.01213); the game and its solution are reconstructed and
checked against a linear program.

Shape legend: n samples of the pool.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from labelmill.errors import DataError


@dataclass(frozen=True)
class Game:
    """The solution.

    Attributes:
        q: float64 (n,), the probability of each sample; 0 below the cut.
        size: k*, how many samples have a chance.
        value: what the worst adversary leaves.
        fallback: no play gains anything; q is uniform.
    """

    q: np.ndarray
    size: int
    value: float
    fallback: bool = False


def solve(gain: np.ndarray, spoiled: float, cost: float = 1.0, allow_uniform: bool = False) -> Game:
    """max over q of min over |S| = m of sum q g - cost * sum over S of q g, in closed form.

    With g descending and H_k = sum_{i <= k} 1/g_i: k* = argmax (k - cost m) / H_k, q_i = 1 / (g_i H_k*) for i <= k*. All chosen
    samples are equally good a prey; the less informative of them are drawn more often. m = 0 takes the most informative
    sample alone. A cost of 1 is an answer that is lost, 2 one that does as much harm as a right one does good.

    Raises DataError for gains that are negative or not finite, or when the adversary leaves nothing (unless `allow_uniform`).
    """
    if len(gain) == 0:
        raise DataError("the pool is empty.")
    wrong = ~np.isfinite(gain) | (gain < 0)
    if wrong.any():
        raise DataError(
            f"{np.count_nonzero(wrong)} gains are negative or not finite; the first at place {int(wrong.argmax())}."
        )
    if spoiled < 0 or cost < 1:
        raise DataError("the number of spoiled answers must not be negative, and cost not below 1.")
    order = np.argsort(-gain, kind="stable")
    g = np.maximum(gain[order].astype(np.float64), 1e-6)
    total = np.cumsum(1.0 / g)
    k = np.arange(1, len(g) + 1)
    value_k = np.where(k >= spoiled, (k - cost * spoiled) / total, -np.inf)
    best = int(value_k.argmax())
    if value_k[best] <= 0:
        if not allow_uniform:
            raise DataError(
                f"no positive play: with {spoiled:.0f} of {len(g)} answers spoiled the teacher is no better than an adversary."
            )
        return Game(np.full(len(g), 1.0 / len(g)), len(g), 0.0, True)
    q = np.zeros(len(g))
    q[order[: best + 1]] = 1.0 / (g[: best + 1] * total[best])
    return Game(q, best + 1, float(value_k[best]))


def draw(q: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """`count` samples without replacement, weights q: those with the smallest E / q, E exponential. Sorted places.

    Raises DataError when fewer have a chance.
    """
    if count > np.count_nonzero(q):
        raise DataError(f"{count} samples asked for, {np.count_nonzero(q)} have a chance.")
    with np.errstate(divide="ignore"):
        key = rng.exponential(size=len(q)) / q
    return np.sort(np.argpartition(key, count - 1)[:count]) if count else np.empty(0, np.int64)


def choose(
    gain: np.ndarray, spoiled_share: float, count: int, rng: np.random.Generator, cost: float = 1.0
) -> tuple[np.ndarray, Game]:
    """`count` places of the pool by the game; where it gives fewer a chance, all of them and the game again on the rest.

    `spoiled_share` is the teacher's error rate. Returns the places, sorted, and the first game. Raises DataError for a
    count beyond the pool.
    """
    if count > len(gain):
        raise DataError(f"{count} samples asked for, the pool has {len(gain)}.")
    left, taken, first = np.arange(len(gain)), [], None
    while count:
        game = solve(gain[left], spoiled_share * len(left), cost, allow_uniform=True)
        first = first or game
        some = np.flatnonzero(game.q) if np.count_nonzero(game.q) <= count else draw(game.q, count, rng)
        taken.append(left[some])
        count -= len(some)
        left = np.delete(left, some)
    assert first is not None
    return np.sort(np.concatenate(taken)), first
