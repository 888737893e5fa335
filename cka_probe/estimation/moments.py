"""Measures that are functions of the second moments of two layers: the CCA family and Procrustes.

A layer is reduced to rows with mean 0 once. Examples are left out by taking their products away from those of all, so
that a replicate costs what its d × d moments cost, and not what the examples do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from cka_probe.estimation.arrays import LayerFeatures, Matrix
from cka_probe.estimation.collected import Doubt, Order, Pairwise
from cka_probe.estimation.feature_store import Scratch

Side = tuple[Matrix, ...]
"""What a measure makes of the moments of one layer; the first array is empty where nothing of the layer is left."""

GONE = 1e-12
"""Share of the variance that counts as none. If examples are left out, a direction that only they had keeps less."""


class _State(NamedTuple):
    rows: Matrix
    sides: list[Side]  # one a run of examples that is left out
    doubt: Doubt | None


class Steps(NamedTuple):
    """The three steps of a measure of second moments.

    Attributes:
        prepare: features of (n, d) -> (n, r) rows with mean 0, what else `side` needs of the layer, and what is
            doubtful about it.
        side: the (r, r) moments of a layer, and that -> arrays.
        compare: the (r₁, r₂) moments of two layers, and the arrays of each -> the value; symmetric.
    """

    prepare: Callable[[LayerFeatures], tuple[Matrix, Any, Doubt | None]]
    side: Callable[[Matrix, Any], Side]
    compare: Callable[[Matrix, Side, Side], float]


def of_moments(
    steps: Steps,
    settings: dict[str, Any],
    *,
    scratch: Scratch | None = None,
    enough: Callable[[int, Sequence[int]], None] = lambda examples, widths: None,
) -> Pairwise:
    """A `cka_probe.estimation.collected.Statistic` of second moments.

    Args:
        steps: of the measure.
        settings: fit for YAML.
        scratch: where rows and arrays lie; in memory where None.
        enough: as for `Pairwise`.
    """
    kept = scratch or Scratch()

    def reduce(features: LayerFeatures, left_out: Sequence[slice]) -> _State:
        rows, other, doubt = steps.prepare(features)
        sides = [steps.side(moments, other) for moments in moments_without(rows, rows, left_out)]
        return _State(*_stored(rows, sides, kept), doubt)

    def value(moments: Matrix, x: Side, y: Side) -> float:
        return steps.compare(moments, x, y) if x[0].size and y[0].size else float("nan")

    def values(
        x: _State, y: _State, left_out: Sequence[slice], orders: Sequence[Order]
    ) -> tuple[list[float], list[float]]:
        moments = moments_without(x.rows, y.rows, left_out)
        shuffled = (x.rows.T @ y.rows[order] for order in orders)
        return (
            [value(*parts) for parts in zip(moments, x.sides, y.sides, strict=True)],
            [value(products, x.sides[0], y.sides[0]) for products in shuffled],
        )

    return Pairwise(reduce, values, settings, enough, lambda state: state.doubt)


def moments_without(x: Matrix, y: Matrix, left_out: Sequence[slice]) -> Iterator[Matrix]:
    """Σ (xᵢ - mean)(yᵢ - mean)ᵀ over the examples that are not in a run, (d₁, d₂), for each run.

    Args:
        x: (n, d₁) rows, whose mean over all examples is 0.
        y: (n, d₂) rows, the same.
        left_out: runs of examples.
    """
    whole = x.T @ y
    for run in left_out:
        first, second = x[run], y[run]
        means = np.outer(first.sum(0), second.sum(0)) / (len(x) - len(first))
        yield whole - first.T @ second - means


def _stored(rows: Matrix, sides: Sequence[Side], scratch: Scratch) -> tuple[Matrix, list[Side]]:
    """The same in scratch arrays, all sides in one: each may be a file, and a process can open only so many."""
    own = scratch.empty(rows.shape, np.float64)
    own[:] = rows
    space = scratch.empty((sum(array.size for side in sides for array in side),), np.float64)
    found: list[Side] = []
    start = 0
    for side in sides:
        views = []
        for array in side:
            view = space[start : start + array.size].reshape(array.shape)
            view[:] = array
            views.append(view)
            start += array.size
        found.append(tuple(views))
    return own, found
