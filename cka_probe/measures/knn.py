"""Mutual k-nearest neighbours (Huh et al. 2024, appendix A)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from math import sqrt
from typing import TYPE_CHECKING, Annotated

import numpy as np

from cka_probe.errors import FeatureError, SpecError
from cka_probe.estimation.arrays import Array, LayerFeatures, paired_layers
from cka_probe.estimation.collected import Collected, Doubt, Order, Pairwise
from cka_probe.estimation.measure import About, Measure, Setup
from cka_probe.runtime.ranges import Range

if TYPE_CHECKING:
    from scipy.sparse import csr_array

NEIGHBOURS = 10
"""As in Huh et al. (2024)."""

_ROUND_OFF = 16 * np.finfo(np.float64).eps
"""Of a cosine: neighbours closer to each other than that are equally near."""

_RANDOM = "the features of {images} are all 0 and have no direction. Their neighbours count as drawn at random"

_BLOCK = 1 << 24  # of cosines at a time


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
            raise SpecError(
                f"The neighbours of {self} must be fewer than the {examples} examples. Use fewer, or more images."
            )

    def start(self, setup: Setup) -> Collected:
        """Of many layers."""
        return Collected(setup, _statistic(self.neighbours))


def mutual_knn(x: Array, y: Array, *, neighbours: int = NEIGHBOURS) -> float:
    """The mean share of an example's nearest neighbours in x that are its nearest in y too (Huh et al. 2024, eq. 11).

    Neighbours are those of the largest cosine, the example itself left out. Where several tie for the last places, each
    counts with its share of them: the value is the expectation over ties that are broken at random, on either side by
    itself, so that of independent features it is k/(n - 1) on average, with ties too. Equal arrays give 1. Nearly equal
    ones with ties give less: round-off decides which of the tied examples are nearest, if it decides at all. The
    features of an example that are all 0 have no direction; its neighbours are all other examples, with equal shares.
    Invariant to orthogonal maps and to the scale of each example; not to translation.

    Args:
        x: (n, d₁) features, an array or a tensor; computed in float64.
        y: (n, d₂) features of the same examples.
        neighbours: k, at least 1 and below n.

    Returns:
        The similarity, in [0, 1]. It is not clamped: round-off can exceed 1 by about 1e-15.

    Raises:
        FeatureError: the arrays are not (n, d) with the same n ≥ 4, not finite, or constant over the examples; or k
            is not between 1 and n - 1.
    """
    pair = paired_layers(x, y)
    _check_neighbours(neighbours, len(pair[0].values))
    return _statistic(neighbours).value(*pair)


@dataclass(frozen=True, eq=False)
class _Neighbourhoods:
    """The neighbours of each example.

    Attributes:
        shares: (n, n) sparse: 1 for a neighbour. Those that tie for the last places have an equal share of them each.
        left: their sum without each run of examples.
        digest: of the features, by which equal ones are known.
        doubt: about examples whose features are all 0.
    """

    shares: csr_array
    left: list[float]
    digest: bytes
    doubt: Doubt | None

    @classmethod
    def of(cls, layer: LayerFeatures, left_out: Sequence[slice], *, neighbours: int) -> _Neighbourhoods:
        """Those of a layer by their cosine, the example itself left out."""
        from scipy.sparse import csr_array, vstack

        rows = layer.values.astype(np.float64)
        norm = np.sqrt(np.square(rows).sum(1))
        unit = rows / np.where(norm > 0, norm, 1)[:, None]
        n, parts = len(unit), []
        at_once = max(1, _BLOCK // n)
        for start in range(0, n, at_once):
            cosines = unit[start : start + at_once] @ unit.T
            own = np.arange(len(cosines))
            cosines[own, start + own] = -np.inf
            last = np.partition(cosines, n - neighbours, axis=1)[:, n - neighbours, None]
            nearer, tied = cosines > last + _ROUND_OFF, abs(cosines - last) <= _ROUND_OFF
            share = (neighbours - nearer.sum(1, keepdims=True)) / tied.sum(1, keepdims=True)
            parts.append(csr_array(np.where(tied, share, nearer).astype(np.float64)))
        shares = csr_array(vstack(parts)) if len(parts) > 1 else parts[0]
        digest = blake2b(np.ascontiguousarray(layer.values).tobytes()).digest()
        zero = np.flatnonzero(norm == 0).tolist()
        return cls(shares, _without(shares, left_out), digest, Doubt(_RANDOM, zero) if zero else None)


def _statistic(neighbours: int) -> Pairwise:
    """Of many layers.

    Without a block of examples, the others keep the neighbours that they have: new ones in their place would be
    further away, and the jackknife would find too large an error.
    """
    return Pairwise(
        partial(_Neighbourhoods.of, neighbours=neighbours), _compared, {"neighbours": neighbours},
        lambda examples, _: _check_neighbours(neighbours, examples),
        lambda state: state.doubt,
    )  # fmt: skip


def _compared(
    x: _Neighbourhoods, y: _Neighbourhoods, left_out: Sequence[slice], orders: Sequence[Order]
) -> tuple[list[float], list[float]]:
    """The common neighbours without each run of examples, relative to the geometric mean of how many there are.

    Of neighbours that tie, the expectation over random draws, which are independent of each other unless the features
    are the same. NaN where none are left.
    """
    same = x.digest == y.digest
    common = x.left if same else _without(x.shares * y.shares, left_out)
    values = [
        found / sqrt(first * second) if first * second else float("nan")
        for found, first, second in zip(common, x.left, y.left, strict=True)
    ]
    total = x.shares.sum()
    return values, [float((x.shares * _shuffled(y.shares, order)).sum() / total) for order in orders]


def _without(shares: csr_array, left_out: Sequence[slice]) -> list[float]:
    """The sum of the entries without the rows and the columns of each run."""
    entries = shares.tocoo()
    row, column = entries.row, entries.col  # coords came with SciPy 1.13
    found = []
    for run in left_out:
        stays = ((row < run.start) | (row >= run.stop)) & ((column < run.start) | (column >= run.stop))
        found.append(float(entries.data[stays].sum()))
    return found


def _shuffled(shares: csr_array, order: Order) -> csr_array:
    """Example i is now what example order[i] was, and so are its neighbours."""
    moved: csr_array = shares[order][:, order]
    return moved


def _check_neighbours(neighbours: int, examples: int) -> None:
    if not 1 <= neighbours < examples:
        raise FeatureError(
            f"The number of neighbours must be at least 1 and below the number of examples, but is {neighbours} of "
            f"{examples} (standard errors leave some examples out). Use fewer neighbours or more images."
        )
