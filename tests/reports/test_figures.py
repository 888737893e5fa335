"""The figures of a report: declared in one place, drawn by matplotlib and plotly from the same result."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cka_probe.reports import report
from cka_probe.reports.drawing import Figure
from cka_probe.reports.figures.catalogue import FIGURES, selections
from cka_probe.reports.figures.figure import ReportFigure, Selection, always
from cka_probe.reports.figures.heatmaps import value_colours
from cka_probe.reports.interactive import figure, heatmap
from cka_probe.reports.run_files import Run
from cka_probe.results.similarity import Layer, Similarity
from tests.pages import figures_of, numbers


def similarity(names: dict[str, list[str]], measure: str = "cka") -> Similarity:
    layers = tuple(Layer(model, name) for model, own in names.items() for name in own)
    values = np.random.default_rng(0).uniform(size=(len(layers), len(layers)))
    return Similarity(values, values / 8, values / 16, layers, layers, measure)


@pytest.mark.slow
def test_a_new_figure_is_one_definition_and_one_entry_of_the_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def plot(selection: Selection) -> dict[str, Figure]:
        drawn = Figure()
        drawn.add_subplot().hist(selection.similarity.values.ravel())
        return {"": drawn}

    def page(selection: Selection) -> list[object]:
        return [figure([{"type": "histogram", "x": selection.similarity.values.ravel()}], 300)]

    histogram = ReportFigure(
        name="histogram", title="All <values>", note="Of layers.", applies=always, plot=plot, page=page
    )
    monkeypatch.setattr(report, "FIGURES", (*FIGURES, histogram))
    results = {measure: similarity({"a": ["l0"], "b": ["l0", "l1"]}, measure) for measure in ("cka", "rsa")}
    report.draw(tmp_path, Run(results, {}, {}))
    assert {path.name for path in tmp_path.glob("hist*")} == {
        f"histogram{infix}.{suffix}" for infix in ("", ".rsa") for suffix in ("png", "svg", "pdf")
    }
    written = (tmp_path / "report.html").read_text()
    assert "<h2>All &lt;values&gt;</h2>" in written
    assert '<div class="wide" data-figure="histogram"></div>' in written
    for measure, result in results.items():
        drawn = figures_of(written)[measure]["histogram"][0]
        np.testing.assert_array_equal(numbers(drawn["data"][0]["x"]), result.values.ravel())
        assert "template" not in drawn["layout"], "the page brings its own, which is large"


def test_the_figures_that_apply_depend_on_the_result() -> None:
    two, three = ({name: ["l0", "l1"] for name in names} for names in ("ab", "abc"))
    for models, expected in ((two, {"heatmap", "profile"}), (three, {"heatmap", "profile", "atlas", "models"})):
        chosen = selections({"cka": similarity(models)})["cka"]
        assert {one.name for one in FIGURES if one.applies(chosen)} == expected


def test_cells_without_a_value_are_gaps_and_the_errors_of_one_batch_are_not_shown() -> None:
    result = similarity({"a": ["l0", "l1"], "b": ["l0", "l1"]})
    values = np.where(np.eye(4), np.nan, result.values)
    nothing = np.full((4, 4), np.nan)
    block = Similarity(values, nothing, nothing, result.rows, result.cols).between("a", "a")
    drawn = heatmap(block, value_colours(block)).to_dict()["data"][0]
    np.testing.assert_array_equal(np.isnan(numbers(drawn["z"])), np.eye(2, dtype=bool))
    assert drawn["hovertemplate"] == "<b>%{z:.3f}</b><br>%{text}<extra></extra>"
    assert drawn.get("customdata") is None


def test_layers_of_equal_or_long_names_keep_their_rows() -> None:
    long = "encoder.layers.11.attention.output.dense"
    result = similarity({"a": ["same", "same", long, f"x{long}"]}).between("a", "a")
    drawn = heatmap(result, value_colours(result)).to_dict()
    names = drawn["data"][0]["y"]
    assert len(set(names)) == 4
    assert names[2:] == [long, f"x{long}"]
    assert set(drawn["layout"]["yaxis"]["labelalias"].values()) == {f"…{long[-25:]}"}
    assert drawn["layout"]["meta"]["names"][0][2] == f"a <b>{long}</b>", "the hover text has all of it"


def test_a_distance_is_brightest_at_its_smallest_value() -> None:
    result = similarity({"a": ["l0", "l1"], "b": ["l0", "l1"]}, "mmd")
    colours = value_colours(result, result.between("a", "b"))
    assert colours.reverse
    assert colours.ranges["fixed"][0] == colours.ranges["panel"][0] == 0
    assert colours.ranges["fixed"][1] == colours.ranges["data"][1]
    assert not value_colours(similarity({"a": ["l0", "l1"]})).reverse
