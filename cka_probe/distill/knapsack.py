"""The 0-1 knapsack, solved exactly: the items of the largest total worth that may cost so much together."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate
from typing import NamedTuple

_UNIT = 2.0**40
"""Worths are added as whole numbers of 2⁻⁴⁰, so that sums which differ by their round-off alone are ties."""


class _Set(NamedTuple):
    """Some of the items.

    Attributes:
        cost: of all.
        worth: of all, in units.
        size: how many.
        mask: a bit an item, the first item's the highest.
    """

    cost: int
    worth: int
    size: int
    mask: int

    @property
    def rank(self) -> tuple[int, int, int, int]:
        """Larger for the better set: more worth, then less cost, fewer items, earlier items."""
        return self.worth, -self.cost, -self.size, self.mask


def best_subset(worths: Sequence[float], costs: Sequence[int], limit: float) -> list[int]:
    """The items with the largest total worth among those sets, not empty, that cost at most ``limit``.

    Of sets of equal worth the cheapest is taken, of these one with the fewest items, of these the first in
    lexicographic order. Sets are built item by item, and one is dropped as soon as another costs no more and is worth
    no less (Nemhauser and Ullmann 1969), or as it cannot become better than what a greedy choice reaches. That leaves
    few, except where the worth of all items is in proportion to their cost, and all costs differ.

    Args:
        worths: of each item; finite.
        costs: of each item, 0 or more.
        limit: of the sum of costs.

    Returns:
        Their numbers from 0, ascending; none where every single item costs more.

    >>> best_subset([0.1, 0.5, 0.6, 0.2], [40, 30, 20, 10], 60)
    [1, 2, 3]
    """
    count = len(worths)
    items = [
        _Set(cost, round(worth * _UNIT), 1, 1 << (count - 1 - index))
        for index, (worth, cost) in enumerate(zip(worths, costs, strict=True))
        if cost <= limit
    ]
    useful = [item for item in items if item.worth > 0]
    if not useful:  # a second item would only take away from the first
        found = max(items, key=lambda item: item.rank, default=_Set(0, 0, 0, 0))
    else:
        found = _best(sorted(useful, key=_density, reverse=True), limit)
    return [index for index in range(count) if found.mask >> (count - 1 - index) & 1]


def _best(items: Sequence[_Set], limit: float) -> _Set:
    """The best set of items that are all worth something, the densest first."""
    costs: list[int]
    worths: list[int]
    costs, worths = (
        [0, *accumulate(values)] for values in zip(*((item.cost, item.worth) for item in items), strict=True)
    )
    reached = _greedy(items, limit)

    def most(chosen: _Set, after: int) -> int:
        """What a set is worth at most with items from ``after`` on, if a part of an item could be taken."""
        room = limit - chosen.cost
        whole = bisect_right(costs, costs[after] + room, after) - 1
        worth = chosen.worth + worths[whole] - worths[after]
        if whole == len(items):
            return worth
        part = Fraction(room) - (costs[whole] - costs[after])
        return worth + int(part * items[whole].worth / items[whole].cost)

    sets = [_Set(0, 0, 0, 0)]
    for after, item in enumerate(items, 1):
        larger = (_Set(*(own + new for own, new in zip(chosen, item, strict=True))) for chosen in sets)
        fitting = sorted([*sets, *(chosen for chosen in larger if chosen.cost <= limit)], key=_cheapest_first)
        sets, best = [], -1
        for chosen in fitting:
            if chosen.worth > best and most(chosen, after) >= reached:
                sets.append(chosen)
                best = chosen.worth
    return max(sets, key=lambda chosen: chosen.rank)


def _greedy(items: Sequence[_Set], limit: float) -> int:
    """The worth of the densest items that fit, taken one after the other."""
    cost = worth = 0
    for item in items:
        if cost + item.cost <= limit:
            cost, worth = cost + item.cost, worth + item.worth
    return worth


def _density(item: _Set) -> Fraction | float:
    return Fraction(item.worth, item.cost) if item.cost else float("inf")


def _cheapest_first(chosen: _Set) -> tuple[int, int, int, int]:
    return chosen.cost, -chosen.worth, chosen.size, -chosen.mask
