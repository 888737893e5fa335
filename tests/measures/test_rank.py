"""Canonical correlations of features whose rank is lower than their width: the cut knows how precise they are."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import cka_probe as cp

Matrix = NDArray[np.float64]
TYPES = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 5e-3}


def bottleneck(examples: int = 200, rank: int = 4, seed: int = 0) -> tuple[Matrix, Matrix, Matrix]:
    """Two views of a bottleneck, and what they are of: (n, rank)."""
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(examples, rank))
    x = z @ rng.normal(size=(rank, 20))
    y = (z + 0.5 * rng.normal(size=(examples, rank))) @ rng.normal(size=(rank, 30))
    return x, y, z


def mean_correlation(x: Matrix, y: Matrix, rank: int) -> float:
    """Hotelling's, of the first so many principal directions."""
    bases = [np.linalg.svd(side - side.mean(0), full_matrices=False)[0][:, :rank] for side in (x, y)]
    return float(np.linalg.svd(bases[0].T @ bases[1], compute_uv=False).mean())


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("rank", [1, 4, 12])
def test_the_rank_is_that_of_the_bottleneck_in_every_type(
    dtype: torch.dtype, rank: int, caplog: pytest.LogCaptureFixture
) -> None:
    x, y, _ = bottleneck(rank=rank)
    sides = [torch.from_numpy(side).to(dtype) for side in (x, y)]
    truth = mean_correlation(x, y, rank)
    assert cp.mean_cca(*sides) == pytest.approx(truth, abs=TYPES[dtype])
    assert cp.svcca(*sides, variance=1) == pytest.approx(truth, abs=TYPES[dtype])
    assert "rank" not in caplog.text


class Bottleneck(nn.Module):
    def __init__(self, weight: Matrix) -> None:
        super().__init__()
        self.up = nn.Linear(*weight.shape, bias=False)
        self.up.weight.data = torch.from_numpy(weight.T).float()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.up(x.flatten(1))
        return out


@pytest.mark.parametrize("amp", [False, True])
def test_a_network_under_autocast_has_the_rank_of_its_bottleneck(amp: bool) -> None:
    rng = np.random.default_rng(1)
    z = torch.from_numpy(rng.normal(size=(200, 4))).float().view(-1, 4, 1, 1)
    networks = {name: Bottleneck(rng.normal(size=(4, width))) for name, width in (("a", 20), ("b", 30))}
    found = cp.compare(networks, data=TensorDataset(z), examples=200, layers="up", measures="mean-cca", amp=amp)
    assert found.between("a", "b").values[0, 0] == pytest.approx(1, abs=1e-3)


def test_features_that_autocast_left_equal_are_constant() -> None:
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Linear(3, 3)
            self.last.weight.data = 1e-5 * torch.eye(3)
            self.last.bias.data = torch.ones(3)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.last(x.flatten(1))
            return out

    z = torch.randn(64, 3, 1, 1, generator=torch.Generator().manual_seed(0))
    options = {"data": TensorDataset(z), "examples": 64, "layers": "last", "measures": "procrustes"}
    assert np.isnan(cp.compare({"a": Shifted()}, amp=True, **options).values).all()
    assert not np.isnan(cp.compare({"a": Shifted()}, amp=False, **options).values).any()


def test_a_rank_that_is_not_clear_is_said(caplog: pytest.LogCaptureFixture) -> None:
    x, y, _ = bottleneck()
    rng = np.random.default_rng(2)
    for precision in np.finfo(np.float64).eps * 200 * np.geomspace(0.5, 2, 5) * np.linalg.svd(x - x.mean(0))[1][0]:
        x = x + precision * np.outer(*(v / np.linalg.norm(v) for v in (rng.normal(size=200), rng.normal(size=20))))
    with caplog.at_level(logging.WARNING):
        cp.mean_cca(x, y)
    assert "In x the rank of the features is not clear" in caplog.text
    assert "of the variance" in caplog.text
