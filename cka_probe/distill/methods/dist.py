"""Distillation by correlation, DIST (Huang et al. 2022, arXiv 2205.10536), with β and γ 1."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from cka_probe.distill.methods.method import LogitMethod, Needs

if TYPE_CHECKING:
    from torch import Tensor

    from cka_probe.distill.methods.loss import MethodLoss, StepInputs


@dataclass(frozen=True, kw_only=True)
class DIST(LogitMethod):
    """Cross-entropy, and the correlation with the teacher's probabilities, by example and by class of all processes."""

    name = "dist"
    summary = "DIST (Huang et al. 2022): the correlation with the teacher's probabilities, by image and by class."
    needs = Needs(logits=True)
    least_images = 2

    def parts(self, loss: MethodLoss, seen: StepInputs) -> dict[str, Tensor]:
        """See `Method.parts`."""
        from cka_probe.distill.losses import dist_loss
        from cka_probe.distill.training.gathering import gathered

        student, teacher = gathered(seen.logits), gathered(seen.teacher_logits)
        dist = dist_loss(student, teacher, temperature=self.temperature)
        return {**super().parts(loss, seen), "dist": self.kd_weight * dist}
