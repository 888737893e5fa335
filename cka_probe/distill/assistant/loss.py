"""The assistant in training: three arrows between teacher, assistant and student."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from cka_probe.activations.features import as_features
from cka_probe.activations.trace import TracedLayer
from cka_probe.distill.assistant.assistant import Assistant
from cka_probe.distill.assistant.decision import first_of, parts_of
from cka_probe.distill.branches import initialize
from cka_probe.distill.losses import classification_loss, info_nce_loss
from cka_probe.distill.methods.loss import MethodLoss, Scored, Setting, StepInputs
from cka_probe.distill.training.gathering import gathered, position

if TYPE_CHECKING:
    from cka_probe.distill.methods.fbt import FBT

TEMPERATURE, LEAST_TEMPERATURE = 0.07, 0.01
"""Of InfoNCE: where it starts, and where it ends to fall."""


@dataclass(frozen=True)
class Arrow:
    """The losses of one arrow, without weights.

    Attributes:
        features: scalar, InfoNCE between the averaged last features.
        logits: scalar, the one-for-all loss.
    """

    features: Tensor
    logits: Tensor


@dataclass(frozen=True)
class _Outcome:
    """What a network puts out: last features (n, d) of the teacher's width, and logits (n, c)."""

    features: Tensor
    logits: Tensor

    def detached(self) -> _Outcome:
        return _Outcome(self.features.detach(), self.logits.detach())


class AssistantLoss(MethodLoss):
    """What FBT trains beside the student: L2G, a linear layer a network, a temperature an arrow.

    The assistant itself is no part of this module, as its other parameters are those of student and teacher.

    Attributes:
        assistant: built from the two networks.
    """

    assistant: Assistant

    def __init__(self, method: FBT, setting: Setting) -> None:
        student, teacher = setting.student, setting.teacher
        assert teacher is not None
        first, _ = first_of(student, teacher, method.assistant)
        own = setting.chosen[0]
        other = next(number for number, layer in enumerate(teacher.stages, 1) if layer.name == setting.matches[0])
        before, behind = parts_of(student, teacher, (own, other), first)
        assistant = Assistant(before, behind, setting.classes, compiled=setting.config.compile)
        trained = nn.ModuleDict(
            {
                "l2g": assistant.l2g,
                "statistics": assistant.statistics,
                "student": _to_width(student.width, teacher.width),
                "assistant": _to_width(behind.side.width, teacher.width),
            }
        )
        cut = (before.layer,)
        layers = (
            (*(cut if before.learns else ()), student.stages[-1]),
            (*(() if before.learns else cut), teacher.stages[-1]),
        )
        super().__init__(method, setting, trained, layers)
        self._fbt, self._student_first, self._last = method, before.learns, behind.last
        self.__dict__["assistant"] = assistant  # no child: checkpoints and the optimizer know its new parts alone
        self.log_temperatures = nn.Parameter(torch.full((3,), math.log(TEMPERATURE)))
        self._latest: Tensor | None = None

    def arrows(self, seen: StepInputs) -> dict[str, Arrow]:
        """The losses of each arrow by its name, in the order of `cka_probe.distill.methods.fbt.FBT.arrows`."""
        before = (seen.taken if self._student_first else seen.teacher_taken)[0]
        logits, last = self.assistant.from_stage(before)
        own, fused = averaged(seen.taken[-1], self.student_layers[-1]), averaged(last, self._last)
        student = _Outcome(self.trained["student"](own).float(), seen.logits)
        assistant = _Outcome(self.trained["assistant"](fused).float(), logits.float())
        teacher = _Outcome(seen.teacher_taken[-1], seen.teacher_logits)
        self._latest = assistant.logits
        pairs = {
            "teacher_student": (teacher, student),
            "teacher_assistant": (teacher, assistant),
            "assistant_student": (assistant, student),
        }
        return {
            name: self._arrow(name, source.detached(), target, seen.target) for name, (source, target) in pairs.items()
        }

    def of_teacher(self, taken: list[Tensor]) -> list[Tensor]:
        """See `MethodLoss.of_teacher`: the averaged last features, and before them the stage that L2G continues."""
        return [*taken[:-1], averaged(taken[-1], self.teacher_layers[-1])]

    @property
    def teacher_features(self) -> list[str]:
        """See `MethodLoss.teacher_features`."""
        return [*(layer.name for layer in self.teacher_layers[:-1]), f"averaged {self.teacher_layers[-1].name}"]

    def assistant_ce(self, seen: StepInputs) -> Tensor:
        """Cross-entropy of the assistant with the labels, after `arrows`."""
        assert self._latest is not None
        return classification_loss(self._latest, seen.target, self.smoothing)

    def after_update(self, student: nn.Module, done: float) -> None:
        """Keep the temperatures at `LEAST_TEMPERATURE` or above."""
        with torch.no_grad():
            self.log_temperatures.clamp_(min=math.log(LEAST_TEMPERATURE))

    @property
    def scored(self) -> dict[str, Scored]:
        """See `MethodLoss.scored`."""
        sees: Literal["student", "teacher"] = "student" if self._student_first else "teacher"
        return {"assistant": Scored(self.assistant, sees, self.assistant.stages)}

    def release(self) -> None:
        """See `MethodLoss.release`."""
        self.assistant.release()

    def _arrow(self, name: str, source: _Outcome, target: _Outcome, labels: Tensor) -> Arrow:
        rank, _ = position()
        return Arrow(
            info_nce_loss(
                target.features,
                gathered(source.features),
                rank * len(target.features),
                log_temperature=self.log_temperatures[self._fbt.arrows.index(name)],
            ),
            self._fbt.one_for_all(name, target.logits, source.logits, labels),
        )


def averaged(activation: Tensor, layer: TracedLayer) -> Tensor:
    """(n, d) float32: the mean of an activation over its pixels or tokens, class and register tokens left out."""
    return as_features(activation, layer.layout, "mean").float()


def _to_width(width: int, wanted: int) -> nn.Module:
    """A linear layer to the teacher's width; nothing where a network has it."""
    if width == wanted:
        return nn.Identity()
    layer = nn.Linear(width, wanted)
    initialize(layer)
    return layer
