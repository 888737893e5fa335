"""The change between two finished comparisons of the same layers: its figure and its table."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np

from cka_probe.errors import SpecError
from cka_probe.reports.drawing import Figure, FigureCanvasAgg, drawable, own_settings
from cka_probe.reports.plots import caption, plot_difference, plot_heatmap
from cka_probe.reports.report import save_figure
from cka_probe.reports.run_files import Run, named_files
from cka_probe.reports.tables import write_table
from cka_probe.results.findings import model_pairs
from cka_probe.results.similarity import Similarity

logger = logging.getLogger(__name__)


@own_settings()
def draw_difference(folder: Path, before: Run, after: Run, *, names: tuple[str, str]) -> None:
    """Write ``difference.*``: two runs and the change between them, for each pair of models; and ``difference.csv``.

    Args:
        folder: that exists.
        before: a finished comparison.
        after: one of the same layers; the models may have other names.
        names: of the two, for the titles.

    Raises:
        SpecError: the runs have no measure in common, other layers, or were not measured alike.
    """
    import pandas as pd

    common = {measure: before.results[measure] for measure in before.results if measure in after.results}
    if not common:
        own = [f"{name} has {', '.join(run.results)}" for name, run in zip(names, (before, after), strict=True)]
        raise SpecError(f"Both runs must have a measure in common, but {' and '.join(own)}.")
    tables = []
    for infix, first in named_files(common):
        second = after.results[first.measure]
        _check_comparable(first, second, names)
        save_figure(_difference_figure(first, second, names), folder, f"difference{infix}")
        tables.append(_difference_table(first, second))
    write_table(folder / "difference.csv", pd.concat(tables))


def _check_comparable(before: Similarity, after: Similarity, names: tuple[str, str]) -> None:
    """Raise a SpecError where two results were not measured alike; warn where their images or batches differ."""
    first, second = before.provenance.pool, after.provenance.pool
    if first != second:
        raise SpecError(
            f"Both runs must be measured alike, but pool is {first} in {names[0]} and {second} in {names[1]}. Compare "
            "again with the same options."
        )
    for what, one, other in (
        ("images", before.provenance.data, after.provenance.data),
        ("batch sizes", before.provenance.batch_size, after.provenance.batch_size),
    ):
        if one != other:
            logger.warning("The two runs have different %s: a part of the change comes from that.", what)


def _difference_figure(before: Similarity, after: Similarity, names: tuple[str, str]) -> Figure:
    pairs, others = model_pairs(before), model_pairs(after)
    if len(pairs) != len(others):
        raise SpecError(
            f"Both runs must compare the same number of networks, but {names[0]} has {len(before.models)} "
            f"({', '.join(before.models)}) and {names[1]} {len(after.models)} ({', '.join(after.models)})."
        )
    figure = Figure(figsize=(16.5, 4.9 * len(pairs)), layout="constrained", dpi=150)
    engine: Any = figure.get_layout_engine()  # that of the constrained layout, which alone knows wspace
    engine.set(wspace=0.06)
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(pairs), 3, squeeze=False)
    for row, (pair, other) in zip(grid, zip(pairs, others, strict=True), strict=True):
        blocks = before.between(*reversed(pair)), after.between(*reversed(other))
        for ax, block, name in zip(row, blocks, names, strict=False):
            plot_heatmap(block, ax, colorbar=block is blocks[1]).set_title(drawable(name), fontsize=9, parse_math=False)
        plot_difference(*blocks, row[2]).set_title("change", fontsize=9)
    texts = dict.fromkeys(caption(similarity) for similarity in (before, after))
    figure.supxlabel("\n".join(texts), fontsize=8, color="0.25", parse_math=False)
    return figure


def _difference_table(before: Similarity, after: Similarity) -> Any:
    """A row a cell of `plot_difference`, the errors of two independent runs added in squares."""
    first, second = before.to_frame(), after.to_frame()
    table = second[["row_model", "row_layer", "col_model", "col_layer", "measure"]].copy()
    table["before"], table["after"] = first["value"], second["value"]
    table["change"] = second["value"] - first["value"]
    table["std_error"] = np.hypot(first["std_error"], second["std_error"])
    return table
