"""Linear CKA of two arrays beside the formulas, rsatoolbox and its invariances."""

from __future__ import annotations

from math import sqrt
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from rsatoolbox.data import Dataset
from rsatoolbox.rdm import calc_rdm, compare
from scipy.stats import ortho_group

from cka_probe.errors import FeatureError
from cka_probe.measures.linear_cka import linear_cka
from tests import oracles

EXACT = 1e-10  # float64, through products of products of a few hundred terms

both_estimators = pytest.mark.parametrize("debiased", [True, False])
tall_and_wide = pytest.mark.parametrize(("n", "p", "q"), [(40, 5, 8), (20, 60, 90), (30, 6, 70), (4, 3, 9)])


def related(n: int, p: int, q: int, seed: int = 0) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, p))
    return x, x @ rng.normal(size=(p, q)) / sqrt(p) + 0.5 * rng.normal(size=(n, q))


# values


@pytest.mark.parametrize(("debiased", "expected"), [(False, 0.5576132566), (True, 0.5134564895)])
def test_the_published_notebooks_example_gives_its_values(debiased: bool, expected: float) -> None:
    rng = np.random.RandomState(1337)
    x = rng.randn(100, 10)
    y = rng.randn(100, 10) + x
    assert linear_cka(x, y, debiased=debiased) == pytest.approx(expected, abs=1e-10)  # printed with 10 digits


@both_estimators
@tall_and_wide
def test_linear_cka_is_the_ratio_of_hsics(n: int, p: int, q: int, debiased: bool) -> None:
    x, y = related(n, p, q)
    expected = oracles.cka(oracles.linear_gram(x), oracles.linear_gram(y), debiased=debiased)
    assert linear_cka(x, y, debiased=debiased) == pytest.approx(expected, abs=EXACT)


@settings(derandomize=True, database=None, deadline=None, max_examples=40)
@given(
    n=st.integers(5, 40),
    p=st.integers(1, 50),
    q=st.integers(1, 50),
    seed=st.integers(0, 2**32 - 1),
    biased=st.booleans(),
)
def test_linear_cka_of_any_shape_is_the_ratio_of_hsics(n: int, p: int, q: int, seed: int, biased: bool) -> None:
    x, y = related(n, p, q, seed)
    expected = oracles.cka(oracles.linear_gram(x), oracles.linear_gram(y), debiased=not biased)
    assert linear_cka(x, y, debiased=not biased) == pytest.approx(expected, abs=1e-8)  # self terms can be small at n=5


@tall_and_wide
def test_biased_linear_cka_is_the_cosine_of_centered_distance_matrices(n: int, p: int, q: int) -> None:
    """Williams (2024): rsatoolbox's cosine_cov of squared Euclidean RDMs."""
    x, y = related(n, p, q)
    first, second = (calc_rdm(Dataset(features), method="euclidean") for features in (x, y))
    expected = compare(first, second, method="cosine_cov").item()
    assert linear_cka(x, y, debiased=False) == pytest.approx(expected, abs=1e-8)  # it solves a linear system


@both_estimators
@pytest.mark.parametrize(("n", "p", "q"), [(40, 5, 8), (100, 30, 99), (5, 4, 1)])
def test_the_feature_space_form_equals_the_gram_form(n: int, p: int, q: int, debiased: bool) -> None:
    x, y = related(n, p, q)
    wide = np.pad(x, ((0, 0), (0, n))), np.pad(y, ((0, 0), (0, n)))  # zeros change no inner product
    expected = linear_cka(*wide, debiased=debiased)
    assert linear_cka(x, y, debiased=debiased) == pytest.approx(expected, abs=EXACT)


@both_estimators
def test_linear_cka_is_symmetric(debiased: bool) -> None:
    x, y = related(50, 7, 80)
    assert linear_cka(x, y, debiased=debiased) == pytest.approx(linear_cka(y, x, debiased=debiased), abs=EXACT)


@both_estimators
@pytest.mark.parametrize("scale", [1e-4, 1e-2, 1.0, 1e2, 1e4])
@pytest.mark.parametrize(("n", "d"), [(60, 10), (20, 100)])
def test_linear_cka_with_oneself_is_one_at_any_scale(n: int, d: int, scale: float, debiased: bool) -> None:
    x = related(n, d, 1)[0] * scale
    assert linear_cka(x, x, debiased=debiased) == pytest.approx(1, abs=EXACT)


@both_estimators
@pytest.mark.parametrize("scale", [1e-200, 1e-25, 1e20, 1e200])
@pytest.mark.parametrize("d", [10, 100])
def test_linear_cka_survives_scales_whose_squares_overflow(d: int, scale: float, debiased: bool) -> None:
    x, y = related(30, d, d)
    expected = linear_cka(x, y, debiased=debiased)
    assert linear_cka(x * scale, y / scale, debiased=debiased) == pytest.approx(expected, abs=EXACT)


@settings(derandomize=True, database=None, deadline=None, max_examples=30)
@given(n=st.integers(4, 12), d=st.integers(1, 12), seed=st.integers(0, 2**32 - 1))
def test_linear_cka_lies_between_its_bounds(n: int, d: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(n, d)), rng.normal(size=(n, d))
    assert abs(linear_cka(x, y)) <= 1 + EXACT
    assert 0 <= linear_cka(x, y, debiased=False) <= 1 + EXACT


# invariances


@both_estimators
@tall_and_wide
def test_linear_cka_is_invariant_to_orthogonal_maps(n: int, p: int, q: int, debiased: bool) -> None:
    x, y = related(n, p, q)
    rotated = x @ ortho_group.rvs(p, random_state=0), y @ ortho_group.rvs(q, random_state=1)
    assert linear_cka(*rotated, debiased=debiased) == pytest.approx(linear_cka(x, y, debiased=debiased), abs=EXACT)


@both_estimators
@tall_and_wide
def test_linear_cka_is_invariant_to_translation(n: int, p: int, q: int, debiased: bool) -> None:
    x, y = related(n, p, q)
    rng = np.random.default_rng(1)
    moved = x + 100 * rng.normal(size=p), y - 100 * rng.normal(size=q)
    expected = linear_cka(x, y, debiased=debiased)
    assert linear_cka(*moved, debiased=debiased) == pytest.approx(expected, abs=1e-9)  # the offset costs two digits


@both_estimators
@tall_and_wide
@pytest.mark.parametrize("scale", [1e-4, 0.5, 1e4, -3.0])
def test_linear_cka_is_invariant_to_isotropic_scaling(n: int, p: int, q: int, scale: float, debiased: bool) -> None:
    x, y = related(n, p, q)
    expected = linear_cka(x, y, debiased=debiased)
    assert linear_cka(scale * x, y, debiased=debiased) == pytest.approx(expected, abs=EXACT)


@both_estimators
@pytest.mark.parametrize(("n", "d"), [(100, 8), (40, 60)])
def test_linear_cka_is_not_invariant_to_a_general_linear_map(n: int, d: int, debiased: bool) -> None:
    x, _ = related(n, d, 1)
    stretched = x * np.geomspace(1, 100, d)  # invertible
    assert linear_cka(x, stretched, debiased=debiased) < 0.9


@both_estimators
@pytest.mark.parametrize("d", [5, 60])
def test_linear_cka_does_not_see_the_order_of_examples(d: int, debiased: bool) -> None:
    x, y = related(30, d, d)
    order = np.random.default_rng(2).permutation(30)
    expected = linear_cka(x, y, debiased=debiased)
    assert linear_cka(x[order], y[order], debiased=debiased) == pytest.approx(expected, abs=EXACT)


# bias


def test_independent_features_have_a_debiased_cka_of_zero_on_average() -> None:
    rng = np.random.default_rng(0)
    values = [linear_cka(rng.normal(size=(32, 64)), rng.normal(size=(32, 128))) for _ in range(100)]
    assert abs(np.mean(values)) < 4 * np.std(values) / sqrt(100)  # four standard errors of the mean


@pytest.mark.parametrize(("n", "p", "q"), [(64, 256, 512), (64, 16, 32), (128, 2048, 4096)])
def test_independent_gaussians_have_a_biased_cka_near_its_closed_form(n: int, p: int, q: int) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(n, p)), rng.normal(size=(n, q))
    expected = 1 / sqrt((1 + (n - 1) / p) * (1 + (n - 1) / q))
    assert linear_cka(x, y, debiased=False) == pytest.approx(expected, abs=0.03)  # noise is of order 1/n


# inputs


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(lambda x: x.tolist(), id="lists"),
        pytest.param(torch.tensor, id="tensor"),
        pytest.param(lambda x: torch.tensor(x, requires_grad=True), id="tensor with a gradient"),
        pytest.param(np.asfortranarray, id="columns first"),
        pytest.param(lambda x: np.flip(np.flip(x, 0).copy(), 0), id="reversed view"),
        pytest.param(lambda x: x.astype(">f8"), id="big-endian"),
        pytest.param(pd.DataFrame, id="data frame"),
    ],
)
def test_any_kind_of_array_gives_the_same_value(kind: Any) -> None:
    x, y = related(20, 4, 6)
    assert linear_cka(kind(x), kind(y)) == pytest.approx(linear_cka(x, y), abs=EXACT)


@pytest.mark.parametrize("dtype", [np.int64, np.int8, np.uint8, np.bool_, np.float16, np.float32])
def test_every_real_dtype_is_computed_in_float64(dtype: Any) -> None:
    x, y = ((10 * features).astype(np.int8).astype(dtype) for features in related(20, 4, 30))
    expected = linear_cka(x.astype(np.float64), y.astype(np.float64))
    assert linear_cka(x, y) == pytest.approx(expected, abs=EXACT)


def test_half_precision_tensors_are_computed_in_float64() -> None:
    x, y = (torch.tensor(features).bfloat16() for features in related(20, 4, 30))
    assert linear_cka(x, y) == pytest.approx(linear_cka(x.double(), y.double()), abs=EXACT)


@pytest.mark.parametrize("d", [4, 30])
def test_linear_cka_leaves_its_arguments_alone(d: int) -> None:
    x, y = related(20, d, d)
    before = x.copy(), y.copy()
    linear_cka(x, y)
    np.testing.assert_array_equal(x, before[0])
    np.testing.assert_array_equal(y, before[1])


@pytest.mark.filterwarnings("error")
def test_a_read_only_array_is_taken_without_a_warning() -> None:
    x, y = related(20, 4, 6)
    expected = linear_cka(x, y)
    x.setflags(write=False)
    assert linear_cka(x, y) == expected


@pytest.mark.parametrize("shape", [(20,), (20, 3, 3), ()])
def test_features_that_are_not_a_matrix_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(FeatureError, match=r"x must have the shape \(examples, features\).*reshape"):
        linear_cka(np.ones(shape), np.ones((20, 3)))
    with pytest.raises(FeatureError, match=r"y must have the shape \(examples, features\).*reshape"):
        linear_cka(np.ones((20, 3)), np.ones(shape))


def test_different_numbers_of_examples_are_refused() -> None:
    with pytest.raises(FeatureError, match=r"same examples.*20 rows and y 19"):
        linear_cka(np.ones((20, 3)), np.ones((19, 3)))


@pytest.mark.parametrize("n", [0, 1, 3])
def test_fewer_than_four_examples_are_refused(n: int) -> None:
    with pytest.raises(FeatureError, match=rf"at least 4 examples, but x has {n}"):
        linear_cka(np.ones((n, 3)), np.ones((n, 3)))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_features_that_are_not_finite_are_refused(bad: float) -> None:
    x, y = related(20, 4, 6)
    y[3, 2] = bad
    with pytest.raises(FeatureError, match=r"y must be finite"):
        linear_cka(x, y)


@both_estimators
@pytest.mark.parametrize("value", [0.0, 0.1, 1e10])
@pytest.mark.parametrize("d", [5, 150])
def test_constant_features_are_refused(d: int, value: float, debiased: bool) -> None:
    x, y = related(99, 4, 6)
    constant = value * np.random.default_rng(0).normal(size=d) * np.ones((99, 1))  # their mean is not exactly a row
    with pytest.raises(FeatureError, match=r"x must differ between examples"):
        linear_cka(constant, y, debiased=debiased)
    with pytest.raises(FeatureError, match=r"y must differ between examples"):
        linear_cka(x, constant, debiased=debiased)


def test_features_without_a_column_are_refused() -> None:
    with pytest.raises(FeatureError, match=r"x"):
        linear_cka(np.ones((20, 0)), np.ones((20, 3)))


@pytest.mark.parametrize("d", [3, 50])
def test_debiased_cka_of_one_example_apart_from_equal_ones_is_refused(d: int) -> None:
    """Off the diagonal its Gram matrix is aᵢ + aⱼ, so its unbiased HSIC is 0: a value would be round-off over 0."""
    rng = np.random.default_rng(0)
    x = np.zeros((30, d))
    x[7] = rng.normal(size=d)
    with pytest.raises(FeatureError, match=r"x"):
        linear_cka(x, rng.normal(size=(30, 3)))


def test_debiased_cka_of_examples_all_equally_far_apart_is_refused() -> None:
    """Off the diagonal its Gram matrix is constant, so its unbiased HSIC is 0: a value would be round-off over 0."""
    with pytest.raises(FeatureError, match=r"x"):
        linear_cka(np.eye(10), np.random.default_rng(0).normal(size=(10, 3)))
