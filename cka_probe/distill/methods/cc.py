"""Correlation congruence (Peng et al. 2019, arXiv 1904.01802)."""

from __future__ import annotations

from torch import Tensor, nn

from cka_probe.distill.losses import cc_loss
from cka_probe.distill.methods.method import (
    Method,
    Needs,
    Seen,
    Setting,
    feature_weight,
    last_stages,
    pooled,
    pooled_width,
)
from cka_probe.distill.training.gathering import gathered

WIDTH = 128


class CC(Method):
    """Cross-entropy, and the congruence of the kernels among the embedded features of the batch, of all processes.

    Both networks' pooled features are embedded by a linear layer to 128 dimensions, trained with the student.
    """

    summary = "Correlation congruence (Peng et al. 2019): the similarities among the images of a batch."
    options = ("feature_weight",)
    least_images = 2

    needs = Needs(features=True)

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.student_layers, self.teacher_layers = map(tuple, last_stages(setting))
        self._weight = feature_weight(setting.config, 0.02)
        self.embed = nn.Linear(pooled_width(self.student_layers[0]), WIDTH)
        self.embed_teacher = nn.Linear(pooled_width(self.teacher_layers[0]), WIDTH)

    def forward(self, seen: Seen) -> dict[str, Tensor]:
        """See `Method.forward`."""
        student = self.embed(pooled(seen.taken[0], self.student_layers[0])).float()
        teacher = self.embed_teacher(pooled(seen.teacher_taken[0], self.teacher_layers[0])).float()
        return {**super().forward(seen), "cc": self._weight * cc_loss(gathered(student), gathered(teacher))}
