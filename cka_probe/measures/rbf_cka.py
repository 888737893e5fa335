"""RBF CKA (Kornblith et al. 2019, section 3): on arrays, and over minibatches."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from typing import Any, get_args

import torch
from torch import Tensor

from cka_probe.errors import FeatureError
from cka_probe.features import Features
from cka_probe.kernels import MedianRule, center, linear_gram, rbf_gram, squared_bandwidth, squared_distances
from cka_probe.measures.arrays import ROUND_OFF, Array, cosine, paired_features
from cka_probe.measures.estimates import VALUES_ONLY, Asked
from cka_probe.measures.streaming import StreamingCKA

THRESHOLDS = (1e-3, 1e6)
"""The smallest and the largest: beyond them the kernel is the identity, or linear to all digits."""


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
        The similarity, in [-1, 1] where debiased, else in [0, 1].

    Raises:
        FeatureError: the arrays are not (n, d) with the same n ≥ 4, not finite, or the median distance is 0; or the
            threshold is out of range.

    >>> import numpy as np
    >>> x = np.random.RandomState(0).randn(50, 8)
    >>> round(rbf_cka(x, 3 * x + 1), 12)
    1.0
    """
    check_kernel(threshold, median)
    grams = []
    for features, name in zip(paired_features(x, y), ("x", "y"), strict=True):
        distances = squared_distances(linear_gram(features))
        bandwidth = squared_bandwidth(distances, threshold=threshold, median=median)
        _require_bandwidth(bandwidth, name)
        grams.append(center(_gram(distances, bandwidth, threshold), debiased=debiased, tolerance=ROUND_OFF))
    k, l = grams
    cross, own_x, own_y = ((a * b).sum().item() for a, b in ((k, l), (k, k), (l, l)))
    return cosine(cross, own_x, own_y)


def streaming(
    labels: Sequence[str], *, debiased: bool, seed: int, threshold: float, median: MedianRule,
    asked: Asked = VALUES_ONLY, **_: Any,
) -> StreamingCKA:  # fmt: skip
    """RBF CKA of many layers over minibatches, one bandwidth a layer: see `StreamingCKA`.

    The bandwidth comes from the first batch, a random sample of the data, and stays: a kernel that changed from
    batch to batch would make the sum of their HSICs meaningless.
    """
    check_kernel(threshold, median)
    return StreamingCKA(labels, _RbfKernel(labels, threshold, median), debiased=debiased, seed=seed, asked=asked)


class _RbfKernel:
    def __init__(self, labels: Sequence[str], threshold: float, median: MedianRule) -> None:
        self._labels = labels
        self._threshold = threshold
        self._median: MedianRule = median
        self._bandwidths: dict[int, float] = {}

    def gram(self, layer: int, features: Features) -> Tensor:
        distances = squared_distances(features.gram.double())
        if layer not in self._bandwidths:
            bandwidth = squared_bandwidth(distances, threshold=self._threshold, median=self._median)
            _require_bandwidth(bandwidth, self._labels[layer])
            self._bandwidths[layer] = bandwidth
        return _gram(distances, self._bandwidths[layer], self._threshold)

    def settled(self) -> dict[int, float]:
        return self._bandwidths

    def settle(self, state: dict[int, float]) -> None:
        self._bandwidths = dict(state)

    def details(self) -> dict[str, Any]:
        sigmas = {self._labels[layer]: sqrt(squared) for layer, squared in sorted(self._bandwidths.items())}
        return {"kernel": "rbf", "threshold": self._threshold, "median": self._median, "bandwidths": sigmas}


def _gram(distances: Tensor, bandwidth: float, threshold: float) -> Tensor:
    """The Gaussian Gram matrix, or what has the same centered one but for a factor, with more digits.

    The entries k of a wide kernel lie so near to 1 that float64 holds few digits of what they differ by, and centering
    leaves that alone: k - 1, scaled to the size of 1, holds them all.
    """
    if threshold <= 1:
        return rbf_gram(distances, bandwidth)
    return threshold**2 * torch.expm1(distances / (-2 * bandwidth))


def check_kernel(threshold: float, median: str) -> None:
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
