"""A finished comparison -> its pictures and report.html: one page that needs nothing else, not even a network."""

from __future__ import annotations

import base64
import io
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cka_probe.estimation.measure import Kind
from cka_probe.measures.catalogue import about
from cka_probe.reports.drawing import own_settings
from cka_probe.reports.layer_plots import plot_layers
from cka_probe.reports.pages import render_page, write_page
from cka_probe.reports.plots import (
    caption,
    captioned,
    measure_name,
    plot_atlas,
    plot_curve,
    plot_pairs,
    plot_profile,
)
from cka_probe.reports.run_files import Run, named_files
from cka_probe.reports.tables import write_table
from cka_probe.results.agreement import Agreement, agreement, layer_table, view_pairs
from cka_probe.results.findings import (
    PairFindings,
    alarm,
    cautions,
    compare_pair,
    control_band,
    matched_curves,
    model_matrix,
    model_pairs,
    off_diagonal,
)
from cka_probe.results.similarity import Influence, Layer, Similarity
from cka_probe.runtime.names import file_names

if TYPE_CHECKING:
    from cka_probe.reports.drawing import Axes, Figure

logger = logging.getLogger(__name__)

FORMATS = ("png", "svg", "pdf")
_TOLD = 10  # of the most influential images of a pair of models


@own_settings()
def draw(folder: Path, run: Run) -> None:
    """Write the pictures and ``report.html`` of a comparison into a folder.

    They are ``heatmap.*``, ``profile.*``, ``atlas.*`` of more than two models, and ``curve.*`` where there is one.

    And ``layers.*``, a table and a figure of the same layer in two views of a model, where there are two; where there
    are more, a figure a pair, ``layers-FIRST-SECOND.*``.

    Args:
        folder: that exists.
        run: the first measure takes the plain names; another stands before the suffix: ``heatmap.cka-rbf-0.8.png``.
    """
    panels = run.record.get("panels") or {}
    for infix, similarity in named_files(run.results):
        pairs = _pairs(similarity, run.record)
        save_figure(plot_pairs(similarity, pairs=pairs, columns=panels.get("columns")), folder, f"heatmap{infix}")
        save_figure(_captioned(plot_profile(similarity, pairs=pairs), similarity), folder, f"profile{infix}")
        if len(similarity.models) > 2:
            save_figure(_captioned(plot_atlas(similarity), similarity), folder, f"atlas{infix}")
        if similarity.curve is not None:
            save_figure(_captioned(plot_curve(similarity), similarity), folder, f"curve{infix}")
    similarity = next(iter(run.results.values()))
    views = view_pairs(similarity)
    names = file_names(similarity.models)
    for first, second in views:
        infix = f"-{names[first]}-{names[second]}" if len(views) > 1 else ""
        save_figure(plot_layers(run.results, first, second), folder, f"layers{infix}")
    table = layer_table(run.results)
    if table is not None:
        write_table(folder / "layers.csv", table)
    write_page(folder / "report.html", report_page(run))


def report_page(run: Run) -> str:
    """The whole report as HTML, scripts and styles inside."""
    first = next(iter(run.results.values()))
    provenance = first.provenance
    return render_page(
        "report.html",
        title=" × ".join(first.models),
        command=run.record.get("command", ""),
        provenance=provenance,
        pooling=_pooling(run.results),
        samples={name: [_data_uri(pixels) for pixels in images] for name, images in run.samples.items()},
        measures=[
            {
                "key": measure,
                "name": measure_name(similarity, estimator=True),
                "caption": caption(similarity),
                "findings": _findings(similarity, run.record),
                "alarm": alarm(similarity),
                "cautions": cautions(similarity),
                "kind": about(measure).kind,
                "tested": similarity.p_value_max is not None and about(measure).kind == "similarity",
                "influence": _influence(similarity),
            }
            for measure, similarity in run.results.items()
        ],
        figures={measure: _figures(similarity, run.record) for measure, similarity in run.results.items()},
        many=len(first.models) > 2,
        curves=all(similarity.curve is not None for similarity in run.results.values()),
        agreements=_agreements(run),
        views=_view_rows(run.results),
        measure_names={measure: measure_name(similarity) for measure, similarity in run.results.items()},
        distances=[measure for measure in run.results if about(measure).kind == "distance"],
    )


def _pooling(results: Mapping[str, Similarity]) -> str:
    """How the features were pooled; for which measures, where they differ in that."""
    pools: dict[str, list[str]] = {}
    for measure, similarity in results.items():
        pools.setdefault(str(similarity.provenance.get("pool", "none")), []).append(measure)
    if len(pools) == 1:
        return next(iter(pools))
    return "; ".join(f"{pool} ({', '.join(measures)})" for pool, measures in pools.items())


def _captioned(ax: Axes, similarity: Similarity) -> Figure:
    figure: Any = ax.figure  # a whole figure, as the axes were made for it
    return captioned(figure, similarity)


def save_figure(figure: Figure, folder: Path, name: str) -> None:
    """Write a figure in each of `FORMATS`."""
    for suffix in FORMATS:
        figure.savefig(folder / f"{name}.{suffix}")


def _pairs(similarity: Similarity, record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Those of the arrangement of the run, where it has one; else all pairs of different models."""
    panels = record.get("panels")
    return [(first, second) for first, second in panels["pairs"]] if panels else model_pairs(similarity)


def _findings(similarity: Similarity, record: Mapping[str, Any]) -> list[PairFindings]:
    found = (compare_pair(similarity, *pair) for pair in _pairs(similarity, record))
    return [pair for pair in found if pair is not None]


def _agreements(run: Run) -> list[tuple[int, Agreement]]:
    """How alike the measures order the layer pairs, for each pair of models that has several, by its number."""
    pairs = _pairs(next(iter(run.results.values())), run.record)
    found = ((number, agreement(run.results, *pair)) for number, pair in enumerate(pairs))
    return [(number, pair) for number, pair in found if pair is not None]


def _view_rows(results: Mapping[str, Similarity]) -> list[dict[str, Any]]:
    """For each model in two views, its layers with the value of every measure and its error."""
    views = []
    for first, second in view_pairs(next(iter(results.values()))):
        blocks = {measure: similarity.between(first, second) for measure, similarity in results.items()}
        names = [layer.name for layer in next(iter(blocks.values())).rows]
        nothing = np.full(len(names), np.nan)
        parts = {
            measure: (
                block.values.diagonal(),
                block.std_error.diagonal(),
                nothing if block.p_value is None else block.p_value.diagonal(),
            )
            for measure, block in blocks.items()
        }
        rows = [
            {
                "layer": name,
                "cells": {measure: tuple(_number(part[index]) for part in found) for measure, found in parts.items()},
            }
            for index, name in enumerate(names)
        ]
        views.append({"first": first, "second": second, "rows": rows})
    return views


def _figures(similarity: Similarity, record: Mapping[str, Any]) -> dict[str, Any]:
    """What the page's script draws, as plain values; a value that is not there is None."""
    values = off_diagonal(similarity, similarity.values)
    profiles = [
        {
            "name": f"{found.first} × {found.second}",
            **{
                part: [
                    [round(found.depth(cell), 4), _number(cell.value), _number(cell.std_error),
                     f"{cell.first.name} × {cell.second.name}"]
                    for cell in cells
                ]
                for part, cells in (("matched", found.matched), ("best", found.best))
            },
        }
        for found in _findings(similarity, record)
    ]  # fmt: skip
    figures: dict[str, Any] = {
        "label": measure_name(similarity),
        "kind": about(similarity.measure).kind,
        "range": [_number(values.min()), _number(values.max())] if len(values) else [0, 1],
        "band": [_number(bound) for bound in control_band(similarity)],
        "heatmaps": [heatmap_values(similarity.between(second, first)) for first, second in _pairs(similarity, record)],
        "profiles": profiles,
    }
    if similarity.curve is not None:
        figures["curve"] = _curve(similarity, record)
    if len(similarity.models) > 2:
        matrix = model_matrix(similarity)
        figures["atlas"] = heatmap_values(similarity)
        figures["models"] = {"names": list(similarity.models), "values": _numbers(matrix)}
        figures["tree"] = _tree(matrix, similarity.models, about(similarity.measure).kind)
    return figures


def _curve(similarity: Similarity, record: Mapping[str, Any]) -> dict[str, Any]:
    """For each pair of models, the mean over layers at matched depth at each number of examples."""
    assert similarity.curve is not None
    lines = {pair: matched_curves(similarity, *pair) for pair in _pairs(similarity, record)}
    return {
        "examples": similarity.curve.examples.tolist(),
        "lines": [
            {"name": f"{first} × {second}", "values": [_number(value) for value in found.mean(1)]}
            for (first, second), found in lines.items()
            if found.size
        ],
    }


def _influence(similarity: Similarity) -> list[dict[str, Any]]:
    """The most influential examples of each pair of models; the rest stands in influence.csv."""
    pairs: dict[tuple[str, str], list[Influence]] = {}
    for one in similarity.influence:
        pairs.setdefault((one.row.model, one.col.model), []).append(one)
    return [
        {"first": first, "second": second, "images": found[:_TOLD], "more": len(found) - len(found[:_TOLD])}
        for (first, second), found in pairs.items()
    ]


def heatmap_values(block: Similarity) -> dict[str, Any]:
    """What `drawHeatmap` of the page's script draws."""
    return {
        **({} if block.p_value is None else {"p": _numbers(block.p_value)}),
        "rows": _axis(block.rows),
        "cols": _axis(block.cols),
        "values": _numbers(block.values),
        "errors": _numbers(block.std_error),
        "control": _numbers(block.null),
    }


def _axis(layers: Sequence[Layer]) -> dict[str, Any]:
    models = list(dict.fromkeys(layer.model for layer in layers))
    counts = [sum(layer.model == model for layer in layers) for model in models]
    return {"models": models, "counts": counts, "names": [layer.name for layer in layers]}


def _tree(matrix: NDArray[np.float64], models: Sequence[str], kind: Kind) -> dict[str, Any] | None:
    """A dendrogram of the models by average linkage of 1 - similarity, or of the distance; None where one is NaN."""
    from scipy.cluster.hierarchy import dendrogram, linkage
    from scipy.spatial.distance import squareform

    if not np.isfinite(matrix).all():
        return None
    distance = np.clip(matrix if kind == "distance" else 1 - matrix, 0, None)
    drawn = dendrogram(linkage(squareform(distance, checks=False), "average"), labels=list(models), no_plot=True)
    return {"x": drawn["icoord"], "y": drawn["dcoord"], "names": drawn["ivl"]}


def _data_uri(pixels: NDArray[np.uint8]) -> str:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _numbers(array: NDArray[np.float64]) -> list[list[float | None]]:
    return [[_number(value) for value in row] for row in array.tolist()]


def _number(value: float) -> float | None:
    return round(float(value), 4) if np.isfinite(value) else None
