"""Student and teacher, ready for a distillation: loaded, on the device, their classes checked, their stages found."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from cka_probe.advice import advice, wrong_size
from cka_probe.distill.branches import StageShape
from cka_probe.distill.methods.method import Side
from cka_probe.dry_runs import traced_subject
from cka_probe.errors import NetworkError, SpecError
from cka_probe.forward import naming_errors, run_network
from cka_probe.hooks import evaluating
from cka_probe.layers import choose_layers, parse_patterns
from cka_probe.models import Subject, load_subject
from cka_probe.trace import DRY_RUN_IMAGES, Trace

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Examined:
    """A subject and what its dry run saw.

    Attributes:
        subject: its network on the device.
        side: its stages.
        blocks: paths of its blocks, in forward order.
    """

    subject: Subject
    side: Side
    blocks: tuple[str, ...]


def with_classes(subject: Subject, classes: int, seed: int) -> Subject:
    """The student with a classifier of so many classes: its own, or a new one from ``seed``.

    Raises:
        SpecError: it has another number of classes and no way to change it.
    """
    found = class_count(subject)
    if found != classes:
        reset: Any = getattr(subject.network, "reset_classifier", None)
        if reset is None:
            raise SpecError(
                f"The student must have {classes} classes, as the data do, but {subject.name!r} has {found}. Give its "
                "factory the number (file.py:factory,num_classes=N)."
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            reset(classes)
        logger.info("The student's classifier of %d classes is replaced by a new one of %d.", found, classes)
    return subject


def frozen(subject: Subject, classes: int) -> Subject:
    """The teacher, its parameters without gradients.

    Raises:
        SpecError: its number of classes is not that of the data.
    """
    found = class_count(subject)
    if found != classes:
        raise SpecError(
            f"The teacher must have the {classes} classes of the data, but {subject.name!r} has {found}. Fine-tune it "
            f"first: cka-probe distill --method none --student {subject.source['spec']} --data DATA --out DIR."
        )
    subject.network.requires_grad_(False)
    return subject


def check_teacher(name: str, top1: float, classes: int, part: str) -> None:
    """Raise a SpecError where a teacher does not clearly beat chance."""
    floor = min(2 / classes, (1 + 1 / classes) / 2)
    if top1 < floor:
        raise SpecError(
            f"The teacher must name at least {floor:.1%} of the {part} images right (chance is {1 / classes:.1%}), "
            f"but {name!r} names {top1:.1%}. Check its weights, its preprocessing and the order of classes."
        )


def examine(subject: Subject, layers: str, device: torch.device) -> Examined:
    """Move a subject to a device and find its stages by a dry run on noise.

    Args:
        subject: its network moves.
        layers: which layers are its stages: ``"stages"``, or paths with commas.
        device: where it goes.

    Raises:
        SpecError: nothing matches ``layers``.
        NetworkError: the network cannot run, or a stage is neither a map nor tokens.
    """
    network, size = subject.network, subject.preprocessing.size
    with naming_errors(f"{subject.name!r} must run on {device}, but to move it there raised"):
        network.to(device)
    noise = torch.rand(DRY_RUN_IMAGES, *size, generator=torch.Generator().manual_seed(0)).to(device)
    with evaluating(network, device, repr(subject.name)):
        traced = traced_subject(subject, noise)
    (stages,) = choose_layers([(subject.name, network, traced)], parse_patterns(layers))
    shapes = tuple(StageShape.of(layer, size[1:]) for layer in stages)
    side = Side(network, stages, shapes, {layer.name: layer for layer in traced.layers}, size[1:])
    return Examined(subject, side, _blocks(subject, traced))


def named_apart(student: Subject, teacher: Subject) -> tuple[Subject, Subject]:
    """The two with names that differ."""
    if student.name != teacher.name:
        return student, teacher
    return replace(student, name=f"{student.name} (student)"), replace(teacher, name=f"{teacher.name} (teacher)")


def load(spec: str, role: str, image_size: int | None) -> Subject:
    """The subject that a spec names, said in the log; its images of another size where one is given."""
    subject = load_subject(spec)
    if image_size is not None:
        size = (subject.preprocessing.size[0], image_size, image_size)
        subject = replace(subject, preprocessing=replace(subject.preprocessing, size=size))
    logger.info("%s %s: %s", role, subject.source["spec"], subject.source["weights"])
    return subject


def class_count(subject: Subject) -> int:
    """How many classes a subject's logits have.

    Raises:
        NetworkError: it cannot run on images of its size, or puts out no logits (n, classes).
    """
    size = subject.preprocessing.size
    with evaluating(subject.network, torch.device("cpu"), repr(subject.name)):
        try:
            doing = f"{subject.name!r} must run on images of shape {size}, but"
            logits = run_network(subject.network, torch.zeros(2, *size), doing, key=(0,))
        except NetworkError as error:
            raise NetworkError(wrong_size(subject, size) or f"{error}{advice(error.__cause__)}") from error
    if not isinstance(logits, torch.Tensor) or logits.ndim != 2:
        got = f"shape {tuple(logits.shape)}" if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise NetworkError(f"{subject.name!r} must put out logits (n, classes), but put out {got}.")
    return logits.shape[1]


def _blocks(subject: Subject, traced: Trace) -> tuple[str, ...]:
    (blocks,) = choose_layers([(subject.name, subject.network, traced)], ("blocks",))
    return tuple(layer.name for layer in blocks)


def parameters(network: nn.Module) -> int:
    """How many numbers a network learns."""
    return sum(parameter.numel() for parameter in network.parameters())
