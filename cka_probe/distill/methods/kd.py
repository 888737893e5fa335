"""Knowledge distillation (Hinton et al. 2015, arXiv 1503.02531)."""

from __future__ import annotations

from torch import Tensor

from cka_probe.distill.losses import kd_loss
from cka_probe.distill.methods.method import Method, Needs, Seen


class KD(Method):
    """Cross-entropy, and the divergence from the teacher's softened probabilities."""

    summary = "Knowledge distillation (Hinton et al. 2015): the teacher's softened probabilities."
    options = ("temperature", "kd_weight")

    needs = Needs(logits=True)

    def forward(self, seen: Seen) -> dict[str, Tensor]:
        """See `Method.forward`."""
        kd = kd_loss(seen.logits, seen.teacher_logits, temperature=self.config.temperature)
        return {**super().forward(seen), "kd": self.config.kd_weight * kd}
