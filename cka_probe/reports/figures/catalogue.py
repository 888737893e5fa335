"""The figures of a comparison, in the order of the page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from cka_probe.reports.figures.atlas import ATLAS
from cka_probe.reports.figures.curve import CURVE
from cka_probe.reports.figures.figure import ReportFigure, Selection
from cka_probe.reports.figures.heatmaps import HEATMAPS
from cka_probe.reports.figures.influence import INFLUENCE
from cka_probe.reports.figures.layers import LAYERS
from cka_probe.reports.figures.model_matrix import MODEL_MATRIX
from cka_probe.reports.figures.profile import PROFILE
from cka_probe.reports.figures.side_by_side import SIDE_BY_SIDE
from cka_probe.results.findings import model_pairs
from cka_probe.results.similarity import Similarity

FIGURES: tuple[ReportFigure, ...] = (
    HEATMAPS,
    PROFILE,
    CURVE,
    INFLUENCE,
    LAYERS,
    SIDE_BY_SIDE,
    ATLAS,
    MODEL_MATRIX,
)


def selections(results: Mapping[str, Similarity], panels: Mapping[str, Any] | None = None) -> dict[str, Selection]:
    """Measure -> what its figures show.

    Args:
        results: measure -> similarity.
        panels: the pairs of models to show (``pairs``) and how many stand in a row (``columns``); None for all pairs of
            different models.
    """
    columns = (panels or {}).get("columns")
    return {
        measure: Selection(
            similarity,
            [(first, second) for first, second in panels["pairs"]] if panels else model_pairs(similarity),
            results,
            columns,
        )
        for measure, similarity in results.items()
    }


def drawn_of(figure: ReportFigure, chosen: Mapping[str, Selection]) -> Iterator[tuple[str, Selection]]:
    """The measures for which a figure is drawn, each with its selection: the first alone if it is one for all."""
    for measure, selection in chosen.items():
        if figure.applies(selection):
            yield measure, selection
        if not figure.per_measure:
            return
