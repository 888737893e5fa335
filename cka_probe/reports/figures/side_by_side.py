"""The heatmaps of all measures for one pair of models, with tables of how far the measures agree."""

from __future__ import annotations

from cka_probe.reports.figures.figure import ReportFigure, Selection
from cka_probe.results.agreement import agreement


def _applies(selection: Selection) -> bool:
    return any(agreement(selection.results, *pair) is not None for pair in selection.pairs)


SIDE_BY_SIDE = ReportFigure(
    name="measures",
    title="The measures side by side",
    applies=_applies,
    per_measure=False,
    template="measures.html",
)
