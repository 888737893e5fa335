"""A distillation -> matplotlib figures: its curves, and the similarity of student and teacher."""

from __future__ import annotations

import numpy as np

from cka_probe.distill.outputs.record import MOMENTS, Record
from cka_probe.reports.drawing import Axes, Figure, FigureCanvasAgg, MaxNLocator, Rectangle, sns
from cka_probe.reports.plots import captioned, plot_difference, plot_heatmap


def plot_curves(record: Record) -> Figure:
    """Parts of the loss, accuracy, learning rate and images a second, by epoch."""
    figure = Figure(figsize=(10, 6), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    (loss, accuracy), (rate, speed) = figure.subplots(2, 2, sharex=True)
    _lines(loss, record, record.parts, "loss, with weights")
    shown = [name for name in ("train_top1", *record.accuracies) if name in record.columns and "top5" not in name]
    _lines(accuracy, record, shown, f"top-1 of {record.measured} images")
    taught = record.teacher_line
    if taught is not None:
        accuracy.axhline(taught, color="0.4", linestyle="--", linewidth=1, label="teacher")
    for ax in (loss, accuracy):
        ax.legend(fontsize=7, frameon=False)
    _lines(rate, record, ["lr"], "learning rate")
    _lines(speed, record, ["images_per_second"], "images a second")
    speed.set_ylim(bottom=0)
    for ax in (rate, speed):
        ax.set_xlabel("epoch")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def plot_similarities(record: Record) -> Figure:
    """Student against teacher at each moment, and what changed; the chosen stages in bold, their matches framed."""
    moments = dict(record.similarities)
    last = next(reversed(moments))
    panels = len(moments) + (len(moments) > 1)
    figure = Figure(figsize=(5.2 * panels, 4.8), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    row = figure.subplots(1, panels, squeeze=False)[0]
    for ax, (when, block) in zip(row, moments.items(), strict=False):
        plot_heatmap(block, ax, colorbar=when == last).set_title(MOMENTS[when], fontsize=9)
    if len(moments) > 1:
        first = next(iter(moments))
        plot_difference(moments[first], moments[last], row[-1]).set_title(f"{last} - {first}", fontsize=9)
    block = moments[last]
    rows, cols = ([layer.name for layer in layers] for layers in (block.rows, block.cols))
    for ax in row:
        for label in ax.get_yticklabels():
            label.set_fontweight("bold" if label.get_text() in record.chosen_layers else "normal")
        for own, other in record.matches:
            if own in rows and other in cols:
                corner = (cols.index(other), rows.index(own))
                for color, width in (("black", 2.5), ("white", 1.2)):
                    ax.add_patch(_frame(corner, color, width))
    return captioned(figure, block)


def _lines(ax: Axes, record: Record, columns: list[str], label: str) -> None:
    epochs = np.array(record.column("epoch"), dtype=float)
    for colour, name in zip(sns.color_palette("colorblind", max(len(columns), 1)), columns, strict=False):
        values = np.array(record.column(name), dtype=float)  # None becomes NaN, a gap
        ax.plot(epochs, values, color=colour, label=name, linewidth=1.5, marker="o" if len(epochs) < 3 else None)
    ax.set_ylabel(label)
    ax.grid(alpha=0.25)


def _frame(corner: tuple[int, int], color: str, width: float) -> Rectangle:
    return Rectangle(corner, 1, 1, fill=False, clip_on=False, zorder=3, edgecolor=color, linewidth=width)
