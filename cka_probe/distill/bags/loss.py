"""The loss of a method with visual words, as the training loop knows losses."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from cka_probe.activations.stage_shapes import as_map
from cka_probe.distill.bags.moving_average import MovingAverage, momentum
from cka_probe.distill.bags.pictured import pictured_words
from cka_probe.distill.methods.loss import MethodLoss, StepInputs
from cka_probe.distill.outputs.words import PicturedWords
from cka_probe.images.sources.source import ImageSource
from cka_probe.networks.models import Subject


class BagLoss(MethodLoss):
    """A loss whose ``trained`` is a `cka_probe.distill.bags.prediction.BagPrediction` of maps of the teacher."""

    def teacher_maps(self, seen: StepInputs) -> list[Tensor]:
        """The activations of the levels as (n, c, h, w)."""
        assert self.setting.teacher is not None
        shapes = [self.setting.teacher.shape_of(layer) for layer in self.teacher_layers]
        return [as_map(taken, shape) for taken, shape in zip(seen.teacher_taken, shapes, strict=True)]

    def pictured(self, teacher: Subject, images: ImageSource) -> PicturedWords | None:
        """See `MethodLoss.pictured`: the words of the last level."""
        words = self.trained.vocabularies[-1].words
        return pictured_words(words, self.teacher_layers[-1], teacher, images, self.setting.config.seed)


class FollowingLoss(BagLoss):
    """The loss of a method whose teacher follows the student; checkpoints keep that teacher.

    Args:
        options: as for `MethodLoss`.
    """

    def __init__(self, *options: Any) -> None:
        super().__init__(*options)
        assert self.setting.teacher is not None
        self.teacher = MovingAverage(self.setting.teacher.network)

    def before_step(self, student: nn.Module, done: float) -> None:
        """See `MethodLoss.before_step`: the teacher moves."""
        self.teacher.follow(student, momentum(done))
