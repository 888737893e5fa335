"""The same layer in two views of one model, by every measure, on one figure."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import cycle
from math import ceil
from typing import Any

import numpy as np

from cka_probe.errors import SpecError
from cka_probe.measures.catalogue import about
from cka_probe.measures.catalogue import label as measure_label
from cka_probe.reports.drawing import Axes, Figure, FigureCanvasAgg, drawable, sns
from cka_probe.reports.figures.figure import ReportFigure, Selection
from cka_probe.reports.interactive import PALETTE, figure, text, with_error
from cka_probe.results.agreement import view_pairs
from cka_probe.results.similarity import Similarity
from cka_probe.runtime.names import file_names

_MOST_TICKS = 40
_LONGEST_TICK = 26
_MARKERS = "osD^vP*X<>"


def plot_layers(results: Mapping[str, Similarity] | Similarity, first: str, second: str) -> Figure:
    """How like itself each layer of a model is in two views, by every measure.

    Args:
        results: measure -> similarity, as `compare` gives them for a sequence of measures; or one of them.
        first: the model in one view, such as ``"dino [identity]"``.
        second: the model in another.

    Returns:
        A figure: similarities on the upper axes, and distances, each over its own largest value, on the lower ones; in
        bands of two standard errors.

    Raises:
        SpecError: the two have other layers.
    """
    if isinstance(results, Similarity):
        results = {results.measure: results}
    blocks = {measure: similarity.between(first, second) for measure, similarity in results.items()}
    block = next(iter(blocks.values()))
    rows, cols = ([layer.name for layer in side] for side in (block.rows, block.cols))
    if rows != cols:
        raise SpecError(f"Both must be the same model, but the layers of {first!r} and {second!r} differ.")
    kinds = [kind for kind in ("similarity", "distance") if any(about(m).kind == kind for m in blocks)]
    figure = Figure(figsize=(max(6.4, min(12.0, 2 + 0.3 * len(rows))), 1.2 + 2.9 * len(kinds)), dpi=150)
    figure.set_layout_engine("constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(kinds), 1, sharex=True, squeeze=False)[:, 0]
    styles = dict(zip(blocks, zip(sns.color_palette("colorblind", len(blocks)), cycle(_MARKERS)), strict=False))
    for ax, kind in zip(grid, kinds, strict=True):
        own = {measure: block for measure, block in blocks.items() if about(measure).kind == kind}
        _draw(ax, own, kind, styles)
    step = ceil(len(rows) / _MOST_TICKS)
    grid[-1].set_xticks(
        range(0, len(rows), step), [drawable(row) for row in rows[::step]], rotation=90, fontsize=7, parse_math=False
    )
    grid[0].set_title(drawable(f"{first} × {second}"), fontsize=9, parse_math=False)
    figure.supxlabel(_made_of(block), fontsize=8, color="0.25", parse_math=False)
    return figure


def _made_of(similarity: Similarity) -> str:
    """The examples and the errors; what else belongs to a number differs from measure to measure."""
    data = similarity.provenance.data
    images = f"{data.examples:,} images of {drawable(data.source)} · " if data else ""
    return f"{images}bands: two standard errors"


def _draw(ax: Axes, blocks: Mapping[str, Similarity], kind: str, styles: Mapping[str, tuple[Any, str]]) -> None:
    for measure, block in blocks.items():
        colour, marker = styles[measure]
        values, errors = block.values.diagonal(), block.std_error.diagonal()
        label, scale = measure_label(measure), 1.0
        if kind == "distance" and np.nanmax(np.abs(values), initial=0.0) > 0:
            scale = float(np.nanmax(np.abs(values)))
            label += f" (1 is {scale:.3g})"
        ax.plot(values / scale, color=colour, marker=marker, markersize=3.5, linewidth=1.5, label=label)
        low, high = (values - 2 * errors) / scale, (values + 2 * errors) / scale
        ax.fill_between(range(len(values)), low, high, color=colour, alpha=0.15, linewidth=0)
    bottom, top = ax.get_ylim()
    ax.set_ylim(min(0.0, bottom), max(1.02, top) if kind == "similarity" else top)
    ax.set_ylabel("similarity" if kind == "similarity" else "distance / its largest", fontsize=9)
    ax.grid(alpha=0.25)
    ax.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1.01, 1))


def _applies(selection: Selection) -> bool:
    return bool(view_pairs(selection.similarity))


def _plot(selection: Selection) -> dict[str, Figure]:
    views = view_pairs(selection.similarity)
    names = file_names(selection.similarity.models)
    endings = [f"-{names[first]}-{names[second]}" if len(views) > 1 else "" for first, second in views]
    return {ending: plot_layers(selection.results, *pair) for ending, pair in zip(endings, views, strict=True)}


def _page(selection: Selection) -> list[Any]:
    """A figure for each model in two views: similarities above; distances below, each over its own largest."""
    return [_layers(selection.results, *pair) for pair in view_pairs(selection.similarity)]


def _layers(results: Mapping[str, Similarity], first: str, second: str) -> Any:
    kinds = {about(measure).kind for measure in results}
    both, similarities = len(kinds) > 1, "similarity" in kinds
    traces = [
        _line(similarity.between(first, second), PALETTE[index % len(PALETTE)], "y2" if both else "y")
        for index, similarity in enumerate(results.values())
    ]
    upper, lower = "similarity", "distance / its largest"
    layout: dict[str, Any] = {
        "xaxis": {"type": "category", "tickangle": -90, "anchor": "y2" if both else "y"},
        "yaxis": {
            "title": {"text": upper if similarities else lower}, "rangemode": "tozero",
            "domain": [0.54, 1] if both else [0, 1],
        },
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom"},
        "hovermode": "closest",
        "showlegend": True,
    }  # fmt: skip
    if both:
        layout["yaxis2"] = {"title": {"text": lower}, "rangemode": "tozero", "domain": [0, 0.46]}
    return figure(traces, 620 if both else 420, **layout)


def _line(block: Similarity, color: str, distance_axis: str) -> dict[str, Any]:
    """A measure along the layers, with two standard errors."""
    values, errors = block.values.diagonal(), block.std_error.diagonal()
    distance = about(block.measure).kind == "distance"
    scale = (float(np.nanmax(np.abs(values), initial=0.0)) or 1.0) if distance else 1.0
    names = [text(layer.name) for layer in block.rows]
    return {
        "type": "scatter", "name": text(measure_label(block.measure)), "mode": "lines+markers",
        "hoverinfo": "text+name",
        "x": [text(layer.name, _LONGEST_TICK) for layer in block.rows], "y": values / scale,
        "text": [
            f"{with_error(value, error)}<br>{name}" for name, value, error in zip(names, values, errors, strict=True)
        ],
        "line": {"color": color}, "marker": {"color": color}, "yaxis": distance_axis if distance else "y",
        "error_y": {
            "type": "data", "array": np.nan_to_num(2 * errors / scale), "color": color, "thickness": 1, "width": 2,
        },
    }  # fmt: skip


LAYERS = ReportFigure(
    name="layers",
    title="The same layer in two views",
    applies=_applies,
    plot=_plot,
    page=_page,
    per_measure=False,
    template="layers.html",
)
