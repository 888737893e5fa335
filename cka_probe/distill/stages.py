"""Which stages of the student get an exit branch, from a Similarity: pure functions, each with scores and reasons.

A stage is scored by its best match: the teacher's layer that it is most similar to. A stage that matches nothing of
the teacher has diverged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from typing import Any, Literal

import numpy as np

from cka_probe.distill.knapsack import best_subset
from cka_probe.errors import FeatureError, SpecError
from cka_probe.results.similarity import Similarity
from cka_probe.runtime.ranges import listed

Rule = Literal["budget", "divergent", "aligned"]


@dataclass(frozen=True)
class StageScore:
    """What is known of one stage.

    Attributes:
        stage: its number, from 1.
        layer: its path in the student.
        match: the teacher's layer that it is most similar to; "" where the measure is not defined for the stage.
        similarity: to that layer; NaN where it is not defined.
        std_error: of the similarity; NaN where the data were one batch.
        parameters: of its branch.
    """

    stage: int
    layer: str
    match: str
    similarity: float
    std_error: float
    parameters: int

    @property
    def divergence(self) -> float:
        """1 - similarity."""
        return 1 - self.similarity


@dataclass(frozen=True)
class Choice:
    """The stages that a rule chose.

    Attributes:
        rule: its name.
        stages: their numbers, from 1, ascending.
        scores: of every stage, chosen or not.
        reasons: one sentence a stage.
        differ: whether some two similarities differ by more than their standard errors; where none do, the parameters
            of the branches alone have decided.
    """

    rule: str
    stages: tuple[int, ...]
    scores: tuple[StageScore, ...]
    reasons: tuple[str, ...]
    differ: bool = True

    def record(self) -> dict[str, Any]:
        """The choice as plain values, fit for YAML; a number that is not defined becomes None."""
        rows = []
        for score, reason in zip(self.scores, self.reasons, strict=True):
            row = {name: None if _undefined(value) else value for name, value in asdict(score).items()}
            rows.append({**row, "chosen": score.stage in self.stages, "reason": reason})
        return {"rule": self.rule, "chosen": list(self.stages), "scores_differ": self.differ, "stages": rows}


def parse_stages(text: str, count: int) -> tuple[int, ...] | None:
    """The numbers that ``--stages`` names: ``all``, ``none``, ``last``, ``1,3,4``; None for ``auto``.

    Args:
        text: as the user wrote it.
        count: stages that the student has.

    Raises:
        SpecError: it names no stage, or one that is not there.

    >>> parse_stages("1,3", 4), parse_stages("last", 4), parse_stages("auto", 4)
    ((1, 3), (4,), None)
    """
    if text == "auto":
        return None
    if text in ("all", "none", "last"):
        return {"all": tuple(range(1, count + 1)), "none": (), "last": (count,)}[text]
    parts = [part.strip() for part in text.split(",")]
    chosen = sorted({int(part) for part in parts if part.isdecimal()})
    if not chosen or not all(part.isdecimal() for part in parts) or chosen[0] < 1 or chosen[-1] > count:
        raise SpecError(
            f"The stages must be 'all', 'none', 'auto', 'last' or numbers from 1 to {count} (the student's stages) "
            f"with commas, but got {text!r}."
        )
    return tuple(chosen)


def score_stages(similarity: Similarity, layers: Sequence[str], parameters: Sequence[int]) -> tuple[StageScore, ...]:
    """The score of each stage.

    Args:
        similarity: rows are layers of the student, columns those of the teacher.
        layers: the path of each stage. Where the rows hold the last block of a stage in place of the stage
            (``layer1.1`` for ``layer1``), that is taken.
        parameters: of each stage's branch.

    Raises:
        SpecError: the rows hold nothing of a stage.
    """
    scores = []
    for number, (layer, cost) in enumerate(zip(layers, parameters, strict=True), 1):
        row = _row(similarity, layer)
        values = similarity.values[row]
        if np.isnan(values).all():
            scores.append(StageScore(number, layer, "", math.nan, math.nan, cost))
            continue
        best = int(np.nanargmax(values))
        match = similarity.cols[best].name
        error = float(similarity.std_error[row, best])
        scores.append(StageScore(number, layer, match, float(values[best]), error, cost))
    return tuple(scores)


def choose_stages(scores: Sequence[StageScore], rule: Rule, *, count: int = 2, budget: float = 0.6) -> Choice:
    """Choose stages by a rule; where no two similarities differ by more than their standard errors, all count as equal.

    Args:
        scores: of all stages.
        rule: ``"divergent"``: the ``count`` least similar to the teacher. ``"aligned"``: the most similar.
            ``"budget"``: the largest sum of divergence whose branches hold at most ``budget`` of the parameters of
            all branches (the cheapest stage alone where even that holds more). Of stages that are equal, all rules
            take the cheaper ones.
        count: stages to choose for the first two, 1 or more.
        budget: above 0, at most 1.

    Raises:
        FeatureError: the similarity is not defined for any stage.
    """
    usable = [score for score in scores if not math.isnan(score.similarity)]
    if not usable:
        raise FeatureError(
            "The similarity to the teacher must be defined for one stage at least, but all stages of the student are "
            "constant over the images. Check its weights, or name the stages with --stages."
        )
    differ = scores_differ(usable)
    mean = sum(score.similarity for score in usable) / len(usable)
    ranked = usable if differ else [replace(score, similarity=mean) for score in usable]
    chosen = tuple(sorted(score.stage for score in _RULES[rule](ranked, scores, count, budget)))
    reasons = tuple(_reason(score, score.stage in chosen, rule if differ else "equal", budget) for score in scores)
    return Choice(rule, chosen, tuple(scores), reasons, differ)


def scores_differ(scores: Sequence[StageScore]) -> bool:
    """Whether some two similarities differ by more than the standard error of their difference.

    The two are taken for independent. Without standard errors, any difference counts.
    """
    return len(scores) < 2 or any(
        abs(one.similarity - other.similarity) > math.hypot(*(_known(score.std_error) for score in (one, other)))
        for one, other in combinations(scores, 2)
    )


def exit_points(what: str, choice: Mapping[str, Any], measure: str, share: float | None = None) -> str:
    """The stages that were chosen, with layers and scores, as a sentence for the log.

    Args:
        what: stands at them: "Exit branches".
        choice: as `Choice.record` gives it; its stages may have no scores.
        measure: of the scores.
        share: of the parameters of all branches that those chosen have.

    >>> rows = [{"stage": 2, "layer": "blocks.2", "chosen": True, "similarity": 0.98, "std_error": 0.008}]
    >>> exit_points("Exit branches", {"stages": rows}, "CKA", 0.5)
    "Exit branches at stage 2 (blocks.2, CKA 0.980 ± 0.008), 50% of all branches' parameters."
    """
    if not any(row["chosen"] for row in choice["stages"]):
        return f"{what} at no stage."
    named, measure = [], f"{measure} "
    for row in choice["stages"]:
        if not row["chosen"]:
            continue
        score = ""
        if row.get("similarity") is not None:
            error = "" if row["std_error"] is None else f" ± {row['std_error']:.3f}"
            score, measure = f", {measure}{row['similarity']:.3f}{error}", ""
        named.append(f"{row['stage']} ({row['layer']}{score})")
    equal = "" if choice.get("scores_differ", True) else (
        " The scores of the stages do not differ by more than their standard errors: the parameters of the branches "
        "alone decided."
    )  # fmt: skip
    cost = "" if share is None else f", {share:.0%} of all branches' parameters"
    return f"{what} at stage{'s' if len(named) > 1 else ''} {listed(named)}{cost}.{equal}"


def match_layers(similarity: Similarity, layers: Sequence[str], among: Sequence[int] | None = None) -> list[str]:
    """A teacher's layer for each of the student's, in the same order of depth, with the largest sum of similarity.

    Args:
        similarity: rows are layers of the student, columns those of the teacher in forward order.
        layers: paths in the student, in forward order.
        among: the columns that may be matched, ascending; all where None.
    """
    cols = range(len(similarity.cols)) if among is None else among
    values = np.nan_to_num(similarity.values[np.ix_([_row(similarity, layer) for layer in layers], cols)], nan=-1.0)
    rows, columns = values.shape
    best = values[0].copy()  # best[j]: the largest sum of the rows so far, where the last one takes column j
    origin = np.zeros((rows, columns), dtype=int)
    for row in range(1, rows):
        for column in range(columns):
            origin[row, column] = int(np.argmax(best[: column + 1]))
        best = best[origin[row]] + values[row]
    path = [int(np.argmax(best))]
    for row in range(rows - 1, 0, -1):
        path.append(int(origin[row, path[-1]]))
    return [similarity.cols[cols[column]].name for column in reversed(path)]


def branch_weights(
    chosen: Sequence[int], total: int, own: Sequence[float] = (), weight: float = 1.0, *, absolute: bool = False
) -> list[float]:
    """The weight of each chosen branch: their sum is ``weight * total`` however many were chosen.

    Args:
        chosen: numbers of the stages.
        total: stages that the student has.
        own: relative weights, one a stage of the student; all equal where it is empty.
        weight: of one branch where all are chosen and equal.
        absolute: the weight of each branch is ``weight`` times its own, however many were chosen.

    >>> branch_weights([1, 4], 4), branch_weights([1, 4], 4, absolute=True)
    ([2.0, 2.0], [1.0, 1.0])
    """
    if own and len(own) != total:
        raise SpecError(f"--branch-weights must hold a number for each of the {total} stages, but got {list(own)}.")
    relative = [own[stage - 1] if own else 1.0 for stage in chosen]
    if any(value < 0 for value in relative) or sum(relative) <= 0:
        raise SpecError(f"--branch-weights of the chosen stages must be 0 or more, one above 0, but are {relative}.")
    scale = weight if absolute else weight * total / sum(relative)
    return [scale * value for value in relative]


_Select = Callable[[Sequence[StageScore], Sequence[StageScore], int, float], Sequence[StageScore]]


def _divergent(
    usable: Sequence[StageScore], _all: Sequence[StageScore], count: int, _budget: float
) -> Sequence[StageScore]:
    return sorted(usable, key=lambda score: (score.similarity, score.parameters))[:count]


def _aligned(
    usable: Sequence[StageScore], _all: Sequence[StageScore], count: int, _budget: float
) -> Sequence[StageScore]:
    return sorted(usable, key=lambda score: (-score.similarity, score.parameters))[:count]


def _budgeted(
    usable: Sequence[StageScore], scores: Sequence[StageScore], _count: int, budget: float
) -> Sequence[StageScore]:
    limit = budget * sum(score.parameters for score in scores)
    found = best_subset([score.divergence for score in usable], [score.parameters for score in usable], limit)
    return [usable[index] for index in found] or [min(usable, key=lambda score: score.parameters)]


_RULES: dict[str, _Select] = {"budget": _budgeted, "divergent": _divergent, "aligned": _aligned}


def _reason(score: StageScore, chosen: bool, rule: str, budget: float) -> str:
    if math.isnan(score.similarity):
        return "left out: constant over the images, so that its similarity is not defined"
    error = "" if math.isnan(score.std_error) else f" ± {score.std_error:.3f}"
    seen = f"its best match, {score.match}, has similarity {score.similarity:.3f}{error}"
    why = {
        "equal": "no two stages differ by more than their standard errors, so that the parameters alone decided",
        "divergent": "among the least similar" if chosen else "closer to the teacher than those chosen",
        "aligned": "among the most similar" if chosen else "farther from the teacher than those chosen",
        "budget": (
            f"{'in' if chosen else 'not in'} the least similar set of stages whose branches fit into {budget:.0%} of "
            "all branches' parameters"
        ),
    }[rule]
    return f"{'chosen' if chosen else 'left out'}: {seen}; {why}"


def _row(similarity: Similarity, layer: str) -> int:
    """The row of a stage; that of the last layer directly inside it where only those are there."""
    names = [row.name for row in similarity.rows]
    if layer in names:
        return names.index(layer)
    inside = [index for index, name in enumerate(names) if name.startswith(f"{layer}.")]
    if not inside:
        raise SpecError(
            f"The similarity must hold the student's stage {layer!r}, but has {', '.join(names[:5])}"
            f"{', …' if len(names) > 5 else ''}. Compare with --layers stages or blocks."
        )
    return inside[-1]


def _known(error: float) -> float:
    return 0.0 if math.isnan(error) else error


def _undefined(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
