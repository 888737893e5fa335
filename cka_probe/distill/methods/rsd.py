"""Redundancy suppression distillation (Zhang et al. 2025, arXiv 2507.21844)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from cka_probe.distill.methods.method import FeatureMethod, Needs
from cka_probe.errors import SpecError
from cka_probe.runtime.ranges import Range

if TYPE_CHECKING:
    from torch import Tensor, nn

    from cka_probe.distill.config import Training
    from cka_probe.distill.methods.loss import MethodLoss, Setting, StepInputs


@dataclass(frozen=True, kw_only=True)
class RSD(FeatureMethod):
    """Cross-entropy, and the distance of the cross-correlation of student and teacher from the identity.

    A projector, trained with the student, takes the student's pooled features to the width of the teacher's. As
    published, the cross-correlation is that of one process's batch.
    """

    name = "rsd"
    summary = (
        "Redundancy suppression (Zhang et al. 2025): each pooled feature of the teacher is predicted by one of "
        "the student's projected features, and by no other."
    )
    needs = Needs(features=True)
    loss_options = ("feature_weight", "kappa")

    feature_weight: Annotated[float, Range()] = 0.1
    """Weight of the distance from the identity."""

    kappa: Annotated[float, Range()] = 0.01
    """Weight of the off-diagonal entries; those on the diagonal have weight 1."""

    def check_with(self, training: Training) -> None:
        """As `Method.check_with`; one image has no deviation."""
        super().check_with(training)
        if training.batch_size < 2:
            raise SpecError(
                "--method rsd standardizes features over the batch of a process, which must hold 2 images at least, "
                f"but --batch-size is {training.batch_size}. Use --batch-size 2 or more."
            )

    def build(self, setting: Setting) -> MethodLoss:
        """See `Method.build`."""
        from cka_probe.distill.methods.loss import MethodLoss, last_stages, pooled_width

        student, teacher = last_stages(setting)
        projector = _projector(pooled_width(student[0]), pooled_width(teacher[0]))
        return MethodLoss(self, setting, projector, (student, teacher), pools=True)

    def parts(self, loss: MethodLoss, seen: StepInputs) -> dict[str, Tensor]:
        """See `Method.parts`."""
        from cka_probe.distill.losses import rsd_loss

        student, teacher = loss.pooled(seen)
        rsd = rsd_loss(loss.trained(student).float(), teacher, kappa=self.kappa)
        return {**super().parts(loss, seen), "rsd": self.feature_weight * rsd}


def _projector(width: int, teacher_width: int) -> nn.Sequential:
    """Linear to twice the width, batch norm, GELU, linear to the teacher's width; no biases."""
    from torch import nn

    first, last = nn.Linear(width, 2 * width, bias=False), nn.Linear(2 * width, teacher_width, bias=False)
    for layer in (first, last):
        nn.init.trunc_normal_(layer.weight, std=0.02)
    return nn.Sequential(first, nn.BatchNorm1d(2 * width), nn.GELU(), last)
