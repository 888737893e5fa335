"""Linear CKA (Kornblith et al. 2019, eq. 4): on arrays, and over minibatches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from cka_probe.estimation.arrays import ROUND_OFF, Array, cosine, paired_features
from cka_probe.estimation.gram import Features
from cka_probe.estimation.kernels import center, linear_gram
from cka_probe.estimation.measure import About, Estimator, Measure, Setup
from cka_probe.estimation.streaming import StreamingCKA


@dataclass(frozen=True)
class LinearCKA(Measure):
    """Linear CKA: see `linear_cka`."""

    name = "cka"
    about = About(
        "linear CKA",
        range="-1 to 1, biased 0 to 1",
        invariant_to="orthogonal maps, translation and isotropic scaling",
        source="Kornblith et al. 2019",
        zero_by_chance=True,
    )
    gram_bytes = 4

    estimator: Estimator = "debiased"

    @property
    def description(self) -> str:
        """The title and the estimator."""
        return f"{self.about.title}, {self.estimator}"

    def __call__(self, x: Array, y: Array) -> float:
        """As `linear_cka`."""
        return linear_cka(x, y, debiased=self.estimator == "debiased")

    def start(self, setup: Setup) -> StreamingCKA:
        """Of many layers over minibatches: see `StreamingCKA`."""
        return StreamingCKA(setup, _LinearKernel(), debiased=self.estimator == "debiased")


def linear_cka(x: Array, y: Array, *, debiased: bool = True) -> float:
    """Linear CKA of two representations of the same examples.

    CKA(K, L) = HSIC(K, L) / √(HSIC(K, K) · HSIC(L, L)) with K = XXᵀ and L = YYᵀ (Kornblith et al. 2019, eq. 4).
    Invariant to orthogonal maps, translation and isotropic scaling of the features of either side.

    Args:
        x: (n, d₁) features, an array or a tensor, n ≥ 4; computed in float64.
        y: (n, d₂) features of the same examples.
        debiased: with the unbiased HSIC of Song et al. (2012), in [-1, 1] and 0 on average for independent features;
            else with the biased HSIC of Gretton et al. (2005), in [0, 1] and far above 0 where n < d.

    Returns:
        The similarity. It is not clamped: round-off can exceed a bound by about 1e-15.

    Raises:
        FeatureError: the arrays are not (n, d) with the same n ≥ 4, not finite, or constant over the examples.

    >>> import numpy as np
    >>> rng = np.random.RandomState(1337)
    >>> x = rng.randn(100, 10); y = rng.randn(100, 10) + x
    >>> round(linear_cka(x, y), 10), round(linear_cka(x, y, debiased=False), 10)
    (0.5134564895, 0.5576132566)
    """
    first, second = paired_features(x, y)
    n = len(first)
    if n > max(first.shape[1], second.shape[1]):
        cross, own_x, own_y = _feature_space_products(first, second, debiased=debiased)
    else:
        k, l = (center(linear_gram(features), debiased=debiased, tolerance=ROUND_OFF) for features in (first, second))
        cross, own_x, own_y = ((a * b).sum().item() for a, b in ((k, l), (k, k), (l, l)))
    return cosine(cross, own_x, own_y)


class _LinearKernel:
    def gram(self, layer: int, features: Features) -> Tensor:
        return features.gram

    def details(self) -> dict[str, Any]:
        return {"kernel": "linear"}

    def settled(self) -> None:
        return None

    def settle(self, state: None) -> None:
        pass


def _feature_space_products(x: Tensor, y: Tensor, *, debiased: bool) -> tuple[float, float, float]:
    """The inner products of the centered Gram matrices (K, L), (K, K), (L, L) without an n × n matrix: O(n d₁ d₂)."""
    first, second = (features - features.mean(0) for features in (x, y))
    # Equal rows leave the round-off of their mean, which is no spread; the largest magnitude of the features is 1.
    first, second = (features * (features.abs().amax(0) > 4e-16 * len(x)) for features in (first, second))
    return _product(first, second, debiased), _product(first, first, debiased), _product(second, second, debiased)


def _product(x: Tensor, y: Tensor, debiased: bool) -> float:
    """⟨U(XXᵀ), U(YYᵀ)⟩ or ⟨HXXᵀH, HYYᵀH⟩ of centered x and y; 0 where nothing but round-off is left of its terms."""
    n = len(x)
    whole = (x.T @ y).square().sum().item()
    if not debiased:
        return whole
    square_x, square_y = x.square().sum(1), y.square().sum(1)
    by_row = n / (n - 2) * (square_x @ square_y).item()
    total = (square_x.sum() * square_y.sum()).item() / ((n - 1) * (n - 2))
    product = whole - by_row + total
    return product if abs(product) > ROUND_OFF * (whole + by_row + total) else 0.0
