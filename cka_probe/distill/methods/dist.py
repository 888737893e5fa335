"""Distillation by correlation, DIST (Huang et al. 2022, arXiv 2205.10536), with β and γ 1."""

from __future__ import annotations

from torch import Tensor

from cka_probe.distill.losses import dist_loss
from cka_probe.distill.methods.method import Method, Needs, Seen
from cka_probe.distill.training.gathering import gathered


class DIST(Method):
    """Cross-entropy, and the correlation with the teacher's probabilities, by example and by class of all processes."""

    summary = "DIST (Huang et al. 2022): the correlation with the teacher's probabilities, by image and by class."
    options = ("temperature", "kd_weight")
    least_images = 2

    needs = Needs(logits=True)

    def forward(self, seen: Seen) -> dict[str, Tensor]:
        """See `Method.forward`."""
        student, teacher = gathered(seen.logits), gathered(seen.teacher_logits)
        loss = dist_loss(student, teacher, temperature=self.config.temperature)
        return {**super().forward(seen), "dist": self.config.kd_weight * loss}
