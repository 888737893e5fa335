"""Is every measure what its definition says? Each function on arrays, and `compare`, against an outside opinion.

    pip install dcor POT rsatoolbox
    python benchmarks/validity.py --out benchmarks/validity.csv

The outside opinion is dcor, rsatoolbox, SciPy, scikit-learn or POT, or where there is none the definition in NumPy. It
takes the stored values as they are, scaled by a power of two, and computes in float64, dissimilarities and cosines in
NumPy's longdouble. What differs by less than 1e-14 there is a tie. A row has the largest difference over the seeds. A
value that one side has and the other calls undefined counts as infinite; "undefined" is how many both call so.
"""

from __future__ import annotations

import argparse
import csv
import logging
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial import procrustes as scipy_procrustes
from scipy.stats import kendalltau
from sklearn.metrics.pairwise import rbf_kernel

import cka_probe as cp

Matrix = NDArray[np.float64]
TYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}
NEIGHBOURS = 3
TIE = 1e-14

# kinds of input: x, y of the same examples, and z, another view of x


def ordinary(rng: np.random.Generator, examples: int = 60, widths: tuple[int, int] = (5, 8)) -> list[Matrix]:
    shared = rng.standard_normal((examples, 3))
    x, y = (shared @ rng.standard_normal((3, d)) + rng.standard_normal((examples, d)) for d in widths)
    return [x, y, 1.2 * x + 0.3 + 0.3 * rng.standard_normal(x.shape)]


def one_hot(rng: np.random.Generator) -> list[Matrix]:
    labels = rng.integers(0, 6, 60)
    noisy = [np.where(rng.random(60) < 0.6, labels, rng.integers(0, 6, 60)) for _ in "yz"]
    return [np.eye(6)[labels], np.eye(6)[noisy[0]] @ np.eye(6)[:, [0, 1, 2, 3, 3, 3]][:, :4], np.eye(6)[noisy[1]]]


def binary(rng: np.random.Generator) -> list[Matrix]:
    x = rng.integers(0, 2, (60, 6)).astype(float)
    flipped = [np.where(rng.random(x.shape) < 0.7, x, 1 - x) for _ in "yz"]
    return [x, flipped[0][:, :5], flipped[1]]


def duplicated(rng: np.random.Generator) -> list[Matrix]:
    first = rng.integers(0, 15, 60)
    return [side[first] for side in ordinary(rng, 15)]


def low_rank(rng: np.random.Generator) -> list[Matrix]:
    x, y, z = ordinary(rng, 60, (3, 3))
    maps = rng.standard_normal((3, 12)), rng.standard_normal((3, 10))
    return [x @ maps[0], y @ maps[1], z @ maps[0]]


def dead_rows(rng: np.random.Generator) -> list[Matrix]:
    return [np.maximum(side, 0) * (rng.random((60, 1)) > 0.3) for side in ordinary(rng)]


def dead_columns(rng: np.random.Generator) -> list[Matrix]:
    x, y, z = ordinary(rng, 60, (8, 8))
    for side in (x, y, z):
        side[:, 5:] = (0, 3, 1e-3)
    return [x, y, z]


def tailed(degrees: float) -> Callable[[np.random.Generator], list[Matrix]]:
    def draw(rng: np.random.Generator) -> list[Matrix]:
        shared, parts = rng.standard_t(degrees, (60, 3)), [rng.standard_t(degrees, (60, d)) for d in (5, 8, 5)]
        x, y = (shared @ rng.standard_normal((3, part.shape[1])) + part for part in parts[:2])
        return [x, y, x + parts[2]]

    return draw


def few(examples: int) -> Callable[[np.random.Generator], list[Matrix]]:
    return lambda rng: ordinary(rng, examples, (2, 2))


KINDS: dict[str, Callable[[np.random.Generator], list[Matrix]]] = {
    "ordinary": ordinary, "one-hot": one_hot, "binary": binary, "duplicated rows": duplicated, "low rank": low_rank,
    "dead rows": dead_rows, "dead columns": dead_columns, "t3": tailed(3), "Cauchy": tailed(1),
    "4 examples": few(4), "6 examples": few(6), "8 examples": few(8),
    "tiny scale": ordinary, "huge scale": ordinary, "large offset": ordinary,
}  # fmt: skip
SCALES = {
    "tiny scale": {"float64": 1e-200, "float32": 1e-30, "bfloat16": 1e-30},
    "huge scale": {"float64": 1e150, "float32": 1e30, "bfloat16": 1e30},
}
OFFSETS = {"float64": 1e6, "float32": 1e3, "bfloat16": 8.0}


def stored(kind: str, dtype: str, seed: int) -> list[torch.Tensor]:
    """x, y and z of a kind in a type."""
    sides = KINDS[kind](np.random.default_rng([seed, list(KINDS).index(kind)]))
    scale = SCALES.get(kind, {}).get(dtype, 1.0)
    offset = OFFSETS[dtype] if kind == "large offset" else 0.0
    return [torch.from_numpy(side * scale + offset).to(TYPES[dtype]) for side in sides]


# the outside opinions


def rank_of(x: Matrix, kind: str) -> int:
    return 3 if kind == "low rank" else int(np.linalg.matrix_rank(x - x.mean(0)))


def hsic(first: Matrix, second: Matrix) -> float:
    n = len(first)
    k, l = (gram - np.diag(np.diag(gram)) for gram in (first, second))
    one = np.ones(n)
    rest = (one @ k @ one) * (one @ l @ one) / ((n - 1) * (n - 2)) - 2 / (n - 2) * (one @ k @ l @ one)
    return float(((k * l).sum() + rest) / (n * (n - 3)))


def rbf_cka(x: Matrix, y: Matrix, _: str) -> float:
    grams = []
    for side in (x, y):
        distances = np.sqrt(squares(side))
        sigma = np.median(distances[np.triu_indices(len(side), 1)])
        if sigma == 0:
            return float("nan")
        grams.append(np.exp(-(distances**2) / (2 * sigma**2)))
    k, l = grams
    return float(hsic(k, l) / np.sqrt(hsic(k, k) * hsic(l, l)))


def dcor_cka(x: Matrix, y: Matrix, _: str) -> float:
    """Linear CKA is the distance correlation of squared distances."""
    import dcor

    return float(dcor.u_distance_correlation_sqr(x - x.mean(0), y - y.mean(0), exponent=2))


def dcor_cka_biased(x: Matrix, y: Matrix, _: str) -> float:
    import dcor

    return float(dcor.distance_correlation_sqr(x - x.mean(0), y - y.mean(0), exponent=2))


def squares(x: Matrix) -> Any:
    rows = x.astype(np.longdouble)
    return np.square(rows[:, None] - rows).sum(2)


def cosines(x: Any) -> Any:
    rows = x.astype(np.longdouble)
    with np.errstate(invalid="ignore"):
        rows = rows / np.sqrt(np.square(rows).sum(1, keepdims=True))
    return (rows[:, None] * rows).sum(2)


def dissimilarities(x: Matrix, rdm: str) -> Matrix:
    """Of all pairs, with ties that are equal."""
    if rdm == "euclidean":
        found = np.sqrt(squares(x))
    else:
        rows = x.astype(np.longdouble)
        found = 1 - cosines(rows - rows.mean(1, keepdims=True) if rdm == "correlation" else rows)
        if rdm == "correlation" and (np.ptp(x, axis=1) == 0).any():
            return np.full(1, np.nan)
    values = found[np.triu_indices(len(x), 1)]
    order = np.argsort(values)
    tolerance = TIE * (values.max() if rdm == "euclidean" else 1)
    group = np.cumsum(np.concatenate([[False], np.diff(values[order]) > tolerance]))
    means = np.bincount(group, values[order].astype(float)) / np.bincount(group)
    ties = np.empty(len(values))
    ties[order] = means[group]
    return ties


def rsa(rdm: str, method: str) -> Callable[[Matrix, Matrix, str], float]:
    def compared(x: Matrix, y: Matrix, _: str) -> float:
        from rsatoolbox import rdm as rdms

        sides = [dissimilarities(side, rdm) for side in (x, y)]
        if any(np.isnan(side).any() or np.ptp(side) == 0 for side in sides):
            return float("nan")
        if method == "kendall":
            return float(kendalltau(*sides).statistic)
        first, second = (rdms.RDMs(side[None]) for side in sides)  # type: ignore[attr-defined, no-untyped-call]
        return float(rdms.compare(first, second, method=method).item())  # type: ignore[attr-defined]

    return compared


def neighbours(x: Matrix) -> Matrix:
    """The share of each example in the neighbours of each, those that tie in equal shares."""
    found = np.nan_to_num(cosines(x), nan=0.0)
    np.fill_diagonal(found, -np.inf)
    shares = np.zeros(found.shape)
    for row, share in zip(found, shares, strict=True):
        last = np.sort(row)[-NEIGHBOURS]
        tied = abs(row - last) < TIE
        share[row > last + TIE] = 1
        share[tied] = (NEIGHBOURS - share.sum()) / tied.sum()
    return shares


def mutual_knn(x: Matrix, y: Matrix, _: str) -> float:
    return float((neighbours(x) * neighbours(y)).sum(1).mean() / NEIGHBOURS)


def directions(x: Matrix, kind: str, variance: float = 1.0) -> Matrix:
    left, values, _ = np.linalg.svd(x - x.mean(0), full_matrices=False)
    rank = rank_of(x, kind)
    if variance < 1:
        explained = np.cumsum(values[:rank] ** 2)
        rank = int(np.searchsorted(explained, variance * explained[-1])) + 1
    return left[:, :rank]


def mean_cca(x: Matrix, y: Matrix, kind: str) -> float:
    return float(np.linalg.svd(directions(x, kind).T @ directions(y, kind), compute_uv=False).mean())


def svcca(x: Matrix, y: Matrix, kind: str) -> float:
    return float(np.linalg.svd(directions(x, kind, 0.99).T @ directions(y, kind, 0.99), compute_uv=False).mean())


def pwcca(x: Matrix, y: Matrix, kind: str) -> float:
    basis = directions(x, kind)
    left, correlations, _ = np.linalg.svd(basis.T @ directions(y, kind), full_matrices=False)
    return float(np.average(correlations, weights=np.abs((basis @ left).T @ (x - x.mean(0))).sum(1)))


def procrustes(x: Matrix, y: Matrix, _: str) -> float:
    width = max(x.shape[1], y.shape[1])
    padded = [np.pad(side, ((0, 0), (0, width - side.shape[1]))) for side in (x, y)]
    return float(np.sqrt(1 - scipy_procrustes(*padded)[2]))


def standardized(x: Matrix, z: Matrix) -> tuple[Matrix, Matrix]:
    both = np.concatenate([x, z])
    mean, deviation = both.mean(0), both.std(0)
    deviation = np.where(deviation > 1e-14 * abs(both).max(0), deviation, 1)
    return (x - mean) / deviation, (z - mean) / deviation


def u_statistic(kernels: list[Matrix]) -> float:
    h = kernels[0] + kernels[1] - kernels[2] - kernels[2].T
    n = len(h)
    return float((h.sum() - np.trace(h)) / (n * (n - 1)))


def mmd(x: Matrix, z: Matrix, _: str) -> float:
    first, second = standardized(x, z)
    both = np.sqrt(squares(np.concatenate([first, second])))
    sigma = float(np.median(both[np.triu_indices(len(both), 1)]))
    if sigma == 0:
        return float("nan")
    pairs = ((first, first), (second, second), (first, second))
    return u_statistic([rbf_kernel(a, b, gamma=1 / (2 * sigma**2)) for a, b in pairs])


def energy(x: Matrix, z: Matrix, _: str) -> float:
    both = np.sqrt(squares(np.concatenate(standardized(x, z)))).astype(float)
    n = len(x)
    return -u_statistic([both[:n, :n], both[n:, n:], both[:n, n:]])


def energy_biased(x: Matrix, z: Matrix, _: str) -> float:
    import dcor

    return float(dcor.energy_distance(*standardized(x, z)))


def wasserstein(x: Matrix, z: Matrix, _: str) -> float:
    import ot  # type: ignore[import-untyped]

    return float(np.mean(ot.wasserstein_1d(*standardized(x, z))))


Opinion = Callable[[Matrix, Matrix, str], float]
SAME: dict[str, tuple[Callable[[Any, Any], float], Opinion, str]] = {
    "cka": (cp.linear_cka, dcor_cka, "dcor"),
    "cka:biased": (lambda x, y: cp.linear_cka(x, y, debiased=False), dcor_cka_biased, "dcor"),
    "cka-rbf": (cp.rbf_cka, rbf_cka, "definition"),
    "rsa": (cp.rsa, rsa("correlation", "spearman"), "rsatoolbox"),
    "rsa:cosine:pearson": (
        lambda x, y: cp.rsa(x, y, rdm="cosine", comparison="pearson"), rsa("cosine", "corr"), "rsatoolbox",
    ),
    "rsa:euclidean:kendall": (
        lambda x, y: cp.rsa(x, y, rdm="euclidean", comparison="kendall"), rsa("euclidean", "kendall"), "SciPy",
    ),
    "rsa:euclidean": (lambda x, y: cp.rsa(x, y, rdm="euclidean"), rsa("euclidean", "spearman"), "rsatoolbox"),
    "mantel:1": (lambda x, y: cp.mantel(x, y, permutations=1).r, rsa("correlation", "corr"), "rsatoolbox"),
    "mutual-knn:3": (lambda x, y: cp.mutual_knn(x, y, neighbours=NEIGHBOURS), mutual_knn, "definition"),
    "mean-cca": (cp.mean_cca, mean_cca, "definition"),
    "svcca": (cp.svcca, svcca, "definition"),
    "pwcca": (cp.pwcca, pwcca, "definition"),
    "procrustes": (cp.procrustes, procrustes, "SciPy"),
    "procrustes angle": (cp.procrustes_angle, lambda x, y, k: float(np.arccos(procrustes(x, y, k))), "SciPy"),
}  # fmt: skip
VIEWS: dict[str, tuple[Callable[[Any, Any], float], Opinion, str]] = {
    "mmd": (cp.mmd, mmd, "scikit-learn"),
    "energy": (cp.energy_distance, energy, "definition"),
    "energy, biased": (lambda x, z: cp.energy_distance(x, z, debiased=False), energy_biased, "dcor"),
    "wasserstein": (cp.wasserstein, wasserstein, "POT"),
}


def exact(side: torch.Tensor, scale: float) -> Matrix:
    return side.double().numpy() * scale


def value(function: Callable[..., float], *arguments: Any) -> float:
    """The value; NaN where it is undefined."""
    try:
        return float(function(*arguments))
    except cp.CkaProbeError:
        return float("nan")


def compared(x: torch.Tensor, y: torch.Tensor, spec: str) -> float:
    found = cp.compare({"x": x, "y": y}, measures=spec, batch_size=len(x))
    return float(found.values[0, 1])


def difference(found: float, truth: float) -> float:
    if np.isnan(found) or np.isnan(truth):
        return 0.0 if np.isnan(found) and np.isnan(truth) else float("inf")
    return abs(found - truth)


def rows(kind: str, dtype: str, seeds: int) -> list[dict[str, Any]]:
    """The largest differences of all measures on a kind of input in a type."""
    largest: dict[tuple[str, str, str], list[float]] = {}
    undefined: dict[tuple[str, str, str], int] = {}
    for seed in range(seeds):
        x, y, z = stored(kind, dtype, seed)
        for table, other in ((SAME, y), (VIEWS, z)):
            scales = [2.0 ** -np.frexp(side.double().abs().max().item())[1] for side in (x, other)]
            scales = scales if table is SAME else [min(scales)] * 2
            first, second = exact(x, scales[0]), exact(other, scales[1])
            for name, (function, opinion, source) in table.items():
                truth = opinion(first, second, kind)
                found = {"function": (value(function, x, other), truth)}
                if name == "pwcca":
                    truth = (truth + opinion(second, first, kind)) / 2
                if " " not in name:
                    found["compare"] = (value(compared, x, other, name), truth)
                for way, pair in found.items():
                    key = (name, way, source)
                    largest.setdefault(key, []).append(difference(*pair))
                    undefined[key] = undefined.get(key, 0) + int(np.isnan(pair).all())
    return [
        {
            "measure": name, "way": way, "against": source, "kind": kind, "type": dtype, "seeds": seeds,
            "largest_difference": f"{max(found):.1e}", "undefined": undefined[name, way, source],
        }
        for (name, way, source), found in largest.items()
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--types", default=",".join(TYPES))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    found = []
    for kind in options.kinds.split(","):
        for dtype in options.types.split(","):
            part = rows(kind, dtype, options.seeds)
            found += part
            large = [f"{row['measure']} ({row['way']})" for row in part if float(row["largest_difference"]) > 1e-7]
            print(f"{kind}, {dtype}: above 1e-7: {', '.join(large) or 'none'}", file=sys.stderr, flush=True)
    file = options.out.open("w", newline="") if options.out else sys.stdout
    writer = csv.DictWriter(file, list(found[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(found)


if __name__ == "__main__":
    main()
