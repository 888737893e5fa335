"""Similarity -> where two models agree and part. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from cka_probe.measures.catalogue import about
from cka_probe.results.similarity import Layer, Similarity


@dataclass(frozen=True)
class Cell:
    """One pair of layers.

    Attributes:
        first: a layer of the first model.
        second: a layer of the second.
        first_depth: its relative depth, above 0 to 1.
        second_depth: its relative depth, above 0 to 1.
        value: the measure.
        std_error: its standard error; NaN where the data were one batch.
        null: the measure on shuffled examples.
        p_value: of a permutation test, corrected for the choice of the best pair of layers; NaN where there was none.
    """

    first: Layer
    second: Layer
    first_depth: float
    second_depth: float
    value: float
    std_error: float
    null: float
    p_value: float


@dataclass(frozen=True)
class PairFindings:
    """How two models compare.

    Attributes:
        first: the name of one.
        second: the name of the other.
        largest: the pair of layers that are closest: of the largest similarity, or the smallest distance. The best of
            many values is too good by selection.
        matched: for each layer of the deeper model, the layer of the other at the nearest relative depth.
        best: for each layer of the deeper model, the layer of the other that it is closest to.
        smallest: of `matched`, the one that is least close: where the two part.
        mean: of `matched`.
        mean_error: an upper bound of its standard error: the mean of the standard errors.
        by_first: whether the first is the deeper model, also where both are equally deep.
    """

    first: str
    second: str
    largest: Cell
    matched: tuple[Cell, ...]
    best: tuple[Cell, ...]
    smallest: Cell
    mean: float
    mean_error: float
    by_first: bool

    def depth(self, cell: Cell) -> float:
        """Where a cell of `matched` or `best` stands along the depth: the relative depth of the deeper model's layer.

        So the best match of a layer stands above its match at the same depth, wherever in the other model it is.
        """
        return cell.first_depth if self.by_first else cell.second_depth


def relative_depths(layers: int) -> NDArray[np.float64]:
    """The relative depth of each of so many layers: the share of them that has been passed, up to 1."""
    return np.arange(1, layers + 1) / layers


def model_pairs(similarity: Similarity) -> list[tuple[str, str]]:
    """The pairs of different models, in their order; of a model with itself where there is but one."""
    rows, cols = (list(dict.fromkeys(layer.model for layer in side)) for side in (similarity.rows, similarity.cols))
    if similarity.rows == similarity.cols:
        return list(combinations(rows, 2)) or [(rows[0], rows[0])]
    return [(row, col) for row in rows for col in cols]


def compare_pair(similarity: Similarity, first: str, second: str) -> PairFindings | None:
    """The findings on two models; None where no pair of their layers has a value."""
    block = similarity.between(first, second)
    if not np.isfinite(block.values).any():
        return None
    rows, cols = (relative_depths(count) for count in block.values.shape)
    distance = np.abs(rows[:, None] - cols[None, :])
    by_row = len(rows) >= len(cols)
    p_value_max = np.full(block.values.shape, np.nan) if block.p_value_max is None else block.p_value_max
    measured = about(similarity.measure)
    filled = np.where(np.isfinite(block.values), measured.closeness(block.values), -np.inf)

    def cells(indices: Iterable[tuple[int, int]]) -> tuple[Cell, ...]:
        return tuple(
            Cell(
                block.rows[row], block.cols[col], rows[row], cols[col],
                *(float(part[row, col]) for part in (block.values, block.std_error, block.null, p_value_max)),
            )
            for row, col in indices
            if np.isfinite(block.values[row, col])
        )  # fmt: skip

    def along(choice: NDArray[np.intp]) -> list[tuple[int, int]]:
        pairs = enumerate(choice.tolist())
        return [(deeper, other) if by_row else (other, deeper) for deeper, other in pairs]

    axis = 1 if by_row else 0
    matched, best = cells(along(distance.argmin(axis))), cells(along(filled.argmax(axis)))
    (largest,) = cells([divmod(int(filled.argmax()), len(cols))])
    matched = matched or (largest,)
    return PairFindings(
        first, second, largest, matched, best,
        smallest=min(matched, key=lambda cell: measured.closeness(np.array(cell.value)).item()),
        mean=float(np.mean([cell.value for cell in matched])),
        mean_error=float(np.mean([cell.std_error for cell in matched])),
        by_first=by_row,
    )  # fmt: skip


def model_matrix(similarity: Similarity) -> NDArray[np.float64]:
    """The mean at matched relative depth of each model with each, (models, models); with itself, that of equals.

    Args:
        similarity: a joint result, the same layers along both sides.
    """
    models = similarity.models
    matrix = np.eye(len(models)) * about(similarity.measure).identical
    for (row, first), (col, second) in combinations(enumerate(models), 2):
        found = compare_pair(similarity, first, second)
        matrix[row, col] = matrix[col, row] = found.mean if found else np.nan
    return matrix


def control_band(similarity: Similarity) -> tuple[float, float]:
    """Between which 95% of the shuffled control between different layers lies; NaN where there is none.

    Around 0 for the debiased estimator; for the biased one, around its bias. All layers of a batch share one
    permutation, so that the control's cells are not independent of each other, and the band is a rough one.
    """
    control = off_diagonal(similarity, similarity.null)
    if not len(control):
        return float("nan"), float("nan")
    low, high = np.quantile(control, (0.025, 0.975))
    return float(low), float(high)


def off_diagonal(similarity: Similarity, array: NDArray[np.float64]) -> NDArray[np.float64]:
    """The finite entries of a (rows, cols) array between different layers."""
    same = np.array([[row == col for col in similarity.cols] for row in similarity.rows])
    return array[~same & np.isfinite(array)]


def matched_curves(similarity: Similarity, first: str, second: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """A pair's layers at matched relative depth, at the growing numbers of examples of the curve.

    Args:
        similarity: with a `cka_probe.results.similarity.Curve`.
        first: the name of a model.
        second: the name of another.

    Returns:
        The values and their standard errors, each (points, pairs of layers); no pair where no value is defined. The
        mean of the standard errors is an upper bound of that of the mean.
    """
    found = compare_pair(similarity, first, second)
    curve = similarity.curve
    assert curve is not None, "matched_curves() of a similarity without a curve"
    if found is None:
        return np.empty((len(curve.examples), 0)), np.empty((len(curve.examples), 0))
    row_of, col_of = ({layer: index for index, layer in enumerate(side)} for side in (similarity.rows, similarity.cols))
    rows, cols = [row_of[cell.first] for cell in found.matched], [col_of[cell.second] for cell in found.matched]
    return curve.values[:, rows, cols], curve.std_error[:, rows, cols]
