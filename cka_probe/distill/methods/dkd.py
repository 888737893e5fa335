"""Decoupled knowledge distillation (Zhao et al. 2022, arXiv 2203.08679), with α 1 and β 2."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from cka_probe.distill.methods.method import Needs, SoftTargetMethod

if TYPE_CHECKING:
    from torch import Tensor

    from cka_probe.distill.methods.loss import MethodLoss, StepInputs


@dataclass(frozen=True, kw_only=True)
class DKD(SoftTargetMethod):
    """Cross-entropy, and the divergence of target and non-target classes apart."""

    name = "dkd"
    summary = "Decoupled knowledge distillation (Zhao et al. 2022): the target class and the other classes apart."
    needs = Needs(logits=True)

    def parts(self, loss: MethodLoss, seen: StepInputs) -> dict[str, Tensor]:
        """See `Method.parts`."""
        from cka_probe.distill.losses import dkd_loss

        student, teacher = self.compared(seen.logits), self.compared(seen.teacher_logits)
        dkd = dkd_loss(student, teacher, seen.target, temperature=self.temperature)
        return {**super().parts(loss, seen), "dkd": self.kd_weight * dkd}
