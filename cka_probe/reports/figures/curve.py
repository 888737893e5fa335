"""The measure at growing numbers of images."""

from __future__ import annotations

from typing import Any

import numpy as np

from cka_probe.errors import SpecError
from cka_probe.reports.drawing import Axes, Figure
from cka_probe.reports.figures.figure import ReportFigure, Selection
from cka_probe.reports.interactive import LEGEND, figure, legend_height, text
from cka_probe.reports.plots import captioned_axes, measure_name, new_axes, pair_colours, short
from cka_probe.results.findings import matched_curves, model_pairs
from cka_probe.results.similarity import Similarity

_KEY = "thin: layers at matched depth · thick: mean ± 2 standard errors"


def plot_curve(similarity: Similarity, ax: Axes | None = None) -> Axes:
    """The measure at growing numbers of examples: where it still moves, there were too few.

    Args:
        similarity: with a `cka_probe.results.similarity.Curve`.
        ax: drawn into; a new figure's where None.

    Returns:
        The axes: for each pair of models a line a layer at matched relative depth, and their mean, thick, with twice
        the mean of the standard errors: an upper bound of two standard errors of the mean.

    Raises:
        SpecError: there is no curve.
    """
    curve = similarity.curve
    if curve is None:
        raise SpecError("There is no curve: compare with curve=True, or --curve.")
    ax = new_axes(6.4, 4.2) if ax is None else ax
    pairs = model_pairs(similarity)
    for colour, (first, second) in zip(pair_colours(len(pairs)), pairs, strict=True):
        lines, errors = matched_curves(similarity, first, second)
        if not lines.size:
            continue
        ax.plot(curve.examples, lines, color=colour, alpha=0.3, linewidth=0.8)
        bars = {"yerr": 2 * errors.mean(1), "elinewidth": 1, "capsize": 3}
        label = short(f"{first} × {second}", 60)
        ax.errorbar(curve.examples, lines.mean(1), color=colour, marker="o", linewidth=2, label=label, **bars)
    ax.set_xscale("log", base=2)
    ax.set_xticks(curve.examples, labels=[f"{examples:,}" for examples in curve.examples.tolist()])
    ax.set(xlabel="images", ylabel=measure_name(similarity))
    ax.grid(alpha=0.25)
    if not ax.get_legend_handles_labels()[0]:  # no pair has a value
        return ax
    legend = ax.legend(fontsize=7, frameon=False, title=_KEY, title_fontsize=7)
    for entry in legend.get_texts():
        entry.set_parse_math(False)
    return ax


def _applies(selection: Selection) -> bool:
    return selection.similarity.curve is not None


def _plot(selection: Selection) -> dict[str, Figure]:
    return {"": captioned_axes(plot_curve(selection.similarity), selection.similarity)}


def _page(selection: Selection) -> list[Any]:
    similarity = selection.similarity
    assert similarity.curve is not None, "the figure applies to a similarity with a curve"
    examples = similarity.curve.examples.tolist()
    lines = {pair: matched_curves(similarity, *pair) for pair in selection.pairs}
    colours = pair_colours(len(lines)).as_hex()
    bars: dict[str, Any] = {"type": "data", "thickness": 1, "width": 3}
    traces = [
        {
            "type": "scatter", "name": text(f"{first} × {second}"), "mode": "lines+markers",
            "x": examples, "y": found.mean(1), "line": {"color": colour},
            "error_y": {**bars, "array": np.nan_to_num(2 * errors.mean(1))},
            "hovertemplate": "%{x} images: <b>%{y:.3f}</b><extra></extra>",
        }
        for colour, ((first, second), (found, errors)) in zip(colours, lines.items(), strict=True)
        if found.size
    ]  # fmt: skip
    ticks = {"tickvals": examples, "ticktext": [f"{count:,}" for count in examples]}
    return [
        figure(
            traces,
            360 + legend_height(len(traces)),
            xaxis={"type": "log", **ticks, "title": {"text": "images"}},
            yaxis={"title": {"text": text(measure_name(similarity))}},
            legend=LEGEND,
            showlegend=True,
            hovermode="closest",
        )
    ]


CURVE = ReportFigure(
    name="curve",
    title="Whether the images are enough",
    note="The mean over layers at matched depth, on the first images, each time twice as many, with "
    "error bars of two standard errors (an upper bound; none for a single batch). Where the value still moves by more, "
    "take more images.",
    applies=_applies,
    plot=_plot,
    page=_page,
)
