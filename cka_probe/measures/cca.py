"""Canonical correlations: their mean, SVCCA (Raghu et al. 2017) and PWCCA (Morcos et al. 2018)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import numpy as np

from cka_probe.errors import FeatureError
from cka_probe.estimation.arrays import Array, LayerFeatures, Matrix, paired_layers
from cka_probe.estimation.collected import Collected, Doubt, Pairwise
from cka_probe.estimation.feature_store import Scratch
from cka_probe.estimation.measure import About, Measure, Setup
from cka_probe.estimation.moments import GONE, Side, Steps, of_moments
from cka_probe.runtime.ranges import Range

_HALF = 2.0**-11
"""The ε of a type of 16 bits is this or more."""

VARIANCE = 0.99
"""The share that SVCCA keeps, as in Raghu et al. (2017)."""


@dataclass(frozen=True)
class MeanCCA(Measure):
    """The mean canonical correlation: see `mean_cca`."""

    name = "mean-cca"
    about = About(
        "mean CCA",
        range="0 to 1",
        invariant_to="every invertible linear map, and translation",
        source="Hotelling 1936",
        fisher_interval=True,
    )

    def __call__(self, x: Array, y: Array) -> float:
        """As `mean_cca`."""
        return mean_cca(x, y)

    def start(self, setup: Setup) -> Collected:
        """Of many layers."""
        return Collected(setup, _statistic(_mean, {}, scratch=setup.store.scratch))


@dataclass(frozen=True)
class SVCCA(Measure):
    """The mean canonical correlation of the principal components: see `svcca`.

    Attributes:
        variance: the share of the variance that the components hold.
    """

    name = "svcca"
    about = About(
        "SVCCA",
        range="0 to 1",
        invariant_to="orthogonal maps, translation and isotropic scaling",
        source="Raghu et al. 2017",
        fisher_interval=True,
    )

    variance: Annotated[float, Range(0, 1, open_low=True)] = VARIANCE

    @property
    def description(self) -> str:
        """The title and the share of the variance."""
        return f"{self.about.title}, {self.variance:.10g} of the variance"

    def __call__(self, x: Array, y: Array) -> float:
        """As `svcca`."""
        return svcca(x, y, variance=self.variance)

    def start(self, setup: Setup) -> Collected:
        """Of many layers."""
        settings = {"variance": self.variance}
        return Collected(setup, _statistic(_mean, settings, share=self.variance, scratch=setup.store.scratch))


@dataclass(frozen=True)
class PWCCA(Measure):
    """Canonical correlations weighted by what each direction says of the features: see `pwcca`.

    In the matrix of all layers, the mean of both directions.
    """

    name = "pwcca"
    about = About(
        "PWCCA",
        range="0 to 1",
        invariant_to="translation and isotropic scaling",
        source="Morcos et al. 2018",
        fisher_interval=True,
    )

    def __call__(self, x: Array, y: Array) -> float:
        """As `pwcca`: projected onto x."""
        return pwcca(x, y)

    def start(self, setup: Setup) -> Collected:
        """Of many layers: the mean of both directions, since a matrix of all layers is symmetric."""
        settings = {"weights": "the mean of both directions"}
        return Collected(setup, _statistic(_weighted_by_both, settings, scratch=setup.store.scratch))


def mean_cca(x: Array, y: Array) -> float:
    """The mean of the canonical correlations ρ₁ ≥ ρ₂ ≥ … of two representations (Hotelling 1936).

    With orthonormal bases Q of the centered features, ρ are the singular values of QₓᵀQᵧ. Invariant to every
    invertible linear map of either side, and so to much that CKA sees. Of independent features it is not 0, but about
    √(d/n).

    Args:
        x: (n, d₁) features, an array or a tensor, n - 1 above their rank; computed in float64.
        y: (n, d₂) features of the same examples.

    Returns:
        The mean over the smaller of the two ranks, in [0, 1]. It is not clamped: round-off can exceed a bound by about
        1e-15.

    Raises:
        FeatureError: the arrays are not (n, d) with the same n, not finite, or constant; or there are too few examples
            for the features, so that the value would be 1 whatever they are.
    """
    return _value(x, y, _statistic(_mean, {}))


def svcca(x: Array, y: Array, *, variance: float = VARIANCE) -> float:
    """`mean_cca` of the principal components that hold a share of the variance of each side (Raghu et al. 2017).

    Invariant to orthogonal maps, translation and isotropic scaling; not to a general linear map.

    Args:
        x: as in `mean_cca`.
        y: as in `mean_cca`.
        variance: the share, above 0 and up to 1: the fewest components with at least that much are kept.

    Returns:
        The similarity, in [0, 1]. It is not clamped: round-off can exceed a bound by about 1e-15.

    Raises:
        FeatureError: as in `mean_cca`, or the share is not one.
    """
    if not 0 < variance <= 1:
        raise FeatureError(f"The share of variance that SVCCA keeps must be above 0 and up to 1, but is {variance}.")
    return _value(x, y, _statistic(_mean, {}, share=variance))


def pwcca(x: Array, y: Array) -> float:
    """Canonical correlations, weighted by how much each direction says of x (Morcos et al. 2018, eq. 2 and 3).

    The weight of ρᵢ is Σⱼ |⟨hᵢ, xⱼ⟩| over the columns of the centered x, with hᵢ the canonical variate of x. So it is
    not symmetric: pwcca(x, y) projects onto the first argument. Nor is it invariant to rotations of x, as the columns
    count one by one.

    Args:
        x: as in `mean_cca`; its directions give the weights.
        y: as in `mean_cca`.

    Returns:
        The similarity, in [0, 1]. It is not clamped: round-off can exceed a bound by about 1e-15.

    Raises:
        FeatureError: as in `mean_cca`.
    """
    return _value(x, y, _statistic(_weighted_by_first, {}))


def _statistic(
    compare: Callable[[Matrix, Side, Side], float],
    settings: dict[str, Any],
    *,
    share: float = 1.0,
    scratch: Scratch | None = None,
) -> Pairwise:
    side = partial(_whitened, share=share, loaded=compare is not _mean)
    return of_moments(Steps(_directions, side, compare), settings, scratch=scratch, enough=_check_examples)


def _value(x: Array, y: Array, statistic: Pairwise) -> float:
    pair = paired_layers(x, y)
    _check_examples(len(pair[0].values), [layer.values.shape[1] for layer in pair])
    return statistic.value(*pair)


def _directions(layer: LayerFeatures) -> tuple[Matrix, Matrix, Doubt | None]:
    """An orthonormal basis (n, r) of the centered features, these in it, (r, d), and whether r is doubtful.

    The r directions are those beyond the round-off of the features. In this basis the moments of most of the examples
    are well conditioned, however different the scales of the features.
    """
    rows = layer.values.astype(np.float64)
    basis, scale, components = np.linalg.svd(rows - rows.mean(0), full_matrices=False)
    noise = _noise(rows, scale, layer.epsilon)
    # Round-off reaches about half of the bound.
    least, rank, most = (int((scale > factor * noise).sum()) for factor in (2, 1, 0.75))
    doubt = None
    if least < most:
        share = np.square(scale[least:most]).sum() / np.square(scale).sum()
        doubt = Doubt(
            f"the rank of the features is not clear at their precision: {rank} is taken, {least} to {most} are "
            f"possible, and the directions in doubt hold {share:.1g} of the variance"
        )
    return basis[:, :rank], scale[:rank, None] * components[:rank], doubt


def _noise(rows: Matrix, scale: Matrix, epsilon: float) -> float:
    """Up to which singular value a direction may be round-off.

    Rounding to nearest leaves an error of ε/√12 of each entry, and the largest singular value of such noise is about
    that times (√n + √d) (Marchenko & Pastur 1967); twice as much is taken. NumPy's ``matrix_rank`` has a bound for the
    worst case, which also covers sums; of types of 16 bits it would leave no direction.
    """
    n, d = rows.shape
    entries = 2 * epsilon / np.sqrt(12) * np.sqrt(np.square(rows).mean()) * (np.sqrt(n) + np.sqrt(d))
    worst = scale.max() * max(n, d) * epsilon if epsilon < _HALF else 0.0
    return float(max(entries, worst))


def _whitened(moments: Matrix, loadings: Matrix, *, share: float, loaded: bool) -> Side:
    """What makes the rows orthonormal, (r, s), with s principal directions that hold the share of the variance.

    Args:
        moments: (r, r) of the rows.
        loadings: (r, d): the features in their basis.
        share: of the variance.
        loaded: whether the features in the new basis, (s, d), are wanted too.
    """
    scale = np.linalg.norm(loadings, axis=1) if share < 1 else np.ones(len(moments))
    values, vectors = np.linalg.eigh(scale[:, None] * moments * scale)
    values, vectors = values[::-1], vectors[:, ::-1]
    rank = int((values > GONE * scale.max() ** 2).sum())
    if share < 1 and rank:
        explained = np.cumsum(values[:rank])
        rank = int(np.searchsorted(explained, share * explained[-1])) + 1
    transform = scale[:, None] * vectors[:, :rank] / np.sqrt(values[:rank])
    return (transform, transform.T @ moments @ loadings) if loaded else (transform,)


def _mean(moments: Matrix, x: Side, y: Side) -> float:
    return float(np.linalg.svd(x[0].T @ moments @ y[0], compute_uv=False).mean())


def _weighted_by_first(moments: Matrix, x: Side, y: Side) -> float:
    left, correlations, _ = np.linalg.svd(x[0].T @ moments @ y[0], full_matrices=False)
    return _weighted(correlations, left, x)


def _weighted_by_both(moments: Matrix, x: Side, y: Side) -> float:
    left, correlations, right = np.linalg.svd(x[0].T @ moments @ y[0], full_matrices=False)
    return (_weighted(correlations, left, x) + _weighted(correlations, right.T, y)) / 2


def _weighted(correlations: Matrix, variates: Matrix, side: Side) -> float:
    return float(np.average(correlations, weights=np.abs(variates.T @ side[1]).sum(1)))


def _check_examples(examples: int, widths: Sequence[int]) -> None:
    """The rank of d features of n examples is n - 1 at most; there, every other layer correlates perfectly."""
    if examples <= max(widths) + 1:
        raise FeatureError(
            "CCA needs more examples than features: otherwise it is always 1. The widest layer has "
            f"{max(widths)} features, but the smallest sample has {examples} examples (standard errors leave some out, "
            "and permutation tests use 2,048). Use more --examples or narrower layers, or leave out mean-cca, svcca "
            "and pwcca."
        )
