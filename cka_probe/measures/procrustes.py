"""The angle between two representations after the best rotation (Williams et al. 2021)."""

from __future__ import annotations

from dataclasses import dataclass
from math import atan2

import numpy as np

from cka_probe.estimation.arrays import Array, LayerFeatures, Matrix, paired_layers
from cka_probe.estimation.collected import Collected, Pairwise
from cka_probe.estimation.feature_store import Scratch
from cka_probe.estimation.measure import About, Measure, Setup
from cka_probe.estimation.moments import GONE, Side, Steps, of_moments


@dataclass(frozen=True)
class Procrustes(Measure):
    """The cosine of the angle after the best rotation: see `procrustes`."""

    name = "procrustes"
    about = About(
        "Procrustes cosine",
        range="0 to 1",
        invariant_to="orthogonal maps, translation and isotropic scaling",
        source="Williams et al. 2021",
        fisher_interval=True,
    )

    def __call__(self, x: Array, y: Array) -> float:
        """As `procrustes`."""
        return procrustes(x, y)

    def start(self, setup: Setup) -> Collected:
        """Of many layers."""
        return Collected(setup, _statistic(setup.store.scratch))


def procrustes(x: Array, y: Array) -> float:
    """The cosine of the angular Procrustes distance: ‖XᵀY‖_* / (‖X‖_F ‖Y‖_F) of the centered features.

    It is the largest inner product of the two over all rotations. Its arc cosine, `procrustes_angle`, is a metric
    (Williams et al. 2021, eq. 5); 1 - cosine² is SciPy's Procrustes disparity. Invariant to orthogonal maps,
    translation and isotropic scaling of either side; not to a general linear map. Of independent features it is not 0,
    but up to about √(d/n).

    Args:
        x: (n, d₁) features, an array or a tensor, n ≥ 4; computed in float64.
        y: (n, d₂) features of the same examples; the narrower of the two counts as filled up with zeros.

    Returns:
        The similarity, in [0, 1]. It is not clamped: round-off can exceed 1 by about 1e-15.

    Raises:
        FeatureError: the arrays are not (n, d) with the same n ≥ 4, not finite, or constant over the examples.
    """
    return _statistic().value(*paired_layers(x, y))


def procrustes_angle(x: Array, y: Array) -> float:
    """The angular Procrustes distance θ of Williams et al. (2021, eq. 5), the arc cosine of `procrustes`.

    Args:
        x: as in `procrustes`.
        y: as in `procrustes`.

    Returns:
        The angle in radians, in [0, π/2].

    Raises:
        FeatureError: as in `procrustes`.
    """
    first, second = (_unit(layer) for layer in paired_layers(x, y))
    width = max(first.shape[1], second.shape[1])
    first, second = (np.pad(side, ((0, 0), (0, width - side.shape[1]))) for side in (first, second))
    left, values, right = np.linalg.svd(first.T @ second)
    cosine = float(values.sum())
    # The arc cosine near 1 has half the digits; the sine is the length of what the rotation leaves over.
    return atan2(float(np.linalg.norm(second @ right.T - cosine * (first @ left))), cosine)


def _statistic(scratch: Scratch | None = None) -> Pairwise:
    return of_moments(Steps(lambda layer: (_unit(layer), None, None), _length, _cosine), {}, scratch=scratch)


def _unit(layer: LayerFeatures) -> Matrix:
    rows = layer.values.astype(np.float64)
    centered = rows - rows.mean(0)
    return np.asarray(centered / np.linalg.norm(centered))


def _length(moments: Matrix, _: None) -> Side:
    square = np.trace(moments)  # 1 of all examples
    return (np.sqrt([square] if square > GONE else []),)


def _cosine(moments: Matrix, x: Side, y: Side) -> float:
    return float(np.linalg.norm(moments, "nuc") / (x[0] * y[0]).item())
