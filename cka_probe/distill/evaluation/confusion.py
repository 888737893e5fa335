"""The confusion matrix of a network as a picture."""

from __future__ import annotations

from math import ceil
from pathlib import Path

import numpy as np
from matplotlib.colors import PowerNorm

from cka_probe.distill.evaluation.score import Score
from cka_probe.reports.drawing import Axes, Figure, FigureCanvasAgg, ScalarMappable, drawable, sns

_COLOURS, _NO_IMAGES = "Blues", "0.85"
_CELL_INCHES, _LEAST_INCHES, _MOST_INCHES = 0.32, 3.2, 13.0
_LABEL_INCHES, _LABEL_POINTS = 0.115, 7  # what a class name takes along its axis, and its size
_LONGEST = 24  # characters of a class name
_COUNTED = 30  # classes up to which the numbers of images stand in the cells


def plot_confusion(score: Score, ax: Axes | None = None) -> Axes:
    """The share of each class's images that got each prediction: a row a class, a column a predicted class.

    The colours grow with the square root of the share, so that rare confusions are seen. Up to 30 classes, the number
    of images stands in each cell that has any.

    Args:
        score: of a network.
        ax: drawn into; a new figure's where None.

    Returns:
        The axes.
    """
    counts = score.confusion
    rows, columns = counts.shape
    images = counts.sum(1, keepdims=True)
    shares = np.divide(counts, images, out=np.full(counts.shape, np.nan), where=images > 0)
    side = min(max(columns * _CELL_INCHES, _LEAST_INCHES), _MOST_INCHES)
    if ax is None:
        figure = Figure(figsize=(side + 2.2, side + 1.6), layout="constrained", dpi=150)
        FigureCanvasAgg(figure)
        ax = figure.add_subplot()
    few = max(rows, columns) <= _COUNTED
    text = np.where(counts > 0, counts.astype(str), "") if few else False
    norm = PowerNorm(0.5, 0, 1)
    sns.heatmap(
        shares, ax=ax, norm=norm, cmap=_COLOURS, cbar=False, annot=text, fmt="",
        annot_kws={"fontsize": 7}, square=True, rasterized=True,
    )  # fmt: skip
    ax.set_facecolor(_NO_IMAGES)
    names = [*score.classes, *(["(another class)"] if columns > rows else [])]
    _label(ax, "x", names, side)
    _label(ax, "y", names[:rows], side)
    ax.set_xlabel("predicted class", fontsize=9)
    ax.set_ylabel("true class", fontsize=9)
    low, high = score.accuracy.interval()
    ax.set_title(
        f"{drawable(score.name)}\ntop-1 {score.top1:.1%} ({low:.1%} to {high:.1%}) of {score.accuracy.images:,} images",
        fontsize=9, parse_math=False,
    )  # fmt: skip
    bar = ax.figure.colorbar(ScalarMappable(norm, _COLOURS), ax=ax, fraction=0.04, pad=0.02, aspect=30)
    bar.set_label("share of the true class's images", fontsize=8)
    bar.set_ticks(
        [0, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 1], labels=["0", "1%", "5%", "10%", "25%", "50%", "75%", "100%"]
    )
    bar.ax.tick_params(labelsize=7)
    bar.outline.set_visible(False)
    return ax


def save_confusion(score: Score, path: Path) -> None:
    """Draw the confusion matrix of a network into a file."""
    figure = plot_confusion(score).figure
    assert isinstance(figure, Figure)
    figure.savefig(path)


def _label(ax: Axes, which: str, names: list[str], inches: float) -> None:
    """Name the ticks after the classes, as many as there is room for."""
    step = max(1, ceil(len(names) * _LABEL_INCHES / inches))
    positions = range(0, len(names), step)
    axis = ax.xaxis if which == "x" else ax.yaxis
    axis.set_ticks(
        [position + 0.5 for position in positions],
        labels=[_short(names[position]) for position in positions],
        rotation=90 if which == "x" else 0, fontsize=_LABEL_POINTS, parse_math=False,
    )  # fmt: skip
    axis.set_tick_params(length=2)


def _short(name: str) -> str:
    name = drawable(name)
    return name if len(name) <= _LONGEST else f"{name[: _LONGEST - 1]}…"
