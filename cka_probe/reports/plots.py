"""Similarity -> a heatmap of matplotlib, and what all figures share. Nothing is shown and nothing is saved."""

from __future__ import annotations

from math import ceil
from typing import Any

import numpy as np

from cka_probe.errors import SpecError
from cka_probe.measures.catalogue import about, description
from cka_probe.measures.catalogue import label as measure_label
from cka_probe.reports.drawing import Axes, Figure, FigureCanvasAgg, Normalize, ScalarMappable, drawable, sns
from cka_probe.results.findings import off_diagonal
from cka_probe.results.similarity import Layer, Similarity

COLOURS, CHANGE_COLOURS = "viridis", "RdBu_r"
_UNDEFINED = "0.8"  # the gray of a cell without a value
_CELL_INCHES, _MIN_PANEL_INCHES, _MAX_PANEL_INCHES = 0.2, 3.2, 9.0
_LABEL_INCHES = 0.125  # what a tick label takes along its axis


def plot_heatmap(
    similarity: Similarity,
    ax: Axes | None = None,
    *,
    vmin: float = 0.0,
    vmax: float | None = None,
    colorbar: bool = True,
) -> Axes:
    """The values as a heatmap, the first layer of both sides at the origin.

    Args:
        similarity: of one pair, as `Similarity.between` gives it; the axes take the names of its models.
        ax: drawn into; a new figure's where None.
        vmin: value of the darkest colour; values below it are drawn in that colour.
        vmax: value of the brightest colour; 1 where None, or the largest value of a distance.
        colorbar: draw one beside the axes.

    Returns:
        The axes.
    """
    rows, cols = similarity.values.shape
    vmax = highest(similarity) if vmax is None else vmax
    ax = new_axes(inches_of(cols), inches_of(rows)) if ax is None else ax
    sns.heatmap(
        similarity.values,
        ax=ax,
        vmin=vmin,
        vmax=vmax,
        cmap=_colours(similarity),
        cbar=False,
        rasterized=True,  # one image in an SVG, not a path a cell
    )
    ax.set_facecolor(_UNDEFINED)
    ax.set(xlim=(0, cols), ylim=(0, rows))
    width, height = _axes_inches(ax)
    _label_axis(ax, "x", similarity.cols, width)
    _label_axis(ax, "y", similarity.rows, height)
    if colorbar:
        colorbar_of(ax, similarity, vmin, vmax)
    return ax


def plot_difference(before: Similarity, after: Similarity, ax: Axes | None = None) -> Axes:
    """What changed between two results on the same layers: after - before, on a scale with 0 in its middle.

    Args:
        before: of one pair, or joint.
        after: the same layers, by name, along both sides.
        ax: drawn into; a new figure's where None.

    Returns:
        The axes.

    Raises:
        SpecError: the layers differ.
    """
    for axis, own, other in (("rows", before.rows, after.rows), ("columns", before.cols, after.cols)):
        if [layer.name for layer in own] != [layer.name for layer in other]:
            raise SpecError(f"Both results must have the same layers in their {axis}, but they differ.")
    change = after.values - before.values
    rows, cols = change.shape
    ax = new_axes(inches_of(cols), inches_of(rows)) if ax is None else ax
    reach = max(float(np.nanmax(np.abs(change), initial=0.0)), 0.05)
    sns.heatmap(change, ax=ax, vmin=-reach, vmax=reach, cmap=CHANGE_COLOURS, cbar=False, rasterized=True)
    ax.set_facecolor(_UNDEFINED)
    ax.set(xlim=(0, cols), ylim=(0, rows))
    width, height = _axes_inches(ax)
    _label_axis(ax, "x", after.cols, width)
    _label_axis(ax, "y", after.rows, height)
    bar = ax.figure.colorbar(ScalarMappable(Normalize(-reach, reach), CHANGE_COLOURS), ax=ax, fraction=0.04, pad=0.02)
    bar.set_label(f"Δ {measure_name(after)}, after - before", fontsize=9)
    bar.ax.tick_params(labelsize=7)
    bar.outline.set_visible(False)
    return ax


def captioned(figure: Figure, similarity: Similarity) -> Figure:
    """The figure with the `caption` below it."""
    figure.supxlabel(_wrapped(caption(similarity), figure.get_figwidth()), fontsize=8, color="0.25", parse_math=False)
    return figure


def captioned_axes(ax: Axes, similarity: Similarity) -> Figure:
    """The figure of axes that were made for it alone, `captioned`."""
    figure: Any = ax.figure
    return captioned(figure, similarity)


def caption(similarity: Similarity) -> str:
    """What a reader needs beside the values: examples, batch size, estimator, control level and error."""
    provenance = similarity.provenance
    parts = []
    if provenance.data is not None:
        parts.append(f"{provenance.data.examples:,} images of {short(provenance.data.source)}")
    if provenance.batch_size is not None and provenance.blocks is None:  # a collected measure knows no batches
        parts.append(f"batches of {provenance.batch_size}" if (provenance.batches or 1) > 1 else "one batch")
    parts.append(measure_name(similarity, estimator=True))
    if provenance.pool not in (None, "none"):
        parts.append(f"pooled: {provenance.pool}")
    control = off_diagonal(similarity, similarity.null)
    if len(control):
        what = "shuffled control" if about(similarity.measure).paired else "views swapped at random"
        parts.append(f"{what} {round(control.mean(), 3) + 0:.3f} ± {control.std():.3f}")  # + 0: never "-0.000"
    errors = similarity.std_error[np.isfinite(similarity.std_error)]
    parts.append(f"standard errors up to {errors.max():.3f}" if len(errors) else "no standard errors")
    if about(similarity.measure).kind == "distance":
        parts.append("gray: other layers, no distance")
    return " · ".join(parts)


def measure_name(similarity: Similarity, *, estimator: bool = False) -> str:
    """The measure for a reader; with ``estimator`` all of its options in words."""
    return description(similarity.measure) if estimator else measure_label(similarity.measure)


def pair_colours(count: int) -> Any:
    """Of so many pairs, the same in every picture and in the page: a palette of seaborn, a list of RGB values."""
    return sns.color_palette("colorblind" if count <= 10 else "husl", count)


def highest(similarity: Similarity) -> float:
    """Where the colours end: at 1, or at the largest distance."""
    if about(similarity.measure).kind == "similarity":
        return 1.0
    return float(np.nanmax(similarity.values, initial=0.0)) or 1.0


def _colours(similarity: Similarity) -> str:
    """The brightest colour is that of layers which are alike."""
    return COLOURS if about(similarity.measure).kind == "similarity" else f"{COLOURS}_r"


def _label_axis(ax: Axes, which: str, layers: tuple[Layer, ...], inches: float) -> None:
    """Name the axis after its model and its ticks after the layers, as many as there is room for."""
    axis = ax.xaxis if which == "x" else ax.yaxis
    step = max(1, ceil(len(layers) * _LABEL_INCHES / inches))
    positions = range(0, len(layers), step)
    axis.set_ticks(
        [position + 0.5 for position in positions],
        labels=[short(layers[position].name) for position in positions],
        rotation=90 if which == "x" else 0,
        fontsize=7,
        parse_math=False,
    )
    axis.set_tick_params(length=2)
    models = list(dict.fromkeys(layer.model for layer in layers))
    axis.set_label_text(drawable(" + ".join(models)), fontsize=10, parse_math=False)


def colorbar_of(ax: Axes | list[Axes], similarity: Similarity, vmin: float, vmax: float) -> None:
    """Draw the colour bar of one or more axes; its ends are pointed where values lie beyond."""
    figure = (ax if isinstance(ax, Axes) else ax[0]).figure
    values = similarity.values[np.isfinite(similarity.values)]
    below, above = bool((values < vmin - 1e-9).any()), bool((values > vmax + 1e-9).any())
    extend = {(False, False): "neither", (True, False): "min", (False, True): "max", (True, True): "both"}[below, above]
    mappable = ScalarMappable(Normalize(vmin, vmax), _colours(similarity))
    bar = figure.colorbar(mappable, ax=ax, extend=extend, fraction=0.04, pad=0.02, aspect=30)
    bar.set_label(measure_name(similarity), fontsize=9)
    bar.ax.tick_params(labelsize=7)
    bar.outline.set_visible(False)


def new_axes(width: float, height: float) -> Axes:
    """Axes of about this size, in inches, alone in a figure."""
    figure = Figure(figsize=(width + 2.2, height + 1.2), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    return figure.add_subplot()


def _axes_inches(ax: Axes) -> tuple[float, float]:
    """About the width and height of the axes: a constrained layout is settled only when it is drawn."""
    extent = ax.get_window_extent()
    return max(extent.width / ax.figure.dpi, 1.0), max(extent.height / ax.figure.dpi, 1.0)


def inches_of(layers: int) -> float:
    """The length of a heatmap's side."""
    return min(max(layers * _CELL_INCHES, _MIN_PANEL_INCHES), _MAX_PANEL_INCHES)


def short(text: str, limit: int = 40) -> str:
    """A text that can be drawn, shortened from the left."""
    text = drawable(text)
    return text if len(text) <= limit else f"…{text[1 - limit :]}"


def _wrapped(text: str, inches: float) -> str:
    """Broken between its parts, so that it fits at 8 points."""
    limit, lines = int(inches * 14), [""]
    for part in text.split(" · "):
        if lines[-1] and len(lines[-1]) + len(part) + 3 > limit:
            lines.append("")
        lines[-1] += f" · {part}" if lines[-1] else part
    return "\n".join(lines)
