"""Reference values: the papers' formulas in float64 NumPy, with loops and traces, and nothing of cka_probe in them."""

from __future__ import annotations

from collections.abc import Sequence
from math import exp, sqrt

import numpy as np
from numpy.typing import ArrayLike, NDArray

Matrix = NDArray[np.float64]


def linear_gram(x: ArrayLike) -> Matrix:
    """⟨xᵢ - x₀, xⱼ - x₀⟩: HSIC does not see a translation, and subtracting a row (not a mean) is exact in float64."""
    rows = np.asarray(x, dtype=np.float64)
    moved = rows - rows[0]
    return np.asarray(moved @ moved.T)


def distance(first: Matrix, second: Matrix) -> float:
    return sqrt(sum((a - b) ** 2 for a, b in zip(first.tolist(), second.tolist(), strict=True)))


def squared_bandwidth(x: ArrayLike, *, threshold: float = 1.0, median: str = "off-diagonal") -> float:
    """σ² by the text of Kornblith et al. (2019), or by their notebook, which leaves the zeros of the diagonal in."""
    rows = np.asarray(x, dtype=np.float64)
    n = len(rows)
    if median == "off-diagonal":
        between = [distance(rows[i], rows[j]) for i in range(n) for j in range(n) if i != j]
        return float((threshold * np.median(between)) ** 2)
    every = [distance(rows[i], rows[j]) ** 2 for i in range(n) for j in range(n)]
    return float(threshold**2 * np.median(every))


def rbf_gram(
    x: ArrayLike, *, threshold: float = 1.0, median: str = "off-diagonal", sigma_squared: float | None = None
) -> Matrix:
    """exp(-d²/2σ²), with σ² by the median rule where it is not given."""
    rows = np.asarray(x, dtype=np.float64)
    if sigma_squared is None:
        sigma_squared = squared_bandwidth(rows, threshold=threshold, median=median)
    return np.array([[exp(-(distance(a, b) ** 2) / (2 * sigma_squared)) for b in rows] for a in rows])


def double_centered(gram: ArrayLike) -> Matrix:
    k = np.asarray(gram, dtype=np.float64)
    n = len(k)
    h = np.eye(n) - np.ones((n, n)) / n
    return h @ k @ h


def u_centered(gram: ArrayLike) -> Matrix:
    """Székely & Rizzo (2014), definition 2, entry by entry."""
    k = np.asarray(gram, dtype=np.float64).copy()
    np.fill_diagonal(k, 0)
    n = len(k)
    centered = np.zeros((n, n))
    for i in range(n):
        for j in range(n):
            if i != j:
                rows = k[i].sum() / (n - 2) + k[:, j].sum() / (n - 2)
                centered[i, j] = k[i, j] - rows + k.sum() / ((n - 1) * (n - 2))
    return centered


def biased_hsic(gram: ArrayLike, other: ArrayLike) -> float:
    """Gretton et al. (2005): tr(KHLH) / (n - 1)²."""
    k, l = np.asarray(gram, dtype=np.float64), np.asarray(other, dtype=np.float64)
    n = len(k)
    h = np.eye(n) - np.ones((n, n)) / n
    return float(np.trace(k @ h @ l @ h)) / (n - 1) ** 2


def unbiased_hsic(gram: ArrayLike, other: ArrayLike) -> float:
    """Song et al. (2012), equation 5, with zero diagonals."""
    k, l = (np.asarray(matrix, dtype=np.float64).copy() for matrix in (gram, other))
    np.fill_diagonal(k, 0)
    np.fill_diagonal(l, 0)
    n = len(k)
    one = np.ones(n)
    trace = np.trace(k @ l)
    sums = (one @ k @ one) * (one @ l @ one) / ((n - 1) * (n - 2))
    mixed = 2 / (n - 2) * (one @ k @ l @ one)
    return float(trace + sums - mixed) / (n * (n - 3))


def cka(gram: ArrayLike, other: ArrayLike, *, debiased: bool) -> float:
    hsic = unbiased_hsic if debiased else biased_hsic
    return hsic(gram, other) / sqrt(hsic(gram, gram) * hsic(other, other))


def inner_product(gram: ArrayLike, other: ArrayLike, *, debiased: bool) -> float:
    """HSIC without its division: what a batch of n examples adds to the sums of the minibatch form."""
    n = len(np.asarray(gram))
    if debiased:
        return n * (n - 3) * unbiased_hsic(gram, other)
    return (n - 1) ** 2 * biased_hsic(gram, other)


def minibatch_cka(grams: Sequence[Matrix], others: Sequence[Matrix], *, debiased: bool) -> float:
    """Nguyen et al. (2021), equation 4: a ratio of sums over the batches."""
    cross = own = other_own = 0.0
    for k, l in zip(grams, others, strict=True):
        cross += inner_product(k, l, debiased=debiased)
        own += inner_product(k, k, debiased=debiased)
        other_own += inner_product(l, l, debiased=debiased)
    return cross / sqrt(own * other_own)


def minibatch_std_error(grams: Sequence[Matrix], others: Sequence[Matrix], *, debiased: bool) -> float:
    """√(m/(m - 1) · Σ e_b²) with e_b = N_b/D - R·(A_b/A + B_b/B)/2, batch by batch."""
    batches = list(zip(grams, others, strict=True))
    cross = [inner_product(k, l, debiased=debiased) for k, l in batches]
    own = [inner_product(k, k, debiased=debiased) for k, _ in batches]
    other_own = [inner_product(l, l, debiased=debiased) for _, l in batches]
    norm = sqrt(sum(own) * sum(other_own))
    ratio = sum(cross) / norm
    total = 0.0
    for n_b, a_b, b_b in zip(cross, own, other_own, strict=True):
        total += (n_b / norm - ratio * (a_b / sum(own) + b_b / sum(other_own)) / 2) ** 2
    return sqrt(len(batches) / (len(batches) - 1) * total)
