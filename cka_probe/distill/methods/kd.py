"""Knowledge distillation (Hinton et al. 2015, arXiv 1503.02531)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from cka_probe.distill.methods.method import Needs, SoftTargetMethod

if TYPE_CHECKING:
    from torch import Tensor

    from cka_probe.distill.methods.loss import MethodLoss, StepInputs


@dataclass(frozen=True, kw_only=True)
class KD(SoftTargetMethod):
    """Cross-entropy, and the divergence from the teacher's softened probabilities."""

    name = "kd"
    summary = "Knowledge distillation (Hinton et al. 2015): the teacher's softened probabilities."
    needs = Needs(logits=True)

    def parts(self, loss: MethodLoss, seen: StepInputs) -> dict[str, Tensor]:
        """See `Method.parts`."""
        from cka_probe.distill.losses import kd_loss

        student, teacher = self.compared(seen.logits), self.compared(seen.teacher_logits)
        kd = kd_loss(student, teacher, temperature=self.temperature)
        return {**super().parts(loss, seen), "kd": self.kd_weight * kd}
