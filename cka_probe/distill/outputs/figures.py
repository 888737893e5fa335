"""A distillation -> figures of matplotlib and plotly: its curves, and the similarity of student and teacher."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from cka_probe.distill.outputs.record import MOMENTS, Record
from cka_probe.reports.drawing import Axes, Figure, FigureCanvasAgg, MaxNLocator, Rectangle, sns
from cka_probe.reports.interactive import (
    DIVERGING,
    LEGEND,
    PALETTE,
    Colours,
    Panel,
    figure,
    heatmap,
    legend_height,
    text,
)
from cka_probe.reports.plots import captioned, measure_name, plot_difference, plot_heatmap
from cka_probe.results.similarity import Similarity


def plot_curves(record: Record) -> Figure:
    """Parts of the loss, accuracy, learning rate and images a second, by epoch."""
    figure = Figure(figsize=(10, 6), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    (loss, accuracy), (rate, speed) = figure.subplots(2, 2, sharex=True)
    _lines(loss, record, record.parts, "loss, with weights")
    shown = [name for name in _accuracies(record) if "top5" not in name]
    knn = "kNN " if record.by_neighbours else ""
    _lines(accuracy, record, shown, f"{knn}top-1 of {record.measured} images" if shown else "not scored")
    taught = record.teacher_line
    if taught is not None:
        accuracy.axhline(taught, color="0.4", linestyle="--", linewidth=1, label="teacher")
    for ax in (loss, accuracy) if shown else (loss,):
        ax.legend(fontsize=7, frameon=False)
    _lines(rate, record, ["lr"], "learning rate")
    _lines(speed, record, ["images_per_second"], "images a second")
    speed.set_ylim(0, 1.1 * speed.get_ylim()[1])
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


def plot_further(name: str, blocks: tuple[Similarity, Similarity]) -> Figure:
    """A further network of the method between student and teacher, after the training."""
    figure = Figure(figsize=(10.4, 4.8), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2)
    for ax, block, title in zip(axes, blocks, _further_titles(name), strict=True):
        plot_heatmap(block, ax, colorbar=block is blocks[-1]).set_title(title, fontsize=9)
    return captioned(figure, blocks[-1])


def _lines(ax: Axes, record: Record, columns: list[str], label: str) -> None:
    epochs = np.array(record.column("epoch"), dtype=float)
    for colour, name in zip(sns.color_palette("colorblind", max(len(columns), 1)), columns, strict=False):
        values = np.array(record.column(name), dtype=float)  # None becomes NaN, a gap
        there = ~np.isnan(values) if name in record.accuracies else slice(None)  # a score of some epochs alone
        marker = "o" if len(values[there]) < 3 else None
        ax.plot(epochs[there], values[there], color=colour, label=name, linewidth=1.5, marker=marker)
    ax.set_ylabel(label)
    ax.grid(alpha=0.25)


def _frame(corner: tuple[int, int], color: str, width: float) -> Rectangle:
    return Rectangle(corner, 1, 1, fill=False, clip_on=False, zorder=3, edgecolor=color, linewidth=width)


def page_curves(record: Record) -> list[Any]:
    """The curves of `plot_curves` as plotly figures, one each; the accuracy with that of the top five classes."""
    zero = {"rangemode": "tozero"}
    percent = {"tickformat": ".0%", "autorangeoptions": {"clipmin": 0, "clipmax": 1}}
    title = "kNN accuracy" if record.by_neighbours else "Accuracy"
    accuracy = _curves(record, _accuracies(record), title, percent, "%{y:.2%}")
    taught = record.teacher_line
    if taught is not None:
        accuracy.add_hline(
            taught,
            line={"color": "gray", "dash": "dash", "width": 1.5},
            label={"text": "teacher", "textposition": "start", "yanchor": "top", "font": {"color": "gray"}},
        )
    return [
        _curves(record, record.parts, "Parts of the loss", zero),
        *([accuracy] if record.accuracies else []),
        _curves(record, ["lr"], "Learning rate", zero),
        _curves(record, ["images_per_second"], "Images per second", zero),
    ]


def page_similarities(record: Record) -> list[Any]:
    """The heatmaps of `plot_similarities` as plotly figures, one each."""
    moments = list(record.similarities.items())
    label = measure_name(moments[-1][1])
    unit = Colours(label, {"fixed": (0.0, 1.0)})
    drawn = [heatmap(block, unit, _panel(block, MOMENTS[when], record)) for when, block in moments]
    if len(moments) > 1:
        (first, before), (last, after) = moments[0], moments[-1]
        change = _change(before, after)
        reach = max(float(np.nanmax(np.abs(change.values), initial=0.0)), 0.05)
        title = f"{MOMENTS[last]} minus {MOMENTS[first]}"
        colours = Colours(f"Δ {label}", {"fixed": (-reach, reach)}, DIVERGING)
        drawn.append(heatmap(change, colours, _panel(change, title, record)))
    return drawn


def page_further(name: str, blocks: tuple[Similarity, Similarity]) -> list[Any]:
    """The heatmaps of `plot_further` as plotly figures, one each."""
    unit = Colours(measure_name(blocks[0]), {"fixed": (0.0, 1.0)})
    return [
        heatmap(block, unit, Panel(title=title, bold=(), frames=[]))
        for block, title in zip(blocks, _further_titles(name), strict=True)
    ]


def _further_titles(name: str) -> tuple[str, str]:
    return f"student and {name}", f"{name} and teacher"


def _accuracies(record: Record) -> list[str]:
    return [name for name in ("train_top1", *record.accuracies) if name in record.columns]


def _curves(record: Record, columns: Sequence[str], title: str, axis: dict[str, Any], hover: str = "%{y:.4g}") -> Any:
    epochs = record.column("epoch")
    traces = [
        {
            "type": "scatter", "name": text(name), "x": epochs, "y": record.column(name), "hovertemplate": hover,
            "mode": "lines+markers" if len(epochs) < 3 or name.endswith("_knn") else "lines",
            "connectgaps": name.endswith("_knn"), "line": {"color": PALETTE[index % len(PALETTE)]},
        }
        for index, name in enumerate(columns)
    ]  # fmt: skip
    below = 20 + legend_height(len(traces)) if len(traces) > 1 else 0
    return figure(
        traces,
        320 + below,
        title={"text": title, "font": {"size": 14}, "x": 0.02},
        margin={"l": 60, "r": 10, "t": 40, "b": 50 + below},
        xaxis={"title": {"text": "epoch"}, "tickformat": "d", **({"dtick": 1} if len(epochs) <= 10 else {})},
        yaxis={"exponentformat": "power", **axis},
        showlegend=len(traces) > 1,
        legend=LEGEND,
        hovermode="x unified",
    )


def _panel(block: Similarity, title: str, record: Record) -> Panel:
    """With the chosen stages marked, and their matches framed."""
    rows, cols = ([layer.name for layer in layers] for layers in (block.rows, block.cols))
    frames = [(cols.index(other), rows.index(own)) for own, other in record.matches if own in rows and other in cols]
    return Panel(title=title, bold=tuple(record.chosen_layers), frames=frames)


def _change(before: Similarity, after: Similarity) -> Similarity:
    """The difference, with the errors of two independent estimates added in squares, and no control."""
    return Similarity(
        after.values - before.values,
        np.hypot(before.std_error, after.std_error),
        np.full(after.values.shape, np.nan),
        after.rows,
        after.cols,
        after.measure,
    )
