"""RBF CKA of two arrays beside the formulas and its invariances."""

from __future__ import annotations

import re
from typing import Any, Literal

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import ortho_group

from cka_probe import compare
from cka_probe.errors import CkaProbeError, FeatureError, SpecError
from cka_probe.estimation.measure import Estimator
from cka_probe.measures.linear_cka import linear_cka
from cka_probe.measures.rbf_cka import RbfCKA, rbf_cka
from tests import oracles

EXACT = 1e-10  # float64; exp adds nothing to the round-off of the distances

Median = Literal["off-diagonal", "with-diagonal"]

both_estimators = pytest.mark.parametrize("debiased", [True, False])
both_medians = pytest.mark.parametrize("median", ["off-diagonal", "with-diagonal"])


def related(n: int = 24, p: int = 5, q: int = 40, seed: int = 0) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, p))
    return x, np.tanh(x @ rng.normal(size=(p, q))) + 0.2 * rng.normal(size=(n, q))


# values


@both_estimators
@both_medians
@pytest.mark.parametrize("threshold", [0.2, 0.4, 0.8, 1.0])
def test_rbf_cka_is_the_ratio_of_hsics(threshold: float, median: Median, debiased: bool) -> None:
    x, y = related()
    k, l = (oracles.rbf_gram(features, threshold=threshold, median=median) for features in (x, y))
    expected = oracles.cka(k, l, debiased=debiased)
    got = rbf_cka(x, y, threshold=threshold, median=median, debiased=debiased)
    assert got == pytest.approx(expected, abs=EXACT)


@settings(derandomize=True, database=None, deadline=None, max_examples=20)
@given(n=st.integers(5, 16), p=st.integers(1, 20), q=st.integers(1, 20), seed=st.integers(0, 2**32 - 1))
def test_rbf_cka_of_any_shape_is_the_ratio_of_hsics(n: int, p: int, q: int, seed: int) -> None:
    x, y = related(n, p, q, seed)
    expected = oracles.cka(oracles.rbf_gram(x), oracles.rbf_gram(y), debiased=True)
    assert rbf_cka(x, y) == pytest.approx(expected, abs=1e-8)  # self terms can be small at n=5


def test_the_two_median_rules_give_different_values() -> None:
    x, y = related()
    assert abs(rbf_cka(x, y) - rbf_cka(x, y, median="with-diagonal")) > 1e-4  # the notebook's σ is about 2% smaller


def test_the_defaults_are_debiased_with_a_threshold_of_one_off_the_diagonal() -> None:
    x, y = related()
    assert rbf_cka(x, y) == rbf_cka(x, y, threshold=1.0, debiased=True, median="off-diagonal")


@both_estimators
def test_rbf_cka_is_symmetric(debiased: bool) -> None:
    x, y = related()
    assert rbf_cka(x, y, debiased=debiased) == pytest.approx(rbf_cka(y, x, debiased=debiased), abs=EXACT)


@both_estimators
@pytest.mark.parametrize("scale", [1e-200, 1e-4, 1.0, 1e4, 1e200])
def test_rbf_cka_with_oneself_is_one_at_any_scale(scale: float, debiased: bool) -> None:
    x = related()[0] * scale
    assert rbf_cka(x, x, debiased=debiased) == pytest.approx(1, abs=EXACT)


@both_estimators
def test_a_wide_kernel_approaches_linear_cka(debiased: bool) -> None:
    x, y = related()
    expected = linear_cka(x, y, debiased=debiased)
    got = rbf_cka(x, y, threshold=1e3, debiased=debiased)
    assert got == pytest.approx(expected, abs=1e-5)  # the next term of exp is of order 1/threshold² = 1e-6


@settings(derandomize=True, database=None, deadline=None, max_examples=20)
@given(n=st.integers(4, 12), d=st.integers(1, 12), seed=st.integers(0, 2**32 - 1))
def test_rbf_cka_lies_between_its_bounds(n: int, d: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(n, d)), rng.normal(size=(n, d))
    assert abs(rbf_cka(x, y)) <= 1 + EXACT
    assert 0 <= rbf_cka(x, y, debiased=False) <= 1 + EXACT


def test_independent_features_have_a_debiased_rbf_cka_of_zero_on_average() -> None:
    rng = np.random.default_rng(0)
    values = [rbf_cka(rng.normal(size=(32, 8)), rng.normal(size=(32, 16))) for _ in range(100)]
    assert abs(np.mean(values)) < 4 * np.std(values) / 10  # four standard errors of the mean


# invariances


@both_estimators
def test_rbf_cka_is_invariant_to_orthogonal_maps(debiased: bool) -> None:
    x, y = related()
    rotated = x @ ortho_group.rvs(5, random_state=0), y @ ortho_group.rvs(40, random_state=1)
    assert rbf_cka(*rotated, debiased=debiased) == pytest.approx(rbf_cka(x, y, debiased=debiased), abs=EXACT)


@both_estimators
def test_rbf_cka_is_invariant_to_translation(debiased: bool) -> None:
    x, y = related()
    rng = np.random.default_rng(1)
    moved = x + 100 * rng.normal(size=5), y - 100 * rng.normal(size=40)
    expected = rbf_cka(x, y, debiased=debiased)
    assert rbf_cka(*moved, debiased=debiased) == pytest.approx(expected, abs=1e-9)  # the offset costs two digits


@both_estimators
@both_medians
@pytest.mark.parametrize("scale", [1e-4, 0.5, 1e4, -3.0])
def test_rbf_cka_is_invariant_to_isotropic_scaling(scale: float, median: Median, debiased: bool) -> None:
    x, y = related()
    expected = rbf_cka(x, y, median=median, debiased=debiased)
    assert rbf_cka(scale * x, y, median=median, debiased=debiased) == pytest.approx(expected, abs=EXACT)


@both_estimators
def test_rbf_cka_is_not_invariant_to_a_general_linear_map(debiased: bool) -> None:
    x, _ = related(60, 8, 1)
    stretched = x * np.geomspace(1, 100, 8)  # invertible
    assert rbf_cka(x, stretched, debiased=debiased) < 0.9


# inputs


def test_tensors_and_arrays_give_the_same_value_and_stay_as_they_are() -> None:
    x, y = related()
    before = x.copy(), y.copy()
    assert rbf_cka(torch.tensor(x), torch.tensor(y, requires_grad=True)) == rbf_cka(x, y)
    np.testing.assert_array_equal(x, before[0])
    np.testing.assert_array_equal(y, before[1])


@pytest.mark.parametrize("threshold", [0.0, -1.0, float("nan"), float("inf"), 1e-300, 1e300, 9e-4, 1.1e6])
def test_a_threshold_that_is_out_of_range_is_refused_by_the_function_and_in_batches(threshold: float) -> None:
    x, y = related()
    said = f"threshold .* must be from 0.001 to 1,000,000, but is {re.escape(str(threshold))}"
    with pytest.raises(FeatureError, match=said):
        rbf_cka(x, y, threshold=threshold)
    with pytest.raises(SpecError, match="threshold of cka-rbf must be a number from 0.001 to 1,000,000"):
        RbfCKA(threshold)


@both_estimators
@pytest.mark.parametrize("threshold", [0.05, 0.2, 1.0, 1.001, 3.0, 100.0, 700.0, 1e4, 1e6])
def test_no_digits_are_lost_however_wide_the_kernel_is(threshold: float, debiased: bool) -> None:
    x, y = related(12, 3, 8)
    expected = float(_with_50_digits(x, y, threshold, debiased))
    estimator: Estimator = "debiased" if debiased else "biased"
    layers = compare({"x": x, "y": y}, measures=RbfCKA(threshold, estimator=estimator), batch_size=12)
    assert rbf_cka(x, y, threshold=threshold, debiased=debiased) == pytest.approx(expected, abs=EXACT)
    assert layers.values[0, 1] == pytest.approx(expected, abs=EXACT)
    if threshold >= 1e4:
        assert expected == pytest.approx(linear_cka(x, y, debiased=debiased), abs=1e-6)


def _with_50_digits(x: NDArray[np.float64], y: NDArray[np.float64], threshold: float, debiased: bool) -> Any:
    """CKA of Gaussian Gram matrices that are centered as they stand in the papers, entry by entry."""
    with mpmath.workdps(50):
        k, l = (_centered(_gaussian_gram(features, threshold), debiased) for features in (x, y))
        cross, own_x, own_y = (
            mpmath.fsum(a * b for a, b in zip(p, q, strict=True)) for p, q in ((k, l), (k, k), (l, l))
        )
        return cross / mpmath.sqrt(own_x * own_y)


def _gaussian_gram(features: NDArray[np.float64], threshold: float) -> Any:
    n = len(features)
    rows = [[mpmath.mpf(value) for value in row] for row in features.tolist()]
    squares = [[mpmath.fsum((a - b) ** 2 for a, b in zip(p, q, strict=True)) for q in rows] for p in rows]
    ordered = sorted(mpmath.sqrt(squares[i][j]) for i in range(n) for j in range(i))
    middle = (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2
    return [[mpmath.exp(-square / (2 * (threshold * middle) ** 2)) for square in row] for row in squares]


def _centered(gram: Any, debiased: bool) -> list[Any]:
    n = len(gram)
    if debiased:
        gram = [[0 if i == j else gram[i][j] for j in range(n)] for i in range(n)]
    by_row, by_all = (n - 2, (n - 1) * (n - 2)) if debiased else (n, n * n)
    rows = [mpmath.fsum(row) / by_row for row in gram]
    mean = mpmath.fsum(value for row in gram for value in row) / by_all
    return [
        mpmath.mpf(0) if debiased and i == j else gram[i][j] - rows[i] - rows[j] + mean
        for i in range(n)
        for j in range(n)
    ]


def test_an_unknown_median_rule_is_refused() -> None:
    x, y = related()
    unknown: Any = "of-diagonal"
    with pytest.raises(CkaProbeError, match=r"median"):
        rbf_cka(x, y, median=unknown)


@both_medians
def test_a_median_distance_of_zero_is_refused(median: Median) -> None:
    x, y = related()
    y[:20] = y[0]
    with pytest.raises(FeatureError, match=r"median distance, which is 0 for y"):
        rbf_cka(x, y, median=median)


@pytest.mark.parametrize("value", [0.0, 0.1, 1e10])
@pytest.mark.parametrize("d", [5, 150])
def test_constant_features_are_refused(d: int, value: float) -> None:
    _, y = related(99)
    constant = value * np.random.default_rng(0).normal(size=d) * np.ones((99, 1))  # their mean is not exactly a row
    with pytest.raises(FeatureError, match=r"0 for x"):
        rbf_cka(constant, y)


def test_features_that_are_not_a_matrix_are_refused() -> None:
    with pytest.raises(FeatureError, match=r"x must have the shape \(examples, features\)"):
        rbf_cka(np.ones((20, 3, 3)), np.ones((20, 3)))


def test_different_numbers_of_examples_are_refused() -> None:
    with pytest.raises(FeatureError, match=r"20 rows and y 19"):
        rbf_cka(np.ones((20, 3)), np.ones((19, 3)))


def test_fewer_than_four_examples_are_refused() -> None:
    with pytest.raises(FeatureError, match=r"at least 4 examples, but x has 3"):
        rbf_cka(np.ones((3, 3)), np.ones((3, 3)))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_features_that_are_not_finite_are_refused(bad: float) -> None:
    x, y = related()
    x[3, 2] = bad
    with pytest.raises(FeatureError, match=r"x must be finite"):
        rbf_cka(x, y)


def test_debiased_cka_of_examples_all_equally_far_apart_is_refused() -> None:
    """Off the diagonal its Gram matrix is constant, so its unbiased HSIC is 0: a value would be round-off over 0."""
    with pytest.raises(FeatureError, match=r"x"):
        rbf_cka(np.eye(24), related()[1])
