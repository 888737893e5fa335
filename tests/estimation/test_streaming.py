"""CKA over minibatches: the ratio of sums, its standard error and the shuffled control."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import sqrt
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cka_probe.errors import FeatureError
from cka_probe.estimation.gram import Features
from cka_probe.estimation.kernels import center, linear_gram
from cka_probe.estimation.streaming import Estimates, HsicSums
from cka_probe.measures.linear_cka import linear_cka
from cka_probe.measures.rbf_cka import rbf_cka
from cka_probe.results.similarity import Layer, Similarity
from tests import oracles
from tests.measures_at_work import start

EXACT = 1e-10  # float64 features: the round-off of products of products of a few hundred terms
FLOAT32 = 1e-6  # numerics.md: float32 Grams of centered features stay below it

Batch = Sequence[Tensor]

both_estimators = pytest.mark.parametrize("debiased", [True, False])
both_measures = pytest.mark.parametrize("measure", ["cka", "cka-rbf"])


def stream(batches: Iterable[Batch], measure: str = "cka", *, debiased: bool = True, seed: int = 0) -> Estimates:
    running = None
    spec = measure if debiased else f"{measure}:biased"
    first = 0
    for batch in batches:
        if running is None:
            running = start(spec, [f"layer {index}" for index in range(len(batch))], seed=seed)
        for index, x in enumerate(batch):
            running.prepare(index, Features(x))
        running.update(first)
        first += len(batch[0])
    assert running is not None
    return running.compute()


def draw(examples: int, widths: Sequence[int] = (3, 20, 150), seed: int = 0) -> list[Tensor]:
    """Layers that share four directions, each with noise of its own."""
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    shared = normal(examples, 4)
    return [shared @ normal(4, width) + normal(examples, width) + normal(width) for width in widths]


def cut(layers: Sequence[Tensor], sizes: Sequence[int]) -> list[list[Tensor]]:
    assert sum(sizes) == len(layers[0])
    return [list(batch) for batch in zip(*(layer.split(list(sizes)) for layer in layers), strict=True)]


def naive_grams(batches: Sequence[Batch], measure: str, **options: Any) -> list[list[oracles.Matrix]]:
    """For each layer the Gram matrices of its batches; the bandwidth of the RBF kernel is that of the first."""
    by_layer = []
    for layer in zip(*batches, strict=True):
        if measure == "cka":
            by_layer.append([oracles.linear_gram(x) for x in layer])
        else:
            sigma_squared = oracles.squared_bandwidth(layer[0], **options)
            by_layer.append([oracles.rbf_gram(x, sigma_squared=sigma_squared) for x in layer])
    return by_layer


def close(got: Tensor, expected: Tensor | Sequence[Sequence[float]], tolerance: float) -> None:
    reference = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(got, reference, rtol=0, atol=tolerance)


# values


@both_measures
@both_estimators
@pytest.mark.parametrize("sizes", [(12,), (12, 12, 12), (16, 16, 5), (4, 9, 20, 7)])
def test_streaming_is_the_ratio_of_sums_over_the_batches(sizes: Sequence[int], debiased: bool, measure: str) -> None:
    batches = cut(draw(sum(sizes)), sizes)
    grams = naive_grams(batches, measure)
    expected = [[oracles.minibatch_cka(k, l, debiased=debiased) for l in grams] for k in grams]
    close(stream(batches, measure, debiased=debiased).values, expected, EXACT)


@pytest.mark.parametrize("median", ["off-diagonal", "with-diagonal"])
@pytest.mark.parametrize("threshold", [0.4, 2.0])
def test_the_bandwidth_is_that_of_the_first_batch(threshold: float, median: str) -> None:
    first, second = cut(draw(24), (12, 12))
    batches = [first, [5 * x for x in second]]  # a bandwidth of its own would hide that the second is wider
    grams = naive_grams(batches, "cka-rbf", threshold=threshold, median=median)
    expected = [[oracles.minibatch_cka(k, l, debiased=True) for l in grams] for k in grams]
    estimates = stream(batches, f"cka-rbf:{threshold}:{median}")
    close(estimates.values, expected, EXACT)
    sigmas = [sqrt(oracles.squared_bandwidth(x, threshold=threshold, median=median)) for x in first]
    assert list(estimates.details["bandwidths"]) == ["layer 0", "layer 1", "layer 2"]
    assert list(estimates.details["bandwidths"].values()) == pytest.approx(sigmas, rel=EXACT)


@both_estimators
def test_one_batch_of_streaming_is_the_function_form(debiased: bool) -> None:
    layers = draw(40)
    linear = [[linear_cka(x, y, debiased=debiased) for y in layers] for x in layers]
    rbf = [[rbf_cka(x, y, debiased=debiased, threshold=0.7) for y in layers] for x in layers]
    close(stream([layers], debiased=debiased).values, linear, EXACT)
    close(stream([layers], "cka-rbf:0.7", debiased=debiased).values, rbf, EXACT)


@both_estimators
@pytest.mark.parametrize("offset", [0.0, 100.0, 1e5])
def test_float32_activations_give_the_values_of_float64(offset: float, debiased: bool) -> None:
    batches = [[(x + offset).float() for x in batch] for batch in cut(draw(96, (3, 300)), (32, 32, 32))]
    exact = stream([[x.double() for x in batch] for batch in batches], debiased=debiased)
    got = stream(batches, debiased=debiased)
    close(got.values, exact.values, FLOAT32)
    close(got.std_error, exact.std_error, 1e-5)  # a root of differences of sums


@pytest.mark.parametrize("scale", [1e-25, 1e-4, 1e4, 1e20])
def test_the_scale_of_a_layer_changes_nothing(scale: float) -> None:
    batches = [[x.float() for x in batch] for batch in cut(draw(64), (32, 32))]
    scaled = [[batch[0] * scale, *batch[1:]] for batch in batches]
    expected, got = stream(batches), stream(scaled)
    close(got.values, expected.values, FLOAT32)
    close(got.std_error, expected.std_error, 1e-5)  # a root of differences of sums
    close(got.null, expected.null, FLOAT32)


@both_measures
@both_estimators
def test_a_layer_is_exactly_like_itself_and_like_its_copy(debiased: bool, measure: str) -> None:
    (layer,) = draw(30, (6,))
    estimates = stream(cut([layer, layer, 3 * layer + 1], (12, 12, 6)), measure, debiased=debiased)
    close(estimates.values, torch.ones(3, 3), EXACT)
    close(estimates.std_error, torch.zeros(3, 3), 1e-7)  # the root of a round-off of 1e-16


def test_the_order_of_batches_is_irrelevant() -> None:
    batches = cut(draw(60), (16, 16, 16, 12))
    expected, got = stream(batches), stream(batches[::-1])
    close(got.values, expected.values, EXACT)
    close(got.std_error, expected.std_error, EXACT)


def test_the_order_of_later_batches_is_irrelevant_with_a_bandwidth() -> None:
    first, *later = cut(draw(60), (16, 16, 16, 12))
    expected, got = stream([first, *later], "cka-rbf"), stream([first, *later[::-1]], "cka-rbf")
    close(got.values, expected.values, EXACT)
    close(got.std_error, expected.std_error, EXACT)


@both_measures
def test_a_pair_of_layers_does_not_depend_on_the_other_layers(measure: str) -> None:
    batches = cut(draw(40, (3, 20, 5, 150)), (16, 16, 8))
    joint = stream(batches, measure)
    pair = stream([[batch[1], batch[3]] for batch in batches], measure)
    close(pair.values, joint.values[1::2, 1::2], EXACT)
    close(pair.null, joint.null[1::2, 1::2], EXACT)
    close(pair.std_error, joint.std_error[1::2, 1::2], 1e-7)  # on the diagonal a root of round-off


@both_measures
@both_estimators
def test_values_are_symmetric_and_bounded(debiased: bool, measure: str) -> None:
    values = stream(cut(draw(32), (8, 8, 8, 8)), measure, debiased=debiased).values
    close(values, values.T, EXACT)
    assert values.abs().max() <= 1 + EXACT


def test_results_are_there_after_every_batch() -> None:
    batches = cut(draw(36), (12, 12, 12))
    running = start("cka", ["a", "b", "c"])
    for count, batch in enumerate(batches, 1):
        for index, x in enumerate(batch):
            running.prepare(index, Features(x))
        running.update(12 * (count - 1))
        close(running.compute().values, stream(batches[:count]).values, EXACT)
        assert running.compute().details["batches"] == count


def test_layers_may_be_prepared_in_any_order() -> None:
    layers = draw(12)
    running = start("cka", ["a", "b", "c"])
    for index in (2, 0, 1):
        running.prepare(index, Features(layers[index]))
    running.update(0)
    close(running.compute().values, stream([layers]).values, EXACT)


def test_streaming_leaves_the_activations_alone() -> None:
    layers = draw(12)
    before = [x.clone() for x in layers]
    stream([layers, layers])
    for x, own in zip(layers, before, strict=True):
        assert torch.equal(x, own)


@both_estimators
def test_details_say_how_the_values_were_computed(debiased: bool) -> None:
    batches = cut(draw(24), (12, 12))
    linear = stream(batches, debiased=debiased).details
    assert linear == {"kernel": "linear", "debiased": debiased, "batches": 2}
    rbf = stream(batches, "cka-rbf:0.5:with-diagonal", debiased=debiased).details
    del rbf["bandwidths"]
    assert rbf == {"kernel": "rbf", "debiased": debiased, "batches": 2, "threshold": 0.5, "median": "with-diagonal"}


# standard errors


@both_measures
@both_estimators
@pytest.mark.parametrize("sizes", [(12, 12), (12, 12, 12, 5), (4, 9, 20, 7)])
def test_standard_error_is_the_sum_of_influences(sizes: Sequence[int], debiased: bool, measure: str) -> None:
    batches = cut(draw(sum(sizes)), sizes)
    grams = naive_grams(batches, measure)
    expected = [[oracles.minibatch_std_error(k, l, debiased=debiased) for l in grams] for k in grams]
    # On the diagonal the exact 0 is a root of round-off.
    close(stream(batches, measure, debiased=debiased).std_error, expected, 1e-7)


@both_measures
def test_one_batch_has_no_standard_error(measure: str) -> None:
    assert stream([draw(20)], measure).std_error.isnan().all()


def triangles(centered: Tensor, order: Tensor) -> Tensor:
    row, column = torch.tril_indices(len(order), len(order))
    half_diagonal = torch.ones(len(row), dtype=torch.float64).masked_fill(row == column, 0.5**0.5)
    both = [matrices[:, row, column] for matrices in (centered, centered[:, order][:, :, order])]
    return torch.stack(both) * half_diagonal


def sums_of(batches: Sequence[Batch], *, debiased: bool = True) -> HsicSums:
    sums = HsicSums.zeros(len(batches[0]), torch.device("cpu"))
    for batch in batches:
        grams = torch.stack([linear_gram(x) for x in batch])
        centered = center(grams, debiased=debiased)
        sums.add(triangles(centered, torch.arange(grams.shape[-1]).flip(0)), len(batch[0]))
    return sums


@both_estimators
def test_sums_of_two_workers_merge_by_addition(debiased: bool) -> None:
    batches = cut(draw(57), (12, 12, 12, 12, 9))
    first, second = sums_of(batches[:2], debiased=debiased), sums_of(batches[2:], debiased=debiased)
    merged = first + second
    whole = sums_of(batches, debiased=debiased)
    assert (merged.batches, merged.examples) == (5, 57)
    close(merged.values(), whole.values(), EXACT)
    close(merged.control(), whole.control(), EXACT)
    close(merged.std_error(), whole.std_error(), 1e-7)  # on the diagonal a root of round-off
    grams = naive_grams(batches, "cka")
    expected = [[oracles.minibatch_std_error(k, l, debiased=debiased) for l in grams] for k in grams]
    close(merged.std_error(), expected, 1e-7)  # on the diagonal a root of round-off


RUNS, BATCHES, SIZE, WIDTH = 400, 8, 64, 3


@pytest.fixture(scope="module")
def repeated() -> tuple[Estimates, float]:
    """Many independent runs as pairs of layers of one (no sum mixes the pairs), and the CKA of their population."""
    rng = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    mixing, noise = normal(WIDTH, WIDTH), 0.7
    batches = []
    for _ in range(BATCHES):
        x = normal(RUNS, SIZE, WIDTH)
        y = x @ mixing + noise * normal(RUNS, SIZE, WIDTH)
        batches.append([layer for run in zip(x, y, strict=True) for layer in run])
    covariance = mixing.T @ mixing + noise**2 * torch.eye(WIDTH, dtype=torch.float64)
    population = mixing.norm() ** 2 / (sqrt(WIDTH) * covariance.norm())  # ‖Σxy‖² / (‖Σxx‖ ‖Σyy‖)
    return stream(batches), population.item()


def pairs_of(matrix: Tensor) -> np.ndarray:
    return matrix[0::2, 1::2].diagonal().numpy()


@pytest.mark.slow
def test_debiased_values_are_centered_on_those_of_the_population(repeated: tuple[Estimates, float]) -> None:
    estimates, population = repeated
    values = pairs_of(estimates.values)
    assert abs(values.mean() - population) < 4 * values.std() / sqrt(RUNS)  # four standard errors of the mean


@pytest.mark.slow
def test_standard_error_is_the_spread_between_runs(repeated: tuple[Estimates, float]) -> None:
    estimates, _ = repeated
    spread = pairs_of(estimates.values).std(ddof=1)
    assert np.sqrt((pairs_of(estimates.std_error) ** 2).mean()) == pytest.approx(spread, rel=0.15)  # 4 / √(2 · 400)


def test_student_interval_covers_the_population_in_95_of_100_runs(repeated: tuple[Estimates, float]) -> None:
    estimates, population = repeated
    labels = tuple(Layer("run", str(index)) for index in range(2 * RUNS))
    similarity = Similarity(
        estimates.values.numpy(), estimates.std_error.numpy(), estimates.null.numpy(), labels, labels, "cka",
        estimates.details,
    )  # fmt: skip
    low, high = (pairs_of(torch.tensor(bound)) for bound in similarity.interval(0.95))
    coverage = ((low < population) & (population < high)).mean()
    assert 0.90 < coverage < 0.98  # 400 runs know it to 1.1%; few batches of few examples cover a little less


# the shuffled control


@both_estimators
def test_control_is_the_value_with_the_second_layers_examples_shuffled(debiased: bool) -> None:
    batches = cut(draw(29), (12, 17))
    orders = [
        torch.randperm(len(batch[0]), generator=torch.Generator().manual_seed(len(batch[0]))) for batch in batches
    ]
    sums = HsicSums.zeros(3, torch.device("cpu"))
    for batch, order in zip(batches, orders, strict=True):
        centered = center(torch.stack([linear_gram(x) for x in batch]), debiased=debiased)
        sums.add(triangles(centered, order), len(order))
    shuffled = [[x[order] for x in batch] for batch, order in zip(batches, orders, strict=True)]
    grams, others = naive_grams(batches, "cka"), naive_grams(shuffled, "cka")
    expected = [[oracles.minibatch_cka(k, l, debiased=debiased) for l in others] for k in grams]
    close(sums.control(), expected, EXACT)


@both_measures
def test_debiased_control_is_about_zero_for_layers_that_are_alike(measure: str) -> None:
    estimates = stream(cut(draw(20 * 32, (3, 20)), [32] * 20), measure)
    assert estimates.values.min() > 0.3
    assert estimates.null.abs().max() < 0.1  # a batch of 32 scatters by √2/32, so 20 by 0.01, more for few directions


@pytest.mark.parametrize(("p", "q"), [(200, 300), (16, 32)])
def test_biased_control_is_the_bias_of_independent_gaussians(p: int, q: int) -> None:
    rng = torch.Generator().manual_seed(0)
    batches = [[torch.randn(64, width, generator=rng) for width in (p, q)] for _ in range(10)]
    estimates = stream(batches, debiased=False)
    bias = 1 / sqrt((1 + 63 / p) * (1 + 63 / q))
    assert estimates.null[0, 1].item() == pytest.approx(bias, abs=0.02)  # ten batches scatter by less than 0.01
    assert estimates.values[0, 1].item() == pytest.approx(bias, abs=0.02)  # ten batches scatter by less than 0.01
    assert abs(stream(batches).null[0, 1]) < 0.03  # debiased: 0, with the scatter of √2/64/√10 = 0.007


def test_control_depends_on_the_seed_alone() -> None:
    batches = cut(draw(24), (12, 12))
    assert torch.equal(stream(batches, seed=3).null, stream(batches, seed=3).null)
    assert not torch.equal(stream(batches, seed=3).null, stream(batches, seed=4).null)
    assert torch.equal(stream(batches, seed=3).values, stream(batches, seed=4).values)


def test_each_batch_is_shuffled_in_an_order_of_its_own() -> None:
    layers = draw(16)
    once, twice = stream([layers]), stream([layers, layers])
    close(twice.values, once.values, EXACT)
    assert (twice.null - once.null).abs().max() > 1e-3  # the same order would leave the ratio as it is


# layers without a value


def only_in_row_and_column(matrix: Tensor, index: int) -> bool:
    expected = torch.zeros_like(matrix, dtype=torch.bool)
    expected[index] = expected[:, index] = True
    return torch.equal(matrix.isnan(), expected)


@both_estimators
@pytest.mark.parametrize("value", [0.0, 0.1, 1e5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_constant_layer_is_nan_in_its_own_row_and_column_alone(
    dtype: torch.dtype, value: float, debiased: bool
) -> None:
    batches = cut(draw(24), (12, 12))
    with_constant = [[x.to(dtype) for x in batch] for batch in batches]
    for batch in with_constant:
        batch[1] = torch.full((12, 30), value, dtype=dtype)
    estimates = stream(with_constant, debiased=debiased)
    for matrix in (estimates.values, estimates.std_error, estimates.null):
        assert only_in_row_and_column(matrix, 1)


def test_a_layer_that_is_constant_in_one_batch_has_a_value() -> None:
    batches = cut(draw(36), (12, 12, 12))
    batches[1][0] = torch.zeros(12, 3, dtype=torch.float64)
    grams = naive_grams(batches, "cka")
    expected = [[oracles.minibatch_cka(k, l, debiased=True) for l in grams] for k in grams]
    estimates = stream(batches)
    close(estimates.values, expected, EXACT)
    assert estimates.std_error.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_layer_that_fires_for_one_example_has_no_debiased_value(dtype: torch.dtype) -> None:
    """Off the diagonal its Gram matrix is aᵢ + aⱼ, so its unbiased HSIC is 0: a value would be round-off over 0."""
    batches = [[x.to(dtype) for x in batch] for batch in cut(draw(64), (32, 32))]
    for batch in batches:
        fires = batch[1][7].clone()
        batch[1] = torch.zeros(32, 20, dtype=dtype)
        batch[1][7] = fires
    estimates = stream(batches)
    for matrix in (estimates.values, estimates.std_error, estimates.null):
        assert only_in_row_and_column(matrix, 1)


def test_rbf_streaming_names_a_layer_whose_median_distance_is_zero() -> None:
    layers = draw(12)
    layers[2] = torch.ones(12, 5)
    with pytest.raises(FeatureError, match=r"median distance, which is 0 for layer 2"):
        stream([layers], "cka-rbf")


@both_measures
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_features_that_are_not_finite_are_refused_by_the_name_of_their_layer(bad: float, measure: str) -> None:
    first, second = cut(draw(24), (12, 12))
    second[1][4, 7] = bad
    with pytest.raises(FeatureError, match=r"must be finite, but those of layer 1 hold NaN or infinity\."):
        stream([first, second], measure)
    second[2][0, 0] = bad
    with pytest.raises(FeatureError, match=r"those of layer 1 .*\(and those of 1 more layers\)"):
        stream([first, second], measure)


def test_effective_batches_are_one_over_the_sum_of_squared_shares() -> None:
    layers = draw(60)
    sizes = [24, 24, 12]
    found = stream(cut(layers, sizes)).batches
    assert found is not None
    own = np.array(
        [[float(center(linear_gram(x), debiased=True).square().sum()) for x in layer.split(sizes)] for layer in layers]
    )
    share = own / own.sum(1, keepdims=True)
    weight = (share[:, None] + share[None, :]) / 2
    np.testing.assert_allclose(found.numpy(), 1 / np.square(weight).sum(-1), rtol=1e-8)
    assert (found < 3).all()
    equal = stream([layers, layers]).batches
    assert equal is not None
    torch.testing.assert_close(equal, torch.full_like(equal, 2.0))
