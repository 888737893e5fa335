"""Grams, bandwidths and centering beside naive float64 references and SciPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cdist, pdist, squareform
from torch import Tensor

from cka_probe.estimation.kernels import (
    _TENSOR_CORE_WIDTH,
    MedianRule,
    _tensor_cores,
    center,
    double_center,
    linear_gram,
    rbf_gram,
    squared_bandwidth,
    squared_distances,
    u_center,
    uncentered_product,
)
from tests import oracles

EXACT = 1e-12  # float64 sums of at most a few thousand terms
FLOAT32 = 1e-6  # numerics.md: float32 products of centered features stay below it

seeded = settings(derandomize=True, database=None, deadline=None, max_examples=25)
examples = st.integers(4, 24)
widths = st.integers(1, 40)
seeds = st.integers(0, 2**32 - 1)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def symmetric(n: int, seed: int) -> Tensor:
    matrix = normal(n, n, seed=seed)
    return matrix + matrix.T


def relative_error(got: Tensor, expected: Tensor | np.ndarray) -> float:
    reference = torch.as_tensor(expected)
    return float((got - reference).norm() / reference.norm())


# linear_gram


@pytest.mark.parametrize(("n", "d"), [(4, 1), (7, 3), (50, 200), (200, 5)])
def test_linear_gram_is_the_gram_of_centered_features(n: int, d: int) -> None:
    x = normal(n, d)
    expected = oracles.double_centered(oracles.linear_gram(x))
    assert relative_error(linear_gram(x), expected) < EXACT


def test_linear_gram_is_the_same_whether_features_fit_one_block_or_need_many() -> None:
    x = normal(64, 20_000)  # 3 blocks of float32 columns, 5 of float64
    expected = oracles.double_centered(oracles.linear_gram(x))
    assert relative_error(linear_gram(x), expected) < EXACT
    assert relative_error(linear_gram(x.float()), expected) < FLOAT32


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_linear_gram_is_a_symmetric_matrix_in_float32_or_that_of_float64(dtype: torch.dtype) -> None:
    gram = linear_gram(normal(9, 30, dtype=dtype))
    assert gram.shape == (9, 9)
    assert gram.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(gram, gram.T, rtol=0, atol=1e-5)  # a BLAS may add the float32 halves in other orders


def test_linear_gram_leaves_its_argument_alone() -> None:
    x = normal(8, 5) + 3
    before = x.clone()
    linear_gram(x)
    assert torch.equal(x, before)


def test_linear_gram_takes_columns_that_are_not_contiguous() -> None:
    x = normal(30, 8).T
    assert relative_error(linear_gram(x), linear_gram(x.contiguous())) < EXACT


@pytest.mark.parametrize("offset", [0, 1, 10, 100, 1e3, 1e4, 1e5])
def test_float32_features_far_from_zero_lose_no_precision(offset: float) -> None:
    x = (normal(64, 300) + offset).float()
    y = (normal(64, 300) + 0.5 * normal(64, 300, seed=1) - offset).float()
    exact_x, exact_y = (oracles.linear_gram(features.double()) for features in (x, y))
    got_x, got_y = (u_center(linear_gram(features)) for features in (x, y))
    assert relative_error(got_x, oracles.u_centered(exact_x)) < FLOAT32
    got = (got_x * got_y).sum().item()
    assert got == pytest.approx(oracles.inner_product(exact_x, exact_y, debiased=True), rel=FLOAT32)


def test_float32_features_of_mixed_offsets_lose_no_precision() -> None:
    offsets = torch.tensor([0.0, 1.0, -30.0, 1e3, -1e4, 1e5]).repeat(20)
    x = (normal(64, 120) + offsets).float()
    expected = oracles.u_centered(oracles.linear_gram(x.double()))
    assert relative_error(u_center(linear_gram(x)), expected) < FLOAT32


@pytest.mark.parametrize("scale", [1e-30, 1e-25, 1e-10, 1.0, 1e10, 1e20, 1e37])
def test_float32_features_of_any_scale_keep_their_gram(scale: float) -> None:
    x = (normal(16, 100) * scale).float()
    expected = oracles.double_centered(oracles.linear_gram(x.double() / scale))
    assert relative_error(linear_gram(x) / scale**2, expected) < FLOAT32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_features_are_multiplied_in_float32(dtype: torch.dtype) -> None:
    x = (normal(32, 1000) * 100).to(dtype)  # squared norms of 1e7, beyond float16
    expected = oracles.double_centered(oracles.linear_gram(x.double()))
    assert relative_error(linear_gram(x), expected) < FLOAT32


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, -1 / 3, 12345.678])
@pytest.mark.parametrize("n", [4, 7, 100])
def test_constant_features_have_a_gram_of_exact_zeros(dtype: torch.dtype, value: float, n: int) -> None:
    assert (linear_gram(torch.full((n, 50), value, dtype=dtype)) == 0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e10])
def test_equal_rows_have_a_gram_of_exact_zeros(dtype: torch.dtype, scale: float) -> None:
    row = normal(1, 700, dtype=dtype) * scale
    assert (linear_gram(row.repeat(99, 1)) == 0).all()


def test_rows_that_differ_by_round_off_have_a_gram_of_exact_zeros() -> None:
    flips = (normal(32, 100) > 0).float()
    assert (linear_gram(1 + flips * torch.finfo(torch.float32).eps) == 0).all()


def test_a_small_but_real_spread_is_kept() -> None:
    noise = normal(32, 100)
    x = 1 + 1e-5 * noise.float()  # a hundred times the round-off of float32
    expected = oracles.double_centered(oracles.linear_gram(x.double()))
    assert relative_error(linear_gram(x), expected) < FLOAT32
    x = 1 + 1e-10 * noise  # their mean is rounded at 1e-6 of the spread: a shift that U-centering removes
    expected = oracles.u_centered(oracles.linear_gram(x))
    assert relative_error(u_center(linear_gram(x)), expected) < EXACT


def test_a_spread_is_kept_beside_a_huge_feature_that_is_constant() -> None:
    spread = normal(64, 10, dtype=torch.float32)
    x = torch.cat([torch.full((64, 1), 1e8), spread], 1)
    assert relative_error(linear_gram(x), linear_gram(spread)) < FLOAT32


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_features_that_are_not_finite_give_a_gram_that_is_not_finite(bad: float) -> None:
    x = normal(8, 600, dtype=torch.float32)
    x[3, 599] = bad
    assert not torch.isfinite(linear_gram(x)).all()


# squared_distances


def test_squared_distances_are_those_of_scipy() -> None:
    x = normal(40, 12) + 5
    assert relative_error(squared_distances(linear_gram(x)), squareform(pdist(x, "sqeuclidean"))) < EXACT


def test_squared_distances_are_never_negative_and_zero_to_oneself() -> None:
    x = normal(20, 50)
    near = torch.cat([x, x + 1e-6 * normal(20, 50, seed=1)]).float()
    distances = squared_distances(linear_gram(near))  # d² of 1e-11 out of float32 products of 1e2
    assert (distances >= 0).all()
    assert (distances.diagonal() == 0).all()


def test_squared_distances_of_a_stack_are_those_of_its_matrices() -> None:
    grams = torch.stack([linear_gram(normal(9, 4, seed=seed)) for seed in range(3)])
    before = grams.clone()
    assert torch.equal(squared_distances(grams), torch.stack([squared_distances(gram) for gram in grams]))
    assert torch.equal(grams, before)


# squared_bandwidth


@pytest.mark.parametrize("median", ["off-diagonal", "with-diagonal"])
@pytest.mark.parametrize("threshold", [0.2, 1.0, 3.0])
@pytest.mark.parametrize("n", [4, 5, 6, 7, 30])  # pairs and matrix entries of both parities
def test_squared_bandwidth_follows_the_median_rule(n: int, threshold: float, median: MedianRule) -> None:
    x = normal(n, 6, seed=n)
    distances = torch.as_tensor(squareform(pdist(x, "sqeuclidean")))
    expected = oracles.squared_bandwidth(x, threshold=threshold, median=median)
    assert squared_bandwidth(distances, threshold=threshold, median=median) == pytest.approx(expected, rel=EXACT)


def test_the_zeros_of_the_diagonal_make_the_bandwidth_a_little_smaller() -> None:
    distances = squared_distances(linear_gram(normal(50, 10)))
    with_zeros = squared_bandwidth(distances, median="with-diagonal")
    assert 0.9 < with_zeros / squared_bandwidth(distances) < 1  # 2% of the entries are zeros


@pytest.mark.parametrize("median", ["off-diagonal", "with-diagonal"])
def test_squared_bandwidth_is_zero_where_most_examples_coincide(median: MedianRule) -> None:
    x = torch.zeros(20, 3, dtype=torch.float64)
    x[:3] = normal(3, 3)
    assert squared_bandwidth(squared_distances(linear_gram(x)), median=median) == 0


# rbf_gram


def test_rbf_gram_is_the_gaussian_of_scipys_distances() -> None:
    x = normal(20, 5)
    expected = np.exp(-(cdist(x, x) ** 2) / (2 * 1.7))
    assert relative_error(rbf_gram(squared_distances(linear_gram(x)), 1.7), expected) < EXACT


def test_rbf_gram_of_a_stack_takes_a_bandwidth_each() -> None:
    distances = torch.stack([squared_distances(linear_gram(normal(6, 4, seed=seed))) for seed in range(2)])
    stacked = rbf_gram(distances, torch.tensor([0.5, 2.0], dtype=torch.float64)[:, None, None])
    for gram, own, bandwidth in zip(stacked, distances, (0.5, 2.0), strict=True):
        assert relative_error(gram, rbf_gram(own, bandwidth)) < EXACT


# u_center


@seeded
@given(n=examples, seed=seeds)
def test_u_centered_rows_sum_to_zero(n: int, seed: int) -> None:
    centered = u_center(symmetric(n, seed))
    assert centered.sum(-1).abs().max() < EXACT * n  # entries of order 1
    assert centered.sum(-2).abs().max() < EXACT * n  # entries of order 1


@seeded
@given(n=examples, seed=seeds)
def test_u_centered_entries_are_those_of_the_definition(n: int, seed: int) -> None:
    gram = symmetric(n, seed)
    expected = torch.as_tensor(oracles.u_centered(gram))
    torch.testing.assert_close(u_center(gram), expected, rtol=0, atol=EXACT * n)  # entries of order 1
    assert (u_center(gram).diagonal() == 0).all()


@seeded
@given(n=examples, d=widths, seed=seeds)
def test_u_centered_inner_product_is_the_unbiased_hsic(n: int, d: int, seed: int) -> None:
    x, y = normal(n, d, seed=seed), normal(n, d + 1, seed=seed ^ 1)
    k, l = x @ x.T, y @ y.T
    hsic = (u_center(k) * u_center(l)).sum().item() / (n * (n - 3))
    size = k.norm().item() * l.norm().item()  # what the three terms of Song's formula cancel from
    assert hsic == pytest.approx(oracles.unbiased_hsic(k, l), abs=EXACT * size)


@seeded
@given(n=examples, d=widths, seed=seeds)
def test_unbiased_hsic_with_oneself_is_never_negative(n: int, d: int, seed: int) -> None:
    centered = u_center(linear_gram(normal(n, d, seed=seed)))
    assert (centered * centered).sum() >= 0


@seeded
@given(n=examples, seed=seeds)
def test_u_centering_removes_a_shift_of_rows_and_columns(n: int, seed: int) -> None:
    gram, shift = symmetric(n, seed), normal(n, seed=seed ^ 1)
    moved = u_center(gram + shift[:, None] + shift[None, :])
    torch.testing.assert_close(moved, u_center(gram), rtol=0, atol=EXACT * n)  # entries of order 1


def test_u_centering_twice_is_u_centering_once() -> None:
    once = u_center(symmetric(12, 0))
    torch.testing.assert_close(u_center(once), once, rtol=0, atol=EXACT)


def test_u_centering_does_not_see_the_diagonal() -> None:
    gram = symmetric(8, 0)
    assert torch.equal(u_center(gram + torch.diag(normal(8, seed=1))), u_center(gram))


# double_center and center


@seeded
@given(n=examples, seed=seeds)
def test_double_centering_is_multiplication_by_the_centering_matrix(n: int, seed: int) -> None:
    gram = symmetric(n, seed)
    expected = torch.as_tensor(oracles.double_centered(gram))
    torch.testing.assert_close(double_center(gram), expected, rtol=0, atol=EXACT * n)  # entries of order 1


@seeded
@given(n=examples, d=widths, seed=seeds)
def test_double_centered_inner_product_is_the_biased_hsic(n: int, d: int, seed: int) -> None:
    x, y = normal(n, d, seed=seed), normal(n, d + 1, seed=seed ^ 1)
    k, l = x @ x.T, y @ y.T
    hsic = (double_center(k) * double_center(l)).sum().item() / (n - 1) ** 2
    size = k.norm().item() * l.norm().item()  # what centering cancels from
    assert hsic == pytest.approx(oracles.biased_hsic(k, l), abs=EXACT * size)


@pytest.mark.parametrize("debiased", [True, False])
def test_center_is_the_one_or_the_other(debiased: bool) -> None:
    gram = symmetric(6, 0)
    assert torch.equal(center(gram, debiased=debiased), u_center(gram) if debiased else double_center(gram))


@pytest.mark.parametrize("debiased", [True, False])
def test_centering_a_stack_centers_each_matrix_and_leaves_its_argument_alone(debiased: bool) -> None:
    grams = torch.stack([symmetric(7, seed) for seed in range(4)]).view(2, 2, 7, 7)
    before = grams.clone()
    centered = center(grams, debiased=debiased)
    assert torch.equal(grams, before)
    for got, gram in zip(centered.flatten(0, 1), grams.flatten(0, 1), strict=True):
        torch.testing.assert_close(got, center(gram, debiased=debiased), rtol=0, atol=EXACT)


@pytest.mark.slow
@pytest.mark.parametrize("n", [4, 5, 33, 64, 66, 96, 128, 130, 256])
@pytest.mark.parametrize("width", [1, 40_000])
def test_the_product_by_halves_is_the_whole_product(n: int, width: int) -> None:
    x = torch.randn(n, width)
    exact = (x.double() - x.double().mean(0)) @ (x.double() - x.double().mean(0)).T
    uncentered = uncentered_product(x)
    assert uncentered.is_precise() or n < 32
    for gram in (linear_gram(x), uncentered.gram if uncentered.is_precise() else linear_gram(x)):
        assert torch.equal(gram, gram.T) or n % 64, "mirrored, or one product"
        for centering in (u_center, double_center):
            error = (centering(gram.double()) - centering(exact)).norm() / exact.norm()
            assert error < 1e-6  # float32 sums of 40,000 terms


@pytest.mark.parametrize("offset", [0.0, 0.5, 2.0, 100.0, 1000.0])
def test_an_uncentered_product_is_given_only_where_cka_keeps_its_digits(offset: float) -> None:
    x, y = torch.randn(64, 30) @ torch.randn(30, 5000) + offset, torch.randn(64, 30)
    product = uncentered_product(x)
    assert product.is_precise() == (offset < 100)
    if product.is_precise():
        k, truth, l = (
            u_center(m) for m in (product.gram.double(), x.double() @ x.double().T, y.double() @ y.double().T)
        )
        cka, exact = (((m * l).sum() / (m.norm() * l.norm())).item() for m in (k, truth))
        assert abs(cka - exact) < 1e-7


@pytest.mark.parametrize(
    "x", [torch.ones(8, 5), torch.full((8, 5), 1e-25).mul(torch.randn(8, 5)), torch.full((8, 5), torch.nan)]
)
def test_features_without_a_spread_in_float32_need_centering(x: Tensor) -> None:
    assert not uncentered_product(x).is_precise()


def test_tf32_is_allowed_within_the_block_alone() -> None:
    settings = torch.backends.cuda.matmul
    for allowed in (False, True):
        settings.allow_tf32 = allowed
        with _tensor_cores():
            assert settings.allow_tf32
        assert settings.allow_tf32 == allowed
    settings.allow_tf32 = False


@pytest.mark.parametrize("offset", [0.0, 2.0])
def test_features_rounded_to_tf32_give_cka_within_a_hundred_thousandth(offset: float) -> None:
    """What a GPU does with features as wide as these, imitated: their last 13 bits are cut off."""
    common = torch.randn(64, 5)
    x, y = (common @ torch.randn(5, _TENSOR_CORE_WIDTH) + torch.randn(64, _TENSOR_CORE_WIDTH) + offset for _ in "xy")
    cut = [(features.view(torch.int32) & ~0x1FFF).view(torch.float32) for features in (x, y)]
    products = [uncentered_product(features) for features in cut]
    assert all(product.is_precise() for product in products)
    k, l = (u_center(product.gram.double()) for product in products)
    exact = oracles.cka(oracles.linear_gram(x.double()), oracles.linear_gram(y.double()), debiased=True)
    assert abs(((k * l).sum() / (k.norm() * l.norm())).item() - exact) < 1e-5
