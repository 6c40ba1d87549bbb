"""Which samples to buy: the game's closed form against a linear program, its invariances, the sampler."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy.optimize import linprog

from labelmill.errors import DataError
from labelmill.evaluation.query_game import choose, draw, solve

G = np.array([1, 0.8, 0.5, 0.4, 0.1])


@pytest.mark.parametrize(
    ("spoiled", "cost", "size", "value", "q"),
    [
        (0, 1, 1, 1.0, [1, 0, 0, 0, 0]),
        (1, 1, 3, 8 / 17, [4 / 17, 5 / 17, 8 / 17, 0, 0]),
        (2, 1, 4, 8 / 27, [4 / 27, 5 / 27, 8 / 27, 10 / 27, 0]),
        (3, 1, 4, 4 / 27, None),
        (1, 2, 4, 8 / 27, None),
        (2, 2, 5, 0.05970149253731343, None),
    ],
)
def test_known_games(spoiled: int, cost: float, size: int, value: float, q: list[float] | None) -> None:
    game = solve(G, spoiled, cost)
    assert game.size == size
    assert game.value == pytest.approx(value)
    if q:
        assert game.q.tolist() == pytest.approx(q)
    assert game.q.sum() == pytest.approx(1)
    prey = (game.q * G)[game.q > 0]
    assert np.ptp(prey) < 1e-12, "every chosen sample is equally good a prey"


def worst(q: np.ndarray, g: np.ndarray, spoiled: int, cost: float = 1.0) -> float:
    v = q * g
    return min(v.sum() - cost * v[list(s)].sum() for s in itertools.combinations(range(len(g)), spoiled))


def test_alternatives_and_symmetries() -> None:
    assert worst(np.array([0.5, 0.5, 0, 0, 0]), G, 1) == pytest.approx(0.4)
    assert worst(np.full(5, 0.2), G, 1) == pytest.approx(0.36)
    assert worst(solve(G, 1).q, G, 1) == pytest.approx(8 / 17)
    assert solve(np.ones(6), 2).value == pytest.approx(2 / 3)
    assert solve(np.ones(6), 2).q.tolist() == pytest.approx([1 / 6] * 6)
    assert solve(7 * G, 1).q.tolist() == pytest.approx(solve(G, 1).q.tolist())
    assert solve(7 * G, 1).value == pytest.approx(7 * 8 / 17)
    order = np.array([3, 0, 4, 2, 1])
    assert solve(G[order], 2).q.tolist() == pytest.approx(solve(G, 2).q[order].tolist())


def test_closed_form_is_the_linear_programs_optimum() -> None:
    rng = np.random.default_rng(0)
    for _ in range(60):
        n = int(rng.integers(2, 9))
        g, m = rng.uniform(0.05, 1, n), int(rng.integers(0, n))
        cost = float(rng.choice([1.0, 1.5, 2.0]))
        # max sum q g - cost (m l + sum w), w_i >= q_i g_i - l, w >= 0: variables q, l, w
        objective = np.concatenate([-g, [cost * m], np.full(n, cost)])
        above = np.hstack([np.diag(g), -np.ones((n, 1)), -np.eye(n)])
        bounds = [(0, None)] * n + [(None, None)] + [(0, None)] * n
        total = np.concatenate([np.ones(n), np.zeros(n + 1)])[None]
        found = linprog(objective, above, np.zeros(n), total, [1.0], bounds)
        if -found.fun < 1e-9:
            continue
        assert solve(g, m, cost).value == pytest.approx(-found.fun, abs=1e-9)


def test_sampler() -> None:
    game = solve(G, 2)
    rng = np.random.default_rng(0)
    first = np.bincount([draw(game.q, 1, rng)[0] for _ in range(4000)], minlength=5) / 4000
    np.testing.assert_allclose(first, game.q, atol=0.03)
    places, found = choose(G, 0.4, 4, rng)
    assert places.tolist() == [0, 1, 2, 3]
    assert found.size == 4
    assert choose(G, 0.4, 5, rng)[0].tolist() == [0, 1, 2, 3, 4], "more than have a chance: all of them, then the rest"
    assert len(set(choose(rng.uniform(size=100), 0.25, 30, rng)[0].tolist())) == 30


def test_what_is_refused() -> None:
    with pytest.raises(DataError, match="no positive play"):
        solve(G, 5)
    assert solve(G, 5, allow_uniform=True).fallback
    with pytest.raises(DataError, match="first at place 1"):
        solve(np.array([1, np.nan]), 0)
    with pytest.raises(DataError, match="6 samples asked for, the pool has 5"):
        choose(G, 0.1, 6, np.random.default_rng(0))
    with pytest.raises(DataError, match="have a chance"):
        draw(np.array([1.0, 0]), 2, np.random.default_rng(0))
