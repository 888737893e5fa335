"""The 1-Wasserstein distance of two views, feature by feature."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from cka_probe.measures.arrays import Array, Matrix
from cka_probe.measures.two_sample import TwoSample, views


def wasserstein(x: Array, y: Array, *, standardize: bool = True) -> float:
    """The mean over the features of the 1-Wasserstein distance of each feature's two distributions.

    In one dimension the distance is the mean difference of the sorted samples (SciPy's ``wasserstein_distance``).
    The distance of the whole vectors would need n² memory and n³ time, and is in hundreds of dimensions far above 0
    for two samples of one distribution. The price: what differs in the correlations alone is not seen. Of equal
    distributions the estimate is above 0 by about n^(-1/2).

    Args:
        x: (n, d) features of the reference view, an array or a tensor, n ≥ 4; computed in float64.
        y: (n, d) features of the other view, the same features of the same examples.
        standardize: in units of the standard deviations of x.

    Returns:
        The distance, at least 0, in standard deviations of x (or in its units).

    Raises:
        FeatureError: the arrays are not (n, d) of one shape, n ≥ 4, or not finite.
    """
    return _mean_distance(*views(x, y, standardize))


def statistic(*, names: Sequence[str], **_: Any) -> TwoSample:
    """The 1-Wasserstein distance of the layers of several views."""
    return TwoSample(names, _distance, {"wasserstein": "mean over the features' own distributions"})


def _distance(x: Matrix, y: Matrix, signs: Matrix) -> tuple[float, Matrix]:
    swapped = []
    for sign in signs:
        stays = (sign > 0)[:, None]
        swapped.append(_mean_distance(np.where(stays, x, y), np.where(stays, y, x)))
    return _mean_distance(x, y), np.array(swapped)


def _mean_distance(x: Matrix, y: Matrix) -> float:
    return float(np.abs(np.sort(x, 0) - np.sort(y, 0)).mean())
