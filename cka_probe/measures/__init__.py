"""The measures of similarity: one a file, and the table of those that `compare` knows by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from cka_probe.features import Features
from cka_probe.measures import cca, energy, knn, linear_cka, mantel, mmd, procrustes, rbf_cka, rsa, wasserstein
from cka_probe.measures.collected import collected
from cka_probe.measures.estimates import Estimates
from cka_probe.world import World


class Measure(Protocol):
    """What takes the features of every layer batch by batch, and tells the similarities at the end."""

    def prepare(self, layer: int, features: Features) -> None: ...

    def update(self, first: int) -> None: ...

    def settle(self, world: World) -> None: ...

    def merge(self, world: World) -> None: ...

    def state(self, folder: Path) -> dict[str, Any]: ...

    def load(self, state: Mapping[str, Any], folder: Path, device: torch.device) -> None: ...

    def compute(self) -> Estimates: ...


MEASURES: dict[str, Callable[..., Measure]] = {
    "cka": linear_cka.streaming,
    "cka-biased": linear_cka.biased,
    "cka-rbf": rbf_cka.streaming,
    "rsa": collected(rsa.statistic),
    "mantel": collected(mantel.statistic),
    "mean-cca": collected(cca.mean_cca_statistic),
    "svcca": collected(cca.svcca_statistic),
    "pwcca": collected(cca.pwcca_statistic),
    "procrustes": collected(procrustes.statistic),
    "mutual-knn": collected(knn.statistic),
    "mmd": collected(mmd.statistic),
    "energy": collected(energy.statistic),
    "wasserstein": collected(wasserstein.statistic),
}
"""By name: a factory of (labels, seed=, asked=), and each of what it needs of debiased=, threshold=, median=, names=,
rdm=, rdm_comparison=, neighbours=, store=."""
