"""Similarity -> matplotlib axes and figures. Nothing is shown and nothing is saved."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import Any

import numpy as np

from cka_probe.errors import SpecError
from cka_probe.measures.catalogue import about, description
from cka_probe.measures.catalogue import label as measure_label
from cka_probe.reports.drawing import Axes, Figure, FigureCanvasAgg, Normalize, ScalarMappable, drawable, sns
from cka_probe.results.findings import compare_pair, control_band, matched_curves, model_pairs, off_diagonal
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
    vmax = _highest(similarity) if vmax is None else vmax
    ax = _new_axes(_inches(cols), _inches(rows)) if ax is None else ax
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
        _colorbar(ax, similarity, vmin, vmax)
    return ax


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
            (ends - np.array(counts) / 2).tolist(), labels=[_short(model) for model in models], parse_math=False,
            rotation=45 if axis is ax.xaxis else 0, ha="right", fontsize=9,
        )  # fmt: skip
        axis.set_label_text("")
    return ax


def plot_profile(
    similarity: Similarity, ax: Axes | None = None, *, pairs: Sequence[tuple[str, str]] | None = None
) -> Axes:
    """Similarity along the depth: for each pair of models at matched relative depth, and at each layer's best match.

    Args:
        similarity: the joint result of a comparison, or one pair of it.
        ax: drawn into; a new figure's where None.
        pairs: which; all of different models where None.

    Returns:
        The axes: solid lines at matched depth, in a band of two standard errors; dotted lines at the best match, which
        is a maximum and so too high by selection; the gray band holds 95% of the shuffled control.
    """
    ax = _new_axes(6.4, 4.2) if ax is None else ax
    low, high = control_band(similarity)
    measured = about(similarity.measure)
    if np.isfinite(low):
        control = "shuffled control, 95%" if measured.paired else "views swapped at random, 95%"
        ax.axhspan(low, high, color="0.5", alpha=0.2, linewidth=0, label=control)
    pairs = model_pairs(similarity) if pairs is None else pairs
    for colour, (first, second) in zip(_pair_colours(len(pairs)), pairs, strict=True):
        found = compare_pair(similarity, first, second)
        if found is None:
            continue
        depth, best_depth = ([found.depth(cell) for cell in cells] for cells in (found.matched, found.best))
        value, error = (np.array([getattr(cell, name) for cell in found.matched]) for name in ("value", "std_error"))
        label = _short(f"{first} × {second}", 60)
        ax.plot(depth, value, color=colour, marker="o", markersize=3.5, linewidth=1.6, label=label)
        ax.fill_between(depth, value - 2 * error, value + 2 * error, color=colour, alpha=0.2, linewidth=0)
        ax.plot(best_depth, [cell.value for cell in found.best], color=colour, linestyle=":", linewidth=1.3)
    ax.set(xlim=(0, 1.02), xlabel="relative depth (of the deeper model)", ylabel=measure_name(similarity))
    ax.set_ylim(min(0.0, ax.get_ylim()[0]), max(1.0 if measured.kind == "similarity" else 0.0, ax.get_ylim()[1]))
    ax.grid(alpha=0.25)
    beside: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (1.01, 1)} if len(pairs) > 6 else {}
    title = "solid: matched depth · dotted: best match"
    if not ax.get_legend_handles_labels()[0]:  # no pair has a value
        return ax
    legend = ax.legend(fontsize=7, frameon=False, title=title, title_fontsize=7, **beside)
    for text in legend.get_texts():
        text.set_parse_math(False)
    return ax


def _pair_colours(count: int) -> list[Any]:
    """Of so many pairs, the same in every picture."""
    return list(sns.color_palette("colorblind" if count <= 10 else "husl", count))


def plot_curve(similarity: Similarity, ax: Axes | None = None) -> Axes:
    """The measure at growing numbers of examples: where it still moves, there were too few.

    Args:
        similarity: with a `cka_probe.results.similarity.Curve`.
        ax: drawn into; a new figure's where None.

    Returns:
        The axes: for each pair of models a line a layer at matched relative depth, and their mean, thick.

    Raises:
        SpecError: there is no curve.
    """
    curve = similarity.curve
    if curve is None:
        raise SpecError("There is no curve: compare with curve=True, or --curve.")
    ax = _new_axes(6.4, 4.2) if ax is None else ax
    pairs = model_pairs(similarity)
    for colour, (first, second) in zip(_pair_colours(len(pairs)), pairs, strict=True):
        lines = matched_curves(similarity, first, second)
        if not lines.size:
            continue
        ax.plot(curve.examples, lines, color=colour, alpha=0.3, linewidth=0.8)
        mean = lines.mean(1)
        ax.plot(curve.examples, mean, color=colour, marker="o", linewidth=2, label=_short(f"{first} × {second}", 60))
    ax.set_xscale("log", base=2)
    ax.set_xticks(curve.examples, labels=[f"{examples:,}" for examples in curve.examples.tolist()])
    ax.set(xlabel="images", ylabel=measure_name(similarity))
    ax.grid(alpha=0.25)
    if not ax.get_legend_handles_labels()[0]:  # no pair has a value
        return ax
    legend = ax.legend(fontsize=7, frameon=False, title="thin: layers at matched depth · thick: mean", title_fontsize=7)
    for text in legend.get_texts():
        text.set_parse_math(False)
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
    ax = _new_axes(_inches(cols), _inches(rows)) if ax is None else ax
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
    vmax = _highest(similarity) if vmax is None else vmax
    blocks = [similarity.between(second, first) for first, second in pairs]
    blocks = [block for block in blocks if np.isfinite(block.values).any()] or blocks
    width = max(_inches(block.values.shape[1]) for block in blocks)
    height = max(_inches(block.values.shape[0]) for block in blocks)
    columns = min(len(blocks), columns or max(1, min(int(24 // width), 4)))
    rows = ceil(len(blocks) / columns)
    figure = Figure(figsize=(columns * (width + 1.1) + 0.9, rows * (height + 1.1) + 0.8), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False)
    for ax, block in zip(grid.flat, blocks, strict=False):
        plot_heatmap(block, ax, vmin=vmin, vmax=vmax, colorbar=False)
    for ax in grid.flat[len(blocks) :]:
        ax.set_axis_off()
    _colorbar(list(grid.flat), similarity, vmin, vmax)
    return captioned(figure, similarity)


def captioned(figure: Figure, similarity: Similarity) -> Figure:
    """The figure with the `caption` below it."""
    figure.supxlabel(_wrapped(caption(similarity), figure.get_figwidth()), fontsize=8, color="0.25", parse_math=False)
    return figure


def caption(similarity: Similarity) -> str:
    """What a reader needs beside the values: examples, batch size, estimator, control level and error."""
    provenance = similarity.provenance
    parts = []
    if "data" in provenance:
        parts.append(f"{provenance['data']['examples']:,} images of {_short(provenance['data']['source'])}")
    if "batch_size" in provenance and "blocks" not in provenance:  # of which a collected measure knows nothing
        batches = provenance.get("batches", 1)
        parts.append(f"batches of {provenance['batch_size']}" if batches > 1 else "one batch")
    parts.append(measure_name(similarity, estimator=True))
    if provenance.get("pool", "none") != "none":
        parts.append(f"pooled: {provenance['pool']}")
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


def _highest(similarity: Similarity) -> float:
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
        labels=[_short(layers[position].name) for position in positions],
        rotation=90 if which == "x" else 0,
        fontsize=7,
        parse_math=False,
    )
    axis.set_tick_params(length=2)
    models = list(dict.fromkeys(layer.model for layer in layers))
    axis.set_label_text(drawable(" + ".join(models)), fontsize=10, parse_math=False)


def _colorbar(ax: Axes | list[Axes], similarity: Similarity, vmin: float, vmax: float) -> None:
    figure = (ax if isinstance(ax, Axes) else ax[0]).figure
    values = similarity.values[np.isfinite(similarity.values)]
    below, above = bool((values < vmin - 1e-9).any()), bool((values > vmax + 1e-9).any())
    extend = {(False, False): "neither", (True, False): "min", (False, True): "max", (True, True): "both"}[below, above]
    mappable = ScalarMappable(Normalize(vmin, vmax), _colours(similarity))
    bar = figure.colorbar(mappable, ax=ax, extend=extend, fraction=0.04, pad=0.02, aspect=30)
    bar.set_label(measure_name(similarity), fontsize=9)
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
