"""Representational similarity analysis (Kriegeskorte et al. 2008): the correlation of two RDMs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

import numpy as np

from cka_probe.errors import FeatureError, SpecError
from cka_probe.estimation.arrays import Array, Matrix, paired_matrices
from cka_probe.estimation.collected import Collected
from cka_probe.estimation.measure import About, Measure, Setup
from cka_probe.measures.rdms import EXACT_EXAMPLES, Comparison, Rdm, RdmStatistic, condensed_rdm


@dataclass(frozen=True)
class RSA(Measure):
    """The correlation of two RDMs: see `rsa`.

    Attributes:
        rdm: the dissimilarity of two examples.
        comparison: the correlation of the dissimilarities.
    """

    name = "rsa"
    about = About(
        "RSA",
        invariant_to="isotropic scaling; with euclidean also by orthogonal maps and translation, with cosine by "
        "orthogonal maps",
        source="Kriegeskorte et al. 2008",
        zero_by_chance=True,
        fisher_interval=True,
    )

    rdm: Rdm = "correlation"
    comparison: Comparison = "spearman"

    @property
    def description(self) -> str:
        """The title, the RDM and the correlation."""
        return f"{self.about.title}, {self.rdm} RDM, {self.comparison.capitalize()}"

    def __call__(self, x: Array, y: Array) -> float:
        """As `rsa`."""
        return rsa(x, y, rdm=self.rdm, comparison=self.comparison)

    def start(self, setup: Setup) -> Collected:
        """Of many layers: see `RdmStatistic`.

        Raises:
            SpecError: Kendall's τ of so many examples would take too long.
        """
        examples = setup.store.examples
        if self.comparison == "kendall" and examples > EXACT_EXAMPLES:
            raise SpecError(
                f"{self} takes at most {EXACT_EXAMPLES} images, because it sorts all pairs of images for each pair of "
                f"layers, but there are {examples:,}. Use --examples {EXACT_EXAMPLES}, or spearman: {RSA(self.rdm)}."
            )
        return Collected(setup, RdmStatistic(self.rdm, self.comparison, setup.store.scratch))


def rsa(x: Array, y: Array, *, rdm: Rdm = "correlation", comparison: Comparison = "spearman") -> float:
    """The correlation of the dissimilarities of all pairs of examples in x with those in y.

    Invariant to orthogonal maps and isotropic scaling of the features of either side with ``rdm="euclidean"`` and
    ``"cosine"``, and to translation with ``"euclidean"``; ``"correlation"``, which centers each example over its
    features, is invariant to neither rotation nor translation.

    Args:
        x: (n, d₁) features, an array or a tensor, n ≥ 4; computed in float64.
        y: (n, d₂) features of the same examples.
        rdm: the dissimilarity of two examples: ``"correlation"``, 1 - Pearson's r over the features; ``"cosine"``;
            ``"euclidean"``.
        comparison: Spearman's ρ, Kendall's τ-b or Pearson's r of the n (n - 1)/2 dissimilarities.

    Returns:
        The similarity, in [-1, 1].

    Raises:
        FeatureError: the arrays are not (n, d) with the same n ≥ 4 or not finite; all dissimilarities of a side are
            equal; or an example has features without a direction (all equal, or with ``"cosine"`` all 0).
    """
    from scipy.stats import kendalltau, rankdata

    _check(rdm, comparison)
    first, second = paired_rdms(x, y, rdm)
    if comparison == "kendall":
        return float(kendalltau(first, second).statistic)
    if comparison == "spearman":
        first, second = rankdata(first), rankdata(second)
    return pearson(first, second)


def paired_rdms(x: Array, y: Array, rdm: Rdm) -> tuple[Matrix, Matrix]:
    """The condensed RDMs of both, n (n - 1)/2 float64 each.

    Raises:
        FeatureError: as in `rsa`.
    """
    _check(rdm, "pearson")
    first, second = (condensed_rdm(features, rdm) for features in paired_matrices(x, y))
    for name, found in (("x", first), ("y", second)):
        if np.isnan(found).any():
            undefined = np.isnan(found)
            row, col = np.tril_indices(int(np.sqrt(2 * len(found))) + 1, -1)
            pairs = np.bincount(np.concatenate([row[undefined], col[undefined]]))
            what = "not all be 0" if rdm == "cosine" else "differ from each other"
            raise FeatureError(
                f"The features of each example of {name} must {what} for a {rdm} dissimilarity, but those of example "
                f"{int(pairs.argmax())} (from 0) do not. Leave it out, or use rdm='euclidean'."
            )
        if not np.ptp(found) > 1e-12 * found.max():
            raise FeatureError(f"The examples of {name} must differ by unequal amounts, but do not: RSA is undefined.")
    return first, second


def pearson(first: Matrix, second: Matrix) -> float:
    """Pearson's r of two vectors."""
    a, b = (values - values.mean() for values in (first, second))
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def _check(rdm: Rdm, comparison: Comparison) -> None:
    for what, given, known in (("RDM", rdm, Rdm), ("comparison of RDMs", comparison, Comparison)):
        if given not in get_args(known):
            raise FeatureError(f"The {what} must be one of {', '.join(get_args(known))}, but is {given!r}.")
