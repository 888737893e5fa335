"""FBT, fuse before transfer: an assistant made of student and teacher (arXiv 2410.12342), as described in the paper."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from numbers import Real
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from cka_probe.distill.methods.by_comparison import ByComparison
from cka_probe.distill.methods.method import LogitMethod, Needs, StageWords
from cka_probe.errors import SpecError
from cka_probe.runtime.ranges import Range, shown

if TYPE_CHECKING:
    from torch import Tensor

    from cka_probe.distill.config import Training
    from cka_probe.distill.methods.loss import MethodLoss, Setting, StepInputs
    from cka_probe.distill.probe import Decision
    from cka_probe.distill.subjects import Examined
    from cka_probe.results.similarity import Similarity

    Gamma = float | tuple[float, ...]
else:  # on the command line
    Gamma = tuple[float, ...]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class FBT(ByComparison, LogitMethod):
    """Cross-entropy, and three arrows: teacher to student, teacher to assistant, assistant to student.

    The assistant is the early stages of one network, L2G, and the last stages of the other, with their own modules.
    Each arrow is InfoNCE between the averaged last features and the one-for-all loss between the logits. The source of
    an arrow gets no gradient from it. The paper's program is not public: this is FBT as it is described there.
    """

    name = "fbt"
    summary = (
        "Fuse before transfer (2024): an assistant made of early stages of the one network and late stages of the "
        "other, trained with the student. For any two architectures; --cut auto chooses the stages by CKA."
    )
    needs = Needs(logits=True, student_stages=True, teacher_stages=True)
    least_images = 2
    decider = "--cut"
    networks = ("assistant",)
    arrows: ClassVar[tuple[str, ...]] = ("teacher_student", "teacher_assistant", "assistant_student")
    stage_words = StageWords("the last stage before the cut", "the teacher's stage before its cut", "Cut behind")
    loss_options = (
        "teacher_student_weight", "teacher_assistant_weight", "assistant_student_weight", "feature_weight",
        "kd_weight", "gamma", "temperature",
    )  # fmt: skip

    cut: str = "3"
    """Where to cut the networks: after a stage of four (1, 2 or 3), after a stage of the student and one of the teacher
    (3,2), or auto, where their stages are most similar (experimental)."""

    assistant: Literal["auto", "student-first", "teacher-first"] = "auto"
    """Which network gives the assistant its early stages. auto: the convolutional one; the student if both or none are
    convolutional."""

    teacher_student_weight: Annotated[float, Range()] = 1.0
    """Weight of the student's losses against the teacher."""

    teacher_assistant_weight: Annotated[float, Range()] = 1.0
    """Weight of the assistant's losses against the teacher. With 0, the assistant learns nothing."""

    assistant_student_weight: Annotated[float, Range()] = 1.0
    """Weight of the student's losses against the assistant."""

    feature_weight: Annotated[float, Range()] = 1.0
    """Weight of InfoNCE between the averaged last features, in each of the three."""

    gamma: Annotated[Gamma, Range(1, many=True)] = (1.0,)
    """Target enhancement of the loss between logits, 1 or more: one number, or three (teacher to student, teacher to
    assistant, assistant to student)."""

    enhancement: Literal["code", "paper"] = "code"
    """As for --method ofa."""

    assistant_ce: Annotated[float, Range()] = 0.0
    """Weight of the assistant's cross-entropy with the labels. The paper's ablation implies 0."""

    def __post_init__(self) -> None:
        """As `Options`; one gamma becomes a tuple of one."""
        super().__post_init__()
        if isinstance(self.gamma, Real):
            object.__setattr__(self, "gamma", (self.gamma,))

    def check(self) -> None:
        """As `ByComparison.check`; the cut must be written as one is, and gamma be one number or three."""
        from cka_probe.distill.assistant.cuts import parse_cut

        super().check()
        parse_cut(self.cut)
        if len(self.gammas) != len(self.arrows):
            raise SpecError(f"--gamma must be one number, or {len(self.arrows)}, but is {shown(self.gamma)}.")

    @property
    def gammas(self) -> tuple[float, ...]:
        """One for each of `arrows`."""
        assert isinstance(self.gamma, tuple)
        return self.gamma if len(self.gamma) > 1 else self.gamma * len(self.arrows)

    def decide(
        self, student: Examined, teacher: Examined, training: Training, similarity: Similarity | None, classes: int
    ) -> Decision:
        """See `ByComparison.decide`."""
        from cka_probe.distill.assistant.decision import decide

        return decide(student, teacher, self, similarity)

    def build(self, setting: Setting) -> MethodLoss:
        """See `Method.build`; before the cut is chosen there is no assistant."""
        from cka_probe.distill.assistant.loss import AssistantLoss
        from cka_probe.distill.methods.loss import MethodLoss

        return AssistantLoss(self, setting) if setting.chosen else MethodLoss(self, setting)

    def parts(self, loss: MethodLoss, seen: StepInputs) -> dict[str, Tensor]:
        """See `Method.parts`. An arrow of weight 0 is computed too: data-parallel training needs its parameters."""
        from cka_probe.distill.assistant.loss import AssistantLoss

        parts = super().parts(loss, seen)
        if not isinstance(loss, AssistantLoss):
            between = self.one_for_all("teacher_student", seen.logits, seen.teacher_logits, seen.target)
            parts["teacher_student_logits"] = self.teacher_student_weight * self.kd_weight * between
            return parts
        for arrow, losses in loss.arrows(seen).items():
            weight = getattr(self, f"{arrow}_weight")
            parts[f"{arrow}_features"] = weight * self.feature_weight * losses.features
            parts[f"{arrow}_logits"] = weight * self.kd_weight * losses.logits
        if self.assistant_ce:
            parts["assistant_ce"] = self.assistant_ce * loss.assistant_ce(seen)
        return parts

    def one_for_all(self, arrow: str, logits: Tensor, source: Tensor, target: Tensor) -> Tensor:
        """The one-for-all loss of one of `arrows`: some logits (n, c) towards those of its source."""
        from cka_probe.distill.losses import ofa_loss

        gamma = self.gammas[self.arrows.index(arrow)]
        return ofa_loss(logits, source, target, gamma=gamma, temperature=self.temperature, form=self.enhancement)

    def cautions(self, metrics: Sequence[Mapping[str, Any]], epochs: int) -> list[str]:
        """See `Method.cautions`: an assistant below its student for a fifth of the epochs."""
        window = max(ceil(epochs / 5), 2)
        part = "validation" if metrics and "validation_top1" in metrics[0] else "test"
        scored = [(row.get(f"{part}_top1_assistant"), row[f"{part}_top1"]) for row in metrics[-window:]]
        if len(scored) < window or any(assistant is None or assistant >= student for assistant, student in scored):
            return []
        return [
            "The assistant was less accurate than the student for a fifth of the epochs. An assistant that learns "
            "nothing can harm the student: in the paper, without the teacher's losses on the assistant, the student "
            "falls from 81.61% to 25.57% (Swin-T to ResNet-18 on CIFAR-100). Try another --cut, more epochs, or a "
            "larger --teacher-assistant-weight."
        ]
