"""RBF CKA (Kornblith et al. 2019, section 3): on arrays, and over minibatches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ldexp, sqrt
from typing import Annotated, Any, get_args

import torch
from torch import Tensor

from cka_probe.errors import FeatureError
from cka_probe.estimation.arrays import ROUND_OFF, Array, cosine, paired_features
from cka_probe.estimation.gram import Features
from cka_probe.estimation.kernels import MedianRule, center, linear_gram, rbf_gram, squared_bandwidth, squared_distances
from cka_probe.estimation.measure import About, Estimator, Measure, Setup
from cka_probe.estimation.streaming import StreamingCKA
from cka_probe.runtime.ranges import Range

THRESHOLDS = (0.001, 10**6)
"""The smallest and the largest: beyond them the kernel is the identity, or linear to all digits."""


@dataclass(frozen=True)
class RbfCKA(Measure):
    """CKA with a Gaussian kernel: see `rbf_cka`.

    Attributes:
        threshold: the bandwidth as a multiple of the median distance.
        median: over which distances.
        estimator: of HSIC.
    """

    name = "cka-rbf"
    about = About(
        "RBF CKA",
        range="-1 to 1, biased 0 to 1",
        invariant_to="orthogonal maps, translation and isotropic scaling",
        source="Kornblith et al. 2019",
        zero_by_chance=True,
    )
    gram_bytes = 8

    threshold: Annotated[float, Range(*THRESHOLDS)] = 1.0
    median: MedianRule = "off-diagonal"
    estimator: Estimator = "debiased"

    @property
    def description(self) -> str:
        """The title, the estimator and the bandwidth."""
        zeros = ", zeros included" if self.median == "with-diagonal" else ""
        return f"{self.about.title}, {self.estimator}, σ = {self.threshold:g} × median distance{zeros}"

    def __call__(self, x: Array, y: Array) -> float:
        """As `rbf_cka`."""
        debiased = self.estimator == "debiased"
        return rbf_cka(x, y, threshold=self.threshold, debiased=debiased, median=self.median)

    def start(self, setup: Setup) -> StreamingCKA:
        """Of many layers over minibatches, one bandwidth a layer: see `StreamingCKA`.

        The bandwidth comes from the first batch, a random sample of the data, and stays: a kernel that changed from
        batch to batch would make the sum of their HSICs meaningless.
        """
        return StreamingCKA(setup, _RbfKernel(setup.labels, self), debiased=self.estimator == "debiased")


def rbf_cka(
    x: Array, y: Array, *, threshold: float = 1.0, debiased: bool = True, median: MedianRule = "off-diagonal"
) -> float:
    """CKA with a Gaussian kernel k = exp(-d² / 2σ²), σ a multiple of each representation's own median distance.

    Args:
        x: (n, d₁) features, an array or a tensor, n ≥ 4; computed in float64.
        y: (n, d₂) features of the same examples.
        threshold: σ / median distance, 0.001 to 1,000,000. Small values look at near neighbours; large ones approach
            linear CKA.
        debiased: as in `linear_cka`.
        median: over the distances between different examples (``"off-diagonal"``), or over all n² squared distances
            with the zeros of the diagonal, as the notebook published with the paper (``"with-diagonal"``).

    Returns:
        The similarity, in [-1, 1] where debiased, else in [0, 1]. It is not clamped: round-off can exceed a bound by
        about 1e-15.

    Raises:
        FeatureError: the arrays are not (n, d) with the same n ≥ 4, not finite, or the median distance is 0; or the
            threshold is out of range.

    >>> import numpy as np
    >>> x = np.random.RandomState(0).randn(50, 8)
    >>> round(rbf_cka(x, 3 * x + 1), 12)
    1.0
    """
    _check_kernel(threshold, median)
    grams = []
    for features, name in zip(paired_features(x, y), ("x", "y"), strict=True):
        distances = squared_distances(linear_gram(features))
        bandwidth = squared_bandwidth(distances, threshold=threshold, median=median)
        _require_bandwidth(bandwidth, name)
        grams.append(center(_gram(distances, bandwidth, threshold), debiased=debiased, tolerance=ROUND_OFF))
    k, l = grams
    cross, own_x, own_y = ((a * b).sum().item() for a, b in ((k, l), (k, k), (l, l)))
    return cosine(cross, own_x, own_y)


class _RbfKernel:
    def __init__(self, labels: Sequence[str], measure: RbfCKA) -> None:
        self._labels = labels
        self._measure = measure
        self._bandwidths: dict[int, float] = {}
        self._exponents: dict[int, int] = {}

    def gram(self, layer: int, features: Features) -> Tensor:
        distances, threshold = features.squared_distances, self._measure.threshold
        self._exponents[layer] = features.exponent
        if layer not in self._bandwidths:
            bandwidth = squared_bandwidth(distances, threshold=threshold, median=self._measure.median)
            _require_bandwidth(bandwidth, self._labels[layer])
            self._bandwidths[layer] = bandwidth
        return _gram(distances, self._bandwidths[layer], threshold)

    def settled(self) -> dict[int, float]:
        return self._bandwidths

    def settle(self, state: dict[int, float]) -> None:
        self._bandwidths = dict(state)

    def details(self) -> dict[str, Any]:
        sigmas = {
            self._labels[layer]: ldexp(sqrt(squared), self._exponents.get(layer, 0))
            for layer, squared in sorted(self._bandwidths.items())
        }
        threshold, median = self._measure.threshold, self._measure.median
        return {"kernel": "rbf", "threshold": threshold, "median": median, "bandwidths": sigmas}


def _gram(distances: Tensor, bandwidth: float, threshold: float) -> Tensor:
    """The Gaussian Gram matrix, or one that has the same centered matrix up to a factor, with more digits.

    The entries k of a wide kernel lie so near to 1 that float64 holds few digits of what they differ by, and centering
    leaves that alone: k - 1, scaled to the size of 1, holds them all.
    """
    if threshold <= 1:
        return rbf_gram(distances, bandwidth)
    return threshold**2 * torch.expm1(distances / (-2 * bandwidth))


def _check_kernel(threshold: float, median: str) -> None:
    """Raise a FeatureError where an option of the kernel has a value that it cannot have."""
    low, high = THRESHOLDS
    if not low <= threshold <= high:
        raise FeatureError(
            f"The RBF threshold (bandwidth / median distance) must be from {low:g} to {high:,.0f}, but is {threshold}."
        )
    if median not in get_args(MedianRule):
        raise FeatureError(f"The median of the RBF bandwidth must be one of {get_args(MedianRule)}, but is {median!r}.")


def _require_bandwidth(bandwidth: float, name: str) -> None:
    if bandwidth == 0:
        raise FeatureError(
            f"The RBF bandwidth is a multiple of the median distance, which is 0 for {name}: half of its examples or "
            "more coincide. Leave that layer out, or use the linear kernel."
        )
