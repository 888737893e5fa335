"""The energy distance of two views (Székely & Rizzo 2013)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cka_probe.estimation.arrays import Array, Matrix
from cka_probe.estimation.collected import Collected
from cka_probe.estimation.measure import About, Measure, Setup
from cka_probe.estimation.two_sample import TwoSample, of_pairs, v_statistic, views


@dataclass(frozen=True)
class EnergyDistance(Measure):
    """The energy distance of one layer under two views: see `energy_distance`."""

    name = "energy"
    about = About(
        "energy distance",
        range="0 on average for equal distributions",
        invariant_to="translation and scaling of each feature, the same in both views",
        source="Székely and Rizzo 2013",
        kind="distance",
        paired=False,
    )

    def __call__(self, x: Array, y: Array) -> float:
        """As `energy_distance`."""
        return energy_distance(x, y)

    def start(self, setup: Setup) -> Collected:
        """Of the layers of several views."""
        return Collected(setup, TwoSample(setup.names, _distance))


def energy_distance(x: Array, y: Array, *, debiased: bool = True, standardize: bool = True) -> float:
    """𝓔 = 2 E‖X - Y‖ - E‖X - X'‖ - E‖Y - Y'‖ of the features of two views (Székely & Rizzo 2013, eq. 5).

    SciPy's one-dimensional ``energy_distance`` is the root of the biased form. The unbiased one has no root, as it
    falls below 0 half the time where the distributions are equal.

    Args:
        x: (n, d) features of one view, an array or a tensor, n ≥ 4; computed in float64.
        y: (n, d) features of the other view, the same features of the same examples.
        debiased: leave out the distances of an example to itself and to its other view; else keep them.
        standardize: in units of each feature's standard deviation over both views.

    Returns:
        𝓔, in units of a distance; biased, at least 0 up to round-off.

    Raises:
        FeatureError: the arrays are not (n, d) of one shape, n ≥ 4, or not finite.
    """
    first, second = views(x, y, standardize)
    if not debiased:
        return v_statistic(first, second, _minus_distance)
    return of_pairs(first, second, _minus_distance, np.empty((0, len(first))))[0]


def _distance(x: Matrix, y: Matrix, signs: Matrix) -> tuple[float, Matrix]:
    return of_pairs(x, y, _minus_distance, signs)


def _minus_distance(squares: Matrix) -> Matrix:
    return np.asarray(-np.sqrt(squares))
