"""One-for-all distillation: exit branches at stages of the student (Hao et al. 2023, arXiv 2310.19444)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf
from numbers import Real
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cka_probe.distill.methods.method import Needs, SoftTargetMethod
from cka_probe.distill.methods.stage_choice import StageChoice
from cka_probe.errors import SpecError
from cka_probe.runtime.ranges import Range, shown

if TYPE_CHECKING:
    from torch import Tensor

    from cka_probe.distill.methods.loss import MethodLoss, Setting, StepInputs

    Gamma = float | tuple[float, ...]
else:  # on the command line
    Gamma = tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class OFA(StageChoice, SoftTargetMethod):
    """Cross-entropy, and the one-for-all loss of the final logits and of an exit branch at each chosen stage."""

    name = "ofa"
    summary = (
        "One-for-all distillation (Hao et al. 2023): exit branches at stages of the student, taught by the "
        "teacher's logits. For any two architectures; --stages auto chooses fewer stages by CKA."
    )
    needs = Needs(logits=True, student_stages=True)
    loss_options = ("gamma", "temperature", "kd_weight", "branch_weight")

    gamma: Annotated[Gamma, Range(1, many=True)] = (1.0,)
    """Target enhancement, 1 or more: one number, or one per stage and one for the final logits."""

    enhancement: Literal["code", "paper"] = "code"
    """code: all classes are raised to gamma, as in the authors' program. paper: the target class alone."""

    branch_weight: Annotated[float, Range()] = 1.0
    """Weight of one branch, if all stages have one."""

    branch_weighting: Literal["shared", "absolute"] = "shared"
    """shared: the weights have the same sum however many branches there are. absolute: each branch has
    --branch-weight."""

    branch_weights: Annotated[tuple[float, ...], Range(many=True, optional=True)] = ()
    """Relative weight of each stage's branch. Default: equal."""

    def __post_init__(self) -> None:
        """As `Options`; one gamma becomes a tuple of one."""
        super().__post_init__()
        if isinstance(self.gamma, Real):
            object.__setattr__(self, "gamma", (self.gamma,))

    def check(self) -> None:
        """As `StageChoice.check`; the weights must have a sum."""
        super().check()
        if self.branch_weights and not 0 < sum(self.branch_weights) < inf:
            raise SpecError(
                f"--branch-weights must hold a number above 0, and have a finite sum, but is "
                f"{shown(self.branch_weights)}."
            )

    def build(self, setting: Setting) -> MethodLoss:
        """See `Method.build`."""
        from torch import nn

        from cka_probe.distill.branches import exit_branch
        from cka_probe.distill.methods.loss import MethodLoss

        student = setting.student
        assert setting.teacher is not None
        total = len(student.stages)
        spread_gamma(self.gamma, total)  # wrong numbers are refused before the training
        self._weights(setting)
        branches = nn.ModuleList(
            exit_branch(
                student.shapes[stage - 1],
                total - stage,
                student_width=student.width,
                teacher_width=setting.teacher.width,
                classes=setting.classes,
            )
            for stage in setting.chosen
        )
        return MethodLoss(self, setting, branches, (tuple(student.stages[stage - 1] for stage in setting.chosen), ()))

    def cautions(self, metrics: Sequence[Mapping[str, Any]], epochs: int) -> list[str]:
        """See `Method.cautions`."""
        if self.stages != "auto":
            return []
        return [
            "The stages were chosen by CKA (--stages auto). In our study of small students, that was no better than "
            "taking the last stages, and branches at all stages were best on average."
        ]

    def parts(self, loss: MethodLoss, seen: StepInputs) -> dict[str, Tensor]:
        """See `Method.parts`."""
        setting = loss.setting
        gammas = spread_gamma(self.gamma, len(setting.student.stages))
        parts = super().parts(loss, seen)
        parts["ofa"] = self.kd_weight * self._one_for_all(seen.logits, seen, gammas[-1])
        weights = self._weights(setting)
        for stage, weight, branch, taken in zip(setting.chosen, weights, loss.trained, seen.taken, strict=True):
            parts[f"branch_{stage}"] = weight * self._one_for_all(branch(taken).float(), seen, gammas[stage - 1])
        return parts

    def _one_for_all(self, logits: Tensor, seen: StepInputs, gamma: float) -> Tensor:
        from cka_probe.distill.losses import ofa_loss

        return ofa_loss(
            self.compared(logits),
            self.compared(seen.teacher_logits),
            seen.target,
            gamma=gamma,
            temperature=self.temperature,
            form=self.enhancement,
        )

    def _weights(self, setting: Setting) -> list[float]:
        from cka_probe.distill.stages import branch_weights

        total = len(setting.student.stages)
        if not setting.chosen:
            return []
        absolute = self.branch_weighting == "absolute"
        return branch_weights(setting.chosen, total, self.branch_weights, self.branch_weight, absolute=absolute)


def spread_gamma(gamma: float | Sequence[float], stages: int) -> tuple[float, ...]:
    """One γ a stage and one for the final logits, from as many numbers or from one.

    >>> spread_gamma([1.2], 2)
    (1.2, 1.2, 1.2)
    """
    if not isinstance(gamma, Sequence):
        gamma = (gamma,)
    if len(gamma) not in (1, stages + 1):
        raise SpecError(
            f"--gamma must be one number, or {stages + 1}: one for each of the {stages} stages and one for the final "
            f"logits, but got {list(gamma)}."
        )
    return tuple(gamma) if len(gamma) > 1 else (gamma[0],) * (stages + 1)
