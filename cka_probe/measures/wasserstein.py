"""The 1-Wasserstein distance of two views, feature by feature."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cka_probe.estimation.arrays import Array, Matrix
from cka_probe.estimation.collected import Collected
from cka_probe.estimation.measure import About, Measure, Setup
from cka_probe.estimation.two_sample import TwoSample, views


@dataclass(frozen=True)
class Wasserstein(Measure):
    """The mean over the features of their 1-Wasserstein distances under two views: see `wasserstein`."""

    name = "wasserstein"
    about = About(
        "1-Wasserstein",
        range="at least 0",
        invariant_to="translation and scaling of each feature, the same in both views",
        source="Vaserstein 1969, feature by feature",
        kind="distance",
        paired=False,
    )

    def __call__(self, x: Array, y: Array) -> float:
        """As `wasserstein`."""
        return wasserstein(x, y)

    def start(self, setup: Setup) -> Collected:
        """Of the layers of several views."""
        settings = {"wasserstein": "mean over the features' own distributions"}
        return Collected(setup, TwoSample(setup.names, _distance, settings))


def wasserstein(x: Array, y: Array, *, standardize: bool = True) -> float:
    """The mean over the features of the 1-Wasserstein distance of each feature's two distributions.

    In one dimension the distance is the mean difference of the sorted samples (SciPy's ``wasserstein_distance``).
    The distance of the whole vectors would need n² memory and n³ time, and is in hundreds of dimensions far above 0
    for two samples of one distribution. The price: what differs in the correlations alone is not seen. Of equal
    distributions the estimate is above 0 by about n^(-1/2).

    Args:
        x: (n, d) features of one view, an array or a tensor, n ≥ 4; computed in float64.
        y: (n, d) features of the other view, the same features of the same examples.
        standardize: in units of each feature's standard deviation over both views.

    Returns:
        The distance, at least 0, in standard deviations (or in the units of the features).

    Raises:
        FeatureError: the arrays are not (n, d) of one shape, n ≥ 4, or not finite.
    """
    return _mean_distance(*views(x, y, standardize))


def _distance(x: Matrix, y: Matrix, signs: Matrix) -> tuple[float, Matrix]:
    swapped = []
    for sign in signs:
        stays = (sign > 0)[:, None]
        swapped.append(_mean_distance(np.where(stays, x, y), np.where(stays, y, x)))
    return _mean_distance(x, y), np.array(swapped)


def _mean_distance(x: Matrix, y: Matrix) -> float:
    return float(np.abs(np.sort(x, 0) - np.sort(y, 0)).mean())
