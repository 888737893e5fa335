"""Options of the methods that take part at stages of the student: which stages, and how they are chosen."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from cka_probe.distill.methods.method import Method
from cka_probe.errors import SpecError
from cka_probe.runtime.paths import usable_path
from cka_probe.runtime.ranges import COUNT, Range, shown

if TYPE_CHECKING:
    from cka_probe.distill.config import Training


@dataclass(frozen=True, kw_only=True)
class StageChoice(Method):
    """A method that takes part at stages of the student.

    Attributes:
        matches: each chosen stage is matched with a stage of the teacher, by ``auto`` with any of its blocks.
    """

    matches: ClassVar[bool] = False

    stages: str = "all"
    """Stages of the student that take part: all, last, 1,3,4, or auto."""

    rule: Literal["budget", "divergent", "aligned"] = "budget"
    """How auto chooses: the most divergence within --branch-budget, or the --branches least or most similar."""

    branches: Annotated[int, COUNT] = 2
    """Stages that the rules divergent and aligned choose."""

    branch_budget: Annotated[float, Range(0, 1, open_low=True)] = 0.6
    """Share of the parameters of all exit branches that the rule budget may spend."""

    probe_epochs: Annotated[int, Range(0, 10**6, whole=True)] = 1
    """Epochs before auto measures and the chosen stages join."""

    similarity: str | None = None
    """A finished comparison (its folder or npz file) that auto decides from, at once."""

    @property
    def measures_stages(self) -> bool:
        """Whether the stages are chosen by a comparison that is made during the training."""
        return self.stages == "auto" and not self.similarity

    def check(self) -> None:
        """As `Options.check`; the stages must be written as they are, and the comparison be there."""
        super().check()
        if self.similarity is not None and self.stages != "auto":
            raise SpecError(f"--similarity is for --stages auto, but the stages are {shown(self.stages)}.")
        if not re.fullmatch(r"all|last|auto|[0-9]{1,4}( *, *[0-9]{1,4})*", self.stages):
            raise SpecError(f"--stages must be all, last, auto, or numbers such as 1,3,4, but is {shown(self.stages)}.")
        if self.similarity is not None and not os.path.exists(usable_path(self.similarity, "--similarity")):
            raise SpecError(f"The comparison {shown(self.similarity)} does not exist (--similarity).")

    def check_with(self, training: Training) -> None:
        """As `Method.check_with`; the choice must leave epochs to train in."""
        super().check_with(training)
        if self.measures_stages and self.probe_epochs >= training.epochs:
            raise SpecError(
                f"--stages auto needs epochs after its --probe-epochs, but {self.probe_epochs} of {training.epochs} "
                "are."
            )

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
