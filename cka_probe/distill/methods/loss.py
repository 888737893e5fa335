"""The seam between the training loop and a method: what it is built from, what it sees of a batch, what it gives."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn

from cka_probe.activations.stage_shapes import StageShape
from cka_probe.activations.trace import TracedLayer

if TYPE_CHECKING:
    from cka_probe.distill.config import Training
    from cka_probe.distill.methods.method import Method
    from cka_probe.distill.outputs.words import PicturedWords
    from cka_probe.images.sources.source import ImageSource
    from cka_probe.networks.models import Subject

LayersOfBoth = tuple[tuple[TracedLayer, ...], tuple[TracedLayer, ...]]
"""Layers of the student, and of the teacher."""


@dataclass(frozen=True)
class Side:
    """One of the two networks, as its dry run saw it.

    Attributes:
        name: of the network, for messages.
        network: itself; a method may build on its modules, but trains none of them by that.
        stages: its stages' layers, in forward order; none where it has no layers that can be observed.
        layers: path -> layer, of every layer that can be tapped, in forward order.
        blocks: names of its blocks, or where it has none of all its layers, in forward order.
        input_size: (channels, height, width) of its images.
    """

    name: str
    network: nn.Module
    stages: tuple[TracedLayer, ...]
    layers: dict[str, TracedLayer]
    blocks: tuple[str, ...]
    input_size: tuple[int, int, int]

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of its images."""
        return self.input_size[1:]

    @cached_property
    def shapes(self) -> tuple[StageShape, ...]:
        """Of the stages' activations, for a method that needs stages."""
        return tuple(self.shape_of(layer) for layer in self.stages)

    def shape_of(self, layer: TracedLayer) -> StageShape:
        """Of an activation that is a map or tokens."""
        shape = StageShape.of(layer, self.image_size)
        assert shape is not None, f"{layer.name} puts out neither a map nor tokens"
        return shape

    @property
    def width(self) -> int:
        """Channels of the last stage, or the length of its vectors; 0 without one."""
        return pooled_width(self.stages[-1]) if self.stages else 0


@dataclass(frozen=True)
class Setting:
    """What a method is built from.

    Attributes:
        config: all options.
        classes: of the logits.
        images: in the training set.
        student: the network that is trained.
        teacher: None where there is none.
        chosen: numbers of the student's stages, from 1; none before ``auto`` has decided.
        matches: for each chosen stage, a layer of the teacher.
    """

    config: Training
    classes: int
    images: int
    student: Side
    teacher: Side | None
    chosen: tuple[int, ...] = ()
    matches: tuple[str, ...] = ()


@dataclass(frozen=True)
class StepInputs:
    """One batch, as a method sees it.

    Attributes:
        images: (n, c, h, w) as the student gets them.
        target: (n,) classes, or (n, c) under mixup and cutmix.
        indices: (n,) which training images they are.
        logits: (n, c) float32 of the student.
        taken: the activations of `MethodLoss.student_layers`.
        teacher_logits: (n, c) float32; empty where the method does not need them.
        teacher_taken: what `MethodLoss.of_teacher` makes of the activations of `MethodLoss.teacher_layers`.
        crops_taken: as ``taken``, for each kind of crops; one, of the images themselves, where there are no crops. With
            crops, images, logits and ``taken`` are those of the first kind.
    """

    images: Tensor
    target: Tensor
    indices: Tensor
    logits: Tensor
    taken: list[Tensor]
    teacher_logits: Tensor
    teacher_taken: list[Tensor]
    crops_taken: tuple[list[Tensor], ...] = ()


@dataclass(frozen=True)
class Scored:
    """A network that is neither student nor teacher, and gives logits.

    Attributes:
        network: on the device.
        sees: whose images it sees.
        layers: names of its layers that are compared with those of student and teacher.
    """

    network: nn.Module
    sees: Literal["student", "teacher"]
    layers: tuple[str, ...]


class MethodLoss(nn.Module):
    """What is trained beside the student, and the loss, as one module.

    Its parameters are trained with the student's and thrown away after it; its buffers are state that checkpoints
    keep. A method of an unusual kind has a subclass of its own.

    Args:
        method: gives the parts of the loss.
        setting: what it is built for.
        trained: the modules that the method's `Method.parts` uses.
        layers: of the student and of the teacher, whose activations the loss sees.
        pools: whether the loss sees the teacher's activations pooled.

    Attributes:
        student_layers: the first of these.
        teacher_layers: the second.
        smoothing: of labels.
        classes: of the logits.
    """

    def __init__(
        self,
        method: Method,
        setting: Setting,
        trained: nn.Module | None = None,
        layers: LayersOfBoth = ((), ()),
        *,
        pools: bool = False,
    ) -> None:
        super().__init__()
        self.method, self.setting, self._pools = method, setting, pools
        self.smoothing, self.classes = setting.config.smoothing, setting.classes
        self.student_layers, self.teacher_layers = layers
        self.trained: Any = trained if trained is not None else nn.Module()

    def forward(self, seen: StepInputs) -> dict[str, Tensor]:
        """The parts of the loss, each a scalar with its weight in it; their sum is minimized."""
        return self.method.parts(self, seen)

    def pooled(self, seen: StepInputs) -> tuple[Tensor, Tensor]:
        """The pooled features of the first layer of the student, (n, d₁), and of the teacher, (n, d₂)."""
        return pooled(seen.taken[0], self.student_layers[0]), seen.teacher_taken[0]

    def of_teacher(self, taken: list[Tensor]) -> list[Tensor]:
        """What the loss needs of the teacher's activations, without gradients: as `teacher_features` names it.

        Where all of it is of shape (n, d), ``--teacher-cache`` can store it.
        """
        if not self._pools:
            return taken
        return [pooled(activation, layer) for activation, layer in zip(taken, self.teacher_layers, strict=True)]

    @property
    def teacher_features(self) -> list[str]:
        """Names of what `of_teacher` gives: two methods use the same name for the same values alone."""
        return [f"pooled {layer.name}" if self._pools else layer.name for layer in self.teacher_layers]

    def pictured(self, teacher: Subject, images: ImageSource) -> PicturedWords | None:
        """What the report shows of visual words, once the training is over; None for a method without.

        Args:
            teacher: on its device.
            images: to take patches from.
        """
        return None

    def before_step(self, student: nn.Module, done: float) -> None:
        """Called before the teacher runs on the first step of an update: for a teacher that follows the student.

        Args:
            student: the network.
            done: share of the updates of the whole run that are done, from 0 to below 1.
        """

    @property
    def scored(self) -> dict[str, Scored]:
        """Further networks whose accuracy each epoch measures, by the names of their columns."""
        return {}

    def release(self) -> None:
        """Take hooks of the method's own off the networks."""

    def after_update(self, student: nn.Module, done: float) -> None:
        """Called once the optimizer has updated the student: for averages and queues of a method's own.

        Args:
            student: the network.
            done: share of the updates of the whole run, above 0 to 1: for a rate of the method's own.
        """


def pooled(activation: Tensor, layer: TracedLayer) -> Tensor:
    """(n, d) float32: the class token of an activation where it has one, else its mean over space or tokens."""
    from cka_probe.activations.features import as_features

    return as_features(activation, layer.layout, "cls").float()


def pooled_width(layer: TracedLayer) -> int:
    """The d of `pooled`."""
    shape = layer.shape[1:] if layer.layout.parts > 1 else layer.shape
    return shape[0] if len(shape) >= 3 and not layer.layout.channels_last else shape[-1]


def last_stages(setting: Setting) -> LayersOfBoth:
    """The last stage of the student and of the teacher, for methods that compare pooled features."""
    assert setting.teacher is not None
    return setting.student.stages[-1:], setting.teacher.stages[-1:]
