"""Relational knowledge distillation (Park et al. 2019, arXiv 1904.05068)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from cka_probe.distill.methods.method import FeatureMethod, Needs
from cka_probe.runtime.ranges import Range

if TYPE_CHECKING:
    from torch import Tensor

    from cka_probe.distill.methods.loss import MethodLoss, Setting, StepInputs


@dataclass(frozen=True, kw_only=True)
class RKD(FeatureMethod):
    """Cross-entropy, and the distances and angles among the batch's pooled features, angles at twice the weight.

    Both relate the images of all processes. A process takes the angles at its own images alone, as those of n images
    are n³; their mean over the processes is that of all.
    """

    name = "rkd"
    summary = (
        "Relational knowledge distillation (Park et al. 2019): the distances and angles among the images of a batch."
    )
    needs = Needs(features=True)
    least_images = 3  # of two, all relative distances and angles are 1

    feature_weight: Annotated[float, Range()] = 25.0
    """Of the loss of distances; the loss of angles has twice that."""

    def build(self, setting: Setting) -> MethodLoss:
        """See `Method.build`."""
        from cka_probe.distill.methods.loss import MethodLoss, last_stages

        return MethodLoss(self, setting, layers=last_stages(setting), pools=True)

    def parts(self, loss: MethodLoss, seen: StepInputs) -> dict[str, Tensor]:
        """See `Method.parts`."""
        from cka_probe.distill.losses import rkd_angle_loss, rkd_distance_loss
        from cka_probe.distill.training.gathering import gathered, position

        own, (rank, _) = len(seen.target), position()
        student, teacher = (gathered(features) for features in loss.pooled(seen))
        vertices = slice(rank * own, (rank + 1) * own)
        return {
            **super().parts(loss, seen),
            "distance": self.feature_weight * rkd_distance_loss(student, teacher),
            "angle": 2 * self.feature_weight * rkd_angle_loss(student, teacher, vertices),
        }
