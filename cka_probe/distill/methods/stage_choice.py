"""Options of the methods that take part at stages of the student: which stages, and how they are chosen."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from cka_probe.distill.methods.by_comparison import ByComparison
from cka_probe.distill.methods.method import StageWords
from cka_probe.errors import SpecError
from cka_probe.runtime.ranges import COUNT, Range, shown

if TYPE_CHECKING:
    from cka_probe.distill.config import Training
    from cka_probe.distill.probe import Decision
    from cka_probe.distill.subjects import Examined
    from cka_probe.results.similarity import Similarity


@dataclass(frozen=True, kw_only=True)
class StageChoice(ByComparison):
    """A method that takes part at stages of the student.

    Attributes:
        matches: each chosen stage is matched with a stage of the teacher, by ``auto`` with any of its blocks.
    """

    matches: ClassVar[bool] = False
    decider = "--stages"
    stage_words = StageWords("got an exit branch", "the layer of the teacher that it was most similar to at the choice")

    stages: str = "all"
    """Stages of the student to use: all, none, last, numbers such as 1,3,4, or auto (by CKA; in our study of branches,
    no better than the last stages)."""

    rule: Literal["budget", "divergent", "aligned"] = "budget"
    """How auto chooses: the least similar stages within --branch-budget, or the --branches least or most similar."""

    branches: Annotated[int, COUNT] = 2
    """Number of stages for the rules divergent and aligned."""

    branch_budget: Annotated[float, Range(0, 1, open_low=True)] = 0.6
    """Largest share of the parameters of all exit branches, for the rule budget."""

    def check(self) -> None:
        """As `ByComparison.check`; the stages must be written as they are."""
        super().check()
        if not re.fullmatch(r"all|none|last|auto|[0-9]{1,4}( *, *[0-9]{1,4})*", self.stages):
            raise SpecError(
                f"--stages must be all, none, last, auto, or numbers such as 1,3,4, but is {shown(self.stages)}."
            )

    def decide(
        self, student: Examined, teacher: Examined, training: Training, similarity: Similarity | None, classes: int
    ) -> Decision:
        """See `ByComparison.decide`."""
        from cka_probe.distill.probe import decide

        return decide(student, teacher, self, similarity, classes=classes, batch_size=training.batch_size)

    def in_words(self, choice: dict[str, Any], measure: str) -> str:
        """The stages that were chosen, as a sentence for the log.

        Args:
            choice: for stages.yaml.
            measure: of the scores.
        """
        from cka_probe.distill.stages import exit_points

        if self.matches:
            return exit_points("Matched layers", choice, measure)
        costs = choice["parameters"]
        return exit_points("Exit branches", choice, measure, costs["chosen_branches"] / costs["all_branches"])
