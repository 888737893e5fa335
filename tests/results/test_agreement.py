"""Where measures disagree is what their ranks say; two views of a model are found and tabled."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import spearmanr

from cka_probe.errors import SpecError
from cka_probe.reports.figures.layers import plot_layers
from cka_probe.results.agreement import agreement, layer_table, view_pairs
from cka_probe.results.provenance import Provenance
from cka_probe.results.similarity import Layer, Similarity

VIEWS = {
    "subjects": [
        {"name": "net [identity]", "model": "net"},
        {"name": "net [gray]", "model": "net"},
        {"name": "other", "model": "other"},
    ]
}


def result(measure: str, values: np.ndarray, names: tuple[str, ...] = ("a", "b")) -> Similarity:
    count = len(values) // len(names)
    layers = tuple(Layer(name, f"l{index}") for name in names for index in range(count))
    return Similarity(
        values, np.full_like(values, 0.01), 0 * values, layers, layers, measure, Provenance.from_record(VIEWS)
    )


def random(seed: int, size: int = 10) -> np.ndarray:
    values = np.random.default_rng(seed).uniform(0, 1, (size, size))
    return (values + values.T) / 2


def test_the_rank_correlation_is_spearman_s_and_a_distance_counts_the_other_way() -> None:
    one, other = random(0), random(1)
    results = {"cka": result("cka", one), "rsa": result("rsa", other), "mmd": result("mmd", 3 * (1 - one))}
    found = agreement(results, "a", "b")
    assert found is not None
    assert found.measures == ("cka", "rsa", "mmd")
    expected = spearmanr(one[:5, 5:].ravel(), other[:5, 5:].ravel()).statistic
    np.testing.assert_allclose(found.correlation, [[1, expected, 1], [expected, 1, expected], [1, expected, 1]])


def test_the_pair_whose_rank_differs_most_comes_first() -> None:
    values = random(0)
    moved = values.copy()
    block = moved[:5, 5:]
    row, col = np.unravel_index(block.argmax(), block.shape)
    moved[row, 5 + col] = -1
    found = agreement({"cka": result("cka", values), "rsa": result("rsa", moved)}, "a", "b", shown=2)
    assert found is not None
    first, second = found.disagreements
    assert (first.first, first.second) == (Layer("a", f"l{row}"), Layer("b", f"l{col}"))
    assert (first.near, first.near_rank, first.far, first.far_rank, first.pairs) == ("cka", 1, "rsa", 25, 25)
    assert abs(second.near_rank - second.far_rank) == 1, "the others moved up by one"


def test_cells_without_a_value_are_passed_over_and_few_say_nothing() -> None:
    sparse = np.full((10, 10), np.nan)
    sparse[0, 5:8] = 1, 2, 3
    found = agreement({"cka": result("cka", random(0)), "energy": result("energy", sparse)}, "a", "b")
    assert found is not None
    assert np.isnan(found.correlation[0, 1])
    assert found.disagreements == ()
    assert (
        agreement({"cka": result("cka", random(0)), "mmd": result("mmd", np.full((10, 10), np.nan))}, "a", "b") is None
    )


def test_in_a_model_with_itself_each_pair_of_layers_counts_once() -> None:
    found = agreement({"cka": result("cka", random(0)), "rsa": result("rsa", random(1))}, "a", "a", shown=99)
    assert found is not None
    assert {cell.pairs for cell in found.disagreements} == {10}
    assert all(cell.first.name < cell.second.name for cell in found.disagreements)


def test_two_views_of_a_model_are_found_and_their_layers_tabled() -> None:
    names = ("net [identity]", "net [gray]", "other")
    values = random(0, 6)
    cka, mmd = result("cka", values, names), result("mmd", 1 - values, names)
    assert view_pairs(cka) == [("net [identity]", "net [gray]")]
    table = layer_table({"cka": cka, "mmd": mmd})
    assert table is not None
    assert list(table.columns) == [
        "first", "second", "layer", "depth", "measure", "value", "std_error", "null",
    ]  # fmt: skip
    assert table[["layer", "depth", "measure"]].to_numpy().tolist() == [
        ["l0", 0.5, "cka"], ["l1", 1.0, "cka"], ["l0", 0.5, "mmd"], ["l1", 1.0, "mmd"],
    ]  # fmt: skip
    np.testing.assert_allclose(table.value, [values[0, 2], values[1, 3], 1 - values[0, 2], 1 - values[1, 3]])
    assert layer_table({"cka": result("cka", random(0))}) is None, "a and b are not views of one model"


@pytest.mark.slow
def test_the_figure_has_similarities_above_and_distances_below_over_their_largest() -> None:
    names = ("net [identity]", "net [gray]")
    values = random(0, 8)
    results = {"cka": result("cka", values, names), "mmd": result("mmd", 7 * (1 - values), names)}
    upper, lower = plot_layers(results, *names).axes
    np.testing.assert_allclose(upper.lines[0].get_ydata(), values.diagonal(4))
    drawn = lower.lines[0].get_ydata()
    np.testing.assert_allclose(drawn, (1 - values.diagonal(4)) / (1 - values.diagonal(4)).max())
    assert "MMD" in lower.get_legend().get_texts()[0].get_text()
    assert [label.get_text() for label in lower.get_xticklabels()] == ["l0", "l1", "l2", "l3"]
    assert len(plot_layers(results["cka"], *names).axes) == 1
    block = Similarity(values[:2, :2], values[:2, :2], values[:2, :2], results["cka"].rows[:2], (
        Layer("x", "other"), Layer("x", "names")), "cka")  # fmt: skip
    with pytest.raises(SpecError, match="must be the same model"):
        plot_layers(block, "net [identity]", "x")
