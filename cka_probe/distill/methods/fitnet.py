"""FitNets' hints (Romero et al. 2015, arXiv 1412.6550), between stages of any two networks."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from cka_probe.activations.stage_shapes import StageShape
from cka_probe.distill.methods.method import Method, Needs, Seen, Setting, feature_weight


class FitNet(Method):
    """Cross-entropy, and the squared distance of projected stages of the student to layers of the teacher.

    Tokens are laid on their grid, both sides are pooled to the smaller grid of the two, and a 1 × 1 convolution takes
    the student's channels to the teacher's.
    """

    summary = (
        "FitNets (Romero et al. 2015): projected features of the student against those of the teacher. "
        "--stages auto matches layers by CKA."
    )
    options = ("feature_weight",)

    needs = Needs(student_stages=True, teacher_stages=True)
    chooses = True
    matches = True

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        assert setting.teacher is not None
        student, teacher = setting.student, setting.teacher
        self._weight = feature_weight(setting.config, 1.0)
        self._stages = setting.chosen
        self.student_layers = tuple(student.stages[stage - 1] for stage in setting.chosen)
        self.teacher_layers = tuple(teacher.layers[name] for name in setting.matches)
        self._shapes = [student.shapes[stage - 1] for stage in setting.chosen]
        self._teacher_shapes = [teacher.shape_of(layer) for layer in self.teacher_layers]
        self.projections = nn.ModuleList(
            nn.Conv2d(own.channels, other.channels, 1)
            for own, other in zip(self._shapes, self._teacher_shapes, strict=True)
        )

    def forward(self, seen: Seen) -> dict[str, Tensor]:
        """See `Method.forward`."""
        parts = super().forward(seen)
        for index, projection in enumerate(self.projections):
            own, other = self._shapes[index], self._teacher_shapes[index]
            grid = (min(own.grid[0], other.grid[0]), min(own.grid[1], other.grid[1]))
            student = F.adaptive_avg_pool2d(as_map(seen.taken[index], own), grid)
            teacher = F.adaptive_avg_pool2d(as_map(seen.teacher_taken[index], other).float(), grid)
            hint = F.mse_loss(projection(student).float(), teacher)
            parts[f"hint_{self._stages[index]}"] = self._weight * hint
        return parts


def as_map(activation: Tensor, shape: StageShape) -> Tensor:
    """A stage's activation as (n, c, h, w), prefix tokens left out."""
    if shape.kind == "map":
        return activation
    if shape.kind == "map_last":
        return activation.permute(0, 3, 1, 2)
    return activation[:, shape.prefix_tokens :].transpose(1, 2).reshape(-1, shape.channels, *shape.grid)
