"""The collected measures: each against an outside opinion, its invariances, controls, errors and bad input."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.spatial import distance
from scipy.spatial import procrustes as scipy_procrustes
from scipy.stats import energy_distance, kendalltau, pearsonr, spearmanr, wasserstein_distance
from sklearn.cross_decomposition import CCA
from sklearn.neighbors import NearestNeighbors

import cka_probe as cp
from cka_probe.errors import FeatureError, OutputError, SpecError
from cka_probe.estimation.arrays import LayerFeatures
from cka_probe.estimation.collected import Pairwise, Replicates, jackknife_blocks, jackknife_error, neighbouring
from cka_probe.estimation.estimates import Estimates
from cka_probe.estimation.feature_store import Scratch
from cka_probe.estimation.gram import Features
from cka_probe.estimation.gram_file import GramFile
from cka_probe.estimation.measure import Accumulator
from cka_probe.measures.catalogue import MEASURES, about
from cka_probe.measures.rdms import RdmStatistic, condensed_rdm
from cka_probe.probing.measuring import curve_sizes, start_measures
from cka_probe.probing.options import Measuring
from cka_probe.results.similarity import Layer

EXACT = 1e-10  # float64 on both sides: the round-off of sums of a few thousand terms
FLOAT32 = 2e-6  # the store keeps float32; ranks of near ties may change places

Matrix = NDArray[np.float64]
COLLECTED = [name for name in MEASURES if not name.startswith("cka")]
PAIRED = [name for name in COLLECTED if about(name).paired]
FUNCTIONS: dict[str, Callable[[Any, Any], float]] = {
    "rsa": cp.rsa,
    "mantel": lambda x, y: cp.mantel(x, y, permutations=1).r,
    "mean-cca": cp.mean_cca,
    "svcca": cp.svcca,
    "pwcca": cp.pwcca,
    "procrustes": cp.procrustes,
    "mutual-knn": cp.mutual_knn,
    "mmd": cp.mmd,
    "energy": cp.energy_distance,
    "wasserstein": cp.wasserstein,
}


def draw(examples: int = 60, widths: Sequence[int] = (5, 8), seed: int = 0) -> list[Matrix]:
    """Layers that share three directions, each with noise of its own."""
    rng = np.random.default_rng(seed)
    shared = rng.standard_normal((examples, 3))
    return [shared @ rng.standard_normal((3, d)) + 0.5 * rng.standard_normal((examples, d)) + 1 for d in widths]


def rotation(width: int, seed: int = 9) -> Matrix:
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((width, width)))[0]


def started(
    layers: Sequence[Matrix], measure: str, *, names: Sequence[str] = (), scratch: Scratch | None = None, **options: Any
) -> Accumulator:
    """A measure before the first batch; each layer is of a subject of its own."""
    labels = [Layer(str(index), name) for index, name in enumerate(names or ["layer"] * len(layers))]
    measuring = Measuring(measures=measure, **options)
    (running,) = start_measures(labels, len(layers[0]), measuring, scratch=scratch).values()
    return running


def collect(layers: Sequence[Matrix], measure: str, *, batch: int = 25, **options: Any) -> Estimates:
    """A measure, driven as the probing loop does it."""
    running = started(layers, measure, **options)
    for start in range(0, len(layers[0]), batch):
        for index, x in enumerate(layers):
            running.prepare(index, Features(torch.from_numpy(x[start : start + batch])))
        running.update(start)
    return running.compute()


# functions, against outside opinions

METRICS = {"correlation": "correlation", "cosine": "cosine", "euclidean": "euclidean"}


@pytest.mark.parametrize("rdm", list(METRICS))
@pytest.mark.parametrize(
    ("comparison", "oracle"), [("spearman", spearmanr), ("kendall", kendalltau), ("pearson", pearsonr)]
)
def test_rsa_is_the_correlation_of_scipys_distances(rdm: Any, comparison: Any, oracle: Any) -> None:
    x, y = draw()
    expected = oracle(*(distance.pdist(features, METRICS[rdm]) for features in (x, y))).statistic
    assert cp.rsa(x, y, rdm=rdm, comparison=comparison) == pytest.approx(expected, abs=EXACT)


@pytest.mark.parametrize(("comparison", "method"), [("spearman", "spearman"), ("pearson", "corr")])
def test_rsa_is_that_of_rsatoolbox(comparison: Any, method: str) -> None:
    rsatoolbox = pytest.importorskip("rsatoolbox")
    x, y = draw()
    rdms = [rsatoolbox.rdm.calc_rdm(rsatoolbox.data.Dataset(features), method="correlation") for features in (x, y)]
    expected = rsatoolbox.rdm.compare(*rdms, method=method).item()
    assert cp.rsa(x, y, comparison=comparison) == pytest.approx(expected, abs=EXACT)


def test_mantel_is_pearsons_r_with_a_p_value_from_joint_permutations() -> None:
    x, y = draw(40)
    found = cp.mantel(x, y, permutations=99, seed=3)
    first, second = (distance.squareform(distance.pdist(features, "correlation")) for features in (x, y))
    upper = np.triu_indices(40, 1)
    rng = np.random.default_rng(3)
    reached = 0
    for _ in range(99):
        order = rng.permutation(40)
        reached += pearsonr(first[upper], second[np.ix_(order, order)][upper]).statistic >= found.r
    assert found.r == pytest.approx(pearsonr(first[upper], second[upper]).statistic, abs=EXACT)
    assert found.p_value == (reached + 1) / 100


def test_canonical_correlations_are_those_of_scikit_learn() -> None:
    x, y = draw(80, (3, 4))
    u, v = CCA(n_components=3, tol=1e-12, max_iter=5000).fit_transform(x, y)
    expected = np.mean([pearsonr(u[:, k], v[:, k]).statistic for k in range(3)])
    assert cp.mean_cca(x, y) == pytest.approx(expected, abs=1e-6)  # its iterations end at a tolerance


def test_svcca_is_the_mean_cca_of_the_principal_components() -> None:
    x, y = draw(80, (6, 9))
    parts = []
    for features in (x, y):
        u, s, _ = np.linalg.svd(features - features.mean(0), full_matrices=False)
        keep = next(k for k in range(1, len(s) + 1) if (s[:k] ** 2).sum() >= 0.9 * (s**2).sum())
        parts.append(u[:, :keep] * s[:keep])
    assert cp.svcca(x, y, variance=0.9) == pytest.approx(cp.mean_cca(*parts), abs=EXACT)


def test_pwcca_weights_by_the_projection_of_the_first_argument() -> None:
    x, y = draw(80, (3, 5))
    x, y = x - x.mean(0), y - y.mean(0)

    def whitener(features: Matrix) -> Matrix:
        values, vectors = np.linalg.eigh(features.T @ features)
        return vectors / np.sqrt(values) @ vectors.T

    u, rho, _ = np.linalg.svd(whitener(x) @ x.T @ y @ whitener(y))
    variates = x @ whitener(x) @ u
    alpha = np.array([sum(abs(variates[:, k] @ x[:, j]) for j in range(3)) for k in range(3)])
    assert cp.pwcca(x, y) == pytest.approx((alpha * rho).sum() / alpha.sum(), abs=EXACT)
    assert abs(cp.pwcca(x, y) - cp.pwcca(y, x)) > 1e-4  # it is not symmetric


def test_procrustes_is_scipys_disparity() -> None:
    x, y = draw(widths=(6, 6))
    _, _, disparity = scipy_procrustes(x, y)
    assert 1 - cp.procrustes(x, y) ** 2 == pytest.approx(disparity, abs=EXACT)
    x, y = draw(widths=(4, 7))
    _, _, disparity = scipy_procrustes(np.pad(x, ((0, 0), (0, 3))), y)
    assert 1 - cp.procrustes(x, y) ** 2 == pytest.approx(disparity, abs=EXACT)
    assert cp.procrustes_angle(x, y) == pytest.approx(np.arccos(cp.procrustes(x, y)), abs=EXACT)
    assert cp.procrustes_angle(x, x @ rotation(4)) == pytest.approx(0, abs=1e-14)  # where the arc cosine has 1e-8


def test_mutual_neighbours_are_counted_one_by_one() -> None:
    x, y = draw()
    near = []
    for features in (x, y):
        unit = features / np.linalg.norm(features, axis=1, keepdims=True)
        search = NearestNeighbors(n_neighbors=6).fit(unit)  # of unit vectors, the order of cosines
        near.append([set(row.tolist()) - {i} for i, row in enumerate(search.kneighbors(unit, return_distance=False))])
    expected = np.mean([len(a & b) / 5 for a, b in zip(*near, strict=True)])
    assert cp.mutual_knn(x, y, neighbours=5) == pytest.approx(expected, abs=EXACT)


def naive_u_statistic(x: Matrix, y: Matrix, k: Callable[[Matrix, Matrix], float]) -> float:
    n = len(x)
    pairs = [(i, j) for i in range(n) for j in range(n) if i != j]
    return sum(k(x[i], x[j]) + k(y[i], y[j]) - k(x[i], y[j]) - k(x[j], y[i]) for i, j in pairs) / (n * (n - 1))


def two_views(examples: int = 40) -> tuple[Matrix, Matrix]:
    (x,) = draw(examples, (5,))
    return x, 1.3 * x + 0.4 + 0.2 * np.random.default_rng(5).standard_normal(x.shape)


def test_mmd_is_the_u_statistic_of_gretton() -> None:
    x, y = two_views()
    both = np.concatenate([x, y])
    z, w = (x - both.mean(0)) / both.std(0), (y - both.mean(0)) / both.std(0)
    sigma = np.median(distance.pdist(np.concatenate([z, w])))
    expected = naive_u_statistic(z, w, lambda a, b: float(np.exp(-((a - b) ** 2).sum() / (2 * sigma**2))))
    assert cp.mmd(x, y) == pytest.approx(expected, abs=EXACT)


def test_energy_distance_is_the_u_statistic_and_biased_it_is_scipys() -> None:
    x, y = two_views()
    both = np.concatenate([x, y])
    z, w = (x - both.mean(0)) / both.std(0), (y - both.mean(0)) / both.std(0)
    expected = naive_u_statistic(z, w, lambda a, b: -float(np.linalg.norm(a - b)))
    assert cp.energy_distance(x, y) == pytest.approx(expected, abs=EXACT)
    line = x[:, :1], y[:, :1]
    biased = cp.energy_distance(*line, debiased=False, standardize=False)
    assert biased == pytest.approx(energy_distance(*(side[:, 0] for side in line)) ** 2, abs=EXACT)


def test_wasserstein_is_the_mean_of_scipys_over_the_features() -> None:
    x, y = two_views()
    expected = np.mean([wasserstein_distance(x[:, k], y[:, k]) for k in range(5)])
    assert cp.wasserstein(x, y, standardize=False) == pytest.approx(expected, abs=EXACT)
    scaled = np.mean([wasserstein_distance(x[:, k], y[:, k]) / np.concatenate([x, y])[:, k].std() for k in range(5)])
    assert cp.wasserstein(x, y) == pytest.approx(scaled, abs=EXACT)


# invariances, and what is none

STAYS = 1e-9
INVARIANT: dict[str, set[str]] = {
    "rsa": {"scale"},  # a correlation RDM sees a rotation: it centers over the features
    "mantel": {"scale"},
    "mean-cca": {"scale", "translation", "rotation", "linear"},
    "svcca": {"scale", "translation", "rotation"},
    "pwcca": {"scale", "translation"},  # its weights see the axes of the features
    "procrustes": {"scale", "translation", "rotation"},
    "mutual-knn": {"scale", "rotation"},
}


@pytest.mark.parametrize("measure", PAIRED)
@pytest.mark.parametrize("change", ["scale", "translation", "rotation", "linear"])
def test_a_measure_does_not_see_what_it_is_invariant_to_and_sees_the_rest(measure: str, change: str) -> None:
    x, y = draw(120, (5, 8))
    stretched = rotation(5) * np.geomspace(1, 30, 5)
    changed = {"scale": 7 * x, "translation": x + np.arange(5), "rotation": x @ rotation(5), "linear": x @ stretched}[
        change
    ]
    function = FUNCTIONS[measure]
    moved = abs(function(changed, y) - function(x, y))
    assert moved < STAYS if change in INVARIANT[measure] else moved > 1e-4


def test_euclidean_rsa_sees_neither_rotation_nor_translation() -> None:
    x, y = draw()
    value = cp.rsa(x, y, rdm="euclidean")
    assert cp.rsa(3 * x @ rotation(5) + 2, y, rdm="euclidean") == pytest.approx(value, abs=STAYS)


# many layers at once


@pytest.mark.parametrize("measure", COLLECTED)
def test_many_layers_give_the_values_of_the_function(measure: str) -> None:
    layers = [*draw(60, (5, 5)), draw(60, (5,), seed=1)[0]]
    found = collect(layers, measure).values.numpy()
    for i, j in ((0, 1), (1, 2)):
        expected = FUNCTIONS[measure](layers[i], layers[j])
        if measure == "pwcca":
            expected = (expected + FUNCTIONS[measure](layers[j], layers[i])) / 2
        assert found[i, j] == found[j, i] == pytest.approx(expected, abs=FLOAT32)


@pytest.mark.parametrize("rdm", ["correlation", "euclidean", "cosine"])
@pytest.mark.parametrize("comparison", ["spearman", "kendall", "pearson"])
def test_rsa_of_many_layers_in_every_form(rdm: Any, comparison: Any) -> None:
    x, y = draw(120)
    found = collect([x, y], f"rsa:{rdm}:{comparison}").values[0, 1].item()
    assert found == pytest.approx(cp.rsa(x, y, rdm=rdm, comparison=comparison), abs=FLOAT32)


@pytest.mark.slow
@pytest.mark.parametrize("comparison", ["spearman", "pearson"])
@pytest.mark.parametrize(("examples", "tolerance"), [(400, 1e-12), (560, 1e-6)])
def test_bins_of_dissimilarities_change_a_correlation_by_little(
    comparison: Any, examples: int, tolerance: float
) -> None:
    """Of the first, each dissimilarity has a bin of its own; of the second, there are more than bins."""
    x, y = draw(examples)
    x[0] *= 1e4  # it stretches the bins of values, and is left out with its block
    order = np.random.default_rng(2).permutation(examples)
    orders = [order, np.arange(examples)]
    statistic = RdmStatistic("euclidean", comparison, Scratch())
    layers = [LayerFeatures(x, 1e-15), LayerFeatures(y, 1e-15)]
    found = statistic(layers, [slice(0, 40)], orders)
    alone = statistic(layers, [], [order])

    def rsa(a: NDArray[Any], b: NDArray[Any]) -> Any:
        return pytest.approx(cp.rsa(a, b, rdm="euclidean", comparison=comparison), abs=tolerance)

    assert found.values[0, 1] == rsa(x, y)
    assert found.deleted[0, 0, 1] == rsa(x[40:], y[40:])
    assert found.shuffled[0, 0, 1] == rsa(x, y[order])
    assert alone.shuffled[0, 0, 1] == rsa(x, y[order])
    assert found.shuffled[1, 0, 1] == rsa(x, y)


def test_kendall_takes_at_most_512_images() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(513, 2))
    with pytest.raises(
        SpecError, match=r"at most 512 images.*there are 513\. Use --examples 512, or spearman: rsa:cos"
    ):
        cp.compare({"x": x, "y": x}, measures="rsa:cosine:kendall")
    cp.compare({"x": x[:12], "y": x[:12]}, measures="rsa:kendall", examples=1000)  # more than there are


def left_out(value: float, deleted: Sequence[float], deleted_pairs: Sequence[float]) -> Replicates:
    """The replicates of one number."""
    parts = [np.array(part)[..., None, None] for part in (value, deleted, [], deleted_pairs)]
    return Replicates(*parts)


CORRECTED = ("mean-cca", "svcca", "pwcca", "procrustes", "mutual-knn")


@pytest.mark.slow
@pytest.mark.parametrize("measure", [name for name in COLLECTED if name != "mutual-knn"])
def test_leaving_out_a_block_is_the_measure_on_the_rest(measure: str) -> None:
    layers = draw(60, (5, 5))
    blocks = jackknife_blocks(60)
    again = [
        [collect([np.delete(x, run, 0) for x in layers], measure).values[0, 1].item() for run in runs]
        for runs in (blocks, neighbouring(blocks) if measure in CORRECTED else [])
    ]
    found = collect(layers, measure)
    expected = jackknife_error(left_out(found.values[0, 1].item(), *again)).item()
    assert expected > 0
    assert found.std_error[0, 1].item() == pytest.approx(expected, rel=1e-3)  # float32 in differences


def second_order(first: Matrix, pairs: Matrix) -> Replicates:
    """Of the statistic Σ aᵢ/g + Σ βᵢⱼ/g² of g blocks: its value, and those without a block and without two."""
    count = len(first)

    def value(gone: set[int]) -> float:
        kept = [block for block in range(count) if block not in gone]
        return float(first[kept].mean() + np.triu(pairs, 1)[np.ix_(kept, kept)].sum() / len(kept) ** 2)

    twice = [{block, block + 1} for block in range(0, count - 1, 2)]
    return left_out(value(set()), [value({block}) for block in range(count)], [value(gone) for gone in twice])


@pytest.mark.parametrize("count", [4, 7, 10])
def test_the_error_counts_the_second_order_once(count: int) -> None:
    first = np.random.default_rng(0).standard_normal(count)
    linear = first.var(ddof=1) / count
    assert jackknife_error(second_order(first, np.zeros((count, count)))).item() ** 2 == pytest.approx(
        linear, abs=EXACT
    )
    size, found = 0.05, []  # so little that the limit of the correction is not reached
    for row, col in zip(*np.triu_indices(count, 1), strict=True):
        for sign in (-size, size):  # what is of both orders cancels
            pairs = np.zeros((count, count))
            pairs[row, col] = sign
            found.append(jackknife_error(second_order(first, pairs)).item() ** 2)
    # Independent βᵢⱼ of variance size² add size²/g⁴ each; in the mean over the pairs, one does.
    assert np.mean(found) - linear == pytest.approx(size**2 / count**4, rel=1e-6)


def test_of_an_error_that_is_all_of_second_order_a_share_stays() -> None:
    pairs = np.random.default_rng(0).standard_normal((10, 10))
    found = second_order(np.zeros(10), pairs)
    whole = jackknife_error(Replicates(found.values, found.deleted, found.shuffled))
    assert 0.6**0.5 * whole.item() <= jackknife_error(found).item() < whole.item()


def test_too_few_blocks_have_no_pairs() -> None:
    assert jackknife_blocks(15) == []
    assert neighbouring(jackknife_blocks(20)) == [slice(0, 8), slice(8, 16)]
    assert np.isnan(jackknife_error(left_out(0.5, [], []))).all()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("measure", ["mean-cca", "svcca", "pwcca", "procrustes"])
def test_a_layer_that_only_one_block_moves_has_no_errors(measure: str) -> None:
    x, y = draw(60, (5, 5))
    x[:] = np.arange(1, 6)
    x[3] += [3, 1, 2, 5, 4]
    found = collect([x, y], measure)
    assert torch.isfinite(found.values).all()
    assert torch.isnan(found.std_error[0]).all()
    assert torch.isfinite(found.std_error[1, 1])


@pytest.mark.parametrize("measure", ["mean-cca", "svcca", "pwcca"])
def test_features_that_only_one_block_has_are_gone_without_it(measure: str) -> None:
    layers = draw(60, (5, 5))
    layers[0][:, 0] = 0
    layers[0][3, 0] = 2  # a unit that one image moves
    again = [
        [collect([np.delete(x, run, 0) for x in layers], measure).values[0, 1].item() for run in runs]
        for runs in (jackknife_blocks(60), neighbouring(jackknife_blocks(60)))
    ]
    found = collect(layers, measure)
    expected = jackknife_error(left_out(found.values[0, 1].item(), *again)).item()
    assert found.std_error[0, 1].item() == pytest.approx(expected, rel=1e-3)  # float32 in differences


@pytest.mark.parametrize("measure", PAIRED)
def test_the_control_is_the_measure_on_shuffled_examples(measure: str) -> None:
    layers = draw(60, (5, 5))
    order = np.random.default_rng(0).permutation(60)
    expected = FUNCTIONS[measure](layers[0], layers[1][order])
    if measure == "pwcca":
        expected = (expected + FUNCTIONS[measure](layers[1][order], layers[0])) / 2
    assert collect(layers, measure).null[0, 1].item() == pytest.approx(expected, abs=FLOAT32)


@pytest.mark.slow
@pytest.mark.parametrize(
    "measure", [pytest.param(name, marks=[pytest.mark.full] if name == "mantel" else []) for name in COLLECTED]
)
def test_identical_views_and_shuffled_pairs(measure: str) -> None:
    x = draw(400, (4,))[0]
    shuffled = x[np.random.default_rng(1).permutation(400)]
    found = collect([x, x, shuffled], measure)
    assert found.values[0, 1].item() == pytest.approx(about(measure).identical, abs=1e-9)
    assert found.std_error[0, 1].item() == pytest.approx(0, abs=1e-9)
    # By chance, canonical correlations are up to about √(d/n) = 0.1, and 10 of 399 neighbours coincide; distances
    # differ by the pairs of an example with itself, 2.8/400.
    assert abs(found.values[0, 2].item()) < (0.2 if about(measure).paired else 0.05)


def test_permutations_tell_related_layers_from_unrelated_ones() -> None:
    x, y = draw(60, (5, 5))
    other = np.random.default_rng(7).standard_normal((60, 5))
    for measure in PAIRED:
        spec = "mantel:49" if measure == "mantel" else measure  # whose permutations are its own
        found = collect([x, y, other], spec, permutations=49)
        assert found.p_value is not None
        assert found.p_value[0, 1] == 0.02  # 1 of 50: none of the permutations reaches it
        assert found.p_value[0, 2] > 0.02
        np.testing.assert_array_equal(found.p_value, found.p_value.T)


def test_swapped_views_tell_moved_ones_from_equal_ones() -> None:
    x, y = two_views(60)
    again = x + 0.01 * np.random.default_rng(2).standard_normal(x.shape)
    for measure in ("mmd", "energy", "wasserstein"):
        found = collect([x, y, again], measure, permutations=49)
        assert found.p_value is not None
        assert found.p_value[0, 1] == 0.02
        assert found.p_value[0, 2] > 0.05


def test_a_distance_is_of_one_layer_under_two_views() -> None:
    x, y = two_views()
    found = collect([x, y, x[:, :4], x], "mmd", names=["a", "a", "a", "b"]).values.numpy()
    defined = [[0, 1, 2, 2], [1, 0, 2, 2], [2, 2, 0, 2], [2, 2, 2, 0]]
    np.testing.assert_array_equal(np.isfinite(found), np.array(defined) < 2)
    with pytest.raises(SpecError, match="the layer of the same name"):  # told before the images run
        collect([x, y], "mmd", names=["a", "b"])
    with pytest.raises(FeatureError, match="a layer of the same name and width"):
        collect([x, y[:, :4]], "mmd", names=["a", "a"])


def test_the_curve_ends_at_the_value_and_is_that_of_the_first_examples() -> None:
    layers = draw(128, (5, 8))
    found = collect(layers, "rsa", curve=True, batch=128)
    assert [point.examples for point in found.curve] == curve_sizes(128) == [16, 32, 64, 128]
    np.testing.assert_allclose(found.curve[-1].values, found.values.numpy())
    assert found.curve[0].values[0, 1] == pytest.approx(cp.rsa(*(x[:16] for x in layers)), abs=FLOAT32)


# bad input


@pytest.mark.parametrize("measure", PAIRED)
def test_a_constant_layer_has_no_value_and_leaves_the_others_theirs(measure: str) -> None:
    x, y = draw(60, (5, 5))
    found = collect([x, np.full((60, 5), 0.1), y], measure).values.numpy()
    assert np.isnan(found[1]).all()
    assert np.isnan(found[:, 1]).all()
    assert np.isfinite(found[0, 2])
    with pytest.raises(FeatureError):
        FUNCTIONS[measure](x, np.full((60, 5), 0.1))


@pytest.mark.parametrize("measure", COLLECTED)
@pytest.mark.parametrize("broken", ["short", "flat", "nan", "words"])
def test_features_that_are_none_are_refused(measure: str, broken: str) -> None:
    x = draw(20, (5,))[0]
    bad: Any = {"short": x[:-1], "flat": x[:, 0], "nan": np.where(x > 2, np.nan, x), "words": [["a"] * 5] * 20}[broken]
    if broken == "nan":
        bad[0, 0] = np.nan
    with pytest.raises(FeatureError, match="must"):
        FUNCTIONS[measure](x, bad)


@pytest.mark.parametrize("measure", ["mean-cca", "svcca", "pwcca"])
def test_cca_refuses_fewer_examples_than_features(measure: str) -> None:
    x, y = draw(20, (20, 4))
    with pytest.raises(FeatureError, match=r"20 features, but the smallest sample has 20 examples"):
        FUNCTIONS[measure](x, y)
    with pytest.raises(FeatureError, match="more examples than features"):
        collect([x, y], measure)


@pytest.mark.parametrize(
    ("measure", "message"),
    [
        ("svcca", "20 features, but the smallest sample has 16 examples"),  # of 25, two of six blocks are out
        ("mutual-knn:22", "but is 22 of 16"),
        ("mmd", "a layer of the same name and width"),
    ],
)
def test_what_cannot_be_is_told_after_the_first_batch(measure: str, message: str) -> None:
    layers = draw(25, (20, 4))
    running = started(layers, measure)
    for index, x in enumerate(layers):
        running.prepare(index, Features(torch.from_numpy(x[:5])))
    with pytest.raises(FeatureError, match=message):
        running.update(0)


def test_a_permutation_test_looks_at_fewer_examples_and_needs_enough_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = draw(60, (20, 4))
    monkeypatch.setattr(sys.modules[Pairwise.__module__], "PERMUTED_EXAMPLES", 20)
    assert torch.isfinite(collect(layers, "svcca").values).all()
    with pytest.raises(FeatureError, match="20 features, but the smallest sample has 20 examples"):
        collect(layers, "svcca", permutations=9)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: cp.rsa(x, x, rdm="manhattan"), "RDM must be one of"),  # type: ignore[arg-type]
        (lambda x: cp.rsa(x, x, comparison="cosine"), "comparison of RDMs must be one of"),  # type: ignore[arg-type]
        (lambda x: cp.rsa(x[:, :1], x), "those of example 0"),
        (lambda x: cp.rsa(np.ma.masked_less(x, 0), x), "masked array"),
        (lambda x: cp.mantel(x, x, permutations=0), "at least 1 permutation"),
        (lambda x: cp.svcca(x, x, variance=1.5), "share of variance"),
        (lambda x: cp.mutual_knn(x, x, neighbours=20), "but is 20 of 20"),
        (lambda x: cp.mmd(x, x, bandwidth=0), "bandwidth of MMD must be above 0"),
        (lambda x: cp.mmd(x, x[:, :3]), "same features of two views"),
        (lambda x: cp.wasserstein(x, x[:, :3]), "same features of two views"),
    ],
)
def test_options_that_make_no_sense_are_refused(call: Callable[[Matrix], Any], message: str) -> None:
    with pytest.raises(FeatureError, match=message):
        call(draw(20, (5,))[0])


def test_non_finite_features_name_their_layer() -> None:
    x, y = draw(20)
    y[3, 2] = np.inf
    with pytest.raises(FeatureError, match="layer 'layer' of '1' hold NaN"):
        collect([x, y], "rsa")


def test_an_example_without_a_direction_leaves_rsa_undefined_for_its_layer() -> None:
    x, y = draw(30)
    y[4] = 0
    assert np.isnan(condensed_rdm(y, "cosine")).any()
    found = collect([x, y], "rsa").values
    assert torch.isnan(found[0, 1])
    assert found[0, 0] == pytest.approx(1, abs=EXACT)
    assert torch.isfinite(collect([x, y], "rsa:euclidean").values).all()


# storage


def test_beyond_the_budget_features_go_to_files_that_vanish(tmp_path: Path) -> None:
    scratch = Scratch(tmp_path / "cache", budget=1000)
    small = scratch.empty((10, 10), np.float32)
    large = scratch.empty((20, 10), np.float64)
    large[:] = 1
    assert not isinstance(small, np.memmap)
    assert isinstance(large, np.memmap)
    assert len(list((tmp_path / "cache").glob("*/*.bin"))) == 1
    del small, large
    again = scratch.empty((20, 10), np.float32)  # what was given back is there to be used again
    assert not isinstance(again, np.memmap)
    del again, scratch
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("measure", ["rsa", "procrustes"])
def test_values_do_not_depend_on_where_the_features_lie(measure: str, tmp_path: Path) -> None:
    layers = draw(60)
    expected = collect(layers, measure)
    found = collect(layers, measure, scratch=Scratch(tmp_path, 0))
    torch.testing.assert_close(found.values, expected.values, rtol=0, atol=0)
    torch.testing.assert_close(found.std_error, expected.std_error, rtol=0, atol=0)


def test_the_error_of_mutual_neighbours_keeps_the_neighbours_of_all_examples() -> None:
    layers = draw(60, (5, 5))
    near = []
    for features in layers:
        unit = features / np.linalg.norm(features, axis=1, keepdims=True)
        search = NearestNeighbors(n_neighbors=11).fit(unit)
        near.append([set(row.tolist()) - {i} for i, row in enumerate(search.kneighbors(unit, return_distance=False))])
    blocks = jackknife_blocks(60)
    again = []
    for run in [slice(0, 0), *blocks, *neighbouring(blocks)]:
        rest = set(range(60)) - set(range(run.start, run.stop))
        x, y = ([neighbours[i] & rest for i in sorted(rest)] for neighbours in near)
        common = sum(len(a & b) for a, b in zip(x, y, strict=True))
        again.append(common / np.sqrt(sum(map(len, x)) * sum(map(len, y))))
    expected = jackknife_error(left_out(again[0], again[1:11], again[11:]))
    assert collect(layers, "mutual-knn").std_error[0, 1].item() == pytest.approx(expected.item())


def test_a_full_disk_is_told_before_features_are_mapped_into_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mapping of a file with holes would end the process when the disk is full."""

    def full(descriptor: int, offset: int, size: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    scratch = Scratch(tmp_path, budget=0)
    with pytest.raises(OutputError, match=r"No space left on device\. Name another with --scratch"):
        scratch.empty((10, 10), np.float32)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_file_system_that_cannot_reserve_space_is_used_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(descriptor: int, offset: int, size: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(os, "posix_fallocate", unknown)
    array = Scratch(tmp_path, budget=0).empty((10, 10), np.float32)
    array[:] = 3
    assert array.sum() == 300


def test_a_full_disk_is_told_when_a_gram_matrix_is_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Full(io.BytesIO):
        def flush(self) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    file = GramFile(tmp_path)
    monkeypatch.setattr(file, "_file", Full())
    with pytest.raises(OutputError, match=r"No space left on device\. Name another with --scratch"):
        file.write(0, 0, torch.zeros(4, 4))
