"""FitNets' hints (Romero et al. 2015, arXiv 1412.6550), between stages of any two networks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from cka_probe.distill.methods.method import FeatureMethod, Needs, StageWords
from cka_probe.distill.methods.stage_choice import StageChoice
from cka_probe.runtime.ranges import Range

if TYPE_CHECKING:
    from torch import Tensor

    from cka_probe.distill.methods.loss import MethodLoss, Setting, StepInputs


@dataclass(frozen=True, kw_only=True)
class FitNet(StageChoice, FeatureMethod):
    """Cross-entropy, and the squared distance of projected stages of the student to layers of the teacher.

    Tokens are laid on their grid, both sides are pooled to the smaller grid of the two, and a 1 × 1 convolution takes
    the student's channels to the teacher's.
    """

    name = "fitnet"
    summary = (
        "FitNets (Romero et al. 2015): projected features of the student against those of the teacher. "
        "--stages auto matches layers by CKA."
    )
    needs = Needs(student_stages=True, teacher_stages=True)
    matches = True
    stage_words = StageWords("matched", "the layer of the teacher that it was matched with", "Matched")

    feature_weight: Annotated[float, Range()] = 1.0
    """Of the squared distance at each chosen stage."""

    def build(self, setting: Setting) -> MethodLoss:
        """See `Method.build`."""
        from torch import nn

        from cka_probe.distill.methods.loss import MethodLoss

        assert setting.teacher is not None
        student, teacher = setting.student, setting.teacher
        layers = (
            tuple(student.stages[stage - 1] for stage in setting.chosen),
            tuple(teacher.layers[name] for name in setting.matches),
        )
        projections = nn.ModuleList(
            nn.Conv2d(student.shape_of(own).channels, teacher.shape_of(other).channels, 1)
            for own, other in zip(*layers, strict=True)
        )
        return MethodLoss(self, setting, projections, layers)

    def parts(self, loss: MethodLoss, seen: StepInputs) -> dict[str, Tensor]:
        """See `Method.parts`."""
        from torch.nn import functional as F

        from cka_probe.activations.stage_shapes import as_map

        parts, setting = super().parts(loss, seen), loss.setting
        assert setting.teacher is not None
        for index, (stage, projection) in enumerate(zip(setting.chosen, loss.trained, strict=True)):
            own = setting.student.shapes[stage - 1]
            other = setting.teacher.shape_of(loss.teacher_layers[index])
            grid = (min(own.grid[0], other.grid[0]), min(own.grid[1], other.grid[1]))
            student = F.adaptive_avg_pool2d(as_map(seen.taken[index], own), grid)
            teacher = F.adaptive_avg_pool2d(as_map(seen.teacher_taken[index], other).float(), grid)
            parts[f"hint_{stage}"] = self.feature_weight * F.mse_loss(projection(student).float(), teacher)
        return parts
