"""`compare` and the functions give the same on the same arrays, whatever their type and scale."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import cka_probe as cp

FUNCTIONS: dict[str, Callable[[Any, Any], float]] = {
    "cka": cp.linear_cka,
    "cka-rbf": cp.rbf_cka,
    "rsa:euclidean": lambda x, y: cp.rsa(x, y, rdm="euclidean"),
    "mean-cca": cp.mean_cca,
    "procrustes": cp.procrustes,
    "mutual-knn": cp.mutual_knn,
    "mmd": cp.mmd,
    "energy": cp.energy_distance,
    "wasserstein": cp.wasserstein,
}


def low_rank(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(seed)
    shared = rng.standard_normal((50, 3))
    x, y = (shared @ rng.standard_normal((3, 8)) + 0.5 * rng.standard_normal((50, 2)) @ rng.standard_normal((2, 8))
            for _ in "xy")  # fmt: skip
    return torch.from_numpy(x), torch.from_numpy(y)


@pytest.mark.parametrize("measure", FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_of_every_type(measure: str, dtype: torch.dtype) -> None:
    x, y = (side.to(dtype) for side in low_rank())
    found = cp.compare({"x": x, "y": y}, measures=measure, batch_size=50).values[0, 1]
    # CKA multiplies in float32; all others compute in float64.
    assert found == pytest.approx(FUNCTIONS[measure](x, y), abs=1e-6 if measure.startswith("cka") else 1e-9)


@pytest.mark.parametrize("measure", FUNCTIONS)
@pytest.mark.parametrize("scale", [1e-200, 1e150])
def test_of_every_scale(measure: str, scale: float) -> None:
    x, y = (side.numpy() for side in low_rank())
    truth = FUNCTIONS[measure](x, y)
    assert FUNCTIONS[measure](x * scale, y * scale) == pytest.approx(truth, abs=1e-9)
    found = cp.compare({"x": x * scale, "y": y * scale}, measures=measure, batch_size=25)
    plain = cp.compare({"x": x, "y": y}, measures=measure, batch_size=25)
    np.testing.assert_allclose(found.values, plain.values, atol=1e-9)
    np.testing.assert_allclose(found.std_error, plain.std_error, atol=1e-9)


def test_float64_features_are_not_rounded() -> None:
    x, y = (side.numpy() + 1e6 for side in low_rank())
    found = cp.compare({"x": x, "y": y}, measures="procrustes").values[0, 1]
    assert found == pytest.approx(cp.procrustes(x, y), abs=1e-12)


def test_whole_numbers_are_not_rounded() -> None:
    x, y = np.random.default_rng(0).integers(0, 9, (2, 40, 3)) + 2**28
    found = cp.compare({"x": x, "y": y}, measures="procrustes").values[0, 1]
    assert found == pytest.approx(cp.procrustes(x, y), abs=1e-9)


def test_a_constant_feature_keeps_its_unit_beside_one_of_any_scale() -> None:
    x, z = np.random.default_rng(0).normal(size=(2, 40, 3))
    x[:, 2], z[:, 2] = 7, np.linspace(3, 12, 40)
    columns = np.array([1e-200, 1e150, 1])
    for function in (cp.mmd, cp.energy_distance, cp.wasserstein):
        assert function(x * columns, z * columns) == pytest.approx(function(x, z), rel=1e-12)


@pytest.mark.parametrize(
    "function",
    [cp.linear_cka, cp.rbf_cka, cp.rsa, cp.mean_cca, cp.svcca, cp.pwcca, cp.procrustes, cp.mutual_knn],
)
def test_a_layer_with_itself_exceeds_1_by_no_more_than_round_off(function: Callable[[Any, Any], float]) -> None:
    for seed in range(20):
        x = np.random.default_rng(seed).normal(size=(40, 6))
        assert abs(function(x, x) - 1) < 4e-15


def test_the_distance_of_equal_examples_is_0() -> None:
    x = np.eye(5)[np.random.default_rng(0).integers(0, 5, 40)]
    z = np.eye(5)[np.random.default_rng(1).integers(0, 5, 40)]
    distances = np.sqrt(2) * np.array([(a.argmax(1)[:, None] != b.argmax(1)) for a, b in ((x, x), (z, z), (x, z))])
    off = ~np.eye(40, dtype=bool)
    truth = 2 * distances[2][off].mean() - distances[0][off].mean() - distances[1][off].mean()
    assert cp.energy_distance(x, z, standardize=False) == pytest.approx(truth, abs=1e-13)
    moved = x @ np.linalg.qr(np.random.default_rng(2).normal(size=(5, 5)))[0]
    assert cp.energy_distance(moved, moved[::-1], debiased=False, standardize=False) == pytest.approx(0, abs=1e-13)
