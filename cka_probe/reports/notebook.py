"""A result in a notebook: its heatmap as axes, and as HTML."""

from __future__ import annotations

import base64
import io
from html import escape
from typing import Any

import numpy as np

from cka_probe.reports.drawing import Axes, Figure, FigureCanvasAgg, own_settings
from cka_probe.reports.figures.atlas import plot_atlas
from cka_probe.reports.plots import caption, plot_heatmap
from cka_probe.results.similarity import Similarity
from cka_probe.runtime.names import readable

_INCHES, _DPI = (5.2, 4.4), 100


def draw_heatmap(similarity: Similarity, ax: Axes | None = None, **options: Any) -> Axes:
    """`plot_atlas` of several models along a side, else `plot_heatmap`; the arguments are theirs."""
    several = any(len({layer.model for layer in side}) > 1 for side in (similarity.rows, similarity.cols))
    return (plot_atlas if several else plot_heatmap)(similarity, ax, **options)


def html_of(similarity: Similarity) -> str:
    """A small heatmap as an image inside the HTML, with what it shows above and its caption below."""
    title = escape(readable(repr(similarity)))
    if not similarity.values.size:
        return f"<p>{title}</p>"
    values = similarity.values[np.isfinite(similarity.values)]
    extent = f"{len(values):,} values from {values.min():.3f} to {values.max():.3f}" if len(values) else "no value"
    return (
        f'<figure style="margin: 0"><figcaption><b>{title}</b></figcaption>'
        f'<img alt="Heatmap of {title}: {extent}" style="max-width: 100%" src="{_image(similarity)}">'
        f"<figcaption>{escape(readable(caption(similarity)))}</figcaption></figure>"
    )


@own_settings()
def _image(similarity: Similarity) -> str:
    """The heatmap as a PNG in a data URI."""
    figure = Figure(figsize=_INCHES, layout="constrained", dpi=_DPI)
    FigureCanvasAgg(figure)
    draw_heatmap(similarity, figure.add_subplot())
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
