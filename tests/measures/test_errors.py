"""Standard errors and p-values of few examples, and of values that repeat."""

from __future__ import annotations

import logging

import numpy as np
import pytest

import cka_probe as cp
from cka_probe.estimation.estimates import p_values
from cka_probe.measures.catalogue import MEASURES
from cka_probe.results.cautions import cautions


@pytest.mark.parametrize("measure", [name for name in MEASURES if not name.startswith("cka")])
def test_fewer_than_16_examples_have_no_errors(measure: str, caplog: pytest.LogCaptureFixture) -> None:
    x, y = np.random.default_rng(0).normal(size=(2, 15, 3))
    spec = "mutual-knn:3" if measure == "mutual-knn" else measure
    with caplog.at_level(logging.INFO):
        found = cp.compare({"x": x, "y": y}, measures=spec)
    assert np.isfinite(found.between("x", "y").values).all()
    assert np.isnan(found.std_error).all()
    assert "Too few images for standard errors" in caplog.text
    assert any("16 or more give them" in caution for caution in cautions(found))


@pytest.mark.slow
@pytest.mark.parametrize("examples", range(16, 60, 9))
def test_an_error_of_mutual_neighbours_is_not_0_where_the_value_is_uncertain(examples: int) -> None:
    for seed in range(20):
        x, y = np.random.default_rng([examples, seed]).normal(size=(2, examples, 3))
        error = cp.compare({"x": x, "y": y}, measures="mutual-knn:1").between("x", "y").std_error
        assert np.isnan(error).all() or (error > 0).all()


def test_layers_without_common_neighbours_have_no_error_and_equal_ones_that_of_0() -> None:
    pairs = np.repeat(np.eye(20), 2, axis=0)  # each example has one neighbour
    apart = np.concatenate([pairs[1:], pairs[:1]])
    found = cp.compare({"x": pairs, "y": apart, "z": pairs}, measures="mutual-knn:1")
    assert found.between("x", "y").values == 0
    assert np.isnan(found.between("x", "y").std_error)
    assert found.between("x", "z").values == 1
    assert found.between("x", "z").std_error == 0
    assert any("have no standard error" in caution for caution in cautions(found))


@pytest.mark.parametrize("value", [0.3, -0.3, 1e-14])
def test_a_permutation_that_changes_round_off_alone_reaches_the_value(value: float) -> None:
    values = np.array([[1.0, value], [value, 1.0]])
    shuffled = np.stack([values * (1 - 4e-16), values - 1e-16, -np.abs(values) - 0.5])
    each, _ = p_values(values, shuffled, [0, 1])
    assert each[0, 1] == 3 / 4
