"""The knapsack against the enumeration of all subsets, and on as many stages as a deep network has."""

from __future__ import annotations

import time
from itertools import combinations

import numpy as np
import pytest

from cka_probe.distill.knapsack import best_subset


def enumerated(worths: list[float], costs: list[int], limit: float) -> list[int]:
    """The best of all subsets: most worth, least cost; of equals the first, small sets before large ones."""
    subsets = [
        subset
        for size in range(1, len(worths) + 1)
        for subset in combinations(range(len(worths)), size)
        if sum(costs[index] for index in subset) <= limit
    ]
    return list(max(subsets, key=lambda s: (sum(worths[i] for i in s), -sum(costs[i] for i in s)), default=()))


@pytest.mark.parametrize("seed", range(60))
def test_it_is_the_best_of_all_subsets(seed: int) -> None:
    rng = np.random.default_rng(seed)
    count = int(rng.integers(1, 11))
    worths = rng.uniform(-0.2, 1.2, count).tolist()
    costs = rng.integers(0, 50, count).tolist()
    for share in (0.05, 0.3, 0.6, 1):
        assert best_subset(worths, costs, share * sum(costs)) == enumerated(worths, costs, share * sum(costs))


@pytest.mark.parametrize("seed", range(60))
def test_ties_go_to_the_cheapest_then_the_smallest_then_the_first(seed: int) -> None:
    rng = np.random.default_rng(seed)
    worths = (rng.integers(-1, 4, 8) / 4).tolist()  # sums of quarters have no round-off
    costs = rng.integers(0, 4, 8).tolist()
    for limit in (0, 3, 6.5, 100):
        assert best_subset(worths, costs, limit) == enumerated(worths, costs, limit)


def test_sums_that_differ_by_round_off_are_ties() -> None:
    assert 0.1 + 0.2 > 0.3
    assert best_subset([0.1, 0.2, 0.3], [2, 2, 3], 4) == [2]


def test_nothing_fits() -> None:
    assert best_subset([1, 2], [5, 6], 4) == []


@pytest.mark.parametrize("count", [24, 48])
@pytest.mark.parametrize("kind", ["random", "equal", "equal costs", "line", "alike"])
def test_deep_networks_are_quick(count: int, kind: str) -> None:
    rng = np.random.default_rng(count)
    worths = np.full(count, 0.3) if kind == "equal" else rng.uniform(0, 1, count)
    costs = np.full(count, 123_457) if kind in ("equal", "equal costs") else rng.integers(10**4, 10**7, count)
    if kind == "line":  # branches of one transformer block a stage that is left
        costs = 444_096 * np.maximum(np.arange(count)[::-1], 1) + 1930
    if kind == "alike":  # every stage of a trained pair is about as similar
        worths = rng.normal(0.02, 0.005, count)
    started = time.perf_counter()
    chosen = best_subset(worths.tolist(), costs.tolist(), 0.6 * costs.sum())
    assert time.perf_counter() - started < 1
    assert costs[chosen].sum() <= 0.6 * costs.sum()
    if kind.startswith("equal"):
        assert len(chosen) == int(0.6 * count)
