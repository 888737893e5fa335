"""The Mantel test (Mantel 1967): Pearson's r of two RDMs, and whether it could come from unrelated examples."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, NamedTuple

import numpy as np

from cka_probe.errors import FeatureError
from cka_probe.estimation.arrays import Array
from cka_probe.estimation.collected import Collected
from cka_probe.estimation.measure import About, Measure, Setup
from cka_probe.measures.rdms import Rdm, RdmStatistic, permuted_pairs
from cka_probe.measures.rsa import RSA, paired_rdms, pearson, rsa
from cka_probe.runtime.ranges import Range

PERMUTATIONS = 999

_ROUND_OFF = 1e-12  # of a correlation: a permutation that changes nothing reaches it


@dataclass(frozen=True)
class Mantel(Measure):
    """Pearson's r of two RDMs, always with a permutation test: see `mantel`.

    Attributes:
        permutations: of the test.
        rdm: the dissimilarity of two examples.
    """

    name = "mantel"
    about = About(
        "Mantel r",
        invariant_to=RSA.about.invariant_to,
        source="Mantel 1967",
        zero_by_chance=True,
        fisher_interval=True,
    )

    permutations: Annotated[int, Range(1, 10**6, whole=True)] = PERMUTATIONS
    rdm: Rdm = "correlation"

    @property
    def description(self) -> str:
        """The title, the RDM and the permutations."""
        return f"{self.about.title}, {self.rdm} RDM, {self.permutations:,} permutations"

    def __call__(self, x: Array, y: Array) -> float:
        """Mantel's r alone."""
        return rsa(x, y, rdm=self.rdm, comparison="pearson")

    def start(self, setup: Setup) -> Collected:
        """Of many layers: see `RdmStatistic`."""
        requests = replace(setup.requests, permutations=self.permutations)
        return Collected(replace(setup, requests=requests), RdmStatistic(self.rdm, "pearson", setup.store.scratch))


class MantelTest(NamedTuple):
    """Mantel's r, and its one-sided p-value."""

    r: float
    p_value: float


def mantel(
    x: Array, y: Array, *, rdm: Rdm = "correlation", permutations: int = PERMUTATIONS, seed: int = 0
) -> MantelTest:
    """Pearson's r of two RDMs, and the p-value of a permutation test of r > 0.

    The examples of y are permuted, rows and columns of its RDM together, as dissimilarities that share an example are
    not independent. With c of P permutations that reach r, p = (c + 1)/(P + 1).

    Args:
        x: as in `cka_probe.rsa`.
        y: as in `cka_probe.rsa`.
        rdm: as in `cka_probe.rsa`.
        permutations: P, at least 1.
        seed: of the permutations.

    Returns:
        r in [-1, 1], and p in [1/(P + 1), 1].

    Raises:
        FeatureError: as in `cka_probe.rsa`; or there are no permutations.
    """
    if permutations < 1:
        raise FeatureError(f"The Mantel test needs at least 1 permutation, but got {permutations}.")
    first, second = paired_rdms(x, y, rdm)
    found = pearson(first, second)
    rng = np.random.default_rng(seed)
    examples = int(np.sqrt(2 * len(first))) + 1
    reached = 0
    for _ in range(permutations):
        moved = permuted_pairs(rng.permutation(examples))
        reached += pearson(first, second[moved]) >= found - _ROUND_OFF
    return MantelTest(found, (reached + 1) / (permutations + 1))
