"""A result in a notebook: as HTML, and as axes of matplotlib."""

from __future__ import annotations

import base64
import io
import re
import subprocess
import sys
import warnings

import numpy as np
import pytest
from PIL import Image

from cka_probe.reports.drawing import Figure
from cka_probe.results.similarity import Layer, Similarity


def similarity(layers: tuple[Layer, ...], values: np.ndarray) -> Similarity:
    nothing = np.full(values.shape, np.nan)
    return Similarity(values, nothing, nothing, layers, layers)


def joint(models: str, count: int) -> Similarity:
    layers = tuple(Layer(model, f"l{index}") for model in models for index in range(count))
    features = np.random.default_rng(0).normal(size=(len(layers), 9))
    return similarity(layers, np.atleast_2d(np.corrcoef(features)))


def image_in(html: str) -> Image.Image:
    found = re.search(r'src="data:image/png;base64,([^"]+)"', html)
    assert found
    image = Image.open(io.BytesIO(base64.b64decode(found[1])))
    image.load()
    return image


def test_the_html_is_a_small_picture_with_its_caption() -> None:
    html = joint("ab", 3)._repr_html_()
    width, height = image_in(html).size
    assert max(width, height) <= 600
    assert "linear CKA, debiased" in html
    assert "Similarity(&#x27;cka&#x27;, 6 x 6 layers: a + b x a + b)" in html


@pytest.mark.slow
@pytest.mark.parametrize("gaps", ["some", "all"])
def test_values_that_are_not_there_and_many_layers_are_drawn_without_a_warning(gaps: str) -> None:
    whole = joint("abcd", 100)
    values = np.where(np.arange(400) == 3, np.nan, whole.values) if gaps == "some" else np.full((400, 400), np.nan)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        html = similarity(whole.rows, values)._repr_html_()
    image_in(html)
    assert ("no value" in html) is (gaps == "all")


def test_names_are_escaped_and_a_result_without_layers_has_no_picture() -> None:
    evil = "<script>alert(1)</script>\"'"
    html = similarity((Layer(evil, evil), Layer("b\udcff", "l0")), np.eye(2))._repr_html_()
    assert "<script" not in html
    html.encode()
    assert similarity((), np.empty((0, 0)))._repr_html_().startswith("<p>Similarity(")


def test_plot_draws_a_pair_with_its_layers_and_several_models_with_lines_between_them() -> None:
    result = joint("ab", 3)
    axes = Figure().add_subplot()
    assert result.plot(axes) is axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b"]
    pair = result.between("a", "b").plot(vmin=-1.0, colorbar=False)
    assert [label.get_text() for label in pair.get_yticklabels()] == ["l0", "l1", "l2"]
    assert (pair.get_xlabel(), pair.get_ylabel()) == ("b", "a")
    assert len(pair.figure.axes) == 1, "no colour bar"
    np.testing.assert_array_equal(
        np.asarray(pair.collections[0].get_array()).reshape(3, 3), result.between("a", "b").values
    )


@pytest.mark.slow
def test_a_result_is_made_without_matplotlib_and_plotly() -> None:
    code = "import sys, cka_probe.results.similarity; assert not {'matplotlib', 'plotly'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
