"""The analysis of the study of stages: does a stage's CKA say what an exit branch there is worth?

    python -m benchmarks.stage_effects

simulates how often the analysis finds a relation of a given strength, and how often one where there is none.
``reports/stage-choice/PROTOCOL.md`` says what the functions answer; ``stage_choice.py`` makes the runs, and
``stage_page.py`` the tables and figures.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, permutations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata, t

OUT = Path(__file__).resolve().parent.parent / "reports" / "stage-choice"
STAGES = 4
ALL = tuple(range(1, STAGES + 1))
PAIRS: tuple[tuple[int, ...], ...] = tuple(combinations(ALL, 2))
ARMS: tuple[tuple[int, ...], ...] = ((), ALL, *PAIRS)
"""The half fraction of the 2⁴ subsets, of even size: no main effect is mixed with an interaction of two stages."""

LEAST_LEAD = 0.1
"""By which a teacher must beat the student without a teacher on the validation images."""


class Arm(NamedTuple):
    """The stages that have a branch, and the weight of each branch."""

    stages: tuple[int, ...]
    weight: float

    def __str__(self) -> str:
        return ",".join(map(str, self.stages)) or "none"


WEIGHT = 2.0
"""Of a branch: what the product gives each of two branches."""

ALL_SHARED = Arm(ALL, 1.0)
"""All branches with the product's weights, whose sum does not depend on the number of branches."""

RUNS = (*(Arm(stages, WEIGHT) for stages in ARMS), ALL_SHARED)

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
    return _correlation(double_centred(effects), double_centred(rankdata(scores, axis=1)))


def _correlation(x: Matrix, y: Matrix) -> float:
    """Of two centred tables; 0 where one is constant."""
    scale = np.linalg.norm(x) * np.linalg.norm(y)
    return float(np.sum(x * y) / scale) if scale > 1e-12 else 0.0


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
        found.append(_correlation(*(double_centred(by_seed[list(part)].mean(0)) for part in (half, other))))
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


@dataclass(frozen=True)
class Pair:
    """All runs of a student with a teacher.

    Attributes:
        student: name.
        teacher: name.
        lead: of the teacher over the student without a teacher, on the validation images.
        teachers: top-1 of the teacher on the test images, in points.
        alone: the same of the student without a teacher, the mean over seeds.
        runs: of each seed that is complete, the row of each arm.
    """

    student: str
    teacher: str
    lead: float
    teachers: float
    alone: float
    runs: Mapping[int, Mapping[Arm, Mapping[str, Any]]]

    def top1(self, seed: int, arm: Arm) -> float:
        """In points, of the test images."""
        return 100 * float(self.runs[seed][arm]["top1"])

    def effects(self, seed: int) -> Matrix:
        """See `main_effects`."""
        return main_effects({stages: self.top1(seed, Arm(stages, WEIGHT)) for stages in ARMS})

    def scores(self, seed: int) -> Matrix:
        """The similarity of each stage to the teacher when the branches join, (4,)."""
        row = self.runs[seed][Arm((), WEIGHT)]
        return np.array([float(row[f"score_{stage}"]) for stage in ALL])


def rows_of(table: Path) -> list[dict[str, Any]]:
    """The runs that are done."""
    if not table.exists():
        return []
    with table.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def pairs_of(rows: Sequence[Mapping[str, Any]]) -> list[Pair]:
    """The pairs that have a complete seed, and whose teacher is better than the student by `LEAST_LEAD`."""
    runs: dict[tuple[str, str], dict[int, dict[Arm, Mapping[str, Any]]]] = {}
    alone: dict[str, list[Matrix]] = {}  # of each run top-1 of the validation and of the test images
    teachers: dict[str, Matrix] = {}
    for row in rows:
        if row["arm"] in ("teacher", "scratch"):
            accuracy = np.array([float(row["validation_top1"]), float(row["top1"])])
        if row["arm"] == "teacher":
            teachers[row["teacher"]] = accuracy
        elif row["arm"] == "scratch":
            alone.setdefault(row["student"], []).append(accuracy)
        else:
            stages = tuple(map(int, row["arm"].split(","))) if row["arm"] != "none" else ()
            seeds = runs.setdefault((row["student"], row["teacher"]), {})
            seeds.setdefault(int(row["seed"]), {})[Arm(stages, float(row["weight"]))] = row
    found = []
    for (student, teacher), seeds in sorted(runs.items()):
        complete = {seed: arms for seed, arms in sorted(seeds.items()) if set(arms) >= set(RUNS)}
        its, own = teachers[teacher], np.mean(alone[student], 0)
        lead = float(its[0] - own[0])
        if complete and lead >= LEAST_LEAD:
            found.append(Pair(student, teacher, lead, 100 * float(its[1]), 100 * float(own[1]), complete))
    return found


LEAST, MOST = "least similar two (auto: divergent)", "most similar two (auto: aligned)"
RULES = {
    LEAST: lambda scores: np.argsort(scores)[:2] + 1,
    MOST: lambda scores: np.argsort(scores)[2:] + 1,
    "first two": lambda scores: (1, 2),
    "last two": lambda scores: (3, 4),
    "all four": lambda scores: ALL,
    "none": lambda scores: (),
}
RIVALS = ((LEAST, MOST), (LEAST, "last two"), (LEAST, "all four"), (LEAST, "none"), (MOST, "all four"), (MOST, "none"))
"""Rules whose picks are compared: with the opposite rule, with depth alone, with all branches and with none."""


def chosen(rule: str, scores: Matrix) -> Arm:
    """The arm that a rule picks from the scores of the stages."""
    stages = tuple(sorted(int(stage) for stage in RULES[rule](scores)))
    return ALL_SHARED if stages == ALL else Arm(stages, WEIGHT)


def gains(pairs: Sequence[Pair], rule: str, rival: str | None = None) -> dict[str, float]:
    """By student, how much better a rule's pick is than another's: points, the mean over its runs.

    Args:
        pairs: of the study.
        rule: one of `RULES`.
        rival: another; None for the mean of all six pairs of stages.
    """
    found: dict[str, list[float]] = {}
    for pair in pairs:
        for seed in pair.runs:
            picks = [chosen(rival, pair.scores(seed))] if rival else [Arm(stages, WEIGHT) for stages in PAIRS]
            other = float(np.mean([pair.top1(seed, arm) for arm in picks]))
            pick = pair.top1(seed, chosen(rule, pair.scores(seed)))
            found.setdefault(pair.student, []).append(pick - other)
    return {student: float(np.mean(values)) for student, values in found.items()}


def mean_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float, float]:
    """Mean and Student's interval; from minus to plus infinity for one value.

    >>> mean_interval([1.0, 2.0, 3.0])  # doctest: +ELLIPSIS
    (2.0, -0.48..., 4.48...)
    """
    mean, count = float(np.mean(values)), len(values)
    if count < 2:
        return mean, -np.inf, np.inf
    reach = float(t.ppf((1 + level) / 2, count - 1)) * float(np.std(values, ddof=1)) / count**0.5
    return mean, mean - reach, mean + reach


def main() -> None:
    for correlation in (0.0, 0.3, 0.5, 0.7, 0.9):
        share = power(correlation)
        print(f"true correlation {correlation:.1f}: p ≤ 0.05 in {share:.0%} of 300 studies", flush=True)


if __name__ == "__main__":
    main()
