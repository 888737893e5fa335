"""Student and teacher, ready for a distillation: loaded, on the device, their classes checked, their stages found."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from cka_probe.activations.forward import run_network
from cka_probe.activations.hooks import evaluating
from cka_probe.activations.layers import STAGE_FRACTIONS, choose_layers, parse_patterns, select
from cka_probe.activations.logits import log_further_outputs, logits_in, logits_of
from cka_probe.activations.modules import unwrapped
from cka_probe.activations.stage_shapes import StageShape
from cka_probe.activations.trace import DRY_RUN_IMAGES, Trace
from cka_probe.distill.methods.loss import Side
from cka_probe.errors import NetworkError, SpecError
from cka_probe.networks.advice import advice, wrong_size
from cka_probe.networks.models import Subject, load_subject, with_class_count
from cka_probe.networks.weights import ANY_CLASSES
from cka_probe.probing.dry_runs import traced_subject
from cka_probe.runtime.user_code import naming_errors

if TYPE_CHECKING:
    from cka_probe.distill.methods.method import Method, Needs

logger = logging.getLogger(__name__)

_SHOWN = 8


@dataclass(frozen=True)
class Examined:
    """A subject and what its dry run saw.

    Attributes:
        subject: its network on the device.
        side: its stages and blocks.
        candidates: its blocks, or where there is none its layers, that put out maps or tokens.
    """

    subject: Subject
    side: Side
    candidates: tuple[str, ...]


def with_classes(subject: Subject, classes: int, seed: int) -> Subject:
    """The student with a classifier of so many classes: its own, or a new one from ``seed``.

    Raises:
        SpecError: it has another number of classes and no way to change it.
    """
    found = class_count(subject)
    if found == classes:
        return subject
    network = with_class_count(subject, classes, seed)
    changed = replace(subject, network=network) if network is not None else None
    if changed is None or class_count(changed) != classes:
        raise SpecError(
            f"The student must have {classes} classes, as the data do, but {subject.name!r} has {found}, and neither a "
            "reset_classifier(num_classes) that changes it nor a factory with the argument num_classes. Give it one of "
            "these, or build it for the data."
        )
    logger.info("The student's classifier of %d classes is replaced by a new one of %d.", found, classes)
    return changed


def frozen(subject: Subject, classes: int, method: Method, known: Mapping[str, type[Method]]) -> tuple[Subject, bool]:
    """The teacher, its parameters without gradients, and whether its logits are of the classes of the data.

    Args:
        subject: the teacher.
        classes: of the data.
        method: some need the teacher's logits.
        known: all methods, of which a message names those that do not.

    Raises:
        SpecError: the method needs them, and its number of classes is not that of the data.
        NetworkError: it cannot run, or puts out no logits where they are needed.
    """
    needed = method.needs.logits
    output = _output(subject)
    found = class_count(subject, output) if needed or _is_logits(output) else None
    if needed and found != classes:
        raise SpecError(
            f"--method {method.name} needs a teacher with the {classes} classes of the data, but {subject.name!r} has "
            f"{found}. Train its head first: cka-probe distill --method none --train head --student "
            f"{subject.source.get('spec', 'SPEC')} --data DATA --out DIR. Or use a method that needs no logits of the "
            f"teacher: {_methods(known, lambda needs: not needs.logits and needs.layers)}."
        )
    if found != classes and method.uses_labels:
        logger.info(
            "The teacher's accuracy is not measured: %s, and the data have %d classes. --method %s uses its features "
            "alone.", "it puts out no logits" if found is None else f"it has {found} classes", classes, method.name,
        )  # fmt: skip
    for weight in subject.network.parameters():  # a TorchScript module has no requires_grad_
        weight.requires_grad_(False)
    return subject, found == classes


def check_trainable(student: Subject) -> None:
    """Raise a NetworkError where nothing of a student can be trained."""
    weights = list(student.network.parameters())
    if not any(weight.requires_grad for weight in weights):
        why = "all of its parameters are frozen (requires_grad is False)" if weights else "it has no parameters"
        cure = "Leave them, or those to train, unfrozen in its factory." if weights else "Name another --student."
        raise NetworkError(f"The student {student.name!r} cannot be trained: {why}. {cure}")


def check_stages(examined: Examined, option: str, method: Method, known: Mapping[str, type[Method]]) -> None:
    """Raise a SpecError where a stage is neither a map nor tokens, and the method needs that.

    Args:
        examined: student or teacher.
        option: that names its stages: ``--student-layers`` or ``--teacher-layers``.
        method: that needs it.
        known: all methods, of which a message names those that do not.
    """
    side = examined.side
    wrong = [layer for layer in side.stages if StageShape.of(layer, side.image_size) is None]
    if side.stages and not wrong:
        return
    if not examined.candidates:
        none = _methods(known, lambda needs: not (needs.student_stages or needs.teacher_stages))
        raise SpecError(
            f"--method {method.name} needs stages that put out feature maps or tokens, but no layer of {side.name!r} "
            f"does. These methods need none: {none}."
        )
    shown = examined.candidates[:_SHOWN]
    more = f" and {len(examined.candidates) - _SHOWN} more" if len(examined.candidates) > _SHOWN else ""
    what = f"{wrong[0].name!r} ({wrong[0].kind}, output of shape {wrong[0].shape}) of " if wrong else "no layer of "
    raise SpecError(
        f"--method {method.name} needs stages that put out feature maps or tokens that fill a grid, but "
        f"{what}{side.name!r} does not. Candidates: {', '.join(shown)}{more}. "
        f"Use {option} {','.join(shown[-len(STAGE_FRACTIONS) :])}."
    )


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
        NetworkError: the network cannot run.
    """
    network, size, name = subject.network, subject.preprocessing.size, subject.name
    with naming_errors(f"{name!r} must run on {device}, but to move it there raised"):
        network.to(device)
    noise = torch.rand(DRY_RUN_IMAGES, *size, generator=torch.Generator().manual_seed(0)).to(device)
    traced = Trace((), {}, image_size=size[1:])
    if not isinstance(unwrapped(network), torch.jit.ScriptModule):  # whose layers cannot be observed
        with evaluating(network, device, repr(name)):
            traced = traced_subject(subject, noise)
    found = select(network, traced, ("stages", "blocks"))
    named = parse_patterns(layers)
    stages = found["stages"] if named == ("stages",) else choose_layers([(name, network, traced)], named)[0]
    inside = [layer for layer in traced.layers if layer.activation.module]
    blocks = found["blocks"] or tuple(inside)
    with_positions, others = (
        tuple(layer.name for layer in which if StageShape.of(layer, size[1:])) for which in (blocks, inside)
    )
    return Examined(
        subject,
        Side(
            name,
            network,
            stages or blocks[-1:],
            {layer.name: layer for layer in traced.layers},
            tuple(layer.name for layer in blocks),
            size,
        ),
        with_positions or others,
    )


def leaves_parameters(student: Examined, device: torch.device) -> bool:
    """Whether some of a student's parameters have no part in its logits, as those of auxiliary heads.

    Args:
        student: whose network runs on noise, in evaluation mode.
        device: of the network.
    """
    network, name = student.subject.network, student.subject.name
    with evaluating(network, device, repr(name)), torch.enable_grad():
        images = torch.rand(2, *student.subject.preprocessing.size, generator=torch.Generator().manual_seed(0))
        output = run_network(network, images.to(device), f"{name!r} must run on images, but", key=(0,))
        logits = logits_of(output, len(images), name, "in its dry run")
    used, seen, nodes = set(), set(), [logits.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        used.add(getattr(node, "variable", None))
        nodes.extend(following for following, _ in node.next_functions)
    return not used.issuperset(weight for weight in network.parameters() if weight.requires_grad)


def named_apart(student: Subject, teacher: Subject) -> tuple[Subject, Subject]:
    """The two with names that differ."""
    if student.name != teacher.name:
        return student, teacher
    return replace(student, name=f"{student.name} (student)"), replace(teacher, name=f"{teacher.name} (teacher)")


def load(model: str | Subject, role: str, image_size: int | None) -> Subject:
    """The subject that a spec names, said in the log; ``image_size`` is that of its images, unless the spec says it.

    Args:
        model: a spec; or a subject, whose network is copied, so that it is given back as it came.
        role: Student or Teacher.
        image_size: height and width; None for its own.
    """
    if isinstance(model, Subject):
        subject = replace(model, network=copy_of(model))
        subject.network.eval()
    else:
        # `with_classes` gives a student those of the data
        subject = load_subject(model, classes=ANY_CLASSES if role == "Student" else None)
    if role == "Student" and any(weight.dtype == torch.float16 for weight in subject.network.parameters()):
        logger.warning("%s has weights of float16, too coarse for updates: it learns in float32.", subject.name)
        subject.network.float()
    if image_size is not None and "view_size" not in subject.source:
        size = (subject.preprocessing.size[0], image_size, image_size)
        subject = replace(subject, preprocessing=replace(subject.preprocessing, size=size))
    labels = subject.source.get("spec", subject.name), subject.source.get("weights", "a network handed over")
    logger.info("%s %s: %s", role, *labels)
    return subject


def copy_of(subject: Subject) -> nn.Module:
    """A copy of a subject's network.

    Raises:
        NetworkError: it cannot be copied.
    """
    with naming_errors(f"{subject.name!r} must be a network that can be copied, but copy.deepcopy raised"):
        return deepcopy(subject.network)


def class_count(subject: Subject, output: Any = None) -> int:
    """How many classes a subject's logits have.

    Args:
        subject: the network.
        output: what it puts out for two images, if that is known.

    Raises:
        NetworkError: it cannot run on images of its size, or puts out no logits (n, classes).
    """
    output = _output(subject) if output is None else output
    logits = logits_of(output, 2, subject.name, "in its dry run")
    log_further_outputs(subject.network, output, subject.name)
    return logits.shape[1]


def _output(subject: Subject) -> Any:
    """What a subject puts out for two images of its size."""
    size = subject.preprocessing.size
    with evaluating(subject.network, torch.device("cpu"), repr(subject.name)):
        try:
            doing = f"{subject.name!r} must run on images of shape {size}, but"
            return run_network(subject.network, torch.zeros(2, *size), doing, key=(0,))
        except NetworkError as error:
            raise NetworkError(wrong_size(subject, size) or f"{error}{advice(error.__cause__)}") from error


def _is_logits(output: Any) -> bool:
    logits = logits_in(output)
    return isinstance(logits, torch.Tensor) and logits.ndim == 2


def _methods(known: Mapping[str, type[Method]], fit: Callable[[Needs], bool]) -> str:
    """The names of the methods whose needs fit."""
    return ", ".join(name for name, method in known.items() if fit(method.needs))


def parameters(network: nn.Module) -> int:
    """How many numbers a network learns."""
    return sum(parameter.numel() for parameter in network.parameters())
