"""What an assistant is made of: which network comes first, and where the two are cut."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch

from cka_probe.distill.assistant.assistant import Part
from cka_probe.distill.assistant.cuts import PAPER_CUT, candidates, choose_cut, cut_stages, reasons
from cka_probe.distill.assistant.kinds import First, direction
from cka_probe.distill.assistant.l2g import LocalToGlobal
from cka_probe.distill.methods.loss import Side
from cka_probe.distill.probe import Decision, names_in
from cka_probe.distill.subjects import Examined, parameters
from cka_probe.results.similarity import Similarity

if TYPE_CHECKING:
    from cka_probe.distill.methods.fbt import FBT

logger = logging.getLogger(__name__)


def first_of(student: Side, teacher: Side, asked: str) -> tuple[First, str]:
    """Which network comes first, and why: as ``--assistant`` says, else by `direction`."""
    if asked == "student-first" or asked == "teacher-first":
        return asked, f"--assistant {asked}"  # type: ignore[return-value]
    return direction(student, teacher)


def parts_of(student: Side, teacher: Side, stages: tuple[int, int], first: First) -> tuple[Part, Part]:
    """The two networks in the order in which the assistant runs them.

    Args:
        student: itself.
        teacher: itself.
        stages: of the student and of the teacher, behind which they are cut.
        first: which comes first.
    """
    own, other = Part(student, stages[0], learns=True), Part(teacher, stages[1], learns=False)
    return (own, other) if first == "student-first" else (other, own)


def _l2g_parameters(first: Part, second: Part) -> int:
    with torch.device("meta"):
        return parameters(LocalToGlobal(first.side.shape_of(first.layer), second.side.shape_of(second.layer)))


def decide(student: Examined, teacher: Examined, method: FBT, similarity: Similarity | None) -> Decision:
    """The cut that ``--cut`` names, or that of the stages that are most similar.

    Args:
        student: its stages.
        teacher: its stages.
        method: its options.
        similarity: of layers of the student with those of the teacher; needed for ``auto``.

    Raises:
        SpecError: a stage is not there.
    """
    own, other = student.side, teacher.side
    counts = len(own.stages), len(other.stages)
    stages, rows, score = cut_stages(method.cut, counts), [], ""
    if stages is None:
        assert similarity is not None, "auto decides from a similarity"
        block = similarity.between(*names_in(similarity, student, teacher))
        found = candidates(block, [layer.name for layer in own.stages], [layer.name for layer in other.stages])
        paper = cut_stages(str(PAPER_CUT), counts)
        assert paper is not None
        best = choose_cut(found, paper)
        stages, rows, score = best.stages, reasons(found, best), f", CKA {best.similarity:.3f}"
    first, why = first_of(own, other, method.assistant)
    before, behind = parts_of(own, other, stages, first)
    logger.info(
        "Assistant: %s up to stage %d (%s), L2G, and %s from stage %d on%s. %s first: %s.",
        before.side.name, before.stage, before.layer.name, behind.side.name, behind.stage + 1, score,
        "The student comes" if first == "student-first" else "The teacher comes", why,
    )  # fmt: skip
    pair = own.stages[stages[0] - 1].name, other.stages[stages[1] - 1].name
    record = {
        "rule": f"--cut {method.cut}",
        "first": first,
        "why_first": why,
        "chosen": [stages[0]],
        "pairs": [list(pair)],
        "parameters": {"student": parameters(own.network), "l2g": _l2g_parameters(before, behind)},
        "candidates": rows,
        "stages": [
            {
                "stage": number,
                "layer": layer.name,
                "chosen": number == stages[0],
                "reason": "before the cut" if number <= stages[0] else "behind the cut",
            }
            for number, layer in enumerate(own.stages, 1)
        ],
    }
    return Decision((stages[0],), (pair[1],), record)
