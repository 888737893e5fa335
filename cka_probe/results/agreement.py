"""Several measures of the same layers: where they disagree, and the same layer in two views of a model. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from cka_probe.measures.catalogue import about
from cka_probe.results.findings import model_pairs, relative_depths
from cka_probe.results.similarity import Layer, Similarity
from cka_probe.runtime.names import utf8

if TYPE_CHECKING:
    from pandas import DataFrame

_LEAST_CELLS = 4
"""Layer pairs below which ranks say nothing."""


@dataclass(frozen=True)
class Disagreement:
    """A pair of layers that one measure ranks high among the pairs of two models, and another low.

    Attributes:
        first: a layer of the first model.
        second: a layer of the second.
        near: the measure by which it is among the nearer ones.
        near_rank: its rank by that one, 1 being the most alike.
        far: the measure by which it is among the farther ones.
        far_rank: its rank by that one.
        pairs: of layers that both measures have a value for.
    """

    first: Layer
    second: Layer
    near: str
    near_rank: int
    far: str
    far_rank: int
    pairs: int


@dataclass(frozen=True)
class Agreement:
    """How alike several measures order the layer pairs of two models.

    Attributes:
        first: the name of one model.
        second: the name of the other.
        measures: those with values for this pair of models.
        correlation: (measures, measures): Spearman's rank correlation over layer pairs, distances with their sign
            turned; NaN where two measures share fewer than 4 pairs, or one is constant.
        disagreements: the layer pairs whose rank differs most, the largest difference first.
    """

    first: str
    second: str
    measures: tuple[str, ...]
    correlation: NDArray[np.float64]
    disagreements: tuple[Disagreement, ...]


def agreement(results: Mapping[str, Similarity], first: str, second: str, *, shown: int = 5) -> Agreement | None:
    """How alike the measures of a comparison order the layer pairs of two models.

    Args:
        results: measure -> similarity, of the same layers.
        first: a model.
        second: another, or the same: then each pair of its layers counts once.
        shown: disagreements to find, at most.

    Returns:
        None where fewer than two measures have values.
    """
    blocks = {measure: similarity.between(first, second) for measure, similarity in results.items()}
    closeness = {
        measure: about(measure).closeness(block.values)
        for measure, block in blocks.items()
        if np.isfinite(block.values).any()
    }
    if len(closeness) < 2:
        return None
    block = next(iter(blocks.values()))
    counted = np.ones(block.values.shape, dtype=bool)
    if first == second:
        counted = np.triu(counted, 1)
    measures = tuple(closeness)
    correlation = np.eye(len(measures))
    widest: dict[tuple[int, int], tuple[float, Disagreement]] = {}
    for (i, one), (j, other) in combinations(enumerate(measures), 2):
        where = np.argwhere(counted & np.isfinite(closeness[one]) & np.isfinite(closeness[other]))
        ranks = [_ranks(closeness[measure][tuple(where.T)]) for measure in (one, other)]
        correlation[i, j] = correlation[j, i] = _correlation(*ranks)
        if len(where) < _LEAST_CELLS:
            continue
        for cell, a, b in zip(map(tuple, where.tolist()), *ranks, strict=True):
            gap = abs(a - b) / len(where)
            if gap > widest.get(cell, (0.0,))[0]:
                near, far = sorted([(a, one), (b, other)])
                widest[cell] = gap, Disagreement(
                    block.rows[cell[0]], block.cols[cell[1]], near[1], round(near[0]), far[1], round(far[0]), len(where)
                )  # fmt: skip
    ordered = sorted(widest.values(), key=lambda found: -found[0])
    return Agreement(first, second, measures, correlation, tuple(found for _, found in ordered[:shown]))


def view_pairs(similarity: Similarity) -> list[tuple[str, str]]:
    """The pairs of subjects that are one model on two versions of the images: their layers are the same, by name."""
    model = {one.name: one.model for one in similarity.provenance.subjects if one.model is not None}
    layers = {name: [layer.name for layer in similarity.rows if layer.model == name] for name in model}
    return [
        (first, second)
        for first, second in model_pairs(similarity)
        if first in model and model[first] == model.get(second) and layers[first] == layers[second]
    ]


def layer_table(results: Mapping[str, Similarity]) -> DataFrame | None:
    """The same layer in two views of a model, a row for each measure; None where there are no two views of one.

    The columns are first, second, layer, depth (relative, up to 1), measure, and the numbers of `Similarity.to_frame`.
    """
    from pandas import DataFrame, concat

    parts = []
    for similarity in results.values():
        for first, second in view_pairs(similarity):
            block = similarity.between(first, second)
            frame = block.to_frame().iloc[:: len(block.cols) + 1].reset_index(drop=True)  # the diagonal
            numbers = frame.drop(columns=["row_model", "row_layer", "col_model", "col_layer"])
            labels = {"first": utf8(first), "second": utf8(second), "layer": frame["row_layer"]}
            parts.append(concat([DataFrame({**labels, "depth": relative_depths(len(frame))}), numbers], axis=1))
    return concat(parts, ignore_index=True) if parts else None


def _ranks(closeness: NDArray[np.float64]) -> NDArray[np.float64]:
    """1 for the nearest; ties share the mean of theirs."""
    from scipy.stats import rankdata

    ranks: NDArray[np.float64] = rankdata(-closeness)
    return ranks


def _correlation(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    if len(x) < _LEAST_CELLS or np.ptp(x) == 0 or np.ptp(y) == 0:
        return float("nan")
    return float(np.corrcoef(x, y)[0, 1])
