"""What a figure of a report declares: its name, when it applies, and how matplotlib and plotly draw it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cka_probe.results.similarity import Similarity

if TYPE_CHECKING:
    from cka_probe.reports.drawing import Figure


@dataclass(frozen=True)
class Selection:
    """What a figure shows: one measure of a run, and the pairs of models to compare.

    Attributes:
        similarity: the result of the measure that is shown.
        pairs: of models, in order.
        results: measure -> similarity, for all measures of the run.
        columns: panels in a row; None for as many as fit.
    """

    similarity: Similarity
    pairs: Sequence[tuple[str, str]]
    results: Mapping[str, Similarity]
    columns: int | None = None


@dataclass(frozen=True, kw_only=True)
class ReportFigure:
    """A figure of a report. A new one is a file that defines it and a line in `cka_probe.reports.figures`.

    Attributes:
        name: of its files (``heatmap.png``), and of its section in the page.
        title: of its section in the page.
        note: the text below it in the page.
        applies: whether a selection has what it shows.
        plot: draws it with matplotlib for PNG, SVG and PDF. Returns file name ending -> figure: ``{"": figure}``, or
            one ending per figure, such as ``"-a-b"``. None: no files.
        page: draws it with plotly for the page, from the same selection. Returns one figure per panel; None in the
            place of a panel that has no value. None: nothing in the page, or only what `template` writes.
        per_measure: whether each measure has one of its own, or the run one for all.
        grid: whether the panels stand beside each other, or each takes the whole width.
        template: of its section in the page.
    """

    name: str
    title: str
    applies: Callable[[Selection], bool]
    plot: Callable[[Selection], Mapping[str, Figure]] | None = None
    page: Callable[[Selection], Sequence[Any]] | None = None
    note: str = ""
    per_measure: bool = True
    grid: bool = False
    template: str = "section.html"


def always(_: Selection) -> bool:
    """Of a figure that every result has."""
    return True
