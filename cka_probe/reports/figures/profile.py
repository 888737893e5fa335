"""The similarity along the depth of two models, for each pair of models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from cka_probe.measures.catalogue import about
from cka_probe.reports.drawing import Axes, Figure
from cka_probe.reports.figures.figure import ReportFigure, Selection, always
from cka_probe.reports.interactive import LEGEND, figure, legend_height, text, with_error
from cka_probe.reports.plots import captioned_axes, measure_name, new_axes, pair_colours, short
from cka_probe.results.findings import Cell, PairFindings, compare_pair, control_band, model_pairs
from cka_probe.results.similarity import Similarity


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
    ax = new_axes(6.4, 4.2) if ax is None else ax
    low, high = control_band(similarity)
    measured = about(similarity.measure)
    if np.isfinite(low):
        control = "shuffled control, 95%" if measured.paired else "views swapped at random, 95%"
        ax.axhspan(low, high, color="0.5", alpha=0.2, linewidth=0, label=control)
    pairs = model_pairs(similarity) if pairs is None else pairs
    for colour, (first, second) in zip(pair_colours(len(pairs)), pairs, strict=True):
        found = compare_pair(similarity, first, second)
        if found is None:
            continue
        depth, best_depth = ([found.depth(cell) for cell in cells] for cells in (found.matched, found.best))
        value, error = (np.array([getattr(cell, name) for cell in found.matched]) for name in ("value", "std_error"))
        label = short(f"{first} × {second}", 60)
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
    for entry in legend.get_texts():
        entry.set_parse_math(False)
    return ax


def _plot(selection: Selection) -> dict[str, Figure]:
    ax = plot_profile(selection.similarity, pairs=selection.pairs)
    return {"": captioned_axes(ax, selection.similarity)}


def _page(selection: Selection) -> list[Any]:
    similarity = selection.similarity
    found = [pair for pair in (compare_pair(similarity, *pair) for pair in selection.pairs) if pair is not None]
    colours = pair_colours(len(found)).as_hex()
    low, high = control_band(similarity)
    band = {"type": "rect", "xref": "paper", "x0": 0, "x1": 1, "y0": low, "y1": high, "layer": "below"}
    drawn = figure(
        [trace for color, pair in zip(colours, found, strict=True) for trace in _lines(pair, color)],
        420 + legend_height(len(found)),
        xaxis={"title": {"text": "relative depth (of the deeper model)"}, "range": [0, 1.03]},
        yaxis={"title": {"text": text(measure_name(similarity))}, "rangemode": "tozero"},
        legend=LEGEND,
        hovermode="closest",
        shapes=[{**band, "fillcolor": "gray", "opacity": 0.25, "line": {"width": 0}}] if np.isfinite(low) else [],
    )
    return [drawn]


def _lines(pair: PairFindings, color: str) -> list[dict[str, Any]]:
    """Solid at matched depth, with two standard errors; dotted at the best match."""
    errors = np.nan_to_num([2 * cell.std_error for cell in pair.matched])
    return [
        {
            **_line(pair, pair.matched), "name": text(f"{pair.first} × {pair.second}"), "mode": "lines+markers",
            "line": {"color": color}, "marker": {"color": color}, "showlegend": True,
            "error_y": {"type": "data", "array": errors, "color": color, "thickness": 1, "width": 2},
        },
        {
            **_line(pair, pair.best), "mode": "lines", "line": {"color": color, "dash": "dot"},
            "showlegend": False,
        },
    ]  # fmt: skip


def _line(pair: PairFindings, cells: Sequence[Cell]) -> dict[str, Any]:
    return {
        "type": "scatter", "legendgroup": f"{pair.first} × {pair.second}", "hoverinfo": "text",
        "x": [round(pair.depth(cell), 4) for cell in cells], "y": [round(cell.value, 4) for cell in cells],
        "text": [
            f"{with_error(cell.value, cell.std_error)}<br>{text(cell.first.name)} × {text(cell.second.name)}"
            for cell in cells
        ],
    }  # fmt: skip


PROFILE = ReportFigure(
    name="profile",
    title="Along the depth",
    note="Solid: layers at the same relative depth, with two standard errors. Dotted: each layer's best match, too "
    "good by selection. Gray: 95% of the control.",
    applies=always,
    plot=_plot,
    page=_page,
)
