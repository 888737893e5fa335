"""What the plotly figures of a page share: layout, colours, text, heatmaps. The page adds the colours of its theme."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cka_probe.results.similarity import Layer, Similarity
from cka_probe.runtime.names import readable

PALETTE = (
    "#0173b2", "#de8f05", "#029e73", "#d55e00", "#cc78bc", "#ca9161", "#fbafe4", "#949494", "#ece133", "#56b4e9",
)  # fmt: skip
"""seaborn's "colorblind"."""

DIVERGING = ((0, "#2166ac"), (0.25, "#92c5de"), (0.5, "#f7f7f7"), (0.75, "#f4a582"), (1, "#b2182b"))
GAP = "rgba(128, 128, 128, 0.35)"
"""Of a cell without a value, on white and on black."""

LEGEND = {"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom"}
"""Of the pairs of models, below the axes."""

_NAME = 26  # characters of a tick label
_PANEL, _ALONE = (0.9, 520), (1.0, 900)  # height of a heatmap: over its width, and in pixels at most


@dataclass(frozen=True)
class Colours:
    """How the values of a heatmap become colours.

    Attributes:
        label: what the values are.
        ranges: name -> the values at both ends of the scale: ``fixed``, ``data``, ``panel``. The page shows one.
        scale: of plotly.
        reverse: whether the brightest colour is that of the smallest value, as for a distance.
    """

    label: str
    ranges: Mapping[str, Sequence[float]]
    scale: Any = "Viridis"
    reverse: bool = False


@dataclass(frozen=True)
class Panel:
    """How one heatmap stands in the page.

    Attributes:
        alone: whether it has the whole width.
        title: above it.
        bold: layers of the rows to mark.
        frames: cells to frame, (column, row).
    """

    alone: bool = False
    title: str = ""
    bold: Sequence[str] = ()
    frames: Sequence[tuple[int, int]] = field(default=())


def text(name: str, limit: int | None = None) -> str:
    """A name as plotly shows it: shortened from the left to ``limit``, with no HTML in it."""
    name = readable(name)
    if limit is not None and len(name) > limit:
        name = f"…{name[1 - limit :]}"
    return escape(name, quote=False)


def figure(traces: Sequence[Any], height: int, **layout: Any) -> Any:
    """A plotly figure without a theme of its own.

    Args:
        traces: of plotly.
        height: in pixels.
        layout: attributes of `plotly.graph_objects.Layout`, beside those that all figures have.
    """
    import plotly.graph_objects as go

    common: dict[str, Any] = {"height": height, "margin": {"l": 60, "r": 10, "t": 30, "b": 60}}
    return go.Figure(traces, {**common, **layout})


def legend_height(pairs: int) -> int:
    """Pixels that a figure grows by for the names of many pairs."""
    return 20 * (pairs // 3)


def number(value: float) -> str:
    """With three digits behind the point; "none" for NaN."""
    return f"{value:.3f}" if np.isfinite(value) else "none"


def with_error(value: float, error: float) -> str:
    """A value in bold, with its standard error unless that is NaN."""
    return f"<b>{number(value)}</b>" + (f" ± {number(error)}" if np.isfinite(error) else "")


def heatmap(block: Similarity, colours: Colours, panel: Panel | None = None) -> Any:
    """The values of a similarity, the first layer of both sides at the origin; errors, control and p when hovered.

    Args:
        block: of one pair of models, or joint: then the axes name the models, and lines part them.
        colours: of the values.
        panel: its place in the page.
    """
    import plotly.graph_objects as go

    panel = panel or Panel()
    several = any(len({layer.model for layer in side}) > 1 for side in (block.rows, block.cols))
    hover, custom = _hover(block)
    aspect, height = _ALONE if panel.alone else _PANEL
    trace = go.Heatmap(
        z=_compact(block.values),
        x=None if several else _categories(block.cols),
        y=None if several else _categories(block.rows, panel.bold),
        customdata=custom,
        hovertemplate=hover,
        hoverongaps=False,
        coloraxis="coloraxis",
    )
    axes = [_joint_axis, _layer_axis][not several]
    layout: dict[str, Any] = {
        "xaxis": {**axes(block.cols), "tickangle": -45 if several else -90, "showgrid": False},
        "yaxis": {**axes(block.rows, panel.bold), "showgrid": False},
        "shapes": [*(_borders(block) if several else ()), *_frames(panel.frames)],
        "plot_bgcolor": GAP,
        # The page writes the names of each cell's layers into its hover text: here they would be most of the file.
        "meta": {
            "aspect": aspect,
            "label": _spoken(block, colours, panel),
            "names": [_full(block.rows), _full(block.cols)],
            "ranges": {name: list(ends) for name, ends in colours.ranges.items()},
        },
    }
    if panel.title:
        layout["title"] = {"text": text(panel.title), "font": {"size": 14}, "x": 0.02}
    return figure([trace], height, coloraxis=color_axis(colours), **layout)


def _spoken(block: Similarity, colours: Colours, panel: Panel) -> str:
    """What a screen reader says of a heatmap."""
    rows, cols = (" + ".join(dict.fromkeys(layer.model for layer in side)) for side in (block.rows, block.cols))
    return f"{panel.title or 'Heatmap'}: {colours.label}, {readable(rows)} by {readable(cols)}"


def color_axis(colours: Colours) -> dict[str, Any]:
    """The colour scale, with its bar, over the first of its ranges."""
    low, high = next(iter(colours.ranges.values()))
    bar = {"title": {"text": text(colours.label), "side": "right"}, "thickness": 12, "outlinewidth": 0}
    return {"colorscale": colours.scale, "reversescale": colours.reverse, "cmin": low, "cmax": high, "colorbar": bar}


def _hover(block: Similarity) -> tuple[str, NDArray[np.float32] | None]:
    """The hover text of a cell, and the numbers that it takes beside the value, (rows, cols, numbers)."""
    rest = (
        (" ± %{{customdata[{}]:.3f}}", block.std_error),
        ("<br>control %{{customdata[{}]:.3f}}", block.null),
        ("<br>p = %{{customdata[{}]:.3f}}, of this pair by itself", block.p_value),
    )
    known = [(words, part) for words, part in rest if part is not None and np.isfinite(part).any()]
    said = {words: words.format(index) for index, (words, _) in enumerate(known)}
    error = said.pop(rest[0][0], "")
    hover = f"<b>%{{z:.3f}}</b>{error}<br>%{{text}}{''.join(said.values())}<extra></extra>"
    return hover, _compact(np.stack([part for _, part in known], -1)) if known else None


def _compact(array: NDArray[Any]) -> NDArray[np.float32]:
    """Single precision, which plotly writes as 5 characters a number; a number of the page has three digits."""
    return array.astype(np.float32)


def _full(layers: Sequence[Layer]) -> list[str]:
    return [f"{text(layer.model)} <b>{text(layer.name)}</b>" for layer in layers]


def _categories(layers: Sequence[Layer], bold: Sequence[str] = ()) -> list[str]:
    """A name per layer, all different: equal ones would share a row."""
    found: dict[str, None] = {}
    for layer in layers:
        name = f"● {text(layer.name)}" if layer.name in bold else text(layer.name)
        while name in found:
            name += "\u200b"
        found[name] = None
    return list(found)


def _layer_axis(layers: Sequence[Layer], bold: Sequence[str] = ()) -> dict[str, Any]:
    """An axis of one model's layers; plotly labels as many as there is room for, also after a zoom."""
    short = {name: f"…{name[1 - _NAME :]}" for name in _categories(layers, bold) if len(name) > _NAME}
    title = {"text": text(layers[0].model, 50), "standoff": 12}
    return {"type": "category", "title": title, "range": _ends(layers), **({"labelalias": short} if short else {})}


def _joint_axis(layers: Sequence[Layer], _: Sequence[str] = ()) -> dict[str, Any]:
    """An axis of several models, each named in the middle of its layers."""
    models, ends = _ends_of_models(layers)
    middles = [(low + high) / 2 for low, high in zip([-0.5, *ends], ends, strict=False)]
    return {"tickvals": middles, "ticktext": [text(model, _NAME) for model in models], "range": _ends(layers)}


def _ends(layers: Sequence[Layer]) -> list[float]:
    return [-0.5, len(layers) - 0.5]


def _ends_of_models(layers: Sequence[Layer]) -> tuple[list[str], list[float]]:
    models = list(dict.fromkeys(layer.model for layer in layers))
    counts = [sum(layer.model == model for layer in layers) for model in models]
    return models, (np.cumsum(counts) - 0.5).tolist()


def _borders(block: Similarity) -> list[dict[str, Any]]:
    """A line between two models, along each side."""
    line = {"color": "white", "width": 1.5}
    shapes = []
    for axis, other, layers in (("x", "y", block.cols), ("y", "x", block.rows)):
        for end in _ends_of_models(layers)[1][:-1]:
            across = {f"{other}ref": "paper", f"{other}0": 0, f"{other}1": 1}
            shapes.append({"type": "line", f"{axis}0": end, f"{axis}1": end, **across, "line": line})
    return shapes


def _frames(cells: Sequence[tuple[int, int]]) -> list[dict[str, Any]]:
    return [
        {
            "type": "rect", "x0": column - 0.5, "x1": column + 0.5, "y0": row - 0.5, "y1": row + 0.5,
            "line": {"color": color, "width": width},
        }
        for column, row in cells
        for color, width in (("black", 4), ("white", 2))
    ]  # fmt: skip
