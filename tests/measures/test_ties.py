"""Ties stay ties: of dissimilarities in RSA and the Mantel test, and of neighbours."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.spatial.distance import pdist
from scipy.stats import kendalltau, spearmanr

import cka_probe as cp
from cka_probe.measures.rdms import condensed_rdm, tie_starts

Matrix = NDArray[np.float64]


def categories(examples: int, classes: int = 10, seed: int = 0) -> tuple[Matrix, Matrix]:
    """Features of classes that lie apart, and the classes, one-hot."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, examples)
    return rng.normal(size=(examples, 32)) + 1.5 * rng.normal(size=(classes, 32))[labels], np.eye(classes)[labels]


@pytest.mark.parametrize("rdm", ["correlation", "euclidean", "cosine"])
@pytest.mark.parametrize(("comparison", "oracle"), [("spearman", spearmanr), ("kendall", kendalltau)])
def test_a_category_model_has_exact_ties(rdm: Any, comparison: Any, oracle: Any) -> None:
    x, model = categories(100)
    row, col = np.triu_indices(100, 1)
    truth = oracle(pdist(x, rdm), (model[row] != model[col]).any(1)).statistic
    assert cp.rsa(x, model, rdm=rdm, comparison=comparison) == pytest.approx(truth, abs=1e-10)
    found = cp.compare({"x": x, "y": model}, measures=f"rsa:{rdm}:{comparison}").between("x", "y").values[0, 0]
    assert found == pytest.approx(truth, abs=2e-5)  # the features of x are kept in float32


def test_ties_beyond_the_exact_codes_have_one_code() -> None:
    x, model = categories(700)
    mixed = model @ np.random.default_rng(1).normal(size=(10, 50))  # exact ties, and no two sums alike
    row, col = np.triu_indices(700, 1)
    truth = spearmanr(pdist(x), pdist(np.round(model))).statistic
    found = cp.compare({"x": x, "y": model}, measures="rsa:euclidean").between("x", "y").values[0, 0]
    assert found == pytest.approx(truth, abs=1e-5)
    labels = model.argmax(1)
    pair = np.minimum(labels[row], labels[col]) * 10 + np.maximum(labels[row], labels[col])
    values = condensed_rdm(mixed, "euclidean")
    ordered = np.sort(values)
    assert len(tie_starts(ordered, 0.0)) == len(np.unique(np.where(labels[row] == labels[col], -1, pair)))


def test_binary_features_and_equal_examples() -> None:
    rng = np.random.default_rng(2)
    x, y = (rng.integers(0, 2, (80, 12)).astype(float) for _ in "xy")
    x[40:] = x[:40]
    for rdm in ("euclidean", "cosine"):
        exact = [np.round(pdist(side, rdm), 12) for side in (x, y)]
        assert cp.rsa(x, y, rdm=rdm) == pytest.approx(spearmanr(*exact).statistic, abs=1e-12)


def test_one_far_example_leaves_the_others_their_order() -> None:
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(2, 40, 6))
    x[0] *= 1e8
    assert cp.rsa(x, y, rdm="euclidean") == pytest.approx(spearmanr(pdist(x), pdist(y)).statistic, abs=1e-12)


def test_equal_dissimilarities_up_to_round_off_are_no_rdm() -> None:
    simplex = np.eye(20) @ np.linalg.qr(np.random.default_rng(4).normal(size=(20, 20)))[0]
    x = np.random.default_rng(5).normal(size=(20, 3))
    with pytest.raises(cp.CkaProbeError, match="differ by unequal amounts"):
        cp.rsa(simplex, x, rdm="euclidean")
    found = cp.compare({"x": x, "y": simplex}, measures="rsa:euclidean")
    assert np.isnan(found.between("x", "y").values).all()


def test_a_tie_is_no_wider_than_the_tolerance() -> None:
    chain = np.arange(0, 10, 0.4)
    starts = tie_starts(chain, 1.0)
    assert (chain[np.append(starts[1:], len(chain)) - 1] - chain[starts] <= 1).all()
    assert tie_starts(np.array([1.0, 1.0, 2.0, 2.5, 9.0]), 0.6).tolist() == [0, 2, 4]
    assert tie_starts(np.array([1.0, 1.05, 100.0, 104.0]), 0.0, 0.06).tolist() == [0, 2]


def test_scale_does_not_matter_to_what_is_invariant_to_it() -> None:
    x, y = np.random.default_rng(6).normal(size=(2, 30, 4))
    for measure in (cp.rsa, cp.mutual_knn, cp.mean_cca, cp.svcca, cp.procrustes, cp.linear_cka):
        assert measure(x * 1e-200, y * 1e200) == pytest.approx(measure(x, y), abs=1e-9)


def test_an_image_without_a_direction_is_named(caplog: pytest.LogCaptureFixture) -> None:
    x, y = np.random.default_rng(7).normal(size=(2, 40, 5))
    x[[3, 9]] = 0
    with caplog.at_level(logging.WARNING):
        found = cp.compare({"x": x, "y": y}, measures=["rsa", "mutual-knn"])
    assert np.isnan(found["rsa"].between("x", "y").values).all()
    assert not np.isnan(found["mutual-knn"].between("x", "y").values).any()
    assert "Leave the images out, or use euclidean ones (rsa)" in caplog.text
    assert "drawn at random (mutual-knn)" in caplog.text
    with pytest.raises(cp.CkaProbeError, match=r"example (3|9) \(from 0\)"):
        cp.rsa(x, y)


def drawn_overlap(x: Matrix, y: Matrix, neighbours: int, draws: int) -> float:
    """The mean overlap of neighbours where ties are broken by a draw of their own on each side."""
    rng = np.random.default_rng(0)
    found = []
    sides = []
    for side in (x, y):
        norm = np.linalg.norm(side, axis=1, keepdims=True)
        cosines = np.round((side / np.where(norm > 0, norm, 1)) @ (side / np.where(norm > 0, norm, 1)).T, 9)
        np.fill_diagonal(cosines, -2)
        sides.append(cosines)
    for _ in range(draws):
        near = [np.argsort(-(side + 1e-11 * rng.random(side.shape)), axis=1)[:, :neighbours] for side in sides]
        found.append(np.mean([len(set(a) & set(b)) for a, b in zip(*near, strict=True)]) / neighbours)
    return float(np.mean(found))


def test_neighbours_that_tie_count_with_their_share() -> None:
    rng = np.random.default_rng(8)
    x = rng.integers(0, 2, (40, 5)).astype(float)
    y = np.where(rng.random((40, 5)) < 0.7, x, rng.integers(0, 2, (40, 5)))
    assert cp.mutual_knn(x, y, neighbours=6) == pytest.approx(drawn_overlap(x, y, 6, 2000), abs=4e-3)


def test_of_independent_features_with_ties_the_mean_is_chance() -> None:
    rng = np.random.default_rng(9)
    values = []
    for _ in range(200):
        x, y = (np.maximum(rng.normal(size=(50, 8)), 0) * (rng.random((50, 1)) > 0.3) for _ in "xy")
        values.append(cp.mutual_knn(x, y, neighbours=5))
    error = np.std(values) / np.sqrt(len(values))
    assert abs(np.mean(values) - 5 / 49) < 4 * error


def test_equal_arrays_with_ties_have_the_same_neighbours() -> None:
    x = np.eye(4)[np.random.default_rng(10).integers(0, 4, 60)]
    assert cp.mutual_knn(x, x) == 1
    assert cp.mutual_knn(x, x.copy()) == 1
    assert cp.mutual_knn(x, x[:, ::-1] + 1e-9) < 1
