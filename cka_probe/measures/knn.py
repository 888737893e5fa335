"""Mutual k-nearest neighbours (Huh et al. 2024, appendix A)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray

from cka_probe.errors import FeatureError, SpecError
from cka_probe.measures.arrays import Array, defined, is_constant, paired_matrices
from cka_probe.measures.collected import Collected, Order, Pairwise
from cka_probe.measures.measure import About, Measure, Setup
from cka_probe.ranges import Range

NEIGHBOURS = 10
"""As in Huh et al. (2024)."""


@dataclass(frozen=True)
class MutualKNN(Measure):
    """The share of nearest neighbours in common: see `mutual_knn`.

    Attributes:
        neighbours: k.
    """

    name = "mutual-knn"
    about = About(
        "mutual k-NN",
        range="0 to 1",
        invariant_to="orthogonal maps and scaling of each example",
        source="Huh et al. 2024",
        fisher_interval=True,
    )

    neighbours: Annotated[int, Range(1, 10**6, whole=True)] = NEIGHBOURS

    @property
    def description(self) -> str:
        """The title and k."""
        return f"{self.about.title}, k = {self.neighbours}"

    def __call__(self, x: Array, y: Array) -> float:
        """As `mutual_knn`."""
        return mutual_knn(x, y, neighbours=self.neighbours)

    def check(self, examples: int) -> None:
        """Raise a SpecError where there are as many neighbours as examples."""
        if self.neighbours >= examples:
            raise SpecError(f"The neighbours of {self} must be fewer than the {examples} examples. Take fewer.")

    def start(self, setup: Setup) -> Collected:
        """Of many layers."""
        return Collected(setup, _statistic(self.neighbours))


def mutual_knn(x: Array, y: Array, *, neighbours: int = NEIGHBOURS) -> float:
    """The mean share of an example's nearest neighbours in x that are its nearest in y too (Huh et al. 2024, eq. 11).

    Neighbours are those of the largest cosine, the example itself left out. Invariant to orthogonal maps and to the
    scale of each example; not to translation. Of independent features it is about k/(n - 1).

    Args:
        x: (n, d₁) features, an array or a tensor; computed in float64.
        y: (n, d₂) features of the same examples.
        neighbours: k, at least 1 and below n.

    Returns:
        The similarity, in [0, 1].

    Raises:
        FeatureError: the arrays are not (n, d) with the same n ≥ 4, not finite, or constant over the examples; or k
            is not between 1 and n - 1.
    """
    pair = paired_matrices(x, y)
    _check_neighbours(neighbours, len(pair[0]))
    defined(float("nan") if any(map(is_constant, pair)) else 0.0, "the neighbourhood")
    return _statistic(neighbours).value(*pair)


def _statistic(neighbours: int) -> Pairwise:
    """Of many layers.

    Without a block of examples, the others keep the neighbours that they have: new ones in their place would be
    further away, and the jackknife would find too large an error.
    """
    return Pairwise(
        lambda features, _: _neighbourhood(features, neighbours=neighbours), _compared, {"neighbours": neighbours},
        lambda examples, _: _check_neighbours(neighbours, examples),
    )  # fmt: skip


def _neighbourhood(x: NDArray[Any], *, neighbours: int) -> NDArray[np.int64]:
    """The numbers of the nearest of each example, (n, k)."""
    from sklearn import config_context
    from sklearn.neighbors import NearestNeighbors

    # scikit-learn's cosine distance is made in blocks of this many MiB.
    with config_context(working_memory=256):
        search = NearestNeighbors(n_neighbors=neighbours, metric="cosine", algorithm="brute").fit(x.astype(np.float64))
        return np.asarray(search.kneighbors(return_distance=False))


def _compared(
    x: NDArray[np.int64], y: NDArray[np.int64], left_out: Sequence[slice], orders: Sequence[Order]
) -> tuple[list[float], list[float]]:
    """The common neighbours without each run of examples, relative to the geometric mean of how many there are.

    NaN where none are left.
    """
    common = _common(x, y)
    values = []
    for run in left_out:
        first, second = (_stays(nearest, run) for nearest in (x, y))
        left = first.sum() * second.sum()
        values.append(float((common & first).sum() / np.sqrt(left)) if left else float("nan"))
    return values, [float(_common(x, _shuffled(y, order)).mean()) for order in orders]


def _common(x: NDArray[np.int64], y: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which of the neighbours in x are neighbours in y, (n, k)."""
    return np.asarray((x[:, :, None] == y[:, None, :]).any(2))


def _stays(nearest: NDArray[np.int64], run: slice) -> NDArray[np.bool_]:
    """Which neighbours there are without a run of examples: neither they nor whose neighbours they are lie in it."""
    stays = (nearest < run.start) | (nearest >= run.stop)
    stays[run] = False
    return np.asarray(stays)


def _shuffled(nearest: NDArray[np.int64], order: Order) -> NDArray[np.int64]:
    """Example i is now what example order[i] was, and so are its neighbours."""
    return np.asarray(np.argsort(order)[nearest[order]])


def _check_neighbours(neighbours: int, examples: int) -> None:
    if not 1 <= neighbours < examples:
        raise FeatureError(
            f"The number of neighbours must be at least 1 and below the number of examples, but is {neighbours} of "
            f"{examples}. A part of the images is left out at a time for the errors."
        )
