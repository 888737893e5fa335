"""Do the 95% intervals hold what they should? Each measure, on many independent samples from populations of its own.

    python benchmarks/intervals.py --out benchmarks/intervals.csv

The truth is what the measure tells on average of as many examples: its mean over all samples (for the unbiased ones,
CKA, MMD² and the energy distance, that is the value of the population). A row is one measure on one population: pairs
of representations of 8 and 12 features that share eight directions, weakly, halfway or closely, of normal numbers, or
halfway of Student's t with 3 degrees of freedom ("tails"); or two views, the second moved, by little or by much. The
error of a coverage of 95% from 1,000 samples is 0.7 points.
"""

from __future__ import annotations

import argparse
import csv
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from cka_probe.estimation.gram import Features
from cka_probe.measures.catalogue import MEASURES, about
from cka_probe.probing.measuring import start_measures
from cka_probe.probing.options import Measuring
from cka_probe.results.similarity import Layer, Similarity

LAYERS = (Layer("first", "layer"), Layer("second", "layer"))
BATCH = 64
SHARED = {"weak": 0.5, "half": 1.0, "close": 3.0, "tails": "t3"}
MOVED = {"little": 0.25, "much": 1.0}
Matrix = NDArray[np.float32]


def related(rng: np.random.Generator, examples: int, strength: float | str) -> tuple[Matrix, Matrix]:
    """Two representations with eight directions in common, from so many times the noise to a third of that."""

    def draw(width: int) -> NDArray[np.float64]:
        shape = (examples, width)
        return rng.standard_t(3, shape) if strength == "t3" else rng.standard_normal(shape)

    common = np.random.default_rng(0)  # the same population in every sample
    maps = [common.standard_normal((8, width)) / 2 for width in (8, 12)]
    shared = draw(8) * np.geomspace(1, 1 / 3, 8) * (1.0 if isinstance(strength, str) else strength)
    first, second = (shared @ one + draw(one.shape[1]) for one in maps)
    return first.astype(np.float32), second.astype(np.float32)


def moved(rng: np.random.Generator, examples: int, by: float) -> tuple[Matrix, Matrix]:
    """Two views of one representation: the second moved, stretched and blurred."""
    first = rng.standard_normal((examples, 8))
    second = first * (1 + by / 2) + by + by * rng.standard_normal((examples, 8))
    return first.astype(np.float32), second.astype(np.float32)


def measured(measure: str, pair: tuple[Matrix, Matrix]) -> tuple[float, float, float]:
    """The value and its interval."""
    examples = len(pair[0])
    (running,) = start_measures(LAYERS, examples, Measuring(measures=measure)).values()
    for start in range(0, examples, BATCH):
        for index, features in enumerate(pair):
            running.prepare(index, Features(torch.from_numpy(features[start : start + BATCH])))
        running.update(start)
    found = running.compute()
    parts = (part.numpy() for part in (found.values, found.std_error, found.null))
    batches = None if found.batches is None else found.batches.numpy()
    similarity = Similarity(*parts, LAYERS, LAYERS, measure, found.details, batches=batches)
    low, high = similarity.interval(0.95)
    return float(similarity.values[0, 1]), float(low[0, 1]), float(high[0, 1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measures", default=",".join(name for name in MEASURES if name != "mantel"))
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--examples", type=int, default=512)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    rows = []
    for name in options.measures.split(","):
        distance = not about(name).paired
        for population, strength in (MOVED if distance else SHARED).items():
            draw = moved if distance else related
            found = np.array([
                measured(name, draw(np.random.default_rng([1, sample]), options.examples, strength))
                for sample in range(options.samples)
            ])  # fmt: skip
            value, low, high = found.T
            covered = ((low <= value.mean()) & (value.mean() <= high)).mean()
            rows.append({
                "measure": name, "population": population, "examples": options.examples, "samples": options.samples,
                "mean": round(value.mean(), 5), "spread": round(value.std(ddof=1), 5),
                "half_width": round((high - low).mean() / 2, 5), "coverage": round(covered, 4),
            })  # fmt: skip
            print(rows[-1], flush=True)
    file = options.out.open("w", newline="") if options.out else sys.stdout
    writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)


if __name__ == "__main__":
    main()
