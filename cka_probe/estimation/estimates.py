"""What a measure found, and the permutation test that is the same for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Matrix = NDArray[np.float64]

_ROUND_OFF = 1e-12
"""Of the largest value under any permutation: one that changes the order of additions alone reaches the value."""


@dataclass(frozen=True)
class Requests:
    """What is wanted of a measure beside its values, their errors and their control.

    Attributes:
        groups: for each layer, the number of its subject.
        permutations: of a permutation test; none where 0.
        curve: at how many examples to compute the values, beside all of them; ascending.
        influence: whether to compute what each example does to each value; measures that cannot say nothing.
    """

    groups: Sequence[int] = ()
    permutations: int = 0
    curve: Sequence[int] = ()
    influence: bool = False


VALUES_ONLY = Requests()


class Point(NamedTuple):
    """A measure on the first so many examples: (layers, layers) values and standard errors."""

    examples: int
    values: Matrix
    std_error: Matrix


@dataclass(frozen=True)
class Estimates:
    """What a measure found: (layers, layers) float64 matrices, and how they were computed.

    Attributes:
        values: the measure; NaN in the row and column of a layer that is constant over the examples.
        std_error: its standard error; NaN where there was one batch, or too few examples.
        null: the same measure with the second layer's examples shuffled.
        details: settings and findings of the measure, fit for YAML.
        p_value: of a permutation test; None where there was none.
        p_value_max: the same, corrected for the choice of the best pair of layers.
        curve: the measure at growing numbers of examples.
        influence: (examples, layers, layers) float32: by how much the value falls where an example is left out.
        batches: the effective number of batches behind each error; None for a measure that has its errors otherwise.
    """

    values: Tensor
    std_error: Tensor
    null: Tensor
    details: dict[str, Any] = field(default_factory=dict)
    p_value: Matrix | None = None
    p_value_max: Matrix | None = None
    curve: Sequence[Point] = ()
    influence: NDArray[np.float32] | None = None
    batches: Tensor | None = None


def p_values(values: Matrix, shuffled: Matrix, groups: Sequence[int]) -> tuple[Matrix, Matrix]:
    """One-sided permutation p-values, (c + 1)/(P + 1) with c the permutations that reach the value.

    Args:
        values: (layers, layers).
        shuffled: (P, layers, layers): the same on permuted examples.
        groups: for each layer, the number of its subject.

    Returns:
        (layers, layers) p-values of each pair of layers by itself; and p-values against the largest value of all pairs
        of the same two subjects, recomputed inside each permutation (Westfall & Young 1993): that of the best pair is
        corrected for its selection. The pairs of one layer with itself are no part of that largest value. NaN where
        the value is.
    """
    count = len(shuffled)
    reach = values - _ROUND_OFF * np.fmax(np.abs(values), np.fmax.reduce(np.abs(shuffled)))
    own = np.eye(len(values), dtype=bool)
    largest = np.full_like(shuffled, -np.inf)
    subjects = np.asarray(groups)
    for row in np.unique(subjects):
        for col in np.unique(subjects):
            block = np.ix_(subjects == row, subjects == col)
            inside = np.where(own | np.isnan(shuffled), -np.inf, shuffled)[:, block[0], block[1]]
            largest[:, block[0], block[1]] = inside.max((1, 2), keepdims=True)
    each = ((shuffled >= reach).sum(0) + 1) / (count + 1)
    corrected = np.where(own, each, ((largest >= reach).sum(0) + 1) / (count + 1))
    undefined = np.isnan(values)
    each, corrected = np.where(undefined, np.nan, each), np.where(undefined, np.nan, corrected)
    upper = np.triu_indices(len(values))  # a permutation of the one side is the inverse one of the other
    for matrix in (each, corrected):
        matrix.T[upper] = matrix[upper]
    return each, corrected
