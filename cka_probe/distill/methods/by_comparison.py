"""Options of the methods that may decide something by a comparison of student and teacher."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from cka_probe.distill.methods.method import Method
from cka_probe.errors import SpecError
from cka_probe.runtime.paths import usable_path
from cka_probe.runtime.ranges import Range, shown

if TYPE_CHECKING:
    from cka_probe.distill.config import Training
    from cka_probe.distill.probe import Decision
    from cka_probe.distill.subjects import Examined
    from cka_probe.results.similarity import Similarity


@dataclass(frozen=True, kw_only=True)
class ByComparison(Method):
    """A method that takes part at stages of the student, which a comparison with the teacher may choose.

    Attributes:
        decider: the flag whose value ``auto`` leaves the choice to the comparison.
    """

    decider: ClassVar[str]

    probe_epochs: Annotated[int, Range(0, 10**6, whole=True)] = 1
    """Epochs before auto measures and the chosen stages join."""

    similarity: str | None = None
    """A finished comparison (its folder or npz file) that auto decides from, at once."""

    @property
    def chosen_by(self) -> str:
        """The value of the flag that decides: ``auto``, or what it names."""
        value: str = getattr(self, self.decider.removeprefix("--"))
        return value

    @property
    def measures_stages(self) -> bool:
        """Whether the stages are chosen by a comparison that is made during the training."""
        return self.chosen_by == "auto" and not self.similarity

    def check(self) -> None:
        """As `Options.check`; the comparison must be there."""
        super().check()
        if self.similarity is not None and self.chosen_by != "auto":
            raise SpecError(f"--similarity is for {self.decider} auto, but {self.decider} is {shown(self.chosen_by)}.")
        if self.similarity is not None and not os.path.exists(usable_path(self.similarity, "--similarity")):
            raise SpecError(f"The comparison {shown(self.similarity)} does not exist (--similarity).")

    def check_with(self, training: Training) -> None:
        """As `Method.check_with`; the choice must leave epochs to train in."""
        super().check_with(training)
        if self.measures_stages and self.probe_epochs >= training.epochs:
            raise SpecError(
                f"{self.decider} auto needs epochs after its --probe-epochs, but {self.probe_epochs} of "
                f"{training.epochs} are."
            )

    def decide(
        self, student: Examined, teacher: Examined, training: Training, similarity: Similarity | None, classes: int
    ) -> Decision:
        """The stages that the training goes on with.

        Args:
            student: its stages.
            teacher: its layers.
            training: all options.
            similarity: of layers of the student with those of the teacher; needed for ``auto``.
            classes: of the logits.
        """
        raise NotImplementedError
