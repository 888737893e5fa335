"""All layers of all models in one matrix."""

from __future__ import annotations

from typing import Any

import numpy as np

from cka_probe.reports.drawing import Axes, Figure
from cka_probe.reports.figures.figure import ReportFigure, Selection
from cka_probe.reports.figures.heatmaps import value_colours
from cka_probe.reports.interactive import Panel, heatmap
from cka_probe.reports.plots import captioned_axes, plot_heatmap, short
from cka_probe.results.similarity import Similarity


def plot_atlas(
    similarity: Similarity,
    ax: Axes | None = None,
    *,
    vmin: float = 0.0,
    vmax: float | None = None,
    colorbar: bool = True,
) -> Axes:
    """The joint matrix of all layers of all models as one heatmap, with lines between the models.

    Args:
        similarity: the joint result of a comparison.
        ax: as for `plot_heatmap`.
        vmin: as for `plot_heatmap`.
        vmax: as for `plot_heatmap`.
        colorbar: as for `plot_heatmap`.

    Returns:
        The axes.
    """
    ax = plot_heatmap(similarity, ax, vmin=vmin, vmax=vmax, colorbar=colorbar)
    for axis, layers, line in ((ax.xaxis, similarity.cols, ax.axvline), (ax.yaxis, similarity.rows, ax.axhline)):
        models = list(dict.fromkeys(layer.model for layer in layers))
        counts = [sum(layer.model == model for layer in layers) for model in models]
        ends = np.cumsum(counts)
        for end in ends[:-1]:
            line(end, color="white", linewidth=1.2)
        axis.set_ticks(
            (ends - np.array(counts) / 2).tolist(), labels=[short(model) for model in models], parse_math=False,
            rotation=45 if axis is ax.xaxis else 0, ha="right", fontsize=9,
        )  # fmt: skip
        axis.set_label_text("")
    return ax


def several_models(selection: Selection) -> bool:
    """Whether there are more than the two models of one heatmap."""
    return len(selection.similarity.models) > 2


def _plot(selection: Selection) -> dict[str, Figure]:
    return {"": captioned_axes(plot_atlas(selection.similarity), selection.similarity)}


def _page(selection: Selection) -> list[Any]:
    return [heatmap(selection.similarity, value_colours(selection.similarity), Panel(alone=True))]


ATLAS = ReportFigure(name="atlas", title="All layers of all models", applies=several_models, plot=_plot, page=_page)
