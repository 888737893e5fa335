"""Which levels of a foreign teacher make the words: as ``--levels`` says, or by CKA."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from cka_probe.distill.bags.levels import levels_of
from cka_probe.distill.probe import Decision, names_in
from cka_probe.distill.subjects import Examined, parameters
from cka_probe.errors import SpecError
from cka_probe.results.similarity import Similarity

if TYPE_CHECKING:
    from cka_probe.distill.methods.visual_words.words import Words


def decide(student: Examined, teacher: Examined, method: Words, similarity: Similarity | None) -> Decision:
    """The levels that ``--levels`` names, or the one whose CKA with the student's last stage is the largest.

    Args:
        student: its last stage predicts the bags.
        teacher: its stages.
        method: its options.
        similarity: of layers of the student with those of the teacher; needed for ``auto``.

    Raises:
        SpecError: a level is not there, or its map is too small; the similarity does not hold the layers.
    """
    own = student.side.stages[-1].name
    if method.levels == "auto":
        assert similarity is not None, "auto decides from a similarity"
        candidates = [layer.name for layer in levels_of(teacher.side, "all", "--teacher-layers")]
        name, score = _most_similar(similarity.between(*names_in(similarity, student, teacher)), own, candidates)
        chosen: tuple[str, ...] = (name,)
        reason = f"predicts the words of {name}, of the largest CKA with it: {score}"
    else:
        chosen = tuple(layer.name for layer in levels_of(teacher.side, method.levels, "--teacher-layers"))
        reason = f"predicts the words of {' and '.join(chosen)}"
    last = len(student.side.stages)
    record = {
        "rule": f"--levels {method.levels}",
        "chosen": [last],
        "pairs": [[own, level] for level in chosen],
        "parameters": {"student": parameters(student.subject.network)},
        "stages": [
            {
                "stage": number,
                "layer": layer.name,
                "chosen": number == last,
                "reason": reason if number == last else "has no part in it",
            }
            for number, layer in enumerate(student.side.stages, 1)
        ],
    }
    return Decision((last,), chosen, record)


def _most_similar(block: Similarity, own: str, candidates: list[str]) -> tuple[str, str]:
    """The candidate with the largest similarity, the deeper of equals, and the value with its standard error."""
    rows, cols = ([layer.name for layer in layers] for layers in (block.rows, block.cols))
    missing = [name for name in (own, *candidates) if name not in {*rows, *cols}]
    if own not in rows or missing:
        raise SpecError(
            f"The comparison must hold the student's stage {own!r} and the teacher's {', '.join(candidates)}, but "
            f"lacks {', '.join(missing) or own}. Compare with --layers stages."
        )
    row = rows.index(own)
    values = {name: float(block.values[row, cols.index(name)]) for name in candidates}
    best = max(reversed(candidates), key=lambda name: -math.inf if np.isnan(values[name]) else values[name])
    error = float(block.std_error[row, cols.index(best)])
    return best, f"{values[best]:.3f}" + (f" ± {error:.3f}" if math.isfinite(error) else "")
