"""Decoupled knowledge distillation (Zhao et al. 2022, arXiv 2203.08679), with α 1 and β 2."""

from __future__ import annotations

from torch import Tensor

from cka_probe.distill.losses import dkd_loss
from cka_probe.distill.methods.method import Method, Needs, Seen


class DKD(Method):
    """Cross-entropy, and the divergence of target and non-target classes apart."""

    summary = "Decoupled knowledge distillation (Zhao et al. 2022): the target class and the other classes apart."
    options = ("temperature", "kd_weight")

    needs = Needs(logits=True)

    def forward(self, seen: Seen) -> dict[str, Tensor]:
        """See `Method.forward`."""
        loss = dkd_loss(seen.logits, seen.teacher_logits, seen.target, temperature=self.config.temperature)
        return {**super().forward(seen), "dkd": self.config.kd_weight * loss}
