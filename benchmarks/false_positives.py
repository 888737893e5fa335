"""How often is p at most 0.05 if the layers are independent? Each permutation test, on pairs of independent layers.

    python benchmarks/false_positives.py --out benchmarks/false_positives.csv

A row is one test on one kind of features, drawn independently for the two layers; for a distance, two views of the same
distribution. ``mantel()`` is the function on arrays, all others are the p-values of a comparison. The share should be
at most 0.05, and less where the test has few different values; its error from 1,000 pairs is 0.007. Rows that the file
holds already are kept, so that the command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import csv
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

import cka_probe as cp
from cka_probe.estimation.gram import Features
from cka_probe.measures.catalogue import MEASURES
from cka_probe.probing.measuring import start_measures
from cka_probe.probing.options import Measuring
from cka_probe.results.similarity import Layer

LAYERS = (Layer("first", "layer"), Layer("second", "layer"))
EXAMPLES, PERMUTATIONS, WIDTH, NEIGHBOURS = 40, 99, 5, 5
LEVEL = 0.05
Matrix = NDArray[np.float64]


def normal(rng: np.random.Generator) -> Matrix:
    return rng.standard_normal((EXAMPLES, WIDTH))


def one_hot(rng: np.random.Generator) -> Matrix:
    return np.eye(WIDTH)[rng.integers(0, WIDTH, EXAMPLES)]


def dead(rng: np.random.Generator) -> Matrix:
    """After a ReLU; 30% of the examples are all 0."""
    return np.maximum(normal(rng), 0) * (rng.random((EXAMPLES, 1)) > 0.3)


def binary(rng: np.random.Generator) -> Matrix:
    return rng.integers(0, 2, (EXAMPLES, WIDTH)).astype(float)


def duplicated(rng: np.random.Generator) -> Matrix:
    """Of 12 different rows, the same in both views of a distance."""
    return np.random.default_rng(0).standard_normal((12, WIDTH))[rng.integers(0, 12, EXAMPLES)]


KINDS: dict[str, Callable[[np.random.Generator], Matrix]] = {
    "normal": normal, "one-hot": one_hot, "30% dead rows": dead, "binary": binary, "duplicated rows": duplicated,
}  # fmt: skip
TESTS = {name: name for name in MEASURES} | {
    "rsa": "rsa:euclidean", "mantel": f"mantel:euclidean:{PERMUTATIONS}", "mutual-knn": f"mutual-knn:{NEIGHBOURS}",
}  # fmt: skip


def p_value(spec: str, pair: tuple[Matrix, Matrix], seed: int) -> float:
    """Of two layers; NaN where the measure is undefined."""
    if spec == "mantel()":
        try:
            return cp.mantel(*pair, rdm="euclidean", permutations=PERMUTATIONS, seed=seed).p_value
        except cp.CkaProbeError:
            return float("nan")
    measuring = Measuring(measures=spec, permutations=PERMUTATIONS)
    (running,) = start_measures(LAYERS, EXAMPLES, measuring, seed=seed).values()
    for index, features in enumerate(pair):
        running.prepare(index, Features(torch.from_numpy(features)))
    running.update(0)
    found = running.compute().p_value
    assert found is not None
    return float(found[0, 1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measures", default=",".join([*TESTS, "mantel()"]))
    parser.add_argument("--pairs", type=int, default=1000)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    found = list(csv.DictReader(options.out.open(newline=""))) if options.out.exists() else []
    done = {(row["test"], row["features"], int(row["pairs"])) for row in found}
    for name in options.measures.split(","):
        spec = TESTS.get(name, name)
        for kind, draw in KINDS.items():
            if (spec, kind, options.pairs) in done:
                continue
            p = []
            for seed in range(options.pairs):
                rng = np.random.default_rng([2, seed])
                p.append(p_value(spec, (draw(rng), draw(rng)), seed))
            known = ~np.isnan(p)
            found.append({
                "test": spec, "features": kind, "pairs": str(options.pairs), "undefined": str((~known).sum()),
                "examples": str(EXAMPLES), "permutations": str(PERMUTATIONS),
                "share": f"{(np.array(p)[known] <= LEVEL).mean():.3f}" if known.any() else "",
            })  # fmt: skip
            print(found[-1], flush=True)
            with options.out.open("w", newline="") as file:
                writer = csv.DictWriter(file, list(found[0]), lineterminator="\n")
                writer.writeheader()
                writer.writerows(found)


if __name__ == "__main__":
    main()
