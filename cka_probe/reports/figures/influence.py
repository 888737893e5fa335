"""The images that change a measure most: a table of the page."""

from __future__ import annotations

from cka_probe.reports.figures.figure import ReportFigure, Selection


def _applies(selection: Selection) -> bool:
    return bool(selection.similarity.influence)


INFLUENCE = ReportFigure(
    name="influence", title="The images that move it most", applies=_applies, template="influence.html"
)
