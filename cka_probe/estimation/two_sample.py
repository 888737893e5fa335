"""Distances between the distributions of one layer's features under two views: what all of them share.

The features of the same layer of the same network are the same quantities in both views, so their distributions can be
compared. Between two layers, or two networks, that would be to compare meters with seconds: there, the distance is NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, Protocol

import numpy as np

from cka_probe.errors import FeatureError
from cka_probe.estimation.arrays import Array, LayerFeatures, Matrix, paired_matrices
from cka_probe.estimation.collected import Order, Replicates

_ROUND_OFF = 8 * np.finfo(np.float64).eps
"""Of a squared distance, relative to |x|² + |y|²: that of equal examples."""

MEDIAN_EXAMPLES = 1000
_ROWS = 512

Kernel = Callable[[Matrix], Matrix]
"""A function of squared distances, elementwise, in place."""


class Distance(Protocol):
    """A distance of two views of a layer."""

    def __call__(self, x: Matrix, y: Matrix, signs: Matrix) -> tuple[float, Matrix]:
        """The distance, and what it is with the views of some examples swapped.

        Args:
            x: (n, d) features of one view, in standard deviations over both views.
            y: (n, d) features of the other view, in the same units.
            signs: (swaps, n): -1 where the views of an example are swapped, else 1.

        Returns:
            The value; and (swaps,) values.
        """
        ...


def views(x: Array, y: Array, standardize: bool) -> tuple[Matrix, Matrix]:
    """Both as (n, d) float64, by default in units of each feature's standard deviation over both views.

    Raises:
        FeatureError: they are not (n, d) of the same shape, or not finite.
    """
    first, second = paired_matrices(x, y, same_features=True)
    return _standardized(first, second) if standardize else (first, second)


@dataclass(frozen=True)
class TwoSample:
    """A `cka_probe.estimation.collected.Statistic`: a distance of each layer under one view to it under another.

    Attributes:
        names: for each layer, its name in its network.
        distance: of two views of one layer.
        settings: fit for YAML.
    """

    names: Sequence[str]
    distance: Distance
    settings: dict[str, Any] = field(default_factory=dict)

    def __call__(self, layers: Sequence[LayerFeatures], blocks: Sequence[slice], orders: Sequence[Order]) -> Replicates:
        count, n = len(layers), len(layers[0].values)
        pairs = self._pairs([layer.values.shape[1] for layer in layers])
        # Where the views make no difference, which of a pair comes from which view is a coin's toss.
        tosses = [np.random.default_rng(order[:8]).choice([-1.0, 1.0], n) for order in orders]
        signs = np.stack(tosses) if tosses else np.empty((0, n))
        values = np.full((count, count), np.nan)
        deleted, shuffled = (np.full((len(again), count, count), np.nan) for again in (blocks, orders))
        for part in (values, deleted, shuffled):
            part[..., np.arange(count), np.arange(count)] = 0
        for i, j in pairs:
            pair = [np.ldexp(layers[side].values.astype(np.float64), layers[side].exponent) for side in (i, j)]
            value, swapped = self.distance(*_standardized(*pair), signs)
            values[i, j] = values[j, i] = value
            shuffled[:, i, j] = shuffled[:, j, i] = swapped
            for part, block in zip(deleted, blocks, strict=True):
                kept = (np.delete(view, block, axis=0) for view in pair)
                part[i, j], _ = self.distance(*_standardized(*kept), signs[:0, : n - block.stop + block.start])
                part[j, i] = part[i, j]
        return Replicates(values, deleted, shuffled)

    def check(self, examples: int, widths: Sequence[int]) -> None:
        """As `cka_probe.estimation.collected.Statistic` has it."""
        if not self._pairs(widths):
            raise FeatureError(
                "A distance between distributions compares one layer under two views, so that two subjects must have "
                "a layer of the same name and width, but no two have. Leave mmd, energy and wasserstein out of "
                "--measures, or compare views of one network."
            )

    def _pairs(self, widths: Sequence[int]) -> list[tuple[int, int]]:
        """Those that are one layer under two views, by their names and widths."""
        return [
            (i, j)
            for i, j in combinations(range(len(widths)), 2)
            if self.names[i] == self.names[j] and widths[i] == widths[j]
        ]

    def details(self) -> dict[str, Any]:
        """Settings, fit for YAML."""
        return {"standardized": "over both views", **self.settings}


def of_pairs(x: Matrix, y: Matrix, kernel: Kernel, signs: Matrix) -> tuple[float, Matrix]:
    """The U-statistic mean of h(i, j) = k(xᵢ, xⱼ) + k(yᵢ, yⱼ) - k(xᵢ, yⱼ) - k(xⱼ, yᵢ) over i ≠ j.

    With k a kernel it is the unbiased MMD² for samples of one size (Gretton et al. 2012, eq. 4), with k = -distance the
    energy distance. A pair of views of one example is no independent draw of both: with i ≠ j it is left out. To swap
    the views of example i turns the sign of h(i, ·).

    Args:
        x: (n, d) features.
        y: (n, d) features.
        kernel: k.
        signs: (swaps, n), ±1.

    Returns:
        The value, and (swaps,) values with views swapped.
    """
    n = len(x)
    total, swapped = 0.0, np.zeros(len(signs))
    for start in range(0, n, _ROWS):
        end = min(start + _ROWS, n)
        h = _h(x, y, kernel, start, end)
        # Columns from the first row on: the rest of the symmetric matrix counts double.
        h[:, end - start :] *= 2
        total += float(h.sum(dtype=np.float64))
        swapped += np.einsum("pi,pi->p", signs[:, start:end] @ h, signs[:, start:])
    return total / (n * (n - 1)), swapped / (n * (n - 1))


def v_statistic(x: Matrix, y: Matrix, kernel: Kernel) -> float:
    """The mean of k(xᵢ, xⱼ) + k(yᵢ, yⱼ) - 2 k(xᵢ, yⱼ) over all i and j, equal ones among them: biased upward."""
    return float(sum(sign * kernel(_squared(a, b)).mean() for sign, a, b in ((1, x, x), (1, y, y), (-2, x, y))))


def median_squared_distance(x: Matrix, y: Matrix) -> float:
    """The square of the median distance within the pooled samples (of the first 1,000 examples of each).

    Raises:
        FeatureError: it is 0: half of the examples coincide.
    """
    from scipy.spatial.distance import pdist

    found = float(np.median(pdist(np.concatenate([x[:MEDIAN_EXAMPLES], y[:MEDIAN_EXAMPLES]]))))
    if found == 0:
        raise FeatureError("The bandwidth of MMD is the median distance, which is 0: half of the examples coincide.")
    return found**2


def _standardized(x: Matrix, y: Matrix) -> tuple[Matrix, Matrix]:
    """Both in each feature's standard deviation over the two views together; a constant feature keeps its unit.

    Over both, as the unit is then the same whichever views are swapped: otherwise the permutation test would find too
    much. Each feature is scaled by a power of two first, so that its square is in the range of float64.
    """
    from sklearn.preprocessing import StandardScaler

    both = np.concatenate([x, y])
    _, exponents = np.frexp(np.abs(both).max(0))
    both = np.ldexp(both, -exponents)
    scaler = StandardScaler().fit(both)
    units = np.where(scaler.scale_ == 1, exponents, 0)  # which is what it has of a constant
    both = np.ldexp(scaler.transform(both), units)
    return both[: len(x)], both[len(x) :]


def _h(x: Matrix, y: Matrix, kernel: Kernel, start: int, end: int) -> Matrix:
    """h(i, j) for rows from start to end, and columns from start on; 0 for i = j."""
    rows, columns = slice(start, end), slice(start, None)
    h = kernel(_squared(x[rows], x[columns])) + kernel(_squared(y[rows], y[columns]))
    h -= kernel(_squared(x[rows], y[columns])) + kernel(_squared(y[rows], x[columns]))
    h[np.arange(end - start), np.arange(end - start)] = 0
    return np.asarray(h)


def _squared(x: Matrix, y: Matrix) -> Matrix:
    own = np.square(x).sum(1)[:, None] + np.square(y).sum(1)
    squares = own - 2 * (x @ y.T)
    return np.where(squares > _ROUND_OFF * own, squares, 0)  # the root of round-off would be 1e-8, and not 0
