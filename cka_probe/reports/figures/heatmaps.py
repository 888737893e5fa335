"""A heatmap for each pair of models, on one colour scale."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import Any

import numpy as np

from cka_probe.measures.catalogue import about
from cka_probe.reports.drawing import Figure, FigureCanvasAgg
from cka_probe.reports.figures.figure import ReportFigure, Selection, always
from cka_probe.reports.interactive import Colours, Panel, heatmap
from cka_probe.reports.plots import captioned, colorbar_of, highest, inches_of, measure_name, plot_heatmap
from cka_probe.results.findings import model_pairs, off_diagonal
from cka_probe.results.similarity import Similarity


def plot_pairs(
    similarity: Similarity,
    *,
    pairs: Sequence[tuple[str, str]] | None = None,
    columns: int | None = None,
    vmin: float = 0.0,
    vmax: float | None = None,
) -> Figure:
    """A heatmap for each pair of models (of the model with itself, where there is one), on one colour scale.

    Args:
        similarity: the joint result of a comparison.
        pairs: which, the model along x before that along y; all of different models where None. A pair that has no
            value is left out, as two networks have no distance, unless no pair has one.
        columns: panels in a row; as many as there is room for where None.
        vmin: as for `plot_heatmap`.
        vmax: as for `plot_heatmap`.

    Returns:
        A figure with a caption: examples, batch size, estimator, shuffled control and standard errors.
    """
    if pairs is None:
        # The second model of a pair lies along y, so that a row of panels shares its x axis where there are three.
        pairs = model_pairs(similarity)
        if similarity.rows != similarity.cols:
            pairs = [(col, row) for row, col in pairs]
    vmax = highest(similarity) if vmax is None else vmax
    blocks = [similarity.between(second, first) for first, second in pairs]
    blocks = [block for block in blocks if np.isfinite(block.values).any()] or blocks
    width = max(inches_of(block.values.shape[1]) for block in blocks)
    height = max(inches_of(block.values.shape[0]) for block in blocks)
    columns = min(len(blocks), columns or max(1, min(int(24 // width), 4)))
    rows = ceil(len(blocks) / columns)
    figure = Figure(figsize=(columns * (width + 1.1) + 0.9, rows * (height + 1.1) + 0.8), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False)
    for ax, block in zip(grid.flat, blocks, strict=False):
        plot_heatmap(block, ax, vmin=vmin, vmax=vmax, colorbar=False)
    for ax in grid.flat[len(blocks) :]:
        ax.set_axis_off()
    colorbar_of(list(grid.flat), similarity, vmin, vmax)
    return captioned(figure, similarity)


def value_colours(similarity: Similarity, block: Similarity | None = None) -> Colours:
    """The colours of a measure: from 0 to 1, or to the largest distance; over its data; over those of one panel.

    Args:
        similarity: all values of the measure.
        block: of the panel; the whole where None.
    """
    distance = about(similarity.measure).kind == "distance"
    values = off_diagonal(similarity, similarity.values)
    data = [float(values.min()), float(values.max())] if len(values) else [0.0, 1.0]
    ranges = {"fixed": [0.0, data[1]] if distance else [0.0, 1.0], "data": data}
    if block is not None:
        own = block.values[np.isfinite(block.values)]
        ranges["panel"] = [min(0.0, float(own.min())) if distance else float(own.min()), float(own.max())]
    return Colours(measure_name(similarity), ranges, reverse=distance)


def _page(selection: Selection) -> list[Any]:
    blocks = [selection.similarity.between(second, first) for first, second in selection.pairs]
    valued = [np.isfinite(block.values).any() for block in blocks]  # two networks have no distance
    panel = Panel(alone=sum(valued) == 1)
    return [
        heatmap(block, value_colours(selection.similarity, block), panel) if found else None
        for block, found in zip(blocks, valued, strict=True)
    ]


def _plot(selection: Selection) -> dict[str, Figure]:
    return {"": plot_pairs(selection.similarity, pairs=selection.pairs, columns=selection.columns)}


HEATMAPS = ReportFigure(
    name="heatmap", title="Layer by layer", applies=always, plot=_plot, page=_page, grid=True, template="heatmap.html"
)
