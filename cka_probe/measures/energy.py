"""The energy distance of two views (Székely & Rizzo 2013)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from cka_probe.measures.arrays import Array, Matrix
from cka_probe.measures.two_sample import TwoSample, of_pairs, v_statistic, views


def energy_distance(x: Array, y: Array, *, debiased: bool = True, standardize: bool = True) -> float:
    """𝓔 = 2 E‖X - Y‖ - E‖X - X'‖ - E‖Y - Y'‖ of the features of two views (Székely & Rizzo 2013, eq. 5).

    SciPy's one-dimensional ``energy_distance`` is the root of the biased form. The unbiased one has no root, as it
    falls below 0 half the time where the distributions are equal.

    Args:
        x: (n, d) features of the reference view, an array or a tensor, n ≥ 4; computed in float64.
        y: (n, d) features of the other view, the same features of the same examples.
        debiased: leave out the distances of an example to itself and to its other view; else keep them.
        standardize: in units of the standard deviations of x.

    Returns:
        𝓔, in units of a distance.

    Raises:
        FeatureError: the arrays are not (n, d) of one shape, n ≥ 4, or not finite.
    """
    first, second = views(x, y, standardize)
    if not debiased:
        return v_statistic(first, second, _minus_distance)
    return of_pairs(first, second, _minus_distance, np.empty((0, len(first))))[0]


def statistic(*, names: Sequence[str], **_: Any) -> TwoSample:
    """The energy distance of the layers of several views."""
    return TwoSample(names, _distance)


def _distance(x: Matrix, y: Matrix, signs: Matrix) -> tuple[float, Matrix]:
    return of_pairs(x, y, _minus_distance, signs)


def _minus_distance(squares: Matrix) -> Matrix:
    return np.asarray(-np.sqrt(squares))
