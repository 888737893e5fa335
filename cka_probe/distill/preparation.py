"""What a training is made from, loaded and checked: images, student, teacher, and how each sees a batch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from cka_probe.activations.taps import changed_in_place
from cka_probe.distill.config import Training
from cka_probe.distill.evaluation.score import Accuracy
from cka_probe.distill.methods import METHODS
from cka_probe.distill.methods.by_comparison import ByComparison
from cka_probe.distill.methods.loss import Setting
from cka_probe.distill.subjects import (
    Examined,
    check_stages,
    check_trainable,
    class_count,
    copy_of,
    examine,
    frozen,
    leaves_parameters,
    load,
    with_classes,
)
from cka_probe.distill.training.pipeline import Batch, CropViews, TrainingImages, Views, augmentation, check_channels
from cka_probe.errors import DataError, SpecError
from cka_probe.images.broken import Search, describe_broken
from cka_probe.images.dark import warn_if_dark
from cka_probe.images.parts import Parts, open_parts
from cka_probe.images.sources.source import ImageSource
from cka_probe.networks.models import Subject
from cka_probe.runtime.world import World

logger = logging.getLogger(__name__)


class TrainingBatches(Protocol):
    """The batches of an epoch: of images, or of features."""

    @property
    def steps(self) -> int: ...

    def epoch(self, epoch: int, *, first: int = 0, pin: bool = False) -> Iterator[Batch]: ...


@dataclass(frozen=True)
class Prepared:
    """What a training is made from.

    Attributes:
        parts: training, validation and test images.
        images: the training images in batches.
        views: from a batch to what each network sees: the student images, or of a method with crops each kind of them.
        student: on the device, with its stages.
        teacher: the same, frozen, or a copy of the student that follows it; None where the method needs none.
        setting: for the method, no stage chosen yet.
        copies: whether the student writes over activations of its stages.
        scores_teacher: whether the teacher's logits are of the classes of the data.
        leaves_parameters: whether some of the student's parameters have no part in its logits; looked at for several
            processes alone.
        trained: the part of the student that runs on what `views` gives; all of it where None.
        compared: the network that the student is compared with, layer by layer: the teacher or another one; None
            without either.
        accuracy: of the student, or an average of it, on images, without running all of it; None where that is not so.
    """

    parts: Parts
    images: TrainingBatches
    views: Callable[[Batch], tuple[Any, Callable[[], Tensor], Tensor]]
    student: Examined
    teacher: Examined | None
    setting: Setting
    copies: bool
    scores_teacher: bool
    leaves_parameters: bool
    trained: nn.Module | None = None
    compared: Examined | None = None
    accuracy: Callable[[nn.Module, ImageSource], Accuracy | None] | None = None


def prepare(config: Training, world: World, networks: Mapping[str, Subject] | None = None) -> Prepared:
    """Load and check everything that a config names.

    Args:
        config: all options.
        world: the processes.
        networks: the student or the teacher, where they are there already.

    Raises:
        CkaProbeError: an argument is wrong; the message says what to change.
    """
    method = config.method
    if config.batch_size * world.size < method.least_images:
        raise SpecError(
            f"--method {method.name} relates the images of a batch, which must hold {method.least_images} at least, "
            f"but --batch-size is {config.batch_size}."
        )
    student_model, teacher_model = (
        (networks or {}).get(role, spec) for role, spec in (("student", config.student), ("teacher", config.teacher))
    )
    assert student_model is not None
    own = load(student_model, "Student", config.image_size)
    other = load(teacher_model, "Teacher", config.image_size) if method.needs_teacher and teacher_model else None
    parts = open_parts(
        config.data, validation=config.validation, seed=config.seed, data_dir=config.data_dir,
        download=config.download, full_scale=config.full_scale, memory=config.image_cache,
        skip_broken=Search(world, config.workers) if config.skip_broken else None, labels=method.uses_labels,
    )  # fmt: skip
    if parts.broken:
        logger.warning(
            "%s. The next readable image takes the place of each in training.", describe_broken(parts.broken)
        )
    if config.patience is not None and parts.validation is None:
        raise SpecError(f"--patience needs validation images, but {parts.train.name} has none to spare.")
    if not len(parts.test) and method.uses_labels:
        raise DataError(
            f"{parts.test.name} must hold an image to report the accuracy on, but holds none: each class has one "
            "image. Add images, or a folder val beside a folder train."
        )
    warn_if_dark(parts.train)
    classes = len(parts.classes) if method.uses_labels else class_count(own)
    own = with_classes(own, classes, config.seed)
    check_trainable(own)
    if method.follows_student:
        if world.size > 1 and world.device.type == "cuda":
            own = replace(own, network=with_shared_batch_norms(own.network))
        other = replace(own, name=f"{own.name} (moving average)", network=copy_of(own))
    student, teacher, scores_teacher = examine(own, config.student_layers, world.device), None, False
    if other is not None:
        if not method.follows_student:
            other, scores_teacher = frozen(other, classes, method, METHODS)
            scores_teacher = scores_teacher and method.uses_labels
        layers = config.student_layers if method.follows_student else config.teacher_layers
        teacher = examine(other, layers, world.device)
    _check_needs(config, student, teacher)
    seen = student.subject.preprocessing
    taught = teacher.subject.preprocessing if teacher is not None else seen
    if taught.size[0] != seen.size[0]:
        raise SpecError(
            f"Student and teacher must see the same channels, but the student sees {seen.size[0]} and the teacher "
            f"{taught.size[0]} (in_chans=N after a model's name)."
        )
    largest = max(seen.size, taught.size, key=lambda size: size[1] * size[2])
    for part in filter(None, (parts.train, parts.validation, parts.test)):  # those that hold images
        for subject in (own, *([other] if other is not None else [])):
            check_channels(subject.name, subject.preprocessing, part)
    augmentation(config, largest)  # an error in its options comes now, not with the first batch
    crops = method.views(student.subject, config)
    images = TrainingImages(parts.train, config, largest, world.rank, world.size, crops=crops)
    if not images.steps:
        raise DataError(
            f"The training images must fill a batch of {config.batch_size * world.size * config.accumulate}, but "
            f"{parts.train.name} holds {len(parts.train)}. Make --batch-size or --accumulate smaller."
        )
    network = student.subject.network
    zeros = torch.zeros(2, *seen.size, device=world.device)
    copies = method.needs.layers and changed_in_place(network, student.side.stages, zeros, own.name)
    if config.channels_last:
        for side in (student, teacher):
            if side is not None:
                side.subject.network.to(memory_format=torch.channels_last)
    return Prepared(
        parts=parts,
        images=images,
        views=CropViews(seen, world.device) if crops else Views(config, classes, seen, taught, world.device),
        student=student,
        teacher=teacher,
        setting=Setting(config, classes, len(parts.train), student.side, teacher.side if teacher else None),
        copies=copies,
        scores_teacher=scores_teacher,
        leaves_parameters=world.size > 1 and (not method.uses_labels or leaves_parameters(student, world.device)),
        compared=_reference(config, world) or teacher,
    )


def with_shared_batch_norms(network: nn.Module) -> nn.Module:
    """The network with batch norms whose statistics are those of all processes; its weights keep their names."""
    from timm.layers import convert_sync_batchnorm

    shared: nn.Module = convert_sync_batchnorm(network)
    return shared


def _reference(config: Training, world: World) -> Examined | None:
    """The further network that a method names, to be compared with the student; None without one."""
    specs = config.method.models
    return examine(load(specs[0], "Reference", config.image_size), "stages", world.device) if specs else None


def _check_needs(config: Training, student: Examined, teacher: Examined | None) -> None:
    """Raise a SpecError where a network lacks the layers that the method needs; log where the two are not compared."""
    method = config.method
    sides = [(student, "--student-layers", method.needs.student_stages)]
    if teacher is not None:
        sides.append((teacher, "--teacher-layers", method.needs.teacher_stages))
    for examined, option, needed in sides:
        if needed:
            check_stages(examined, option, method, METHODS)
        if examined.side.stages or teacher is None:
            continue
        without = f"{examined.side.name!r} has no layers that can be observed"
        if method.needs.features:
            raise SpecError(f"--method {method.name} needs features of both networks, but {without}.")
        if isinstance(method, ByComparison) and method.measures_stages:
            raise SpecError(
                f"{method.decider} auto compares student and teacher, but {without}. Choose the stages yourself "
                f"({method.decider})."
            )
        logger.info("Student and teacher are not compared: %s.", without)
