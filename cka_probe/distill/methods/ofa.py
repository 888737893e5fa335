"""One-for-all distillation: exit branches at stages of the student (Hao et al. 2023, arXiv 2310.19444)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from cka_probe.distill.branches import exit_branch
from cka_probe.distill.losses import ofa_loss
from cka_probe.distill.methods.method import Method, Needs, Seen, Setting
from cka_probe.distill.stages import branch_weights
from cka_probe.errors import SpecError


class OFA(Method):
    """Cross-entropy, and the one-for-all loss of the final logits and of a branch a chosen stage."""

    summary = (
        "One-for-all distillation (Hao et al. 2023): exit branches at stages of the student, taught by the "
        "teacher's logits. For any two architectures; --stages auto chooses the stages by CKA."
    )
    options = ("gamma", "temperature", "kd_weight", "branch_weight")

    needs = Needs(logits=True, student_stages=True)
    chooses = True

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        config, student = setting.config, setting.student
        assert setting.teacher is not None
        total = len(student.stages)
        gammas = spread_gamma(config.gamma, total)
        self._stages = setting.chosen
        self._gammas = [gammas[stage - 1] for stage in setting.chosen]
        self._final_gamma = gammas[-1]
        self._weights = (
            branch_weights(setting.chosen, total, config.branch_weights, config.branch_weight) if setting.chosen else []
        )
        self.student_layers = tuple(student.stages[stage - 1] for stage in setting.chosen)
        self.branches = nn.ModuleList(
            exit_branch(
                student.shapes[stage - 1],
                total - stage,
                student_width=student.width,
                teacher_width=setting.teacher.width,
                classes=setting.classes,
            )
            for stage in setting.chosen
        )

    def forward(self, seen: Seen) -> dict[str, Tensor]:
        """See `Method.forward`."""
        parts = super().forward(seen)
        parts["ofa"] = self.config.kd_weight * self._loss(seen.logits, seen, self._final_gamma)
        for index, branch in enumerate(self.branches):
            loss = self._loss(branch(seen.taken[index]).float(), seen, self._gammas[index])
            parts[f"branch_{self._stages[index]}"] = self._weights[index] * loss
        return parts

    def _loss(self, logits: Tensor, seen: Seen, gamma: float) -> Tensor:
        return ofa_loss(
            logits,
            seen.teacher_logits,
            seen.target,
            gamma=gamma,
            temperature=self.config.temperature,
            form=self.config.enhancement,
        )


def spread_gamma(gamma: Sequence[float], stages: int) -> tuple[float, ...]:
    """One γ a stage and one for the final logits, from as many numbers or from one.

    >>> spread_gamma([1.2], 2)
    (1.2, 1.2, 1.2)
    """
    if len(gamma) not in (1, stages + 1):
        raise SpecError(
            f"--gamma must be one number, or {stages + 1}: one for each of the {stages} stages and one for the final "
            f"logits, but got {list(gamma)}."
        )
    return tuple(gamma) if len(gamma) > 1 else (gamma[0],) * (stages + 1)
