"""A finished comparison -> its pictures and report.html: one page that needs nothing else, not even a network."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cka_probe.measures.catalogue import about
from cka_probe.reports.drawing import Figure, own_settings
from cka_probe.reports.figures.catalogue import FIGURES, drawn_of, selections
from cka_probe.reports.figures.figure import Selection
from cka_probe.reports.pages import figure_data, render_page, write_page
from cka_probe.reports.plots import caption, measure_name
from cka_probe.reports.run_files import Run, named_files
from cka_probe.reports.tables import write_table
from cka_probe.results.agreement import Agreement, agreement, layer_table, view_pairs
from cka_probe.results.cautions import alarm, cautions
from cka_probe.results.findings import PairFindings, compare_pair
from cka_probe.results.similarity import Influence, Similarity

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
    chosen = selections(run.results, run.record.get("panels"))
    infixes = {similarity.measure: infix for infix, similarity in named_files(run.results)}
    for figure in FIGURES:
        for measure, selection in drawn_of(figure, chosen):
            for ending, drawn in (figure.plot(selection) if figure.plot else {}).items():
                save_figure(drawn, folder, f"{figure.name}{ending}{infixes[measure]}")
    table = layer_table(run.results)
    if table is not None:
        write_table(folder / "layers.csv", table)
    write_page(folder / "report.html", report_page(run))


def report_page(run: Run) -> str:
    """The whole report as HTML, scripts and styles inside."""
    first = next(iter(run.results.values()))
    chosen = selections(run.results, run.record.get("panels"))
    return render_page(
        "report.html",
        title=" × ".join(first.models),
        command=run.record.get("command", ""),
        provenance=first.provenance,
        pooling=_pooling(run.results),
        samples={name: [data_uri(pixels) for pixels in images] for name, images in run.samples.items()},
        measures=[
            {
                "key": measure,
                "name": measure_name(selection.similarity, estimator=True),
                "caption": caption(selection.similarity),
                "findings": _findings(selection),
                "alarm": alarm(selection.similarity),
                "cautions": cautions(selection.similarity),
                "kind": about(measure).kind,
                "tested": selection.similarity.p_value_max is not None and about(measure).kind == "similarity",
                "influence": _influence(selection.similarity),
            }
            for measure, selection in chosen.items()
        ],
        sections=[figure for figure in FIGURES if any(drawn_of(figure, chosen))],
        figures=_figures(chosen),
        agreements=_agreements(next(iter(chosen.values()))),
        views=_view_rows(run.results),
        measure_names={measure: measure_name(similarity) for measure, similarity in run.results.items()},
        distances=[measure for measure in run.results if about(measure).kind == "distance"],
    )


def _figures(chosen: Mapping[str, Selection]) -> dict[str, Any]:
    """Measure -> name -> its figures for the page; those that are one for all measures under an empty name."""
    data: dict[str, Any] = {"": {}, **{measure: {} for measure in chosen}}
    for figure in FIGURES:
        if figure.page is None:
            continue
        for measure, selection in drawn_of(figure, chosen):
            panels = [None if panel is None else figure_data(panel) for panel in figure.page(selection)]
            data[measure if figure.per_measure else ""][figure.name] = panels
    return data


def _pooling(results: Mapping[str, Similarity]) -> str:
    """How the features were pooled; for which measures, where they differ in that."""
    pools: dict[str, list[str]] = {}
    for measure, similarity in results.items():
        pools.setdefault(similarity.provenance.pool or "none", []).append(measure)
    if len(pools) == 1:
        return next(iter(pools))
    return "; ".join(f"{pool} ({', '.join(measures)})" for pool, measures in pools.items())


def save_figure(figure: Figure, folder: Path, name: str) -> None:
    """Write a figure in each of `FORMATS`. Its layout is computed once, not anew for each."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    for suffix in FORMATS:
        figure.savefig(folder / f"{name}.{suffix}")


def _findings(selection: Selection) -> list[PairFindings]:
    found = (compare_pair(selection.similarity, *pair) for pair in selection.pairs)
    return [pair for pair in found if pair is not None]


def _agreements(selection: Selection) -> list[tuple[int, Agreement]]:
    """How alike the measures order the layer pairs, for each pair of models that has several, by its number."""
    found = ((number, agreement(selection.results, *pair)) for number, pair in enumerate(selection.pairs))
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


def _influence(similarity: Similarity) -> list[dict[str, Any]]:
    """The most influential examples of each pair of models; the rest stands in influence.csv."""
    pairs: dict[tuple[str, str], list[Influence]] = {}
    for one in similarity.influence:
        pairs.setdefault((one.row.model, one.col.model), []).append(one)
    return [
        {"first": first, "second": second, "images": found[:_TOLD], "more": len(found) - len(found[:_TOLD])}
        for (first, second), found in pairs.items()
    ]


def data_uri(pixels: NDArray[np.uint8]) -> str:
    """An image (h, w, c) for the ``src`` of a page."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _number(value: float) -> float | None:
    return round(float(value), 4) if np.isfinite(value) else None
