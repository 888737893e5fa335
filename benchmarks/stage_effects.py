"""The analysis of the study of stages: does a stage's CKA say what an exit branch there is worth?

    python -m benchmarks.stage_effects power

simulates how often the analysis finds a relation of a given strength, and how often one where there is none. The
functions are used by ``stage_choice.py``; `reports/stage-choice/PROTOCOL.md` says what they answer.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from itertools import combinations, permutations

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata, t

STAGES = 4
ARMS: tuple[tuple[int, ...], ...] = ((), (1, 2, 3, 4), *combinations(range(1, STAGES + 1), 2))
"""The half fraction of the 2⁴ subsets, of even size: no main effect is mixed with an interaction of two stages."""

Matrix = NDArray[np.float64]


def main_effects(top1: Mapping[tuple[int, ...], float]) -> Matrix:
    """What a branch at each stage is worth: the mean of the arms that have it minus that of those that have not, (4,).

    Args:
        top1: of each of `ARMS`, in points.
    """
    return np.array([_mean(top1, stage, has=True) - _mean(top1, stage, has=False) for stage in range(1, STAGES + 1)])


def _mean(top1: Mapping[tuple[int, ...], float], stage: int, *, has: bool) -> float:
    return float(np.mean([top1[arm] for arm in ARMS if (stage in arm) is has]))


def double_centred(values: Matrix) -> Matrix:
    """What is left of a table (pairs, stages) after the mean of each pair and that of each stage."""
    return values - values.mean(1, keepdims=True) - values.mean(0, keepdims=True) + values.mean()


def relation(effects: Matrix, scores: Matrix) -> float:
    """The correlation of effects with ranks of scores within pairs, both double-centred; 0 where one is constant.

    Args:
        effects: (pairs, stages).
        scores: (pairs, stages), the similarity of each stage to the teacher.
    """
    x, y = double_centred(effects).ravel(), double_centred(rankdata(scores, axis=1)).ravel()
    scale = np.linalg.norm(x) * np.linalg.norm(y)
    return float(x @ y / scale) if scale > 1e-12 else 0.0


def p_value(effects: Matrix, scores: Matrix, students: Sequence[str], teachers: Sequence[str]) -> float:
    """Two-sided p of `relation`, by giving each student the scores of another one, with both teachers at once.

    Args:
        effects: (pairs, stages).
        scores: (pairs, stages).
        students: of each pair.
        teachers: of each pair; all students have the same ones.
    """
    names = list(dict.fromkeys(students))
    place = {pair: row for row, pair in enumerate(zip(students, teachers, strict=True))}
    found = abs(relation(effects, scores))
    count = hits = 0
    for order in permutations(names):
        other = dict(zip(names, order, strict=True))
        rows = [place[other[student], teacher] for student, teacher in zip(students, teachers, strict=True)]
        count += 1
        hits += abs(relation(effects, scores[rows])) >= found - 1e-12
    return hits / count


def interval(effects: Matrix, scores: Matrix, students: Sequence[str], level: float = 0.95) -> tuple[float, float]:
    """Of `relation`: the jackknife over students, on Fisher's z, with Student's t.

    Args:
        effects: (pairs, stages).
        scores: (pairs, stages).
        students: of each pair, three or more.
        level: of the interval.
    """
    names, of = list(dict.fromkeys(students)), np.array(students)
    whole = float(np.arctanh(np.clip(relation(effects, scores), -1 + 1e-9, 1 - 1e-9)))
    left = [relation(effects[of != name], scores[of != name]) for name in names]
    z = len(names) * whole - (len(names) - 1) * np.arctanh(np.clip(left, -1 + 1e-9, 1 - 1e-9))
    reach = float(t.ppf((1 + level) / 2, len(names) - 1)) * float(np.std(z, ddof=1)) / np.sqrt(len(names))
    low, high = np.tanh([z.mean() - reach, z.mean() + reach])
    return float(low), float(high)


def reliability(by_seed: NDArray[np.float64]) -> float:
    """How well the effects repeat: the mean correlation of halves of the seeds, double-centred, raised to all seeds.

    Args:
        by_seed: (seeds, pairs, stages).
    """
    seeds = range(len(by_seed))
    halves = [half for half in combinations(seeds, len(by_seed) // 2) if len(half) * 2 < len(by_seed) or 0 in half]
    found = []
    for half in halves:
        other = [seed for seed in seeds if seed not in half]
        x, y = (double_centred(by_seed[list(part)].mean(0)).ravel() for part in (half, other))
        found.append(np.corrcoef(x, y)[0, 1])
    mean = float(np.mean(found))
    return 2 * mean / (1 + mean)


def simulated(
    rng: np.random.Generator,
    strength: float,
    *,
    students: int = 5,
    teachers: int = 2,
    seeds: int = 2,
    noise: float = 0.6,
) -> tuple[Matrix, Matrix, list[str], list[str]]:
    """Effects and scores of a study, with a trend of both with depth and with strong teachers.

    Args:
        rng: draws them.
        strength: correlation of the true effect with the score, after the trends, from -1 to 1.
        students: how many.
        teachers: how many.
        seeds: of each arm.
        noise: standard deviation of an arm's top-1 between seeds, in points.
    """
    depth = np.linspace(-1, 1, STAGES)
    names = [(f"student {s}", f"teacher {t}") for s in range(students) for t in range(teachers)]
    own = np.repeat(rng.normal(size=(students, STAGES)), teachers, 0)  # a student's profile is much the same for both
    profile = 0.9 * own + 0.45 * rng.normal(size=(len(names), STAGES))
    scores = 2 * depth + profile
    true = strength * profile + np.sqrt(1 - strength**2) * np.repeat(rng.normal(size=(students, STAGES)), teachers, 0)
    error = noise * np.sqrt(2 / (len(ARMS) / 2) / seeds)
    effects = depth + 0.5 * true + rng.normal(size=(len(names), 1)) + error * rng.normal(size=true.shape)
    return effects, scores, [student for student, _ in names], [teacher for _, teacher in names]


def power(strength: float, studies: int = 300, *, seed: int = 0, level: float = 0.05) -> float:
    """Share of simulated studies whose p is at most ``level``."""
    rng = np.random.default_rng(seed)
    return float(np.mean([p_value(*simulated(rng, strength)) <= level for _ in range(studies)]))


if __name__ == "__main__":
    if sys.argv[1:] != ["power"]:
        sys.exit(__doc__)
    for correlation in (0.0, 0.3, 0.5, 0.7, 0.9):
        print(f"true correlation {correlation:.1f}: p ≤ 0.05 in {power(correlation):.0%} of 300 studies", flush=True)
