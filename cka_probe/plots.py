"""Similarity -> matplotlib axes and figures. Nothing is shown and nothing is saved."""

from __future__ import annotations

from itertools import combinations, product
from math import ceil

import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from numpy.typing import NDArray

from cka_probe.similarity import Layer, Similarity

COLOURS = "viridis"
_UNDEFINED = "0.8"  # the gray of a cell without a value
_CELL_INCHES, _MIN_PANEL_INCHES, _MAX_PANEL_INCHES = 0.2, 3.2, 9.0
_LABEL_INCHES = 0.125  # what a tick label takes along its axis

_NAMES = {"cka": "linear CKA", "cka-rbf": "RBF CKA"}


def plot_heatmap(
    similarity: Similarity, ax: Axes | None = None, *, vmin: float = 0.0, vmax: float = 1.0, colorbar: bool = True
) -> Axes:
    """The values as a heatmap, the first layer of both sides at the origin.

    Args:
        similarity: of one pair, as `Similarity.between` gives it; the axes take the names of its models.
        ax: drawn into; a new figure's where None.
        vmin: value of the darkest colour; values below it are drawn in that colour.
        vmax: value of the brightest colour.
        colorbar: draw one beside the axes.

    Returns:
        The axes.
    """
    rows, cols = similarity.values.shape
    ax = _new_axes(_inches(cols), _inches(rows)) if ax is None else ax
    sns.heatmap(
        similarity.values,
        ax=ax,
        vmin=vmin,
        vmax=vmax,
        cmap=COLOURS,
        cbar=False,
        rasterized=True,  # one image in an SVG, not a path a cell
    )
    ax.set_facecolor(_UNDEFINED)
    ax.set(xlim=(0, cols), ylim=(0, rows))
    width, height = _axes_inches(ax)
    _label_axis(ax, "x", similarity.cols, width)
    _label_axis(ax, "y", similarity.rows, height)
    if colorbar:
        _colorbar(ax, similarity, vmin, vmax)
    return ax


def plot_pairs(similarity: Similarity, *, vmin: float = 0.0, vmax: float = 1.0) -> Figure:
    """A heatmap for each pair of models (of the model with itself, where there is one), on one colour scale.

    Args:
        similarity: the joint result of a comparison.
        vmin: as for `plot_heatmap`.
        vmax: as for `plot_heatmap`.

    Returns:
        A figure with a caption: examples, batch size, estimator, shuffled control and standard errors.
    """
    models = similarity.models
    # The second model of a pair lies along y, so that a row of panels shares its x axis where there are three.
    pairs = list(combinations(models, 2)) or [(models[0], models[0])]
    if similarity.rows != similarity.cols:
        pairs = [
            (col, row)
            for row, col in product(
                *(dict.fromkeys(l.model for l in side) for side in (similarity.rows, similarity.cols))
            )
        ]
    blocks = [similarity.between(second, first) for first, second in pairs]
    width = max(_inches(block.values.shape[1]) for block in blocks)
    height = max(_inches(block.values.shape[0]) for block in blocks)
    columns = min(len(blocks), max(1, int(24 // width)), 4)
    rows = ceil(len(blocks) / columns)
    figure = Figure(figsize=(columns * (width + 1.1) + 0.9, rows * (height + 1.1) + 0.8), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False)
    for ax, block in zip(grid.flat, blocks, strict=False):
        plot_heatmap(block, ax, vmin=vmin, vmax=vmax, colorbar=False)
    for ax in grid.flat[len(blocks) :]:
        ax.set_axis_off()
    _colorbar(list(grid.flat), similarity, vmin, vmax)
    figure.supxlabel(_wrapped(caption(similarity), figure.get_figwidth()), fontsize=8, color="0.25", parse_math=False)
    return figure


def caption(similarity: Similarity) -> str:
    """What a reader needs beside the values: examples, batch size, estimator, control level and error."""
    provenance = similarity.provenance
    parts = []
    if "data" in provenance:
        parts.append(f"{provenance['data']['examples']:,} images of {_short(provenance['data']['source'])}")
    if "batch_size" in provenance:
        batches = provenance.get("batches", 1)
        parts.append(f"batches of {provenance['batch_size']}" if batches > 1 else "one batch")
    estimator = (", debiased" if provenance["debiased"] else ", biased") if "debiased" in provenance else ""
    if provenance.get("kernel") == "rbf":
        estimator += f", σ = {provenance['threshold']:g} × median distance"
    parts.append(_NAMES.get(similarity.measure, similarity.measure) + estimator)
    if provenance.get("pool", "none") != "none":
        parts.append(f"pooled: {provenance['pool']}")
    control = _off_diagonal(similarity, similarity.null)
    if len(control):
        parts.append(f"shuffled control {control.mean():.3f} ± {control.std():.3f}")
    errors = similarity.std_error[np.isfinite(similarity.std_error)]
    parts.append(f"standard errors up to {errors.max():.3f}" if len(errors) else "no standard errors")
    return " · ".join(parts)


def _off_diagonal(similarity: Similarity, array: NDArray[np.float64]) -> NDArray[np.float64]:
    """The finite entries between different layers."""
    same = np.array([[row == col for col in similarity.cols] for row in similarity.rows])
    return array[~same & np.isfinite(array)]


def _label_axis(ax: Axes, which: str, layers: tuple[Layer, ...], inches: float) -> None:
    """Name the axis after its model and its ticks after the layers, as many as there is room for."""
    axis = ax.xaxis if which == "x" else ax.yaxis
    step = max(1, ceil(len(layers) * _LABEL_INCHES / inches))
    positions = range(0, len(layers), step)
    axis.set_ticks(
        [position + 0.5 for position in positions],
        labels=[_short(layers[position].name) for position in positions],
        rotation=90 if which == "x" else 0,
        fontsize=7,
        parse_math=False,
    )
    axis.set_tick_params(length=2)
    models = list(dict.fromkeys(layer.model for layer in layers))
    axis.set_label_text(" + ".join(models), fontsize=10, parse_math=False)


def _colorbar(ax: Axes | list[Axes], similarity: Similarity, vmin: float, vmax: float) -> None:
    figure = (ax if isinstance(ax, Axes) else ax[0]).figure
    values = similarity.values[np.isfinite(similarity.values)]
    below, above = bool((values < vmin - 1e-9).any()), bool((values > vmax + 1e-9).any())
    extend = {(False, False): "neither", (True, False): "min", (False, True): "max", (True, True): "both"}[below, above]
    mappable = ScalarMappable(Normalize(vmin, vmax), COLOURS)
    bar = figure.colorbar(mappable, ax=ax, extend=extend, fraction=0.04, pad=0.02, aspect=30)
    bar.set_label(_NAMES.get(similarity.measure, similarity.measure), fontsize=9)
    bar.ax.tick_params(labelsize=7)
    bar.outline.set_visible(False)


def _new_axes(width: float, height: float) -> Axes:
    figure = Figure(figsize=(width + 2.2, height + 1.2), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    return figure.add_subplot()


def _axes_inches(ax: Axes) -> tuple[float, float]:
    """About the width and height of the axes: a constrained layout is settled only when it is drawn."""
    extent = ax.get_window_extent()
    return max(extent.width / ax.figure.dpi, 1.0), max(extent.height / ax.figure.dpi, 1.0)


def _inches(layers: int) -> float:
    return min(max(layers * _CELL_INCHES, _MIN_PANEL_INCHES), _MAX_PANEL_INCHES)


def _short(text: str, limit: int = 40) -> str:
    return text if len(text) <= limit else f"…{text[1 - limit :]}"


def _wrapped(text: str, inches: float) -> str:
    """Broken between its parts, so that it fits at 8 points."""
    limit, lines = int(inches * 14), [""]
    for part in text.split(" · "):
        if lines[-1] and len(lines[-1]) + len(part) + 3 > limit:
            lines.append("")
        lines[-1] += f" · {part}" if lines[-1] else part
    return "\n".join(lines)
