"""Behind which stages the two networks of an assistant are cut: as asked for, or where they agree most."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from cka_probe.errors import FeatureError, SpecError
from cka_probe.results.similarity import Similarity
from cka_probe.runtime.ranges import shown

PAPER_CUT = 3
"""Of four stages: the best one in the paper."""

STAGES = 4


@dataclass(frozen=True)
class Candidate:
    """A pair of stages behind which the networks may be cut.

    Attributes:
        stages: of the student and of the teacher, from 1.
        layers: their names.
        similarity: CKA of the two.
        std_error: of it; NaN where the data were one batch.
    """

    stages: tuple[int, int]
    layers: tuple[str, str]
    similarity: float
    std_error: float


def parse_cut(text: str) -> int | tuple[int, int] | None:
    """What ``--cut`` says: a stage of four, a stage of the student and one of the teacher, or None for ``auto``.

    Raises:
        SpecError: it says something else.

    >>> parse_cut("3"), parse_cut("4,3"), parse_cut("auto")
    (3, (4, 3), None)
    """
    if text == "auto":
        return None
    numbers = [int(number) for number in text.split(",")] if re.fullmatch(r"\d{1,4}( *, *\d{1,4})?", text) else []
    if not numbers or min(numbers) < 1 or (len(numbers) == 1 and numbers[0] >= STAGES):
        raise SpecError(
            f"--cut must be auto, 1 to {STAGES - 1} (stages of {STAGES} before the cut), or a stage of the student and "
            f"one of the teacher such as 3,2, but is {shown(text)}."
        )
    return numbers[0] if len(numbers) == 1 else (numbers[0], numbers[1])


def cut_stages(text: str, counts: tuple[int, int]) -> tuple[int, int] | None:
    """The stages of student and teacher behind which ``--cut`` cuts; None for ``auto``.

    One number is of four stages; a network with another number of stages is cut at the same share of its depth.

    Args:
        text: as the user wrote it.
        counts: stages of the student and of the teacher.

    Raises:
        SpecError: it names a stage that is not there, or the last one.

    >>> cut_stages("3", (4, 5)), cut_stages("3,2", (4, 4))
    ((3, 4), (3, 2))
    """
    for role, count in zip(("student", "teacher"), counts, strict=True):
        if count < 2:
            raise SpecError(
                f"--method fbt cuts both networks behind a stage that is not the last, but the {role} has {count} "
                f"stage{'s' if count != 1 else ''}. Name several layers with --{role}-layers."
            )
    cut = parse_cut(text)
    if cut is None:
        return None
    if isinstance(cut, int):
        first, second = (min(max(round(cut * count / STAGES), 1), count - 1) for count in counts)
        return first, second
    for role, stage, count in zip(("student", "teacher"), cut, counts, strict=True):
        if stage >= count:
            raise SpecError(
                f"--cut must name a stage of the {role} from 1 to {count - 1}, as the assistant needs the last one "
                f"behind the cut, but is {shown(text)}."
            )
    return cut


def candidates(similarity: Similarity, student: list[str], teacher: list[str]) -> list[Candidate]:
    """The pairs of stages that ``auto`` chooses from.

    From the second stage on, none the last, and at most one stage of four apart in depth.

    Args:
        similarity: rows are layers of the student, columns those of the teacher.
        student: names of its stages.
        teacher: names of its stages.

    Raises:
        SpecError: a stage is no row or no column.
    """
    rows, cols = ([layer.name for layer in layers] for layers in (similarity.rows, similarity.cols))
    found = []
    for own, other in product(range(1, len(student)), range(1, len(teacher))):
        if (own < 2 and len(student) > 2) or (other < 2 and len(teacher) > 2):
            continue
        if abs(own / len(student) - other / len(teacher)) > 1 / STAGES + 1e-9:
            continue
        layers = student[own - 1], teacher[other - 1]
        for layer, names in zip(layers, (rows, cols), strict=True):
            if layer not in names:
                raise SpecError(
                    f"The similarity must hold the stage {layer!r}, but has {', '.join(names[:5])}"
                    f"{', …' if len(names) > 5 else ''}. Compare with --layers stages."
                )
        at = rows.index(layers[0]), cols.index(layers[1])
        found.append(Candidate((own, other), layers, float(similarity.values[at]), float(similarity.std_error[at])))
    return found


def choose_cut(found: list[Candidate], paper: tuple[int, int]) -> Candidate:
    """The pair of the highest similarity.

    Of those whose similarity is lower by no more than the standard error of the difference, the one nearest to the
    paper's cut.

    Args:
        found: by `candidates`.
        paper: the stages of the paper's cut in the two networks.

    Raises:
        FeatureError: the similarity is defined for none of them.
    """
    known = [candidate for candidate in found if not math.isnan(candidate.similarity)]
    if not known:
        raise FeatureError(
            "The similarity must be defined for one pair of stages at least, but no stage between the first and the "
            "last differs over the images. Check the weights, or name the stages with --cut."
        )
    best = max(known, key=lambda candidate: candidate.similarity)
    equal = [candidate for candidate in known if best.similarity - candidate.similarity <= _error(best, candidate)]
    return min(
        equal,
        key=lambda one: (sum(abs(np.subtract(one.stages, paper))), -one.similarity),
    )


def reasons(found: list[Candidate], chosen: Candidate) -> list[dict[str, Any]]:
    """A row a pair for stages.yaml: its stages, its similarity, and whether and why it was chosen."""
    known = [candidate for candidate in found if not math.isnan(candidate.similarity)]
    best = max(known, key=lambda candidate: candidate.similarity)
    return [
        {
            "stages": list(one.stages),
            "layers": list(one.layers),
            "similarity": None if math.isnan(one.similarity) else one.similarity,
            "std_error": None if math.isnan(one.std_error) else one.std_error,
            "chosen": one is chosen,
            "reason": _reason(one, best, chosen),
        }
        for one in found
    ]


def _reason(one: Candidate, best: Candidate, chosen: Candidate) -> str:
    if math.isnan(one.similarity):
        return "not defined: a stage is constant over the images"
    if one is chosen:
        return "the most similar" if one is best else "the nearest to the paper's cut of those that are equally similar"
    if best.similarity - one.similarity <= _error(best, one):
        return "as similar within the standard errors, but farther from the paper's cut"
    return "less similar"


def _error(one: Candidate, other: Candidate) -> float:
    """Standard error of the difference of two similarities, taken for independent; 0 where it is not known."""
    return math.hypot(*(0.0 if math.isnan(error) else error for error in (one.std_error, other.std_error)))
