"""The models as wholes: the mean similarity of each with each, and the tree that joins them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cka_probe.measures.catalogue import about
from cka_probe.reports.figures.atlas import several_models
from cka_probe.reports.figures.figure import ReportFigure, Selection
from cka_probe.reports.figures.heatmaps import value_colours
from cka_probe.reports.interactive import GAP, PALETTE, color_axis, figure, text
from cka_probe.results.findings import model_matrix

_HEIGHT, _NAME = 440, 26
_MOST_NUMBERS = 12  # models up to which the cells carry their values


def _page(selection: Selection) -> list[Any]:
    similarity = selection.similarity
    matrix, distance = model_matrix(similarity), about(similarity.measure).kind == "distance"
    names = [text(model, _NAME) for model in similarity.models]
    drawn = [_matrix(matrix, names, selection)]
    if np.isfinite(matrix).all():  # models without a value between them make no tree
        drawn.append(_tree(matrix if distance else 1 - matrix, names, distance=distance))
    return drawn


def _matrix(matrix: NDArray[np.float64], names: Sequence[str], selection: Selection) -> Any:
    colours = value_colours(selection.similarity)
    models = [text(model) for model in selection.similarity.models]
    trace = {
        "type": "heatmap", "z": matrix, "coloraxis": "coloraxis", "hoverongaps": False,
        "hovertemplate": "<b>%{z:.3f}</b><br>%{text}<extra></extra>",
        "text": [[f"{row}<br>{col}" for col in models] for row in models],
    }  # fmt: skip
    if len(models) <= _MOST_NUMBERS:
        trace["texttemplate"] = "%{z:.2f}"
    axis = {"tickvals": list(range(len(names))), "ticktext": names, "showgrid": False}
    return figure(
        [trace], _HEIGHT, coloraxis=color_axis(colours), xaxis=axis, yaxis=axis, plot_bgcolor=GAP,
        meta={"ranges": dict(colours.ranges)},
    )  # fmt: skip


def _tree(distances: NDArray[np.float64], names: Sequence[str], *, distance: bool) -> Any:
    """A dendrogram of the models by average linkage."""
    from scipy.cluster.hierarchy import dendrogram, linkage
    from scipy.spatial.distance import squareform

    joined = linkage(squareform(np.clip(distances, 0, None), checks=False), "average")
    tree = dendrogram(joined, labels=list(names), no_plot=True)
    traces = [
        {
            "type": "scatter", "x": x, "y": y, "mode": "lines", "line": {"color": PALETTE[0], "width": 2},
            "hoverinfo": "x", "showlegend": False,
        }
        for x, y in zip(tree["dcoord"], tree["icoord"], strict=True)
    ]  # fmt: skip
    ticks = {"tickvals": [5 + 10 * index for index in range(len(names))], "ticktext": tree["ivl"]}
    title = "mean distance" if distance else "1 - mean similarity"
    return figure(
        traces, _HEIGHT, xaxis={"title": {"text": title}, "rangemode": "tozero"}, yaxis={**ticks, "showgrid": False}
    )


MODEL_MATRIX = ReportFigure(
    name="models",
    title="Model by model",
    note="The mean over layers at matched relative depth, and the models joined by it (average linkage of 1 - mean, or "
    "of the mean distance).",
    applies=several_models,
    page=_page,
    grid=True,
)
