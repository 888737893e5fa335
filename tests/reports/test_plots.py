"""Heatmaps: what is drawn, where, and that nothing is shown."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import QuadMesh
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from cka_probe.errors import SpecError
from cka_probe.reports.figures.curve import plot_curve
from cka_probe.reports.figures.heatmaps import plot_pairs
from cka_probe.reports.figures.profile import plot_profile
from cka_probe.reports.plots import caption, plot_heatmap
from cka_probe.results.provenance import Provenance
from cka_probe.results.similarity import Curve, Layer, Similarity

PROVENANCE = {
    "data": {"source": "digits", "examples": 1280},
    "batch_size": 64,
    "batches": 20,
    "debiased": True,
    "pool": "none",
    "kernel": "linear",
}


def similarity(models: dict[str, int], provenance: dict[str, Any] | None = None) -> Similarity:
    layers = tuple(Layer(model, f"blocks.{index}") for model, count in models.items() for index in range(count))
    n = len(layers)
    values = np.random.default_rng(0).uniform(size=(n, n))
    null = np.full((n, n), 0.125)
    error = np.full((n, n), 0.0625)
    made = Provenance.from_record(PROVENANCE if provenance is None else provenance)
    return Similarity(values, error, null, layers, layers, "cka", made)


def pair(rows: int, cols: int) -> Similarity:
    return similarity({"first": rows, "second": cols}).between("first", "second")


def mesh(ax: Axes) -> QuadMesh:
    (only,) = [drawn for drawn in ax.collections if isinstance(drawn, QuadMesh)]
    return only


def panels(figure: Figure) -> list[Axes]:
    return [ax for ax in figure.axes if ax.collections and ax.get_xlabel()]


def colour_at(ax: Axes, x: float, y: float) -> np.ndarray:
    """The colour drawn at a point of the axes' data, (3,) from 0 to 1."""
    canvas = ax.figure.canvas
    assert isinstance(canvas, FigureCanvasAgg)
    canvas.draw()
    image = np.asarray(canvas.buffer_rgba())
    column, line = ax.transData.transform((x, y))
    return image[image.shape[0] - 1 - int(line), int(column), :3] / 255


@pytest.fixture(autouse=True)
def nothing_shown(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a figure was shown")

    monkeypatch.setattr(plt, "show", refuse)
    monkeypatch.setattr(Figure, "show", refuse)
    yield
    plt.close("all")


# plot_heatmap


def test_heatmap_draws_the_values_from_the_origin() -> None:
    result = pair(3, 5)
    ax = plot_heatmap(result)
    assert ax.get_xlim() == (0, 5)
    assert ax.get_ylim() == (0, 3)
    np.testing.assert_array_equal(mesh(ax).get_array(), result.values)
    np.testing.assert_array_equal(mesh(ax).get_coordinates()[0, 0], [0, 0])
    assert [label.get_text() for label in ax.get_xticklabels()] == [f"blocks.{index}" for index in range(5)]
    assert [label.get_text() for label in ax.get_yticklabels()] == [f"blocks.{index}" for index in range(3)]
    np.testing.assert_array_equal(ax.get_xticks(), np.arange(5) + 0.5)
    np.testing.assert_array_equal(ax.get_yticks(), np.arange(3) + 0.5)
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("second", "first")


@pytest.mark.slow
def test_heatmap_shows_the_first_layers_at_the_lower_left() -> None:
    values = np.zeros((3, 4))
    values[0, 1] = 1  # first row, second column
    own = pair(3, 4)
    ax = plot_heatmap(Similarity(values, values, values, own.rows, own.cols))
    left, bottom = ax.transData.transform((0.5, 0.5))
    right, top = ax.transData.transform((3.5, 2.5))
    assert left < right
    assert bottom < top
    dark, bright = (np.array(to_rgb(plt.get_cmap("viridis")(value))) for value in (0.0, 1.0))
    for row in range(3):
        for col in range(4):
            expected = bright if values[row, col] else dark
            # An 8-bit channel is rounded.
            np.testing.assert_allclose(colour_at(ax, col + 0.5, row + 0.5), expected, atol=2 / 255)


def test_heatmap_draws_into_the_axes_given() -> None:
    figure = Figure()
    FigureCanvasAgg(figure)
    other, own = figure.subplots(1, 2)
    assert plot_heatmap(pair(3, 4), own, colorbar=False) is own
    assert figure.axes == [other, own]
    assert not other.collections
    np.testing.assert_array_equal(mesh(own).get_array(), pair(3, 4).values)


def test_heatmap_draws_into_pyplots_axes_and_leaves_its_state() -> None:
    figure, (own, current) = plt.subplots(1, 2)
    plt.sca(current)
    assert plot_heatmap(pair(3, 4), own) is own
    assert plt.get_fignums() == [figure.number]
    assert plt.gca() is current


def test_heatmap_draws_into_the_axes_of_a_subfigure() -> None:
    figure = Figure(layout="constrained")
    FigureCanvasAgg(figure)
    own = figure.subfigures(1, 2)[1].subplots()
    assert plot_heatmap(pair(3, 4), own) is own
    figure.canvas.draw()


def test_plots_create_no_pyplot_figure() -> None:
    joint = similarity({"a": 3, "b": 4})
    plot_heatmap(joint.between("a", "b"))
    plot_pairs(joint)
    assert plt.get_fignums() == []


def test_heatmap_has_a_colorbar_unless_told_otherwise() -> None:
    assert len(plot_heatmap(pair(3, 4)).figure.axes) == 2
    assert len(plot_heatmap(pair(3, 4), colorbar=False).figure.axes) == 1


@pytest.mark.slow
def test_heatmap_takes_the_range_of_its_colours() -> None:
    assert mesh(plot_heatmap(pair(3, 4))).get_clim() == (0, 1)
    assert mesh(plot_heatmap(pair(3, 4), vmin=-1, vmax=0.5)).get_clim() == (-1, 0.5)


@pytest.mark.slow
def test_labels_of_260_layers_are_thinned_until_they_fit() -> None:
    result = pair(260, 260)
    ax = plot_heatmap(result)
    ax.figure.canvas.draw()
    for axis, layers, along in ((ax.xaxis, result.cols, "x"), (ax.yaxis, result.rows, "y")):
        ticks, labels = axis.get_ticklocs(), axis.get_ticklabels()
        assert 20 < len(ticks) < 130
        assert [label.get_text() for label in labels] == [layers[int(position)].name for position in ticks]
        boxes = [label.get_window_extent() for label in labels]
        ends, starts = ([getattr(box, f"{along}{end}") for box in boxes] for end in (1, 0))
        assert all(end <= start for end, start in zip(ends, starts[1:], strict=False))


def test_long_layer_names_keep_their_end() -> None:
    name = ".".join(["encoder"] * 20) + ".last"
    layers = (Layer("a", name), Layer("a", "x"))
    label = plot_heatmap(Similarity(np.eye(2), np.eye(2), np.eye(2), layers, layers)).get_xticklabels()[0].get_text()
    assert label.startswith("…")
    assert label.endswith(".last")
    assert len(label) <= 40


@pytest.mark.parametrize("name", ["vit_small", "$x_1$", "$_$", "a$b", r"\frac{", "^^", "a\nb"])
def test_names_of_models_and_layers_are_not_read_as_math(name: str) -> None:
    layers = (Layer(name, name), Layer(name, "x"))
    ax = plot_heatmap(Similarity(np.eye(2), np.eye(2), np.eye(2), layers, layers))
    ax.figure.canvas.draw()  # where unreadable math would raise
    assert (ax.get_xlabel(), ax.get_ylabel()) == (name, name)
    assert ax.get_xticklabels()[0].get_text() == name
    for text in (ax.xaxis.label, ax.yaxis.label, *ax.get_xticklabels(), *ax.get_yticklabels()):
        assert not text.get_parse_math()


@pytest.mark.parametrize("everywhere", [False, True])
def test_cells_without_a_value_are_gray(everywhere: bool) -> None:
    values = np.full((3, 3), np.nan if everywhere else 0.5)
    values[1] = values[:, 1] = np.nan
    layers = pair(3, 3).rows
    ax = plot_heatmap(Similarity(values, values, values, layers, layers))
    np.testing.assert_allclose(colour_at(ax, 1.5, 0.5), [0.8, 0.8, 0.8], atol=2 / 255)  # an 8-bit channel is rounded
    plot_pairs(Similarity(values, values, values, layers, layers)).canvas.draw()


def test_heatmap_of_one_layer_is_one_cell() -> None:
    ax = plot_heatmap(pair(1, 1))
    ax.figure.canvas.draw()
    assert np.shape(mesh(ax).get_array()) == (1, 1)


def test_plotting_leaves_the_result_alone() -> None:
    joint = similarity({"a": 3, "b": 4})
    before = joint.values.copy()
    plot_pairs(joint)
    np.testing.assert_array_equal(joint.values, before)


# plot_pairs


@pytest.mark.slow
@pytest.mark.parametrize(
    ("models", "expected"),
    [
        ({"a": 3}, [("a", "a")]),
        ({"a": 3, "b": 4}, [("a", "b")]),
        ({"a": 3, "b": 4, "c": 2}, [("a", "b"), ("a", "c"), ("b", "c")]),
        ({"a": 1, "b": 2, "c": 3, "d": 4}, [("a", "b"), ("a", "c"), ("a", "d"), ("b", "c"), ("b", "d"), ("c", "d")]),
    ],
)
def test_pairs_have_a_panel_each_on_one_scale(models: dict[str, int], expected: list[tuple[str, str]]) -> None:
    joint = similarity(models)
    figure = plot_pairs(joint, vmin=-0.25, vmax=0.75)
    drawn = panels(figure)
    assert [(ax.get_xlabel(), ax.get_ylabel()) for ax in drawn] == expected
    for ax, (along_x, along_y) in zip(drawn, expected, strict=True):
        np.testing.assert_array_equal(mesh(ax).get_array(), joint.between(along_y, along_x).values)
        assert mesh(ax).get_clim() == (-0.25, 0.75)
    bars = [ax for ax in figure.axes if ax not in drawn and ax.axison]
    assert len(bars) == 1
    assert bars[0].get_ylim() == (-0.25, 0.75)
    figure.canvas.draw()


def test_pairs_carry_the_caption() -> None:
    joint = similarity({"a": 3, "b": 4})
    assert plot_pairs(joint).get_supxlabel().replace("\n", " · ") == caption(joint)


@pytest.mark.parametrize("source", ["folder:/a$_$/b", "$x^^$", "imagenet_val"])
def test_the_name_of_the_data_is_not_read_as_math(source: str) -> None:
    provenance = {**PROVENANCE, "data": {"source": source, "examples": 1280}}
    figure = plot_pairs(similarity({"a": 3, "b": 4}, provenance))
    figure.canvas.draw()  # where unreadable math would raise
    assert source in figure.get_supxlabel()


def test_pairs_do_not_label_more_layers_than_fit() -> None:
    figure = plot_pairs(similarity({"a": 260, "b": 260}))
    (ax,) = panels(figure)
    assert 20 < len(ax.get_xticks()) < 130
    assert 20 < len(ax.get_yticks()) < 130


# caption


def test_caption_holds_examples_batch_size_estimator_control_and_error() -> None:
    assert caption(similarity({"a": 3, "b": 4})) == (
        "1,280 images of digits · batches of 64 · linear CKA, debiased · shuffled control 0.125 ± 0.000 · "
        "standard errors up to 0.062"
    )


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"batches": 1}, "one batch"),
        ({"pool": "cls"}, "pooled: cls"),
    ],
)
def test_caption_says_what_differs(changes: dict[str, Any], expected: str) -> None:
    assert expected in caption(similarity({"a": 3, "b": 4}, PROVENANCE | changes)).split(" · ")


@pytest.mark.parametrize(
    ("measure", "expected"),
    [
        ("cka:biased", "linear CKA, biased"),
        ("cka-rbf:0.4", "RBF CKA, debiased, σ = 0.4 × median distance"),
        ("cka-rbf:with-diagonal", "RBF CKA, debiased, σ = 1 × median distance, zeros included"),
        ("rsa:euclidean:kendall", "RSA, euclidean RDM, Kendall"),
        ("mantel:9999", "Mantel r, correlation RDM, 9,999 permutations"),
        ("svcca:0.95", "SVCCA, 0.95 of the variance"),
        ("mutual-knn:20", "mutual k-NN, k = 20"),
        ("somebody's own:3", "somebody's own:3"),
    ],
)
def test_caption_says_how_the_measure_was_computed(measure: str, expected: str) -> None:
    joint = similarity({"a": 3})
    other = Similarity(joint.values, joint.std_error, joint.null, joint.rows, joint.cols, measure, joint.provenance)
    assert expected in caption(other).split(" · ")


def test_caption_leaves_the_control_of_a_layer_with_itself_out() -> None:
    layers = (Layer("a", "x"), Layer("a", "y"))
    null = np.array([[1.0, 0.25], [0.25, 1.0]])
    assert "shuffled control 0.250 ± 0.000" in caption(Similarity(null, null, null, layers, layers))


def test_caption_says_where_there_is_no_error_or_control() -> None:
    layers = (Layer("a", "x"),)
    nothing = np.full((1, 1), np.nan)
    assert (
        caption(Similarity(np.ones((1, 1)), nothing, nothing, layers, layers))
        == "linear CKA, debiased · no standard errors"
    )


# plot_profile


@pytest.mark.parametrize("counts", [{"a": 8, "b": 8}, {"a": 3, "b": 8}, {"a": 8, "b": 3}])
def test_profile_draws_the_best_match_of_a_layer_above_its_match_at_the_same_depth(counts: dict[str, int]) -> None:
    lines = {line.get_linestyle(): line.get_xydata() for line in plot_profile(similarity(counts)).get_lines()}
    solid, dotted = lines["-"], lines[":"]
    np.testing.assert_allclose(solid[:, 0], np.arange(1, 9) / 8)
    np.testing.assert_array_equal(dotted[:, 0], solid[:, 0])
    assert (dotted[:, 1] >= solid[:, 1]).all()


# distances and curves


def distances() -> Similarity:
    layers = tuple(Layer(model, name) for model in ("a", "b") for name in ("one", "two"))
    values = np.full((4, 4), np.nan)
    np.fill_diagonal(values, 0)
    for row, col, value in ((0, 2, 0.5), (1, 3, 2.5)):
        values[row, col] = values[col, row] = value
    return Similarity(values, values / 10, values / 100, layers, layers, "energy", {"blocks": 10, "batch_size": 8})


def test_a_distance_is_drawn_from_0_to_its_largest_and_the_alike_are_bright() -> None:
    mesh = plot_heatmap(distances().between("a", "b")).collections[0]
    assert mesh.get_clim() == (0, 2.5)
    assert mesh.get_cmap().name == "viridis_r"
    assert plot_profile(distances()).get_ylim()[1] > 2.5
    assert caption(distances()).startswith("energy distance · views swapped at random")


def test_a_pair_without_a_distance_has_no_panel() -> None:
    found = distances()
    layers = (*found.rows, Layer("c", "three"))
    parts = [np.pad(part, (0, 1), constant_values=np.nan) for part in (found.values, found.std_error, found.null)]
    three = Similarity(*parts, layers, layers, "energy", found.provenance)
    assert [(ax.get_xlabel(), ax.get_ylabel()) for ax in panels(plot_pairs(three))] == [("a", "b")]
    nothing = replace(three, values=np.full((5, 5), np.nan))
    assert len(panels(plot_pairs(nothing))) == 3


def test_a_curve_has_a_line_a_layer_and_their_mean_with_twice_the_mean_error() -> None:
    base = distances()
    errors = np.stack([np.full((4, 4), error) for error in (0.2, 0.1)])
    curve = Curve(np.array([16, 32]), np.stack([base.values * 2, base.values]), errors)
    ax = plot_curve(replace(base, curve=curve))
    lines = [line.get_ydata().tolist() for line in ax.get_lines() if line.get_linestyle() != "None"]
    assert lines == [[1.0, 0.5], [5.0, 2.5], [3.0, 1.5]]
    (bars,) = ax.containers[0].lines[2]
    np.testing.assert_allclose(np.diff([part[:, 1] for part in bars.get_segments()])[:, 0], [0.8, 0.4])
    with pytest.raises(SpecError, match="no curve"):
        plot_curve(base)
