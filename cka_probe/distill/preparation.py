"""What a training is made from, loaded and checked: images, student, teacher, and how each sees a batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cka_probe.distill.config import Training
from cka_probe.distill.methods import METHODS, Setting
from cka_probe.distill.pipeline import TrainingImages, Views, augmentation
from cka_probe.distill.subjects import Examined, examine, frozen, load, with_classes
from cka_probe.distill.taps import changed_in_place
from cka_probe.errors import DataError, SpecError
from cka_probe.images.dark import warn_if_dark
from cka_probe.images.parts import Parts, open_parts
from cka_probe.world import World


@dataclass(frozen=True)
class Prepared:
    """What a training is made from.

    Attributes:
        parts: training and held-out images.
        images: the training images in batches.
        views: from a batch to what each network sees.
        student: on the device, with its stages.
        teacher: the same, frozen; None where the method needs none.
        setting: for the method, no stage chosen yet.
        copies: whether the student writes over activations of its stages.
    """

    parts: Parts
    images: TrainingImages
    views: Views
    student: Examined
    teacher: Examined | None
    setting: Setting
    copies: bool


def prepare(config: Training, world: World) -> Prepared:
    """Load and check everything that a config names.

    Raises:
        CkaProbeError: of one kind or another, where the caller can mend it.
    """
    method = METHODS[config.method]
    if config.batch_size * world.size < method.least_images:
        raise SpecError(
            f"--method {config.method} relates the images of a batch, which must hold {method.least_images} at least, "
            f"but --batch-size is {config.batch_size}."
        )
    needs_teacher = method.needs_teacher
    own = load(config.student, "Student", config.image_size)
    other = load(config.teacher, "Teacher", config.image_size) if needs_teacher and config.teacher else None
    parts = open_parts(
        config.data, data_dir=config.data_dir, download=config.download, full_scale=config.full_scale,
        memory=config.image_cache,
    )  # fmt: skip
    warn_if_dark(parts.train)
    classes = len(parts.classes)
    student = examine(with_classes(own, classes, config.seed), config.student_layers, world.device)
    teacher = examine(frozen(other, classes), config.teacher_layers, world.device) if other is not None else None
    seen = student.subject.preprocessing
    taught = teacher.subject.preprocessing if teacher is not None else seen
    if taught.size[0] != seen.size[0]:
        raise SpecError(
            f"Student and teacher must see the same channels, but the student sees {seen.size[0]} and the teacher "
            f"{taught.size[0]} (in_chans=N after a model's name)."
        )
    largest = max(seen.size, taught.size, key=lambda size: size[1] * size[2])
    augmentation(config, largest)  # an error in its options comes now, not with the first batch
    images = TrainingImages(parts.train, config, largest, world.rank, world.size)
    if not images.steps:
        raise DataError(
            f"The training images must fill a batch of {config.batch_size * world.size * config.accumulate}, but "
            f"{parts.train.name} holds {len(parts.train)}. Make --batch-size or --accumulate smaller."
        )
    network = student.subject.network
    zeros = torch.zeros(2, *seen.size, device=world.device)
    copies = changed_in_place(network, student.side.stages, zeros, student.subject.name)
    if config.channels_last:
        for side in (student, teacher):
            if side is not None:
                side.subject.network.to(memory_format=torch.channels_last)
    return Prepared(
        parts=parts,
        images=images,
        views=Views(config, classes, seen, taught, world.device),
        student=student,
        teacher=teacher,
        setting=Setting(config, classes, len(parts.train), student.side, teacher.side if teacher else None),
        copies=copies,
    )
