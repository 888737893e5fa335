"""Correlation congruence (Peng et al. 2019, arXiv 1904.01802)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from cka_probe.distill.methods.method import FeatureMethod, Needs
from cka_probe.runtime.ranges import Range

if TYPE_CHECKING:
    from torch import Tensor

    from cka_probe.distill.methods.loss import MethodLoss, Setting, StepInputs

WIDTH = 128


@dataclass(frozen=True, kw_only=True)
class CC(FeatureMethod):
    """Cross-entropy, and the congruence of the kernels among the embedded features of the batch, of all processes.

    Both networks' pooled features are embedded by a linear layer to 128 dimensions, trained with the student.
    """

    name = "cc"
    summary = "Correlation congruence (Peng et al. 2019): the similarities among the images of a batch."
    needs = Needs(features=True)
    least_images = 2

    feature_weight: Annotated[float, Range()] = 0.02
    """Of the loss between features."""

    def build(self, setting: Setting) -> MethodLoss:
        """See `Method.build`."""
        from torch import nn

        from cka_probe.distill.methods.loss import MethodLoss, last_stages, pooled_width

        student, teacher = last_stages(setting)
        embed = nn.ModuleDict(
            {
                "student": nn.Linear(pooled_width(student[0]), WIDTH),
                "teacher": nn.Linear(pooled_width(teacher[0]), WIDTH),
            }
        )
        return MethodLoss(self, setting, embed, (student, teacher), pools=True)

    def parts(self, loss: MethodLoss, seen: StepInputs) -> dict[str, Tensor]:
        """See `Method.parts`."""
        from cka_probe.distill.losses import cc_loss
        from cka_probe.distill.training.gathering import gathered

        features = zip(("student", "teacher"), loss.pooled(seen), strict=True)
        student, teacher = (gathered(loss.trained[side](x).float()) for side, x in features)
        return {**super().parts(loss, seen), "cc": self.feature_weight * cc_loss(student, teacher)}
