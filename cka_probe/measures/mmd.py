"""The maximum mean discrepancy of two views, squared (Gretton et al. 2012)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cka_probe.errors import FeatureError
from cka_probe.estimation.arrays import Array, Matrix
from cka_probe.estimation.collected import Collected
from cka_probe.estimation.measure import About, Measure, Setup
from cka_probe.estimation.two_sample import (
    MEDIAN_EXAMPLES,
    Kernel,
    TwoSample,
    median_squared_distance,
    of_pairs,
    v_statistic,
    views,
)


@dataclass(frozen=True)
class MMD(Measure):
    """The squared maximum mean discrepancy of one layer under two views: see `mmd`."""

    name = "mmd"
    about = About(
        "MMD²",
        range="up to 2, and 0 on average for equal distributions",
        invariant_to="translation and scaling of each feature, the same in both views",
        source="Gretton et al. 2012",
        kind="distance",
        paired=False,
    )

    def __call__(self, x: Array, y: Array) -> float:
        """As `mmd`."""
        return mmd(x, y)

    def start(self, setup: Setup) -> Collected:
        """Of the layers of several views; the bandwidth of a layer is that of all its examples."""
        settings = {"bandwidth": f"median distance in the pooled samples, {MEDIAN_EXAMPLES} examples of each at most"}
        return Collected(setup, TwoSample(setup.names, _distance, settings))


def mmd(
    x: Array, y: Array, *, bandwidth: float | None = None, debiased: bool = True, standardize: bool = True
) -> float:
    """MMD² of the features of two views of the same examples, with the kernel exp(-d² / 2σ²).

    Args:
        x: (n, d) features of one view, an array or a tensor, n ≥ 4; computed in float64.
        y: (n, d) features of the other view, the same features of the same examples.
        bandwidth: σ, above 0; the median distance within the pooled samples where None.
        debiased: the unbiased form (Gretton et al. 2012, eq. 4), 0 on average where the distributions are equal, and
            then below 0 half the time; else the biased one (eq. 5).
        standardize: in units of each feature's standard deviation over both views.

    Returns:
        MMD², from -2 to 2; biased, from 0 to 2. It is not clamped: round-off can exceed a bound by about 1e-15.

    Raises:
        FeatureError: the arrays are not (n, d) of one shape, n ≥ 4, or not finite; the bandwidth is not above 0.
    """
    first, second = views(x, y, standardize)
    if bandwidth is not None and not bandwidth > 0:
        raise FeatureError(f"The bandwidth of MMD must be above 0, but is {bandwidth}.")
    kernel = _gaussian(median_squared_distance(first, second) if bandwidth is None else bandwidth**2)
    if not debiased:
        return v_statistic(first, second, kernel)
    return of_pairs(first, second, kernel, np.empty((0, len(first))))[0]


def _distance(x: Matrix, y: Matrix, signs: Matrix) -> tuple[float, Matrix]:
    return of_pairs(x, y, _gaussian(median_squared_distance(x, y)), signs)


def _gaussian(squared_bandwidth: float) -> Kernel:
    return lambda squares: np.exp(squares / (-2 * squared_bandwidth))
