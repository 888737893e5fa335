"""Relational knowledge distillation (Park et al. 2019, arXiv 1904.05068)."""

from __future__ import annotations

from torch import Tensor

from cka_probe.distill.losses import rkd_angle_loss, rkd_distance_loss
from cka_probe.distill.methods.method import Method, Needs, Seen, Setting, feature_weight, last_stages, pooled
from cka_probe.distill.training.gathering import gathered, position


class RKD(Method):
    """Cross-entropy, and the distances and angles among the batch's pooled features, angles at twice the weight.

    Both relate the images of all processes. A process takes the angles at its own images alone, as those of n images
    are n³; their mean over the processes is that of all.
    """

    summary = (
        "Relational knowledge distillation (Park et al. 2019): the distances and angles among the images of a batch."
    )
    options = ("feature_weight",)
    least_images = 3  # of two, all relative distances and angles are 1

    needs = Needs(features=True)

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.student_layers, self.teacher_layers = map(tuple, last_stages(setting))
        self._weight = feature_weight(setting.config, 25.0)

    def forward(self, seen: Seen) -> dict[str, Tensor]:
        """See `Method.forward`."""
        own, (rank, _) = len(seen.target), position()
        student = gathered(pooled(seen.taken[0], self.student_layers[0]))
        teacher = gathered(pooled(seen.teacher_taken[0], self.teacher_layers[0]))
        vertices = slice(rank * own, (rank + 1) * own)
        return {
            **super().forward(seen),
            "distance": self._weight * rkd_distance_loss(student, teacher),
            "angle": 2 * self._weight * rkd_angle_loss(student, teacher, vertices),
        }
