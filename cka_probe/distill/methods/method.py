"""The seam between the training loop and a method: what it is told, what it sees of a batch, what it gives back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from torch import Tensor, nn

from cka_probe.activations.stage_shapes import StageShape
from cka_probe.activations.trace import TracedLayer
from cka_probe.distill.config import Training
from cka_probe.distill.losses import classification_loss


@dataclass(frozen=True)
class Needs:
    """What a method asks of the networks; they are checked for it before the training, and for nothing else.

    Attributes:
        logits: those of the teacher, of the classes of the data.
        student_stages: stages of the student that put out maps or tokens.
        teacher_stages: stages of the teacher that do.
        features: the pooled features of the last stage of either network, which may be vectors.
    """

    logits: bool = False
    student_stages: bool = False
    teacher_stages: bool = False
    features: bool = False

    @property
    def layers(self) -> bool:
        """Whether layers of the networks are tapped."""
        return self.student_stages or self.teacher_stages or self.features


@dataclass(frozen=True)
class Side:
    """One of the two networks, as its dry run saw it.

    Attributes:
        name: of the network, for messages.
        network: itself; a method may build on its modules, but trains none of them by that.
        stages: its stages' layers, in forward order; none where it has no layers that can be observed.
        layers: path -> layer, of every layer that can be tapped.
        image_size: (height, width) of its images.
    """

    name: str
    network: nn.Module
    stages: tuple[TracedLayer, ...]
    layers: dict[str, TracedLayer]
    image_size: tuple[int, int]

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
class Seen:
    """One batch, as a method sees it.

    Attributes:
        images: (n, c, h, w) as the student gets them.
        target: (n,) classes, or (n, c) under mixup and cutmix.
        indices: (n,) which training images they are.
        logits: (n, c) float32 of the student.
        taken: the activations of ``Method.student_layers``.
        teacher_logits: (n, c) float32; empty (n, 0) where the method does not need them.
        teacher_taken: the activations of ``Method.teacher_layers``.
    """

    images: Tensor
    target: Tensor
    indices: Tensor
    logits: Tensor
    taken: list[Tensor]
    teacher_logits: Tensor
    teacher_taken: list[Tensor]


class Method(nn.Module):
    """A distillation method: what is trained beside the student, and the parts of the loss.

    Its parameters are trained with the student's and thrown away after it; its buffers are state that checkpoints
    keep. A method is one file with a subclass of this, and one line in `METHODS`.

    Attributes:
        summary: for a list of all methods: its name, its paper, and what it does.
        needs_teacher: whether the loop runs the teacher.
        needs: what it asks of the networks: everything, where it does not say.
        chooses: whether ``--stages`` speaks to it.
        matches: whether each chosen stage is matched with a stage of the teacher, by ``auto`` with any of its blocks.
        classes: of the logits.
        least_images: that the batches of all processes must hold together; more than one where images are related.
        options: of the config, that its own parts of the loss depend on.
        student_layers: activations of the student that it wants.
        teacher_layers: activations of the teacher that it wants.
    """

    summary: ClassVar[str]
    needs_teacher = True
    needs: ClassVar[Needs] = Needs(logits=True, student_stages=True, teacher_stages=True, features=True)
    chooses = False
    matches = False
    least_images = 1
    options: ClassVar[tuple[str, ...]] = ()

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        self.config = setting.config
        self.classes = setting.classes
        self.student_layers: tuple[TracedLayer, ...] = ()
        self.teacher_layers: tuple[TracedLayer, ...] = ()

    def forward(self, seen: Seen) -> dict[str, Tensor]:
        """The parts of the loss, each a scalar with its weight in it; their sum is minimized."""
        return {"ce": self.config.ce_weight * classification_loss(seen.logits, seen.target, self.config.smoothing)}

    def after_update(self, student: nn.Module, done: float) -> None:
        """Called once the optimizer has updated the student: for averages and queues of a method's own.

        Args:
            student: the network.
            done: share of the updates of the whole run, above 0 to 1: for a rate of the method's own.
        """


def feature_weight(config: Training, default: float) -> float:
    """The weight of the feature loss: the user's, else the method's own."""
    return default if config.feature_weight is None else config.feature_weight


def pooled(activation: Tensor, layer: TracedLayer) -> Tensor:
    """(n, d) float32: the class token of an activation where it has one, else its mean over space or tokens."""
    from cka_probe.activations.features import as_features

    return as_features(activation, layer.layout, "cls").float()


def pooled_width(layer: TracedLayer) -> int:
    """The d of `pooled`."""
    shape = layer.shape[1:] if layer.layout.parts > 1 else layer.shape
    return shape[0] if len(shape) >= 3 and not layer.layout.channels_last else shape[-1]


def last_stages(setting: Setting) -> tuple[Sequence[TracedLayer], Sequence[TracedLayer]]:
    """The last stage of the student and of the teacher, for methods that compare pooled features."""
    assert setting.teacher is not None
    return setting.student.stages[-1:], setting.teacher.stages[-1:]
