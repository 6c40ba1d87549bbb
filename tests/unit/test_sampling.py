"""Ownership, first rows and sampled classes depend on the job alone, never on the number of ranks."""

from __future__ import annotations

import itertools

import pytest
import torch

from labelmill.heads.sampling import block_size, class_range, initial_rows, sampled_blocks, sampled_classes


@pytest.mark.parametrize("num_classes", [1, 2, 63, 64, 1003, 100_003, 1_000_000])
@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_ranks_share_all_classes_in_whole_blocks(num_classes: int, world: int) -> None:
    ranges = [class_range(num_classes, 1024, rank, world) for rank in range(world)]
    assert ranges[0][0] == 0
    assert ranges[-1][1] == num_classes
    assert all(left[1] == right[0] for left, right in itertools.pairwise(ranges))
    size = block_size(num_classes, 1024)
    assert all(start % size == 0 or start == num_classes for start, _ in ranges)
    sizes = [stop - start for start, stop in ranges]
    assert max(sizes) - min(sizes) <= 2 * size
    if num_classes >= world:
        assert min(sizes) > 0


def test_blocks_are_small_for_few_classes() -> None:
    assert [block_size(c, 1024) for c in (1, 100, 6400, 10**6)] == [1, 1, 100, 1024]
    assert block_size(10**6, 64) == 64


@pytest.mark.parametrize("world", [2, 3])
def test_first_rows_do_not_depend_on_the_ranks(world: int) -> None:
    num_classes, dim = 1003, 8
    whole = initial_rows(num_classes, dim, 64, 0, num_classes, 5, 0.01, torch.float32)
    parts = []
    for rank in range(world):
        start, stop = class_range(num_classes, 64, rank, world)
        parts.append(initial_rows(num_classes, dim, 64, start, stop, 5, 0.01, torch.float32))
    assert torch.equal(torch.cat(parts), whole)
    assert whole.std().item() == pytest.approx(0.01, rel=0.05)
    assert whole.mean().item() == pytest.approx(0.0, abs=0.001)
    assert not torch.equal(initial_rows(num_classes, dim, 64, 0, num_classes, 6, 0.01, torch.float32), whole)
    double = initial_rows(num_classes, dim, 64, 0, num_classes, 5, 0.01, torch.float64)
    torch.testing.assert_close(double.float(), whole)


@pytest.mark.parametrize(("num_classes", "rate", "count"), [(1000, 0.1, 100), (1000, 1.0, 1000), (10, 0.001, 1)])
def test_sample_is_exact_distinct_and_sorted(num_classes: int, rate: float, count: int) -> None:
    drawn = sampled_classes(num_classes, rate, seed=3, step=4)
    assert drawn.dtype == torch.int64
    assert len(drawn) == count
    assert (drawn.diff() > 0).all()
    assert 0 <= int(drawn.min()) <= int(drawn.max()) < num_classes
    assert torch.equal(drawn, sampled_classes(num_classes, rate, seed=3, step=4))


def test_sample_changes_with_step_and_seed_and_is_uniform() -> None:
    hits = torch.zeros(50)
    for step in range(2000):
        hits[sampled_classes(50, 0.2, seed=1, step=step)] += 1
    # 2000 draws of share 0.2: standard deviation of a count is sqrt(2000 * 0.2 * 0.8) = 18
    assert (hits - 400).abs().max() < 5 * 18
    assert not torch.equal(sampled_classes(1000, 0.1, 1, 7), sampled_classes(1000, 0.1, 2, 7))


def test_every_rank_gets_its_share_of_the_drawn_blocks() -> None:
    for step in range(20):
        drawn = sampled_blocks(977, 0.1, seed=1, step=step)
        assert len(drawn) == 98
        assert abs(int((drawn < 488).sum()) - 49) <= 1


@pytest.mark.parametrize("rate", [0.35, 0.66, 0.9])
def test_sample_is_uniform_for_any_rate(rate: float) -> None:
    """Runs of unequal length: only the random turn of the ring makes every class equally likely."""
    hits = torch.zeros(20)
    for step in range(4000):
        hits[sampled_classes(20, rate, seed=2, step=step)] += 1
    share = round(rate * 20) / 20
    assert (hits / 4000 - share).abs().max() < 5 * (share * (1 - share) / 4000) ** 0.5
